"""What happened, for those who listen: read from a position onwards, in one order for everybody.

Given     a position in the log, as the cursor of an earlier event, and what of it is wanted.
Returns   events with names instead of row ids, and where to go on.
Promises  nothing is ever added before a position that was given out: only what transactions wrote that are over is
          read, in the order of transactions. One that takes long delays what was written after it began, and hides
          nothing. What reading costs depends on what is read, not on how much there is; names cost at most eight
          statements a page.
Partner   replica.catalog.outbox writes; replica.catalog.webhooks and .subscriptions go on from positions of their own.

The versions of an entity tell the order in which it changed. Two of its events come in the other order where the
second transaction had written something before the first one did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors, rule_views
from replica.catalog.membership import Unguessed
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import alias_of, events
from rules.errors import Invalid
from rules.events import ENTITIES, check_patterns
from rules.names import shown

#: Events that are looked through for what is wanted before an answer is given.
WINDOW = 10_000
#: Instead of a cursor: before all that is kept, and after all that has happened.
OLDEST, NOW = "oldest", "now"

#: Who has not read for so long is not waited for.
WAIT_FOR_READERS = timedelta(days=30)


class Position(NamedTuple):
    """After the event of this transaction and id."""

    tx: int = 0
    id: int = 0

    @property
    def cursor(self) -> str:
        return cursors.pack(*self)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which events. What is None does not matter."""

    kinds: tuple[str, ...] = ("*",)
    entity: str | None = None
    entity_id: int | None = None
    account_id: int | None = None
    #: Besides those: what happens to rules that are to tell the webhook of this name, and to itself.
    notify: tuple[str, int] | None = None


class Found(NamedTuple):
    rows: Sequence[sa.Row[Any]]
    #: Where to go on: all before it was looked at.
    reached: Position
    #: Perhaps there is more already.
    more: bool


def page(
    s: Session,
    *,
    cursor: str | None = None,
    kinds: Sequence[str] = (),
    entity: str | None = None,
    entity_id: int | None = None,
    account: str | None = None,
    limit: int = 100,
) -> wire.Events:
    """Events after `cursor`; without one from the oldest that is kept."""
    if entity_id is not None and entity is None:
        raise Invalid("an id says nothing without what it is the id of", hint="say the entity, too", field="entity")
    if entity is not None and entity not in ENTITIES:
        known = ", ".join(sorted(ENTITIES))
        raise Invalid(f"there are no events of {shown(entity)}", hint=f"there are those of {known}", field="entity")
    wanted = Wanted(
        kinds=check_patterns(kinds),
        entity=entity,
        entity_id=entity_id,
        account_id=None if account is None else accounts.account_id(s, account),
    )
    found = read(s, position(s, cursor), wanted, cursors.check_limit(limit))
    return wire.Events(items=told(s, found.rows), next=found.reached.cursor, more=found.more)


def position(s: Session, cursor: str | None) -> Position:
    if cursor == OLDEST:
        return Position()
    if cursor == NOW:
        return end(s)
    return Position(*(cursors.unpack(cursor, 2) or ()))


def end(s: Session) -> Position:
    """After all that can be read now."""
    query = sa.select(events.c.tx, events.c.id).where(_is_over(s)).order_by(events.c.tx.desc(), events.c.id.desc())
    row = s.execute(query.limit(1)).one_or_none()
    return Position() if row is None else Position(row.tx, row.id)


def read(s: Session, after: Position, wanted: Wanted, limit: int) -> Found:
    """Events that are wanted, at most `limit` and out of a bounded window: perhaps none, and still there is more."""
    if wanted.entity_id is not None and wanted.entity != "transfer":
        return _of_one(s, after, wanted, limit)
    ahead = sa.select(events.c.tx, events.c.id).where(_after(after), _is_over(s)).order_by(events.c.tx, events.c.id)
    size = limit if wanted == Wanted() else WINDOW
    window = ahead.limit(size).cte("ahead")
    count = sa.select(sa.func.count()).select_from(window).scalar_subquery()
    last = s.execute(
        sa.select(window.c.tx, window.c.id, count.label("looked_at"))
        .order_by(window.c.tx.desc(), window.c.id.desc())
        .limit(1)
    ).one_or_none()
    if last is None:
        return Found([], after, False)
    upto = Position(last.tx, last.id)
    query = _select().where(_after(after), sa.not_(_after(upto)), Unguessed(_is_wanted(wanted)))
    rows = s.execute(query.order_by(events.c.tx, events.c.id).limit(limit)).all()
    if len(rows) < limit:
        return Found(rows, upto, last.looked_at == size)
    reached = Position(rows[-1].tx, rows[-1].id)
    return Found(rows, reached, reached != upto or last.looked_at == size)


