"""Rules that are due are looked at again, fairly, and what got stuck or lost heals."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from replica.catalog import evaluation, rules
from replica.db import tables
from replica.db.engine import Database, Session
from rules.errors import Refused
from rules.states import TransferState
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, World, failed


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def test_one_hopeless_rule_does_not_delay_another(world: World, clock: HandClock) -> None:
    world.endpoint("SMALL-DISK", capacity=MB)
    hopeless = world.collection("hopeless")
    world.files(1, "DESY-DISK", hopeless, size=5 * MB)
    poison = [world.rule(hopeless, "SMALL-DISK", copies=n) for n in (1, 2, 3)]
    large = world.collection("large")
    world.files(5_500, "DESY-DISK", large)
    rule = world.rule(large, "HZDR-DISK")
    clock.turn(minutes=1)
    assert world.evaluate(limit_files=200) < 20
    assert world.move() == 5_500
    assert world.show(rule).state == "ok"
    assert {world.show(p).state for p in poison} == {"stuck"}
    world.check()


def test_a_rule_whose_evaluation_fails_gets_a_reason_and_the_others_their_turn(
    world: World, clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.endpoint("SMALL-DISK", capacity=MB)
    made = []
    for i in range(3):
        dataset = world.collection(f"d{i}")
        world.files(1, "DESY-DISK", dataset, size=5 * MB)
        made.append(world.rule(dataset, "SMALL-DISK"))
    original = evaluation._evaluate

    def poisoned(s: object, rule: sa.Row[tuple[object, ...]], limit: int) -> int:
        if rule.id == made[0].id:
            s.execute(tables.rules.update().values(comment="half done"))  # type: ignore[attr-defined]
            raise Refused("its evaluation broke off")
        return original(s, rule, limit)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation, "_evaluate", poisoned)
    world.change("SMALL-DISK", capacity_bytes=50 * MB)
    assert world.evaluate() == 3
    states = [world.show(rule) for rule in made]
    assert [r.state for r in states] == ["stuck", "replicating", "replicating"]
    assert [r.comment for r in states] == ["", "", ""], "what was half done is undone"
    assert "evaluation_failed" in {r.code for r in states[0].reasons}
    monkeypatch.undo()
    clock.turn(hours=1)
    world.evaluate()
    assert world.show(made[0]).state == "replicating"
    world.check()


def test_a_stuck_rule_is_tried_again_after_pauses_that_grow(world: World, clock: HandClock) -> None:
    world.endpoint("SMALL-DISK", capacity=MB)
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset, size=5 * MB)
    rule = world.rule(dataset, "SMALL-DISK")
    pauses = []
    for _ in range(9):
        retry_at = world.show(rule).reasons[0].next_retry_at
        assert retry_at is not None
        pauses.append((retry_at - clock.now).total_seconds())
        clock.now = retry_at
        assert world.evaluate() == 1
    assert pauses[:3] == [60, 60, 120]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 3_600
    first = world.show(rule).reasons[0]
    assert first.first_seen_at < first.last_seen_at == clock.now


def test_a_failed_transfer_is_asked_for_anew_after_the_pause(world: World, clock: HandClock) -> None:
    dataset = world.collection("d")
    world.files(3, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    claimed = world.claim("HZDR").orders
    world.report("HZDR", [failed(order, "refused") for order in claimed])
    shown = world.show(rule)
    assert (shown.state, shown.reasons[0].files) == ("stuck", 3)
    clock.turn(minutes=2)
    assert world.evaluate() == 1
    shown = world.show(rule)
    assert (shown.state, shown.locks_replicating, shown.reasons) == ("replicating", 3, [])
    world.check()
    assert world.move() == 3
    assert world.show(rule).state == "ok"


def test_a_transfer_that_got_lost_is_noticed_and_made_again(world: World, clock: HandClock) -> None:
    dataset = world.collection("d")
    world.files(2, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    with world.db.write() as s:
        s.execute(tables.transfers.delete())
    clock.turn(minutes=20)
    assert world.evaluate() == 1
    assert world.count(tables.transfers, tables.transfers.c.state == TransferState.QUEUED) == 2
    assert "site.HZDR" in world.woken
    world.move()
    assert world.show(rule).state == "ok"
    world.check()


def test_large_rules_are_worked_off_in_slices_and_take_turns(world: World, clock: HandClock) -> None:
    made = []
    for i in range(2):
        dataset = world.collection(f"d{i}")
        world.files(6_000, "DESY-DISK", dataset, size=1)
        made.append(world.rule(dataset, "HZDR-DISK"))
        clock.turn(seconds=1)
    queued = tables.transfers.c.state == TransferState.QUEUED
    assert world.count(tables.transfers, queued) == 10_000, "each in its first slice"
    clock.turn(seconds=1)
    for _ in range(2):
        with world.db.write() as s:
            assert rules.evaluate_due(s, limit_files=100) == 101
        clock.turn(seconds=1)
    for rule in made:
        assert world.count(tables.transfers, tables.transfers.c.rule_id == rule.id) == 5_100
    world.evaluate()
    assert world.count(tables.transfers, queued) == 12_000
    world.check()


def test_an_expression_that_selects_nothing_any_more_is_a_reason_and_keeps_nobody_from_attaching(
    world: World, clock: HandClock
) -> None:
    world.endpoint("TAGGED-DISK", pool="fast")
    container, dataset = world.collection("c", "container"), world.collection("d")
    world.files(1, "DESY-DISK", dataset)
    rule = world.rule(container, "pool=fast")
    world.change("TAGGED-DISK", attributes={"pool": "slow"})
    world.attach(container, dataset)
    shown = world.show(rule)
    assert shown.state == "stuck"
    assert shown.reasons[0].code == "no_candidates"
    assert "selects no endpoint" in shown.reasons[0].message
    world.check()
    clock.turn(minutes=2)
    world.evaluate()
    assert world.show(rule).state == "stuck"
    world.change("TAGGED-DISK", attributes={"pool": "fast"})
    world.evaluate()
    world.move()
    assert world.show(rule).state == "ok"
    assert world.show(rule).reasons == []
    world.check()


def test_nothing_is_due_when_everything_is_as_wished(world: World) -> None:
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset)
    world.rule(dataset, "DESY-DISK")
    assert world.evaluate() == 0


def test_a_rule_that_waits_for_nothing_is_counted_anew(world: World, clock: HandClock) -> None:
    """Whatever made a counter wrong: all copies are there and nothing is on its way: no rule waits for ever."""
    dataset = world.collection("counted wrongly")
    world.files(3, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    with world.db.write() as s:
        s.execute(tables.locks.update().values(files_available=-2, files_stuck=1, bytes_total=7))
    world.move()
    assert world.show(rule).state != "ok"
    clock.turn(minutes=16)
    world.evaluate()
    assert world.show(rule).state == "ok"
    world.check()


@pytest.mark.parametrize("db", ["postgresql"], indirect=True)  # SQLite has no limit for a statement
def test_a_rule_that_takes_too_long_does_not_hold_up_the_others(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = (world.rule(did, "HZDR-DISK") for did in world.files(2, "DESY-DISK"))
    with world.db.write() as s:
        s.execute(tables.rules.update().values(evaluate_at=s.now))
    original, seen = evaluation._evaluate, []

    def evaluate(s: Session, rule: sa.Row[Any], limit_files: int) -> int:
        seen.append(rule.id)
        if rule.id == slow.id:
            s.connection.exec_driver_sql("SET LOCAL statement_timeout = '20ms'")
            s.connection.exec_driver_sql("SELECT pg_sleep(5)")
        return original(s, rule, limit_files)

    monkeypatch.setattr(evaluation, "_evaluate", evaluate)
    world.evaluate()
    assert seen == [slow.id, quick.id]
    assert [reason.code for reason in world.show(slow).reasons] == ["evaluation_failed"]
