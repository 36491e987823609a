"""Gather what placement must know, ask rules.placement, write the locks.

Given     a rule and the units it still wants placed.
Returns   a Proposal, which changes nothing; or, applied, locks that protect from this moment on.
Promises  what is promised at an endpoint is promised once: who places new bytes holds the endpoints and looks at
          their space after that. A unit that is refused delays no other. Statements do not grow with units or files.
Partner   rules.placement decides; replica.catalog.provision makes replicas and transfers of the locks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from replica.catalog import endpoints, guards
from replica.catalog.bulk import rows_of
from replica.catalog.membership import Unguessed, any_of, files_of, literal, of_pair
from replica.catalog.provision import is_stuck
from replica.catalog.reasons import Found
from replica.db.engine import Session
from replica.db.tables import locks, replicas
from rules import expressions, placement
from rules.endpoints import Endpoint
from rules.states import Grouping, ReplicaState

#: A replica in these states is there, or on its way to being there.
_COUNTS = (ReplicaState.COPYING, ReplicaState.AVAILABLE)

_HINTS: Mapping[str, str] = {
    "no_space": "free space there, raise its capacity, or widen the rule's expression",
    "over_quota": "ask for more quota there, or widen the rule's expression",
    "writing_off": "switch writing on again, or widen the rule's expression",
    "domain_used": "add an endpoint in another failure domain, or ask for fewer copies or a smaller spread",
    "too_few_candidates": "widen the rule's expression, or ask for fewer copies or a smaller spread",
    "no_domain": "give the endpoint that attribute, or spread by another",
    "no_weight": "give the endpoint that attribute as a number above 0",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of a rule placement needs."""

    rule_id: int
    did_id: int
    copies: int
    expression: str
    grouping: Grouping
    spread: str
    weight: str | None

    @classmethod
    def of(cls, rule: sa.Row[Any]) -> Wanted:
        return cls(rule.id, rule.did_id, rule.copies, rule.expression, rule.grouping, rule.spread, rule.weight)

    @property
    def wish(self) -> placement.Wish:
        # The lot is drawn from what is wished, not from the number of the row: so a plan shown before is what happens.
        text = repr((self.did_id, self.expression, self.grouping.name, self.spread, self.weight)).encode()
        lot = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        return placement.Wish(lot, self.copies, self.spread, self.weight)


@dataclass(slots=True)
class Facts:
    """Of the units in question: their size, and what of them is where."""

    files: dict[int, int] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    #: unit → endpoint → bytes that need not be booked there again
    present: dict[int, dict[int, int]] = field(default_factory=dict)
    #: unit → endpoints where every file is available
    complete: dict[int, set[int]] = field(default_factory=dict)
    #: unit → endpoints where the rule has a lock on it
    locked: dict[int, set[int]] = field(default_factory=dict)


@dataclass(slots=True)
class Proposal:
    facts: Facts
    choices: list[placement.Choice] = field(default_factory=list)
    refusals: list[placement.Refusal] = field(default_factory=list)

    @property
    def copies_missing(self) -> int:
        return sum(refusal.missing_copies for refusal in self.refusals)

    @property
    def moves_nothing(self) -> bool:
        """All that was chosen is there already: nothing is booked, made or moved."""
        return all(c.endpoint_id in self.facts.complete.get(c.unit_id, ()) for c in self.choices)

    def reasons(self, rule_id: int) -> list[Found]:
        found: list[Found] = []
        for refusal in self.refusals:
            count = self.facts.files.get(refusal.unit_id, 0)
            found += [
                Found(rule_id, o.code, o.endpoint_id, o.message, _HINTS.get(o.code, ""), max(count, 1))
                for o in refusal.obstacles
            ]
        return found


def candidates(s: Session, expression: str) -> tuple[Endpoint, ...]:
    """The endpoints an expression selects, with the space that is left there."""
    return less_what_is_promised(s, expressions.select(expression, endpoints.snapshot(s)))


