"""Limits on what is in flight hold exactly, whoever claims, and stop nothing that is not under them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from replica import wire
from replica.catalog import accounts, limits, rules
from replica.db.engine import Database
from rules.errors import Conflict, Invalid
from rules.permissions import Actor, Role
from tests.at_once import at_once
from tests.conftest import HandClock
from tests.replica.catalog.world import LEASE, MB, World, done, failed

COUNT = Callable[[Database], AbstractContextManager[Any]]


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def limit(world: World, kind: str, of: str, **fields: Any) -> wire.Limit:
    with world.db.write() as s:
        return limits.set_limit(s, wire.LimitChange(kind=kind, of=of, **fields))


def shown(world: World) -> dict[tuple[str, str], tuple[int, int]]:
    with world.db.read() as s:
        return {(x.kind, x.of): (x.files_in_flight, x.bytes_in_flight) for x in limits.list_all(s).items}


def wished(world: World, count: int, source: str, target: str, **fields: Any) -> wire.Rule:
    dataset = world.collection(f"d{next(world._numbers)}")
    world.files(count, source, dataset, size=MB)
    return world.rule(dataset, target, **fields)


@pytest.mark.parametrize(
    ("kind", "of", "source"),
    [
        ("write", "HZDR-DISK", None),
        ("read", "DESY-DISK", None),
        ("link", "HZDR-DISK", "DESY-DISK"),
        ("activity", "default", None),
        ("account", "root", None),
    ],
)
def test_each_kind_of_limit_holds_and_gives_way_as_transfers_end(
    world: World, kind: str, of: str, source: str | None
) -> None:
    wished(world, 5, "DESY-DISK", "HZDR-DISK")
    limit(world, kind, of, source=source, files_max=2)
    first = world.claim("HZDR").orders
    assert len(first) == 2
    assert world.claim("HZDR").orders == []
    world.woken.clear()
    world.report("HZDR", [done(first[0])])
    assert "site.HZDR" in world.woken, "nobody else would ask for what waits"
    assert len(world.claim("HZDR").orders) == 1
    limit(world, kind, of, source=source, files_max=None, bytes_max=MB * 5 // 2)
    assert world.claim("HZDR").orders == [], "two are in flight, and half a file is left"
    limit(world, kind, of, source=source, bytes_max=None)
    assert len(world.claim("HZDR").orders) == 2
    assert shown(world) == {}
    world.check()


def test_what_is_full_is_passed_over_and_holds_up_nothing_behind_it(world: World) -> None:
    world.endpoint("HZDR-TWO", "HZDR")
    wished(world, 4, "DESY-DISK", "HZDR-DISK", priority=5)
    wished(world, 4, "GSI-DISK", "HZDR-DISK", priority=3)
    wished(world, 3, "DESY-DISK", "HZDR-TWO")
    limit(world, "read", "DESY-DISK", files_max=1)
    orders = []
    for _ in range(4):  # what has no room is sent to a lane of its own on the way
        orders += world.claim("HZDR", 3).orders
    assert Counter(o.sources[0].endpoint for o in orders) == {"DESY-DISK": 1, "GSI-DISK": 4}
    assert world.claim("HZDR", 3) == wire.Orders(orders=[], lease_seconds=LEASE, more=False, full=True)
    limit(world, "read", "DESY-DISK", files_max=100)
    assert len(world.claim("HZDR").orders) == 6
    assert {t.reason for t in world.transfers()} == {None}


def test_another_source_with_room_is_used_and_no_order_names_a_limited_one_besides(world: World) -> None:
    dataset = world.collection("d")
    names = world.files(6, "DESY-DISK", dataset, size=MB)
    world.register(names, "GSI-DISK", size=MB)
    world.rule(dataset, "HZDR-DISK")
    limit(world, "read", "DESY-DISK", files_max=2)
    limit(world, "link", "HZDR-DISK", source="GSI-DISK", files_max=3)
    named = [[s.endpoint for s in order.sources] for order in world.claim("HZDR").orders]
    assert sorted(named) == [["DESY-DISK"]] * 2 + [["GSI-DISK"]] * 3
    assert shown(world) == {("link", "GSI-DISK → HZDR-DISK"): (3, 3 * MB), ("read", "DESY-DISK"): (2, 2 * MB)}


def test_a_file_larger_than_the_limit_goes_alone(world: World) -> None:
    wished(world, 2, "DESY-DISK", "HZDR-DISK")
    limit(world, "write", "HZDR-DISK", bytes_max=MB // 2)
    (order,) = world.claim("HZDR").orders
    assert world.claim("HZDR").orders == []
    world.report("HZDR", [failed(order, "refused")])
    assert len(world.claim("HZDR").orders) == 1


def test_the_person_sees_what_is_full(world: World) -> None:
    rule = wished(world, 3, "DESY-DISK", "HZDR-DISK")
    limit(world, "read", "DESY-DISK", files_max=1)
    for _ in range(2):
        world.claim("HZDR")
    waiting = [t.reason for t in world.transfers() if t.state == "queued"]
    assert waiting == ["DESY-DISK: at most 1 file may be in flight read from it"] * 2
    (held,) = [w for w in world.explain(rule).waiting if w.what == "held"]
    assert (held.code, held.files) == ("limit", 2)
    assert "DESY-DISK" in held.message


def test_a_limit_of_a_link_names_both_ends_and_others_one(world: World) -> None:
    for fields in ({"kind": "link", "of": "HZDR-DISK"}, {"kind": "read", "of": "HZDR-DISK", "source": "GSI-DISK"}):
        with pytest.raises(Invalid, match="names its source"):
            limit(world, **fields, files_max=1)


def test_limits_cost_a_claim_a_few_statements_more_and_no_more_for_more_transfers(
    world: World, count_statements: COUNT
) -> None:
    wished(world, 501, "DESY-DISK", "HZDR-DISK")
    limit(world, "read", "DESY-DISK", files_max=1_000)
    counts = []
    for most in (1, 400):
        with count_statements(world.db) as statements:
            assert len(world.claim("HZDR", most).orders) == most
        counts.append(statements.count)
    assert counts[0] >= counts[1], counts
    assert counts[1] <= (24 if world.db.url.get_backend_name() == "sqlite" else 18), counts


def test_eight_claimers_of_two_sites_at_once_never_exceed_any_limit(postgresql_url: str) -> None:
    db = Database(postgresql_url, pool_size=12)
    world = World(db)
    world.three()
    world.endpoint("HZDR-TWO", "HZDR")
    user = Actor("alice", Role.USER)
    with db.write() as s:
        accounts.add(s, wire.NewAccount(name="alice"))
    for number in range(8):
        source = ("DESY-DISK", "GSI-DISK")[number % 2]
        dataset = world.collection(f"d{number}")
        world.files(40, source, dataset, size=MB)
        targets = "HZDR-DISK|HZDR-TWO" if number % 2 else "HZDR-DISK|GSI-DISK"
        with db.write() as s:
            activity = ("raw", "default")[number // 4]
            new = wire.NewRule(did=dataset, expression=targets, copies=2, activity=activity)
            rules.add(s, user if number in (2, 3) else Actor("root", Role.ADMIN), new)
    maxima = {
        ("read", "DESY-DISK"): (9, None),
        ("write", "HZDR-DISK"): (11, None),
        ("write", "HZDR-TWO"): (None, 7 * MB),
        ("link", "HZDR-DISK"): (5, None),
        ("activity", "raw"): (13, None),
        ("account", "alice"): (4, None),
    }
    for (kind, of), (files, size) in maxima.items():
        limit(world, kind, of, files_max=files, bytes_max=size, source="GSI-DISK" if kind == "link" else None)

    ended: list[int] = []

    def check() -> None:
        with db.read() as s:
            for each in limits.list_all(s).items:
                assert each.files_max is None or each.files_in_flight <= each.files_max, each
                assert each.bytes_max is None or each.bytes_in_flight <= each.bytes_max, each

    def work(number: int) -> None:
        dice, site = random.Random(number), ("HZDR", "HZDR", "GSI")[number % 3]
        for _ in range(25):
            try:
                orders = world.claim(site, 7).orders
                check()
                if orders:
                    mine = [done(o) if dice.random() < 0.8 else failed(o, "timed_out") for o in orders]
                    ended.append(world.report(site, mine[: len(mine) * 2 // 3 + 1]).accepted)
            except Conflict:
                pass
            check()

    assert at_once(*[lambda n=n: work(n) for n in range(8)]) == [None] * 8
    assert sum(ended) > 200
    db.close()
