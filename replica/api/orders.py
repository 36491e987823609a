"""Orders over REST: what a site's worker claims, keeps alive and reports. The site is in its token."""

from __future__ import annotations

import random

from replica import wire
from replica.api.at_site import at_site
from replica.api.routing import Context, Routes
from replica.catalog import transfers
from rules.transfers import RetryPolicy

routes = Routes("orders", "What the workers of a site carry out.")


@routes.post("/orders/claim", "orders.work")
async def claim(context: Context, body: wire.Claim) -> wire.Orders:
    """Take transfers to the own site, each with a lease and an epoch."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, transfers.claim, body, lease_seconds=lease)


@routes.post("/orders/heartbeat", "orders.work", bulk=True)
async def heartbeat(context: Context, body: wire.Heartbeat) -> wire.HeartbeatAnswer:
    """Keep the leases of orders, tell their progress, hear which to stop."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, transfers.heartbeat, body, lease_seconds=lease)


@routes.post("/orders/report", "orders.work", bulk=True)
async def report(context: Context, body: wire.Report) -> wire.ReportAnswer:
    """Report what became of orders."""
    policy = RetryPolicy(base_seconds=context.facts.retry_base_seconds)
    return await context.write(at_site, context.site, transfers.report, body, fraction=random.random(), policy=policy)
