"""When will it be done? An honest band, from what was measured.

Given     for each target what is left to bring there, what goes before it, and how much came there in recent periods.
Returns   Estimate: seconds at the soonest, likely, and at the latest; or Unknown with the reason.
Promises  nothing is invented: without a measurement, or with something in the way that time alone does not mend, there
          is no estimate but a reason. soonest ≤ likely ≤ latest, always.
Partner   replica.catalog.forecasts gathers the facts.

A period in which B bytes in F files came, over T seconds summed over files that went side by side, was busy for at
most T seconds, and for no longer than it lasted. Its speed is taken as B and F over the smaller of the two: too low
rather than too high. What is left takes b seconds by its bytes and f by its files; small files are bound by f, large
ones by b, and where they disagree nobody knows: so over the periods

    soonest   min(b, f) of the fastest period, and nobody goes before us
    likely    the median of √(b·f), with what goes before us and the share of attempts that failed
    latest    max(b, f) of the slowest period, with the same
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Period:
    """What came over the links to a target in one period."""

    seconds: float  #: how long it lasted
    files: int
    bytes: int
    busy_seconds: float  #: summed over the files
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """What is left to bring to one target."""

    target: str
    files: int
    bytes: int
    #: Of other rules, and claimed before ours.
    files_ahead: int = 0
    bytes_ahead: int = 0
    #: More goes before ours than was counted.
    ahead_is_more: bool = False
    periods: Sequence[Period] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds from now. None: at the latest cannot be said, because of what the note says."""

    soonest: float
    likely: float | None
    latest: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    reason: str


def estimate(ways: Sequence[Way]) -> Estimate | Unknown:
    """When the last of several ways is done; they go on side by side."""
    left = [way for way in ways if way.files > 0]
    if not left:
        return Estimate(0.0, 0.0, 0.0)
    soonest = likely = latest = 0.0
    notes = []
    for way in left:
        measured = [p for p in way.periods if p.files > 0]
        if not measured:
            return Unknown(f"nothing was brought to {way.target} lately, so its speed is not known")
        first, middle, last = _of_way(way, measured)
        soonest, likely, latest = max(soonest, first), max(likely, middle), max(latest, last)
        if way.ahead_is_more:
            notes.append(f"more than {way.files_ahead} transfers to the site of {way.target} go before these")
    if notes:
        return Estimate(soonest, None, None, "; ".join(notes))
    likely = max(soonest, likely)
    return Estimate(soonest, likely, max(likely, latest))


def _of_way(way: Way, measured: Sequence[Period]) -> tuple[float, float, float]:
    ours = [_times(way.files, way.bytes, p) for p in measured]
    all_ = [_times(way.files + way.files_ahead, way.bytes + way.bytes_ahead, p) for p in measured]
    came, failed = sum(p.files for p in measured), sum(p.failures for p in way.periods)
    again = 1 + failed / came  # every failure costs an attempt
    return (
        min(min(pair) for pair in ours),
        again * _median([math.sqrt(by_bytes * by_files) for by_bytes, by_files in all_]),
        again * max(max(pair) for pair in all_),
    )


def _median(numbers: Sequence[float]) -> float:
    in_order = sorted(numbers)
    return (in_order[(len(in_order) - 1) // 2] + in_order[len(in_order) // 2]) / 2


def _times(files: int, size_bytes: int, period: Period) -> tuple[float, float]:
    """Seconds by bytes and by files at the speed of this period."""
    busy = min(period.seconds, period.busy_seconds) if period.busy_seconds > 0 else period.seconds
    by_files = busy * files / period.files
    # Files without bytes say nothing of a speed in bytes.
    by_bytes = busy * size_bytes / period.bytes if period.bytes > 0 and size_bytes > 0 else by_files
    return by_bytes, by_files
