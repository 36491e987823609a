"""Which copies a rule keeps when it wishes something else."""

from __future__ import annotations

import random
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from rules.changes import Copy, keep
from rules.endpoints import Endpoint
from rules.placement import Wish, domain_of
from tests.rules.factories import endpoint

IDS = range(1, 7)
endpoints = st.lists(
    st.builds(
        lambda i, site, attributes: endpoint(f"E{i}", i, site=f"S{site}", **attributes),
        st.sampled_from(IDS),
        st.integers(1, 3),
        st.fixed_dictionaries({}, optional={"country": st.sampled_from(["DE", "FR"])}),
    ),
    max_size=6,
    unique_by=lambda e: e.id,
)
some_copies = st.lists(
    st.builds(Copy, st.sampled_from(IDS), st.integers(0, 9), st.booleans()),
    max_size=6,
    unique_by=lambda c: c.endpoint_id,
)
wishes = st.builds(Wish, st.just(1), st.integers(1, 4), st.sampled_from(["endpoint", "site", "country"]))


@given(wishes, some_copies, endpoints, st.randoms(use_true_random=False))
def test_what_is_kept_fits_the_wish_is_as_much_as_can_be_and_always_the_same(
    wish: Wish, copies: list[Copy], candidates: list[Endpoint], dice: random.Random
) -> None:
    kept = keep(wish, copies, candidates)
    by_id = {e.id: e for e in candidates}
    domains = [domain_of(by_id[i], wish.spread) for i in kept]
    assert kept <= {c.endpoint_id for c in copies}
    assert len(kept) <= wish.copies
    assert None not in domains and len(set(domains)) == len(domains)
    able = [d for c in copies if c.endpoint_id in by_id and (d := domain_of(by_id[c.endpoint_id], wish.spread))]
    most = max(n for n in range(wish.copies + 1) if any(len(set(some)) == n for some in combinations(able, n)))
    assert len(kept) == most
    dice.shuffle(copies)
    dice.shuffle(candidates)
    assert keep(wish, copies, candidates) == kept


def test_the_more_complete_copy_is_kept() -> None:
    candidates = [endpoint(f"E{i}", i) for i in IDS]
    copies = [Copy(1, 0, False), Copy(2, 9, True), Copy(3, 5, False), Copy(4, 9, True)]
    assert keep(Wish(1, 2), copies, candidates) == {2, 4}
    assert keep(Wish(1, 3), copies, candidates) == {2, 3, 4}
    assert keep(Wish(1, 1), copies, candidates[2:]) == {4}


def test_what_is_where_it_is_drained_goes_first() -> None:
    drained = Endpoint(**{f: getattr(endpoint("E1", 1), f) for f in Endpoint.__slots__} | {"draining": True})
    copies = [Copy(1, 9, True), Copy(2, 3, False)]
    assert keep(Wish(1, 1), copies, [drained, endpoint("E2", 2)]) == {2}
