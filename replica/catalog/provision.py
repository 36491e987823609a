"""From a lock to the rows that make it true: replicas on their way, and the transfers that bring them.

Given     pairs of a file and an endpoint that rules want, or a rule whose locks are not worked off yet.
Returns   how many files were looked at.
Promises  harmless to repeat: what is there stays, what is missing is made, and never a second live transfer. Space is
          booked with the row that needs it. About ten statements for any number of files.
Partner   replica.catalog.placing makes the locks; site workers claim the transfers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards, revival, rule_transfers
from replica.catalog.bulk import Batch, Columns, insert, rows_of
from replica.catalog.membership import Unguessed, any_of, covering, files_of, literal, of_lock, of_pair
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session
from replica.db.tables import alias_of, contents, endpoints, files, locks, replicas, rules, sites, transfers
from rules.states import TRANSFER_TERMINAL, ReplicaState, TransferState

LIVE = tuple(state for state in TransferState if state not in TRANSFER_TERMINAL)
#: How a transfer ends without its file being there.
IN_VAIN = (TransferState.FAILED, TransferState.CANCELLED)

_BOOKING = Batch("booking", {"id": sa.BigInteger(), "bytes": sa.BigInteger()})

PAIR: Columns = {"file_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}


def apply_locks(s: Session, rule_id: int, limit_files: int) -> int:
    """One slice of the locks of a rule that are not worked off yet; returns how many files it held, 0 at the end.

    The caller holds the rule and the endpoints of its locks, and settles the rule.
    """
    bounds, files_of_bounds = _next_bounds(s, rule_id, limit_files)
    if not bounds:
        return 0
    columns = {name: sa.BigInteger() for name in ("rule_id", "unit_id", "endpoint_id", "after", "upto", "next")}
    part = rows_of(s, "slices", columns, bounds)
    held = files_of(part, after="after", upto="upto")
    wanted = (
        sa.select(
            held.c.file_id,
            held.c.endpoint_id,
            sa.func.max(held.c.size_bytes).label("size_bytes"),
            rules.c.id.label("rule_id"),
            rules.c.priority,
            rules.c.activity,
        )
        .join(rules, rules.c.id == held.c.rule_id)
        .group_by(held.c.file_id, held.c.endpoint_id, rules.c.id)
        .subquery("wanted")
    )
    provided = provide(s, wanted, {rule_id}, files_of_bounds)
    if provided.left_stuck:
        look_soon(s, [rule_id])
    # Two units may have shared a file that was made once: what is left is settled by the last slice of each unit.
    share = rows_of(
        s, "booked", {"id": sa.BigInteger(), "bytes": sa.BigInteger()}, sorted(provided.created_bytes.items())
    )
    booked = sa.select(share.c.bytes).where(share.c.id == locks.c.endpoint_id).scalar_subquery()
    left = locks.c.bytes_pending - sa.func.coalesce(booked, 0)
    s.execute(
        locks.update()
        .where(of_lock(part))
        .values(
            applied_to=part.c.next,
            bytes_pending=sa.case((part.c.next.is_(None), 0), (left < 0, 0), else_=left),
        )
    )
    return max(files_of_bounds, 1)


def _next_bounds(
    s: Session, rule_id: int, limit_files: int
) -> tuple[list[tuple[int, int, int, int, int, int | None]], int]:
    """`(rule, unit, endpoint, after, upto, next)`: whole units as long as they fit, else a part of the first one; and
    how many files that is at most."""
    query = (
        sa.select(locks.c.unit_id, locks.c.endpoint_id, locks.c.applied_to, locks.c.files_total)
        .where(locks.c.rule_id == rule_id, locks.c.applied_to.is_not(None), sa.not_(locks.c.surplus))
        .order_by(locks.c.unit_id, locks.c.endpoint_id)
        .limit(max(limit_files, 1))
    )
    everything = 2**63 - 1
    bounds: list[tuple[int, int, int, int, int, int | None]] = []
    room = limit_files
    for lock in s.execute(query).all():
        if lock.files_total <= room:
            room -= lock.files_total
            bounds.append((rule_id, lock.unit_id, lock.endpoint_id, lock.applied_to, everything, None))
        elif not bounds:
            upto = s.execute(
                sa.select(contents.c.child_id)
                .where(contents.c.parent_id == lock.unit_id, contents.c.child_id > lock.applied_to)
                .order_by(contents.c.child_id)
                .offset(limit_files - 1)
                .limit(1)
            ).scalar()
            end = everything if upto is None else upto
            return [(rule_id, lock.unit_id, lock.endpoint_id, lock.applied_to, end, upto)], limit_files
        else:
            break
    return bounds, limit_files - room


@dataclass(frozen=True, slots=True)
class Provided:
    #: Endpoint id → bytes of the replicas that were made.
    created_bytes: dict[int, int]
    #: Some copies had failed before, and other rules want them, too: evaluation can hold all of them and try again.
    left_stuck: bool


def provide(
    s: Session, wanted: sa.FromClause, held: Collection[int], pairs: int | None = None, *, none_there: bool = False
) -> Provided:
    """Make what is missing for `(file_id, endpoint_id, size_bytes, rule_id, priority, activity)`, one row for a pair.

    The caller holds the endpoints and the rules `held`, and settles these. `pairs`: there are not more than so many;
    `none_there`: none of them has a replica yet, in whatever state.
    """
    stuck: list[tuple[int, int]] = []
    if not none_there:
        _revive(s, wanted, held)
        stuck = [(row.file_id, row.endpoint_id) for row in s.execute(_in_vain(wanted))]
    if stuck:
        batch = rows_of(s, "stuck_before", PAIR, stuck)
        if set(s.execute(sa.select(covering(batch).c.rule_id).distinct()).scalars()) <= set(held):
            count_stuck(s, batch, -1)
            stuck = []
    created, rows = _make_replicas(s, wanted)
    if rows != pairs:  # else all are new, and nothing of them was released, or queued for somebody else
        _protect(s, wanted)
        _raise_priority(s, wanted)
    _make_transfers(s, wanted, rows_of(s, "left_stuck", PAIR, stuck) if stuck else None)
    rule_transfers.keep_waiting(s, wanted, held)
    return Provided(created, bool(stuck))


def _revive(s: Session, wanted: sa.FromClause, held: Collection[int]) -> None:
    """What is there and was to be deleted stays, and counts."""
    if back := revival.revive(s, wanted, held):
        settle(s, set(count_available(s, rows_of(s, "revived", PAIR, back), 1)) - set(held))


def provide_again(s: Session, wanted: sa.FromClause) -> list[int]:
    """The same for copies that had failed or got lost; the caller also holds every rule that covers them.

    Returns the rules whose counters moved; the caller settles their states.
    """
    touched = try_again(s, wanted)
    _make_replicas(s, wanted)
    _make_transfers(s, wanted)
    return touched


def try_again(s: Session, pairs: sa.FromClause) -> list[int]:
    """Transfers are about to be made for these pairs: those that were stuck are not any more.

    The caller holds the rules that cover them. Returns those that notice, for the caller to settle. Conflict when a
    rule was added since then and is being changed.
    """
    stuck = [(row.file_id, row.endpoint_id) for row in s.execute(_in_vain(pairs))]
    if not stuck:
        return []
    batch = rows_of(s, "tried_again", PAIR, stuck)
    guards.change_rules_that_came(s, batch)
    return count_stuck(s, batch, -1)


def reserve(s: Session, wanted: sa.FromClause) -> None:
    """Rows for copies that will be ordered later: their space is booked. The caller holds the endpoints."""
    _make_replicas(s, wanted)


def order(s: Session, wanted: sa.FromClause) -> None:
    """Transfers for replicas that have rows, where none is under way."""
    _make_transfers(s, wanted)


def wanted_by(s: Session, rule_id: int, pairs: list[tuple[int, int]]) -> sa.Subquery:
    """What `provide` takes, for pairs that this rule wants."""
    batch = rows_of(s, "wanted_pairs", PAIR, pairs)
    return (
        sa.select(
            batch.c.file_id,
            batch.c.endpoint_id,
            files.c.size_bytes,
            rules.c.id.label("rule_id"),
            rules.c.priority,
            rules.c.activity,
        )
        .select_from(batch)
        .join(files, files.c.did_id == batch.c.file_id)
        .join(rules, rules.c.id == rule_id)
        .subquery("wanted")
    )


def _make_replicas(s: Session, wanted: sa.FromClause) -> tuple[dict[int, int], int]:
    """Bytes of what was made, by endpoint; and how many rows that is."""
    # No look whether they are there: a row that somebody is deleting at this moment must be waited for, not skipped.
    # Written out: within RETURNING, SQLAlchemy would not see that `replicas` is the row just made.
    size = sa.literal_column("(SELECT size_bytes FROM files WHERE did_id = replicas.file_id)", sa.BigInteger())
    made = s.execute(
        insert(s, replicas)
        .from_select(
            ["file_id", "endpoint_id", "state", "generation"],
            sa.select(
                wanted.c.file_id,
                wanted.c.endpoint_id,
                literal(ReplicaState.COPYING),
                revival.next_generation(wanted.c.file_id, wanted.c.endpoint_id),
            )
            .where(sa.true())
            .order_by(wanted.c.file_id, wanted.c.endpoint_id),
        )
        .on_conflict_do_nothing()
        .returning(replicas.c.endpoint_id, size)
    )
    created: Counter[int] = Counter()
    rows = made.all()
    for endpoint_id, size_bytes in rows:
        created[endpoint_id] += size_bytes
    book(s, created)
    return created, len(rows)


def book(s: Session, bytes_by_endpoint: dict[int, int]) -> None:
    """Replica rows of so many bytes came (or, below zero, went); the caller holds the endpoints."""
    changes = sorted((e, n) for e, n in bytes_by_endpoint.items() if n)
    if changes:
        s.execute(_add_bytes(s.postgresql), _BOOKING.holding(s, changes))


@cache
def _add_bytes(postgresql: bool) -> sa.Update:
    batch = _BOOKING.rows(postgresql)
    more = endpoints.c.used_bytes + batch.c.bytes
    return endpoints.update().where(endpoints.c.id == batch.c.id).values(used_bytes=more)


def _protect(s: Session, wanted: sa.FromClause) -> None:
    s.execute(
        replicas.update()
        .where(
            Unguessed(replicas.c.tombstone_at.is_not(None)),
            of_pair(wanted),
        )
        .values(tombstone_at=None)
    )


def _raise_priority(s: Session, wanted: sa.FromClause) -> None:
    """Who is in a hurry takes along what others queued with less, and what waits because they are suspended."""
    waits = sa.and_(
        transfers.c.state == literal(TransferState.WAITING), transfers.c.reason_code == rule_transfers.SUSPENDED
    )
    s.execute(
        transfers.update()
        .where(
            transfers.c.file_id == wanted.c.file_id,
            transfers.c.target_id == wanted.c.endpoint_id,
            Unguessed(
                sa.or_(
                    sa.and_(
                        transfers.c.state == literal(TransferState.QUEUED), transfers.c.priority < wanted.c.priority
                    ),
                    waits,
                )
            ),
        )
        .values(
            priority=sa.case((transfers.c.priority < wanted.c.priority, wanted.c.priority), else_=transfers.c.priority),
            state=literal(TransferState.QUEUED),
            reason_code=sa.case((waits, None), else_=transfers.c.reason_code),
            reason=sa.case((waits, None), else_=transfers.c.reason),
        )
    )


def is_live(file_id: sa.ColumnElement[Any], endpoint_id: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    live = alias_of(transfers, "live")
    # By the file, for each: by both, PostgreSQL would rather read all transfers there are into a hash table first.
    there = Unguessed(live.c.target_id == endpoint_id)
    found = sa.select(1).where(live.c.file_id == file_id, there, any_of(live.c.state, LIVE))
    return Unguessed(sa.exists(found))


def is_stuck(file_id: sa.ColumnElement[Any], endpoint_id: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    """Of a replica that is not available: a transfer ended in vain, and none is under way now."""
    vain = alias_of(transfers, "vain")
    here = sa.and_(vain.c.target_id == endpoint_id, any_of(vain.c.state, IN_VAIN))
    ended = sa.select(1).where(vain.c.file_id == file_id, Unguessed(here))
    return sa.and_(Unguessed(sa.exists(ended)), sa.not_(is_live(file_id, endpoint_id)))


def _missing(wanted: sa.FromClause) -> sa.Select[Any]:
    return (
        sa.select(wanted.c.file_id, wanted.c.endpoint_id)
        .join(replicas, of_pair(wanted))
        .where(Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE)))
    )


def _in_vain(wanted: sa.FromClause) -> sa.Select[Any]:
    return _missing(wanted).where(is_stuck(wanted.c.file_id, wanted.c.endpoint_id))


def _make_transfers(s: Session, wanted: sa.FromClause, but: sa.FromClause | None = None) -> None:
    nothing_yet = sa.literal(s.now, transfers.c.created_at.type)
    rows = (
        _missing(wanted)
        .join(endpoints, endpoints.c.id == wanted.c.endpoint_id)
        .where(sa.not_(is_live(wanted.c.file_id, wanted.c.endpoint_id)))
        .with_only_columns(
            wanted.c.file_id,
            wanted.c.endpoint_id,
            endpoints.c.site_id,
            wanted.c.rule_id,
            literal(TransferState.QUEUED),
            wanted.c.priority,
            wanted.c.activity,
            wanted.c.size_bytes,
            nothing_yet,
        )
        .order_by(wanted.c.file_id, wanted.c.endpoint_id)
    )
    if but is not None:
        pair = sa.tuple_(wanted.c.file_id, wanted.c.endpoint_id)
        rows = rows.where(pair.not_in(sa.select(but.c.file_id, but.c.endpoint_id)))
    names = ["file_id", "target_id", "site_id", "rule_id", "state", "priority", "activity", "size_bytes", "created_at"]
    made = s.execute(
        insert(s, transfers).from_select(names, rows).on_conflict_do_nothing().returning(transfers.c.site_id)
    )
    wake_sites(s, {site_id for (site_id,) in made})


def cancel(s: Session, these: sa.ColumnElement[bool], code: str, reason: str) -> None:
    """End transfers that are live: nobody wants them, or not any more. Their workers hear of it with the next beat."""
    s.execute(
        transfers.update()
        .where(these)
        .values(
            state=TransferState.CANCELLED,
            finished_at=s.now,
            lease_until=None,
            not_before=None,
            reason_code=code,
            reason=reason,
        )
    )


def wake_sites(s: Session, site_ids: set[int]) -> None:
    if site_ids:
        query = sa.select(sites.c.name).where(sites.c.id.in_(sorted(site_ids)))
        s.wake.update(f"site.{name}" for (name,) in s.execute(query))


def count_stuck(s: Session, pairs: sa.FromClause, sign: int) -> list[int]:
    """The files of these pairs became stuck (1) or are no longer (-1); returns the rules that notice."""
    cover = covering(pairs)
    change = (
        sa.select(cover.c.rule_id, cover.c.unit_id, cover.c.endpoint_id, sa.func.count().label("files"))
        .group_by(cover.c.rule_id, cover.c.unit_id, cover.c.endpoint_id)
        .subquery("change")
    )
    changed = s.execute(
        locks.update()
        .where(of_lock(change))
        .values(files_stuck=locks.c.files_stuck + sign * change.c.files)
        .returning(locks.c.rule_id)
    )
    return sorted({rule_id for (rule_id,) in changed})


def count_available(s: Session, pairs: sa.FromClause, sign: int, *, none_stuck: bool = False) -> list[int]:
    """These became available (1), or no longer are (-1); their transfers are still as they were before.

    `none_stuck`: all of them have one under way, or were not there at all. Returns the ids of the rules that noticed;
    the caller holds them.
    """
    cover = covering(pairs)
    was_stuck: sa.ColumnElement[int] = sa.literal(0)
    if not none_stuck:
        was_stuck = sa.case((is_stuck(cover.c.file_id, cover.c.endpoint_id), 1), else_=0)
    change = (
        sa.select(
            cover.c.rule_id,
            cover.c.unit_id,
            cover.c.endpoint_id,
            sa.func.count().label("files"),
            sa.func.sum(was_stuck).label("stuck"),
        )
        .group_by(cover.c.rule_id, cover.c.unit_id, cover.c.endpoint_id)
        .subquery("change")
    )
    changed = s.execute(
        locks.update()
        .where(of_lock(change))
        .values(
            files_available=locks.c.files_available + sign * change.c.files,
            files_stuck=locks.c.files_stuck - sign * change.c.stuck,
            troubled_at=None if sign > 0 else locks.c.troubled_at,
        )
        .returning(locks.c.rule_id)
    )
    return sorted({rule_id for (rule_id,) in changed})
