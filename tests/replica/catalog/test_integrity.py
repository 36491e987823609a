"""Doubts and verdicts in the catalogue: what counts, what is healed, what is stuck, and what no word can do."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, checks, deletions, doubts, fsck, integrity, scrubs, verdicts
from replica.catalog.integrity import Doubt
from replica.db import tables
from replica.db.engine import Database
from rules.errors import NotAllowed, Refused, SourceMissing
from rules.integrity import BAD_IN_A_DAY, BATCH_SECONDS, GUARD_FILES, Why
from rules.permissions import Actor, Role
from rules.states import ReplicaState
from tests.conftest import HandClock
from tests.replica.catalog.world import LEASE, ROOT, World, checksums, size_of

DAY = 86_400


class Looks(World):
    """The same, and what a site's worker finds where the replicas lie."""

    def state(self, did: str, at: str) -> str:
        with self.db.read() as s:
            from replica.catalog import replicas
            from rules.names import Did

            return {r.endpoint: r.state for r in replicas.locate(s, Did.parse(did), None, 100).items}.get(at, "gone")

    def bad(self, did: str, at: str, actor: Actor = ROOT, **more: object) -> wire.BadDeclared:
        with self.db.write() as s:
            return verdicts.declare_bad(s, actor, wire.BadReplicas(endpoint=at, dids=[did], reason="wrong", **more))

    def good(self, did: str, at: str) -> wire.GoodDeclared:
        with self.db.write() as s:
            return verdicts.declare_good(s, ROOT, wire.GoodReplicas(endpoint=at, dids=[did]))

    def checks(self, site: str) -> wire.Checks:
        with self.db.write() as s:
            return checks.claim(s, self.sites[site], wire.CheckClaim(worker=f"{site}/1"), lease_seconds=LEASE)

    def tell(self, site: str, *probes: wire.CheckOutcome, scrub: wire.ScrubReport | None = None) -> wire.CheckAnswer:
        with self.db.write() as s:
            report = wire.CheckReport(worker=f"{site}/1", probes=list(probes), scrub=scrub)
            return checks.report(s, self.sites[site], report)

    def scrub(self, at: str, **change: object) -> wire.Scrub:
        with self.db.write() as s:
            return scrubs.change(s, at, wire.ScrubChange(**change), ROOT)

    def suspects(self) -> list[wire.Suspect]:
        with self.db.read() as s:
            return verdicts.list_page(s, endpoint=None, cursor=None, limit=1_000).items

    def events(self, kind: str) -> int:
        return self.count(tables.events, tables.events.c.kind == kind)

    def whole(self) -> None:
        self.check()
        with self.db.read() as s:
            assert [f for f in fsck.examine(s) if f.violations] == []


def found(check: wire.Check, outcome: str = "ok", **more: object) -> wire.CheckOutcome:
    if outcome == "ok":
        more = {"size": check.size, "checksums": check.checksums} | more
    return wire.CheckOutcome(
        file=check.file, endpoint_id=check.endpoint_id, epoch=check.epoch, outcome=outcome, message=outcome, **more
    )


def part(order: wire.ScrubOrder, findings: Sequence[wire.CheckOutcome], *, over: bool = True) -> wire.ScrubReport:
    return wire.ScrubReport(endpoint_id=order.endpoint_id, epoch=order.epoch, findings=list(findings), over=over)


@pytest.fixture
def world(db: Database, clock: HandClock) -> Looks:
    world = Looks(db)
    world.three()
    for name in ("DESY-DISK", "HZDR-DISK", "GSI-DISK"):
        world.scrub(name, depth="off")
    return world


@pytest.fixture
def two(world: Looks) -> tuple[wire.Rule, str]:
    """A file under a rule of two copies, at DESY-DISK and HZDR-DISK."""
    dataset = world.collection("d")
    (did,) = world.files(1, "DESY-DISK", dataset)
    rule = world.rule(dataset, "DESY-DISK|HZDR-DISK", copies=2)
    world.evaluate()
    world.move()
    assert world.show(rule).state == "ok"
    return rule, did


