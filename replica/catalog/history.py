"""What happened to one entity, from the beginning: its events.

Given     the kind of entity and its id.
Returns   pages of wire.HistoryEntry by version.
Promises  one statement for a page, whatever the length of the history.
Partner   replica.catalog.outbox writes them.
"""

from __future__ import annotations

import sqlalchemy as sa

from replica import wire
from replica.catalog import cursors
from replica.db.engine import Session
from replica.db.tables import accounts, events


def of_entity(
    s: Session, entity: str, entity_id: int, *, cursor: str | None = None, limit: int = 100
) -> wire.Page[wire.HistoryEntry]:
    query = (
        sa.select(events.c.version, events.c.kind, events.c.at, events.c.payload, accounts.c.name.label("account"))
        .outerjoin(accounts, accounts.c.id == events.c.account_id)
        .where(events.c.entity == entity, events.c.entity_id == entity_id)
        .order_by(events.c.version)
        .limit(cursors.check_limit(limit) + 1)
    )
    if entity != "transfer":  # as the index has it
        query = query.where(sa.text("entity <> 'transfer'"))
    if after := cursors.unpack(cursor):
        query = query.where(events.c.version > after[0])
    return cursors.page(
        s.execute(query).all(),
        limit,
        lambda row: wire.HistoryEntry(
            version=row.version, kind=row.kind, at=row.at, account=row.account, payload=row.payload or {}
        ),
        lambda row: (row.version,),
    )
