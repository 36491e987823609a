"""When is an endpoint left alone, and when is it tried again?

Given     the breaker of an endpoint for reading or for writing, and how a transfer there ended.
Returns   the breaker after that, and for how long it stays open.
Promises  only what is the endpoint's own fault counts: a file that is missing, wrong or in the way says nothing about
          the rest, and one transfer that fails again and again counts once. An open breaker lets one probe through at
          a time; any success closes it. A pause is never longer than PAUSE_MAX_SECONDS.
Partner   replica.catalog.breakers keeps them; replica.catalog.orders leaves alone what is open.

    closed ──failures in a row──▶ open ──the pause is over: one probe──▶ half open ──success──▶ closed
                                   ▲                                         │
                                   └────────── twice the pause ◀──failure────┘

| why        | errors                                        | opened by      | first pause               |
|------------|-----------------------------------------------|----------------|---------------------------|
| full       | no_space, when writing                        | FEW in a row   | 5 min                     |
| denied     | forbidden (read-only, too), not_authenticated, not_allowed | FEW in a row | 2 min              |
| away       | unreachable (a vanished mount)                | FEW in a row   | 30 s                      |
| throttled  | busy with Retry-After                         | the first      | what the storage asked for |
| failing    | busy, timed_out, storage_error, storage_transient | MANY in a row | 30 s                   |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType

FEW = 3
MANY = 8
PAUSE_MAX_SECONDS = 1800.0


class BreakerState(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Why(Enum):
    FULL = "full"
    DENIED = "denied"
    AWAY = "away"
    THROTTLED = "throttled"
    FAILING = "failing"


WHY: Mapping[str, Why] = MappingProxyType(
    {
        "no_space": Why.FULL,
        "forbidden": Why.DENIED,
        "not_authenticated": Why.DENIED,
        "not_allowed": Why.DENIED,
        "unreachable": Why.AWAY,
        "busy": Why.THROTTLED,
        "timed_out": Why.FAILING,
        "storage_error": Why.FAILING,
        "storage_transient": Why.FAILING,
    }
)
_FIRST_PAUSE: Mapping[Why, float] = MappingProxyType(
    {Why.FULL: 300.0, Why.DENIED: 120.0, Why.AWAY: 30.0, Why.THROTTLED: 30.0, Why.FAILING: 30.0}
)
#: What a person can do about it.
HINTS: Mapping[str, str] = MappingProxyType(
    {
        Why.FULL.value: "free space there, or move data elsewhere",
        Why.DENIED.value: "check credentials, permissions, and whether it is mounted read-only",
        Why.AWAY.value: "check that it is mounted and answers",
        Why.THROTTLED.value: "it asked for a pause and gets it; lower its limits if that goes on: `replica limit set`",
        Why.FAILING.value: "look at the storage; the messages of its failures are with the transfers",
    }
)


@dataclass(frozen=True, slots=True)
class Breaker:
    """Of one endpoint in one direction."""

    state: BreakerState = BreakerState.CLOSED
    #: Of different transfers, in a row.
    failures: int = 0
    #: How often it was opened without a success in between.
    openings: int = 0
    #: The transfer that failed last.
    last_transfer: int | None = None
    why: str = ""
    message: str = ""
    #: Set where it was opened just now: for so long.
    opened_for: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How a transfer ended there. `code` empty: well."""

    transfer: int
    code: str = ""
    message: str = ""
    retry_after_seconds: float | None = None
    is_probe: bool = False


def is_own_fault(code: str) -> bool:
    """Whether such a failure says anything about the endpoint as a whole."""
    return code in WHY


def after(breaker: Breaker, ended: Ended) -> Breaker:
    if not ended.code:
        return Breaker()
    why = WHY.get(ended.code)
    if why is None:
        return breaker
    match breaker.state:
        case BreakerState.OPEN:  # begun before it was opened
            return breaker
        case BreakerState.HALF_OPEN:
            return _opened(breaker, ended, why) if ended.is_probe else breaker
    asked = why is Why.THROTTLED and _seconds(ended.retry_after_seconds) is not None
    if breaker.last_transfer == ended.transfer and not asked:
        return replace(breaker, message=ended.message)
    failed = replace(breaker, failures=breaker.failures + 1, last_transfer=ended.transfer, message=ended.message)
    enough = FEW if why in (Why.FULL, Why.DENIED, Why.AWAY) else MANY
    return _opened(failed, ended, why) if asked or failed.failures >= enough else failed


def _opened(breaker: Breaker, ended: Ended, why: Why) -> Breaker:
    pause = _FIRST_PAUSE[why] * 2.0 ** min(breaker.openings, 20)
    if why is Why.THROTTLED and (asked := _seconds(ended.retry_after_seconds)) is not None:
        pause = asked
    return replace(
        breaker,
        state=BreakerState.OPEN,
        openings=breaker.openings + 1,
        last_transfer=ended.transfer,
        why=why.value,
        message=ended.message,
        opened_for=min(pause, PAUSE_MAX_SECONDS),
    )


def _seconds(asked: float | None) -> float | None:
    """What a storage asked for, unless it is nonsense."""
    return asked if asked is not None and math.isfinite(asked) and asked >= 0 else None
