"""Endpoints: places that store, what is known of them, and what still fits there.

Given     a new endpoint or a change of one.
Returns   the endpoint; and for decisions one snapshot of all, with the links between them.
Promises  no two endpoints share a file: a root lies neither at nor beneath another's. Free space already leaves out
          what is on its way. A change of the facts makes stuck rules due at once.
Partner   rules.endpoints has the value that decisions see; replica.storage opens the URL.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, unquote, urlsplit

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import bulk, cursors, guards, sites
from replica.catalog.documents import check_attributes
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import endpoint_attributes, endpoints
from replica.storage.registry import open_storage
from rules import expressions
from rules.endpoints import AttributeValue, Endpoint, Link
from rules.errors import AlreadyExists, NotFound
from rules.names import check_word, shown
from rules.states import EndpointKind, RuleState


def add(s: Session, new: wire.NewEndpoint) -> wire.Endpoint:
    name = check_word(new.name, "an endpoint")
    url = normal_url(new.url, name)
    attributes = check_attributes(new.attributes, name)
    site = sites.site_id(s, new.site)
    guards.one_at_a_time(s, "endpoints")  # a new root is compared with all others
    for other in s.execute(sa.select(endpoints.c.name, endpoints.c.url).order_by(endpoints.c.id)):
        if other.name == name:
            raise AlreadyExists(f"there is an endpoint {name} already", field="name")
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
    _set_attributes(s, s.execute(made.returning(endpoints.c.id)).scalar_one(), attributes)
    _facts_changed(s)
    return get(s, name)


def get(s: Session, name: str) -> wire.Endpoint:
    found = row(s, name)
    return _endpoint(found, _attributes(s, [found.id]))


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


def change(s: Session, name: str, change: wire.EndpointChange) -> wire.Endpoint:
    endpoint_id = row(s, name).id
    _facts_changed(s)  # rules come before endpoints in the order in which rows are held
    fields = ("readable", "writable", "deletable", "capacity_bytes")
    values = {field: value for field in fields if (value := getattr(change, field)) is not msgspec.UNSET}
    if values:
        s.execute(sa.update(endpoints).where(endpoints.c.id == endpoint_id).values(values))
    if change.attributes is not msgspec.UNSET:
        _set_attributes(s, endpoint_id, check_attributes(change.attributes, name))
    return get(s, name)


def snapshot(s: Session) -> tuple[Endpoint, ...]:
    """All endpoints at this moment, by id."""
    rows = s.execute(_select().order_by(endpoints.c.id)).all()
    attributes = _attributes(s, None)
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
        )
        for r in rows
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


def _facts_changed(s: Session) -> None:
    """What was impossible may be possible now: rules that are stuck are looked at again."""
    stuck = tables.rules.c.state == RuleState.STUCK
    guards.change_rules(s, sa.select(tables.rules.c.id).where(stuck))
    s.execute(sa.update(tables.rules).where(stuck).values(evaluate_at=s.now))
    s.wake.add("evaluation")


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
    )
