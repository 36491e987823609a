"""Removals: deletions as the workers of a site carry them out.

Given     a site, from the worker's token; or what became of its orders.
Returns   orders with a lease and an epoch; which of them to stop; how many outcomes counted.
Promises  only the site's own; never before the grace is over; each is asked about once more before it is given away, as
          rules.deletion decides, for the facts may be older than hours. An outcome counts only with the epoch of the
          present claim, and touches only the replica of the generation that was meant. About ten statements for a
          thousand orders or outcomes as for one. Nothing stays half deleted: what fails too often is a replica again,
          though nobody takes it for good.
Partner   workers.removing; replica.catalog.deletions decides; replica.catalog.removable has the argument about locks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import guards, outbox, provision, removable, revival, sites
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.membership import Unguessed, any_of, by_index, is_covered, is_wished, literal, of_pair
from replica.catalog.provision import PAIR
from replica.db.engine import Session
from replica.db.tables import Instant, deletions, dids, endpoints, replicas, scopes, transfers
from rules.deletion import EXPLICIT, FAILED_SECONDS
from rules.errors import Invalid
from rules.names import Did
from rules.paths import path_for
from rules.states import DeletionState, Evidence, ReplicaState, TransferState
from rules.transfers import GiveUp, RetryPolicy, after_failure

DEFAULT_POLICY = RetryPolicy()
#: How many leases that ran out one call takes back.
EXPIRED_MAX = 1_000
#: How long a deletion that must not begin now waits for the next look.
PUT_OFF_SECONDS = 60
#: Of a transfer to where the same file is being deleted.
UNDER_WAY = "deletion_under_way"

#: What of a deletion its end needs.
_NEEDED = tuple(
    deletions.c[name]
    for name in ("id", "file_id", "endpoint_id", "generation", "size_bytes", "was", "attempts", "worker", "epoch")
)
#: Of a deletion that has ended well: its id, file, endpoint, generation and bytes. Plain, for there are many.
_Done = tuple[int, int, int, int, int]
_EXPLICIT = frozenset(why.value for why in EXPLICIT)
_CLAIMED = deletions.c.state == literal(DeletionState.CLAIMED)


def _tuples(rows: Sequence[sa.Row[*tuple[Any, ...]]]) -> Sequence[Any]:
    """Rows of the database are tuples of any length to the type checker."""
    return rows


# --- orders ---------------------------------------------------------------------------------------------------------


def claim(s: Session, site_id: int, claim: wire.DeletionClaim, *, lease_seconds: float) -> wire.DeletionOrders:
    """Take up to `limit` deletions of the site that are due."""
    rows, more = _take(s, site_id, claim.limit)
    orders: list[wire.DeletionOrder] = []
    if rows:
        with by_index(s):
            verdicts = _verdicts(s, rows)
            go = [row.id for row in rows if verdicts.get(row.id) == "go"]
            _lease(s, go, claim.worker, lease_seconds)
            _put_off(s, [row.id for row in rows if verdicts.get(row.id, "held") in ("held", "locked", "busy")])
            _refuse(s, [row for row in rows if verdicts.get(row.id) == "last_copy"])
            orders = _orders(s, go)
    sites.seen(s, site_id)
    return wire.DeletionOrders(orders=orders, lease_seconds=lease_seconds, more=more)


def _take(s: Session, site_id: int, limit: int) -> tuple[Sequence[sa.Row[Any]], bool]:
    """Those that are due, held, at endpoints that are held: nobody adds a lock there while they are looked at."""
    due = (
        deletions.c.site_id == site_id,
        revival.QUEUED,
        deletions.c.not_before <= s.now,
        deletions.c.endpoint_id.in_(sa.select(endpoints.c.id).where(endpoints.c.deletable)),
    )
    query = (
        sa.select(deletions.c.id, deletions.c.file_id, deletions.c.endpoint_id, deletions.c.why, deletions.c.was)
        .where(*due)
        .order_by(deletions.c.not_before, deletions.c.id)
        .limit(limit + 1)
    )
    rows = s.execute(query).all()
    if not rows or not s.postgresql:
        return rows[:limit], len(rows) > limit
    wanted = sorted({row.endpoint_id for row in rows})
    # An endpoint that somebody holds is passed over while there is another, for who places a large rule holds it long.
    free = sa.select(endpoints.c.id).where(endpoints.c.id.in_(wanted)).order_by(endpoints.c.id)
    held = set(s.execute(free.with_for_update(key_share=True, skip_locked=True)).scalars())
    if not held:
        held = set(wanted[:1])
        guards.change_endpoints(s, wanted[:1])
    mine = query.where(deletions.c.endpoint_id.in_(sorted(held))).limit(limit)
    taken = s.execute(mine.with_for_update(of=deletions, key_share=True, skip_locked=True)).all()
    return taken, bool(taken) and len(rows) > limit


def _verdicts(s: Session, rows: Sequence[sa.Row[Any]]) -> dict[int, str]:
    """By deletion: go; locked: whoever locked it takes it back; busy: not now; last_copy: not any more.

    None of files that somebody else holds."""
    free = set(removable.hold_files(s, [row.file_id for row in rows]))
    if not free:
        return {}
    maybe = removable.possible(s, free, sorted({row.endpoint_id for row in rows}))
    alike: dict[tuple[bool, bool], dict[tuple[int, int], int]] = {}
    for row in rows:
        if row.file_id in free:
            kind = row.was is ReplicaState.COPYING, row.why in _EXPLICIT
            alike.setdefault(kind, {})[row.file_id, row.endpoint_id] = row.id
    found: dict[int, str] = {}
    for (was_copying, explicit), ids in sorted(alike.items()):
        batch = rows_of(s, "asked_again", PAIR, sorted(ids))
        pair = sa.tuple_(replicas.c.file_id, replicas.c.endpoint_id)
        query = sa.select(replicas.c.file_id, replicas.c.endpoint_id, _verdict(was_copying, explicit, maybe)).where(
            removable.one_of(s, replicas.c.file_id, [file_id for file_id, _ in ids]),
            Unguessed(pair.in_(sa.select(batch))),
        )
        found |= {ids[file_id, endpoint_id]: said for file_id, endpoint_id, said in _tuples(s.execute(query).all())}
    return found


def _verdict(was_copying: bool, explicit: bool, maybe: removable.Possible) -> sa.ColumnElement[str]:
    no_declared = replicas.c.evidence.is_distinct_from(literal(Evidence.DECLARED))
    was_leftover = no_declared if was_copying else sa.false()
    may_be_last = sa.true() if explicit else sa.or_(was_leftover, removable.is_forgotten())
    tests: list[tuple[sa.ColumnElement[bool], str]] = []
    if maybe.locked:
        tests.append((is_covered(replicas.c.file_id, replicas.c.endpoint_id), "locked"))
    if maybe.travelling:
        tests.append((removable.is_being_read(), "busy"))
    tests.append((sa.not_(sa.or_(removable.is_good_elsewhere(), may_be_last)), "last_copy"))
    if maybe.travelling:
        tests.append((sa.and_(sa.not_(was_leftover), removable.is_last_source()), "busy"))
    return sa.case(*((test, sa.literal_column(f"'{said}'")) for test, said in tests), else_=sa.literal_column("'go'"))


def _lease(s: Session, ids: Sequence[int], worker: str, lease_seconds: float) -> None:
    if not ids:
        return
    s.execute(
        deletions.update()
        .where(removable.one_of(s, deletions.c.id, ids))
        .values(
            state=DeletionState.CLAIMED,
            epoch=deletions.c.epoch + 1,
            attempts=deletions.c.attempts + 1,
            worker=worker[:128],
            lease_until=s.now + timedelta(seconds=lease_seconds),
        )
    )


def _put_off(s: Session, ids: Sequence[int]) -> None:
    if ids:
        later = s.now + timedelta(seconds=PUT_OFF_SECONDS)
        s.execute(deletions.update().where(removable.one_of(s, deletions.c.id, ids)).values(not_before=later))


def _refuse(s: Session, rows: Sequence[sa.Row[Any]]) -> None:
    """The other copies went or turned out bad since it was decided: this one is kept. No lock counts it, so none has
    to be told."""
    pairs = [(row.file_id, row.endpoint_id) for row in rows]
    if revival.take_back(s, sorted(pairs), "it has become the last good copy", keep_tombstone=True):
        outbox.record(s, "deletion.undone", min(row.id for row in rows), files=len(rows), reason="last_copy")


def _orders(s: Session, ids: Sequence[int]) -> list[wire.DeletionOrder]:
    if not ids:
        return []

    # One value each, looked up row by row: a join might read all replicas and DIDs there are.
    def of(column: sa.ColumnElement[Any], *where: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
        return sa.select(column).where(*where).scalar_subquery()

    its = dids.c.id == deletions.c.file_id
    of_replica = replicas.c.file_id == deletions.c.file_id, replicas.c.endpoint_id == deletions.c.endpoint_id
    query = (
        sa.select(
            deletions.c.id,
            deletions.c.epoch,
            deletions.c.generation,
            deletions.c.size_bytes,
            deletions.c.was,
            of(replicas.c.path, *of_replica).label("path"),
            of(dids.c.name, its).label("name"),
            of(scopes.c.name, its, scopes.c.id == dids.c.scope_id).label("scope"),
            endpoints.c.name.label("endpoint"),
            endpoints.c.url,
            endpoints.c.layout,
        )
        .select_from(deletions)
        .join(endpoints, endpoints.c.id == deletions.c.endpoint_id)
        .where(removable.one_of(s, deletions.c.id, ids))
        .order_by(deletions.c.id)
    )
    orders = []
    found = s.execute(query).all()
    for row in found:
        did = Did(row.scope, row.name)
        orders.append(
            wire.DeletionOrder(
                deletion=row.id,
                epoch=row.epoch,
                did=str(did),
                generation=row.generation,
                endpoint=row.endpoint,
                url=row.url,
                path=row.path if row.path is not None else path_for(did, row.layout),
                size=None if row.was is ReplicaState.BAD else row.size_bytes,
            )
        )
    return orders


def heartbeat(s: Session, site_id: int, beat: wire.DeletionHeartbeat, *, lease_seconds: float) -> wire.HeartbeatAnswer:
    """Renew the leases; what is not the worker's any more is to be left alone."""
    alive: set[int] = set()
    if beat.beats:
        columns: Columns = {"id": sa.BigInteger(), "epoch": sa.Integer()}
        batch = rows_of(s, "deletion_beats", columns, sorted((b.deletion, b.epoch) for b in beat.beats))
        mine = _current(batch, site_id)
        held = (mine.with_for_update(of=deletions, key_share=True) if s.postgresql else mine).subquery("mine")
        renewed = s.execute(
            deletions.update()
            .where(deletions.c.id == held.c.id)
            .values(lease_until=s.now + timedelta(seconds=lease_seconds))
            .returning(deletions.c.id)
        )
        alive = {id_ for (id_,) in renewed}
    sites.seen(s, site_id)
    stop = [b.deletion for b in beat.beats if b.deletion not in alive]
    return wire.HeartbeatAnswer(lease_seconds=lease_seconds, stop=stop)


