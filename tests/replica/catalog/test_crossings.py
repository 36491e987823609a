"""Where routes, doubts, scans and deletions meet: each knows of the others."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import deletions, endpoints, integrity, losses, rules
from replica.catalog.integrity import Doubt
from replica.catalog.losses import Lost
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Refused
from rules.integrity import PROBES_AT_ONCE, Why
from rules.states import ReplicaState
from tests.conftest import HandClock
from tests.replica.catalog.test_integrity import Looks, found
from tests.replica.catalog.test_routes import cleared, close_all_but, leg, look, show, wished
from tests.replica.catalog.world import MB, ROOT

SCRUBBED = ("DESY-DISK", "HZDR-DISK", "GSI-DISK")


@pytest.fixture
def world(db: Database, clock: HandClock) -> Looks:
    world = Looks(db)
    world.three()
    for name in SCRUBBED:
        world.scrub(name, depth="off")
    return world


@pytest.fixture
def routed(world: Looks) -> Looks:
    """From DESY to HZDR only over A or B."""
    for name in ("A-HOP", "B-HOP"):
        world.endpoint(name, hop="true")
        world.scrub(name, depth="off")
    close_all_but(world, *((a, b) for hop in ("A-HOP", "B-HOP") for a, b in (("DESY-DISK", hop), (hop, "HZDR-DISK"))))
    return world


def under_way(world: Looks) -> tuple[wire.Rule, wire.Transfer]:
    """A file has come as far as A, and its last leg waits."""
    rule = wished(world)
    assert world.claim("HZDR").orders == []
    look(world)
    (wanted,) = world.transfers(site="HZDR")
    assert len(leg(world, "A")) == 1
    return rule, wanted


def test_a_step_that_was_doubted_and_is_good_goes_with_its_route(routed: Looks) -> None:
    rule, wanted = under_way(routed)
    routed.bad(wanted.did, "A-HOP")
    routed.whole()
    assert routed.good(wanted.did, "A-HOP").good == 1
    (order,) = leg(routed, "HZDR")
    assert order.sources[0].endpoint == "A-HOP"
    assert routed.show(rule).state == "ok"
    look(routed)
    assert cleared(routed, "A-HOP") == 1, "it was there for the route only"
    routed.whole()


def test_a_step_that_is_bad_is_gone_around_and_goes_too(routed: Looks, clock: HandClock) -> None:
    rule, wanted = under_way(routed)
    routed.bad(wanted.did, "A-HOP")
    assert routed.claim("HZDR").orders == []
    look(routed)
    routed.whole()
    told = show(routed, wanted.id).route
    assert told is not None and [hop.endpoint for hop in told.hops] == ["B-HOP"]
    leg(routed, "B")
    leg(routed, "HZDR")
    assert routed.show(rule).state == "ok"
    look(routed)
    assert [cleared(routed, name) for name in ("A-HOP", "B-HOP", "DESY-DISK")] == [1, 1, 0]
    routed.whole()


def test_what_is_being_deleted_takes_no_place_among_the_looks(world: Looks, clock: HandClock) -> None:
    dids = world.files(PROBES_AT_ONCE + 1, "DESY-DISK")
    world.register(dids, "HZDR-DISK")
    r = tables.replicas
    with world.db.write() as s:
        ids = sorted(s.execute(sa.select(r.c.file_id).where(r.c.endpoint_id == 1)).scalars())
        integrity.suspect(s, [Doubt(id_, 1, "a copy disagreed") for id_ in ids], why=Why.SOURCE)
    with world.db.write() as s:
        for did in dids[:PROBES_AT_ONCE]:
            deletions.ask(s, ROOT, wire.NewDeletion(did=did, endpoint="DESY-DISK"))
    (check,) = world.checks("DESY").probes
    assert check.did == dids[-1]
    world.tell("DESY", found(check))
    assert world.checks("DESY").probes == []
    world.whole()


def test_a_doubt_about_what_was_bad_once_and_healed_is_a_doubt(world: Looks, clock: HandClock) -> None:
    dataset = world.collection("d")
    (did,) = world.files(1, "DESY-DISK", dataset)
    world.rule(dataset, "DESY-DISK|HZDR-DISK", copies=2)
    world.evaluate()
    world.move()
    world.bad(did, "HZDR-DISK")
    clock.turn(seconds=1)
    world.move()
    assert world.state(did, "HZDR-DISK") == "available"
    clock.turn(seconds=1)
    r = tables.replicas
    with world.db.write() as s:
        row = s.execute(sa.select(r).where(r.c.endpoint_id == 2, r.c.state == ReplicaState.AVAILABLE)).one()
        integrity.suspect(s, [Doubt(row.file_id, 2, "it is wrong again")], why=Why.SOURCE)
    (check,) = world.checks("HZDR").probes
    assert check.did == did
    (suspect,) = world.suspects()
    assert (suspect.message, suspect.why) == ("it is wrong again", "source")
    world.whole()


@pytest.mark.parametrize("evidence", ["hashed", "declared"])
def test_a_step_that_has_come_and_is_registered_stays(routed: Looks, evidence: str) -> None:
    _, wanted = under_way(routed)
    routed.register([wanted.did], "A-HOP", size=MB, evidence=evidence)
    leg(routed, "HZDR")
    look(routed)
    assert cleared(routed, "A-HOP") == 0, "somebody said that it is theirs"
    assert routed.state(wanted.did, "A-HOP") == "available"
    routed.whole()


def test_a_last_copy_that_is_bad_ends_no_way_and_a_new_source_takes_it_up(routed: Looks, clock: HandClock) -> None:
    """The source is bad before the file has left it; then a good copy appears elsewhere."""
    rule = wished(routed)
    assert routed.claim("HZDR").orders == []
    look(routed)
    (wanted,) = routed.transfers(site="HZDR")
    said = routed.bad(wanted.did, "DESY-DISK")
    assert said.last_copies == [wanted.did]
    routed.whole()
    assert routed.claim("A").orders == []
    look(routed)
    clock.turn(seconds=301)
    routed.claim("HZDR")
    look(routed)
    routed.whole()
    routed.register([wanted.did], "B-HOP", size=MB)
    routed.evaluate()
    for _ in range(3):
        clock.turn(seconds=301)
        look(routed)
        leg(routed, "HZDR")
    assert routed.show(rule).state == "ok"
    look(routed)
    routed.whole()


def test_a_rule_that_ends_while_a_step_is_bad_leaves_nothing(routed: Looks, clock: HandClock) -> None:
    rule, wanted = under_way(routed)
    routed.bad(wanted.did, "A-HOP")
    routed.delete(rule)
    look(routed)
    routed.whole()
    assert cleared(routed, "A-HOP") == 1


def test_a_suspended_rule_is_not_moved_on_by_a_verdict(routed: Looks, clock: HandClock) -> None:
    rule, wanted = under_way(routed)
    with routed.db.write() as s:
        rules.suspend(s, ROOT, rule.id, wire.Verdict())
    routed.bad(wanted.did, "A-HOP")
    look(routed)
    routed.whole()
    assert leg(routed, "HZDR") == [] and leg(routed, "B") == []
    with routed.db.write() as s:
        rules.resume(s, ROOT, rule.id)
    clock.turn(seconds=301)
    routed.claim("HZDR")
    look(routed)
    leg(routed, "B")
    leg(routed, "HZDR")
    assert routed.show(rule).state == "ok"
    look(routed)
    routed.whole()


def test_what_may_have_been_moved_away_is_no_source_is_brought_anew_and_is_looked_at(world: Looks) -> None:
    dataset = world.collection("d")
    (did,) = world.files(1, "DESY-DISK", dataset)
    rule = world.rule(dataset, "DESY-DISK|HZDR-DISK", copies=2)
    world.evaluate()
    world.move()
    r = tables.replicas
    with world.db.write() as s:
        row = s.execute(sa.select(r).where(r.c.endpoint_id == 2)).one()
        old = Lost(row.file_id, 2, row.generation + 1, "of another life")
        losses.doubt(s, [old])
        assert losses.declare(s, [old], looked_at=s.now).bad == []
    assert world.state(did, "HZDR-DISK") == "available"
    with world.db.write() as s:
        losses.doubt(s, [Lost(row.file_id, 2, row.generation, "its file was moved to quarantine")])
    assert world.state(did, "HZDR-DISK") == "unavailable"
    assert world.show(rule).state == "replicating"
    world.whole()
    (check,) = world.checks("HZDR").probes
    world.tell("HZDR", found(check))
    assert world.state(did, "HZDR-DISK") == "available"
    assert world.show(rule).state == "ok"
    world.whole()


@pytest.mark.parametrize("verdict", ["the other is doubted", "this one is bad and the last"])
def test_an_endpoint_is_not_forgotten_with_what_may_be_the_last_copy(world: Looks, verdict: str) -> None:
    (did,) = world.files(1, "DESY-DISK")
    r = tables.replicas
    if verdict == "the other is doubted":
        world.register([did], "HZDR-DISK")
        with world.db.write() as s:
            file_id = s.execute(sa.select(r.c.file_id).where(r.c.endpoint_id == 2)).scalar_one()
            integrity.suspect(s, [Doubt(file_id, 2, "a scrub could not read it")], why=Why.SCRUB)
    else:
        world.bad(did, "DESY-DISK")
    with pytest.raises(Refused, match="no other good copy"), world.db.write() as s:
        endpoints.decommission(s, "DESY-DISK", wire.Decommission(forget=True))
    with world.db.write() as s:
        endpoints.decommission(s, "DESY-DISK", wire.Decommission(forget=True, last_copies=True))
    world.whole()
