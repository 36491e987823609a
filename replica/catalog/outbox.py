"""What happened, written down in the transaction in which it happened.

Given     an event: its kind, the entity it is about, and what is worth telling.
Returns   nothing; whoever listens reads it by cursor after the commit.
Promises  an event is there if and only if its change is; what a savepoint undid was never told. Versions of an
          entity go up by one without gaps. Two statements for all events of a transaction, and one for any number of
          transfers that ended.
Partner   every module of replica.catalog that changes something people care about; replica.catalog.events reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from replica.catalog.bulk import Batch, Columns, columns_of, insert_of
from replica.catalog.membership import literal
from replica.db.engine import Session
from replica.db.tables import Instant, events, versions
from rules.states import TransferState

#: Wakes who delivers, after the commit.
DELIVERY = "events"
#: Wakes who looks for new data, after the commit.
SUBSCRIPTIONS = "subscriptions"

#: Nothing to say is NULL, not the JSON `null`.
_Payload = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

_COUNTED = Batch("told", {"entity": sa.String(), "entity_id": sa.BigInteger(), "version": sa.Integer()})
_TOLD = Batch(
    "events_told",
    {
        "entity": sa.String(),
        "entity_id": sa.BigInteger(),
        "kind": sa.String(),
        "version": sa.Integer(),
        "account_id": sa.BigInteger(),
        "payload": _Payload,
    },
)


@dataclass(frozen=True, slots=True)
class Event:
    kind: str
    entity: str
    entity_id: int
    account_id: int | None
    payload: dict[str, Any]


def record(s: Session, kind: str, entity_id: int, /, account_id: int | None = None, **payload: Any) -> None:
    """Remember that this happened: `kind` is `entity.what`, for example `rule.ok`. Written right before the commit.

    Whoever records another event of this entity waits for the commit, so a transaction that changes several does it
    in the order of replica.catalog.guards.
    """
    entity = kind.partition(".")[0]
    s.events.append(Event(kind, entity, entity_id, account_id, payload))
    s.tell = _write
    s.wake.add(DELIVERY)
    if entity == "did":
        s.wake.add(SUBSCRIPTIONS)


def record_ends(s: Session, ends: Sequence[tuple[int, TransferState]]) -> None:
    """Transfers that are done or have failed: one event each, in one statement.

    It is the only one of its transfer, for a transfer that is tried again is another one. It carries nothing: what
    there is to tell, the transfer's row tells. It wakes nobody: there are thousands, and who wants them looks often.
    """
    if not ends:
        return
    columns: Columns = {"id": sa.BigInteger(), "state": sa.SmallInteger()}
    ended = columns_of(s, "ends_told", columns, [[id_ for id_, _ in ends], [state.value for _, state in ends]])
    kind = sa.case((ended.c.state == literal(TransferState.DONE), "transfer.done"), else_="transfer.failed")
    rows = sa.select(
        sa.literal("transfer"),
        ended.c.id,
        kind,
        sa.literal(1),
        sa.literal(s.now, Instant()),
        _transaction(s.postgresql),
    )
    s.execute(events.insert().from_select(["entity", "entity_id", "kind", "version", "at", "tx"], rows))


def _write(s: Session) -> None:
    told: list[Event] = s.events
    count = Counter((event.entity, event.entity_id) for event in told)
    counted = [(entity, entity_id, n) for (entity, entity_id), n in sorted(count.items())]
    reached = s.execute(_count_up(s.postgresql), _COUNTED.holding(s, counted))
    next_version = {(row.entity, row.entity_id): row.version - count[row.entity, row.entity_id] for row in reached}
    rows = []
    for event in told:
        key = (event.entity, event.entity_id)
        next_version[key] += 1
        rows.append((*key, event.kind, next_version[key], event.account_id, event.payload or None))
    s.execute(_keep(s.postgresql), {**_TOLD.holding(s, rows), "at": s.now})
    told.clear()


@cache
def _count_up(postgresql: bool) -> sa.Executable:
    batch = _COUNTED.rows(postgresql)
    upsert = insert_of(versions, postgresql).from_select(
        ["entity", "entity_id", "version"],
        sa.select(batch).where(sa.true()).order_by(batch.c.entity, batch.c.entity_id),
    )
    more = {"version": versions.c.version + upsert.excluded.version}
    counted: sa.Executable = upsert.on_conflict_do_update(index_elements=["entity", "entity_id"], set_=more).returning(
        versions.c.entity, versions.c.entity_id, versions.c.version
    )
    return counted


@cache
def _keep(postgresql: bool) -> sa.Executable:
    rows = sa.select(_TOLD.rows(postgresql), sa.bindparam("at", type_=Instant()), _transaction(postgresql))
    return events.insert().from_select([*_TOLD.columns, "at", "tx"], rows)


def _transaction(postgresql: bool) -> sa.ColumnElement[int]:
    """The number of this transaction; on SQLite, where one writes at a time, ids alone are in the order of commits."""
    if postgresql:
        number = sa.cast(sa.cast(sa.func.pg_current_xact_id(), sa.String()), sa.BigInteger())
        return sa.select(number).scalar_subquery()  # asked once, not for each row
    return sa.literal(0, sa.BigInteger())
