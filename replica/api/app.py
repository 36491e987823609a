"""The REST service, put together.

Given     a Database and the few settings that matter here.
Returns   `create_app`, an aiohttp application; `start`, the same listening.
Promises  stopping finishes the requests that have begun and waits for their transactions; the database stays open,
          for it belongs to whoever gave it. Nothing is asked of the database before the first request.
Partner   `replica serve` and replica.embedded start it.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from importlib import metadata

import aiohttp.web_response
from aiohttp import web

from replica.api import (
    accounts,
    deletions,
    dids,
    endpoints,
    events,
    integrity,
    limits,
    middleware,
    orders,
    quotas,
    replicas,
    rules,
    scans,
    scopes,
    service,
    sites,
    subscriptions,
    transfers,
    webhooks,
)
from replica.api.routing import BULK_BODY_MAX, Facts, Routes
from replica.api.work import Work
from replica.db.engine import Database
from rules.deletion import UNDELETE_SECONDS
from rules.reconciling import Policy

NOUNS: tuple[Routes, ...] = (
    service.outside,
    service.routes,
    accounts.routes,
    quotas.routes,
    sites.routes,
    endpoints.routes,
    limits.routes,
    scopes.routes,
    dids.routes,
    replicas.routes,
    integrity.routes,
    rules.routes,
    subscriptions.routes,
    transfers.routes,
    deletions.routes,
    scans.routes,
    orders.routes,
    events.routes,
    webhooks.routes,
)

#: How long a stop waits for the requests that have begun.
STOP_SECONDS = 30.0
KEEP_ALIVE_SECONDS = 75.0
#: A longer one gets no problem document but a bare 400: far above the longest name, to say what is wrong with it.
REQUEST_LINE_MAX = 256 * 1024
#: How long the rest of a refused body is read and thrown away, so that its sender gets to hear the refusal.
LINGERING_SECONDS = 3.0

# What aiohttp answers by itself to a malformed request passes no signal of ours; its version is nobody's business.
aiohttp.web_response.SERVER_SOFTWARE = "replica"  # type: ignore[attr-defined]


def create_app(
    db: Database,
    *,
    lease_seconds: float = 120.0,
    retry_base_seconds: float = 30.0,
    undelete_seconds: float = UNDELETE_SECONDS,
    scan_policy: Policy | None = None,
) -> web.Application:
    work = Work(db)
    facts = Facts(lease_seconds, retry_base_seconds, undelete_seconds, scan_policy or Policy())
    app = web.Application(
        middlewares=[middleware.answering, middleware.guard(work, facts)], client_max_size=BULK_BODY_MAX
    )
    app[service.STOPPING] = []
    app[service.DESCRIBED] = service.described(_version(), NOUNS)
    app.on_response_prepare.append(middleware.headers)
    for noun in NOUNS:
        for route in noun.all:
            # By itself, aiohttp takes no segment with a brace in it.
            pattern = route.path.replace("}", ":[^/]+}")
            app.router.add_route(route.method, pattern, route.unguarded)

    async def stopping(app: web.Application) -> None:
        app[service.STOPPING].append(True)
        app[events.FEED].stop()

    async def ending(app: web.Application) -> AsyncIterator[None]:
        yield
        work.close()

    app.on_shutdown.append(stopping)
    app.cleanup_ctx.append(ending)
    app.cleanup_ctx.append(functools.partial(events.feeding, db=db, work=work))
    return app


async def start(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Listening; the port is the one given, or for 0 the one found. `await runner.cleanup()` stops it."""
    runner = web.AppRunner(
        app,
        access_log=None,  # the middleware writes its own line
        handle_signals=False,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        shutdown_timeout=STOP_SECONDS,
        lingering_time=LINGERING_SECONDS,
        max_line_size=REQUEST_LINE_MAX,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner, int(runner.addresses[0][1])


def _version() -> str:
    try:
        return metadata.version("replica-manager")
    except metadata.PackageNotFoundError:
        return "0"
