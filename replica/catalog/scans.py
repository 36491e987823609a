"""Scans of endpoints, for people and for the timetable: asked for, looked at, accepted.

Given     an endpoint; a scan's number.
Returns   scans and what they found, as people see them.
Promises  at most one scan of an endpoint at a time: who asks for another joins it. What too large a part of an endpoint
          is about waits for a person. Only the findings of the last two complete scans are kept.
Partner   replica.catalog.scanning speaks with the workers; rules.reconciling decides.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, cursors, endpoints, guards, outbox
from replica.catalog.membership import any_of, literal
from replica.catalog.provision import wake_sites
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import findings, scans, scopes
from rules.errors import Conflict, NotFound, Refused
from rules.names import Did
from rules.permissions import Actor
from rules.reconciling import DARK, EVERY, KINDS, ODD, Policy, Scanned, confirmed_if_seen_by, is_due
from rules.states import SCAN_LIVE, SCAN_TERMINAL, EndpointKind, FindingState, ScanState

#: Of a scan that a person carries out: so long after the last word of theirs it has failed.
PERSON_SECONDS = 900
PERSON, WORKER = "person", "worker"
IS_LIVE = any_of(scans.c.state, SCAN_LIVE)
OPEN = (FindingState.ASKED, FindingState.CLAIMED)


def start(s: Session, actor: Actor, new: wire.NewScan, policy: Policy) -> wire.Scan:
    """Begin one, or join the one that is under way; with `accept_fraction` the last one that is held goes on."""
    endpoint = endpoints.row(s, new.endpoint)
    if endpoint.decommissioned_at is not None:
        raise Refused(f"{new.endpoint} is out of service for good", hint="there is nothing to compare it with")
    guards.one_at_a_time(s, "scan", endpoint.id)
    last = _last(s, endpoint.id)
    if last is not None and last.state in SCAN_LIVE:
        if new.listing:
            raise Conflict(f"a scan of {new.endpoint} is under way", hint="wait for it: `replica scan` shows how far")
        if new.accept_fraction and not last.accepted:
            s.execute(scans.update().where(scans.c.id == last.id).values(accepted=True))
        return get(s, last.id)
    account_id = accounts.account_id(s, actor.account)
    if last is not None and last.state is ScanState.HELD:
        if new.accept_fraction and not new.listing:
            return accept(s, actor, last.id, policy)
        overtake(s, endpoint.id)
    listed_at = min(new.listed_at or s.now, s.now) if new.listing else None
    accepted = new.accept_fraction
    return get(s, begin(s, endpoint, account_id, accepted=accepted, listed_at=listed_at, who=actor.account))


def begin(
    s: Session,
    endpoint: sa.Row[Any],
    account_id: int | None,
    *,
    accepted: bool = False,
    listed_at: datetime | None = None,
    who: str = "",
) -> int:
    by_person = {
        "state": ScanState.LISTING,
        "worker": f"account {who}"[:128],
        "epoch": 1,
        "attempts": 1,
        "began_at": listed_at,
        "lease_until": s.now + timedelta(seconds=PERSON_SECONDS),
    }
    made = scans.insert().values(
        endpoint_id=endpoint.id,
        site_id=endpoint.site_id,
        account_id=account_id,
        listed_by=WORKER if listed_at is None else PERSON,
        accepted=accepted,
        created_at=s.now,
        **({"state": ScanState.QUEUED} if listed_at is None else by_person),
    )
    scan_id = int(s.execute(made.returning(scans.c.id)).scalar_one())
    wake_sites(s, {endpoint.site_id})
    return scan_id


def overtake(s: Session, endpoint_id: int) -> None:
    """What waits for a person does so no longer: there is a newer scan."""
    held = scans.c.endpoint_id == endpoint_id, scans.c.state == literal(ScanState.HELD)
    s.execute(scans.update().where(*held).values(state=ScanState.CANCELLED, finished_at=s.now))


def accept(s: Session, actor: Actor, scan_id: int, policy: Policy) -> wire.Scan:
    """A person says that so much is missing or dark indeed."""
    row = hold(s, scan_id)
    if row.state in SCAN_TERMINAL or row.accepted:
        return get(s, scan_id)
    s.execute(scans.update().where(scans.c.id == scan_id).values(accepted=True))
    account_id = accounts.account_id(s, actor.account)
    outbox.record(s, "scan.accepted", scan_id, account_id, endpoint=_name(s, row.endpoint_id))
    if row.state is ScanState.HELD:
        conclude(s, row, policy)
    return get(s, scan_id)


def conclude(s: Session, row: sa.Row[Any], policy: Policy) -> None:
    """What two scans saw, far enough apart, is confirmed. What is missing is looked for once more before it counts.

    The caller holds the scan; it is compared, and nobody minds the fraction.
    """
    for kind in KINDS:
        if kind != ODD:
            seen = findings.c.first_seen_at <= confirmed_if_seen_by(kind, row.began_at, policy)
            mine = findings.c.scan_id == row.id, findings.c.kind == kind, seen
            of_state = findings.c.state == literal(FindingState.SEEN)
            s.execute(findings.update().where(*mine, of_state).values(state=FindingState.CONFIRMED))
    doubtful = sa.select(sa.func.count()).where(
        findings.c.scan_id == row.id,
        findings.c.kind.not_in((DARK, ODD)),
        findings.c.state == literal(FindingState.CONFIRMED),
    )
    if not s.execute(doubtful).scalar_one():
        finish(s, row.id)
    elif row.listed_by == WORKER and row.state is ScanState.LISTING:
        values = {"state": ScanState.VERIFYING, "phase": "verifying", "phase_files": 0}
        s.execute(scans.update().where(scans.c.id == row.id).values(values))
    else:
        values = {"state": ScanState.TO_VERIFY, "phase": "", "phase_files": 0, "lease_until": None}
        s.execute(scans.update().where(scans.c.id == row.id).values(values))
        wake_sites(s, {row.site_id})


def hold_up(s: Session, row: sa.Row[Any], reason: str) -> None:
    """Nothing more is done for it until a person has said that it is so. The caller holds the scan."""
    values = {"state": ScanState.HELD, "lease_until": None, "phase": "", "phase_files": 0, "reason": reason[:2_000]}
    s.execute(scans.update().where(scans.c.id == row.id).values(values))
    outbox.record(s, "scan.held", row.id, row.account_id, endpoint=_name(s, row.endpoint_id), reason=reason[:500])


def finish(s: Session, scan_id: int, state: ScanState = ScanState.DONE, reason: str = "") -> None:
    values: dict[str, Any] = {"state": state, "finished_at": s.now, "lease_until": None, "phase": "", "phase_files": 0}
    if reason:
        values["reason"] = reason[:2_000]
    s.execute(scans.update().where(scans.c.id == scan_id).values(values))
    row = s.execute(sa.select(scans).where(scans.c.id == scan_id)).one()
    said: dict[str, Any] = {"endpoint": _name(s, row.endpoint_id)}
    if state is ScanState.DONE:
        counts = ("missing_files", "differing_files", "dark_files", "odd_files", "lost_files", "last_copies")
        said |= {name: getattr(row, name) for name in counts}
    else:
        said["reason"] = reason[:500]
    outbox.record(s, f"scan.{state.label}", scan_id, row.account_id, **said)


def schedule(s: Session, policy: Policy) -> int:
    """Begin the scans that are due by the timetable; returns how many."""
    endpoint, attribute = tables.endpoints, tables.endpoint_attributes
    here = scans.c.endpoint_id == endpoint.c.id

    def latest(column: sa.ColumnElement[Any], *where: sa.ColumnElement[bool]) -> Any:
        return sa.select(sa.func.max(column)).where(here, *where).scalar_subquery()

    unconfirmed = (
        sa.select(sa.func.min(findings.c.first_seen_at))
        .where(
            findings.c.endpoint_id == endpoint.c.id,
            findings.c.scan_id == latest(scans.c.id, scans.c.compared_at.is_not(None)),
            findings.c.state == literal(FindingState.SEEN),
            findings.c.kind.not_in((DARK, ODD)),
        )
        .scalar_subquery()
    )
    query = (
        sa.select(
            endpoint,
            attribute.c.value.label("every"),
            latest(scans.c.compared_at).label("compared_at"),
            latest(scans.c.finished_at, scans.c.state == literal(ScanState.FAILED)).label("failed_at"),
            unconfirmed.label("unconfirmed_since"),
        )
        .outerjoin(attribute, sa.and_(attribute.c.endpoint_id == endpoint.c.id, attribute.c.key == EVERY))
        .where(
            endpoint.c.decommissioned_at.is_(None),
            endpoint.c.readable,
            # One that is held waits for a person, not for another scan.
            sa.not_(sa.exists(sa.select(1).where(here, sa.or_(IS_LIVE, scans.c.state == literal(ScanState.HELD))))),
        )
        .order_by(endpoint.c.id)
    )
    begun = 0
    for row in s.execute(query).all():
        every = row.every if isinstance(row.every, int | float) and not isinstance(row.every, bool) else None
        scanned = Scanned(
            every_days=every,
            is_disk=row.kind is EndpointKind.DISK,
            created_at=row.created_at,
            compared_at=row.compared_at,
            failed_at=row.failed_at,
            unconfirmed_since=row.unconfirmed_since,
        )
        if is_due(scanned, policy, s.now):
            guards.one_at_a_time(s, "scan", row.id)
            last = _last(s, row.id)
            if last is None or last.state not in {*SCAN_LIVE, ScanState.HELD}:
                begin(s, row, None)
                begun += 1
    return begun


# --- rows -----------------------------------------------------------------------------------------------------------


def hold(s: Session, scan_id: int) -> sa.Row[Any]:
    query = sa.select(scans).where(scans.c.id == scan_id)
    row = s.execute(query.with_for_update(key_share=True) if s.postgresql else query).one_or_none()
    if row is None:
        raise NotFound(f"there is no scan {scan_id}", hint="`replica scan ENDPOINT --history` shows them")
    return row


def _last(s: Session, endpoint_id: int) -> sa.Row[Any] | None:
    query = sa.select(scans).where(scans.c.endpoint_id == endpoint_id).order_by(scans.c.id.desc()).limit(1)
    return s.execute(query.with_for_update(key_share=True) if s.postgresql else query).one_or_none()


def _name(s: Session, endpoint_id: int) -> str:
    e = tables.endpoints.c
    return str(s.execute(sa.select(e.name).where(e.id == endpoint_id)).scalar_one())


# --- looking --------------------------------------------------------------------------------------------------------


def get(s: Session, scan_id: int) -> wire.Scan:
    row = s.execute(_select().where(scans.c.id == scan_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no scan {scan_id}", hint="`replica scan ENDPOINT --history` shows them")
    return _scan(row)


def list_page(s: Session, endpoint: str | None, cursor: str | None, limit: int) -> wire.Page[wire.Scan]:
    """The newest first."""
    query = _select().order_by(scans.c.id.desc()).limit(cursors.check_limit(limit) + 1)
    if endpoint is not None:
        query = query.where(scans.c.endpoint_id == endpoints.row(s, endpoint).id)
    if before := cursors.unpack(cursor):
        query = query.where(scans.c.id < before[0])
    return cursors.page(s.execute(query).all(), limit, _scan, lambda row: (row.id,))


def list_findings(
    s: Session, scan_id: int, kind: str | None, cursor: str | None, limit: int
) -> wire.Page[wire.Finding]:
    get(s, scan_id)
    did = tables.dids
    query = (
        sa.select(findings, did.c.name.label("name"), scopes.c.name.label("scope"))
        .outerjoin(did, did.c.id == findings.c.file_id)
        .outerjoin(scopes, scopes.c.id == did.c.scope_id)
        .where(findings.c.scan_id == scan_id, findings.c.id > (cursors.unpack(cursor) or (0,))[0])
        .order_by(findings.c.id)
        .limit(cursors.check_limit(limit) + 1)
    )
    if kind is not None:
        query = query.where(findings.c.kind == kind)
    return cursors.page(s.execute(query).all(), limit, _finding, lambda row: (row.id,))


def _select() -> sa.Select[Any]:
    e = tables.endpoints.c

    def number(*where: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
        return sa.select(sa.func.count()).where(findings.c.scan_id == scans.c.id, *where).scalar_subquery()

    def of(state: FindingState) -> sa.ColumnElement[bool]:
        return findings.c.state == literal(state)

    dark = findings.c.kind == DARK
    return (
        sa.select(
            scans,
            e.name.label("endpoint"),
            tables.sites.c.name.label("site"),
            tables.accounts.c.name.label("account"),
            number(sa.not_(dark), sa.not_(of(FindingState.SEEN))).label("confirmed"),
            number(dark, of(FindingState.CONFIRMED)).label("removable"),
            number(dark, of(FindingState.REMOVED)).label("removed"),
            number(findings.c.state.in_([literal(state) for state in OPEN])).label("moving"),
        )
        .join(tables.endpoints, e.id == scans.c.endpoint_id)
        .join(tables.sites, tables.sites.c.id == scans.c.site_id)
        .outerjoin(tables.accounts, tables.accounts.c.id == scans.c.account_id)
    )


def _scan(row: sa.Row[Any]) -> wire.Scan:
    counts = {
        name: getattr(row, name)
        for name in (
            *("phase_files", "known_files", "listed_files", "listed_bytes", "missing_files", "differing_files"),
            *("dark_files", "dark_bytes", "odd_files", "lost_files", "last_copies"),
        )
    }
    return wire.Scan(
        id=row.id,
        endpoint=row.endpoint,
        site=row.site,
        state=row.state.label,
        account=row.account,
        listed_by=row.listed_by,
        accepted=row.accepted,
        phase=row.phase,
        confirmed_files=row.confirmed,
        removable_files=row.removable,
        removed_files=row.removed,
        moving_files=row.moving,
        reason=row.reason,
        epoch=row.epoch,
        created_at=row.created_at,
        began_at=row.began_at,
        compared_at=row.compared_at,
        finished_at=row.finished_at,
        **counts,
    )


def _finding(row: sa.Row[Any]) -> wire.Finding:
    return wire.Finding(
        kind=row.kind,
        state=row.state.label,
        path=row.path,
        did=None if row.name is None else str(Did(row.scope, row.name)),
        size=row.size_bytes,
        found_size=row.found_bytes,
        first_seen_at=row.first_seen_at,
        reason=row.reason,
    )
