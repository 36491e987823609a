"""Which events somebody wants, and how long who does not listen is tried."""

from __future__ import annotations

import pytest

from rules.errors import Invalid
from rules.events import GIVE_UP_SECONDS, PAUSE_MAX_SECONDS, check_patterns, pause_after


def test_patterns_are_kept_once_and_in_order() -> None:
    assert check_patterns(["rule.*", "did.created", "rule.*"]) == ("rule.*", "did.created")
    assert check_patterns([]) == ("*",)


@pytest.mark.parametrize(
    "pattern", ["", "rule", "rule.", "*.ok", "rules.*", "rule.OK", "r" * 99 + ".*", "rule.*,x", "\0"]
)
def test_a_pattern_that_fits_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(Invalid) as refused:
        check_patterns([pattern])
    assert refused.value.field == "kinds"
    assert refused.value.hint


def test_pauses_double_up_to_an_hour_and_those_that_failed_together_come_apart() -> None:
    longest = [pause_after(n, 0.999) for n in range(1, 40)]
    assert longest == sorted(longest)
    assert longest[0] < 5 < longest[1] < 10
    assert PAUSE_MAX_SECONDS * 0.99 < longest[-1] < PAUSE_MAX_SECONDS
    assert pause_after(3, 0.0) == pause_after(3, 1.0) / 2
    assert sum(longest) > GIVE_UP_SECONDS / 10  # some dozens of tries in the days before it is given up
