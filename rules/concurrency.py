"""How many files may be in flight at once, so that most arrives and nothing is overrun.

Given     what happened on a link, or at an endpoint in one direction, in a window of time; what was decided before; and
          the bounds that people set.
Returns   Decision: the number from now on, what is remembered for the next, the code and the sentence that say why,
          and the values they follow from.
Promises  the number is always within the bounds. It grows only while what arrives grows with it, falls by a factor when
          errors come that load can cause, and stays where the measurement cannot tell. Of two numbers that bring the
          same the smaller is taken. The same facts give the same decision.
Partner   replica.catalog.concurrency measures and keeps; replica.catalog.limits lets claims obey; replica.simulation
          plays it against others, of which rules.concurrency_fts is one.

What arrives is counted as work: bytes, and FILE_WORK for each file, so that neither small nor large files are the only
ones that count. A number is judged by its *elasticity* against the number before it: by how much of the growth in
flight did the work grow? 1: twice as many bring twice as much. 0: they bring the same, so something else is the limit.

    start ─▶ climb ──grows with it──▶ climb          twice as many, then half as many more, a quarter more, …
               └── does not ──▶ half of that growth ──▶ hold where it paid
    hold ──now and then──▶ up or down, by a quarter ──pays──▶ goes on ──does not──▶ hold, and asks half as often
    any ──errors──▶ recover: 0.7 or 0.5 of it ──a window without──▶ half as many more, up to 0.85 of where they came

| why       | the number                                                                                     |
|-----------|------------------------------------------------------------------------------------------------|
| start     | is the first                                                                                   |
| unlimited | stays: less is in flight than it allows, so it says nothing (a short queue, or another limit)  |
| draining  | stays: more is in flight than it allows, until that ends                                       |
| measuring | stays: one window is not enough against the noise                                              |
| grows     | grows: the last growth paid                                                                    |
| enough    | falls back, or stays lower: the difference brought nothing                                     |
| overrun   | falls: more in flight brought less                                                             |
| needed    | goes back up: less in flight brought less                                                      |
| hold      | stays: it is at what serves best                                                               |
| probe     | grows or falls a little, to see                                                                |
| errors    | falls: errors that load can cause                                                              |
| unrelated | stays: errors, and fewer in flight did not make them fewer                                     |
| recovers  | grows: the errors are over                                                                     |
| bounds    | is where a person's limit puts it                                                              |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

#: What a file counts besides its bytes: about what opening, proving and publishing it takes (rules.shares.FILE_COST).
FILE_WORK = 1_000_000
#: Errors that load can be the cause of; whatever else fails, fewer in flight do not help.
LOAD_ERRORS = frozenset({"busy", "timed_out", "storage_error", "storage_transient", "unreachable"})
#: Where a link or an endpoint begins that nothing is known of.
FIRST = 8
LOWEST, HIGHEST = 2, 200

#: Growth that pays: so much of it at least must arrive.
PAYS, PAYS_WELL = 0.25, 0.6
OVERRUN = -0.15
#: When a growth by more than this did not pay, half of it is tried.
HALVE = 1.35
#: In flight at least so much of the number, or it is not the number that limits.
AT_THE_LIMIT = 0.75
DRAINED = 1.25
#: Failures that count as errors of load: so many at least, and such a part of all that ended.
ERRORS_MIN, ERRORS_PART, ERRORS_MANY = 2, 0.04, 0.2
CUT, CUT_HARD = 0.7, 0.5
#: So many cuts show whether fewer in flight help: whether this part of the errors or less is left. If not, so many
#: windows pass before that is tried again.
CUTS_MAX, HELPED, ENDURED = 2, 0.7, 20
#: Of where errors came: so far it goes back up at once.
BELOW_ERRORS = 0.85
#: Windows between two probes at first and at most.
PATIENCE, PATIENCE_MAX = 4, 10
SAMPLES_MAX = 4
#: How large a probe is, as a logarithm: at least, at most, and by the noise.
STEP, STEP_MAX, NOISE_STEP = 0.26, 0.5, 2.0
#: A change of what arrives at the same number that calls for a look before its time.
CHANGED = 0.3
#: Files of so much another size cannot be compared with those before.
OTHER_SIZE = 3.0


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured since the last decision."""

    seconds: float
    #: That arrived, of files that are complete and of those still under way.
    bytes: float
    files: float
    #: Attempts that failed in a way that load can cause.
    failures: float
    #: On average; a list of small files counts as one.
    in_flight: float
    #: That could go besides, had they room; None: not known.
    queued: float | None
    #: Summed over the complete files.
    busy_seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Work a second."""
        return (self.bytes + FILE_WORK * self.files) / max(self.seconds, 1e-9)

    @property
    def mean_bytes(self) -> float:
        return self.bytes / self.files if self.files else 0.0

    @property
    def errors(self) -> float:
        """Which part of what ended failed."""
        ended = self.files + self.failures
        return self.failures / ended if ended else 0.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What people allow: their limit always wins, and where it is lower than the lowest there is no lowest."""

    highest: int = HIGHEST
    lowest: int = LOWEST

    def clamp(self, number: float) -> int:
        return max(1, min(self.highest, max(self.lowest, round(number))))


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered from one decision to the next."""

    number: int
    phase: str = "climb"  #: climb | half | hold | up | down | recover
    #: The number that the present one is compared with, what was in flight then, and what it brought.
    base: int = 0
    base_flight: float = 0.0
    base_speed: float = 0.0
    #: What the present number brought, window by window, and what was in flight.
    samples: tuple[float, ...] = ()
    flights: tuple[float, ...] = ()
    #: By what it grows.
    step: float = 2.0
    noise: float = 0.1
    #: Windows until the next probe; and between probes.
    wait: int = 0
    patience: int = PATIENCE
    upwards: bool = True
    mean_bytes: float = 0.0
    #: The number at which errors came, the part that failed then, and how often it was cut since.
    strained: int = 0
    errors: float = 0.0
    cuts: int = 0

    def document(self) -> dict[str, Any]:
        return {**asdict(self), "samples": list(self.samples), "flights": list(self.flights)}

    @staticmethod
    def of(document: Mapping[str, Any]) -> State:
        """What an older version remembered otherwise is forgotten."""
        known = {name: document[name] for name in State.__slots__ if name in document}
        for name in ("samples", "flights"):
            known[name] = tuple(known.get(name, ()))
        return State(**known)


@dataclass(frozen=True, slots=True)
class Decision:
    state: Any
    number: int
    why: str
    #: One plain sentence.
    reason: str
    values: Mapping[str, float]


class Policy(Protocol):
    """`state`: of this policy's last decision; None: there was none."""

    def decide(self, state: Any, window: Window, bounds: Bounds) -> Decision: ...


