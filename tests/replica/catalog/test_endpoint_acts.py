"""Endpoints in trouble and at their end: banned, drained, out of service; and the ways between them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import endpoints, rules
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Conflict, NotFound, Refused
from rules.states import ReplicaState
from tests.at_once import at_once
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, ROOT, World


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def act(world: World, verb: str, *given: Any) -> wire.Endpoint:
    with world.db.write() as s:
        made: wire.Endpoint = getattr(endpoints, verb)(s, *given, ROOT)
    with world.look() as s:
        assert endpoints.get(s, made.name) == made
    return made


def abilities(e: wire.Endpoint) -> tuple[bool, bool, bool]:
    return e.readable, e.writable, e.deletable


def test_a_ban_switches_off_what_it_names_or_everything_and_says_why(world: World, clock: HandClock) -> None:
    shown = act(world, "ban", "GSI-DISK", wire.Ban(reason="fire", write=True))
    assert (abilities(shown), shown.status_reason, shown.status_since) == ((True, False, True), "fire", clock.now)
    world.rule(world.files(1, "DESY-DISK")[0], "GSI-DISK")
    with world.look() as s:
        (told,) = s.execute(sa.select(tables.reasons.c.message)).scalars()
    assert told == "GSI-DISK: writing is off: fire"
    clock.turn(hours=1)
    shown = act(world, "ban", "GSI-DISK", wire.Ban(reason="water"))
    assert (abilities(shown), shown.status_reason) == ((False, False, False), "water")
    shown = act(world, "unban", "GSI-DISK")
    assert (abilities(shown), shown.status_reason, shown.status_since) == ((True, True, True), "", clock.now)
    world.evaluate()
    assert world.transfers()[0].target == "GSI-DISK", "the rule heard of it at once"
    with world.look() as s:
        kinds = list(s.execute(sa.select(tables.events.c.kind).where(tables.events.c.entity == "endpoint")).scalars())
    assert kinds == ["endpoint.added"] * 3 + ["endpoint.banned"] * 2 + ["endpoint.unbanned"]


def test_nothing_new_goes_to_a_drained_endpoint(world: World) -> None:
    act(world, "drain", "GSI-DISK", wire.Drain(reason="old"))
    rule = world.rule(world.files(1, "GSI-DISK")[0], "GSI-DISK")
    assert [(r.code, r.message) for r in world.show(rule).reasons] == [("draining", "GSI-DISK: is being drained: old")]
    assert world.show(rule).reasons[0].hint
    act(world, "drain", "GSI-DISK", wire.Drain(undo=True))
    world.evaluate()
    assert world.show(rule).state == "ok"


def test_an_endpoint_goes_out_of_service_when_nothing_is_there_that_anybody_needs(world: World) -> None:
    name, *rest = world.files(3, "GSI-DISK")
    rule = world.rule(name, "GSI-DISK|HZDR-DISK")

    def refused(**fields: bool) -> str:
        with pytest.raises(Refused) as error:
            act(world, "decommission", "GSI-DISK", wire.Decommission(**fields))
        return error.value.message

    assert refused(forget=True) == "still protected at GSI-DISK: 1 file, by 1 rule"
    act(world, "drain", "GSI-DISK", wire.Drain())
    world.evaluate()
    world.move()
    world.evaluate()
    assert refused() == "GSI-DISK still has copies of 3 files"
    assert refused(forget=True) == "of 2 files at GSI-DISK no other good copy is known"
    world.register(rest, "DESY-DISK")
    shown = act(world, "decommission", "GSI-DISK", wire.Decommission(forget=True))
    assert (shown.decommissioned_at is not None, shown.used_bytes, shown.draining) == (True, 0, False)
    assert abilities(shown) == (False, False, False)
    world.check()
    assert world.count(tables.replicas, tables.replicas.c.state == ReplicaState.AVAILABLE) == 3
    other = world.rule(rest[0], "GSI-DISK|HZDR-DISK")
    assert {lock.endpoint for lock in world.explain(other).locks} == {"HZDR-DISK"}, "its name may still be said"
    with pytest.raises(Refused):
        act(world, "unban", "GSI-DISK")
    assert world.show(rule).state == "ok"
    act(world, "decommission", "GSI-DISK", wire.Decommission(undo=True))
    assert abilities(act(world, "unban", "GSI-DISK")) == (True, True, True)


def test_an_endpoint_with_transfers_under_way_stays_in_service(world: World) -> None:
    rule = world.rule(world.files(1, "DESY-DISK")[0], "GSI-DISK")
    world.claim("GSI")
    world.delete(rule)
    with world.db.write() as s:
        s.execute(tables.transfers.update().values(state=1))
    with pytest.raises(Refused, match="a transfer to GSI-DISK under way"):
        act(world, "decommission", "GSI-DISK", wire.Decommission(forget=True))


def test_the_ways_between_endpoints(world: World) -> None:
    with world.db.write() as s:
        made = endpoints.set_link(s, wire.LinkChange(source="GSI-DISK", target="HZDR-DISK", distance=7), ROOT)
        assert made == wire.Link(source="GSI-DISK", target="HZDR-DISK", distance=7, allowed=True)
        made = endpoints.set_link(s, wire.LinkChange(source="GSI-DISK", target="HZDR-DISK", allowed=False), ROOT)
        assert (made.distance, made.allowed) == (7, False)
        endpoints.set_link(s, wire.LinkChange(source="DESY-DISK", target="HZDR-DISK"), ROOT)
        page = endpoints.list_links(s, cursor=None, limit=1)
        assert [link.source for link in page.items] == ["DESY-DISK"]
        page = endpoints.list_links(s, cursor=page.next, limit=1)
        assert [link.source for link in page.items] == ["GSI-DISK"] and page.next is None
        assert len(endpoints.list_links(s, target="GSI-DISK", cursor=None, limit=9).items) == 0
        with pytest.raises(NotFound):
            endpoints.set_link(s, wire.LinkChange(source="GSI-DISK", target="NOWHERE"), ROOT)


def test_an_attribute_counts_in_expressions_at_once(world: World) -> None:
    """In Rucio an expression is answered from a cache for ten minutes."""
    names = world.files(2, "DESY-DISK")
    world.change("GSI-DISK", attributes={"pool": "a"})
    first = world.rule(names[0], "pool=a")
    world.change("GSI-DISK", attributes={"pool": None})
    world.change("HZDR-DISK", attributes={"pool": "a"})
    second = world.rule(names[1], "pool=a")
    assert [lock.endpoint for lock in world.explain(first).locks] == ["GSI-DISK"], "what is placed stays"
    assert [lock.endpoint for lock in world.explain(second).locks] == ["HZDR-DISK"]


def test_a_rule_that_takes_files_one_by_one_has_rows_only_where_files_live(world: World) -> None:
    """Six datasets, six endpoints: Rucio has 24 rows of dataset replicas, 14 of them for nothing."""
    for name in ("A-DISK", "B-DISK", "C-DISK"):
        world.endpoint(name)
    container = world.collection("c", "container")
    for i in range(6):
        dataset = world.collection(f"d{i}")
        world.files(4, "DESY-DISK", dataset)
        world.attach(container, dataset)
    before = world.count(tables.replicas)
    world.rule(container, "*\\DESY-DISK", grouping="none")
    assert world.count(tables.locks) == world.count(tables.replicas) - before == world.count(tables.transfers) == 24
    pair = sa.select(1).where(
        tables.replicas.c.file_id == tables.locks.c.unit_id,
        tables.replicas.c.endpoint_id == tables.locks.c.endpoint_id,
    )
    assert world.count(tables.locks, sa.exists(pair)) == 24
    world.check()


@pytest.mark.parametrize("db", ["postgresql"], indirect=True)
@pytest.mark.parametrize("grouping", ["dataset", "all", "none"])
def test_rules_that_come_at_once_never_promise_the_same_space_twice(world: World, grouping: str) -> None:
    world.endpoint("SMALL-DISK", capacity=20 * MB)
    datasets = []
    for i in range(8):
        datasets.append(world.collection(f"d{i}"))
        world.files(1, "DESY-DISK", datasets[-1], size=5 * MB)

    def wish(did: str) -> None:
        for _ in range(20):
            with contextlib.suppress(Conflict), world.db.write() as s:
                rules.add(s, ROOT, wire.NewRule(did=did, expression="SMALL-DISK", grouping=grouping))
                return

    assert at_once(*(functools.partial(wish, did) for did in datasets)) == [None] * 8
    assert world.used("SMALL-DISK") == 20 * MB
    world.evaluate()
    assert world.used("SMALL-DISK") == 20 * MB
    assert world.count(tables.rules, tables.rules.c.copies_missing > 0) == 4
    world.check()
