"""What became of orders: a whole batch of reports in one transaction.

Given     the outcomes a worker reports, or leases that ran out.
Returns   how many counted, and which came too late.
Promises  an outcome counts only with the epoch of the present claim, so each transfer has one accepted completion;
          *done* counts only when size and checksums are the catalogue's; about fifteen statements for a thousand
          outcomes as for one; a failure of the target never blames a source, and a source is blamed only when two
          attempts said so.
Partner   rules.transfers decides what follows a failure; replica.catalog.locks moves the counters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import (
    breakers,
    guards,
    hops,
    integrity,
    limits,
    locks,
    outbox,
    provision,
    reasons,
    rule_transfers,
    traffic,
)
from replica.catalog.bulk import Columns, columns_of, ids_of, rows_of
from replica.catalog.integrity import Doubt
from replica.catalog.membership import Unguessed, any_of, covering, literal, of_pair, walk_by_index
from replica.catalog.provision import PAIR
from replica.catalog.rule_states import settle
from replica.db.engine import Session
from replica.db.tables import Instant, attempts, endpoints, files, replicas, transfers
from rules.checksums import DIGITS, Agreement, Checksums
from rules.errors import ChecksumDiffers, Conflict, Invalid, SourceMissing
from rules.integrity import Why
from rules.states import TRANSFER_LEASED, Evidence, ReplicaState, TransferState
from rules.transfers import GiveUp, RetryPolicy, after_failure, describe

DEFAULT_POLICY = RetryPolicy()
#: How many leases that ran out one call takes back.
EXPIRED_MAX = 1_000
#: Independent attempts that must blame a source before its replica is no longer taken for good.
BLAMED_BY = 2

#: Looked up a thousand times faster than `.value`.
_NUMBER = {state: state.value for state in TransferState}

#: What of a transfer its end needs.
_NEEDED = tuple(
    transfers.c[name]
    for name in (
        "id",
        "epoch",
        "file_id",
        "target_id",
        "site_id",
        "source_id",
        "attempts",
        "worker",
        "size_bytes",
    )
)

#: Errors that blame the replica that was read. Another site's word makes it UNAVAILABLE and no worse: BAD is for who
#: reads it where it lies, and its own site's worker is sent to do that.
_BLAMES = frozenset({SourceMissing.code, ChecksumDiffers.code})


class _Ending(msgspec.Struct, kw_only=True, gc=False):
    """One outcome, joined with the transfer it is about, and what follows from it. A thousand are made at once."""

    id: int
    epoch: int
    file_id: int
    target_id: int
    attempts: int
    attempts_after: int
    size: int
    worker: str
    outcome: str
    source_id: int | None
    state: TransferState = TransferState.QUEUED
    seconds: float = 0.0
    error: str = ""
    message: str = ""
    side: str = ""
    hint: str = ""
    retry_after_seconds: float | None = None
    not_before: datetime | None = None
    reason_code: str | None = None
    reason: str | None = None
    learned: dict[str, bytes] | None = None
    read_from: dict[int, int] | None = None

    @property
    def pair(self) -> tuple[int, int]:
        return self.file_id, self.target_id

    @property
    def blames(self) -> bool:
        return self.outcome == "failed" and self.side == "source" and self.error in _BLAMES


def report(
    s: Session, site_id: int, report: wire.Report, *, fraction: float, policy: RetryPolicy = DEFAULT_POLICY
) -> wire.ReportAnswer:
    """Carry out a batch of outcomes. `fraction` in [0, 1) is the jitter of the pauses before other attempts."""
    walk_by_index(s)
    said = {outcome.transfer: outcome for outcome in report.outcomes}
    if len(said) < len(report.outcomes):
        raise Invalid("a transfer is reported twice in one batch", hint="report each once", field="outcomes")
    columns: Columns = {"id": sa.BigInteger(), "epoch": sa.Integer()}
    told = [o.transfer for o in report.outcomes], [o.epoch for o in report.outcomes]
    wanted = columns_of(s, "outcomes", columns, told)
    current = (
        sa.select(*_NEEDED, files.c.size_bytes.label("file_size"), *(files.c[a] for a in DIGITS))
        .join(wanted, sa.and_(wanted.c.id == transfers.c.id, wanted.c.epoch == transfers.c.epoch))
        .join(files, files.c.did_id == transfers.c.file_id)
        .where(Unguessed(transfers.c.site_id == site_id), Unguessed(any_of(transfers.c.state, TRANSFER_LEASED)))
        .order_by(transfers.c.id)
    )
    named = {o.source_endpoint for o in report.outcomes if o.source_endpoint}
    sources = _endpoint_ids(s, named.union(*(o.read_from for o in report.outcomes)))

    def carry_out() -> list[_Ending]:
        found = s.execute(current).all()
        endings = [_as_said(row, said[row.id], sources, report.worker[:128]) for row in found]
        if endings:
            _check_content(endings, found, said)
            _decide(s, endings, fraction, policy)
            blamed = {(e.file_id, e.source_id) for e in endings if e.blames and e.source_id is not None}
            held = _hold(s, endings, blamed, all(e.state is TransferState.DONE for e in endings))
            _carry_out(s, endings, held)
        return endings

    endings = _again_if_it_changed(s, carry_out)
    accepted = {ending.id for ending in endings}
    return wire.ReportAnswer(
        accepted=len(accepted), stale=[o.transfer for o in report.outcomes if o.transfer not in accepted]
    )


def expire_leases(s: Session, policy: RetryPolicy = DEFAULT_POLICY) -> int:
    """Give back what workers hold that stopped answering; who lost too many workers already has failed."""
    walk_by_index(s)
    current = (
        sa.select(*_NEEDED)
        .where(any_of(transfers.c.state, TRANSFER_LEASED), transfers.c.lease_until < s.now)
        .order_by(transfers.c.lease_until, transfers.c.id)
        .limit(EXPIRED_MAX)
    )
    found = s.execute(current).all()
    if not found:
        return 0

    def carry_out() -> list[_Ending]:
        held = _hold(s, found)
        still = found
        if s.postgresql:
            ids = ids_of(s, "expired", sorted(row.id for row in found))
            again = (
                sa.select(*_NEEDED)
                .join(ids, ids.c.id == transfers.c.id)
                .where(any_of(transfers.c.state, TRANSFER_LEASED), transfers.c.lease_until < s.now)
                .order_by(transfers.c.id)
            )
            still = s.execute(again.with_for_update(of=transfers, key_share=True, skip_locked=True)).all()
        endings = [_lost(row, policy) for row in still]
        if endings:
            _carry_out(s, endings, held)
            provision.wake_sites(s, {row.site_id for row in still})
        return endings

    return len(_again_if_it_changed(s, carry_out))


def _ending(row: sa.Row[Any], outcome: str, source_id: int | None, worker: str, **said: Any) -> _Ending:
    return _Ending(
        id=row.id,
        epoch=row.epoch,
        file_id=row.file_id,
        target_id=row.target_id,
        attempts=row.attempts,
        attempts_after=row.attempts,
        size=row.size_bytes,
        worker=worker,
        outcome=outcome,
        source_id=source_id,
        **said,
    )


def _lost(row: sa.Row[Any], policy: RetryPolicy) -> _Ending:
    message = f"the worker {row.worker} stopped answering"
    ending = _ending(
        row, "lost", row.source_id, row.worker, error="lost", message=message, reason_code="lost", reason=message
    )
    if row.attempts >= policy.attempts_max:
        ending.state = TransferState.FAILED
        ending.reason = f"{message}, and so did others: {row.attempts} attempts"
        ending.hint = "the file or an endpoint may be what stops the workers: look at their logs"
    return ending


class _ItChanged(Exception):
    """A rule that was added meanwhile covers a replica of the batch, and is not held; or somebody else has ended a
    transfer of the batch."""


def _again_if_it_changed(s: Session, carry_out: Callable[[], list[_Ending]]) -> list[_Ending]:
    """Rules are held before replicas, and these before transfers. Who finds one too late lets go of everything and
    begins again."""
    if not s.postgresql:
        return carry_out()
    for _ in range(5):
        with contextlib.suppress(_ItChanged), s.savepoint():
            return carry_out()
    raise Conflict("rules for these files are being added faster than they can be counted", hint="report again")


# --- what was said --------------------------------------------------------------------------------------------------


def _endpoint_ids(s: Session, names: set[str]) -> dict[str, int]:
    if not names:
        return {}
    rows = s.execute(sa.select(endpoints.c.name, endpoints.c.id).where(endpoints.c.name.in_(sorted(names))))
    return {row.name: row.id for row in rows}


def _hold(
    s: Session,
    ended: Sequence[_Ending] | Sequence[sa.Row[Any]],
    blamed: Collection[tuple[int, int]] = (),
    all_done: bool = False,
) -> set[int]:
    """Hold rules, blamed endpoints and replicas, in this order; returns the rules. SQLite has nothing to hold.

    `all_done`: the replicas at all targets are about to change, and are held with that.
    """
    if not s.postgresql:
        return set()
    if blamed:
        pairs = rows_of(s, "concerned", PAIR, sorted({*blamed, *((e.file_id, e.target_id) for e in ended)}))
    else:
        pairs = _targets(s, "concerned", ended)
    held = guards.change_rules_covering(s, pairs)
    if blamed:
        guards.change_endpoints(s, sorted({e for _, e in blamed} | {e.target_id for e in ended}))
    if not all_done:
        guards.change_replicas(s, pairs)
    return held


def _targets(s: Session, name: str, ended: Sequence[_Ending] | Sequence[sa.Row[Any]]) -> sa.FromClause:
    """The pairs that these were to bring."""
    return columns_of(s, name, PAIR, [[e.file_id for e in ended], [e.target_id for e in ended]])


def _as_said(row: sa.Row[Any], said: wire.Outcome, sources: dict[str, int], worker: str) -> _Ending:
    source_id = sources.get(said.source_endpoint or "", row.source_id)
    if said.outcome == "done" and not said.error and not said.message:
        read = {sources[name]: min(size, row.size_bytes) for name, size in said.read_from.items() if name in sources}
        ending = _ending(row, "done", source_id, worker, seconds=said.seconds, read_from=read or None)
        if said.moved_bytes is not None:  # what a repair moved, for the history of attempts and of the link
            ending.size = min(ending.size, said.moved_bytes)
        return ending
    return _ending(
        row,
        said.outcome,
        source_id,
        worker,
        seconds=said.seconds,
        error=said.error[:40],
        message=said.message,
        side=said.side if said.outcome == "failed" else "",
        retry_after_seconds=said.retry_after_seconds,
    )


def _check_content(endings: list[_Ending], found: Sequence[sa.Row[Any]], said: dict[int, wire.Outcome]) -> None:
    """A worker that says *done* and names other content than the catalogue has failed, whatever it says."""
    for ending, file in zip(endings, found, strict=True):
        if ending.outcome != "done":
            continue
        outcome, values = said[ending.id], file._mapping
        if outcome.size in (None, file.file_size) and _all_known_and_equal(outcome.checksums, values):
            continue
        mine = Checksums.of({a: values[a].hex() for a in DIGITS if values[a] is not None})
        try:
            theirs = Checksums.of(outcome.checksums)
        except Invalid as error:
            _differs(ending, f"the worker reported a checksum that is none: {error.message}")
            continue
        if outcome.size is not None and outcome.size != file.file_size:
            _differs(ending, f"the target has {outcome.size} bytes, the catalogue {file.file_size}")
        elif mine.compare(theirs) is Agreement.DIFFER:
            _differs(ending, "the checksums at the target are not those of the catalogue")
        elif mine.compare(theirs) is Agreement.AGREE:
            known_already = mine.as_dict()
            ending.learned = {c.algorithm: bytes.fromhex(c.value) for c in theirs if c.algorithm not in known_already}
        else:
            _differs(ending, "the worker reported no checksum that the catalogue knows: nothing was proven")


def _all_known_and_equal(reported: Mapping[str, str], known: Mapping[Any, Any]) -> bool:
    """The usual case, told without making anything of it."""
    return bool(reported) and all(
        a in DIGITS and known[a] is not None and known[a].hex() == value for a, value in reported.items()
    )


def _differs(ending: _Ending, message: str) -> None:
    ending.outcome, ending.error, ending.message, ending.side = "failed", ChecksumDiffers.code, message, "target"


def _decide(s: Session, endings: list[_Ending], fraction: float, policy: RetryPolicy) -> None:
    failed = [ending for ending in endings if ending.outcome == "failed"]
    sources = _other_sources(s, failed)
    for ending in endings:
        match ending.outcome:
            case "done":
                ending.state = TransferState.DONE
            case "given_back":
                ending.attempts_after = max(0, ending.attempts - 1)
            case _:
                # Transfers that failed together must not come back together: each has its own part of the jitter.
                own = (fraction + (ending.id * 0.6180339887498949)) % 1.0
                after = after_failure(
                    ending.error, ending.attempts, policy, own, ending.retry_after_seconds, sources.get(ending.id, 0)
                )
                ending.reason_code, ending.reason = ending.error or "error", ending.message[:2_000] or ending.error
                ending.hint = describe(after.error_class)
                if isinstance(after, GiveUp):
                    ending.state = TransferState.FAILED
                else:
                    ending.not_before = s.now + timedelta(seconds=after.delay_seconds)


def _other_sources(s: Session, failed: Sequence[_Ending]) -> dict[int, int]:
    """Transfer → how many good copies there are besides the one that was just tried."""
    if not failed:
        return {}
    columns: Columns = {"id": sa.BigInteger(), **PAIR, "source_id": sa.BigInteger()}
    batch = rows_of(s, "failed", columns, [(e.id, e.file_id, e.target_id, e.source_id) for e in failed])
    query = (
        sa.select(batch.c.id, sa.func.count().label("sources"))
        .join(replicas, replicas.c.file_id == batch.c.file_id)
        .join(endpoints, endpoints.c.id == replicas.c.endpoint_id)
        .where(
            Unguessed(replicas.c.state == literal(ReplicaState.AVAILABLE)),
            endpoints.c.readable,
            replicas.c.endpoint_id != batch.c.endpoint_id,
            replicas.c.endpoint_id.is_distinct_from(batch.c.source_id),
        )
        .group_by(batch.c.id)
    )
    return {row.id: row.sources for row in s.execute(query)}


# --- what follows ---------------------------------------------------------------------------------------------------


def _carry_out(s: Session, endings: list[_Ending], held: set[int]) -> None:
    """Rules and replicas are held. Counters move while the transfers are still as they were: under way, so that none
    of the copies they bring is counted as stuck."""
    touched: set[int] = set()
    done = [ending for ending in endings if ending.state is TransferState.DONE]
    failed = [ending for ending in endings if ending.state is TransferState.FAILED]
    _keep_attempts(s, endings)
    came: sa.FromClause | None = None
    if done:
        _learn(s, done)  # while it can be seen which replicas were only declared
        came = _make_available(s, done)
        touched.update(provision.count_available(s, came, 1, none_stuck=True))
    _end_transfers(s, endings)
    again = [ending for ending in endings if ending.state is TransferState.QUEUED]
    if again:
        rule_transfers.keep_waiting(s, _targets(s, "queued_again", again))
    if came is not None:
        locks.sources_appeared(s, came)
    if failed:
        batch = _targets(s, "given_up", failed)
        touched.update(provision.count_stuck(s, batch, 1))
        hops.not_coming(s, batch)
        _note(s, failed)
    touched.update(_blame(s, endings))
    if s.postgresql and not touched <= held:
        raise _ItChanged
    settle(s, touched)
    limits.wake_waiting(s)
    traffic.add(s, endings)  # late: all reports about a link wait for it
    breakers.learn(s, endings)  # last


def _keep_attempts(s: Session, endings: list[_Ending]) -> None:
    columns: Columns = {
        "transfer_id": sa.BigInteger(),
        "epoch": sa.Integer(),
        "source_id": sa.BigInteger(),
        "worker": sa.String(),
        "outcome": sa.String(),
        "error": sa.String(),
        "side": sa.String(),
        "message": sa.String(),
        "bytes": sa.BigInteger(),
        "seconds": sa.Float(),
    }
    values = (
        [e.id for e in endings],
        [e.epoch for e in endings],
        [e.source_id for e in endings],
        [e.worker for e in endings],
        [e.outcome for e in endings],
        [e.error for e in endings],
        [e.side for e in endings],
        [e.message[:4_000] for e in endings],
        [e.size if e.state is TransferState.DONE else 0 for e in endings],
        [e.seconds for e in endings],
    )
    batch = columns_of(s, "attempts", columns, values)
    s.execute(attempts.insert().from_select([*columns, "at"], sa.select(batch, sa.literal(s.now, Instant()))))


def _make_available(s: Session, done: list[_Ending]) -> sa.FromClause:
    """The replicas that became available by it: all of them, unless somebody registered one meanwhile."""
    batch = _targets(s, "done", done)
    missing = Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE))
    these = (
        sa.select(replicas.c.file_id, replicas.c.endpoint_id)
        .select_from(batch)
        .join(replicas, of_pair(batch))
        .where(missing)
        .order_by(replicas.c.file_id, replicas.c.endpoint_id)
    )
    mine = (these.with_for_update(of=replicas, key_share=True) if s.postgresql else these).subquery("mine")
    changed = s.execute(
        replicas.update()
        .where(of_pair(mine))
        .values(state=ReplicaState.AVAILABLE, evidence=Evidence.COPIED, verified_at=s.now)
        .returning(replicas.c.file_id, replicas.c.endpoint_id)
    )
    if s.postgresql and changed.rowcount == len(done):  # told without a look at the rows
        changed.close()
        return batch
    came = [(row.file_id, row.endpoint_id) for row in changed]
    return batch if len(came) == len(done) else rows_of(s, "came", PAIR, came)


def _learn(s: Session, done: list[_Ending]) -> None:
    """Checksums that the catalogue did not have, from the first proof of a replica that was only declared.

    From nobody else: who copies a file could agree in the checksum that is known and invent another, and every right
    copy after that would be taken for wrong.
    """
    news = {ending.pair: ending.learned for ending in done if ending.learned is not None}
    if not news:
        return
    columns: Columns = {**PAIR, **{a: sa.LargeBinary() for a in DIGITS}}
    batch = rows_of(s, "learned", columns, [(*pair, *(news[pair].get(a) for a in DIGITS)) for pair in sorted(news)])
    declared = sa.exists().where(of_pair(batch), replicas.c.evidence == literal(Evidence.DECLARED))
    s.execute(
        files.update()
        .where(files.c.did_id == batch.c.file_id, declared)
        .values({a: sa.func.coalesce(files.c[a], batch.c[a]) for a in DIGITS})
    )


def _end_transfers(s: Session, endings: list[_Ending]) -> None:
    """Where nobody else has ended them since they were looked at."""
    columns: Columns = {
        "id": sa.BigInteger(),
        "epoch": sa.Integer(),
        "state": sa.SmallInteger(),
        "attempts": sa.Integer(),
        "source_id": sa.BigInteger(),
        "not_before": Instant(),
        "reason_code": sa.String(),
        "reason": sa.String(),
    }
    values = (
        [e.id for e in endings],
        [e.epoch for e in endings],
        [_NUMBER[e.state] for e in endings],
        [e.attempts_after for e in endings],
        [e.source_id for e in endings],
        [e.not_before for e in endings],
        [e.reason_code for e in endings],
        [e.reason for e in endings],
    )
    batch = columns_of(s, "endings", columns, values)
    held = (
        sa.select(batch)
        .select_from(batch)
        .join(transfers, sa.and_(transfers.c.id == batch.c.id, transfers.c.epoch == batch.c.epoch))
        .where(Unguessed(any_of(transfers.c.state, TRANSFER_LEASED)))
        .order_by(transfers.c.id)
    )
    mine = (held.with_for_update(of=transfers, key_share=True) if s.postgresql else held).subquery("mine")
    ended = s.execute(
        transfers.update()
        .where(transfers.c.id == mine.c.id)
        .values(
            {name: mine.c[name] for name in columns if name not in ("id", "epoch")}
            | {
                "bytes_done": sa.case((mine.c.state == literal(TransferState.DONE), transfers.c.size_bytes), else_=0),
                "finished_at": sa.case(
                    (any_of(mine.c.state, (TransferState.DONE, TransferState.FAILED)), sa.literal(s.now, Instant()))
                ),
                "lease_until": None,
            }
        )
    )
    if ended.rowcount < len(endings):
        raise _ItChanged
    outbox.record_ends(s, [(e.id, e.state) for e in endings if e.state is not TransferState.QUEUED])


def _note(s: Session, failed: list[_Ending]) -> None:
    """Tell every rule that locks one of these copies."""
    by_pair = {ending.pair: ending for ending in failed}
    batch = rows_of(s, "noted", PAIR, sorted(by_pair))
    cover = covering(batch)
    query = sa.select(cover.c.rule_id, cover.c.file_id, cover.c.endpoint_id).distinct()
    reasons.add(
        s,
        [
            reasons.Found(row.rule_id, e.reason_code or "error", e.target_id, e.reason or "", e.hint, 1)
            for row in s.execute(query)
            if (e := by_pair[(row.file_id, row.endpoint_id)])
        ],
    )


def _blame(s: Session, endings: list[_Ending]) -> set[int]:
    """Replicas that two attempts found missing or wrong are no longer taken for good; locked ones are made anew."""
    said = {(e.file_id, e.source_id): e.message or e.error for e in endings if e.blames and e.source_id is not None}
    if not said:
        return set()
    suspects = set(said)
    # A worker of its own site is sent to look, from the first word on.
    integrity.suspect(s, [Doubt(f, source_id, text) for (f, source_id), text in said.items()], why=Why.SOURCE)
    batch = rows_of(s, "suspects", PAIR, sorted(suspects))
    query = (
        sa.select(replicas.c.file_id, replicas.c.endpoint_id)
        .select_from(batch)
        .join(replicas, of_pair(batch))
        .join(transfers, transfers.c.file_id == replicas.c.file_id)
        .join(
            attempts,
            sa.and_(
                attempts.c.transfer_id == transfers.c.id,
                attempts.c.source_id == replicas.c.endpoint_id,
                attempts.c.side == "source",
                attempts.c.error.in_(sorted(_BLAMES)),
                # What was found before the replica was last proven is forgiven.
                attempts.c.at >= sa.func.coalesce(replicas.c.verified_at, sa.literal(0, sa.BigInteger())),
            ),
        )
        .where(replicas.c.state == literal(ReplicaState.AVAILABLE))
        .group_by(replicas.c.file_id, replicas.c.endpoint_id)
        .having(sa.func.count() >= BLAMED_BY)
    )
    guilty = sorted((row.file_id, row.endpoint_id) for row in s.execute(query))
    if not guilty:
        return set()
    return integrity.not_taken_for_good(s, guilty)
