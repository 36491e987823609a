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

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards, placing, provision, reasons
from replica.catalog.bulk import ids_of, rows_of
from replica.catalog.membership import (
    Unguessed,
    ancestors,
    any_of,
    by_index,
    closure,
    closure_of,
    covering,
    files_of,
    is_covered,
    literal,
    of_pair,
    units,
)
from replica.catalog.provision import LIVE, PAIR, is_stuck
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session
from replica.db.tables import dids, endpoints, files, locks, replicas, rules, transfers
from rules.endpoints import Endpoint
from rules.errors import InvalidExpression, Refused
from rules.states import (
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

#: Rules in these states have no locks.
_WITHOUT_LOCKS = (RuleState.WAITING_APPROVAL, RuleState.EXPIRED)


# --- contents changed -----------------------------------------------------------------------------------------------


def content_attached(s: Session, parent_id: int, child_ids: Sequence[int]) -> None:
    """These children are new in the parent, which the caller holds."""
    if not child_ids:
        return
    holds_files = _kind(s, parent_id) is DidKind.DATASET
    if not holds_files:
        guards.keep_collections(s, child_ids, nested=True)
    above = _rules_above(s, parent_id)
    if not above:
        return
    if holds_files:
        _files_joined(s, parent_id, child_ids, above)
    else:
        _hold_every_endpoint(s)
        for rule in above:
            tree = closure(_roots(s, child_ids))
            place_units(s, rule, sa.select(units(tree, rule.grouping).subquery().c.unit_id))
    settle(s, [rule.id for rule in above])


def content_detached(s: Session, parent_id: int, child_ids: Sequence[int]) -> None:
    """These children were in the parent, which the caller holds, and are not any more."""
    if not child_ids:
        return
    holds_files = _kind(s, parent_id) is DidKind.DATASET
    if not holds_files:
        guards.keep_collections(s, child_ids, nested=True)
    above = _rules_above(s, parent_id)
    if not above:
        return
    rule_ids = [rule.id for rule in above]
    guards.change_endpoints(s, sa.select(locks.c.endpoint_id).where(locks.c.rule_id.in_(rule_ids)).distinct())
    if holds_files:
        lost = _files_left(s, parent_id, child_ids)
        singles = [rule for rule in above if rule.grouping is Grouping.NONE]
        lost += _units_left(s, singles, child_ids, Grouping.NONE)
    else:
        lost = []
        for grouping in Grouping:
            concerned = [rule for rule in above if rule.grouping is grouping]
            lost += _units_left(s, concerned, child_ids, grouping)
    release(s, _distinct_pairs(s, lost))
    # Copies that were wanted for what has gone are not missing any more.
    for rule in above:
        if rule.copies_missing:
            count_missing(s, rule)
    settle(s, rule_ids)


def hold_for_registration(s: Session, pairs: sa.FromClause, endpoint_id: int, dataset_id: int | None) -> None:
    """What entering these replicas, and putting their files into the dataset, will change: all at once, in order.

    The caller holds the dataset.
    """
    if not s.postgresql:
        return
    concerned = sa.select(covering(pairs).c.rule_id.label("id"))
    if dataset_id is not None:
        above = ancestors(s, [dataset_id])
        of_dataset = sa.select(rules.c.id, rules.c.grouping).where(
            rules.c.did_id.in_(sa.select(above.c.id)), rules.c.state.not_in(_WITHOUT_LOCKS)
        )
        if any(grouping is Grouping.NONE for _, grouping in s.execute(of_dataset)):
            guards.change_rules(s, sa.union(concerned, of_dataset.with_only_columns(rules.c.id)))
            _hold_every_endpoint(s)
            return
        guards.change_rules(s, sa.union(concerned, of_dataset.with_only_columns(rules.c.id)))
    else:
        guards.change_rules(s, concerned)
    there: Any = sa.select(sa.literal(endpoint_id, sa.BigInteger()).label("id"))
    if dataset_id is not None:
        there = sa.union(there, sa.select(locks.c.endpoint_id).where(locks.c.unit_id == dataset_id))
    guards.change_endpoints(s, there)


def _rules_above(s: Session, parent_id: int) -> Sequence[sa.Row[Any]]:
    """The rules that cover what is in the parent; the caller may change them from here on."""
    above = ancestors(s, [parent_id])
    query = (
        sa.select(rules)
        .where(rules.c.did_id.in_(sa.select(above.c.id)), rules.c.state.not_in(_WITHOUT_LOCKS))
        .order_by(rules.c.id)
    )
    return s.execute(query.with_for_update(of=rules, key_share=True) if s.postgresql else query).all()


def _kind(s: Session, did_id: int) -> DidKind:
    kind: DidKind = s.execute(sa.select(dids.c.kind).where(dids.c.id == did_id)).scalar_one()
    return kind


def _roots(s: Session, ids: Sequence[int]) -> sa.Select[Any]:
    batch = ids_of(s, "roots", ids)
    return sa.select(sa.literal(0).label("tag"), batch.c.id)


def _files_joined(s: Session, parent_id: int, file_ids: Sequence[int], above: Sequence[sa.Row[Any]]) -> None:
    singles = [rule for rule in above if rule.grouping is Grouping.NONE]
    if singles:
        _hold_every_endpoint(s)
    else:
        guards.change_endpoints(s, sa.select(locks.c.endpoint_id).where(locks.c.unit_id == parent_id))
    batch = ids_of(s, "joined", file_ids)
    wanted = (
        sa.select(
            batch.c.id.label("file_id"),
            locks.c.endpoint_id,
            sa.func.max(files.c.size_bytes).label("size_bytes"),
            sa.func.min(rules.c.id).label("rule_id"),
            sa.func.max(rules.c.priority).label("priority"),
            sa.func.min(rules.c.activity).label("activity"),
        )
        .select_from(batch)
        .join(files, files.c.did_id == batch.c.id)
        .join(locks, locks.c.unit_id == parent_id)
        .join(rules, rules.c.id == locks.c.rule_id)
        .group_by(batch.c.id, locks.c.endpoint_id)
        .subquery("wanted")
    )
    guards.change_replicas(s, wanted, missing=True)
    _count_files(s, parent_id, wanted, 1)
    held = [rule.id for rule in above]
    if provision.provide(s, wanted, held).left_stuck:
        look_soon(s, held)
    for rule in singles:
        place_units(s, rule, sa.select(batch.c.id), limit_files=len(file_ids) * rule.copies)


def _hold_every_endpoint(s: Session) -> None:
    """Where new units go is not known yet, and endpoints are held in the order of their ids."""
    guards.change_endpoints(s, sa.select(endpoints.c.id))


def _count_files(s: Session, unit_id: int, pairs: sa.FromClause, sign: int) -> None:
    """The files of `pairs`, which has their sizes, came into the unit (1) or went (-1)."""
    available = replicas.c.state == literal(ReplicaState.AVAILABLE)
    stuck = sa.case(
        (replicas.c.state.is_(None), 0), (available, 0), (is_stuck(pairs.c.file_id, pairs.c.endpoint_id), 1), else_=0
    )
    change = (
        sa.select(
            pairs.c.endpoint_id,
            sa.func.count().label("files"),
            sa.func.sum(sa.case((available, 1), else_=0)).label("available"),
            sa.func.sum(stuck).label("stuck"),
            sa.func.sum(pairs.c.size_bytes).label("bytes"),
        )
        .select_from(pairs)
        .outerjoin(replicas, of_pair(pairs))
        .group_by(pairs.c.endpoint_id)
        .subquery("change")
    )
    s.execute(
        locks.update()
        .where(locks.c.unit_id == unit_id, locks.c.endpoint_id == change.c.endpoint_id)
        .values(
            files_total=locks.c.files_total + sign * change.c.files,
            files_available=locks.c.files_available + sign * change.c.available,
            files_stuck=locks.c.files_stuck + sign * change.c.stuck,
            bytes_total=locks.c.bytes_total + sign * change.c.bytes,
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
    _count_files(s, dataset_id, pairs, -1)
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
        .returning(locks.c.unit_id, locks.c.endpoint_id)
    ).all()
    if not removed:
        return []
    batch = rows_of(
        s, "gone_locks", {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}, [tuple(row) for row in removed]
    )
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
    provision.apply_locks(s, rule.id, limit_files)


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
        .where(locks.c.rule_id == rule.id, locks.c.unit_id == unit_id)
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
    have = sa.select(sa.func.count()).select_from(locks).where(locks.c.rule_id == rule.id).scalar_subquery()
    missing = s.execute(sa.select(wanted - have)).scalar_one()
    s.execute(rules.update().where(rules.c.id == rule.id).values(copies_missing=max(0, int(missing))))


# --- replicas changed -----------------------------------------------------------------------------------------------


def replicas_became_available(s: Session, pairs: sa.FromClause) -> None:
    """The replicas of `pairs` (file_id, endpoint_id) were not available before this transaction and now are.

    The caller holds the rules that cover them. Conflict when one was added since then and is being changed.
    """
    guards.change_rules_that_came(s, pairs)
    concerned = count_available(s, pairs, 1)
    this = sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(sa.select(pairs.c.file_id, pairs.c.endpoint_id))
    needless = sa.and_(this, Unguessed(any_of(transfers.c.state, LIVE)))
    guards.change_transfers(s, needless)
    # Not DONE: no worker of ours finished them.
    cancel = {"state": TransferState.CANCELLED, "finished_at": s.now, "lease_until": None, "not_before": None}
    s.execute(
        transfers.update()
        .where(needless)
        .values(**cancel, reason_code="not_needed", reason="the file is at the target already")
    )
    sources_appeared(s, pairs)
    settle(s, concerned)


def count_available(s: Session, pairs: sa.FromClause, sign: int) -> list[int]:
    """These became available (1), or no longer are (-1); their transfers are still as they were before.

    Returns the ids of the rules that noticed; the caller holds them.
    """
    cover = covering(pairs)
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
        .where(
            locks.c.rule_id == change.c.rule_id,
            locks.c.unit_id == change.c.unit_id,
            locks.c.endpoint_id == change.c.endpoint_id,
        )
        .values(
            files_available=locks.c.files_available + sign * change.c.files,
            files_stuck=locks.c.files_stuck - sign * change.c.stuck,
        )
        .returning(locks.c.rule_id)
    )
    return sorted({rule_id for (rule_id,) in changed})


def sources_appeared(s: Session, pairs: sa.FromClause) -> None:
    """Transfers that waited for any good copy of these files need not wait longer."""
    freed = s.execute(
        transfers.update()
        .where(
            transfers.c.file_id.in_(sa.select(pairs.c.file_id)),
            Unguessed(transfers.c.state == literal(TransferState.QUEUED)),
            Unguessed(transfers.c.reason_code == "no_source"),
        )
        .values(not_before=None, reason_code=None, reason=None)
        .returning(transfers.c.site_id)
    )
    provision.wake_sites(s, {site_id for (site_id,) in freed})


# --- releasing ------------------------------------------------------------------------------------------------------


def release(s: Session, pairs: sa.FromClause, ignoring_rule: int | None = None) -> None:
    """What no rule (but `ignoring_rule`) protects any more, of `pairs`: transfers stop, copies may be deleted.

    Copies that had not come yet, and for which no worker holds a lease, vanish and give back their space. The caller
    holds the rules and the endpoints of the pairs.
    """
    with by_index(s):
        unfinished = _unfinished(s, pairs, ignoring_rule)
        if unfinished:
            _stop(s, unfinished)
        s.execute(
            replicas.update()
            .where(
                of_pair(pairs),
                Unguessed(replicas.c.tombstone_at.is_(None)),
                sa.not_(is_covered(replicas.c.file_id, replicas.c.endpoint_id, ignoring_rule)),
            )
            .values(tombstone_at=s.now)
        )


def _unfinished(s: Session, pairs: sa.FromClause, ignoring_rule: int | None) -> Sequence[sa.Row[Any]]:
    """Replicas of `pairs` that nobody wants and that are not there, with whether a worker is at it."""
    guards.change_replicas(s, pairs, missing=True)
    leased = sa.exists(
        sa.select(1).where(
            transfers.c.file_id == replicas.c.file_id,
            transfers.c.target_id == replicas.c.endpoint_id,
            any_of(transfers.c.state, TRANSFER_LEASED),
        )
    )
    return s.execute(
        sa.select(
            replicas.c.file_id, replicas.c.endpoint_id, replicas.c.state, files.c.size_bytes, leased.label("leased")
        )
        .select_from(pairs)
        .join(replicas, of_pair(pairs))
        .join(files, files.c.did_id == replicas.c.file_id)
        .where(
            Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE)),
            # Somebody said that the bytes are there: verifying them goes on, whoever wanted them as well.
            Unguessed(replicas.c.evidence.is_distinct_from(Evidence.DECLARED)),
            sa.not_(is_covered(replicas.c.file_id, replicas.c.endpoint_id, ignoring_rule)),
        )
        .distinct()
    ).all()


