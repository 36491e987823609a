"""Endpoints that fail are left alone, everybody sees why, and one transfer finds out when they are well again."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import breakers, endpoints
from replica.db import tables
from replica.db.engine import Database
from tests.at_once import at_once
from tests.conftest import HandClock
from tests.replica.catalog.world import LEASE, MB, World, done, failed


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    made.endpoint("HZDR-TWO", "HZDR")
    return made


def wished(world: World, count: int, source: str, target: str) -> wire.Rule:
    dataset = world.collection(f"d{next(world._numbers)}")
    world.files(count, source, dataset, size=MB)
    return world.rule(dataset, target)


def broken(world: World, name: str) -> list[wire.Breaker]:
    with world.db.read() as s:
        return endpoints.get(s, name).breakers


def told(world: World) -> list[tuple[str, str, str]]:
    kept = tables.events.c
    with world.db.read() as s:
        found = s.execute(sa.select(kept.kind, kept.payload).where(kept.kind.like("%breaker%")).order_by(kept.id))
        return [(row.kind, row.payload["name"], row.payload["direction"]) for row in found]


def fail(world: World, count: int, error: str, side: Any, **fields: Any) -> list[wire.Order]:
    orders = world.claim("HZDR", count).orders
    assert len(orders) == count
    world.report("HZDR", [failed(o, error, side, **fields) for o in orders])
    return orders


@pytest.mark.parametrize(("error", "why"), [("no_space", "full"), ("forbidden", "denied"), ("unreachable", "away")])
def test_a_target_that_is_full_read_only_or_gone_is_left_alone_and_the_rest_goes_on(
    world: World, clock: HandClock, error: str, why: str
) -> None:
    rule = wished(world, 6, "DESY-DISK", "HZDR-DISK")
    wished(world, 2, "DESY-DISK", "HZDR-TWO")
    fail(world, 3, error, "target")
    assert {o.target_endpoint for o in world.claim("HZDR").orders} == {"HZDR-TWO"}
    (breaker,) = broken(world, "HZDR-DISK")
    assert (breaker.direction, breaker.state, breaker.why) == ("write", "open", why)
    assert breaker.hint and breaker.probe_at is not None and breaker.probe_at > clock.now
    assert told(world) == [("endpoint.breaker_opened", "HZDR-DISK", "write")]
    waiting = [t for t in world.transfers() if t.target == "HZDR-DISK" and t.attempts == 0]
    assert len(waiting) == 3
    assert all("HZDR-DISK is not written to since" in str(t.reason) for t in waiting)
    assert {t.not_before for t in waiting} == {breaker.probe_at}
    held = [w for w in world.explain(rule).waiting if w.code == f"breaker_{why}"]
    assert {(w.what, w.next_at, w.hint) for w in held} == {("held", breaker.probe_at, breaker.hint)}
    assert sum(w.files for w in held) == (6 if error == "forbidden" else 3), "with those whose next attempt is due"
    world.check()


def test_one_probe_goes_and_its_success_lets_the_others_through(world: World, clock: HandClock) -> None:
    wished(world, 6, "DESY-DISK", "HZDR-DISK")
    fail(world, 3, "unreachable", "target")
    clock.turn(seconds=30)
    (probe,) = world.claim("HZDR").orders
    assert world.claim("HZDR").orders == [], "exactly one"
    assert broken(world, "HZDR-DISK")[0].state == "half_open"
    world.woken.clear()
    world.report("HZDR", [done(probe)])
    assert "site.HZDR" in world.woken
    assert broken(world, "HZDR-DISK") == []
    assert [kind for kind, *_ in told(world)] == ["endpoint.breaker_opened", "endpoint.breaker_closed"]
    assert len(world.claim("HZDR").orders) == 5
    world.check()


def test_a_probe_that_fails_makes_the_pause_longer_and_one_that_is_lost_is_followed_by_another(
    world: World, clock: HandClock
) -> None:
    wished(world, 8, "DESY-DISK", "HZDR-DISK")
    fail(world, 3, "unreachable", "target")
    opened = broken(world, "HZDR-DISK")[0]
    clock.turn(seconds=30)
    (lost,) = world.claim("HZDR").orders
    clock.turn(seconds=LEASE + 1)
    assert world.claim("HZDR").orders == []
    world.expire()
    (probe,) = world.claim("HZDR").orders
    assert (probe.transfer, probe.epoch) != (lost.transfer, lost.epoch)
    world.report("HZDR", [failed(probe, "unreachable", "target")])
    again = broken(world, "HZDR-DISK")[0]
    assert (again.state, again.since) == ("open", opened.since)
    assert again.probe_at is not None and (again.probe_at - clock.now).total_seconds() == 60
    assert len(told(world)) == 1, "it is still the same trouble"


def test_a_source_that_is_gone_is_not_named_and_the_others_are(world: World, clock: HandClock) -> None:
    wished(world, 6, "DESY-DISK", "HZDR-DISK")
    fail(world, 3, "unreachable", "source")
    assert [b.direction for b in broken(world, "DESY-DISK")] == ["read"]
    dataset = world.collection("both")
    names = world.files(2, "DESY-DISK", dataset, size=MB)
    world.register(names, "GSI-DISK", size=MB)
    world.rule(dataset, "HZDR-DISK")
    orders = world.claim("HZDR").orders
    assert [[s.endpoint for s in o.sources] for o in orders] == [["GSI-DISK"]] * 2
    assert world.claim("HZDR") == wire.Orders(orders=[], lease_seconds=LEASE, more=False)
    waiting = [t for t in world.transfers() if t.state == "queued" and t.attempts == 0]
    assert len(waiting) == 3
    assert all("DESY-DISK is not read from since" in str(t.reason) for t in waiting)
    clock.turn(seconds=30)
    (probe,) = world.claim("HZDR").orders
    assert [s.endpoint for s in probe.sources] == ["DESY-DISK"]
    world.report("HZDR", [done(probe)])
    assert len(world.claim("HZDR").orders) > 1


def test_another_copy_that_comes_sets_free_what_waits_for_a_broken_source(world: World) -> None:
    dataset = world.collection("d")
    names = world.files(6, "DESY-DISK", dataset, size=MB)
    world.rule(dataset, "HZDR-DISK")
    fail(world, 3, "unreachable", "source")
    assert world.claim("HZDR").orders == []
    world.register(names, "GSI-DISK", size=MB)
    assert [o.sources[0].endpoint for o in world.claim("HZDR").orders] == ["GSI-DISK"] * 3


@pytest.mark.parametrize("error", ["checksum_differs", "source_missing", "target_exists", "source_changed"])
def test_what_is_wrong_with_files_leaves_the_endpoints_alone(world: World, error: str) -> None:
    wished(world, 12, "DESY-DISK", "HZDR-DISK")
    fail(world, 6, error, "source")
    fail(world, 6, error, "target")
    assert broken(world, "DESY-DISK") == broken(world, "HZDR-DISK") == []


def test_a_storage_that_asks_for_a_pause_gets_it_from_all(world: World, clock: HandClock) -> None:
    wished(world, 3, "DESY-DISK", "HZDR-DISK")
    fail(world, 1, "busy", "target", retry_after_seconds=77.0)
    (breaker,) = broken(world, "HZDR-DISK")
    assert breaker.why == "throttled" and breaker.probe_at is not None
    assert (breaker.probe_at - clock.now).total_seconds() == 77
    assert world.claim("HZDR").orders == []


def test_a_person_who_mended_it_need_not_wait(world: World) -> None:
    wished(world, 5, "DESY-DISK", "HZDR-DISK")
    fail(world, 3, "no_space", "target")
    assert world.claim("HZDR").orders == []
    with world.db.write() as s:
        endpoints.unban(s, "HZDR-DISK")
    assert broken(world, "HZDR-DISK") == []
    assert len(world.claim("HZDR").orders) == 2


def test_of_many_claims_at_once_at_two_sites_one_sends_the_probe(postgresql_url: str, clock: HandClock) -> None:
    db = Database(postgresql_url, clock=clock, pool_size=12)
    world = World(db)
    world.three()
    for target in ("HZDR-DISK", "GSI-DISK"):
        wished(world, 20, "DESY-DISK", target)
    fail(world, 3, "unreachable", "source")
    for _ in range(3):
        clock.turn(minutes=30)
        sites = ["HZDR", "GSI"] * 4
        claims: Any = at_once(*[lambda site=site: world.claim(site) for site in sites])
        sent = [(site, o) for site, claim in zip(sites, claims, strict=True) for o in claim.orders]
        assert len(sent) == 1
        ((site, probe),) = sent
        world.report(site, [failed(probe, "unreachable", "source")])
    with db.read() as s:
        assert breakers.of_endpoint(s, 1)[0].why == "away"
    db.close()
