"""DIDs: files, datasets that hold files, containers that hold datasets and containers.

Given     names, as rules.names.Did.
Returns   what they are, what they hold, where the list goes on.
Promises  a dataset holds files only and a container none; nothing contains itself; what is closed does not change. A
          child is covered by the rules of its parents in the transaction that attaches it. The number of statements
          does not depend on the number of children.
Partner   replica.catalog.locks keeps rules true to the contents; replica.catalog.replicas brings files into being.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors, guards, locks, membership, scopes
from replica.catalog.documents import check_metadata
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import dids, files
from rules.checksums import DIGITS
from rules.errors import AlreadyExists, Invalid, NotFound, Refused, ReplicaError
from rules.names import Did, shown
from rules.permissions import Actor
from rules.states import DidKind

#: A pattern with more stars takes a database longer than anybody waits.
STARS_MAX = 5
PATTERN_LENGTH_MAX = 1_024
#: How many offending items of a bulk call are listed one by one.
ITEMS_MAX = 100

_HOLDS = {DidKind.DATASET: {DidKind.FILE}, DidKind.CONTAINER: {DidKind.DATASET, DidKind.CONTAINER}}


def add(s: Session, actor: Actor, new: wire.NewDid) -> wire.Did:
    did = Did.parse(new.did)
    values = {
        "scope_id": scopes.ids(s, [did.scope])[did.scope],
        "name": did.name,
        "kind": DidKind[new.kind.upper()],
        "account_id": accounts.account_id(s, actor.account),
        "metadata": check_metadata(new.metadata) or sa.null(),
        "created_at": s.now,
    }
    made = bulk.insert(s, dids).values(values).on_conflict_do_nothing()
    if s.execute(made.returning(dids.c.id)).one_or_none() is None:
        _, kind = row_id(s, did)
        raise AlreadyExists(f"there is a {kind.label} {did} already", field="did")
    return get(s, did)


def get(s: Session, did: Did) -> wire.Did:
    """With size and number of files; of a dataset or container those of everything in it, each file once."""
    row = s.execute(_select().where(tables.scopes.c.name == did.scope, dids.c.name == did.name)).one_or_none()
    if row is None:
        raise _missing(did)
    answer = _did(row)
    if row.kind is not DidKind.FILE:
        tree = membership.closure_of(row.id)
        held = (
            sa.select(files.c.did_id, files.c.size_bytes)
            .distinct()
            .select_from(tree)
            .join(tables.contents, tables.contents.c.parent_id == tree.c.id)
            .join(files, files.c.did_id == tables.contents.c.child_id)
            .subquery()
        )
        total = sa.func.coalesce(sa.func.sum(held.c.size_bytes), 0)
        answer.files, size = s.execute(sa.select(sa.func.count(), total).select_from(held)).one()
        answer.size = int(size)
    return answer


def list_page(
    s: Session,
    *,
    scope: str | None = None,
    pattern: str | None = None,
    kind: str | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.Did]:
    """DIDs in the order they were made. In `pattern`, `*` stands for any text and `?` for any character of the name.

    Sizes are those of files only: of a dataset, `get` counts them.
    """
    query = _select().order_by(dids.c.id).limit(cursors.check_limit(limit) + 1)
    if scope is not None:
        query = query.where(dids.c.scope_id == scopes.ids(s, [scope])[scope])
    if pattern is not None:
        query = query.where(_matches(s, pattern))
    if kind is not None:
        if kind.upper() not in DidKind.__members__:
            raise Invalid(f"{shown(kind)} is not a kind", hint="use file, dataset or container", field="kind")
        query = query.where(dids.c.kind == DidKind[kind.upper()])
    if after := cursors.unpack(cursor):
        query = query.where(dids.c.id > after[0])
    return cursors.page(s.execute(query).all(), limit, _did, lambda row: (row.id,))


def change(s: Session, did: Did, change: wire.DidChange) -> wire.Did:
    """Close or reopen a dataset or container."""
    did_id, kind = row_id(s, did)
    if change.open is not msgspec.UNSET:
        if kind is DidKind.FILE:
            raise Invalid(f"{did} is a file", hint="only datasets and containers are closed and reopened", field="did")
        # An attachment under way holds the row, and is complete before the door closes.
        values = {"open": change.open, "closed_at": None if change.open else s.now}
        s.execute(sa.update(dids).where(dids.c.id == did_id, dids.c.open != change.open).values(values))
    return get(s, did)


def contents(s: Session, did: Did, cursor: str | None, limit: int) -> wire.Page[wire.Did]:
    """What is directly in a dataset or container."""
    did_id, kind = row_id(s, did)
    if kind is DidKind.FILE:
        raise Invalid(f"{did} is a file and holds nothing", hint="ask for a dataset or container", field="did")
    query = (
        _select()
        .join(tables.contents, tables.contents.c.child_id == dids.c.id)
        .where(tables.contents.c.parent_id == did_id)
        .order_by(tables.contents.c.child_id)
        .limit(cursors.check_limit(limit) + 1)
    )
    if after := cursors.unpack(cursor):
        query = query.where(tables.contents.c.child_id > after[0])
    return cursors.page(s.execute(query).all(), limit, _did, lambda row: (row.id,))


def attach(s: Session, parent: Did, children: Sequence[Did]) -> wire.Attached:
    """Put children into an open dataset or container; those that are in it already stay."""
    parent_id, parent_kind = open_parent(s, parent, children)
    found = resolve(s, children)
    _refuse(
        Invalid,
        {did: f"{did} is a {kind.label}" for did, (_, kind) in found.items() if kind not in _HOLDS[parent_kind]},
        f"a {parent_kind.label} does not hold that",
        "datasets hold files; containers hold datasets and containers",
    )
    if parent_kind is DidKind.CONTAINER:
        above = membership.ancestors(s, [parent_id])
        looping = set(s.execute(sa.select(above.c.id)).scalars())
        _refuse(
            Refused,
            {did: f"{did} contains {parent}" for did, (id_, _) in found.items() if id_ in looping and did != parent}
            | {did: f"{did} is the container itself" for did in found if did == parent},
            f"{parent} would contain itself",
            "a container cannot be in one that is in it",
        )
    return wire.Attached(attached=attach_ids(s, parent_id, [id_ for id_, _ in found.values()]))


def attach_ids(s: Session, parent_id: int, child_ids: Sequence[int]) -> int:
    """Put children, known to fit, into a parent that `open_parent` holds; returns how many were not in it."""
    given = bulk.ids_of(s, "children", sorted(child_ids))
    rows = sa.select(sa.literal(parent_id, sa.BigInteger), given.c.id).where(sa.true()).order_by(given.c.id)
    made = bulk.insert(s, tables.contents).from_select(["parent_id", "child_id"], rows).on_conflict_do_nothing()
    new = [int(id_) for id_ in s.execute(made.returning(tables.contents.c.child_id)).scalars()]
    if new:
        locks.content_attached(s, parent_id, new)
    return len(new)


def detach(s: Session, parent: Did, children: Sequence[Did]) -> wire.Detached:
    """Take children out of an open dataset or container; those that are not in it are no error."""
    parent_id, _ = open_parent(s, parent, children)
    found = resolve(s, children)
    given = bulk.ids_of(s, "children", [id_ for id_, _ in found.values()])
    gone = sa.delete(tables.contents).where(
        tables.contents.c.parent_id == parent_id, tables.contents.c.child_id.in_(sa.select(given.c.id))
    )
    detached = [int(id_) for id_ in s.execute(gone.returning(tables.contents.c.child_id)).scalars()]
    if detached:
        locks.content_detached(s, parent_id, detached)
    return wire.Detached(detached=len(detached))


def open_parent(s: Session, parent: Did, children: Sequence[Did]) -> tuple[int, DidKind]:
    """The parent, held so that nobody else changes its contents. Refused when it is closed or cannot have any."""
    if len(children) > wire.BULK_MAX:
        raise Invalid(f"{len(children)} are too many for one call", hint=f"at most {wire.BULK_MAX}", field="dids")
    parent_id, kind = row_id(s, parent)
    if kind is DidKind.FILE:
        raise Invalid(f"{parent} is a file and holds nothing", hint="name a dataset or container", field="did")
    if kind is DidKind.CONTAINER:
        # Two at once could close a loop that neither sees. Before the container is held: the other may want to hold it.
        guards.one_at_a_time(s, "containers")
    guards.change_collection(s, parent_id)
    if not s.execute(sa.select(dids.c.open).where(dids.c.id == parent_id)).scalar_one():
        raise Refused(
            f"the {kind.label} {parent} is closed",
            hint=f"open it again with `replica did reopen {parent}`",
            field="did",
        )
    return parent_id, kind


def row_id(s: Session, did: Did) -> tuple[int, DidKind]:
    query = sa.select(dids.c.id, dids.c.kind).join_from(dids, tables.scopes)
    row = s.execute(query.where(tables.scopes.c.name == did.scope, dids.c.name == did.name)).one_or_none()
    if row is None:
        raise _missing(did)
    return row.id, row.kind


def resolve(s: Session, names: Sequence[Did]) -> dict[Did, tuple[int, DidKind]]:
    """Id and kind of each. NotFound names the first that does not exist, and says how many there are."""
    given = bulk.rows_of(
        s, "given_dids", {"scope": sa.String(), "name": sa.String()}, [(did.scope, did.name) for did in set(names)]
    )
    query = (
        sa.select(given.c.scope, given.c.name, dids.c.id, dids.c.kind)
        .select_from(given)
        .join(tables.scopes, tables.scopes.c.name == given.c.scope)
        .join(dids, sa.and_(dids.c.scope_id == tables.scopes.c.id, dids.c.name == given.c.name))
    )
    found = {Did(row.scope, row.name): (int(row.id), row.kind) for row in s.execute(query)}
    missing = {did: f"there is no DID {did}" for did in names if did not in found}
    _refuse(NotFound, missing, "", "`replica did list` shows what there is; files come into being by being registered")
    return {did: found[did] for did in dict.fromkeys(names)}


def _refuse(error: type[ReplicaError], wrong: dict[Did, str], sentence: str, hint: str) -> None:
    """Raise `error` about the first of `wrong`, with all of them as items."""
    if not wrong:
        return
    first, *others = wrong.values()
    more = f" (and {len(others)} more like it)" if others else ""
    raised = error(f"{first}{more}" + (f"; {sentence}" if sentence else ""), hint=hint, field="dids")
    raised.items = [{"did": str(did), "reason": reason} for did, reason in list(wrong.items())[:ITEMS_MAX]]
    raise raised


def _missing(did: Did) -> NotFound:
    return NotFound(
        f"there is no DID {did}", hint=f"`replica did list --scope {did.scope}` shows those of its scope", field="did"
    )


def _matches(s: Session, pattern: str) -> sa.ColumnElement[bool]:
    """Case counts on both databases: SQLite's LIKE does not distinguish it, its GLOB does."""
    if len(pattern) > PATTERN_LENGTH_MAX or pattern.count("*") > STARS_MAX or "\0" in pattern:
        raise Invalid(
            f"the pattern {shown(pattern)} cannot be used",
            hint=f"use at most {STARS_MAX} stars and {PATTERN_LENGTH_MAX} characters",
            field="pattern",
        )
    if s.postgresql:
        for special in "\\%_":
            pattern = pattern.replace(special, f"\\{special}")
        return dids.c.name.like(pattern.replace("*", "%").replace("?", "_"), escape="\\")
    return dids.c.name.op("GLOB")(pattern.replace("[", "[[]"))


def _select() -> sa.Select[Any]:
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


def _did(row: sa.Row[Any]) -> wire.Did:
    is_file = row.kind is DidKind.FILE
    values = row._mapping
    return wire.Did(
        did=f"{row.scope}:{row.name}",
        kind=row.kind.label,
        account=row.account,
        open=row.open,
        created_at=row.created_at,
        closed_at=row.closed_at,
        size=row.size_bytes,
        files=1 if is_file else None,
        checksums={algorithm: values[algorithm].hex() for algorithm in DIGITS if values[algorithm] is not None},
        metadata=row.metadata or {},
    )
