"""Change a rule in place: what it wishes, or anything else about it.

Given     the id of a rule and a change; fields that are absent stay as they are.
Returns   nothing; the caller shows the rule. Or a plan, which changed nothing.
Promises  all of the change or none of it. A locked rule gives up no copy before it is unlocked, by this very change at
          the earliest. What is queued already follows: priority, activity and allowed sources are those of the rule.
Partner   replica.catalog.rule_changes changes the wish; replica.catalog.rule_transfers what is queued.
"""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, endpoints, guards, outbox, plans, quotas, rule_changes, rule_transfers, rules
from replica.db import tables
from replica.db.engine import Session
from rules.errors import Conflict, Invalid, NotAllowed, Refused
from rules.permissions import Actor, may
from rules.states import Grouping, RuleState

#: What rule_changes applies: whether copies must go or come is decided there.
_WISH = ("copies", "expression", "grouping", "spread", "weight")
#: What is queued already is made to fit these.
_QUEUED = frozenset({"priority", "activity", "source_expression"})
_PLAIN = ("locked", "purge", "priority", "activity", "comment")


def update(s: Session, actor: Actor, rule_id: int, change: wire.RuleChange, *, version: int | None = None) -> wire.Rule:
    """`version`: refuse with Conflict if anything happened to the rule since it had this one."""
    if change.account is not msgspec.UNSET:  # accounts come before rules in the order in which rows are held
        accounts.account_id(s, change.account)
    _check_can_change(rules.look(s, rule_id))
    wish = _wish_of(change)
    before = rules.look(s, rule_id)
    accounts.demand_own(s, actor, "rule.write", f"rule {rule_id}", before.account_id)
    if wish:
        rule_changes.change_wish(s, rule_id, **wish)
    rule = rules.hold(s, rule_id)
    _check_can_change(rule)
    _check_version(s, rule_id, version)
    if rule.locked and change.locked is not False and _may_lose(before, wish):
        raise rules.is_locked(rule_id)
    values = _values(s, actor, rule, change)
    if "account_id" in values and rule.state is not RuleState.WAITING_APPROVAL:
        mine = sa.select(tables.locks.c.endpoint_id).where(tables.locks.c.rule_id == rule_id)
        guards.change_endpoints(s, mine)
        quotas.take_over(s, rule_id, values["account_id"])
    if values:
        s.execute(
            tables.rules.update()
            .where(tables.rules.c.id == rule_id)
            .values(**{name: sa.null() if value is None else value for name, value in values.items()}, updated_at=s.now)
        )
    if not _QUEUED.isdisjoint(values):
        rule_transfers.begin(s, rule_id)
    after = rules.hold(s, rule_id)
    told = {
        name: [rules.told(before._mapping[name]), rules.told(after._mapping[name])]
        for name in (*_WISH, *_PLAIN, "source_expression", "expires_at", "notify", "metadata", "account_id")
        if before._mapping[name] != after._mapping[name]
    }
    if "account_id" in told:
        told["account"] = [accounts.name_of(s, account_id) for account_id in told.pop("account_id")]
    if told:
        outbox.record(s, "rule.updated", rule_id, accounts.account_id(s, actor.account), **_plainly(told))
    return rules.get(s, rule_id)


def move(s: Session, actor: Actor, rule_id: int, move: wire.RuleMove) -> wire.Rule:
    """Copies are made where `move` says; the others go once these are there."""
    before = rules.look(s, rule_id)
    accounts.demand_own(s, actor, "rule.write", f"rule {rule_id}", before.account_id)
    _check_can_change(before)
    rule_changes.change_wish(s, rule_id, **_wish_of(_as_change(move)))
    if rules.hold(s, rule_id).locked:
        raise rules.is_locked(rule_id)
    said: dict[str, Any] = {"expression": [before.expression, move.expression]}
    if move.copies is not msgspec.UNSET:
        said["copies"] = [before.copies, move.copies]
    outbox.record(s, "rule.moved", rule_id, accounts.account_id(s, actor.account), **said)
    return rules.get(s, rule_id)


