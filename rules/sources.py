"""Rank the copies a transfer can read from.

Given     the copies that exist, the target, and what is known of the links to it.
Returns   the usable ones, best first; when there are none, `why_none` says why for each.
Promises  the same facts give the same order, in whatever order they come; nothing that is left out is ever tried.
Partner   rules.transfers decides when another source is tried; replica.catalog.transfers gathers the facts.

Order, the first difference decides:
    1. above suspicion before suspicious   it disagreed with the catalogue before, but may be the last that is left
    2. disk before tape                    a mount takes minutes and wears the medium
    3. verified before declared            nobody has read a declared copy yet
    4. the shorter distance
    5. fewer recent failures
    6. the name of the endpoint, so that the order is always the same
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rules.endpoints import Endpoint, Link, Obstacle
from rules.states import EndpointKind

#: (source endpoint id, target endpoint id) → the link; what is not there is allowed, at distance 1.
Links = Mapping[tuple[int, int], Link]


@dataclass(frozen=True, slots=True)
class Source:
    """A copy of the file that the catalogue takes for good."""

    endpoint: Endpoint
    verified: bool
    suspicious: bool = False
    recent_failures: int = 0


def rank(sources: Sequence[Source], target: Endpoint, links: Links) -> tuple[Source, ...]:
    """The sources that can be read for `target`, best first; empty when there are none."""

    def order(source: Source) -> tuple[bool, bool, bool, int, int, str, int]:
        return (
            source.suspicious,
            source.endpoint.kind is EndpointKind.TAPE,
            not source.verified,
            _link(source, target, links).distance,
            source.recent_failures,
            source.endpoint.name,
            source.endpoint.id,
        )

    return tuple(sorted((s for s in sources if _obstacle(s, target, links) is None), key=order))


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
