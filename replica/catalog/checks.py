"""Looks at replicas where they lie: probes of what is doubted, and scrubs of everything, round and round.

Given     a site, from the worker's token; or what its worker found.
Returns   what to look at next, with a lease and an epoch; what counted.
Promises  only the site's own endpoints. Probes go before scrubs, few of an endpoint at a time. A batch of a scrub is
          given when the rate allows it, to one worker at a time; the cursor moves only over what was reported, so a
          kill forgets nothing. What cannot be read decides nothing; what is wrong is doubted, and bad only when a probe
          has found it twice. Where too much is wrong the endpoint is halted for a person, and nothing is declared.
          A fixed number of statements for a thousand replicas as for one.
Partner   workers.checking looks; rules.integrity decides; replica.catalog.integrity writes verdicts down;
          replica.catalog.scrubs is for people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import guards, integrity, outbox
from replica.catalog.bulk import Columns, insert, rows_of
from replica.catalog.integrity import Doubt, Pair
from replica.catalog.membership import Unguessed, any_of, by_index, literal, of_pair
from replica.catalog.provision import PAIR
from replica.db.engine import Session
from replica.db.tables import Instant, dids, endpoints, files, micros, replicas, scopes, scrubs, suspects
from rules.checksums import DIGITS, Agreement, Checksums
from rules.errors import Invalid
from rules.integrity import (
    BAD_IN_A_DAY,
    BATCH_FILES,
    BYTES_PER_SECOND,
    FILES_PER_SECOND,
    GUARD_FILES,
    GUARD_FRACTION,
    PERIOD_SECONDS,
    PROBES_AT_ONCE,
    Budget,
    Depth,
    Why,
    fresh_seconds,
    probe_pause,
    too_many,
)
from rules.names import Did
from rules.paths import path_for
from rules.states import EndpointKind, Evidence, ReplicaState

#: File numbers that one look at the table of replicas walks through, and how often a claim looks.
SPAN = 20_000
SPANS = 20
#: When a batch could not be read at all, the endpoint is left alone for so long.
TROUBLE_SECONDS = 300
#: Where there is nothing to do, a worker asks again after so long.
IDLE_SECONDS = 3_600.0
_DAY = timedelta(days=1)
_LOOKED_AT = (ReplicaState.AVAILABLE, ReplicaState.UNAVAILABLE, ReplicaState.BAD)
_WRONG = frozenset({"differs", "missing"})


# --- claims ---------------------------------------------------------------------------------------------------------


def claim(s: Session, site_id: int, claim: wire.CheckClaim, *, lease_seconds: float) -> wire.Checks:
    """Some probes of the site; if there are none, the next batch of an endpoint that is due."""
    guards.one_at_a_time(s, "checks", site_id)
    integrity.forget_what_is_over(s, site_id)
    lease_until = s.now + timedelta(seconds=lease_seconds)
    probes = _probes(s, site_id, claim, lease_until)
    scrub = None if probes else _scrub(s, site_id, claim.worker, lease_until)
    again = 0.0 if probes or scrub else _next_time(s, site_id)
    return wire.Checks(probes=probes, scrub=scrub, lease_seconds=lease_seconds, again_seconds=again)


def _next_time(s: Session, site_id: int) -> float:
    its = sa.select(endpoints.c.id).where(endpoints.c.site_id == site_id)
    batch = sa.select(sa.func.min(scrubs.c.next_at)).where(
        scrubs.c.endpoint_id.in_(its), scrubs.c.depth != Depth.OFF.value, scrubs.c.halted_at.is_(None)
    )
    probe = sa.select(sa.func.min(suspects.c.due_at)).where(suspects.c.endpoint_id.in_(its))
    at = [m for m in s.execute(sa.select(batch.scalar_subquery(), probe.scalar_subquery())).one() if m is not None]
    pauses: list[float] = [max(1.0, (moment - s.now).total_seconds()) for moment in at]
    return min([IDLE_SECONDS, *pauses])


def _probes(s: Session, site_id: int, claim: wire.CheckClaim, lease_until: datetime) -> list[wire.Check]:
    free = sa.or_(suspects.c.lease_until.is_(None), suspects.c.lease_until < s.now)
    leased = (
        sa.select(suspects.c.endpoint_id, sa.func.count().label("leased"))
        .where(suspects.c.lease_until >= s.now)
        .group_by(suspects.c.endpoint_id)
        .subquery("leased")
    )
    turn = sa.func.row_number().over(
        partition_by=suspects.c.endpoint_id, order_by=(suspects.c.due_at, suspects.c.file_id)
    )
    due = (
        sa.select(suspects.c.file_id, suspects.c.endpoint_id, suspects.c.due_at, turn.label("turn"))
        .join(endpoints, endpoints.c.id == suspects.c.endpoint_id)
        .join(replicas, of_pair(suspects))
        .outerjoin(scrubs, scrubs.c.endpoint_id == suspects.c.endpoint_id)
        .where(
            endpoints.c.site_id == site_id,
            endpoints.c.readable,
            endpoints.c.decommissioned_at.is_(None),
            # What is being deleted would take the place of others, again and again.
            Unguessed(any_of(replicas.c.state, _LOOKED_AT)),
            suspects.c.due_at <= s.now,
            free,
            # Halted: a person is to look first, but what a person asks for is looked at.
            sa.or_(scrubs.c.halted_at.is_(None), suspects.c.why == Why.PERSON.value),
        )
        .subquery("due")
    )
    query = (
        sa.select(due.c.file_id, due.c.endpoint_id)
        .outerjoin(leased, leased.c.endpoint_id == due.c.endpoint_id)
        .where(due.c.turn <= PROBES_AT_ONCE - sa.func.coalesce(leased.c.leased, 0))
        .order_by(due.c.due_at, due.c.file_id, due.c.endpoint_id)
        .limit(claim.limit)
    )
    pairs = [(f, e) for f, e in s.execute(query)]
    if not pairs:
        return []
    batch = rows_of(s, "probed", PAIR, sorted(pairs))
    moment = sa.literal(micros(s.now), sa.BigInteger())
    leases = (
        suspects.update()
        .where(suspects.c.file_id == batch.c.file_id, suspects.c.endpoint_id == batch.c.endpoint_id)
        .values(
            # By the clock: a row that was forgotten and came back must not be mistaken for the one before.
            epoch=sa.case((suspects.c.epoch >= moment, suspects.c.epoch + 1), else_=moment),
            attempts=suspects.c.attempts + 1,
            worker=claim.worker[:128],
            claimed_at=s.now,
            lease_until=lease_until,
        )
        .returning(suspects.c.file_id, suspects.c.endpoint_id, suspects.c.epoch)
    )
    epochs = {(f, e): epoch for f, e, epoch in s.execute(leases)}
    found = _checks(s, batch, epochs)
    return [found[pair] for pair in pairs if pair in found]


def _checks(s: Session, batch: sa.FromClause, epochs: Mapping[Pair, int]) -> dict[Pair, wire.Check]:
    """What a worker is told of these."""
    query = (
        sa.select(
            replicas.c.file_id,
            replicas.c.endpoint_id,
            replicas.c.path,
            files.c.size_bytes,
            *(files.c[a] for a in DIGITS),
            dids.c.name.label("name"),
            scopes.c.name.label("scope"),
            endpoints.c.name.label("endpoint"),
            endpoints.c.url,
            endpoints.c.layout,
        )
        .select_from(batch)
        .join(replicas, of_pair(batch))
        .join(files, files.c.did_id == replicas.c.file_id)
        .join(dids, dids.c.id == replicas.c.file_id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
        .join(endpoints, endpoints.c.id == replicas.c.endpoint_id)
        .where(Unguessed(any_of(replicas.c.state, _LOOKED_AT)))
    )
    found: dict[Pair, wire.Check] = {}
    with by_index(s):
        rows = s.execute(query).all()
    for row in rows:
        did = Did(row.scope, row.name)
        values = row._mapping
        found[row.file_id, row.endpoint_id] = wire.Check(
            file=row.file_id,
            endpoint_id=row.endpoint_id,
            epoch=epochs.get((row.file_id, row.endpoint_id), 0),
            did=str(did),
            endpoint=row.endpoint,
            url=row.url,
            path=row.path if row.path is not None else path_for(did, row.layout),
            size=row.size_bytes,
            checksums={a: values[a].hex() for a in DIGITS if values[a] is not None},
        )
    return found


# --- batches of a scrub ---------------------------------------------------------------------------------------------


def usual(now: datetime) -> dict[str, Any]:
    """How a disk is scrubbed if nobody has said otherwise."""
    return {
        "depth": Depth.DEEP.value,
        "bytes_per_second": BYTES_PER_SECOND,
        "files_per_second": FILES_PER_SECOND,
        "period_seconds": PERIOD_SECONDS,
        "guard_fraction": GUARD_FRACTION,
        "pass_began_at": now,
        "next_at": now,
    }


def provide_rows(s: Session, *which: sa.ColumnElement[bool]) -> None:
    """Each disk has a row."""
    values = usual(s.now)
    lacking = sa.not_(sa.exists(sa.select(1).where(scrubs.c.endpoint_id == endpoints.c.id)))
    # Reading a tape is a recall: never unasked.
    disks = endpoints.c.kind == literal(EndpointKind.DISK)
    columns = [sa.literal(value, scrubs.c[name].type).label(name) for name, value in values.items()]
    rows = sa.select(endpoints.c.id, *columns).where(disks, lacking, *which).order_by(endpoints.c.id)
    s.execute(insert(s, scrubs).from_select(["endpoint_id", *values], rows).on_conflict_do_nothing())


def _scrub(s: Session, site_id: int, worker: str, lease_until: datetime) -> wire.ScrubOrder | None:
    provide_rows(s, endpoints.c.site_id == site_id)
    due = (
        sa.select(scrubs)
        .join(endpoints, endpoints.c.id == scrubs.c.endpoint_id)
        .where(
            endpoints.c.site_id == site_id,
            endpoints.c.readable,
            endpoints.c.decommissioned_at.is_(None),
            scrubs.c.depth != Depth.OFF.value,
            scrubs.c.halted_at.is_(None),
            scrubs.c.next_at <= s.now,
            sa.or_(scrubs.c.lease_until.is_(None), scrubs.c.lease_until < s.now),
        )
        .order_by(scrubs.c.next_at, scrubs.c.endpoint_id)
    )
    for row in s.execute(due).all():
        if (order := _batch(s, row, worker, lease_until)) is not None:
            return order
    return None


def _batch(s: Session, row: sa.Row[Any], worker: str, lease_until: datetime) -> wire.ScrubOrder | None:
    """The next files of the pass, as many as the rate allows for one batch; None: there are none now."""
    budget = Budget(row.bytes_per_second, row.files_per_second)
    deep = row.depth == Depth.DEEP.value
    newest = s.execute(sa.select(sa.func.max(files.c.did_id))).scalar() or 0
    reached = row.reached
    taken: list[int] = []
    size = 0
    for _ in range(SPANS):
        if reached >= newest or taken:
            break
        found = _files_after(s, row, reached, deep)
        for file_id, size_bytes in found:
            if not budget.has_room(len(taken), size):
                break
            taken.append(file_id)
            size += size_bytes if deep else 0
        # Nothing was left out: all up to the end of the span has been seen.
        reached = min(newest, reached + SPAN) if len(taken) == len(found) < BATCH_FILES else taken[-1]
    values: dict[str, Any]
    if taken:
        seconds = budget.seconds(len(taken), size)
        values = {
            "epoch": row.epoch + 1,
            "upto": reached,
            "worker": worker[:128],
            "claimed_at": s.now,
            "lease_until": lease_until,
            "next_at": s.now + timedelta(seconds=seconds),
        }
    elif reached >= newest:
        values = _next_pass(s, row)
    else:
        values = {"reached": reached, "upto": None, "lease_until": None}
    s.execute(scrubs.update().where(scrubs.c.endpoint_id == row.endpoint_id).values(values))
    if not taken:
        return None
    batch = rows_of(s, "scrubbed", PAIR, [(file_id, row.endpoint_id) for file_id in taken])
    checks = _checks(s, batch, {})
    return wire.ScrubOrder(
        endpoint_id=row.endpoint_id,
        epoch=row.epoch + 1,
        depth=row.depth,
        bytes_per_second=row.bytes_per_second,
        checks=[checks[key] for file_id in taken if (key := (file_id, row.endpoint_id)) in checks],
    )


def _files_after(s: Session, row: sa.Row[Any], reached: int, deep: bool) -> list[tuple[int, int]]:
    """Files of this endpoint with the next numbers, and their bytes: along the primary key, so no index is needed that
    every replica would pay for."""
    query = (
        sa.select(replicas.c.file_id, files.c.size_bytes)
        .join(files, files.c.did_id == replicas.c.file_id)
        .where(
            replicas.c.file_id > reached,
            replicas.c.file_id <= reached + SPAN,
            Unguessed(replicas.c.endpoint_id == row.endpoint_id),
            Unguessed(replicas.c.state == literal(ReplicaState.AVAILABLE)),
        )
        .order_by(replicas.c.file_id)
        .limit(BATCH_FILES)
    )
    if deep:  # what was read lately, by whatever, need not be read now
        old = s.now - timedelta(seconds=fresh_seconds(row.period_seconds))
        query = query.where(
            Unguessed(sa.or_(replicas.c.verified_at.is_(None), replicas.c.verified_at <= sa.literal(old, Instant())))
        )
    with by_index(s):
        return [(f, size) for f, size in s.execute(query)]


def _next_pass(s: Session, row: sa.Row[Any]) -> dict[str, Any]:
    begins = max(s.now, row.pass_began_at + timedelta(seconds=row.period_seconds))
    outbox.record(
        s,
        "endpoint.scrubbed",
        row.endpoint_id,
        **{"pass": row.pass_number, "files": row.files, "bytes": row.bytes, "wrong": row.wrong},
    )
    return {
        "pass_number": row.pass_number + 1,
        "pass_began_at": begins,
        "pass_ended_at": s.now,
        "reached": 0,
        "files": 0,
        "bytes": 0,
        "wrong": 0,
        "upto": None,
        "lease_until": None,
        "next_at": begins,
    }


# --- beats ----------------------------------------------------------------------------------------------------------


def heartbeat(s: Session, site_id: int, beat: wire.CheckHeartbeat, *, lease_seconds: float) -> wire.CheckBeatAnswer:
    """Renew the leases; what is not the worker's any more is to be left alone."""
    until = s.now + timedelta(seconds=lease_seconds)
    alive: set[Pair] = set()
    if beat.probes:
        current = _current(s, site_id, [((b.file, b.endpoint_id), b.epoch) for b in beat.probes])
        alive = set(current)
        if alive:
            batch = rows_of(s, "probe_beats", PAIR, sorted(alive))
            same = sa.and_(suspects.c.file_id == batch.c.file_id, suspects.c.endpoint_id == batch.c.endpoint_id)
            s.execute(suspects.update().where(same).values(lease_until=until))
    goes_on = False
    if beat.scrub is not None:
        row = _hold_scrub(s, site_id, *beat.scrub)
        goes_on = row is not None
        if row is not None:
            s.execute(scrubs.update().where(scrubs.c.endpoint_id == row.endpoint_id).values(lease_until=until))
    stop = [b.file for b in beat.probes if (b.file, b.endpoint_id) not in alive]
    return wire.CheckBeatAnswer(lease_seconds=lease_seconds, stop=stop, stop_scrub=not goes_on)


