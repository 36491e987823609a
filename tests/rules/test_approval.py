"""Who need not be asked: closed, and within both limits of every candidate."""

from __future__ import annotations

import pytest

from rules.approval import Ask, Granted, decide
from rules.endpoints import Endpoint
from rules.states import EndpointKind


def endpoint(number: int, **attributes: str | int | float | bool) -> Endpoint:
    return Endpoint(number, f"E{number}", "site", EndpointKind.DISK, attributes)


WIDE = endpoint(1, auto_approve_bytes=1_000, auto_approve_files=10)
NARROW = endpoint(2, auto_approve_bytes=500, auto_approve_files=5)


def test_what_is_within_the_limits_of_every_candidate_is_granted_to_the_byte() -> None:
    assert decide(5, 500, closed=True, candidates=[WIDE, NARROW]) == Granted()
    assert decide(5, 501, closed=True, candidates=[WIDE, NARROW]) == Ask("501 B are more than the 500 B of E2")
    assert decide(6, 500, closed=True, candidates=[WIDE, NARROW]) == Ask("6 files are more than the 5 of E2")
    assert decide(6, 501, closed=True, candidates=[WIDE]) == Granted()


def test_what_can_still_grow_is_never_granted() -> None:
    assert decide(0, 0, closed=False, candidates=[WIDE]) == Ask("the DID is open: more may be attached to it")


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"auto_approve_bytes": 1_000},
        {"auto_approve_files": 10},
        {"auto_approve_bytes": True, "auto_approve_files": 10},
        {"auto_approve_bytes": "lots", "auto_approve_files": 10},
        {"auto_approve_bytes": -1, "auto_approve_files": 10},
        {"auto_approve_bytes": 1e12, "auto_approve_files": 10},
    ],
)
def test_one_candidate_without_both_limits_asks(attributes: dict[str, str | int | float | bool]) -> None:
    answer = decide(1, 1, closed=True, candidates=[WIDE, endpoint(3, **attributes)])
    assert answer == Ask("E3 approves nothing by itself")


def test_a_limit_may_be_written_as_text_and_may_be_nothing() -> None:
    by_text = endpoint(4, auto_approve_bytes="1000", auto_approve_files="10")
    assert decide(10, 1_000, closed=True, candidates=[by_text]) == Granted()
    nothing = endpoint(5, auto_approve_bytes=0, auto_approve_files=0)
    assert decide(0, 0, closed=True, candidates=[nothing]) == Granted()
    assert isinstance(decide(1, 0, closed=True, candidates=[nothing]), Ask)


def test_without_a_candidate_somebody_is_asked() -> None:
    assert isinstance(decide(0, 0, closed=True, candidates=[]), Ask)
