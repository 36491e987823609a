"""Dark files: on a storage, unknown to the catalogue, and in nobody's way until a person says that they shall go.

Given     a scan and a person's word; a worker of the endpoint's site.
Returns   orders to move files to quarantine, never to unlink them.
Promises  only what two scans found with the grace between them, and what is still unknown when a worker is told to move
          it, while the endpoint is held: whoever registers a file there waits for that, and is refused while it is
          being moved. Should a transfer have adopted such a file in the same moment, its replica is not taken for good
          any more, and a transfer looks what is there.
Partner   replica.catalog.scanning hands the orders out; workers.scanning carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, guards, losses, outbox, scans
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.losses import Lost
from replica.catalog.membership import Unguessed, any_of, by_index, dids_named, literal
from replica.catalog.provision import LIVE, wake_sites
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import Instant, alias_of, deletions, findings, replicas, transfers
from rules.errors import Refused
from rules.names import shown
from rules.paths import owners
from rules.permissions import Actor
from rules.reconciling import DARK
from rules.states import DeletionState, FindingState, ReplicaState, ScanState

#: How many are handed out at a time: few, for they are to be moved within one lease.
ORDERS = 200
_CLAIMED = findings.c.state == literal(FindingState.CLAIMED)


def ask(s: Session, actor: Actor, scan_id: int) -> wire.Scan:
    """The dark files that are confirmed by this scan, the endpoint's last complete one, shall go to quarantine."""
    row = scans.hold(s, scan_id)
    endpoint = tables.endpoints
    there = s.execute(sa.select(endpoint).where(endpoint.c.id == row.endpoint_id)).one()
    newest = sa.select(sa.func.max(tables.scans.c.id)).where(
        tables.scans.c.endpoint_id == row.endpoint_id, tables.scans.c.compared_at.is_not(None)
    )
    if row.compared_at is None or s.execute(newest).scalar() != scan_id:
        raise Refused(f"the scan {scan_id} is not the last complete one of {there.name}", hint="name that one")
    if row.state is ScanState.HELD:
        raise Refused(
            f"the scan {scan_id} is held: {row.reason}",
            hint=f"if it is so: `replica scan {there.name} --accept-fraction`",
        )
    if not there.deletable:
        raise Refused(f"deleting is off at {there.name}", hint=f"`replica endpoint set {there.name} --deletable`")
    mine = findings.c.scan_id == scan_id, findings.c.kind == DARK
    confirmed = findings.c.state == literal(FindingState.CONFIRMED)
    asked = s.execute(findings.update().where(*mine, confirmed).values(state=FindingState.ASKED)).rowcount
    if asked:
        account_id = accounts.account_id(s, actor.account)
        outbox.record(s, "scan.dark_asked", scan_id, account_id, endpoint=there.name, files=asked)
        wake_sites(s, {there.site_id})
    return scans.get(s, scan_id)


def claim(s: Session, site_id: int, worker: str, *, lease_seconds: float) -> list[wire.DarkOrder]:
    endpoint = tables.endpoints
    asked = findings.c.state == literal(FindingState.ASKED)
    open_ = findings.c.state.in_([literal(state) for state in scans.OPEN])
    of_site = sa.select(endpoint.c.id).where(endpoint.c.site_id == site_id, endpoint.c.deletable)
    first = sa.select(findings.c.endpoint_id).where(open_, asked, findings.c.endpoint_id.in_(of_site)).limit(1)
    endpoint_id = s.execute(first).scalar()
    if endpoint_id is None:
        return []
    guards.change_endpoints(s, [endpoint_id])  # who registers something there comes before this, or after
    query = (
        sa.select(findings, tables.scans.c.began_at)
        .join(tables.scans, tables.scans.c.id == findings.c.scan_id)
        .where(findings.c.endpoint_id == endpoint_id, open_, asked)
        .order_by(findings.c.id)
        .limit(ORDERS)
    )
    rows = s.execute(query.with_for_update(of=findings, key_share=True) if s.postgresql else query).all()
    if not rows:
        return []
    since = min(row.first_seen_at for row in rows)
    known = known_paths(s, endpoint_id, {row.path for row in rows}, since)
    stay = [row.id for row in rows if row.path in known]
    go = [row for row in rows if row.path not in known]
    if stay:
        ids = bulk.ids_of(s, "dark_known", stay)
        values: dict[str, Any] = {"state": FindingState.KEPT, "reason": "the catalogue knows it by now"}
        s.execute(findings.update().where(findings.c.id.in_(sa.select(ids.c.id))).values(values))
    if not go:
        return []
    ids = bulk.ids_of(s, "dark_claimed", [row.id for row in go])
    values = {
        "state": FindingState.CLAIMED,
        "epoch": findings.c.epoch + 1,
        "worker": worker[:128],
        "lease_until": s.now + timedelta(seconds=lease_seconds),
    }
    s.execute(findings.update().where(findings.c.id.in_(sa.select(ids.c.id))).values(values))
    there = s.execute(sa.select(endpoint.c.name, endpoint.c.url).where(endpoint.c.id == endpoint_id)).one()
    return [
        wire.DarkOrder(
            finding=row.id,
            epoch=row.epoch + 1,
            endpoint=there.name,
            url=there.url,
            path=row.path,
            size=row.size_bytes,
            mtime_ns=row.mtime_ns,
        )
        for row in go
    ]


