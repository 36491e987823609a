"""Files that no copy may bring to their target directly come over other endpoints, and leave nothing there."""

from __future__ import annotations

from typing import Any

import pytest

from replica import wire
from replica.catalog import deletions, endpoints, fsck, rules, transfers
from replica.catalog import routes as routes_
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Refused
from rules.states import ReplicaState
from rules.transfers import RetryPolicy
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, ROOT, World, done, failed

ONCE = RetryPolicy(attempts_max=1)
#: From DESY to HZDR only over A, B and C in a row; X leads there at a greater distance.
CHAIN = [("DESY-DISK", "A-HOP"), ("A-HOP", "B-HOP"), ("B-HOP", "C-HOP"), ("C-HOP", "HZDR-DISK")]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    for name in ("DESY-DISK", "HZDR-DISK", "GSI-DISK"):
        made.endpoint(name)
    for name in ("A-HOP", "B-HOP", "C-HOP"):
        made.endpoint(name, hop="true")
    close_all_but(made, *CHAIN)
    return made


def link(world: World, source: str, target: str, **fields: Any) -> None:
    with world.db.write() as s:
        endpoints.set_link(s, wire.LinkChange(source=source, target=target, **fields))


def close_all_but(world: World, *open_: tuple[str, str]) -> None:
    with world.db.read() as s:
        names = [row.name for row in endpoints.rows(s)]
    for source in names:
        for target in names:
            if source != target and (source, target) not in open_:
                link(world, source, target, allowed=False)


def wished(world: World, count: int = 1, target: str = "HZDR-DISK", **fields: Any) -> wire.Rule:
    dataset = world.collection(f"d{next(world._numbers)}")
    world.files(count, "DESY-DISK", dataset, size=MB)
    return world.rule(dataset, target, **fields)


def look(world: World) -> None:
    """What the pass does."""
    for _ in range(5):
        with world.db.write() as s:
            closed = routes_.close(s)
        with world.db.write() as s:
            planned = routes_.plan(s)
        if not closed and not planned:
            return
    raise AssertionError("it does not come to an end")


def sound(world: World) -> None:
    world.check()
    with world.db.read() as s:
        assert {f.invariant: f.examples for f in fsck.examine(s) if f.violations} == {}


def leg(world: World, site: str, *, ok: bool = True) -> list[wire.Order]:
    """The site's orders, carried out."""
    orders = world.claim(site).orders
    if orders:
        end = [done(order) if ok else failed(order, "refused") for order in orders]
        world.report(site, end, policy=None if ok else ONCE)
    return orders


def show(world: World, transfer: int) -> wire.Transfer:
    with world.db.read() as s:
        return transfers.get(s, transfer)


def at_step(world: World, name: str) -> list[ReplicaState]:
    t = tables.replicas
    with world.db.read() as s:
        where = t.c.endpoint_id == endpoints.row(s, name).id
        return [row.state for row in s.execute(t.select().where(where).order_by(t.c.file_id))]


def cleared(world: World, name: str) -> int:
    """What the deletion pass and the worker then remove there at once."""
    with world.db.write() as s:
        return deletions.decide(s, endpoints.row(s, name).id).files


def test_a_chain_of_three_steps_each_ordered_by_the_commit_of_the_one_before(world: World) -> None:
    rule = wished(world, 2)
    assert world.claim("HZDR").orders == []
    assert "routes" in world.woken
    look(world)
    sound(world)
    (first, second) = [t for t in world.transfers() if t.target == "HZDR-DISK"]
    assert first.reason == (
        "it comes from DESY-DISK over A-HOP and B-HOP and C-HOP, since it may not go to HZDR-DISK directly"
    )
    told = show(world, first.id).route
    assert told is not None
    assert [(hop.endpoint, hop.state, hop.transfer is not None) for hop in told.hops] == [
        ("A-HOP", "reserved", True),
        ("B-HOP", "reserved", False),
        ("C-HOP", "reserved", False),
    ]
    assert {name: world.used(name) for name in ("A-HOP", "B-HOP", "C-HOP")} == dict.fromkeys(
        ("A-HOP", "B-HOP", "C-HOP"), 2 * MB
    ), "the space is booked"
    for here, step in (("DESY-DISK", "A"), ("A-HOP", "B"), ("B-HOP", "C")):
        assert world.claim("HZDR").orders == []
        orders = leg(world, step)
        assert [order.sources[0].endpoint for order in orders] == [here] * 2
        assert show(world, orders[0].transfer).step_for == [first.id]
        if step == "B":
            world.claim("HZDR")
            look(world)
            assert "2 files of these have come as far as B-HOP." in world.explain(rule).sentences
    orders = leg(world, "HZDR")
    assert {(order.transfer, order.sources[0].endpoint) for order in orders} == {
        (first.id, "C-HOP"),
        (second.id, "C-HOP"),
    }
    assert world.show(rule).state == "ok"
    look(world)
    sound(world)
    ended = show(world, first.id).route
    assert ended is not None and (ended.outcome, ended.reason) == ("done", "the file has come")
    assert [cleared(world, name) for name in ("A-HOP", "B-HOP", "C-HOP", "DESY-DISK")] == [2, 2, 2, 0]
    sound(world)