def test_a_bad_replica_counts_no_more_is_healed_from_a_good_one_and_counts_again(world, two):
    rule, did = two
    said = world.bad(did, "HZDR-DISK")
    assert (said.bad, said.known, said.last_copies) == (1, 0, [])
    assert world.state(did, "HZDR-DISK") == "bad"
    assert world.show(rule).state == "replicating"
    world.whole()
    (order,) = world.claim("HZDR").orders
    assert order.repair
    assert [source.endpoint for source in order.sources] == ["DESY-DISK"]
    done = wire.Outcome(
        transfer=order.transfer,
        epoch=order.epoch,
        outcome="done",
        size=order.size,
        checksums=order.checksums,
        moved_bytes=1,
    )
    world.report("HZDR", [done])
    assert world.show(rule).state == "ok"
    assert world.state(did, "HZDR-DISK") == "available"
    world.whole()
    assert [a.bytes for a in rows(world, tables.attempts)][-1] == 1, "what was moved, not what the file has"
    world.checks("HZDR")
    assert world.suspects() == []
    assert world.events("replica.bad") == 1


def rows(world: World, table: sa.Table) -> Sequence[sa.Row]:
    with world.db.read() as s:
        return s.execute(sa.select(table).order_by(*table.primary_key.columns)).all()


def test_the_last_copy_stays_and_its_rule_is_stuck_and_says_why_until_a_good_one_appears(world, two, clock):
    rule, did = two
    world.bad(did, "HZDR-DISK")
    said = world.bad(did, "DESY-DISK")
    assert said.last_copies == [did]
    assert world.state(did, "DESY-DISK") == "bad"
    assert world.show(rule).state == "stuck"
    for _ in range(5):  # evaluation does not take it for something that somebody will bring
        clock.turn(hours=2)
        world.evaluate()
        assert world.claim("DESY").orders == []
        assert ("last_copy_bad", "DESY-DISK", 1) in [(r.code, r.endpoint, r.files) for r in world.show(rule).reasons]
        assert world.show(rule).state == "stuck"
        world.whole()
    assert world.count(tables.deletions) == 0
    world.register([did], "GSI-DISK")
    clock.turn(hours=2)
    world.evaluate()
    assert world.move() == 2
    assert world.show(rule).state == "ok"
    world.whole()


def test_two_bad_copies_at_once_are_both_healed_from_the_third(world):
    dataset = world.collection("d")
    dids = world.files(20, "DESY-DISK", dataset)
    rule = world.rule(dataset, "*", copies=3)
    world.evaluate()
    world.move()
    with world.db.write() as s:
        for name in ("HZDR-DISK", "GSI-DISK"):
            verdicts.declare_bad(s, ROOT, wire.BadReplicas(endpoint=name, dids=dids, reason="both"))
    world.whole()
    assert world.move() == 40
    assert world.show(rule).state == "ok"
    world.whole()


def test_good_by_word_takes_back_only_what_nobody_has_seen_wrong_or_begun_to_rewrite(world, two):
    rule, did = two
    world.bad(did, "HZDR-DISK")
    assert world.good(did, "HZDR-DISK") == wire.GoodDeclared(good=1, to_verify=0)
    assert world.show(rule).state == "ok"
    world.whole()

    world.bad(did, "HZDR-DISK")
    assert len(world.claim("HZDR").orders) == 1, "a worker begins to rewrite it, and may have moved its bytes away"
    assert world.good(did, "HZDR-DISK") == wire.GoodDeclared(good=0, to_verify=1)
    assert world.state(did, "HZDR-DISK") == "bad"
    (check,) = world.checks("HZDR").probes
    world.tell("HZDR", found(check))
    assert world.state(did, "HZDR-DISK") == "available"
    assert world.show(rule).state == "ok"
    (replica,) = [r for r in rows(world, tables.replicas) if r.evidence.label == "scrubbed"]
    assert replica.state is ReplicaState.AVAILABLE
    world.whole()


def test_what_a_worker_has_proven_bad_no_word_makes_good_not_even_a_registration(world, two):
    rule, did = two
    with world.db.write() as s:
        (row,) = [r for r in rows(world, tables.replicas) if r.endpoint_id == 2]
        integrity.declare_bad(s, [Doubt(row.file_id, 2, "read twice")], why=Why.SCRUB, proven=True)
    world.bad(did, "HZDR-DISK")  # a person's word after it does not weaken it
    assert world.good(did, "HZDR-DISK") == wire.GoodDeclared(good=0, to_verify=1)
    world.register([did], "HZDR-DISK", evidence="hashed")
    assert world.state(did, "HZDR-DISK") == "copying"
    world.whole()
    world.move()
    assert world.show(rule).state == "ok"


