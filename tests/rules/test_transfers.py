"""What follows a failed attempt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import transfers
from rules.errors import ReplicaError
from rules.transfers import Again, ErrorClass, GiveUp, RetryPolicy, after_failure, classify, describe

POLICY = RetryPolicy()


def all_errors(root: type[ReplicaError] = ReplicaError) -> list[type[ReplicaError]]:
    return [root, *(e for sub in root.__subclasses__() for e in all_errors(sub))]


CODES = sorted({e.code for e in all_errors()})
codes = st.sampled_from([*CODES, "of_a_newer_worker"])
fractions = st.floats(0, 1, exclude_max=True)


def pause(code: str, attempts: int, fraction: float = 0.5, **more: float) -> float:
    what = after_failure(code, attempts, POLICY, fraction, **more)  # type: ignore[arg-type]
    assert isinstance(what, Again)
    return what.delay_seconds


def gives_up(code: str, attempts: int, **more: int) -> bool:
    return isinstance(after_failure(code, attempts, POLICY, 0.5, **more), GiveUp)


def test_every_error_of_the_tree_has_been_given_a_class() -> None:
    assert set(transfers.CLASS_OF) == set(CODES)


@pytest.mark.parametrize(
    ("code", "error_class"),
    [
        ("timed_out", ErrorClass.TRANSIENT),
        ("unreachable", ErrorClass.TRANSIENT),
        ("source_changed", ErrorClass.TRANSIENT),
        ("busy", ErrorClass.THROTTLED),
        ("no_space", ErrorClass.TARGET_FULL),
        ("forbidden", ErrorClass.AUTH),
        ("source_missing", ErrorClass.SOURCE_MISSING),
        ("checksum_differs", ErrorClass.CHECKSUM),
        ("target_exists", ErrorClass.PERMANENT),
        ("broken", ErrorClass.PERMANENT),
        ("never heard of", ErrorClass.TRANSIENT),
        ("", ErrorClass.TRANSIENT),
    ],
)
def test_a_code_has_the_class_of_its_remedy(code: str, error_class: ErrorClass) -> None:
    assert classify(code) is error_class


@pytest.mark.parametrize("error_class", list(ErrorClass))
def test_every_class_says_what_a_person_can_do(error_class: ErrorClass) -> None:
    assert describe(error_class).endswith(".")


def test_pauses_double_up_to_the_cap() -> None:
    assert [pause("timed_out", n) for n in range(1, 8)] == [15, 30, 60, 120, 240, 480, 960]
    patient = RetryPolicy(attempts_max=10**9)
    assert after_failure("timed_out", 10**8, patient, 0.5) == Again(1800, ErrorClass.TRANSIENT)


def test_the_jitter_is_full() -> None:
    assert pause("timed_out", 1, fraction=0) == 0
    assert pause("timed_out", 1, fraction=0.99) == pytest.approx(29.7)


def test_a_throttled_transfer_waits_as_long_as_it_was_asked_to() -> None:
    assert pause("busy", 1, retry_after_seconds=120) == 135
    assert pause("busy", 7, retry_after_seconds=1, fraction=0) == 1
    assert pause("busy", 1, retry_after_seconds=10**9) == POLICY.cap_seconds


@pytest.mark.parametrize("nonsense", [-1, float("nan"), None])
def test_a_storage_that_asks_for_nonsense_has_asked_for_nothing(nonsense: float) -> None:
    assert pause("busy", 2, retry_after_seconds=nonsense) == pause("timed_out", 2)


def test_a_full_target_gets_a_long_pause_from_the_start() -> None:
    assert pause("no_space", 1, fraction=0) == POLICY.cap_seconds / 2


def test_a_token_is_renewed_at_once_and_then_doubted() -> None:
    assert pause("forbidden", 1) == 0
    assert pause("forbidden", 2) > 0
    assert gives_up("forbidden", 3)


@pytest.mark.parametrize("code", ["checksum_differs", "source_missing"])
def test_a_bad_source_is_left_for_another_at_once(code: str) -> None:
    assert pause(code, 1, other_sources=1) == 0
    assert pause(code, 7, other_sources=1) == 0
    assert gives_up(code, 8, other_sources=1)


@pytest.mark.parametrize("code", ["checksum_differs", "source_missing"])
def test_a_bad_source_without_another_is_tried_a_few_times(code: str) -> None:
    assert pause(code, 1) > 0
    assert pause(code, 2) > 0
    assert gives_up(code, 3)


def test_what_repeating_cannot_help_is_not_repeated() -> None:
    what = after_failure("target_exists", 1, POLICY, 0.5, other_sources=5)
    assert what == GiveUp(ErrorClass.PERMANENT, "target_exists: trying the same again will not help")


def test_giving_up_says_how_often_it_was_tried() -> None:
    what = after_failure("timed_out", 8, POLICY, 0.5)
    assert what == GiveUp(ErrorClass.TRANSIENT, "timed_out: 8 of 8 attempts are used up")


@given(codes, fractions, st.none() | st.floats(), st.integers(0, 5), st.integers(0, 20))
def test_every_transfer_ends(
    code: str, fraction: float, retry_after: float | None, other_sources: int, attempts_max: int
) -> None:
    policy = RetryPolicy(attempts_max=attempts_max)
    for attempts in range(1, attempts_max + 2):
        what = after_failure(code, attempts, policy, fraction, retry_after, other_sources)
        if isinstance(what, GiveUp):
            return
        assert 0 <= what.delay_seconds <= policy.cap_seconds
    raise AssertionError("it went on beyond attempts_max")
