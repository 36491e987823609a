"""What do an account's quotas leave?

Given     quotas, one snapshot of all endpoints, and the bytes an account holds at each.
Returns   a Standing for each quota: which endpoints it is about, what is used there, what is left.
Promises  a changed attribute of an endpoint counts at once. Several quotas that select an endpoint must all have room
          there; where none does, nothing is limited. A quota whose expression selects nothing any more limits nothing,
          and says so.
Partner   rules.placement keeps to what is left; replica.catalog.quotas gathers the facts.

What is held beyond a quota, because it was lowered or because files came into datasets under rules, stays: a quota
limits what is added by placing copies, it never takes protection away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rules import expressions
from rules.endpoints import Endpoint
from rules.errors import InvalidExpression, Refused
from rules.placement import Quota

__all__ = ["Standing", "limiting", "standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a quota is used up."""

    endpoints: tuple[Endpoint, ...]
    limit_bytes: int
    used_bytes: int
    problem: str = ""  #: why the expression selects nothing; empty otherwise

    @property
    def left_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)

    @property
    def over_bytes(self) -> int:
        return max(0, self.used_bytes - self.limit_bytes)


def standing(expression: str, limit_bytes: int, endpoints: Sequence[Endpoint], held: Mapping[int, int]) -> Standing:
    """`held` is by endpoint id."""
    try:
        selected = expressions.select(expression, endpoints)
    except (Refused, InvalidExpression) as error:
        return Standing((), limit_bytes, 0, error.message)
    return Standing(selected, limit_bytes, sum(held.get(e.id, 0) for e in selected))


def limiting(standings: Iterable[Standing], among: Collection[int]) -> tuple[Quota, ...]:
    """Those that say anything about these endpoints, as placement takes them."""
    quotas = (Quota(frozenset(e.id for e in each.endpoints), each.left_bytes) for each in standings)
    return tuple(quota for quota in quotas if not quota.endpoint_ids.isdisjoint(among))
