"""The transfers that bring what a rule still misses, when the rule itself is changed: held back, let go, hurried.

Given     a rule, or pairs of a file and an endpoint for which transfers were just made.
Returns   nothing; the transfers are as the rules that want them say.
Promises  a transfer that only suspended rules want waits, and goes on as soon as one that is not wants it; what a
          worker holds is never touched. The rules say what transfers are to be: so it does not matter how often, in
          which order and in how many slices transfers follow them. One transaction looks at a bounded number of files.
Partner   replica.catalog.suspension and .rule_updates; .provision asks `keep_waiting` about what it made.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.membership import Computed, Unguessed, any_of, by_index, covering, files_of, literal, of_pair
from replica.db.engine import Session
from replica.db.tables import alias_of, contents, locks, replicas, rules, sites, transfers
from rules.states import Evidence, RuleState, TransferState

SUSPENDED = "suspended"
_SUSPENDED_REASON = "every rule that wants this copy is suspended"

#: How many files follow while a person waits; unattended work takes the rest.
SLICE_FILES = 5_000

#: Not claimed, so what is said of them counts.
_UNCLAIMED = (TransferState.QUEUED, TransferState.WAITING)
_OPEN = locks.c.files_available < locks.c.files_total
_WISHED = sa.not_(locks.c.surplus)
_EVERYTHING = 2**63 - 1
_TRANSFER: Columns = {name: sa.BigInteger() for name in ("id", "file_id", "endpoint_id")}


def open_pairs(rule_id: int) -> sa.Subquery:
    """`(file_id, endpoint_id)`: files of the locks of the rule that are not complete."""
    mine = (
        sa.select(locks.c.unit_id, locks.c.endpoint_id)
        .where(
            locks.c.rule_id == rule_id,
            locks.c.files_available < locks.c.files_total,
            locks.c.surplus.is_(False),
        )
        .subquery("mine")
    )
    held = files_of(mine)
    return sa.select(held.c.file_id, held.c.endpoint_id).distinct().subquery("open_pairs")


def keep_waiting(s: Session, pairs: sa.FromClause, rule_ids: Collection[int] | None = None) -> None:
    """Transfers were made or queued anew for these pairs: those that only suspended rules want wait.

    `rule_ids` are the rules that may be suspended; None: those that cover the pairs. The caller holds them.
    """
    asked = sa.select(rules.c.id).where(rules.c.state == RuleState.SUSPENDED)
    if rule_ids is None:
        asked = asked.where(rules.c.id.in_(sa.select(covering(pairs).c.rule_id)))
    else:
        asked = asked.where(rules.c.id.in_(sorted(rule_ids)))
    if s.execute(asked.limit(1)).scalar() is not None:
        hold_back(s, pairs)


def hold_back(s: Session, pairs: sa.FromClause) -> None:
    """Queued transfers for these pairs wait, unless a rule that is not suspended wants them as well."""
    declared = sa.select(1).where(
        replicas.c.file_id == transfers.c.file_id,
        Unguessed(replicas.c.endpoint_id == transfers.c.target_id),
        # Somebody said that the bytes are there: verifying them is not what was suspended.
        Unguessed(replicas.c.evidence == literal(Evidence.DECLARED)),
    )
    queued = _of(pairs, (TransferState.QUEUED,))
    guards.change_transfers(s, *queued)
    s.execute(
        transfers.update()
        .where(
            *queued,
            sa.not_(_wanted_by(sa.not_(any_of(rules.c.state, (RuleState.SUSPENDED, RuleState.EXPIRED))))),
            sa.not_(Unguessed(sa.exists(declared))),
        )
        .values(
            state=TransferState.WAITING,
            not_before=None,
            reason_code=SUSPENDED,
            reason=_SUSPENDED_REASON,
        )
    )


def begin(s: Session, rule_id: int) -> None:
    """The rule, which the caller holds, was changed: what is queued for it follows, at once if it is little; else
    evaluation goes on."""
    s.execute(rules.update().where(rules.c.id == rule_id).values(followed_to=0, followed_file=0))
    follow(s, rule_id, SLICE_FILES)


def follow(s: Session, rule_id: int, limit_files: int) -> int:
    """The next slice of what is queued is made to fit the rules that want it, as they are now; returns the files that
    were looked at. The caller holds the rule."""
    rule = s.execute(sa.select(rules).where(rules.c.id == rule_id)).one()
    bounds, reached, files = _bounds(s, rule, limit_files)
    if bounds:
        _fit(s, rule, _unclaimed(s, rule_id, bounds))
    unit_id, file_id = reached or (None, 0)
    values: dict[str, Any] = {"followed_to": unit_id, "followed_file": file_id}
    if reached is not None:
        values["evaluate_at"] = s.now
        s.wake.add("evaluation")
    s.execute(rules.update().where(rules.c.id == rule_id).values(**values))
    return files


def _bounds(
    s: Session, rule: sa.Row[Any], limit_files: int
) -> tuple[list[tuple[int, int, int]], tuple[int, int] | None, int]:
    """`(unit, after, upto)` of the next open units, or of a part of the first; up to where that is; and their files."""
    query = (
        sa.select(locks.c.unit_id, sa.func.sum(locks.c.files_total).label("files"), sa.func.count().label("copies"))
        .where(locks.c.rule_id == rule.id, _OPEN, _WISHED, locks.c.unit_id >= rule.followed_to)
        .group_by(locks.c.unit_id)
        .order_by(locks.c.unit_id)
        .limit(max(limit_files, 1) + 1)
    )
    bounds: list[tuple[int, int, int]] = []
    files = 0
    for unit in s.execute(query).all():
        after = rule.followed_file if unit.unit_id == rule.followed_to else 0
        if not bounds and unit.files > limit_files:
            upto = s.execute(
                sa.select(contents.c.child_id)
                .where(contents.c.parent_id == unit.unit_id, contents.c.child_id > after)
                .order_by(contents.c.child_id)
                .offset(max(limit_files // unit.copies, 1) - 1)
                .limit(1)
            ).scalar()
            if upto is not None:
                return [(unit.unit_id, after, upto)], (unit.unit_id, upto), limit_files
        elif bounds and files + unit.files > limit_files:
            return bounds, (unit.unit_id, 0), files
        bounds.append((unit.unit_id, after, _EVERYTHING))
        files += int(unit.files)
    return bounds, None, files


def _unclaimed(s: Session, rule_id: int, bounds: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """`(transfer, file, target)` that no worker holds; nobody else changes them from here on."""
    part = rows_of(s, "followed", {name: sa.BigInteger() for name in ("unit_id", "after", "upto")}, bounds)
    mine = (
        sa.select(part.c.unit_id, locks.c.endpoint_id, part.c.after, part.c.upto)
        .select_from(part)
        .join(locks, sa.and_(locks.c.rule_id == rule_id, locks.c.unit_id == part.c.unit_id))
        .where(Unguessed(_OPEN), Unguessed(_WISHED))
        .subquery("followed_locks")
    )
    held = files_of(mine, after="after", upto="upto")
    same = sa.and_(
        transfers.c.file_id == held.c.file_id,
        Unguessed(transfers.c.target_id == held.c.endpoint_id),
        Unguessed(any_of(transfers.c.state, _UNCLAIMED)),
    )
    query = sa.select(transfers.c.id, transfers.c.file_id, transfers.c.target_id).select_from(held)
    with by_index(s):
        found = s.execute(query.join(transfers, same).distinct()).all()
    return [(row.id, row.file_id, row.target_id) for row in found]


def _fit(s: Session, rule: sa.Row[Any], those: Sequence[tuple[int, int, int]]) -> None:
    """State, priority and activity of these transfers by the rules that want them."""
    if not those:
        return
    batch = rows_of(s, "to_fit", _TRANSFER, sorted(those))
    guards.change_transfers(s, transfers.c.id.in_(sa.select(batch.c.id)))
    decided = _decided(batch)
    queued = transfers.c.state == literal(TransferState.QUEUED)
    goes_on = decided.c.goes_on == 1
    held = sa.and_(queued, decided.c.goes_on == 0, decided.c.declared == 0)
    freed = sa.or_(
        sa.and_(transfers.c.state == literal(TransferState.WAITING), transfers.c.reason_code == SUSPENDED, goes_on),
        # It may be that other sources are allowed now.
        sa.and_(queued, transfers.c.reason_code.in_(("no_source", "no_link", "no_route")), goes_on),
    )
    activity = sa.case((transfers.c.rule_id == rule.id, sa.literal(rule.activity)), else_=transfers.c.activity)
    changed = s.execute(
        transfers.update()
        .where(
            transfers.c.id == decided.c.id,
            Unguessed(any_of(transfers.c.state, _UNCLAIMED)),
            Unguessed(
                sa.or_(held, freed, transfers.c.priority != decided.c.priority, transfers.c.activity != activity)
            ),
        )
        .values(
            state=sa.case(
                (held, literal(TransferState.WAITING)), (freed, literal(TransferState.QUEUED)), else_=transfers.c.state
            ),
            not_before=sa.case((sa.or_(held, freed), sa.null()), else_=transfers.c.not_before),
            reason_code=sa.case((held, SUSPENDED), (freed, sa.null()), else_=transfers.c.reason_code),
            reason=sa.case((held, _SUSPENDED_REASON), (freed, sa.null()), else_=transfers.c.reason),
            priority=decided.c.priority,
            activity=activity,
        )
        .returning(transfers.c.site_id, transfers.c.state)
    )
    _wake(s, {site_id for site_id, state in changed if state is TransferState.QUEUED})


def _decided(batch: sa.FromClause) -> sa.Subquery:
    """`(id, priority, goes_on, declared)` of these transfers."""
    own, of_dataset = alias_of(locks, "own_wish"), alias_of(locks, "dataset_wish")

    def wished(lock: Any) -> sa.ColumnElement[bool]:
        return Unguessed(sa.and_(lock.c.endpoint_id == batch.c.endpoint_id, sa.not_(lock.c.surplus)))

    columns = (batch.c.id, batch.c.file_id, batch.c.endpoint_id)
    by_file = sa.select(*columns, own.c.rule_id).select_from(batch)
    by_file = by_file.join(own, sa.and_(own.c.unit_id == batch.c.file_id, wished(own)))
    by_dataset = sa.select(*columns, of_dataset.c.rule_id).select_from(batch)
    by_dataset = by_dataset.join(contents, contents.c.child_id == batch.c.file_id).join(
        of_dataset, sa.and_(of_dataset.c.unit_id == Computed(contents.c.parent_id), wished(of_dataset))
    )
    wish = sa.union_all(by_file, by_dataset).subquery("wishes")
    # Somebody said that the bytes are there: verifying them is not what was suspended.
    declared = sa.case((replicas.c.evidence == literal(Evidence.DECLARED), 1), else_=0)
    return (
        sa.select(
            wish.c.id,
            sa.func.max(rules.c.priority).label("priority"),
            sa.func.max(sa.case((rules.c.state == literal(RuleState.SUSPENDED), 0), else_=1)).label("goes_on"),
            sa.func.max(declared).label("declared"),
        )
        .select_from(wish)
        .join(rules, rules.c.id == wish.c.rule_id)
        .outerjoin(replicas, of_pair(wish))
        .where(Unguessed(rules.c.state != literal(RuleState.EXPIRED)))
        .group_by(wish.c.id)
        .subquery("decided")
    )


def suspended_go_without(s: Session, rule_id: int) -> None:
    """The rule, which the caller holds, has ended: what only suspended rules want after that waits."""
    shared = _shared_with_suspended(rule_id)
    theirs = shared.with_only_columns(rules.c.id).distinct()
    others = set(s.execute(theirs).scalars())
    if not others:
        return
    held = guards.try_change_rules(s, sorted(others))
    room = SLICE_FILES
    for other in sorted(held):
        s.execute(rules.update().where(rules.c.id == other).values(followed_to=0, followed_file=0, evaluate_at=s.now))
        room -= follow(s, other, room) if room > 0 else 0
    s.wake.add("evaluation")
    if others - held:  # somebody is changing these, and to wait for them here could be to wait in a circle
        busy = shared.where(rules.c.id.in_(sorted(others - held)))
        files = files_of(busy.distinct().subquery("shared"))
        hold_back(s, sa.select(files.c.file_id, files.c.endpoint_id).subquery("shared_pairs"))


def _shared_with_suspended(rule_id: int) -> sa.Select[Any]:
    """Units and endpoints of this rule's open locks that a suspended rule locks, too."""
    other = alias_of(locks, "other")
    return (
        sa.select(locks.c.unit_id, locks.c.endpoint_id)
        .join(
            other,
            sa.and_(
                other.c.unit_id == locks.c.unit_id,
                other.c.endpoint_id == locks.c.endpoint_id,
                other.c.rule_id != locks.c.rule_id,
            ),
        )
        .join(rules, rules.c.id == other.c.rule_id)
        .where(locks.c.rule_id == rule_id, _OPEN, rules.c.state == literal(RuleState.SUSPENDED))
    )