def test_a_probe_that_names_other_content_or_comes_too_late_proves_nothing(world, two):
    _, did = two
    world.bad(did, "HZDR-DISK", repair=True)
    world.claim("HZDR")
    world.good(did, "HZDR-DISK")
    (check,) = world.checks("HZDR").probes
    other = "f" * 8
    world.tell("HZDR", found(check, checksums={"adler32": other}))
    assert world.state(did, "HZDR-DISK") == "bad"
    assert world.tell("HZDR", found(check)).stale == [check.file], "an order is answered once"
    assert world.checks("GSI").probes == []


def test_who_may_say_that_a_replica_is_bad(world, two):
    _, did = two
    with world.db.write() as s:
        s.execute(sa.insert(tables.accounts).values(name="bob", role="user", created_at=s.now))
    with pytest.raises(NotAllowed, match="does not own"):
        world.bad(did, "HZDR-DISK", Actor("bob", Role.USER))
    with pytest.raises(NotAllowed, match="speaks for DESY only"):
        world.bad(did, "HZDR-DISK", Actor("DESY-worker", Role.SITE, "DESY"))
    world.bad(did, "HZDR-DISK", Actor("HZDR-worker", Role.SITE, "HZDR"))
    with pytest.raises(Refused, match="no copy"):
        world.bad(did, "GSI-DISK")


def fail(world: Looks, site: str, **how: object) -> None:
    (order,) = world.claim(site).orders
    failed = {"outcome": "failed", "error": SourceMissing.code, "message": "gone", "side": "source"} | how
    world.report(site, [wire.Outcome(transfer=order.transfer, epoch=order.epoch, **failed)])


def test_a_source_that_disagrees_is_doubted_at_the_first_word_and_its_own_site_decides(world, two):
    rule, did = two
    world.rule(did, "GSI-DISK", copies=1)
    fail(world, "GSI", source_endpoint="DESY-DISK")
    (suspect,) = world.suspects()
    assert (suspect.endpoint, suspect.state, suspect.why, suspect.proven) == ("DESY-DISK", "available", "source", False)
    assert world.show(rule).state == "ok", "a doubt is no verdict"
    assert world.checks("HZDR").probes == []
    (check,) = world.checks("DESY").probes
    assert world.checks("DESY").probes == [], "it is in somebody's hands"
    world.tell("DESY", found(check, "failed"))
    assert world.state(did, "DESY-DISK") == "available", "what cannot be reached decides nothing"
    world.whole()


def test_the_probe_after_a_doubt_makes_it_bad_and_it_is_healed(world, two, clock):
    rule, did = two
    with world.db.write() as s:
        (row,) = [r for r in rows(world, tables.replicas) if r.endpoint_id == 1]
        assert integrity.suspect(s, [Doubt(row.file_id, 1, "not in the listing")], why=Why.SCAN) == 1
        assert integrity.suspect(s, [Doubt(row.file_id, 1, "not in the listing")], why=Why.SCAN) == 0
    clock.turn(seconds=1)
    (check,) = world.checks("DESY").probes
    world.tell("DESY", found(check, "missing"))
    assert world.state(did, "DESY-DISK") == "bad"
    assert world.suspects()[0].proven
    assert world.show(rule).state == "replicating"
    world.whole()
    assert world.move() == 1
    assert world.show(rule).state == "ok"


def test_no_copy_is_removed_because_of_one_that_is_doubted(world, two):
    rule, did = two
    world.delete(rule)
    with world.db.write() as s:
        (row,) = [r for r in rows(world, tables.replicas) if r.endpoint_id == 1]
        integrity.suspect(s, [Doubt(row.file_id, 1, "not in the listing")], why=Why.SCAN)
    with world.db.write() as s, pytest.raises(Refused, match="no other good copy"):
        deletions.ask(s, ROOT, wire.NewDeletion(did=did, endpoint="HZDR-DISK"))
    (check,) = world.checks("DESY").probes
    world.tell("DESY", found(check))
    with world.db.write() as s:
        deletions.ask(s, ROOT, wire.NewDeletion(did=did, endpoint="HZDR-DISK"))


