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

from typing import Any

import sqlalchemy as sa

from replica.catalog import guards, locks, usage
from replica.catalog.bulk import rows_of
from replica.catalog.membership import Unguessed, files_of, literal
from replica.db.engine import Session
from replica.db.tables import contents, rules
from replica.db.tables import locks as locks_table
from rules.states import RuleState

#: What one transaction releases.
SLICE_FILES = 20_000

_EVERYTHING = 2**63 - 1
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
    pairs = sa.select(locks_table.c.unit_id, locks_table.c.endpoint_id).where(mine).subquery("mine")
    locks.release(s, files_of(pairs), ignoring_rule=rule_id, purge=purge)
    s.execute(locks_table.delete().where(mine))
    return True


def go_on(s: Session, rule: sa.Row[Any], limit_files: int = SLICE_FILES) -> int:
    """The next slice of a rule that has ended; returns the files it took."""
    bounds = _bounds(s, rule.id, limit_files)
    if not bounds:
        s.execute(rules.update().where(rules.c.id == rule.id).values(evaluate_at=None))
        return 0
    guards.change_endpoints(s, sorted({endpoint_id for _, endpoint_id, *_ in bounds}))
    columns = {**_UNIT, **{name: sa.BigInteger() for name in ("after", "upto", "next", "files")}}
    part = rows_of(s, "released_part", columns, bounds)
    locks.release(s, files_of(part, after="after", upto="upto"), ignoring_rule=rule.id, purge=rule.purge)
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
    return sum(files for *_, files in bounds)


def _is_much(s: Session, mine: sa.ColumnElement[bool]) -> bool:
    some = sa.select(locks_table.c.files_total).where(mine).limit(SLICE_FILES + 1).subquery()
    counted = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(some.c.files_total), 0)).select_from(some)
    return max(map(int, s.execute(counted).one())) > SLICE_FILES


def _drop_what_others_lock(s: Session, mine: sa.ColumnElement[bool]) -> None:
    """As a whole, at the same endpoint, for a rule that has not ended: of that nothing is released."""
    other = locks_table.alias("other")
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
    _discharge(s, locks_table.delete().where(mine, Unguessed(sa.exists(same))))


def _discharge(s: Session, gone: sa.Delete) -> None:
    """Remove these locks, and what they held is no longer charged for them."""
    rows = s.execute(gone.returning(locks_table.c.rule_id, locks_table.c.unit_id, locks_table.c.endpoint_id)).all()
    usage.discharge(s, [(rule_id, unit_id, endpoint_id) for rule_id, unit_id, endpoint_id in rows])


def _bounds(s: Session, rule_id: int, limit_files: int) -> list[tuple[int, int, int, int, int | None, int]]:
    """`(unit, endpoint, after, upto, next, files)`: whole units as long as they fit, else a part of the first one."""
    done = sa.func.coalesce(locks_table.c.applied_to, 0)
    query = (
        sa.select(locks_table.c.unit_id, locks_table.c.endpoint_id, done, locks_table.c.files_total)
        .where(locks_table.c.rule_id == rule_id)
        .order_by(locks_table.c.unit_id, locks_table.c.endpoint_id)
        .limit(max(limit_files, 1))
    )
    bounds: list[tuple[int, int, int, int, int | None, int]] = []
    room = limit_files
    for unit_id, endpoint_id, after, files in s.execute(query).all():
        if files <= room:
            room -= files
            bounds.append((unit_id, endpoint_id, after, _EVERYTHING, None, files))
        elif not bounds:
            upto = s.execute(
                sa.select(contents.c.child_id)
                .where(contents.c.parent_id == unit_id, contents.c.child_id > after)
                .order_by(contents.c.child_id)
                .offset(limit_files - 1)
                .limit(1)
            ).scalar()
            return [(unit_id, endpoint_id, after, _EVERYTHING if upto is None else upto, upto, limit_files)]
        else:
            break
    return bounds


def _look_again(s: Session, rule_id: int, **values: Any) -> None:
    s.execute(rules.update().where(rules.c.id == rule_id).values(evaluate_at=s.now, **values))
    s.wake.add("evaluation")
