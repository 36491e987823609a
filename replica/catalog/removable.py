"""Which replicas may be removed now: rules.deletion.decide, said in SQL, over a batch.

Given     replicas of one endpoint, or of several, and what they shall go for.
Returns   `(… , verdict)`: the value of a `Why` for those that go, else the reason for which one is kept.
Promises  the same answer as `decide` for the same facts. The caller holds the endpoints and the files, and that nothing
          is missed by it is argued here.
Partner   replica.catalog.deletions decides with it, replica.catalog.removals asks once more before a worker begins.

Why no deletion overlooks a lock. A lock is inserted, and a file comes into a locked dataset, only by who holds the row
of the lock's endpoint, at least shared, from before it looks at replicas until it commits: replica.catalog.placing
(`place`), .locks (`_files_joined`, `_hold_every_endpoint`) and .replicas (by way of `hold_for_registration`). Who
decides on a deletion holds that row alone, and looks after that. So either the lock is committed and seen here; or its
maker comes later, sees DELETING, and takes the deletion back (replica.catalog.revival) or waits for its end. The rows
that say which rules and datasets there are were held before endpoints, so no order is reversed.

Why two deletions do not take the last two copies. The copies are at two endpoints, so these rows say nothing; the row
of the file does. Both hold it before they look for another good copy, so the second sees that the first is DELETING.
Nobody waits for a file's row while holding an endpoint: who finds it held by somebody else leaves that file for later.
So it does not matter that registration holds files before rules and endpoints.

The order is: rule → endpoint → file (without waiting) → replica → deletion → transfer.

What is not excluded, because no database can: a copy that was good is found damaged after another one was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from replica.catalog import hops
from replica.catalog.bulk import ids_of
from replica.catalog.membership import Computed, Unguessed, any_of, is_covered, literal
from replica.catalog.provision import LIVE, is_live
from replica.db.engine import Session
from replica.db.tables import (
    Instant,
    alias_of,
    contents,
    dids,
    endpoints,
    files,
    links,
    locks,
    replicas,
    rules,
    suspects,
    transfers,
)
from rules.deletion import AT_ONCE, BY_HAND, EXPLICIT, LEFTOVER_SECONDS, Why
from rules.states import TRANSFER_LEASED, Evidence, ReplicaState


def one_of(s: Session, column: sa.ColumnElement[Any], ids: Collection[int]) -> sa.ColumnElement[bool]:
    return among(s, ids)(column)


#: Of a column of ids: whether it is one of these.
Choice = Callable[[sa.ColumnElement[Any]], sa.ColumnElement[bool]]


def among(s: Session, ids: Collection[int]) -> Choice:
    """Of a column, whether it has one of these numbers; looked up by an index that begins with it.

    Not a join with the batch: PostgreSQL knows little of a batch, and would now and then rather walk through all
    replicas there are.
    """
    wanted = sorted(set(ids))
    if not s.postgresql:
        return lambda column: column.in_(sa.select(ids_of(s, "one_of", wanted).c.id))
    text = f"{{{','.join(map(str, wanted))}}}"

    def is_one(column: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        return column == sa.any_(sa.cast(sa.bindparam(None, text, sa.Text(), unique=True), ARRAY(sa.BigInteger())))

    return is_one


def hold_files(s: Session, file_ids: Sequence[int]) -> Sequence[int]:
    """Hold the rows of these files, but those that somebody else holds; returns the ids of those held. `by_index`."""
    if not s.postgresql:
        return file_ids
    rows = sa.select(files.c.did_id).where(one_of(s, files.c.did_id, file_ids)).order_by(files.c.did_id)
    held = rows.with_for_update(key_share=True, skip_locked=True).subquery()
    if s.execute(sa.select(sa.func.count()).select_from(held)).scalar_one() == len(set(file_ids)):
        return file_ids  # nearly always, and they need not be brought here
    return s.execute(sa.select(held)).scalars().all()


@dataclass(frozen=True, slots=True)
class Possible:
    """What may be true of some files of a batch. What is False here is true of none, and not asked of each."""

    #: A lock there covers it.
    locked: bool = True
    #: A transfer of it has not ended.
    travelling: bool = True


def possible(s: Session, file_ids: Collection[int], endpoint_ids: Sequence[int]) -> Possible:
    """The caller holds the endpoints and, before a decision, the files: so this is as good as a look at each of them.

    A transfer of theirs may be made meanwhile, as it may be after that look: who hands out the order to delete asks
    for it once more. `by_index`.
    """
    these = among(s, file_ids)
    live = sa.select(sa.func.count()).where(these(transfers.c.file_id), any_of(transfers.c.state, LIVE))
    locked, travelling = s.execute(sa.select(_number_of_locks(these, endpoint_ids), live.scalar_subquery())).one()
    return Possible(bool(locked), bool(travelling))


def may_be_locked(s: Session, file_ids: Collection[int], endpoint_ids: Sequence[int]) -> bool:
    """Whether any of these files has a lock at any of these endpoints, which the caller holds. `by_index`."""
    return bool(s.execute(sa.select(_number_of_locks(among(s, file_ids), endpoint_ids))).scalar_one())


def _number_of_locks(these: Choice, endpoint_ids: Sequence[int]) -> sa.ColumnElement[int]:
    """On the files, and on what holds them. Counted, not asked whether there is one: for the first of many PostgreSQL
    would rather read a table from its beginning. Computed, or it would read all contents in the order of the parents.
    """
    there = Unguessed(locks.c.endpoint_id.in_(endpoint_ids))
    parent_id = Computed(contents.c.parent_id)
    parents = sa.select(parent_id.label("id")).where(these(contents.c.child_id)).distinct().subquery("parents")
    above = sa.exists(sa.select(1).where(locks.c.unit_id == parents.c.id, there).correlate(parents))
    of_parents = sa.select(sa.func.count()).select_from(parents).where(Unguessed(above))
    of_files = sa.select(sa.func.count()).select_from(locks).where(these(locks.c.unit_id), there)
    return of_parents.scalar_subquery() + of_files.scalar_subquery()


def is_leftover() -> sa.ColumnElement[bool]:
    """It never became a copy, and nobody said that bytes are there."""
    return sa.and_(
        replicas.c.state == literal(ReplicaState.COPYING),
        replicas.c.evidence.is_distinct_from(literal(Evidence.DECLARED)),
    )


def verdict(now: datetime, why: Why | None, possible: Possible = Possible()) -> sa.ColumnElement[str]:
    """Of a row of `replicas`, whose endpoint may be deleted from."""
    may_be_last = sa.or_(is_leftover(), sa.true() if why in EXPLICIT else is_forgotten())
    since = replicas.c.tombstone_at
    old = sa.literal(now - timedelta(seconds=LEFTOVER_SECONDS), Instant())
    guards: list[tuple[sa.ColumnElement[bool], Any]] = [
        (replicas.c.state == literal(ReplicaState.DELETING), "deleting"),
    ]
    if possible.locked:
        guards += [(is_covered(replicas.c.file_id, replicas.c.endpoint_id), "locked")]
    if possible.travelling:
        guards += [(is_live(replicas.c.file_id, replicas.c.endpoint_id), "arriving"), (is_being_read(), "being_read")]
        # Of a route in force the transfer has not ended.
        guards += [(hops.is_hop(replicas.c.file_id, replicas.c.endpoint_id), "reserved")]
    guards += [(sa.not_(sa.or_(is_good_elsewhere(), may_be_last)), "last_copy")]
    if possible.travelling:
        guards += [(sa.and_(is_last_source(), sa.not_(is_leftover())), "last_source")]
    if why in BY_HAND:
        assert why is not None
        return _case(guards, why.value)
    leftover = Why.LEFTOVER.value if why is None else why.value
    guards += [
        (since.is_(None), "not_released"),
        (sa.and_(is_leftover(), since > old), "not_yet"),
        (is_leftover(), leftover),
        (since > sa.literal(now, Instant()), "not_yet"),
    ]
    if why is None:
        at_once = since == sa.literal(AT_ONCE, Instant())
        return _case([*guards, (is_forgotten(), Why.FORGOTTEN.value), (at_once, Why.PURGE.value)], "not_needed")
    return _case(guards, why.value)


def _case(guards: Sequence[tuple[sa.ColumnElement[bool], Any]], otherwise: str) -> sa.ColumnElement[str]:
    # Written out: bound values of unknown type would each need a cast on PostgreSQL.
    def word(text: str) -> sa.ColumnElement[str]:
        return sa.literal_column(f"'{text}'", sa.String())

    return sa.case(*((condition, word(text)) for condition, text in guards), else_=word(otherwise))


def is_being_read() -> sa.ColumnElement[bool]:
    """A worker holds an order to copy this file. It may read from any of its copies."""
    t = alias_of(transfers, "reading")
    found = sa.select(1).where(
        t.c.file_id == replicas.c.file_id, any_of(t.c.state, LIVE), any_of(t.c.state, TRANSFER_LEASED)
    )
    return Unguessed(sa.exists(found))


def _good(name: str, *, doubted_too: bool = False) -> tuple[sa.FromClause, sa.ColumnElement[bool]]:
    other = alias_of(replicas, name)
    doubts = alias_of(suspects, f"{name}_doubted")
    doubted = sa.select(1).where(
        doubts.c.file_id == other.c.file_id, Unguessed(doubts.c.endpoint_id == other.c.endpoint_id)
    )
    readable = sa.select(endpoints.c.id).where(endpoints.c.readable)
    return other, sa.and_(
        other.c.file_id == replicas.c.file_id,
        Unguessed(other.c.endpoint_id != replicas.c.endpoint_id),
        Unguessed(other.c.state == literal(ReplicaState.AVAILABLE)),
        Unguessed(other.c.evidence > literal(Evidence.DECLARED)),
        Unguessed(other.c.endpoint_id.in_(readable)),
        # Nothing is removed because of a copy that somebody has found wrong, before a worker has looked at it.
        sa.true() if doubted_too else sa.not_(Unguessed(sa.exists(doubted.correlate(other)))),
    )


def is_good_elsewhere(*, doubted_too: bool = False) -> sa.ColumnElement[bool]:
    """Another copy is verified, can be read, and is not being deleted; `doubted_too`: even if it may be wrong, as a
    copy to read from, which proves itself."""
    _, good = _good("good_copy", doubted_too=doubted_too)
    return Unguessed(sa.exists(sa.select(1).where(good)))


def is_last_source() -> sa.ColumnElement[bool]:
    """A transfer that has not ended could read from nowhere else, or its rule says from where it may read."""
    t, other_way = alias_of(transfers, "waiting"), alias_of(links, "way")
    other, good = _good("good_source")
    closed = sa.select(1).where(
        other_way.c.source_id == other.c.endpoint_id,
        other_way.c.target_id == t.c.target_id,
        sa.not_(other_way.c.allowed),
    )
    elsewhere = sa.select(1).where(
        good,
        Unguessed(other.c.endpoint_id != t.c.target_id),
        sa.not_(Unguessed(sa.exists(closed.correlate(other, t)))),
    )
    limited = sa.select(1).where(rules.c.id == t.c.rule_id, rules.c.source_expression.is_not(None))
    found = sa.select(1).where(
        t.c.file_id == replicas.c.file_id,
        any_of(t.c.state, LIVE),
        Unguessed(t.c.target_id != replicas.c.endpoint_id),
        sa.or_(sa.exists(limited.correlate(t)), sa.not_(sa.exists(elsewhere.correlate(replicas, t)))),
    )
    return Unguessed(sa.exists(found))


def is_forgotten() -> sa.ColumnElement[bool]:
    """The file's DID was deleted, and nobody can have it back any more (see replica.catalog.did_deletion)."""
    found = sa.select(1).where(
        dids.c.id == replicas.c.file_id, Unguessed(dids.c.deleted_at.is_not(None)), Unguessed(dids.c.final_at.is_(None))
    )
    return Unguessed(sa.exists(found))
