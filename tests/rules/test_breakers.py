"""When an endpoint is left alone, and when it is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.breakers import FEW, MANY, PAUSE_MAX_SECONDS, WHY, Breaker, BreakerState, Ended, after

CODES = [*WHY, "checksum_differs", "source_missing", "target_exists", "invalid", ""]


def through(*ended: Ended) -> Breaker:
    breaker = Breaker()
    for each in ended:
        breaker = after(breaker, each)
    return breaker


def many(code: str, count: int) -> list[Ended]:
    return [Ended(n, code, "no") for n in range(count)]


@pytest.mark.parametrize(
    ("code", "needed", "why"),
    [
        ("no_space", FEW, "full"),
        ("forbidden", FEW, "denied"),
        ("not_authenticated", FEW, "denied"),
        ("unreachable", FEW, "away"),
        ("timed_out", MANY, "failing"),
        ("busy", MANY, "throttled"),
    ],
)
def test_it_opens_after_so_many_in_a_row_and_not_before(code: str, needed: int, why: str) -> None:
    assert through(*many(code, needed - 1)).state is BreakerState.CLOSED
    opened = through(*many(code, needed))
    assert (opened.state, opened.why, opened.message) == (BreakerState.OPEN, why, "no")
    assert opened.opened_for is not None and opened.opened_for >= 30
    assert through(*many(code, needed - 1), Ended(99), *many(code, needed - 1)).state is BreakerState.CLOSED


@pytest.mark.parametrize("code", ["checksum_differs", "source_missing", "target_exists", "invalid", "source_changed"])
def test_what_is_the_fault_of_a_file_says_nothing_about_the_endpoint(code: str) -> None:
    assert through(*many(code, 100)) == Breaker()


def test_one_transfer_that_fails_for_ever_counts_once() -> None:
    assert through(*[Ended(7, "unreachable")] * 50).state is BreakerState.CLOSED


def test_a_storage_that_asks_for_a_pause_gets_it_at_once() -> None:
    asked = through(Ended(1, "busy", "later", 90.0))
    assert (asked.state, asked.opened_for) == (BreakerState.OPEN, 90.0)
    assert through(Ended(1, "busy", "later", 1e12)).opened_for == PAUSE_MAX_SECONDS
    assert through(Ended(1, "busy", "later", float("nan"))).state is BreakerState.CLOSED


def test_a_probe_that_fails_doubles_the_pause_and_any_success_closes() -> None:
    opened = through(*many("unreachable", FEW))
    half = Breaker(BreakerState.HALF_OPEN, opened.failures, opened.openings, None, opened.why, "")
    again = after(half, Ended(50, "unreachable", is_probe=True))
    assert opened.opened_for is not None and again.opened_for == 2 * opened.opened_for
    assert after(half, Ended(50, "unreachable")) == half, "somebody who began before"
    assert after(half, Ended(50, "checksum_differs", is_probe=True)) == half
    assert after(half, Ended(50)) == Breaker()
    assert after(opened, Ended(50)) == Breaker()


@given(st.lists(st.tuples(st.integers(1, 20), st.sampled_from(CODES), st.booleans()), max_size=60))
def test_it_is_closed_right_after_a_success_and_no_pause_is_longer_than_the_longest(
    ended: list[tuple[int, str, bool]],
) -> None:
    breaker = Breaker()
    for transfer, code, probe in ended:
        breaker = after(breaker, Ended(transfer, code, is_probe=probe))
        if not code:
            assert breaker == Breaker()
        if breaker.opened_for is not None:
            assert 0 <= breaker.opened_for <= PAUSE_MAX_SECONDS
        # What the catalogue does when the pause is over.
        if breaker.state is BreakerState.OPEN and probe:
            breaker = Breaker(BreakerState.HALF_OPEN, breaker.failures, breaker.openings, breaker.last_transfer)