def test_a_failure_of_the_target_blames_no_source(world, two):
    _, did = two
    world.rule(did, "GSI-DISK", copies=1)
    for _ in range(3):
        if not world.claim("GSI", limit=1).orders:
            break
    assert world.suspects() == []
    order = world.transfers(site="GSI")[0]
    outcome = wire.Outcome(
        transfer=order.id, epoch=1, outcome="failed", error="checksum_differs", message="bad disk", side="target"
    )
    world.report("GSI", [outcome])
    assert world.suspects() == []


def test_a_replica_that_came_anew_is_not_judged_by_what_lay_there_before(world, two, clock):
    rule, did = two
    world.bad(did, "HZDR-DISK")
    world.claim("HZDR", limit=1)
    world.good(did, "HZDR-DISK")
    (check,) = world.checks("HZDR").probes  # it begins to read, and meanwhile the copy is healed
    clock.turn(seconds=5)
    transfer = world.transfers(site="HZDR")[-1]
    world.report(
        "HZDR",
        [wire.Outcome(transfer=transfer.id, epoch=1, outcome="done", size=size_of(did), checksums=checksums(did))],
    )
    world.tell("HZDR", found(check, "differs"))
    assert world.state(did, "HZDR-DISK") == "available"
    assert world.show(rule).state == "ok"


# --- scrubs -----------------------------------------------------------------------------------------------------------


def test_a_scrub_reads_everything_once_in_order_and_a_kill_forgets_nothing(world, clock):
    dids = world.files(30, "DESY-DISK", size=1_000_000)
    period = 90 * DAY
    world.scrub("DESY-DISK", depth="deep", bytes_per_second=100_000, files_per_second=None, period_seconds=period)
    assert world.checks("DESY").scrub is None, "what was just verified is not read"
    clock.turn(days=100)
    seen: list[str] = []
    began = clock.now
    kills = 0
    while len(seen) < len(dids):
        order = world.checks("DESY").scrub
        if order is None:
            clock.turn(seconds=1)
            assert clock.now - began < timedelta(seconds=1_000 + kills * LEASE)
            continue
        assert sum(check.size for check in order.checks) <= 100_000 * BATCH_SECONDS
        assert world.checks("DESY").scrub is None, "one batch of an endpoint at a time"
        half = len(order.checks) // 2
        if kills < 2:  # the worker has told the first half, and is killed
            world.tell("DESY", scrub=part(order, [found(c) for c in order.checks[:half]], over=False))
            seen += [c.did for c in order.checks[:half]]
            kills += 1
            clock.turn(seconds=LEASE + 1)
            late = part(order, [found(c) for c in order.checks[half:]])
            assert world.checks("DESY").scrub is not None
            assert world.tell("DESY", scrub=late).accepted == 0, "a zombie changes nothing"
            clock.turn(seconds=LEASE + 1)
            continue
        world.tell("DESY", scrub=part(order, [found(c) for c in order.checks]))
        seen += [c.did for c in order.checks]
    assert seen == dids
    assert (clock.now - began).total_seconds() >= 30_000_000 / 100_000 - 2 * BATCH_SECONDS, "the rate is kept"
    assert {r.evidence.label for r in rows(world, tables.replicas)} == {"scrubbed"}
    clock.turn(days=1)
    assert world.checks("DESY").scrub is None
    with world.db.read() as s:
        told = scrubs.get(s, "DESY-DISK")
    assert (told.pass_number, told.files, told.pass_ended_at) == (3, 0, clock.now)
    clock.turn(days=90)
    assert len(world.checks("DESY").scrub.checks) == 6, "and again, a period later"


def test_a_file_that_comes_while_a_pass_is_under_way_is_read_too(world, clock):
    world.files(3, "DESY-DISK")
    world.scrub("DESY-DISK", depth="deep", period_seconds=10)
    clock.turn(seconds=100)
    order = world.checks("DESY").scrub
    world.tell("DESY", scrub=part(order, [found(c) for c in order.checks]))
    (late,) = world.files(1, "DESY-DISK")
    clock.turn(seconds=6)
    order = world.checks("DESY").scrub
    assert [c.did for c in order.checks] == [late]


def test_what_a_scrub_finds_wrong_is_doubted_and_bad_only_after_a_probe(world, two, clock):
    rule, did = two
    world.scrub("HZDR-DISK", depth="deep", period_seconds=10)
    clock.turn(seconds=100)
    order = world.checks("HZDR").scrub
    world.tell("HZDR", scrub=part(order, [found(c, "differs") for c in order.checks]))
    assert world.state(did, "HZDR-DISK") == "available"
    answer = world.checks("HZDR")
    assert answer.scrub is None
    world.tell("HZDR", found(answer.probes[0], "differs"))
    assert world.state(did, "HZDR-DISK") == "bad"
    world.whole()
    world.move()
    assert world.show(rule).state == "ok"


