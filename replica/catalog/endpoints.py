"""Endpoints: places that store, what is known of them, and what still fits there.

Given     a new endpoint or a change of one.
Returns   the endpoint; and for decisions one snapshot of all, with the links between them.
Promises  no two endpoints share a file: a root lies neither at nor beneath another's. Free space already leaves out
          what is on its way. A change of the facts makes stuck rules due at once, and draining those that have copies
          there. What goes out of service protects nothing and is on its way to nowhere.
Partner   rules.endpoints has the value that decisions see; replica.storage opens the URL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, breakers, bulk, cursors, guards, hops, outbox, reasons, sites
from replica.catalog.documents import check_attributes
from replica.catalog.membership import Unguessed, any_of, literal
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import alias_of, endpoint_attributes, endpoints
from replica.storage.registry import open_storage
from rules import expressions
from rules.endpoints import AttributeValue, Endpoint, Link
from rules.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused
from rules.names import check_word, shown
from rules.permissions import Actor
from rules.quantities import counted
from rules.states import EndpointKind, ReplicaState, RuleState

_ABILITIES = ("readable", "writable", "deletable")
#: What `change` can set, besides attributes.
_SETTINGS = (
    *_ABILITIES,
    "capacity_bytes",
    "min_free_bytes",
    "delete_at_once",
    "grace_seconds",
    "budget_files",
    "budget_bytes",
)


def add(s: Session, new: wire.NewEndpoint, actor: Actor | None = None) -> wire.Endpoint:
    name = check_word(new.name, "an endpoint")
    url = normal_url(new.url, name)
    attributes = check_attributes(new.attributes, name)
    site = sites.site_id(s, new.site)
    guards.one_at_a_time(s, "endpoints")  # a new root is compared with all others
    for other in s.execute(sa.select(endpoints.c.name, endpoints.c.url).order_by(endpoints.c.id)):
        if other.name == name:
            raise AlreadyExists(f"there is an endpoint {name} already", hint="choose another name", field="name")
        if f"{url}/".startswith(f"{other.url}/") or f"{other.url}/".startswith(f"{url}/"):
            raise AlreadyExists(
                f"{shown(url)} shares files with the endpoint {other.name}, which is at {shown(other.url)}",
                hint="give every endpoint a folder of its own, neither above nor beneath another's",
                field="url",
            )
    made = sa.insert(endpoints).values(
        name=name,
        site_id=site,
        kind=EndpointKind[new.kind.upper()],
        url=url,
        layout=new.layout,
        capacity_bytes=new.capacity_bytes,
        created_at=s.now,
    )
    endpoint_id = s.execute(made.returning(endpoints.c.id)).scalar_one()
    _set_attributes(s, endpoint_id, attributes)
    _facts_changed(s)
    _tell(s, "endpoint.added", endpoint_id, actor, name=name, site=new.site, url=url)
    return get(s, name)


def get(s: Session, name: str) -> wire.Endpoint:
    found = row(s, name)
    return msgspec.structs.replace(
        _endpoint(found, _attributes(s, [found.id])),
        protected=_protected(s, found.id),
        breakers=breakers.of_endpoint(s, found.id),
    )


def list_page(s: Session, where: str | None, cursor: str | None, limit: int) -> wire.Page[wire.Endpoint]:
    """Endpoints in the order they were made; with `where`, those the expression selects."""
    query = _select().order_by(endpoints.c.id).limit(cursors.check_limit(limit) + 1)
    if after := cursors.unpack(cursor):
        query = query.where(endpoints.c.id > after[0])
    if where is not None:
        selected = bulk.ids_of(s, "selected", [e.id for e in expressions.select(where, snapshot(s))])
        query = query.where(endpoints.c.id.in_(sa.select(selected.c.id)))
    rows = s.execute(query).all()
    attributes = _attributes(s, [row.id for row in rows])
    return cursors.page(rows, limit, lambda row: _endpoint(row, attributes), lambda row: (row.id,))


def change(s: Session, name: str, change: wire.EndpointChange, actor: Actor | None = None) -> wire.Endpoint:
    found = row(s, name)
    _facts_changed(s)  # rules come before endpoints in the order in which rows are held
    values: dict[str, Any] = {
        field: value for field in _SETTINGS if (value := getattr(change, field)) is not msgspec.UNSET
    }
    told = dict(values)
    if any(values.get(field, getattr(found, field)) != getattr(found, field) for field in _ABILITIES):
        values["status_since"] = s.now
        if all(values.get(field, getattr(found, field)) for field in _ABILITIES) and not found.draining:
            values["status_reason"] = ""
    if values:
        _update(s, found.id, values)
    if change.attributes is not msgspec.UNSET:
        told["attributes"] = check_attributes(change.attributes, name)
        _set_attributes(s, found.id, told["attributes"])
    _tell(s, "endpoint.changed", found.id, actor, name=name, **told)
    return get(s, name)


def ban(s: Session, name: str, ban: wire.Ban, actor: Actor | None = None) -> wire.Endpoint:
    """Reading, writing or deleting is off from now on, until it is unbanned. What is under way is not broken off."""
    found = row(s, name)
    _facts_changed(s)
    every = not (ban.read or ban.write or ban.delete)
    off = {"readable": ban.read or every, "writable": ban.write or every, "deletable": ban.delete or every}
    values = {ability: False for ability, is_off in off.items() if is_off}
    _update(s, found.id, values | {"status_reason": ban.reason, "status_since": s.now})
    _tell(s, "endpoint.banned", found.id, actor, name=name, reason=ban.reason, **values)
    return get(s, name)


def unban(s: Session, name: str, actor: Actor | None = None) -> wire.Endpoint:
    """It may be read, written and deleted from again."""
    found = row(s, name)
    _in_service(found)
    breakers.forget(s, found.id)
    if all(getattr(found, ability) for ability in _ABILITIES):
        return get(s, name)
    _facts_changed(s)
    values: dict[str, Any] = dict.fromkeys(_ABILITIES, True)
    _update(s, found.id, values | {"status_reason": "", "status_since": s.now})
    _tell(s, "endpoint.unbanned", found.id, actor, name=name)
    return get(s, name)


def drain(s: Session, name: str, drain: wire.Drain, actor: Actor | None = None) -> wire.Endpoint:
    """What is protected there is brought elsewhere, rule by rule; each copy goes when another has taken its place."""
    found = row(s, name)
    _in_service(found)
    here = tables.locks.c.endpoint_id == found.id
    _facts_changed(s, tables.rules.c.id.in_(sa.select(tables.locks.c.rule_id).where(here)))
    if found.draining == drain.undo:
        values = {"draining": not drain.undo, "status_reason": drain.reason, "status_since": s.now}
        _update(s, found.id, values)
        kind = "endpoint.undrained" if drain.undo else "endpoint.draining"
        _tell(s, kind, found.id, actor, name=name, reason=drain.reason)
    return get(s, name)


def decommission(s: Session, name: str, order: wire.Decommission, actor: Actor | None = None) -> wire.Endpoint:
    """Out of service for good: refused while anything there is protected, under way or, unless forgotten, stored."""
    found = row(s, name)
    endpoint_id = found.id
    _facts_changed(s)
    guards.change_endpoints(s, [endpoint_id])  # nobody places anything there from here on
    if order.undo:
        _update(s, endpoint_id, {"decommissioned_at": None, "status_since": s.now})
        _tell(s, "endpoint.changed", endpoint_id, actor, name=name, decommissioned=False)
        return get(s, name)
    if found.decommissioned_at is not None:
        return get(s, name)
    protected = _protected(s, endpoint_id)
    if protected.rules:
        raise Refused(
            f"still protected at {name}: {counted(protected.files, 'file')}, by {counted(protected.rules, 'rule')}",
            hint=f"bring them elsewhere first: `replica endpoint drain {name}`",
        )
    for thing, under_way in (
        ("transfer to", sa.and_(tables.transfers.c.target_id == endpoint_id, tables.LIVE_TRANSFER)),
        (
            "route over",
            sa.and_(tables.route_hops.c.endpoint_id == endpoint_id, tables.route_hops.c.closed_at.is_(None)),
        ),
        ("deletion at", sa.and_(tables.deletions.c.endpoint_id == endpoint_id, tables.LIVE_DELETION)),
    ):
        if s.execute(sa.select(sa.exists().where(under_way))).scalar_one():
            raise Refused(f"there is a {thing} {name} under way", hint="wait until it has ended")
    _forget_replicas(s, endpoint_id, name, order)
    off: dict[str, Any] = dict.fromkeys((*_ABILITIES, "draining"), False)
    _update(s, endpoint_id, off | {"decommissioned_at": s.now, "status_since": s.now})
    _tell(s, "endpoint.decommissioned", endpoint_id, actor, name=name)
    return get(s, name)


def _forget_replicas(s: Session, endpoint_id: int, name: str, order: wire.Decommission) -> None:
    replicas = tables.replicas
    here = replicas.c.endpoint_id == endpoint_id
    count = s.execute(sa.select(sa.func.count()).select_from(replicas).where(here)).scalar_one()
    if not count:
        return
    if not order.forget:
        raise Refused(
            f"{name} still has copies of {counted(count, 'file')}",
            hint="let them be deleted there, or forget them: `--forget`",
        )
    if s.postgresql and not order.last_copies:
        # Who decides on a deletion holds the file: of two copies that go at once, one is seen to be the last.
        theirs = sa.select(tables.files.c.did_id).join_from(replicas, tables.files).where(here)
        held = theirs.with_for_update(of=tables.files, key_share=True, skip_locked=True).subquery("held_files")
        if s.execute(sa.select(sa.func.count()).select_from(held)).scalar_one() < count:
            raise Conflict(f"files of {name} are being changed at this moment", hint="repeat the request")
    available = literal(ReplicaState.AVAILABLE)
    other = alias_of(replicas, "other")
    doubts = tables.suspects
    doubted = sa.exists().where(
        doubts.c.file_id == other.c.file_id, Unguessed(doubts.c.endpoint_id == other.c.endpoint_id)
    )
    elsewhere = sa.exists().where(
        other.c.file_id == replicas.c.file_id,
        other.c.endpoint_id != endpoint_id,
        Unguessed(other.c.state == available),
        sa.not_(Unguessed(doubted.correlate(other))),
    )
    last = sa.select(sa.func.count()).select_from(replicas)
    # What is bad may still be all that is left of a file.
    there = Unguessed(any_of(replicas.c.state, (ReplicaState.AVAILABLE, ReplicaState.UNAVAILABLE, ReplicaState.BAD)))
    last = last.where(here, there, sa.not_(elsewhere))
    if not order.last_copies and (alone := s.execute(last).scalar_one()):
        raise Refused(
            f"of {counted(alone, 'file')} at {name} no other good copy is known",
            hint="copy them elsewhere first; or, if they shall be lost, say so: `--last-copies`",
        )
    s.execute(sa.delete(replicas).where(here))
    _update(s, endpoint_id, {"used_bytes": 0})


def _in_service(found: sa.Row[Any]) -> None:
    if found.decommissioned_at is not None:
        raise Refused(f"{found.name} was decommissioned", hint=f"`replica endpoint decommission {found.name} --undo`")


def snapshot(s: Session) -> tuple[Endpoint, ...]:
    """All endpoints at this moment, by id."""
    return values(s, rows(s), with_attributes=True)


def rows(s: Session) -> Sequence[sa.Row[Any]]:
    """Of all endpoints, by id: their columns and their `site`."""
    return s.execute(_select().order_by(endpoints.c.id)).all()


def values(s: Session, of: Iterable[sa.Row[Any]], *, with_attributes: bool) -> tuple[Endpoint, ...]:
    """These rows as decisions see them; without attributes where nothing is decided by an expression."""
    attributes = _attributes(s, None) if with_attributes else {}
    return tuple(
        Endpoint(
            id=r.id,
            name=r.name,
            site=r.site,
            kind=r.kind,
            attributes=attributes.get(r.id, {}),
            readable=r.readable,
            writable=r.writable,
            deletable=r.deletable,
            free_bytes=_free_bytes(r),
            draining=r.draining,
            decommissioned=r.decommissioned_at is not None,
            status=r.status_reason,
        )
        for r in of
    )


def set_link(s: Session, change: wire.LinkChange, actor: Actor | None = None) -> wire.Link:
    source, target = row(s, change.source), row(s, change.target)
    if source.id == target.id:
        raise Invalid(f"{change.source} is both ends of the link", hint="name two endpoints", field="target")
    values: dict[str, Any] = {
        field: value for field in ("distance", "allowed") if (value := getattr(change, field)) is not msgspec.UNSET
    }
    upsert = bulk.insert(s, tables.links).values(source_id=source.id, target_id=target.id, **values)
    index = {"index_elements": ["source_id", "target_id"]}
    s.execute(upsert.on_conflict_do_update(**index, set_=values) if values else upsert.on_conflict_do_nothing(**index))
    hops.look_again(s, target.id)
    told = {"source": change.source, "target": change.target, **values}
    _tell(s, "endpoint.changed", target.id, actor, name=change.target, link=told)
    return list_links(s, source=change.source, target=change.target, cursor=None, limit=1).items[0]


def list_links(
    s: Session, *, source: str | None = None, target: str | None = None, cursor: str | None, limit: int
) -> wire.Page[wire.Link]:
    """What is known of the ways between endpoints; one that nothing is known of is allowed, at distance 1."""
    key = tables.links.c.source_id, tables.links.c.target_id
    sources, targets = alias_of(endpoints, "sources"), alias_of(endpoints, "targets")
    query = (
        sa.select(tables.links, sources.c.name.label("source"), targets.c.name.label("target"))
        .join(sources, sources.c.id == tables.links.c.source_id)
        .join(targets, targets.c.id == tables.links.c.target_id)
        .order_by(*key)
        .limit(cursors.check_limit(limit) + 1)
    )
    for name, side in ((source, sources), (target, targets)):
        if name is not None:
            query = query.where(side.c.id == row(s, name).id)
    if after := cursors.unpack(cursor, 2):
        query = query.where(sa.tuple_(*key) > sa.tuple_(*(sa.literal(each, sa.BigInteger()) for each in after)))
    rows = s.execute(query).all()
    return cursors.page(
        rows,
        limit,
        lambda r: wire.Link(source=r.source, target=r.target, distance=r.distance, allowed=r.allowed),
        lambda r: (r.source_id, r.target_id),
    )


def links(s: Session) -> dict[tuple[int, int], Link]:
    """What is known of the ways between endpoints, by (source, target)."""
    return {
        (row.source_id, row.target_id): Link(row.source_id, row.target_id, row.distance, row.allowed)
        for row in s.execute(sa.select(tables.links))
    }


def report_space(s: Session, site_id: int, endpoint_name: str, free_bytes: int) -> None:
    """What a worker of the endpoint's own site found free there."""
    own = endpoints.c.name == check_word(endpoint_name, "an endpoint"), endpoints.c.site_id == site_id
    values = {"reported_free_bytes": free_bytes, "reported_at_used_bytes": endpoints.c.used_bytes}
    if s.execute(sa.update(endpoints).where(*own).values(values)).rowcount == 0:
        raise NotFound(f"this site has no endpoint {shown(endpoint_name)}", field="endpoint")


