"""The removal loop against a centre that can be told to misbehave: what goes, what stays, what is said."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from replica.storage.posix import PosixStorage
from workers import removing


async def heard(centre: Any, outcomes: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while len(centre.deletion_outcomes) < outcomes:
        assert time.monotonic() < deadline, f"{len(centre.deletion_outcomes)} of {outcomes}"
        await asyncio.sleep(0.01)


def files(world: Any, at: str = "TARGET") -> list[str]:
    root = Path(world.directory / at)
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and ".replica" not in p.parts)


async def test_files_go_and_are_reported_in_batches(centre, world, running):
    centre.deletions = [world.deletion(f"d {i % 3}/ü{i}", b"%d" % i) for i in range(300)]
    kept = world.deletion("kept", b"kept")
    mover = await running()
    await heard(centre, 300)
    assert {o.outcome for o in centre.deletion_outcomes} == {"removed"}
    assert files(world) == ["kept"]
    assert kept.path == "kept"
    assert centre.calls["deletions.report"] <= 3
    assert mover.remover.removed == 300


async def test_what_is_not_there_is_as_good_as_removed(centre, world, running):
    centre.deletions = [world.deletion("never/was", None, size=7)]
    await running()
    await heard(centre, 1)
    assert [o.outcome for o in centre.deletion_outcomes] == ["removed"]


async def test_what_is_of_another_size_stays(centre, world, running):
    centre.deletions = [world.deletion("other", b"12345", size=4), world.deletion("bad", b"12345", size=None)]
    await running()
    await heard(centre, 2)
    said = {o.deletion: o for o in centre.deletion_outcomes}
    assert {d: (o.outcome, o.error) for d, o in said.items()} == {1: ("failed", "refused"), 2: ("removed", "")}
    assert "5 bytes" in said[1].message
    assert files(world) == ["other"]


async def test_what_cannot_be_removed_is_told_with_its_class(centre, world, running):
    os.makedirs(world.directory / "TARGET" / "folder")
    centre.deletions = [world.deletion("folder", None), world.deletion("gone", b"x", at="TARGET")]
    centre.deletions.append(world.deletion("far", None, at="NOWHERE"))
    await running()
    await heard(centre, 3)
    said = {o.deletion: (o.outcome, o.error) for o in centre.deletion_outcomes}
    assert said == {1: ("failed", "forbidden"), 2: ("removed", ""), 3: ("failed", "unreachable")}


async def test_an_order_leads_nobody_out_of_the_roots(centre, world, running, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "f").write_bytes(b"x")
    order = world.deletion("f", None, size=1, at="TARGET")
    order.url = (tmp_path / "secret").as_uri()
    centre.deletions = [order]
    await running(roots=[str(world.directory)])
    await heard(centre, 1)
    assert centre.deletion_outcomes[0].error == "forbidden"
    assert (tmp_path / "secret" / "f").exists()


async def test_nothing_is_removed_once_the_lease_may_be_over(centre, world, running, monkeypatch):
    """A worker that hung comes back: the bytes there now may be a newer generation's."""
    centre.lease_seconds = 0.3
    centre.trouble["deletions.heartbeat"] = 503
    looked: list[str] = []
    stat = PosixStorage.stat

    async def slowly(self: PosixStorage, path: str) -> Any:
        looked.append(path)
        await asyncio.sleep(0.5)
        return await stat(self, path)

    monkeypatch.setattr(PosixStorage, "stat", slowly)
    centre.deletions = [world.deletion(f"f{i}", b"x") for i in range(removing.AT_ONCE + 5)]
    mover = await running()
    deadline = time.monotonic() + 10
    while len(looked) < removing.AT_ONCE or mover.remover._running or mover.remover._waiting:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    assert len(files(world)) == removing.AT_ONCE + 5
    assert centre.deletion_outcomes == []
    assert len(looked) == removing.AT_ONCE


async def test_beats_keep_the_lease_of_a_slow_disk_and_what_is_lost_is_left_alone(centre, world, running, monkeypatch):
    centre.lease_seconds = 1.5
    stat = PosixStorage.stat

    async def slowly(self: PosixStorage, path: str) -> Any:
        await asyncio.sleep(2.0)
        return await stat(self, path)

    monkeypatch.setattr(PosixStorage, "stat", slowly)
    centre.deletions = [world.deletion("a", b"x"), world.deletion("b", b"x")]
    centre.stop.add(2)
    await running()
    await heard(centre, 1)
    await asyncio.sleep(0.1)
    assert [(o.deletion, o.outcome) for o in centre.deletion_outcomes] == [(1, "removed")]
    assert files(world) == ["b"]
    assert centre.calls["deletions.heartbeat"] >= 2


async def test_a_report_whose_answer_is_lost_is_repeated(centre, world, running):
    centre.trouble["deletions.report"] = "reset"
    centre.deletions = [world.deletion("a", b"x")]
    await running()
    while centre.calls["deletions.report"] < 2:
        await asyncio.sleep(0.01)
    del centre.trouble["deletions.report"]
    await heard(centre, 1)
    assert files(world) == []


async def test_a_stop_gives_back_what_has_not_begun(centre, world, running, monkeypatch):
    begun = asyncio.Event()
    stat = PosixStorage.stat

    async def slowly(self: PosixStorage, path: str) -> Any:
        begun.set()
        await asyncio.sleep(0.3)
        return await stat(self, path)

    monkeypatch.setattr(PosixStorage, "stat", slowly)
    count = removing.AT_ONCE + 20
    centre.deletions = [world.deletion(f"f{i}", b"x") for i in range(count)]
    mover = await running()
    await begun.wait()
    mover.stop()
    await mover.task
    said = [o.outcome for o in centre.deletion_outcomes]
    assert (said.count("removed"), said.count("given_back")) == (removing.AT_ONCE, 20)
    assert len(files(world)) == 20


async def test_a_hint_starts_it_and_a_centre_that_is_away_is_waited_for(centre, world, running):
    centre.trouble["deletions.claim"] = 503
    mover = await running(dice=lambda: 0.0)
    while centre.calls["deletions.claim"] < 2:
        await asyncio.sleep(0.01)
    del centre.trouble["deletions.claim"]
    calls = centre.calls["deletions.claim"]
    while centre.calls["deletions.claim"] == calls:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    centre.deletions = [world.deletion("a", b"x")]
    began = time.monotonic()
    mover.wake()
    await heard(centre, 1)
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("path", ["../outside", ".replica/endpoint", "/etc/passwd"])
async def test_a_path_that_is_no_replicas_is_refused(centre, world, running, path):
    order = world.deletion("x", None, size=1)
    order.path = path
    centre.deletions = [order]
    await running()
    await heard(centre, 1)
    assert centre.deletion_outcomes[0].outcome == "failed"
    assert (world.directory / "TARGET/.replica/endpoint").exists()
