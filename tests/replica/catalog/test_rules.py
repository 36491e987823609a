"""Wishes: what is promised, what is refused and why, and what is left when a wish ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from replica import wire
from replica.catalog import coverage, plans, rules
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Invalid, InvalidExpression, NotFound, Refused
from rules.states import TransferState
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, ROOT, World

COUNT = Callable[[Database], AbstractContextManager[Any]]


@pytest.fixture
def world(db: Database) -> World:
    made = World(db)
    made.three()
    return made


def dataset_of(world: World, count: int, name: str = "d", **fields: Any) -> str:
    dataset = world.collection(name)
    world.files(count, "DESY-DISK", dataset, **fields)
    return dataset


def test_a_rule_makes_its_copies_and_is_ok_when_they_are_there(world: World) -> None:
    dataset = dataset_of(world, 5)
    rule = world.rule(dataset, "*", copies=2, spread="site")
    assert (rule.state, rule.files_total, rule.files_available) == ("replicating", 5, 0)
    assert (rule.locks_ok, rule.locks_replicating, rule.locks_stuck) == (5, 5, 0)
    world.check()
    assert world.move() == 5
    rule = world.show(rule)
    assert (rule.state, rule.files_available, rule.locks_ok) == ("ok", 5, 10)
    world.check()


def test_a_rule_for_data_elsewhere_costs_the_same_statements_for_10_and_for_2000_files(
    world: World, count_statements: COUNT
) -> None:
    counts = []
    for size in (10, 2_000):
        dataset = dataset_of(world, size, f"d{size}")
        with count_statements(world.db) as statements:
            world.rule(dataset, "HZDR-DISK|GSI-DISK", copies=2)
        counts.append(statements.count)
    assert counts[0] == counts[1] <= 80
    assert world.count(tables.transfers, tables.transfers.c.state == TransferState.QUEUED) == 2 * 2_010


def test_a_rule_for_data_that_is_there_already_is_ok_at_once_in_a_handful_of_statements(
    world: World, count_statements: COUNT
) -> None:
    counts = []
    for size in (10, 6_000):
        dataset = dataset_of(world, size, f"d{size}")
        with count_statements(world.db) as statements:
            rule = world.rule(dataset, "DESY-DISK")
        counts.append(statements.count)
        assert rule.state == "ok", "also for more files than one slice takes"
    assert counts[0] <= counts[1] <= counts[0] + 3, "a large dataset is read along two indexes"
    assert counts[1] <= 60
    assert world.count(tables.transfers) == 0
    world.check()


def test_a_dataset_that_is_read_along_two_indexes_is_counted_as_any_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage, "LARGE_FILES", 3)
    dataset, other = world.collection("one"), world.collection("other")
    names = world.files(8, "DESY-DISK")
    world.attach(dataset, *names[::2])
    world.attach(other, *names[1::2])
    world.register(names[:3], "HZDR-DISK")
    assert world.rule(dataset, "DESY-DISK").state == "ok"
    there = world.rule(dataset, "HZDR-DISK")
    assert (there.files_available, there.files_total) == (2, 4)
    assert world.rule(dataset, "GSI-DISK").files_available == 0
    world.check()
    assert world.move() == 2 + 4
    world.check()


def test_the_same_wish_twice_is_one_rule_and_another_wish_another(world: World) -> None:
    dataset = dataset_of(world, 2)
    rule = world.rule(dataset, "HZDR-DISK")
    assert world.rule(dataset, "HZDR-DISK", comment="again").id == rule.id
    assert world.rule(dataset, "HZDR-DISK", grouping="none").id != rule.id
    world.delete(rule)
    assert world.rule(dataset, "HZDR-DISK").id != rule.id
    world.check()


def test_two_rules_that_want_the_same_copy_move_it_once_with_the_higher_priority(world: World) -> None:
    dataset = dataset_of(world, 3)
    world.rule(dataset, "HZDR-DISK", priority=2)
    world.rule(dataset, "HZDR-DISK", priority=5, grouping="all")
    assert {t.priority for t in world.transfers()} == {5}
    assert len(world.transfers()) == 3
    assert world.move() == 3
    world.check()


def test_a_container_of_4_times_5_mb_with_6_mb_left_is_placed_as_far_as_it_fits(world: World) -> None:
    """Rucio locks all 20 MB."""
    world.endpoint("SMALL-DISK", capacity=6 * MB)
    container = world.collection("c", "container")
    for i in range(4):
        world.attach(container, dataset_of(world, 1, f"d{i}", size=5 * MB))
    rule = world.rule(container, "SMALL-DISK")
    assert world.used("SMALL-DISK") == 5 * MB
    assert rule.state == "stuck"
    (reason,) = rule.reasons
    assert (reason.code, reason.endpoint, reason.files) == ("no_space", "SMALL-DISK", 3)
    assert reason.message == "SMALL-DISK: 4.0 MB short"
    assert reason.next_retry_at is not None
    assert world.move() == 1, "what fits goes on its way"
    world.check()
    world.change("SMALL-DISK", capacity_bytes=20 * MB)
    assert world.evaluate() > 0, "changed facts are a reason to look again"
    assert world.move() == 3
    assert world.show(rule).state == "ok"
    assert world.show(rule).reasons == []
    world.check()


def test_space_is_promised_once_even_to_rules_that_are_applied_in_slices(world: World, clock: HandClock) -> None:
    world.endpoint("SMALL-DISK", capacity=9_000)
    dataset = dataset_of(world, 6_000, size=1)
    other = dataset_of(world, 1, "other", size=4_000)
    rule = world.rule(dataset, "SMALL-DISK")
    assert world.used("SMALL-DISK") == 5_000, "the first slice is booked"
    assert "evaluation" in world.woken
    refused = world.rule(other, "SMALL-DISK")
    assert refused.reasons[0].message == "SMALL-DISK: 1.0 kB short", "and the rest is reserved"
    world.check()
    world.evaluate()
    assert world.used("SMALL-DISK") == 6_000
    assert world.show(rule).files_total == 6_000
    assert len({t.target for t in world.transfers()}) == 1
    world.check()


def test_many_units_are_placed_in_slices_and_every_unit_is_placed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replica.catalog.locks.SLICE_UNITS", 20)
    dataset = dataset_of(world, 95)
    rule = world.rule(dataset, "HZDR-DISK|GSI-DISK", grouping="none")
    assert rule.state == "replicating"
    assert rule.files_total == 95
    assert len(world.explain(rule).locks) == 20
    world.check()
    world.files(2, "DESY-DISK", dataset)
    world.evaluate()
    assert len(world.explain(rule).locks) == 97
    world.check()
    assert world.move() == 97
    assert world.show(rule).state == "ok"


def test_files_taken_one_by_one_spread_over_the_endpoints_and_lock_only_where_they_are(world: World) -> None:
    """No phantom rows: exactly one lock for each file (Rucio makes 14 of 24 for nothing)."""
    container = world.collection("c", "container")
    for i in range(6):
        world.attach(container, dataset_of(world, 4, f"d{i}"))
    rule = world.rule(container, "HZDR-DISK|GSI-DISK", grouping="none")
    locks = world.explain(rule).locks
    assert len(locks) == 24
    assert {lock.endpoint for lock in locks} == {"HZDR-DISK", "GSI-DISK"}
    world.check()


def test_grouping_all_keeps_everything_together_and_counts_a_shared_file_once(world: World) -> None:
    world.endpoint("SMALL-DISK", capacity=3_000)
    container, second = world.collection("c", "container"), world.collection("d2")
    first = world.collection("d1")
    names = world.files(3, "DESY-DISK", first, size=1_000)
    world.attach(second, *names)
    world.attach(container, first, second)
    rule = world.rule(container, "SMALL-DISK", grouping="all")
    assert rule.reasons == []
    assert world.used("SMALL-DISK") == 3_000
    world.check()


def test_copies_never_share_a_failure_domain(world: World) -> None:
    world.endpoint("DESY-TWO", "DESY")
    dataset = dataset_of(world, 2)
    rule = world.rule(dataset, "DESY-DISK|DESY-TWO", copies=2, spread="site")
    assert rule.state == "stuck"
    assert {r.code for r in rule.reasons} == {"too_few_candidates", "domain_used"}
    assert len(world.explain(rule).locks) == 1, "the copy that is possible is kept"
    world.check()


@pytest.mark.parametrize(
    ("fields", "error", "field", "words"),
    [
        ({"did": "t:nothing"}, NotFound, "did", "there is no DID t:nothing"),
        ({"expression": "DESY-DISK|"}, InvalidExpression, "expression", "column 11"),
        ({"expression": "NOWHERE"}, InvalidExpression, "expression", "column 1"),
        ({"expression": "kind=tape"}, Refused, "expression", "selects no endpoint"),
        ({"source_expression": "(DESY-DISK"}, InvalidExpression, "source_expression", "column"),
        ({"spread": "building"}, Invalid, "spread", "building"),
        ({"weight": "mood"}, Invalid, "weight", "mood"),
    ],
)
def test_a_wish_that_cannot_be_right_is_refused_and_leaves_nothing(
    world: World, fields: dict[str, Any], error: type[Exception], field: str, words: str
) -> None:
    dataset = dataset_of(world, 1)
    wish = {"did": dataset, "expression": "*"} | fields
    with pytest.raises(error) as caught, world.db.write() as s:
        rules.add(s, ROOT, wire.NewRule(**wish))
    assert getattr(caught.value, "field", None) == field
    assert words in str(caught.value)
    assert world.count(tables.rules) == 0


def test_a_plan_is_what_happens_and_changes_nothing(world: World) -> None:
    container = world.collection("c", "container")
    for i in range(5):
        world.attach(container, dataset_of(world, 2, f"d{i}", size=MB))
    wish = wire.NewRule(did=container, expression="HZDR-DISK|GSI-DISK")
    with world.db.read() as s:
        plan = plans.plan(s, ROOT, wish)
    assert plan.candidates == ["GSI-DISK", "HZDR-DISK"]
    assert (plan.units, plan.new_bytes, plan.refusals) == (5, 10 * MB, [])
    rule = world.rule(container, "HZDR-DISK|GSI-DISK")
    locks = {(lock.unit, lock.endpoint) for lock in world.explain(rule).locks}
    assert locks == {(copy.unit, copy.endpoint) for copy in plan.copies}


def test_a_plan_says_for_each_endpoint_why_it_cannot_take_a_unit(world: World) -> None:
    world.endpoint("SMALL-DISK", capacity=MB)
    dataset = dataset_of(world, 1, size=3 * MB)
    world.change("GSI-DISK", writable=False)
    with world.db.read() as s:
        plan = plans.plan(s, ROOT, wire.NewRule(did=dataset, expression="SMALL-DISK|GSI-DISK"))
    (refusal,) = plan.refusals
    assert sorted(refusal.obstacles) == ["GSI-DISK: writing is off", "SMALL-DISK: 2.0 MB short"]


def test_a_deleted_rule_stops_what_it_wanted_and_releases_what_it_protected(world: World) -> None:
    dataset = dataset_of(world, 4, size=MB)
    rule = world.rule(dataset, "HZDR-DISK")
    held = world.claim("HZDR", 1).orders
    kept = world.rule(dataset, "GSI-DISK")
    world.delete(rule)
    assert world.show(rule).state == "expired"
    assert world.used("HZDR-DISK") == MB, "what a worker may be writing keeps its space"
    assert {t.state for t in world.transfers(site="HZDR")} == {"cancelled"}
    answer = world.heartbeat("HZDR", wire.Beat(transfer=held[0].transfer, epoch=held[0].epoch))
    assert answer.stop == [held[0].transfer]
    assert {t.state for t in world.transfers(site="GSI")} == {"queued"}
    world.check()
    world.delete(rule)
    assert world.show(kept).state == "replicating"
    # The same wish anew begins from the beginning, whatever the first one left.
    again = world.rule(dataset, "HZDR-DISK")
    world.check()
    world.move()
    assert world.show(again).state == "ok"
    world.check()


def test_deleting_a_rule_costs_the_same_statements_for_10_and_for_2000_files(
    world: World, count_statements: COUNT
) -> None:
    counts = []
    for size in (10, 2_000):
        rule = world.rule(dataset_of(world, size, f"d{size}"), "HZDR-DISK")
        with count_statements(world.db) as statements:
            world.delete(rule)
        counts.append(statements.count)
    assert counts[0] == counts[1] <= (45 if world.db.url.get_backend_name() == "sqlite" else 33), counts
    assert world.used("HZDR-DISK") == 0
    world.check()


def test_a_rule_ends_with_its_lifetime(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world, 2)
    rule = world.rule(dataset, "DESY-DISK", lifetime_seconds=60)
    with world.db.write() as s:
        assert rules.expire_due(s) == 0
    clock.turn(seconds=60)
    with world.db.write() as s:
        assert rules.expire_due(s) == 1
        assert rules.expire_due(s) == 0
    assert world.show(rule).state == "expired"
    assert world.count(tables.replicas, tables.replicas.c.tombstone_at.is_not(None)) == 2
    world.check()


def test_a_new_rule_takes_back_what_an_ended_one_released(world: World) -> None:
    dataset = dataset_of(world, 2)
    world.delete(world.rule(dataset, "DESY-DISK"))
    again = world.rule(dataset, "DESY-DISK")
    assert again.state == "ok" or world.evaluate()
    assert world.show(again).state == "ok"
    assert world.count(tables.replicas, tables.replicas.c.tombstone_at.is_not(None)) == 0
    world.check()


def test_rules_are_listed_by_did_state_and_page(world: World) -> None:
    first, second = dataset_of(world, 1, "a"), dataset_of(world, 1, "b")
    made = [world.rule(first, "DESY-DISK"), world.rule(first, "HZDR-DISK"), world.rule(second, "HZDR-DISK")]
    with world.db.read() as s:
        page = rules.list_page(s, limit=2)
        rest = rules.list_page(s, cursor=page.next, limit=2)
        assert [r.id for r in (*page.items, *rest.items)] == [r.id for r in made]
        assert rest.next is None
        assert [r.id for r in rules.list_page(s, state="ok").items] == [made[0].id]
        assert [r.id for r in rules.list_page(s, account="root", state="replicating").items] == [made[1].id, made[2].id]
        with pytest.raises(Invalid, match="not a state"):
            rules.list_page(s, state="asleep")


def test_an_explanation_says_what_is_wanted_there_moving_and_missing(world: World) -> None:
    world.endpoint("SMALL-DISK", capacity=MB)
    container = world.collection("c", "container")
    world.attach(container, dataset_of(world, 2, "small", size=MB // 4), dataset_of(world, 3, "large", size=MB))
    rule = world.rule(container, "SMALL-DISK")
    world.claim("SMALL", 1)
    explanation = world.explain(rule)
    text = " ".join(explanation.sentences)
    assert "root wants 1 copy of t:c at `SMALL-DISK`." in text
    assert "The DID has 5 files with 3.5 MB; 0 of 5 have every copy that is wanted." in text
    assert "1 file (250.0 kB) was handed to a worker for SMALL-DISK." in text
    assert "1 file (250.0 kB) waits for a worker of SMALL-DISK." in text
    assert "1 copy of a dataset has no place yet" in text
    assert "SMALL-DISK: 2.5 MB short (3 files, first seen" in text
    assert "What helps: free space there" in text
    assert "It is tried again by itself at" in text
    assert explanation.transfers == {"queued": 1, "claimed": 1}
