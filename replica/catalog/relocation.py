"""Copies that a rule gives up, and copies that are brought elsewhere.

Given     a rule, which the caller holds with all endpoints.
Returns   what was given up, brought elsewhere or could not be, as reasons.
Promises  what a rule gives up it keeps as *surplus* until all that it wishes is available: so no move ever lowers
          protection. A surplus lock protects what is there, orders nothing, and is no copy; one that holds nothing is
          dropped at once. A copy leaves its endpoint only in the transaction that locks its replacement. Statements
          do not grow with files or units.
Partner   rules.relocation decides who moves; replica.catalog.placing finds where to; replica.catalog.rule_changes
          gives up what a changed wish has no use for; replica.catalog.evaluation calls all this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica.catalog import hops, locks, outbox, placing, reasons, usage
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.membership import Unguessed, files_of, is_covered, is_wished, literal, of_pair
from replica.catalog.provision import is_stuck
from replica.db.engine import Session
from replica.db.tables import endpoint_attributes, endpoints, replicas, sites
from replica.db.tables import locks as locks_table
from replica.db.tables import reasons as reasons_table
from rules.errors import InvalidExpression, Refused
from rules.relocation import NEVER, Move, Trouble, decide
from rules.states import Grouping, ReplicaState

#: The attribute of an endpoint, or key of a rule's metadata, that forbids moves by being `never`.
REPLACE = "replace"
#: A site from which no worker was heard for so long writes nothing.
SILENT = timedelta(minutes=15)
#: How many copies of units one evaluation looks at, the smallest first: what can move does so before what cannot.
UNITS_MAX = 10_000

UNIT: Columns = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}

_OPEN = locks_table.c.files_available < locks_table.c.files_total
WISHED = sa.not_(locks_table.c.surplus)
_SET_ASIDE = sa.and_(locks_table.c.surplus, locks_table.c.applied_to.is_not(None))


# --- giving up ------------------------------------------------------------------------------------------------------


def set_aside(s: Session, rule_id: int, copies: Collection[tuple[int, int]]) -> None:
    """The rule does not wish these copies, `(unit_id, endpoint_id)`, any more. What is on its way for them still is,
    as what takes their place may wish the same: `let_go` follows when places were chosen."""
    if copies:
        batch = rows_of(s, "set_aside", UNIT, sorted(copies))
        s.execute(
            locks_table.update()
            .where(_of(rule_id, batch))
            .values(surplus=True, applied_to=sa.case((_OPEN, 0), else_=None), bytes_pending=0)
        )


def _of(rule_id: int, units: sa.FromClause) -> sa.ColumnElement[bool]:
    """The rule's locks on these units there."""
    return sa.and_(
        locks_table.c.rule_id == rule_id,
        locks_table.c.unit_id == units.c.unit_id,
        locks_table.c.endpoint_id == units.c.endpoint_id,
    )


def let_go(s: Session, rule_id: int, limit_files: int) -> int:
    """Of a slice of the copies set aside: what has not come is not ordered any more, and what holds nothing is dropped.

    Returns the files it held, at least 1 for anything. The caller holds the rule and its endpoints.
    """
    slice_, held = _slice(s, rule_id, _SET_ASIDE, limit_files)
    if not slice_:
        return 0
    copies = [(lock.unit_id, lock.endpoint_id) for lock in slice_]
    for part in _parts(s, copies):
        # What no other rule has a lock on, and this one only surplus ones.
        locks.stop_unfinished(
            s, part, lambda f, e: sa.or_(is_covered(f, e, rule_id), is_wished(f, e, rule_id), hops.is_hop(f, e))
        )
    batch = rows_of(s, "let_go", UNIT, copies)
    recount(s, rule_id, batch)
    s.execute(locks_table.update().where(_of(rule_id, batch)).values(applied_to=None))
    _drop(s, rule_id, [(lock.unit_id, lock.endpoint_id) for lock in slice_ if not lock.files_available])
    return max(held, len(slice_))


def has_to_let_go(s: Session, rule_id: int) -> bool:
    return bool(s.execute(sa.select(sa.exists().where(locks_table.c.rule_id == rule_id, _SET_ASIDE))).scalar_one())


def drop_surplus(s: Session, rule_id: int, limit_files: int) -> int:
    """Release a slice of what a satisfied rule has no use for; returns the files it held, at least 1 for anything."""
    slice_, held = _slice(s, rule_id, locks_table.c.surplus, limit_files)
    _drop(s, rule_id, [(lock.unit_id, lock.endpoint_id) for lock in slice_])
    return max(held, len(slice_))


