"""Metadata of DIDs: shown, changed one by one or many at once, and as facts for a condition.

Given     names, and what shall be set and unset.
Returns   the metadata as it is then; how many DIDs have other metadata than before.
Promises  all of a call is done, or nothing. A key is a path as in rules.conditions; what is set below a value that is
          no object replaces it. Statements do not grow with the number of DIDs.
Partner   replica.catalog.conditions searches it; subscriptions ask `facts`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import bulk, dids, outbox
from replica.catalog.documents import check_metadata
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import Json
from rules import conditions
from rules.errors import Invalid, InvalidExpression
from rules.names import Did
from rules.permissions import Actor
from rules.states import DidKind

_d = tables.dids.c


def get(s: Session, did: Did) -> wire.Metadata:
    did_id, _ = dids.row_id(s, did)
    found = s.execute(sa.select(_d.metadata).where(_d.id == did_id)).scalar_one()
    return wire.Metadata(did=str(did), metadata=found or {})


def change(s: Session, did: Did, change: wire.MetadataChange, actor: Actor | None = None) -> wire.Metadata:
    change_many(s, [wire.MetadataOf(did=str(did), set=change.set, unset=change.unset)], actor)
    return get(s, did)


def change_many(s: Session, changes: Sequence[wire.MetadataOf], actor: Actor | None = None) -> wire.MetadataChanged:
    """Several changes of one DID are done in their order."""
    if len(changes) > wire.BULK_MAX:
        raise Invalid(f"{len(changes)} are too many for one call", hint=f"at most {wire.BULK_MAX}", field="changes")
    wanted: dict[Did, list[wire.MetadataOf]] = {}
    for each in changes:
        wanted.setdefault(Did.parse(each.did), []).append(each)
    found = dids.resolve(s, wanted)
    before = _hold(s, [id_ for id_, _ in found.values()])
    rows: list[tuple[int, Any]] = []
    account_id = dids.account_of(s, actor)
    for did, (id_, kind) in found.items():
        after = _changed(did, before[id_] or {}, wanted[did])
        if after == (before[id_] or {}):
            continue
        rows.append((id_, after))
        if kind is not DidKind.FILE:
            keys = sorted({key for each in wanted[did] for key in (*each.set, *each.unset)})
            outbox.record(s, "did.metadata", id_, account_id, did=str(did), keys=keys[: dids.ITEMS_MAX])
    if rows:
        batch = bulk.rows_of(s, "changed_metadata", {"id": sa.BigInteger(), "metadata": Json}, rows)
        s.execute(
            tables.dids.update()
            .where(_d.id == batch.c.id)
            .values(metadata=sa.case((_is_empty(s, batch.c.metadata), sa.null()), else_=batch.c.metadata))
        )
    return wire.MetadataChanged(changed=len(rows))


def facts(s: Session, ids: Collection[int]) -> dict[int, dict[str, Any]]:
    """What rules.conditions.matches asks of a DID, by id; of those that are not deleted."""
    batch = bulk.ids_of(s, "facts_of", sorted(ids))
    rows = s.execute(dids.select().where(_d.id.in_(sa.select(batch.c.id)), _d.deleted_at.is_(None)))
    return {row.id: _facts(row) for row in rows}


def _facts(row: sa.Row[Any]) -> dict[str, Any]:
    is_file = row.kind is DidKind.FILE
    return {
        "kind": row.kind.label,
        "name": row.name,
        "scope": row.scope,
        "account": row.account,
        "created_at": row.created_at,
        "closed_at": row.closed_at,
        "expires_at": row.expires_at,
        "open": row.open,
        "monotonic": row.monotonic,
        "size": row.size_bytes,
        "files": 1 if is_file else row.files_total,
        "bytes": row.size_bytes if is_file else row.bytes_total,
        conditions.METADATA: row.metadata or {},
    }


def _hold(s: Session, ids: Sequence[int]) -> dict[int, Any]:
    batch = bulk.ids_of(s, "metadata_of", sorted(ids))
    query = (
        sa.select(_d.id, _d.metadata).join_from(batch, tables.dids, _d.id == batch.c.id).order_by(_d.kind.desc(), _d.id)
    )
    locked = query.with_for_update(of=tables.dids, key_share=True) if s.postgresql else query
    return {row.id: row.metadata for row in s.execute(locked)}


def _changed(did: Did, before: Mapping[str, Any], changes: Sequence[wire.MetadataOf]) -> dict[str, Any]:
    after = copy.deepcopy(dict(before))
    for change in changes:
        for text, value in change.set.items():
            _set(after, _path(text), value)
        for text in change.unset:
            _unset(after, _path(text))
    try:
        return check_metadata(after)
    except Invalid as error:
        raise Invalid(f"{did}: {error.message}", hint=error.hint, field=error.field) from None


def _path(text: str) -> tuple[str, ...]:
    """What a condition calls built-in, of the metadata is a key like any other."""
    try:
        return conditions.parse_key(text).path
    except InvalidExpression as error:
        raise Invalid(f"the key {text[:80]!a} cannot be one: {error.message}", hint=error.hint, field="set") from None


def _set(document: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *above, last = path
    for segment in above:
        inner = document.get(segment)
        if not isinstance(inner, dict):
            inner = document[segment] = {}
        document = inner
    document[last] = value


def _unset(document: dict[str, Any], path: Sequence[str]) -> None:
    """An object that becomes empty by it goes as well."""
    first, *rest = path
    if not rest:
        document.pop(first, None)
        return
    inner = document.get(first)
    if isinstance(inner, dict):
        _unset(inner, rest)
        if not inner:
            del document[first]


def _is_empty(s: Session, document: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
    return sa.cast(document, sa.Text()) == "{}"
