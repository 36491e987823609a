"""DIDs over REST."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from replica import wire
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import did_deletion, dids, metadata
from rules.names import Did

routes = Routes("dids", "Datasets, containers and files, and what is in them.")


class Search(Paging):
    scope: Word | None = None
    #: A name in which `*` stands for anything.
    pattern: Word | None = None
    kind: Literal["file", "dataset", "container"] | None = None
    #: A condition on metadata and built-in keys: `datatype = raw and run in 100..200`.
    where: Word | None = None
    #: A key; `-key` for the other direction.
    sort: Annotated[str, msgspec.Meta(max_length=1_000)] | None = None
    #: Those that were deleted, and no others.
    deleted: bool = False


class Showing(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    #: Also when it was deleted.
    deleted: bool = False


@routes.post("/dids", "did.write", status=201)
async def add(context: Context, body: wire.NewDid) -> wire.Did:
    """Add a dataset or a container."""
    return await context.write(dids.add, context.actor, body)


@routes.get("/dids", "did.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Did]:
    """List DIDs, or find those that fulfil a condition."""
    return await context.read(
        dids.list_page,
        scope=query.scope,
        pattern=query.pattern,
        kind=query.kind,
        where=query.where,
        sort=query.sort,
        deleted=query.deleted,
        cursor=query.cursor,
        limit=query.limit,
    )


@routes.get("/dids/{scope}/{name}", "did.read")
async def show(context: Context, did: Did, query: Showing) -> wire.Did:
    """Show a DID."""
    return await context.read(dids.get, did, deleted=query.deleted)


@routes.patch("/dids/{scope}/{name}", "did.write")
async def change(context: Context, did: Did, body: wire.DidChange) -> wire.Did:
    """Close or reopen a dataset or container, make it monotonic; give any DID a lifetime."""
    return await context.write(dids.change, did, body, context.actor)


@routes.delete("/dids/{scope}/{name}", "did.write")
async def delete(context: Context, did: Did) -> wire.Deleted:
    """Delete a DID. For some time it can be had back; its name stays taken for ever."""
    return await _delete(context, [did])


@routes.delete("/dids", "did.write", bulk=True)
async def delete_many(context: Context, body: wire.DidList) -> wire.Deleted:
    """Delete many DIDs: all of them or none."""
    return await _delete(context, [Did.parse(text) for text in body.dids])


async def _delete(context: Context, names: list[Did]) -> wire.Deleted:
    undo_seconds = context.facts.undelete_seconds
    return await context.write(did_deletion.delete, names, context.actor, undo_seconds=undo_seconds)


@routes.post("/dids/undelete", "did.write", bulk=True)
async def undelete(context: Context, body: wire.DidList) -> wire.Undeleted:
    """Have deleted DIDs back: all of them or none."""
    names = [Did.parse(text) for text in body.dids]
    return await context.write(did_deletion.undelete, names, context.actor)


@routes.get("/dids/{scope}/{name}/history", "did.read")
async def history(context: Context, did: Did, query: Paging) -> wire.Page[wire.HistoryEntry]:
    """List what happened to a DID, from the beginning."""
    return await context.read(dids.history_page, did, query.cursor, query.limit)


@routes.get("/dids/{scope}/{name}/metadata", "did.read")
async def show_metadata(context: Context, did: Did) -> wire.Metadata:
    """Show the metadata of a DID."""
    return await context.read(metadata.get, did)


@routes.patch("/dids/{scope}/{name}/metadata", "did.write")
async def change_metadata(context: Context, did: Did, body: wire.MetadataChange) -> wire.Metadata:
    """Set and unset keys of a DID's metadata; the others stay."""
    return await context.write(metadata.change, did, body, context.actor)


@routes.patch("/dids/metadata", "did.write", bulk=True)
async def change_metadata_of_many(context: Context, body: wire.MetadataChanges) -> wire.MetadataChanged:
    """Change the metadata of many DIDs: all of them or none."""
    return await context.write(metadata.change_many, body.changes, context.actor)


@routes.post("/dids/attachments", "did.write", status=201, bulk=True)
async def attach_all(context: Context, body: wire.Attachments) -> wire.Attached:
    """Attach to several parents at once: all of it or nothing."""
    return await context.write(dids.attach_all, body.attachments, context.actor)


@routes.get("/dids/{scope}/{name}/contents", "did.read")
async def contents(context: Context, did: Did, query: Paging) -> wire.Page[wire.Did]:
    """List what is attached to a dataset or container."""
    return await context.read(dids.contents, did, query.cursor, query.limit)


@routes.post("/dids/{scope}/{name}/contents", "did.write", status=201, bulk=True)
async def attach(context: Context, did: Did, body: wire.Attachment) -> wire.Attached:
    """Attach files to a dataset, or datasets and containers to a container: all of them or none."""
    return await context.write(dids.attach, did, [Did.parse(text) for text in body.dids], context.actor)


@routes.delete("/dids/{scope}/{name}/contents", "did.write", bulk=True)
async def detach(context: Context, did: Did, body: wire.Attachment) -> wire.Detached:
    """Detach: all of them or none."""
    return await context.write(dids.detach, did, [Did.parse(text) for text in body.dids], context.actor)
