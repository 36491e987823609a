"""A year by a clock that the test turns: lifetimes, undo times and late starts come when they should, not before."""

from __future__ import annotations

from datetime import timedelta

import pytest

from replica import wire
from replica.catalog import did_deletion, dids, fsck
from replica.db.engine import Database
from replica.db.tables import rules as rules_table
from rules.errors import NotFound
from rules.names import Did
from tests.conftest import HandClock
from tests.replica.catalog.cleaning import CleanWorld
from tests.replica.catalog.world import ROOT
from workers.app import TIMETABLE

DAY = 86_400


def a_week_passes(world: CleanWorld, clock: HandClock) -> None:
    """Everything that happens when nobody is asking, until there is no more of it; then the sites do their work."""
    clock.turn(days=7)
    for _ in range(3):
        for entry in TIMETABLE:
            for _ in range(100):
                if not entry.function()(world.db).more:
                    break
            else:
                raise AssertionError(f"{entry.name} does not come to an end")
        world.move()
        for site in world.sites:
            world.remove(site)
    world.check()
    assert fsck.check(world.db).clean


def is_known(world: CleanWorld, did: str) -> bool:
    with world.db.read() as s:
        try:
            dids.get(s, Did.parse(did))
        except NotFound:
            return False
    return True


def test_a_year(db: Database, clock: HandClock) -> None:
    world = CleanWorld(db)
    world.three()
    world.set_endpoint("HZDR-DISK", delete_at_once=True, grace_seconds=10 * DAY)
    raw, late, kept = (world.collection(name) for name in ("raw", "late", "kept"))
    with world.db.write() as s:
        dids.add(s, ROOT, wire.NewDid(did="t:brief", lifetime_seconds=90 * DAY))
    for dataset in (raw, late, kept):
        world.files(2, "DESY-DISK", dataset)
    world.files(2, "GSI-DISK", "t:brief")
    [a_raw, *_], [a_late, *_], [a_brief, *_] = (
        [d.did for d in contents(world, name)] for name in (raw, late, "t:brief")
    )

    forever = world.rule(raw, "DESY-DISK", locked=True)
    month = world.rule(raw, "HZDR-DISK", lifetime_seconds=30 * DAY)
    starts = clock() + timedelta(days=60)
    waits = world.rule(late, "HZDR-DISK", not_before=starts)
    year = world.rule(kept, "GSI-DISK", lifetime_seconds=350 * DAY, purge=True)
    brief = world.rule("t:brief", "GSI-DISK")

    for week in range(1, 53):
        a_week_passes(world, clock)
        day = 7 * week
        state = {r.id: world.show(r).state for r in (forever, month, waits, year, brief)}
        assert state[forever.id] == "ok"
        assert state[month.id] == ("ok" if day < 30 else "expired"), day
        # Ten days of grace, in which it could be undone, come after the end.
        if day < 30:
            assert world.where(a_raw) == {"DESY-DISK": "available", "HZDR-DISK": "available"}
        elif day > 49:
            assert world.where(a_raw) == {"DESY-DISK": "available"}, day
        assert state[waits.id] == ("ok" if day >= 60 else state[waits.id])
        assert ("HZDR-DISK" in world.where(a_late)) == (day >= 60), day
        # What expired can be had back for a week; it is protected as long, though nobody sees it.
        assert is_known(world, "t:brief") == (day < 90), day
        assert state[brief.id] == ("ok" if day < 97 else "expired"), day
        # Its files were not deleted with it, and of each this is the last copy: whoever wants it gone must say so.
        assert world.where(a_brief) == {"GSI-DISK": "available"}
        assert state[year.id] == ("ok" if day < 350 else "expired"), day
    assert world.count(rules_table, rules_table.c.ended_at.is_(None)) == 2


def contents(world: CleanWorld, did: str) -> list[wire.Did]:
    with world.db.read() as s:
        return dids.contents(s, Did.parse(did), None, 100).items


@pytest.mark.parametrize("gone", [False, True])
def test_what_was_deleted_can_be_had_back_for_a_week(db: Database, clock: HandClock, gone: bool) -> None:
    world = CleanWorld(db)
    world.three()
    data = world.collection("data")
    [name] = world.files(1, "DESY-DISK", data)
    rule = world.rule(data, "DESY-DISK")
    with world.db.write() as s:
        did_deletion.delete(s, [Did.parse(data), Did.parse(name)], ROOT)
    if gone:
        a_week_passes(world, clock)
        a_week_passes(world, clock)
        assert (world.show(rule).state, world.where(name)) == ("expired", {})
        return
    with world.db.write() as s:
        did_deletion.undelete(s, [Did.parse(data), Did.parse(name)], ROOT)
    a_week_passes(world, clock)
    assert (world.show(rule).state, world.where(name)) == ("ok", {"DESY-DISK": "available"})
