"""Replicas over REST."""

from __future__ import annotations

from aiohttp import web

from replica import wire
from replica.api.paging import LIMIT_MAX, Paging
from replica.api.routing import Context, Routes
from replica.api.work import Stream
from replica.catalog import endpoints, replicas
from replica.metalink import MEDIA_TYPE, metalink
from rules.errors import Refused
from rules.names import Did

#: Replicas in one Metalink document, which is put together before the first byte is sent.
METALINK_MAX = 10_000

routes = Routes("replicas", "Which file is at which endpoint.")


@routes.post("/replicas", "replica.write", status=201, bulk=True)
async def register(context: Context, body: wire.Registration) -> wire.Registered:
    """Register files that are at an endpoint already: all of them or none."""
    return await context.write(replicas.register, context.actor, body)


@routes.get("/dids/{scope}/{name}/replicas", "replica.read", lines=wire.Replica)
async def locate(context: Context, did: Did, query: Paging) -> wire.Page[wire.Replica] | Stream | web.Response:
    """List the replicas of a file, or of all files in a dataset or container.

    With `Accept: application/x-ndjson` all of them as a stream, one a line; with `Accept: application/metalink4+xml`
    as a Metalink document (RFC 5854), for download tools.
    """
    if context.wants_lines:
        return await context.lines(replicas.stream, did)
    if MEDIA_TYPE in context.request.headers.get("Accept", ""):
        return await _metalink(context, did)
    return await context.read(replicas.locate, did, query.cursor, query.limit)


async def _metalink(context: Context, did: Did) -> web.Response:
    found: list[wire.Replica] = []
    cursor: str | None = None
    while True:
        page = await context.read(replicas.locate, did, cursor, LIMIT_MAX)
        found += page.items
        if len(found) > METALINK_MAX:
            raise Refused(
                f"{did} has more than {METALINK_MAX} replicas, too many for one document",
                hint="ask for a part of it, or use `replica locate --metalink`",
            )
        cursor = page.next
        if cursor is None:
            break
    known: dict[str, wire.Endpoint] = {}
    while True:
        some = await context.read(endpoints.list_page, None, cursor, LIMIT_MAX)
        known |= {endpoint.name: endpoint for endpoint in some.items}
        if (cursor := some.next) is None:
            break
    return web.Response(text="".join(metalink(found, known)), content_type=MEDIA_TYPE, charset="utf-8")
