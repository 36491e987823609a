"""What was looked up changes before it is held, and what is given up comes back: nothing is lost or counted wrongly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import deletions, did_deletion, dids, endpoints, guards, rule_changes, rules, scopes, totals
from replica.db import tables as t
from replica.db.engine import Database, Session
from replica.db.tables import EPOCH
from rules.deletion import LEFTOVER_SECONDS
from rules.errors import Conflict, NotFound, ReplicaError
from rules.names import Did
from tests.conftest import HandClock
from tests.replica.catalog.cleaning import CleanWorld
from tests.replica.catalog.world import ROOT, failed

WAITING = sa.text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@pytest.fixture
def world(db: Database, clock: HandClock) -> CleanWorld:
    made = CleanWorld(db)
    made.three()
    return made


@pytest.fixture
def at_once(postgresql_url: str) -> Iterator[CleanWorld]:
    """On PostgreSQL, where transactions meet."""
    db = Database(postgresql_url)
    made = CleanWorld(db)
    made.three()
    yield made
    db.close()


def behind(
    world: CleanWorld,
    first: Callable[[Session], object],
    second: Callable[[], object],
    then: Callable[[Session], object] = lambda s: None,
) -> object:
    """What becomes of `second`, which has looked before `first` is committed, and then waits for it.

    `then`: what the first one still does while the second waits.
    """
    with ThreadPoolExecutor(1) as thread:
        with world.db.write() as s:
            first(s)
            future = thread.submit(second)
            with world.db.engine.connect() as looking:
                while not future.done():
                    if looking.execute(WAITING).scalar_one():
                        break
                    looking.rollback()
                    time.sleep(0.005)
            assert not future.done(), "it did not wait"
            then(s)
        return future.exception() or future.result()


# --- two at the same moment ---


def test_what_is_deleted_at_this_moment_is_attached_nowhere_and_takes_nothing_in(at_once: CleanWorld) -> None:
    dataset = at_once.collection("d")
    names = at_once.files(2, "DESY-DISK")

    def gone(name: str) -> Callable[[Session], object]:
        return lambda s: did_deletion.delete(s, [Did.parse(name)], ROOT)

    assert isinstance(behind(at_once, gone(names[0]), lambda: at_once.attach(dataset, *names)), Conflict)
    assert at_once.contents(dataset) == []
    assert isinstance(behind(at_once, gone(dataset), lambda: at_once.attach(dataset, names[1])), NotFound)
    assert isinstance(behind(at_once, gone(names[1]), lambda: at_once.rule(names[1], "HZDR-DISK")), NotFound)
    assert at_once.count(t.rules) == 0
    at_once.check()


def test_a_registration_that_begins_again_takes_nothing_for_new_that_others_made_meanwhile(
    at_once: CleanWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = at_once.collection("d")
    [known] = at_once.files(1, "DESY-DISK", size=7)
    hold_datasets = totals.hold_datasets
    with ThreadPoolExecutor(1) as thread:
        others: list[Future[None]] = []

        def hold_late(s: Session, batch: sa.FromClause) -> bool:
            """The first time: somebody registers what we have just made, and we must let go of it."""
            if not others:
                others.append(thread.submit(at_once.register, ["t:new"], "DESY-DISK", size=7))
                with at_once.db.engine.connect() as looking:
                    while not looking.execute(WAITING).scalar_one():
                        looking.rollback()
                        time.sleep(0.005)
                return False
            return True

        def after_them(*given: Any) -> None:
            for other in others:
                other.result()
            hold_datasets(*given)

        monkeypatch.setattr(totals, "hold_late", hold_late)
        monkeypatch.setattr(totals, "hold_datasets", after_them)
        at_once.register([known, "t:new"], "HZDR-DISK", dataset, size=7)
    assert at_once.contents(dataset) == [known, "t:new"]
    assert at_once.count(t.replicas) == 4
    assert at_once.count(t.replicas, t.replicas.c.file_id.not_in(sa.select(t.files.c.did_id))) == 0
    at_once.check()


def test_no_rule_counts_on_an_endpoint_that_goes_out_of_service_at_this_moment(at_once: CleanWorld) -> None:
    dataset = at_once.collection("d")
    names = at_once.files(2, "DESY-DISK", dataset)
    at_once.copied(names, "GSI-DISK")
    rule = at_once.rule(dataset, "GSI-DISK")

    def out_of_service(s: Session) -> None:
        rules.delete(s, rule.id)
        endpoints.decommission(s, "GSI-DISK", wire.Decommission(forget=True))

    late = behind(at_once, out_of_service, lambda: at_once.rule(dataset, "*"))
    assert isinstance(late, Conflict)
    assert at_once.rule(dataset, "*").state == "ok"
    assert at_once.count(t.locks, t.locks.c.endpoint_id == at_once.endpoint_id("GSI-DISK")) == 0
    at_once.check()


def test_who_ends_the_rule_of_what_is_gone_holds_no_endpoint_while_it_waits_for_the_rule(at_once: CleanWorld) -> None:
    dataset = at_once.collection("d")
    at_once.files(2, "DESY-DISK", dataset)
    rule = at_once.rule(dataset, "DESY-DISK")
    with at_once.db.write() as s:
        did_deletion.delete(s, [Did.parse(dataset)], ROOT, undo_seconds=0)

    def end() -> int:
        with at_once.db.write() as s:
            return did_deletion.finish_due(s)

    every = sa.select(t.endpoints.c.id)
    held = behind(at_once, lambda s: rules.hold(s, rule.id), end, lambda s: guards.change_endpoints(s, every))
    assert held == 1
    assert at_once.show(rule).state == "expired"
    at_once.check()


@pytest.mark.parametrize("first", ["deletion", "forgetting"])
def test_of_two_copies_one_is_not_deleted_while_the_other_is_forgotten(at_once: CleanWorld, first: str) -> None:
    names = at_once.files(2, "DESY-DISK")
    at_once.copied(names, "GSI-DISK")
    at_once.released(names, "DESY-DISK")
    at_once.set_endpoint("DESY-DISK", delete_at_once=True)
    desy = at_once.endpoint_id("DESY-DISK")

    def forget(s: Session) -> object:
        return endpoints.decommission(s, "GSI-DISK", wire.Decommission(forget=True))

    with at_once.db.write() as one:
        if first == "deletion":
            assert deletions.decide(one, desy).files == 2
            with pytest.raises(Conflict), at_once.db.write() as other:
                forget(other)
        else:
            forget(one)
            with at_once.db.write() as other:
                assert deletions.decide(other, desy).files == 0
    if first == "deletion":
        with pytest.raises(ReplicaError, match="no other good copy is known"), at_once.db.write() as s:
            forget(s)
    else:
        assert at_once.clean("DESY-DISK").kept == {"last_copy": 2}
    at_once.check()


# --- given up, and yet not over ---


def test_a_purge_leaves_time_to_who_is_still_writing_and_spares_nothing_else(
    world: CleanWorld, clock: HandClock
) -> None:
    dataset = world.collection("d")
    here, coming = world.files(2, "DESY-DISK", dataset)
    world.copied([here], "HZDR-DISK")
    rule = world.rule(dataset, "HZDR-DISK", purge=True)
    (order,) = world.claim("HZDR").orders
    assert order.did == coming
    world.released([here], "HZDR-DISK")  # as a rule that ended at the same time did
    world.delete(rule)
    assert world.row(here, "HZDR-DISK").tombstone_at == EPOCH
    assert world.row(coming, "HZDR-DISK").tombstone_at == clock.now
    assert world.clean("HZDR-DISK").files == 1, "the worker does not know yet, and may still publish what it has"
    clock.turn(seconds=LEFTOVER_SECONDS)
    assert world.clean("HZDR-DISK").files == 1
    world.check()


def test_what_a_rule_has_given_up_is_not_ordered_anew_when_it_is_lost(world: CleanWorld, clock: HandClock) -> None:
    dataset, reader = world.collection("d"), world.collection("r")
    names = world.files(1, "DESY-DISK", dataset)
    world.attach(reader, *names)
    rule = world.rule(dataset, "DESY-DISK")
    world.rule(reader, "GSI-DISK")
    with world.db.write() as s:
        rule_changes.change_wish(s, rule.id, expression="HZDR-DISK")
    (order,) = world.claim("GSI").orders
    world.report("GSI", [failed(order, "source_missing", "source")])
    clock.turn(seconds=3600)
    (order,) = world.claim("GSI").orders
    # A worker that does not say from where it read means where it read last.
    said = wire.Outcome(
        transfer=order.transfer, epoch=order.epoch, outcome="failed", error="source_missing", side="source"
    )
    assert world.report("GSI", [said]).accepted == 1
    world.check()
    assert world.where(names[0])["DESY-DISK"] == "unavailable"
    assert {transfer.target for transfer in world.transfers()} == {"GSI-DISK", "HZDR-DISK"}


def test_no_order_goes_where_the_bytes_of_another_file_are_being_deleted(world: CleanWorld, clock: HandClock) -> None:
    """In the layout `hash` some names share a path: the deletion would take what was just written there."""
    with world.db.write() as s:
        for scope in ("user.08", "user"):
            scopes.add(s, ROOT, wire.NewScope(name=scope))
        endpoints.add(s, wire.NewEndpoint(name="RUCIO", site="HZDR", url="file:///data/rucio", layout="hash"))
    coming, going = "user.08:n559", "user:6d/n559"
    world.register([coming], "DESY-DISK", size=5)
    for at in ("RUCIO", "DESY-DISK"):
        world.register([going], at, size=5)
    deletion = world.ask(going, "RUCIO")
    rule = world.rule(coming, "RUCIO")
    assert world.claim("HZDR").orders == []
    (order,) = world.take("HZDR").orders
    assert (order.deletion, order.path) == (deletion.id, "user/08/0e/6d/n559")
    world.tell("HZDR", wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome="removed"))
    clock.turn(seconds=301)
    assert world.move("HZDR") == 1
    assert world.show(rule).state == "ok"
    world.check()


def test_a_dataset_knows_of_a_rule_on_a_file_alone_that_is_to_begin_later(world: CleanWorld, clock: HandClock) -> None:
    (name,) = world.files(1, "DESY-DISK")
    world.rule(name, "DESY-DISK", not_before=clock.now + timedelta(days=1))
    dataset = world.collection("d")
    world.attach(dataset, name)
    with world.look() as s:
        assert s.execute(
            sa.select(t.dids.c.shared).where(t.dids.c.id == dids.row_id(s, Did.parse(dataset))[0])
        ).scalar()
    world.check()