def less_what_is_promised(s: Session, among: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """The same, their free space less what large rules have reserved and not booked yet."""
    query = sa.select(locks.c.endpoint_id, sa.func.sum(locks.c.bytes_pending)).where(locks.c.applied_to.is_not(None))
    promised = {e: int(size) for e, size in s.execute(query.group_by(locks.c.endpoint_id))}
    return tuple(
        replace(e, free_bytes=max(0, e.free_bytes - promised[e.id]))
        if e.free_bytes is not None and e.id in promised
        else e
        for e in among
    )


def propose(s: Session, wanted: Wanted, unit_ids: Sequence[int], among: Sequence[Endpoint]) -> Proposal:
    """Where the missing copies of these units would go. Changes nothing."""
    facts = _facts(s, wanted, unit_ids, among)
    proposal = Proposal(facts)
    if not unit_ids:
        return proposal
    if wanted.grouping is Grouping.ALL:
        _propose_together(s, wanted, unit_ids, among, proposal)
    else:
        units = [
            placement.Unit(u, facts.bytes.get(u, 0), facts.present.get(u, {}), frozenset(facts.locked.get(u, ())))
            for u in unit_ids
        ]
        plan = placement.place(wanted.wish, units, among)
        proposal.choices += plan.choices
        proposal.refusals += plan.refusals
    return proposal


def _propose_together(
    s: Session, wanted: Wanted, unit_ids: Sequence[int], among: Sequence[Endpoint], proposal: Proposal
) -> None:
    """Everything on one set of endpoints: first what the rule has chosen before, then what is still missing."""
    facts = proposal.facts
    taken = frozenset(
        endpoint_id
        for (endpoint_id,) in s.execute(
            sa.select(locks.c.endpoint_id).where(locks.c.rule_id == wanted.rule_id).distinct()
        )
    )
    left = {e.id: e.free_bytes for e in among}
    if taken:
        # New datasets join the others. Whatever spread was asked for, the set was chosen by it.
        joining = [u for u in unit_ids if not taken <= facts.locked.get(u, set())]
        together = placement.Wish(wanted.wish.rule_id, len(taken))
        units = [
            placement.Unit(u, facts.bytes.get(u, 0), facts.present.get(u, {}), frozenset(facts.locked.get(u, ())))
            for u in joining
        ]
        plan = placement.place(together, units, [e for e in among if e.id in taken])
        proposal.choices += plan.choices
        proposal.refusals += plan.refusals
        for choice in plan.choices:
            if (free := left[choice.endpoint_id]) is not None:
                left[choice.endpoint_id] = free - choice.new_bytes
    if len(taken) >= wanted.copies:
        return
    total, present = _together(s, unit_ids, among)
    merged = placement.Unit(wanted.did_id, total, present, taken)
    space = [replace(e, free_bytes=left[e.id]) for e in among]
    plan = placement.place(wanted.wish, [merged], space)
    for choice in plan.choices:
        for unit_id in unit_ids:
            here = facts.present.get(unit_id, {}).get(choice.endpoint_id, 0)
            new_bytes = facts.bytes.get(unit_id, 0) - here
            proposal.choices.append(placement.Choice(unit_id, choice.endpoint_id, new_bytes, choice.why))
    for refusal in plan.refusals:
        facts.files[refusal.unit_id] = sum(facts.files.get(u, 0) for u in unit_ids)
        missing = refusal.missing_copies * max(len(unit_ids), 1)
        proposal.refusals.append(placement.Refusal(refusal.unit_id, missing, refusal.obstacles))


def place(s: Session, wanted: Wanted, unit_ids: Sequence[int], among: Sequence[Endpoint]) -> Proposal:
    """Choose endpoints for these units and lock them there. The caller holds the rule."""
    proposal: Proposal | None = None
    if s.postgresql:
        quiet = propose(s, wanted, unit_ids, among)
        if quiet.moves_nothing:
            guards.keep_endpoints(s, sorted({c.endpoint_id for c in quiet.choices}))
            proposal = quiet
        else:
            guards.change_endpoints(s, sorted(e.id for e in among))
            among = candidates(s, wanted.expression)  # their space as it is now that nobody else can take it
    if proposal is None:
        proposal = propose(s, wanted, unit_ids, among)
    _write_locks(s, wanted.rule_id, proposal)
    return proposal


def _write_locks(s: Session, rule_id: int, proposal: Proposal) -> None:
    if not proposal.choices:
        return
    columns = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}
    chosen = rows_of(s, "chosen", columns, [(c.unit_id, c.endpoint_id) for c in proposal.choices])
    held = files_of(chosen)
    if not proposal.moves_nothing:
        # Copies on their way are counted as missing: whoever finishes them must wait until our lock can be seen.
        guards.change_replicas(s, held, missing=True)
    available = sa.case((replicas.c.state == literal(ReplicaState.AVAILABLE), 1), else_=0)
    at_rest = sa.case(
        (sa.and_(replicas.c.state == literal(ReplicaState.AVAILABLE), replicas.c.tombstone_at.is_(None)), 1), else_=0
    )
    stuck = sa.case(
        (replicas.c.state.is_(None), 0),
        (replicas.c.state == literal(ReplicaState.AVAILABLE), 0),
        (is_stuck(held.c.file_id, held.c.endpoint_id), 1),
        else_=0,
    )
    missing_bytes = sa.case((replicas.c.state.is_(None), held.c.size_bytes), else_=0)
    count = sa.func.count()
    counted = (
        sa.select(
            held.c.unit_id,
            held.c.endpoint_id,
            count.label("files"),
            sa.func.sum(available).label("available"),
            sa.func.sum(stuck).label("stuck"),
            sa.func.sum(held.c.size_bytes).label("bytes"),
            sa.case((sa.func.sum(at_rest) == count, None), else_=0).label("applied_to"),
            sa.func.sum(missing_bytes).label("pending"),
        )
        .select_from(held)
        .outerjoin(replicas, of_pair(held))
        .group_by(held.c.unit_id, held.c.endpoint_id)
        .subquery("counted")
    )
    s.execute(
        locks.insert().from_select(
            [
                "rule_id",
                "unit_id",
                "endpoint_id",
                "files_total",
                "files_available",
                "files_stuck",
                "bytes_total",
                "applied_to",
                "bytes_pending",
            ],
            sa.select(
                sa.literal(rule_id, sa.BigInteger()),
                chosen.c.unit_id,
                chosen.c.endpoint_id,
                sa.func.coalesce(counted.c.files, 0),
                sa.func.coalesce(counted.c.available, 0),
                sa.func.coalesce(counted.c.stuck, 0),
                sa.func.coalesce(counted.c.bytes, 0),
                counted.c.applied_to,
                sa.func.coalesce(counted.c.pending, 0),
            )
            .select_from(chosen)
            .outerjoin(
                counted,
                sa.and_(counted.c.unit_id == chosen.c.unit_id, counted.c.endpoint_id == chosen.c.endpoint_id),
            ),
        )
    )