def _current(batch: sa.FromClause, site_id: int) -> sa.Select[Any]:
    """The deletions of a batch of ids and epochs that are this site's and claimed with that epoch."""
    return (
        sa.select(*_NEEDED)
        .join(batch, sa.and_(batch.c.id == deletions.c.id, batch.c.epoch == deletions.c.epoch))
        .where(Unguessed(deletions.c.site_id == site_id), Unguessed(_CLAIMED))
        .order_by(deletions.c.id)
    )


# --- outcomes -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Ending:
    """One outcome, joined with the deletion it is about, and what follows from it."""

    id: int
    file_id: int
    endpoint_id: int
    generation: int
    size: int
    was: ReplicaState
    attempts: int
    state: DeletionState = DeletionState.QUEUED
    not_before: datetime | None = None
    reason: str | None = None

    @classmethod
    def of(cls, row: sa.Row[Any]) -> _Ending:
        return cls(row.id, row.file_id, row.endpoint_id, row.generation, row.size_bytes, row.was, row.attempts)


def report(
    s: Session, site_id: int, report: wire.DeletionReport, *, fraction: float, policy: RetryPolicy = DEFAULT_POLICY
) -> wire.ReportAnswer:
    """Carry out a batch of outcomes. `fraction` in [0, 1) is the jitter of the pauses before other attempts."""
    said = {outcome.deletion: outcome for outcome in report.outcomes}
    if len(said) < len(report.outcomes):
        raise Invalid("a deletion is reported twice in one batch", hint="report each once", field="outcomes")
    removed = {id_: outcome.epoch for id_, outcome in said.items() if outcome.outcome == "removed"}
    others = sorted((id_, outcome.epoch) for id_, outcome in said.items() if id_ not in removed)
    with by_index(s):
        _hold_endpoints(s, site_id, said)
        if others and s.postgresql:  # all in one order, though they end in two ways
            these = removable.one_of(s, deletions.c.id, said), Unguessed(deletions.c.site_id == site_id)
            every = sa.select(deletions.c.id).where(*these).order_by(deletions.c.id)
            s.execute(every.with_for_update(key_share=True)).all()
        done = _done(s, site_id, removed)
        _forget(s, done)
    endings = []
    if others:
        columns: Columns = {"id": sa.BigInteger(), "epoch": sa.Integer()}
        current = _current(rows_of(s, "deletion_outcomes", columns, others), site_id)
        for row in s.execute(current).all():
            ending = _Ending.of(row)
            _decide(s, ending, said[row.id], fraction, policy)
            endings.append(ending)
    _carry_out(s, endings)
    accepted = {id_ for id_, *_ in done} | {ending.id for ending in endings}
    return wire.ReportAnswer(accepted=len(accepted), stale=[id_ for id_ in said if id_ not in accepted])