def _current(s: Session, site_id: int, said: Sequence[tuple[Pair, int]]) -> dict[Pair, sa.Row[Any]]:
    """Those of these probes, with their epochs, that are this site's and in a worker's hands; held from here on."""
    columns: Columns = {**PAIR, "epoch": sa.BigInteger()}
    batch = rows_of(s, "probes_said", columns, sorted((*pair, epoch) for pair, epoch in said))
    query = (
        sa.select(suspects)
        .join(
            batch,
            sa.and_(
                batch.c.file_id == suspects.c.file_id,
                batch.c.endpoint_id == suspects.c.endpoint_id,
                batch.c.epoch == suspects.c.epoch,
            ),
        )
        .join(endpoints, endpoints.c.id == suspects.c.endpoint_id)
        .where(endpoints.c.site_id == site_id, suspects.c.lease_until.is_not(None))
        .order_by(suspects.c.file_id, suspects.c.endpoint_id)
    )
    rows = s.execute(query.with_for_update(of=suspects) if s.postgresql else query).all()
    return {(row.file_id, row.endpoint_id): row for row in rows}


def _hold_scrub(s: Session, site_id: int, endpoint_id: int, epoch: int) -> sa.Row[Any] | None:
    """The batch, if it is still this worker's."""
    query = (
        sa.select(scrubs)
        .join(endpoints, endpoints.c.id == scrubs.c.endpoint_id)
        .where(
            scrubs.c.endpoint_id == endpoint_id,
            scrubs.c.epoch == epoch,
            scrubs.c.lease_until.is_not(None),
            scrubs.c.halted_at.is_(None),
            endpoints.c.site_id == site_id,
        )
    )
    return s.execute(query.with_for_update(of=scrubs) if s.postgresql else query).one_or_none()


