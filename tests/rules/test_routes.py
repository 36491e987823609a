"""The way over other endpoints."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from rules.endpoints import Endpoint, Link
from rules.routes import HOPS_MAX, PENALTY, find, may_be_hop, what_is_wrong, why_none
from rules.sources import Source
from rules.states import EndpointKind
from tests.rules.factories import endpoint

S, T = endpoint("S", 1), endpoint("T", 2)
A, B, C, D = (endpoint(name, number, hop=True) for number, name in enumerate("ABCD", 3))
FROM_S = [Source(S, verified=True)]


def closed(*pairs: tuple[Endpoint, Endpoint], **distances: int) -> dict[tuple[int, int], Link]:
    links = {(a.id, b.id): Link(a.id, b.id, allowed=False) for a, b in pairs}
    by_name = {e.name: e for e in (S, T, A, B, C, D)}
    for names, distance in distances.items():
        a, b = (by_name[name] for name in names)
        links[a.id, b.id] = Link(a.id, b.id, distance)
    return links


def names(sources: list[Source], hops: list[Endpoint], links: dict[tuple[int, int], Link], **more: object) -> str:
    route = find(sources, T, hops, links, 5, more.get("free", {}))  # type: ignore[arg-type]
    return "-" if route is None else "".join(e.name for e in route.path)


def test_the_cheapest_way_is_taken_and_a_step_costs_more_than_a_distance() -> None:
    assert names(FROM_S, [A, B], closed((S, T))) == "SAT"
    assert names(FROM_S, [A, B], closed((S, T), SA=9)) == "SBT"
    assert names(FROM_S, [A, B, C], closed((S, T), (B, T), SA=9, SC=99)) == "SAT"
    assert names(FROM_S, [A, B, C], closed((S, T), (S, C), (B, T), (A, T))) == "SACT"


def test_a_step_must_declare_it_and_have_room() -> None:
    for odd in (
        endpoint("X", 9),
        endpoint("X", 9, hop=False),
        endpoint("X", 9, hop=True, writable=False),
        endpoint("X", 9, hop=True, readable=False),
        endpoint("X", 9, hop=True, kind=EndpointKind.TAPE),
    ):
        assert not may_be_hop(odd)
        assert names(FROM_S, [odd], closed((S, T))) == "-"
    assert names(FROM_S, [A, B], closed((S, T)), free={A.id: 4, B.id: 5}) == "SBT"
    assert "no endpoint may be a step" in why_none(FROM_S, T, [])
    assert "over A leads to T" in why_none(FROM_S, T, [A])


def test_the_better_copy_is_worth_a_longer_way() -> None:
    other = Source(D, verified=False)
    assert names([other, *FROM_S], [A, B], closed((S, T), (D, T), (S, B), (A, T))) == "SABT"
    assert names([other], [A, B], closed((D, T))) == "DAT"


def test_what_is_wrong_with_the_rest_of_a_way() -> None:
    assert what_is_wrong(S, [A], T, {}) == what_is_wrong(None, [A, B], T, closed((S, A))) == ""
    assert "from A to T are not allowed" in what_is_wrong(S, [A], T, closed((A, T)))
    assert "from S to A are not allowed" in what_is_wrong(S, [A], T, closed((S, A)))
    assert "A can no longer be a step" in what_is_wrong(None, [endpoint("A", 3, hop=True, writable=False)], T, {})
    assert "A can no longer be read" in what_is_wrong(endpoint("A", 3, readable=False), [], T, {})


@given(
    st.sets(st.integers(0, 29)),
    st.lists(st.integers(0, 40), min_size=30, max_size=30),
    st.randoms(use_true_random=False),
)
def test_no_way_is_cheaper_of_all_there_are(shut: set[int], distances: list[int], dice: random.Random) -> None:
    pairs = list(itertools.permutations([S, A, B, C, D, T], 2))
    links = {(a.id, b.id): Link(a.id, b.id, d) for (a, b), d in zip(pairs, distances, strict=True)}
    links |= {(a.id, b.id): Link(a.id, b.id, allowed=False) for a, b in (pairs[i] for i in shut)}

    def cost(path: tuple[Endpoint, ...]) -> int | None:
        legs = [links[a.id, b.id] for a, b in itertools.pairwise(path)]
        return sum(leg.distance for leg in legs) + PENALTY * (len(path) - 2) if all(x.allowed for x in legs) else None

    every = [cost((S, *hops, T)) for n in range(1, HOPS_MAX + 1) for hops in itertools.permutations([A, B, C, D], n)]
    best = min((c for c in every if c is not None), default=None)
    hops = [A, B, C, D]
    dice.shuffle(hops)
    route = find(FROM_S, T, hops, links, 5, {})
    assert (route is None) == (best is None)
    if route is not None:
        assert route == find(FROM_S, T, [A, B, C, D], links, 5, {})
        found = cost(route.path)
        assert found == best