def _facts(s: Session, wanted: Wanted, unit_ids: Sequence[int], among: Sequence[Endpoint]) -> Facts:
    facts = Facts()
    units = rows_of(s, "units", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
    held = files_of(units)
    sizes = sa.select(held.c.unit_id, sa.func.count(), sa.func.sum(held.c.size_bytes)).group_by(held.c.unit_id)
    for unit_id, count, size_bytes in s.execute(sizes):
        facts.files[unit_id] = count
        facts.bytes[unit_id] = int(size_bytes)
    available = sa.case((replicas.c.state == literal(ReplicaState.AVAILABLE), 1), else_=0)
    coverage = (
        sa.select(held.c.unit_id, replicas.c.endpoint_id, sa.func.sum(held.c.size_bytes), sa.func.sum(available))
        .select_from(held)
        .join(replicas, replicas.c.file_id == held.c.file_id)
        .where(
            Unguessed(replicas.c.endpoint_id.in_([e.id for e in among])), Unguessed(any_of(replicas.c.state, _COUNTS))
        )
        .group_by(held.c.unit_id, replicas.c.endpoint_id)
    )
    for unit_id, endpoint_id, size_bytes, whole in s.execute(coverage):
        facts.present.setdefault(unit_id, {})[endpoint_id] = int(size_bytes)
        if whole == facts.files.get(unit_id):
            facts.complete.setdefault(unit_id, set()).add(endpoint_id)
    held_already = sa.select(locks.c.unit_id, locks.c.endpoint_id).join(units, units.c.unit_id == locks.c.unit_id)
    for unit_id, endpoint_id in s.execute(held_already.where(locks.c.rule_id == wanted.rule_id)):
        facts.locked.setdefault(unit_id, set()).add(endpoint_id)
    return facts


def _together(s: Session, unit_ids: Sequence[int], among: Sequence[Endpoint]) -> tuple[int, dict[int, int]]:
    """Bytes of all units as one, and what of them is at which endpoint; a file in two datasets counts once."""
    units = rows_of(s, "units", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
    held = files_of(units)
    once = sa.select(held.c.file_id, held.c.size_bytes).distinct().subquery()
    total = s.execute(sa.select(sa.func.coalesce(sa.func.sum(once.c.size_bytes), 0))).scalar_one()
    coverage = (
        sa.select(replicas.c.endpoint_id, sa.func.sum(once.c.size_bytes))
        .select_from(once)
        .join(replicas, replicas.c.file_id == once.c.file_id)
        .where(
            Unguessed(replicas.c.endpoint_id.in_([e.id for e in among])), Unguessed(any_of(replicas.c.state, _COUNTS))
        )
        .group_by(replicas.c.endpoint_id)
    )
    return int(total), {endpoint_id: int(size) for endpoint_id, size in s.execute(coverage)}
