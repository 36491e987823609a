"""For every unit that is not satisfied: why, since when, what happens next, and what a person can do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import endpoints, quotas, replicas, rule_changes, rules, traffic
from replica.db import tables
from replica.db.engine import Database
from tests.conftest import HandClock, Statements
from tests.replica.catalog.world import ROOT, World, checksums, done, failed, size_of

COUNT = Callable[[Database], AbstractContextManager[Statements]]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    world = World(db)
    world.three()
    return world


def dataset_of(world: World, files: int, name: str = "d", size: int | None = None) -> str:
    dataset = world.collection(name)
    world.files(files, "DESY-DISK", dataset, size=size)
    return dataset


def waiting(world: World, rule: wire.Rule) -> list[wire.Waiting]:
    explained = world.explain(rule)
    missing = explained.rule.locks_replicating + explained.rule.locks_stuck
    assert sum(w.files for w in explained.waiting if w.endpoint is not None) == missing, (
        "every copy of a file is in one"
    )
    for each in explained.waiting:
        assert each.message and each.next and each.since is not None
    return explained.waiting


def test_each_kind_of_waiting_is_told_apart_and_no_file_is_left_out(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world, 6)
    before = world.rule(dataset_of(world, 4, "before"), "GSI-DISK", priority=5)
    rule = world.rule(dataset, "GSI-DISK")
    (only,) = waiting(world, rule)
    assert (only.what, only.files, only.ahead, only.units) == ("queued", 6, 4, ["t:d"])
    assert "4 transfers go before it" in only.message
    orders = world.claim("GSI", limit=8).orders
    mine = orders[4:]
    world.report("GSI", [done(o) for o in orders[:4]])
    assert world.show(before).state == "ok"
    world.report(
        "GSI",
        [failed(mine[0], "timed_out"), failed(mine[1], "no_space"), failed(mine[2], "target_exists")],
    )
    found = {(w.what, w.code): w for w in waiting(world, rule)}
    assert set(found) == {
        ("moving", ""),
        ("queued", ""),
        ("retrying", "timed_out"),
        ("retrying", "no_space"),
        ("stuck", ""),
    }
    assert found["queued", ""].files == 2 and found["queued", ""].ahead == 0
    full = found["retrying", "no_space"]
    assert "1 attempt" in full.message and "free space" in full.hint and full.next_at is not None
    stuck = found["stuck", ""]
    assert "target_exists happened" in stuck.message and "what a person must decide" in stuck.hint
    assert stuck.next_at == clock.now + timedelta(seconds=60)
    world.change("GSI-DISK", writable=False)
    off = [w for w in waiting(world, rule) if w.what == "held"]
    assert off and all("writing is off at GSI-DISK" in w.message and "unban" in w.hint for w in off)


def test_copies_without_a_place_and_without_a_source_say_so(world: World) -> None:
    world.endpoint("KIT-DISK", capacity=10)
    box = world.collection("box", "container")
    for i in range(3):
        world.attach(box, dataset_of(world, 2, f"d{i}", size=100))
    rule = world.rule(box, "KIT-DISK|GSI-DISK", copies=2, source_expression="HZDR-DISK")
    explained = world.explain(rule)
    unplaced = [w for w in explained.waiting if w.what == "unplaced"]
    assert [(w.files, w.bytes, w.units) for w in unplaced] == [(6, 600, ["t:d0", "t:d1", "t:d2"])]
    assert unplaced[0].code == "no_space" and "KIT-DISK: 1" in unplaced[0].message and "free space" in unplaced[0].hint
    world.claim("GSI")
    (held,) = [w for w in waiting(world, rule) if w.endpoint == "GSI-DISK"]
    assert (held.what, held.code, held.files) == ("held", "no_source", 6) and "register" in held.hint


def test_what_is_not_wished_any_more_is_told_as_kept_and_is_no_copy(world: World) -> None:
    rule = world.rule(dataset_of(world, 3), "HZDR-DISK")
    world.move()
    with world.db.write() as s:
        rule_changes.change_wish(s, rule.id, expression="GSI-DISK")
    explained = world.explain(rule)
    assert [(lock.endpoint, lock.surplus) for lock in explained.locks] == [("GSI-DISK", False), ("HZDR-DISK", True)]
    assert "1 copy of a unit at HZDR-DISK (3 files there) is not wished any more, and is kept until" in " ".join(
        explained.sentences
    )
    assert [(w.endpoint, w.files) for w in waiting(world, rule)] == [("GSI-DISK", 3)]
    world.move()
    world.evaluate()
    assert [lock.endpoint for lock in world.explain(rule).locks] == ["GSI-DISK"]


def test_a_drained_target_says_where_its_copies_go_or_why_they_stay(world: World) -> None:
    free = world.rule(dataset_of(world, 2), "HZDR-DISK|GSI-DISK")
    target = next(lock.endpoint for lock in world.explain(free).locks)
    bound = world.rule("t:d", target)
    world.move()
    with world.db.write() as s:
        endpoints.drain(s, target, wire.Drain(reason="it is old"))
    world.evaluate()
    told = " ".join(world.explain(free).sentences)
    assert f"{target}: what the rule had there was brought elsewhere" in told
    assert f"at {target} (2 files there) is not wished any more" in told
    assert f"{target}: it is being drained, but its copies stay" in " ".join(world.explain(bound).sentences)
    assert "widen the rule's expression" in " ".join(world.explain(bound).sentences)


def test_a_path_that_another_file_has_holds_up_one_file_and_says_so(world: World) -> None:
    other = wire.NewReplica(did="t:c", size=size_of("t:c"), checksums=checksums("t:c"), path="t/a")
    with world.db.write() as s:
        replicas.register(s, ROOT, wire.Registration(endpoint="GSI-DISK", replicas=[other]))
    world.register(["t:a", "t:b"], "DESY-DISK", world.collection("d"))
    rule = world.rule("t:d", "GSI-DISK")
    world.claim("GSI")
    (held,) = [w for w in waiting(world, rule) if w.code == "path_taken"]
    assert (held.what, held.files) == ("held", 1) and "its path at GSI-DISK is that of t:c" in held.message
    assert "register one of them under another path" in held.hint and held.next_at is not None
    assert "its path at GSI-DISK is that of t:c" in " ".join(world.explain(rule).sentences)


def test_a_quota_that_is_short_says_by_how_much(world: World) -> None:
    with world.db.write() as s:
        quotas.put(s, ROOT, wire.NewQuota(account="root", expression="GSI-DISK", limit_bytes=1_500))
    rule = world.rule(dataset_of(world, 2, size=1_000), "GSI-DISK")
    (short,) = waiting(world, rule)
    assert (short.what, short.code, short.files) == ("unplaced", "over_quota", 2)
    assert "GSI-DISK: quota 500 B short" in short.message and "more quota" in short.hint
    assert "GSI-DISK: quota 500 B short" in " ".join(world.explain(rule).sentences)


def test_explaining_costs_the_same_statements_for_10_and_for_2000_files(world: World, count_statements: COUNT) -> None:
    counts = []
    for size in (10, 2_000):
        rule = world.rule(dataset_of(world, size, f"d{size}"), "GSI-DISK|HZDR-DISK", copies=2)
        with count_statements(world.db) as statements:
            explained = world.explain(rule)
        assert sum(w.files for w in explained.waiting) == 2 * size and len(explained.waiting) == 2
        counts.append(statements.count)
    assert counts[0] == counts[1] <= 30


# --- when it will be done -------------------------------------------------------------------------------------------


def show(world: World, rule: wire.Rule) -> wire.Rule:
    with world.db.read() as s:
        return rules.show(s, rule.id)


def test_what_goes_over_a_link_is_counted_in_periods_with_the_reports(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world, 5, size=1_000)
    rule = world.rule(dataset, "GSI-DISK")
    orders = world.claim("GSI").orders
    assert show(world, rule).eta is None and "not known" in show(world, rule).eta_note
    clock.turn(seconds=10)
    world.report("GSI", [done(o, seconds=4.0) for o in orders[:2]] + [failed(orders[2], "timed_out")])
    world.report("GSI", [wire.Outcome(transfer=orders[3].transfer, epoch=orders[3].epoch, outcome="given_back")])
    clock.turn(seconds=600)
    world.report("GSI", [done(orders[4], seconds=1.0)])
    with world.db.read() as s:
        rows = s.execute(sa.select(tables.traffic).order_by(tables.traffic.c.since)).all()
    assert [(r.files, r.bytes, r.seconds, r.failures) for r in rows] == [(2, 2_000, 8.0, 1), (1, 1_000, 1.0, 0)]
    shown = show(world, rule)
    assert shown.eta is not None and shown.eta.likely is not None and shown.eta.pessimistic is not None
    assert clock.now < shown.eta.optimistic <= shown.eta.likely <= shown.eta.pessimistic
    assert shown.eta.optimistic == clock.now + timedelta(seconds=2), "two files, as fast as the fastest period"
    assert "it is done at about" in " ".join(world.explain(rule).sentences)
    assert world.show(rule).eta is None, "only who asks for one rule pays for it"
    with world.db.write() as s:
        assert traffic.forget_old(s) == 0
    clock.turn(days=100)
    with world.db.write() as s:
        assert traffic.forget_old(s) == 2


def test_what_time_alone_does_not_mend_has_no_forecast_but_a_reason(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world, 1)
    asked = world.rule(dataset, "GSI-DISK", ask_approval=True)
    later = world.rule(dataset, "GSI-DISK", not_before=clock.now + timedelta(days=1))
    there = world.rule(dataset, "DESY-DISK")
    assert "approve" in show(world, asked).eta_note
    assert show(world, later).eta_note.startswith("it begins at 2026-01-02")
    assert (show(world, there).eta, show(world, there).eta_note) == (None, "")
