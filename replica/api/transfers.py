"""Transfers over REST, for people; workers have replica.api.orders."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import transfers
from rules.names import Did

routes = Routes("transfers", "Files on their way to an endpoint.")


class Search(Paging):
    state: Word | None = None
    rule: wire.Count | None = None
    did: Word | None = None
    site: Word | None = None


@routes.get("/transfers", "transfer.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Transfer]:
    """List transfers."""
    return await context.read(
        transfers.list_page,
        state=query.state,
        rule=query.rule,
        did=Did.parse(query.did) if query.did is not None else None,
        site=query.site,
        cursor=query.cursor,
        limit=query.limit,
    )


@routes.get("/transfers/{transfer}", "transfer.read")
async def show(context: Context, transfer: int) -> wire.Transfer:
    """Show a transfer."""
    return await context.read(transfers.get, transfer)


@routes.post("/transfers/{transfer}/cancel", "transfer.write")
async def cancel(context: Context, transfer: int) -> wire.Transfer:
    """Cancel a transfer."""
    return await context.write(transfers.cancel, transfer)


@routes.post("/transfers/{transfer}/retry", "transfer.write")
async def retry(context: Context, transfer: int) -> wire.Transfer:
    """Try a failed or waiting transfer again, at once."""
    return await context.write(transfers.retry, transfer)
