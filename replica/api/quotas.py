"""Quotas and usage over REST."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from replica import wire
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import quotas, usage

routes = Routes("quotas", "How much accounts may hold where, and what they hold.")


class OfAccount(Paging):
    account: Word | None = None


class Held(OfAccount):
    #: An endpoint expression.
    endpoint: Word | None = None
    #: Totals of each account, or of each endpoint.
    by: Literal["account", "endpoint"] | None = None


class HeldSince(OfAccount):
    #: An endpoint expression.
    endpoint: Word | None = None
    since: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


@routes.post("/quotas", "quota.write")
async def put(context: Context, body: wire.NewQuota) -> wire.Quota:
    """Set a quota; the account's quota with the same expression gets the new limit."""
    return await context.write(quotas.put, context.actor, body)


@routes.get("/quotas", "quota.read")
async def list_(context: Context, query: OfAccount) -> wire.Page[wire.Quota]:
    """List quotas with what is used and left."""
    return await context.read(quotas.list_page, account=query.account, cursor=query.cursor, limit=query.limit)


@routes.get("/quotas/{quota}", "quota.read")
async def show(context: Context, quota: int) -> wire.Quota:
    """Show a quota with what is used and left."""
    return await context.read(quotas.get, quota)


@routes.delete("/quotas/{quota}", "quota.write")
async def remove(context: Context, quota: int) -> None:
    """Remove a quota: the limit goes, the data stay."""
    await context.write(quotas.remove, context.actor, quota)


@routes.get("/usage", "quota.read")
async def held(context: Context, query: Held) -> wire.Page[wire.Usage]:
    """Tell what the rules of accounts hold at endpoints, each file once."""
    return await context.read(
        usage.list_page,
        account=query.account,
        where=query.endpoint,
        by=query.by,
        cursor=query.cursor,
        limit=query.limit,
    )


@routes.get("/usage/history", "quota.read")
async def history(context: Context, query: HeldSince) -> wire.Page[wire.UsageThen]:
    """Tell how usage was, the oldest first: a row for each period in which it changed."""
    return await context.read(
        usage.history_page,
        account=query.account,
        where=query.endpoint,
        since=query.since,
        cursor=query.cursor,
        limit=query.limit,
    )