class Adaptive:
    """Ours."""

    def decide(self, state: State | None, window: Window, bounds: Bounds) -> Decision:
        if state is None:
            state = State(bounds.clamp(max(FIRST, window.in_flight)))
            return _decision(state, state.number, "start", f"{state.number} to begin with", window)
        allowed = bounds.clamp(state.number)
        if allowed != state.number:
            new = _hold(state, allowed)
            return _decision(state, allowed, "bounds", f"people allow {bounds.highest} at most", window, new)
        new, why, reason = _next(state, window, bounds)
        return _decision(state, new.number, why, reason, window, new)


def _decision(old: State, number: int, why: str, reason: str, window: Window, new: State | None = None) -> Decision:
    values = {
        "before": float(old.number),
        "in_flight": round(window.in_flight, 2),
        "queued": -1.0 if window.queued is None else window.queued,
        "seconds": round(window.seconds, 1),
        "bytes_per_second": round(window.bytes / max(window.seconds, 1e-9)),
        "files_per_second": round(window.files / max(window.seconds, 1e-9), 3),
        "mean_bytes": round(window.mean_bytes),
        "errors": round(window.errors, 4),
        "compared_with": float(old.base),
        "noise": round(old.noise, 3),
    }
    return Decision(new or old, number, why, reason, values)