def test_a_shallow_scrub_proves_nothing_about_the_bytes(world, clock):
    world.files(3, "DESY-DISK")
    before = [r.verified_at for r in rows(world, tables.replicas)]
    world.scrub("DESY-DISK", depth="shallow")
    clock.turn(days=1)
    order = world.checks("DESY").scrub
    assert len(order.checks) == 3
    world.tell("DESY", scrub=part(order, [found(c) for c in order.checks]))
    assert [r.verified_at for r in rows(world, tables.replicas)] == before


def test_when_too_much_is_wrong_nothing_is_declared_and_a_person_is_asked(world, clock):
    world.files(200, "DESY-DISK")
    world.scrub("DESY-DISK", depth="deep", period_seconds=10, files_per_second=None)
    clock.turn(seconds=100)
    order = world.checks("DESY").scrub
    findings = [found(c, "missing" if i < 2 * GUARD_FILES + 1 else "ok") for i, c in enumerate(order.checks)]
    answer = world.tell("DESY", scrub=part(order, findings))
    assert not answer.scrub_goes_on
    assert world.suspects() == []
    clock.turn(days=1)
    answer = world.checks("DESY")
    assert (answer.probes, answer.scrub) == ([], None), "halted"
    assert world.events("endpoint.scrub_halted") == 1
    told = world.scrub("DESY-DISK", resume=True, guard_fraction=0.5)
    assert told.halted_at is None
    order = world.checks("DESY").scrub
    findings = [found(c, "missing" if i < 2 * GUARD_FILES + 1 else "ok") for i, c in enumerate(order.checks)]
    world.tell("DESY", scrub=part(order, findings))
    assert len(world.suspects()) == 2 * GUARD_FILES + 1, "the person said that it is so"


def test_no_more_than_so_many_are_declared_bad_in_a_day_without_a_person(world, clock):
    dids = world.files(BAD_IN_A_DAY + 20, "DESY-DISK")
    with world.db.write() as s:
        ids = [r.file_id for r in rows(world, tables.replicas)]
        integrity.suspect(s, [Doubt(i, 1, "not there") for i in ids], why=Why.SCAN)
    clock.turn(seconds=1)
    probes = 0
    while checks_ := world.checks("DESY").probes:
        assert len(checks_) <= 4, "few of an endpoint at a time"
        probes += len(checks_)
        world.tell("DESY", *(found(c, "missing") for c in checks_))
        assert probes <= len(dids)
    with world.db.read() as s:
        told = scrubs.get(s, "DESY-DISK")
    assert told.bad == BAD_IN_A_DAY
    assert "within a day" in told.halted_why
    world.whole()


def test_a_storage_that_cannot_be_read_is_left_alone_for_a_while_and_its_place_is_kept(world, clock):
    world.files(5, "DESY-DISK")
    world.scrub("DESY-DISK", depth="deep", period_seconds=10)
    clock.turn(seconds=100)
    order = world.checks("DESY").scrub
    report = wire.ScrubReport(
        endpoint_id=order.endpoint_id, epoch=order.epoch, findings=[], over=False, trouble="not mounted"
    )
    world.tell("DESY", scrub=report)
    assert world.checks("DESY").scrub is None
    assert world.suspects() == []
    clock.turn(seconds=400)
    again = world.checks("DESY").scrub
    assert [c.did for c in again.checks] == [c.did for c in order.checks]
    # One that cannot be read, as before, among others that can: that is about the file.
    world.tell("DESY", scrub=part(again, [found(c, "failed" if i == 2 else "ok") for i, c in enumerate(again.checks)]))
    assert len(world.suspects()) == 1


def test_statements_do_not_grow_with_the_number_of_replicas(world, clock, count_statements):
    dids = world.files(400, "DESY-DISK", world.collection("d"))
    world.rule("t:d", "DESY-DISK|HZDR-DISK", copies=2)
    world.evaluate()
    world.move()
    counts = []
    for some in (dids[:2], dids[2:]):
        with count_statements(world.db) as statements, world.db.write() as s:
            verdicts.declare_bad(s, ROOT, wire.BadReplicas(endpoint="HZDR-DISK", dids=some, reason="wrong"))
        counts.append(statements.count)
    assert counts[1] <= counts[0]
    world.scrub("DESY-DISK", depth="deep", period_seconds=10, files_per_second=None)
    clock.turn(seconds=100)
    with count_statements(world.db) as statements:
        order = world.checks("DESY").scrub
        world.tell("DESY", scrub=part(order, [found(c) for c in order.checks]))
    assert len(order.checks) == 400
    assert statements.count < 60
    world.whole()