# --- reports --------------------------------------------------------------------------------------------------------


def report(s: Session, site_id: int, report: wire.CheckReport) -> wire.CheckAnswer:
    accepted, stale = _probes_reported(s, site_id, report.probes) if report.probes else (0, [])
    goes_on = False
    if report.scrub is not None:
        count, goes_on = _scrub_reported(s, site_id, report.scrub)
        accepted += count
    return wire.CheckAnswer(accepted=accepted, stale=stale, scrub_goes_on=goes_on)


def _probes_reported(s: Session, site_id: int, findings: Sequence[wire.CheckOutcome]) -> tuple[int, list[int]]:
    said = {(f.file, f.endpoint_id): f for f in findings}
    if len(said) < len(findings):
        raise Invalid("a replica is reported twice in one batch", hint="report each once", field="probes")
    pairs = rows_of(s, "reported", PAIR, sorted(said))
    integrity.hold(s, pairs)
    current = _current(s, site_id, [(pair, f.epoch) for pair, f in said.items()])
    facts = _facts(s, pairs)
    good: list[Pair] = []
    bad: list[Doubt] = []
    undecided: list[tuple[Pair, str]] = []
    for pair, row in current.items():
        finding, fact = said[pair], facts.get(pair)
        if fact is None:  # gone meanwhile, or on its way anew
            undecided.append((pair, "it is not there any more as it was"))
            continue
        outcome, message = _judged(finding, fact)
        # Bytes that came after the worker was sent are not those that it read.
        renewed = fact.verified_at is not None and row.claimed_at is not None and fact.verified_at > row.claimed_at
        if outcome == "ok":
            good.append(pair)
        elif outcome in _WRONG and not renewed:
            bad.append(Doubt(*pair, message))
        else:
            undecided.append((pair, message if not renewed else "it came anew meanwhile"))
    integrity.proven_good(s, good)
    bad, too_much = _within_bounds(s, bad, current)
    if bad:
        for why in sorted({current[doubt.pair].why for doubt in bad}):
            some = [doubt for doubt in bad if current[doubt.pair].why == why]
            integrity.declare_bad(s, some, why=Why(why), proven=True, held=True)
    _look_later(s, [*undecided, *((doubt.pair, doubt.message) for doubt in too_much)], current, said)
    return len(current), [file for (file, _), _ in ((pair, 0) for pair in said if pair not in current)]


