"""How many may be in flight: up while it pays, down on errors, within what people allow, and never without a reason."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.concurrency import FIRST, Adaptive, Bounds, Decision, State, Window
from rules.concurrency_fts import Fts

MB = 1_000_000
OURS = Adaptive()


def window(
    in_flight: float, mb_per_second: float, failures: float = 0, queued: float = 1_000, size: float = 100 * MB
) -> Window:
    moved = 60 * mb_per_second * MB
    return Window(60, moved, moved / size, failures, in_flight, queued, 60 * in_flight)


class Place:
    """A link that brings `each` for each in flight, up to `most`, and less beyond `best`."""

    def __init__(self, each: float = 10, most: float = 200, best: int = 1_000) -> None:
        self.each, self.most, self.best = each, most, best
        self.decided: Decision = OURS.decide(None, window(0, 0), Bounds())

    def step(self, *, failures: float = 0, bounds: Bounds | None = None, queued: float = 1_000) -> Decision:
        n = min(self.decided.number, queued)
        brings = min(n * self.each, self.most) / max(1, n / self.best)
        measured = window(n, brings, failures, queued if queued >= 1_000 else 0)
        self.decided = OURS.decide(self.decided.state, measured, bounds or Bounds())
        return self.decided

    def steps(self, count: int, **fields: object) -> list[int]:
        return [self.step(**fields).number for _ in range(count)]  # type: ignore[arg-type]


def test_it_doubles_while_that_pays_and_settles_where_it_stops_paying() -> None:
    place = Place(each=10, most=200)
    assert place.decided.number == FIRST
    numbers = place.steps(40)
    assert numbers[:2] == [16, 32]
    assert max(numbers) <= 42
    assert 17 <= numbers[-1] <= 24, numbers


def test_of_two_numbers_that_bring_the_same_the_smaller_is_taken() -> None:
    place = Place(each=10, most=50)
    assert place.steps(60)[-1] <= 7


def test_what_thrashes_is_left_at_once() -> None:
    place = Place(each=10, most=80, best=8)
    numbers = place.steps(40)
    assert max(numbers[2:]) <= 16
    assert 6 <= numbers[-1] <= 10


def test_errors_cut_by_a_factor_and_it_comes_back_soon() -> None:
    place = Place(each=10, most=400)
    before = place.steps(12)[-1]
    first = place.step(failures=200)
    assert (first.why, first.number) == ("errors", round(before * 0.5))
    back = place.steps(6)
    assert back[3] >= 0.8 * before, "FTS3 would need an hour"


def test_errors_that_fewer_in_flight_do_not_help_against_cost_a_little_only() -> None:
    place = Place(each=10, most=400)
    before = place.steps(12)[-1]
    numbers = []
    for _ in range(25):
        n = place.decided.number
        numbers.append(place.step(failures=n * 3).number)  # always a third
    assert min(numbers) >= before / 5
    assert sorted(numbers)[len(numbers) // 2] >= 0.6 * before


def test_one_failure_is_none_and_a_failure_in_a_hundred_is_life() -> None:
    place = Place(each=10, most=200)
    place.steps(10)
    assert place.step(failures=1).why != "errors"
    assert place.step(failures=3).why != "errors", "of 120"


def test_a_short_queue_says_nothing() -> None:
    place = Place()
    before = place.steps(3)[-1]
    for _ in range(10):
        decided = place.step(queued=3)
        assert (decided.number, decided.why) == (before, "unlimited")
    assert "nothing more waits" in decided.reason


def test_files_of_another_size_are_not_compared_with_those_before() -> None:
    place = Place()
    place.steps(12)
    n, state = place.decided.number, place.decided.state
    decided = OURS.decide(state, window(n, 1, size=MB / 10), Bounds())
    assert (decided.number, decided.why) == (n, "measuring")


def test_half_of_the_capacity_halves_the_number_in_a_few_windows() -> None:
    place = Place(each=10, most=240, best=30)
    before = place.steps(30)[-1]
    place.most = 120
    assert place.steps(20)[-1] <= 0.7 * before
    place.most = 240
    assert max(place.steps(30)) >= 0.8 * before


def test_what_people_allow_always_wins() -> None:
    place = Place()
    place.steps(12)
    decided = place.step(bounds=Bounds(highest=3))
    assert (decided.number, decided.why) == (3, "bounds")
    assert set(place.steps(30, bounds=Bounds(highest=3))) <= {2, 3}
    assert set(place.steps(5, bounds=Bounds(highest=1))) == {1}
    assert place.steps(40)[-1] > 10, "and when they do no more, it goes on from there"


def test_the_state_can_be_kept_as_a_document() -> None:
    place = Place()
    for _ in range(30):
        place.step()
        assert State.of(place.decided.state.document()) == place.decided.state
    assert State.of({"number": 5, "unheard_of": 1}) == State(5)


@given(st.integers(0, 2**32), st.integers(1, 300), st.sampled_from(["ours", "fts3"]))
def test_whatever_happens_it_stays_within_the_bounds_and_says_why(seed: int, highest: int, policy: str) -> None:
    dice, rules, state = random.Random(seed), {"ours": OURS, "fts3": Fts()}[policy], None
    for _ in range(30):
        odd = dice.choice([0, 0, 1, 10, 1e3, 1e7])
        measured = Window(
            dice.choice([1e-3, 30, 60, 4_000]),
            *(dice.random() * odd * 1e6, dice.choice([0, 0.3, odd]), dice.choice([0, 0, odd])),
            *(dice.choice([0, 1, highest, 3 * highest]), dice.choice([0, 5, 1e6]), dice.random() * odd),
        )
        bounds = Bounds(dice.choice([highest, highest, 1, 1_000]))
        decided = rules.decide(state, measured, bounds)
        state = decided.state
        assert 1 <= decided.number <= bounds.highest
        assert decided.reason and decided.why and state.number == decided.number
        assert all(isinstance(value, int | float) for value in decided.values.values())


@pytest.mark.parametrize(
    ("success", "queued", "step"), [(100, 1_000, 2), (90, 1_000, -1), (100, 10, 0)], ids=["up", "errors", "queue"]
)
def test_fts3_goes_two_up_one_down_and_stays_with_a_short_queue(success: int, queued: int, step: int) -> None:
    fts = Fts()
    decided = fts.decide(None, window(0, 0), Bounds())
    assert decided.number == 66
    for n in range(1, 6):
        before = decided.number
        good = window(before, 100 + n, queued=queued)
        failed = good.files * (100 - success) / success
        measured = window(before, 100 + n, failed, queued)
        decided = fts.decide(decided.state, measured, Bounds())
        assert decided.number == before + step
