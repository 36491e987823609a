"""What is doubted, bad, good again or to be repaired, and how endpoints are read again, over REST."""

from __future__ import annotations

from replica import wire
from replica.api.at_site import at_site
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import checks, doubts, scrubs, verdicts

routes = Routes("integrity", "Whether replicas are still what they were.")


class Search(Paging):
    endpoint: Word | None = None


@routes.get("/suspects", "replica.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Suspect]:
    """List the replicas that are doubted or bad, and why."""
    return await context.read(verdicts.list_page, endpoint=query.endpoint, cursor=query.cursor, limit=query.limit)


@routes.post("/replicas/bad", "replica.judge", bulk=True)
async def bad(context: Context, body: wire.BadReplicas) -> wire.BadDeclared:
    """Say that replicas are bad: no sources any more, healed from good copies. The last copy stays."""
    return await context.write(verdicts.declare_bad, context.actor, body)


@routes.post("/replicas/good", "replica.judge", bulk=True)
async def good(context: Context, body: wire.GoodReplicas) -> wire.GoodDeclared:
    """Say that replicas are not bad; what a worker has found wrong, one reads again first."""
    return await context.write(verdicts.declare_good, context.actor, body)


@routes.post("/replicas/doubted", "replica.doubt")
async def doubted(context: Context, body: wire.Doubts) -> wire.DoubtsTaken:
    """Say that replicas were read and found wrong: workers of their sites look. Nothing else changes by it."""
    return await context.write(doubts.add, context.actor, body)


@routes.post("/replicas/repair", "replica.judge", status=201)
async def repair(context: Context, body: wire.RepairWish) -> wire.Transfer:
    """Mend a bad replica from good copies, also where no rule asks for it: only its damaged chunks are moved."""
    return await context.write(verdicts.repair, context.actor, body)


@routes.get("/scrubs", "endpoint.read")
async def list_scrubs(context: Context) -> wire.Scrubs:
    """List how endpoints are read again, and how far that is."""
    return await context.read(scrubs.list_all)


@routes.get("/scrubs/{endpoint}", "endpoint.read")
async def show_scrub(context: Context, endpoint: str) -> wire.Scrub:
    """Show how an endpoint is read again."""
    return await context.read(scrubs.get, endpoint)


@routes.patch("/scrubs/{endpoint}", "endpoint.write")
async def set_scrub(context: Context, endpoint: str, body: wire.ScrubChange) -> wire.Scrub:
    """Set how an endpoint is read again: how deep, how fast, how often; let it go on after a halt."""
    return await context.write(scrubs.change, endpoint, body, context.actor)


@routes.post("/orders/checks/claim", "orders.work")
async def claim(context: Context, body: wire.CheckClaim) -> wire.Checks:
    """Take replicas of the own site to look at: what is doubted first, else the next batch of a scrub."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, checks.claim, body, lease_seconds=lease)


@routes.post("/orders/checks/heartbeat", "orders.work", bulk=True)
async def heartbeat(context: Context, body: wire.CheckHeartbeat) -> wire.CheckBeatAnswer:
    """Keep the leases of looks, hear which to leave alone."""
    lease = context.facts.lease_seconds
    return await context.write(at_site, context.site, checks.heartbeat, body, lease_seconds=lease)


@routes.post("/orders/checks/report", "orders.work", bulk=True)
async def report(context: Context, body: wire.CheckReport) -> wire.CheckAnswer:
    """Report what was found."""
    return await context.write(at_site, context.site, checks.report, body)
