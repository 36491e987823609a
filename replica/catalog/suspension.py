"""A person pauses a rule, and lets it go on.

Given     the id of a rule, who decides, and what they say of it.
Returns   nothing; the caller shows the rule.
Promises  a suspended rule protects what it protected and covers what is attached to its DID; only its transfers wait,
          but those that a worker holds already. Its state stays what the person said until they resume it, and then
          is what its locks say, whatever became of them meanwhile.
Partner   replica.catalog.rule_transfers makes the transfers wait; replica.catalog.evaluation looks on.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from replica.catalog import outbox, reasons, rule_transfers
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session
from replica.db.tables import locks, rules
from rules.errors import Refused
from rules.states import RULE, RuleState


def suspend(s: Session, rule: sa.Row[Any], account_id: int, comment: str) -> None:
    """`rule` is held by the caller. Once more changes nothing."""
    if rule.state is RuleState.SUSPENDED:
        return
    if RuleState.SUSPENDED not in RULE[rule.state]:
        raise Refused(
            f"rule {rule.id} cannot be suspended: it is {rule.state.label}",
            hint="a rule that waits or has ended moves nothing",
        )
    s.execute(rules.update().where(rules.c.id == rule.id).values(state=RuleState.SUSPENDED, updated_at=s.now))
    files = sa.select(sa.func.coalesce(sa.func.sum(locks.c.files_total - locks.c.files_available), 0))
    missing = s.execute(files.where(locks.c.rule_id == rule.id, locks.c.surplus.is_(False))).scalar_one()
    said = f": {comment}" if comment else ""
    hint = f"let it go on: `replica rule resume {rule.id}`"
    message = f"a person suspended it{said}; its transfers wait"
    reasons.add(s, [reasons.Found(rule.id, rule_transfers.SUSPENDED, None, message, hint, max(int(missing), 1))])
    outbox.record(s, "rule.suspended", rule.id, account_id, **({"comment": comment} if comment else {}))
    rule_transfers.begin(s, rule.id)


def resume(s: Session, rule: sa.Row[Any], account_id: int) -> None:
    """`rule` is held by the caller. One that is not suspended is left as it is."""
    if rule.state is not RuleState.SUSPENDED:
        if rule.state in (RuleState.EXPIRED, RuleState.WAITING_APPROVAL):
            raise Refused(f"rule {rule.id} is not suspended: it is {rule.state.label}")
        return
    s.execute(rules.update().where(rules.c.id == rule.id).values(state=RuleState.REPLICATING, updated_at=s.now))
    reasons.decided(s, rule.id, rule_transfers.SUSPENDED)
    outbox.record(s, "rule.resumed", rule.id, account_id)
    if rule.not_before is None or rule.not_before <= s.now:
        look_soon(s, [rule.id])  # what failed meanwhile is tried again now
    rule_transfers.begin(s, rule.id)
    settle(s, [rule.id])