def normal_url(url: str, name: str) -> str:
    """The one way to write this URL. Invalid where it is none that a storage can be opened by."""
    open_storage(url, name=name)
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{quote(unquote(parts.path).rstrip('/'))}"


def row(s: Session, name: str) -> sa.Row[Any]:
    """The columns of one endpoint, and its `site`."""
    found = s.execute(_select().where(endpoints.c.name == check_word(name, "an endpoint"))).one_or_none()
    if found is None:
        raise NotFound(
            f"there is no endpoint {shown(name)}", hint="`replica endpoint list` shows all", field="endpoint"
        )
    return found


def _select() -> sa.Select[Any]:
    return sa.select(endpoints, tables.sites.c.name.label("site")).join_from(endpoints, tables.sites)


def _attributes(s: Session, ids: list[int] | None) -> dict[int, dict[str, AttributeValue]]:
    """By endpoint; of all endpoints for None."""
    query = sa.select(endpoint_attributes).order_by(endpoint_attributes.c.key)
    if ids is not None:
        wanted = bulk.ids_of(s, "of_endpoints", ids)
        query = query.where(endpoint_attributes.c.endpoint_id.in_(sa.select(wanted.c.id)))
    found: dict[int, dict[str, AttributeValue]] = {}
    for row in s.execute(query):
        found.setdefault(row.endpoint_id, {})[row.key] = row.value
    return found


