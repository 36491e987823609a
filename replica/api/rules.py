"""Rules over REST."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import rules
from rules.names import Did

routes = Routes("rules", "Wishes for copies.")


class Search(Paging):
    did: Word | None = None
    account: Word | None = None
    state: Word | None = None


@routes.post("/rules", "rule.write", status=201)
async def add(context: Context, body: wire.NewRule) -> wire.Rule:
    """Wish for copies of a DID."""
    return await context.write(rules.add, context.actor, body)


@routes.post("/rules/plan", "rule.write")
async def plan(context: Context, body: wire.NewRule) -> wire.RulePlan:
    """Tell what adding this rule would do, and change nothing."""
    return await context.read(rules.plan, context.actor, body)


@routes.get("/rules", "rule.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Rule]:
    """List rules."""
    did = Did.parse(query.did) if query.did is not None else None
    return await context.read(
        rules.list_page, did=did, account=query.account, state=query.state, cursor=query.cursor, limit=query.limit
    )


@routes.get("/rules/{rule}", "rule.read")
async def show(context: Context, rule: int) -> wire.Rule:
    """Show a rule, its progress, and the reasons for what is missing."""
    return await context.read(rules.get, rule)


@routes.get("/rules/{rule}/explain", "rule.read")
async def explain(context: Context, rule: int) -> wire.Explanation:
    """Explain where a rule's copies are or will be, what is missing, why, and what happens next."""
    return await context.read(rules.explain, rule)


@routes.delete("/rules/{rule}", "rule.write")
async def delete(context: Context, rule: int) -> None:
    """Delete a rule; what it alone protected may go."""
    await context.write(rules.delete, rule)
