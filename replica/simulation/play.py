"""A policy lives in a trace, and what it brought is counted.

Given     a trace, a policy, and a seed.
Returns   Score.
Promises  everything follows from the seed; the policy is told what a server measures, and nothing else; the same seed
          is the same weather for every policy.
Partner   replica.simulation.model carries, rules.concurrency and rules.concurrency_fts decide.

The oracle knows the trace: at each moment the smallest number, the same for all links, with which 98 % of the most
arrives that any number can bring.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from replica.simulation.model import Way, flow, good
from replica.simulation.traces import TRACES, Trace
from rules.concurrency import Adaptive, Bounds, Decision, Policy, Window
from rules.concurrency_fts import STORAGE_HIGHEST, Fts

STEP_SECONDS = 10.0
DECIDE_SECONDS = 60.0
#: What counts as too many in flight, and what as having found it.
TOO_MANY, FOUND = 1.25, 0.9
POLICIES = ("ours", "fts3", "fixed_4", "fixed_32", "oracle")


class Fixed:
    """So many, whatever happens."""

    def __init__(self, number: int) -> None:
        self.number = number

    def decide(self, state: Any, window: Window, bounds: Bounds) -> Decision:
        return Decision(None, bounds.clamp(self.number), "fixed", f"always {self.number}", {})


@dataclass(frozen=True, slots=True)
class Score:
    trace: str
    policy: str
    seed: int
    bytes: float
    #: Of what the oracle brings in the same weather; filled in by who has both.
    of_oracle: float
    failures: float
    #: Seconds with more in flight than 1.25 times what the oracle needs.
    overshoot_seconds: float
    #: Until nine tenths of what is possible arrived in a window for the first time.
    converge_seconds: float
    mean_in_flight: float
    decisions: tuple[tuple[float, str, int, str, str], ...] = ()


@dataclass(slots=True)
class _Meter:
    """What a server would have measured of a link or an endpoint since the last decision."""

    number: int
    state: Any = None
    bytes: float = 0.0
    files: float = 0.0
    failures: float = 0.0
    flights: float = 0.0
    busy: float = 0.0
    steps: int = 0

    def window(self, queued: float) -> Window:
        steps = max(1, self.steps)
        seconds = steps * STEP_SECONDS
        measured = Window(seconds, self.bytes, self.files, self.failures, self.flights / steps, queued, self.busy)
        self.bytes = self.files = self.failures = self.flights = self.busy = 0.0
        self.steps = 0
        return measured


def policies(name: str) -> tuple[Policy, Policy]:
    """For links, and for storages in each direction."""
    match name:
        case "ours":
            return Adaptive(), Adaptive()
        case "fts3":
            return Fts(), Fixed(STORAGE_HIGHEST)
        case "oracle":
            return Fixed(0), Fixed(10_000)
    number = int(name.removeprefix("fixed_"))
    return Fixed(number), Fixed(10_000)


def play(trace: Trace, policy: str, seed: int, *, keep_decisions: bool = False) -> Score:
    dice, fate = random.Random(seed), random.Random(seed + 1_000_003)
    of_links, of_storages = policies(policy)
    bounds = Bounds(highest=10_000 if policy == "oracle" else 200)
    count = len(trace.ways)
    links = [_Meter(of_links.decide(None, _NOTHING, bounds).number) for _ in trace.ways]
    ends = {(end, i) for way in trace.ways for i, end in enumerate((way.source, way.target))}
    storages = {end: _Meter(of_storages.decide(None, _NOTHING, Bounds(10_000)).number) for end in sorted(ends)}
    for meter in links:
        meter.state = of_links.decide(None, _NOTHING, bounds).state
    for meter in storages.values():
        meter.state = of_storages.decide(None, _NOTHING, Bounds(10_000)).state
    flights = [0.0] * count
    queues = [math.inf if trace.comes is None else 0.0] * count
    weather = dict.fromkeys(sorted({*(w.name for w in trace.ways), *trace.by_name}), 0.0)
    total = failures = overshoot = flown = 0.0
    converged: float | None = None
    arrived = possible = 0.0
    kept: list[tuple[float, str, int, str, str]] = []
    now = 0.0
    while now < trace.seconds:
        ways, factors, extra = _conditions(trace, now)
        best, most = _oracle(trace.name, ways, tuple(sorted(factors.items())), extra)
        if policy == "oracle":
            for meter in links:
                meter.number = best
        for name in weather:
            weather[name] = trace.memory * weather[name] + trace.noise * dice.gauss(0, 1) * math.sqrt(
                1 - trace.memory**2
            )
        if trace.comes is not None and now % trace.comes[0] < STEP_SECONDS:
            queues = [queue + trace.comes[1] for queue in queues]
        _fill(trace, flights, queues, links, storages, int(now / STEP_SECONDS))
        sky = {name: factors.get(name, 1.0) * math.exp(deviation) for name, deviation in weather.items()}
        carried = flow(ways, trace.by_name, flights, sky, extra)
        for i, (rate, failing) in enumerate(carried):
            way, n = ways[i], flights[i]
            ended = rate * STEP_SECONDS / (way.size * (1 - failing / 2))
            if trace.comes is not None:
                ended = min(ended, n + queues[i])
            failed = min(ended, _poisson(fate, ended * failing))
            files = ended - failed
            size = good(rate, failing) * STEP_SECONDS if trace.comes is None else files * way.size
            refilled = min(max(0.0, ended - n), queues[i])
            queues[i] -= refilled
            queues[i] += failed
            flights[i] = max(0.0, n - max(0.0, ended - refilled))
            total += size
            failures += failed
            arrived += size
            for meter in (links[i], storages[way.source, 0], storages[way.target, 1]):
                meter.bytes += size
                meter.files += files
                meter.failures += failed
                meter.flights += n
                meter.busy += n * STEP_SECONDS
            flown += n
            overshoot += STEP_SECONDS / count if n > TOO_MANY * best + 1 else 0.0
        possible += most * STEP_SECONDS
        for meter in (*links, *storages.values()):
            meter.steps += 1
        now += STEP_SECONDS
        if now % DECIDE_SECONDS < STEP_SECONDS / 2:
            if converged is None and arrived >= FOUND * possible:
                converged = now
            arrived = possible = 0.0
            for i, meter in enumerate(links):
                _decide(meter, of_links, bounds, queues[i], kept, now, trace.ways[i].name)
            for (end, direction), meter in storages.items():
                mine = [i for i, w in enumerate(trace.ways) if (w.source, w.target)[direction] == end]
                _decide(
                    meter,
                    of_storages,
                    replace(bounds, highest=400),
                    sum(queues[i] for i in mine),
                    kept,
                    now,
                    f"{('read', 'write')[direction]}:{end}",
                )
    steps = trace.seconds / STEP_SECONDS
    return Score(
        *(trace.name, policy, seed, total, 0.0, failures, overshoot),
        *(trace.seconds if converged is None else converged, flown / steps, tuple(kept) if keep_decisions else ()),
    )


_NOTHING = Window(DECIDE_SECONDS, 0, 0, 0, 0, 0)


def compare(trace: Trace, seed: int, names: Sequence[str] = POLICIES) -> dict[str, Score]:
    """The same weather for all; `of_oracle` is filled in."""
    most = play(trace, "oracle", seed)
    found = {name: most if name == "oracle" else play(trace, name, seed) for name in names}
    return {name: replace(score, of_oracle=score.bytes / most.bytes) for name, score in found.items()}


def _decide(
    meter: _Meter,
    policy: Policy,
    bounds: Bounds,
    queued: float,
    kept: list[tuple[float, str, int, str, str]],
    now: float,
    name: str,
) -> None:
    decided = policy.decide(meter.state, meter.window(min(queued, 1e6)), bounds)
    meter.state = decided.state
    if decided.state is not None or isinstance(policy, Fixed):
        meter.number = decided.number
    kept.append((now, name, decided.number, decided.why, decided.reason))


def _fill(
    trace: Trace,
    flights: list[float],
    queues: list[float],
    links: Sequence[_Meter],
    storages: dict[tuple[str, int], _Meter],
    turn: int,
) -> None:
    """Start what there is room for, the links in turn."""
    order = [(turn + i) % len(flights) for i in range(len(flights))]
    loads = dict.fromkeys(storages, 0.0)
    for i, way in enumerate(trace.ways):
        loads[way.source, 0] += flights[i]
        loads[way.target, 1] += flights[i]
    started = True
    while started:
        started = False
        for i in order:
            ends = ((trace.ways[i].source, 0), (trace.ways[i].target, 1))
            room = min(links[i].number - flights[i], queues[i], *(storages[end].number - loads[end] for end in ends))
            more = min(room, 4.0)
            if more < 0.5:
                continue
            flights[i] += more
            queues[i] -= more
            for end in ends:
                loads[end] += more
            started = True


def _conditions(trace: Trace, now: float) -> tuple[tuple[Way, ...], dict[str, float], float]:
    factors = {change.of: change.factor for change in trace.changes if change.at <= now}
    extra = sum(burst.part for burst in trace.errors if burst.since <= now < burst.until)
    size = next((resize.size for resize in reversed(trace.resizes) if resize.at <= now), None)
    ways = tuple(trace.ways) if size is None else tuple(replace(way, size=size) for way in trace.ways)
    return ways, factors, extra


@cache
def _oracle(
    name: str, ways: tuple[Way, ...], factors: tuple[tuple[str, float], ...], extra: float
) -> tuple[int, float]:
    """The smallest number that brings nearly the most, and the most."""
    storages, weather = TRACES[name].by_name if name in TRACES else {}, dict(factors)
    brought = []
    for number in range(1, 301):
        carried = flow(ways, storages, [float(number)] * len(ways), weather, extra)
        brought.append(sum(good(*each) for each in carried))
    most = max(brought)
    return next(i + 1 for i, value in enumerate(brought) if value >= 0.98 * most), most


def _poisson(dice: random.Random, mean: float) -> float:
    if mean > 30:
        return max(0.0, round(dice.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), dice.random(), 0
    while product > limit:
        product *= dice.random()
        count += 1
    return float(count)