def _set_attributes(s: Session, endpoint_id: int, attributes: dict[str, AttributeValue | None]) -> None:
    if not attributes:
        return
    mine = endpoint_attributes.c.endpoint_id == endpoint_id
    s.execute(sa.delete(endpoint_attributes).where(mine, endpoint_attributes.c.key.in_(sorted(attributes))))
    kept = [
        {"endpoint_id": endpoint_id, "key": key, "value": value}
        for key, value in sorted(attributes.items())
        if value is not None
    ]
    if kept:
        s.execute(sa.insert(endpoint_attributes), kept)


def _facts_changed(s: Session, *besides: sa.ColumnElement[bool]) -> None:
    """What was impossible may be possible now: rules that are stuck are looked at again, or have copies that shall
    leave their endpoint; and `besides`."""
    waiting = sa.select(tables.reasons.c.rule_id).where(tables.reasons.c.code == reasons.NOT_MOVED)
    concerned = sa.or_(tables.rules.c.state == RuleState.STUCK, tables.rules.c.id.in_(waiting), *besides)
    guards.change_rules(s, sa.select(tables.rules.c.id).where(concerned))
    s.execute(sa.update(tables.rules).where(concerned).values(evaluate_at=s.now))
    s.wake.add("evaluation")


def _update(s: Session, endpoint_id: int, values: dict[str, Any]) -> None:
    s.execute(sa.update(endpoints).where(endpoints.c.id == endpoint_id).values(values))


