"""Look again at rules that are due: place what is missing, work off slices, repair what got stuck.

Given     nothing but the time: `evaluate_at` says which rules are due.
Returns   how much was done; 0 when nothing is due.
Promises  one rule in one transaction and one bounded slice of it, the longest due first, so no rule holds up another;
          a rule whose evaluation fails gets a reason and a later turn. Safe to run twice at once.
Partner   workers.evaluation calls it until it returns 0; replica.catalog.rule_states plans the next look.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from replica.catalog import (
    guards,
    integrity,
    locks,
    placing,
    provision,
    reasons,
    releasing,
    relocation,
    rule_changes,
    rule_transfers,
)
from replica.catalog.bulk import rows_of
from replica.catalog.membership import Unguessed, covering, files_of, literal, of_pair
from replica.catalog.rule_states import settle
from replica.db.engine import Session
from replica.db.tables import endpoints, replicas, rules
from replica.db.tables import locks as locks_table
from replica.db.tables import reasons as reasons_table
from replica.log import get_logger
from rules.endpoints import Endpoint
from rules.errors import Conflict, InvalidExpression, Refused, ReplicaError
from rules.states import ReplicaState, RuleState

#: When copies that another rule wants as well could not be tried again, because somebody was changing that rule.
POSTPONE_SECONDS = 5
#: What PostgreSQL calls a statement that ran into its time limit. Tried at once again, the rule would always be first.
_TOOK_TOO_LONG = "57014"

#: A suspended rule goes on covering what comes: only its transfers wait.
_NOT_EVALUATED = (RuleState.WAITING_APPROVAL,)


def evaluate_due(s: Session, limit_files: int = 20_000) -> int:
    """One slice of the rule that is due longest; returns the files worked on plus one, or 0 when no rule is due."""
    due = (
        sa.select(rules)
        .where(
            rules.c.evaluate_at <= s.now,
            rules.c.state.not_in(_NOT_EVALUATED),
            sa.or_(rules.c.not_before.is_(None), rules.c.not_before <= s.now),
        )
        .order_by(rules.c.evaluate_at, rules.c.id)
        .limit(1)
    )
    rule = s.execute(due.with_for_update(skip_locked=True, key_share=True) if s.postgresql else due).one_or_none()
    if rule is None:
        return 0
    try:
        with s.savepoint():
            worked = _evaluate(s, rule, limit_files)
    except Conflict:  # somebody is changing a rule that wants the same copies: after them
        _look_again(s, rule, timedelta(seconds=POSTPONE_SECONDS))
        return 1
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _TOOK_TOO_LONG:
            raise  # the database itself: nothing can be noted there now
        _note_failure(s, rule, error)
        return 1
    except (ReplicaError, DBAPIError) as error:
        _note_failure(s, rule, error)
        return 1
    return worked + 1


def _evaluate(s: Session, rule: sa.Row[Any], limit_files: int) -> int:
    if rule.state is RuleState.EXPIRED:  # and much of what it protected is not released yet
        return releasing.go_on(s, rule, limit_files)
    if rule.followed_to is not None:
        return _settled(s, rule, rule_transfers.follow(s, rule.id, min(limit_files, rule_transfers.SLICE_FILES)))
    if rule.revised_to is not None:
        _hold_endpoints(s, rule, every=True)
        return _settled(s, rule, rule_changes.revise(s, rule))
    if rule.placed_to is None and relocation.has_to_let_go(s, rule.id):
        _hold_endpoints(s, rule, every=False)
        return _settled(s, rule, relocation.let_go(s, rule.id, limit_files))
    if relocation.is_satisfied_with_surplus(s, rule):
        _hold_endpoints(s, rule, every=False)
        return _settled(s, rule, relocation.drop_surplus(s, rule.id, limit_files))
    places, endangered = relocation.in_trouble(s, rule)
    lost, postponed = _lost(s, rule, limit_files)
    placing_on = rule.placed_to is not None or (rule.copies_missing > 0 and not _is_being_made(s, rule.id))
    _hold_endpoints(s, rule, every=placing_on or bool(endangered))
    relocated = relocation.relocate(s, rule, places, endangered)
    if relocated.moved:
        lost, postponed = [], True  # what had got lost may be wished elsewhere now
    worked, more = _place(s, rule) if placing_on else (0, False)
    applied = 0 if more and locks.places_all_first(rule) else provision.apply_locks(s, rule.id, limit_files)
    if not placing_on and not applied:
        reasons.replace(s, rule.id, [*relocated.found, *_last_copies(s, rule)])
        if not lost and not postponed:
            _recount(s, rule)
    else:
        reasons.add(s, relocated.found)
    touched = {rule.id}
    if lost:
        wanted = provision.wanted_by(s, rule.id, lost)
        touched.update(provision.provide_again(s, wanted))
        if rule.state is RuleState.SUSPENDED:
            rule_transfers.hold_back(s, wanted)
    settle(s, {rule.id}, evaluated=True)
    settle(s, touched - {rule.id})
    if relocated.more:
        _look_again(s, rule, timedelta())
    elif postponed and not relocated.moved:
        _look_again(s, rule, timedelta(seconds=POSTPONE_SECONDS))
    return worked + applied + len(lost) + relocated.moved


def _is_being_made(s: Session, rule_id: int) -> bool:
    """Of what was chosen, some is still to be made. What was refused is tried again after that, and not after each
    slice of it: space that was reserved twice, for files that datasets share, would have been given back in between,
    and no plan could tell who gets it."""
    sliced = sa.exists().where(locks_table.c.rule_id == rule_id, locks_table.c.applied_to.is_not(None))
    return bool(s.execute(sa.select(sliced)).scalar_one())


def _settled(s: Session, rule: sa.Row[Any], worked: int) -> int:
    settle(s, {rule.id})  # what it was due for is still to be seen to
    return worked


def _hold_endpoints(s: Session, rule: sa.Row[Any], *, every: bool) -> None:
    if every:
        guards.change_endpoints(s, sa.select(endpoints.c.id))
    else:
        mine = sa.select(locks_table.c.endpoint_id).where(locks_table.c.rule_id == rule.id)
        guards.change_endpoints(s, mine)


def _place(s: Session, rule: sa.Row[Any]) -> tuple[int, bool]:
    """The next slice of a round over all units that lack copies; a round begins when some were missing before. Returns
    the units looked at, and whether there are more."""
    begins = rule.placed_to is None
    found: list[reasons.Found] = []
    candidates: tuple[Endpoint, ...] = ()
    lacking: list[int] = []
    more = False
    try:
        candidates = placing.candidates(s, rule.expression)
    except (Refused, InvalidExpression) as error:
        found.append(reasons.Found(rule.id, "no_candidates", None, error.message, error.hint, rule.copies_missing or 1))
    else:
        lacking, more = locks.next_units(s, rule, locks.units_of_rule(rule), rule.placed_to)
        if lacking:
            found += placing.place(s, placing.Wanted.of(rule), lacking, candidates).reasons(rule.id)
    if begins:
        reasons.replace(s, rule.id, found)
    else:
        reasons.add(s, found)
    reached = lacking[-1] if more else None
    if reached != rule.placed_to:
        s.execute(rules.update().where(rules.c.id == rule.id).values(placed_to=reached))
    if not more:
        locks.count_missing(s, rule)
    return len(lacking), more


def _lost(s: Session, rule: sa.Row[Any], limit_files: int) -> tuple[list[tuple[int, int]], bool]:
    """Pairs that the rule locks and that are neither there nor on their way: failed, cancelled or lost.

    Other rules that want the same copies are held from here on. Where somebody else holds one of them, that copy must
    wait, as waiting here could be waiting in a circle: then True comes back as well.
    """
    held = files_of(_open_locks(rule))
    missing = (
        sa.select(held.c.file_id, held.c.endpoint_id)
        .outerjoin(replicas, of_pair(held))
        .where(
            sa.or_(replicas.c.state.is_(None), Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE))),
            # A last copy that is bad: nobody could bring it, and to say that somebody does would be a lie.
            sa.or_(replicas.c.state.is_(None), sa.not_(Unguessed(integrity.is_hopeless()))),
            sa.not_(provision.is_live(held.c.file_id, held.c.endpoint_id)),
        )
        .distinct()
        .order_by(held.c.file_id, held.c.endpoint_id)
        .limit(limit_files)
    )
    pairs = [(row.file_id, row.endpoint_id) for row in s.execute(missing)]
    if not pairs or not s.postgresql:
        return pairs, False
    cover = covering(rows_of(s, "lost", provision.PAIR, pairs))
    others = set(s.execute(sa.select(cover.c.rule_id).where(cover.c.rule_id != rule.id).distinct()).scalars())
    busy = others - guards.try_change_rules(s, sorted(others)) if others else set()
    if not busy:
        return pairs, False
    theirs = s.execute(sa.select(cover.c.file_id, cover.c.endpoint_id).where(cover.c.rule_id.in_(sorted(busy))))
    taken = {(row.file_id, row.endpoint_id) for row in theirs}
    return [pair for pair in pairs if pair not in taken], True


def _last_copies(s: Session, rule: sa.Row[Any]) -> list[reasons.Found]:
    """Of a rule that is stuck, those of its copies that are bad and that nothing is left to heal from."""
    if rule.state is not RuleState.STUCK:
        return []
    held = files_of(_open_locks(rule))
    pairs = sa.select(held.c.file_id, held.c.endpoint_id).distinct().subquery("open_pairs")
    return integrity.last_copies(s, rule.id, pairs)


def _open_locks(rule: sa.Row[Any]) -> sa.Subquery:
    """The rule's locks that were applied whole and still miss files."""
    return (
        sa.select(locks_table.c.unit_id, locks_table.c.endpoint_id)
        .where(
            locks_table.c.rule_id == rule.id,
            locks_table.c.files_available < locks_table.c.files_total,
            locks_table.c.applied_to.is_(None),
            sa.not_(locks_table.c.surplus),
        )
        .subquery("open_locks")
    )