def _facts(s: Session, pairs: sa.FromClause) -> dict[Pair, sa.Row[Any]]:
    query = (
        sa.select(
            replicas.c.file_id,
            replicas.c.endpoint_id,
            replicas.c.state,
            replicas.c.verified_at,
            files.c.size_bytes,
            *(files.c[a] for a in DIGITS),
        )
        .select_from(pairs)
        .join(replicas, of_pair(pairs))
        .join(files, files.c.did_id == replicas.c.file_id)
        .where(Unguessed(any_of(replicas.c.state, _LOOKED_AT)))
    )
    return {(row.file_id, row.endpoint_id): row for row in s.execute(query)}


def _judged(finding: wire.CheckOutcome, fact: sa.Row[Any]) -> tuple[str, str]:
    """The outcome that counts, and what to say of it: *ok* only with content that is the catalogue's."""
    if finding.outcome != "ok":
        return finding.outcome, finding.message or finding.error or finding.outcome
    values = fact._mapping
    known = Checksums.of({a: values[a].hex() for a in DIGITS if values[a] is not None})
    try:
        found = Checksums.of(finding.checksums)
    except Invalid as error:
        return "failed", error.message
    if finding.size != fact.size_bytes or known.compare(found) is not Agreement.AGREE:
        return "failed", "the worker says that it is right, and names other content than the catalogue"
    return "ok", ""


