"""Locks: "rule r protects unit u at endpoint e", kept true while contents and replicas change below them.

Given     what just changed in this transaction: children attached or detached, replicas that became available.
Returns   nothing; counters, replicas, transfers and states of the rules concerned are as if evaluated anew.
Promises  a file attached to a unit under rules is protected at once. The cost follows what changed, never the size of
          the unit; statements do not grow with the number of files. Counters move by what changed and agree with a
          recount at every commit.
Partner   called by replica.catalog.dids, .replicas and .outcomes inside their transactions. The order in which rows
          are held is in replica.catalog.guards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

from replica.catalog import guards, hops, placing, provision, reasons, totals, usage
from replica.catalog.bulk import Batch, ids_of, rows_of
from replica.catalog.membership import (
    Unguessed,
    ancestors,
    ancestors_of,
    any_of,
    by_index,
    closure,
    closure_of,
    covering,
    files_of,
    is_covered,
    literal,
    looked_up,
    of_pair,
    units,
)
from replica.catalog.provision import LIVE, count_available, is_stuck
from replica.catalog.removable import Choice, among, one_of
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session
from replica.db.tables import EPOCH, Instant, contents, dids, endpoints, files, locks, replicas, rules, transfers
from rules.endpoints import Endpoint
from rules.errors import InvalidExpression, Refused
from rules.states import (
    RULE_WITHOUT_LOCKS,
    TRANSFER_LEASED,
    DidKind,
    Evidence,
    Grouping,
    ReplicaState,
    RuleState,
    TransferState,
)

#: How many files one transaction works off when a person waits for it; unattended work takes the rest.
SLICE_FILES = 5_000
#: How many units are placed in one transaction.
SLICE_UNITS = 10_000

_PARENT = Batch("parent", {"id": sa.BigInteger()})
_CHANGE = Batch("change", {name: sa.BigInteger() for name in ("id", "files", "available", "stuck", "bytes")})
#: A rule that has ended and is due still has some locks, which are being removed (see replica.catalog.releasing).
_MAY_HAVE_LOCKS = sa.or_(
    rules.c.state.not_in(tuple(RULE_WITHOUT_LOCKS)),
    sa.and_(rules.c.state == literal(RuleState.EXPIRED), rules.c.evaluate_at.is_not(None)),
)


# --- contents changed -----------------------------------------------------------------------------------------------


def content_attached(
    s: Session, parent_id: int, parent_kind: DidKind, child_ids: Sequence[int], batch: sa.FromClause
) -> None:
    """These children, `batch` (id), are new in the parent. The caller holds it and them."""
    shared = parent_kind is DidKind.DATASET and totals.joined(s, parent_id, batch, len(child_ids))
    above = _rules_above(s, parent_id)
    if not above:
        return
    if parent_kind is DidKind.DATASET:
        _files_joined(s, parent_id, batch, len(child_ids), above, shared)
    else:
        _hold_every_endpoint(s)
        for rule in _alive(above):
            tree = closure(_roots(s, child_ids))
            place_units(s, rule, sa.select(units(tree, rule.grouping).subquery().c.unit_id))
    settle(s, [rule.id for rule in _alive(above)], held=True)


def content_detached(s: Session, parent_id: int, child_ids: Sequence[int]) -> None:
    """These children were in the parent, which the caller holds, and are not any more."""
    if not child_ids:
        return
    holds_files = _kind(s, parent_id) is DidKind.DATASET
    if holds_files:
        totals.left(s, parent_id, child_ids)
    else:
        guards.keep_collections(s, child_ids, nested=True)
    above = _rules_above(s, parent_id)
    if not above:
        return
    rule_ids = [rule.id for rule in above]
    guards.change_endpoints(s, sa.select(locks.c.endpoint_id).where(locks.c.rule_id.in_(rule_ids)).distinct())
    if holds_files:
        lost = _files_left(s, parent_id, child_ids)
        changed = _with_surplus(s, rule_ids)
        singles = [rule for rule in above if rule.grouping is Grouping.NONE or rule.id in changed]
        lost += _units_left(s, singles, child_ids, Grouping.NONE)
    else:
        lost = []
        changed = _with_surplus(s, rule_ids)
        for grouping in Grouping:
            concerned = [rule for rule in above if rule.grouping is grouping or rule.id in changed]
            lost += _units_left(s, concerned, child_ids, grouping)
    release(s, _parts_of(s, lost))
    # Copies that were wanted for what has gone are not missing any more.
    for rule in above:
        if rule.copies_missing:
            count_missing(s, rule)
    settle(s, [rule.id for rule in _alive(above)])


def _with_surplus(s: Session, rule_ids: Sequence[int]) -> set[int]:
    """Those that keep copies they do not wish any more, maybe of units of another grouping."""
    found = sa.select(locks.c.rule_id).where(locks.c.rule_id.in_(rule_ids), locks.c.surplus)
    return set(s.execute(found.distinct()).scalars())


def hold_for_registration(s: Session, pairs: sa.FromClause | None, endpoint_id: int, dataset_id: int | None) -> None:
    """What entering these replicas, and putting their files into the dataset, will change: all at once, in order.
    `pairs` are those of files that were known before; None: all are new.

    The caller holds the dataset.
    """
    if not s.postgresql:
        return
    concerned = [] if pairs is None else [sa.select(covering(pairs).c.rule_id.label("id"))]
    if dataset_id is not None:
        above = ancestors(s, [dataset_id])
        of_dataset = sa.select(rules.c.id, rules.c.grouping).where(
            rules.c.did_id.in_(sa.select(above.c.id)), _MAY_HAVE_LOCKS
        )
        guards.change_rules(s, sa.union(*concerned, of_dataset.with_only_columns(rules.c.id)))
        if any(grouping is Grouping.NONE for _, grouping in s.execute(of_dataset)):
            _hold_every_endpoint(s)
            return
    elif concerned:
        guards.change_rules(s, *concerned)
    there: Any = sa.select(sa.literal(endpoint_id, sa.BigInteger()).label("id"))
    if dataset_id is not None:
        there = sa.union(there, sa.select(locks.c.endpoint_id).where(locks.c.unit_id == dataset_id))
    guards.change_endpoints(s, there)


def _has_begun(s: Session, rule: sa.Row[Any]) -> bool:
    """Whether the rule, which the caller holds, covers what is in its DID; else evaluation will see what is there then.

    By another clock it may have begun already.
    """
    return rule.not_before is None or rule.not_before <= s.now or rule.evaluate_at != rule.not_before


def _rules_above(s: Session, parent_id: int) -> Sequence[sa.Row[Any]]:
    """The rules that cover what is in the parent; the caller may change them from here on."""
    held = s.execute(_hold_above(s.postgresql), _PARENT.holding(s, [(parent_id,)])).all()
    return [rule for rule in held if _has_begun(s, rule)]


@cache
def _hold_above(postgresql: bool) -> sa.Select[Any]:
    above = ancestors_of(_PARENT.rows(postgresql), postgresql)
    query = sa.select(rules).where(rules.c.did_id.in_(sa.select(above.c.id)), _MAY_HAVE_LOCKS).order_by(rules.c.id)
    return query.with_for_update(of=rules, key_share=True) if postgresql else query


def _alive(above: Sequence[sa.Row[Any]]) -> list[sa.Row[Any]]:
    return [rule for rule in above if rule.state is not RuleState.EXPIRED]


def _kind(s: Session, did_id: int) -> DidKind:
    kind: DidKind = s.execute(sa.select(dids.c.kind).where(dids.c.id == did_id)).scalar_one()
    return kind


def _roots(s: Session, ids: Sequence[int]) -> sa.Select[Any]:
    batch = ids_of(s, "roots", ids)
    return sa.select(sa.literal(0).label("tag"), batch.c.id)


def _files_joined(
    s: Session, parent_id: int, batch: sa.FromClause, count: int, above: Sequence[sa.Row[Any]], shared: bool
) -> None:
    singles = [rule for rule in _alive(above) if rule.grouping is Grouping.NONE]
    there = _locks_held(s, parent_id, every_endpoint=bool(singles))
    if there:
        every = _by_endpoint(there)
        pairs = _at(s, "locked_at", batch, every)
        counts = _counts(s, pairs)
        if any(row.rows > row.available for row in counts):
            # Who changes these now waits, or we wait for him and see what he did.
            guards.change_replicas(s, pairs, missing=True)
            counts = _counts(s, pairs)
        _count_files(s, parent_id, counts, 1)
        if shared:
            usage.files_joined(s, parent_id, batch)
        else:
            holders = {(lock.account_id, lock.endpoint_id) for lock in there}
            usage.unshared_joined(s, holders, count, int(counts[0].bytes))
        _provide_joined(s, batch, every, counts, [rule.id for rule in above])
    for rule in singles:
        place_units(s, rule, sa.select(batch.c.id), limit_files=count * rule.copies)


def _locks_held(s: Session, unit_id: int, *, every_endpoint: bool) -> Sequence[sa.Row[Any]]:
    """The locks on the unit, and of their rules what provision takes; their endpoints are held from here on."""
    ended = rules.c.state == literal(RuleState.EXPIRED)
    query = (
        sa.select(
            locks.c.endpoint_id,
            rules.c.id.label("rule_id"),
            rules.c.priority,
            rules.c.activity,
            rules.c.account_id,
            sa.or_(locks.c.surplus, ended).label("given_up"),
        )
        .join(rules, rules.c.id == locks.c.rule_id)
        .join(endpoints, endpoints.c.id == locks.c.endpoint_id)
        .where(locks.c.unit_id == unit_id)
        .order_by(endpoints.c.id)
    )
    if every_endpoint:
        _hold_every_endpoint(s)
    elif s.postgresql:
        query = query.with_for_update(of=endpoints, key_share=True)
    return s.execute(query).all()


def _by_endpoint(there: Sequence[sa.Row[Any]]) -> list[tuple[Any, ...]]:
    """`(endpoint, rule, priority, activity, given up by all)` of locks in the order of their endpoints."""
    answer = []
    for endpoint_id, some in itertools.groupby(there, key=lambda lock: lock.endpoint_id):
        here = list(some)
        first = min(lock.rule_id for lock in here), max(lock.priority for lock in here)
        last = min(lock.activity for lock in here), all(lock.given_up for lock in here)
        answer.append((endpoint_id, *first, *last))
    return answer


def _provide_joined(
    s: Session, batch: sa.FromClause, every: Sequence[tuple[Any, ...]], counts: Sequence[sa.Row[Any]], held: list[int]
) -> None:
    """Make what is missing of files that joined a unit, where a lock wishes them. The caller holds the endpoints, so
    what is there and protected stays so."""
    missing = {row.endpoint_id: row.rows for row in counts if row.available < row.files or row.released}
    wished = [row for row in every if not row[-1] and row[0] in missing]
    if wished:
        wanted = _at(s, "wished_at", batch, wished)
        pairs = len(wished) * counts[0].files
        none_there = not any(missing[row[0]] for row in wished)
        if provision.provide(s, wanted, held, pairs, none_there=none_there).left_stuck:
            look_soon(s, held)


def _at(s: Session, name: str, batch: sa.FromClause, there: Sequence[tuple[Any, ...]]) -> sa.Subquery:
    """What provision takes: each of these files at each of these endpoints."""
    columns = {"endpoint_id": sa.BigInteger(), "rule_id": sa.BigInteger(), "priority": sa.SmallInteger()}
    at = rows_of(s, name, {**columns, "activity": sa.String()}, [row[:4] for row in there])
    sizes = sa.select(files.c.did_id.label("file_id"), files.c.size_bytes)
    sized, walk = looked_up(s.postgresql, batch, files.c.did_id, sizes, "sized")
    return sa.select(*sized.c, *at.c).select_from(walk.join(at, sa.true())).subquery(f"files_{name}")


def _hold_every_endpoint(s: Session) -> None:
    """Where new units go is not known yet, and endpoints are held in the order of their ids."""
    guards.change_endpoints(s, sa.select(endpoints.c.id))


def _counts(s: Session, pairs: sa.FromClause) -> Sequence[sa.Row[Any]]:
    """Of `pairs`, which has the sizes of files, by endpoint: how many files and bytes, how many of them have a replica
    there, and in which state."""
    available = replicas.c.state == literal(ReplicaState.AVAILABLE)
    stuck = sa.case(
        (replicas.c.state.is_(None), 0), (available, 0), (is_stuck(pairs.c.file_id, pairs.c.endpoint_id), 1), else_=0
    )
    query = (
        sa.select(
            pairs.c.endpoint_id,
            sa.func.count().label("files"),
            sa.func.sum(pairs.c.size_bytes).label("bytes"),
            sa.func.count(replicas.c.file_id).label("rows"),
            sa.func.sum(sa.case((available, 1), else_=0)).label("available"),
            sa.func.sum(stuck).label("stuck"),
            sa.func.count(replicas.c.tombstone_at).label("released"),
        )
        .select_from(pairs)
        .outerjoin(replicas, of_pair(pairs))
        .group_by(pairs.c.endpoint_id)
    )
    return s.execute(query).all()


def _count_files(s: Session, unit_id: int, counts: Sequence[sa.Row[Any]], sign: int) -> None:
    """So many files came into the unit (1) or went (-1)."""
    changes = [
        (row.endpoint_id, *(sign * int(n) for n in (row.files, row.available, row.stuck, row.bytes))) for row in counts
    ]
    s.execute(_add_to_locks(s.postgresql), {**_CHANGE.holding(s, changes), "unit": unit_id})


@cache
def _add_to_locks(postgresql: bool) -> sa.Update:
    change = _CHANGE.rows(postgresql)
    return (
        locks.update()
        .where(locks.c.unit_id == sa.bindparam("unit", type_=sa.BigInteger()), locks.c.endpoint_id == change.c.id)
        .values(
            files_total=locks.c.files_total + change.c.files,
            files_available=locks.c.files_available + change.c.available,
            files_stuck=locks.c.files_stuck + change.c.stuck,
            bytes_total=locks.c.bytes_total + change.c.bytes,
        )
    )


def _files_left(s: Session, dataset_id: int, file_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Uncount files in the locks on their former dataset; returns the pairs that these protected."""
    batch = ids_of(s, "left_files", file_ids)
    pairs = (
        sa.select(batch.c.id.label("file_id"), locks.c.endpoint_id, files.c.size_bytes)
        .select_from(batch)
        .join(files, files.c.did_id == batch.c.id)
        .join(locks, locks.c.unit_id == dataset_id)
        .distinct()
        .subquery("pairs")
    )
    guards.change_replicas(s, pairs, missing=True)
    _count_files(s, dataset_id, _counts(s, pairs), -1)
    usage.files_left(s, dataset_id, batch)
    where = s.execute(sa.select(locks.c.endpoint_id).where(locks.c.unit_id == dataset_id).distinct()).scalars().all()
    return [(file_id, endpoint_id) for endpoint_id in where for file_id in file_ids]


