"""The two processes of unattended work: a site's worker, and control.

Given     the settings.
Returns   an exit code, after SIGTERM or SIGINT.
Promises  work begins before, and goes on without, a broker; a worker never reads the database's URL. A process that no
          longer moves ends itself with 75 for its supervisor to start it anew.
Partner   `replica worker` and `replica control` start these; replica.embedded uses the same parts in one process.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NoReturn

from replica import log
from replica.collector import settle_in
from replica.config import Settings
from replica.hints import CONTROL
from replica.storage.credentials import Credentials
from rules.errors import Invalid
from workers.app import TIMETABLE, USUAL_PACE_SECONDS, Entry, site_queue
from workers.mover import Mover, MoverThread
from workers.runtime import Life, Looper, Report, Watchdog, listening

#: A round, or an event loop, that has not come round for so long never will.
WEDGED_SECONDS = 600.0


def run_worker(settings: Settings) -> int:
    """The worker of one site, until it is told to stop."""
    log.configure(settings.log_level)
    site, server = settings.site, settings.server
    if not site:
        raise Invalid("no site was named", hint="say --site NAME, or set REPLICA_SITE", field="site")
    if not server:
        raise Invalid("no server was named", hint="set REPLICA_SERVER to the URL of the API", field="server")
    # The file itself may come later: whoever enrols the site writes it, and the mover says that it waits for it.
    if settings.token is None and settings.token_file is None:
        raise Invalid(
            "no token was given",
            hint=f"`replica site key {site}` prints one; name the file that holds it by REPLICA_TOKEN_FILE",
            field="token_file",
        )
    for warning in settings.warnings:
        log.get_logger().warning("settings.odd", reason=warning)
    if not settings.roots:
        log.get_logger().warning(
            "settings.odd",
            reason="roots is empty: whatever storage an order names, this worker writes and deletes there",
        )
    thread = MoverThread(mover_of(settings, site, server))
    life = Life()
    with ExitStack() as stack:
        stack.enter_context(life.signals())
        stack.enter_context(listening(site_queue(site), thread.wake))
        thread.start()  # before anything that needs the broker
        Watchdog(lambda: [thread], life, limit_seconds=max(WEDGED_SECONDS, 4 * settings.poll_seconds)).start()
        threading.Thread(target=_check_site, args=(settings, site, server), name="check-site", daemon=True).start()
        stack.enter_context(_hearing(settings.broker_url, (site_queue(site),)))
        settle_in()
        life.wait()
        ended = thread.stop(thread.mover.stop_seconds + 1)
    if not ended:
        leave(life.exit_code)
    return life.exit_code


def leave(exit_code: int) -> NoReturn:
    """End the process although a thread still waits for a disk that does not answer.

    Python would wait for it for ever. All is reported by then, and what the thread holds has no name yet.
    """
    log.get_logger().warning("process.left_a_thread_behind")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def mover_of(settings: Settings, site: str, server: str, **options: Any) -> Mover:
    return Mover(
        server,
        settings.read_token,
        label=site,
        roots=settings.roots,
        sources=settings.sources,
        credentials=Credentials.at(settings.credentials_file),
        concurrency=settings.concurrency,
        poll_seconds=settings.poll_seconds,
        **options,
    )


def run_control(settings: Settings) -> int:
    """Unattended work, until it is told to stop."""
    # Here, not above: a site's worker has neither database nor driver.
    from replica.db.engine import Database
    from replica.hints import Hints

    log.configure(settings.log_level)
    if not settings.database_url:
        raise Invalid(
            "no database was named",
            hint="set REPLICA_DATABASE_URL, for example postgresql://replica@127.0.0.1/replica",
            field="database_url",
        )
    life = Life()
    db = Database(settings.database_url, pool_size=len(TIMETABLE) + 1)
    passes = Passes(db, pace_seconds=settings.control_interval_seconds, settings=settings)
    hints = Hints(settings.broker_url, also=passes.wake)
    db.on_commit = hints.wake
    with ExitStack() as stack:
        stack.callback(db.close)
        stack.callback(hints.close)
        stack.enter_context(life.signals())
        stack.enter_context(listening(CONTROL, passes.wake_all))
        passes.start()
        Watchdog(lambda: passes.loops, life, limit_seconds=WEDGED_SECONDS).start()
        stack.enter_context(_hearing(settings.broker_url, (CONTROL,)))
        settle_in()
        log.get_logger().info("control.started", passes=[entry.name for entry in TIMETABLE])
        life.wait()
        passes.stop(15.0)
        log.get_logger().info("control.stopped")
    return life.exit_code


class Passes:
    """All of the timetable, each pass in a loop of its own."""

    def __init__(self, db: Any, *, pace_seconds: float, settings: Settings | None = None) -> None:
        self._db = db
        self._settings = settings or Settings()
        self._log = log.get_logger()
        self._ready = False
        self._ready_lock = threading.Lock()
        pace = pace_seconds / USUAL_PACE_SECONDS
        self._loops = {
            entry.name: Looper(
                entry.name,
                partial(self._run, entry),
                seconds=entry.seconds * pace,
                back_off_seconds=0.5 * pace,
            )
            for entry in TIMETABLE
        }

    @property
    def loops(self) -> list[Looper]:
        return list(self._loops.values())

    def start(self) -> None:
        for loop in self._loops.values():
            loop.start()

    def wake(self, names: Iterable[str]) -> None:
        """The passes of these names: what a commit of this process asks for."""
        for name in names:
            if name in self._loops:
                self._loops[name].wake()

    def wake_all(self) -> None:
        """All that a hint brings forward: what came over the broker names none."""
        self.wake(entry.name for entry in TIMETABLE if entry.woken_by == CONTROL)

    def stop(self, seconds: float) -> bool:
        """No round begins any more; True when all have ended in time."""
        deadline = time.monotonic() + seconds
        for loop in self.loops:
            loop.stop()
        for loop in self.loops:
            loop.stop(max(0.0, deadline - time.monotonic()))
        return not any(loop.is_alive() for loop in self.loops)

    def _run(self, entry: Entry) -> bool:
        self._check_schema()
        began = time.monotonic()
        given = {name: getattr(self._settings, name) for name in entry.settings}
        report: Report = entry.function()(self._db, **given)
        if report.seen:
            seconds = round(time.monotonic() - began, 3)
            self._log.info("pass.done", name=entry.name, seen=report.seen, done=report.done, seconds=seconds)
        return report.more

    def _check_schema(self) -> None:
        """Nothing is done on a schema of another release; `replica migrate` may be running at this moment."""
        if self._ready:
            return
        from replica.db import schema

        with self._ready_lock:
            if not self._ready:
                schema.check(self._db)
                self._ready = True


@contextlib.contextmanager
def _hearing(broker_url: str | None, queues: tuple[str, ...]) -> Any:
    if not broker_url:
        log.get_logger().info("broker.none", reason="no broker_url: everything is found by looking now and then")
        yield
        return
    from workers.consumer import Consumer

    consumer = Consumer(broker_url, queues)
    consumer.start()
    try:
        yield
    finally:
        consumer.stop(3.0)


def _check_site(settings: Settings, site: str, server: str) -> None:
    """A token for another site would work off that site's orders: say so, loudly, as soon as the server answers."""
    from replica.client import Client
    from rules.errors import ReplicaError

    for _ in range(20):
        try:
            with Client(server, settings.read_token()) as client:
                known = client.whoami()
        except ReplicaError:
            time.sleep(15.0)
            continue
        if known.site != site:
            log.get_logger().error(
                "token.for_another_site",
                site=site,
                token_site=known.site,
                hint=f"the hints come for {site}, the orders for {known.site or 'no site'}: "
                f"`replica site key {site}` prints the token that belongs here",
            )
        return
