"""Rules as people see them: names instead of ids, and how far each one is.

Given     rows of rules.
Returns   wire.Rule, with progress and reasons.
Promises  the number of statements does not depend on the number of rules.
Partner   replica.catalog.rules and .explanation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import reasons
from replica.catalog.bulk import ids_of
from replica.catalog.membership import closure, files_of, units
from replica.db.engine import Session
from replica.db.tables import accounts, dids, locks, rules, scopes, versions
from rules.states import Grouping, RuleState


def select() -> sa.Select[Any]:
    return (
        sa.select(
            rules,
            dids.c.name.label("did_name"),
            scopes.c.name.label("did_scope"),
            accounts.c.name.label("account"),
            sa.func.coalesce(versions.c.version, 0).label("version"),
        )
        .join_from(rules, dids, dids.c.id == rules.c.did_id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
        .join(accounts, accounts.c.id == rules.c.account_id)
        .outerjoin(versions, sa.and_(versions.c.entity == "rule", versions.c.entity_id == rules.c.id))
    )


def rules_of(s: Session, rows: Sequence[sa.Row[Any]]) -> list[wire.Rule]:
    if not rows:
        return []
    ids = [row.id for row in rows]
    progress = _progress(s, ids)
    why = reasons.of_rules(s, ids)
    # Units that could not be placed have no lock to count their files by.
    unplaced = [row.id for row in rows if row.copies_missing or row.placed_to is not None or _waits(row)]
    whole = _files_of_dids(s, unplaced) if unplaced else {}
    made = []
    for row in rows:
        done = progress.get(row.id)
        files, size = whole.get(row.id) or ((done.files, int(done.bytes)) if done else (0, 0))
        made.append(
            wire.Rule(
                id=row.id,
                did=f"{row.did_scope}:{row.did_name}",
                account=row.account,
                copies=row.copies,
                expression=row.expression,
                grouping=row.grouping.label,
                spread=row.spread,
                state=row.state.label,
                locks_ok=done.ok if done else 0,
                locks_replicating=done.wanted - done.ok - done.stuck if done else 0,
                locks_stuck=done.stuck if done else 0,
                files_total=files,
                files_available=done.least if done else 0,
                bytes_total=size,
                priority=row.priority,
                activity=row.activity,
                created_at=row.created_at,
                updated_at=row.updated_at,
                weight=row.weight,
                source_expression=row.source_expression,
                expires_at=row.expires_at,
                comment=row.comment,
                reasons=[*_begins_later(s, row, files), *why.get(row.id, [])],
                not_before=row.not_before,
                locked=row.locked,
                purge=row.purge,
                notify=row.notify,
                metadata=row.metadata,
                ended_at=row.ended_at,
                # With what happened in this transaction, which is counted at its end.
                version=row.version + sum(e.entity == "rule" and e.entity_id == row.id for e in s.events),
            )
        )
    return made


def _waits(row: sa.Row[Any]) -> bool:
    return row.state is RuleState.WAITING_APPROVAL


def _begins_later(s: Session, row: sa.Row[Any], files: int) -> list[wire.Reason]:
    if row.not_before is None or row.not_before <= s.now or row.state is RuleState.EXPIRED:
        return []
    return [
        wire.Reason(
            code="not_before",
            endpoint=None,
            message="it is to begin later, and protects nothing until then",
            hint="",
            files=files,
            first_seen_at=row.created_at,
            last_seen_at=s.now,
            next_retry_at=row.not_before,
        )
    ]


def _progress(s: Session, rule_ids: Sequence[int]) -> dict[int, sa.Row[Any]]:
    unit = (
        sa.select(
            locks.c.rule_id,
            sa.func.count().label("copies"),
            sa.func.max(locks.c.files_total).label("files"),
            sa.func.max(locks.c.bytes_total).label("bytes"),
            sa.func.min(locks.c.files_available).label("least"),
            sa.func.sum(locks.c.files_total).label("wanted"),
            sa.func.sum(locks.c.files_available).label("ok"),
            sa.func.sum(locks.c.files_stuck).label("stuck"),
        )
        .where(locks.c.rule_id.in_(rule_ids), locks.c.surplus.is_(False))
        .group_by(locks.c.rule_id, locks.c.unit_id)
        .subquery("unit")
    )
    least = sa.case((unit.c.copies >= rules.c.copies, unit.c.least), else_=0)
    # PostgreSQL sums into numeric: the counts go back to plain numbers.
    query = (
        sa.select(
            unit.c.rule_id,
            *(
                sa.cast(sa.func.sum(column), sa.BigInteger()).label(name)
                for name, column in (
                    ("files", unit.c.files),
                    ("bytes", unit.c.bytes),
                    ("least", least),
                    ("wanted", unit.c.wanted),
                    ("ok", unit.c.ok),
                    ("stuck", unit.c.stuck),
                )
            ),
        )
        .select_from(unit)
        .join(rules, rules.c.id == unit.c.rule_id)
        .group_by(unit.c.rule_id)
    )
    return {row.rule_id: row for row in s.execute(query)}


def _files_of_dids(s: Session, rule_ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Rule id → files and bytes of its DID; a file in two datasets counts twice, as in the locks on these."""
    tree = closure(sa.select(rules.c.id.label("tag"), rules.c.did_id.label("id")).where(rules.c.id.in_(rule_ids)))
    held = files_of(units(tree, Grouping.DATASET).subquery("held"))
    query = sa.select(held.c.tag, sa.func.count(), sa.func.sum(held.c.size_bytes)).group_by(held.c.tag)
    return {tag: (count, int(size)) for tag, count, size in s.execute(query)}


def did_texts(s: Session, did_ids: Sequence[int]) -> dict[int, str]:
    """Id → `scope:name`."""
    batch = ids_of(s, "texts", did_ids)
    query = (
        sa.select(dids.c.id, scopes.c.name.label("scope"), dids.c.name)
        .join(batch, batch.c.id == dids.c.id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
    )
    return {row.id: f"{row.scope}:{row.name}" for row in s.execute(query)}
