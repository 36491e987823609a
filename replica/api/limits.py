"""Limits and shares over REST."""

from __future__ import annotations

from typing import Literal

import msgspec

from replica import wire
from replica.api.paging import Limit
from replica.api.routing import Context, Routes
from replica.catalog import activities, concurrency, limits

routes = Routes("limits", "How much may be in flight at once, and who gets which part of it.")


class WhichNumber(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    kind: Literal["read", "write", "link"]
    #: The endpoint; of a link the one that is written to.
    of: wire.Text
    source: wire.Text | None = None
    limit: Limit = 100


@routes.get("/limits", "endpoint.read")
async def list_(context: Context) -> wire.Limits:
    """List the limits that are set or adapt, and what is in flight under each."""
    return await context.read(limits.list_all)


@routes.patch("/limits", "endpoint.write")
async def set_(context: Context, body: wire.LimitChange) -> wire.Limit:
    """Limit what is in flight from or to an endpoint, on a link, for an activity or for an account.

    `adaptive: false` has nothing adapt there: only what is set here holds.
    """
    return await context.write(limits.set_limit, body, context.actor)


@routes.get("/limits/history", "endpoint.read")
async def history(context: Context, query: WhichNumber) -> wire.LimitDecisions:
    """List how what adapts was changed lately, and why, newest first."""
    return await context.read(concurrency.history, query.kind, query.of, query.source, query.limit)


@routes.get("/activities", "endpoint.read")
async def list_activities(context: Context) -> wire.Activities:
    """List the activities whose weight was set."""
    return await context.read(activities.list_all)


@routes.patch("/activities", "endpoint.write")
async def set_weight(context: Context, body: wire.NewActivity) -> wire.Activity:
    """Set which part of the workers an activity gets while others wait."""
    return await context.write(activities.set_weight, body)
