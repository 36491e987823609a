"""Workers claim, beat and report: who may, what counts, and what a failure leads to."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import endpoints, lanes, membership, orders, replicas, scopes
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Invalid
from rules.states import Evidence, ReplicaState, TransferState
from rules.transfers import RetryPolicy
from tests.conftest import HandClock
from tests.replica.catalog.world import LEASE, MB, ROOT, World, checksums, done, failed

COUNT = Callable[[Database], AbstractContextManager[Any]]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def wished(world: World, count: int, expression: str = "HZDR-DISK", **fields: Any) -> wire.Rule:
    dataset = world.collection(f"d{count}-{expression}".replace("|", "-"))
    world.files(count, "DESY-DISK", dataset, size=MB)
    return world.rule(dataset, expression, **fields)


# --- claim ----------------------------------------------------------------------------------------------------------


def test_an_order_says_all_a_worker_needs_and_nothing_secret(world: World) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    assert order.epoch == 1
    assert order.attempt == 1
    assert order.did == "t:f0000001"
    assert (order.target_url, order.target_path) == ("file:///data/HZDR-DISK", "t/f0000001")
    assert order.sources == [wire.OrderSource(endpoint="DESY-DISK", url="file:///data/DESY-DISK", path="t/f0000001")]
    assert (order.size, order.checksums) == (MB, checksums(order.did))


def test_a_site_gets_its_own_transfers_only_and_each_once(world: World) -> None:
    wished(world, 3, "HZDR-DISK|GSI-DISK", copies=2)
    assert world.claim("DESY").orders == []
    mine, again = world.claim("HZDR").orders, world.claim("HZDR").orders
    assert len(mine) == 3
    assert again == []
    assert {order.target_endpoint for order in world.claim("GSI").orders} == {"GSI-DISK"}


def test_the_most_urgent_comes_first_and_the_oldest_of_these(world: World) -> None:
    for name, priority in (("a", 2), ("b", 5), ("c", 3)):
        dataset = world.collection(name)
        world.files(2, "DESY-DISK", dataset)
        world.rule(dataset, "HZDR-DISK", priority=priority)
    claimed = [order.transfer for order in world.claim("HZDR").orders]
    assert claimed == [3, 4, 5, 6, 1, 2]


def test_a_claim_is_bounded_in_number_and_bytes_and_says_whether_more_waits(world: World) -> None:
    wished(world, 5)
    first = world.claim("HZDR", 2)
    assert (len(first.orders), first.more) == (2, True)
    second = world.claim("HZDR", 10, limit_bytes=MB // 2)
    assert (len(second.orders), second.more) == (1, True), "the first always fits"
    third = world.claim("HZDR", 10, limit_bytes=2 * MB)
    assert (len(third.orders), third.more) == (2, False)


def test_a_claim_costs_the_same_statements_for_1_and_for_500_orders(world: World, count_statements: COUNT) -> None:
    wished(world, 501)
    counts = []
    for limit in (1, 500):
        with count_statements(world.db) as statements:
            assert len(world.claim("HZDR", limit).orders) == limit
        counts.append(statements.count)
    assert counts[0] >= counts[1] - 1, counts  # the second one finds the site seen already
    assert counts[0] <= (19 if world.db.url.get_backend_name() == "sqlite" else 14), counts


def test_the_claim_reads_its_index_only_as_far_as_it_needs(world: World) -> None:
    dataset = world.collection("d")
    (name,) = world.files(1, "DESY-DISK", dataset)
    with world.db.write() as s:
        file_id = s.execute(sa.select(tables.files.c.did_id)).scalar_one()
        target = s.execute(sa.select(tables.endpoints).where(tables.endpoints.c.name == "HZDR-DISK")).one()
        s.connection.exec_driver_sql("DROP INDEX uq_transfers_live")  # 50,000 rows about one file are enough
        s.execute(
            tables.transfers.insert(),
            [
                {
                    "file_id": file_id,
                    "target_id": target.id,
                    "site_id": target.site_id,
                    "state": TransferState.QUEUED if i % 2 else TransferState.DONE,
                    "priority": i % 5 + 1,
                    "activity": "default",
                    "size_bytes": 1,
                    "created_at": s.now,
                }
                for i in range(50_000)
            ],
        )
    with world.db.write() as s:
        if s.postgresql:
            s.connection.exec_driver_sql("ANALYZE transfers")
        membership.walk_in_order(s)
        key = lanes.Key("default", target.id, "")
        for statement in (lanes.keys_query(target.site_id), lanes.heads_query(s, target.site_id, [(key, 101)])):
            query = statement.compile(s.connection, compile_kwargs={"literal_binds": True, "render_postcompile": True})
            explain = "EXPLAIN " if s.postgresql else "EXPLAIN QUERY PLAN "
            plan = "\n".join(str(row) for row in s.connection.exec_driver_sql(explain + str(query).replace("%", "%%")))
            assert "ix_transfers_lanes" in plan, plan
            assert "Sort" not in plan and "TEMP B-TREE" not in plan and "ix_transfers_queue" not in plan, plan
    assert name


def test_an_endpoint_that_is_not_written_to_holds_up_nothing_else(world: World) -> None:
    world.endpoint("HZDR-TWO", "HZDR")
    wished(world, 3, "HZDR-DISK", priority=5)
    wished(world, 2, "HZDR-TWO")
    world.change("HZDR-DISK", writable=False)
    assert {order.target_endpoint for order in world.claim("HZDR", 2).orders} == {"HZDR-TWO"}
    assert {t.reason for t in world.transfers() if t.target == "HZDR-DISK"} == {"writing is off at the target"}
    world.change("HZDR-DISK", writable=True)
    assert len(world.claim("HZDR").orders) == 3, "and goes on as soon as it is on again"


def test_a_transfer_without_any_source_is_put_back_with_the_reason_and_tried_again(
    world: World, clock: HandClock
) -> None:
    rule = wished(world, 2)
    world.change("DESY-DISK", readable=False)
    answer = world.claim("HZDR")
    assert answer.orders == []
    transfer = world.transfers()[0]
    assert (transfer.state, transfer.reason, transfer.attempts) == ("queued", "DESY-DISK: reading is off", 0)
    assert any("no endpoint that may be read holds a good copy" in x for x in world.explain(rule).sentences)
    world.change("DESY-DISK", readable=True)
    clock.turn(seconds=orders.NO_SOURCE_SECONDS)
    assert len(world.claim("HZDR").orders) == 2


def test_the_sources_are_those_the_rule_allows_best_first(world: World) -> None:
    dataset = world.collection("d")
    names = world.files(1, "DESY-DISK", dataset)
    world.register(names, "GSI-DISK")
    world.rule(dataset, "HZDR-DISK", source_expression="GSI-DISK")
    (order,) = world.claim("HZDR").orders
    assert [s.endpoint for s in order.sources] == ["GSI-DISK"]


def test_a_source_that_failed_comes_last_the_next_time(world: World, clock: HandClock) -> None:
    dataset = world.collection("d")
    names = world.files(1, "DESY-DISK", dataset)
    world.register(names, "GSI-DISK")
    world.rule(dataset, "HZDR-DISK")
    (order,) = world.claim("HZDR").orders
    assert [s.endpoint for s in order.sources] == ["DESY-DISK", "GSI-DISK"]
    world.report("HZDR", [failed(order, "source_missing", "source")])
    (order,) = world.claim("HZDR").orders
    assert [s.endpoint for s in order.sources] == ["GSI-DISK", "DESY-DISK"], "at once, as another source is left"
    assert (order.epoch, order.attempt) == (2, 2)


# --- heartbeat ------------------------------------------------------------------------------------------------------


def test_a_heartbeat_keeps_the_lease_and_tells_what_to_stop(world: World, clock: HandClock) -> None:
    wished(world, 3)
    first, second, third = world.claim("HZDR").orders
    clock.turn(seconds=LEASE - 1)
    world.cancel(second.transfer)
    answer = world.heartbeat(
        "HZDR",
        wire.Beat(transfer=first.transfer, epoch=first.epoch, bytes_done=5, phase="moving"),
        wire.Beat(transfer=second.transfer, epoch=second.epoch),
        wire.Beat(transfer=third.transfer, epoch=third.epoch + 1),
    )
    assert answer.stop == [second.transfer, third.transfer]
    clock.turn(seconds=2)
    assert world.expire() == 1, "the third was not kept"
    kept, _, lost = world.transfers()
    assert (kept.state, kept.bytes_done) == ("moving", 5)
    assert lost.state == "queued"
    world.check()


def test_phases_go_forward_only_though_beats_overtake_each_other(world: World) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    for phase, state in (("moving", "moving"), ("verifying", "verifying"), ("moving", "verifying")):
        world.heartbeat("HZDR", wire.Beat(transfer=order.transfer, epoch=order.epoch, phase=phase))
        assert world.transfers()[0].state == state


def test_another_site_can_neither_beat_nor_report_for_this_one(world: World) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    beat = wire.Beat(transfer=order.transfer, epoch=order.epoch)
    assert world.heartbeat("GSI", beat).stop == [order.transfer]
    assert world.report("GSI", [done(order)]).stale == [order.transfer]
    assert world.transfers()[0].state == "claimed"


# --- report ---------------------------------------------------------------------------------------------------------


def test_a_finished_batch_costs_the_same_statements_for_2_and_for_1000_outcomes(
    world: World, count_statements: COUNT
) -> None:
    wished(world, 1_003)
    counts = []
    for limit in (2, 1_000):
        claimed = world.claim("HZDR", limit).orders
        with count_statements(world.db) as statements:
            assert world.report("HZDR", [done(order) for order in claimed]).accepted == limit
        counts.append(statements.count)
    # One of them asks whether any route is open, whose next leg this would begin.
    assert counts[0] == counts[1] <= (32 if world.db.url.get_backend_name() == "sqlite" else 18), counts
    world.check()


def test_a_batch_of_failures_costs_the_same_statements_for_2_and_for_500(world: World, count_statements: COUNT) -> None:
    wished(world, 503)
    counts = []
    for limit in (1, 2, 500):
        claimed = world.claim("HZDR", limit).orders
        with count_statements(world.db) as statements:
            world.report("HZDR", [failed(order, "refused") for order in claimed])
        counts.append(statements.count)
    assert counts[0] >= counts[1] == counts[2] <= 42, counts  # the first one also finds the rule stuck
    world.check()


def test_what_is_reported_done_is_available_proven_and_remembered(world: World, clock: HandClock) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    more = order.checksums | {"xxh3_128": "0" * 31 + "7"}
    world.report("HZDR", [done(order, seconds=2.5, checksums=more)])
    transfer = world.transfers()[0]
    assert (transfer.state, transfer.source, transfer.bytes_done) == ("done", "DESY-DISK", MB)
    assert transfer.finished_at == clock.now
    with world.look() as s:
        replica = s.execute(sa.select(tables.replicas).where(tables.replicas.c.evidence == Evidence.COPIED)).one()
        assert (replica.state, replica.verified_at) == (ReplicaState.AVAILABLE, clock.now)
        attempt = s.execute(sa.select(tables.attempts)).one()
        assert (attempt.outcome, attempt.bytes, attempt.seconds, attempt.worker) == ("done", MB, 2.5, "HZDR/1")
        learned = s.execute(sa.select(tables.files.c.xxh3_128)).scalar_one()
        assert learned is None, "who copies a file cannot give it checksums that nobody had"


def test_the_first_proof_of_a_declared_replica_brings_the_checksums_that_nobody_had(world: World) -> None:
    world.files(1, "DESY-DISK", evidence="declared")
    (order,) = world.claim("DESY").orders
    assert order.sources == [], "it is verified where it lies"
    world.report("DESY", [done(order, checksums=order.checksums | {"xxh3_128": "0" * 31 + "7"})])
    with world.look() as s:
        assert s.execute(sa.select(tables.files.c.xxh3_128)).scalar_one() == bytes(15) + b"\7"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"size": 5}, "the target has 5 bytes, the catalogue 1000000"),
        ({"checksums": {"adler32": "00000001"}}, "not those of the catalogue"),
        ({"checksums": {"xxh3_128": "0" * 32}}, "nothing was proven"),
        ({"checksums": {}}, "nothing was proven"),
        ({"checksums": {"adler32": "xyz"}}, "a checksum that is none"),
    ],
)
def test_a_worker_that_says_done_and_proves_nothing_has_failed(
    world: World, fields: dict[str, Any], words: str
) -> None:
    rule = wished(world, 1)
    (order,) = world.claim("HZDR").orders
    world.report("HZDR", [done(order, **fields)])
    transfer = world.transfers()[0]
    assert transfer.state == "queued"
    assert words in str(transfer.reason)
    assert world.show(rule).files_available == 0
    assert world.count(tables.replicas, tables.replicas.c.state == ReplicaState.BAD) == 0, "no source is blamed"
    world.check()


def test_a_killed_workers_claim_comes_back_with_a_higher_epoch_and_the_zombies_report_is_stale(
    world: World, clock: HandClock
) -> None:
    rule = wished(world, 1)
    (zombie,) = world.claim("HZDR").orders
    clock.turn(seconds=LEASE + 1)
    world.woken.clear()
    assert world.expire() == 1
    assert "site.HZDR" in world.woken
    (order,) = world.claim("HZDR").orders
    assert (order.transfer, order.epoch) == (zombie.transfer, zombie.epoch + 1)
    assert world.report("HZDR", [done(zombie)]).stale == [zombie.transfer]
    assert world.show(rule).state == "replicating", "the zombie changed nothing"
    assert world.report("HZDR", [done(order)]).accepted == 1
    assert world.report("HZDR", [done(order)]).stale == [order.transfer], "there is one completion"
    with world.look() as s:
        outcomes = s.execute(sa.select(tables.attempts.c.outcome).order_by(tables.attempts.c.id)).scalars().all()
    assert outcomes == ["lost", "done"]
    world.check()


def test_a_report_that_comes_after_the_lease_but_before_anybody_else_counts(world: World, clock: HandClock) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    clock.turn(seconds=LEASE + 1)
    assert world.report("HZDR", [done(order)]).accepted == 1


def test_a_transfer_that_loses_every_worker_is_given_up_with_the_reason(world: World, clock: HandClock) -> None:
    rule = wished(world, 1)
    policy = RetryPolicy(attempts_max=3)
    for _ in range(3):
        assert len(world.claim("HZDR").orders) == 1
        clock.turn(seconds=LEASE + 1)
        assert world.expire(policy) == 1
    assert world.transfers()[0].state == "failed"
    shown = world.show(rule)
    assert shown.state == "stuck"
    assert shown.reasons[0].code == "lost"
    assert "stopped answering" in shown.reasons[0].message
    world.check()


def test_what_is_given_back_is_nobodys_fault_and_goes_out_again_at_once(world: World) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    back = wire.Outcome(transfer=order.transfer, epoch=order.epoch, outcome="given_back")
    assert world.report("HZDR", [back]).accepted == 1
    transfer = world.transfers()[0]
    assert (transfer.state, transfer.attempts, transfer.reason) == ("queued", 0, None)
    (again,) = world.claim("HZDR").orders
    assert (again.attempt, again.epoch) == (1, 2)


def test_a_failure_waits_longer_each_time_and_is_given_up_in_the_end(world: World, clock: HandClock) -> None:
    rule = wished(world, 1)
    policy = RetryPolicy(attempts_max=3, base_seconds=30, cap_seconds=600)
    for attempt in (1, 2, 3):
        (order,) = world.claim("HZDR").orders
        world.report("HZDR", [failed(order, "timed_out")], policy=policy)
        transfer = world.transfers()[0]
        if attempt < 3:
            assert transfer.state == "queued"
            assert transfer.not_before is not None and transfer.not_before > clock.now
            assert world.claim("HZDR").orders == []
            clock.turn(seconds=600)
    assert transfer.state == "failed"
    shown = world.show(rule)
    assert (shown.state, shown.locks_stuck) == ("stuck", 1)
    (reason,) = shown.reasons
    assert (reason.code, reason.endpoint, reason.files) == ("timed_out", "HZDR-DISK", 1)
    assert reason.hint and reason.next_retry_at is not None
    world.check()


def test_a_source_is_blamed_when_two_attempts_said_so_and_its_copy_is_made_anew_elsewhere_from(
    world: World, clock: HandClock
) -> None:
    dataset = world.collection("d")
    names = world.files(1, "DESY-DISK", dataset)
    home = world.rule(dataset, "DESY-DISK")
    world.register(names, "GSI-DISK")
    world.rule(dataset, "HZDR-DISK", source_expression="DESY-DISK")
    clock.turn(seconds=1)
    (order,) = world.claim("HZDR").orders
    world.report("HZDR", [failed(order, "checksum_differs", "source")])
    assert world.show(home).state == "ok", "once is not enough"
    clock.turn(hours=1)
    (order,) = world.claim("HZDR").orders
    world.report("HZDR", [failed(order, "checksum_differs", "source")])
    assert world.count(tables.replicas, tables.replicas.c.state == ReplicaState.BAD) == 0, "not on another's word"
    assert world.count(tables.replicas, tables.replicas.c.state == ReplicaState.UNAVAILABLE) == 1
    assert world.show(home).state == "replicating"
    world.check()
    (repair,) = world.claim("DESY").orders
    assert [s.endpoint for s in repair.sources] == ["GSI-DISK"], "a bad copy is never a source"
    world.report("DESY", [done(repair)])
    assert world.show(home).state == "ok"
    world.check()


def test_a_failure_of_the_target_never_blames_a_source(world: World, clock: HandClock) -> None:
    wished(world, 1)
    for _ in range(3):
        clock.turn(hours=2)
        (order,) = world.claim("HZDR").orders
        world.report("HZDR", [failed(order, "checksum_differs", "target")])
    assert world.count(tables.replicas, tables.replicas.c.state == ReplicaState.AVAILABLE) == 1
    world.check()


def test_a_transfer_reported_twice_in_one_batch_is_refused(world: World) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    with pytest.raises(Invalid, match="twice"):
        world.report("HZDR", [done(order), done(order)])


# --- people ---------------------------------------------------------------------------------------------------------


def test_a_cancelled_transfer_stops_and_its_rule_asks_anew_later(world: World, clock: HandClock) -> None:
    rule = wished(world, 2)
    first = world.transfers()[0]
    assert world.cancel(first.id).state == "cancelled"
    shown = world.show(rule)
    assert (shown.state, shown.reasons[0].code) == ("stuck", "cancelled")
    world.check()
    assert world.evaluate() == 0, "not at once"
    clock.turn(minutes=2)
    assert world.evaluate() > 0
    assert world.move() == 2
    assert world.show(rule).state == "ok"
    world.check()


def test_a_failed_transfer_is_tried_again_by_a_new_one(world: World) -> None:
    rule = wished(world, 1)
    (order,) = world.claim("HZDR").orders
    world.report("HZDR", [failed(order, "refused")])
    again = world.retry(order.transfer)
    assert (again.id != order.transfer, again.state) == (True, "queued")
    assert world.show(rule).state == "replicating"
    world.check()
    with pytest.raises(Exception, match=f"transfer {again.id} is trying it again already"):
        world.retry(order.transfer)
    world.move()
    assert world.show(rule).state == "ok"
    assert {t.state for t in world.transfers()} == {"failed", "done"}


def test_what_has_ended_is_neither_cancelled_nor_tried_again(world: World) -> None:
    rule = wished(world, 2)
    world.move("HZDR")
    with pytest.raises(Exception, match="has ended: it is done"):
        world.cancel(1)
    with pytest.raises(Exception, match="is done"):
        world.retry(1)
    world.delete(rule)
    with pytest.raises(Exception, match="there is no transfer 99"):
        world.retry(99)


def test_a_waiting_transfer_is_hurried_and_one_under_way_is_left_alone(world: World, clock: HandClock) -> None:
    wished(world, 1)
    (order,) = world.claim("HZDR").orders
    with pytest.raises(Exception, match="is under way"):
        world.retry(order.transfer)
    world.report("HZDR", [failed(order, "timed_out")])
    assert world.claim("HZDR").orders == []
    world.retry(order.transfer)
    assert len(world.claim("HZDR").orders) == 1


def test_transfers_are_listed_by_rule_did_state_site_and_page(world: World) -> None:
    first, second = wished(world, 2), wished(world, 3, "GSI-DISK")
    both = world.rule(first.did, "HZDR-DISK", grouping="none")
    world.claim("GSI", 1)
    assert len(world.transfers(rule=second.id)) == 3
    assert len(world.transfers(rule=both.id)) == 2, "whoever asked for them first"
    assert len(world.transfers(site="GSI", state="queued")) == 2
    with world.db.read() as s:
        from replica.catalog import transfers
        from rules.names import Did

        assert len(transfers.list_page(s, did=Did.parse(first.did)).items) == 2
        page = transfers.list_page(s, limit=4)
        assert len(page.items) == 4
        assert len(transfers.list_page(s, cursor=page.next, limit=4).items) == 1


def test_no_order_goes_where_another_file_lies(world: World) -> None:
    """Its worker would take the other's good bytes for wrong ones of its own, and move them away."""
    with world.db.write() as s:
        there = wire.NewReplica(did="t:a", size=5, checksums={"adler32": "00000001"}, path="t/b")
        replicas.register(s, ROOT, wire.Registration(endpoint="HZDR-DISK", replicas=[there], evidence="hashed"))
    world.register(["t:b", "t:c"], "DESY-DISK")
    for did in ("t:b", "t:c"):
        world.rule(did, "HZDR-DISK")
    assert [order.did for order in world.claim("HZDR").orders] == ["t:c"]
    assert [t.reason for t in world.transfers() if t.did == "t:b"] == ["its path at HZDR-DISK is that of t:a"]
    world.check()


def test_of_two_names_with_one_path_the_first_has_it(world: World) -> None:
    with world.db.write() as s:
        for scope in ("user.08", "user"):
            scopes.add(s, ROOT, wire.NewScope(name=scope))
        endpoints.add(s, wire.NewEndpoint(name="RUCIO", site="HZDR", url="file:///data/rucio", layout="hash"))
    for did in ("user.08:n559", "user:6d/n559"):
        world.register([did], "DESY-DISK")
        world.rule(did, "RUCIO")
    assert [order.did for order in world.claim("HZDR").orders] == ["user.08:n559"]
    world.check()