def report(s: Session, site_id: int, report: wire.DarkReport) -> wire.ReportAnswer:
    said = {outcome.finding: outcome for outcome in report.outcomes}
    columns: Columns = {"id": sa.BigInteger(), "epoch": sa.Integer()}
    told = rows_of(s, "dark_told", columns, sorted((o.finding, o.epoch) for o in said.values()))
    of_site = sa.select(tables.endpoints.c.id).where(tables.endpoints.c.site_id == site_id)
    query = (
        sa.select(findings.c.id, findings.c.endpoint_id, findings.c.scan_id, findings.c.path, findings.c.size_bytes)
        .join(told, sa.and_(told.c.id == findings.c.id, told.c.epoch == findings.c.epoch))
        .where(_CLAIMED, findings.c.endpoint_id.in_(of_site))
        .order_by(findings.c.id)
    )
    before = s.execute(query).all()
    _doubt(s, [row for row in before if said[row.id].outcome == "removed"])
    guards.change_endpoints(s, sorted({row.endpoint_id for row in before}))
    rows = s.execute(query.with_for_update(of=findings, key_share=True) if s.postgresql else query).all()
    moved = [row for row in rows if said[row.id].outcome == "removed"]
    states = {"removed": FindingState.REMOVED, "gone": FindingState.REMOVED}
    values = [
        (row.id, states.get(said[row.id].outcome, FindingState.KEPT).value, said[row.id].message[:2_000])
        for row in rows
    ]
    if values:
        names: Columns = {"id": sa.BigInteger(), "state": sa.SmallInteger(), "reason": sa.String()}
        batch = rows_of(s, "dark_ended", names, values)
        to = {"state": batch.c.state, "reason": batch.c.reason, "lease_until": None}
        s.execute(findings.update().where(findings.c.id == batch.c.id).values(to))
    if moved:
        size = sum(row.size_bytes for row in moved)
        outbox.record(s, "scan.dark_removed", min(row.scan_id for row in moved), files=len(moved), bytes=size)
    accepted = {row.id for row in rows}
    return wire.ReportAnswer(accepted=len(rows), stale=[id_ for id_ in said if id_ not in accepted])


def expire_leases(s: Session) -> int:
    """A worker that fell silent may have moved them or not: another one looks."""
    open_ = findings.c.state.in_([literal(state) for state in scans.OPEN])
    over = sa.select(findings).where(open_, _CLAIMED, findings.c.lease_until < s.now).order_by(findings.c.id)
    over = over.limit(1_000)
    before = s.execute(over).all()
    if not before:
        return 0
    _doubt(s, before)
    guards.change_endpoints(s, sorted({row.endpoint_id for row in before}))
    rows = s.execute(over.with_for_update(of=findings, key_share=True) if s.postgresql else over).all()
    ids = bulk.ids_of(s, "dark_lost", [row.id for row in rows])
    back = {"state": FindingState.ASKED, "lease_until": None}
    s.execute(findings.update().where(findings.c.id.in_(sa.select(ids.c.id))).values(back))
    return len(rows)


def _doubt(s: Session, moved: Sequence[sa.Row[Any]]) -> None:
    """A transfer may have found such a file at its target and proven it, right before it was moved away.

    Nothing is held yet: what is doubted is held first, rules before endpoints.
    """
    lost = []
    for endpoint_id in sorted({row.endpoint_id for row in moved}):
        paths = sorted({row.path for row in moved if row.endpoint_id == endpoint_id})
        lost += [
            Lost(row.file_id, row.endpoint_id, row.generation, "an unknown file was moved to quarantine from its path")
            for row in _replicas_at(s, endpoint_id, paths)
            if row.state is ReplicaState.AVAILABLE
        ]
    losses.doubt(s, lost)