def plan(s: Session, rule_id: int, change: wire.RuleChange) -> wire.WishPlan:
    """What changing the wish would do now; other fields move no copy."""
    _check_can_change(rules.look(s, rule_id))
    return plans.plan_wish(s, rule_id, **_wish_of(change))


def plan_move(s: Session, rule_id: int, move: wire.RuleMove) -> wire.WishPlan:
    return plan(s, rule_id, _as_change(move))


def _as_change(move: wire.RuleMove) -> wire.RuleChange:
    return wire.RuleChange(expression=move.expression, copies=move.copies)


def _wish_of(change: wire.RuleChange) -> dict[str, Any]:
    wish = {name: value for name in _WISH if (value := getattr(change, name)) is not msgspec.UNSET}
    if "grouping" in wish:
        wish["grouping"] = Grouping[wish["grouping"].upper()]
    return wish


def _may_lose(before: sa.Row[Any], wish: dict[str, Any]) -> bool:
    """More copies of the same wish lose none."""
    changed = {name for name, value in wish.items() if before._mapping[name] != value}
    return bool(changed - {"copies"}) or wish.get("copies", before.copies) < before.copies


def _check_can_change(rule: sa.Row[Any]) -> None:
    if rule.state is RuleState.EXPIRED:
        raise Refused(f"rule {rule.id} has ended", hint="add a new one")


def _check_version(s: Session, rule_id: int, version: int | None) -> None:
    if version is None:
        return
    versions = tables.versions
    query = sa.select(versions.c.version).where(versions.c.entity == "rule", versions.c.entity_id == rule_id)
    if (now := s.execute(query).scalar() or 0) != version:
        raise Conflict(
            f"rule {rule_id} has changed since: it has version {now}, not {version}",
            hint="look at it again: `replica rule history` tells what happened",
            field="If-Match",
        )


def _values(s: Session, actor: Actor, rule: sa.Row[Any], change: wire.RuleChange) -> dict[str, Any]:
    """The columns that change, besides those of the wish."""
    values = {name: value for name in _PLAIN if (value := getattr(change, name)) is not msgspec.UNSET}
    if change.source_expression is not msgspec.UNSET:
        values["source_expression"] = rules.check_source(change.source_expression, endpoints.snapshot(s))
    if change.lifetime_seconds is not msgspec.UNSET or change.expires_at is not msgspec.UNSET:
        lifetime = None if change.lifetime_seconds is msgspec.UNSET else change.lifetime_seconds
        end = None if change.expires_at is msgspec.UNSET else change.expires_at
        begins = s.now if rule.not_before is None else max(s.now, rule.not_before)
        values["expires_at"] = rules.check_end(s, lifetime, end, begins)
    if change.notify is not msgspec.UNSET:
        values["notify"] = rules.check_notify(s, change.notify)
    if change.metadata is not msgspec.UNSET:
        values["metadata"] = rules.check_metadata(change.metadata)
    if change.account is not msgspec.UNSET:
        values["account_id"] = _new_owner(s, actor, rule, change.account)
    same = {name for name, value in values.items() if rule._mapping[name] == value}
    return {name: value for name, value in values.items() if name not in same}


def _new_owner(s: Session, actor: Actor, rule: sa.Row[Any], account: str) -> int:
    if not may(actor, "rule.write", owner=account):
        raise NotAllowed("only an administrator can give a rule to another account", field="account")
    if rule.subscription_id is not None:
        raise Invalid(f"rule {rule.id} belongs to a subscription, and so to its account", field="account")
    return accounts.account_id(s, account)


def _plainly(told: dict[str, list[Any]]) -> dict[str, Any]:
    """Words instead of numbers."""
    if "grouping" in told:
        told["grouping"] = [each.label for each in told["grouping"]]
    return told
