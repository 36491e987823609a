"""Limits on what is in flight: set by people or adapting, counted with every claim.

Given     what a limit is of, as people name it.
Returns   the limits with what is in flight under each; for a claim, the room that they leave.
Promises  what is in flight is counted from the leases themselves, of which there are few: no counter can drift. Claims
          that could exceed the same limit wait for one another; where nothing is limited nobody counts or waits.
Partner   rules.limits decides; replica.catalog.orders asks within the transaction that claims;
          replica.catalog.concurrency writes what adapts.

In flight is what a worker holds a lease on. Every source is counted that the order was made for, each with the whole
file, which may have to come from it alone; others are named in an order only where nothing limits them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, guards, outbox
from replica.catalog import endpoints as endpoints_
from replica.catalog.membership import Unguessed, any_of
from replica.db.engine import Session
from replica.db.tables import accounts as accounts_table
from replica.db.tables import concurrency, endpoints, limits, reads, rules, transfers
from replica.db.tables import sites as sites_table
from rules.errors import Invalid
from rules.limits import KINDS, PARTS, SMALL_BYTES, Key, Limit, Load, Room
from rules.names import check_word
from rules.permissions import Actor
from rules.states import TRANSFER_LEASED, TransferState

#: What adapts, besides what people set.
ADAPT = ("read", "write", "link")


def room(s: Session) -> Room:
    """What all limits leave at this moment. Whoever claims by it holds off the others."""
    found = known(s)
    if not found:
        return Room()
    return Room(found, in_flight(s, of_people=any(kind in ("activity", "account") for kind, _ in found)))


def known(s: Session) -> dict[Key, Limit]:
    """What people set, and what adapts: the least of both holds."""
    c = concurrency
    people = sa.select(limits.c.kind, limits.c.key, limits.c.files_max, limits.c.bytes_max, sa.null().label("number"))
    people = people.where(sa.or_(limits.c.files_max.is_not(None), limits.c.bytes_max.is_not(None)))
    adapts = sa.select(c.c.kind, c.c.key, sa.null(), sa.null(), c.c.number)
    found: dict[Key, Limit] = {}
    for kind, key, files, size, number in s.execute(sa.union_all(people, adapts)):
        before = found.get((kind, key), Limit())
        found[kind, key] = replace(before, slots=number) if number is not None else Limit(files, size, before.slots)
    return found


def in_flight(s: Session, *, of_people: bool = True) -> dict[Key, Load]:
    """`of_people`: also of activities and accounts, for which rules are looked up."""
    t = transfers
    whose: tuple[Any, Any] = (
        (t.c.activity, rules.c.account_id)
        if of_people
        else (sa.literal("").label("activity"), sa.cast(sa.null(), sa.BigInteger()))
    )
    first = (
        sa.select(
            t.c.target_id,
            t.c.reads_id.label("source_id"),
            whose[0],
            whose[1].label("account_id"),
            *_amount(),
        )
        .select_from(t.outerjoin(rules, rules.c.id == t.c.rule_id) if of_people else t)
        .where(any_of(t.c.state, TRANSFER_LEASED))
        .group_by(t.c.target_id, t.c.reads_id, *(whose if of_people else ()))
    )
    loads: dict[Key, Load] = {}
    # One statement for both: a claim that something limits asks this each time.
    for row in s.execute(sa.union_all(first, read_as_well())):
        if row.activity is None:
            keys = source_keys(row.source_id, row.target_id)
        else:
            sources = () if row.source_id is None else (row.source_id,)
            keys = keys_of(row.target_id, sources, row.activity, row.account_id)
        for key in keys:
            load = loads.setdefault(key, Load())
            load.files += row.files
            load.bytes += int(row.bytes)
            load.parts += int(row.parts)
    return loads


def _amount() -> tuple[sa.ColumnElement[Any], ...]:
    return (
        sa.func.count().label("files"),
        sa.func.sum(transfers.c.size_bytes).label("bytes"),
        sa.func.sum(parts_sql()).label("parts"),
    )


def parts_sql() -> sa.ColumnElement[int]:
    """rules.limits.parts_of, of a transfer."""
    size = transfers.c.size_bytes
    return sa.case((size >= SMALL_BYTES, PARTS), (size < SMALL_BYTES // PARTS, 1), else_=size // (SMALL_BYTES // PARTS))


def read_as_well() -> sa.Select[Any]:
    """Besides the first source of each claim, of no activity: few files are large enough for several."""
    t = transfers
    nobody = sa.cast(sa.null(), sa.String()).label("activity"), sa.cast(sa.null(), sa.BigInteger()).label("account_id")
    return (
        sa.select(t.c.target_id, reads.c.source_id, *nobody, *_amount())
        .join_from(reads, t, sa.and_(t.c.id == reads.c.transfer_id, t.c.epoch == reads.c.epoch))
        .where(Unguessed(any_of(t.c.state, TRANSFER_LEASED)))
        .group_by(reads.c.source_id, t.c.target_id)
    )


def readers(s: Session) -> Counter[int]:
    """Source → how many workers read there."""
    first = (
        sa.select(transfers.c.reads_id, sa.func.count().label("files"))
        .where(any_of(transfers.c.state, TRANSFER_LEASED), Unguessed(transfers.c.reads_id.is_not(None)))
        .group_by(transfers.c.reads_id)
    )
    found = Counter({row.reads_id: row.files for row in s.execute(first)})
    for row in s.execute(read_as_well()):
        found[row.source_id] += row.files
    return found


def keys_of(target_id: int, source_ids: Iterable[int], activity: str, account_id: int | None) -> list[Key]:
    """All limits that a transfer is under."""
    keys: list[Key] = [("write", str(target_id)), ("activity", activity)]
    if account_id is not None:
        keys.append(("account", str(account_id)))
    return [*keys, *(key for source_id in source_ids for key in source_keys(source_id, target_id))]


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
    some = sa.or_(*(sa.exists(sa.select(1).select_from(table)) for table in (limits, concurrency)))
    query = sa.select(sites_table.c.name).where(some, waits)
    s.wake.update(f"site.{name}" for name in s.execute(query).scalars())


# --- for people -----------------------------------------------------------------------------------------------------


def set_limit(s: Session, change: wire.LimitChange, actor: Actor | None = None) -> wire.Limit:
    """Absent fields stay as they are; null: no limit of this kind."""
    kind, key = key_of(s, change.kind, change.of, change.source)
    if change.adaptive is False and kind not in ADAPT:
        raise Invalid(f"a limit of an {kind} does not adapt", hint="only those of endpoints and links do")
    found = s.execute(sa.select(limits).where(limits.c.kind == kind, limits.c.key == key)).one_or_none()
    values: dict[str, Any] = {
        field: value if (value := getattr(change, field)) is not msgspec.UNSET else getattr(found, field, None)
        for field in ("files_max", "bytes_max")
    }
    was_fixed = found is not None and found.fixed
    values["fixed"] = was_fixed if change.adaptive is msgspec.UNSET else not change.adaptive
    if values["fixed"] != was_fixed:
        guards.one_at_a_time(s, "concurrency")
        s.execute(sa.delete(concurrency).where(of_fixed(kind, key)))
    if values["files_max"] is None and values["bytes_max"] is None and not values["fixed"]:
        s.execute(sa.delete(limits).where(limits.c.kind == kind, limits.c.key == key))
    else:
        upsert = bulk.insert(s, limits).values(kind=kind, key=key, **values)
        s.execute(upsert.on_conflict_do_update(index_elements=["kind", "key"], set_=values))
    for endpoint_id in _endpoints(kind, key)[-1:]:
        told = {"kind": kind, "of": change.of, **values}
        by = None if actor is None else accounts.account_id(s, actor.account)
        outbox.record(s, "endpoint.changed", endpoint_id, by, limit=told)
    wake_all(s)
    return _shown(s, [(kind, key)])[0]


def of_fixed(kind: str, key: str) -> sa.ColumnElement[bool]:
    """What adapts there: of an endpoint, its links, too."""
    c = concurrency
    same = sa.and_(c.c.kind == kind, c.c.key == key)
    match kind:
        case "read":
            return sa.or_(same, sa.and_(c.c.kind == "link", c.c.key.startswith(f"{key}:")))
        case "write":
            return sa.or_(same, sa.and_(c.c.kind == "link", c.c.key.endswith(f":{key}")))
    return same


def list_all(s: Session) -> wire.Limits:
    """All that are set or adapt, with what is in flight under each."""
    keys = sa.union(sa.select(limits.c.kind, limits.c.key), sa.select(concurrency.c.kind, concurrency.c.key))
    return wire.Limits(items=_shown(s, sorted((kind, key) for kind, key in s.execute(keys))))


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


def _shown(s: Session, keys: Sequence[Key]) -> list[wire.Limit]:
    if not keys:
        return []
    loads = in_flight(s)
    name = names(s, keys)
    people = {(row.kind, row.key): row for row in s.execute(sa.select(limits))}
    adapts = {(row.kind, row.key): row for row in s.execute(sa.select(concurrency))}
    return [
        wire.Limit(
            kind=kind,
            of=name[kind, key],
            files_max=getattr(people.get((kind, key)), "files_max", None),
            bytes_max=getattr(people.get((kind, key)), "bytes_max", None),
            files_in_flight=loads.get((kind, key), Load()).files,
            bytes_in_flight=loads.get((kind, key), Load()).bytes,
            slots_in_flight=round(loads.get((kind, key), Load()).slots, 2),
            adaptive=getattr(people.get((kind, key)), "fixed", False) is False and kind in ADAPT,
            slots=getattr(adapts.get((kind, key)), "number", None),
            why=getattr(adapts.get((kind, key)), "why", None),
            reason=getattr(adapts.get((kind, key)), "reason", None),
            decided_at=getattr(adapts.get((kind, key)), "decided_at", None),
        )
        for kind, key in keys
    ]


def key_of(s: Session, kind: str, of: str, source: str | None) -> Key:
    assert kind in KINDS
    if (kind == "link") != (source is not None):
        raise Invalid("a limit of a link names its source, and no other does", hint="see `replica limit set --help`")
    match kind:
        case "activity":
            return "activity", check_word(of, "an activity")
        case "account":
            return "account", str(accounts.account_id(s, of))
        case "link":
            assert source is not None
            return "link", f"{endpoints_.row(s, source).id}:{endpoints_.row(s, of).id}"
    return kind, str(endpoints_.row(s, of).id)


def _endpoints(kind: str, key: str) -> list[int]:
    return [int(id_) for id_ in key.split(":")] if kind in ("read", "write", "link") else []