def _replicas_at(s: Session, endpoint_id: int, paths: Sequence[str]) -> list[sa.Row[Any]]:
    layout = layout_of(s, endpoint_id)
    owned = [(did.scope, did.name) for path in paths for did in owners(path, layout)]
    if not owned:
        return []
    names: Columns = {"scope": sa.String(), "name": sa.String()}
    batch = rows_of(s, "doubted", names, owned)
    did, scope, replica = tables.dids, tables.scopes, alias_of(replicas, "doubtful")
    query = (
        sa.select(replica.c.file_id, replica.c.endpoint_id, replica.c.generation, replica.c.state)
        .select_from(batch)
        .join(scope, scope.c.name == batch.c.scope)
        .join(did, sa.and_(did.c.scope_id == scope.c.id, did.c.name == batch.c.name))
        .join(replica, sa.and_(replica.c.file_id == did.c.id, replica.c.endpoint_id == endpoint_id))
        .where(replica.c.path.is_(None))
    )
    return list(s.execute(query).all())


def refuse_claimed(s: Session, endpoint_id: int, endpoint: str, paths: Callable[[], Collection[str]]) -> None:
    """Refused where a worker may be moving one of these to quarantine at this moment. The caller holds the endpoint."""
    here = findings.c.endpoint_id == endpoint_id, findings.c.state.in_([literal(x) for x in scans.OPEN]), _CLAIMED
    moving = set(s.execute(sa.select(findings.c.path).where(*here)).scalars())
    for path in paths() if moving else ():
        if path in moving:
            raise Refused(
                f"{shown(path)} at {endpoint} was unknown, and is being moved to quarantine at this moment",
                hint="look there in a minute; what is in .replica/quarantine can be moved back and registered",
                field="replicas",
            )


def known_paths(s: Session, endpoint_id: int, paths: Collection[str], since: datetime) -> set[str]:
    """Those of these paths that are, or since then were, of a replica, a transfer or a deletion at the endpoint."""
    if not paths:
        return set()
    layout = layout_of(s, endpoint_id)
    columns: Columns = {"path": sa.String(), "scope": sa.String(), "name": sa.String()}
    owned = [(path, did.scope, did.name) for path in sorted(paths) for did in owners(path, layout)]
    known: set[str] = set()
    with by_index(s):
        own = rows_of(s, "own_paths", {"path": sa.String()}, [(path,) for path in sorted(paths)])
        at_own = sa.and_(replicas.c.endpoint_id == endpoint_id, replicas.c.path == own.c.path)
        known |= set(s.execute(sa.select(own.c.path).join(replicas, at_own)).scalars())
        if owned:
            batch = rows_of(s, "owners_of_paths", columns, owned)
            there, walk = dids_named(s, batch)
            since_then = sa.literal(since, Instant())
            replica = sa.select(1).where(
                replicas.c.file_id == there.c.id,
                Unguessed(replicas.c.endpoint_id == endpoint_id),
                # Under a path of its own it is not this one.
                Unguessed(replicas.c.path.is_(None)),
            )
            transfer = sa.select(1).where(
                transfers.c.file_id == there.c.id,
                Unguessed(transfers.c.target_id == endpoint_id),
                Unguessed(sa.or_(any_of(transfers.c.state, LIVE), transfers.c.finished_at >= since_then)),
            )
            live = (DeletionState.QUEUED, DeletionState.CLAIMED)
            deletion = sa.select(1).where(
                deletions.c.file_id == there.c.id,
                Unguessed(deletions.c.endpoint_id == endpoint_id),
                Unguessed(sa.or_(any_of(deletions.c.state, live), deletions.c.finished_at >= since_then)),
            )
            spoken_of = sa.or_(sa.exists(replica), sa.exists(transfer), sa.exists(deletion))
            known |= set(s.execute(sa.select(batch.c.path).select_from(walk).where(spoken_of)).scalars())
    return known


def layout_of(s: Session, endpoint_id: int) -> str:
    e = tables.endpoints.c
    return str(s.execute(sa.select(e.layout).where(e.id == endpoint_id)).scalar_one())