# --- whoever reads ----------------------------------------------------------------------------------------------------


def doubted(world: Looks, who: str, *pairs: tuple[str, str]) -> wire.DoubtsTaken:
    said = wire.Doubts(replicas=[wire.DoubtedReplica(did=d, endpoint=e, reason="wrong bytes") for d, e in pairs])
    with world.db.write() as s:
        return doubts.add(s, Actor(who, Role.USER), said)


@pytest.fixture
def old(world: Looks, clock: HandClock) -> list[str]:
    """Five files at DESY-DISK, and an account that owns none of them."""
    with world.db.write() as s:
        accounts.add(s, wire.NewAccount(name="reader", role="user"))
    dids = world.files(5, "DESY-DISK", world.collection("d"))
    clock.turn(hours=2)
    return dids


def test_a_readers_word_has_a_replica_looked_at_and_changes_nothing_else(world, old):
    did = old[0]
    said = doubted(world, "reader", (did, "DESY-DISK"), (did, "HZDR-DISK"), ("s:nothing", "DESY-DISK"), (did, "NO"))
    assert (said.to_look_at, said.passed_over, said.too_many) == (1, 3, 0)
    assert world.state(did, "DESY-DISK") == "available"
    (suspect,) = world.suspects()
    assert (suspect.why, suspect.account, suspect.proven) == ("reader", "reader", False)
    assert doubted(world, "reader", (did, "DESY-DISK")).to_look_at == 0, "it is doubted already"
    (check,) = world.checks("DESY").probes
    world.tell("DESY", found(check))
    assert world.suspects() == []
    assert doubted(world, "reader", (did, "DESY-DISK")).to_look_at == 0, "it was proven just now"
    world.whole()


def test_an_account_has_only_so_much_looked_at_in_a_day(world, old, clock, monkeypatch):
    monkeypatch.setattr(doubts, "DOUBTS_IN_A_DAY", 3)
    said = doubted(world, "reader", *((did, "DESY-DISK") for did in old))
    assert (said.to_look_at, said.too_many) == (3, 2)
    assert doubted(world, "reader", (old[4], "DESY-DISK")).too_many == 1
    assert doubted(world, "root", (old[4], "DESY-DISK")).to_look_at == 1, "each account for itself"
    clock.turn(days=2)
    monkeypatch.setattr(doubts, "DOUBTED_BYTES_IN_A_DAY", 1)
    assert doubted(world, "reader", (old[3], "DESY-DISK")).to_look_at == 1, "one always fits"
    world.whole()


def test_a_readers_word_does_not_get_past_the_halt_of_an_endpoint(world, old):
    with world.db.write() as s:
        checks.provide_rows(s, sa.true())
        s.execute(tables.scrubs.update().values(halted_at=s.now))
    doubted(world, "reader", *((did, "DESY-DISK") for did in old))
    assert world.checks("DESY").probes == []


def test_a_site_says_nothing_of_anothers_replicas(world, old):
    doubted(world, "reader", (old[0], "DESY-DISK"))
    (check,) = world.checks("DESY").probes
    assert world.checks("GSI").probes == []
    for outcome in ("missing", "differs", "ok"):
        assert world.tell("GSI", found(check, outcome)).accepted == 0
    world.scrub("DESY-DISK", depth="deep", now=True)
    with world.db.write() as s:
        beat = wire.CheckHeartbeat(
            worker="GSI/1",
            probes=[wire.ProbeBeat(file=check.file, endpoint_id=check.endpoint_id, epoch=check.epoch)],
        )
        assert checks.heartbeat(s, world.sites["GSI"], beat, lease_seconds=LEASE).stop == [check.file]
    worker = Actor("worker", Role.SITE, "GSI")
    with pytest.raises(NotAllowed):
        world.bad(old[0], "DESY-DISK", worker)
    assert world.state(old[0], "DESY-DISK") == "available"
    assert len(world.suspects()) == 1