def _of_one(s: Session, after: Position, wanted: Wanted, limit: int) -> Found:
    """What happened to one thing is little, and has an index of its own."""
    query = _select().where(
        events.c.entity == wanted.entity,
        events.c.entity_id == wanted.entity_id,
        events.c.entity != sa.literal_column("'transfer'"),
        _after(after),
        _is_over(s),
        _is_wanted(wanted),
    )
    rows = s.execute(query.order_by(events.c.tx, events.c.id).limit(limit + 1)).all()
    reached = Position(rows[:limit][-1].tx, rows[:limit][-1].id) if rows else after
    return Found(rows[:limit], reached, len(rows) > limit)


def _after(position: Position) -> sa.ColumnElement[bool]:
    return sa.tuple_(events.c.tx, events.c.id) > sa.tuple_(
        sa.literal(position.tx, sa.BigInteger()), sa.literal(position.id, sa.BigInteger())
    )


def _is_over(s: Session) -> sa.ColumnElement[bool]:
    """Written by a transaction before which none is under way any more: nothing can come to be before it."""
    if not s.postgresql:
        return sa.true()
    oldest = sa.func.pg_snapshot_xmin(sa.func.pg_current_snapshot())
    return events.c.tx < sa.cast(sa.cast(oldest, sa.String()), sa.BigInteger())


def _is_wanted(wanted: Wanted) -> sa.ColumnElement[bool]:
    conditions: list[sa.ColumnElement[bool]] = [_fits(wanted.kinds)]
    if wanted.entity is not None:
        conditions.append(events.c.entity == wanted.entity)
    if wanted.entity_id is not None:
        conditions.append(events.c.entity_id == wanted.entity_id)
    if wanted.account_id is not None:
        conditions.append(events.c.account_id == wanted.account_id)
    every = sa.and_(*conditions)
    if wanted.notify is None:
        return every
    name, webhook_id = wanted.notify
    rules = tables.rules
    asked = sa.exists().where(rules.c.id == events.c.entity_id, rules.c.notify == name)
    return sa.or_(
        every,
        sa.and_(events.c.entity == "rule", asked),
        sa.and_(events.c.kind == "webhook.test", events.c.entity_id == webhook_id),
    )


def _fits(kinds: Iterable[str]) -> sa.ColumnElement[bool]:
    conditions: list[sa.ColumnElement[bool]] = []
    for pattern in kinds:
        entity, _, what = pattern.partition(".")
        if pattern == "*":
            return sa.true()
        conditions.append(events.c.entity == entity if what == "*" else events.c.kind == pattern)
    return sa.or_(*conditions)


def _select() -> sa.Select[Any]:
    account = alias_of(tables.accounts, "by")
    return sa.select(events, account.c.name.label("account")).outerjoin(account, account.c.id == events.c.account_id)


# --- with names -----------------------------------------------------------------------------------------------------

#: Keys of a payload that are ids, and of what: told as names, under the key without `_id`.
_DIDS = frozenset({"did_id", "unit_id", "file_id", "dataset_id", "container_id", "parent_id", "child_id"})
_ENDPOINTS = frozenset({"endpoint_id", "source_id", "target_id"})
_ACCOUNTS = frozenset({"account_id", "owner_id"})
#: Entities that have a name, and a table where it stands.
_NAMED = {
    "account": tables.accounts,
    "endpoint": tables.endpoints,
    "scope": tables.scopes,
    "site": tables.sites,
    "subscription": tables.subscriptions,
    "webhook": tables.webhooks,
}