def _within_bounds(
    s: Session, bad: list[Doubt], current: Mapping[Pair, sa.Row[Any]]
) -> tuple[list[Doubt], list[Doubt]]:
    """What may be declared unattended today; the rest waits, with its endpoint, for a person. What a person asked to
    have looked at counts for nothing here."""
    unasked = [doubt for doubt in bad if current[doubt.pair].why != Why.PERSON.value]
    if not unasked:
        return bad, []
    ids = sorted({doubt.endpoint_id for doubt in unasked})
    provide_rows(s, endpoints.c.id.in_(ids))
    query = sa.select(scrubs).where(scrubs.c.endpoint_id.in_(ids)).order_by(scrubs.c.endpoint_id)
    rows = {row.endpoint_id: row for row in s.execute(query.with_for_update() if s.postgresql else query)}
    too_much: list[Doubt] = []
    for endpoint_id, row in rows.items():
        mine = [doubt for doubt in unasked if doubt.endpoint_id == endpoint_id]
        today = row.bad_since is not None and row.bad_since > s.now - _DAY
        before = row.bad if today else 0
        left = max(0, BAD_IN_A_DAY - before)
        values = {"bad": before + min(left, len(mine)), "bad_since": row.bad_since if today else s.now}
        s.execute(scrubs.update().where(scrubs.c.endpoint_id == endpoint_id).values(values))
        if len(mine) > left:
            too_much += mine[left:]
            _halt(s, endpoint_id, f"more than {BAD_IN_A_DAY} replicas were found bad within a day")
    waiting = {doubt.pair for doubt in too_much}
    return [doubt for doubt in bad if doubt.pair not in waiting], too_much


