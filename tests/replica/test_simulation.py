"""On the same traces in the same weather, ours is better than FTS3's, and what is simulated is no dream."""

from __future__ import annotations

import pytest

from replica.simulation.model import Storage, Way, flow
from replica.simulation.play import compare, play
from replica.simulation.traces import TRACES
from tests.benchmarks.bench_concurrency import measure, verdict


def test_ours_brings_more_than_fts3_and_does_less_harm() -> None:
    found = measure(list(TRACES), 1)
    said = verdict(found)
    assert said["better"], said
    ours, fts3 = said["mean_of_oracle"]["ours"], said["mean_of_oracle"]["fts3"]
    assert ours > 0.95
    assert ours > fts3 + 0.05
    assert all(by["ours"]["of_oracle"] > 0.9 for by in found.values())
    harm = {p: sum(by[p]["overshoot_seconds"] for by in found.values()) for p in ("ours", "fts3")}
    assert harm["ours"] < harm["fts3"] / 3


def test_everything_follows_from_the_seed() -> None:
    trace = TRACES["noisy_wan"]
    assert play(trace, "ours", 7, keep_decisions=True) == play(trace, "ours", 7, keep_decisions=True)
    assert play(trace, "ours", 7) != play(trace, "ours", 8)
    assert compare(trace, 7, ["fts3"])["fts3"].bytes == play(trace, "fts3", 7).bytes


@pytest.mark.parametrize("n", [1, 8, 64, 400])
def test_nothing_is_carried_that_nobody_allows(n: int) -> None:
    ways = [Way("A", target, 100.0, 10.0, 1.0, 50.0) for target in "BC"]
    storages = {name: Storage(name, 150.0, 16) for name in "ABC"}
    (one, failing), (two, _) = flow(ways, storages, [n, n], {"A:B": 0.5})
    assert one + two <= 150.001
    assert one <= 50.001
    assert one <= 10.0 * n
    assert 0 <= failing <= 0.9
    assert (failing > 0.01) == (n > 16)