def _of(pairs: sa.FromClause, states: tuple[TransferState, ...]) -> tuple[sa.ColumnElement[bool], ...]:
    wanted = sa.select(pairs.c.file_id, pairs.c.endpoint_id)
    return (
        sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(wanted),
        Unguessed(any_of(transfers.c.state, states)),
    )


def _covers(file_id: sa.ColumnElement[int], endpoint_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    """Of a row of rules: one of its locks wants this file at this endpoint."""
    own, of_dataset = alias_of(locks, "own_wish"), alias_of(locks, "dataset_wish")
    by_file = sa.select(own.c.rule_id).where(
        own.c.unit_id == file_id, Unguessed(own.c.endpoint_id == endpoint_id), own.c.surplus.is_(False)
    )
    by_dataset = (
        sa.select(of_dataset.c.rule_id)
        .select_from(contents)
        .join(of_dataset, of_dataset.c.unit_id == Computed(contents.c.parent_id))
        .where(
            contents.c.child_id == file_id,
            Unguessed(of_dataset.c.endpoint_id == endpoint_id),
            of_dataset.c.surplus.is_(False),
        )
    )
    return rules.c.id.in_(sa.union_all(by_file, by_dataset))


def _wanted_by(which: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    found = sa.select(1).select_from(rules).where(_covers(transfers.c.file_id, transfers.c.target_id), which)
    return Unguessed(sa.exists(found.correlate(transfers)))


def _wake(s: Session, site_ids: set[int]) -> None:
    if site_ids:
        query = sa.select(sites.c.name).where(sites.c.id.in_(sorted(site_ids)))
        s.wake.update(f"site.{name}" for (name,) in s.execute(query))
