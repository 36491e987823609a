"""Which copy is read first and why, and how many at once: as claims write it into orders."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from replica import wire
from replica.catalog import deletions, endpoints, fsck, limits, transfers
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Conflict
from rules.sources import MEASURED_BYTES, SHARE_BYTES
from tests.at_once import at_once
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, ROOT, World, done, failed


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    made.endpoint("PSI-DISK")
    return made


def copies(world: World, count: int, *at: str, size: int = MB, target: str = "HZDR-DISK") -> list[str]:
    dataset = world.collection(f"d{next(world._numbers)}")
    names = world.files(count, at[0], dataset, size=size)
    for place in at[1:]:
        world.register(names, place, size=size)
    world.rule(dataset, target)
    return names


def link(world: World, source: str, target: str, **fields: Any) -> None:
    with world.db.write() as s:
        endpoints.set_link(s, wire.LinkChange(source=source, target=target, **fields))


def limit(world: World, kind: str, of: str, **fields: Any) -> None:
    with world.db.write() as s:
        limits.set_limit(s, wire.LimitChange(kind=kind, of=of, **fields))


def show(world: World, transfer: int) -> wire.Transfer:
    with world.db.read() as s:
        return transfers.get(s, transfer)


def firsts(orders: wire.Orders) -> list[str]:
    return [order.sources[0].endpoint for order in orders.orders]


def test_a_link_measured_as_clearly_slower_comes_last_and_the_reason_is_told(world: World, clock: HandClock) -> None:
    size = 2 * MEASURED_BYTES
    copies(world, 1, "DESY-DISK", size=size)
    copies(world, 1, "GSI-DISK", size=size)
    for order in world.claim("HZDR").orders:
        world.report("HZDR", [done(order, seconds=30.0 if order.sources[0].endpoint == "DESY-DISK" else 1.0)])
    copies(world, 3, "DESY-DISK", "GSI-DISK")
    orders = world.claim("HZDR")
    assert firsts(orders) == ["GSI-DISK"] * 3
    told = show(world, orders.orders[0].transfer)
    assert (told.source, told.source_why) == (
        "GSI-DISK",
        "GSI-DISK: DESY-DISK was clearly slower in the last hour (1.1 MB/s, not 33.6 MB/s)",
    )
    clock.turn(hours=1, minutes=6)
    copies(world, 2, "DESY-DISK", "GSI-DISK")
    assert firsts(world.claim("HZDR")) == ["DESY-DISK"] * 2, "that is forgotten, and three still read from GSI-DISK"


def test_failures_of_the_last_hour_count_unless_they_were_the_targets(world: World) -> None:
    for source, side in (("DESY-DISK", "target"), ("GSI-DISK", "source")):
        copies(world, 4, source)
        world.report("HZDR", [failed(order, "timed_out", side) for order in world.claim("HZDR").orders])
    copies(world, 2, "DESY-DISK", "GSI-DISK")
    with world.db.write() as s:
        s.execute(tables.breakers.delete())
    assert firsts(world.claim("HZDR")) == ["DESY-DISK"] * 2


def test_equally_good_sources_share_the_work(world: World) -> None:
    copies(world, 6, "DESY-DISK", "GSI-DISK", "PSI-DISK")
    assert Counter(firsts(world.claim("HZDR", 4))) == {"DESY-DISK": 2, "GSI-DISK": 1, "PSI-DISK": 1}
    assert firsts(world.claim("HZDR")) == ["GSI-DISK", "PSI-DISK"], "what others read already counts"


def test_a_copy_that_is_to_be_deleted_is_not_named(world: World) -> None:
    (name,) = copies(world, 1, "DESY-DISK", "GSI-DISK", target="PSI-DISK")
    world.change("DESY-DISK", grace_seconds=3600)
    with world.db.write() as s:
        deletions.ask(s, ROOT, wire.NewDeletion(did=name, endpoint="DESY-DISK"))
    (order,) = world.claim("PSI").orders
    assert [source.endpoint for source in order.sources] == ["GSI-DISK"]


def test_a_large_file_is_read_from_equally_good_sources_that_all_count(world: World) -> None:
    size = 2 * SHARE_BYTES
    link(world, "PSI-DISK", "HZDR-DISK", distance=2)
    limit(world, "read", "GSI-DISK", files_max=1)
    copies(world, 3, "DESY-DISK", "GSI-DISK", "PSI-DISK", size=size)
    orders = world.claim("HZDR").orders
    named = [([s.endpoint for s in order.sources], order.sources_at_once) for order in orders]
    assert named == [
        (["DESY-DISK", "GSI-DISK", "PSI-DISK"], 2),
        (["DESY-DISK", "PSI-DISK"], 1),
        (["DESY-DISK", "PSI-DISK"], 1),
    ]
    with world.db.read() as s:
        (told,) = limits.list_all(s).items
        assert (told.files_in_flight, told.bytes_in_flight) == (1, size)
        assert limits.readers(s) == {1: 3, 3: 1}
    assert show(world, orders[0].transfer).also_from == ["GSI-DISK"]
    read = {"DESY-DISK": size // 4, "GSI-DISK": size * 3 // 4}
    world.report("HZDR", [done(orders[0], seconds=2.0, read_from=read)])
    with world.db.read() as s:
        assert limits.list_all(s).items[0].files_in_flight == 0
        rows = s.execute(tables.traffic.select().order_by("source_id")).all()
        assert [(r.source_id, r.files, r.bytes, r.seconds) for r in rows] == [
            (1, 1, size // 4, 2.0),
            (3, 0, size * 3 // 4, 2.0),
        ]
        assert not [f for f in fsck.examine(s) if f.violations]
    assert show(world, orders[0].transfer).also_from == []


def test_sources_at_once_never_exceed_a_limit_whoever_claims(postgresql_url: str) -> None:
    db = Database(postgresql_url, pool_size=10)
    world = World(db)
    world.three()
    for name in ("PSI-DISK", "HZDR-TWO"):
        world.endpoint(name, name.split("-")[0])
    for target in ("HZDR-DISK", "HZDR-TWO", "GSI-DISK"):
        copies(world, 30, "DESY-DISK", "PSI-DISK", size=3 * SHARE_BYTES, target=target)
    limit(world, "read", "DESY-DISK", files_max=5)
    limit(world, "read", "PSI-DISK", bytes_max=4 * 3 * SHARE_BYTES)
    limit(world, "link", "HZDR-TWO", source="PSI-DISK", files_max=2)
    counted: Counter[int] = Counter()

    def work(number: int) -> None:
        dice, site = random.Random(number), ("HZDR", "GSI")[number % 2]
        for _ in range(20):
            try:
                orders = world.claim(site, 3).orders
                counted.update(order.sources_at_once for order in orders)
                with db.read() as s:
                    for each in limits.list_all(s).items:
                        assert each.files_max is None or each.files_in_flight <= each.files_max, each
                        assert each.bytes_max is None or each.bytes_in_flight <= each.bytes_max, each
                mine = [done(o) if dice.random() < 0.8 else failed(o, "timed_out") for o in orders]
                if mine:
                    world.report(site, mine[dice.randrange(2) :])
            except Conflict:
                pass

    assert at_once(*[lambda n=n: work(n) for n in range(6)]) == [None] * 6
    assert counted[2] > 5
    db.close()
