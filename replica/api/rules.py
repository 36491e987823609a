"""Rules over REST."""

from __future__ import annotations

from http import HTTPStatus

import msgspec

from replica import wire
from replica.api.paging import Paging, Word
from replica.api.routing import Context, HttpRefusal, Routes
from replica.catalog import plans, rule_updates, rules
from rules.errors import Conflict, Invalid
from rules.names import Did

routes = Routes("rules", "Wishes for copies.")


class Search(Paging):
    did: Word | None = None
    account: Word | None = None
    state: Word | None = None


class End(msgspec.Struct, forbid_unknown_fields=True):
    #: Whether copies that only this rule protects go at once, whatever the rule says.
    purge: bool | None = None


@routes.post("/rules", "rule.write", status=201)
async def add(context: Context, body: wire.NewRule) -> wire.Rule:
    """Wish for copies of a DID."""
    return await context.write(rules.add, context.actor, body)


@routes.post("/rules/plan", "rule.write")
async def plan(context: Context, body: wire.NewRule) -> wire.RulePlan:
    """Tell what adding this rule would do, and change nothing."""
    return await context.read(plans.plan, context.actor, body)


@routes.get("/rules", "rule.read")
async def list_(context: Context, query: Search) -> wire.Page[wire.Rule]:
    """List rules."""
    did = Did.parse(query.did) if query.did is not None else None
    return await context.read(
        rules.list_page, did=did, account=query.account, state=query.state, cursor=query.cursor, limit=query.limit
    )


@routes.get("/rules/{rule}", "rule.read")
async def show(context: Context, rule: int) -> wire.Rule:
    """Show a rule, its progress, when it will be done, and the reasons for what is missing."""
    return await context.read(rules.show, rule)


@routes.get("/rules/{rule}/explain", "rule.read")
async def explain(context: Context, rule: int) -> wire.Explanation:
    """Explain where a rule's copies are or will be, what is missing, why, and what happens next."""
    return await context.read(rules.explain, rule)


@routes.get("/rules/{rule}/history", "rule.read")
async def history(context: Context, rule: int, query: Paging) -> wire.Page[wire.HistoryEntry]:
    """List what happened to a rule, from its beginning."""
    return await context.read(rules.history_page, rule, cursor=query.cursor, limit=query.limit)


@routes.patch("/rules/{rule}", "rule.write")
async def update(context: Context, rule: int, body: wire.RuleChange) -> wire.Rule:
    """Change a rule in place.

    With `If-Match: "version"` only if nothing has happened to it since it had this version; else 412.
    """
    version = _version(context)
    try:
        return await context.write(rule_updates.update, context.actor, rule, body, version=version)
    except Conflict as error:
        if error.field == "If-Match":
            raise HttpRefusal(HTTPStatus.PRECONDITION_FAILED, error) from error
        raise


@routes.post("/rules/{rule}/plan", "rule.write")
async def plan_update(context: Context, rule: int, body: wire.RuleChange) -> wire.WishPlan:
    """Tell what changing this rule would do, and change nothing."""
    return await context.read(rule_updates.plan, rule, body)


@routes.post("/rules/{rule}/move", "rule.write")
async def move(context: Context, rule: int, body: wire.RuleMove) -> wire.Rule:
    """Make the copies elsewhere, and give up the old ones when the new ones are there."""
    return await context.write(rule_updates.move, context.actor, rule, body)


@routes.post("/rules/{rule}/move/plan", "rule.write")
async def plan_move(context: Context, rule: int, body: wire.RuleMove) -> wire.WishPlan:
    """Tell what moving this rule would do, and change nothing."""
    return await context.read(rule_updates.plan_move, rule, body)


@routes.post("/rules/{rule}/approve", "rule.approve")
async def approve(context: Context, rule: int, body: wire.Verdict) -> wire.Rule:
    """Say yes to a rule that asked: it begins."""
    return await context.write(rules.approve, context.actor, rule, body)


@routes.post("/rules/{rule}/deny", "rule.approve")
async def deny(context: Context, rule: int, body: wire.Verdict) -> wire.Rule:
    """Say no to a rule that asked: it ends."""
    return await context.write(rules.deny, context.actor, rule, body)


@routes.post("/rules/{rule}/suspend", "rule.write")
async def suspend(context: Context, rule: int, body: wire.Verdict) -> wire.Rule:
    """Let a rule's transfers wait; it protects and covers as before."""
    return await context.write(rules.suspend, context.actor, rule, body)


@routes.post("/rules/{rule}/resume", "rule.write")
async def resume(context: Context, rule: int) -> wire.Rule:
    """Let a suspended rule go on."""
    return await context.write(rules.resume, context.actor, rule)


@routes.delete("/rules/{rule}", "rule.write")
async def delete(context: Context, rule: int, query: End) -> None:
    """Delete a rule; what it alone protected may go."""
    await context.write(rules.delete, rule, context.actor, purge=query.purge)


@routes.get("/rules/{rule}/delete-plan", "rule.read")
async def plan_delete(context: Context, rule: int, query: End) -> wire.RuleDeletePlan:
    """Tell which copies would lose their protection if this rule were deleted, and change nothing."""
    return await context.read(plans.plan_delete, rule, purge=query.purge)


def _version(context: Context) -> int | None:
    """Of `If-Match`: the version the caller has seen; None: whatever it is."""
    given = context.request.headers.get("If-Match", "").strip()
    if given in ("", "*"):
        return None
    bare = given.removeprefix('"').removesuffix('"')
    if not (bare.isascii() and bare.isdigit() and len(bare) <= 10):
        raise Invalid(
            "this If-Match is not an ETag of ours", hint='send it as it came, for example "3"', field="If-Match"
        )
    return int(bare)