def _look_later(
    s: Session,
    undecided: Sequence[tuple[Pair, str]],
    current: Mapping[Pair, sa.Row[Any]],
    said: Mapping[Pair, wire.CheckOutcome],
) -> None:
    if not undecided:
        return
    columns: Columns = {**PAIR, "message": sa.String(), "attempts": sa.Integer(), "due_at": Instant()}
    rows = []
    for pair, message in sorted(undecided):
        attempts = current[pair].attempts
        back = said[pair].outcome == "given_back"
        due_at = s.now if back else s.now + timedelta(seconds=probe_pause(attempts))
        text = current[pair].message if back else f"{current[pair].message.partition(' | ')[0]} | {message}"
        rows.append((*pair, text[:2_000], attempts - 1 if back else attempts, due_at))
    batch = rows_of(s, "looked_later", columns, rows)
    same = sa.and_(suspects.c.file_id == batch.c.file_id, suspects.c.endpoint_id == batch.c.endpoint_id)
    values = {"message": batch.c.message, "attempts": batch.c.attempts, "due_at": batch.c.due_at, "lease_until": None}
    s.execute(suspects.update().where(same).values(values))


def _scrub_reported(s: Session, site_id: int, report: wire.ScrubReport) -> tuple[int, bool]:
    """How many findings counted, and whether the worker goes on with the batch."""
    said = {f.file: f for f in report.findings if f.endpoint_id == report.endpoint_id}
    if len(said) < len(report.findings):
        raise Invalid("a file is reported twice, or is another endpoint's", hint="report each once", field="scrub")
    pairs = rows_of(s, "scrub_reported", PAIR, [(file, report.endpoint_id) for file in sorted(said)])
    guards.change_replicas(s, pairs)
    row = _hold_scrub(s, site_id, report.endpoint_id, report.epoch)
    if row is None:
        return 0, False
    facts = {file: fact for (file, _), fact in _facts(s, pairs).items() if fact.state is ReplicaState.AVAILABLE}
    deep = row.depth == Depth.DEEP.value
    fine: list[Pair] = []
    doubts: list[Doubt] = []
    unread: list[Doubt] = []
    for file, finding in sorted(said.items()):
        fact = facts.get(file)
        if fact is None:
            continue  # not what it was when it was given out
        outcome, message = _judged(finding, fact) if deep else (finding.outcome, finding.message)
        renewed = fact.verified_at is not None and row.claimed_at is not None and fact.verified_at > row.claimed_at
        if outcome == "ok":
            fine.append((file, report.endpoint_id))
        elif outcome in _WRONG and not renewed:
            doubts.append(Doubt(file, report.endpoint_id, message))
        elif outcome in ("failed", "unsteady"):
            unread.append(Doubt(file, report.endpoint_id, message))
    looked = len(fine) + len(doubts)
    files_now, wrong_now = row.files + looked, row.wrong + len(doubts)
    if too_many(looked, len(doubts), row.guard_fraction) or too_many(files_now, wrong_now, row.guard_fraction):
        example = f": {doubts[0].message}" if doubts else ""
        _halt(s, report.endpoint_id, f"{len(doubts)} of {looked} replicas just read are wrong{example}")
        return looked, False
    if not fine and len(unread) >= GUARD_FILES:
        _halt(s, report.endpoint_id, f"none of {len(unread)} replicas could be read: {unread[0].message}")
        return looked, False
    if deep and fine:
        batch = rows_of(s, "found_fine", PAIR, fine)
        s.execute(replicas.update().where(of_pair(batch)).values(evidence=Evidence.SCRUBBED, verified_at=s.now))
    # Where nothing at all can be read it may be the storage; what is as it was when tried again, is the file.
    if fine or row.trouble:
        doubts += unread
    elif unread and not report.trouble:
        report = wire.ScrubReport(
            endpoint_id=report.endpoint_id, epoch=report.epoch, findings=[], over=True, trouble=unread[0].message
        )
        said = {}
    integrity.suspect(s, doubts, why=Why.SCRUB)
    reached = max([row.reached, *said])
    values: dict[str, Any] = {
        "reached": reached,
        "files": files_now,
        "bytes": row.bytes + (sum(facts[file].size_bytes for file, _ in fine) if deep else 0),
        "wrong": wrong_now,
        "trouble": report.trouble[:2_000],
    }
    if report.trouble:
        values["next_at"] = max(row.next_at, s.now + timedelta(seconds=TROUBLE_SECONDS))
    elif report.over and row.upto is not None:
        values["reached"] = max(reached, row.upto)  # what lay between is not this endpoint's
    if report.over or report.trouble:
        values |= {"upto": None, "lease_until": None, "worker": None}
    s.execute(scrubs.update().where(scrubs.c.endpoint_id == report.endpoint_id).values(values))
    return looked, not (report.over or report.trouble)


def halted(s: Session, endpoint_id: int) -> str | None:
    """Why a person is to look at the endpoint before anything there is declared bad unattended; None: nobody need."""
    here = scrubs.c.endpoint_id == endpoint_id, scrubs.c.halted_at.is_not(None)
    why: str | None = s.execute(sa.select(scrubs.c.halted_why).where(*here)).scalar()
    return why


def _halt(s: Session, endpoint_id: int, why: str) -> None:
    why = f"{why}. Nothing was declared bad for it"[:2_000]
    s.execute(
        scrubs.update()
        .where(scrubs.c.endpoint_id == endpoint_id)
        .values(halted_at=s.now, halted_why=why, lease_until=None, upto=None, worker=None)
    )
    outbox.record(s, "endpoint.scrub_halted", endpoint_id, reason=why)
