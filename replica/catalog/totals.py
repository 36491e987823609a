"""How much a dataset holds, and whether what it holds is held elsewhere as well.

Given     files that just came into a dataset or left it.
Returns   nothing; `files_total`, `bytes_total` and `shared` of the datasets are as a recount would have them.
Promises  the size of a dataset is read from one row, whatever its size. `shared` is never false when a file of the
          dataset is in another one or is the unit of a lock; it may stay true when that is over. Three statements.
Partner   replica.catalog.locks calls it where contents change; .usage marks the datasets of files that get locked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards
from replica.catalog.bulk import columns_of, ids_of
from replica.catalog.membership import Computed, Unguessed, literal
from replica.db.engine import Session
from replica.db.tables import contents, dids, files, locks, rules, scopes
from rules.names import Did
from rules.states import DidKind


def hold_parent(s: Session, parent_id: int, file_ids: Sequence[int] = ()) -> sa.Row[Any]:
    """Before files are put into the parent: it, and the datasets that will be marked as sharing a file with it, in one
    order. Nobody who holds one of them waits for another. Returns what the parent is now: `open`, `deleted_at`."""
    query = sa.select(dids.c.id, dids.c.open, dids.c.deleted_at)
    if not s.postgresql or not file_ids:
        mine = query.where(dids.c.id == parent_id)
        return s.execute(mine.with_for_update(key_share=True)).one()
    own = sa.select(sa.literal(parent_id, sa.BigInteger()))
    concerned = sa.union(own, datasets_of(ids_of(s, "to_attach", file_ids)))
    held = query.where(dids.c.id.in_(concerned)).order_by(dids.c.kind.desc(), dids.c.id)
    return next(row for row in s.execute(held.with_for_update(key_share=True)).all() if row.id == parent_id)


def hold_datasets(s: Session, parent: Did, children: Collection[Did]) -> None:
    """The same before it is known which of them exist."""
    if not s.postgresql:
        return
    columns = {"scope": sa.String(), "name": sa.String()}
    names = columns_of(s, "to_attach", columns, [[did.scope for did in children], [did.name for did in children]])
    child = dids.alias("child")
    known = (
        sa.select(child.c.id)
        .select_from(names)
        .join(scopes, scopes.c.name == names.c.scope)
        .join(child, sa.and_(child.c.scope_id == scopes.c.id, child.c.name == names.c.name))
        .subquery("known")
    )
    own = (
        sa.select(dids.c.id)
        .join_from(dids, scopes, scopes.c.id == dids.c.scope_id)
        .where(scopes.c.name == parent.scope, dids.c.name == parent.name, dids.c.kind == literal(DidKind.DATASET))
    )
    guards.change_collections(s, sa.union(own, datasets_of(known)))


def datasets_of(batch: sa.FromClause) -> sa.Select[Any]:
    """The datasets that hold some of these files, `(id)`, and that are not known to share any."""
    dataset = dids.alias("other_dataset")
    return (
        sa.select(dataset.c.id)
        .select_from(batch)
        .join(contents, contents.c.child_id == batch.c.id)
        .join(dataset, dataset.c.id == Computed(contents.c.parent_id))
        .where(Unguessed(sa.and_(dataset.c.kind == literal(DidKind.DATASET), sa.not_(dataset.c.shared))))
    )


def held_files(batch: sa.FromClause) -> sa.Subquery:
    """`(id, deleted_at)` of these files, `(id)`, which are about to be put into a dataset. Two who put one file into
    two datasets at once would both not see that it is shared; so the second waits."""
    rows = sa.select(dids.c.id, dids.c.deleted_at).select_from(batch).join(dids, dids.c.id == batch.c.id)
    return rows.order_by(dids.c.id).with_for_update(of=dids, key_share=True).subquery("held_files")


def hold_files(s: Session, batch: sa.FromClause) -> None:
    if s.postgresql:
        s.execute(sa.select(sa.func.count()).select_from(held_files(batch))).scalar_one()


def hold_late(s: Session, batch: sa.FromClause) -> bool:
    """Having waited for these files, `(id)`, which others were making: whether all datasets that have come to share
    them could be held. Without waiting, for which it is too late."""
    if not s.postgresql:
        return True
    late = set(s.execute(datasets_of(batch).distinct()).scalars())
    if not late:
        return True
    query = sa.select(dids.c.id).where(dids.c.id.in_(sorted(late)))
    return late <= set(s.execute(query.with_for_update(skip_locked=True, key_share=True)).scalars())


def joined(s: Session, dataset_id: int, batch: sa.FromClause, count: int) -> bool:
    """So many files, `(id)`, are new in the dataset, which the caller holds with them. Returns whether it may share
    some of its files with other units."""
    other = contents.alias("other")
    elsewhere = sa.exists(
        sa.select(1)
        .select_from(batch)
        .join(other, other.c.child_id == batch.c.id)
        .where(Computed(other.c.parent_id) != dataset_id)
    )
    single = sa.exists(sa.select(1).select_from(batch).join(locks, locks.c.unit_id == batch.c.id))
    # A rule that begins later, or waits for approval, will lock the file alone when nobody looks at its datasets.
    later = sa.exists(sa.select(1).select_from(batch).join(rules, rules.c.did_id == batch.c.id))
    anywhere = sa.or_(dids.c.shared, elsewhere, single, later)
    shared = sa.case((anywhere, sa.true()), else_=sa.false())
    size = sa.select(sa.func.coalesce(sa.func.sum(files.c.size_bytes), 0))
    bytes_ = size.select_from(batch).join(files, files.c.did_id == batch.c.id).scalar_subquery()
    now_shared = _count(s, dataset_id, count, bytes_, shared=shared)
    if now_shared:
        parents = sa.select(contents.c.parent_id).join(batch, batch.c.id == contents.c.child_id)
        s.execute(dids.update().where(dids.c.id.in_(parents), dids.c.shared.is_(False)).values(shared=True))
    return now_shared


def left(s: Session, dataset_id: int, file_ids: Sequence[int]) -> None:
    """These files were in the dataset, which the caller holds."""
    batch = ids_of(s, "leaving", file_ids)
    size = sa.select(sa.func.coalesce(sa.func.sum(files.c.size_bytes), 0))
    bytes_ = size.select_from(batch).join(files, files.c.did_id == batch.c.id).scalar_subquery()
    _count(s, dataset_id, -len(file_ids), -bytes_)


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
