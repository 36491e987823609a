"""What is known to go wrong in systems of this kind, each as a test named after what it protects.

The first five fail in Rucio when they are run there; the others are facts of its code. Here all of them must hold, with
every invariant of the catalogue besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, did_deletion, dids, endpoints, events, fsck, quotas, rules, suspension, usage
from replica.db import tables
from replica.db.engine import Database
from rules.errors import AlreadyExists, Refused
from rules.names import Did
from rules.permissions import Actor, Role
from tests.conftest import HandClock, Statements
from tests.replica.catalog.cleaning import CleanWorld
from tests.replica.catalog.world import MB, ROOT, done
from workers import deletion

JANE = Actor("jane", Role.USER)


@pytest.fixture
def world(db: Database) -> Iterator[CleanWorld]:
    world = CleanWorld(db)
    world.three()
    yield world
    world.check()
    assert fsck.check(db).clean


def test_an_unsatisfiable_rule_delays_no_other(world: CleanWorld) -> None:
    world.endpoint("FULL-DISK", capacity=1)
    for name in ("hopeless", "fine"):
        world.collection(name)
        world.files(10, "DESY-DISK", f"t:{name}")
    hopeless = world.rule("t:hopeless", "FULL-DISK", priority=5)
    fine = world.rule("t:fine", "HZDR-DISK")
    world.evaluate()
    assert world.move() == 10
    assert world.show(fine).state == "ok"
    assert world.show(hopeless).state == "stuck"
    assert {r.code for r in world.show(hopeless).reasons} == {"no_space"}


def test_detached_files_are_taken_off_both_accounts_alike(world: CleanWorld) -> None:
    data = world.collection("data")
    names = world.files(10, "DESY-DISK", data, size=1_000)
    with world.db.write() as s:
        accounts.add(s, wire.NewAccount(name="jane"))
    world.rule(data, "HZDR-DISK")
    with world.db.write() as s:
        rules.add(s, JANE, wire.NewRule(did=data, expression="HZDR-DISK"))
    world.move()
    world.detach(data, *names[:4])
    with world.db.read() as s:
        found = {(u.account, u.endpoint): (u.files, u.bytes) for u in usage.list_page(s, limit=100).items}
    assert found == {("root", "HZDR-DISK"): (6, 6_000), ("jane", "HZDR-DISK"): (6, 6_000)}


def test_a_container_is_never_placed_beyond_the_space_that_is_left(world: CleanWorld) -> None:
    world.endpoint("SMALL-DISK", capacity=6 * MB)
    world.collection("all", "container")
    for i in range(4):
        world.files(1, "DESY-DISK", world.collection(f"part{i}"), size=5 * MB)
        world.attach("t:all", f"t:part{i}")
    rule = world.rule("t:all", "SMALL-DISK")
    world.evaluate()
    assert world.used("SMALL-DISK") == 5 * MB
    shown = world.show(rule)
    assert (shown.state, shown.files_total, shown.locks_replicating) == ("stuck", 4, 1)
    assert [(r.code, r.files) for r in shown.reasons] == [("no_space", 3)]


def test_rows_are_made_only_where_files_go(world: CleanWorld) -> None:
    names = [world.endpoint(f"E{i}-DISK", f"S{i}", pool=1) for i in range(6)]
    world.collection("all", "container")
    for i in range(6):
        world.files(1, "DESY-DISK", world.collection(f"d{i}"))
        world.attach("t:all", f"t:d{i}")
    world.rule("t:all", "pool=1", grouping="none")
    world.evaluate()
    pool = sa.select(tables.endpoints.c.id).where(tables.endpoints.c.name.in_(names))
    assert world.count(tables.locks) == 6
    assert world.count(tables.replicas, tables.replicas.c.endpoint_id.in_(pool)) == 6
    assert world.count(tables.transfers) == 6


def test_finishing_a_thousand_files_is_a_few_statements_and_one_line_of_history(
    world: CleanWorld, count_statements: Callable[[Database], AbstractContextManager[Statements]]
) -> None:
    data = world.collection("data")
    world.files(1_000, "DESY-DISK", data)
    rule = world.rule(data, "HZDR-DISK")
    orders = world.claim("HZDR").orders
    with count_statements(world.db) as statements:
        assert world.report("HZDR", [done(order) for order in orders]).accepted == 1_000
    assert statements.count <= (30 if world.db.url.get_backend_name() == "postgresql" else 60)  # with temporary tables
    with world.db.read() as s:
        told = events.page(s, kinds=["rule.*"], limit=100).items
    assert [e.kind for e in told if e.id == rule.id].count("rule.ok") == 1
    assert len(told) <= 3


def test_a_suspended_rule_protects_what_is_added_and_is_not_trapped(world: CleanWorld) -> None:
    data = world.collection("data")
    world.files(2, "DESY-DISK", data)
    rule = world.rule(data, "HZDR-DISK")
    with world.db.write() as s:
        suspension.suspend(s, rules.hold(s, rule.id), 1, "")
    added = world.files(1, "HZDR-DISK", data)
    with pytest.raises(Refused):
        world.ask(added[0], "HZDR-DISK", last_copy=True)
    assert world.claim("HZDR").orders == []
    with world.db.write() as s:
        suspension.resume(s, rules.hold(s, rule.id), 1)
    world.move()
    assert world.show(rule).state == "ok"


def test_a_dataset_moves_away_from_a_dead_endpoint(world: CleanWorld, clock: HandClock) -> None:
    data = world.collection("data")
    world.files(3, "DESY-DISK", data)
    rule = world.rule(data, "HZDR-DISK|GSI-DISK")
    [dead] = {order.target_endpoint for site in ("HZDR", "GSI") for order in world.claim(site).orders}
    with world.db.write() as s:
        endpoints.ban(s, dead, wire.Ban(reason="the controller burnt"))
    clock.turn(hours=12)
    world.expire()
    for _ in range(4):
        world.evaluate()
        clock.turn(hours=6)
    [other] = {"HZDR-DISK", "GSI-DISK"} - {dead}
    world.move(other.split("-")[0])
    world.evaluate()
    assert world.show(rule).state == "ok"
    with world.db.read() as s:
        at = {r.endpoint for r in rules.explain(s, rule.id).locks}
    assert at == {other}


def test_nothing_is_taken_out_of_a_monotonic_dataset(world: CleanWorld) -> None:
    with world.db.write() as s:
        dids.add(s, ROOT, wire.NewDid(did="t:data", monotonic=True))
    [name] = world.files(1, "DESY-DISK", "t:data")
    with pytest.raises(Refused, match="monotonic"):
        world.detach("t:data", name)


def test_nothing_is_taken_out_of_a_closed_dataset(world: CleanWorld) -> None:
    data = world.collection("data")
    [name] = world.files(1, "DESY-DISK", data)
    with world.db.write() as s:
        dids.change(s, Did.parse(data), wire.DidChange(open=False), ROOT)
    with pytest.raises(Refused, match="closed"):
        world.detach(data, name)


def test_a_file_attached_to_a_dataset_under_a_rule_survives_a_deletion_that_runs_first(world: CleanWorld) -> None:
    data = world.collection("data")
    world.files(1, "DESY-DISK", data)
    world.rule(data, "DESY-DISK")
    [name] = world.files(1, "DESY-DISK")
    world.copied([name], "HZDR-DISK")
    world.released([name], "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    world.attach(data, name)
    report = deletion.delete(world.db)  # before any other worker
    assert report.done == 0
    assert world.count(tables.deletions) == 0


def test_the_last_copy_goes_only_by_an_explicit_act(world: CleanWorld) -> None:
    [name] = world.files(1, "DESY-DISK")
    world.released([name], "DESY-DISK")
    world.set_endpoint("DESY-DISK", delete_at_once=True)
    assert deletion.delete(world.db).done == 0
    with pytest.raises(Refused, match="no other good copy"):
        world.ask(name, "DESY-DISK")
    assert world.ask(name, "DESY-DISK", last_copy=True).state == "queued"


def test_a_changed_attribute_is_effective_at_once(world: CleanWorld) -> None:
    data = world.collection("data")
    world.files(1, "DESY-DISK", data)
    with pytest.raises(Refused):
        world.rule(data, "fast=1")
    world.change("GSI-DISK", attributes={"fast": 1})
    rule = world.rule(data, "fast=1")
    world.move()
    assert world.show(rule).state == "ok"


def test_what_is_there_already_costs_no_quota(world: CleanWorld) -> None:
    """And an administrator is bound by space like everybody."""
    data = world.collection("data")
    world.files(4, "DESY-DISK", data, size=1_000)
    with world.db.write() as s:
        quotas.put(s, ROOT, wire.NewQuota(account="root", expression="DESY-DISK", limit_bytes=4_000))
    first = world.rule(data, "DESY-DISK")
    again = world.rule(data, "DESY-DISK", comment="the same bytes", grouping="none")
    assert [world.show(r).state for r in (first, again)] == ["ok", "ok"]
    more = world.collection("more")
    world.files(1, "HZDR-DISK", more, size=1)
    refused = world.rule(more, "DESY-DISK")
    assert [r.code for r in world.show(refused).reasons] == ["over_quota"]


def test_a_name_is_never_given_to_other_bytes(world: CleanWorld) -> None:
    [name] = world.files(1, "DESY-DISK")
    with world.db.write() as s:
        did_deletion.delete(s, [Did.parse(name)], ROOT)
    with pytest.raises(AlreadyExists, match="deleted"):
        world.register([name], "HZDR-DISK", size=3)
