"""Scans as they are carried out: handed to workers, asked about what the catalogue knows, told what was found.

Given     a scan and the epoch of its present claim; what a comparison found, in parts.
Returns   parts of what the catalogue knows at an endpoint; what is to be looked for once more.
Promises  only with the epoch of the present claim; a part said twice counts once. The catalogue is asked before the
          listing begins, and once more with each finding, after it has ended: missing is only what was available
          throughout, in one generation and not proven since; dark only what was unknown throughout, to replicas,
          transfers and deletions alike. A few statements for each ten thousand files. Nobody else is made to wait:
          what the catalogue knows is read in parts, without holding anything.
Partner   workers.scanning; `replica scan --listing` does the same for a person.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import bulk, checks, dark, losses, scans, sites
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.losses import Lost
from replica.catalog.membership import Unguessed, any_of, by_index, literal, of_pair
from replica.catalog.provision import wake_sites
from replica.catalog.scans import PERSON, PERSON_SECONDS, finish
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import Instant, findings, replicas, scopes
from replica.db.tables import scans as table
from rules.errors import Conflict, NotFound
from rules.names import Did
from rules.paths import path_for
from rules.reconciling import ATTEMPTS_MAX, DARK, DIFFERS, MISSING, ODD, Counts, Policy, too_many
from rules.states import SCAN_LEASED, SCAN_LIVE, FindingState, ReplicaState, ScanState

#: How many files of the catalogue one part holds.
PART_FILES = 10_000
#: Of each kind so many are kept of one scan; what is beyond is counted, and found again by the next.
FINDINGS_MAX = 100_000
#: How many are looked for once more between two words with the server.
PROBES = 500

_LEASED = any_of(table.c.state, SCAN_LEASED)


# --- handing out ----------------------------------------------------------------------------------------------------


def claim(s: Session, site_id: int, claim: wire.ScanClaim, *, lease_seconds: float) -> wire.ScanWork:
    """A scan of the site that nobody has begun, or dark files to be moved away. One statement when there is nothing."""
    waiting = (
        sa.select(table)
        .where(
            table.c.site_id == site_id,
            any_of(table.c.state, SCAN_LIVE),
            Unguessed(any_of(table.c.state, (ScanState.QUEUED, ScanState.TO_VERIFY))),
        )
        .order_by(table.c.id)
        .limit(1)
    )
    row = s.execute(
        waiting.with_for_update(key_share=True, skip_locked=True) if s.postgresql else waiting
    ).one_or_none()
    order = None if row is None else _lease(s, row, claim.worker, lease_seconds)
    orders = [] if order is not None else dark.claim(s, site_id, claim.worker, lease_seconds=lease_seconds)
    sites.seen(s, site_id)
    return wire.ScanWork(scan=order, dark=orders, lease_seconds=lease_seconds)


def _lease(s: Session, row: sa.Row[Any], worker: str, lease_seconds: float) -> wire.ScanOrder:
    lists = row.state is ScanState.QUEUED
    values: dict[str, Any] = {
        "state": ScanState.LISTING if lists else ScanState.VERIFYING,
        "epoch": row.epoch + 1,
        "attempts": row.attempts + 1,
        "worker": worker[:128],
        "lease_until": s.now + timedelta(seconds=lease_seconds),
        "phase": "" if lists else "verifying",
        "phase_files": 0,
    }
    if lists and row.began_at is None:
        # A later attempt may go on with what the first one was told: only what is true since then counts.
        values["began_at"] = s.now
    s.execute(table.update().where(table.c.id == row.id).values(values))
    if lists:
        s.execute(findings.delete().where(findings.c.scan_id == row.id))
    e = tables.endpoints.c
    endpoint = s.execute(sa.select(e.name, e.url).where(e.id == row.endpoint_id)).one()
    return wire.ScanOrder(
        scan=row.id,
        epoch=row.epoch + 1,
        what="list" if lists else "verify",
        began_at=row.began_at or s.now,
        endpoint=endpoint.name,
        url=endpoint.url,
    )


def heartbeat(s: Session, site_id: int, beat: wire.ScanBeat, *, lease_seconds: float) -> wire.HeartbeatAnswer:
    """Renew the lease and tell how far it is."""
    renewed = s.execute(
        table.update()
        .where(table.c.id == beat.scan, table.c.site_id == site_id, table.c.epoch == beat.epoch, _LEASED)
        .values(lease_until=s.now + timedelta(seconds=lease_seconds), phase=beat.phase[:12], phase_files=beat.files)
    )
    sites.seen(s, site_id)
    return wire.HeartbeatAnswer(lease_seconds=lease_seconds, stop=[] if renewed.rowcount else [beat.scan])


def failed(s: Session, site_id: int | None, told: wire.ScanFailed) -> wire.Scan:
    """It could not be done; or the worker stops, and another one begins anew."""
    row = _current(s, site_id, told.scan, told.epoch)
    if told.given_back and row.listed_by != PERSON:
        _give_back(s, row, max(0, row.attempts - 1))
    else:
        finish(s, row.id, ScanState.FAILED, told.message or "it gave no reason")
    return scans.get(s, row.id)


def expire_leases(s: Session) -> int:
    """Give back what workers hold that stopped answering; what lost too many of them has failed."""
    over = sa.select(table).where(_LEASED, table.c.lease_until < s.now).order_by(table.c.id)
    lost = s.execute(over.with_for_update(key_share=True, skip_locked=True) if s.postgresql else over).all()
    for row in lost:
        if row.listed_by == PERSON and row.state is ScanState.LISTING:
            finish(s, row.id, ScanState.FAILED, f"{row.worker} told nothing more of the listing")
        elif row.attempts >= ATTEMPTS_MAX:
            finish(s, row.id, ScanState.FAILED, f"{row.attempts} workers stopped answering, the last was {row.worker}")
        else:
            _give_back(s, row, row.attempts)
    return len(lost) + dark.expire_leases(s)


def _give_back(s: Session, row: sa.Row[Any], attempts: int) -> None:
    state = ScanState.QUEUED if row.state is ScanState.LISTING else ScanState.TO_VERIFY
    values = {"state": state, "attempts": attempts, "lease_until": None, "phase": "", "phase_files": 0}
    s.execute(table.update().where(table.c.id == row.id).values(values))
    wake_sites(s, {row.site_id})


def _current(s: Session, site_id: int | None, scan_id: int, epoch: int, *, over: bool = False) -> sa.Row[Any]:
    """The scan, held, if this is the epoch of its present claim. `over`: also when that claim has ended well.

    `site_id` None: a person, who carries it out himself.
    """
    row = _checked(scans.hold(s, scan_id), site_id, scan_id, epoch, over=over)
    if site_id is None and row.state is ScanState.LISTING:
        later = s.now + timedelta(seconds=PERSON_SECONDS)
        s.execute(table.update().where(table.c.id == scan_id).values(lease_until=later))
    return row


def _checked(
    row: sa.Row[Any] | None, site_id: int | None, scan_id: int, epoch: int, *, over: bool = False
) -> sa.Row[Any]:
    if row is None or not (row.listed_by == PERSON if site_id is None else row.site_id == site_id):
        raise NotFound(f"there is no scan {scan_id} of yours", hint="it is carried out by somebody else")
    if row.epoch != epoch or (row.state not in SCAN_LEASED and not over):
        raise Conflict(f"the scan {scan_id} is not yours any more", hint="leave it alone")
    return row


# --- what the catalogue knows ---------------------------------------------------------------------------------------


def known(s: Session, site_id: int | None, part: wire.ScanPart) -> wire.KnownPart:
    """The next files that the catalogue knows at the endpoint, in whatever state, by their numbers: for a person."""
    return _known(s, _current(s, site_id, part.scan, part.epoch), part)


def known_at(s: Session, site: str, part: wire.ScanPart) -> wire.KnownPart:
    """The same for a worker of the site; only read, so that nobody has to wait."""
    row = s.execute(sa.select(table).where(table.c.id == part.scan)).one_or_none()
    return _known(s, _checked(row, sites.site_id(s, site), part.scan, part.epoch), part)


def _known(s: Session, row: sa.Row[Any], part: wire.ScanPart) -> wire.KnownPart:
    did = tables.dids
    query = (
        sa.select(
            replicas.c.file_id,
            replicas.c.generation,
            sa.type_coerce(replicas.c.state, sa.SmallInteger),
            replicas.c.path,
            did.c.scope_id,
            did.c.name,
            tables.files.c.size_bytes,
        )
        .join(did, did.c.id == replicas.c.file_id)
        .join(tables.files, tables.files.c.did_id == replicas.c.file_id)
        .where(replicas.c.file_id > part.after, Unguessed(replicas.c.endpoint_id == row.endpoint_id))
        .order_by(replicas.c.file_id)
        .limit(PART_FILES)
    )
    layout = dark.layout_of(s, row.endpoint_id)
    names = dict(_tuples(s.execute(sa.select(scopes.c.id, scopes.c.name)).all()))
    available = ReplicaState.AVAILABLE.value
    with by_index(s):
        found = _tuples(s.execute(query).all())
    parts = [
        wire.Known(
            file=file_id,
            generation=generation,
            size=size,
            expected=state == available,
            path=path_for(Did(names[scope_id], name), layout) if path is None else path,
        )
        for file_id, generation, state, path, scope_id, name, size in found
    ]
    return wire.KnownPart(known=parts, next=found[-1][0] if len(found) == PART_FILES else None)


def _tuples(rows: Sequence[sa.Row[*tuple[Any, ...]]]) -> Sequence[Any]:
    """Rows of the database are tuples of any length to the type checker."""
    return rows


# --- what was found -------------------------------------------------------------------------------------------------

_FOUND: Columns = {
    "kind": sa.String(),
    "state": sa.SmallInteger(),
    "path": sa.String(),
    "path_hash": sa.LargeBinary(),
    "file_id": sa.BigInteger(),
    "generation": sa.Integer(),
    "size_bytes": sa.BigInteger(),
    "found_bytes": sa.BigInteger(),
    "mtime_ns": sa.BigInteger(),
    "reason": sa.String(),
}


def found(s: Session, site_id: int | None, told: wire.ScanFindings) -> None:
    """A part of what the comparison came to; each is compared with the catalogue as it is now, after the listing."""
    row = _current(s, site_id, told.scan, told.epoch)
    if row.state is not ScanState.LISTING:
        return  # all was told already, and the answer was lost
    kept = _number(s, row.id)
    rows: list[tuple[Any, ...]] = []
    if told.missing and kept.get(MISSING, 0) + kept.get(DIFFERS, 0) < FINDINGS_MAX:
        rows += _missing(s, row, told.missing)
    if told.dark and kept.get(DARK, 0) + kept.get(ODD, 0) < FINDINGS_MAX:
        rows += _dark(s, row, told.dark)
    if not rows:
        return
    batch = rows_of(s, "found", _FOUND, rows)
    constants = {
        "scan_id": sa.literal(row.id, sa.BigInteger()),
        "endpoint_id": sa.literal(row.endpoint_id, sa.BigInteger()),
        "first_seen_at": sa.literal(row.began_at, Instant()),
    }
    made = sa.select(*(batch.c[name] for name in _FOUND), *constants.values()).where(sa.true())
    s.execute(bulk.insert(s, findings).from_select([*_FOUND, *constants], made).on_conflict_do_nothing())


def _number(s: Session, scan_id: int) -> dict[str, int]:
    query = sa.select(findings.c.kind, sa.func.count()).where(findings.c.scan_id == scan_id)
    return dict(_tuples(s.execute(query.group_by(findings.c.kind)).all()))


def _missing(s: Session, scan: sa.Row[Any], told: Sequence[wire.MissingFile]) -> list[tuple[Any, ...]]:
    """Those that are available now, in the generation of before, and that nobody has proven since the scan began."""
    columns: Columns = {"file_id": sa.BigInteger(), "generation": sa.Integer(), "found_bytes": sa.BigInteger()}
    once = {m.file: (m.file, min(m.generation, 2**31 - 1), m.found_size) for m in told}
    batch = rows_of(s, "told_missing", columns, sorted(once.values(), key=lambda row: row[0]))
    here = sa.select(batch, sa.literal(scan.endpoint_id, sa.BigInteger()).label("endpoint_id")).subquery(
        "told_missing_here"
    )
    did = tables.dids
    query = (
        sa.select(
            here.c.file_id,
            here.c.generation,
            here.c.found_bytes,
            replicas.c.path,
            did.c.name,
            scopes.c.name.label("scope"),
            tables.files.c.size_bytes,
        )
        .select_from(here)
        .join(replicas, of_pair(here))
        .join(did, did.c.id == here.c.file_id)
        .join(scopes, scopes.c.id == did.c.scope_id)
        .join(tables.files, tables.files.c.did_id == here.c.file_id)
        .where(
            Unguessed(replicas.c.state == literal(ReplicaState.AVAILABLE)),
            Unguessed(replicas.c.generation == here.c.generation),
            Unguessed(replicas.c.verified_at <= sa.literal(scan.began_at, Instant())),
        )
    )
    layout = dark.layout_of(s, scan.endpoint_id)
    with by_index(s):
        rows = s.execute(query).all()
    seen = FindingState.SEEN.value
    answer = []
    for row in rows:
        if row.found_bytes is not None and row.found_bytes == row.size_bytes:
            continue
        path = row.path if row.path is not None else path_for(Did(row.scope, row.name), layout)
        kind = MISSING if row.found_bytes is None else DIFFERS
        values = (row.file_id, row.generation, row.size_bytes, row.found_bytes, 0, "")
        answer.append((kind, seen, path, hash_of(path), *values))
    return answer


def _dark(s: Session, scan: sa.Row[Any], told: Sequence[wire.DarkFile]) -> list[tuple[Any, ...]]:
    """Those that nothing in the catalogue speaks of. What can be no replica is told of, whatever its name is."""
    ordinary = {d.path: d for d in told if not d.problem}
    strangers = ordinary.keys() - dark.known_paths(s, scan.endpoint_id, ordinary, scan.began_at)
    answer = []
    for it in told:
        if it.problem or it.path in strangers:
            kind = ODD if it.problem else DARK
            path = it.path.replace("\0", "\\0")
            mtime = max(-(2**63), min(it.mtime_ns, 2**63 - 1))
            values = (None, None, it.size, None, mtime, it.problem)
            answer.append((kind, FindingState.SEEN.value, path, hash_of(path), *values))
    return answer


def hash_of(path: str) -> bytes:
    return hashlib.blake2b(path.encode(errors="surrogatepass"), digest_size=16).digest()


# --- the end of a comparison ----------------------------------------------------------------------------------------


def compared(s: Session, site_id: int | None, told: wire.ScanCompared, *, policy: Policy) -> wire.Scan:
    """All was told: it is compared with the scan before, and believed, or a person is asked."""
    row = _current(s, site_id, told.scan, told.epoch, over=True)
    if row.state is not ScanState.LISTING:
        return scans.get(s, row.id)  # said again, for the answer was lost
    before = _scan_before(s, row)
    if before is not None:
        _seen_before(s, row.id, before)
    number = _number(s, row.id)
    is_dark = findings.c.scan_id == row.id, findings.c.kind == DARK
    size = sa.select(sa.func.coalesce(sa.func.sum(findings.c.size_bytes), 0)).where(*is_dark)
    available = replicas.c.endpoint_id == row.endpoint_id, replicas.c.state == literal(ReplicaState.AVAILABLE)
    missing, differing = number.get(MISSING, 0), number.get(DIFFERS, 0)
    dark_files = number.get(DARK, 0)
    if missing + differing >= FINDINGS_MAX:
        missing = max(missing, told.missing - differing)
    if dark_files + number.get(ODD, 0) >= FINDINGS_MAX:
        dark_files = max(dark_files, told.dark - number.get(ODD, 0))
    values: dict[str, Any] = {
        "known_files": s.execute(sa.select(sa.func.count()).select_from(replicas).where(*available)).scalar_one(),
        "listed_files": told.listed_files,
        "listed_bytes": told.listed_bytes,
        "missing_files": missing,
        "differing_files": differing,
        "dark_files": dark_files,
        "dark_bytes": int(s.execute(size).scalar_one()),
        "odd_files": number.get(ODD, 0),
        "compared_at": s.now,
        "attempts": 1,
    }
    counts = Counts(values["known_files"], told.listed_files, missing + differing, dark_files)
    reason = too_many(counts, policy)
    if reason is not None:
        values["reason"] = reason
    s.execute(table.update().where(table.c.id == row.id).values(values))
    _forget_older(s, row, before)
    if reason is not None and not row.accepted:
        scans.hold_up(s, row, reason)
    else:
        scans.conclude(s, row, policy)
    return scans.get(s, row.id)


def _scan_before(s: Session, row: sa.Row[Any]) -> int | None:
    """The last complete scan of the endpoint before this one."""
    complete = table.c.endpoint_id == row.endpoint_id, table.c.id < row.id, table.c.compared_at.is_not(None)
    before: int | None = s.execute(sa.select(sa.func.max(table.c.id)).where(*complete)).scalar()
    return before


def _seen_before(s: Session, scan_id: int, before: int) -> None:
    """What the scan before had found, too, was seen first when that says; in the same generation, of the same size."""
    earlier = findings.alias("earlier")
    same = (
        earlier.c.scan_id == before,
        earlier.c.kind == findings.c.kind,
        earlier.c.path_hash == findings.c.path_hash,
        earlier.c.size_bytes == findings.c.size_bytes,
        # Written anew since then, it may be an upload that is not registered yet.
        earlier.c.mtime_ns == findings.c.mtime_ns,
        earlier.c.file_id.is_not_distinct_from(findings.c.file_id),
        earlier.c.generation.is_not_distinct_from(findings.c.generation),
    )
    since = sa.select(earlier.c.first_seen_at).where(*same).scalar_subquery()
    there = sa.exists(sa.select(1).where(*same))
    s.execute(findings.update().where(findings.c.scan_id == scan_id, there).values(first_seen_at=since))


def _forget_older(s: Session, row: sa.Row[Any], before: int | None) -> None:
    """The findings of this scan and the one before are kept, and what is being moved away."""
    oldest = row.id if before is None else before
    settled = findings.c.state.not_in([literal(state) for state in scans.OPEN])
    older = findings.c.endpoint_id == row.endpoint_id, findings.c.scan_id < oldest
    s.execute(findings.delete().where(*older, settled))


# --- looking once more ----------------------------------------------------------------------------------------------

_AFTER_PROBE = {
    "missing": FindingState.LOST,
    "differs": FindingState.LOST,
    "there": FindingState.THERE,
    "unclear": FindingState.UNCLEAR,
}
_SEEN = {"missing": "nothing is there", "differs": "what is there has another size"}


def probed(s: Session, site_id: int, report: wire.ProbeReport) -> wire.Probes:
    """What a second look found: what is not there is declared bad, and made anew where a rule wants it. Returns what to
    look for next; after the last the scan is over."""
    row = _current(s, site_id, report.scan, report.epoch, over=True)
    if row.state is not ScanState.VERIFYING:
        return wire.Probes(probes=[])
    if not row.accepted and (halted := checks.halted(s, row.endpoint_id)):
        scans.hold_up(s, row, f"the endpoint was halted for a person to look: {halted}")
        return wire.Probes(probes=[])
    if report.outcomes:
        _conclude_probes(s, row, {o.finding: o for o in report.outcomes})
    waiting = (
        sa.select(findings.c.id, findings.c.path, findings.c.size_bytes)
        .where(
            findings.c.scan_id == row.id,
            findings.c.kind.in_((MISSING, DIFFERS)),
            findings.c.state == literal(FindingState.CONFIRMED),
        )
        .order_by(findings.c.id)
        .limit(PROBES)
    )
    probes = [wire.Probe(finding=r.id, path=r.path, size=r.size_bytes) for r in s.execute(waiting)]
    if not probes:
        finish(s, row.id)
    return wire.Probes(probes=probes)


def _conclude_probes(s: Session, row: sa.Row[Any], said: dict[int, wire.ProbeOutcome]) -> None:
    ids = bulk.ids_of(s, "probed", sorted(said))
    query = (
        sa.select(findings.c.id, findings.c.file_id, findings.c.generation)
        .join(ids, ids.c.id == findings.c.id)
        .where(findings.c.scan_id == row.id, findings.c.state == literal(FindingState.CONFIRMED))
    )
    mine = s.execute(query).all()
    gone = {f.id: f for f in mine if _AFTER_PROBE[said[f.id].outcome] is FindingState.LOST}

    def seen(f: sa.Row[Any]) -> Lost:
        message = said[f.id].message or _SEEN[said[f.id].outcome]
        return Lost(f.file_id, row.endpoint_id, f.generation, f"scan {row.id}: {message}")

    declared = losses.declare(s, [seen(f) for f in gone.values()], looked_at=row.began_at)
    lost = set(declared.bad)
    columns: Columns = {"id": sa.BigInteger(), "state": sa.SmallInteger(), "reason": sa.String()}
    rows = []
    for f in mine:
        state, reason = _AFTER_PROBE[said[f.id].outcome], said[f.id].message[:2_000]
        if state is FindingState.LOST and (f.file_id, row.endpoint_id) not in lost:
            state, reason = FindingState.THERE, "nobody expects it there any more, or it was proven meanwhile"
        rows.append((f.id, state.value, reason))
    if not rows:
        return
    batch = rows_of(s, "probes_said", columns, sorted(rows))
    values = {"state": batch.c.state, "reason": batch.c.reason}
    s.execute(findings.update().where(findings.c.id == batch.c.id).values(values))
    counts = {
        "lost_files": table.c.lost_files + len(declared.bad),
        "last_copies": table.c.last_copies + len(declared.last),
        "phase_files": table.c.phase_files + len(rows),
    }
    s.execute(table.update().where(table.c.id == row.id).values(counts))