def _tell(s: Session, kind: str, endpoint_id: int, actor: Actor | None, **payload: Any) -> None:
    outbox.record(s, kind, endpoint_id, None if actor is None else accounts.account_id(s, actor.account), **payload)


def _protected(s: Session, endpoint_id: int) -> wire.Protected:
    """Of every unit the longest list: rules on the same one protect the same files."""
    locks = tables.locks
    here = locks.c.endpoint_id == endpoint_id
    unit = (
        sa.select(sa.func.max(locks.c.files_total).label("files"), sa.func.max(locks.c.bytes_total).label("bytes"))
        .where(here)
        .group_by(locks.c.unit_id)
        .subquery("unit")
    )
    sums = s.execute(
        sa.select(sa.func.coalesce(sa.func.sum(unit.c.files), 0), sa.func.coalesce(sa.func.sum(unit.c.bytes), 0))
    ).one()
    rules = s.execute(sa.select(sa.func.count(locks.c.rule_id.distinct())).where(here)).scalar_one()
    return wire.Protected(rules=rules, files=int(sums[0]), bytes=int(sums[1]))


def _free_bytes(row: sa.Row[Any]) -> int | None:
    """The smaller of what the capacity leaves and what the storage said, less what was placed there since."""
    free = []
    if row.capacity_bytes is not None:
        free.append(row.capacity_bytes - row.used_bytes)
    if row.reported_free_bytes is not None:
        free.append(row.reported_free_bytes - (row.used_bytes - row.reported_at_used_bytes))
    return max(0, min(free)) if free else None


def _endpoint(row: sa.Row[Any], attributes: dict[int, dict[str, AttributeValue]]) -> wire.Endpoint:
    return wire.Endpoint(
        id=row.id,
        name=row.name,
        site=row.site,
        kind=row.kind.label,
        url=row.url,
        layout=row.layout,
        attributes=attributes.get(row.id, {}),
        readable=row.readable,
        writable=row.writable,
        deletable=row.deletable,
        used_bytes=row.used_bytes,
        free_bytes=_free_bytes(row),
        capacity_bytes=row.capacity_bytes,
        draining=row.draining,
        status_reason=row.status_reason,
        status_since=row.status_since,
        min_free_bytes=row.min_free_bytes,
        delete_at_once=row.delete_at_once,
        grace_seconds=row.grace_seconds,
        budget_files=row.budget_files,
        budget_bytes=row.budget_bytes,
        decommissioned_at=row.decommissioned_at,
    )
