"""DIDs over REST."""

from __future__ import annotations

from typing import Literal

from replica import wire
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import dids
from rules.names import Did

routes = Routes("dids", "Datasets, containers and files, and what is in them.")


class Search(Paging):
    scope: Word
    #: A name in which `*` stands for anything.
    pattern: Word | None = None
    kind: Literal["file", "dataset", "container"] | None = None


@routes.post("/dids", "did.write", status=201)
async def add(context: Context, body: wire.NewDid) -> wire.Did:
    """Add a dataset or a container."""
    return await context.write(dids.add, context.actor, body)


@routes.get("/dids", "did.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Did]:
    """List the DIDs of a scope."""
    return await context.read(
        dids.list_page,
        scope=query.scope,
        pattern=query.pattern,
        kind=query.kind,
        cursor=query.cursor,
        limit=query.limit,
    )


@routes.get("/dids/{scope}/{name}", "did.read")
async def show(context: Context, did: Did) -> wire.Did:
    """Show a DID."""
    return await context.read(dids.get, did)


@routes.patch("/dids/{scope}/{name}", "did.write")
async def change(context: Context, did: Did, body: wire.DidChange) -> wire.Did:
    """Close or reopen a dataset or container."""
    return await context.write(dids.change, did, body)


@routes.get("/dids/{scope}/{name}/contents", "did.read")
async def contents(context: Context, did: Did, query: Paging) -> wire.Page[wire.Did]:
    """List what is attached to a dataset or container."""
    return await context.read(dids.contents, did, query.cursor, query.limit)


@routes.post("/dids/{scope}/{name}/contents", "did.write", status=201, bulk=True)
async def attach(context: Context, did: Did, body: wire.Attachment) -> wire.Attached:
    """Attach files to a dataset, or datasets and containers to a container: all of them or none."""
    return await context.write(dids.attach, did, [Did.parse(text) for text in body.dids])


@routes.delete("/dids/{scope}/{name}/contents", "did.write", bulk=True)
async def detach(context: Context, did: Did, body: wire.Attachment) -> wire.Detached:
    """Detach: all of them or none."""
    return await context.write(dids.detach, did, [Did.parse(text) for text in body.dids])