def _hold_endpoints(s: Session, site_id: int, ids: Collection[int]) -> None:
    """Of these deletions: what changes the replicas is in their order."""
    if s.postgresql:
        where = removable.one_of(s, deletions.c.id, ids), Unguessed(deletions.c.site_id == site_id)
        guards.change_endpoints(
            s, s.execute(sa.select(deletions.c.endpoint_id).where(*where).distinct()).scalars().all()
        )


def _done(s: Session, site_id: int, removed: Mapping[int, int]) -> Sequence[_Done]:
    """Those of these, id → epoch, that are this site's and claimed with that epoch have ended."""
    if not removed:
        return ()
    if s.postgresql:  # else it might go by place on the disk: here, too, the rows are held in the order of their ids
        s.execute(sa.text("SET LOCAL enable_bitmapscan = off"))
    columns: Columns = {"id": sa.BigInteger(), "epoch": sa.Integer()}
    batch = rows_of(s, "deletions_done", columns, sorted(removed.items()))
    current = sa.tuple_(deletions.c.id, deletions.c.epoch).in_(sa.select(batch))
    ended = (
        deletions.update()
        .where(
            removable.one_of(s, deletions.c.id, removed),
            *map(Unguessed, (current, deletions.c.site_id == site_id, _CLAIMED)),
        )
        .values(state=DeletionState.DONE, finished_at=s.now, lease_until=None, reason=None)
        .returning(*(deletions.c[name] for name in ("id", "file_id", "endpoint_id", "generation", "size_bytes")))
    )
    return _tuples(s.execute(ended).all())