def _recount(s: Session, rule: sa.Row[Any]) -> None:
    """Count anew what the open locks of this rule hold: nothing is missing that nobody brings, so whatever keeps them
    open is on its way, or was counted wrongly. The caller holds the rule, without which no counter moves."""
    wrong = relocation.recount(s, rule.id, _open_locks(rule))
    if wrong:  # an invariant failed: mended, but not in silence
        get_logger().error("locks.recounted", rule=rule.id, locks=wrong[:20], count=len(wrong))


def _note_failure(s: Session, rule: sa.Row[Any], error: Exception) -> None:
    message = error.message if isinstance(error, ReplicaError) else "the rule could not be evaluated"
    hint = (error.hint if isinstance(error, ReplicaError) else "") or "tell the operators; their log has the cause"
    reasons.add(s, [reasons.Found(rule.id, "evaluation_failed", None, message, hint, 1)])
    first = s.execute(
        sa.select(sa.func.min(reasons_table.c.first_seen_at)).where(reasons_table.c.rule_id == rule.id)
    ).scalar()
    _look_again(s, rule, reasons.pause_after(first, s.now))


def _look_again(s: Session, rule: sa.Row[Any], pause: timedelta) -> None:
    s.execute(rules.update().where(rules.c.id == rule.id).values(evaluate_at=s.now + pause))
