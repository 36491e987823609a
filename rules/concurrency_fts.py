"""How FTS3 decides how many files are in flight on a link: the baseline that rules.concurrency is measured against.

Given     the same windows and bounds as rules.concurrency, about a minute each.
Returns   Decision, the same.
Promises  FTS3's rules, re-implemented from the description of its optimizer (src/server/services/optimizer of
          gitlab.cern.ch/fts/fts3, release 3.12 to 3.14; `reference/transfers.md` §1.4 of this project), not its code:
          a look back of 5, 15 or 30 minutes by the mean duration of a file; the moving average of what arrives, with
          weight 0.1; below 97 % success one less, unless it gets better; else one step of two more while the average
          does not fall and the queue is long enough; 2 to 130 for a link, half way to begin with.
Partner   replica.simulation plays both.

Left out, for the traces have none of it: caps in MB/s, streams within a file, and the minimum of 10 within a site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rules.concurrency import Bounds, Decision, Window

LOWEST, HIGHEST = 2, 130
#: Of a storage, in each direction: not adapted.
STORAGE_HIGHEST = 200
WEIGHT = 0.1
STEP_UP, STEP_DOWN = 2, 1
GOOD, FAIR = 97, 96
STREAMS_MAX = 16
UNCHANGED_SECONDS = 300.0
#: Mean duration of a file below which the look back is so long.
LOOK_BACK = ((30.0, 300.0), (900.0, 900.0))
LOOK_BACK_LONGEST = 1800.0


@dataclass(frozen=True, slots=True)
class FtsState:
    number: int
    average: float = 0.0
    success: int = 100
    retries: float = 0.0
    mean_bytes: float = 0.0
    #: Since when nothing was different.
    unchanged: float = 0.0
    windows: tuple[Window, ...] = ()


class Fts:
    """FTS3, in its mode *normal*."""

    def decide(self, state: FtsState | None, window: Window, bounds: Bounds) -> Decision:
        lowest, highest = min(LOWEST, bounds.highest), min(HIGHEST, bounds.highest)
        if state is None:
            state = FtsState(lowest + (highest - lowest) // 2)
            return _decision(state, "start", f"half way between {lowest} and {highest}", window)
        windows = _within((*state.windows, window), LOOK_BACK_LONGEST)
        seen = _within(windows, _look_back(windows))
        speed = sum(w.bytes for w in seen) / sum(w.seconds for w in seen)
        average = state.average
        if speed > 0:
            average = WEIGHT * speed + (1 - WEIGHT) * average if average else speed
        files, retries = sum(w.files for w in seen), sum(w.failures for w in seen)
        success = math.ceil(100 * files / (files + retries)) if files + retries else 100
        mean_bytes = sum(w.bytes for w in seen) / files if files else state.mean_bytes
        new = FtsState(state.number, average, success, retries, mean_bytes, 0.0, windows)
        if success == state.success and average == state.average and state.unchanged < UNCHANGED_SECONDS:
            number = max(lowest, min(highest, state.number))
            same = replace(new, number=number, unchanged=state.unchanged + window.seconds)
            return _decision(same, "hold", "nothing changed", window)
        queued = window.queued if window.queued is not None else math.inf
        number, reason = _number(state, new, queued)
        if number > state.number and number > queued * STREAMS_MAX:
            number, reason = state.number, "not more than the queue can use"
        number = max(lowest, min(highest, number))
        return _decision(replace(new, number=number), "fts", reason, window)


def _number(old: FtsState, new: FtsState, queued: float) -> tuple[int, str]:
    if new.success < GOOD:
        if new.success > old.success and new.success >= FAIR and new.retries <= old.retries:
            return old.number, "the success rate is getting better"
        return old.number - STEP_DOWN, "bad success rate"
    if new.average == 0:
        return old.number, "nothing arrived yet"
    if queued < old.number:
        return old.number, "the queue is shorter than the number"
    if new.average < old.average:
        if _magnitude(new.mean_bytes) < _magnitude(old.mean_bytes):
            return old.number + STEP_UP, "less arrives, but the files are smaller"
        if _magnitude(new.average) < _magnitude(old.average):
            return old.number - STEP_DOWN, "much less arrives"
        return old.number, "a little less arrives"
    return old.number + STEP_UP, "what arrives does not become less"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(value)) if value > 0 else 0


def _look_back(windows: Sequence[Window]) -> float:
    files = sum(w.files for w in windows)
    if not files:
        return LOOK_BACK_LONGEST
    duration = sum(w.busy_seconds for w in windows) / files
    return next((seconds for below, seconds in LOOK_BACK if duration < below), LOOK_BACK_LONGEST)


def _within(windows: Sequence[Window], seconds: float) -> tuple[Window, ...]:
    """The latest of them that together last about so long."""
    kept: list[Window] = []
    lasted = 0.0
    for window in reversed(windows):
        if kept and lasted + window.seconds > seconds + 1:
            break
        kept.append(window)
        lasted += window.seconds
    return tuple(reversed(kept))


def _decision(state: FtsState, why: str, reason: str, window: Window) -> Decision:
    values = {
        "average": round(state.average),
        "success": float(state.success),
        "queued": -1.0 if window.queued is None else window.queued,
        "in_flight": round(window.in_flight, 2),
    }
    return Decision(state, state.number, why, reason, values)
