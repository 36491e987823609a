"""fsck finds nothing in a healthy world and each corruption by the invariant that it violates; counters it repairs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from pytest import MonkeyPatch

from replica import wire
from replica.catalog import endpoints, fsck, locks, routes, rules
from replica.db.engine import Database, Session
from rules.errors import Invalid
from rules.transfers import RetryPolicy
from tests.conftest import HandClock
from tests.replica.catalog.world import KB, World, failed

ONCE = RetryPolicy(attempts_max=1)


def wrong(world: World) -> dict[str, fsck.Finding]:
    """What is violated: its name and what was found."""
    return {f.invariant: f for f in fsck.check(world.db).findings if f.violations}


def healthy(db: Database) -> World:
    """A bit of everything: nested contents; rules that are OK, stuck, on their way, over; leases, failures, ends."""
    world = World(db)
    world.three()
    world.endpoint("HZDR-TWO", "HZDR", capacity=50 * KB, hop="true")
    whole = world.collection("whole")
    world.files(4, "DESY-DISK", whole)
    both = world.collection("both", "container")
    outer = world.collection("outer", "container")
    world.attach(both, whole)
    world.attach(outer, both)
    world.rule(outer, "*", copies=2, spread="site")
    world.rule(whole, "DESY-DISK", grouping="none")
    world.move()
    part = world.collection("part")
    world.files(3, "DESY-DISK", part)
    world.rule(part, "GSI-DISK")
    world.move()
    world.rule(part, "HZDR-DISK")
    world.claim("HZDR", 1)
    lost = world.collection("lost")
    world.files(2, "DESY-DISK", lost)
    world.rule(lost, "GSI-DISK")
    world.report("GSI", [failed(o, "refused") for o in world.claim("GSI", 1).orders], policy=ONCE)
    big = world.collection("big")
    world.files(1, "DESY-DISK", big, size=60 * KB)
    world.rule(big, "HZDR-TWO")
    ended = world.collection("ended")
    world.files(1, "DESY-DISK", ended)
    rule = world.rule(ended, "HZDR-DISK|GSI-DISK")
    world.delete(rule)
    over = world.collection("over")
    world.files(2, "HZDR-DISK", over)
    with db.write() as s:
        endpoints.set_link(s, wire.LinkChange(source="HZDR-DISK", target="DESY-DISK", allowed=False))
    world.rule(over, "DESY-DISK")
    world.claim("DESY")
    with db.write() as s:
        assert routes.plan(s) == 2
    return world


@dataclass(frozen=True)
class Plant:
    """A corruption, the invariant that must find it, and what else it violates as well."""

    found_by: str
    statement: str
    also: frozenset[str]
    repaired: bool


def plant(found_by: str, statement: str, *also: str, repaired: bool = False) -> Plant:
    return Plant(found_by, statement, frozenset(also), repaired)


def did(name: str) -> str:
    return f"(SELECT id FROM dids WHERE name = '{name}')"


def at(name: str) -> str:
    return f"(SELECT id FROM endpoints WHERE name = '{name}')"


def of(name: str) -> str:
    """The files in the dataset."""
    return f"(SELECT child_id FROM contents WHERE parent_id = {did(name)})"


def first_of(name: str) -> str:
    return f"(SELECT min(child_id) FROM contents WHERE parent_id = {did(name)})"


def of_rule(name: str) -> str:
    return f"(SELECT min(id) FROM rules WHERE did_id = {did(name)})"


ORDERED = f"(SELECT min(id) FROM transfers WHERE file_id IN {of('part')} AND state = 1)"
CLAIMED = "(SELECT id FROM transfers WHERE state = 2)"
DONE = "(SELECT min(id) FROM transfers WHERE state = 6)"
NEW_TRANSFER = (
    "INSERT INTO transfers (file_id, target_id, site_id, state, priority, activity, size_bytes, created_at)"
    " SELECT r.file_id, r.endpoint_id, e.site_id, {state}, 3, 'x', 1, 0"
    " FROM replicas r JOIN endpoints e ON e.id = r.endpoint_id"
    f" WHERE r.file_id = {first_of('whole')} AND r.endpoint_id = {at('DESY-DISK')}"
)
NEW_DELETION = (
    "INSERT INTO deletions (file_id, endpoint_id, site_id, generation, size_bytes, state, was, why, created_at{more})"
    " SELECT r.file_id, r.endpoint_id, e.site_id, {generation}, 1, {state}, 2, 'space', 0{values}"
    " FROM replicas r JOIN endpoints e ON e.id = r.endpoint_id"
    " WHERE r.file_id = {file} AND r.endpoint_id = {endpoint}"
)


def deletion(state: int, file: str, endpoint: str, generation: int = 1, more: str = "", values: str = "") -> str:
    return NEW_DELETION.format(
        state=state, file=file, endpoint=at(endpoint), generation=generation, more=more, values=values
    )


NEW_SCAN = (
    "INSERT INTO scans (endpoint_id, site_id, state, listed_by, created_at{more})"
    " SELECT e.id, e.site_id, {state}, 'worker', 0{values} FROM endpoints e WHERE e.name = 'DESY-DISK'"
)
NEW_FINDING = (
    "INSERT INTO findings (scan_id, endpoint_id, kind, state, path, path_hash, size_bytes, first_seen_at)"
    " SELECT max(id), {endpoint}, '{kind}', {state}, 'p', '1234567890123456', 0, 0 FROM scans"
)


def scan(state: int, more: str = "", values: str = "") -> str:
    return NEW_SCAN.format(state=state, more=more, values=values)


def finding(kind: str, state: int, endpoint: str = "DESY-DISK") -> str:
    return NEW_FINDING.format(kind=kind, state=state, endpoint=at(endpoint))


DELETING = f"UPDATE replicas SET state = 5 WHERE file_id = {{}} AND endpoint_id = {at('DESY-DISK')}"
ENDED = first_of("ended")

PLANTS = [
    # contents
    plant(
        "did-kinds", f"UPDATE dids SET kind = 2, files_total = 0, bytes_total = 0 WHERE id = {ENDED}", "contents-kinds"
    ),
    plant("contents-kinds", f"INSERT INTO contents VALUES ({did('ended')}, {did('lost')})"),
    plant("contents-cycle", f"INSERT INTO contents VALUES ({did('both')}, {did('outer')})"),
    plant("did-closed", f"UPDATE dids SET closed_at = 5 WHERE id = {did('part')}"),
    plant("did-totals", f"UPDATE dids SET bytes_total = bytes_total + 1 WHERE id = {did('part')}", repaired=True),
    plant("did-totals", f"UPDATE dids SET files_total = 0 WHERE id = {did('lost')}", repaired=True),
    plant("did-totals-of-others", f"UPDATE dids SET files_total = 4 WHERE id = {did('both')}"),
    plant("did-shared", f"UPDATE dids SET shared = false WHERE id = {did('whole')}"),
    # replicas
    plant("replica-evidence", f"UPDATE replicas SET evidence = 1 WHERE file_id = {first_of('whole')}"),
    plant("replica-evidence", f"UPDATE replicas SET verified_at = NULL WHERE file_id = {ENDED}"),
    plant("replica-checksum", f"UPDATE files SET adler32 = NULL WHERE did_id = {ENDED}"),
    plant("replica-generation", f"UPDATE replicas SET generation = 0 WHERE file_id = {ENDED}"),
    plant("replica-protected", f"UPDATE replicas SET tombstone_at = 7 WHERE file_id = {first_of('whole')}"),
    plant("replica-wanted", f"UPDATE replicas SET state = 1, evidence = NULL WHERE file_id = {ENDED}"),
    plant("replica-bad", f"UPDATE replicas SET state = 4 WHERE file_id = {ENDED}"),
    plant(
        "probe-lease",
        "INSERT INTO suspects (file_id, endpoint_id, why, message, since, lease_until)"
        f" VALUES ({ENDED}, 1, 'scan', 'x', 1, 2)",
    ),
    plant(
        "scrub-place",
        "INSERT INTO scrubs (endpoint_id, depth, period_seconds, guard_fraction, pass_began_at, next_at, files, wrong)"
        " VALUES (1, 'deep', 1, 0.1, 1, 1, 3, 4)",
    ),
    plant("replica-deleting", DELETING.format(ENDED)),
    plant("replica-deleting", deletion(1, ENDED, "DESY-DISK"), "deletion-last-copy"),
    plant(
        "replica-path",
        f"UPDATE replicas SET path = 't/' || (SELECT name FROM dids WHERE id = {first_of('big')})"
        f" WHERE file_id = {ENDED}",
    ),
    plant(
        "endpoint-used", f"UPDATE endpoints SET used_bytes = used_bytes - 9 WHERE id = {at('DESY-DISK')}", repaired=True
    ),
    # rules
    plant("rule-ok-copies", f"UPDATE rules SET copies = 3 WHERE id = {of_rule('outer')}", "rule-missing"),
    plant("rule-ok-files", f"UPDATE rules SET state = 2 WHERE id = {of_rule('part')} + 1", "rule-state"),
    plant("rule-ok-spread", "UPDATE endpoints SET site_id = 1", "deletion-lease", "transfer-replica"),
    plant(
        "rule-ok-surplus",
        f"UPDATE locks SET surplus = true WHERE rule_id = {of_rule('whole')}",
        "rule-ok-copies",
        "rule-missing",
    ),
    plant("rule-missing", f"UPDATE rules SET copies_missing = 5 WHERE id = {of_rule('big')}", repaired=True),
    plant(
        "rule-missing",
        f"UPDATE rules SET copies_missing = 1 WHERE id = {of_rule('whole')}",
        "rule-state",
        repaired=True,
    ),
    plant("rule-state", f"UPDATE rules SET state = 1 WHERE id = {of_rule('big')}"),
    plant("rule-due", f"UPDATE rules SET evaluate_at = NULL WHERE id = {of_rule('big')}"),
    plant("rule-reasons", f"DELETE FROM reasons WHERE rule_id = {of_rule('big')}"),
    plant(
        "rule-reasons-gone",
        f"UPDATE reasons SET rule_id = {of_rule('whole')} WHERE rule_id = {of_rule('lost')}",
        "rule-reasons",
    ),
    plant("rule-of-subscription", f"UPDATE rules SET subscription_id = 4 WHERE id = {of_rule('whole')}"),
    # locks
    plant(
        "lock-counters",
        f"UPDATE locks SET files_available = files_available - 1 WHERE rule_id = {of_rule('part')}",
        "rule-state",
        repaired=True,
    ),
    plant(
        "lock-counters",
        f"UPDATE locks SET files_total = files_total + 2 WHERE rule_id = {of_rule('lost')}",
        repaired=True,
    ),
    plant(
        "lock-counters",
        f"UPDATE locks SET files_stuck = 0 WHERE rule_id = {of_rule('lost')}",
        "rule-state",
        repaired=True,
    ),
    plant("lock-counters", f"UPDATE locks SET bytes_total = 1 WHERE rule_id = {of_rule('lost')}", repaired=True),
    plant("lock-pending", f"UPDATE locks SET bytes_pending = 12 WHERE rule_id = {of_rule('part')}", repaired=True),
    plant(
        "lock-unit",
        f"UPDATE locks SET unit_id = {did('whole')} WHERE rule_id = {of_rule('part')}",
        "lock-counters",
        "rule-ok-copies",
        "usage",
        "did-shared",
        "lock-provided",
        "rule-ok-files",
    ),
    plant("lock-rule", f"UPDATE rules SET state = 5 WHERE id = {of_rule('part')}", "lock-unit"),
    plant(
        "lock-surplus",
        f"UPDATE locks SET unit_id = {did('whole')}, surplus = true WHERE rule_id = {of_rule('part')}",
        *("lock-counters", "rule-ok-copies", "rule-ok-surplus", "rule-missing", "usage", "did-shared"),
    ),
    plant("lock-released", f"UPDATE rules SET state = 6, evaluate_at = NULL WHERE id = {of_rule('part')}"),
    plant("lock-number", f"UPDATE rules SET copies = 1 WHERE id = {of_rule('outer')}", "rule-ok-copies"),
    plant("lock-provided", f"UPDATE transfers SET state = 6, finished_at = 1 WHERE id = {ORDERED}"),
    plant(
        "lock-provided",
        f"DELETE FROM replicas WHERE file_id = {first_of('part')} AND endpoint_id = {at('GSI-DISK')}",
        "endpoint-used",
        "lock-counters",
        "rule-ok-files",
    ),
    # work
    plant(
        "transfer-once",
        f"DROP INDEX uq_transfers_live; UPDATE transfers SET file_id = {first_of('part')}"
        f" WHERE file_id IN {of('part')} AND target_id = {at('HZDR-DISK')} AND state = 1",
        "lock-provided",
    ),
    plant("transfer-replica", NEW_TRANSFER.format(state=1)),
    plant("transfer-replica", f"UPDATE transfers SET site_id = 1 WHERE id = {ORDERED}"),
    plant("transfer-lease", f"UPDATE transfers SET lease_until = NULL WHERE id = {CLAIMED}"),
    plant("transfer-lease", f"UPDATE transfers SET lease_until = 8 WHERE id = {ORDERED}"),
    plant("transfer-lease", f"UPDATE transfers SET state = 5 WHERE id = {ORDERED}"),
    plant("transfer-suspended", f"UPDATE transfers SET state = 5, reason_code = 'suspended' WHERE id = {ORDERED}"),
    plant("transfer-finished", f"UPDATE transfers SET finished_at = NULL WHERE id = {DONE}"),
    plant("transfer-attempts", f"UPDATE transfers SET attempts = 9 WHERE id = {DONE}"),
    plant("attempt-once", f"UPDATE attempts SET epoch = 3 WHERE transfer_id = {DONE}"),
    plant(
        "attempt-once",
        "INSERT INTO attempts (transfer_id, epoch, outcome, at)"
        f" SELECT transfer_id, epoch, 'failed', 0 FROM attempts WHERE transfer_id = {DONE}",
    ),
    plant("route-transfer", f"UPDATE routes SET target_id = {at('GSI-DISK')} WHERE file_id = {first_of('over')}"),
    plant(
        "route-transfer",
        f"UPDATE route_hops SET endpoint_id = {at('DESY-DISK')} WHERE file_id = {first_of('over')}",
    ),
    plant("route-closed", f"UPDATE routes SET outcome = 'done' WHERE file_id = {first_of('over')}"),
    plant("route-closed", f"UPDATE route_hops SET closed_at = 5 WHERE file_id = {first_of('over')}"),
    plant("route-closed", f"DELETE FROM route_hops WHERE file_id = {first_of('over')}"),
    plant(
        "route-reserved",
        f"DELETE FROM replicas WHERE file_id = {first_of('over')} AND endpoint_id = {at('HZDR-TWO')}",
        "endpoint-used",
        "transfer-replica",
    ),
    plant("route-waiting", f"UPDATE routes SET transfer_id = -1 WHERE file_id = {first_of('over')}", "route-transfer"),
    plant("transfer-reads", f"INSERT INTO reads VALUES ({CLAIMED}, 2, {at('GSI-DISK')})"),
    plant("transfer-reads", f"INSERT INTO reads VALUES ({CLAIMED}, 1, {at('HZDR-DISK')})"),
    plant(
        "deletion-once",
        "DROP INDEX uq_deletions_live; "
        + "; ".join([deletion(1, first_of("whole"), "DESY-DISK")] * 2 + [DELETING.format(first_of("whole"))]),
        "deletion-covered",
        "rule-ok-files",
        "lock-counters",
        "lock-provided",
    ),
    plant("deletion-lease", deletion(2, ENDED, "DESY-DISK") + "; " + DELETING.format(ENDED), "deletion-last-copy"),
    plant("deletion-finished", deletion(3, ENDED, "DESY-DISK")),
    plant("deletion-attempts", deletion(3, ENDED, "DESY-DISK", more=", attempts, finished_at", values=", 2, 4")),
    plant(
        "deletion-covered",
        deletion(1, first_of("whole"), "DESY-DISK") + "; " + DELETING.format(first_of("whole")),
        "rule-ok-files",
        "lock-counters",
        "lock-provided",
    ),
    plant("deletion-last-copy", deletion(1, ENDED, "DESY-DISK") + "; " + DELETING.format(ENDED)),
    plant(
        "replica-generation",
        deletion(1, ENDED, "DESY-DISK", generation=2) + "; " + DELETING.format(ENDED),
        "deletion-last-copy",
    ),
    plant("references", f"UPDATE transfers SET source_id = 999 WHERE id = {DONE}"),
    # scans
    plant("scan-once", "DROP INDEX uq_scans_live; " + "; ".join([scan(1)] * 2)),
    plant("scan-lease", scan(2)),
    plant("scan-lease", scan(1, ", lease_until", ", 7")),
    plant("scan-finished", scan(6, ", compared_at", ", 7")),
    plant("scan-finished", scan(3)),
    plant("finding-scan", scan(1) + "; " + finding("dark", 1, "GSI-DISK")),
    plant("finding-scan", scan(1) + "; " + finding("missing", 1)),
    plant("finding-lease", scan(1) + "; " + finding("dark", 7)),
    plant("finding-lease", scan(1) + "; " + finding("odd", 6)),
    # the ledger
    plant("usage", f"UPDATE usage SET bytes = bytes + 1 WHERE endpoint_id = {at('GSI-DISK')}", repaired=True),
    plant("usage", f"DELETE FROM usage WHERE endpoint_id = {at('HZDR-DISK')}", repaired=True),
    plant(
        "event-versions",
        "DELETE FROM events WHERE version = 1 AND entity = 'rule'"
        f" AND entity_id = {of_rule('lost')}; UPDATE versions SET version = 9 WHERE entity = 'rule'",
    ),
    plant(
        "idempotency",
        "INSERT INTO idempotency_keys (account_id, key, request_hash, status, body, created_at)"
        " VALUES (1, 'k', '12345678901234567890123456789012', 0, '', 0)",
    ),
]


def corrupt(s: Session, planted: Plant) -> None:
    if not s.postgresql:  # it would look at references after each statement; at the end is late enough
        s.execute(sa.text("PRAGMA defer_foreign_keys = ON"))
    for statement in planted.statement.split("; "):
        s.execute(sa.text(statement))


class _TakenBackError(Exception):
    """Ends a transaction that nobody shall see."""


def test_a_healthy_world_violates_nothing(db: Database, clock: HandClock) -> None:
    world = healthy(db)
    world.check()
    assert wrong(world) == {}
    assert len({invariant.name for invariant in fsck.INVARIANTS}) == len(fsck.INVARIANTS)


def test_each_corruption_is_found_by_its_own_invariant(db: Database, clock: HandClock) -> None:
    """In one world, taken back each time: nothing is wrong but what was planted, and what follows from it."""
    world = healthy(db)
    missed: list[object] = []
    for planted in PLANTS:
        with suppress(_TakenBackError), world.db.write() as s:
            corrupt(s, planted)
            # What a corruption violates besides is seen on one database, for the SQL is the same on the other.
            wanted = fsck.named([planted.found_by]) if s.postgresql else fsck.INVARIANTS
            found = {f.invariant: f for f in fsck.examine(s, wanted) if f.violations}
            if planted.found_by not in found or found.keys() - {planted.found_by} - planted.also:
                missed.append((planted, [(name, f.examples[0].message) for name, f in found.items()]))
            raise _TakenBackError
    assert missed == []
    assert {planted.found_by for planted in PLANTS} == {invariant.name for invariant in fsck.INVARIANTS}


def test_counters_are_repaired_and_nothing_else(db: Database, clock: HandClock) -> None:
    world = healthy(db)
    for planted in PLANTS:
        if planted.repaired:
            with world.db.write() as s:
                corrupt(s, planted)
            report = fsck.check(db, repair=True)
            assert planted.found_by in {f.invariant for f in report.findings if f.repaired}, planted
            assert wrong(world) == {}, planted
            world.check()
    state = next(p for p in PLANTS if p.found_by == "replica-evidence")
    with world.db.write() as s:
        corrupt(s, state)
    report = fsck.check(db, repair=True)
    assert not report.clean
    assert list(wrong(world)) == ["replica-evidence"]


def test_counters_are_all_repaired_together(db: Database, clock: HandClock) -> None:
    world = healthy(db)
    with world.db.write() as s:
        s.execute(sa.text("UPDATE locks SET files_total = 1, files_available = 1, files_stuck = 1, bytes_total = 1"))
        s.execute(sa.text("UPDATE rules SET copies_missing = 1"))
        s.execute(sa.text("UPDATE endpoints SET used_bytes = 1"))
        s.execute(sa.text("UPDATE dids SET files_total = 1, bytes_total = 1 WHERE kind = 2"))
        s.execute(sa.text("UPDATE usage SET files = 1, bytes = 1"))
    assert fsck.check(db, repair=True).findings
    assert wrong(world) == {}
    world.check()


def test_slices_and_waiting_work_are_no_violation(db: Database, clock: HandClock, monkeypatch: MonkeyPatch) -> None:
    """A rule that is placed and worked off in pieces violates nothing between two of them."""
    monkeypatch.setattr(locks, "SLICE_FILES", 3)
    monkeypatch.setattr(locks, "SLICE_UNITS", 2)
    world = World(db)
    world.three()
    tree = world.collection("tree", "container")
    for i in range(4):
        dataset = world.collection(f"d{i}")
        world.files(5, "DESY-DISK", dataset)
        world.attach(tree, dataset)
    rule = world.rule(tree, "HZDR-DISK|GSI-DISK", copies=2)
    single = world.rule(tree, "GSI-DISK", grouping="none")
    steps = 0
    while True:
        assert wrong(world) == {}
        with world.db.write() as s:
            if rules.evaluate_due(s, 3) == 0:
                break
        steps += 1
    assert steps > 10
    orders = world.claim("HZDR", 4).orders
    assert wrong(world) == {}
    world.detach("t:d1", *[o.did for o in orders if o.did][:2])
    assert wrong(world) == {}
    world.delete(rule)
    assert wrong(world) == {}
    world.delete(single)
    assert wrong(world) == {}


def test_the_smallest_counter_examples_come_first_with_names_and_few(db: Database, clock: HandClock) -> None:
    world = World(db)
    world.three()
    for n in (30, 2, 9):
        dataset = world.collection(f"with{n}")
        world.files(n, "DESY-DISK", dataset)
        world.rule(dataset, "DESY-DISK")
    with world.db.write() as s:
        s.execute(sa.text("UPDATE locks SET files_stuck = 1"))
        s.execute(sa.text("UPDATE replicas SET verified_at = NULL"))
    found = wrong(world)
    counters, evidence = found["lock-counters"], found["replica-evidence"]
    assert [e.facts["unit"] for e in counters.examples] == ["t:with2", "t:with9", "t:with30"]
    assert counters.examples[0].message == (
        "rule 2 on t:with2 at DESY-DISK counts 2 files of {0} bytes, 2 available, 1 stuck;"
        " there are 2 of {0}, 2 available, 0 stuck".format(counters.examples[0].facts["bytes_true"])
    )
    assert evidence.violations == 41
    assert len(evidence.examples) == fsck.EXAMPLES
    assert "t:f0000001 at DESY-DISK is available, evidence: hashed, verified at: None" in evidence.examples[0].message


def test_a_check_is_one_moment_whatever_goes_on(db: Database, clock: HandClock) -> None:
    """The statements of one check see one state: what is committed between two of them belongs to the next."""
    world = healthy(db)
    with world.db.read() as s:
        assert fsck.violations(s, fsck.INVARIANTS[0]) == (0, [])
        with world.db.write() as other:
            other.execute(sa.text("UPDATE endpoints SET used_bytes = 1"))
        assert [f.invariant for f in fsck.examine(s) if f.violations] == []
    assert list(wrong(world)) == ["endpoint-used"]


def test_only_what_is_named_is_checked(db: Database, clock: HandClock) -> None:
    assert [f.invariant for f in fsck.check(db, only=["usage", "lock-rule"]).findings] == ["usage", "lock-rule"]
    with pytest.raises(Invalid, match="no invariant 'locks'"):
        fsck.check(db, only=["locks"])
