"""Replicas over REST."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging
from replica.api.routing import Context, Routes
from replica.api.work import Stream
from replica.catalog import replicas
from rules.names import Did

routes = Routes("replicas", "Which file is at which endpoint.")


@routes.post("/replicas", "replica.write", status=201, bulk=True)
async def register(context: Context, body: wire.Registration) -> wire.Registered:
    """Register files that are at an endpoint already: all of them or none."""
    return await context.write(replicas.register, context.actor, body)


@routes.get("/dids/{scope}/{name}/replicas", "replica.read", lines=wire.Replica)
async def locate(context: Context, did: Did, query: Paging) -> wire.Page[wire.Replica] | Stream:
    """List the replicas of a file, or of all files in a dataset or container.

    With `Accept: application/x-ndjson` all of them as a stream, one a line.
    """
    if context.wants_lines:
        return await context.lines(replicas.stream, did)
    return await context.read(replicas.locate, did, query.cursor, query.limit)
