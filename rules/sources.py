"""Rank the copies a transfer can read from, say why, and from how many of them a large file is read at once.

Given     the copies that exist, the target, and what is known of the links to it.
Returns   the usable ones, best first, and why the first is the first; when there are none, `why_none` says why for
          each.
Promises  the same facts give the same order, in whatever order they come; nothing that is left out is ever tried.
Partner   rules.transfers decides when another source is tried; replica.catalog.orders gathers the facts.

Order, the first difference decides:
    1. above suspicion before suspicious   it disagreed with the catalogue before, but may be the last that is left
    2. disk before tape                    a mount takes minutes and wears the medium
    3. verified before declared            nobody has read a declared copy yet
    4. the shorter distance
    5. fewer recent failures               of this very transfer
    6. the faster link, as measured        clearly: what is at least half as fast as the best counts as fast as that
    7. a link that did not mostly fail     in the last hour
    8. fewer reads in flight at the source
    9. the name of the endpoint, so that the order is always the same

Up to 7, sources are equally good. A link that was not measured lately, or by too little, counts as fast as the best:
so it is tried, and then it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType

from rules.endpoints import Endpoint, Link, Obstacle
from rules.quantities import human_bytes
from rules.states import EndpointKind

#: (source endpoint id, target endpoint id) → the link; what is not there is allowed, at distance 1.
Links = Mapping[tuple[int, int], Link]
#: Source endpoint id → how many workers read there; what is not there is read by nobody.
Load = Mapping[int, int]

#: What a link must have carried for its speed to say anything: small files measure how long it takes to begin.
MEASURED_BYTES = 16 << 20
#: A difference in speed that counts.
CLEARLY = 2.0
#: A link mostly fails when so many attempts failed, and more than were well.
FAILURES_MIN = 3
#: A large file is read from several sources at once, so much of it from each, and not from more.
SHARE_BYTES = 128 << 20
AT_ONCE_MAX = 4


@dataclass(frozen=True, slots=True)
class Lately:
    """What a link carried in the last hour."""

    files: int = 0
    bytes: int = 0
    #: Summed over files that went side by side.
    seconds: float = 0.0
    #: Attempts that failed, and not because of the target.
    failures: int = 0

    @property
    def rate(self) -> float | None:
        """Bytes in a second of one file; None: not known."""
        if self.bytes < MEASURED_BYTES or self.seconds <= 0:
            return None
        return self.bytes / self.seconds

    @property
    def mostly_fails(self) -> bool:
        return self.failures >= FAILURES_MIN and self.failures > self.files


UNUSED = Lately()


@dataclass(frozen=True, slots=True)
class Source:
    """A copy of the file that the catalogue takes for good."""

    endpoint: Endpoint
    verified: bool
    suspicious: bool = False
    recent_failures: int = 0
    #: Of the link from there to the target.
    lately: Lately = UNUSED


#: Sources that are equally good, in the order of their names.
Equals = tuple[Source, ...]


def rank(
    sources: Sequence[Source], target: Endpoint, links: Links, load: Load = MappingProxyType({})
) -> tuple[Source, ...]:
    """The sources that can be read for `target`, best first; empty when there are none."""
    return in_order(grades(sources, target, links), load)


def grades(sources: Sequence[Source], target: Endpoint, links: Links) -> tuple[Equals, ...]:
    """The same as groups of equally good ones, the best group first."""

    def before(source: Source) -> tuple[bool, bool, bool, int, int]:
        return (
            source.suspicious,
            source.endpoint.kind is EndpointKind.TAPE,
            not source.verified,
            _link(source, target, links).distance,
            source.recent_failures,
        )

    found: list[Equals] = []
    usable = sorted((s for s in sources if _obstacle(s, target, links) is None), key=before)
    for _, alike in groupby(usable, key=before):
        group = list(alike)
        slower = _slower(group)

        def then(source: Source, slower: Callable[[Source], int] = slower) -> tuple[int, bool]:
            return slower(source), source.lately.mostly_fails

        group.sort(key=lambda s: (*then(s), s.endpoint.name, s.endpoint.id))
        found += [tuple(equals) for _, equals in groupby(group, key=then)]
    return tuple(found)


def _slower(group: Sequence[Source]) -> Callable[[Source], int]:
    """By how many clear differences a source is slower than the fastest of the group."""
    best = max((s.lately.rate or 0.0 for s in group), default=0.0)

    def steps(source: Source) -> int:
        rate = source.lately.rate
        return 0 if rate is None else max(0, math.ceil(math.log(best / rate, CLEARLY)) - 1)

    return steps


def in_order(graded: Sequence[Equals], load: Load = MappingProxyType({})) -> tuple[Source, ...]:
    """All of them, of equally good ones first where the fewest read."""
    return tuple(
        source
        for equals in graded
        for source in (
            equals
            if len(equals) == 1
            else sorted(equals, key=lambda s: (load.get(s.endpoint.id, 0), s.endpoint.name, s.endpoint.id))
        )
    )


def at_once(size: int, equals: int) -> int:
    """From how many of so many equally good sources a file of `size` bytes is read at the same time, at most."""
    return max(1, min(equals, size // SHARE_BYTES, AT_ONCE_MAX))


def why_first(ranked: Sequence[Source], target: Endpoint, links: Links, load: Load = MappingProxyType({})) -> str:
    """Why the first of these comes before the second, in words."""
    first = ranked[0]
    if len(ranked) == 1:
        return f"{first.endpoint.name}: no other copy can be read"
    second = ranked[1]
    mine, other = first.endpoint.name, second.endpoint.name
    near, far = _link(first, target, links).distance, _link(second, target, links).distance
    here, there = load.get(first.endpoint.id, 0), load.get(second.endpoint.id, 0)
    rate, slow = first.lately.rate, second.lately.rate
    told = (
        (first.suspicious != second.suspicious, f"{other} disagreed with the catalogue before"),
        (first.endpoint.kind is not second.endpoint.kind, f"it is on disk, and {other} on tape"),
        (first.verified != second.verified, f"it is verified, and {other} only declared"),
        (near != far, f"it is nearer than {other} (distance {near}, not {far})"),
        (first.recent_failures != second.recent_failures, f"this transfer failed less often from it than from {other}"),
        (
            slow is not None and _slower(ranked)(first) < _slower(ranked)(second),
            f"{other} was clearly slower in the last hour ({_speed(slow)}, not {_speed(rate)})",
        ),
        (
            first.lately.mostly_fails != second.lately.mostly_fails,
            f"most attempts from {other} failed in the last hour",
        ),
        (here != there, f"it is as good as {other}, and fewer read there ({here}, not {there})"),
        (True, f"it is as good as {other}, and the first by name"),
    )
    return f"{mine}: {next(reason for differs, reason in told if differs)}"


def _speed(rate: float | None) -> str:
    return "not measured" if rate is None else f"{human_bytes(int(rate))}/s"


def why_none(sources: Sequence[Source], target: Endpoint, links: Links) -> tuple[Obstacle, ...]:
    """What keeps each unusable source from being read, by name; if there is no source at all, that."""
    if not sources:
        return (Obstacle(None, "no_source", "no endpoint holds a good copy"),)
    found = (_obstacle(s, target, links) for s in sorted(sources, key=lambda s: (s.endpoint.name, s.endpoint.id)))
    return tuple(o for o in found if o is not None)


def _link(source: Source, target: Endpoint, links: Links) -> Link:
    key = (source.endpoint.id, target.id)
    return links.get(key) or Link(*key)


def _obstacle(source: Source, target: Endpoint, links: Links) -> Obstacle | None:
    endpoint = source.endpoint
    if endpoint.id == target.id:
        return Obstacle(endpoint.id, "is_target", f"{endpoint.name}: is the target itself")
    if not endpoint.readable:
        return Obstacle(endpoint.id, "reading_off", f"{endpoint.name}: reading is off")
    if not _link(source, target, links).allowed:
        return Obstacle(endpoint.id, "link_not_allowed", f"{endpoint.name}: transfers to {target.name} are not allowed")
    return None