def _slice(s: Session, rule_id: int, which: sa.ColumnElement[bool], limit_files: int) -> tuple[list[sa.Row[Any]], int]:
    """The first of these locks of the rule, as many as hold so many files, at least one; and how many they hold."""
    query = (
        sa.select(locks_table)
        .where(locks_table.c.rule_id == rule_id, which)
        .order_by(locks_table.c.unit_id, locks_table.c.endpoint_id)
        .limit(max(limit_files, 1))
    )
    taken: list[sa.Row[Any]] = []
    held = 0
    for lock in s.execute(query):
        if taken and held + lock.files_total > limit_files:
            break
        taken.append(lock)
        held += lock.files_total
    return taken, held


def is_satisfied_with_surplus(s: Session, rule: sa.Row[Any]) -> bool:
    """All that the rule wishes is there, and it holds what it does not wish."""
    if rule.copies_missing or rule.placed_to is not None or rule.revised_to is not None:
        return False

    def any_lock(*where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return sa.exists(sa.select(1).where(locks_table.c.rule_id == rule.id, *where))

    unfinished = sa.or_(any_lock(WISHED, _OPEN), any_lock(WISHED, locks_table.c.applied_to.is_not(None)))
    return bool(s.execute(sa.select(sa.and_(any_lock(locks_table.c.surplus), sa.not_(unfinished)))).scalar_one())


def _drop(s: Session, rule_id: int, copies: Sequence[tuple[int, int]]) -> None:
    """Remove these surplus locks, and what they alone protected is released."""
    if not copies:
        return
    batch = rows_of(s, "dropped", UNIT, sorted(copies))
    s.execute(
        locks_table.delete().where(
            locks_table.c.rule_id == rule_id,
            locks_table.c.surplus,
            sa.tuple_(locks_table.c.unit_id, locks_table.c.endpoint_id).in_(
                sa.select(batch.c.unit_id, batch.c.endpoint_id)
            ),
        )
    )
    usage.discharge(s, [(rule_id, *copy) for copy in sorted(copies)])
    locks.release(s, _parts(s, copies))


def _parts(s: Session, copies: Collection[tuple[int, int]]) -> Iterator[locks.Part]:
    """The files of these units there, endpoint by endpoint."""
    by_endpoint: dict[int, list[tuple[int, int, int]]] = {}
    for unit_id, endpoint_id in sorted(copies):
        by_endpoint.setdefault(endpoint_id, []).append((unit_id, *locks.WHOLE))
    for endpoint_id, units in sorted(by_endpoint.items()):
        yield locks.Part(endpoint_id, locks.files_of_units(s, units))


def recount(s: Session, rule_id: int, copies: sa.FromClause) -> list[tuple[int, int]]:
    """Count anew what these locks of the rule hold; returns those that were counted otherwise. The caller holds the
    rule, without which no counter moves."""
    held = files_of(copies)
    is_there = Unguessed(replicas.c.state == literal(ReplicaState.AVAILABLE))
    is_vain = sa.and_(replicas.c.state.is_not(None), sa.not_(is_there), is_stuck(held.c.file_id, held.c.endpoint_id))
    counted_ = (
        sa.select(
            held.c.unit_id,
            held.c.endpoint_id,
            sa.func.count().label("files_total"),
            sa.func.sum(sa.case((is_there, 1), else_=0)).label("files_available"),
            sa.func.sum(sa.case((is_vain, 1), else_=0)).label("files_stuck"),
            sa.func.sum(held.c.size_bytes).label("bytes_total"),
        )
        .select_from(held)
        .outerjoin(replicas, of_pair(held))
        .group_by(held.c.unit_id, held.c.endpoint_id)
        .subquery("counted")
    )
    counters = ("files_total", "files_available", "files_stuck", "bytes_total")
    wrong = s.execute(
        locks_table.update()
        .where(
            _of(rule_id, counted_),
            sa.or_(*(locks_table.c[name] != counted_.c[name] for name in counters)),
        )
        .values({name: counted_.c[name] for name in counters})
        .returning(locks_table.c.unit_id, locks_table.c.endpoint_id)
    )
    return [(row.unit_id, row.endpoint_id) for row in wrong]


# --- trouble --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """An endpoint, as far as trouble goes."""

    id: int
    name: str
    writable: bool
    draining: bool
    hears: bool  #: a worker of its site was heard of not long ago
    status_since: datetime | None
    replace: str


@dataclass(frozen=True, slots=True)
class Endangered:
    """A wished copy that may have to move."""

    unit_id: int
    endpoint_id: int
    complete: bool
    troubled_at: datetime | None


def in_trouble(s: Session, rule: sa.Row[Any]) -> tuple[dict[int, Place], list[Endangered]]:
    """Notes which copies of the rule get on no further, and returns these and what is at drained endpoints."""
    places = _places(s)
    hampered = [p.id for p in places.values() if not p.writable or not p.hears]
    mine = locks_table.c.rule_id == rule.id, WISHED
    s.execute(
        locks_table.update()
        .where(
            *mine,
            _OPEN,
            locks_table.c.troubled_at.is_(None),
            sa.or_(locks_table.c.files_stuck > 0, locks_table.c.endpoint_id.in_(hampered)),
        )
        .values(troubled_at=s.now)
    )
    columns = (
        locks_table.c.unit_id,
        locks_table.c.endpoint_id,
        sa.not_(_OPEN).label("complete"),
        locks_table.c.troubled_at,
        locks_table.c.bytes_total,
    )
    found = sa.select(*columns).where(*mine, _OPEN, locks_table.c.troubled_at.is_not(None))
    draining = [p.id for p in places.values() if p.draining]
    query: Any = found
    if draining:
        query = found.union(sa.select(*columns).where(*mine, locks_table.c.endpoint_id.in_(draining)))
    every = query.subquery("endangered")
    rows = s.execute(
        sa.select(every).order_by(every.c.bytes_total, every.c.unit_id, every.c.endpoint_id).limit(UNITS_MAX)
    )
    return places, [Endangered(r.unit_id, r.endpoint_id, r.complete, r.troubled_at) for r in rows]


def _places(s: Session) -> dict[int, Place]:
    said = sa.and_(endpoint_attributes.c.endpoint_id == endpoints.c.id, endpoint_attributes.c.key == REPLACE)
    query = (
        sa.select(endpoints, sites.c.worker_seen_at, endpoint_attributes.c.value.label("replace"))
        .join(sites, sites.c.id == endpoints.c.site_id)
        .outerjoin(endpoint_attributes, said)
    )
    return {
        r.id: Place(
            r.id,
            r.name,
            r.writable,
            r.draining,
            r.worker_seen_at is not None and r.worker_seen_at > s.now - SILENT,
            r.status_since,
            r.replace if isinstance(r.replace, str) else "",
        )
        for r in s.execute(query)
    }


# --- bringing elsewhere ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Relocated:
    moved: int
    found: list[reasons.Found]
    more: bool


def relocate(s: Session, rule: sa.Row[Any], places: dict[int, Place], endangered: Sequence[Endangered]) -> Relocated:
    """Bring elsewhere what has to move and can; what cannot stays, with a reason. The caller holds every endpoint."""
    done = Relocated(0, [], False)
    leaving = _leaving(s, rule, places, endangered)
    if not leaving:
        return done
    try:
        among = placing.candidates(s, rule.expression)
    except (Refused, InvalidExpression) as error:
        done.found = [
            _not_moved(rule.id, places[e], why, error.message, len(units)) for e, (why, units) in leaving.items()
        ]
        return done
    gone: set[int] = set()
    for endpoint_id, (why, unit_ids) in leaving.items():  # one after the other: who moved from one stays for now
        place = places[endpoint_id]
        if isinstance(why, _Never):
            done.found.append(_not_moved(rule.id, place, "it is being drained", str(why), len(unit_ids)))
            continue
        unit_ids = [u for u in unit_ids if u not in gone]
        if not unit_ids:
            continue
        moved, files_moved, refusal = _move(s, rule, endpoint_id, unit_ids, among)
        if moved:
            gone.update(moved)
            done.moved += len(moved)
            message = f"{place.name}: what the rule had there was brought elsewhere, as {why}"
            hint = "" if place.draining else "see what is wrong there"
            done.found.append(reasons.Found(rule.id, placing.MOVED, endpoint_id, message, hint, max(files_moved, 1)))
            outbox.record(s, "rule.relocated", rule.id, endpoint=place.name, copies=len(moved), why=why)
            among = placing.candidates(s, rule.expression)
        if refusal is not None:
            done.found.append(_not_moved(rule.id, place, why, refusal, len(unit_ids) - len(moved)))
    done.more = bool(done.moved) and len(endangered) == UNITS_MAX
    return done


class _Never(str):
    """Why copies stay at an endpoint that is to be emptied."""


def _leaving(
    s: Session, rule: sa.Row[Any], places: dict[int, Place], endangered: Sequence[Endangered]
) -> dict[int, tuple[str, list[int]]]:
    """Endpoint → why copies must leave it, and the units; drained endpoints first."""
    if not endangered:
        return {}
    before = s.execute(
        sa.select(sa.func.count())
        .select_from(reasons_table)
        .where(reasons_table.c.rule_id == rule.id, reasons_table.c.code == placing.MOVED)
    ).scalar_one()
    of_rule = (rule.metadata or {}).get(REPLACE)
    found: dict[int, tuple[str, list[int]]] = {}
    for copy in sorted(endangered, key=lambda c: (not places[c.endpoint_id].draining, c.endpoint_id, c.unit_id)):
        place = places[copy.endpoint_id]
        decision = decide(
            Trouble(
                copy.complete,
                place.draining,
                place.writable,
                _seconds_since(s, copy.troubled_at, place.status_since),
                before,
                NEVER if NEVER in (of_rule, place.replace) else "",
            )
        )
        if isinstance(decision, Move):
            found.setdefault(place.id, (decision.why, []))[1].append(copy.unit_id)
        elif place.draining:
            found.setdefault(place.id, (_Never(decision.why), []))[1].append(copy.unit_id)
    return found


def _seconds_since(s: Session, troubled_at: datetime | None, status_since: datetime | None) -> float | None:
    """Patience begins anew when a person has done something about the endpoint."""
    if troubled_at is None:
        return None
    return (s.now - max(troubled_at, status_since or troubled_at)).total_seconds()


def _move(
    s: Session, rule: sa.Row[Any], endpoint_id: int, unit_ids: Sequence[int], among: Sequence[Any]
) -> tuple[list[int], int, str | None]:
    """Replace the copies of these units at the endpoint by others; returns the units that moved, how many files that
    takes, and why one of the others did not."""
    wanted = placing.Wanted.of(rule)
    mine = sa.select(locks_table.c.unit_id, locks_table.c.endpoint_id).where(locks_table.c.rule_id == rule.id, WISHED)
    if rule.grouping is Grouping.ALL:
        unit_ids = sorted(set(s.execute(mine.with_only_columns(locks_table.c.unit_id)).scalars()))
    else:
        batch = rows_of(s, "moving", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
        mine = mine.where(locks_table.c.unit_id.in_(sa.select(batch.c.unit_id)))
    stays: dict[int, set[int]] = {u: set() for u in unit_ids}
    had: set[tuple[int, int]] = set()
    for row in s.execute(mine):
        had.add((row.unit_id, row.endpoint_id))
        if row.endpoint_id != endpoint_id:
            stays[row.unit_id].add(row.endpoint_id)
    if rule.grouping is Grouping.ALL:
        kept = frozenset().union(*stays.values())
        groups = {len(kept) + 1: list(unit_ids)}
    else:
        groups = {}
        for unit_id in unit_ids:
            groups.setdefault(len(stays[unit_id]) + 1, []).append(unit_id)
    moved: list[int] = []
    files_moved = 0
    refusal: str | None = None
    for copies, group in sorted(groups.items()):
        # As many copies as there are: what else is missing is not ours to place.
        proposal = placing.propose(
            s, replace(wanted, copies=copies), group, among, locked={u: stays[u] for u in group}, left={endpoint_id}
        )
        proposal.choices = [c for c in proposal.choices if c.endpoint_id not in _everywhere(stays, rule, c.unit_id)]
        placing.write_locks(s, wanted, proposal)
        replaced = {c.unit_id for c in proposal.choices}
        set_aside(s, rule.id, [(u, endpoint_id) for u in replaced if (u, endpoint_id) in had])
        moved += sorted(replaced)
        files_moved += sum(proposal.facts.new_files(c) for c in proposal.choices)
        for refused in proposal.refusals:
            others = [o.message for o in refused.obstacles if o.endpoint_id not in (None, endpoint_id)]
            refusal = refusal or "; ".join(others[:3]) or "the expression selects no other"
    return moved, files_moved, refusal


def _everywhere(stays: dict[int, set[int]], rule: sa.Row[Any], unit_id: int) -> Iterable[int]:
    """Where a new copy of the unit would be none: with grouping ALL, wherever any unit stays."""
    return frozenset().union(*stays.values()) if rule.grouping is Grouping.ALL else stays[unit_id]


def _not_moved(rule_id: int, place: Place, why: str, obstacle: str, units: int) -> reasons.Found:
    message = f"{place.name}: {why}, but its copies stay: {obstacle}"
    return reasons.Found(
        rule_id, reasons.NOT_MOVED, place.id, message, "widen the rule's expression, or add space elsewhere", units
    )