def _units_left(
    s: Session, concerned: Sequence[sa.Row[Any]], child_ids: Sequence[int], grouping: Grouping
) -> list[tuple[int, int]]:
    """Remove the locks of rules on units that are no longer below their DID; returns the pairs these protected."""
    if not concerned:
        return []
    gone_roots = closure(_roots(s, child_ids), "gone")
    gone = units(gone_roots, grouping).subquery("gone_units")
    own = rows_of(
        s, "own_roots", {"tag": sa.BigInteger(), "id": sa.BigInteger()}, [(r.id, r.did_id) for r in concerned]
    )
    kept = units(closure(sa.select(own.c.tag, own.c.id), "kept"), grouping).subquery("kept_units")
    removed = s.execute(
        locks.delete()
        .where(
            locks.c.rule_id.in_([rule.id for rule in concerned]),
            locks.c.unit_id.in_(sa.select(gone.c.unit_id)),
            sa.tuple_(locks.c.rule_id, locks.c.unit_id).not_in(sa.select(kept.c.tag, kept.c.unit_id)),
        )
        .returning(locks.c.rule_id, locks.c.unit_id, locks.c.endpoint_id)
    ).all()
    if not removed:
        return []
    usage.discharge(s, [(rule_id, unit_id, endpoint_id) for rule_id, unit_id, endpoint_id in removed])
    columns = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}
    batch = rows_of(s, "gone_locks", columns, [(unit_id, endpoint_id) for _, unit_id, endpoint_id in removed])
    held = files_of(batch)
    return [(f, e) for f, e in s.execute(sa.select(held.c.file_id, held.c.endpoint_id).distinct())]


