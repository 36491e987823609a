"""A person says yes or no to a rule that asked.

Given     a rule that waits for approval, who decides, and what they say.
Returns   nothing; an approved rule is begun as if it were added now, a denied one has ended.
Promises  a rule that waits has no locks, protects nothing and moves nothing; waiting is no part of its lifetime.
Partner   rules.approval decides whether anybody need be asked; rules.permissions who may answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from replica.catalog import outbox, reasons
from replica.catalog.membership import closure_of, files_of, literal, units
from replica.db.engine import Session
from replica.db.tables import dids, rules
from rules.approval import Ask, decide
from rules.endpoints import Endpoint
from rules.errors import Refused
from rules.states import DidKind, Grouping, RuleState

WAITING = "waiting_approval"


def why_ask(s: Session, did_id: int, candidates: Sequence[Endpoint]) -> str:
    """What a person would have to look at; empty when every candidate grants it by itself."""
    held = files_of(units(closure_of(did_id), Grouping.DATASET).subquery("asked_units"))
    size = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(held.c.size_bytes), 0))
    files, size_bytes = s.execute(size).one()
    tree = closure_of(did_id, "asked")
    is_open = sa.select(1).join_from(tree, dids, dids.c.id == tree.c.id)
    is_open = is_open.where(tree.c.kind != literal(DidKind.FILE), dids.c.open)
    closed = s.execute(is_open.limit(1)).first() is None
    answer = decide(files, int(size_bytes), closed=closed, candidates=candidates)
    return answer.reason if isinstance(answer, Ask) else ""


def ask(s: Session, rule_id: int, why: str) -> None:
    hint = f"an administrator decides: `replica rule approve {rule_id}` or `replica rule deny {rule_id}`"
    reasons.add(s, [reasons.Found(rule_id, WAITING, None, f"a person must approve it: {why}", hint, 1)])


def check_waits(rule: sa.Row[Any]) -> None:
    if rule.state is not RuleState.WAITING_APPROVAL:
        raise Refused(
            f"rule {rule.id} does not wait for approval: it is {rule.state.label}",
            hint="`replica rule list --state waiting_approval` shows those that do",
        )


def approve(s: Session, rule: sa.Row[Any], account_id: int, comment: str) -> None:
    """Its state and reasons; `rule` is held by the caller, which begins it."""
    check_waits(rule)
    # It lives as long as was wished, from the moment it may begin.
    wished = rule.created_at if rule.not_before is None else max(rule.created_at, rule.not_before)
    late = max(s.now - wished, timedelta(0))
    s.execute(
        rules.update()
        .where(rules.c.id == rule.id)
        .values(
            state=RuleState.REPLICATING,
            updated_at=s.now,
            expires_at=None if rule.expires_at is None else rule.expires_at + late,
        )
    )
    reasons.decided(s, rule.id, WAITING)
    outbox.record(s, "rule.approved", rule.id, account_id, **({"comment": comment} if comment else {}))
