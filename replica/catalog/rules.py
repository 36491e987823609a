"""Rules: the wish for n copies of a DID at endpoints that an expression selects.

Given     a wish, or the id of a rule.
Returns   the rule as it stands.
Promises  a rule protects from the moment it is added, in the transaction that adds it, unless it is to begin later or
          waits for approval; the same wish twice is one rule; what is refused is refused for that unit only and says
          why; nothing is deleted here, only released. Everything that happens to a rule is an event.
Partner   replica.catalog.placing chooses, .provision makes the work, .evaluation goes on with what was left;
          .approvals, .suspension and .rule_updates change a rule, .plans tells what an act would do.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import (
    accounts,
    approvals,
    cursors,
    dids,
    endpoints,
    forecasts,
    guards,
    history,
    locks,
    outbox,
    placing,
    reasons,
    releasing,
    rule_transfers,
    rule_views,
    suspension,
    usage,
)
from replica.catalog.evaluation import evaluate_due
from replica.catalog.explanation import explain
from replica.catalog.rule_states import settle
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import rules
from rules import expressions
from rules.endpoints import Endpoint
from rules.errors import Invalid, NotFound, Refused, ReplicaError
from rules.names import Did, shown
from rules.permissions import Actor
from rules.states import DidKind, Grouping, RuleState

__all__ = [
    "add",
    "approve",
    "delete",
    "deny",
    "evaluate_due",
    "expire_due",
    "explain",
    "get",
    "hold",
    "list_page",
    "resume",
    "show",
    "suspend",
]

#: How much JSON may hang on a rule.
METADATA_LENGTH_MAX = 10_000
#: How far away its beginning and its end may be.
YEARS_MAX = 100


# --- adding ---------------------------------------------------------------------------------------------------------


def add(
    s: Session,
    actor: Actor,
    new: wire.NewRule,
    *,
    subscription_id: int | None = None,
    template: int | None = None,
) -> wire.Rule:
    """Add the rule, or return the one that wishes the same already; one with a lifetime is prolonged by that."""
    did_id, kind = dids.row_id(s, Did.parse(new.did))
    account_id = accounts.account_id(s, actor.account)
    candidates = check(s, new)
    values = values_of(s, new) | {"did_id": did_id, "account_id": account_id}
    grouping = values["grouping"]
    guards.one_at_a_time(s, "rule", did_id, account_id, new.copies, new.expression, new.grouping, new.spread)
    if (same := same_wish(s, values, subscription_id, template)) is not None:
        _prolong(s, same, values["expires_at"])
        return get(s, same.id)
    usage.files_become_units(s, did_id, kind, grouping)
    guards.keep_collections(s, [did_id], nested=kind is DidKind.CONTAINER)
    if s.postgresql:
        dids.row_id(s, Did.parse(new.did))  # it may have been deleted while we waited for it
    why = approvals.why_ask(s, did_id, candidates) if new.ask_approval else ""
    rule = s.execute(
        rules.insert()
        .values(
            **values | {"metadata": values["metadata"] or sa.null()},
            state=RuleState.WAITING_APPROVAL if why else RuleState.REPLICATING,
            created_at=s.now,
            updated_at=s.now,
            subscription_id=subscription_id,
            template=template,
        )
        .returning(rules)
    ).one()
    outbox.record(s, "rule.added", rule.id, account_id, did=new.did, copies=new.copies, expression=new.expression)
    if why:
        approvals.ask(s, rule.id, why)
    else:
        if new.ask_approval:
            outbox.record(s, "rule.approved", rule.id, automatic=True)
        _begin(s, rule, candidates)
    return get(s, rule.id)


def _begin(s: Session, rule: sa.Row[Any], candidates: tuple[Endpoint, ...] | None = None) -> None:
    """It protects from here on; or, if it is to begin later, evaluation begins then. The caller holds its DID."""
    if starts_later(s, rule):
        s.execute(rules.update().where(rules.c.id == rule.id).values(placed_to=0, evaluate_at=rule.not_before))
        return
    locks.place_units(s, rule, locks.units_of_rule(rule), among=candidates)
    settle(s, [rule.id])


def starts_later(s: Session, rule: sa.Row[Any]) -> bool:
    return rule.not_before is not None and rule.not_before > s.now


def values_of(s: Session, new: wire.NewRule) -> dict[str, Any]:
    """The columns of the wish."""
    starts = check_moment(s, new.not_before, "not_before")
    begins = s.now if starts is None else max(s.now, starts)
    return {
        "copies": new.copies,
        "expression": new.expression,
        "grouping": Grouping[new.grouping.upper()],
        "spread": new.spread,
        "weight": new.weight,
        "source_expression": new.source_expression,
        "priority": new.priority,
        "activity": new.activity,
        "comment": new.comment,
        "not_before": starts if starts is not None and starts > s.now else None,
        "expires_at": check_end(s, new.lifetime_seconds, new.expires_at, begins),
        "locked": new.locked,
        "purge": new.purge,
        "notify": check_notify(s, new.notify),
        "metadata": check_metadata(new.metadata),
    }


def same_wish(
    s: Session, values: dict[str, Any], subscription_id: int | None = None, template: int | None = None
) -> sa.Row[Any] | None:
    """The rule that wishes exactly this already, whatever is said of it; of two ends, the later one counts."""
    query = sa.select(rules).where(
        *(rules.c[name] == values[name] for name in ("did_id", "account_id", "copies", "expression")),
        rules.c.state != RuleState.EXPIRED,
        sa.or_(rules.c.expires_at.is_(None), rules.c.expires_at > s.now),
        rules.c.subscription_id.is_not_distinct_from(subscription_id),
        rules.c.template.is_not_distinct_from(template),
    )
    for row in s.execute(query.order_by(rules.c.id)):
        there = dict(row._mapping)
        if not starts_later(s, row):
            there["not_before"] = None
        if (there["expires_at"] is None) is not (values["expires_at"] is None):
            continue
        if all(there[name] == value for name, value in values.items() if name not in ("expires_at", "comment")):
            return row
    return None


def _prolong(s: Session, rule: sa.Row[Any], expires_at: datetime | None) -> None:
    if expires_at is not None and expires_at > rule.expires_at:
        s.execute(
            rules.update().where(rules.c.id == rule.id, rules.c.expires_at < expires_at).values(expires_at=expires_at)
        )
        outbox.record(s, "rule.updated", rule.id, rule.account_id, expires_at=[told(rule.expires_at), told(expires_at)])


def told(value: Any) -> Any:
    """As an event tells it."""
    return value.isoformat() if isinstance(value, datetime) else value


# --- what can be wished ---------------------------------------------------------------------------------------------


def check(s: Session, new: wire.NewRule) -> tuple[Endpoint, ...]:
    """What cannot be right is refused with the field that is at fault; returns the candidates."""
    snapshot = endpoints.snapshot(s)
    candidates = expressions.select(new.expression, snapshot)
    check_source(new.source_expression, snapshot)
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


def check_source(expression: str | None, snapshot: tuple[Endpoint, ...]) -> str | None:
    if expression is not None:
        try:
            expressions.select(expression, snapshot)
        except ReplicaError as error:
            error.field = "source_expression"
            raise
    return expression


def check_moment(s: Session, moment: datetime | None, field: str) -> datetime | None:
    if moment is not None and moment > s.now + timedelta(days=365 * YEARS_MAX):
        raise Invalid(f"{moment:%Y-%m-%d} is more than {YEARS_MAX} years away", field=field)
    return moment


def check_end(s: Session, lifetime_seconds: int | None, expires_at: datetime | None, begins: datetime) -> Any:
    """When the rule ends; None: never."""
    if lifetime_seconds is not None:
        if expires_at is not None:
            raise Invalid("a lifetime and an end are given", hint="give one of them", field="expires_at")
        return begins + timedelta(seconds=lifetime_seconds)
    if expires_at is not None and expires_at <= begins:
        raise Invalid("the rule would end before it begins", hint="give a later moment", field="expires_at")
    return check_moment(s, expires_at, "expires_at")


def check_notify(s: Session, webhook: str | None) -> str | None:
    if webhook is not None:
        there = s.execute(sa.select(tables.webhooks.c.id).where(tables.webhooks.c.name == webhook)).scalar()
        if there is None:
            raise Invalid(
                f"there is no webhook {shown(webhook)}", hint="`replica webhook list` shows them", field="notify"
            )
    return webhook


def check_metadata(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    if metadata is not None and len(msgspec.json.encode(metadata)) > METADATA_LENGTH_MAX:
        raise Invalid(f"the metadata of a rule is longer than {METADATA_LENGTH_MAX} bytes", field="metadata")
    return metadata or None


# --- looking --------------------------------------------------------------------------------------------------------


def get(s: Session, rule_id: int) -> wire.Rule:
    found = rule_views.rules_of(s, s.execute(rule_views.select().where(rules.c.id == rule_id)).all())
    if not found:
        raise missing(rule_id)
    return found[0]


def show(s: Session, rule_id: int) -> wire.Rule:
    """The same with a forecast of when it will be ok."""
    return forecasts.with_eta(s, get(s, rule_id))


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


def history_page(
    s: Session, rule_id: int, *, cursor: str | None = None, limit: int = 100
) -> wire.Page[wire.HistoryEntry]:
    """What happened to the rule, from the beginning."""
    if s.execute(sa.select(rules.c.id).where(rules.c.id == rule_id)).scalar() is None:
        raise missing(rule_id)
    return history.of_entity(s, "rule", rule_id, cursor=cursor, limit=limit)


# --- a person decides -----------------------------------------------------------------------------------------------


def look(s: Session, rule_id: int) -> sa.Row[Any]:
    row = s.execute(sa.select(rules).where(rules.c.id == rule_id)).one_or_none()
    if row is None:
        raise missing(rule_id)
    return row


def hold(s: Session, rule_id: int) -> sa.Row[Any]:
    """The rule, which nobody else changes from here on."""
    query = sa.select(rules).where(rules.c.id == rule_id)
    row = s.execute(query.with_for_update(key_share=True) if s.postgresql else query).one_or_none()
    if row is None:
        raise missing(rule_id)
    return row


def hold_as(s: Session, actor: Actor, rule_id: int) -> sa.Row[Any]:
    """The same for somebody who wants to change it. NotAllowed where the rule is not theirs."""
    row = hold(s, rule_id)
    accounts.demand_own(s, actor, "rule.write", f"rule {rule_id}", row.account_id)
    return row


def approve(s: Session, actor: Actor, rule_id: int, verdict: wire.Verdict) -> wire.Rule:
    """The rule begins."""
    row = look(s, rule_id)
    approvals.check_waits(row)
    kind: DidKind = s.execute(sa.select(tables.dids.c.kind).where(tables.dids.c.id == row.did_id)).scalar_one()
    usage.files_become_units(s, row.did_id, kind, row.grouping)
    guards.keep_collections(s, [row.did_id], nested=kind is DidKind.CONTAINER)
    approvals.approve(s, hold(s, rule_id), accounts.account_id(s, actor.account), verdict.comment)
    _begin(s, hold(s, rule_id))
    return get(s, rule_id)


def deny(s: Session, actor: Actor, rule_id: int, verdict: wire.Verdict) -> wire.Rule:
    """The rule ends before it has begun."""
    approvals.check_waits(hold(s, rule_id))
    said: dict[str, Any] = {"comment": verdict.comment} if verdict.comment else {}
    _end(s, rule_id, kind="rule.denied", account_id=accounts.account_id(s, actor.account), **said)
    return get(s, rule_id)


def suspend(s: Session, actor: Actor, rule_id: int, verdict: wire.Verdict) -> wire.Rule:
    """Its transfers wait; it protects and covers as before."""
    suspension.suspend(s, hold_as(s, actor, rule_id), accounts.account_id(s, actor.account), verdict.comment)
    return get(s, rule_id)


def resume(s: Session, actor: Actor, rule_id: int) -> wire.Rule:
    suspension.resume(s, hold_as(s, actor, rule_id), accounts.account_id(s, actor.account))
    return get(s, rule_id)


# --- the end --------------------------------------------------------------------------------------------------------


def delete(s: Session, rule_id: int, actor: Actor | None = None, *, purge: bool | None = None) -> None:
    """End the rule: what it alone protected is released, what it alone wanted stops. Once more changes nothing.

    `purge`: whether the released copies go at once, whatever the rule says.
    """
    rule = hold(s, rule_id) if actor is None else hold_as(s, actor, rule_id)
    if rule.state is RuleState.EXPIRED:
        return
    if rule.locked:
        raise is_locked(rule_id)
    _end(s, rule_id, account_id=None if actor is None else accounts.account_id(s, actor.account), purge=purge)


def is_locked(rule_id: int) -> Refused:
    return Refused(
        f"rule {rule_id} is locked: it gives up no copy",
        hint=f"unlock it first: `replica rule update {rule_id} --unlock`",
    )


def expire_due(s: Session) -> int:
    """End one rule whose lifetime is over, unless it is locked; returns 1, or 0 when there is none."""
    query = (
        sa.select(rules.c.id)
        .where(rules.c.expires_at <= s.now, rules.c.state != RuleState.EXPIRED, rules.c.locked.is_(False))
        .order_by(rules.c.expires_at, rules.c.id)
        .limit(1)
    )
    rule_id = s.execute(query.with_for_update(skip_locked=True, key_share=True) if s.postgresql else query).scalar()
    if rule_id is None:
        return 0
    _end(s, rule_id, kind="rule.expired")
    return 1


def _end(
    s: Session,
    rule_id: int,
    *,
    kind: str = "rule.deleted",
    account_id: int | None = None,
    purge: bool | None = None,
    **told: Any,
) -> None:
    """The caller holds the rule. `kind` is the event that tells why; `purge`: None, as the rule says."""
    locks_ = tables.locks
    guards.change_endpoints(s, sa.select(locks_.c.endpoint_id).where(locks_.c.rule_id == rule_id))
    if purge is None:
        purge = s.execute(sa.select(rules.c.purge).where(rules.c.id == rule_id)).scalar_one()
    s.execute(
        rules.update()
        .where(rules.c.id == rule_id)
        .values(
            state=RuleState.EXPIRED,
            evaluate_at=None,
            placed_to=None,
            revised_to=None,
            followed_to=None,
            copies_missing=0,
            updated_at=s.now,
            ended_at=s.now,
        )
    )
    rule_transfers.suspended_go_without(s, rule_id)
    releasing.begin(s, rule_id, purge=purge)
    reasons.clear(s, [rule_id])
    outbox.record(s, kind, rule_id, account_id, **told, **({"purge": True} if purge else {}))


def missing(rule_id: int) -> NotFound:
    return NotFound(f"there is no rule {rule_id}", hint="`replica rule list` shows them", field="rule")
