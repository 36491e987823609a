"""Why a rule is not satisfied: one row for each reason and endpoint, never a text that grows.

Given     what placement refused and which transfers failed.
Returns   reasons as a person reads them, oldest first.
Promises  a reason keeps the moment it was first seen until the rule is satisfied, however often it is tried in
          between; `files` says how many files it holds up now, and 0 that it was tried again and not seen since.
Partner   the caller holds the rule's row, so that two never write the same reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from replica import wire
from replica.catalog.bulk import Columns, rows_of
from replica.db.engine import Session
from replica.db.tables import endpoints, reasons

#: The pause before a rule is tried again: as long as it has been stuck, within these bounds.
RETRY_SECONDS_MIN = 60
RETRY_SECONDS_MAX = 3600

MESSAGE_LENGTH_MAX = 2_000

#: What a person decided or has to decide: no evaluation makes it untrue.
DECIDED = ("waiting_approval", "suspended")
#: Copies shall leave an endpoint, and no other can take them: a satisfied rule may have this, too.
NOT_MOVED = "not_moved"

_COLUMNS: Columns = {
    "rule_id": sa.BigInteger(),
    "code": sa.String(),
    "endpoint_id": sa.BigInteger(),
    "message": sa.String(),
    "hint": sa.String(),
    "files": sa.Integer(),
}


@dataclass(frozen=True, slots=True)
class Found:
    """A reason as it was seen now."""

    rule_id: int
    code: str
    endpoint_id: int | None
    message: str
    hint: str
    files: int


def pause_after(first_seen_at: datetime | None, now: datetime) -> timedelta:
    """How long to wait before a stuck rule is tried again: it doubles, as the pause is as long as the past."""
    age = 0.0 if first_seen_at is None else (now - first_seen_at).total_seconds()
    return timedelta(seconds=min(max(age, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX))


def add(s: Session, found: Sequence[Found]) -> None:
    """These were seen, and hold up so many more files. Three statements, however many."""
    _write(s, found, added=True)


def replace(s: Session, rule_id: int, found: Sequence[Found]) -> None:
    """These are all the reasons of the rule now, besides what people decided."""
    found_before = reasons.c.rule_id == rule_id, reasons.c.files > 0, reasons.c.code.not_in(DECIDED)
    s.execute(reasons.update().where(*found_before).values(files=0))
    _write(s, found, added=False)


def clear(s: Session, rule_ids: Sequence[int]) -> None:
    """These rules are gone."""
    s.execute(reasons.delete().where(reasons.c.rule_id.in_(rule_ids)))


def satisfied(s: Session, rule_ids: Sequence[int]) -> None:
    """These rules have all that they wish; a copy that shall leave its endpoint still shall."""
    still = sa.and_(reasons.c.code == NOT_MOVED, reasons.c.files > 0)
    s.execute(reasons.delete().where(reasons.c.rule_id.in_(rule_ids), sa.not_(still)))


def decided(s: Session, rule_id: int, code: str) -> None:
    """A person decided what this reason asked for."""
    s.execute(reasons.delete().where(reasons.c.rule_id == rule_id, reasons.c.code == code))


def _write(s: Session, found: Sequence[Found], *, added: bool) -> None:
    if not found:
        return
    batch = rows_of(
        s,
        "found_reasons",
        _COLUMNS,
        [(f.rule_id, f.code, f.endpoint_id, f.message[:MESSAGE_LENGTH_MAX], f.hint, f.files) for f in merged(found)],
    )
    same = sa.and_(
        reasons.c.rule_id == batch.c.rule_id,
        reasons.c.code == batch.c.code,
        reasons.c.endpoint_id.is_not_distinct_from(batch.c.endpoint_id),
    )
    s.execute(
        reasons.update()
        .where(same)
        .values(
            files=(reasons.c.files + batch.c.files) if added else batch.c.files,
            message=batch.c.message,
            hint=batch.c.hint,
            last_seen_at=s.now,
        )
    )
    seen = sa.literal(s.now, reasons.c.first_seen_at.type)
    s.execute(
        reasons.insert().from_select(
            [*_COLUMNS, "first_seen_at", "last_seen_at"],
            sa.select(*(batch.c[name] for name in _COLUMNS), seen, seen).where(
                ~sa.exists(sa.select(1).select_from(reasons).where(same))
            ),
        )
    )


def merged(found: Iterable[Found]) -> list[Found]:
    """One for each rule, code and endpoint, with the files of all; the first message speaks for them."""
    first: dict[tuple[int, str, int | None], Found] = {}
    total: dict[tuple[int, str, int | None], int] = {}
    for f in found:
        key = (f.rule_id, f.code, f.endpoint_id)
        first.setdefault(key, f)
        total[key] = total.get(key, 0) + f.files
    return [Found(f.rule_id, f.code, f.endpoint_id, f.message, f.hint, total[key]) for key, f in first.items()]


def of_rules(s: Session, rule_ids: Sequence[int]) -> dict[int, list[wire.Reason]]:
    """Rule id → its reasons that hold up files now, oldest first."""
    query = (
        sa.select(reasons, endpoints.c.name.label("endpoint"))
        .outerjoin(endpoints, endpoints.c.id == reasons.c.endpoint_id)
        .where(reasons.c.rule_id.in_(rule_ids), reasons.c.files > 0)
        .order_by(reasons.c.first_seen_at, reasons.c.id)
    )
    found: dict[int, list[wire.Reason]] = {}
    for row in s.execute(query):
        found.setdefault(row.rule_id, []).append(
            wire.Reason(
                code=row.code,
                endpoint=row.endpoint,
                message=row.message,
                hint=row.hint,
                files=row.files,
                first_seen_at=row.first_seen_at,
                last_seen_at=row.last_seen_at,
                next_retry_at=row.next_retry_at,
            )
        )
    return found
