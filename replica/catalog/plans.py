"""What adding, changing or deleting a rule would do, before it is done.

Given     the wish, or the id of the rule and what is to change.
Returns   a plan that changed nothing.
Promises  what the act then does, if nothing else happens in between: the same copies at the same endpoints, the same
          files and bytes, each file once, however many slices the act takes. A refusal is what the act meets at first:
          it tries again by itself, and may succeed once something else has changed. Statements grow with the slices.
Partner   replica.catalog.rules and .rule_updates act; .foresight and .rule_changes tell what they would do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import (
    accounts,
    approvals,
    dids,
    endpoints,
    foresight,
    locks,
    placing,
    relocation,
    rule_changes,
    rule_views,
    rules,
)
from replica.catalog.bulk import rows_of
from replica.catalog.foresight import ITEMS_MAX
from replica.catalog.membership import Unguessed, by_index, files_of, is_covered, literal, replicas_of
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import alias_of, replicas
from rules.errors import NotFound
from rules.names import Did
from rules.permissions import Actor
from rules.placement import Choice, Refusal
from rules.states import RULE_WITHOUT_LOCKS, Evidence, Grouping, ReplicaState, RuleState

_UNIT = relocation.UNIT


# --- adding ---------------------------------------------------------------------------------------------------------


def plan(s: Session, actor: Actor, new: wire.NewRule) -> wire.RulePlan:
    """What `rules.add` would do now."""
    did_id, _ = dids.row_id(s, Did.parse(new.did))
    candidates = rules.check(s, new)
    values = rules.values_of(s, new)
    try:
        account_id: int | None = accounts.account_id(s, actor.account)
    except NotFound:
        account_id = None
    same = None
    if account_id is not None:
        same = rules.same_wish(s, values | {"did_id": did_id, "account_id": account_id})
    wanted = placing.Wanted(
        -1, did_id, new.copies, new.expression, values["grouping"], new.spread, new.weight, account_id
    )
    units = _Units(s, wanted)
    whole = foresight.foresee(s, wanted, candidates, units.lacking({}), twice=True)
    name = {e.id: e.name for e in candidates}
    text = _texts(s, whole.choices, whole.refusals.values())
    return wire.RulePlan(
        candidates=[e.name for e in candidates],
        copies=[
            wire.PlannedCopy(unit=text[c.unit_id], endpoint=name[c.endpoint_id], new_bytes=c.new_bytes, why=c.why)
            for c in whole.choices
        ],
        refusals=_refusals(text, whole.refusals.values()),
        new_bytes=sum(total.new_bytes for total in whole.totals.values()),
        units=units.count,
        copies_missing=sum(r.missing_copies for r in whole.refusals.values()),
        totals=[
            wire.PlannedTotal(
                endpoint=name[e],
                units=total.units,
                files=total.files,
                bytes=total.bytes,
                new_files=total.new_files,
                new_bytes=total.new_bytes,
            )
            for e, total in sorted(whole.totals.items(), key=lambda item: name[item[0]])
        ],
        exists=None if same is None else same.id,
        asks=approvals.why_ask(s, did_id, candidates) if new.ask_approval else "",
    )


class _Units:
    """The units of a wish, a slice at a time."""

    def __init__(self, s: Session, wanted: placing.Wanted) -> None:
        self._s, self._wanted = s, wanted
        self.count = 0

    def lacking(self, kept: Mapping[int, frozenset[int]]) -> foresight.Lacking:
        """Those that keep fewer copies than are wished."""
        unit_id = locks.units_of(self._wanted.did_id, self._wanted.grouping).subquery("every_unit").c.unit_id
        nowhere: frozenset[int] = frozenset()
        after = 0
        while True:
            query = sa.select(unit_id).where(unit_id > after).order_by(unit_id).limit(locks.SLICE_UNITS)
            found = list(self._s.execute(query).scalars())
            self.count += len(found)
            for each in found:
                if len(kept.get(each, nowhere)) < self._wanted.copies:
                    yield each, kept.get(each, nowhere)
            if len(found) < locks.SLICE_UNITS:
                return
            after = found[-1]


def _texts(s: Session, choices: Sequence[Choice], refusals: Iterable[Refusal]) -> dict[int, str]:
    shown = {c.unit_id for c in choices} | {r.unit_id for r in list(refusals)[:ITEMS_MAX]}
    return rule_views.did_texts(s, sorted(shown))


def _refusals(text: Mapping[int, str], refusals: Iterable[Refusal]) -> list[wire.PlanRefusal]:
    return [
        wire.PlanRefusal(
            unit=text[r.unit_id], missing_copies=r.missing_copies, obstacles=[o.message for o in r.obstacles]
        )
        for r in list(refusals)[:ITEMS_MAX]
    ]


# --- changing the wish ----------------------------------------------------------------------------------------------


def plan_wish(
    s: Session,
    rule_id: int,
    *,
    copies: int | None = None,
    expression: str | None = None,
    grouping: Grouping | None = None,
    spread: str | None = None,
    weight: str | msgspec.UnsetType | None = msgspec.UNSET,
) -> wire.WishPlan:
    """What `rule_changes.change_wish` would do now: copies to be made and, after that, given up."""
    rule = rules.look(s, rule_id)
    new = rule_changes.wanted_then(
        rule, copies=copies, expression=expression, grouping=grouping, spread=spread, weight=weight
    )
    wanted = new or placing.Wanted.of(rule)
    compared = rule_changes.compare(s, rule, wanted)
    if rule.state in RULE_WITHOUT_LOCKS or (rule.not_before is not None and rule.not_before > s.now) or new is None:
        # Nothing follows: it has no copies yet, or stays as it is.
        return wire.WishPlan(
            candidates=[e.name for e in compared.candidates],
            made=[],
            given_up=[],
            refusals=[],
            missing_copies=0,
            units=0,
        )
    surplus = sa.select(tables.locks.c.unit_id, tables.locks.c.endpoint_id)
    surplus = surplus.where(tables.locks.c.rule_id == rule_id, tables.locks.c.surplus)
    gone = frozenset(compared.gone).union((row.unit_id, row.endpoint_id) for row in s.execute(surplus))
    among = tuple(
        e if e.free_bytes is None else replace(e, free_bytes=e.free_bytes + compared.freed[e.id])
        for e in compared.candidates
    )
    units = _Units(s, wanted)
    whole = foresight.foresee(
        s,
        wanted,
        among,
        units.lacking(compared.kept),
        twice=compared.slices == 1,
        locked=compared.kept if wanted.grouping is Grouping.ALL else None,
        regained=gone,
    )
    name = {e.id: e.name for e in endpoints.snapshot(s)}
    made = {e: (total.units, total.new_files, total.new_bytes) for e, total in whole.totals.items()}
    text = _texts(s, (), whole.refusals.values())
    return wire.WishPlan(
        candidates=[e.name for e in compared.candidates],
        made=_shares(name, made),
        given_up=_shares(name, _given_up(s, rule_id, gone, whole.chosen)),
        refusals=_refusals(text, whole.refusals.values()),
        missing_copies=sum(r.missing_copies for r in whole.refusals.values()),
        units=units.count,
    )


def _shares(name: Mapping[int, str], sums: Mapping[int, tuple[int, int, int]]) -> list[wire.PlannedShare]:
    return [
        wire.PlannedShare(endpoint=name[e], copies=copies, files=files, bytes=size)
        for e, (copies, files, size) in sorted(sums.items(), key=lambda item: name[item[0]])
    ]


def _given_up(
    s: Session, rule_id: int, gone: frozenset[tuple[int, int]], chosen: Sequence[tuple[int, int]]
) -> dict[int, tuple[int, int, int]]:
    """Endpoint → copies that go in the end, and the files and bytes of them that are there and nobody keeps."""
    leaving = sorted(gone.difference(chosen))
    if not leaving:
        return {}
    own = tables.locks
    batch = rows_of(s, "leaving", _UNIT, leaving)
    stays = sa.select(own.c.unit_id, own.c.endpoint_id).where(own.c.rule_id == rule_id, relocation.WISHED)
    kept: Any = sa.except_(stays, sa.select(batch.c.unit_id, batch.c.endpoint_id))
    if chosen:
        more = rows_of(s, "chosen_then", _UNIT, chosen)
        kept = sa.union_all(sa.select(kept.subquery("stays")), sa.select(more.c.unit_id, more.c.endpoint_id))
    pairs = sa.except_(_pairs(batch), _pairs(kept.subquery("kept"))).subquery("leaving_pairs")
    there, walk = replicas_of(s, pairs)
    good = Unguessed(there.c.state == literal(ReplicaState.AVAILABLE))
    free = sa.not_(is_covered(there.c.file_id, there.c.endpoint_id, rule_id, ignoring_ended=True))
    query = (
        sa.select(pairs.c.endpoint_id, sa.func.count(), sa.func.sum(pairs.c.size_bytes))
        .select_from(walk)
        .where(good, free)
        .group_by(pairs.c.endpoint_id)
    )
    with by_index(s):
        found = {e: (count, int(size)) for e, count, size in s.execute(query)}
    copies = Counter(endpoint_id for _, endpoint_id in leaving)
    return {e: (number, *found.get(e, (0, 0))) for e, number in copies.items()}


def _pairs(units: sa.FromClause) -> sa.Select[Any]:
    held = files_of(units)
    return sa.select(held.c.file_id, held.c.endpoint_id, held.c.size_bytes)


# --- deleting -------------------------------------------------------------------------------------------------------


def plan_delete(s: Session, rule_id: int, *, purge: bool | None = None) -> wire.RuleDeletePlan:
    """Which copies would lose their protection if the rule ended now. Three statements, however many files."""
    rule = s.execute(sa.select(tables.rules).where(tables.rules.c.id == rule_id)).one_or_none()
    if rule is None:
        raise rules.missing(rule_id)
    parts: list[wire.Unprotected] = []
    last = 0
    if rule.state is not RuleState.EXPIRED:
        with by_index(s):
            rows = s.execute(_unprotected(s, rule_id)).all()
        parts = [
            wire.Unprotected(
                endpoint=row.endpoint,
                files=int(row.files),
                bytes=int(row.bytes),
                last_copies=int(row.last),
                stopped=int(row.stopped),
            )
            for row in rows
        ]
        last = sum(part.last_copies for part in parts)
    return wire.RuleDeletePlan(
        rule=rule_id,
        purge=rule.purge if purge is None else purge,
        files=sum(part.files for part in parts),
        bytes=sum(part.bytes for part in parts),
        last_copies=last,
        stopped=sum(part.stopped for part in parts),
        endpoints=parts,
        refused=rules.is_locked(rule_id).message if rule.locked and rule.state is not RuleState.EXPIRED else "",
    )


def _unprotected(s: Session, rule_id: int) -> sa.Select[Any]:
    own = tables.locks
    held = files_of(sa.select(own.c.unit_id, own.c.endpoint_id).where(own.c.rule_id == rule_id).subquery("mine"))
    pairs = sa.select(held.c.file_id, held.c.endpoint_id, held.c.size_bytes).distinct().subquery("pairs")
    good = alias_of(replicas, "good")
    good_copies = (
        sa.select(sa.func.count())
        .where(
            good.c.file_id == pairs.c.file_id,
            Unguessed(good.c.state == literal(ReplicaState.AVAILABLE)),
            Unguessed(good.c.tombstone_at.is_(None)),
        )
        .scalar_subquery()
    )
    there, walk = replicas_of(s, pairs)
    available = sa.case((there.c.state == literal(ReplicaState.AVAILABLE), 1), else_=0)
    coming = sa.and_(
        there.c.state == literal(ReplicaState.COPYING),
        there.c.evidence.is_distinct_from(literal(Evidence.DECLARED)),
    )
    goes = (
        sa.select(
            pairs.c.endpoint_id,
            pairs.c.size_bytes,
            available.label("available"),
            sa.case((coming, 1), else_=0).label("coming"),
            sa.func.sum(available).over(partition_by=pairs.c.file_id).label("going"),
            good_copies.label("good"),
        )
        .select_from(walk)
        .where(sa.not_(is_covered(there.c.file_id, there.c.endpoint_id, rule_id, ignoring_ended=True)))
        .subquery("goes")
    )
    is_last = sa.and_(goes.c.available == 1, goes.c.going >= goes.c.good)
    place = tables.endpoints
    return (
        sa.select(
            place.c.name.label("endpoint"),
            sa.func.sum(goes.c.available).label("files"),
            sa.func.sum(goes.c.available * goes.c.size_bytes).label("bytes"),
            sa.func.sum(sa.case((is_last, 1), else_=0)).label("last"),
            sa.func.sum(goes.c.coming).label("stopped"),
        )
        .join_from(goes, place, place.c.id == goes.c.endpoint_id)
        .group_by(place.c.name)
        .order_by(place.c.name)
    )
