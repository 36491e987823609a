"""Activities share a site's workers by weight, over many claims; nothing waits for ever."""

from __future__ import annotations

from collections import Counter

import pytest

from replica import wire
from replica.catalog import activities
from replica.db.engine import Database
from tests.conftest import HandClock
from tests.replica.catalog.world import MB, World


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def wished(world: World, count: int, activity: str, **fields: object) -> None:
    dataset = world.collection(f"d{next(world._numbers)}")
    world.files(count, "DESY-DISK", dataset, size=MB)
    world.rule(dataset, "HZDR-DISK", activity=activity, **fields)


def claimed(world: World, limit: int) -> Counter[str]:
    activity = {t.id: t.activity for t in world.transfers()}
    return Counter(activity[o.transfer] for o in world.claim("HZDR", limit).orders)


def test_over_many_claims_each_activity_has_its_part_whatever_the_length_of_a_claim(world: World) -> None:
    for name, weight in (("raw", 300), ("test", 50)):
        with world.db.write() as s:
            activities.set_weight(s, wire.NewActivity(name=name, weight=weight))
    for name in ("raw", "default", "test"):
        wished(world, 200, name, priority=1 if name == "raw" else 5)
    got: Counter[str] = Counter()
    for limit in (1, 1, 2, 7, 30, 1, 3, 50, 11, 40):
        got += claimed(world, limit)
        whole = got.total()
        for name, weight in (("raw", 300), ("default", 100), ("test", 50)):
            assert abs(got[name] - whole * weight / 450) <= 1, got
    assert got.total() >= 140
    world.check()


def test_who_is_alone_gets_everything_and_who_comes_later_is_owed_nothing(world: World) -> None:
    wished(world, 60, "a")
    assert claimed(world, 40) == {"a": 40}
    wished(world, 30, "b")
    assert claimed(world, 20) == {"a": 10, "b": 10}


def test_the_old_goes_before_the_urgent_that_came_much_later(world: World, clock: HandClock) -> None:
    wished(world, 2, "a", priority=1)
    clock.turn(hours=23)
    wished(world, 2, "a", priority=5)
    assert [o.transfer for o in world.claim("HZDR", 2).orders] == [3, 4], "four steps of priority are a day"
    clock.turn(hours=2)
    wished(world, 2, "a", priority=5)
    assert [o.transfer for o in world.claim("HZDR", 2).orders] == [1, 2]