Next = tuple[State, str, str]


def _next(state: State, window: Window, bounds: Bounds) -> Next:
    strained = window.failures >= ERRORS_MIN and window.errors > ERRORS_PART
    if strained:
        return _cut(state, window, bounds)
    if window.in_flight > DRAINED * state.number + 1:
        over = f"{window.in_flight:.0f} are still in flight, more than the {state.number} that may be"
        return replace(state, samples=(), flights=()), "draining", over
    if window.in_flight < AT_THE_LIMIT * state.number:
        return _unlimited(state, window, bounds)
    if state.phase == "recover":
        return _recover(state, window, bounds)
    if _other_size(state, window):
        told = "the files are of another size than before: what they bring is measured anew"
        return replace(_hold(state, state.number), wait=1, mean_bytes=window.mean_bytes), "measuring", told
    state = _sampled(state, window)
    if state.phase == "hold":
        return _holding(state, bounds)
    if len(state.samples) < _needed(state):
        return state, "measuring", f"one more window at {state.number}, for what arrives varies by {state.noise:.0%}"
    return _judge(state, bounds)


# --- errors ---------------------------------------------------------------------------------------------------------


def _cut(state: State, window: Window, bounds: Bounds) -> Next:
    told = f"{window.errors:.0%} of {window.files + window.failures:.0f} attempts failed in a way that load can cause"
    if window.in_flight > DRAINED * state.number + 1 and state.phase == "recover":
        return replace(state, wait=1), "draining", f"{told}, and what was in flight before the last cut still ends"
    if state.cuts >= CUTS_MAX and window.errors > HELPED * state.errors:
        return _unrelated(state, bounds, told)
    if state.phase == "recover" and state.wait > 0:
        return replace(state, wait=0), "draining", f"{told}, and the last cut is too recent to be judged"
    hard = window.errors >= ERRORS_MANY
    number = bounds.clamp(min(state.number, max(window.in_flight, 1.0)) * (CUT_HARD if hard else CUT))
    number = min(number, state.number)
    first = state.cuts == 0
    new = replace(
        _forgotten(state),
        number=number,
        phase="recover",
        strained=state.number if first else state.strained,
        errors=window.errors if first else state.errors,
        cuts=state.cuts + 1,
        wait=1,
    )
    return new, "errors", f"{told}: {number} instead of {state.number}"


def _unrelated(state: State, bounds: Bounds, told: str) -> Next:
    """Fewer only bring less. It goes back up, and looks again after a while whether that is still so."""
    told = f"{told}, and fewer in flight did not make them fewer"
    if state.wait <= -ENDURED:
        again = replace(_forgotten(state), phase="hold", cuts=0, wait=0)
        return again, "unrelated", f"{told}; that was a while ago, so it is tried anew"
    number = _back_up(state, bounds.clamp(BELOW_ERRORS * state.strained), bounds)
    return replace(state, number=number, wait=min(0, state.wait) - 1), "unrelated", f"{told}: {number}"


def _back_up(state: State, goal: int, bounds: Bounds) -> int:
    return max(state.number, min(goal, bounds.clamp(max(state.number * 1.6, state.number + 1))))


def _recover(state: State, window: Window, bounds: Bounds) -> Next:
    # Errors that fewer in flight did not help against were not of its making: it goes back to all of it.
    far = 1.0 if state.cuts >= CUTS_MAX else BELOW_ERRORS
    goal = bounds.clamp(far * state.strained)
    if state.number >= goal:
        held = _hold(state, state.number)
        return replace(held, strained=0, cuts=0, errors=0.0), "hold", f"no errors at {state.number}: it stays there"
    number = _back_up(state, goal, bounds)
    return replace(state, number=number, wait=0), "recovers", f"no errors any more: {number} instead of {state.number}"


# --- a queue that is too short --------------------------------------------------------------------------------------


