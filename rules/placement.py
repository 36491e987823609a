"""Choose where the missing copies should go.

Given     a wish for n copies, the units to place with what is already where, the endpoints an expression selected.
Returns   a Plan: a Choice for each copy to make, and a Refusal for each unit that cannot have all of its copies.
Promises  same facts, same plan, in whatever order they come; never more copies than wished; no two copies of a unit
          in one failure domain; never more bytes than an endpoint or a quota has left, over the whole plan, also
          where several endpoints share one quota; a unit gets all the copies for which there are domains, as far as
          these quotas reach, and a refused one delays no other.
Partner   replica.catalog.rules gathers the facts and makes the locks.

**Order.** An endpoint that already holds more of the unit comes first: bytes that need not move are the best bytes.
Among equals the choice is by weighted rendezvous hashing: each endpoint draws a lot from (rule, unit, endpoint), and
the larger its free space times its weight, the likelier it wins. So units spread in proportion to the space, and a new
endpoint takes its share from the others without moving anything between them. The lots use the free space as it was
*before* the plan, for the same reason; what fits is decided by what is left *during* it.

**Enough domains.** Every endpoint lies in one failure domain, and whether it can take a unit does not depend on the
other copies of the same unit. Going through the endpoints in order and leaving out used domains therefore finds the
best endpoint of each domain, and as many copies as there are domains with one that fits. A quota that endpoints share
is used up by the copies before: then the order says who gets what is left of it.

**What counts against a quota** is what the account does not keep at the endpoint already, whether or not it must move.

**Locks the rule already holds** count as copies and use up their domain; they are never moved here. A lock outside of
the candidates counts too, but of its domain only the endpoint is known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from rules.endpoints import Endpoint, Obstacle, attribute_text
from rules.errors import Broken
from rules.quantities import human_bytes

__all__ = ["Choice", "Obstacle", "Plan", "Quota", "Refusal", "Unit", "Wish", "domain_of", "place"]

#: What an endpoint whose free space is not known counts for among the others: 1 PB. What fits there is not limited.
UNMEASURED_BYTES = 10**15


@dataclass(frozen=True, slots=True)
class Unit:
    """What is placed as a whole: a dataset, a single file or, for grouping ALL, everything as one."""

    id: int  #: of the DID; for grouping ALL any number that stays the same
    bytes: int
    present: Mapping[int, int]  #: endpoint id → bytes of this unit already there, available or on their way
    locked: frozenset[int] = frozenset()  #: endpoints where this rule already holds a lock on it: these are copies
    #: endpoint id → bytes of it that its account keeps there already
    charged: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    left: frozenset[int] = frozenset()  #: endpoints it was brought away from, and to which it does not go back yet


@dataclass(frozen=True, slots=True)
class Quota:
    """What an account may still keep, at all of these endpoints together."""

    endpoint_ids: frozenset[int]
    bytes_left: int


@dataclass(frozen=True, slots=True)
class Wish:
    rule_id: int
    copies: int
    spread: str = "endpoint"  #: `endpoint`, `site` or an attribute: the failure domain that no two copies share
    weight: str | None = None  #: a numeric attribute that biases the choice


@dataclass(frozen=True, slots=True)
class Choice:
    """A copy to make, or to keep where it already is."""

    unit_id: int
    endpoint_id: int
    new_bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A unit that cannot have all its copies now: one obstacle for every candidate that was not chosen."""

    unit_id: int
    missing_copies: int
    obstacles: tuple[Obstacle, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    choices: tuple[Choice, ...]
    refusals: tuple[Refusal, ...]


def place(wish: Wish, units: Sequence[Unit], candidates: Sequence[Endpoint], quotas: Sequence[Quota] = ()) -> Plan:
    """Where the missing copies of `units` go. An endpoint that no quota names is free of them."""
    placing = _Placing(wish, candidates, quotas)
    choices: list[Choice] = []
    refusals: list[Refusal] = []
    for unit in sorted(units, key=lambda u: u.id):  # the oldest first, whatever the order of the facts
        chosen, missing = placing.take(unit)
        choices.extend(chosen)
        if missing:
            refusals.append(Refusal(unit.id, missing, placing.obstacles(unit, chosen)))
    return Plan(tuple(choices), tuple(refusals))


class _Placing:
    """One plan while it is being made: the space and quota that are still left."""

    def __init__(self, wish: Wish, candidates: Iterable[Endpoint], quotas: Sequence[Quota]) -> None:
        self._wish = wish
        self._endpoints = {e.id: e for e in sorted(candidates, key=lambda e: (e.name, e.id))}
        self._free = {e.id: e.free_bytes for e in self._endpoints.values() if e.free_bytes is not None}
        self._quota_left = [quota.bytes_left for quota in quotas]
        self._quotas = {e: [i for i, quota in enumerate(quotas) if e in quota.endpoint_ids] for e in self._endpoints}
        self._domain = {e.id: domain_of(e, wish.spread) for e in self._endpoints.values()}
        self._weight = {e.id: _weight_of(e, wish.weight) for e in self._endpoints.values()}

    def take(self, unit: Unit) -> tuple[list[Choice], int]:
        """Choose endpoints for the copies of `unit` that are missing; returns them, and how many are still missing."""
        missing = self._wish.copies - len(unit.locked)
        if missing <= 0:
            return [], 0
        chosen: list[Choice] = []
        used = self._domains_in_use(unit, ())
        for endpoint in self._in_order(unit):
            if missing == 0:
                break
            if self._obstacle(unit, endpoint, used) is None:
                chosen.append(self._choose(unit, endpoint))
                used[self._domain[endpoint.id]] = endpoint.name
                missing -= 1
        return chosen, missing

    def obstacles(self, unit: Unit, chosen: Sequence[Choice]) -> tuple[Obstacle, ...]:
        """Why the copies that are still missing cannot be anywhere: something about each candidate not chosen."""
        here = {c.endpoint_id for c in chosen}
        used = self._domains_in_use(unit, here)
        found = [*self._too_few_candidates(unit)]
        for endpoint in self._endpoints.values():
            if endpoint.id not in here:
                obstacle = self._obstacle(unit, endpoint, used)
                if obstacle is None:
                    raise Broken(f"{endpoint.name} could take unit {unit.id}, and was left out")
                found.append(obstacle)
        return tuple(found)

    def _choose(self, unit: Unit, endpoint: Endpoint) -> Choice:
        new_bytes = _new_bytes(unit, endpoint)
        if endpoint.id in self._free:
            self._free[endpoint.id] -= new_bytes
        for quota in self._quotas[endpoint.id]:
            self._quota_left[quota] -= _charge(unit, endpoint)
        return Choice(unit.id, endpoint.id, new_bytes, _why(unit, endpoint, new_bytes))

    def _in_order(self, unit: Unit) -> list[Endpoint]:
        def rank(endpoint: Endpoint) -> tuple[bool, int, float, int]:
            return (
                not _is_whole_at(unit, endpoint),  # matters for a unit without bytes
                -min(unit.present.get(endpoint.id, 0), unit.bytes),
                -self._lot(unit, endpoint),
                endpoint.id,
            )

        return sorted(self._endpoints.values(), key=rank)

    def _lot(self, unit: Unit, endpoint: Endpoint) -> float:
        free = UNMEASURED_BYTES if endpoint.free_bytes is None else max(endpoint.free_bytes, 0)
        return free * (self._weight[endpoint.id] or 0.0) / -math.log(_draw(self._wish.rule_id, unit.id, endpoint.id))

    def _domains_in_use(self, unit: Unit, chosen: Iterable[int]) -> dict[str | None, str]:
        """Domain → name of the endpoint whose copy uses it."""
        taken = [self._endpoints[i] for i in sorted(unit.locked.union(chosen)) if i in self._endpoints]
        return {self._domain[e.id]: e.name for e in taken if self._domain[e.id] is not None}

    def _obstacle(self, unit: Unit, endpoint: Endpoint, used: Mapping[str | None, str]) -> Obstacle | None:
        """What keeps a further copy of `unit` from `endpoint`; None when nothing does."""

        def no(code: str, reason: str) -> Obstacle:
            return Obstacle(endpoint.id, code, f"{endpoint.name}: {reason}")

        domain, new_bytes = self._domain[endpoint.id], _new_bytes(unit, endpoint)
        if endpoint.id in unit.locked:
            return no("domain_used", "already holds a copy for this rule")
        if domain is None:
            return no("no_domain", f"has no attribute {self._wish.spread} to spread by")
        if domain in used:
            return no("domain_used", f"shares {self._wish.spread} {domain} with {used[domain]}, which has a copy")
        if self._weight[endpoint.id] is None:
            return no("no_weight", f"its attribute {self._wish.weight} is not a number above 0")
        because = f": {endpoint.status}" if endpoint.status else ""
        if endpoint.draining:
            return no("draining", f"is being drained{because}")
        if endpoint.id in unit.left:
            return no("left", "the copy was brought away from there, and does not go back yet")
        if not endpoint.writable and not _is_whole_at(unit, endpoint):
            return no("writing_off", f"writing is off{because}")
        # What brings no new bytes needs no room, even where there is less than none.
        if new_bytes > max(self._free.get(endpoint.id, new_bytes), 0):
            return no("no_space", f"{human_bytes(new_bytes - max(self._free[endpoint.id], 0))} short")
        charge = _charge(unit, endpoint)
        quota_left = min((self._quota_left[quota] for quota in self._quotas[endpoint.id]), default=charge)
        if charge > max(quota_left, 0):
            return no("over_quota", f"quota {human_bytes(charge - max(quota_left, 0))} short")
        return None

    def _too_few_candidates(self, unit: Unit) -> Iterable[Obstacle]:
        """Whether the wish could not be met even if every candidate were willing and empty."""
        used = self._domains_in_use(unit, ())
        unused = {d for d in self._domain.values() if d is not None and d not in used}
        possible = len(unit.locked) + len(unused)
        if possible < self._wish.copies:
            wanted = f"{self._wish.copies} copies with spread {self._wish.spread} are wanted"
            yield Obstacle(None, "too_few_candidates", f"{wanted}; the candidates allow {possible}")


def domain_of(endpoint: Endpoint, spread: str) -> str | None:
    """The failure domain as a text; None for an endpoint without the attribute."""
    if spread == "endpoint":
        return endpoint.name
    value = endpoint.value(spread)
    return None if value is None else attribute_text(value)


def _weight_of(endpoint: Endpoint, weight: str | None) -> float | None:
    """The weight as a number above 0; None where it is missing or anything else."""
    if weight is None:
        return 1.0
    value = endpoint.value(weight)
    try:
        number = float(value) if value is not None else 0.0
    except (ValueError, OverflowError):
        return None
    return number if 0 < number < math.inf else None


def _is_whole_at(unit: Unit, endpoint: Endpoint) -> bool:
    return endpoint.id in unit.present and unit.present[endpoint.id] >= unit.bytes


def _new_bytes(unit: Unit, endpoint: Endpoint) -> int:
    return max(0, unit.bytes - unit.present.get(endpoint.id, 0))


def _charge(unit: Unit, endpoint: Endpoint) -> int:
    return max(0, unit.bytes - unit.charged.get(endpoint.id, 0))


def _draw(rule_id: int, unit_id: int, endpoint_id: int) -> float:
    """A number between 0 and 1, neither of them, that is the same in every process and looks random."""
    digest = hashlib.blake2b(b"%d:%d:%d" % (rule_id, unit_id, endpoint_id), digest_size=8).digest()
    # 52 bits and a half: exact as a float, so neither 0 nor 1 can come of rounding.
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52


def _why(unit: Unit, endpoint: Endpoint, new_bytes: int) -> str:
    if _is_whole_at(unit, endpoint):
        return "all of it is there already"
    if new_bytes < unit.bytes:
        return f"{human_bytes(unit.bytes - new_bytes)} of {human_bytes(unit.bytes)} are there already"
    if endpoint.free_bytes is None:
        return "drawn by lot; its free space is not known"
    return f"drawn by lot; it has {human_bytes(endpoint.free_bytes)} free"