def test_what_is_a_step_is_kept_until_the_route_has_ended(world: World) -> None:
    wished(world)
    world.claim("HZDR")
    look(world)
    leg(world, "A")
    (name,) = [t.did for t in world.transfers(site="HZDR")]
    with pytest.raises(Refused, match="a step of a copy's way"), world.db.write() as s:
        deletions.ask(s, ROOT, wire.NewDeletion(did=name, endpoint="A-HOP", last_copy=True))
    world.change("A-HOP", delete_at_once=True)
    with world.db.write() as s:
        s.execute(tables.replicas.update().values(tombstone_at=s.now))
    assert cleared(world, "A-HOP") == 0


def test_a_step_that_fails_ends_the_route_and_another_way_is_found(world: World) -> None:
    link(world, "DESY-DISK", "C-HOP", allowed=True, distance=500)
    rule = wished(world)
    world.claim("HZDR")
    look(world)
    (wanted,) = world.transfers(site="HZDR")
    leg(world, "A")
    leg(world, "B", ok=False)
    look(world)
    sound(world)
    told = show(world, wanted.id)
    assert told.reason is not None and told.reason.startswith("the transfer to B-HOP failed or was cancelled; it comes")
    assert told.route is not None and [hop.endpoint for hop in told.route.hops] == ["C-HOP"]
    assert at_step(world, "B-HOP") == []
    assert leg(world, "B") == []
    leg(world, "C", ok=False)
    look(world)
    sound(world)
    told = show(world, wanted.id)
    assert told.route is not None and told.route.outcome == "failed"
    assert told.reason is not None and "B-HOP, C-HOP failed and are left out for a time" in told.reason
    assert world.show(rule).state == "replicating"
    (waits,) = world.explain(rule).waiting
    assert (waits.code, waits.next_at is not None) == ("no_route", True)


def test_what_failed_is_tried_again_after_an_hour(world: World, clock: HandClock) -> None:
    wished(world)
    world.claim("HZDR")
    look(world)
    leg(world, "A", ok=False)
    look(world)
    clock.turn(hours=1, seconds=1)
    with world.db.write() as s:
        s.execute(tables.breakers.delete())
    world.claim("HZDR")
    look(world)
    assert len(leg(world, "A")) == 1
    sound(world)


@pytest.mark.parametrize("moment", ["queued", "leased", "at B"])
def test_the_end_of_the_rule_ends_the_route(world: World, clock: HandClock, moment: str) -> None:
    rule = wished(world)
    world.claim("HZDR")
    look(world)
    (order,) = leg(world, "A") if moment == "at B" else world.claim("A").orders if moment == "leased" else [None]
    if moment == "at B":
        leg(world, "B")
    world.delete(rule)
    look(world)
    sound(world)
    assert world.claim("A").orders == world.claim("B").orders == world.claim("C").orders == []
    assert world.count(tables.routes, tables.routes.c.outcome == "cancelled") == 1
    if moment == "at B":
        assert (cleared(world, "A-HOP"), cleared(world, "B-HOP"), at_step(world, "C-HOP")) == (1, 1, [])
    elif moment == "leased":
        assert order is not None
        assert world.report("A", [done(order)]).stale == [order.transfer]
        clock.turn(hours=2)
        assert (cleared(world, "A-HOP"), at_step(world, "B-HOP")) == (1, []), (
            "bytes may have landed: cleared away later"
        )
    else:
        assert [world.used(name) for name in ("A-HOP", "B-HOP", "C-HOP")] == [0, 0, 0]
    sound(world)


def test_a_target_that_can_be_reached_directly_again_is(world: World) -> None:
    rule = wished(world)
    world.claim("HZDR")
    look(world)
    leg(world, "A")
    link(world, "DESY-DISK", "HZDR-DISK", allowed=True)
    (order,) = leg(world, "HZDR")
    assert order.sources[0].endpoint == "DESY-DISK"
    look(world)
    sound(world)
    assert world.show(rule).state == "ok"
    assert cleared(world, "A-HOP") == 1
    assert (at_step(world, "B-HOP"), at_step(world, "C-HOP")) == ([], [])


def test_a_copy_that_was_at_a_step_is_used_and_stays(world: World) -> None:
    dataset = world.collection("d")
    names = world.files(1, "DESY-DISK", dataset, size=MB)
    world.register(names, "B-HOP", size=MB)
    world.rule(dataset, "HZDR-DISK")
    world.claim("HZDR")
    look(world)
    assert leg(world, "A") == []
    assert [order.sources[0].endpoint for order in leg(world, "C")] == ["B-HOP"]
    assert len(leg(world, "HZDR")) == 1
    look(world)
    sound(world)
    assert [cleared(world, name) for name in ("B-HOP", "C-HOP")] == [0, 1]
    assert at_step(world, "B-HOP") == [ReplicaState.AVAILABLE]