def _unlimited(state: State, window: Window, bounds: Bounds) -> Next:
    if state.phase == "recover":
        # Nothing speaks against it, and nothing would ever speak for it.
        return _recover(state, window, bounds)
    new = replace(state, samples=(), flights=())
    if state.phase in ("up", "climb", "half") and state.base:
        new = _hold(state, state.number)
    why = "too little waits, or something else limits it: workers, or another limit"
    if window.queued is not None:
        why = "nothing more waits" if window.queued < 1 else "something else limits it: workers, or another limit"
    return new, "unlimited", f"{window.in_flight:.0f} of {state.number} are in flight: {why}"


# --- what the number brings -----------------------------------------------------------------------------------------


def _other_size(state: State, window: Window) -> bool:
    if not state.mean_bytes or window.files < 3 or window.mean_bytes < FILE_WORK / 4 > state.mean_bytes:
        return False
    return not 1 / OTHER_SIZE < window.mean_bytes / state.mean_bytes < OTHER_SIZE


def _sampled(state: State, window: Window) -> State:
    noise = state.noise
    if state.samples and state.samples[-1] > 0 and window.speed > 0:
        off = min(CHANGED, abs(math.log(window.speed / state.samples[-1]))) / math.sqrt(2)
        noise = 0.8 * noise + 0.2 * off * 1.25
    size = window.mean_bytes if window.files >= 3 else state.mean_bytes
    mean_bytes = 0.7 * state.mean_bytes + 0.3 * size if state.mean_bytes else size
    return replace(
        state,
        samples=(*state.samples, window.speed)[-SAMPLES_MAX:],
        flights=(*state.flights, window.in_flight)[-SAMPLES_MAX:],
        noise=noise,
        mean_bytes=mean_bytes,
    )


def _needed(state: State) -> int:
    """Windows until a difference that matters is larger than the noise."""
    if not state.base:
        return 1 if state.noise < 0.15 else 2
    matters = abs(math.log(max(state.number, 1) / state.base)) / 2 if state.number != state.base else 0.1
    return max(1, min(SAMPLES_MAX, math.ceil((1.2 * state.noise / max(matters, 0.02)) ** 2)))


def _judge(state: State, bounds: Bounds) -> Next:
    speed, flight = _mean(state.samples), _mean(state.flights)
    if not state.base:
        return _grow(state, speed, flight, bounds, f"{state.number} bring {_told(speed)}; it is tried with more")
    elasticity = _elasticity(state, speed, flight)
    of = f"{state.number} bring {_told(speed)}, {state.base} brought {_told(state.base_speed)}"
    if state.phase == "down":
        if elasticity < PAYS:
            return _shrink(state, speed, flight, bounds, f"{of}: the fewer do as well")
        back = _back(state, less_often=True)
        return back, "needed", f"{of}: it goes back to {back.number}"
    if elasticity >= PAYS + _doubt(state):
        if state.phase == "half":
            return _hold(state, state.number), "hold", f"{of}: that pays, and more than that did not"
        step = state.step if elasticity >= PAYS_WELL else min(state.step, 1.25)
        return _grow(replace(state, step=step), speed, flight, bounds, f"{of}: growing pays")
    between = bounds.clamp(math.sqrt(state.base * state.number))
    if state.phase != "half" and state.base < between < state.number and state.number > HALVE * state.base:
        half = replace(state, number=between, phase="half", samples=(), flights=())
        return half, "enough", f"{of}: not worth it, {between} is tried"
    back = _back(state, less_often=state.phase == "up")
    if elasticity < OVERRUN:
        return back, "overrun", f"{of}: more in flight brought less, it goes back to {back.number}"
    return back, "enough", f"{of}: more in flight brought nothing, it goes back to {back.number}"


def _grow(state: State, speed: float, flight: float, bounds: Bounds, reason: str) -> Next:
    number = bounds.clamp(max(state.number * state.step, state.number + 1))
    if number == state.number:
        return _hold(state, number), "hold", f"{reason}, and {number} is all that is allowed"
    new = _from_here(state, number, speed, flight)
    phase = "up" if state.phase == "up" else "climb"
    return replace(new, phase=phase, patience=PATIENCE), "grows", f"{reason}: {number}"


