"""A World whose copies can be let go, chosen, removed and asked for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import sqlalchemy as sa

from replica import wire
from replica.catalog import deletions, removals
from replica.catalog.bulk import rows_of
from replica.catalog.provision import PAIR
from replica.db import tables
from replica.db.tables import replicas
from rules.names import Did
from rules.states import ReplicaState
from rules.transfers import RetryPolicy
from tests.replica.catalog.world import LEASE, ROOT, World


class CleanWorld(World):
    def endpoint_id(self, name: str) -> int:
        with self.db.read() as s:
            e = tables.endpoints
            return s.execute(sa.select(e.c.id).where(e.c.name == name)).scalar_one()

    def file_id(self, did: str) -> int:
        with self.db.read() as s:
            name = Did.parse(did).name
            return s.execute(sa.select(tables.dids.c.id).where(tables.dids.c.name == name)).scalar_one()

    def set_endpoint(self, name: str, **values: object) -> None:
        with self.db.write() as s:
            s.execute(tables.endpoints.update().where(tables.endpoints.c.name == name).values(**values))

    def set_replica(self, did: str, at: str, **values: object) -> None:
        here = replicas.c.file_id == self.file_id(did), replicas.c.endpoint_id == self.endpoint_id(at)
        with self.db.write() as s:
            s.execute(replicas.update().where(*here).values(**values))

    def copied(self, names: Sequence[str], to: str, *, dataset: str | None = None) -> None:
        """The same files, at another endpoint as well, proven there."""
        self.register(names, to, dataset)

    def released(self, names: Sequence[str], at: str, seconds_ago: float = 10.0) -> None:
        """As when a rule has let go of them."""
        endpoint_id = self.endpoint_id(at)
        pairs = [(self.file_id(name), endpoint_id) for name in names]
        with self.db.write() as s:
            batch = rows_of(s, "let_go", PAIR, sorted(pairs))
            s.execute(
                replicas.update()
                .where(replicas.c.file_id == batch.c.file_id, replicas.c.endpoint_id == batch.c.endpoint_id)
                .values(tombstone_at=s.now - timedelta(seconds=seconds_ago))
            )

    def clean(self, at: str, **options: object) -> deletions.Decided:
        endpoint_id = self.endpoint_id(at)
        with self.db.write() as s:
            return deletions.decide(s, endpoint_id, **options)

    def ask(self, did: str, at: str, *, last_copy: bool = False) -> wire.Deletion:
        with self.db.write() as s:
            return deletions.ask(s, ROOT, wire.NewDeletion(did=did, endpoint=at, last_copy=last_copy))

    def undo(self, deletion: int) -> wire.Deletion:
        with self.db.write() as s:
            return deletions.undo(s, ROOT, deletion)

    def deletions(self, **where: object) -> list[wire.Deletion]:
        with self.db.read() as s:
            return deletions.list_page(s, limit=1_000, **where).items

    def take(self, site: str, limit: int = 1_000, worker: str = "1") -> wire.DeletionOrders:
        with self.db.write() as s:
            claim = wire.DeletionClaim(worker=f"{site}/{worker}", limit=limit)
            return removals.claim(s, self.sites[site], claim, lease_seconds=LEASE)

    def beat(self, site: str, *beats: wire.DeletionBeat) -> wire.HeartbeatAnswer:
        with self.db.write() as s:
            heartbeat = wire.DeletionHeartbeat(worker=f"{site}/1", beats=list(beats))
            return removals.heartbeat(s, self.sites[site], heartbeat, lease_seconds=LEASE)

    def tell(self, site: str, *outcomes: wire.DeletionOutcome, policy: RetryPolicy | None = None) -> wire.ReportAnswer:
        with self.db.write() as s:
            report = wire.DeletionReport(worker=f"{site}/1", outcomes=list(outcomes))
            return removals.report(s, self.sites[site], report, fraction=0.5, policy=policy or RetryPolicy())

    def remove(self, site: str) -> int:
        """Carry out what is due; returns how many replicas went."""
        orders = self.take(site).orders
        return self.tell(site, *map(removed, orders)).accepted if orders else 0

    def where(self, did: str) -> dict[str, str]:
        """Endpoint → state."""
        file_id = self.file_id(did)
        with self.db.read() as s:
            e = tables.endpoints
            query = sa.select(e.c.name, replicas.c.state).join(e, e.c.id == replicas.c.endpoint_id)
            return {row.name: row.state.label for row in s.execute(query.where(replicas.c.file_id == file_id))}

    def row(self, did: str, at: str) -> sa.Row[tuple[object, ...]]:
        here = replicas.c.file_id == self.file_id(did), replicas.c.endpoint_id == self.endpoint_id(at)
        with self.db.read() as s:
            return s.execute(sa.select(replicas).where(*here)).one()

    def check(self) -> None:
        super().check()
        d = tables.deletions
        with self.db.read() as s:
            states = {(r.file_id, r.endpoint_id): r for r in s.execute(sa.select(replicas))}
            live = {(r.file_id, r.endpoint_id): r for r in s.execute(sa.select(d).where(d.c.finished_at.is_(None)))}
        deleting = {pair for pair, row in states.items() if row.state is ReplicaState.DELETING}
        assert deleting == live.keys()
        assert all(states[pair].generation == row.generation for pair, row in live.items())


def removed(order: wire.DeletionOrder) -> wire.DeletionOutcome:
    return wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome="removed")


def not_removed(order: wire.DeletionOrder, error: str) -> wire.DeletionOutcome:
    return wire.DeletionOutcome(
        deletion=order.deletion, epoch=order.epoch, outcome="failed", error=error, message=f"{error} happened"
    )
