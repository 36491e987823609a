"""Rules: the wish for n copies of a DID at endpoints that an expression selects.

Given     a wish, or the id of a rule.
Returns   the rule as it stands, or a plan that changed nothing.
Promises  a rule protects from the moment it is added, in the transaction that adds it; the same wish twice is one
          rule; what is refused is refused for that unit only and says why; nothing is deleted here, only released.
Partner   replica.catalog.placing chooses, .provision makes the work, .evaluation goes on with what was left.
"""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, cursors, dids, endpoints, guards, locks, placing, reasons, rule_views
from replica.catalog.evaluation import evaluate_due
from replica.catalog.explanation import explain
from replica.catalog.membership import files_of
from replica.catalog.rule_states import settle
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import rules
from rules import expressions
from rules.endpoints import Endpoint
from rules.errors import Invalid, InvalidExpression, NotFound
from rules.names import Did, shown
from rules.permissions import Actor
from rules.states import DidKind, Grouping, RuleState

__all__ = ["add", "delete", "evaluate_due", "expire_due", "explain", "get", "list_page", "plan"]

#: How many choices and refusals a plan lists one by one.
PLAN_ITEMS_MAX = 1_000


def add(s: Session, actor: Actor, new: wire.NewRule) -> wire.Rule:
    """Add the rule, or return the one that wishes the same already."""
    did_id, kind = dids.row_id(s, Did.parse(new.did))
    account_id = accounts.account_id(s, actor.account)
    candidates = _check(s, new)
    grouping = Grouping[new.grouping.upper()]
    guards.one_at_a_time(s, "rule", did_id, account_id, new.copies, new.expression, new.grouping, new.spread)
    same = s.execute(
        sa.select(rules.c.id).where(
            rules.c.did_id == did_id,
            rules.c.account_id == account_id,
            rules.c.copies == new.copies,
            rules.c.expression == new.expression,
            rules.c.grouping == grouping,
            rules.c.spread == new.spread,
            rules.c.state != RuleState.EXPIRED,
            sa.or_(rules.c.expires_at.is_(None), rules.c.expires_at > s.now),
        )
    ).scalar()
    if same is not None:
        return get(s, same)
    guards.keep_collections(s, [did_id], nested=kind is DidKind.CONTAINER)
    rule = s.execute(
        rules.insert()
        .values(
            did_id=did_id,
            account_id=account_id,
            copies=new.copies,
            expression=new.expression,
            grouping=grouping,
            spread=new.spread,
            weight=new.weight,
            source_expression=new.source_expression,
            priority=new.priority,
            activity=new.activity,
            comment=new.comment,
            state=RuleState.REPLICATING,
            created_at=s.now,
            updated_at=s.now,
            expires_at=None if new.lifetime_seconds is None else s.now + timedelta(seconds=new.lifetime_seconds),
        )
        .returning(rules)
    ).one()
    locks.place_units(s, rule, locks.units_of_rule(rule), among=candidates)
    settle(s, [rule.id])
    return get(s, rule.id)


def plan(s: Session, actor: Actor, new: wire.NewRule) -> wire.RulePlan:
    """What `add` would do now, for the first units; changes nothing."""
    did_id, _ = dids.row_id(s, Did.parse(new.did))
    candidates = _check(s, new)
    grouping = Grouping[new.grouping.upper()]
    wanted = placing.Wanted(-1, did_id, new.copies, new.expression, grouping, new.spread, new.weight)
    every = locks.units_of(did_id, grouping)
    unit_ids = list(s.execute(every.order_by(sa.column("unit_id")).limit(locks.SLICE_UNITS)).scalars())
    units = s.execute(sa.select(sa.func.count()).select_from(every.subquery())).scalar_one()
    proposal = placing.propose(s, wanted, unit_ids, candidates)
    shown_ids = {c.unit_id for c in proposal.choices[:PLAN_ITEMS_MAX]}
    shown_ids |= {r.unit_id for r in proposal.refusals[:PLAN_ITEMS_MAX]}
    text = rule_views.did_texts(s, sorted(shown_ids))
    name = {e.id: e.name for e in candidates}
    return wire.RulePlan(
        candidates=[e.name for e in candidates],
        copies=[
            wire.PlannedCopy(unit=text[c.unit_id], endpoint=name[c.endpoint_id], new_bytes=c.new_bytes, why=c.why)
            for c in proposal.choices[:PLAN_ITEMS_MAX]
        ],
        refusals=[
            wire.PlanRefusal(
                unit=text[r.unit_id], missing_copies=r.missing_copies, obstacles=[o.message for o in r.obstacles]
            )
            for r in proposal.refusals[:PLAN_ITEMS_MAX]
        ],
        new_bytes=sum(c.new_bytes for c in proposal.choices),
        units=units,
    )


