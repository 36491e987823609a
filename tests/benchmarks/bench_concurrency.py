"""Do rules that adapt bring more than FTS3's, and than fixed numbers, with less harm?

Question  On the traces of replica.simulation, in the same weather: what arrives in three hours, as a part of what the
          oracle brings; how many attempts fail; how long too much is in flight; how long until it is found.
Sketch    FTS3 adds two a minute and takes one away, for each link alone; so it should be slow to leave what is too
          much, and blind to what links share. Ours doubles, halves, and adapts storages, too.

    python -m tests.benchmarks.bench_concurrency [--seeds 20] [--trace NAME …]

Prints one JSON document: for each trace and policy the means over the seeds. Fails when ours brings less than FTS3's
on average, less than FLOOR of it on any trace, or does more harm on any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from replica.simulation.play import POLICIES, Score, compare
from replica.simulation.traces import TRACES

#: Where errors and noise come from outside, FTS3 brings a little more by having two or three times as much in flight.
FLOOR = 0.87
MEASURED = ("of_oracle", "bytes", "failures", "overshoot_seconds", "converge_seconds", "mean_in_flight")


def means(scores: list[Score]) -> dict[str, float]:
    return {name: round(statistics.mean(getattr(score, name) for score in scores), 3) for name in MEASURED}


def measure(names: list[str], seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in names:
        played = [compare(TRACES[name], seed) for seed in range(seeds)]
        found[name] = {policy: means([each[policy] for each in played]) for policy in POLICIES}
    return found


def verdict(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    ratios = {name: by["ours"]["of_oracle"] / by["fts3"]["of_oracle"] for name, by in found.items()}
    worse = {
        name: [what for what in ("failures", "overshoot_seconds") if by["ours"][what] > 1.1 * by["fts3"][what] + 1]
        for name, by in found.items()
    }
    mean = {policy: statistics.mean(by[policy]["of_oracle"] for by in found.values()) for policy in POLICIES}
    return {
        "mean_of_oracle": {policy: round(value, 3) for policy, value in mean.items()},
        "ours_to_fts3": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "worse_than_fts3": {name: what for name, what in worse.items() if what},
        "better": mean["ours"] > mean["fts3"] and min(ratios.values()) >= FLOOR and not any(worse.values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trace", action="append", choices=sorted(TRACES))
    asked = parser.parse_args()
    started = time.perf_counter()
    found = measure(asked.trace or list(TRACES), asked.seeds)
    said = verdict(found)
    took = round(time.perf_counter() - started, 1)
    print(json.dumps({"seeds": asked.seeds, "traces": found, **said, "seconds": took}, indent=2))
    return int(not said["better"])


if __name__ == "__main__":
    sys.exit(main())
