"""Deletions over REST: for people, and for the workers of a site that carry them out."""

from __future__ import annotations

import random

from replica import wire
from replica.api.at_site import at_site
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import deletions, removals
from rules.names import Did
from rules.transfers import RetryPolicy

routes = Routes("deletions", "Copies that nobody protects, on their way out.")


class Search(Paging):
    state: Word | None = None
    endpoint: Word | None = None
    did: Word | None = None
    site: Word | None = None


@routes.get("/deletions", "deletion.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Deletion]:
    """List deletions."""
    return await context.read(
        deletions.list_page,
        state=query.state,
        endpoint=query.endpoint,
        did=Did.parse(query.did) if query.did is not None else None,
        site=query.site,
        cursor=query.cursor,
        limit=query.limit,
    )


@routes.post("/deletions", "deletion.write", status=201)
async def ask(context: Context, body: wire.NewDeletion) -> wire.Deletion:
    """Ask that one copy of a file goes; what a rule protects, and the last good copy, stays."""
    return await context.write(deletions.ask, context.actor, body)


@routes.get("/deletions/{deletion}", "deletion.read")
async def show(context: Context, deletion: int) -> wire.Deletion:
    """Show a deletion."""
    return await context.read(deletions.get, deletion)


@routes.post("/deletions/{deletion}/undo", "deletion.write")
async def undo(context: Context, deletion: int) -> wire.Deletion:
    """Take a deletion back that no worker has begun."""
    return await context.write(deletions.undo, context.actor, deletion)


@routes.post("/orders/deletions/claim", "orders.work")
async def claim(context: Context, body: wire.DeletionClaim) -> wire.DeletionOrders:
    """Take deletions at the own site, each with a lease and an epoch."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, removals.claim, body, lease_seconds=lease)


@routes.post("/orders/deletions/heartbeat", "orders.work", bulk=True)
async def heartbeat(context: Context, body: wire.DeletionHeartbeat) -> wire.HeartbeatAnswer:
    """Keep the leases of deletions, hear which to leave alone."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, removals.heartbeat, body, lease_seconds=lease)


@routes.post("/orders/deletions/report", "orders.work", bulk=True)
async def report(context: Context, body: wire.DeletionReport) -> wire.ReportAnswer:
    """Report what became of deletions."""
    policy = RetryPolicy(base_seconds=context.facts.retry_base_seconds)
    return await context.write(at_site, context.site, removals.report, body, fraction=random.random(), policy=policy)
