"""A rule that held much ends at once, and what it alone protected is released in slices."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from replica.catalog import releasing, rules
from replica.db import tables
from replica.db.engine import Database
from replica.db.tables import EPOCH
from rules.states import ReplicaState
from tests.conftest import HandClock
from tests.replica.catalog.world import World

SLICE = 10


@pytest.fixture
def world(db: Database, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(releasing, "SLICE_FILES", SLICE)
    world = World(db)
    world.three()
    return world


def at_rest(world: World, files: int, name: str, where: str = "HZDR-DISK") -> str:
    dataset = world.collection(name)
    world.files(files, where, dataset)
    return dataset


def released(world: World, endpoint: str = "HZDR-DISK") -> int:
    r, e = tables.replicas, tables.endpoints
    there = r.c.endpoint_id.in_(sa.select(e.c.id).where(e.c.name == endpoint))
    return world.count(r, r.c.tombstone_at.is_not(None), there)


def test_a_large_rule_ends_at_once_and_lets_go_slice_by_slice(world: World) -> None:
    rule = world.rule(at_rest(world, 35, "d"), "HZDR-DISK")
    world.delete(rule)
    assert world.show(rule).state == "expired"
    assert released(world) == 0
    seen = []
    while world.evaluate_once(limit_files=SLICE):
        seen.append(released(world))
        world.check()
    assert seen[:4] == [10, 20, 30, 35]
    assert world.count(tables.locks) == 0


def test_copies_on_their_way_vanish_with_their_slice_and_give_back_their_space(world: World) -> None:
    rule = world.rule(at_rest(world, 35, "d", "DESY-DISK"), "HZDR-DISK")
    world.evaluate()
    held = world.claim("HZDR", 3).orders
    world.delete(rule)
    for _ in range(2):
        world.evaluate_once(limit_files=SLICE)
        world.check()
    assert world.used("HZDR-DISK") > 0
    world.evaluate(limit_files=SLICE)
    world.check()
    cancelled = world.count(tables.replicas, tables.replicas.c.state == ReplicaState.COPYING)
    assert cancelled == len(held), "a worker is at these: they go when it has stopped"


def test_what_another_rule_locks_as_a_whole_costs_nothing_to_let_go(world: World) -> None:
    dataset = at_rest(world, 35, "d")
    kept, ended = world.rule(dataset, "HZDR-DISK"), world.rule(dataset, "HZDR-DISK", priority=2)
    world.delete(ended)
    assert world.evaluate() == 0, "there is nothing left to do"
    world.check()
    assert world.count(tables.locks) == 1
    world.delete(kept)
    world.evaluate(limit_files=SLICE)
    assert released(world) == 35


def test_two_large_rules_that_end_together_leave_nothing_protected(world: World) -> None:
    dataset = at_rest(world, 35, "d")
    one, two = world.rule(dataset, "HZDR-DISK"), world.rule(dataset, "HZDR-DISK", priority=2)
    other = world.collection("other")
    world.attach(other, *world.contents(dataset)[:20])
    three = world.rule(other, "HZDR-DISK")
    world.delete(one)
    world.delete(two)
    world.evaluate_once(limit_files=SLICE)
    world.delete(three)
    for _ in range(20):
        world.evaluate_once(limit_files=SLICE)
        world.check()
    assert released(world) == 35
    assert world.count(tables.locks) == 0


def test_what_comes_under_another_lock_between_two_slices_is_kept(world: World) -> None:
    dataset = at_rest(world, 35, "d")
    world.delete(world.rule(dataset, "HZDR-DISK"))
    world.evaluate_once(limit_files=SLICE)
    other = world.collection("other")
    world.attach(other, *world.contents(dataset)[-5:])
    world.rule(other, "HZDR-DISK")
    world.evaluate(limit_files=SLICE)
    world.check()
    assert released(world) == 30


def test_letting_go_takes_as_many_statements_for_many_files_as_for_few(world: World, count_statements: Any) -> None:
    needed = []
    for count in (2, SLICE):
        at_rest_, coming = at_rest(world, count, f"d{count}"), at_rest(world, count, f"e{count}", "DESY-DISK")
        for dataset in (at_rest_, coming):
            rule = world.rule(dataset, "HZDR-DISK")
            world.evaluate()
            with count_statements(world.db) as ending:
                world.delete(rule)
            needed.append(ending.count)
    assert needed[:2] == needed[2:]
    if world.db.engine.dialect.name == "postgresql":
        assert needed[0] <= 22, "nothing is stopped where everything is there"
        assert needed[1] <= 28


def test_files_that_leave_and_join_meanwhile_are_released_as_well(world: World) -> None:
    dataset = at_rest(world, 35, "d")
    rule = world.rule(dataset, "HZDR-DISK")
    files = world.contents(dataset)
    world.delete(rule)
    world.evaluate_once(limit_files=SLICE)
    world.detach(dataset, files[2], files[30])
    (late,) = world.files(1, "DESY-DISK")
    world.attach(dataset, late)
    world.check()
    assert not world.transfers(), "a rule that has ended orders nothing"
    world.evaluate(limit_files=SLICE)
    world.check()
    assert released(world) == 35
    with world.look() as s:
        assert not s.execute(sa.select(sa.func.sum(tables.usage.c.files))).scalar_one()


def test_a_rule_on_single_files_is_let_go_lock_by_lock(world: World) -> None:
    rule = world.rule(at_rest(world, 35, "d"), "HZDR-DISK", grouping="none")
    world.delete(rule)
    world.evaluate_once(limit_files=SLICE)
    assert world.count(tables.locks) == 25
    world.evaluate(limit_files=SLICE)
    world.check()
    assert released(world) == 35


def test_the_copies_of_a_purging_rule_go_at_once_in_every_slice(world: World) -> None:
    world.delete(world.rule(at_rest(world, 35, "d"), "HZDR-DISK", purge=True))
    world.evaluate(limit_files=SLICE)
    assert world.count(tables.replicas, tables.replicas.c.tombstone_at == EPOCH) == 35


def test_what_ends_by_its_lifetime_is_let_go_in_the_same_way(world: World, clock: HandClock) -> None:
    world.rule(at_rest(world, 35, "d"), "HZDR-DISK", lifetime_seconds=60)
    clock.now += timedelta(seconds=61)
    with world.db.write() as s:
        assert rules.expire_due(s) == 1
    world.evaluate(limit_files=SLICE)
    world.check()
    assert released(world) == 35