def _shrink(state: State, speed: float, flight: float, bounds: Bounds, reason: str) -> Next:
    number = bounds.clamp(min(state.number * 0.75, state.number - 1))
    if number == state.number:
        return _hold(state, number), "enough", reason
    new = _from_here(state, number, speed, flight)
    return replace(new, phase="down", patience=PATIENCE), "enough", f"{reason}: {number}"


def _holding(state: State, bounds: Bounds) -> Next:
    speed, flight = _mean(state.samples), _mean(state.flights)
    if state.base_speed and len(state.samples) >= 2:
        recent = _mean(state.samples[-2:])
        change = math.log(max(recent, 1e-9) / state.base_speed)
        if abs(change) > max(CHANGED, 2 * state.noise):
            how = "less" if change < 0 else "more"
            told = f"{state.number} bring {_told(recent)}, {how} than the {_told(state.base_speed)} before"
            calm = replace(state, base_speed=recent, base_flight=flight, patience=PATIENCE, samples=state.samples[-2:])
            return _probe(calm, recent, flight, change > 0, bounds, told)
    if state.wait > 0:
        kept = replace(state, wait=state.wait - 1)
        if not state.base_speed and len(state.samples) >= 2:
            kept = replace(kept, base=state.number, base_speed=speed, base_flight=flight)
        return kept, "hold", f"{state.number} bring {_told(speed)}: it stays there"
    return _probe(state, speed, flight, state.upwards, bounds, f"{state.number} bring {_told(speed)}")


def _probe(state: State, speed: float, flight: float, upwards: bool, bounds: Bounds, told: str) -> Next:
    number = bounds.clamp(_a_step(state, upwards))
    if number == state.number:  # there is no room on this side
        upwards = not upwards
        number = bounds.clamp(_a_step(state, upwards))
    if number == state.number:
        return _hold(state, number), "hold", f"{told}, and nothing else is allowed"
    new = replace(
        _from_here(state, number, speed, flight), phase="up" if upwards else "down", step=1.4, upwards=not upwards
    )
    return new, "probe", f"{told}: {number} are tried"


def _a_step(state: State, upwards: bool) -> float:
    """About a quarter; more where the noise would hide what a quarter brings."""
    factor = math.exp(max(STEP, min(STEP_MAX, NOISE_STEP * state.noise)))
    return max(state.number * factor, state.number + 1) if upwards else min(state.number / factor, state.number - 1)


def _from_here(state: State, number: int, speed: float, flight: float) -> State:
    return replace(
        state, number=number, base=state.number, base_speed=speed, base_flight=flight, samples=(), flights=()
    )


def _hold(state: State, number: int, *, less_often: bool = False) -> State:
    patience = min(PATIENCE_MAX, state.patience * 2) if less_often else PATIENCE
    return replace(_forgotten(state), number=number, phase="hold", wait=patience, patience=patience)


def _back(state: State, *, less_often: bool) -> State:
    """To the number before, and what it brought then is remembered: if it does not any more, something has changed."""
    held = _hold(state, state.base, less_often=less_often)
    return replace(held, base=state.base, base_speed=state.base_speed, base_flight=state.base_flight)


def _forgotten(state: State) -> State:
    return replace(state, base=0, base_speed=0.0, base_flight=0.0, samples=(), flights=())


def _elasticity(state: State, speed: float, flight: float) -> float:
    grown = math.log(max(flight, 0.1) / max(state.base_flight, 0.1))
    meant = math.log(state.number / state.base)
    if grown * meant <= 0 or abs(grown) < abs(meant) / 2:  # what is in flight varies, too
        grown = meant
    return math.log(max(speed, 1e-9) / max(state.base_speed, 1e-9)) / grown


def _doubt(state: State) -> float:
    """How far noise alone can raise the elasticity: more in flight must have paid beyond it."""
    return state.noise / math.sqrt(max(1, len(state.samples))) / abs(math.log(state.number / state.base)) / 4


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values) if values else 0.0


def _told(speed: float) -> str:
    return f"{speed / 1e6:,.0f} MB/s"
