"""`replica serve`: the API as a process of its own.

Given     the settings.
Returns   an exit code, after SIGTERM or SIGINT.
Promises  listens before the database or the broker is there, and says 503 with the reason until it is; a stop takes no
          new request and lets the begun ones end; hints are sent after each commit and never waited for.
Partner   replica.api.app is what it serves; replica.hints tells the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

from replica import log
from replica.api.app import create_app, start
from replica.collector import settle_in
from replica.config import Settings
from replica.db.engine import Database
from replica.hints import Hints
from rules.errors import Invalid, Refused


def run_serve(settings: Settings) -> int:
    log.configure(settings.log_level)
    if not settings.database_url:
        raise Invalid(
            "no database was named",
            hint="set REPLICA_DATABASE_URL, for example postgresql://replica@127.0.0.1/replica",
            field="database_url",
        )
    hints = Hints(settings.broker_url)
    db = Database(settings.database_url, wake=hints.wake)
    try:
        return asyncio.run(_serve(settings, db))
    finally:
        hints.close()
        db.close()


async def _serve(settings: Settings, db: Database) -> int:
    host, port = settings.listen_address()
    logger = log.get_logger()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    app = create_app(
        db,
        lease_seconds=settings.lease_seconds,
        retry_base_seconds=settings.retry_base_seconds,
        undelete_seconds=settings.undelete_seconds,
        scan_policy=settings.scan_policy(),
    )
    try:
        runner, port = await start(app, host, port)
    except OSError as error:
        raise Refused(
            f"cannot listen on {settings.listen}: {error.strerror or error}",
            hint="another process may have the port; say another one with --listen",
        ) from error
    settle_in()
    logger.info("api.started", url=f"http://{host}:{port}")
    with contextlib.suppress(asyncio.CancelledError):
        await stop.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)  # the next one ends the process where it stands
    logger.info("api.stopping")
    await runner.cleanup()
    logger.info("api.stopped")
    return 0
