"""The mover against a centre that can be told to misbehave: what arrives, what is reported, what never happens."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from replica.storage import chunks, faultpoints
from replica.storage.base import PARTS, QUARANTINE
from replica.storage.memory import MemoryStorage, behind, forget
from workers import carrying
from workers import mover as mover_module

LARGE = os.urandom(carrying.SMALL_BYTES + 1)


def parts(world: Any, name: str = "TARGET") -> list[str]:
    folder = world.directory / name / PARTS
    return sorted(os.listdir(folder)) if folder.exists() else []


def slow_pieces(seconds: float, started: threading.Event | None = None) -> Any:
    """Within, every piece of a copy takes so long."""

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        if point == "piece":
            if started is not None:
                started.set()
            time.sleep(seconds)
        return None

    return faultpoints.handling(handler)


async def until(true: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.01)


# --- the usual ---


async def test_many_small_files_arrive_and_are_reported_in_batches(centre, world, running):
    for i in range(1500):
        centre.add(world.order(f"run {i % 7}/ü{i}.dat", b"%d" % i))
    await running()
    await centre.wait_for(1500, 60)
    assert {o.outcome for o in centre.outcomes} == {"done"}
    assert {o.verified_by for o in centre.outcomes} == {"read back"}
    assert {o.source_endpoint for o in centre.outcomes} == {"SOURCE"}
    assert len({o.transfer for o in centre.outcomes}) == 1500
    for i in range(1500):
        assert (world.directory / f"TARGET/run {i % 7}/ü{i}.dat").read_bytes() == b"%d" % i
    assert len(centre.reports) < 100
    assert centre.calls["claim"] < 20
    assert parts(world) == []


async def test_small_files_for_a_server_go_many_at_a_time_each_with_its_own_end(centre, world, running, monkeypatch):
    store = MemoryStorage("mover-small", name="TARGET")
    await store.prepare()
    orders = [world.order(f"f{n}", b"%d" % n) for n in range(200)]
    orders[7] = world.order("f7", b"7", sources=("SOURCE", "SECOND"), write_at=("SECOND",))
    orders[9] = world.order("f9", b"9", write_at=())
    orders[11] = world.order("f11", b"11", checksums={"sha256": "0" * 64})
    (world.directory / "SOURCE/f7").unlink()
    (world.directory / "SOURCE/f9").unlink()
    for order in orders:
        centre.add(msgspec.structs.replace(order, target_url=store.url))
    now = most = 0

    async def counted(*arguments: Any, copy: Any = carrying.copy_file, **more: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            await asyncio.sleep(0)
            return await copy(*arguments, **more)
        finally:
            now -= 1

    monkeypatch.setattr(carrying, "copy_file", counted)
    await running(concurrency=1)
    await centre.wait_for(200, 60)
    assert most == carrying.REMOTE_AT_ONCE
    outcomes = {centre.orders[o.transfer].target_path: o for o in centre.outcomes}
    assert len(outcomes) == 200
    assert outcomes["f7"].source_endpoint == "SECOND"
    assert (outcomes["f9"].outcome, outcomes["f9"].error) == ("failed", "source_missing")
    assert (outcomes["f11"].outcome, outcomes["f11"].side) == ("failed", "source")
    assert sorted(path for path, o in outcomes.items() if o.outcome != "done") == ["f11", "f9"]
    for n in {*range(200)} - {9, 11}:
        assert behind("mover-small").get(f"f{n}") == b"%d" % n
    assert len(centre.reports) < 50
    forget("mover-small")


async def test_large_files_leave_one_slot_to_small_ones(centre, world, running, monkeypatch):
    go_on = asyncio.Event()

    async def held_up(self: Any, held: Any, *, copy: Any = carrying.Carrier._copy_one, **more: Any) -> None:
        if not held.small:
            await go_on.wait()
        await copy(self, held, **more)

    monkeypatch.setattr(carrying.Carrier, "_copy_one", held_up)
    for n in range(3):
        centre.add(world.order(f"large{n}", LARGE))
    for n in range(20):
        centre.add(world.order(f"small{n}", b"%d" % n))
    await running(concurrency=2)
    await centre.wait_for(20)
    assert {centre.orders[o.transfer].target_path[:5] for o in centre.outcomes} == {"small"}
    go_on.set()
    await centre.wait_for(23)
    assert {o.outcome for o in centre.outcomes} == {"done"}


async def test_a_large_file_arrives(centre, world, running):
    centre.add(world.order("large.h5", LARGE))
    await running()
    await centre.wait_for(1)
    (outcome,) = centre.outcomes
    assert (outcome.outcome, outcome.size, outcome.adopted) == ("done", len(LARGE), False)
    assert outcome.checksums.keys() >= {"xxh3_128", "adler32"}
    assert (world.directory / "TARGET/large.h5").read_bytes() == LARGE


async def test_what_is_there_already_is_verified_and_adopted(centre, world, running):
    for name, content in (("small", b"abc"), ("large", LARGE)):
        centre.add(world.order(name, content))
        (world.directory / "TARGET" / name).write_bytes(content)
    await running()
    await centre.wait_for(2)
    assert [(o.outcome, o.adopted, o.source_endpoint) for o in centre.outcomes] == [("done", True, None)] * 2


async def test_a_hint_starts_work_at_once(centre, world, running):
    mover = await running(poll_seconds=1000.0)
    await until(lambda: centre.calls["claim"] == 1)
    await asyncio.sleep(0.1)
    centre.add(world.order("a", b"a"))
    began = time.monotonic()
    mover.wake()
    await centre.wait_for(1)
    assert time.monotonic() - began < 1.0


async def test_without_hints_it_looks_by_itself(centre, world, running):
    await running(poll_seconds=0.2)
    await until(lambda: centre.calls["claim"] >= 1)
    centre.add(world.order("a", b"a"))
    await centre.wait_for(1, 2)


async def test_a_thousand_hints_cost_few_claims(centre, running):
    mover = await running()
    await until(lambda: centre.calls["claim"] >= 1)
    for _ in range(1000):
        mover.wake()
        await asyncio.sleep(0.0005)
    assert centre.calls["claim"] < 200


async def test_large_files_are_not_hoarded(centre, world, running):
    """What waits behind the slots is bounded in bytes, so another worker of the site finds something to do."""
    size = mover_module.WAITING_BYTES
    for i in range(50):
        centre.add(world.order(f"f{i}", LARGE, size=size))
        os.truncate(world.directory / f"SOURCE/f{i}", size)  # mostly a hole: it costs nothing, and is read slowly
    with slow_pieces(0.5):
        await running(concurrency=2)
        await until(lambda: centre.calls["claim"] >= 1)
        await asyncio.sleep(0.2)
    assert sum(taken for _, taken in centre.claims) <= 2 + 2 + 1 + len(centre.outcomes)


async def test_free_space_of_a_target_is_told_but_rarely(centre, world, running):
    for i in range(5):
        centre.add(world.order(f"a{i}", b"a"))
    mover = await running()
    await centre.wait_for(5)
    centre.add(world.order("b", b"b"))
    mover.wake()
    await centre.wait_for(6)
    assert centre.space.keys() == {"TARGET"}
    assert centre.space["TARGET"] > 0
    assert centre.calls["space"] == 1


async def test_what_killed_workers_left_behind_is_collected_when_it_is_old(centre, world, running):
    folder = world.directory / "TARGET" / PARTS
    folder.mkdir(parents=True, exist_ok=True)
    for name, age in (("1-1-old", 49 * 3600), ("1-1-young", 3600)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (time.time() - age,) * 2)
    centre.add(world.order("a", b"a"))
    await running()
    await centre.wait_for(1)
    await until(lambda: parts(world) == ["1-1-young"])


# --- sources and targets that fail ---


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_when_a_source_fails_the_next_one_is_tried(centre, world, running, content):
    centre.add(world.order("a", content, sources=("SOURCE", "SECOND"), write_at=("SECOND",)))
    await running()
    await centre.wait_for(1)
    (outcome,) = centre.outcomes
    assert (outcome.outcome, outcome.source_endpoint) == ("done", "SECOND")
    assert (world.directory / "TARGET/a").read_bytes() == content


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_a_source_with_other_bytes_is_blamed_and_nothing_gets_the_name(centre, world, running, content):
    order = world.order("a", content)
    (world.directory / "SOURCE/a").write_bytes(content[:-1] + b"#")
    centre.add(order)
    await running()
    await centre.wait_for(1)
    (outcome,) = centre.outcomes
    assert (outcome.outcome, outcome.error, outcome.side) == ("failed", "checksum_differs", "source")
    assert outcome.source_endpoint == "SOURCE"
    assert not (world.directory / "TARGET/a").exists()
    assert parts(world) == []


async def test_of_several_failing_sources_the_failure_that_may_pass_is_told(centre, world, running):
    (world.directory / "SECOND" / ".replica").rename(world.directory / "SECOND/away")  # not mounted: may come back
    for i, sources in enumerate((("SOURCE", "SECOND"), ("SECOND", "SOURCE"))):
        centre.add(world.order(f"a{i}", None, sources=sources))
    await running()
    await centre.wait_for(2)
    assert [(o.error, o.side, o.source_endpoint) for o in centre.outcomes] == [("unreachable", "source", "SECOND")] * 2


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_a_failure_of_the_target_blames_no_source(centre, world, running, content):
    (world.directory / "TARGET" / ".replica").rename(world.directory / "TARGET/away")
    centre.add(world.order("a", content, sources=("SOURCE", "SECOND")))
    await running()
    await centre.wait_for(1)
    (outcome,) = centre.outcomes
    assert (outcome.outcome, outcome.error, outcome.side) == ("failed", "unreachable", "target")
    assert outcome.source_endpoint is None


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_a_full_target_says_so_and_its_space_is_told_again(centre, world, running, content, monkeypatch):
    from replica.storage.tree import Tree
    from rules.errors import NoSpace

    def full(self: Tree, *args: Any, **kwargs: Any) -> int:
        raise NoSpace("no space left", endpoint=self.name, side="target")

    monkeypatch.setattr(Tree, "create_part", full)
    centre.add(world.order("a", content))
    await running()
    await centre.wait_for(1)
    assert (centre.outcomes[0].error, centre.outcomes[0].side) == ("no_space", "target")
    await until(lambda: centre.calls["space"] == 2)


async def test_a_bug_of_ours_is_an_outcome_too(centre, world, running, monkeypatch):
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(carrying, "copy_local_batch", broken)
    centre.add(world.order("a", b"a"))
    await running()
    await centre.wait_for(1)
    assert (centre.outcomes[0].error, centre.outcomes[0].message) == ("broken", "a bug")


async def test_orders_without_a_source_are_verified_in_place(centre, world, running):
    centre.add(world.order("there", b"there", sources=(), write_at=("TARGET",)))
    centre.add(world.order("large", LARGE, sources=(), write_at=("TARGET",)))
    centre.add(world.order("missing", None, sources=()))
    wrong = world.order("wrong", b"wrong", sources=(), write_at=("TARGET",))
    (world.directory / "TARGET/wrong").write_bytes(b"WRONG")
    centre.add(wrong)
    await running()
    await centre.wait_for(4)
    outcomes = {centre.orders[o.transfer].target_path: o for o in centre.outcomes}
    assert (outcomes["there"].outcome, outcomes["there"].adopted) == ("done", True)
    assert outcomes["large"].outcome == "done"
    assert outcomes["missing"].error == "source_missing"
    assert outcomes["wrong"].outcome == "failed"
    kept = [p.read_bytes() for p in (world.directory / "TARGET" / QUARANTINE).rglob("*") if p.is_file()]
    assert kept == [b"WRONG"]


# --- the fence around a worker ---


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("pinned", "side"), [("SOURCE", "target"), ("TARGET", "source")])
async def test_an_order_never_leads_a_worker_out_of_its_roots(centre, world, running, content, pinned, side):
    centre.add(world.order("a", content))
    await running(roots=(str(world.directory / pinned),))
    await centre.wait_for(1)
    (outcome,) = centre.outcomes
    assert (outcome.error, outcome.side) == ("forbidden", side)
    assert not (world.directory / "TARGET/a").exists()


async def test_a_symbolic_link_does_not_lead_out_of_the_roots_either(centre, world, running, tmp_path: Path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(world.directory / "TARGET")
    order = world.order("a", b"a")
    centre.add(msgspec.structs.replace(order, target_url=(inside / "link").as_uri()))
    await running(roots=(str(inside), str(world.directory / "SOURCE")))
    await centre.wait_for(1)
    assert (centre.outcomes[0].error, centre.outcomes[0].side) == ("forbidden", "target")


@pytest.mark.parametrize("url", ["file://host/x", "gopher://x", "file:///a/../b", "https://u:p@h/", ""])
async def test_a_url_that_cannot_be_used_fails_its_order_and_no_other(centre, world, running, url):
    centre.add(msgspec.structs.replace(world.order("bad", b"a"), target_url=url))
    centre.add(world.order("good", b"a"))
    await running()
    await centre.wait_for(2)
    outcomes = {centre.orders[o.transfer].target_path: o for o in centre.outcomes}
    assert (outcomes["bad"].outcome, outcomes["bad"].side) == ("failed", "target")
    assert outcomes["good"].outcome == "done"


# --- a server that is away, slow or gone ---


async def test_a_server_that_comes_later_is_found(centre, world, running):
    centre.trouble["*"] = "reset"
    centre.add(world.order("a", b"a"))
    await running()
    await until(lambda: centre.calls["claim"] >= 2)
    centre.trouble.clear()
    await centre.wait_for(1)


async def test_a_renewed_token_is_used_without_a_restart(centre, world, running):
    token = ["rpl_old"]
    centre.add(world.order("a", b"a"))
    await running(token=lambda: token[0])
    await until(lambda: centre.calls["claim"] >= 2)
    token[0] = centre.token
    await centre.wait_for(1)


@pytest.mark.parametrize("trouble", [503, "reset", 401])
async def test_an_outcome_is_told_until_the_server_has_heard_it(centre, world, running, trouble):
    centre.trouble["report"] = trouble
    centre.add(world.order("a", b"a"))
    await running()
    await until(lambda: centre.calls["report"] >= 3)
    assert centre.outcomes == []
    centre.trouble.clear()
    await centre.wait_for(1)


async def test_a_report_whose_answer_was_lost_is_repeated_and_counts_once(centre, world, running):
    centre.lose_answer.add("report")
    centre.add(world.order("a", b"a"))
    await running()
    await until(lambda: len(centre.reports) >= 2)
    centre.lose_answer.clear()
    reports = len(centre.reports)
    await until(lambda: len(centre.reports) > reports)
    assert [o.outcome for o in centre.outcomes] == ["done"]


async def test_one_outcome_that_the_server_refuses_does_not_hold_up_the_others(centre, world, running):
    (world.directory / "TARGET" / ".replica").rename(world.directory / "TARGET/away")
    await world.endpoint("OTHER")
    orders = [world.order(f"f{i}", b"x", target="OTHER") for i in range(9)]
    orders.insert(4, msgspec.structs.replace(world.order("refuse me", b"x"), target_endpoint="refuse me"))
    for order in orders:
        centre.add(order)
    mover = await running()
    await centre.wait_for(9)
    assert {o.outcome for o in centre.outcomes} == {"done"}
    await until(lambda: not mover._held)


async def test_claims_whose_answers_were_lost_harm_nobody(centre, world, running):
    centre.lease_seconds = 1.0
    centre.lose_answer.add("claim")
    centre.add(world.order("a", b"a"))
    mover = await running(poll_seconds=0.2)
    await until(lambda: centre.leases)
    centre.lose_answer.clear()
    await until(lambda: centre.requeue_lost() == 1)
    mover.wake()
    await centre.wait_for(1)
    assert centre.outcomes[0].epoch == 2


# --- leases ---


async def test_heartbeats_keep_the_lease_and_tell_the_progress(centre, world, running):
    centre.lease_seconds = 0.9
    order = world.order("a", os.urandom(12 << 20))
    centre.add(order)
    with slow_pieces(0.2):
        await running()
        await centre.wait_for(1, 20)
    assert centre.outcomes[0].outcome == "done"
    assert centre.outcomes[0].epoch == 1
    told = [beat.bytes_done for beat in centre.beats]
    assert len(told) >= 3
    assert told == sorted(told)
    assert 0 < told[-1] <= order.size


async def test_a_worker_that_hears_nothing_stops_before_its_lease_ends_and_publishes_nothing(centre, world, running):
    centre.lease_seconds = 1.0
    centre.trouble["heartbeat"] = "hang"
    centre.add(world.order("a", os.urandom(12 << 20)))
    with slow_pieces(0.3):
        mover = await running()
        began = time.monotonic()
        await until(lambda: mover.lost == 1)
        assert time.monotonic() - began < 1.5
        assert not (world.directory / "TARGET/a").exists()
        await until(lambda: not parts(world))
    assert centre.outcomes == []
    centre.trouble.clear()
    await until(lambda: centre.requeue_lost() == 1)
    mover.wake()
    await centre.wait_for(1)
    assert (centre.outcomes[0].outcome, centre.outcomes[0].epoch) == ("done", 2)


@pytest.mark.parametrize("content", [b"small", LARGE], ids=["small", "large"])
async def test_a_worker_frozen_until_its_lease_is_over_cannot_publish(centre, world, running, content):
    """The fence is asked in the last moment: even a copy that never looked at its stop flag publishes nothing."""
    centre.lease_seconds = 0.5
    centre.trouble["heartbeat"] = "hang"
    centre.add(world.order("a", content))
    frozen = threading.Event()

    def freeze(point: str, piece: memoryview | None) -> bytes | None:
        if point == "after_verify":
            frozen.set()
            time.sleep(0.8)
        return None

    with faultpoints.handling(freeze):
        mover = await running()
        await until(frozen.is_set)
        await until(lambda: mover.lost == 1)
    assert not (world.directory / "TARGET/a").exists()
    assert parts(world) == []
    assert centre.outcomes == []


async def test_a_cancelled_order_stops_at_once(centre, world, running):
    centre.lease_seconds = 0.6
    order = world.order("a", os.urandom(24 << 20))
    centre.add(order)
    with slow_pieces(0.1):
        mover = await running()
        await until(lambda: centre.beats)
        centre.stop.add(order.transfer)
        await until(lambda: mover.lost == 1)
    assert not (world.directory / "TARGET/a").exists()
    assert parts(world) == []
    assert centre.outcomes == []


async def test_orders_that_wait_keep_their_lease_too(centre, world, running):
    centre.lease_seconds = 0.6
    for i in range(4):
        centre.add(world.order(f"a{i}", LARGE))
    with slow_pieces(0.1):
        await running(concurrency=1)
        await centre.wait_for(4, 20)
    assert {(o.outcome, o.epoch) for o in centre.outcomes} == {("done", 1)}


async def test_a_large_file_goes_on_where_another_worker_ended(centre, world, running, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(chunks, "RESUME_BYTES", 4 << 20)
    content = os.urandom((16 << 20) + 5)
    order = world.order("large.h5", content)
    centre.add(order)
    moved: list[int] = []
    noted = threading.Semaphore(0)

    def count(point: str, piece: memoryview | None) -> None:
        if piece is not None:
            moved.append(len(piece))
        if point == "chunk":
            noted.release()
            if len(moved) == 8:
                time.sleep(1)

    with faultpoints.handling(count):
        first = await running(finish_seconds=0.0)
        await until(lambda: len(moved) == 8)
        first.stop()
        await first.task
        assert [o.outcome for o in centre.outcomes] == ["given_back"]
        assert len(parts(world)) == 2
        centre.add(msgspec.structs.replace(order, epoch=1))
        await running()
        await centre.wait_for(2)
    assert centre.outcomes[-1].outcome == "done"
    assert centre.outcomes[-1].source_endpoint == "SOURCE"
    assert (world.directory / "TARGET/large.h5").read_bytes() == content
    assert sum(moved) <= len(content) + (1 << 20)
    assert parts(world) == []


async def test_a_large_file_goes_on_with_the_next_source(centre, world, running, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(chunks, "RESUME_BYTES", 4 << 20)
    content = os.urandom((8 << 20) + 5)
    order = world.order("large.h5", content, sources=("SOURCE", "SECOND"))
    (world.directory / "SOURCE/large.h5").write_bytes(content[:-9] + b"damaged!!")
    centre.add(order)
    await running()
    await centre.wait_for(1)
    (outcome,) = centre.outcomes
    assert outcome.outcome == "done"
    assert (world.directory / "TARGET/large.h5").read_bytes() == content
    assert parts(world) == []


# --- the end ---


async def test_a_stop_gives_back_what_has_not_begun_and_what_is_large(centre, world, running):
    for i in range(6):
        centre.add(world.order(f"large{i}", os.urandom(16 << 20)))
    with slow_pieces(0.2):
        mover = await running(concurrency=2)
        await until(lambda: mover._running == 2)
        began = time.monotonic()
        mover.stop()
        await mover.task
        assert time.monotonic() - began < 3
    assert {o.outcome for o in centre.outcomes} == {"given_back"}
    assert centre.leases == {}
    assert parts(world) == []


async def test_a_stop_lets_small_files_finish(centre, world, running):
    for i in range(50):
        centre.add(world.order(f"a{i}", b"a"))
    with slow_pieces(0.01):
        mover = await running(concurrency=1, stop_seconds=10.0, finish_seconds=5.0)
        await until(lambda: mover._running == 1)
        mover.stop()
        await mover.task
    assert len(centre.outcomes) == 50
    assert centre.leases == {}
    assert "done" in {o.outcome for o in centre.outcomes}
    assert parts(world) == []


async def test_a_stop_does_not_wait_for_a_server_that_is_gone(centre, world, running):
    centre.trouble["report"] = "hang"
    centre.add(world.order("a", b"a"))
    mover = await running(stop_seconds=0.5)
    await until(lambda: centre.calls["report"] == 1)
    began = time.monotonic()
    mover.stop()
    await mover.task
    assert time.monotonic() - began < 1.5


async def test_a_stop_before_the_start_ends_it_at_once(centre):
    mover = mover_module.Mover(centre.url, lambda: centre.token)
    mover.stop()
    await asyncio.wait_for(mover.run(), 3)
    mover.wake()


async def test_an_idle_mover_does_nothing(centre, running):
    await running()
    await until(lambda: centre.calls["claim"] == 1)
    before = time.process_time()
    await asyncio.sleep(1.0)
    assert time.process_time() - before < 0.05
    assert centre.calls == {"claim": 1, "deletions.claim": 1, "scans.claim": 1, "checks.claim": 1}


def test_a_mover_in_a_thread_begins_anew_after_what_should_never_happen():
    class Odd(mover_module.Mover):
        lives = 0

        async def run(self) -> None:
            self.lives += 1
            if self.lives == 1:
                raise AssertionError("never happens")

    mover = Odd("http://127.0.0.1:1", lambda: None)
    thread = mover_module.MoverThread(mover)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert mover.lives == 2


async def test_what_was_held_when_a_mover_broke_is_given_to_somebody(centre, world, monkeypatch):
    """Begun anew, it has no outcome for it: it must not keep the lease for ever."""

    async def broken(self: object, job: object) -> None:
        monkeypatch.undo()
        raise RuntimeError("never happens")

    centre.lease_seconds = 0.5
    centre.add(world.order("a", b"small"))
    monkeypatch.setattr(carrying.Carrier, "carry", broken)
    mover = mover_module.Mover(centre.url, lambda: centre.token, poll_seconds=1000.0, stop_seconds=3.0)
    with pytest.raises(RuntimeError):
        await mover.run()
    again = asyncio.create_task(mover.run())
    await until(lambda: centre.requeue_lost() == 1)
    mover.wake()
    await centre.wait_for(1)
    assert (centre.outcomes[0].outcome, centre.outcomes[0].epoch) == ("done", 2)
    mover.stop()
    await again
