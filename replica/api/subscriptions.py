"""Subscriptions over REST."""

from __future__ import annotations

from typing import Annotated

import msgspec

from replica import wire
from replica.api.paging import Paging
from replica.api.routing import Context, Routes
from replica.catalog import subscriptions

routes = Routes("subscriptions", "Rules for all data that fulfil a condition.")


class Preview(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    #: DIDs that are listed.
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20


@routes.post("/subscriptions", "subscription.write", status=201)
async def add(context: Context, body: wire.NewSubscription) -> wire.Subscription:
    """Add a subscription: from now on it makes its rules for data that are new or changed.

    With `backfill` also for all that exist.
    """
    return await context.write(subscriptions.add, context.actor, body)


@routes.post("/subscriptions/preview", "subscription.write")
async def preview(context: Context, body: wire.NewSubscription, query: Preview) -> wire.SubscriptionPreview:
    """Tell what such a subscription would make for what exists, and change nothing."""
    return await context.read(subscriptions.preview, context.actor, body, limit=query.limit)


@routes.get("/subscriptions", "subscription.read")
async def list_(context: Context, query: Paging) -> wire.Page[wire.Subscription]:
    """List subscriptions."""
    return await context.read(subscriptions.list_page, query.cursor, query.limit)


@routes.get("/subscriptions/{subscription}", "subscription.read")
async def show(context: Context, subscription: str) -> wire.Subscription:
    """Show a subscription, what it made, and what it could not make."""
    return await context.read(subscriptions.get, subscription)


@routes.get("/subscriptions/{subscription}/preview", "subscription.read")
async def preview_of(context: Context, subscription: str, query: Preview) -> wire.SubscriptionPreview:
    """Tell what a backfill of this subscription would make now, and change nothing."""
    return await context.read(subscriptions.preview_of, subscription, limit=query.limit)


@routes.patch("/subscriptions/{subscription}", "subscription.write")
async def change(context: Context, subscription: str, body: wire.SubscriptionChange) -> wire.Subscription:
    """Change, enable or disable a subscription. Rules that it made stay as they are."""
    return await context.write(subscriptions.change, context.actor, subscription, body)


@routes.post("/subscriptions/{subscription}/backfill", "subscription.write")
async def backfill(context: Context, subscription: str) -> wire.Subscription:
    """Let a subscription look at all that exist. What it made before, it does not make again."""
    return await context.write(subscriptions.backfill, context.actor, subscription)


@routes.delete("/subscriptions/{subscription}", "subscription.write")
async def delete(context: Context, subscription: str) -> None:
    """Delete a subscription; the rules that it made stay."""
    await context.write(subscriptions.delete, context.actor, subscription)
