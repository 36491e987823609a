"""A plan changes nothing, and what it says is what then happens: to the file, the byte and the endpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import locks, plans, quotas, rule_updates, rules
from replica.db import tables
from replica.db.engine import Database
from replica.db.tables import EPOCH
from rules.states import ReplicaState
from tests.conftest import HandClock, Statements
from tests.replica.catalog.world import ROOT, World
from tests.scenarios.plans_at_scale import Story

COUNT = Callable[[Database], AbstractContextManager[Statements]]
Totals = dict[str, tuple[int, int, int]]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    return World(db)


def everything(world: World) -> list[list[tuple[object, ...]]]:
    """Every row of every table."""
    with world.db.read() as s:
        return [sorted(map(tuple, s.execute(sa.select(t))), key=repr) for t in tables.metadata.sorted_tables]


def planned(world: World, **wish: object) -> wire.RulePlan:
    before = everything(world)
    with world.db.read() as s:
        plan = plans.plan(s, ROOT, wire.NewRule(**wish))
    assert everything(world) == before, "a plan changes nothing"
    return plan


def made(world: World, rule: wire.Rule) -> tuple[Totals, Totals]:
    """Endpoint → copies, files, bytes of the rule's locks; and of the transfers it asked for, counted once."""
    locks, moved = tables.locks, tables.transfers
    name = tables.endpoints.c.name
    with world.db.read() as s:
        all_ = sa.select(name, sa.func.count(), sa.func.sum(locks.c.files_total), sa.func.sum(locks.c.bytes_total))
        all_ = all_.join(tables.endpoints, tables.endpoints.c.id == locks.c.endpoint_id).group_by(name)
        new = sa.select(name, sa.func.count(), sa.func.count(), sa.func.sum(moved.c.size_bytes))
        new = new.join(tables.endpoints, tables.endpoints.c.id == moved.c.target_id).group_by(name)
        rows = s.execute(all_.where(locks.c.rule_id == rule.id)).all()
        queued = s.execute(new.where(moved.c.rule_id == rule.id)).all()
    return {r[0]: (r[1], int(r[2]), int(r[3])) for r in rows}, {r[0]: (0, r[2], int(r[3])) for r in queued}


def assert_comes_true(world: World, plan: wire.RulePlan, rule: wire.Rule) -> None:
    world.evaluate()
    locks, moved = made(world, rule)
    assert {t.endpoint: (t.units, t.files, t.bytes) for t in plan.totals} == locks
    assert {t.endpoint: (0, t.new_files, t.new_bytes) for t in plan.totals if t.new_files} == moved
    assert world.show(rule).state != "expired"
    with world.db.read() as s:
        missing = s.execute(sa.select(tables.rules.c.copies_missing).where(tables.rules.c.id == rule.id)).scalar_one()
    assert plan.copies_missing == missing
    world.check()


@pytest.mark.parametrize("grouping", ["dataset", "all", "none"])
def test_adding_does_what_the_plan_said(world: World, grouping: str) -> None:
    for name, capacity in (("DESY-DISK", None), ("HZDR-DISK", 30_000), ("GSI-DISK", 40_000), ("KIT-DISK", 25_000)):
        world.endpoint(name, capacity=capacity)
    box = world.collection("box", "container")
    for i in range(5):
        dataset = world.collection(f"d{i}")
        names = world.files(6, "DESY-DISK", dataset)
        world.attach(box, dataset)
        if i == 0:
            world.register(names[:3], "HZDR-DISK")
        if i == 1:
            world.rule(dataset, "GSI-DISK")
    wish = {"did": box, "expression": "HZDR-DISK|GSI-DISK|KIT-DISK", "copies": 2, "grouping": grouping}
    plan = planned(world, **wish)
    assert plan.totals and plan.exists is None
    rule = world.rule(**wish)
    assert_comes_true(world, plan, rule)
    assert planned(world, **wish).exists == rule.id