def get(s: Session, rule_id: int) -> wire.Rule:
    found = rule_views.rules_of(s, s.execute(rule_views.select().where(rules.c.id == rule_id)).all())
    if not found:
        raise _missing(rule_id)
    return found[0]


def list_page(
    s: Session,
    *,
    did: Did | None = None,
    account: str | None = None,
    state: str | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.Rule]:
    """Rules by id; those that have ended only when `state` asks for them."""
    query = rule_views.select().order_by(rules.c.id).limit(cursors.check_limit(limit) + 1)
    if did is not None:
        query = query.where(rules.c.did_id == dids.row_id(s, did)[0])
    if account is not None:
        query = query.where(tables.accounts.c.name == account)
    if state is None:
        query = query.where(rules.c.state != RuleState.EXPIRED)
    else:
        if state.upper() not in RuleState.__members__:
            states = ", ".join(each.label for each in RuleState)
            raise Invalid(f"{shown(state)} is not a state of a rule", hint=f"use one of {states}", field="state")
        query = query.where(rules.c.state == RuleState[state.upper()])
    if after := cursors.unpack(cursor):
        query = query.where(rules.c.id > after[0])
    rows = s.execute(query).all()
    made = {rule.id: rule for rule in rule_views.rules_of(s, rows[:limit])}
    return cursors.page(rows, limit, lambda row: made[row.id], lambda row: (row.id,))


def delete(s: Session, rule_id: int) -> None:
    """End the rule: what it alone protected is released, what it alone wanted stops. Once more changes nothing."""
    query = sa.select(rules.c.id, rules.c.state).where(rules.c.id == rule_id)
    rule = s.execute(query.with_for_update(key_share=True) if s.postgresql else query).one_or_none()
    if rule is None:
        raise _missing(rule_id)
    if rule.state is not RuleState.EXPIRED:
        _end(s, rule_id)


def expire_due(s: Session) -> int:
    """End one rule whose lifetime is over; returns 1, or 0 when there is none."""
    query = (
        sa.select(rules.c.id)
        .where(rules.c.expires_at <= s.now, rules.c.state != RuleState.EXPIRED)
        .order_by(rules.c.expires_at, rules.c.id)
        .limit(1)
    )
    rule_id = s.execute(query.with_for_update(skip_locked=True, key_share=True) if s.postgresql else query).scalar()
    if rule_id is None:
        return 0
    _end(s, rule_id)
    return 1


def _end(s: Session, rule_id: int) -> None:
    locks_ = tables.locks
    guards.change_endpoints(s, sa.select(locks_.c.endpoint_id).where(locks_.c.rule_id == rule_id))
    mine = sa.select(locks_.c.unit_id, locks_.c.endpoint_id).where(locks_.c.rule_id == rule_id).subquery("mine")
    held = files_of(mine)
    locks.release(s, held, ignoring_rule=rule_id)
    s.execute(locks_.delete().where(locks_.c.rule_id == rule_id))
    reasons.clear(s, [rule_id])
    s.execute(
        rules.update()
        .where(rules.c.id == rule_id)
        .values(state=RuleState.EXPIRED, evaluate_at=None, placed_to=None, copies_missing=0, updated_at=s.now)
    )


def _check(s: Session, new: wire.NewRule) -> tuple[Endpoint, ...]:
    """What cannot be right is refused with the field that is at fault; returns the candidates."""
    snapshot = endpoints.snapshot(s)
    candidates = expressions.select(new.expression, snapshot)
    if new.source_expression is not None:
        try:
            expressions.select(new.source_expression, snapshot)
        except InvalidExpression as error:
            raise InvalidExpression(
                error.message, column=error.column, hint=error.hint, field="source_expression"
            ) from None
    if new.spread != "endpoint" and all(e.value(new.spread) is None for e in candidates):
        raise Invalid(
            f"no endpoint that the expression selects has the attribute {shown(new.spread)} to spread by",
            hint="spread by `endpoint`, `site` or an attribute that the endpoints have",
            field="spread",
        )
    if new.weight is not None and all(e.value(new.weight) is None for e in candidates):
        raise Invalid(
            f"no endpoint that the expression selects has the attribute {shown(new.weight)}",
            hint="weigh by a numeric attribute that the endpoints have",
            field="weight",
        )
    return placing.less_what_is_promised(s, candidates)


def _missing(rule_id: int) -> NotFound:
    return NotFound(f"there is no rule {rule_id}", hint="`replica rule list` shows them", field="rule")
