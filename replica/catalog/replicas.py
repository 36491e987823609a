"""Replicas: which file is at which endpoint, and what proves it.

Given     files that lie at an endpoint already, or the name of what to look for.
Returns   what was new; or where the replicas are, in pages or as a stream.
Promises  a registration is done whole or not at all, may be repeated, and takes the same number of statements for one
          file as for ten thousand. A size or checksum that contradicts the catalogue is refused, naming the file. What
          nobody read does not count as a copy: it waits until a worker of the site has verified it in place.
Partner   replica.catalog.locks tells the rules; replica.catalog.transfers hands the verifications out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NoReturn, assert_never
from urllib.parse import quote

import sqlalchemy as sa

from replica import wire
from replica.catalog import (
    accounts,
    bulk,
    cursors,
    dark,
    dids,
    endpoints,
    hops,
    locks,
    membership,
    outbox,
    provision,
    revival,
    scopes,
    totals,
)
from replica.catalog.rule_states import settle
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import contents, files, instant, replicas, transfers
from replica.storage.base import check_path
from rules.checksums import DIGITS, Packed, packed
from rules.errors import AlreadyExists, Conflict, Invalid, Refused, ReplicaError
from rules.names import Did, shown
from rules.paths import is_injective, owners, path_for
from rules.permissions import Actor
from rules.states import DidKind, Evidence, ReplicaState, TransferState

#: At least one of these must be given: without any, nothing can ever be verified.
SUFFICIENT = frozenset({"sha256", "xxh3_128", "md5", "adler32"})
#: The activity of transfers that only verify what lies at their target already.
VERIFICATION = "verification"
_PRIORITY = 3
#: Rows a stream reads at a time.
_STREAM_ROWS = 5_000

_CHECKSUM_COLUMNS: bulk.Columns = {algorithm: sa.LargeBinary() for algorithm in DIGITS}


@dataclass(slots=True)
class _Given:
    """One file of a registration."""

    did: Did
    size: int
    checksums: Packed
    path: str | None
    file_id: int = 0
    #: The catalogue did not know it: so no rule covers it, and nothing is on its way.
    new: bool = False
    #: The bytes at the endpoint were read, and a common checksum says that they are the catalogue's.
    proven: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    """What the catalogue knew of a DID before."""

    id: int
    kind: DidKind
    size: int | None
    checksums: Packed


def register(s: Session, actor: Actor, registration: wire.Registration) -> wire.Registered:
    """Enter files that are at an endpoint already, and put them into the dataset, which is made where it is not yet."""
    endpoint = endpoints.row(s, registration.endpoint)
    given = _read(registration, endpoint.layout)
    dataset = None if registration.dataset is None else Did.parse(registration.dataset)
    if dataset in given:
        raise Invalid(f"{dataset} cannot be a file and the dataset that holds it", field="dataset")
    names = {did.scope for did in given} | ({dataset.scope} if dataset is not None else set())
    scope_ids = scopes.ids(s, names)
    account_id = accounts.account_id(s, actor.account)

    def enter() -> wire.Registered:
        hashed = registration.evidence == "hashed"
        return _enter(s, endpoint, dataset, given, scope_ids, account_id, hashed)

    if dataset is None or not s.postgresql:
        return enter()
    for _ in range(5):
        with contextlib.suppress(_TooLate), s.savepoint():
            return enter()
    raise Conflict(f"others put the same files into datasets besides {dataset}", hint="repeat the request")


class _TooLate(Exception):
    """Another dataset has come to hold some of the files, and somebody else holds it: let go of ours, begin again."""


def _enter(
    s: Session,
    endpoint: sa.Row[Any],
    dataset: Did | None,
    given: dict[Did, _Given],
    scope_ids: dict[str, int],
    account_id: int,
    hashed: bool,
) -> wire.Registered:
    # Everybody holds rows in this order: dataset, files, rules, endpoints, replicas (see replica.catalog.guards).
    if dataset is not None:
        totals.hold_datasets(s, dataset, given)
    dataset_id = None if dataset is None else _open_dataset(s, dataset, scope_ids, account_id)
    everything = sorted(given.values(), key=attrgetter("did"))
    known = _files(s, everything, scope_ids, account_id, hashed)
    if dataset is not None and known:
        batch = bulk.ids_of(s, "registered", sorted(file.file_id for file in known))
        totals.hold_files(s, batch)
        if not totals.hold_late(s, batch):
            raise _TooLate
    covered = _pairs(s, "held", known, endpoint.id) if known else None
    locks.hold_for_registration(s, covered, endpoint.id, dataset_id)
    _refuse_taken_paths(s, everything, endpoint)
    dark.refuse_claimed(
        s, endpoint.id, endpoint.name, lambda: [file.path or path_for(file.did, endpoint.layout) for file in everything]
    )

    made, came, waiting = _replicas(s, everything, endpoint.id, endpoint.name)
    if covered is not None:
        hops.others_own(s, covered)  # in whatever state they are
    to_verify = [*(file for file in made if not file.proven), *waiting]
    if to_verify:
        _verifications(s, to_verify, waiting, endpoint.id, endpoint.site_id)
        s.wake.add(f"site.{endpoint.site}")
    # Before the files are put into the dataset: its rules then count them once, as available, when they come in.
    if came:
        locks.replicas_became_available(s, _pairs(s, "came", came, endpoint.id))
    if entered := [file for file in made if file.proven and not file.new]:
        locks.replicas_became_available(s, _pairs(s, "entered", entered, endpoint.id), none_there=True)
    attached = 0
    if dataset_id is not None:
        attached = dids.attach_ids(s, dataset_id, DidKind.DATASET, [file.file_id for file in everything])
        if attached:
            outbox.record(s, "did.attached", dataset_id, account_id, did=str(dataset), attached=attached)
    new = len(everything) - len(known)
    return wire.Registered(files=len(everything), new=new, attached=attached, to_verify=len(to_verify))


def locate(s: Session, did: Did, cursor: str | None, limit: int) -> wire.Page[wire.Replica]:
    """The replicas of a file, or of all files of a dataset or container.

    A page may hold less than `limit`, where files have no replica, and the list still goes on: `next` says so.
    """
    cursors.check_limit(limit)
    file_id, endpoint_id = cursors.unpack(cursor, 2) or (0, 0)
    held = _files_of(s, did)
    id_ = held.selected_columns.file_id
    # First some files in the order of the index, then their replicas: a page costs the same wherever it is. Each file
    # gives a row, if only one that says it has no replica, except perhaps the file the last page ended in.
    some = held.where(id_ >= file_id).order_by(id_).limit(limit + 2).subquery("some")
    query = (
        _columns(some.c.file_id)
        .select_from(some)
        .join(files, files.c.did_id == some.c.file_id)
        .join(tables.dids, tables.dids.c.id == some.c.file_id)
        # What is deleted has, like what has no replica, a row that says nothing.
        .join(
            replicas,
            sa.and_(replicas.c.file_id == some.c.file_id, tables.dids.c.deleted_at.is_(None)),
            isouter=True,
        )
        .where(sa.or_(some.c.file_id > file_id, replicas.c.endpoint_id > endpoint_id))
        .order_by(some.c.file_id, replicas.c.endpoint_id)
        .limit(limit + 1)
    )
    rows = s.execute(query).all()
    show = _Printer(s)
    following = cursors.pack(rows[limit - 1][0], rows[limit - 1][1] or 0) if len(rows) > limit else None
    return wire.Page(items=[show(row) for row in rows[:limit] if row[1] is not None], next=following)


def stream(s: Session, did: Did) -> Iterator[wire.Replica]:
    """All that the pages of `locate` would give, in constant memory however many they are."""
    query = (
        _columns(replicas.c.file_id)
        .join_from(replicas, files, files.c.did_id == replicas.c.file_id)
        .join(tables.dids, tables.dids.c.id == replicas.c.file_id)
        .where(replicas.c.file_id.in_(_files_of(s, did)), tables.dids.c.deleted_at.is_(None))
        .order_by(replicas.c.file_id, replicas.c.endpoint_id)
    )
    show = _Printer(s)
    with membership.by_index(s):  # decided when the stream begins
        rows = s.execute(query.execution_options(yield_per=_STREAM_ROWS))
    return map(show, rows)


# --- what the caller says -------------------------------------------------------------------------------------------


def _read(registration: wire.Registration, layout: str) -> dict[Did, _Given]:
    """The files by name, each checked by itself. The same file twice is one; twice and different is Invalid."""
    given: dict[Did, _Given] = {}
    if len(registration.replicas) > wire.BULK_MAX:
        raise Invalid(f"{len(registration.replicas)} files are too many", hint=f"at most {wire.BULK_MAX} in one call")
    for replica in registration.replicas:
        did = Did.parse(replica.did)
        try:
            checksums = packed(replica.checksums)
            if replica.checksums.keys().isdisjoint(SUFFICIENT):
                raise Invalid("no checksum to verify it by is given", hint="give one of xxh3_128, sha256, md5, adler32")
            path = None if replica.path is None else check_path(replica.path)
        except Invalid as error:
            raise Invalid(f"{did}: {error.message}", hint=error.hint, field=error.field or "replicas") from None
        if path is not None and path == path_for(did, layout):
            path = None
        file = _Given(did, replica.size, checksums, path)
        if (before := given.setdefault(did, file)) is not file and before != file:
            raise Invalid(f"{did} is given twice, with different values", hint="give it once", field="replicas")
    paths: dict[str, Did] = {}
    for did, file in given.items():
        if file.path is not None and paths.setdefault(file.path, did) != did:
            raise Invalid(
                f"{paths[file.path]} and {did} are given the same path {shown(file.path)}",
                hint="one path holds one file",
                field="replicas",
            )
    return given


# --- DIDs and files -------------------------------------------------------------------------------------------------


def _open_dataset(s: Session, dataset: Did, scope_ids: dict[str, int], account_id: int) -> int:
    made = bulk.insert(s, tables.dids).values(
        scope_id=scope_ids[dataset.scope],
        name=dataset.name,
        kind=DidKind.DATASET,
        account_id=account_id,
        created_at=s.now,
        metadata=sa.null(),
        files_total=0,
        bytes_total=0,
    )
    new_id = s.execute(made.on_conflict_do_nothing().returning(tables.dids.c.id)).scalar_one_or_none()
    if new_id is not None:
        outbox.record(s, "did.created", new_id, account_id, did=str(dataset), kind=DidKind.DATASET.label)
    dataset_id, kind = dids.open_parent(s, dataset, [])
    if kind is not DidKind.DATASET:
        raise Invalid(f"{dataset} is a {kind.label} and does not hold files", hint="name a dataset", field="dataset")
    return dataset_id


def _files(
    s: Session, given: Sequence[_Given], scope_ids: dict[str, int], account_id: int, hashed: bool
) -> list[_Given]:
    """Give every file its id and say whether it is new, and proven; returns those that are not new.

    `given` is sorted by scope and name: two registrations of the same new names wait for each other in one order.
    """
    _make(s, given, scope_ids, account_id)
    there = [file for file in given if not file.new]
    known = _known(s, there, scope_ids) if there else {}
    _refuse_other_content(there, known)
    learned = []
    for file in given:
        file.proven = hashed
        if not file.new:
            before = known[file.did]
            file.file_id = before.id
            common, more = _compared(file.checksums, before.checksums)
            file.proven = hashed and common
            if file.proven and more:
                learned.append(file)
    if learned:
        _learn(s, learned)
    return there


def _compared(given: Packed, known: Packed) -> tuple[bool, bool]:
    """Whether any checksum is in both, and whether any is not known. None of them differs."""
    both = list(zip(given, known, strict=True))
    common = any(mine is not None and theirs is not None for mine, theirs in both)
    return common, any(mine is not None and theirs is None for mine, theirs in both)


def _named(s: Session, given: Sequence[_Given], scope_ids: dict[str, int]) -> sa.FromClause:
    """`(ord, scope_id, name)`; `ord` is the place in `given`."""
    columns: bulk.Columns = {"ord": sa.Integer(), "scope_id": sa.BigInteger(), "name": sa.String()}
    values = [range(len(given)), [scope_ids[file.did.scope] for file in given], [file.did.name for file in given]]
    return bulk.columns_of(s, "names", columns, values)


def _known(s: Session, given: Sequence[_Given], scope_ids: dict[str, int]) -> dict[Did, _Known]:
    names = _named(s, given, scope_ids)
    there, walk = membership.dids_named(s, names)
    query = (
        sa.select(names.c.ord, there.c.id, there.c.kind, there.c.deleted_at, files)
        .select_from(walk)
        .join(files, files.c.did_id == there.c.id, isouter=True)
    )
    met = s.execute(query).all()
    if gone := [given[row.ord].did for row in met if row.deleted_at is not None]:
        dids.refuse_deleted(s, gone, "replicas")
    return {given[row.ord].did: _Known(int(row.id), row.kind, row.size_bytes, _checksums(row)) for row in met}


def _make(s: Session, given: Sequence[_Given], scope_ids: dict[str, int], account_id: int) -> None:
    """Insert those that do not exist, and note which they are. What others are inserting is waited for."""
    for file in given:
        file.new = False  # what was made before the transaction was rolled back and begun again is not any more
    names = _named(s, given, scope_ids)
    values = sa.select(
        names.c.scope_id,
        names.c.name,
        sa.literal(DidKind.FILE, tables.dids.c.kind.type),
        sa.literal(account_id, sa.BigInteger()),
        sa.literal(s.now, tables.dids.c.created_at.type),
    )
    made = (
        bulk.insert(s, tables.dids)
        .from_select(
            ["scope_id", "name", "kind", "account_id", "created_at"], values.where(sa.true()).order_by(names.c.ord)
        )
        .on_conflict_do_nothing()
        .returning(tables.dids.c.id, tables.dids.c.scope_id, tables.dids.c.name)
    )
    by_key = {(scope_ids[file.did.scope], file.did.name): file for file in given}
    mine = []
    for id_, scope_id, name in s.execute(made).all():
        file = by_key[scope_id, name]
        file.file_id = id_
        file.new = True
        mine.append(file)
    if mine:
        values_of = dict(zip(DIGITS, zip(*(file.checksums for file in mine), strict=True), strict=True))
        # What is known of none is left out: most files have one or two of the five checksums.
        told = {algorithm: found for algorithm, found in values_of.items() if any(found)}
        columns = {"did_id": sa.BigInteger(), "size_bytes": sa.BigInteger()} | dict.fromkeys(told, sa.LargeBinary())
        ids_and_sizes = [[file.file_id for file in mine], [file.size for file in mine]]
        batch = bulk.columns_of(s, "contents_of", columns, [*ids_and_sizes, *told.values()])
        s.execute(sa.insert(files).from_select([*columns], sa.select(batch)))


def _refuse_other_content(given: Sequence[_Given], known: dict[Did, _Known]) -> None:
    """AlreadyExists about the first whose size or checksum is not that of the catalogue; Invalid when it is no file."""
    others = [file for file in given if file.did in known and known[file.did].kind is not DidKind.FILE]
    if others:
        kind = known[others[0].did].kind.label
        _refuse(
            Invalid,
            [{"did": str(file.did), "reason": f"it is a {known[file.did].kind.label}"} for file in others],
            f"{others[0].did} is a {kind}, not a file",
            "give the file another name",
        )
    items: list[dict[str, object]] = []
    for file in given:
        before = known.get(file.did)
        if before is None:
            continue
        if before.size != file.size:
            items.append({"did": str(file.did), "field": "size", "known": before.size, "given": file.size})
            continue
        for algorithm, theirs, mine in zip(DIGITS, before.checksums, file.checksums, strict=True):
            if theirs is not None and mine is not None and mine != theirs:
                differs = {"field": algorithm, "known": theirs.hex(), "given": mine.hex()}
                items.append({"did": str(file.did), **differs})
                break
    if items:
        first = items[0]
        _refuse(
            AlreadyExists,
            items,
            f"{first['did']} is known with {first['field']} {first['known']}, not {first['given']}",
            "a name stands for one content for ever: register other bytes under another name, "
            "or look at the file again if it should be the same",
        )


def _learn(s: Session, learned: list[_Given]) -> None:
    """Fill in checksums that the catalogue did not have. They were computed from bytes that it knows otherwise."""
    learned.sort(key=lambda file: file.file_id)
    by_id = {file.file_id: file for file in learned}
    ids = bulk.ids_of(s, "learned", list(by_id))
    query = sa.select(files).where(files.c.did_id.in_(sa.select(ids.c.id))).order_by(files.c.did_id)
    # Held before they are compared again: somebody else may have filled in another value since we looked.
    now = {
        by_id[row.did_id].did: _Known(row.did_id, DidKind.FILE, row.size_bytes, _checksums(row))
        for row in s.execute(query.with_for_update(key_share=True))
    }
    _refuse_other_content(learned, now)
    columns: bulk.Columns = {"did_id": sa.BigInteger(), **_CHECKSUM_COLUMNS}
    batch = bulk.rows_of(s, "learned", columns, [(file.file_id, *file.checksums) for file in learned])
    values = {algorithm: sa.func.coalesce(files.c[algorithm], batch.c[algorithm]) for algorithm in DIGITS}
    s.execute(sa.update(files).where(files.c.did_id == batch.c.did_id).values(values))


# --- replicas -------------------------------------------------------------------------------------------------------


def _refuse_taken_paths(s: Session, given: Sequence[_Given], endpoint: sa.Row[Any]) -> None:
    """AlreadyExists where another file has the path already: deleting one of the two would take the bytes of both."""
    # Where every path is the layout's, and the layout gives no path twice, there is nothing to look for.
    odd = any(file.path is not None for file in given) or _has_own_paths(s, endpoint.id)
    of_scopes = {file.did.scope: file.did for file in given}
    if not odd and all(is_injective(did, endpoint.layout) for did in of_scopes.values()):
        return
    by_path: dict[str, Did] = {}
    rows: list[tuple[str, str | None, str | None]] = []
    for file in given:
        injective = is_injective(file.did, endpoint.layout)
        if file.path is None and injective and not odd:
            continue
        path = file.path or path_for(file.did, endpoint.layout)
        if by_path.setdefault(path, file.did) != file.did:
            _refuse_shared(path, by_path[path], file.did, endpoint.name)
        others = () if file.path is None and injective else owners(path, endpoint.layout)
        rows.append((path, None, None))
        rows += [(path, other.scope, other.name) for other in others if other != file.did]
    if not rows:
        return
    columns: bulk.Columns = {"path": sa.String(), "scope": sa.String(), "name": sa.String()}
    batch = bulk.rows_of(s, "paths", columns, rows)
    at_endpoint = replicas.c.endpoint_id == endpoint.id
    by_their_path = sa.and_(at_endpoint, replicas.c.path == batch.c.path)
    there, walk = membership.dids_named(s, batch)
    by_layout = sa.and_(at_endpoint, replicas.c.path.is_(None), replicas.c.file_id == there.c.id)
    queries = (
        sa.select(batch.c.path, tables.scopes.c.name, tables.dids.c.name.label("did_name"))
        .select_from(batch)
        .join(replicas, by_their_path)
        .join(tables.dids, tables.dids.c.id == replicas.c.file_id)
        .join(tables.scopes, tables.scopes.c.id == tables.dids.c.scope_id),
        sa.select(batch.c.path, batch.c.scope, there.c.name).select_from(walk).join(replicas, by_layout),
    )
    for path, scope, name in s.execute(sa.union_all(*queries)).all():
        if by_path[path] != Did(scope, name):
            _refuse_shared(path, Did(scope, name), by_path[path], endpoint.name)


def _has_own_paths(s: Session, endpoint_id: int) -> bool:
    own = sa.select(1).where(replicas.c.endpoint_id == endpoint_id, replicas.c.path.is_not(None))
    return bool(s.execute(sa.select(sa.exists(own))).scalar_one())


def _refuse_shared(path: str, owner: Did, other: Did, endpoint: str) -> NoReturn:
    raise AlreadyExists(
        f"{shown(path)} at {endpoint} is the file {owner}, it cannot be {other} as well",
        hint="one path holds one file: copy it to another path first, or use the name it has",
        field="replicas",
    )


def _pairs(s: Session, name: str, given: Sequence[_Given], endpoint_id: int) -> sa.FromClause:
    """`(file_id, endpoint_id)` of these files at the endpoint."""
    ids = bulk.ids_of(s, f"{name}_ids", [file.file_id for file in given])
    columns = ids.c.id.label("file_id"), sa.literal(endpoint_id, sa.BigInteger()).label("endpoint_id")
    return sa.select(*columns).subquery(name)


def _replicas(
    s: Session, given: Sequence[_Given], endpoint_id: int, endpoint: str
) -> tuple[list[_Given], list[_Given], list[_Given]]:
    """Enter the replicas. Returns those that were not there before; and of those that were, which became available by
    it, and which are to be verified in place."""
    entered = [file for file in given if file.new]
    if entered:
        s.execute(_insert_replicas(s, entered, endpoint_id, sa.literal(1)))
    known = {file.file_id: file for file in given if not file.new}
    if known:
        made = _insert_replicas(s, list(known.values()), endpoint_id)
        made = made.on_conflict_do_nothing(index_elements=["file_id", "endpoint_id"]).returning(replicas.c.file_id)
        entered += [known.pop(id_) for id_ in s.execute(made).scalars().all()]
    if entered:
        _take_space(s, endpoint_id, sum(file.size for file in entered))
    if not known:
        return entered, [], []
    return entered, *_those_there(s, [known[id_] for id_ in sorted(known)], endpoint_id, endpoint)


def _insert_replicas(
    s: Session, given: Sequence[_Given], endpoint_id: int, generation: sa.ColumnElement[int] | None = None
) -> Any:
    """`generation`: where it is known, because there cannot have been any replica."""
    rows = sorted(given, key=attrgetter("file_id"))
    placed = [(file.file_id, file.proven, file.path) for file in rows]
    columns: bulk.Columns = {"file_id": sa.BigInteger(), "proven": sa.Boolean(), "path": sa.String()}
    batch = bulk.rows_of(s, "placed", columns, placed)
    there = sa.literal(endpoint_id, sa.BigInteger())

    def if_proven(yes: object, no: object, column: sa.Column[Any]) -> sa.ColumnElement[Any]:
        return sa.case((batch.c.proven, sa.literal(yes, column.type)), else_=sa.literal(no, column.type))

    if generation is None:
        generation = revival.next_generation(batch.c.file_id, there)
    made = {
        "file_id": batch.c.file_id,
        "endpoint_id": there,
        "state": if_proven(ReplicaState.AVAILABLE, ReplicaState.COPYING, replicas.c.state),
        "evidence": if_proven(Evidence.HASHED, Evidence.DECLARED, replicas.c.evidence),
        "verified_at": if_proven(s.now, None, replicas.c.verified_at),
        "path": batch.c.path,
        "generation": generation,
    }
    query = sa.select(*made.values()).where(sa.true()).order_by(batch.c.file_id)
    return bulk.insert(s, replicas).from_select([*made], query)


def _those_there(
    s: Session, given: Sequence[_Given], endpoint_id: int, endpoint: str
) -> tuple[list[_Given], list[_Given]]:
    """Files whose replica at this endpoint was known before: which became available, and which are to be verified."""
    by_id = {file.file_id: file for file in given}
    ids = bulk.ids_of(s, "there", list(by_id))
    at_endpoint = replicas.c.endpoint_id == endpoint_id
    query = (
        sa.select(replicas.c.file_id, replicas.c.state, replicas.c.path)
        .where(at_endpoint, replicas.c.file_id.in_(sa.select(ids.c.id)))
        .order_by(replicas.c.file_id)
        .with_for_update()
    )
    came, waiting = [], []
    for row in s.execute(query).all():
        file = by_id[row.file_id]
        if row.path != file.path:
            _refuse_path(file, row.path, endpoint)
        if row.state is ReplicaState.DELETING:
            raise Refused(
                f"{file.did} is being deleted at {endpoint}", hint="register it when that is done", field="replicas"
            )
        if row.state is not ReplicaState.AVAILABLE:
            # What is bad was declared so: only a worker of its own site takes that back.
            if file.proven and row.state is not ReplicaState.BAD:
                came.append(file)
            elif row.state in (ReplicaState.COPYING, ReplicaState.BAD):
                waiting.append(file)
    for moved, values in (
        (came, {"state": ReplicaState.AVAILABLE, "evidence": Evidence.HASHED, "verified_at": s.now}),
        (waiting, {"state": ReplicaState.COPYING, "evidence": Evidence.DECLARED}),
    ):
        if moved:
            ids = bulk.ids_of(s, "moved", [file.file_id for file in moved])
            rows = sa.update(replicas).where(at_endpoint, replicas.c.file_id.in_(sa.select(ids.c.id)))
            s.execute(rows.values(values))
    return came, waiting


def _refuse_path(file: _Given, known: str | None, endpoint: str) -> NoReturn:
    def text(path: str | None) -> str:
        return "the path of the endpoint's layout" if path is None else f"the path {shown(path)}"

    raise AlreadyExists(
        f"{file.did} is known at {endpoint} under {text(known)}, not {text(file.path)}",
        hint="one endpoint keeps a file once",
        field="replicas",
    )


def _take_space(s: Session, endpoint_id: int, size: int) -> None:
    """Count bytes that lie at the endpoint already: what the storage reported as free leaves them out as well."""
    e = tables.endpoints.c
    values = {"used_bytes": e.used_bytes + size, "reported_at_used_bytes": e.reported_at_used_bytes + size}
    s.execute(sa.update(tables.endpoints).where(e.id == endpoint_id).values(values))


def _verifications(
    s: Session, waiting: Sequence[_Given], there: Sequence[_Given], endpoint_id: int, site_id: int
) -> None:
    """A transfer for each, unless one is on its way: its worker finds the bytes at the target and verifies them."""
    if there:
        # Rules for which such a copy was stuck see that it is tried again. Where none was, none was stuck.
        settle(s, provision.try_again(s, _pairs(s, "verified", there, endpoint_id)))
    columns: bulk.Columns = {"file_id": sa.BigInteger(), "size_bytes": sa.BigInteger()}
    rows = sorted((file.file_id, file.size) for file in waiting)
    batch = bulk.rows_of(s, "waiting", columns, rows)
    values = {
        "target_id": endpoint_id,
        "site_id": site_id,
        "state": TransferState.QUEUED,
        "priority": _PRIORITY,
        "activity": VERIFICATION,
        "created_at": s.now,
    }
    constants = [sa.literal(value, transfers.c[name].type) for name, value in values.items()]
    made = sa.select(batch, *constants).where(sa.true()).order_by(batch.c.file_id)
    s.execute(bulk.insert(s, transfers).from_select([*columns, *values], made).on_conflict_do_nothing())


def _refuse(error: type[ReplicaError], items: list[dict[str, object]], message: str, hint: str) -> NoReturn:
    more = f" (and {len(items) - 1} more like it)" if len(items) > 1 else ""
    raised = error(f"{message}{more}", hint=hint, field="replicas")
    raised.items = items[: dids.ITEMS_MAX]
    raise raised


# --- values in and out ----------------------------------------------------------------------------------------------


def _checksums(row: sa.Row[Any]) -> Packed:
    values = row._mapping
    return tuple(values[algorithm] for algorithm in DIGITS)


def _files_of(s: Session, did: Did) -> sa.Select[Any]:
    """`(file_id)`: the file itself, or each file in the dataset or below the container once."""
    did_id, kind = dids.row_id(s, did)
    held = sa.select(contents.c.child_id.label("file_id"))
    match kind:
        case DidKind.FILE:
            return sa.select(files.c.did_id.label("file_id")).where(files.c.did_id == did_id)
        case DidKind.DATASET:
            return held.where(contents.c.parent_id == did_id)
        case DidKind.CONTAINER:
            tree = membership.closure_of(did_id)
            below = held.join_from(tree, contents, contents.c.parent_id == tree.c.id)
            return below.where(tree.c.kind == membership.literal(DidKind.DATASET)).distinct()
    assert_never(kind)


def _columns(file_id: sa.ColumnElement[int]) -> sa.Select[Any]:
    """What `_Printer` reads. Bare numbers: a stream has no time for a converter in each column of each row."""
    return sa.select(
        file_id,
        replicas.c.endpoint_id,
        sa.type_coerce(replicas.c.state, sa.SmallInteger),
        sa.type_coerce(replicas.c.evidence, sa.SmallInteger),
        sa.type_coerce(replicas.c.verified_at, sa.BigInteger),
        replicas.c.path,
        tables.dids.c.scope_id,
        tables.dids.c.name,
        files.c.size_bytes,
        *(files.c[algorithm] for algorithm in DIGITS),
    )


class _Printer:
    """Rows of `_columns` as the wire has them. Scopes and endpoints are few: they are read once, not with every row."""

    def __init__(self, s: Session) -> None:
        self.scopes = {row.id: row.name for row in s.execute(sa.select(tables.scopes.c.id, tables.scopes.c.name))}
        e = tables.endpoints.c
        query = sa.select(e.id, e.name, e.url, e.layout, tables.sites.c.name.label("site"))
        rows = s.execute(query.join_from(tables.endpoints, tables.sites))
        self.endpoints = {row.id: (row.name, row.site, row.url, row.layout) for row in rows}
        self.states = {state.value: state.label for state in ReplicaState}
        self.evidence = {evidence.value: evidence.label for evidence in Evidence}

    def __call__(self, row: Sequence[Any]) -> wire.Replica:
        _, endpoint_id, state, evidence, verified_at, path, scope_id, name, size, *values = row
        endpoint, site, url, layout = self.endpoints[endpoint_id]
        did = Did(self.scopes[scope_id], name)
        if path is None:
            path = path_for(did, layout)
        return wire.Replica(
            did=f"{did.scope}:{name}",
            endpoint=endpoint,
            site=site,
            state=self.states[state],
            size=size,
            checksums={a: value.hex() for a, value in zip(DIGITS, values, strict=True) if value is not None},
            path=path,
            url=f"{url}/{quote(path)}",
            verified_at=None if verified_at is None else instant(verified_at),
            evidence=None if evidence is None else self.evidence[evidence],
        )