def told(s: Session, rows: Sequence[sa.Row[Any]]) -> list[wire.Event]:
    """These events, as people call things."""

    def ids(entity: str) -> set[int]:
        return {row.entity_id for row in rows if row.entity == entity}

    rules = _by_id(s, tables.rules, ids("rule"), "did_id")
    needed = ("file_id", "source_id", "target_id", "attempts", "size_bytes", "reason")
    transfers = _by_id(s, tables.transfers, ids("transfer"), *needed)
    did_ids = ids("did") | {row.did_id for row in rules.values()} | {row.file_id for row in transfers.values()}
    endpoint_ids = {i for row in transfers.values() for i in (row.source_id, row.target_id) if i is not None}
    account_ids: set[int] = set()
    for row in rows:
        for key, value in (row.payload or {}).items():
            for keys, wanted in ((_DIDS, did_ids), (_ENDPOINTS, endpoint_ids), (_ACCOUNTS, account_ids)):
                if key in keys and isinstance(value, int):
                    wanted.add(value)
    names = {
        entity: {id_: row.name for id_, row in _by_id(s, table, ids(entity) | more, "name").items()}
        for entity, table in _NAMED.items()
        for more in ({"endpoint": endpoint_ids, "account": account_ids}.get(entity, set()),)
    }
    known_dids = rule_views.did_texts(s, sorted(did_ids)) if did_ids else {}

    def event(row: sa.Row[Any]) -> wire.Event:
        payload: dict[str, Any] = {}
        for key, value in (row.payload or {}).items():
            for keys, known in ((_DIDS, known_dids), (_ENDPOINTS, names["endpoint"]), (_ACCOUNTS, names["account"])):
                if key in keys:
                    payload[key.removesuffix("_id")] = known.get(value, value)
                    break
            else:
                payload[key] = value
        made = wire.Event(
            cursor=cursors.pack(row.tx, row.id),
            kind=row.kind,
            entity=row.entity,
            id=row.entity_id,
            version=row.version,
            at=row.at,
            account=row.account,
            name=payload.pop("name", None),  # as it was called then
            payload=payload,
        )
        made.name = names.get(row.entity, {}).get(row.entity_id, made.name)
        if row.entity == "did":
            made.did = known_dids.get(row.entity_id)
        elif row.entity == "rule" and row.entity_id in rules:
            made.did = known_dids.get(rules[row.entity_id].did_id)
        elif row.entity == "transfer" and row.entity_id in transfers:
            transfer = transfers[row.entity_id]
            made.did = known_dids.get(transfer.file_id)
            made.source = names["endpoint"].get(transfer.source_id)
            made.target = names["endpoint"].get(transfer.target_id)
            made.payload = {"bytes": transfer.size_bytes, "attempts": transfer.attempts, "reason": transfer.reason}
        if "did" in payload:  # as it was called then
            made.did = made.did or payload["did"]
            if made.did == payload["did"]:
                del payload["did"]
        return made

    return [event(row) for row in rows]


def _by_id(s: Session, table: sa.Table, ids: set[int], *columns: str) -> dict[int, sa.Row[Any]]:
    if not ids:
        return {}
    given = bulk.ids_of(s, f"told_{table.name}", sorted(ids))
    query = sa.select(table.c.id, *(table.c[name] for name in columns)).join(given, given.c.id == table.c.id)
    return {row.id: row for row in s.execute(query)}


# --- what is kept ---------------------------------------------------------------------------------------------------


def forget(s: Session, after: Position, *, transfers: timedelta, others: timedelta) -> tuple[int, Position | None]:
    """Forget what is old among the next events; how many, and where to go on, None at the end of what may be old.

    What an enabled webhook or subscription has still to read is kept, unless it does not read at all. So is the
    latest event: SQLite would give its id again.
    """
    ahead = sa.select(events.c.tx, events.c.id, events.c.at).where(_after(after), _is_over(s))
    window = ahead.order_by(events.c.tx, events.c.id).limit(WINDOW).cte("ahead")
    last = s.execute(sa.select(window).order_by(window.c.tx.desc(), window.c.id.desc()).limit(1)).one_or_none()
    if last is None:
        return 0, None
    upto = Position(last.tx, last.id)

    def older_than(age: timedelta) -> sa.ColumnElement[bool]:
        return events.c.at < _at(s.now - age)

    unread = sa.and_(sa.not_(older_than(WAIT_FOR_READERS)), _after(_slowest(s)))
    gone = sa.delete(events).where(
        _after(after),
        sa.not_(_after(upto)),
        events.c.id != sa.select(sa.func.max(events.c.id)).scalar_subquery(),
        Unguessed(sa.or_(older_than(others), sa.and_(events.c.entity == "transfer", older_than(transfers)))),
        Unguessed(sa.not_(unread)),
    )
    count = int(s.execute(gone).rowcount)
    return count, upto if last.at < s.now - min(transfers, others) else None


def _slowest(s: Session) -> Position:
    """How far the slowest of those has read who go on by themselves."""
    readers = [
        sa.select(table.c.seen_tx, table.c.seen_id).where(table.c.enabled)
        for table in (tables.webhooks, tables.subscriptions)
    ]
    every = sa.union_all(*readers).subquery()
    row = s.execute(sa.select(every).order_by(every.c.seen_tx, every.c.seen_id).limit(1)).one_or_none()
    return Position(2**63 - 1, 2**63 - 1) if row is None else Position(row.seen_tx, row.seen_id)


def _at(moment: datetime) -> sa.ColumnElement[Any]:
    return sa.literal(moment, tables.Instant())
