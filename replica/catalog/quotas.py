"""Quotas: how many bytes an account may hold at the endpoints an expression selects, taken together.

Given     an account, an expression and a limit.
Returns   the quota with what is used and left; for placement, what may still be added where.
Promises  what the account holds at an endpoint already costs nothing, whoever brought it there; a copy that is there
          already costs its bytes if the account does not hold it yet. Placing never exceeds a quota, also when two
          rules of an account are placed at once. What is attached to a dataset under rules is protected and charged
          whatever the quota says. An account without quotas pays one look-up for all this.
Partner   rules.quotas decides; replica.catalog.usage has the ledger; replica.catalog.placing asks for `left`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors, endpoints, guards, outbox, usage
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import quotas
from rules import expressions, placement
from rules import quotas as decisions
from rules.errors import NotFound, Refused
from rules.permissions import Actor
from rules.quantities import human_bytes
from rules.states import RuleState


def put(s: Session, actor: Actor, new: wire.NewQuota) -> wire.Quota:
    """Set the quota; the one with the same expression gets the new limit."""
    account_id = accounts.account_id(s, new.account)
    expression = new.expression.strip()
    expressions.select(expression, endpoints.snapshot(s))  # what selects nothing limits nothing: surely not meant
    upsert = bulk.insert(s, quotas).values(
        account_id=account_id, expression=expression, limit_bytes=new.limit_bytes, created_at=s.now
    )
    limit = {"limit_bytes": upsert.excluded.limit_bytes}
    quota_id = s.execute(
        upsert.on_conflict_do_update(index_elements=["account_id", "expression"], set_=limit).returning(quotas.c.id)
    ).scalar_one()
    told = {"account": new.account, "expression": expression, "limit_bytes": new.limit_bytes}
    outbox.record(s, "quota.set", quota_id, accounts.account_id(s, actor.account), **told)
    _look_again(s, account_id)
    return get(s, quota_id)


def get(s: Session, quota_id: int) -> wire.Quota:
    return _quotas(s, [_row(s, quota_id)])[0]


def list_page(
    s: Session, *, account: str | None = None, cursor: str | None = None, limit: int = 100
) -> wire.Page[wire.Quota]:
    query = _select().order_by(quotas.c.id).limit(cursors.check_limit(limit) + 1)
    if account is not None:
        query = query.where(quotas.c.account_id == accounts.account_id(s, account))
    if after := cursors.unpack(cursor):
        query = query.where(quotas.c.id > after[0])
    rows = s.execute(query).all()
    made = {quota.id: quota for quota in _quotas(s, rows[:limit])}
    return cursors.page(rows, limit, lambda row: made[row.id], lambda row: (row.id,))


def remove(s: Session, actor: Actor, quota_id: int) -> None:
    """Take away the limit, not the data."""
    row = _row(s, quota_id)
    guards.change_ledger(s, row.account_id)
    if s.execute(sa.delete(quotas).where(quotas.c.id == quota_id)).rowcount:
        told = {"account": row.account, "expression": row.expression}
        outbox.record(s, "quota.removed", quota_id, accounts.account_id(s, actor.account), **told)
        _look_again(s, row.account_id)


def left(s: Session, account_id: int, endpoint_ids: Collection[int]) -> tuple[placement.Quota, ...]:
    """What the account may still add at these endpoints, by each of its quotas that says anything about them.

    Who places by this holds the account's ledger (guards.change_ledger) from before this look until the commit.
    """
    return decisions.limiting(_standings(s, account_id), endpoint_ids)


def take_over(s: Session, rule_id: int, account_id: int) -> None:
    """The rule's copies are charged to this account from here on. Refused where that exceeds a quota of it.

    The caller holds the rule and the endpoints of its locks, and writes the account into the rule.
    """
    guards.change_ledger(s, account_id)
    before = usage.of_account(s, account_id)
    usage.change_account(s, rule_id, account_id)
    after = usage.of_account(s, account_id)
    more = {endpoint_id for endpoint_id, size in after.items() if size > before.get(endpoint_id, 0)}
    for standing in _standings(s, account_id):
        if standing.over_bytes and not more.isdisjoint(e.id for e in standing.endpoints):
            raise Refused(
                f"the account's quota at {_listed([e.name for e in standing.endpoints])} is "
                f"{human_bytes(standing.over_bytes)} short",
                hint="ask an administrator for more quota, or move less",
                field="account",
            )


def _standings(s: Session, account_id: int) -> list[decisions.Standing]:
    mine = s.execute(
        sa.select(quotas.c.expression, quotas.c.limit_bytes)
        .where(quotas.c.account_id == account_id)
        .order_by(quotas.c.id)
    ).all()
    if not mine:
        return []
    every, held = endpoints.snapshot(s), usage.of_account(s, account_id)
    return [decisions.standing(row.expression, row.limit_bytes, every, held) for row in mine]


def _look_again(s: Session, account_id: int) -> None:
    """What did not fit may fit now."""
    rules = tables.rules
    stuck = sa.and_(rules.c.account_id == account_id, rules.c.state == RuleState.STUCK)
    guards.change_rules(s, sa.select(rules.c.id).where(stuck))
    s.execute(sa.update(rules).where(stuck).values(evaluate_at=s.now))
    s.wake.add("evaluation")


def _select() -> sa.Select[Any]:
    return sa.select(quotas, tables.accounts.c.name.label("account")).join_from(quotas, tables.accounts)


def _row(s: Session, quota_id: int) -> sa.Row[Any]:
    row = s.execute(_select().where(quotas.c.id == quota_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no quota {quota_id}", hint="`replica quota list` shows them", field="quota")
    return row


def _quotas(s: Session, rows: Sequence[sa.Row[Any]]) -> list[wire.Quota]:
    if not rows:
        return []
    every = endpoints.snapshot(s)
    used: dict[int, dict[int, int]] = {}
    batch = bulk.ids_of(s, "with_quotas", sorted({row.account_id for row in rows}))
    held = sa.select(tables.usage).join(batch, batch.c.id == tables.usage.c.account_id)
    for row in s.execute(held):
        used.setdefault(row.account_id, {})[row.endpoint_id] = row.bytes
    made = []
    for row in rows:
        standing = decisions.standing(row.expression, row.limit_bytes, every, used.get(row.account_id, {}))
        made.append(
            wire.Quota(
                id=row.id,
                account=row.account,
                expression=row.expression,
                endpoints=[e.name for e in standing.endpoints],
                limit_bytes=row.limit_bytes,
                used_bytes=standing.used_bytes,
                left_bytes=standing.left_bytes,
                over_bytes=standing.over_bytes,
                problem=standing.problem,
                created_at=row.created_at,
            )
        )
    return made


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