# --- placing --------------------------------------------------------------------------------------------------------


def place_units(
    s: Session,
    rule: sa.Row[Any],
    which: sa.Select[Any],
    *,
    among: tuple[Endpoint, ...] | None = None,
    limit_files: int = SLICE_FILES,
) -> None:
    """Place what `which` (unit ids) still lacks and work off a first slice; the caller holds the rule.

    What is too much for one transaction, or impossible now, is left to evaluation.
    """
    lacking, more = next_units(s, rule, which)
    if lacking:
        if among is None:
            among = _candidates_or_none(s, rule)
        proposal = placing.place(s, placing.Wanted.of(rule), lacking, among)
        reasons.add(s, proposal.reasons(rule.id))
        if proposal.refusals or rule.copies_missing:
            count_missing(s, rule)
    if more and rule.placed_to is None:
        s.execute(rules.update().where(rules.c.id == rule.id).values(placed_to=0))
    if not more or not places_all_first(rule):
        provision.apply_locks(s, rule.id, limit_files)


def places_all_first(rule: sa.Row[Any]) -> bool:
    """Datasets may share files: if what was chosen for some were made before the others are chosen for, space that is
    reserved twice would be given back in between, and no plan could tell where these go."""
    grouping: Grouping = rule.grouping
    return grouping is Grouping.DATASET


