"""A rule stays true to what its DID holds: in the same transaction, at a cost that follows what changed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from replica.catalog import provision
from replica.db import tables
from replica.db.engine import Database
from rules.states import ReplicaState, TransferState
from tests.replica.catalog.world import MB, World, done

COUNT = Callable[[Database], AbstractContextManager[Any]]


@pytest.fixture
def world(db: Database) -> World:
    made = World(db)
    made.three()
    return made


def test_an_attached_file_is_protected_at_once(world: World) -> None:
    dataset = world.collection("d")
    world.files(3, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    world.move()
    assert world.show(rule).state == "ok"
    world.woken.clear()

    (late,) = world.files(1, "DESY-DISK")
    world.attach(dataset, late)

    shown = world.show(rule)
    assert (shown.state, shown.files_total, shown.files_available) == ("replicating", 4, 3)
    assert world.count(tables.replicas, tables.replicas.c.state == ReplicaState.COPYING) == 1
    assert "site.HZDR" in world.woken, "nobody had to look for it"
    world.check()
    assert world.move() == 1
    assert world.show(rule).state == "ok"
    world.check()


def test_attaching_to_a_dataset_under_rules_costs_the_same_whatever_its_size_and_whatever_comes(
    world: World, count_statements: COUNT
) -> None:
    counts = set()
    for size, coming in ((2, 1), (300, 1), (2, 200)):
        dataset = world.collection(f"d{size}-{coming}")
        world.files(size, "DESY-DISK", dataset)
        for expression in ("HZDR-DISK", "GSI-DISK", "HZDR-DISK|GSI-DISK"):
            world.rule(dataset, expression)
        late = world.files(coming, "DESY-DISK")
        with count_statements(world.db) as statements:
            world.attach(dataset, *late)
        counts.add(statements.count)
        world.check()
    assert len(counts) == 1, f"it grew: {counts}"
    assert counts.pop() <= (46 if world.db.url.get_backend_name() == "sqlite" else 18)


def test_a_file_attached_to_an_inner_dataset_is_seen_by_a_rule_on_the_outermost_container(world: World) -> None:
    inner, outer, dataset = (
        world.collection("i", "container"),
        world.collection("o", "container"),
        world.collection("d"),
    )
    world.attach(outer, inner)
    world.attach(inner, dataset)
    rule = world.rule(outer, "HZDR-DISK")
    world.files(2, "DESY-DISK", dataset)
    assert world.show(rule).files_total == 2
    world.check()
    assert world.move() == 2
    assert world.show(rule).state == "ok"


@pytest.mark.parametrize("grouping", ["dataset", "all", "none"])
def test_a_dataset_attached_to_a_container_under_a_rule_is_placed_at_once(world: World, grouping: str) -> None:
    container, first, second = world.collection("c", "container"), world.collection("d1"), world.collection("d2")
    world.files(3, "DESY-DISK", first)
    world.files(4, "DESY-DISK", second)
    world.attach(container, first)
    rule = world.rule(container, "HZDR-DISK|GSI-DISK", grouping=grouping)
    world.attach(container, second)
    shown = world.show(rule)
    assert (shown.files_total, shown.state) == (7, "replicating")
    world.check()
    assert world.move() == 7
    locks = world.explain(rule).locks
    if grouping == "all":
        assert len({lock.endpoint for lock in locks}) == 1, "a new dataset joins the others"
    assert len(locks) == (7 if grouping == "none" else 2)
    world.check()


def test_a_file_in_two_datasets_of_a_container_is_one_unit_of_a_rule_that_takes_files_one_by_one(world: World) -> None:
    container, first, second = world.collection("c", "container"), world.collection("d1"), world.collection("d2")
    shared, *_ = world.files(2, "DESY-DISK", first)
    world.attach(second, shared)
    world.attach(container, first, second)
    rule = world.rule(container, "HZDR-DISK", grouping="none")
    assert len(world.explain(rule).locks) == 2
    world.detach(first, shared)
    world.check()
    assert len(world.explain(rule).locks) == 2, "it is still in the other dataset"
    world.detach(second, shared)
    world.check()
    assert len(world.explain(rule).locks) == 1


def test_detached_files_are_released_for_every_rule_by_the_right_number(world: World) -> None:
    """Two rules, 4 of 10 files detached: both count 6 (in Rucio, 10 and 2)."""
    dataset = world.collection("d")
    names = world.files(10, "DESY-DISK", dataset)
    rules = [world.rule(dataset, "HZDR-DISK"), world.rule(dataset, "GSI-DISK")]
    world.move()
    world.detach(dataset, *names[:4])
    assert [(r.files_total, r.files_available, r.state) for r in map(world.show, rules)] == [(6, 6, "ok")] * 2
    released = tables.replicas.c.tombstone_at.is_not(None)
    assert world.count(tables.replicas, released) == 8
    world.check()


def test_what_is_detached_before_it_was_moved_is_not_moved_and_gives_its_space_back(world: World) -> None:
    dataset = world.collection("d")
    kept, gone = world.files(2, "DESY-DISK", dataset, size=MB)
    world.rule(dataset, "HZDR-DISK")
    assert world.used("HZDR-DISK") == 2 * MB
    world.detach(dataset, gone)
    assert world.used("HZDR-DISK") == MB
    assert [t.state for t in world.transfers(site="HZDR")] == ["queued", "cancelled"]
    world.check()
    assert world.move() == 1
    assert kept in {t.did for t in world.transfers(state="done")}


def test_a_detached_dataset_takes_its_lock_along_unless_it_is_still_below_by_another_way(world: World) -> None:
    top, left, right = (world.collection(n, "container") for n in ("top", "left", "right"))
    dataset = world.collection("d")
    world.files(2, "DESY-DISK", dataset)
    world.attach(top, left, right)
    world.attach(left, dataset)
    world.attach(right, dataset)
    rule = world.rule(top, "HZDR-DISK")
    world.detach(left, dataset)
    assert len(world.explain(rule).locks) == 1
    world.check()
    world.detach(right, dataset)
    assert world.explain(rule).locks == []
    assert world.show(rule).state == "ok"
    assert world.used("HZDR-DISK") == 0
    world.check()


def test_a_file_that_another_rule_wants_there_stays_when_one_rule_lets_go(world: World) -> None:
    dataset = world.collection("d")
    first, second = world.files(2, "DESY-DISK", dataset)
    world.rule(dataset, "HZDR-DISK")
    world.rule(first, "HZDR-DISK")
    world.detach(dataset, first, second)
    states = {t.did: t.state for t in world.transfers(site="HZDR")}
    assert states == {first: "queued", second: "cancelled"}
    world.check()


def test_a_copy_registered_where_a_rule_wants_one_completes_the_rule_and_stops_the_transfer(world: World) -> None:
    dataset = world.collection("d")
    names = world.files(3, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    held = world.claim("HZDR", 1).orders
    world.register(names, "HZDR-DISK")
    assert world.show(rule).state == "ok"
    assert {t.state for t in world.transfers()} == {"cancelled"}
    assert world.report("HZDR", [done(o) for o in held]).stale == [held[0].transfer]
    world.check()


@pytest.mark.parametrize("evidence", ["hashed", "declared"])
def test_what_is_registered_before_a_rule_made_it_was_not_stuck_though_it_was_cancelled_once(
    world: World, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = world.collection("d")
    names = world.files(3, "DESY-DISK", dataset)
    world.delete(world.rule(dataset, "HZDR-DISK"))
    with monkeypatch.context() as patched:
        patched.setattr(provision, "apply_locks", lambda *given: 0)  # it is much, and left to evaluation
        rule = world.rule(dataset, "HZDR-DISK")
    world.register(names[:2], "HZDR-DISK", evidence=evidence)
    world.check()
    world.evaluate()
    world.move("HZDR")
    assert world.show(rule).state == "ok"
    world.check()


def test_a_transfer_that_waited_for_a_source_goes_on_when_one_is_registered(world: World) -> None:
    dataset = world.collection("d")
    (name,) = world.files(1, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    world.change("DESY-DISK", readable=False)
    assert world.claim("HZDR").orders == []
    assert "DESY-DISK: reading is off" in " ".join(world.explain(rule).sentences) or any(
        "no endpoint that may be read" in sentence for sentence in world.explain(rule).sentences
    )
    world.woken.clear()
    world.register([name], "GSI-DISK")
    assert "site.HZDR" in world.woken
    (order,) = world.claim("HZDR").orders
    assert [source.endpoint for source in order.sources] == ["GSI-DISK"]
    world.check()


def test_a_declared_copy_counts_only_when_a_worker_has_verified_it(world: World) -> None:
    dataset = world.collection("d")
    rule = world.rule(dataset, "HZDR-DISK")
    world.files(2, "HZDR-DISK", dataset, evidence="declared")
    assert world.show(rule).state == "replicating"
    orders = world.claim("HZDR").orders
    assert [order.sources for order in orders] == [[], []], "verify in place"
    world.report("HZDR", [done(order) for order in orders])
    assert world.show(rule).state == "ok"
    world.check()


def test_what_a_rule_releases_of_declared_copies_is_still_verified(world: World) -> None:
    dataset = world.collection("d")
    world.files(1, "HZDR-DISK", dataset, evidence="declared")
    rule = world.rule(dataset, "HZDR-DISK")
    world.delete(rule)
    assert world.count(tables.transfers, tables.transfers.c.state == TransferState.QUEUED) == 1
    world.check()
