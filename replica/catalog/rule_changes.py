"""A rule wishes something else from now on: other copies, another expression, grouping, spread or weight.

Given     the id of a rule and what is to change.
Returns   nothing: the rule keeps its id, its locks follow in slices.
Promises  what the new wish has no use for goes only after all that it wishes is available (see
          replica.catalog.relocation), so a change never lowers protection. What fits the new wish stays where it is.
Partner   rules.changes decides what is kept; replica.catalog.placing places what is missing then;
          replica.catalog.rule_updates and .evaluation call this, .plans compares without changing anything.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import sqlalchemy as sa

from replica.catalog import endpoints, guards, locks, placing, reasons, relocation, usage
from replica.catalog.bulk import rows_of
from replica.catalog.rule_states import look_soon, settle
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import locks as locks_table
from replica.db.tables import rules
from rules import changes, expressions
from rules.endpoints import Endpoint
from rules.errors import Invalid, InvalidExpression, NotFound, Refused
from rules.names import shown
from rules.states import RULE_WITHOUT_LOCKS, DidKind, Grouping, RuleState

#: Of copies that are not complete: how many files one transaction lets go of while a person waits for it.
SLICE_FILES = 5_000


def change_wish(
    s: Session,
    rule_id: int,
    *,
    copies: int | None = None,
    expression: str | None = None,
    grouping: Grouping | None = None,
    spread: str | None = None,
    weight: str | msgspec.UnsetType | None = msgspec.UNSET,
) -> bool:
    """Apply the difference; returns whether there was any. The caller tells of it (replica.catalog.outbox)."""
    rule = _row(s, rule_id)
    if grouping is not None and grouping is not rule.grouping:
        kind = s.execute(sa.select(tables.dids.c.kind).where(tables.dids.c.id == rule.did_id)).scalar_one()
        usage.files_become_units(s, rule.did_id, kind, grouping)
    guards.change_rules(s, [rule_id])
    rule = _row(s, rule_id)
    new = _changed(rule, copies, expression, grouping, spread, weight)
    if not new:
        return False
    wanted = _wanted(rule, new)
    _check(s, wanted)
    s.execute(rules.update().where(rules.c.id == rule_id).values(**new, updated_at=s.now))
    if rule.state in RULE_WITHOUT_LOCKS or (rule.not_before is not None and rule.not_before > s.now):
        return True
    guards.change_endpoints(s, sa.select(tables.endpoints.c.id))
    s.execute(rules.update().where(rules.c.id == rule_id).values(revised_to=0, placed_to=None))
    revise(s, _row(s, rule_id))
    rule = _row(s, rule_id)
    if rule.revised_to is None:
        s.execute(rules.update().where(rules.c.id == rule_id).values(placed_to=None))
        rule = _row(s, rule_id)
        locks.place_units(s, rule, locks.units_of_rule(rule))
        locks.count_missing(s, rule)
        if _row(s, rule_id).placed_to is None:
            relocation.let_go(s, rule_id, SLICE_FILES)
    settle(s, [rule_id])
    look_soon(s, [rule_id])  # what had to stay at a drained endpoint may go now
    return True


# --- what is kept ---------------------------------------------------------------------------------------------------


def revise(s: Session, rule: sa.Row[Any]) -> int:
    """Set aside, of the next slice of units, what the changed wish has no use for; returns the units looked at.

    The caller holds the rule and every endpoint, and settles the rule.
    """
    wanted = placing.Wanted.of(rule)
    try:
        candidates: Sequence[Endpoint] = placing.candidates(s, rule.expression)
    except (Refused, InvalidExpression):
        candidates = ()  # for the moment it selects nothing: nothing is given up for that
        slice_ = _Slice(reached=None)
    else:
        slice_ = _decide_slice(s, rule, wanted, candidates, rule.revised_to)
    relocation.set_aside(s, rule.id, [(lock.unit_id, lock.endpoint_id) for lock in slice_.gone])
    done = slice_.reached is None
    s.execute(
        rules.update()
        .where(rules.c.id == rule.id)
        .values(revised_to=slice_.reached, placed_to=0 if done else rule.placed_to)
    )
    if done:
        reasons.replace(s, rule.id, [])  # they were about the former wish
    return max(slice_.units, 1)


@dataclass(slots=True)
class _Slice:
    """What becomes of some units' copies."""

    #: Units up to this one were looked at; None: all.
    reached: int | None
    units: int = 0
    gone: list[sa.Row[Any]] = field(default_factory=list)
    #: unit → endpoints where it keeps a copy
    kept: dict[int, frozenset[int]] = field(default_factory=dict)


