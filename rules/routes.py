"""Find a way over other endpoints when no copy of a file may go to its target directly.

Given     the copies, the target, the endpoints that may be steps, the links, and how much fits where.
Returns   the best Route; or None, and `why_none` says what is missing.
Promises  the same facts give the same route, in whatever order they come; no endpoint twice; a step is a disk whose
          attribute `hop` is true, that can be read and written, is not being emptied, and has room for the file.
Partner   replica.catalog.routes makes it a stored plan.

The best source decides first, as in rules.sources: above suspicion, disk, verified. Then the cheapest way: the sum of
the distances, and a penalty for each step, since it takes room and writes everything once more. It is the shortest path
with a bound on the number of legs, found from the target backwards, leg by leg.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rules.endpoints import Endpoint
from rules.sources import Links, Source
from rules.states import EndpointKind

#: The attribute by which an endpoint declares that it may be a step.
ATTRIBUTE = "hop"
#: What a step costs besides its distances.
PENALTY = 10
#: Steps on one way at most.
HOPS_MAX = 3


@dataclass(frozen=True, slots=True)
class Route:
    """From a source over its hops, in order, to the target."""

    source: Endpoint
    hops: tuple[Endpoint, ...]
    target: Endpoint

    @property
    def path(self) -> tuple[Endpoint, ...]:
        return (self.source, *self.hops, self.target)


#: Cost and hops of the best way from an endpoint to the target; compared by cost, number, names.
_Way = tuple[int, int, tuple[str, ...], tuple[Endpoint, ...]]


def may_be_hop(endpoint: Endpoint) -> bool:
    value = endpoint.attributes.get(ATTRIBUTE)
    return (
        (value is True or str(value).lower() in ("true", "yes", "1"))
        and endpoint.kind is EndpointKind.DISK
        and endpoint.readable
        and endpoint.writable
        and not endpoint.draining
        and not endpoint.decommissioned
    )


def find(
    sources: Sequence[Source],
    target: Endpoint,
    hops: Sequence[Endpoint],
    links: Links,
    size: int,
    free: Mapping[int, int],
) -> Route | None:
    """`hops`: the endpoints to think of; `free`: bytes that are left there, of those of which it is known."""
    steps = [e for e in hops if may_be_hop(e) and e.id != target.id and free.get(e.id, size) >= size]
    ways = _ways(steps, target, links)

    def best(source: Source) -> _Way | None:
        found = [
            (cost + _distance(links, source.endpoint, first), number, names, (first, *rest))
            for first in steps
            if first.id != source.endpoint.id and allowed(links, source.endpoint, first)
            for cost, number, names, rest in ways.get(first.id, ())
            if all(e.id != source.endpoint.id for e in rest)
        ]
        return min(found, key=lambda way: way[:3], default=None)

    ranked = [
        (source.suspicious, source.endpoint.kind is EndpointKind.TAPE, not source.verified, *way[:3], source, way[3])
        for source in sources
        if source.endpoint.readable and source.endpoint.id != target.id and (way := best(source)) is not None
    ]
    if not ranked:
        return None
    *_, source, path = min(ranked, key=lambda each: (*each[:6], each[6].endpoint.name))
    return Route(source.endpoint, path, target)


def _ways(steps: Sequence[Endpoint], target: Endpoint, links: Links) -> dict[int, list[_Way]]:
    """Step → its best way to the target for each number of further steps. What begins there costs the penalty."""
    found: dict[int, list[_Way]] = {}
    last: dict[int, _Way] = {
        e.id: (PENALTY + _distance(links, e, target), 1, (e.name,), ()) for e in steps if allowed(links, e, target)
    }
    for number in range(1, HOPS_MAX + 1):
        for id_, way in last.items():
            found.setdefault(id_, []).append(way)
        if number == HOPS_MAX:
            break
        following: dict[int, _Way] = {}
        for e in steps:
            onward = [
                (
                    PENALTY + _distance(links, e, v) + last[v.id][0],
                    number + 1,
                    (e.name, *last[v.id][2]),
                    (v, *last[v.id][3]),
                )
                for v in steps
                if v.id in last and v.id != e.id and e not in last[v.id][3] and allowed(links, e, v)
            ]
            if onward:
                following[e.id] = min(onward, key=lambda way: way[:3])
        last = following
    return found


def why_none(sources: Sequence[Source], target: Endpoint, hops: Sequence[Endpoint]) -> str:
    if not any(source.endpoint.readable for source in sources):
        return "no endpoint that may be read holds a good copy"
    steps = sorted(e.name for e in hops if may_be_hop(e) and e.id != target.id)
    if not steps:
        return f"no endpoint may be a step on the way to {target.name}"
    return f"no way over {', '.join(steps)} leads to {target.name} with room for it, in at most {HOPS_MAX} steps"


def what_is_wrong(begin: Endpoint | None, steps: Sequence[Endpoint], target: Endpoint, links: Links) -> str:
    """With the rest of a way, from the copy where the file is by now (None: from any); empty: nothing."""
    for step in steps:
        if not may_be_hop(step):
            return f"{step.name} can no longer be a step{f': {step.status}' if step.status else ''}"
    if begin is not None and not begin.readable:
        return f"{begin.name} can no longer be read{f': {begin.status}' if begin.status else ''}"
    path = [*([] if begin is None else [begin]), *steps, target]
    for here, there in pairwise(path):
        if not allowed(links, here, there):
            return f"transfers from {here.name} to {there.name} are not allowed any more"
    return ""


def allowed(links: Links, source: Endpoint, target: Endpoint) -> bool:
    link = links.get((source.id, target.id))
    return link is None or link.allowed


def _distance(links: Links, source: Endpoint, target: Endpoint) -> int:
    link = links.get((source.id, target.id))
    return 1 if link is None else link.distance
