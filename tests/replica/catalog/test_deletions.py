"""Deletion in the catalogue: what goes, what stays whatever happens, and how it is taken back."""

from __future__ import annotations

import itertools
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import deletions, removable, removals
from replica.catalog.bulk import rows_of
from replica.catalog.provision import PAIR
from replica.db import tables
from replica.db.engine import Database
from replica.db.tables import replicas
from rules.deletion import AT_ONCE, FAILED_SECONDS, LEFTOVER_SECONDS, Delete, Facts, Why, decide
from rules.errors import NotFound, Refused
from rules.states import DidKind, Evidence, ReplicaState, TransferState
from rules.transfers import RetryPolicy
from tests.conftest import HandClock
from tests.replica.catalog.cleaning import CleanWorld, not_removed, removed
from tests.replica.catalog.world import done


@pytest.fixture
def world(db: Database, clock: HandClock) -> CleanWorld:
    made = CleanWorld(db)
    made.three()
    return made


def two_copies(world: CleanWorld, count: int = 3, *, size: int | None = None) -> list[str]:
    """At DESY-DISK and HZDR-DISK; DESY-DISK's were let go, and nothing is kept there that nobody wants."""
    names = world.files(count, "DESY-DISK", size=size)
    world.register(names, "HZDR-DISK", size=size)
    world.released(names, "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    return names


# --- the whole way ---


def test_what_nobody_protects_goes_when_another_copy_is_good(world: CleanWorld) -> None:
    names = two_copies(world)
    used = world.used("DESY-DISK")
    assert world.clean("DESY-DISK").files == 3
    assert world.where(names[0]) == {"DESY-DISK": "deleting", "HZDR-DISK": "available"}
    assert {d.why for d in world.deletions()} == {"purge"}
    orders = world.take("DESY").orders
    assert {(o.did, o.path, o.url) for o in orders} == {
        (n, n.replace(":", "/"), "file:///data/DESY-DISK") for n in names
    }
    assert used > 0
    world.check()
    answer = world.tell("DESY", *map(removed, orders))
    assert (answer.accepted, answer.stale) == (3, [])
    assert world.where(names[0]) == {"HZDR-DISK": "available"}
    assert world.used("DESY-DISK") == 0
    assert {d.state for d in world.deletions()} == {"done"}
    world.check()
    assert world.clean("DESY-DISK").files == 0


def test_a_rule_that_ends_lets_its_copies_go_and_another_rule_keeps_its_own(world: CleanWorld) -> None:
    dataset = world.collection("d")
    names = world.files(4, "DESY-DISK", dataset)
    kept = world.rule(dataset, "DESY-DISK")
    ended = world.rule(dataset, "HZDR-DISK")
    world.move()
    for name in ("DESY-DISK", "HZDR-DISK"):
        world.set_endpoint(name, delete_at_once=True)
    assert world.clean("HZDR-DISK").files == 0
    world.delete(ended)
    assert world.clean("DESY-DISK").files == 0
    assert world.clean("HZDR-DISK").files == 4
    assert world.remove("HZDR") == 4
    assert world.where(names[0]) == {"DESY-DISK": "available"}
    world.delete(kept)
    assert world.clean("DESY-DISK").kept == {"last_copy": 4}
    world.check()


def test_statements_do_not_grow_with_the_number_of_files(world: CleanWorld, count_statements: Any) -> None:
    needed: list[tuple[int, ...]] = []
    for count in (2, 300):
        two_copies(world, count)
        with count_statements(world.db) as deciding:
            assert world.clean("DESY-DISK").files == count
        with count_statements(world.db) as claiming:
            orders = world.take("DESY").orders
        with count_statements(world.db) as reporting:
            assert world.tell("DESY", *map(removed, orders)).accepted == count
        needed.append((deciding.count, claiming.count, reporting.count))
    assert needed[0] == needed[1]
    if world.db.engine.dialect.name == "postgresql":
        decided, claimed, reported = needed[0]
        assert decided <= 14
        assert claimed <= 11
        assert reported <= 13


# --- SQL and rules say the same ---


def test_sql_decides_as_the_rules_do(world: CleanWorld, clock: HandClock) -> None:
    """Every combination of a few facts, made real, and judged by both."""
    world.endpoint("KIT-DISK")
    now = clock.now
    since = {"never": None, "long ago": now - timedelta(days=2), "now": now, "later": now + timedelta(seconds=1)}
    since["at once"] = AT_ONCE
    dice = itertools.count()
    expected: dict[int, Facts] = {}
    states = [s for s in ReplicaState if s is not ReplicaState.DELETING]
    combinations = list(
        itertools.product(
            states, since, ("none", "good", "bad", "deaf", "declared"), ("", "locked", "to", "from", "lone")
        )
    )
    names = world.files(len(combinations), "DESY-DISK", size=1)
    world.change("KIT-DISK", readable=False)
    ids = {name: world.file_id(name) for name in names[:1]}
    first = ids[names[0]]
    where = {n: world.endpoint_id(n) for n in ("DESY-DISK", "HZDR-DISK", "GSI-DISK", "KIT-DISK")}
    rows: list[dict[str, object]] = []
    ways: list[dict[str, object]] = []
    with world.db.write() as s:
        ids = {f"t:{r.name}": r.id for r in s.execute(sa.select(tables.dids).where(tables.dids.c.kind == DidKind.FILE))}
        site = s.execute(sa.select(tables.endpoints.c.site_id).limit(1)).scalar_one()
        account = s.execute(sa.select(tables.accounts.c.id).limit(1)).scalar_one()
        rule = s.execute(
            tables.rules.insert()
            .values(
                did_id=first, account_id=account, copies=1, expression="DESY-DISK", grouping=1, spread="endpoint",
                priority=3, activity="a", state=1, created_at=s.now, updated_at=s.now,
            )
            .returning(tables.rules.c.id)
        ).scalar_one()  # fmt: skip
        for name, (state, age, other, doing) in zip(names, combinations, strict=True):
            file_id, odd = ids[name], next(dice) % 3
            declared = odd == 0 and state is ReplicaState.COPYING
            evidence = Evidence.DECLARED if declared else None if state is ReplicaState.COPYING else Evidence.HASHED
            s.execute(
                replicas.update()
                .where(replicas.c.file_id == file_id)
                .values(state=state, tombstone_at=since[age], evidence=evidence)
            )
            at, how, proof = {
                "none": (None, None, None),
                "good": ("HZDR-DISK", ReplicaState.AVAILABLE, Evidence.COPIED),
                "bad": ("HZDR-DISK", ReplicaState.BAD, Evidence.COPIED),
                "deaf": ("KIT-DISK", ReplicaState.AVAILABLE, Evidence.COPIED),
                "declared": ("HZDR-DISK", ReplicaState.COPYING, Evidence.DECLARED),
            }[other]
            if at:
                rows.append({"file_id": file_id, "endpoint_id": where[at], "state": how, "evidence": proof})
            if odd == 1 and doing == "":
                s.execute(tables.dids.update().where(tables.dids.c.id == file_id).values(deleted_at=now))
            if doing == "locked":
                s.execute(tables.locks.insert().values(rule_id=rule, unit_id=file_id, endpoint_id=where["DESY-DISK"]))
            elif doing:
                target = "DESY-DISK" if doing == "to" else "GSI-DISK"
                going = TransferState.MOVING if doing == "from" else TransferState.QUEUED
                ways.append(
                    {
                        "file_id": file_id, "target_id": where[target], "site_id": site, "state": going, "priority": 3,
                        "activity": "a", "size_bytes": 1, "created_at": s.now,
                    }
                )  # fmt: skip
            expected[file_id] = Facts(
                state=state,
                declared=declared,
                locked=doing == "locked",
                arriving=doing == "to",
                being_read=doing == "from",
                good_elsewhere=other == "good",
                last_source=doing in ("from", "lone") and other != "good",
                forgotten=odd == 1 and doing == "",
                released_at=since[age],
            )
        s.execute(replicas.insert(), rows)
        s.execute(tables.transfers.insert(), ways)
    with world.db.read() as s:
        pairs = rows_of(s, "all", PAIR, [(f, where["DESY-DISK"]) for f in sorted(expected)])
        for why in (None, *Why):
            query = sa.select(replicas.c.file_id, removable.verdict(now, why).label("verdict")).join(
                pairs, sa.and_(pairs.c.file_id == replicas.c.file_id, pairs.c.endpoint_id == replicas.c.endpoint_id)
            )
            for row in s.execute(query):
                answer = decide(expected[row.file_id], why, now)
                said = answer.why.value if isinstance(answer, Delete) else answer.reason
                assert row.verdict == said, (why, expected[row.file_id])


# --- how much goes ---


def test_no_more_goes_than_room_is_needed_the_longest_unprotected_first(world: CleanWorld, clock: HandClock) -> None:
    names = world.files(10, "DESY-DISK", size=10)
    world.register(names, "HZDR-DISK", size=10)
    for i, name in enumerate(names):
        world.released([name], "DESY-DISK", seconds_ago=1000 - i)
    same = names[3:6]
    world.released(same, "DESY-DISK", seconds_ago=997)
    world.set_replica(same[0], "DESY-DISK", accessed_at=clock.now)
    world.set_endpoint("DESY-DISK", capacity_bytes=120, min_free_bytes=20)
    assert world.clean("DESY-DISK").files == 0
    world.set_endpoint("DESY-DISK", min_free_bytes=65)
    decided = world.clean("DESY-DISK")
    assert (decided.files, decided.bytes, decided.reached) == (5, 50, None)
    # What is going already is counted as free, so that a second pass finds nothing to do.
    assert world.clean("DESY-DISK").files == 0
    assert [d.did for d in world.deletions()] == [*names[:3], *same[1:]]
    assert {d.why for d in world.deletions()} == {"space"}
    assert world.remove("DESY") == 5
    assert world.clean("DESY-DISK").files == 0
    world.check()


def test_a_budget_holds_for_an_hour_and_for_several_passes(world: CleanWorld, clock: HandClock) -> None:
    two_copies(world, 10)
    world.set_endpoint("DESY-DISK", budget_files=4)
    assert [world.clean("DESY-DISK").files for _ in range(3)] == [4, 0, 0]
    world.undo(world.deletions()[0].id)
    assert world.clean("DESY-DISK").files == 1
    with pytest.raises(Refused, match="used up"):
        world.ask(world.deletions()[0].did, "DESY-DISK")
    clock.turn(seconds=3601)
    assert world.clean("DESY-DISK").files == 4


def test_a_purging_rule_and_a_draining_endpoint_need_no_lack_of_room(world: CleanWorld) -> None:
    names = world.files(3, "DESY-DISK")
    world.register(names, "HZDR-DISK")
    world.released(names[:2], "DESY-DISK")
    world.set_replica(names[0], "DESY-DISK", tombstone_at=AT_ONCE)
    assert world.clean("DESY-DISK").files == 1
    world.set_endpoint("DESY-DISK", draining=True)
    decided = world.clean("DESY-DISK")
    assert decided.files == 1
    assert {d.did: d.why for d in world.deletions()} == {names[0]: "purge", names[1]: "drained"}
    # What never was under a rule is nobody's to choose.
    assert world.where(names[2])["DESY-DISK"] == "available"


def test_an_endpoint_that_is_not_deletable_keeps_all(world: CleanWorld) -> None:
    names = two_copies(world)
    world.change("DESY-DISK", deletable=False)
    assert world.clean("DESY-DISK").files == 0
    with world.db.read() as s:
        assert deletions.endpoints_to_look_at(s) == []
    with pytest.raises(Refused, match="deleting is off"):
        world.ask(names[0], "DESY-DISK")
    world.change("DESY-DISK", deletable=True)
    assert world.clean("DESY-DISK").files == 3
    world.change("DESY-DISK", deletable=False)
    assert world.take("DESY").orders == []


def test_a_look_goes_on_where_the_last_one_ended(world: CleanWorld) -> None:
    """Copies that must stay do not hide those behind them."""
    lonely = world.files(5, "DESY-DISK")
    world.released(lonely, "DESY-DISK", seconds_ago=100)
    two_copies(world, 4)
    first = world.clean("DESY-DISK", limit=3)
    assert (first.files, first.kept) == (0, {"last_copy": 3})
    second = world.clean("DESY-DISK", after=first.reached, limit=3)
    assert second.files == 1
    third = world.clean("DESY-DISK", after=second.reached, limit=3)
    assert third.files == 3
    assert world.clean("DESY-DISK", after=third.reached, limit=3) == deletions.Decided()


def test_what_a_stopped_transfer_left_is_cleared_away_later(world: CleanWorld, clock: HandClock) -> None:
    dataset = world.collection("d")
    names = world.files(2, "DESY-DISK", dataset)
    rule = world.rule(dataset, "HZDR-DISK")
    world.claim("HZDR")
    world.delete(rule)
    assert world.where(names[0])["HZDR-DISK"] == "copying"
    assert world.used("HZDR-DISK") > 0
    assert world.clean("HZDR-DISK").files == 0
    clock.turn(seconds=LEFTOVER_SECONDS)
    with world.db.read() as s:
        assert deletions.endpoints_to_look_at(s) == [world.endpoint_id("HZDR-DISK")]
    assert world.clean("HZDR-DISK").files == 2
    assert {d.why for d in world.deletions()} == {"leftover"}
    assert world.remove("HZDR") == 2
    assert world.used("HZDR-DISK") == 0
    world.check()


# --- by hand ---


def test_a_person_may_ask_within_the_same_guards(world: CleanWorld) -> None:
    names = world.files(2, "DESY-DISK")
    world.register(names[:1], "HZDR-DISK")
    with pytest.raises(NotFound, match="no replica at GSI-DISK"):
        world.ask(names[0], "GSI-DISK")
    with pytest.raises(Refused, match="no other good copy"):
        world.ask(names[1], "DESY-DISK")
    asked = world.ask(names[0], "DESY-DISK")
    assert (asked.state, asked.why, asked.account, asked.generation) == ("queued", "asked", "root", 1)
    with pytest.raises(Refused, match="already"):
        world.ask(names[0], "DESY-DISK")
    with pytest.raises(Refused, match="no other good copy"):  # the other one is going
        world.ask(names[0], "HZDR-DISK")
    last = world.ask(names[1], "DESY-DISK", last_copy=True)
    assert last.why == "asked_last"
    assert world.remove("DESY") == 2
    assert world.where(names[1]) == {}
    rule = world.rule(names[0], "HZDR-DISK")
    with pytest.raises(Refused, match="a rule protects it"):
        world.ask(names[0], "HZDR-DISK", last_copy=True)
    world.delete(rule)
    world.check()


def test_a_copy_that_is_read_from_or_is_the_last_source_stays(world: CleanWorld) -> None:
    (name,) = world.files(1, "DESY-DISK")
    world.rule(name, "GSI-DISK")
    with pytest.raises(Refused, match=r"no other copy to read from|no other good copy"):
        world.ask(name, "DESY-DISK", last_copy=True)
    world.register([name], "HZDR-DISK")
    orders = world.claim("GSI").orders
    with pytest.raises(Refused, match="copying the file"):
        world.ask(name, "DESY-DISK")
    world.report("GSI", [done(o) for o in orders])
    world.ask(name, "DESY-DISK")
    world.check()


def test_a_link_that_is_closed_makes_another_copy_no_source(world: CleanWorld) -> None:
    (name,) = world.files(1, "DESY-DISK")
    world.register([name], "HZDR-DISK")
    world.rule(name, "GSI-DISK")
    with world.db.write() as s:
        s.execute(
            tables.links.insert().values(
                source_id=world.endpoint_id("HZDR-DISK"), target_id=world.endpoint_id("GSI-DISK"), allowed=False
            )
        )
    with pytest.raises(Refused, match="no other copy to read from"):
        world.ask(name, "DESY-DISK")
    world.ask(name, "HZDR-DISK")


# --- second thoughts ---


def test_within_its_grace_a_deletion_is_given_to_nobody_and_can_be_undone(world: CleanWorld, clock: HandClock) -> None:
    names = two_copies(world, 2)
    world.set_endpoint("DESY-DISK", grace_seconds=600)
    world.clean("DESY-DISK")
    assert world.take("DESY").orders == []
    undone, other = world.deletions()
    assert world.undo(undone.id).state == "undone"
    assert world.where(names[0])["DESY-DISK"] == "available"
    # Nobody chooses it again by itself.
    assert world.clean("DESY-DISK").files == 0
    clock.turn(seconds=600)
    (order,) = world.take("DESY").orders
    assert order.deletion == other.id
    with pytest.raises(Refused, match="under way"):
        world.undo(other.id)
    world.tell("DESY", removed(order))
    with pytest.raises(Refused, match="has ended"):
        world.undo(other.id)
    with pytest.raises(NotFound):
        world.undo(99)
    world.check()


def test_an_undo_gives_back_what_was_and_not_what_is_better(world: CleanWorld) -> None:
    names = two_copies(world, 3)
    for name, state in zip(names, (ReplicaState.BAD, ReplicaState.UNAVAILABLE, ReplicaState.AVAILABLE), strict=True):
        world.set_replica(name, "DESY-DISK", state=state)
    world.clean("DESY-DISK")
    for deletion in world.deletions():
        world.undo(deletion.id)
    assert [world.where(n)["DESY-DISK"] for n in names] == ["bad", "unavailable", "available"]


def test_a_new_rule_takes_back_what_no_worker_has_begun(world: CleanWorld) -> None:
    dataset = world.collection("d")
    names = world.files(3, "HZDR-DISK", dataset)
    world.register(names, "DESY-DISK")
    world.released(names, "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    world.clean("DESY-DISK")
    rule = world.rule(dataset, "DESY-DISK")
    assert (rule.state, rule.locks_ok) == ("ok", 3)
    assert {d.state for d in world.deletions()} == {"undone"}
    assert world.row(names[0], "DESY-DISK").tombstone_at is None
    assert world.transfers() == []
    world.check()
    assert world.clean("DESY-DISK").files == 0


def test_a_file_attached_to_a_ruled_dataset_survives_a_pass_that_runs_before_any_other_worker(
    world: CleanWorld,
) -> None:
    """Before the pass, between the decision and the order, or after the order: protected from that moment on."""
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset)
    rule = world.rule(dataset, "DESY-DISK")
    before, between, after = two_copies(world, 3)
    world.attach(dataset, before)
    assert world.clean("DESY-DISK").files == 2
    assert world.where(before)["DESY-DISK"] == "available"
    world.attach(dataset, between)
    assert world.where(between)["DESY-DISK"] == "available"
    (order,) = world.take("DESY").orders
    assert order.did == after
    world.attach(dataset, after)
    world.check()
    assert (world.show(rule).state, world.show(rule).locks_ok) == ("replicating", 3)
    assert world.claim("DESY").orders == []
    (waiting,) = world.transfers()
    assert "being deleted" in (waiting.reason or "")
    world.check()
    world.tell("DESY", removed(order))
    row = world.row(after, "DESY-DISK")
    assert (row.state, row.generation, row.tombstone_at) == (ReplicaState.COPYING, 2, None)
    world.check()
    assert world.move("DESY") == 1
    assert world.show(rule).state == "ok"
    world.check()


def test_two_rules_that_share_what_was_to_go_both_count_it_again(world: CleanWorld) -> None:
    first, second = world.collection("a"), world.collection("b")
    names = two_copies(world, 4)
    world.attach(first, *names[:3])
    world.attach(second, *names[1:])
    world.clean("DESY-DISK")
    rules = [world.rule(did, "DESY-DISK") for did in (first, second)]
    world.evaluate()
    assert [(world.show(r).state, world.show(r).locks_ok) for r in rules] == [("ok", 3), ("ok", 3)]
    world.check()


def test_a_copy_that_has_become_the_last_is_kept_when_its_order_is_due(world: CleanWorld, clock: HandClock) -> None:
    names = two_copies(world, 2)
    world.set_endpoint("DESY-DISK", grace_seconds=3600)
    world.clean("DESY-DISK")
    world.set_replica(names[0], "HZDR-DISK", state=ReplicaState.BAD)
    clock.turn(seconds=3600)
    assert [o.did for o in world.take("DESY").orders] == [names[1]]
    assert world.where(names[0]) == {"DESY-DISK": "available", "HZDR-DISK": "bad"}
    assert "last good copy" in (world.deletions(state="undone")[0].reason or "")
    world.check()


# --- what workers say ---


def test_an_outcome_counts_once_and_only_with_its_epoch(world: CleanWorld, clock: HandClock) -> None:
    """ABA: a worker that was thought dead comes back when the file is there anew."""
    dataset = world.collection("d")
    names = world.files(1, "HZDR-DISK", dataset)
    world.register(names, "DESY-DISK")
    world.released(names, "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    world.clean("DESY-DISK")
    (late,) = world.take("DESY", worker="late").orders
    clock.turn(seconds=121)
    with world.db.write() as s:
        assert removals.expire_leases(s) == 1
    (order,) = world.take("DESY", worker="new").orders
    assert (order.deletion, order.epoch) == (late.deletion, late.epoch + 1)
    assert world.tell("DESY", removed(late)).stale == [late.deletion]
    assert world.tell("HZDR", removed(order)).stale == [order.deletion]
    assert world.tell("DESY", removed(order)).accepted == 1
    assert world.tell("DESY", removed(order)).stale == [order.deletion]
    rule = world.rule(dataset, "DESY-DISK")
    world.move("DESY")
    assert world.show(rule).state == "ok"
    assert world.row(names[0], "DESY-DISK").generation == 2
    assert world.tell("DESY", removed(late)).stale == [late.deletion]
    assert world.where(names[0])["DESY-DISK"] == "available"
    world.check()


def test_heartbeats_keep_a_lease_and_say_what_is_lost(world: CleanWorld, clock: HandClock) -> None:
    two_copies(world, 2)
    world.clean("DESY-DISK")
    kept, lost = world.take("DESY").orders
    clock.turn(seconds=100)
    assert world.beat("DESY", wire.DeletionBeat(deletion=kept.deletion, epoch=kept.epoch)).stop == []
    clock.turn(seconds=100)
    with world.db.write() as s:
        assert removals.expire_leases(s) == 1
    beats = [wire.DeletionBeat(deletion=o.deletion, epoch=o.epoch) for o in (kept, lost)]
    assert world.beat("DESY", *beats).stop == [lost.deletion]
    assert world.beat("HZDR", *beats).stop == [kept.deletion, lost.deletion]
    assert [o.deletion for o in world.take("DESY").orders] == [lost.deletion]


def test_failures_are_tried_again_by_class_and_nothing_is_stuck_for_ever(world: CleanWorld, clock: HandClock) -> None:
    names = two_copies(world, 2)
    world.clean("DESY-DISK")
    for_now, for_good = world.take("DESY").orders
    world.tell("DESY", not_removed(for_now, "unreachable"), not_removed(for_good, "refused"))
    waiting, failed = world.deletions()
    assert (waiting.state, failed.state) == ("queued", "failed")
    assert waiting.not_before is not None
    assert waiting.not_before > clock.now
    assert "refused happened" in (failed.reason or "")
    assert world.where(names[1])["DESY-DISK"] == "unavailable"
    assert world.take("DESY").orders == []
    world.check()
    policy = RetryPolicy(attempts_max=2)
    clock.turn(seconds=3600)
    (again,) = world.take("DESY").orders
    world.tell("DESY", not_removed(again, "unreachable"), policy=policy)
    assert [d.state for d in world.deletions()] == ["failed", "failed"]
    # Some hours later they are chosen again.
    assert world.clean("DESY-DISK").files == 0
    clock.turn(seconds=FAILED_SECONDS)
    assert world.clean("DESY-DISK").files == 2
    assert world.remove("DESY") == 2
    world.check()


def test_a_failed_deletion_that_a_rule_wants_again_is_looked_at_by_its_transfer(world: CleanWorld) -> None:
    dataset = world.collection("d")
    names = world.files(1, "HZDR-DISK", dataset)
    world.register(names, "DESY-DISK")
    world.released(names, "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    world.clean("DESY-DISK")
    (order,) = world.take("DESY").orders
    rule = world.rule(dataset, "DESY-DISK")
    assert world.claim("DESY").orders == []
    world.tell("DESY", not_removed(order, "forbidden"), policy=RetryPolicy(attempts_max=1))
    assert world.where(names[0])["DESY-DISK"] == "unavailable"
    world.check()
    assert world.move("DESY") == 1
    assert world.show(rule).state == "ok"
    world.check()


def test_a_lease_that_is_lost_again_and_again_fails(world: CleanWorld, clock: HandClock) -> None:
    names = two_copies(world, 1)
    world.clean("DESY-DISK")
    for _ in range(2):
        assert len(world.take("DESY").orders) == 1
        clock.turn(seconds=121)
        with world.db.write() as s:
            assert removals.expire_leases(s, RetryPolicy(attempts_max=2)) == 1
    assert [d.state for d in world.deletions()] == ["failed"]
    assert world.where(names[0])["DESY-DISK"] == "unavailable"
    world.check()


def test_a_file_whose_did_is_gone_for_good_loses_its_last_copy(world: CleanWorld, clock: HandClock) -> None:
    (name,) = world.files(1, "DESY-DISK")
    world.released([name], "DESY-DISK")
    world.set_replica(name, "DESY-DISK", tombstone_at=AT_ONCE)
    assert world.clean("DESY-DISK").kept == {"last_copy": 1}
    with world.db.write() as s:
        values = {"deleted_at": s.now, "final_at": s.now + timedelta(days=7)}
        s.execute(tables.dids.update().where(tables.dids.c.name == name[2:]).values(values))
    assert world.clean("DESY-DISK").kept == {"last_copy": 1}
    with world.db.write() as s:
        s.execute(tables.dids.update().where(tables.dids.c.name == name[2:]).values(final_at=None))
    assert world.clean("DESY-DISK").files == 1
    assert world.deletions()[0].why == "forgotten"
    assert world.remove("DESY") == 1


# --- what a worker had in hand ---


def kept_elsewhere(world: CleanWorld) -> tuple[str, str, wire.DeletionOrder]:
    """A dataset's file, also at DESY-DISK, where a worker has the order to remove it."""
    dataset = world.collection("d")
    (name,) = world.files(1, "HZDR-DISK", dataset)
    world.copied([name], "DESY-DISK")
    world.released([name], "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    world.clean("DESY-DISK")
    (order,) = world.take("DESY").orders
    return dataset, name, order


@pytest.mark.parametrize("back", ["rule", "undo", "last"])
def test_what_a_lost_worker_may_have_removed_is_not_taken_for_good(
    world: CleanWorld, clock: HandClock, back: str
) -> None:
    """Killed between the removal and its report: the bytes may be gone, whoever takes the deletion back."""
    dataset, name, order = kept_elsewhere(world)
    clock.turn(seconds=121)
    with world.db.write() as s:
        assert removals.expire_leases(s) == 1
    if back == "rule":
        rule = world.rule(dataset, "DESY-DISK")
        assert (rule.state, rule.locks_ok) == ("replicating", 0)
        assert world.where(name)["DESY-DISK"] == "unavailable"
        world.check()
        assert world.move("DESY") == 1
        assert world.show(rule).state == "ok"
    elif back == "undo":
        assert world.undo(order.deletion).state == "undone"
        assert world.where(name)["DESY-DISK"] == "unavailable"
    else:
        world.set_replica(name, "HZDR-DISK", state=ReplicaState.BAD)
        assert world.take("DESY").orders == []
        assert world.where(name)["DESY-DISK"] == "unavailable"
    world.check()


@pytest.mark.parametrize("end", ["given_back", "unreachable", "lost"])
def test_what_is_wanted_again_while_a_worker_has_it_never_waits_for_ever(
    world: CleanWorld, clock: HandClock, end: str
) -> None:
    """The rule waits for the end of the deletion, so a deletion that is not carried out must end, too."""
    dataset, name, order = kept_elsewhere(world)
    rule = world.rule(dataset, "DESY-DISK")
    assert world.claim("DESY").orders == []
    if end == "lost":
        clock.turn(seconds=121)
        with world.db.write() as s:
            assert removals.expire_leases(s) == 1
    elif end == "unreachable":
        world.tell("DESY", not_removed(order, end))
    else:
        world.tell("DESY", wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome="given_back"))
    (deletion,) = world.deletions()
    assert (deletion.state, world.where(name)["DESY-DISK"]) == ("undone", "unavailable")
    assert "wants it again" in (deletion.reason or "")
    world.check()
    assert world.move("DESY") == 1
    assert world.show(rule).state == "ok"
    world.check()
