"""A suspended rule protects and covers; only its transfers wait, and nothing is a trap."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from replica import wire
from replica.catalog import rule_updates, rules
from replica.db import tables
from replica.db.engine import Database
from tests.conftest import HandClock, Statements
from tests.replica.catalog.world import ROOT, World, done, failed

COUNT = Callable[[Database], AbstractContextManager[Statements]]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    world = World(db)
    world.three()
    return world


def dataset_of(world: World, files: int, name: str = "d") -> str:
    dataset = world.collection(name)
    world.files(files, "DESY-DISK", dataset)
    return dataset


def suspend(world: World, rule: wire.Rule, comment: str = "") -> wire.Rule:
    with world.db.write() as s:
        return rules.suspend(s, ROOT, rule.id, wire.Verdict(comment=comment))


def resume(world: World, rule: wire.Rule) -> wire.Rule:
    with world.db.write() as s:
        return rules.resume(s, ROOT, rule.id)


def states(world: World) -> dict[str, int]:
    found: dict[str, int] = {}
    for transfer in world.transfers():
        found[transfer.state] = found.get(transfer.state, 0) + 1
    return found


def test_queued_transfers_wait_claimed_ones_finish_and_new_files_are_covered(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world, 4)
    rule = world.rule(dataset, "GSI-DISK")
    orders = world.claim("GSI", limit=2).orders
    shown = suspend(world, rule, "the network is being repaired")
    assert shown.state == "suspended" and shown.reasons[0].code == "suspended"
    assert "the network is being repaired" in shown.reasons[0].message and "resume" in shown.reasons[0].hint
    assert states(world) == {"claimed": 2, "waiting": 2}
    new = world.files(3, "DESY-DISK", dataset)
    assert states(world) == {"claimed": 2, "waiting": 5}
    assert world.show(rule).files_total == 7, "what is attached is covered at once"
    assert suspend(world, rule).version == shown.version, "once more changes nothing"
    assert world.claim("GSI").orders == []
    world.report("GSI", [done(orders[0]), failed(orders[1], "timed_out")])
    assert states(world) == {"done": 1, "waiting": 6}, "what is to be tried again waits, too"
    clock.turn(hours=2)
    world.evaluate()
    assert world.show(rule).state == "suspended" and states(world) == {"done": 1, "waiting": 6}
    waiting = world.explain(rule).waiting
    assert [(w.what, w.files, w.endpoint) for w in waiting] == [("suspended", 6, "GSI-DISK")]
    assert "replica rule resume" in waiting[0].hint
    world.check()
    assert resume(world, rule).state == "replicating" and world.show(rule).reasons == []
    assert world.move() == 6 and world.show(rule).state == "ok"
    assert new
    world.check()


def test_a_rule_that_became_complete_while_it_was_suspended_is_ok_when_it_goes_on(world: World) -> None:
    rule = world.rule(dataset_of(world, 2), "GSI-DISK")
    orders = world.claim("GSI").orders
    suspend(world, rule)
    world.report("GSI", [done(order) for order in orders])
    assert (world.show(rule).state, world.show(rule).locks_ok) == ("suspended", 2)
    assert resume(world, rule).state == "ok"
    with world.db.read() as s:
        told = [e.kind for e in rules.history_page(s, rule.id).items]
    assert told == ["rule.added", "rule.suspended", "rule.resumed", "rule.ok"]
    world.check()


def test_what_another_rule_wants_goes_on_and_waits_once_that_is_gone(world: World) -> None:
    dataset = dataset_of(world, 3)
    paused = world.rule(dataset, "GSI-DISK")
    suspend(world, paused)
    assert states(world) == {"waiting": 3}
    other = world.rule(dataset, "GSI-DISK", priority=5)
    assert states(world) == {"queued": 3} and {t.priority for t in world.transfers()} == {5}
    world.delete(other)
    assert states(world) == {"waiting": 3}
    second = world.rule(dataset, "GSI-DISK|HZDR-DISK", copies=2)
    assert states(world) == {"queued": 6}
    suspend(world, second)
    assert states(world) == {"waiting": 6}, "both are suspended"
    resume(world, paused)
    assert states(world) == {"queued": 3, "waiting": 3}, "one of them is not any more"
    world.check()


def test_a_suspended_rule_that_ends_leaves_nothing_waiting(world: World) -> None:
    rule = world.rule(dataset_of(world, 3), "GSI-DISK")
    suspend(world, rule)
    world.delete(rule)
    assert states(world) == {"cancelled": 3} and world.used("GSI-DISK") == 0
    world.check()


def test_many_units_attached_to_a_suspended_rule_are_placed_slice_by_slice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.catalog.locks.SLICE_UNITS", 4)
    dataset = dataset_of(world, 1)
    rule = world.rule(dataset, "GSI-DISK|HZDR-DISK", grouping="none")
    suspend(world, rule)
    box = world.collection("box", "container")
    boxed = world.rule(box, "HZDR-DISK", grouping="none")
    suspend(world, boxed)
    world.attach(box, dataset_of(world, 11, "more"))
    world.evaluate()
    assert world.count(tables.locks, tables.locks.c.rule_id == boxed.id) == 11, "protected, though it is suspended"
    assert world.claim("HZDR").orders == world.claim("GSI").orders == []
    resume(world, boxed)
    world.move()
    assert world.show(boxed).state == "ok"
    world.check()


def test_pausing_and_going_on_cost_the_same_statements_for_10_and_for_2000_files(
    world: World, count_statements: COUNT
) -> None:
    counts = []
    for size in (10, 2_000):
        rule = world.rule(dataset_of(world, size, f"d{size}"), "GSI-DISK")
        with count_statements(world.db) as statements:
            suspend(world, rule)
            resume(world, rule)
        counts.append(statements.count)
    assert counts[1] <= counts[0] <= 70


def test_of_many_files_a_slice_follows_at_once_and_the_rest_by_and_by(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.catalog.rule_transfers.SLICE_FILES", 6)
    box = world.collection("box", "container")
    for name, size in (("small", 2), ("large", 15), ("other", 3), ("last", 4)):
        world.attach(box, dataset_of(world, size, name))
    rule = world.rule(box, "GSI-DISK|HZDR-DISK", copies=2)
    shared = world.rule("t:other", "GSI-DISK")
    assert world.claim("GSI", limit=1).orders
    suspend(world, rule)
    assert states(world) == {"claimed": 1, "queued": 44, "waiting": 3}, "of the first dataset"
    world.check()
    world.evaluate()
    assert states(world) == {"claimed": 1, "queued": 3, "waiting": 44}, "but what another rule wants, too"
    world.delete(shared)
    world.evaluate()
    assert states(world) == {"claimed": 1, "waiting": 47}
    resume(world, rule)
    suspend(world, rule)
    resume(world, rule)
    assert states(world) == {"claimed": 1, "queued": 3, "waiting": 44}, "whatever was decided in between"
    with world.db.write() as s:
        rule_updates.update(s, ROOT, rule.id, wire.RuleChange(priority=5, activity="in a hurry"))
    world.evaluate()
    assert states(world) == {"claimed": 1, "queued": 47}
    assert {(t.priority, t.activity) for t in world.transfers() if t.state == "queued"} == {(5, "in a hurry")}
    world.check()


def test_single_files_follow_slice_by_slice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replica.catalog.rule_transfers.SLICE_FILES", 5)
    rule = world.rule(dataset_of(world, 13), "GSI-DISK|HZDR-DISK", copies=2, grouping="none")
    suspend(world, rule)
    assert states(world) == {"queued": 22, "waiting": 4}
    with world.db.write() as s:
        assert rules.evaluate_due(s) == 5, "one slice in one transaction"
    assert states(world)["waiting"] == 8
    world.evaluate()
    assert states(world) == {"waiting": 26}
    resume(world, rule)
    world.evaluate()
    assert world.move() == 26 and world.show(rule).state == "ok"
    world.check()