def _candidates_or_none(s: Session, rule: sa.Row[Any]) -> tuple[Endpoint, ...]:
    """An expression that selects nothing any more must not keep files out of a dataset: the rule gets stuck instead."""
    try:
        return placing.candidates(s, rule.expression)
    except (Refused, InvalidExpression) as error:
        reasons.add(s, [reasons.Found(rule.id, "no_candidates", None, error.message, error.hint, 1)])
        return ()


def next_units(
    s: Session, rule: sa.Row[Any], which: sa.Select[Any], after: int | None = None
) -> tuple[list[int], bool]:
    """Unit ids of `which` with fewer locks than copies, by id; and whether there are more than one slice of them."""
    wanted = which.subquery("which")
    unit_id = next(iter(wanted.c))
    have = (
        sa.select(sa.func.count())
        .select_from(locks)
        .where(locks.c.rule_id == rule.id, locks.c.unit_id == unit_id, sa.not_(locks.c.surplus))
        .scalar_subquery()
    )
    query = sa.select(unit_id).where(have < rule.copies).order_by(unit_id)
    if after is not None:
        query = query.where(unit_id > after)
    if rule.grouping is not Grouping.ALL:
        query = query.limit(SLICE_UNITS + 1)
    found = list(s.execute(query).scalars())
    if rule.grouping is Grouping.ALL or len(found) <= SLICE_UNITS:
        return found, False
    return found[:SLICE_UNITS], True


