"""DIDs: files, datasets that hold files, containers that hold datasets and containers.

Given     names, as rules.names.Did.
Returns   what they are, what they hold, where the list goes on.
Promises  a dataset holds files only and a container none; nothing contains itself; what is closed does not change;
          nothing is taken out of what is monotonic. A child is covered by the rules of its parents in the transaction
          that attaches it. The number of statements does not depend on the number of children. What is deleted is not
          found, and its name stays taken.
Partner   replica.catalog.locks keeps rules true to the contents; replica.catalog.replicas brings files into being;
          replica.catalog.did_deletion deletes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import (
    accounts,
    bulk,
    conditions,
    cursors,
    guards,
    history,
    locks,
    membership,
    outbox,
    scopes,
    totals,
)
from replica.catalog.documents import check_metadata
from replica.catalog.membership import Unguessed
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import dids, files
from rules.checksums import DIGITS
from rules.conditions import PATTERN_LENGTH_MAX, STARS_MAX, parse
from rules.errors import AlreadyExists, Conflict, Invalid, NotFound, Refused, ReplicaError
from rules.names import Did, shown
from rules.permissions import Actor
from rules.states import DidKind

#: How many offending items of a bulk call are listed one by one.
ITEMS_MAX = 100

_HOLDS = {DidKind.DATASET: {DidKind.FILE}, DidKind.CONTAINER: {DidKind.DATASET, DidKind.CONTAINER}}


def add(s: Session, actor: Actor, new: wire.NewDid) -> wire.Did:
    did = Did.parse(new.did)
    account_id = accounts.account_id(s, actor.account)
    values = {
        "scope_id": scopes.ids(s, [did.scope])[did.scope],
        "name": did.name,
        "kind": DidKind[new.kind.upper()],
        "account_id": account_id,
        "metadata": check_metadata(new.metadata) or sa.null(),
        "created_at": s.now,
        "monotonic": new.monotonic,
        "expires_at": None if new.lifetime_seconds is None else s.now + timedelta(seconds=new.lifetime_seconds),
    }
    if values["kind"] is DidKind.DATASET:
        values |= {"files_total": 0, "bytes_total": 0}
    made = bulk.insert(s, dids).values(values).on_conflict_do_nothing()
    did_id = s.execute(made.returning(dids.c.id)).scalar_one_or_none()
    if did_id is None:
        refuse_deleted(s, [did], "did")
        _, kind = row_id(s, did)
        raise AlreadyExists(f"there is a {kind.label} {did} already", hint="choose another name", field="did")
    outbox.record(s, "did.created", did_id, account_id, did=str(did), kind=new.kind)
    return get(s, did)


def get(s: Session, did: Did, *, deleted: bool = False) -> wire.Did:
    """With size and number of files; of a dataset or container those of everything in it, each file once.

    `deleted`: also when it was deleted.
    """
    query = select().where(tables.scopes.c.name == did.scope, dids.c.name == did.name)
    row = s.execute(query if deleted else query.where(dids.c.deleted_at.is_(None))).one_or_none()
    if row is None:
        raise _missing(s, did)
    answer = as_wire(row)
    if row.kind is DidKind.CONTAINER:
        answer.files, answer.size = _held(s, row.id)
    return answer


def _held(s: Session, container_id: int) -> tuple[int, int]:
    """Files below a container, and their bytes, each file once.

    What a dataset holds that shares none of its files is read from its row; only the others are looked into.
    """
    tree = membership.closure_of(container_id)
    alone = (
        sa.select(sa.func.sum(dids.c.files_total), sa.func.sum(dids.c.bytes_total))
        .select_from(tree)
        .join(dids, dids.c.id == tree.c.id)
        .where(sa.not_(dids.c.shared))
    )
    held = (
        sa.select(files.c.did_id, files.c.size_bytes)
        .distinct()
        .select_from(tree)
        .join(dids, dids.c.id == tree.c.id)
        .join(tables.contents, tables.contents.c.parent_id == tree.c.id)
        .join(files, files.c.did_id == tables.contents.c.child_id)
        .where(dids.c.shared)
        .subquery()
    )
    shared = sa.select(sa.func.count(), sa.func.sum(held.c.size_bytes)).select_from(held)
    count, size = 0, 0
    for files_, bytes_ in s.execute(sa.union_all(alone, shared)):
        count, size = count + int(files_ or 0), size + int(bytes_ or 0)
    return count, size


def list_page(
    s: Session,
    *,
    scope: str | None = None,
    pattern: str | None = None,
    kind: str | None = None,
    where: str | None = None,
    sort: str | None = None,
    deleted: bool = False,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.Did]:
    """DIDs in the order they were made, or by `sort`. In `pattern`, `*` stands for any text and `?` for any character
    of the name; `where` is a condition (see rules.conditions). With `deleted` those that were deleted, and no others.

    Sizes are those of files and datasets: those of a container, `get` counts.
    """
    query = select().limit(cursors.check_limit(limit) + 1)
    query = query.where(dids.c.deleted_at.is_not(None) if deleted else dids.c.deleted_at.is_(None))
    if scope is not None:
        query = query.where(dids.c.scope_id == scopes.ids(s, [scope])[scope])
    if pattern is not None:
        _check_pattern(pattern)
        query = query.where(conditions.matches(s, dids.c.name, pattern))
    if kind is not None:
        if kind.upper() not in DidKind.__members__:
            raise Invalid(f"{shown(kind)} is not a kind", hint="use file, dataset or container", field="kind")
        query = query.where(dids.c.kind == DidKind[kind.upper()])
    after = cursors.unpack(cursor) if sort is None else None
    if where is not None:
        start = (after or (0,))[0] if sort is None else None
        query = conditions.select_where(s, query, parse(where), after=start, limit=limit)
    if sort is None:
        if after is not None:
            query = query.where(dids.c.id > after[0])
        return cursors.page(s.execute(query.order_by(dids.c.id)).all(), limit, as_wire, lambda row: (row.id,))
    sorting = conditions.Sorting(s, sort)
    query = query.add_columns(*sorting.columns).order_by(*sorting.order())
    if cursor is not None:
        query = query.where(sorting.after(cursor))
    return cursors.page(s.execute(query).all(), limit, as_wire, sorting.key)


def change(s: Session, did: Did, change: wire.DidChange, actor: Actor | None = None) -> wire.Did:
    """Close or reopen a dataset or container, make it monotonic; give anything a lifetime."""
    did_id, kind = row_id(s, did)
    if kind is DidKind.FILE and (change.open is not msgspec.UNSET or change.monotonic is not msgspec.UNSET):
        raise Invalid(f"{did} is a file", hint="only datasets and containers are closed and reopened", field="did")
    # An attachment under way holds the row, and is complete before the door closes.
    guards.change_collection(s, did_id)
    now = s.execute(sa.select(dids.c.open, dids.c.monotonic).where(dids.c.id == did_id)).one()
    if change.monotonic is False and now.monotonic:
        raise Refused(
            f"the {kind.label} {did} is monotonic, and stays so",
            hint="make another one, and attach to it what should go on",
            field="monotonic",
        )
    values: dict[str, Any] = {}
    told: dict[str, Any] = {}
    if change.open is not msgspec.UNSET and change.open is not now.open:
        values |= {"open": change.open, "closed_at": None if change.open else s.now}
    if change.monotonic is True and not now.monotonic:
        values["monotonic"] = told["monotonic"] = True
    if change.lifetime_seconds is not msgspec.UNSET:
        seconds = told["lifetime_seconds"] = change.lifetime_seconds
        values["expires_at"] = None if seconds is None else s.now + timedelta(seconds=seconds)
    if values:
        s.execute(sa.update(dids).where(dids.c.id == did_id).values(values))
    if kind is not DidKind.FILE:
        account_id = account_of(s, actor)
        if "open" in values:
            outbox.record(s, "did.reopened" if change.open else "did.closed", did_id, account_id, did=str(did))
        if told:
            outbox.record(s, "did.changed", did_id, account_id, did=str(did), **told)
    return get(s, did)


def account_of(s: Session, actor: Actor | None) -> int | None:
    """Who did it, for the history; None: unattended work."""
    return None if actor is None else accounts.account_id(s, actor.account)


def history_page(s: Session, did: Did, cursor: str | None, limit: int) -> wire.Page[wire.HistoryEntry]:
    """What happened to it, also when it was deleted."""
    did_id, _ = row_id(s, did, deleted=True)
    return history.of_entity(s, "did", did_id, cursor=cursor, limit=limit)


def contents(s: Session, did: Did, cursor: str | None, limit: int) -> wire.Page[wire.Did]:
    """What is directly in a dataset or container."""
    did_id, kind = row_id(s, did)
    if kind is DidKind.FILE:
        raise Invalid(f"{did} is a file and holds nothing", hint="ask for a dataset or container", field="did")
    query = (
        select()
        .join(tables.contents, tables.contents.c.child_id == dids.c.id)
        .where(tables.contents.c.parent_id == did_id, dids.c.deleted_at.is_(None))
        .order_by(tables.contents.c.child_id)
        .limit(cursors.check_limit(limit) + 1)
    )
    if after := cursors.unpack(cursor):
        query = query.where(tables.contents.c.child_id > after[0])
    return cursors.page(s.execute(query).all(), limit, as_wire, lambda row: (row.id,))


def attach(s: Session, parent: Did, children: Sequence[Did], actor: Actor | None = None) -> wire.Attached:
    """Put children into an open dataset or container; those that are in it already stay."""
    _check_number(children)
    found = {place: (id_, kind) for place, id_, kind in _find(s, [parent, *children])}
    if 0 not in found:
        raise _missing(s, parent)
    parent_id, parent_kind = found.pop(0)
    _hold_open(s, parent, parent_id, parent_kind, [id_ for id_, kind in found.values() if kind is DidKind.FILE])
    ids = {id_ for id_, _ in found.values()}
    # Which of them does not exist or is of another kind is only looked for when there is one.
    files_only = all(kind is DidKind.FILE for _, kind in found.values())
    if parent_kind is DidKind.CONTAINER or not files_only or len(found) < len(children):
        sure = resolve(s, children)
        _check_fit(s, parent, parent_id, parent_kind, sure)
        ids = {id_ for id_, _ in sure.values()}
    attached = attach_ids(s, parent_id, parent_kind, ids)
    if attached:
        outbox.record(s, "did.attached", parent_id, account_of(s, actor), did=str(parent), attached=attached)
    return wire.Attached(attached=attached)


def attach_all(s: Session, attachments: Sequence[wire.Attaching], actor: Actor | None = None) -> wire.Attached:
    """The same for several parents: all of it or nothing."""
    wanted: dict[Did, list[Did]] = {}
    for each in attachments:
        wanted.setdefault(Did.parse(each.parent), []).extend(map(Did.parse, each.children))
    count = sum(map(len, wanted.values()))
    if count > wire.BULK_MAX:
        raise Invalid(f"{count} children are too many for one call", hint=f"at most {wire.BULK_MAX}", field="children")
    parents = resolve(s, wanted)
    _hold_for_attaching(s, parents.values(), resolve(s, [child for each in wanted.values() for child in each]).values())
    attached = 0
    for parent in sorted(wanted, key=lambda did: parents[did][0]):
        attached += attach(s, parent, wanted[parent], actor).attached
    return wire.Attached(attached=attached)


def _hold_for_attaching(
    s: Session, parents: Iterable[tuple[int, DidKind]], children: Iterable[tuple[int, DidKind]]
) -> None:
    """All that attaching to one parent after the other will hold, each kind before the next (see guards)."""
    if not s.postgresql:
        return
    parent_ids = sorted(id_ for id_, _ in parents)
    below = list(children)
    guards.one_at_a_time(s, "containers")
    joining = bulk.ids_of(s, "joining_files", sorted({id_ for id_, kind in below if kind is DidKind.FILE}))
    those = sa.select(bulk.ids_of(s, "parents", parent_ids).c.id)
    guards.change_collections(s, sa.union(those, totals.datasets_of(s.postgresql, joining)))
    guards.keep_collections(s, [id_ for id_, kind in below if kind is not DidKind.FILE], nested=True)
    totals.hold_files(s, joining)
    above = membership.ancestors(s, parent_ids)
    if guards.change_rules(s, sa.select(tables.rules.c.id).where(tables.rules.c.did_id.in_(sa.select(above.c.id)))):
        guards.change_endpoints(s, sa.select(tables.endpoints.c.id))


def _check_fit(
    s: Session, parent: Did, parent_id: int, parent_kind: DidKind, found: dict[Did, tuple[int, DidKind]]
) -> None:
    refuse(
        Invalid,
        {did: f"{did} is a {kind.label}" for did, (_, kind) in found.items() if kind not in _HOLDS[parent_kind]},
        f"a {parent_kind.label} does not hold that",
        "datasets hold files; containers hold datasets and containers",
    )
    if parent_kind is DidKind.CONTAINER:
        above = membership.ancestors(s, [parent_id])
        looping = set(s.execute(sa.select(above.c.id)).scalars())
        refuse(
            Refused,
            {did: f"{did} contains {parent}" for did, (id_, _) in found.items() if id_ in looping and did != parent}
            | {did: f"{did} is the container itself" for did in found if did == parent},
            f"{parent} would contain itself",
            "a container cannot be in one that is in it",
        )


def attach_ids(s: Session, parent_id: int, parent_kind: DidKind, child_ids: Collection[int]) -> int:
    """Put children, known to fit, into a parent that `open_parent` holds; returns how many were not in it."""
    given = bulk.ids_of(s, "children", sorted(child_ids))
    rows = sa.select(sa.literal(parent_id, sa.BigInteger), given.c.id).where(sa.true()).order_by(given.c.id)
    if parent_kind is DidKind.DATASET and s.postgresql:
        held, walk = totals.held_files(s, given)
        those = sa.select(sa.literal(parent_id, sa.BigInteger), held.c.id).select_from(walk)
        rows = those.where(held.c.deleted_at.is_(None))
    made = bulk.insert(s, tables.contents).from_select(["parent_id", "child_id"], rows).on_conflict_do_nothing()
    new = s.execute(made.returning(tables.contents.c.child_id)).scalars().all()
    if parent_kind is DidKind.CONTAINER:
        guards.keep_collections(s, new, nested=True)
    if s.postgresql and (len(new) < len(child_ids) or parent_kind is DidKind.CONTAINER):
        _refuse_deleted(s, given)
    if new:
        batch = given if len(new) == len(child_ids) else bulk.ids_of(s, "joined", new)
        locks.content_attached(s, parent_id, parent_kind, new, batch)
    return len(new)


def _refuse_deleted(s: Session, batch: sa.FromClause) -> None:
    """Conflict when one of these children, which the caller holds, was deleted after it was looked up."""
    gone = sa.select(1).select_from(batch).join(dids, dids.c.id == batch.c.id)
    if s.execute(gone.where(Unguessed(dids.c.deleted_at.is_not(None))).limit(1)).scalar() is not None:
        raise Conflict("one of these was deleted at this moment", hint="repeat the request")


def detach(s: Session, parent: Did, children: Sequence[Did], actor: Actor | None = None) -> wire.Detached:
    """Take children out of an open dataset or container; those that are not in it are no error."""
    parent_id, kind = open_parent(s, parent, children)
    if s.execute(sa.select(dids.c.monotonic).where(dids.c.id == parent_id)).scalar_one():
        raise Refused(
            f"the {kind.label} {parent} is monotonic: nothing is ever taken out of it",
            hint="make another one without it",
            field="did",
        )
    found = resolve(s, children)
    detached = detach_ids(s, parent_id, [id_ for id_, _ in found.values()])
    if detached:
        outbox.record(s, "did.detached", parent_id, account_of(s, actor), did=str(parent), detached=detached)
    return wire.Detached(detached=detached)


def detach_ids(s: Session, parent_id: int, child_ids: Sequence[int]) -> int:
    """Take children out of a parent that the caller holds; returns how many were in it."""
    given = bulk.ids_of(s, "children", child_ids)
    gone = sa.delete(tables.contents).where(
        tables.contents.c.parent_id == parent_id, tables.contents.c.child_id.in_(sa.select(given.c.id))
    )
    detached = [int(id_) for id_ in s.execute(gone.returning(tables.contents.c.child_id)).scalars()]
    if detached:
        locks.content_detached(s, parent_id, detached)
    return len(detached)


def open_parent(s: Session, parent: Did, children: Sequence[Did]) -> tuple[int, DidKind]:
    """The parent, held so that nobody else changes its contents. Refused when it is closed or cannot have any."""
    _check_number(children)
    parent_id, kind = row_id(s, parent)
    _hold_open(s, parent, parent_id, kind)
    return parent_id, kind


def _check_number(children: Sequence[Did]) -> None:
    if len(children) > wire.BULK_MAX:
        raise Invalid(f"{len(children)} are too many for one call", hint=f"at most {wire.BULK_MAX}", field="dids")


def _hold_open(s: Session, parent: Did, parent_id: int, kind: DidKind, file_ids: Sequence[int] = ()) -> None:
    """With the datasets that share some of these files, which are about to come."""
    if kind is DidKind.FILE:
        raise Invalid(f"{parent} is a file and holds nothing", hint="name a dataset or container", field="did")
    if kind is DidKind.CONTAINER:
        # Two at once could close a loop that neither sees. Before the container is held: the other may want to hold it.
        guards.one_at_a_time(s, "containers")
    now = totals.hold_parent(s, parent_id, file_ids)
    if now.deleted_at is not None:  # while we waited for it
        raise _missing(s, parent)
    if not now.open:
        raise Refused(
            f"the {kind.label} {parent} is closed",
            hint=f"open it again with `replica did reopen {parent}`",
            field="did",
        )


def row_id(s: Session, did: Did, *, deleted: bool = False) -> tuple[int, DidKind]:
    """`deleted`: also when it was deleted."""
    query = sa.select(dids.c.id, dids.c.kind, dids.c.deleted_at).join_from(dids, tables.scopes)
    row = s.execute(query.where(tables.scopes.c.name == did.scope, dids.c.name == did.name)).one_or_none()
    if row is None or (row.deleted_at is not None and not deleted):
        raise _missing(s, did)
    return row.id, row.kind


def resolve(s: Session, names: Collection[Did], *, deleted: bool = False) -> dict[Did, tuple[int, DidKind]]:
    """Id and kind of each. NotFound names the first that does not exist, and says how many there are.

    `deleted`: also those that were deleted.
    """
    wanted = list(names)
    found = {wanted[place]: (id_, kind) for place, id_, kind in _find(s, wanted, deleted=deleted)}
    missing = {did: f"there is no DID {did}" for did in names if did not in found}
    refuse(NotFound, missing, "", "`replica did list` shows what there is; files come into being by being registered")
    return {did: found[did] for did in dict.fromkeys(names)}


def _find(s: Session, names: Sequence[Did], *, deleted: bool = False) -> Iterator[tuple[int, int, DidKind]]:
    """Place in `names`, id and kind of those that there are."""
    columns: bulk.Columns = {"place": sa.Integer(), "scope": sa.String(), "name": sa.String()}
    values = [range(len(names)), [did.scope for did in names], [did.name for did in names]]
    given = bulk.columns_of(s, "given_dids", columns, values)
    there, walk = membership.dids_named(s, given)
    # A bare number: thousands have no time for a converter each.
    query = sa.select(given.c.place, there.c.id, sa.type_coerce(there.c.kind, sa.SmallInteger)).select_from(walk)
    if not deleted:
        query = query.where(there.c.deleted_at.is_(None))
    kinds = {kind.value: kind for kind in DidKind}
    return ((place, id_, kinds[kind]) for place, id_, kind in s.execute(query).all())


def refuse(error: type[ReplicaError], wrong: dict[Did, str], sentence: str, hint: str) -> None:
    """Raise `error` about the first of `wrong`, with all of them as items."""
    if not wrong:
        return
    first, *others = wrong.values()
    more = f" (and {len(others)} more like it)" if others else ""
    raised = error(f"{first}{more}" + (f"; {sentence}" if sentence else ""), hint=hint, field="dids")
    raised.items = [{"did": str(did), "reason": reason} for did, reason in list(wrong.items())[:ITEMS_MAX]]
    raise raised


def _missing(s: Session, did: Did) -> NotFound:
    found = s.execute(_named([did])).one_or_none()
    if found is None or found.deleted_at is None:
        hint = f"`replica did list --scope {did.scope}` shows those of its scope"
        return NotFound(f"there is no DID {did}", hint=hint, field="did")
    at = f"{found.deleted_at:%Y-%m-%d %H:%M} UTC"
    return NotFound(f"{did} was deleted at {at}", hint=_way_back(did, found.final_at), field="did")


def _way_back(did: Did, final_at: datetime | None) -> str:
    if final_at is None:
        return "it is gone for good, and its name stays taken: a name stands for one content for ever"
    return f"until {final_at:%Y-%m-%d %H:%M} UTC it can be had back: `replica did undelete {did}`"


def refuse_deleted(s: Session, names: Collection[Did], field: str) -> None:
    """AlreadyExists about the first of these that was deleted: a name is never used again."""
    gone = {Did(row.scope, row.name): row for row in s.execute(_named(names)) if row.deleted_at is not None}
    if not gone:
        return
    first = next(did for did in names if did in gone)
    more = f" (and {len(gone) - 1} more like it)" if len(gone) > 1 else ""
    raised = AlreadyExists(
        f"{first} was deleted, and its name stays taken{more}", hint=_way_back(first, gone[first].final_at), field=field
    )
    raised.items = [{"did": str(did), "reason": "it was deleted"} for did in list(gone)[:ITEMS_MAX]]
    raise raised


def _named(names: Collection[Did]) -> sa.Select[Any]:
    columns = tables.scopes.c.name.label("scope"), dids.c.name, dids.c.id, dids.c.deleted_at, dids.c.final_at
    pairs = [(did.scope, did.name) for did in names]
    query = sa.select(*columns).join_from(dids, tables.scopes)
    return query.where(sa.tuple_(tables.scopes.c.name, dids.c.name).in_(pairs))


def _check_pattern(pattern: str) -> None:
    if len(pattern) > PATTERN_LENGTH_MAX or pattern.count("*") > STARS_MAX or "\0" in pattern:
        raise Invalid(
            f"the pattern {shown(pattern)} cannot be used",
            hint=f"use at most {STARS_MAX} stars and {PATTERN_LENGTH_MAX} characters",
            field="pattern",
        )


def select() -> sa.Select[Any]:
    return (
        sa.select(
            dids,
            tables.scopes.c.name.label("scope"),
            tables.accounts.c.name.label("account"),
            files.c.size_bytes,
            *(files.c[algorithm] for algorithm in DIGITS),
        )
        .join_from(dids, tables.scopes, tables.scopes.c.id == dids.c.scope_id)
        .join(tables.accounts, tables.accounts.c.id == dids.c.account_id)
        .join(files, files.c.did_id == dids.c.id, isouter=True)
    )


def as_wire(row: sa.Row[Any]) -> wire.Did:
    is_file = row.kind is DidKind.FILE
    values = row._mapping
    return wire.Did(
        did=f"{row.scope}:{row.name}",
        kind=row.kind.label,
        account=row.account,
        open=row.open,
        created_at=row.created_at,
        closed_at=row.closed_at,
        size=row.size_bytes if is_file else row.bytes_total,
        files=1 if is_file else row.files_total,
        checksums={algorithm: values[algorithm].hex() for algorithm in DIGITS if values[algorithm] is not None},
        metadata=row.metadata or {},
        monotonic=row.monotonic,
        expires_at=row.expires_at,
        deleted_at=row.deleted_at,
        final_at=row.final_at,
    )
