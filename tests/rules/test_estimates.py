"""A band from what was measured, and no number where nothing was."""

from __future__ import annotations

import random

from rules.estimates import Estimate, Period, Unknown, Way, estimate


def test_what_a_steady_link_did_it_will_do() -> None:
    steady = Period(300, files=300, bytes=300_000, busy_seconds=3_000)  # ten side by side, all the time
    answer = estimate([Way("E", 60, 60_000, periods=[steady, steady])])
    assert answer == Estimate(60.0, 60.0, 60.0)


def test_a_link_that_was_idle_most_of_the_time_is_measured_by_when_it_was_busy() -> None:
    idle = Period(300, files=10, bytes=10_000, busy_seconds=2.0)
    answer = estimate([Way("E", 100, 100_000, periods=[idle])])
    assert isinstance(answer, Estimate)
    assert answer.likely is not None and abs(answer.likely - 20) < 1e-6, "5 files a second, not 10 in five minutes"


def test_the_band_holds_what_goes_before_and_how_often_it_fails() -> None:
    fast = Period(300, files=600, bytes=600_000, busy_seconds=300)
    slow = Period(300, files=150, bytes=150_000, busy_seconds=300, failures=75)
    answer = estimate([Way("E", 100, 100_000, 100, 100_000, periods=[fast, slow])])
    assert isinstance(answer, Estimate) and answer.likely is not None and answer.latest is not None
    assert answer.soonest == 50, "nobody goes before us, at the best speed"
    assert answer.latest == 400 * 1.1, "everybody goes before us, at the worst speed, and every tenth fails"
    assert answer.soonest < answer.likely < answer.latest


def test_small_files_after_large_ones_widen_the_band_instead_of_being_guessed() -> None:
    large = Period(300, files=3, bytes=300_000_000, busy_seconds=300)
    answer = estimate([Way("E", 1_000, 1_000, periods=[large])])
    assert isinstance(answer, Estimate) and answer.latest is not None
    assert answer.soonest < 1 and answer.latest == 100_000


def test_the_last_way_decides_and_one_without_a_measurement_says_so() -> None:
    steady = Period(300, files=300, bytes=300_000, busy_seconds=300)
    two = [Way("A", 10, 10_000, periods=[steady]), Way("B", 20, 20_000, periods=[steady])]
    assert estimate(two) == Estimate(20.0, 20.0, 20.0)
    failing = Period(300, files=0, bytes=0, busy_seconds=0, failures=9)
    answer = estimate([*two, Way("C", 1, 1, periods=[failing])])
    assert answer == Unknown("nothing was brought to C lately, so its speed is not known")
    assert estimate([Way("C", 0, 0)]) == Estimate(0.0, 0.0, 0.0), "nothing is left"


def test_behind_a_queue_that_was_not_counted_to_its_end_only_the_soonest_is_said() -> None:
    steady = Period(300, files=300, bytes=300_000, busy_seconds=300)
    answer = estimate([Way("A", 10, 10_000, 5_000, 5_000_000, ahead_is_more=True, periods=[steady])])
    assert isinstance(answer, Estimate)
    assert (answer.soonest, answer.likely, answer.latest) == (10.0, None, None)
    assert "more than 5000 transfers" in answer.note


def test_the_three_are_always_in_order() -> None:
    dice = random.Random(7)
    for _ in range(2_000):
        periods = [
            Period(
                300,
                dice.randint(0, 50),
                dice.choice([0, dice.randint(0, 10**9)]),
                dice.choice([0.0, dice.uniform(0, 3_000)]),
                dice.randint(0, 20),
            )
            for _ in range(dice.randint(0, 5))
        ]
        way = Way(
            "E", dice.randint(0, 100), dice.randint(0, 10**9), dice.randint(0, 9), dice.randint(0, 99), periods=periods
        )
        answer = estimate([way])
        if isinstance(answer, Estimate):
            assert answer.likely is not None and answer.latest is not None
            assert 0 <= answer.soonest <= answer.likely <= answer.latest
