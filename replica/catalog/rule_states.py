"""The state of rules after something changed below them, and when somebody must look at them again.

Given     the ids of rules whose counters changed in this transaction.
Returns   nothing; states, reasons and `evaluate_at` are as the locks say.
Promises  a rule that is not satisfied always has a next look, so nothing that was lost stays lost; a rule that is
          satisfied has no reasons; every change of a state is an event. Statements do not grow with the number of
          rules.
Partner   rules.rule_state decides; replica.catalog.evaluation looks again.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from functools import cache

import sqlalchemy as sa

from replica.catalog import guards, outbox, reasons
from replica.catalog.bulk import rows_of
from replica.db.engine import Session
from replica.db.tables import Instant, locks, rules
from replica.db.tables import reasons as reasons_table
from rules.rule_state import state_of
from rules.states import RULE_WITHOUT_LOCKS, RuleState

#: Copies on their way are looked after this often, should a transfer have got lost.
WATCH_SECONDS = 900

_OPEN = locks.c.files_available < locks.c.files_total
#: Copies that a rule has given up are no concern of its state.
_WISHED = sa.not_(locks.c.surplus)


def look_soon(s: Session, rule_ids: Collection[int]) -> None:
    """Evaluation is to look at these rules at once; the caller holds them."""
    s.execute(rules.update().where(rules.c.id.in_(sorted(rule_ids))).values(evaluate_at=s.now))
    s.wake.add("evaluation")


def settle(s: Session, rule_ids: Collection[int], *, evaluated: bool = False, held: bool = False) -> None:
    """Set the states of these rules by what is true now. At most five statements.

    `evaluated`: they were just looked at, so a look that was due is done; else it stays due. `held`: the caller has
    held them since before anything changed below them.
    """
    if not rule_ids:
        return
    # What others changed below these rules is seen, or they see ours: whoever comes last settles for both.
    if not held:
        guards.change_rules(s, sorted(rule_ids))
    changes: list[tuple[int, int, datetime | None]] = []
    satisfied: list[int] = []
    for row in s.execute(_facts(), {"rule_ids": sorted(rule_ids)}).all():
        pending = row.placed_to is not None or row.revised_to is not None or row.sliced
        state = state_of(row.copies_missing, int(row.replicating or pending), int(row.stuck), row.state)
        evaluate_at = _next_look(s, row, state, pending, evaluated)
        # Also one that was satisfied all the while: a drained copy may have gone to where everything was already.
        if state is RuleState.OK and (row.state is not RuleState.OK or row.other_reasons):
            satisfied.append(row.id)
        if state is not row.state or evaluate_at != row.evaluate_at:
            changes.append((row.id, state.value, evaluate_at))
        if state is not row.state:
            outbox.record(s, f"rule.{state.label}", row.id)
    if satisfied:
        reasons.satisfied(s, satisfied)
    if not changes:
        return
    batch = rows_of(
        s,
        "rule_states",
        {"id": sa.BigInteger(), "state": sa.SmallInteger(), "evaluate_at": Instant()},
        changes,
    )
    changed_at = sa.case((rules.c.state != batch.c.state, sa.literal(s.now, Instant())), else_=rules.c.updated_at)
    s.execute(
        rules.update()
        .where(rules.c.id == batch.c.id)
        .values(state=batch.c.state, evaluate_at=batch.c.evaluate_at, updated_at=changed_at)
    )
    if any(at is not None and at <= s.now for _, _, at in changes):
        s.wake.add("evaluation")
    s.execute(
        reasons_table.update().where(reasons_table.c.rule_id == batch.c.id).values(next_retry_at=batch.c.evaluate_at)
    )


@cache
def _facts() -> sa.Select[tuple[object, ...]]:
    """Of the rules `rule_ids`. Built once: it is asked with nearly every change."""

    def any_lock(*where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
        return sa.exists(sa.select(1).where(locks.c.rule_id == rules.c.id, *where))

    first_seen = sa.select(sa.func.min(reasons_table.c.first_seen_at)).where(reasons_table.c.rule_id == rules.c.id)
    return sa.select(
        rules.c.id,
        rules.c.state,
        rules.c.copies_missing,
        rules.c.evaluate_at,
        rules.c.placed_to,
        rules.c.revised_to,
        rules.c.followed_to,
        rules.c.not_before,
        any_lock(_WISHED, _OPEN, locks.c.files_total > locks.c.files_available + locks.c.files_stuck).label(
            "replicating"
        ),
        any_lock(_WISHED, _OPEN, locks.c.files_stuck > 0).label("stuck"),
        any_lock(locks.c.surplus).label("surplus"),
        any_lock(locks.c.applied_to.is_not(None)).label("sliced"),
        first_seen.scalar_subquery().label("first_seen_at"),
        first_seen.where(reasons_table.c.code == reasons.NOT_MOVED, reasons_table.c.files > 0)
        .scalar_subquery()
        .label("not_moved_at"),
        sa.exists(
            sa.select(1).where(reasons_table.c.rule_id == rules.c.id, reasons_table.c.code != reasons.NOT_MOVED)
        ).label("other_reasons"),
    ).where(rules.c.id.in_(sa.bindparam("rule_ids", expanding=True)), rules.c.state != RuleState.EXPIRED)


def _next_look(
    s: Session, row: sa.Row[tuple[object, ...]], state: RuleState, pending: bool, evaluated: bool
) -> datetime | None:
    if state is RuleState.SUSPENDED:  # it goes on covering what comes; only its transfers wait
        state = state_of(row.copies_missing, int(row.replicating), int(row.stuck), RuleState.REPLICATING)
    if state in RULE_WITHOUT_LOCKS:
        return None
    if row.not_before is not None and row.not_before > s.now:
        not_before: datetime = row.not_before
        return not_before
    if pending or row.followed_to is not None:
        due = s.now
    elif state is RuleState.STUCK:
        due = s.now + reasons.pause_after(row.first_seen_at, s.now)
    elif state is RuleState.REPLICATING:
        due = s.now + timedelta(seconds=WATCH_SECONDS)
    elif row.surplus:
        due = s.now  # all that is wished is there: what is not wished can go
    elif row.not_moved_at is not None:
        due = s.now + reasons.pause_after(row.not_moved_at, s.now)
    else:
        return None
    planned: datetime | None = row.evaluate_at
    # The sooner look stays planned, unless it is the one that just happened.
    if planned is not None and planned <= due and not (evaluated and planned <= s.now):
        return planned
    return due
