"""The present moment, in one place, so that a test can turn it.

Given     nothing.
Returns   aware UTC moments.
Promises  code that decides takes `now` as a value; only whoever begins a transaction or a pass asks the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], datetime]


def system_clock() -> datetime:
    return datetime.now(UTC)