def _decide_slice(
    s: Session,
    rule: sa.Row[Any],
    wanted: placing.Wanted,
    candidates: Sequence[Endpoint],
    after: int,
) -> _Slice:
    """The next units after this one; with grouping ALL every unit."""
    mine = locks_table.c.rule_id == rule.id, relocation.WISHED
    together = wanted.grouping is Grouping.ALL
    ids = sa.select(locks_table.c.unit_id).where(*mine, locks_table.c.unit_id > after).distinct()
    ids = ids.order_by(locks_table.c.unit_id)
    unit_ids = list(s.execute(ids if together else ids.limit(locks.SLICE_UNITS + 1)).scalars())
    more = not together and len(unit_ids) > locks.SLICE_UNITS
    unit_ids = unit_ids if together else unit_ids[: locks.SLICE_UNITS]
    batch = rows_of(s, "revised", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
    query = (
        sa.select(locks_table, tables.dids.c.kind)
        .select_from(batch)
        .join(locks_table, locks_table.c.unit_id == batch.c.unit_id)
        .join(tables.dids, tables.dids.c.id == batch.c.unit_id)
        .where(*mine)
        .order_by(locks_table.c.unit_id, locks_table.c.endpoint_id)
    )
    found: dict[int, list[sa.Row[Any]]] = defaultdict(list)
    slice_ = _Slice(reached=unit_ids[-1] if more else None)
    for lock in s.execute(query):
        found[lock.unit_id].append(lock)
    if together:
        _decide_together(wanted, candidates, found, slice_)
        return slice_
    slice_.units = len(unit_ids)
    for unit_id in unit_ids:
        here = found[unit_id]
        kept = _keep(wanted, candidates, here) if _is_unit(wanted, here[0]) else frozenset()
        slice_.gone += [lock for lock in here if lock.endpoint_id not in kept]
        if kept:
            slice_.kept[unit_id] = kept
    return slice_


def _decide_together(
    wanted: placing.Wanted, candidates: Sequence[Endpoint], found: dict[int, list[sa.Row[Any]]], slice_: _Slice
) -> None:
    """One set of endpoints for everything: those that have most of it."""
    units = {unit_id: here for unit_id, here in found.items() if _is_unit(wanted, here[0])}
    size: Counter[int] = Counter()
    complete: Counter[int] = Counter()
    for here in units.values():
        for lock in here:
            size[lock.endpoint_id] += _available_bytes(lock)
            complete[lock.endpoint_id] += lock.files_available >= lock.files_total
    copies = [changes.Copy(e, size[e], complete[e] == len(units)) for e in complete]
    kept = changes.keep(wanted.wish, copies, candidates)
    slice_.units = len(found)
    for unit_id, here in found.items():
        keeps = kept if unit_id in units else frozenset()
        slice_.gone += [lock for lock in here if lock.endpoint_id not in keeps]
        if has := keeps.intersection(lock.endpoint_id for lock in here):
            slice_.kept[unit_id] = has


def _is_unit(wanted: placing.Wanted, lock: sa.Row[Any]) -> bool:
    """Whether the new grouping places this as a whole; a file under a rule of its own is one for every grouping."""
    if lock.kind is DidKind.FILE:
        return wanted.grouping is Grouping.NONE or lock.unit_id == wanted.did_id
    return wanted.grouping is not Grouping.NONE


def _keep(wanted: placing.Wanted, candidates: Sequence[Endpoint], here: Sequence[sa.Row[Any]]) -> frozenset[int]:
    copies = [
        changes.Copy(lock.endpoint_id, _available_bytes(lock), lock.files_available >= lock.files_total)
        for lock in here
    ]
    return changes.keep(wanted.wish, copies, candidates)


def _available_bytes(lock: sa.Row[Any]) -> int:
    """As far as its counters tell: files of one unit are taken to be of one size."""
    return int(lock.bytes_total) * int(lock.files_available) // max(int(lock.files_total), 1)


# --- what would be --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Compared:
    """What a changed wish makes of the copies that the rule has."""

    candidates: tuple[Endpoint, ...]
    #: unit → endpoints where it keeps a copy
    kept: dict[int, frozenset[int]] = field(default_factory=dict)
    #: Copies that the rule would not wish any more, `(unit_id, endpoint_id)`.
    gone: list[tuple[int, int]] = field(default_factory=list)
    #: endpoint → bytes that were reserved for such copies, and not booked yet
    freed: Counter[int] = field(default_factory=Counter)
    slices: int = 0


def compare(s: Session, rule: sa.Row[Any], wanted: placing.Wanted) -> Compared:
    """What `revise` would do, slice by slice. Changes nothing."""
    found = Compared(_check(s, wanted))
    same: dict[frozenset[int], frozenset[int]] = {}
    after: int | None = 0
    while after is not None:
        slice_ = _decide_slice(s, rule, wanted, found.candidates, after)
        after = slice_.reached
        found.slices += 1
        found.kept.update({unit_id: same.setdefault(kept, kept) for unit_id, kept in slice_.kept.items()})
        for lock in slice_.gone:
            found.gone.append((lock.unit_id, lock.endpoint_id))
            if lock.applied_to is not None:
                found.freed[lock.endpoint_id] += lock.bytes_pending
    return found


def wanted_then(
    rule: sa.Row[Any],
    *,
    copies: int | None = None,
    expression: str | None = None,
    grouping: Grouping | None = None,
    spread: str | None = None,
    weight: str | msgspec.UnsetType | None = msgspec.UNSET,
) -> placing.Wanted | None:
    """What the rule would wish; None: what it wishes now."""
    new = _changed(rule, copies, expression, grouping, spread, weight)
    return _wanted(rule, new) if new else None


# --- what is asked for ----------------------------------------------------------------------------------------------


def _row(s: Session, rule_id: int) -> sa.Row[Any]:
    rule = s.execute(sa.select(rules).where(rules.c.id == rule_id)).one_or_none()
    if rule is None:
        raise NotFound(f"there is no rule {rule_id}", hint="`replica rule list` shows them", field="rule")
    if rule.state is RuleState.EXPIRED:
        raise Refused(f"rule {rule_id} has ended", hint="add a new one")
    return rule


def _changed(
    rule: sa.Row[Any],
    copies: int | None,
    expression: str | None,
    grouping: Grouping | None,
    spread: str | None,
    weight: str | msgspec.UnsetType | None,
) -> dict[str, Any]:
    given = {"copies": copies, "expression": expression, "grouping": grouping, "spread": spread}
    new: dict[str, Any] = {k: v for k, v in given.items() if v is not None and v != getattr(rule, k)}
    if weight is not msgspec.UNSET and weight != rule.weight:
        new["weight"] = weight
    return new


def _wanted(rule: sa.Row[Any], new: dict[str, Any]) -> placing.Wanted:
    return replace(placing.Wanted.of(rule), **new)


def _check(s: Session, wanted: placing.Wanted) -> tuple[Endpoint, ...]:
    candidates = expressions.select(wanted.expression, endpoints.snapshot(s))
    for key, field_, use in ((wanted.spread, "spread", "spread by"), (wanted.weight, "weight", "weigh by")):
        if key is None or key == "endpoint":
            continue
        if all(e.value(key) is None for e in candidates):
            raise Invalid(
                f"no endpoint that the expression selects has the attribute {shown(key)} to {use}",
                hint="name an attribute that the endpoints have",
                field=field_,
            )
    return placing.less_what_is_promised(s, candidates)