def expire_leases(s: Session, policy: RetryPolicy = DEFAULT_POLICY) -> int:
    """Give back what workers hold that stopped answering; what lost too many workers already has failed."""
    over = (
        sa.select(*_NEEDED).where(_CLAIMED, deletions.c.lease_until < s.now).order_by(deletions.c.id).limit(EXPIRED_MAX)
    )
    endings = []
    for row in _hold(s, over):
        ending = _Ending.of(row)
        ending.not_before = s.now
        ending.reason = f"the worker {row.worker} stopped answering"
        if row.attempts >= policy.attempts_max:
            ending.state = DeletionState.FAILED
        endings.append(ending)
    _carry_out(s, endings)
    return len(endings)


def _hold(s: Session, query: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
    """The rows of the query, with their endpoints held before them; what changes the replicas is in their order."""
    found = s.execute(query).all()
    if not found or not s.postgresql:
        return found
    guards.change_endpoints(s, sorted({row.endpoint_id for row in found}))
    # Only now nobody else can end them: what was current before may not be any more.
    return s.execute(query.with_for_update(of=deletions, key_share=True)).all()


def _decide(s: Session, ending: _Ending, outcome: wire.DeletionOutcome, fraction: float, policy: RetryPolicy) -> None:
    """What was not removed: when it is tried again, or that it is given up."""
    ending.not_before = s.now
    match outcome.outcome:
        case "given_back":
            ending.attempts = max(0, ending.attempts - 1)
        case _:
            # What failed together must not come back together: each has its own part of the jitter.
            own = (fraction + (ending.id * 0.6180339887498949)) % 1.0
            after = after_failure(outcome.error, ending.attempts, policy, own, outcome.retry_after_seconds)
            ending.reason = f"{outcome.error or 'error'}: {outcome.message or 'it gave no reason'}"[:2_000]
            if isinstance(after, GiveUp):
                ending.state = DeletionState.FAILED
            else:
                ending.not_before = s.now + timedelta(seconds=after.delay_seconds)


def _carry_out(s: Session, endings: Sequence[_Ending]) -> None:
    """Endpoints, replicas and deletions are held, so no lock comes or goes meanwhile that would cover these."""
    if not endings:
        return
    _not_again(s, [ending for ending in endings if ending.state is DeletionState.QUEUED])
    failed = [ending for ending in endings if ending.state is DeletionState.FAILED]
    undone = [ending for ending in endings if ending.state is DeletionState.UNDONE]
    if failed or undone:
        _give_up(s, [*failed, *undone])
    _end(s, endings)
    _tell(s, "deletion.failed", [(e.id, e.endpoint_id, e.size) for e in failed])
    _tell(s, "deletion.undone", [(e.id, e.endpoint_id, e.size) for e in undone])


def _not_again(s: Session, queued: Sequence[_Ending]) -> None:
    """What a rule has come to want while a worker had it is not tried again: that rule waits for the end."""
    if not queued:
        return
    batch = rows_of(s, "queued_again", PAIR, sorted((ending.file_id, ending.endpoint_id) for ending in queued))
    wished = sa.select(batch.c.file_id, batch.c.endpoint_id).where(is_wished(batch.c.file_id, batch.c.endpoint_id))
    with by_index(s):
        pairs = {(row.file_id, row.endpoint_id) for row in s.execute(wished)}
    for ending in queued:
        if (ending.file_id, ending.endpoint_id) in pairs:
            ending.state = DeletionState.UNDONE
            before = f"; before that, {ending.reason}" if ending.reason else ""
            ending.reason = f"a rule wants it again{before}"[:2_000]


def _forget(s: Session, done: Sequence[_Done]) -> None:
    """The bytes are gone. The replicas go, too; those that a rule wants again are on their way again. `by_index`."""
    if not done:
        return
    size = {(file_id, endpoint_id): size_bytes for _, file_id, endpoint_id, _, size_bytes in done}
    gone = _remove(s, done, sorted({endpoint_id for _, endpoint_id in size}))
    _end_transfers(s, gone)
    freed: Counter[int] = Counter()
    for pair in gone:
        freed[pair[1]] -= size.pop(pair)
    provision.book(s, freed)
    if size:
        again = rows_of(s, "wanted_again", PAIR, sorted(size))
        s.execute(
            replicas.update()
            .where(of_pair(again), Unguessed(replicas.c.state == literal(ReplicaState.DELETING)))
            .values(
                state=ReplicaState.COPYING,
                generation=replicas.c.generation + 1,
                evidence=None,
                verified_at=None,
                tombstone_at=None,
            )
        )
        _let_go(s, again)
    _tell(s, "deletion.done", [(id_, endpoint_id, size_bytes) for id_, _, endpoint_id, _, size_bytes in done])


def _remove(s: Session, done: Sequence[_Done], endpoint_ids: Sequence[int]) -> Sequence[tuple[int, int]]:
    """The replicas that were meant and that no rule wants again; returns their files and endpoints."""
    columns: Columns = {**PAIR, "generation": sa.Integer()}
    batch = rows_of(s, "removed", columns, sorted((f, e, generation) for _, f, e, generation, _ in done))
    file_ids = [file_id for _, file_id, _, _, _ in done]
    replica = sa.tuple_(replicas.c.file_id, replicas.c.endpoint_id, replicas.c.generation)
    meant = [
        removable.one_of(s, replicas.c.file_id, file_ids),
        Unguessed(replica.in_(sa.select(batch))),
        Unguessed(replicas.c.state == literal(ReplicaState.DELETING)),
    ]
    if removable.may_be_locked(s, file_ids, endpoint_ids):
        # What a rule that has ended still locks it may have released already: nobody would clear the row away.
        covered = is_covered(replicas.c.file_id, replicas.c.endpoint_id, ignoring_ended=True)
        meant.append(sa.not_(covered))
    gone = replicas.delete().where(*meant).returning(replicas.c.file_id, replicas.c.endpoint_id)
    return [(file_id, endpoint_id) for file_id, endpoint_id in _tuples(s.execute(gone).all())]


def _give_up(s: Session, failed: Sequence[_Ending]) -> None:
    """Nobody knows whether the bytes are there: the replica is no source, and is tried again some hours later; for a
    rule that wants it again, a transfer looks what is there."""
    unknown = (ReplicaState.AVAILABLE, ReplicaState.UNAVAILABLE)
    columns: Columns = {**PAIR, "state": sa.SmallInteger()}
    rows = [(e.file_id, e.endpoint_id, (ReplicaState.UNAVAILABLE if e.was in unknown else e.was).value) for e in failed]
    pairs = rows_of(s, "given_up", columns, sorted(rows))
    covered = is_covered(replicas.c.file_id, replicas.c.endpoint_id)
    later = sa.literal(s.now + timedelta(seconds=FAILED_SECONDS), Instant())
    s.execute(
        replicas.update()
        .where(of_pair(pairs), Unguessed(replicas.c.state == literal(ReplicaState.DELETING)))
        .values(
            state=pairs.c.state,
            generation=replicas.c.generation + 1,
            tombstone_at=sa.case((covered, sa.null()), else_=later),
        )
    )
    _let_go(s, pairs)


def _let_go(s: Session, pairs: sa.FromClause) -> None:
    """Transfers that waited for the end of a deletion go on."""
    freed = s.execute(
        transfers.update()
        .where(
            sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(sa.select(pairs.c.file_id, pairs.c.endpoint_id)),
            Unguessed(transfers.c.state == literal(TransferState.QUEUED)),
            Unguessed(transfers.c.reason_code == UNDER_WAY),
        )
        .values(not_before=None, reason_code=None, reason=None)
        .returning(transfers.c.site_id)
    )
    provision.wake_sites(s, {site_id for (site_id,) in freed})


def _end_transfers(s: Session, gone: Sequence[tuple[int, int]]) -> None:
    """Somebody tried again what no rule wants any more."""
    if not gone:
        return
    batch = rows_of(s, "gone", PAIR, sorted(gone))
    live = sa.and_(
        removable.one_of(s, transfers.c.file_id, [file_id for file_id, _ in gone]),
        any_of(transfers.c.state, provision.LIVE),
        Unguessed(sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(sa.select(batch))),
    )
    provision.cancel(s, live, "not_wanted", "the replica was deleted")


def _end(s: Session, endings: Sequence[_Ending]) -> None:
    columns: Columns = {
        "id": sa.BigInteger(),
        "state": sa.SmallInteger(),
        "attempts": sa.Integer(),
        "not_before": Instant(),
        "reason": sa.String(),
        "finished_at": Instant(),
    }
    rows = [
        (
            e.id,
            e.state.value,
            e.attempts,
            e.not_before,
            e.reason,
            None if e.state is DeletionState.QUEUED else s.now,
        )
        for e in endings
    ]
    batch = rows_of(s, "deletion_endings", columns, rows)
    s.execute(
        deletions.update()
        .where(deletions.c.id == batch.c.id)
        .values({name: batch.c[name] for name in columns if name != "id"} | {"lease_until": None})
    )


def _tell(s: Session, kind: str, some: Sequence[tuple[int, int, int]]) -> None:
    """Of `(deletion, endpoint, bytes)`: one event for each endpoint, under the number of the first of its deletions."""
    found: dict[int, list[tuple[int, int]]] = {}
    for id_, endpoint_id, size in some:
        found.setdefault(endpoint_id, []).append((id_, size))
    if found:
        names = sa.select(endpoints.c.id, endpoints.c.name).where(endpoints.c.id.in_(sorted(found)))
        for endpoint_id, name in s.execute(names).all():
            mine = found[endpoint_id]
            size = sum(size for _, size in mine)
            outbox.record(s, kind, min(id_ for id_, _ in mine), endpoint=name, files=len(mine), bytes=size)
