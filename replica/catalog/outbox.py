"""What happened, written down in the transaction in which it happened.

Given     an event: its kind, the entity it is about, and what is worth telling.
Returns   nothing; whoever listens reads it by cursor after the commit.
Promises  an event is there if and only if its change is. Versions of an entity go up by one without gaps. Two
          statements for all events of a transaction.
Partner   every module of replica.catalog that changes something people care about.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from replica.catalog.bulk import Columns, insert, rows_of
from replica.db.engine import Session
from replica.db.tables import Instant, Json, events, versions


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    entity: str
    entity_id: int
    account_id: int | None
    payload: dict[str, Any]


def record(s: Session, kind: str, entity_id: int, account_id: int | None = None, **payload: Any) -> None:
    """Remember that this happened: `kind` is `entity.what`, for example `rule.ok`. Written right before the commit.

    The caller holds the entity's row, so that nobody else counts up its version meanwhile.
    """
    s.events.append(Event(kind, kind.partition(".")[0], entity_id, account_id, payload))
    s.before_commit[_write] = None


def _write(s: Session) -> None:
    told: list[Event] = s.events
    count = Counter((event.entity, event.entity_id) for event in told)
    batch = rows_of(
        s,
        "told",
        {"entity": sa.String(), "entity_id": sa.BigInteger(), "version": sa.Integer()},
        [(entity, entity_id, n) for (entity, entity_id), n in sorted(count.items())],
    )
    upsert = insert(s, versions).from_select(
        ["entity", "entity_id", "version"],
        sa.select(batch).where(sa.true()).order_by(batch.c.entity, batch.c.entity_id),
    )
    reached = s.execute(
        upsert.on_conflict_do_update(
            index_elements=["entity", "entity_id"], set_={"version": versions.c.version + upsert.excluded.version}
        ).returning(versions.c.entity, versions.c.entity_id, versions.c.version)
    )
    next_version = {(row.entity, row.entity_id): row.version - count[row.entity, row.entity_id] for row in reached}
    rows = []
    for event in told:
        key = (event.entity, event.entity_id)
        next_version[key] += 1
        rows.append((*key, event.kind, next_version[key], event.account_id, event.payload or None))
    columns: Columns = {
        "entity": sa.String(),
        "entity_id": sa.BigInteger(),
        "kind": sa.String(),
        "version": sa.Integer(),
        "account_id": sa.BigInteger(),
        "payload": Json,
    }
    given = rows_of(s, "events_told", columns, rows)
    s.execute(
        events.insert().from_select(
            ["entity", "entity_id", "kind", "version", "account_id", "payload", "at", "tx"],
            sa.select(given, sa.literal(s.now, Instant()), _transaction(s)),
        )
    )
    told.clear()


def _transaction(s: Session) -> sa.ColumnElement[int]:
    """The number of this transaction; on SQLite, where one writes at a time, ids alone are in the order of commits."""
    if s.postgresql:
        return sa.cast(sa.cast(sa.func.pg_current_xact_id(), sa.String()), sa.BigInteger())
    return sa.literal(0, sa.BigInteger())
