"""The queue of a site as lanes: what waits there, and their heads, without reading what is behind.

Given     a site.
Returns   its lanes, each with its most urgent transfer; then as many of the heads of some lanes as are asked for.
Promises  a step in an index for each lane, and a row for each transfer that is asked for, whatever the length of the
          queue. What waits until a moment is in no lane before that moment. Who reads heads holds them.
Partner   rules.lanes says which of them go; replica.catalog.orders hands them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from replica.catalog.bulk import Columns, rows_of
from replica.catalog.membership import Unguessed, literal
from replica.db.engine import Session
from replica.db.tables import alias_of, transfers
from rules.lanes import Lane
from rules.states import TransferState

#: How many transfers whose moment has come are let into the lanes by one claim.
LET_IN_MAX = 1_000
#: A compound statement of SQLite has so many parts at most.
_PARTS_MAX = 400


@dataclass(frozen=True, slots=True)
class Key:
    activity: str
    target_id: int
    waits_for: str


def let_in(s: Session, site_id: int) -> None:
    """Those whose moment has come take part again."""
    due = (
        sa.select(transfers.c.id)
        .where(
            transfers.c.site_id == site_id,
            transfers.c.state == literal(TransferState.QUEUED),
            transfers.c.not_before.is_not(None),
            transfers.c.not_before <= s.now,
        )
        .order_by(transfers.c.not_before)
        .limit(LET_IN_MAX)
    )
    held = due.with_for_update(of=transfers, skip_locked=True, key_share=True) if s.postgresql else due
    s.execute(transfers.update().where(transfers.c.id.in_(held)).values(not_before=None))


def keys(s: Session, site_id: int) -> list[Key]:
    """The lanes that have something in them."""
    walk = keys_query(site_id)
    return [Key(*row) for row in s.execute(walk)]


def keys_query(site_id: int) -> sa.Select[Any]:
    """From the first transfer of a lane to the first of the next, by the index."""
    first, there, after = (alias_of(transfers, name) for name in ("first", "there", "after"))
    walk = sa.select(_first(first, site_id).scalar_subquery().label("id")).cte("walk", recursive=True)
    beyond = sa.tuple_(after.c.activity, after.c.target_id, after.c.waits_for) > sa.tuple_(
        there.c.activity, there.c.target_id, there.c.waits_for
    )
    following = _first(after, site_id).where(beyond).correlate(there).scalar_subquery()
    walk = walk.union_all(sa.select(following).select_from(walk.join(there, there.c.id == walk.c.id)))
    head = alias_of(transfers, "head")
    return sa.select(head.c.activity, head.c.target_id, head.c.waits_for).select_from(
        walk.join(head, head.c.id == walk.c.id)
    )


def _first(t: Any, site_id: int) -> sa.Select[Any]:
    key = (t.c.activity, t.c.target_id, t.c.waits_for, _urgency(t), t.c.id)
    return sa.select(t.c.id).where(*_ready(t, site_id)).order_by(*key).limit(1)


def heads(s: Session, site_id: int, wanted: Sequence[tuple[Key, int]]) -> list[Lane]:
    """So many of the most urgent of each of these lanes, which nobody else holds."""
    query = heads_query(s, site_id, wanted)
    found: dict[Key, list[tuple[int, int, int, Any]]] = {key: [] for key, _ in wanted}
    for row in s.execute(query):
        lane = found.get(Key(row.activity, row.target_id, row.waits_for))
        if lane is not None:
            lane.append((row.urgency, row.id, row.size_bytes, row))
    return [
        Lane(key.activity, key.target_id, key.waits_for, sorted(rows, key=lambda row: row[:2]), len(rows) >= limit)
        for key, limit in wanted
        if (rows := found[key])
    ]


def heads_query(s: Session, site_id: int, wanted: Sequence[tuple[Key, int]]) -> sa.Select[Any]:
    t = transfers
    columns = (
        *(t.c.id, t.c.epoch, t.c.file_id, t.c.target_id, t.c.rule_id, t.c.attempts, t.c.size_bytes),
        *(t.c.activity, t.c.waits_for, _urgency(t).label("urgency")),
    )
    lane = alias_of(transfers, "lane")
    if not s.postgresql:
        parts = [
            sa.select(
                sa.select(lane.c.id)
                .where(*_ready(lane, site_id))
                .where(
                    lane.c.activity == key.activity,
                    lane.c.target_id == key.target_id,
                    lane.c.waits_for == key.waits_for,
                )
                .order_by(_urgency(lane), lane.c.id)
                .limit(limit)
                .subquery()
            )
            for key, limit in wanted[:_PARTS_MAX]
        ]
        return sa.select(*columns).where(t.c.id.in_(sa.union_all(*parts)))
    names: Columns = {
        "activity": sa.String(),
        "target_id": sa.BigInteger(),
        "waits_for": sa.String(),
        "most": sa.BigInteger(),
    }
    batch = rows_of(s, "lanes", names, [(k.activity, k.target_id, k.waits_for, limit) for k, limit in wanted])
    head = (
        sa.select(lane.c.id)
        .where(*_ready(lane, site_id))
        .where(
            lane.c.activity == batch.c.activity,
            lane.c.target_id == batch.c.target_id,
            lane.c.waits_for == batch.c.waits_for,
        )
        .order_by(_urgency(lane), lane.c.id)
        .limit(batch.c.most)
        .lateral("heads")
    )
    # Each by its number: it might think a lane's index as good, and read all of the lane for each.
    still = Unguessed(sa.and_(t.c.state == literal(TransferState.QUEUED), t.c.not_before.is_(None)))
    return (
        sa.select(*columns)
        .select_from(batch.join(head, sa.true()).join(t, t.c.id == head.c.id))
        .where(still)
        .with_for_update(of=transfers, skip_locked=True, key_share=True)
    )


def _ready(t: Any, site_id: int) -> tuple[sa.ColumnElement[bool], ...]:
    return t.c.site_id == site_id, t.c.state == literal(TransferState.QUEUED), t.c.not_before.is_(None)


def _urgency(t: Any) -> sa.ColumnElement[int]:
    prefix = t.name
    return sa.literal_column(f"({prefix}.created_at - {prefix}.priority * 21600000000)", sa.BigInteger())
