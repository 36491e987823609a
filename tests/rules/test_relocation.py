"""Who moves and who stays: patience, and when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.relocation import NEVER, Move, Patience, Stay, Trouble, decide

HOUR = 3600.0
TROUBLED = Trouble(complete=False, draining=False, writable=True, seconds=0.0)
troubles = st.builds(
    Trouble,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.floats(0, 1e7),
    st.integers(0, 100),
    st.sampled_from(["", NEVER]),
)


@pytest.mark.parametrize(
    ("changed", "moves"),
    [
        ({}, False),
        ({"seconds": 5.9 * HOUR}, False),
        ({"seconds": 6 * HOUR}, True),
        ({"seconds": 6 * HOUR, "complete": True}, False),
        ({"seconds": 6 * HOUR, "replace": NEVER}, False),
        ({"seconds": 6 * HOUR, "moves_before": 1}, False),
        ({"seconds": 12 * HOUR, "moves_before": 1}, True),
        ({"seconds": 0.9 * HOUR, "writable": False}, False),
        ({"seconds": 1 * HOUR, "writable": False}, True),
        ({"seconds": None, "writable": False}, False),
        ({"seconds": None, "complete": True, "draining": True}, True),
        ({"draining": True, "replace": NEVER}, False),
    ],
)
def test_there_is_patience(changed: dict[str, object], moves: bool) -> None:
    assert isinstance(decide(replace(TROUBLED, **changed)), Move) is moves


@given(troubles)
def test_who_stays_is_looked_at_again_when_its_patience_is_at_its_end(trouble: Trouble) -> None:
    decision = decide(trouble)
    assert decision.why
    if isinstance(decision, Stay) and decision.again_in_seconds is not None:
        assert trouble.seconds is not None and decision.again_in_seconds > 0
        later = replace(trouble, seconds=trouble.seconds + decision.again_in_seconds + 1)
        assert isinstance(decide(later), Move)


@given(troubles)
def test_never_is_never(trouble: Trouble) -> None:
    assert isinstance(decide(replace(trouble, replace=NEVER)), Stay)


def test_patience_grows_with_every_move_and_has_an_end() -> None:
    patience = Patience(stuck_seconds=HOUR, longest_seconds=10 * HOUR)
    waits = [decide(replace(TROUBLED, moves_before=n), patience).again_in_seconds for n in (0, 1, 2, 3, 4, 500)]  # type: ignore[union-attr]
    assert waits == [h * HOUR for h in (1, 2, 4, 8, 10, 10)]


def test_a_move_says_why() -> None:
    assert decide(replace(TROUBLED, seconds=7 * HOUR)).why == "nothing more arrived there for 7 hours"
    off = replace(TROUBLED, writable=False, seconds=61 * 60)
    assert decide(off).why == "nothing could be written there for 61 minutes"
    assert decide(replace(TROUBLED, draining=True)).why == "it is being drained"
