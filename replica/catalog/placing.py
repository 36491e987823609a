"""Gather what placement must know, ask rules.placement, write the locks.

Given     a rule and the units it still wants placed.
Returns   a Proposal, which changes nothing; or, applied, locks that protect from this moment on.
Promises  what is promised at an endpoint is promised once: who places new bytes holds the endpoints and looks at
          their space after that. A unit that is refused delays no other. Statements do not grow with units or files.
Partner   rules.placement decides; replica.catalog.provision makes replicas and transfers of the locks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from replica.catalog import coverage, endpoints, guards, quotas, usage
from replica.catalog.bulk import Columns, insert, rows_of
from replica.catalog.coverage import Coverage
from replica.catalog.membership import Unguessed, any_of, files_of, literal, of_pair
from replica.catalog.provision import is_stuck
from replica.catalog.reasons import Found
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import locks, reasons, replicas
from rules import expressions, placement
from rules.endpoints import Endpoint
from rules.errors import Conflict
from rules.states import Grouping, ReplicaState

#: A reason that says that copies were brought away from an endpoint; for so long they do not go back there.
MOVED = "moved"
LEFT_FOR = timedelta(days=1)

#: A replica in these states is there, or on its way to being there.
_COUNTS = (ReplicaState.COPYING, ReplicaState.AVAILABLE)

_UNIT_PAIR: Columns = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}
#: What a lock counts.
_COUNTED = ("files_total", "files_available", "files_stuck", "bytes_total", "applied_to", "bytes_pending")

_HINTS: Mapping[str, str] = {
    "no_space": "free space there, raise its capacity, or widen the rule's expression",
    "over_quota": "ask for more quota there, or widen the rule's expression",
    "writing_off": "switch writing on again, or widen the rule's expression",
    "domain_used": "add an endpoint in another failure domain, or ask for fewer copies or a smaller spread",
    "too_few_candidates": "widen the rule's expression, or ask for fewer copies or a smaller spread",
    "no_domain": "give the endpoint that attribute, or spread by another",
    "no_weight": "give the endpoint that attribute as a number above 0",
    "draining": "widen the rule's expression, or end the draining",
    "left": "see what is wrong there, or widen the rule's expression",
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
    account_id: int | None = None  #: whose quotas count; None: nobody's

    @classmethod
    def of(cls, rule: sa.Row[Any]) -> Wanted:
        return cls(
            rule.id,
            rule.did_id,
            rule.copies,
            rule.expression,
            rule.grouping,
            rule.spread,
            rule.weight,
            rule.account_id,
        )

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
    #: the same in files
    present_files: dict[int, dict[int, int]] = field(default_factory=dict)
    #: unit → endpoints where every file is available
    complete: dict[int, set[int]] = field(default_factory=dict)
    #: unit → endpoints where the rule has a lock on it
    locked: dict[int, set[int]] = field(default_factory=dict)
    #: unit → endpoint → bytes that the account keeps there already
    charged: dict[int, dict[int, int]] = field(default_factory=dict)
    #: endpoints that copies of the rule were brought away from
    left: frozenset[int] = frozenset()
    #: where all of this comes from
    coverage: Coverage = field(default_factory=Coverage)

    def unit(self, unit_id: int) -> placement.Unit:
        return placement.Unit(
            unit_id,
            self.bytes.get(unit_id, 0),
            self.present.get(unit_id, {}),
            frozenset(self.locked.get(unit_id, ())),
            self.charged.get(unit_id, {}),
            self.left,
        )

    def new_files(self, choice: placement.Choice) -> int:
        """How many files must move for this choice."""
        there = self.present_files.get(choice.unit_id, {}).get(choice.endpoint_id, 0)
        return self.files.get(choice.unit_id, 0) - there


@dataclass(slots=True)
class Proposal:
    facts: Facts
    #: Whether a quota of the account had a say.
    limited: bool = False
    #: The caller held the endpoints alone before it looked: nothing came there or went since.
    held: bool = False
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
    """The endpoints in service that an expression selects, with the space that is left there."""
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
        if not e.decommissioned
    )


def propose(
    s: Session,
    wanted: Wanted,
    unit_ids: Sequence[int],
    among: Sequence[Endpoint],
    *,
    locked: Mapping[int, Collection[int]] | None = None,
    left: Collection[int] = (),
    promised: Mapping[int, Mapping[int, int]] | None = None,
) -> Proposal:
    """Where the missing copies of these units would go. Changes nothing.

    `locked`: the copies that count, by unit, instead of those that the rule has; with grouping ALL of every unit.
    `left`: endpoints that are to be left now, besides those that were left before. `promised`: unit → endpoint → bytes
    that the account would keep there besides what it keeps.
    """
    found = coverage.of_units(s, unit_ids, [e.id for e in among])
    quick = _propose(s, wanted, unit_ids, among, found, locked, left, promised) if found.locked else None
    if quick is not None and quick.moves_nothing and not quick.refusals:
        return quick
    coverage.count(s, found, [e.id for e in among])
    return _propose(s, wanted, unit_ids, among, found, locked, left, promised)


def _propose(
    s: Session,
    wanted: Wanted,
    unit_ids: Sequence[int],
    among: Sequence[Endpoint],
    found: Coverage,
    locked: Mapping[int, Collection[int]] | None,
    left: Collection[int],
    promised: Mapping[int, Mapping[int, int]] | None = None,
) -> Proposal:
    facts = _facts(s, wanted, unit_ids, found)
    facts.left = _left(s, wanted).union(left)
    if locked is not None:
        facts.locked = {unit_id: set(here) for unit_id, here in locked.items()}
    proposal = Proposal(facts)
    if not unit_ids:
        return proposal
    limits = () if wanted.account_id is None else quotas.left(s, wanted.account_id, [e.id for e in among])
    proposal.limited = bool(limits)
    if limits and wanted.account_id is not None:
        facts.charged = usage.charged(s, wanted.account_id, unit_ids, [e.id for e in among])
        for unit_id, more in (promised or {}).items():
            here = facts.charged.setdefault(unit_id, {})
            here.update({endpoint_id: here.get(endpoint_id, 0) + size for endpoint_id, size in more.items()})
    if wanted.grouping is Grouping.ALL:
        taken = _taken(s, wanted) if locked is None else frozenset().union(*locked.values())
        _propose_together(s, wanted, unit_ids, among, proposal, taken, limits)
    else:
        plan = placement.place(wanted.wish, [facts.unit(u) for u in unit_ids], among, limits)
        proposal.choices += plan.choices
        proposal.refusals += plan.refusals
    return proposal


def _taken(s: Session, wanted: Wanted) -> frozenset[int]:
    """Where a rule with grouping ALL has its copies."""
    mine = sa.select(locks.c.endpoint_id).where(locks.c.rule_id == wanted.rule_id, sa.not_(locks.c.surplus))
    return frozenset(s.execute(mine.distinct()).scalars())


def _propose_together(
    s: Session,
    wanted: Wanted,
    unit_ids: Sequence[int],
    among: Sequence[Endpoint],
    proposal: Proposal,
    taken: frozenset[int],
    limits: Sequence[placement.Quota],
) -> None:
    """Everything on one set of endpoints: first what the rule has chosen before, then what is still missing."""
    facts = proposal.facts
    left = {e.id: e.free_bytes for e in among}
    if taken:
        # New datasets join the others. Whatever spread was asked for, the set was chosen by it.
        joining = [u for u in unit_ids if not taken <= facts.locked.get(u, set())]
        together = placement.Wish(wanted.wish.rule_id, len(taken))
        units = [facts.unit(u) for u in joining]
        plan = placement.place(together, units, [e for e in among if e.id in taken], limits)
        proposal.choices += plan.choices
        proposal.refusals += plan.refusals
        for choice in plan.choices:
            if (free := left[choice.endpoint_id]) is not None:
                left[choice.endpoint_id] = free - choice.new_bytes
        limits = _less_quota(limits, plan.choices, facts)
    if len(taken) >= wanted.copies:
        return
    total, present = _together(s, unit_ids, among, facts)
    charged: dict[int, int] = {}
    if limits and wanted.account_id is not None:
        charged = usage.charged_together(s, wanted.account_id, unit_ids, [e.id for e in among])
    merged = placement.Unit(wanted.did_id, total, present, taken, charged, facts.left)
    space = [replace(e, free_bytes=left[e.id]) for e in among]
    plan = placement.place(wanted.wish, [merged], space, limits)
    for choice in plan.choices:
        for unit_id in unit_ids:
            here = facts.present.get(unit_id, {}).get(choice.endpoint_id, 0)
            new_bytes = facts.bytes.get(unit_id, 0) - here
            proposal.choices.append(placement.Choice(unit_id, choice.endpoint_id, new_bytes, choice.why))
    for refusal in plan.refusals:
        facts.files[refusal.unit_id] = sum(facts.files.get(u, 0) for u in unit_ids)
        missing = refusal.missing_copies * max(len(unit_ids), 1)
        proposal.refusals.append(placement.Refusal(refusal.unit_id, missing, refusal.obstacles))


def _less_quota(
    limits: Sequence[placement.Quota], choices: Sequence[placement.Choice], facts: Facts
) -> list[placement.Quota]:
    def charge(c: placement.Choice) -> int:
        return facts.bytes.get(c.unit_id, 0) - facts.charged.get(c.unit_id, {}).get(c.endpoint_id, 0)

    return [
        replace(q, bytes_left=q.bytes_left - sum(charge(c) for c in choices if c.endpoint_id in q.endpoint_ids))
        for q in limits
    ]


def place(s: Session, wanted: Wanted, unit_ids: Sequence[int], among: Sequence[Endpoint]) -> Proposal:
    """Choose endpoints for these units and lock them there. The caller holds the rule."""
    proposal = _protected_already(s, wanted, unit_ids, among) if s.postgresql else None
    if proposal is not None:
        chosen = sorted({c.endpoint_id for c in proposal.choices})
        if guards.keep_endpoints(s, chosen) < len(chosen):
            raise Conflict("an endpoint was put out of service at this moment", hint="repeat the request")
        _hold_ledger(s, wanted)
    else:
        guards.change_endpoints(s, sorted(e.id for e in among))
        if s.postgresql and among:
            _hold_ledger(s, wanted)  # quotas may speak of other endpoints, too
            held = {e.id for e in among}
            # Their space as it is now that nobody else can take it; nothing is locked at an endpoint that is not held.
            among = tuple(e for e in candidates(s, wanted.expression) if e.id in held)
        proposal = propose(s, wanted, unit_ids, among)
        proposal.held = True
    write_locks(s, wanted, proposal)
    return proposal


def _protected_already(
    s: Session, wanted: Wanted, unit_ids: Sequence[int], among: Sequence[Endpoint]
) -> Proposal | None:
    """A proposal that moves nothing, as far as locks tell: then the endpoints need not be held alone."""
    found = coverage.of_units(s, unit_ids, [e.id for e in among])
    if not found.locked:
        return None
    quick = _propose(s, wanted, unit_ids, among, found, None, ())
    return quick if quick.moves_nothing and not quick.refusals and not quick.limited else None


def _hold_ledger(s: Session, wanted: Wanted) -> None:
    if wanted.account_id is not None:
        guards.change_ledger(s, wanted.account_id)


def write_locks(s: Session, wanted: Wanted, proposal: Proposal) -> None:
    """Lock what was chosen. A copy that the rule had given up, and keeps for the time being, is wished again."""
    if not proposal.choices:
        return
    pairs = [(c.unit_id, c.endpoint_id) for c in proposal.choices]
    if wanted.account_id is not None:
        usage.charge(s, wanted.account_id, rows_of(s, "charged_pairs", _UNIT_PAIR, pairs))
    known = _known_counts(s, proposal, pairs)
    if known:
        columns = {**_UNIT_PAIR, **{name: sa.BigInteger() for name in _COUNTED}}
        batch = rows_of(s, "known_locks", columns, [(*pair, *known[pair]) for pair in sorted(known)])
        _insert_locks(s, wanted.rule_id, sa.select(*batch.c))
    if rest := [pair for pair in pairs if pair not in known]:
        _count_and_lock(s, wanted.rule_id, rest)


def _known_counts(
    s: Session, proposal: Proposal, pairs: Sequence[coverage.Pair]
) -> dict[coverage.Pair, tuple[int | None, ...]]:
    """What the columns `_COUNTED` of the locks on these pairs are, of those that need no other look."""
    found = proposal.facts.coverage
    complete = [pair for pair in pairs if pair in found.locked]
    counts: dict[coverage.Pair, tuple[int | None, ...]] = {}
    if complete:
        for pair, (files, size) in coverage.locked_complete(s, complete).items():
            counts[pair] = (files, files, 0, size, None, 0)
    if proposal.held:
        for unit_id, endpoint_id in pairs:
            pair, files, size = (unit_id, endpoint_id), found.files[unit_id], found.bytes[unit_id]
            if pair in counts or pair in found.locked:
                continue
            if endpoint_id in found.complete.get(unit_id, ()):
                counts[pair] = (files, files, 0, size, None if pair in found.at_rest else 0, 0)
            elif pair not in found.begun:
                counts[pair] = (files, 0, 0, size, 0 if files else None, size)
    return counts


def _insert_locks(s: Session, rule_id: int, rows: sa.Select[Any]) -> None:
    names = ["rule_id", *_UNIT_PAIR, *_COUNTED]
    rows = rows.with_only_columns(sa.literal(rule_id, sa.BigInteger()), *rows.selected_columns).where(sa.true())
    made = insert(s, locks).from_select(names, rows)
    again = {name: made.excluded[name] for name in _COUNTED}
    s.execute(
        made.on_conflict_do_update(index_elements=names[:3], set_=again | {"surplus": False, "troubled_at": None})
    )


def _count_and_lock(s: Session, rule_id: int, pairs: Sequence[coverage.Pair]) -> None:
    chosen = rows_of(s, "chosen", _UNIT_PAIR, pairs)
    held = files_of(chosen)
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
    _insert_locks(
        s,
        rule_id,
        sa.select(
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


def _facts(s: Session, wanted: Wanted, unit_ids: Sequence[int], found: Coverage) -> Facts:
    facts = Facts(found.files, found.bytes, found.present, found.present_files, found.complete, coverage=found)
    units = rows_of(s, "units", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
    held_already = sa.select(locks.c.unit_id, locks.c.endpoint_id).join(units, units.c.unit_id == locks.c.unit_id)
    mine = sa.and_(locks.c.rule_id == wanted.rule_id, sa.not_(locks.c.surplus))
    for unit_id, endpoint_id in s.execute(held_already.where(mine)):
        facts.locked.setdefault(unit_id, set()).add(endpoint_id)
    return facts


def _left(s: Session, wanted: Wanted) -> frozenset[int]:
    """Endpoints that copies of the rule were brought away from not long ago."""
    places = tables.endpoints
    query = (
        sa.select(reasons.c.endpoint_id)
        .join(places, places.c.id == reasons.c.endpoint_id)
        .where(
            reasons.c.rule_id == wanted.rule_id,
            reasons.c.code == MOVED,
            reasons.c.last_seen_at > s.now - LEFT_FOR,
            # Since then somebody has done something about it.
            sa.or_(places.c.status_since.is_(None), places.c.status_since < reasons.c.last_seen_at),
        )
    )
    return frozenset(s.execute(query).scalars())


def _together(
    s: Session, unit_ids: Sequence[int], among: Sequence[Endpoint], facts: Facts
) -> tuple[int, dict[int, int]]:
    """Bytes of all units as one, and what of them is at which endpoint; a file in two datasets counts once."""
    if len(unit_ids) == 1 or not facts.coverage.shared:
        together: Counter[int] = Counter()
        for unit_id in unit_ids:
            together.update(facts.present.get(unit_id, {}))
        return sum(facts.bytes[unit_id] for unit_id in unit_ids), dict(together)
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