def units_of_rule(rule: sa.Row[Any]) -> sa.Select[Any]:
    """`(unit_id)` of everything below the rule's DID."""
    return units_of(rule.did_id, rule.grouping)


def units_of(did_id: int, grouping: Grouping) -> sa.Select[Any]:
    found = units(closure_of(did_id), grouping).subquery("units_of_did")
    return sa.select(found.c.unit_id)


def count_missing(s: Session, rule: sa.Row[Any]) -> None:
    """Write down how many copies of units have no lock; exact while no round of placement is under way."""
    every = units_of_rule(rule).subquery()
    wanted = sa.select(sa.func.count()).select_from(every).scalar_subquery() * rule.copies
    wished = locks.c.rule_id == rule.id, sa.not_(locks.c.surplus)
    have = sa.select(sa.func.count()).select_from(locks).where(*wished).scalar_subquery()
    missing = s.execute(sa.select(wanted - have)).scalar_one()
    s.execute(rules.update().where(rules.c.id == rule.id).values(copies_missing=max(0, int(missing))))


# --- replicas changed -----------------------------------------------------------------------------------------------


def replicas_became_available(s: Session, pairs: sa.FromClause, *, none_there: bool = False) -> None:
    """The replicas of `pairs` (file_id, endpoint_id) were not available before this transaction and now are.

    `none_there`: none of them was there at all, so none was counted as stuck, whatever failed or was cancelled once.
    The caller holds the rules that cover them. Conflict when one was added since then and is being changed.
    """
    guards.change_rules_that_came(s, pairs)
    concerned = count_available(s, pairs, 1, none_stuck=none_there)
    end_needless(s, pairs)
    sources_appeared(s, pairs)
    settle(s, concerned)


