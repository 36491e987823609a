"""Webhooks over REST, for administrators."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging
from replica.api.routing import Context, Routes
from replica.catalog import webhooks

routes = Routes("webhooks", "Servers elsewhere that are told what happens.")


@routes.post("/webhooks", "webhook.write", status=201, keyed=False)
async def add(context: Context, body: wire.NewWebhook) -> wire.WebhookMade:
    """Add a webhook.

    Its secret is shown this once. It takes no Idempotency-Key: a kept answer would be a kept secret.
    """
    return await context.write(webhooks.add, context.actor, body)


@routes.get("/webhooks", "webhook.read")
async def list_(context: Context, query: Paging) -> wire.Page[wire.Webhook]:
    """List webhooks."""
    return await context.read(webhooks.list_page, query.cursor, query.limit)


@routes.get("/webhooks/{webhook}", "webhook.read")
async def show(context: Context, webhook: str) -> wire.Webhook:
    """Show a webhook, and why the last delivery failed if it did."""
    return await context.read(webhooks.get, webhook)


@routes.patch("/webhooks/{webhook}", "webhook.write")
async def change(context: Context, webhook: str, body: wire.WebhookChange) -> wire.Webhook:
    """Enable or disable a webhook; enabled, it goes on where it was."""
    return await context.write(webhooks.change, context.actor, webhook, body)


@routes.post("/webhooks/{webhook}/test", "webhook.write")
async def test(context: Context, webhook: str) -> wire.Webhook:
    """Send a webhook an event of its own, after all that waits for it."""
    return await context.write(webhooks.test, context.actor, webhook)


@routes.delete("/webhooks/{webhook}", "webhook.write")
async def delete(context: Context, webhook: str) -> None:
    """Delete a webhook; it is told nothing any more."""
    await context.write(webhooks.delete, context.actor, webhook)
