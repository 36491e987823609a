"""The pass: every endpoint in turn, slice after slice, and nothing done twice for what must stay."""

from __future__ import annotations

import pytest

from replica.db.engine import Database
from tests.conftest import HandClock
from tests.replica.catalog.cleaning import CleanWorld
from workers import deletion


@pytest.fixture
def world(db: Database, clock: HandClock) -> CleanWorld:
    made = CleanWorld(db)
    made.three()
    return made


def test_a_pass_decides_at_every_endpoint_and_then_rests(world: CleanWorld) -> None:
    names = world.files(3, "DESY-DISK")
    for name in ("HZDR-DISK", "GSI-DISK"):
        world.register(names, name)
    lonely = world.files(2, "GSI-DISK")
    for at, those in (("DESY-DISK", names), ("GSI-DISK", [*names, *lonely])):
        world.released(those, at)
        world.set_endpoint(at, draining=True)
    report = deletion.delete(world.db)
    assert (report.done, report.more) == (6, False)
    assert world.woken >= {"site.DESY", "site.GSI"}
    assert deletion.delete(world.db).seen == 0  # the last copies stay, and are no reason to tell of a pass
    assert world.remove("DESY") + world.remove("GSI") == 6
    world.check()


def test_a_lost_lease_goes_back_to_the_queue(world: CleanWorld, clock: HandClock) -> None:
    (name,) = world.files(1, "DESY-DISK")
    world.register([name], "HZDR-DISK")
    world.ask(name, "DESY-DISK")
    assert len(world.take("DESY").orders) == 1
    clock.turn(seconds=121)
    assert deletion.release(world.db).done == 1
    assert deletion.release(world.db).done == 0
    assert world.remove("DESY") == 1