def _stop(s: Session, unfinished: Sequence[sa.Row[Any]]) -> None:
    batch = rows_of(s, "unfinished", PAIR, [(row.file_id, row.endpoint_id) for row in unfinished])
    wanted = sa.select(batch.c.file_id, batch.c.endpoint_id)
    live = sa.and_(
        sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(wanted), Unguessed(any_of(transfers.c.state, LIVE))
    )
    guards.change_transfers(s, live)
    s.execute(
        transfers.update()
        .where(live)
        .values(
            state=TransferState.CANCELLED,
            finished_at=s.now,
            lease_until=None,
            not_before=None,
            reason_code="not_wanted",
            reason="no rule wants this copy any more",
        )
    )
    vanish = [row for row in unfinished if row.state is ReplicaState.COPYING and not row.leased]
    if vanish:
        gone = rows_of(s, "vanishing", PAIR, [(row.file_id, row.endpoint_id) for row in vanish])
        s.execute(
            replicas.delete().where(
                sa.tuple_(replicas.c.file_id, replicas.c.endpoint_id).in_(sa.select(gone.c.file_id, gone.c.endpoint_id))
            )
        )
        freed: Counter[int] = Counter()
        for row in vanish:
            freed[row.endpoint_id] -= row.size_bytes
        provision.book(s, freed)


def _distinct_pairs(s: Session, pairs: Collection[tuple[int, int]]) -> sa.FromClause:
    return rows_of(s, "released", PAIR, sorted(set(pairs)))
