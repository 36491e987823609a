"""Copies are brought elsewhere: from drained endpoints at once, from where nothing arrives after some patience."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import endpoints, rule_changes, rules
from replica.db import tables
from replica.db.engine import Database
from tests.conftest import HandClock
from tests.replica.catalog.world import KB, MB, World, done, failed

COUNT = Callable[[Database], AbstractContextManager[Any]]
GROUPINGS = ("dataset", "all", "none")


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def drain(world: World, name: str, **fields: Any) -> wire.Endpoint:
    with world.db.write() as s:
        return endpoints.drain(s, name, wire.Drain(**fields))


def ban(world: World, name: str, **fields: Any) -> wire.Endpoint:
    with world.db.write() as s:
        return endpoints.ban(s, name, wire.Ban(**({"reason": "a disk array burns"} | fields)))


def where(world: World, rule: wire.Rule, *, surplus: bool = False) -> set[str]:
    query = (
        sa.select(tables.endpoints.c.name)
        .join_from(tables.locks, tables.endpoints)
        .where(tables.locks.c.rule_id == rule.id, tables.locks.c.surplus == surplus)
    )
    with world.look() as s:
        return set(s.execute(query).scalars())


def container(world: World, datasets: int = 3, files: int = 3) -> str:
    made = world.collection("c", "container")
    for i in range(datasets):
        dataset = world.collection(f"d{i}")
        world.files(files, "DESY-DISK", dataset)
        world.attach(made, dataset)
    return made


def pass_(world: World, clock: HandClock, *, hours: float, dead: str = "") -> None:
    """So much time, in which workers are heard of everywhere but at the dead site, and rules are looked at."""
    step = 0.25 if hours < 4 else 1.0
    for _ in range(round(hours / step)):
        clock.turn(hours=step)
        hear(world, dead)
        world.evaluate()


def hear(world: World, dead: str = "") -> None:
    with world.db.write() as s:
        s.execute(tables.sites.update().where(tables.sites.c.name != dead).values(worker_seen_at=s.now))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_what_is_at_a_drained_endpoint_is_brought_elsewhere_and_then_goes(world: World, grouping: str) -> None:
    did = container(world)
    rule = world.rule(did, "HZDR-DISK|GSI-DISK", grouping=grouping)
    (name, *_) = sorted(where(world, rule))
    world.move()
    assert world.show(rule).state == "ok"
    shown = drain(world, name, reason="out of warranty")
    assert (shown.draining, shown.status_reason) == (True, "out of warranty")
    assert shown.protected is not None and shown.protected.rules == 1 and shown.protected.files > 0
    world.evaluate()
    world.check()
    (other,) = {"HZDR-DISK", "GSI-DISK"} - {name}
    assert (where(world, rule), where(world, rule, surplus=True)) == ({other}, {name})
    assert world.show(rule).state == "replicating"
    assert "brought elsewhere, as it is being drained" in world.show(rule).reasons[0].message
    world.move()
    world.evaluate()
    world.check()
    assert (where(world, rule, surplus=True), world.show(rule).state) == (set(), "ok")
    with world.look() as s:
        assert endpoints.get(s, name).protected == wire.Protected(rules=0, files=0, bytes=0)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_rule_is_placed_anew_after_its_endpoint_died(world: World, clock: HandClock, grouping: str) -> None:
    """In Rucio only rules that take files one by one ever are (#536)."""
    did = container(world)
    world.change("GSI-DISK", writable=False)
    rule = world.rule(did, "HZDR-DISK|GSI-DISK", grouping=grouping)
    world.change("GSI-DISK", writable=True)
    hear(world)
    assert world.report("HZDR", [done(order) for order in world.claim("HZDR", limit=2).orders]).accepted == 2
    assert where(world, rule) == {"HZDR-DISK"}
    pass_(world, clock, hours=6, dead="HZDR")
    assert where(world, rule) == {"HZDR-DISK"}, "it may come back"
    pass_(world, clock, hours=1.5, dead="HZDR")
    world.check()
    # Files that had arrived are complete copies of their own under grouping none: they stay.
    kept = {"HZDR-DISK"} if grouping == "none" else set()
    assert where(world, rule) == {"GSI-DISK"} | kept
    assert where(world, rule, surplus=True) == (set() if grouping == "none" else {"HZDR-DISK"})
    world.move("GSI")
    world.evaluate()
    world.check()
    assert (world.show(rule).state, world.show(rule).reasons) == ("ok", [])
    assert where(world, rule, surplus=True) == set()


def test_where_every_try_fails_the_copy_goes_elsewhere_and_not_back(world: World, clock: HandClock) -> None:
    (name,) = world.files(1, "DESY-DISK")
    rule = world.rule(name, "HZDR-DISK|GSI-DISK")
    (first,) = where(world, rule)
    (second,) = {"HZDR-DISK", "GSI-DISK"} - {first}

    def fail(endpoint: str, hours: int) -> None:
        for _ in range(hours):
            clock.turn(hours=1)
            with world.db.write() as s:
                s.execute(tables.sites.update().values(worker_seen_at=s.now))
            world.evaluate()
            orders = world.claim(endpoint.split("-")[0]).orders
            world.report(endpoint.split("-")[0], [failed(order, "refused") for order in orders])

    fail(first, 7)
    assert where(world, rule) == {first}
    fail(first, 2)
    assert where(world, rule) == {second}
    world.check()
    fail(second, 12)
    assert where(world, rule) == {second}, "the second time it takes twice the patience, and there is no way back yet"
    fail(second, 6)
    assert where(world, rule) == {second}
    assert "not_moved" in {reason.code for reason in world.show(rule).reasons}
    fail(second, 7)
    assert where(world, rule) == {first}, "a day after it was left it is tried again"
    world.check()


def test_where_writing_is_off_there_is_less_patience_and_what_is_complete_stays(world: World, clock: HandClock) -> None:
    here, there = world.collection("here"), world.collection("there")
    world.files(2, "DESY-DISK", here)
    world.files(2, "DESY-DISK", there)
    complete = world.rule(here, "HZDR-DISK")
    world.move()
    world.change("GSI-DISK", writable=False)
    rule = world.rule(there, "HZDR-DISK|GSI-DISK")
    world.change("GSI-DISK", writable=True)
    shown = ban(world, "HZDR-DISK")
    assert (shown.readable, shown.writable, shown.deletable, shown.status_reason) == (
        False,
        False,
        False,
        "a disk array burns",
    )
    pass_(world, clock, hours=0.75)
    assert where(world, rule) == {"HZDR-DISK"}
    pass_(world, clock, hours=0.75)
    assert (where(world, rule), where(world, rule, surplus=True)) == ({"GSI-DISK"}, set())
    assert (where(world, complete), world.show(complete).state) == ({"HZDR-DISK"}, "ok")
    world.check()


def test_switching_on_again_gives_new_patience(world: World, clock: HandClock) -> None:
    (name,) = world.files(1, "DESY-DISK")
    world.change("GSI-DISK", writable=False)
    rule = world.rule(name, "HZDR-DISK|GSI-DISK")
    world.change("GSI-DISK", writable=True)
    ban(world, "HZDR-DISK", write=True)
    pass_(world, clock, hours=0.75)
    with world.db.write() as s:
        assert endpoints.unban(s, "HZDR-DISK").status_reason == ""
    pass_(world, clock, hours=4)
    assert where(world, rule) == {"HZDR-DISK"}
    world.move()
    assert world.show(rule).state == "ok"


def test_what_no_other_endpoint_can_take_stays_and_its_rule_says_why(world: World, clock: HandClock) -> None:
    world.endpoint("SMALL-DISK", capacity=2 * MB)
    did = container(world, files=1)
    big = world.collection("big")
    world.files(1, "DESY-DISK", big, size=5 * MB)
    world.attach(did, big)
    rule = world.rule(did, "DESY-DISK|SMALL-DISK")
    drain(world, "DESY-DISK", reason="out of warranty")
    world.evaluate()
    world.check()
    shown = world.show(rule)
    assert where(world, rule) == {"DESY-DISK", "SMALL-DISK"}
    stays = next(reason for reason in shown.reasons if reason.code == "not_moved")
    assert stays.message.startswith("DESY-DISK: it is being drained, but its copies stay: SMALL-DISK: ")
    assert stays.message.endswith(" short")
    world.move()
    shown = world.show(rule)
    assert shown.state == "ok", "every copy is there"
    assert [reason.code for reason in shown.reasons] == ["not_moved"]
    world.change("SMALL-DISK", capacity_bytes=20 * MB)
    world.evaluate()
    world.move()
    world.evaluate()
    assert (where(world, rule), world.show(rule).state, world.show(rule).reasons) == ({"SMALL-DISK"}, "ok", [])
    world.check()


def test_a_wider_wish_lets_go_what_a_drained_endpoint_had_to_keep(world: World) -> None:
    world.files(3, "DESY-DISK", world.collection("d"))
    rule = world.rule("t:d", "DESY-DISK")
    drain(world, "DESY-DISK")
    world.evaluate()
    assert [reason.code for reason in world.show(rule).reasons] == ["not_moved"]
    with world.db.write() as s:
        rule_changes.change_wish(s, rule.id, expression="DESY-DISK|HZDR-DISK")
    world.evaluate()
    world.move()
    world.evaluate()
    assert (where(world, rule), world.show(rule).reasons) == ({"HZDR-DISK"}, [])
    world.check()


def test_a_rule_that_stays_satisfied_while_its_copy_moves_has_no_reasons(world: World) -> None:
    """Everything was already where the copy went to."""
    files = world.files(3, "DESY-DISK", world.collection("d"))
    rule = world.rule("t:d", "DESY-DISK|HZDR-DISK")
    there = world.rule("t:d", "HZDR-DISK")
    world.move()
    world.delete(there)
    drain(world, "DESY-DISK")
    world.evaluate()
    assert len(files) == 3 and where(world, rule) == {"HZDR-DISK"}
    assert (world.show(rule).state, world.show(rule).reasons) == ("ok", [])
    world.check()


def test_all_of_a_set_moves_or_nothing(world: World) -> None:
    world.endpoint("SMALL-DISK", capacity=10 * KB)
    did = world.collection("c", "container")
    for i in range(3):
        dataset = world.collection(f"d{i}")
        world.files(1, "DESY-DISK", dataset, size=4 * KB)
        world.attach(did, dataset)
    rule = world.rule(did, "DESY-DISK|SMALL-DISK", grouping="all")
    drain(world, "DESY-DISK")
    world.evaluate()
    assert where(world, rule) == {"DESY-DISK"}
    world.change("SMALL-DISK", capacity_bytes=12 * KB)
    world.evaluate()
    assert (where(world, rule), where(world, rule, surplus=True)) == ({"SMALL-DISK"}, {"DESY-DISK"})
    world.check()


def test_a_replacement_keeps_to_the_spread(world: World) -> None:
    world.endpoint("DESY-TAPE")
    (name,) = world.files(1, "DESY-DISK")
    rule = world.rule(name, "DESY-DISK|HZDR-DISK", copies=2, spread="site")
    world.move()
    with world.db.write() as s:
        s.execute(tables.rules.update().values(expression="*"))
    drain(world, "HZDR-DISK")
    world.evaluate()
    assert where(world, rule) == {"DESY-DISK", "GSI-DISK"}
    drain(world, "GSI-DISK")
    world.evaluate()
    assert where(world, rule) == {"DESY-DISK", "GSI-DISK"}, "HZDR is drained and DESY has a copy"
    drain(world, "HZDR-DISK", undo=True)
    world.evaluate()
    assert where(world, rule) == {"DESY-DISK", "HZDR-DISK"}, "what had not gone yet is wished again"
    world.check()


@pytest.mark.parametrize("by", ["endpoint", "rule"])
def test_never_is_obeyed(world: World, by: str) -> None:
    (name,) = world.files(1, "DESY-DISK")
    rule = world.rule(name, "*", **({"metadata": {"replace": "never"}} if by == "rule" else {}))
    if by == "endpoint":
        world.change("DESY-DISK", attributes={"replace": "never"})
    drain(world, "DESY-DISK")
    world.evaluate()
    assert where(world, rule) == {"DESY-DISK"}
    assert "shall never be replaced" in world.show(rule).reasons[0].message
    world.check()


def test_the_cost_of_a_move_does_not_grow_with_units_or_files(world: World, count_statements: COUNT) -> None:
    counts = []
    for files in (2, 200):
        dataset = world.collection(f"n{files}")
        world.files(files, "DESY-DISK", dataset, size=1)
        world.rule(dataset, "*", grouping="none")
        drain(world, "DESY-DISK")
        with count_statements(world.db) as statements, world.db.write() as s:
            rules.evaluate_due(s)
        counts.append(statements.count)
        world.evaluate()
        world.move()
        world.evaluate()
        world.check()
        drain(world, "DESY-DISK", undo=True)
        with world.db.write() as s:
            s.execute(tables.rules.update().values(evaluate_at=None))
    assert counts[1] <= counts[0] + 3 <= 130


def test_a_rule_with_few_copies_in_trouble_moves_only_these(world: World) -> None:
    did = container(world)
    rule = world.rule(did, "*", grouping="dataset")
    late = world.collection("late")
    world.files(2, "HZDR-DISK", late)
    world.attach(did, late)
    assert where(world, rule) == {"DESY-DISK", "HZDR-DISK"}
    drain(world, "HZDR-DISK")
    world.evaluate()
    assert world.count(tables.locks, tables.locks.c.surplus) == 1
    world.move()
    world.evaluate()
    world.check()
    assert world.count(tables.locks) == 4