def test_the_plan_counts_all_slices_and_the_space_and_quota_each_leaves(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.catalog.locks.SLICE_UNITS", 20)
    world.endpoint("DESY-DISK")
    world.endpoint("HZDR-DISK", capacity=40_000)
    world.endpoint("GSI-DISK", capacity=20_000)
    world.endpoint("KIT-DISK")
    with world.db.write() as s:
        quotas.put(s, ROOT, wire.NewQuota(account="root", expression="KIT-DISK", limit_bytes=15_000))
    dataset = world.collection("d")
    world.files(90, "DESY-DISK", dataset)
    wish = {"did": dataset, "expression": "HZDR-DISK|GSI-DISK|KIT-DISK", "copies": 1, "grouping": "none"}
    plan = planned(world, **wish)
    assert plan.units == 90 and plan.copies_missing > 0 and len(plan.totals) == 3
    assert_comes_true(world, plan, world.rule(**wish))


def deleted(world: World, rule: wire.Rule, plan: wire.RuleDeletePlan) -> None:
    """What loses its protection is what the plan said."""
    replicas, files, name = tables.replicas, tables.files, tables.endpoints.c.name
    with world.db.write() as s:
        rules.delete(s, rule.id, ROOT)
    with world.db.read() as s:
        query = (
            sa.select(name, sa.func.count(), sa.func.sum(files.c.size_bytes))
            .select_from(replicas)
            .join(tables.endpoints, tables.endpoints.c.id == replicas.c.endpoint_id)
            .join(files, files.c.did_id == replicas.c.file_id)
            .where(
                replicas.c.tombstone_at == (sa.literal(EPOCH if plan.purge else s.now, replicas.c.tombstone_at.type)),
                replicas.c.state == ReplicaState.AVAILABLE,
            )
            .group_by(name)
        )
        found = {row[0]: (row[1], int(row[2])) for row in s.execute(query)}
        stopped = s.execute(
            sa.select(sa.func.count())
            .select_from(tables.transfers)
            .where(tables.transfers.c.reason_code == "not_wanted", tables.transfers.c.finished_at == s.now)
        ).scalar_one()
    assert {p.endpoint: (p.files, p.bytes) for p in plan.endpoints if p.files} == found
    assert (plan.files, plan.bytes) == (sum(n for n, _ in found.values()), sum(b for _, b in found.values()))
    assert plan.stopped == stopped
    world.check()


def plan_delete(world: World, rule: wire.Rule) -> wire.RuleDeletePlan:
    before = everything(world)
    with world.db.read() as s:
        plan = plans.plan_delete(s, rule.id)
    assert everything(world) == before
    return plan


def test_deleting_does_what_the_plan_said(world: World, clock: HandClock) -> None:
    world.three()
    world.endpoint("KIT-DISK")
    dataset, other = world.collection("d"), world.collection("other")
    names = world.files(10, "DESY-DISK", dataset)
    world.register(names[:4], "HZDR-DISK")
    world.attach(other, *names[:2])
    kept = world.rule(other, "DESY-DISK|HZDR-DISK", copies=2)
    rule = world.rule(dataset, "DESY-DISK|HZDR-DISK|GSI-DISK", copies=3)
    plan = plan_delete(world, rule)
    assert {p.endpoint: (p.files, p.last_copies, p.stopped) for p in plan.endpoints} == {
        "DESY-DISK": (8, 8, 0),
        "HZDR-DISK": (2, 2, 6),
        "GSI-DISK": (0, 0, 10),
    }, "with both of their copies going, both are the last ones; what the other rule keeps is not touched"
    clock.turn(seconds=1)
    deleted(world, rule, plan)
    assert plan_delete(world, rule).files == 0, "it has ended"
    with world.db.write() as s:
        rule_updates.update(s, ROOT, kept.id, wire.RuleChange(purge=True, locked=True))
    plan = plan_delete(world, kept)
    assert plan.purge and "locked" in plan.refused and plan.last_copies == 4
    with world.db.write() as s:
        rule_updates.update(s, ROOT, kept.id, wire.RuleChange(locked=False))
    clock.turn(seconds=1)
    deleted(world, kept, plan)


def test_a_copy_that_nobody_locked_elsewhere_is_not_the_last(world: World) -> None:
    world.three()
    dataset = world.collection("d")
    names = world.files(3, "DESY-DISK", dataset)
    world.register(names[:1], "GSI-DISK")
    plan = plan_delete(world, world.rule(dataset, "DESY-DISK"))
    assert (plan.files, plan.last_copies) == (3, 2)


def test_a_plan_to_delete_costs_the_same_statements_for_10_and_for_5000_files(
    world: World, count_statements: COUNT
) -> None:
    world.three()
    counts = []
    for size in (10, 5_000):
        dataset = world.collection(f"d{size}")
        world.files(size, "DESY-DISK", dataset)
        rule = world.rule(dataset, "DESY-DISK")
        with count_statements(world.db) as statements, world.db.read() as s:
            assert plans.plan_delete(s, rule.id).files == size
        counts.append(statements.count)
    assert counts[0] == counts[1] <= 6


def test_what_every_act_does_is_what_its_plan_said_whatever_the_slices(
    db: Database, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, size in (("locks.SLICE_UNITS", 4), ("locks.SLICE_FILES", 40), ("rule_changes.SLICE_FILES", 40)):
        monkeypatch.setattr(f"replica.catalog.{name}", size)
    story = Story(db, 80)
    for each in story.tell():
        assert each.differences == [], each.name
    story.world.check()


def test_what_is_refused_is_not_tried_again_before_all_that_was_chosen_is_made(
    world: World, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two datasets share most of their files: reserved for both they leave no room for the third, made they do.
    world.three()
    world.endpoint("FULL-DISK", capacity=26)
    box = world.collection("box", "container")
    first, second, third, fourth = datasets = [world.collection(name) for name in "abcd"]
    world.attach(box, *datasets)
    world.files(1, "DESY-DISK", first, size=1)
    both = world.files(9, "DESY-DISK", first, size=1)
    world.files(1, "DESY-DISK", second, size=1)
    world.attach(second, *both)
    world.files(10, "DESY-DISK", third, size=1)
    world.files(5, "DESY-DISK", fourth, size=1)
    plan = planned(world, did=box, expression="FULL-DISK")
    assert (plan.totals[0].files, plan.copies_missing) == (16, 1)
    monkeypatch.setattr(locks.place_units, "__kwdefaults__", {"among": None, "limit_files": 4})
    rule = world.rule(box, "FULL-DISK")

    def missing() -> int:
        world.evaluate(limit_files=4)
        with world.db.read() as s:
            found: int = rules.look(s, rule.id).copies_missing
        return found

    assert missing() == 1, "what the plan said"
    clock.turn(seconds=3_600)
    assert missing() == 0, "there is room for it, after all"
    world.check()
