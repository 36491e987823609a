"""The end of a rule: what it alone protected is released, at once if it is little, else in slices.

Given     a rule that has ended, which the caller holds.
Returns   whether all of it is done, or how many files a slice took.
Promises  one transaction releases a bounded number of files, so the end of a rule on a million files is told at once
          and holds up nobody. Until the slice with its last file, a unit stays locked: that protects it a little longer
          and orders nothing. What another rule locks at the same endpoint as a whole is not looked at file by file.
Partner   replica.catalog.rules ends rules; .evaluation goes on with those that have ended and are due; .locks releases.

The locks of an ended rule: `applied_to` NULL or 0, not begun; above 0, files up to this one are released. Their
counters move with what changes, but those of stuck files are nobody's any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards, locks, usage
from replica.catalog.bulk import rows_of
from replica.catalog.membership import Unguessed, literal
from replica.db.engine import Session
from replica.db.tables import alias_of, contents, dids, rules
from replica.db.tables import locks as locks_table
from rules.states import RuleState

#: What one transaction releases.
SLICE_FILES = 20_000

_UNIT = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}


def begin(s: Session, rule_id: int, *, purge: bool) -> bool:
    """Release what the rule protects, if it is not too much; else leave it to evaluation.

    The caller holds the rule, which has ended, and the endpoints of its locks.
    """
    mine = locks_table.c.rule_id == rule_id
    if _is_much(s, mine):
        _drop_what_others_lock(s, mine)
        if _is_much(s, mine):
            s.execute(locks_table.update().where(mine, locks_table.c.applied_to > 0).values(applied_to=0))
            _look_again(s, rule_id, purge=purge)
            return False
    usage.discharge_rule(s, rule_id)
    held = s.execute(_held(rule_id)).all()
    slices = [_Slice(lock, *locks.WHOLE, None, lock.files_total) for lock in held]
    locks.release(s, _parts(s, slices), ignoring_rule=rule_id, purge=purge)
    s.execute(locks_table.delete().where(mine))
    return True


def go_on(s: Session, rule: sa.Row[Any], limit_files: int = SLICE_FILES) -> int:
    """The next slice of a rule that has ended; returns the files it took."""
    slices = _next_slices(s, rule.id, limit_files)
    if not slices:
        s.execute(rules.update().where(rules.c.id == rule.id).values(evaluate_at=None))
        return 0
    guards.change_endpoints(s, sorted({slice_.lock.endpoint_id for slice_ in slices}))
    # Asked again: only from here on no lock comes that covers them. Those of the rule, which is held, are the same.
    held = s.execute(_held(rule.id).limit(len(slices))).all()
    slices = [replace(slice_, lock=lock) for slice_, lock in zip(slices, held, strict=True)]
    locks.release(s, _parts(s, slices), ignoring_rule=rule.id, purge=rule.purge)
    columns = {**_UNIT, "next": sa.BigInteger()}
    part = rows_of(s, "released_part", columns, [(x.lock.unit_id, x.lock.endpoint_id, x.next) for x in slices])
    this = sa.and_(
        locks_table.c.rule_id == rule.id,
        locks_table.c.unit_id == part.c.unit_id,
        locks_table.c.endpoint_id == part.c.endpoint_id,
    )
    s.execute(locks_table.update().where(this, part.c.next.is_not(None)).values(applied_to=part.c.next))
    whole = sa.select(part.c.unit_id, part.c.endpoint_id).where(part.c.next.is_(None))
    pair = sa.tuple_(locks_table.c.unit_id, locks_table.c.endpoint_id)
    gone = locks_table.delete().where(locks_table.c.rule_id == rule.id, pair.in_(whole))
    _discharge(s, gone)
    _look_again(s, rule.id)
    return sum(slice_.files for slice_ in slices)


@dataclass(frozen=True, slots=True)
class _Slice:
    """A lock, and of its unit the files with an id greater than `after` and at most `upto`."""

    lock: sa.Row[Any]
    after: int
    upto: int
    #: Where the next slice of it begins; None: this was the last.
    next: int | None
    files: int


def _locks_of(rule_id: int) -> sa.Select[Any]:
    done = sa.func.coalesce(locks_table.c.applied_to, 0).label("done")
    return (
        sa.select(locks_table.c.unit_id, locks_table.c.endpoint_id, done, locks_table.c.files_total)
        .where(locks_table.c.rule_id == rule_id)
        .order_by(locks_table.c.unit_id, locks_table.c.endpoint_id)
    )


def _held(rule_id: int) -> sa.Select[Any]:
    """The same, with what spares a look at each file. True only while the endpoints are held."""
    alone = sa.exists(sa.select(1).where(dids.c.id == locks_table.c.unit_id, usage.ALONE))
    return _locks_of(rule_id).add_columns(
        locks_table.c.files_available, Unguessed(_others_lock_it()).label("kept"), Unguessed(alone).label("alone")
    )


def _parts(s: Session, slices: Sequence[_Slice]) -> Iterator[locks.Part]:
    """What may have to be released, by endpoint, and apart what needs no look at each file.

    What another rule locks as a whole is kept as a whole. A dataset that shares no file, and that nobody else locks
    there, has no file that another lock covers: `dids.shared` is never false otherwise (see replica.catalog.usage), and
    who makes it so, or makes such a lock, holds the endpoint until it is seen.
    """
    found: dict[tuple[int, bool, bool], list[tuple[int, int, int]]] = {}
    for slice_ in slices:
        lock = slice_.lock
        if not lock.kept:
            key = lock.endpoint_id, bool(lock.alone), lock.files_available == lock.files_total
            found.setdefault(key, []).append((lock.unit_id, slice_.after, slice_.upto))
    for (endpoint_id, alone, complete), units in sorted(found.items()):
        yield locks.Part(endpoint_id, locks.files_of_units(s, units), alone, complete)


def _is_much(s: Session, mine: sa.ColumnElement[bool]) -> bool:
    some = sa.select(locks_table.c.files_total).where(mine).limit(SLICE_FILES + 1).subquery()
    counted = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(some.c.files_total), 0)).select_from(some)
    return max(map(int, s.execute(counted).one())) > SLICE_FILES


def _drop_what_others_lock(s: Session, mine: sa.ColumnElement[bool]) -> None:
    """As a whole, at the same endpoint, for a rule that has not ended: of that nothing is released."""
    _discharge(s, locks_table.delete().where(mine, Unguessed(_others_lock_it())))


def _others_lock_it() -> sa.ColumnElement[bool]:
    """Of a lock: a rule that has not ended has one on the same unit at the same endpoint."""
    other = alias_of(locks_table, "other")
    same = (
        sa.select(1)
        .select_from(other)
        .join(rules, rules.c.id == other.c.rule_id)
        .where(
            other.c.unit_id == locks_table.c.unit_id,
            Unguessed(other.c.endpoint_id == locks_table.c.endpoint_id),
            Unguessed(other.c.rule_id != locks_table.c.rule_id),
            Unguessed(rules.c.state != literal(RuleState.EXPIRED)),
        )
    )
    return sa.exists(same)


def _discharge(s: Session, gone: sa.Delete) -> None:
    """Remove these locks, and what they held is no longer charged for them."""
    rows = s.execute(gone.returning(locks_table.c.rule_id, locks_table.c.unit_id, locks_table.c.endpoint_id)).all()
    usage.discharge(s, [(rule_id, unit_id, endpoint_id) for rule_id, unit_id, endpoint_id in rows])


def _next_slices(s: Session, rule_id: int, limit_files: int) -> list[_Slice]:
    """Whole units as long as they fit, else a part of the first one."""
    slices: list[_Slice] = []
    room = limit_files
    for lock in s.execute(_locks_of(rule_id).limit(max(limit_files, 1))).all():
        if lock.files_total <= room:
            room -= lock.files_total
            slices.append(_Slice(lock, lock.done, locks.WHOLE[1], None, lock.files_total))
        elif not slices:
            upto = s.execute(
                sa.select(contents.c.child_id)
                .where(contents.c.parent_id == lock.unit_id, contents.c.child_id > lock.done)
                .order_by(contents.c.child_id)
                .offset(limit_files - 1)
                .limit(1)
            ).scalar()
            return [_Slice(lock, lock.done, locks.WHOLE[1] if upto is None else upto, upto, limit_files)]
        else:
            break
    return slices


def _look_again(s: Session, rule_id: int, **values: Any) -> None:
    s.execute(rules.update().where(rules.c.id == rule_id).values(evaluate_at=s.now, **values))
    s.wake.add("evaluation")