def test_a_copy_that_a_rule_brings_to_a_step_is_shared_and_stays_its(world: World) -> None:
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset, size=MB)
    own = world.rule(dataset, "A-HOP")
    world.rule(dataset, "HZDR-DISK")
    world.claim("HZDR")
    look(world)
    assert len([t for t in world.transfers() if t.target == "A-HOP"]) == 1
    world.delete(own)
    sound(world)
    assert len(leg(world, "A")) == 1, "the route needs it, though the rule does not any more"
    for site in ("B", "C", "HZDR"):
        assert len(leg(world, site)) == 1
    look(world)
    sound(world)


def test_a_copy_that_somebody_registers_at_a_step_is_theirs(world: World) -> None:
    wished(world)
    world.claim("HZDR")
    look(world)
    (wanted,) = world.transfers(site="HZDR")
    world.register([wanted.did], "B-HOP", size=MB)
    sound(world)
    with world.db.write() as s, pytest.raises(Refused, match="a route over B-HOP"):
        endpoints.decommission(s, "B-HOP", wire.Decommission(forget=True, last_copies=True))
    assert [len(leg(world, site)) for site in ("C", "HZDR")] == [1, 1]
    look(world)
    sound(world)
    assert (cleared(world, "B-HOP"), cleared(world, "C-HOP")) == (0, 1)


def test_two_routes_share_a_step_which_goes_with_the_last(world: World) -> None:
    for step in ("HZDR-DISK", "GSI-DISK"):
        link(world, "B-HOP", step, allowed=True)
    dataset = world.collection("d")
    world.files(1, "DESY-DISK", dataset, size=MB)
    one = world.rule(dataset, "HZDR-DISK")
    world.rule(dataset, "GSI-DISK")
    world.claim("HZDR")
    look(world)
    world.claim("GSI")
    look(world)
    assert len([t for t in world.transfers() if t.target == "A-HOP"]) == 1
    leg(world, "A")
    world.delete(one)
    look(world)
    sound(world)
    assert (cleared(world, "A-HOP"), at_step(world, "A-HOP")) == (0, [ReplicaState.AVAILABLE])
    assert len(leg(world, "B")) == len(leg(world, "GSI")) == 1
    look(world)
    sound(world)
    assert [cleared(world, name) for name in ("A-HOP", "B-HOP")] == [1, 1]


def test_a_step_that_is_banned_is_gone_around(world: World, clock: HandClock) -> None:
    link(world, "DESY-DISK", "C-HOP", allowed=True, distance=500)
    wished(world)
    world.claim("HZDR")
    look(world)
    world.change("B-HOP", writable=False)
    leg(world, "A")
    clock.turn(minutes=6)
    world.claim("HZDR")
    look(world)
    (wanted,) = world.transfers(site="HZDR")
    told = show(world, wanted.id)
    assert told.reason is not None and told.reason.startswith("B-HOP can no longer be a step")
    assert [len(leg(world, site)) for site in ("B", "C", "HZDR")] == [0, 1, 1]
    look(world)
    sound(world)


def test_a_suspended_rule_orders_no_further_leg_and_goes_on_where_it_was(world: World) -> None:
    rule = wished(world)
    world.claim("HZDR")
    look(world)
    with world.db.write() as s:
        rules.suspend(s, ROOT, rule.id, wire.Verdict())
    leg(world, "A")
    look(world)
    assert leg(world, "B") == []
    with world.db.write() as s:
        rules.resume(s, ROOT, rule.id)
    world.claim("HZDR")
    look(world)
    assert [len(leg(world, site)) for site in ("B", "C", "HZDR")] == [1, 1, 1]
    sound(world)


def test_rules_that_limit_sources_mean_where_the_file_comes_from(world: World) -> None:
    rule = wished(world, source_expression="DESY-DISK")
    world.claim("HZDR")
    look(world)
    assert [len(leg(world, site)) for site in ("A", "B", "C", "HZDR")] == [1, 1, 1, 1]
    assert world.show(rule).state == "ok"


def test_where_no_way_leads_people_are_told_what_helps_and_space_counts(world: World) -> None:
    with world.db.write() as s:
        s.execute(
            tables.endpoints.update().where(tables.endpoints.c.name == "B-HOP").values(capacity_bytes=3 * MB // 2)
        )
    rule = wished(world, 2)
    world.claim("HZDR")
    look(world)
    sound(world)
    codes = sorted(waits.code for waits in world.explain(rule).waiting)
    assert codes == ["hops", "no_route"], "there is room for one of the two"
    (none,) = [waits for waits in world.explain(rule).waiting if waits.code == "no_route"]
    assert "no way over A-HOP, B-HOP, C-HOP leads to HZDR-DISK" in none.message
    assert "hop=true" in none.hint


def test_a_person_who_cancels_a_leg_makes_it_look_for_another_way(world: World) -> None:
    wished(world)
    world.claim("HZDR")
    look(world)
    (legs,) = [t for t in world.transfers() if t.target == "A-HOP"]
    world.cancel(legs.id)
    look(world)
    sound(world)
    (wanted,) = world.transfers(site="HZDR")
    assert wanted.reason is not None and wanted.reason.startswith("the transfer to A-HOP failed or was cancelled")
