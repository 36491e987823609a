"""A small world to test the catalogue in: sites, endpoints, files; short verbs; and a recount of everything.

`World.check` counts again, in plain Python from the rows, what the catalogue keeps by set-based deltas.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, dids, endpoints, replicas, rules, scopes, sites, transfers
from replica.db import tables
from replica.db.engine import Database, Session
from rules.names import Did
from rules.permissions import Actor, Role
from rules.states import (
    TRANSFER_TERMINAL,
    DidKind,
    Evidence,
    Grouping,
    ReplicaState,
    RuleState,
    TransferState,
)
from rules.transfers import RetryPolicy

ROOT = Actor("root", Role.ADMIN)
LEASE = 120.0
KB, MB = 1_000, 1_000_000


def checksums(name: str) -> dict[str, str]:
    return {"adler32": f"{hash_of(name):08x}"}


def size_of(name: str) -> int:
    """Files are of different sizes unless a test says otherwise: what is added to the wrong sum is seen."""
    return hash_of(name) % (2 * KB) + 1


def hash_of(name: str) -> int:
    value = 2166136261
    for byte in name.encode():
        value = ((value ^ byte) * 16777619) & 0xFFFFFFFF
    return value


class World:
    def __init__(self, db: Database) -> None:
        self.db = db
        self._numbers = itertools.count(1)
        self.sites: dict[str, int] = {}
        #: What the queues were told after the commits.
        self.woken: set[str] = set()
        db.on_commit = self.woken.update
        with db.write() as s:
            accounts.bootstrap(s)
            scopes.add(s, ROOT, wire.NewScope(name="t"))

    def endpoint(
        self, name: str, site: str | None = None, *, capacity: int | None = None, **attributes: str | int
    ) -> str:
        site = site or name.split("-")[0]
        with self.db.write() as s:
            if site not in self.sites:
                self.sites[site] = sites.add(s, wire.NewSite(name=site)).id
            endpoints.add(
                s,
                wire.NewEndpoint(
                    name=name, site=site, url=f"file:///data/{name}", capacity_bytes=capacity, attributes=attributes
                ),
            )
        return name

    def three(self) -> None:
        """DESY-DISK, HZDR-DISK and GSI-DISK, each at its site, without a limit."""
        for name in ("DESY-DISK", "HZDR-DISK", "GSI-DISK"):
            self.endpoint(name)

    def change(self, name: str, **fields: object) -> None:
        with self.db.write() as s:
            endpoints.change(s, name, wire.EndpointChange(**fields))

    def collection(self, name: str, kind: str = "dataset") -> str:
        with self.db.write() as s:
            dids.add(s, ROOT, wire.NewDid(did=f"t:{name}", kind=kind))
        return f"t:{name}"

    def files(
        self,
        count: int,
        at: str,
        dataset: str | None = None,
        *,
        size: int | None = None,
        evidence: str = "hashed",
    ) -> list[str]:
        names = [f"t:f{next(self._numbers):07}" for _ in range(count)]
        self.register(names, at, dataset, size=size, evidence=evidence)
        return names

    def register(
        self,
        names: Sequence[str],
        at: str,
        dataset: str | None = None,
        *,
        size: int | None = None,
        evidence: str = "hashed",
    ) -> None:
        for start in range(0, len(names), wire.BULK_MAX):
            part = names[start : start + wire.BULK_MAX]
            with self.db.write() as s:
                replicas.register(
                    s,
                    ROOT,
                    wire.Registration(
                        endpoint=at,
                        dataset=dataset,
                        evidence=evidence,
                        replicas=[
                            wire.NewReplica(did=n, size=size_of(n) if size is None else size, checksums=checksums(n))
                            for n in part
                        ],
                    ),
                )

    def attach(self, parent: str, *children: str) -> None:
        with self.db.write() as s:
            dids.attach(s, Did.parse(parent), [Did.parse(c) for c in children])

    def detach(self, parent: str, *children: str) -> None:
        with self.db.write() as s:
            dids.detach(s, Did.parse(parent), [Did.parse(c) for c in children])

    def rule(self, did: str, expression: str, **fields: object) -> wire.Rule:
        with self.db.write() as s:
            return rules.add(s, ROOT, wire.NewRule(did=did, expression=expression, **fields))

    def show(self, rule: wire.Rule | int) -> wire.Rule:
        with self.db.read() as s:
            return rules.get(s, rule if isinstance(rule, int) else rule.id)

    def explain(self, rule: wire.Rule) -> wire.Explanation:
        with self.db.read() as s:
            return rules.explain(s, rule.id)

    def delete(self, rule: wire.Rule) -> None:
        with self.db.write() as s:
            rules.delete(s, rule.id)

    def evaluate(self, *, limit_files: int = 20_000, times: int = 100) -> int:
        """Evaluate until nothing is due; returns how often something was."""
        for done in range(times):
            with self.db.write() as s:
                if rules.evaluate_due(s, limit_files) == 0:
                    return done
        raise AssertionError("evaluation does not come to an end")

    def contents(self, dataset: str) -> list[str]:
        with self.db.read() as s:
            return [child.did for child in dids.contents(s, Did.parse(dataset), None, 1_000).items]

    def evaluate_once(self, *, limit_files: int = 20_000) -> int:
        with self.db.write() as s:
            return rules.evaluate_due(s, limit_files)

    def claim(self, site: str, limit: int = 1_000, **fields: object) -> wire.Orders:
        with self.db.write() as s:
            claim = wire.Claim(worker=f"{site}/1", limit=limit, **fields)
            return transfers.claim(s, self.sites[site], claim, lease_seconds=LEASE)

    def heartbeat(self, site: str, *beats: wire.Beat) -> wire.HeartbeatAnswer:
        with self.db.write() as s:
            heartbeat = wire.Heartbeat(worker=f"{site}/1", beats=list(beats))
            return transfers.heartbeat(s, self.sites[site], heartbeat, lease_seconds=LEASE)

    def report(
        self, site: str, outcomes: Sequence[wire.Outcome], *, policy: RetryPolicy | None = None
    ) -> wire.ReportAnswer:
        with self.db.write() as s:
            report = wire.Report(worker=f"{site}/1", outcomes=list(outcomes))
            return transfers.report(
                s, self.sites[site], report, fraction=0.5, policy=policy or RetryPolicy(attempts_max=8)
            )

    def expire(self, policy: RetryPolicy | None = None) -> int:
        with self.db.write() as s:
            return transfers.expire_leases(s, policy or RetryPolicy(attempts_max=8))

    def cancel(self, transfer_id: int) -> wire.Transfer:
        with self.db.write() as s:
            return transfers.cancel(s, transfer_id)

    def retry(self, transfer_id: int) -> wire.Transfer:
        with self.db.write() as s:
            return transfers.retry(s, transfer_id)

    def transfers(self, **where: object) -> list[wire.Transfer]:
        with self.db.read() as s:
            return transfers.list_page(s, limit=1_000, **where).items

    def move(self, *sites: str) -> int:
        """Carry out all that is queued; returns how many files were moved."""
        moved = 0
        while True:
            before = moved
            for site in sites or self.sites:
                orders = self.claim(site).orders
                if orders:
                    moved += self.report(site, [done(order) for order in orders]).accepted
            if moved == before:
                return moved

    @contextmanager
    def look(self) -> Iterator[Session]:
        with self.db.read() as s:
            yield s

    def count(self, table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
        with self.db.read() as s:
            return s.execute(sa.select(sa.func.count()).select_from(table).where(*where)).scalar_one()

    def used(self, endpoint: str) -> int:
        with self.db.read() as s:
            return endpoints.get(s, endpoint).used_bytes

    # --- the recount ---

    def check(self) -> None:
        """Every invariant between the tables that the catalogue promises at each commit."""
        t = tables
        with self.db.read() as s:

            def rows(table: sa.Table) -> Sequence[sa.Row[tuple[object, ...]]]:
                return s.execute(sa.select(table)).all()

            size = {r.did_id: r.size_bytes for r in rows(t.files)}
            kind = {r.id: r.kind for r in rows(t.dids)}
            children: dict[int, set[int]] = defaultdict(set)
            for r in rows(t.contents):
                children[r.parent_id].add(r.child_id)
            replica = {(r.file_id, r.endpoint_id): r for r in rows(t.replicas)}
            used: dict[int, int] = defaultdict(int)
            for file_id, endpoint_id in replica:
                used[endpoint_id] += size[file_id]
            for e in rows(t.endpoints):
                assert e.used_bytes == used[e.id], f"used_bytes of {e.name}: {e.used_bytes}, recounted {used[e.id]}"

            live: dict[tuple[int, int], sa.Row[tuple[object, ...]]] = {}
            vain: set[tuple[int, int]] = set()
            for x in rows(t.transfers):
                pair = (x.file_id, x.target_id)
                if x.state not in TRANSFER_TERMINAL:
                    assert pair not in live, f"two live transfers for {pair}"
                    live[pair] = x
                    assert pair in replica, f"live transfer {x.id} without a replica"
                    assert replica[pair].state is not ReplicaState.AVAILABLE, f"needless transfer {x.id}"
                elif x.state in (TransferState.FAILED, TransferState.CANCELLED):
                    vain.add(pair)

            def files_of(unit: int) -> set[int]:
                return {unit} if kind[unit] is DidKind.FILE else children[unit]

            def datasets(did: int) -> set[int]:
                if kind[did] is not DidKind.CONTAINER:
                    return {did}
                return set().union(*(datasets(c) for c in children[did]))

            covered: set[tuple[int, int]] = set()
            by_rule: dict[int, list[sa.Row[tuple[object, ...]]]] = defaultdict(list)
            #: Their locks are being removed; until then they protect, and nobody counts on them.
            ended = {r.id for r in rows(t.rules) if r.state is RuleState.EXPIRED}
            for lock in rows(t.locks):
                by_rule[lock.rule_id].append(lock)
                pairs = [(f, lock.endpoint_id) for f in files_of(lock.unit_id)]
                covered.update(pairs)
                if lock.rule_id in ended:
                    continue
                there = {p for p in pairs if p in replica and replica[p].state is ReplicaState.AVAILABLE}
                stuck = {p for p in pairs if p in replica and p not in there and p not in live and p in vain}
                kept = (lock.files_total, lock.files_available, lock.files_stuck, lock.bytes_total)
                true = (len(pairs), len(there), len(stuck), sum(size[f] for f, _ in pairs))
                assert kept == true, f"lock {lock.rule_id}/{lock.unit_id}/{lock.endpoint_id}: {kept}, recounted {true}"
                assert lock.bytes_pending >= 0
                if lock.surplus:
                    assert not lock.bytes_pending, "what is not wished any more reserves nothing"
                elif lock.applied_to is None:
                    for p in pairs:
                        assert p in replica, f"{p} is locked and has no replica"
                        assert p in there or p in live or p in stuck, (
                            f"{p} is locked, missing, and nobody does anything"
                        )

            for p, r in replica.items():
                if p in covered:
                    worked_off = all(
                        lock.applied_to is None and lock.rule_id not in ended
                        for locks in by_rule.values()
                        for lock in locks
                        if lock.endpoint_id == p[1] and p[0] in files_of(lock.unit_id)
                    )
                    assert r.tombstone_at is None or not worked_off, f"{p} is locked and may be deleted"
                step = any(h.closed_at is None and (h.file_id, h.endpoint_id) == p for h in rows(t.route_hops))
                wanted = p in covered or step or r.evidence is Evidence.DECLARED
                if r.state is ReplicaState.COPYING and not wanted:
                    assert r.tombstone_at is not None, f"{p} is wanted by nobody, and nobody clears it away"

            for rule in rows(t.rules):
                mine = [lock for lock in by_rule[rule.id] if not lock.surplus]
                surplus = len(by_rule[rule.id]) - len(mine)
                if rule.state in (RuleState.EXPIRED, RuleState.WAITING_APPROVAL):
                    assert rule.evaluate_at is not None or (not mine and not surplus)
                    continue
                if rule.revised_to is not None:  # its wish was changed, and it was not compared with all of it yet
                    assert rule.evaluate_at is not None
                    continue
                units = datasets(rule.did_id)
                if rule.grouping is Grouping.NONE:
                    units = set().union(*(files_of(u) for u in units))
                assert {lock.unit_id for lock in mine} <= units, "a lock on what the rule does not hold"
                per_unit: dict[int, int] = defaultdict(int)
                for lock in mine:
                    per_unit[lock.unit_id] += 1
                assert all(n <= rule.copies for n in per_unit.values())
                if rule.placed_to is None:
                    assert rule.copies_missing == rule.copies * len(units) - len(mine)
                if rule.copies_missing or any(lock.files_stuck for lock in mine):
                    expected = RuleState.STUCK
                elif rule.placed_to is not None or any(
                    lock.applied_to is not None or lock.files_available < lock.files_total for lock in mine
                ):
                    expected = RuleState.REPLICATING
                else:
                    expected = RuleState.OK
                if rule.state is RuleState.SUSPENDED:
                    assert expected is RuleState.OK or rule.evaluate_at is not None, "nobody will look again"
                    continue
                assert rule.state is expected, f"rule {rule.id} is {rule.state}, should be {expected}"
                settled = rule.state is RuleState.OK and not surplus
                assert settled or rule.evaluate_at is not None, "nobody will look again"


def done(order: wire.Order, **fields: object) -> wire.Outcome:
    values: dict[str, object] = {
        "source_endpoint": order.sources[0].endpoint if order.sources else None,
        "size": order.size,
        "checksums": order.checksums,
    }
    return wire.Outcome(transfer=order.transfer, epoch=order.epoch, outcome="done", **(values | fields))


def failed(order: wire.Order, error: str, side: str = "target", **fields: object) -> wire.Outcome:
    return wire.Outcome(
        transfer=order.transfer,
        epoch=order.epoch,
        outcome="failed",
        source_endpoint=order.sources[0].endpoint if order.sources else None,
        error=error,
        message=f"{error} happened",
        side=side,
        **fields,
    )