def end_needless(s: Session, pairs: sa.FromClause) -> None:
    """What should be brought is there. Cancelled, not DONE: no worker of ours finished these transfers."""
    _cancel(s, pairs, "not_needed", "the file is at the target already")


def _cancel(s: Session, pairs: sa.FromClause, code: str, reason: str) -> None:
    this = sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(sa.select(pairs.c.file_id, pairs.c.endpoint_id))
    live = sa.and_(this, Unguessed(any_of(transfers.c.state, LIVE)))
    guards.change_transfers(s, live)
    provision.cancel(s, live, code, reason)


def sources_appeared(s: Session, pairs: sa.FromClause) -> None:
    """Transfers that waited for any good copy of these files need not wait longer."""
    freed = s.execute(
        transfers.update()
        .where(
            transfers.c.file_id.in_(sa.select(pairs.c.file_id)),
            Unguessed(transfers.c.state == literal(TransferState.QUEUED)),
            Unguessed(sa.or_(transfers.c.reason_code.in_(hops.FOR_A_SOURCE), transfers.c.waits_for != "")),
            hops.can_go_on(pairs),
        )
        .values(not_before=None, reason_code=None, reason=None, waits_for="")
        .returning(transfers.c.site_id)
    )
    provision.wake_sites(s, {site_id for (site_id,) in freed})
    hops.arrived(s, pairs)


# --- releasing ------------------------------------------------------------------------------------------------------


#: Of a unit, as `after` and `upto`: all files.
WHOLE = (0, 2**63 - 1)
#: Of a file and an endpoint.
Condition = Callable[[sa.ColumnElement[int], sa.ColumnElement[int]], sa.ColumnElement[bool]]


@dataclass(frozen=True, slots=True)
class Part:
    """Files at one endpoint, which a lock protected, or several."""

    endpoint_id: int
    files: Choice
    #: No other lock can be there that covers any of them: none has to be looked for, file by file.
    alone: bool = False
    #: All of them are there: nothing has to be stopped.
    complete: bool = False


