"""Where everything that a wish lacks would go, slice by slice as the act goes about it, without a row being written.

Given     a wish and the units that lack copies, in order, with the endpoints where their other copies are.
Returns   Foreseen: all choices and refusals, and what the choices come to at each endpoint, each file once.
Promises  each slice is chosen with the space and quota that the slices before it leave, counted as the act counts
          them. Statements grow with the slices; files are looked at one by one only where datasets share some, or a
          part is there already.
Partner   replica.catalog.plans asks; replica.catalog.placing decides, here as in the act.

The act chooses for all slices of datasets before it makes anything (see replica.catalog.evaluation): so what two of
them share is reserved for both as long as it goes on choosing, and is booked once after that. The same holds here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from replica.catalog import locks, placing, usage
from replica.catalog.bulk import Columns, ids_of, rows_of
from replica.catalog.coverage import Pair
from replica.catalog.membership import Unguessed, any_of, by_index, files_of, literal, of_pair
from replica.db.engine import Session
from replica.db.tables import deletions, dids, replicas
from rules.endpoints import Endpoint
from rules.placement import Choice, Refusal
from rules.states import DeletionState, DidKind, Grouping, ReplicaState

#: How many choices and refusals are kept to be listed one by one.
ITEMS_MAX = 1_000

#: Units that lack copies, and where they have some.
Lacking = Iterator[tuple[int, frozenset[int]]]

_UNIT: Columns = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}
_COUNTS = (ReplicaState.COPYING, ReplicaState.AVAILABLE)


@dataclass(slots=True)
class Total:
    """What the choices at one endpoint come to, each file once."""

    units: int = 0
    files: int = 0
    bytes: int = 0
    #: Of these, what is neither there nor on its way.
    new_files: int = 0
    new_bytes: int = 0


@dataclass(slots=True)
class Foreseen:
    choices: list[Choice] = field(default_factory=list)
    #: unit → its refusal; a unit that is looked at twice has the later one.
    refusals: dict[int, Refusal] = field(default_factory=dict)
    totals: dict[int, Total] = field(default_factory=dict)
    #: All choices, if the caller asked for them.
    chosen: list[Pair] = field(default_factory=list)
    #: Choices that are counted file by file.
    uncertain: list[Pair] = field(default_factory=list)
    #: Choices of datasets that may share files.
    shared: list[Pair] = field(default_factory=list)


def foresee(
    s: Session,
    wanted: placing.Wanted,
    among: tuple[Endpoint, ...],
    lacking: Lacking,
    *,
    twice: bool,
    locked: Mapping[int, frozenset[int]] | None = None,
    regained: frozenset[Pair] = frozenset(),
) -> Foreseen:
    """`twice`: what the first slice refuses is tried once more with the second, as evaluation begins from the
    beginning. `locked`: with grouping ALL, where every unit has copies. `regained`: copies that the rule has and would
    give up: chosen again, they are nothing new."""
    whole = Foreseen()
    charges = dict(s.charges)
    try:
        _go_on(s, wanted, among, lacking, twice, locked, regained, whole)
    finally:
        s.charges.clear()
        s.charges.update(charges)
    _count(s, whole)
    return whole


def _go_on(
    s: Session,
    wanted: placing.Wanted,
    among: tuple[Endpoint, ...],
    lacking: Lacking,
    twice: bool,
    locked: Mapping[int, frozenset[int]] | None,
    regained: frozenset[Pair],
    whole: Foreseen,
) -> None:
    again: dict[int, frozenset[int]] = {}
    ahead = next(lacking, None)
    while ahead is not None or again:
        slice_ = again
        while ahead is not None and (wanted.grouping is Grouping.ALL or len(slice_) < locks.SLICE_UNITS):
            slice_[ahead[0]] = ahead[1]
            ahead = next(lacking, None)
        promised = _promised(s, wanted, slice_, whole)
        proposal = placing.propose(s, wanted, list(slice_), among, locked=locked or slice_, promised=promised)
        shared = _shared(s, slice_) if proposal.facts.coverage.shared else frozenset()
        _add(whole, proposal, slice_, shared, regained)
        if ahead is None:
            return
        again = {}
        if twice:
            again = {r.unit_id: slice_[r.unit_id] for r in proposal.refusals}
            for c in proposal.choices:
                if c.unit_id in again:
                    again[c.unit_id] |= {c.endpoint_id}
            twice = False
        among = _less(s, proposal, among)
        if proposal.limited:
            _charge(s, wanted, proposal, shared, whole)
        whole.shared += [(c.unit_id, c.endpoint_id) for c in proposal.choices if c.unit_id in shared]


def _add(
    whole: Foreseen,
    proposal: placing.Proposal,
    units: Iterable[int],
    shared: frozenset[int],
    regained: frozenset[Pair],
) -> None:
    for unit_id in units:
        whole.refusals.pop(unit_id, None)
    whole.refusals.update({r.unit_id: r for r in proposal.refusals})
    facts = proposal.facts
    for choice in proposal.choices:
        pair = choice.unit_id, choice.endpoint_id
        if regained:
            whole.chosen.append(pair)
        if pair in regained:
            continue
        total = whole.totals.setdefault(choice.endpoint_id, Total())
        total.units += 1
        complete = choice.endpoint_id in facts.complete.get(choice.unit_id, ())
        if choice.unit_id in shared or (not complete and pair in facts.coverage.begun):
            whole.uncertain.append(pair)
            continue
        files, size = facts.files.get(choice.unit_id, 0), facts.bytes.get(choice.unit_id, 0)
        total.files += files
        total.bytes += size
        if not complete:
            total.new_files += files
            total.new_bytes += size
    whole.choices += proposal.choices[: max(0, ITEMS_MAX - len(whole.choices))]


def _shared(s: Session, unit_ids: Iterable[int]) -> frozenset[int]:
    """Those that are datasets and may have files in common with others."""
    batch = ids_of(s, "maybe_shared", sorted(unit_ids))
    query = sa.select(dids.c.id).join(batch, batch.c.id == dids.c.id)
    dataset = Unguessed(sa.and_(dids.c.shared, dids.c.kind == literal(DidKind.DATASET)))
    return frozenset(s.execute(query.where(dataset)).scalars())


def _less(s: Session, proposal: placing.Proposal, among: Sequence[Endpoint]) -> tuple[Endpoint, ...]:
    """The space that these choices would leave: what has a replica row already is booked already."""
    if all(e.free_bytes is None for e in among):
        return tuple(among)
    facts = proposal.facts
    reserved: dict[int, int] = {}
    parts: list[Pair] = []
    for c in proposal.choices:
        if (c.unit_id, c.endpoint_id) not in facts.coverage.begun:
            reserved[c.endpoint_id] = reserved.get(c.endpoint_id, 0) + facts.bytes.get(c.unit_id, 0)
        elif c.endpoint_id not in facts.complete.get(c.unit_id, ()):
            parts.append((c.unit_id, c.endpoint_id))
    if parts:
        held = files_of(rows_of(s, "begun", _UNIT, parts))
        query = (
            sa.select(held.c.endpoint_id, sa.func.sum(held.c.size_bytes))
            .select_from(held)
            .outerjoin(replicas, of_pair(held))
            .where(replicas.c.file_id.is_(None))
            .group_by(held.c.endpoint_id)
        )
        with by_index(s):
            for endpoint_id, size in s.execute(query):
                reserved[endpoint_id] = reserved.get(endpoint_id, 0) + int(size)
    return tuple(
        e if e.free_bytes is None else replace(e, free_bytes=max(0, e.free_bytes - reserved.get(e.id, 0)))
        for e in among
    )


# --- quotas ---------------------------------------------------------------------------------------------------------


def _charge(
    s: Session, wanted: placing.Wanted, proposal: placing.Proposal, shared: frozenset[int], whole: Foreseen
) -> None:
    """Quotas are asked with what this transaction has charged so far: as if these copies were made."""
    facts = proposal.facts
    compared: list[Pair] = []
    more: dict[int, int] = {}
    for c in proposal.choices:
        if c.unit_id in shared:
            compared.append((c.unit_id, c.endpoint_id))
        else:
            size = facts.bytes.get(c.unit_id, 0) - facts.charged.get(c.unit_id, {}).get(c.endpoint_id, 0)
            more[c.endpoint_id] = more.get(c.endpoint_id, 0) + size
    for endpoint_id, size in _new_charges(s, wanted, compared, whole.shared).items():
        more[endpoint_id] = more.get(endpoint_id, 0) + size
    assert wanted.account_id is not None, "only an account has quotas"
    for endpoint_id, size in more.items():
        key = (wanted.account_id, endpoint_id)
        files, total = s.charges.get(key, (0, 0))
        s.charges[key] = (files, total + size)


def _new_charges(
    s: Session, wanted: placing.Wanted, compared: Sequence[Pair], before: Sequence[Pair]
) -> dict[int, int]:
    """Endpoint → bytes of these choices that the account would not hold there by its locks and the choices before."""
    if not compared:
        return {}
    now = _pairs(rows_of(s, "charged_now", _UNIT, compared))
    new: Any = sa.except_(now, _pairs(rows_of(s, "charged_before", _UNIT, before))) if before else now.distinct()
    once = new.subquery("charged_new")
    held = usage._held(sa.literal(wanted.account_id, sa.BigInteger()), once.c.file_id, once.c.endpoint_id)
    query = sa.select(once.c.endpoint_id, sa.func.sum(once.c.size_bytes)).where(sa.not_(held))
    with by_index(s):
        return {e: int(size) for e, size in s.execute(query.group_by(once.c.endpoint_id))}


def _promised(
    s: Session, wanted: placing.Wanted, units: Iterable[int], whole: Foreseen
) -> dict[int, dict[int, int]] | None:
    """Unit → endpoint → bytes that the account would hold there by the choices before, and does not hold now."""
    if wanted.account_id is None or not whole.shared or not s.charges:
        return None
    batch = rows_of(s, "asked_now", {"unit_id": sa.BigInteger()}, [(u,) for u in sorted(units)])
    now = files_of(batch)
    before = _pairs(rows_of(s, "chosen_before", _UNIT, whole.shared)).distinct().subquery("before")
    both = sa.select(now.c.unit_id, before.c.endpoint_id, now.c.file_id, now.c.size_bytes)
    once = both.join(before, before.c.file_id == now.c.file_id).distinct().subquery("promised_once")
    held = usage._held(sa.literal(wanted.account_id, sa.BigInteger()), once.c.file_id, once.c.endpoint_id)
    query = sa.select(once.c.unit_id, once.c.endpoint_id, sa.func.sum(once.c.size_bytes)).where(sa.not_(held))
    found: dict[int, dict[int, int]] = {}
    for unit_id, endpoint_id, size in s.execute(query.group_by(once.c.unit_id, once.c.endpoint_id)):
        found.setdefault(unit_id, {})[endpoint_id] = int(size)
    return found


# --- counting file by file ------------------------------------------------------------------------------------------


def _count(s: Session, whole: Foreseen) -> None:
    if not whole.uncertain:
        return
    pairs = _pairs(rows_of(s, "uncertain", _UNIT, whole.uncertain)).distinct().subquery("uncertain_pairs")
    comes_back = sa.exists(
        sa.select(1).where(
            deletions.c.file_id == pairs.c.file_id,
            Unguessed(deletions.c.endpoint_id == pairs.c.endpoint_id),
            Unguessed(deletions.c.state == literal(DeletionState.QUEUED)),
            Unguessed(deletions.c.was == literal(ReplicaState.AVAILABLE)),
        )
    )
    there = sa.or_(
        any_of(replicas.c.state, _COUNTS), sa.and_(replicas.c.state == literal(ReplicaState.DELETING), comes_back)
    )
    new = sa.case((there, 0), else_=1).label("new")
    each = sa.select(pairs.c.endpoint_id, pairs.c.size_bytes, new).outerjoin_from(pairs, replicas, of_pair(pairs))
    row = each.subquery("counted_pairs")
    query = sa.select(
        row.c.endpoint_id,
        sa.func.count(),
        sa.func.sum(row.c.size_bytes),
        sa.func.sum(row.c.new),
        sa.func.sum(row.c.new * row.c.size_bytes),
    ).group_by(row.c.endpoint_id)
    with by_index(s):
        for endpoint_id, *sums in s.execute(query).all():
            total, more = whole.totals[endpoint_id], [int(each) for each in sums]
            total.files += more[0]
            total.bytes += more[1]
            total.new_files += more[2]
            total.new_bytes += more[3]


def _pairs(units: sa.FromClause) -> sa.Select[Any]:
    held = files_of(units)
    return sa.select(held.c.file_id, held.c.endpoint_id, held.c.size_bytes)
