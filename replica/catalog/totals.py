"""How much a dataset holds, and whether what it holds is held elsewhere as well.

Given     files that just came into a dataset or left it.
Returns   nothing; `files_total`, `bytes_total` and `shared` of the datasets are as a recount would have them.
Promises  the size of a dataset is read from one row, whatever its size. `shared` is never false when a file of the
          dataset is in another one or is the unit of a lock; it may stay true when that is over. Three statements.
Partner   replica.catalog.locks calls it where contents change; .usage marks the datasets of files that get locked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards
from replica.catalog.bulk import Batch, columns_of, ids_of
from replica.catalog.membership import Unguessed, dids_named, literal, looked_up
from replica.db.engine import Session
from replica.db.tables import alias_of, contents, dids, files, locks, rules, scopes
from rules.names import Did
from rules.states import DidKind

_TO_ATTACH = Batch("to_attach", {"id": sa.BigInteger()})


def hold_parent(s: Session, parent_id: int, file_ids: Sequence[int] = ()) -> sa.Row[Any]:
    """Before files are put into the parent: it, and the datasets that will be marked as sharing a file with it, in one
    order. Nobody who holds one of them waits for another. Returns what the parent is now: `open`, `deleted_at`."""
    if s.postgresql and file_ids:
        given = {**_TO_ATTACH.holding(s, [(id_,) for id_ in file_ids]), "parent": parent_id}
        return next(row for row in s.execute(_hold_with_sharing(), given).all() if row.id == parent_id)
    query = sa.select(dids.c.id, dids.c.open, dids.c.deleted_at).where(dids.c.id == parent_id)
    return s.execute(query.with_for_update(key_share=True)).one()


@cache
def _hold_with_sharing() -> sa.Select[Any]:
    own = sa.select(sa.bindparam("parent", type_=sa.BigInteger()).label("id"))
    concerned = sa.union(own, datasets_of(True, _TO_ATTACH.rows(postgresql=True)))
    query = sa.select(dids.c.id, dids.c.open, dids.c.deleted_at)
    few = query.where(dids.c.id == sa.any_(sa.func.array(concerned.scalar_subquery())))
    return few.order_by(dids.c.kind.desc(), dids.c.id).with_for_update(key_share=True)


def hold_datasets(s: Session, parent: Did, children: Collection[Did]) -> None:
    """The same before it is known which of them exist."""
    if not s.postgresql:
        return
    columns = {"scope": sa.String(), "name": sa.String()}
    names = columns_of(s, "to_attach", columns, [[did.scope for did in children], [did.name for did in children]])
    child, walk = dids_named(s, names)
    known = sa.select(child.c.id).select_from(walk).subquery("known")
    own = (
        sa.select(dids.c.id)
        .join_from(dids, scopes, scopes.c.id == dids.c.scope_id)
        .where(scopes.c.name == parent.scope, dids.c.name == parent.name, dids.c.kind == literal(DidKind.DATASET))
    )
    guards.change_collections(s, sa.union(own, datasets_of(s.postgresql, known)))


def datasets_of(postgresql: bool, batch: sa.FromClause) -> sa.Select[Any]:
    """The datasets that hold some of these files, `(id)`, and that are not known to share any."""
    dataset = alias_of(dids, "other_dataset")
    parents, walk = looked_up(postgresql, batch, contents.c.child_id, sa.select(contents.c.parent_id), "holding")
    is_alone = sa.and_(dataset.c.kind == literal(DidKind.DATASET), sa.not_(dataset.c.shared))
    # The offset keeps PostgreSQL from gathering all datasets there are, to ask about a few.
    alone = sa.select(1).where(dataset.c.id == parents.c.parent_id, is_alone).offset(0)
    return sa.select(parents.c.parent_id.label("id")).select_from(walk).where(Unguessed(sa.exists(alone)))


def held_files(s: Session, batch: sa.FromClause) -> tuple[sa.FromClause, sa.FromClause]:
    """`(id, deleted_at)` of these files, `(id)` in order, which are about to be put into a dataset; and what to select
    them from. Two who put one file into two datasets at once would both not see that it is shared; so the second waits.
    """
    rows = sa.select(dids.c.id, dids.c.deleted_at).with_for_update(key_share=True)
    return looked_up(s.postgresql, batch, dids.c.id, rows, "held_files")


def hold_files(s: Session, batch: sa.FromClause) -> None:
    if s.postgresql:
        held, walk = held_files(s, batch)
        s.execute(sa.select(sa.func.count(held.c.id)).select_from(walk)).scalar_one()


def hold_late(s: Session, batch: sa.FromClause) -> bool:
    """Having waited for these files, `(id)`, which others were making: whether all datasets that have come to share
    them could be held. Without waiting, for which it is too late."""
    if not s.postgresql:
        return True
    late = set(s.execute(datasets_of(s.postgresql, batch).distinct()).scalars())
    if not late:
        return True
    query = sa.select(dids.c.id).where(dids.c.id.in_(sorted(late)))
    return late <= set(s.execute(query.with_for_update(skip_locked=True, key_share=True)).scalars())


def joined(s: Session, dataset_id: int, batch: sa.FromClause, count: int) -> bool:
    """So many files, `(id)`, are new in the dataset, which the caller holds with them. Returns whether it may share
    some of its files with other units."""
    other = alias_of(contents, "other")
    others = sa.select(other.c.parent_id).where(Unguessed(other.c.parent_id != dataset_id))
    _, elsewhere = looked_up(s.postgresql, batch, other.c.child_id, others, "elsewhere")
    _, single = looked_up(s.postgresql, batch, locks.c.unit_id, sa.select(locks.c.rule_id), "single")
    # A rule that begins later, or waits for approval, will lock the file alone when nobody looks at its datasets.
    _, later = looked_up(s.postgresql, batch, rules.c.did_id, sa.select(rules.c.id), "later")
    units = (sa.exists(sa.select(1).select_from(walk)) for walk in (elsewhere, single, later))
    anywhere = sa.or_(dids.c.shared, *units)
    shared = sa.case((anywhere, sa.true()), else_=sa.false())
    bytes_ = _bytes(s, batch)
    now_shared = _count(s, dataset_id, count, bytes_, shared=shared)
    if now_shared:
        parents, walk = looked_up(s.postgresql, batch, contents.c.child_id, sa.select(contents.c.parent_id), "parents")
        s.execute(
            dids.update()
            .where(dids.c.id.in_(sa.select(parents.c.parent_id).select_from(walk)), dids.c.shared.is_(False))
            .values(shared=True)
        )
    return now_shared


def left(s: Session, dataset_id: int, file_ids: Sequence[int]) -> None:
    """These files were in the dataset, which the caller holds."""
    batch = ids_of(s, "leaving", file_ids)
    _count(s, dataset_id, -len(file_ids), -_bytes(s, batch))


def _bytes(s: Session, batch: sa.FromClause) -> sa.ScalarSelect[int]:
    sizes, walk = looked_up(s.postgresql, batch, files.c.did_id, sa.select(files.c.size_bytes), "sizes")
    return sa.select(sa.func.coalesce(sa.func.sum(sizes.c.size_bytes), 0)).select_from(walk).scalar_subquery()


def _count(
    s: Session,
    dataset_id: int,
    count: int,
    bytes_: sa.ColumnElement[int],
    *,
    shared: sa.ColumnElement[bool] | None = None,
) -> bool:
    counted = dids.update().where(dids.c.id == dataset_id, dids.c.kind == literal(DidKind.DATASET))
    values: dict[str, sa.ColumnElement[Any]] = {
        "files_total": sa.func.coalesce(dids.c.files_total, 0) + count,
        "bytes_total": sa.func.coalesce(dids.c.bytes_total, 0) + bytes_,
    }
    if shared is not None:
        values["shared"] = shared
    return bool(s.execute(counted.values(values).returning(dids.c.shared)).scalar())