def files_of_units(s: Session, units: Sequence[tuple[int, int, int]]) -> Choice:
    """The files of these `(unit_id, after, upto)`, with an id greater than the one and at most the other. They stay in
    the database: not a join, which PostgreSQL would now and then begin with all replicas there are."""

    def is_one(column: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
        columns = {name: sa.BigInteger() for name in ("unit_id", "after", "upto")}
        batch = rows_of(s, "units_of_part", columns, units)
        held = (
            sa.select(contents.c.child_id)
            .join_from(batch, contents, contents.c.parent_id == batch.c.unit_id)
            .where(contents.c.child_id > batch.c.after, contents.c.child_id <= batch.c.upto)
        )
        single = sa.select(files.c.did_id).join_from(batch, files, files.c.did_id == batch.c.unit_id)
        both = sa.union_all(held, single)
        if not s.postgresql:
            return column.in_(both)
        return column == sa.any_(sa.func.array(both.scalar_subquery(), type_=ARRAY(sa.BigInteger())))

    return is_one


def release(s: Session, parts: Iterable[Part], ignoring_rule: int | None = None, *, purge: bool = False) -> None:
    """What no rule (but `ignoring_rule`) protects any more, of `parts`: transfers stop, copies may be deleted.

    Copies that had not come yet, and for which no worker holds a lease, vanish and give back their space. The caller
    holds the rules and the endpoints of the parts. `purge`: copies shall go at once, not when space is needed. What
    comes to be a step of a route is not stopped. At most six statements for a part.
    """
    steps = hops.any_open(s)

    def is_protected(file_id: sa.ColumnElement[int], endpoint_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
        return is_covered(file_id, endpoint_id, ignoring_rule, ignoring_ended=True)

    with by_index(s):
        for part in parts:
            protected = None if part.alone else is_protected
            if not part.complete:
                stop_unfinished(s, part, _or_a_step(protected) if steps else protected)
            _may_be_deleted(s, part, protected, purge)


def _or_a_step(condition: Condition | None) -> Condition:
    if condition is None:
        return hops.is_hop
    return lambda file_id, endpoint_id: sa.or_(condition(file_id, endpoint_id), hops.is_hop(file_id, endpoint_id))


def let_go(s: Session, pairs: Collection[tuple[int, int]]) -> None:
    """Nothing needs these any more but rules, if any does: the others go at once. The caller holds the endpoints."""
    release(s, _parts_of(s, pairs), purge=True)


def _may_be_deleted(s: Session, part: Part, is_protected: Condition | None, purge: bool) -> None:
    since, at = replicas.c.tombstone_at, sa.literal(EPOCH if purge else s.now, Instant())
    # What a worker may still publish goes an hour later, and needs no purge for it (see rules.deletion).
    came = sa.or_(replicas.c.state != literal(ReplicaState.COPYING), replicas.c.evidence == literal(Evidence.DECLARED))
    s.execute(
        replicas.update()
        .where(
            part.files(replicas.c.file_id),
            Unguessed(replicas.c.endpoint_id == part.endpoint_id),
            Unguessed(sa.or_(since.is_(None), sa.and_(came, since > EPOCH)) if purge else since.is_(None)),
            *_not(is_protected),
        )
        .values(tombstone_at=sa.case((came, at), else_=sa.literal(s.now, Instant())))
    )


def _not(condition: Condition | None) -> Iterator[sa.ColumnElement[bool]]:
    if condition is not None:
        yield sa.not_(condition(replicas.c.file_id, replicas.c.endpoint_id))


def stop_unfinished(s: Session, part: Part, is_wanted: Condition | None) -> None:
    """Of the part, what is not there and not wanted is not brought any more. What no worker is at vanishes."""
    unfinished = _unfinished(s, part, is_wanted)
    if unfinished:
        _stop(s, part.endpoint_id, unfinished)


def _unfinished(s: Session, part: Part, is_wanted: Condition | None) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    """`(file, bytes, copying)` of the replicas that are neither wanted nor there, which are held from here on."""
    size = sa.select(files.c.size_bytes).where(files.c.did_id == replicas.c.file_id).scalar_subquery()
    query = (
        sa.select(replicas.c.file_id, size, Unguessed(replicas.c.state == literal(ReplicaState.COPYING)))
        .where(
            part.files(replicas.c.file_id),
            Unguessed(replicas.c.endpoint_id == part.endpoint_id),
            Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE)),
            # Somebody said that the bytes are there: verifying them goes on, whoever wanted them as well.
            Unguessed(replicas.c.evidence.is_distinct_from(literal(Evidence.DECLARED))),
            *_not(is_wanted),
        )
        .order_by(replicas.c.file_id)
    )
    return s.execute(query.with_for_update(of=replicas, key_share=True) if s.postgresql else query).all()


def _stop(s: Session, endpoint_id: int, unfinished: Sequence[sa.Row[*tuple[Any, ...]]]) -> None:
    query = (
        sa.select(transfers.c.id, transfers.c.file_id, Unguessed(any_of(transfers.c.state, TRANSFER_LEASED)))
        .where(
            one_of(s, transfers.c.file_id, [file_id for file_id, _, _ in unfinished]),
            Unguessed(transfers.c.target_id == endpoint_id),
            any_of(transfers.c.state, LIVE),
        )
        .order_by(transfers.c.id)
    )
    # Held before it is asked whether a worker is at them: from here on none begins.
    live = s.execute(query.with_for_update(of=transfers, key_share=True) if s.postgresql else query).all()
    if live:
        these = one_of(s, transfers.c.id, [id_ for id_, _, _ in live])
        provision.cancel(s, these, "not_wanted", "no rule wants this copy any more")
    leased = {file_id for _, file_id, leased in live if leased}
    vanish = [(file_id, size) for file_id, size, copying in unfinished if copying and file_id not in leased]
    if vanish:
        gone = one_of(s, replicas.c.file_id, [file_id for file_id, _ in vanish])
        s.execute(replicas.delete().where(gone, Unguessed(replicas.c.endpoint_id == endpoint_id)))
        provision.book(s, {endpoint_id: -sum(size for _, size in vanish)})


def _parts_of(s: Session, pairs: Collection[tuple[int, int]]) -> Iterator[Part]:
    by_endpoint: dict[int, set[int]] = {}
    for file_id, endpoint_id in pairs:
        by_endpoint.setdefault(endpoint_id, set()).add(file_id)
    for endpoint_id, file_ids in sorted(by_endpoint.items()):
        yield Part(endpoint_id, among(s, file_ids))
