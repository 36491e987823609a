"""A rule wishes something else: the difference is applied in place, and protection never falls while it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import locks, plans, rule_changes
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Invalid, InvalidExpression, NotFound, Refused
from rules.states import Grouping
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, World, done

COUNT = Callable[[Database], AbstractContextManager[Any]]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def change(world: World, rule: wire.Rule, **wish: Any) -> wire.Rule:
    with world.db.write() as s:
        rule_changes.change_wish(s, rule.id, **wish)
    world.check()
    return world.show(rule)


def plan(world: World, rule: wire.Rule, **wish: Any) -> wire.WishPlan:
    with world.db.read() as s:
        return plans.plan_wish(s, rule.id, **wish)


def copies(world: World, rule: wire.Rule, *, surplus: bool = False) -> dict[str, int]:
    """Endpoint → wished (or given-up) copies of units there."""
    query = (
        sa.select(tables.endpoints.c.name, sa.func.count())
        .join_from(tables.locks, tables.endpoints)
        .where(tables.locks.c.rule_id == rule.id, tables.locks.c.surplus == surplus)
        .group_by(tables.endpoints.c.name)
    )
    with world.look() as s:
        return dict(map(tuple, s.execute(query)))  # type: ignore[arg-type]


def covered(world: World, rule: wire.Rule) -> set[tuple[int, str]]:
    """Unit and endpoint of every copy that is complete and protected."""
    query = (
        sa.select(tables.locks.c.unit_id, tables.endpoints.c.name)
        .join_from(tables.locks, tables.endpoints)
        .where(tables.locks.c.rule_id == rule.id, tables.locks.c.files_available == tables.locks.c.files_total)
    )
    with world.look() as s:
        return set(map(tuple, s.execute(query)))  # type: ignore[arg-type]


def finish(world: World, rule: wire.Rule) -> wire.Rule:
    """All that is queued arrives, and what was due is looked at."""
    world.evaluate()
    world.move()
    world.evaluate()
    world.check()
    return world.show(rule)


def tombstones(world: World) -> int:
    return world.count(tables.replicas, tables.replicas.c.tombstone_at.is_not(None))


def test_a_move_keeps_the_old_copies_until_the_new_ones_are_verified(world: World) -> None:
    dataset = world.collection("d")
    world.files(10, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    world.move()
    moved = change(world, rule, expression="GSI-DISK")
    assert (moved.id, moved.expression, moved.state) == (rule.id, "GSI-DISK", "replicating")
    assert (copies(world, rule), copies(world, rule, surplus=True)) == ({"GSI-DISK": 1}, {"HZDR-DISK": 1})
    assert (moved.locks_ok, moved.locks_replicating, moved.files_total) == (0, 10, 10), "what was given up is no copy"
    orders = world.claim("GSI", limit=9).orders
    world.report("GSI", [done(order) for order in orders])
    world.evaluate()
    assert tombstones(world) == 0, "9 of 10 are not all"
    assert finish(world, rule).state == "ok"
    assert copies(world, rule, surplus=True) == {}
    assert tombstones(world) == 10
    world.check()


def test_what_had_not_come_yet_is_not_ordered_any_more(world: World) -> None:
    dataset = world.collection("d")
    world.files(5, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    claimed = world.claim("HZDR", limit=2).orders
    change(world, rule, expression="GSI-DISK")
    assert copies(world, rule, surplus=True) == {}, "nothing was there"
    assert {t.state for t in world.transfers() if t.target == "HZDR-DISK"} == {"cancelled"}
    assert world.report("HZDR", [done(order) for order in claimed]).accepted == 0
    assert finish(world, rule).state == "ok"


def test_what_another_rule_wishes_as_well_goes_on(world: World) -> None:
    dataset = world.collection("d")
    world.files(5, "DESY-DISK", dataset)
    other, rule = world.rule(dataset, "HZDR-DISK"), world.rule(dataset, "HZDR-DISK|HZDR-DISK", comment="second")
    change(world, rule, expression="GSI-DISK")
    assert {t.state for t in world.transfers() if t.target == "HZDR-DISK"} == {"queued"}
    world.move()
    assert (world.show(other).state, finish(world, rule).state) == ("ok", "ok")


def test_half_of_a_copy_stays_and_its_other_half_is_not_ordered(world: World) -> None:
    dataset = world.collection("d")
    world.files(6, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    world.report("HZDR", [done(order) for order in world.claim("HZDR", limit=3).orders])
    world.claim("HZDR", limit=1)
    change(world, rule, expression="GSI-DISK")
    assert copies(world, rule, surplus=True) == {"HZDR-DISK": 1}
    back = change(world, rule, expression="HZDR-DISK|DESY-DISK", copies=2)
    assert copies(world, rule) == {"DESY-DISK": 1, "HZDR-DISK": 1}, "a copy that was given up is wished again"
    assert back.state == "replicating"
    assert finish(world, rule).state == "ok"
    assert copies(world, rule, surplus=True) == {}


def test_more_copies_are_placed_and_fewer_keep_what_is_there(world: World) -> None:
    dataset = world.collection("d")
    world.files(4, "DESY-DISK", dataset)
    rule = world.rule(dataset, "*")
    assert world.show(rule).state == "ok"
    assert change(world, rule, copies=3).locks_replicating == 8
    shown = change(world, rule, copies=1)
    assert (copies(world, rule), shown.state) == ({"DESY-DISK": 1}, "ok")
    assert world.transfers(state="queued") == []
    change(world, rule, copies=3)
    assert finish(world, rule).state == "ok"
    shown = change(world, rule, copies=2)
    assert (shown.state, sum(copies(world, rule).values())) == ("ok", 2)
    assert tombstones(world) == 0
    world.evaluate()
    assert tombstones(world) == 4
    world.check()


def test_a_new_spread_moves_what_shares_a_domain(world: World) -> None:
    world.endpoint("DESY-TAPE")
    dataset = world.collection("d")
    world.files(2, "DESY-DISK", dataset)
    rule = world.rule(dataset, "DESY-DISK|DESY-TAPE", copies=2)
    world.move()
    change(world, rule, expression="*", spread="site")
    assert copies(world, rule, surplus=True) == {"DESY-TAPE": 1}
    assert finish(world, rule).state == "ok"
    assert len({name.split("-")[0] for name in copies(world, rule)}) == 2


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(Grouping, 2)))
def test_every_grouping_becomes_every_other(world: World, before: Grouping, after: Grouping) -> None:
    container = world.collection("c", "container")
    for i in range(3):
        dataset = world.collection(f"d{i}")
        world.files(4, "DESY-DISK", dataset)
        world.attach(container, dataset)
    rule = world.rule(container, "HZDR-DISK|GSI-DISK", grouping=before.label)
    world.move()
    assert world.show(rule).state == "ok"
    there = world.count(tables.replicas)
    changed = change(world, rule, grouping=after)
    assert changed.grouping == after.label
    assert tombstones(world) == 0
    assert finish(world, rule).state == "ok"
    assert copies(world, rule, surplus=True) == {}
    units = {Grouping.NONE: 12}.get(after, 3)
    assert sum(copies(world, rule).values()) == units
    if after is Grouping.ALL:
        assert len(copies(world, rule)) == 1
    assert world.count(tables.replicas) - there < 12, "what fits stays where it is"


def test_protection_never_falls_while_a_rule_changes(world: World) -> None:
    container = world.collection("c", "container")
    for i in range(4):
        dataset = world.collection(f"d{i}")
        world.files(3, "DESY-DISK", dataset)
        world.attach(container, dataset)
    rule = world.rule(container, "DESY-DISK|HZDR-DISK", copies=2)
    finish(world, rule)
    before = covered(world, rule)
    assert len(before) == 8
    for wish in ({"expression": "GSI-DISK", "copies": 1}, {"grouping": Grouping.ALL}, {"grouping": Grouping.NONE}):
        change(world, rule, **wish)
        assert before <= covered(world, rule)
    assert finish(world, rule).state == "ok"
    assert {name for _, name in covered(world, rule)} == {"GSI-DISK"}
    assert tombstones(world) == 24


@pytest.mark.parametrize(
    "wish",
    [
        {"expression": "GSI-DISK"},
        {"copies": 2},
        {"copies": 2, "expression": "*"},
        {"grouping": Grouping.ALL},
        {"grouping": Grouping.NONE},
        {"expression": "SMALL-DISK"},
    ],
)
def test_the_plan_is_what_happens(world: World, wish: Mapping[str, Any]) -> None:
    world.endpoint("SMALL-DISK", capacity=5_000)
    container = world.collection("c", "container")
    for i in range(4):
        dataset = world.collection(f"d{i}")
        world.files(3, "DESY-DISK", dataset)
        world.attach(container, dataset)
    rule = world.rule(container, "HZDR-DISK|GSI-DISK")
    world.move("HZDR")
    rows = [(t, world.count(t)) for t in (tables.locks, tables.replicas, tables.transfers, tables.reasons)]
    had = {name: world.used(name) for name in ("DESY-DISK", "HZDR-DISK", "GSI-DISK", "SMALL-DISK")}
    foreseen = plan(world, rule, **wish)
    assert [(t, world.count(t)) for t, _ in rows] == rows, "a plan changes nothing"
    before, given_up = copies(world, rule), copies(world, rule, surplus=True)
    shown = change(world, rule, **wish)
    after = copies(world, rule)
    assert not given_up
    for name in had:
        share = {s.endpoint: s for s in foreseen.made}.get(name)
        gone = {s.endpoint: s for s in foreseen.given_up}.get(name)
        made = after.get(name, 0) - before.get(name, 0) + (gone.copies if gone else 0)
        assert made == (share.copies if share else 0), name
    queued = world.transfers(state="queued")
    with world.look() as s:
        missing = s.execute(sa.select(tables.rules.c.copies_missing)).scalar_one()
    assert missing == foreseen.missing_copies
    assert (shown.state == "stuck") == bool(foreseen.refusals)
    # Bytes: what is booked now, and was not or was given back.
    gained = sum(world.used(name) - had[name] for name in had)
    assert sum(s.bytes for s in foreseen.made) >= gained
    for share in foreseen.made:
        mine = [t for t in queued if t.target == share.endpoint]
        assert share.files <= len(mine)
    finish(world, rule)


def test_a_large_change_answers_at_once_and_is_worked_off_in_slices(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SLICE_UNITS", 20)
    dataset = world.collection("d")
    world.files(90, "DESY-DISK", dataset, size=1)
    rule = world.rule(dataset, "HZDR-DISK", grouping="none")
    world.evaluate()
    world.move()
    foreseen = plan(world, rule, expression="GSI-DISK")
    assert [(s.endpoint, s.copies, s.files, s.bytes) for s in foreseen.made] == [("GSI-DISK", 90, 90, 90)]
    assert [(s.endpoint, s.copies, s.files, s.bytes) for s in foreseen.given_up] == [("HZDR-DISK", 90, 90, 90)]
    shown = change(world, rule, expression="GSI-DISK")
    assert (shown.state, copies(world, rule, surplus=True)) == ("replicating", {"HZDR-DISK": 20})
    world.evaluate()
    world.check()
    assert (copies(world, rule), copies(world, rule, surplus=True)) == ({"GSI-DISK": 90}, {"HZDR-DISK": 90})
    late = world.files(1, "DESY-DISK")
    world.attach(dataset, *late)
    world.check()
    assert finish(world, rule).state == "ok"
    assert copies(world, rule) == {"GSI-DISK": 91}


def test_a_file_that_is_attached_while_a_copy_is_given_up_is_ordered_where_it_is_wished(world: World) -> None:
    dataset = world.collection("d")
    world.files(2, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    world.move()
    change(world, rule, expression="GSI-DISK")
    world.attach(dataset, *world.files(1, "DESY-DISK"))
    world.check()
    assert {t.target for t in world.transfers(state="queued")} == {"GSI-DISK"}
    world.detach(dataset, "t:f0000001")
    world.check()
    assert finish(world, rule).state == "ok"


def test_the_cost_does_not_grow_with_the_files(world: World, count_statements: COUNT) -> None:
    counts = []
    for size in (5, 500):
        dataset = world.collection(f"d{size}")
        world.files(size, "DESY-DISK", dataset)
        rule = world.rule(dataset, "HZDR-DISK")
        with count_statements(world.db) as statements, world.db.write() as s:
            rule_changes.change_wish(s, rule.id, expression="GSI-DISK")
        counts.append(statements.count)
    assert counts[0] == counts[1] <= 130


def test_what_cannot_be_is_refused_and_changes_nothing(world: World) -> None:
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    for wish, error in (
        ({"expression": "NOWHERE"}, InvalidExpression),
        ({"expression": "DESY-DISK&HZDR-DISK"}, Refused),
        ({"spread": "colour"}, Invalid),
        ({"weight": "colour"}, Invalid),
    ):
        with pytest.raises(error):
            change(world, rule, **wish)
        with pytest.raises(error):
            plan(world, rule, **wish)
    assert world.show(rule).expression == "HZDR-DISK"
    with world.db.write() as s:
        assert not rule_changes.change_wish(s, rule.id, expression="HZDR-DISK", copies=1)
    world.delete(rule)
    with pytest.raises(Refused):
        change(world, rule, copies=2)
    with pytest.raises(NotFound), world.db.write() as s:
        rule_changes.change_wish(s, 999, copies=2)


def test_what_is_given_up_before_it_came_leaves_its_space_to_the_new_wish(world: World) -> None:
    world.endpoint("SMALL-DISK", capacity=5 * MB)
    world.endpoint("SMALL-TAPE", "SMALL", capacity=5 * MB)
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset, size=4 * MB)
    rule = world.rule(dataset, "SMALL-DISK")
    assert plan(world, rule, grouping=Grouping.NONE).missing_copies == 0
    assert change(world, rule, grouping=Grouping.NONE).state == "replicating"
    assert world.used("SMALL-DISK") == 4 * MB
    assert finish(world, rule).state == "ok"


def test_what_is_detached_is_not_kept_for_a_former_grouping(world: World) -> None:
    container, dataset = world.collection("c", "container"), world.collection("d")
    first, *_ = world.files(3, "DESY-DISK", dataset)
    world.attach(container, dataset)
    rule = world.rule(container, "DESY-DISK", grouping="none")
    change(world, rule, grouping=Grouping.DATASET, expression="GSI-DISK")
    assert copies(world, rule, surplus=True) == {"DESY-DISK": 3}
    world.detach(dataset, first)
    world.check()
    assert copies(world, rule, surplus=True) == {"DESY-DISK": 2}
    change(world, rule, grouping=Grouping.NONE)
    world.detach(container, dataset)
    world.check()
    assert (copies(world, rule), copies(world, rule, surplus=True)) == ({}, {})
