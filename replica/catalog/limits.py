"""Limits on what is in flight: set by people, counted with every claim.

Given     what a limit is of, as people name it.
Returns   the limits with what is in flight under each; for a claim, the room that they leave.
Promises  what is in flight is counted from the leases themselves, of which there are few: no counter can drift. Claims
          that could exceed the same limit wait for one another; where nothing is limited nobody counts or waits.
Partner   rules.limits decides; replica.catalog.orders asks within the transaction that claims.

In flight is what a worker holds a lease on. A source is counted that the order was made for; others are named in an
order only where nothing limits them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, outbox
from replica.catalog import endpoints as endpoints_
from replica.catalog.membership import any_of
from replica.db.engine import Session
from replica.db.tables import accounts as accounts_table
from replica.db.tables import endpoints, limits, rules, transfers
from replica.db.tables import sites as sites_table
from rules.errors import Invalid
from rules.limits import KINDS, Key, Limit, Load, Room
from rules.names import check_word
from rules.permissions import Actor
from rules.states import TRANSFER_LEASED, TransferState


def room(s: Session) -> Room:
    """What all limits leave at this moment. Whoever claims by it holds off the others."""
    found = {(row.kind, row.key): Limit(row.files_max, row.bytes_max) for row in s.execute(sa.select(limits))}
    return Room(found, in_flight(s)) if found else Room()


def in_flight(s: Session) -> dict[Key, Load]:
    t = transfers
    query = (
        sa.select(
            t.c.target_id,
            t.c.reads_id,
            t.c.activity,
            rules.c.account_id,
            sa.func.count().label("files"),
            sa.func.sum(t.c.size_bytes).label("bytes"),
        )
        .select_from(t.outerjoin(rules, rules.c.id == t.c.rule_id))
        .where(any_of(t.c.state, TRANSFER_LEASED))
        .group_by(t.c.target_id, t.c.reads_id, t.c.activity, rules.c.account_id)
    )
    loads: dict[Key, Load] = {}
    for row in s.execute(query):
        for key in keys_of(row.target_id, row.reads_id, row.activity, row.account_id):
            load = loads.setdefault(key, Load())
            load.files += row.files
            load.bytes += int(row.bytes)
    return loads


def keys_of(target_id: int, source_id: int | None, activity: str, account_id: int | None) -> list[Key]:
    """All limits that a transfer is under."""
    keys: list[Key] = [("write", str(target_id)), ("activity", activity)]
    if account_id is not None:
        keys.append(("account", str(account_id)))
    return keys if source_id is None else [*keys, *source_keys(source_id, target_id)]


def source_keys(source_id: int, target_id: int) -> list[Key]:
    return [("read", str(source_id)), ("link", f"{source_id}:{target_id}")]


def wake_waiting(s: Session) -> None:
    """Something in flight has ended, so that what waits for room may go, at whatever site: nobody else would ask."""
    t = transfers
    waits = sa.exists().where(
        t.c.site_id == sites_table.c.id,
        t.c.state == sa.literal_column(str(TransferState.QUEUED.value), sa.SmallInteger()),
        t.c.not_before.is_(None),
    )
    query = sa.select(sites_table.c.name).where(sa.exists(sa.select(1).select_from(limits)), waits)
    s.wake.update(f"site.{name}" for name in s.execute(query).scalars())


# --- for people -----------------------------------------------------------------------------------------------------


def set_limit(s: Session, change: wire.LimitChange, actor: Actor | None = None) -> wire.Limit:
    """Absent fields stay as they are; null: no limit of this kind."""
    kind, key = _key(s, change)
    found = s.execute(sa.select(limits).where(limits.c.kind == kind, limits.c.key == key)).one_or_none()
    values: dict[str, Any] = {
        field: value if (value := getattr(change, field)) is not msgspec.UNSET else getattr(found, field, None)
        for field in ("files_max", "bytes_max")
    }
    if values["files_max"] is None and values["bytes_max"] is None:
        s.execute(sa.delete(limits).where(limits.c.kind == kind, limits.c.key == key))
    else:
        upsert = bulk.insert(s, limits).values(kind=kind, key=key, **values)
        s.execute(upsert.on_conflict_do_update(index_elements=["kind", "key"], set_=values))
    for endpoint_id in _endpoints(kind, key)[-1:]:
        told = {"kind": kind, "of": change.of, **values}
        by = None if actor is None else accounts.account_id(s, actor.account)
        outbox.record(s, "endpoint.changed", endpoint_id, by, limit=told)
    wake_all(s)
    return _shown(s, [(kind, key, values["files_max"], values["bytes_max"])])[0]


def list_all(s: Session) -> wire.Limits:
    """All that are set, with what is in flight under each. They are few: people set them one by one."""
    rows = s.execute(sa.select(limits).order_by(limits.c.kind, limits.c.key)).all()
    return wire.Limits(items=_shown(s, rows))


def wake_all(s: Session) -> None:
    names = s.execute(sa.select(sites_table.c.name)).scalars()
    s.wake.update(f"site.{name}" for name in names)


def names(s: Session, keys: Iterable[Key]) -> dict[Key, str]:
    """What these limits are of, as people name it."""
    keys = list(keys)
    ids = sorted({id_ for kind, key in keys for id_ in _endpoints(kind, key)})
    where = endpoints.c.id.in_(ids)
    places = {row.id: row.name for row in s.execute(sa.select(endpoints.c.id, endpoints.c.name).where(where))}
    owners = sorted({int(key) for kind, key in keys if kind == "account"})
    query = sa.select(accounts_table.c.id, accounts_table.c.name).where(accounts_table.c.id.in_(owners))
    people = {row.id: row.name for row in s.execute(query)} if owners else {}
    return {
        (kind, key): key
        if kind == "activity"
        else people.get(int(key), key)
        if kind == "account"
        else " → ".join(places.get(id_, str(id_)) for id_ in _endpoints(kind, key))
        for kind, key in keys
    }


def _shown(s: Session, rows: Sequence[Any]) -> list[wire.Limit]:
    if not rows:
        return []
    loads = in_flight(s)
    name = names(s, [(kind, key) for kind, key, *_ in rows])
    return [
        wire.Limit(
            kind=kind,
            of=name[kind, key],
            files_max=files_max,
            bytes_max=bytes_max,
            files_in_flight=loads.get((kind, key), Load()).files,
            bytes_in_flight=loads.get((kind, key), Load()).bytes,
        )
        for kind, key, files_max, bytes_max in rows
    ]


def _key(s: Session, change: wire.LimitChange) -> Key:
    assert change.kind in KINDS
    if (change.kind == "link") != (change.source is not None):
        raise Invalid("a limit of a link names its source, and no other does", hint="see `replica limit set --help`")
    match change.kind:
        case "activity":
            return "activity", check_word(change.of, "an activity")
        case "account":
            return "account", str(accounts.account_id(s, change.of))
        case "link":
            assert change.source is not None
            return "link", f"{endpoints_.row(s, change.source).id}:{endpoints_.row(s, change.of).id}"
    return change.kind, str(endpoints_.row(s, change.of).id)


def _endpoints(kind: str, key: str) -> list[int]:
    return [int(id_) for id_ in key.split(":")] if kind in ("read", "write", "link") else []
