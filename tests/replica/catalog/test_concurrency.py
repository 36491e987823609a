"""What may be in flight adapts through real claims and reports, is never exceeded, and always says why."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import concurrency, limits
from replica.db import tables
from replica.db.engine import Database
from rules.concurrency import FIRST, State
from rules.errors import Invalid
from rules.limits import PARTS, parts_of
from rules.sources import SHARE_BYTES
from tests.at_once import at_once
from tests.conftest import HandClock
from tests.replica.catalog.world import KB, MB, World, done, failed

COUNT = Callable[[Database], AbstractContextManager[Any]]
LARGE = 8 * MB


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    made = World(db)
    made.three()
    return made


def wished(world: World, count: int, source: str, target: str, size: int = LARGE) -> None:
    dataset = world.collection(f"d{next(world._numbers)}")
    world.files(count, source, dataset, size=size)
    world.rule(dataset, target)


def adapt(world: World) -> tuple[int, int]:
    with world.db.write() as s:
        return concurrency.adapt(s)


def shown(world: World) -> dict[tuple[str, str], wire.Limit]:
    with world.db.read() as s:
        return {(x.kind, x.of): x for x in limits.list_all(s).items}


def slots(world: World) -> dict[tuple[str, str], int | None]:
    return {key: each.slots for key, each in shown(world).items()}


def change(world: World, kind: str, of: str, **fields: Any) -> wire.Limit:
    with world.db.write() as s:
        return limits.set_limit(s, wire.LimitChange(kind=kind, of=of, **fields))


def put(world: World, kind: str, of: str, number: int, source: str | None = None) -> None:
    """A number, as if it had been decided."""
    with world.db.write() as s:
        kind, key = limits.key_of(s, kind, of, source)
        row = {"kind": kind, "key": key, "number": number, "why": "start", "reason": "a test", "flight": 0, "looks": 1}
        at = dict.fromkeys(("decided_at", "measured_at", "counted_since", "active_at"), s.now)
        s.execute(tables.concurrency.insert(), {**row, **at, "state": State(number).document(), "counted": [0.0] * 5})


def check(world: World) -> None:
    for each in shown(world).values():
        assert each.files_max is None or each.files_in_flight <= each.files_max, each


class Line:
    """Workers of HZDR that carry at most so many files of DESY in half a minute, each of them one."""

    def __init__(self, world: World, clock: HandClock, most: int) -> None:
        self.world, self.clock, self.most = world, clock, most
        self.held: list[wire.Order] = []

    def minute(self, errors: float = 0.0) -> wire.Limit | None:
        for _ in range(2):
            self._claim()
            self.clock.turn(seconds=30)
            ended, self.held = self.held[: self.most], self.held[self.most :]
            every = round(1 / errors) if errors else 0
            told = [failed(o, "timed_out") if every and i % every == 1 else done(o) for i, o in enumerate(ended)]
            if told:
                self.world.report("HZDR", told)
        self._claim()
        adapt(self.world)
        return shown(self.world).get(("write", "HZDR-DISK"))

    def _claim(self) -> None:
        before = shown(self.world).get(("write", "HZDR-DISK"))
        orders = self.world.claim("HZDR").orders
        self.held += orders
        if orders:  # what was in flight when the number fell may end in peace
            check(self.world)
        if orders and before is not None and before.slots is not None:
            assert len(self.held) <= before.slots


def test_it_climbs_while_that_pays_falls_on_errors_and_comes_back(world: World, clock: HandClock) -> None:
    wished(world, 1_300, "DESY-DISK", "HZDR-DISK")
    change(world, "write", "HZDR-DISK", files_max=FIRST)  # who finds no number claims all there is
    line = Line(world, clock, most=20)
    first = line.minute()
    assert first is not None
    assert (first.slots, first.why, first.slots_in_flight) == (FIRST, "start", FIRST)
    change(world, "write", "HZDR-DISK", files_max=None)
    climbed = [line.minute() for _ in range(4)]
    assert [each.slots for each in climbed[:2] if each] == [16, 32]
    line.most = 60  # from here on each carries one, whatever their number
    numbers = [each.slots for _ in range(4) if (each := line.minute()) is not None]
    before = numbers[-1]
    fallen = line.minute(errors=0.34)
    assert fallen is not None
    assert fallen.why == "errors"
    assert fallen.slots is not None and before is not None
    assert fallen.slots <= 0.75 * before
    assert "failed" in (fallen.reason or "")
    back = [line.minute() for _ in range(4)][-1]
    assert back is not None and (back.slots or 0) >= 0.8 * before
    with world.look() as s:
        told = concurrency.history(s, "write", "HZDR-DISK", None, 100).items
    assert [told[-1].why, told[-1].before, told[-1].slots] == ["start", None, FIRST]
    assert "errors" in {each.why for each in told}
    assert all(older.slots == newer.before for newer, older in itertools.pairwise(told))
    assert all(each.reason and each.measured["seconds"] >= 0 for each in told)
    world.check()


def test_people_bound_it_and_switch_it_off(world: World, clock: HandClock) -> None:
    wished(world, 400, "DESY-DISK", "HZDR-DISK")
    put(world, "write", "HZDR-DISK", 12)
    line = Line(world, clock, most=20)
    line.minute()
    change(world, "write", "HZDR-DISK", files_max=5)
    line.minute()
    decided = line.minute()
    assert decided is not None and (decided.slots, decided.files_max, len(line.held)) == (5, 5, 5)
    assert change(world, "write", "HZDR-DISK", files_max=None, adaptive=False).adaptive is False
    assert ("write", "HZDR-DISK") in shown(world), "that it is fixed is told"
    assert len(world.claim("HZDR", 30).orders) == 30, "nothing limits it"
    for _ in range(3):
        line.minute()
    assert slots(world) == {("write", "HZDR-DISK"): None}
    assert change(world, "write", "HZDR-DISK", adaptive=True).adaptive
    line.minute()
    assert (slots(world)["write", "HZDR-DISK"] or 0) >= FIRST
    with world.db.write() as s:
        assert concurrency.switch_off(s) == 1
    assert shown(world) == {}
    with pytest.raises(Invalid, match="does not adapt"):
        change(world, "activity", "raw", adaptive=False)


def test_links_have_numbers_where_there_are_several_and_sources_where_several_lead_from_them(
    world: World, clock: HandClock
) -> None:
    wished(world, 3, "DESY-DISK", "HZDR-DISK")
    world.claim("HZDR")
    adapt(world)
    assert set(slots(world)) == {("write", "HZDR-DISK")}, "one link to it: its number would be the same again"
    wished(world, 3, "GSI-DISK", "HZDR-DISK")
    wished(world, 3, "DESY-DISK", "GSI-DISK")
    world.claim("HZDR")
    world.claim("GSI")
    adapt(world)
    assert set(slots(world)) == {
        *[("write", "HZDR-DISK"), ("write", "GSI-DISK"), ("read", "DESY-DISK")],
        *[("link", "DESY-DISK → HZDR-DISK"), ("link", "GSI-DISK → HZDR-DISK")],
    }
    change(world, "read", "GSI-DISK", adaptive=False)
    assert ("link", "GSI-DISK → HZDR-DISK") not in shown(world), "of an endpoint that is fixed, the links are, too"
    clock.turn(seconds=20)
    adapt(world)
    assert slots(world)["read", "GSI-DISK"] is None
    assert ("link", "GSI-DISK → HZDR-DISK") not in shown(world)
    clock.turn(hours=1)
    world.expire()
    for _ in range(5):
        clock.turn(hours=1)
        adapt(world)
    assert set(slots(world)) == {("read", "GSI-DISK")}, "nothing goes there any more"


def test_small_files_share_a_slot_and_the_least_of_both_holds(world: World) -> None:
    wished(world, 300, "DESY-DISK", "HZDR-DISK", size=KB)
    wished(world, 3, "DESY-DISK", "HZDR-DISK")
    put(world, "write", "HZDR-DISK", 2)
    orders = world.claim("HZDR").orders
    assert sum(parts_of(o.size) for o in orders) <= 2 * PARTS
    assert len(orders) == 2 * PARTS
    (each,) = shown(world).values()
    assert (each.slots_in_flight, each.files_in_flight, each.slots) == (2.0, 256, 2)
    assert world.claim("HZDR").orders == []
    waiting = {t.reason for t in world.transfers() if t.state == "queued"}
    assert waiting == {"HZDR-DISK: at most 2 slots by what was measured may be in flight written to it"}
    change(world, "write", "HZDR-DISK", files_max=5)
    world.report("HZDR", [done(o) for o in orders[:252]])
    assert len(world.claim("HZDR").orders) == 1, "five files, whatever slots they share"


def test_bytes_that_flow_count_before_the_file_is_complete(world: World, clock: HandClock) -> None:
    wished(world, 8, "DESY-DISK", "HZDR-DISK", size=1_000 * MB)
    orders = world.claim("HZDR").orders
    adapt(world)
    for part in range(1, 9):
        clock.turn(seconds=30)
        beats = [
            wire.Beat(transfer=o.transfer, epoch=o.epoch, bytes_done=part * 100 * MB, phase="moving") for o in orders
        ]
        world.heartbeat("HZDR", *beats)
        adapt(world)
    with world.look() as s:
        told = concurrency.history(s, "write", "HZDR-DISK", None, 10).items
    assert told[0].measured["bytes_per_second"] == pytest.approx(8 * 100 * MB / 30, rel=0.05)
    assert told[0].measured["seconds"] >= 230, "a window of one beat would say nothing"


def test_the_pass_takes_the_same_statements_for_many_links(
    world: World, clock: HandClock, count_statements: COUNT
) -> None:
    counts = []
    for number in range(2):
        for extra in range(1 if number == 0 else 12):
            name = world.endpoint(f"HZDR-N{number}{extra}", "HZDR")
            wished(world, 3, "DESY-DISK", name)
        world.claim("HZDR")
        clock.turn(seconds=60)
        with count_statements(world.db) as statements:
            adapt(world)
        counts.append(statements.count)
    assert counts[1] <= counts[0] + 1, counts
    assert counts[1] <= (22 if world.db.url.get_backend_name() == "sqlite" else 12), counts


def test_a_claim_takes_as_many_statements_as_with_a_limit_that_people_set(
    world: World, count_statements: COUNT
) -> None:
    wished(world, 900, "DESY-DISK", "HZDR-DISK")
    counts = {}

    def counted(name: str) -> None:
        with count_statements(world.db) as statements:
            assert len(world.claim("HZDR", 100).orders) == 100
        counts[name] = statements.count

    counted("nothing limits")
    change(world, "write", "HZDR-DISK", files_max=5_000)
    counted("people limit")
    put(world, "write", "HZDR-DISK", 1_000)
    counted("both")
    change(world, "write", "HZDR-DISK", files_max=None)
    counted("it adapts")
    assert counts["it adapts"] == counts["both"] == counts["people limit"] <= counts["nothing limits"] + 2, counts


def test_old_decisions_are_forgotten(world: World, clock: HandClock) -> None:
    wished(world, 3, "DESY-DISK", "HZDR-DISK")
    world.claim("HZDR")
    adapt(world)
    assert world.count(tables.concurrency_decisions) == 1
    clock.turn(days=13)
    with world.db.write() as s:
        assert concurrency.forget_old(s) == 0
    clock.turn(days=2)
    with world.db.write() as s:
        assert concurrency.forget_old(s) == 1


def test_claimers_of_two_sites_at_once_never_exceed_a_number_that_changes_under_them(postgresql_url: str) -> None:
    db = Database(postgresql_url, pool_size=12)
    world = World(db)
    world.three()
    for target in ("HZDR-DISK", "GSI-DISK", "HZDR-DISK"):
        wished(world, 150, "DESY-DISK", target)
    put(world, "read", "DESY-DISK", 9)
    put(world, "write", "HZDR-DISK", 7)
    most = {"read": 9, "write": 7}

    def look() -> None:
        with db.read() as s:
            query = sa.select(sa.func.count(), tables.transfers.c.target_id).where(
                tables.transfers.c.lease_until.is_not(None), tables.transfers.c.state == 2
            )
            rows = s.execute(query.group_by(tables.transfers.c.target_id)).all()
            assert sum(count for count, _ in rows) <= most["read"], rows
        at_hzdr = shown(world)["write", "HZDR-DISK"]
        assert at_hzdr.slots_in_flight <= most["write"], at_hzdr

    def work(number: int) -> None:
        dice, site = random.Random(number), ("HZDR", "GSI")[number % 2]
        for _ in range(12):
            orders = world.claim(site, 5).orders
            look()
            if orders:
                world.report(site, [done(o) for o in orders if dice.random() < 0.9])

    def decide() -> None:
        for _ in range(6):
            adapt(world)

    assert at_once(*[lambda n=n: work(n) for n in range(6)], decide) == [None] * 7
    db.close()


def test_what_is_read_from_two_sources_is_in_flight_on_both_links_and_once_at_the_target(world: World) -> None:
    dataset = world.collection("large")
    files = world.files(1, "DESY-DISK", dataset, size=2 * SHARE_BYTES)
    world.register(files, "GSI-DISK", size=2 * SHARE_BYTES)
    world.rule(dataset, "HZDR-DISK")
    (order,) = world.claim("HZDR").orders
    assert order.sources_at_once == 2
    adapt(world)
    c = tables.concurrency
    with world.db.read() as s:
        flight = {(row.kind, row.key): row.flight for row in s.execute(sa.select(c))}
    assert flight == {("write", "2"): 1.0, ("link", "1:2"): 1.0, ("link", "3:2"): 1.0}
