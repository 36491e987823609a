"""A rule wishes something else than before: which of its copies does it keep?

Given     the copies of one unit that the rule has, the endpoints its new expression selects, and the new wish.
Returns   the endpoints where it keeps a copy; all others it gives up, once what it now wishes is there.
Promises  same facts, same choice, in whatever order they come; never more copies than wished, never two in one
          failure domain; as many as these two allow. Of two copies the more complete one is kept.
Partner   replica.catalog.rule_changes gathers the facts; rules.placement places what is still missing.

Every endpoint lies in one failure domain. So the best copy of each domain, and of these the best, are the most copies
that can be kept, and the best of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rules.endpoints import Endpoint
from rules.placement import Wish, domain_of

__all__ = ["Copy", "keep"]


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a unit that a rule has wished so far."""

    endpoint_id: int
    bytes_available: int
    complete: bool


def keep(wish: Wish, copies: Sequence[Copy], candidates: Iterable[Endpoint]) -> frozenset[int]:
    """The ids of the endpoints whose copies stay."""
    by_id = {e.id: e for e in candidates}
    kept: dict[str, int] = {}

    def rank(copy: Copy) -> tuple[bool, bool, int, int]:
        endpoint = by_id[copy.endpoint_id]
        return endpoint.draining, not copy.complete, -copy.bytes_available, endpoint.id

    for copy in sorted((c for c in copies if c.endpoint_id in by_id), key=rank):
        domain = domain_of(by_id[copy.endpoint_id], wish.spread)
        if len(kept) < wish.copies and domain is not None:
            kept.setdefault(domain, copy.endpoint_id)
    return frozenset(kept.values())
