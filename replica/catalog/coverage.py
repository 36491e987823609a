"""What of units is at which endpoints: read from counters where there are any, counted where there are none.

Given     units and the endpoints in question.
Returns   sizes, and what of each unit is there or on its way.
Promises  the size of a dataset is one row of it, and a copy that a lock says is complete is not counted again: so a
          rule on what is protected there already costs the same for a thousand files and for a million. What no lock
          speaks of is counted file by file in one walk along an index; sizes are looked up only where a part is there.
Partner   replica.catalog.placing decides with it and writes the locks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from replica.catalog.bulk import ids_of, rows_of
from replica.catalog.membership import Unguessed, literal, of_pair, side_by_side
from replica.db.engine import Session
from replica.db.tables import contents, dids, files, locks, replicas
from rules.states import DidKind, ReplicaState

#: A unit and an endpoint.
Pair = tuple[int, int]

#: A dataset of so many files is read side by side with its replicas, if less than so many others lie between each two.
LARGE_FILES = 5_000
SPARSE_MAX = 3

_COUNTED = (replicas.c.endpoint_id, replicas.c.state, replicas.c.tombstone_at)
_UNIT_PAIR = {"unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}


@dataclass(slots=True)
class Coverage:
    files: dict[int, int] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)
    #: Some of the units may have files in common.
    shared: bool = False
    #: unit → endpoint → bytes that are there or on their way
    present: dict[int, dict[int, int]] = field(default_factory=dict)
    #: the same in files
    present_files: dict[int, dict[int, int]] = field(default_factory=dict)
    #: unit → endpoints where every file is available
    complete: dict[int, set[int]] = field(default_factory=dict)
    #: Of the complete ones, those that a lock speaks for.
    locked: set[Pair] = field(default_factory=set)
    #: Of the complete ones, those of which no file waits to be deleted.
    at_rest: set[Pair] = field(default_factory=set)
    #: Of some of their files there is a row, in whatever state.
    begun: set[Pair] = field(default_factory=set)


def of_units(s: Session, unit_ids: Sequence[int], endpoint_ids: Iterable[int]) -> Coverage:
    """Sizes, and what locks say is complete. Three statements that do not grow with the files."""
    found = Coverage()
    units = rows_of(s, "sized", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
    sizes = (
        sa.select(
            units.c.unit_id,
            sa.func.coalesce(dids.c.files_total, sa.case((files.c.did_id.is_not(None), 1), else_=0)),
            sa.func.coalesce(dids.c.bytes_total, files.c.size_bytes, 0),
            sa.or_(dids.c.shared, dids.c.kind == literal(DidKind.FILE)),
        )
        .select_from(units)
        .join(dids, dids.c.id == units.c.unit_id)
        .outerjoin(files, files.c.did_id == units.c.unit_id)
    )
    for unit_id, count, size_bytes, shared in s.execute(sizes).all():
        found.files[unit_id] = count
        found.bytes[unit_id] = size_bytes
        found.shared |= shared
    for unit_id, endpoint_id, *_ in _complete(s, units, Unguessed(locks.c.endpoint_id.in_(list(endpoint_ids)))):
        _is_complete(found, unit_id, endpoint_id)
        found.locked.add((unit_id, endpoint_id))
        found.at_rest.add((unit_id, endpoint_id))
    return found


def locked_complete(s: Session, pairs: Iterable[Pair]) -> dict[Pair, tuple[int, int]]:
    """`(unit, endpoint)` → files and bytes, of those that a lock says are complete. The caller holds the endpoints, at
    least shared, so that nothing is lost there meanwhile, and the contents of the units."""
    batch = rows_of(s, "maybe_complete", _UNIT_PAIR, sorted(pairs))
    rows = _complete(s, batch, Unguessed(locks.c.endpoint_id == batch.c.endpoint_id))
    return {(unit_id, endpoint_id): (count, size) for unit_id, endpoint_id, count, size in rows}


def _complete(s: Session, units: sa.FromClause, where: sa.ColumnElement[bool]) -> Sequence[Any]:
    return s.execute(
        sa.select(locks.c.unit_id, locks.c.endpoint_id, locks.c.files_total, locks.c.bytes_total)
        .select_from(units)
        .join(locks, locks.c.unit_id == units.c.unit_id)
        .where(
            where,
            Unguessed(locks.c.applied_to.is_(None)),
            Unguessed(locks.c.files_available == locks.c.files_total),
        )
        .distinct()
    ).all()


def count(s: Session, found: Coverage, endpoint_ids: Iterable[int]) -> None:
    """Count what no lock speaks of, at these endpoints."""
    there = sorted(endpoint_ids)
    open_units = [u for u in found.files if not found.complete.get(u, set()).issuperset(there)]
    if not open_units or not there:
        return
    span = _span(s, found, open_units)
    row = _rows_of_units(s, open_units, there) if span is None else _rows_beside(open_units[0], span, there)
    available = row.c.state == literal(ReplicaState.AVAILABLE)
    coming = row.c.state == literal(ReplicaState.COPYING)

    def number(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((condition, 1), else_=0))

    query = sa.select(
        row.c.unit_id,
        row.c.endpoint_id,
        number(available),
        number(sa.or_(available, coming)),
        number(row.c.tombstone_at.is_not(None)),
    ).group_by(row.c.unit_id, row.c.endpoint_id)
    parts: list[Pair] = []
    with contextlib.nullcontext() if span is None else side_by_side(s):
        counted = s.execute(query).all()
    for unit_id, endpoint_id, good, present, released in counted:
        if endpoint_id in found.complete.get(unit_id, ()):
            continue
        found.begun.add((unit_id, endpoint_id))
        if good == found.files[unit_id]:
            _is_complete(found, unit_id, endpoint_id)
            if not released:
                found.at_rest.add((unit_id, endpoint_id))
        elif present:
            found.present_files.setdefault(unit_id, {})[endpoint_id] = present
            if present == found.files[unit_id]:
                found.present.setdefault(unit_id, {})[endpoint_id] = found.bytes[unit_id]
            else:
                parts.append((unit_id, endpoint_id))
    for unit_id, endpoint_id, size in _sizes_of_parts(s, parts):
        found.present.setdefault(unit_id, {})[endpoint_id] = int(size)


def _rows_of_units(s: Session, unit_ids: Sequence[int], endpoint_ids: Sequence[int]) -> sa.Subquery:
    """The replicas at these endpoints of the files of these units, each of which is a dataset or a file."""
    units = ids_of(s, "counted_units", sorted(unit_ids))
    rows = sa.select(units.c.id.label("unit_id"), *_COUNTED).select_from(units)
    # No dataset has replicas.
    held = rows.join(contents, contents.c.parent_id == units.c.id).join(
        replicas, replicas.c.file_id == contents.c.child_id
    )
    single = rows.join(replicas, replicas.c.file_id == units.c.id)
    at = Unguessed(replicas.c.endpoint_id.in_(endpoint_ids))
    return sa.union_all(held.where(at), single.where(at)).subquery("counted_rows")


def _rows_beside(dataset_id: int, span: tuple[int, int], endpoint_ids: Sequence[int]) -> sa.Subquery:
    """The same for one dataset, to be read along two indexes at once: its files, and all replicas in their span."""
    return (
        sa.select(sa.literal(dataset_id, sa.BigInteger()).label("unit_id"), *_COUNTED)
        .join_from(contents, replicas, replicas.c.file_id == contents.c.child_id)
        .where(
            contents.c.parent_id == dataset_id,
            replicas.c.file_id.between(*span),
            Unguessed(replicas.c.endpoint_id.in_(endpoint_ids)),
        )
        .subquery("counted_rows")
    )


def _span(s: Session, found: Coverage, unit_ids: Sequence[int]) -> tuple[int, int] | None:
    """The first and the last file of a single large dataset, if most files between them are its own: files that were
    registered together have numbers beside each other."""
    if not s.postgresql or len(unit_ids) > 1 or (size := found.files[unit_ids[0]]) < LARGE_FILES:
        return None
    child = contents.c.child_id
    first, last = s.execute(
        sa.select(sa.func.min(child), sa.func.max(child)).where(contents.c.parent_id == unit_ids[0])
    ).one()
    return (first, last) if first is not None and last - first < SPARSE_MAX * size else None


def _is_complete(found: Coverage, unit_id: int, endpoint_id: int) -> None:
    found.complete.setdefault(unit_id, set()).add(endpoint_id)
    found.begun.add((unit_id, endpoint_id))
    found.present.setdefault(unit_id, {})[endpoint_id] = found.bytes[unit_id]
    found.present_files.setdefault(unit_id, {})[endpoint_id] = found.files[unit_id]


def _sizes_of_parts(s: Session, parts: list[Pair]) -> Sequence[Any]:
    """Bytes of the files of datasets that are there or on their way."""
    if not parts:
        return ()
    batch = rows_of(s, "parts", _UNIT_PAIR, sorted(parts))
    held = (
        sa.select(batch.c.unit_id, batch.c.endpoint_id, contents.c.child_id.label("file_id"))
        .select_from(batch)
        .join(contents, contents.c.parent_id == batch.c.unit_id)
        .subquery("files_of_parts")
    )
    counts = (literal(ReplicaState.COPYING), literal(ReplicaState.AVAILABLE))
    return s.execute(
        sa.select(held.c.unit_id, held.c.endpoint_id, sa.func.sum(files.c.size_bytes))
        .select_from(held)
        .join(replicas, of_pair(held))
        .join(files, files.c.did_id == held.c.file_id)
        .where(Unguessed(replicas.c.state.in_(counts)))
        .group_by(held.c.unit_id, held.c.endpoint_id)
    ).all()
