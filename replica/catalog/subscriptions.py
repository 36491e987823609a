"""Subscriptions: rules for every dataset and container that fulfils a condition.

Given     a condition, and templates of rules without their DID.
Returns   the subscription, what it made and what it could not make; or a preview that changed nothing.
Promises  what cannot be read or selects nothing is refused when the subscription is made, with the field. A changed
          template is a new one: what its predecessor made stays, and what it makes comes beside it.
Partner   replica.catalog.subscribing looks at DIDs and makes the rules, rules.subscriptions decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors, endpoints, events, outbox, plans, subscribing
from replica.catalog.subscribing import Templates
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import rules, subscriptions, versions
from rules import conditions, expressions
from rules.errors import AlreadyExists, InvalidExpression, NotFound, ReplicaError
from rules.names import check_word, shown
from rules.permissions import Actor, demand
from rules.subscriptions import Lacking, check, decide

#: Skipped DIDs that are shown with a subscription.
SKIPPED_SHOWN = 20


def add(s: Session, actor: Actor, new: wire.NewSubscription) -> wire.Subscription:
    """It looks at what is made, closed or given other metadata from now on, and with `backfill` at all else, too."""
    check_word(new.name, "a subscription")
    _check_condition(new.condition)
    _check_templates(s, new.rules)
    now = events.end(s)
    values = {
        "name": new.name,
        "account_id": accounts.account_id(s, actor.account),
        "condition": new.condition,
        "rules": Templates().changed_to(new.rules).packed(),
        "comment": new.comment,
        "created_at": s.now,
        "updated_at": s.now,
        "expires_at": _end(s, new.lifetime_seconds),
        "seen_tx": now.tx,
        "seen_id": now.id,
        "backfilled_to": 0 if new.backfill else None,
    }
    if not s.postgresql:  # it would give the id of a deleted one again, whose rules are still there
        used = sa.select(sa.func.max(versions.c.entity_id)).where(versions.c.entity == "subscription")
        values["id"] = (s.execute(used).scalar() or 0) + 1
    made = bulk.insert(s, subscriptions).values(values).on_conflict_do_nothing().returning(subscriptions)
    row = s.execute(made).one_or_none()
    if row is None:
        raise AlreadyExists(f"there is a subscription {new.name} already", hint="choose another name", field="name")
    _tell(s, actor, "subscription.added", row)
    return get(s, new.name)


def get(s: Session, name: str) -> wire.Subscription:
    row = s.execute(_select().where(subscriptions.c.name == name)).one_or_none()
    if row is None:
        raise _missing(name)
    answer = _subscriptions(s, [row])[row.id]
    answer.skipped = _skipped(s, row.id)
    return answer


def list_page(s: Session, cursor: str | None, limit: int) -> wire.Page[wire.Subscription]:
    query = _select().order_by(subscriptions.c.id).limit(cursors.check_limit(limit) + 1)
    if after := cursors.unpack(cursor):
        query = query.where(subscriptions.c.id > after[0])
    rows = s.execute(query).all()
    made = _subscriptions(s, rows[:limit])
    return cursors.page(rows, limit, lambda row: made[row.id], lambda row: (row.id,))


def change(s: Session, actor: Actor, name: str, change: wire.SubscriptionChange) -> wire.Subscription:
    """What it looks at from now on. Rules that were made stay; `backfill` looks again at what exists."""
    row = _hold(s, actor, name)
    values: dict[str, Any] = {}
    if change.condition is not msgspec.UNSET:
        _check_condition(change.condition)
        values["condition"] = change.condition
    if change.rules is not msgspec.UNSET:
        _check_templates(s, change.rules)
        values["rules"] = Templates.of(row.rules).changed_to(change.rules).packed()
    if change.comment is not msgspec.UNSET:
        values["comment"] = change.comment
    if change.lifetime_seconds is not msgspec.UNSET:
        values["expires_at"] = _end(s, change.lifetime_seconds)
    if change.enabled is not msgspec.UNSET:
        values["enabled"] = change.enabled
    changed = {key: value for key, value in values.items() if value != row._mapping[key]}
    if changed:
        s.execute(subscriptions.update().where(subscriptions.c.id == row.id).values(changed | {"updated_at": s.now}))
        enabled = changed.pop("enabled", None)
        if enabled is not None:
            _tell(s, actor, "subscription.enabled" if enabled else "subscription.disabled", row)
        if changed:
            _tell(s, actor, "subscription.updated", row, changed=sorted(changed))
        s.wake.add(outbox.SUBSCRIPTIONS)
    return get(s, name)


def backfill(s: Session, actor: Actor, name: str) -> wire.Subscription:
    """Look at everything that exists, from the beginning. What was made before is not made again."""
    row = _hold(s, actor, name)
    s.execute(subscriptions.update().where(subscriptions.c.id == row.id).values(backfilled_to=0))
    _tell(s, actor, "subscription.backfill", row)
    s.wake.add(outbox.SUBSCRIPTIONS)
    return get(s, name)


def delete(s: Session, actor: Actor, name: str) -> None:
    """The rules that it made stay."""
    row = _hold(s, actor, name)
    s.execute(subscriptions.delete().where(subscriptions.c.id == row.id))
    _tell(s, actor, "subscription.deleted", row)


def preview(s: Session, actor: Actor, new: wire.NewSubscription, *, limit: int = 20) -> wire.SubscriptionPreview:
    """What a backfill of such a subscription would do now; changes nothing."""
    tree = _check_condition(new.condition)
    _check_templates(s, new.rules)
    return _preview(s, actor, tree, Templates().changed_to(new.rules), limit)


def preview_of(s: Session, name: str, *, limit: int = 20) -> wire.SubscriptionPreview:
    """The same, of a subscription that there is."""
    row = s.execute(_select().where(subscriptions.c.name == name)).one_or_none()
    if row is None:
        raise _missing(name)
    owner = subscribing.owner_of(s, row.account_id)
    return _preview(s, owner, _check_condition(row.condition), Templates.of(row.rules), limit, made_by=row.id)


def _preview(
    s: Session, actor: Actor, tree: conditions.Condition, templates: Templates, limit: int, made_by: int = -1
) -> wire.SubscriptionPreview:
    examined, matching, candidates = subscribing.fulfilling(s, tree, limit)
    there = subscribing.made_already(s, made_by, [candidate.did_id for candidate in candidates])
    total: Counter[str] = Counter()
    found = []
    for candidate in candidates:
        planned = []
        for decided in decide(tree, templates.short(), candidate.facts):
            template = templates.rules[decided.number]
            if isinstance(decided, Lacking):
                one = wire.PreviewedRule(rule=decided.number, expression=template.expression, skipped=decided.reason)
            else:
                one = wire.PreviewedRule(rule=decided.number, expression=decided.expression)
                one.exists = (candidate.did_id, decided.number) in there
                if not one.exists:
                    _plan(s, actor, subscribing.rule_of(template, decided, candidate.did), one, total)
            planned.append(one)
        found.append(wire.PreviewedDid(did=candidate.did, rules=planned))
    return wire.SubscriptionPreview(
        examined=examined,
        matching=matching,
        more=matching > len(found),
        dids=found,
        new_bytes=dict(sorted(total.items())),
    )


def _plan(s: Session, actor: Actor, rule: wire.NewRule, one: wire.PreviewedRule, total: Counter[str]) -> None:
    try:
        plan = plans.plan(s, actor, rule)
    except ReplicaError as error:
        one.skipped = error.message
        return
    one.new_bytes = plan.new_bytes
    one.copies_missing = plan.copies_missing
    for place in plan.totals:
        total[place.endpoint] += place.new_bytes


# --- below ----------------------------------------------------------------------------------------------------------


def _check_condition(text: str) -> conditions.Condition:
    try:
        return conditions.parse(text)
    except InvalidExpression as error:
        raise InvalidExpression(error.message, column=error.column, hint=error.hint, field="condition") from None


def _check_templates(s: Session, templates: Sequence[wire.RuleTemplate]) -> None:
    snapshot = endpoints.snapshot(s)
    for template in templates:
        for field, text in (("expression", template.expression), ("source_expression", template.source_expression)):
            if text is None:
                continue
            try:
                if not check(text, field):
                    expressions.select(text, snapshot)
            except InvalidExpression as error:
                raise InvalidExpression(error.message, column=error.column, hint=error.hint, field=field) from None


def _end(s: Session, lifetime_seconds: int | None) -> datetime | None:
    return None if lifetime_seconds is None else s.now + timedelta(seconds=lifetime_seconds)


def _tell(s: Session, actor: Actor, kind: str, row: sa.Row[Any], **payload: Any) -> None:
    outbox.record(s, kind, row.id, accounts.account_id(s, actor.account), name=row.name, **payload)


def _hold(s: Session, actor: Actor, name: str) -> sa.Row[Any]:
    query = _select().where(subscriptions.c.name == name)
    row = s.execute(query.with_for_update(of=subscriptions) if s.postgresql else query).one_or_none()
    if row is None:
        raise _missing(name)
    demand(actor, "subscription.write", name, owner=row.account)
    return row


def _select() -> sa.Select[Any]:
    return sa.select(subscriptions, tables.accounts.c.name.label("account")).join_from(subscriptions, tables.accounts)


def _subscriptions(s: Session, rows: Sequence[sa.Row[Any]]) -> dict[int, wire.Subscription]:
    query = (
        sa.select(rules.c.subscription_id, sa.func.count().label("made"))
        .where(rules.c.subscription_id.in_([row.id for row in rows]), rules.c.subscription_id.is_not(None))
        .group_by(rules.c.subscription_id)
    )
    made = {row.subscription_id: row.made for row in s.execute(query)} if rows else {}
    return {row.id: _subscription(row, made.get(row.id, 0)) for row in rows}


def _subscription(row: sa.Row[Any], rules_made: int) -> wire.Subscription:
    templates = Templates.of(row.rules)
    return wire.Subscription(
        id=row.id,
        name=row.name,
        account=row.account,
        condition=row.condition,
        rules=list(templates.rules.values()),
        numbers=list(templates.rules),
        enabled=row.enabled,
        comment=row.comment,
        created_at=row.created_at,
        updated_at=row.updated_at,
        expires_at=row.expires_at,
        backfilling=row.backfilled_to is not None,
        rules_made=rules_made,
    )


def _skipped(s: Session, subscription_id: int) -> list[wire.Skipped]:
    known = tables.events
    query = (
        sa.select(known.c.at, known.c.payload)
        .where(
            known.c.entity == "subscription",
            known.c.entity_id == subscription_id,
            known.c.entity != sa.literal_column("'transfer'"),
            known.c.kind == "subscription.skipped",
        )
        .order_by(known.c.version.desc())
        .limit(SKIPPED_SHOWN)
    )
    return [
        wire.Skipped(
            did=row.payload["did"],
            rule=row.payload["rule"],
            reason=row.payload["reason"],
            hint=row.payload["hint"],
            at=row.at,
        )
        for row in s.execute(query)
    ]


def _missing(name: str) -> NotFound:
    return NotFound(
        f"there is no subscription {shown(name)}",
        hint="`replica subscription list` shows them",
        field="subscription",
    )
