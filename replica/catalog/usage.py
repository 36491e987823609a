"""Usage: what the locks of an account's rules hold at an endpoint, each file once.

Given     locks that come or go, files that join or leave a dataset below locks, rules that change hands.
Returns   nothing: the ledger `usage` is right at every commit; or how much is held, now and over time.
Promises  a file is charged to an account once at an endpoint, however many of its rules hold it there. What changes is
          added to the ledger in the transaction that changes it, right before the commit, in one order: its rows are
          held for an instant and nobody waits in a circle. A dataset that shares no file costs one statement whatever
          its size; only where files are shared are they compared, set against set, bounded by what changed.
Partner   called by replica.catalog.placing, .locks and .rules where they write locks; .quotas reads it.

**Who may call.** Whether a file is held by another lock of the account must not change before the commit. So the
caller holds the endpoints concerned (guards.change_endpoints), as whoever changes locks or what is in a locked dataset
does; who holds them together with others (guards.keep_endpoints) also holds the account's ledger
(guards.change_ledger).

**Shared datasets.** `dids.shared` being False proves that no file of the dataset is in another unit of a lock: then a
lock on it holds all of it or, if the account has another lock there on the same dataset, nothing new. A lock on a
single file makes its datasets shared (`files_become_units`, `charge`), an attachment makes both of a file's datasets
shared (replica.catalog.locks).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors, endpoints, guards
from replica.catalog.membership import Unguessed, by_index, closure_of, files_of, literal
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import (
    Instant,
    alias_of,
    contents,
    dids,
    files,
    instant,
    locks,
    micros,
    rules,
    usage,
    usage_history,
)
from rules import expressions
from rules.errors import Invalid
from rules.names import shown
from rules.states import DidKind, Grouping

Number = sa.ColumnElement[Any]

#: SQLite takes no more values in one statement than some ten thousand.
_ROWS_AT_ONCE = 1_000

#: Of a unit: a dataset none of whose files is in another unit of a lock.
ALONE = Unguessed(sa.and_(dids.c.files_total.is_not(None), sa.not_(dids.c.shared)))


# --- locks come and go ----------------------------------------------------------------------------------------------


def charge(s: Session, account_id: int, pairs: sa.FromClause) -> None:
    """The account will have these locks, `(unit_id, endpoint_id)`, which are not written yet."""
    mine = sa.select(sa.literal(account_id, sa.BigInteger()).label("account_id"), pairs.c.unit_id, pairs.c.endpoint_id)
    if _change(s, mine.subquery("charged"), 1):
        _mark_shared(s, sa.select(pairs.c.unit_id))


def discharge(s: Session, gone: Sequence[tuple[int, int, int]]) -> None:
    """These locks, `(rule_id, unit_id, endpoint_id)`, were removed just now."""
    if not gone:
        return
    columns = {"rule_id": sa.BigInteger(), "unit_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}
    batch = bulk.rows_of(s, "locks_gone", columns, gone)
    theirs = (
        sa.select(rules.c.account_id, batch.c.unit_id, batch.c.endpoint_id)
        .select_from(batch)
        .join(rules, rules.c.id == batch.c.rule_id)
        .distinct()
    )
    _change(s, theirs.subquery("discharged"), -1)


def discharge_rule(s: Session, rule_id: int) -> None:
    """All locks of the rule are about to be removed."""
    _change(s, _locks_of(rule_id, _account_of(rule_id)), -1, ignoring_rule=rule_id)


def change_account(s: Session, rule_id: int, account_id: int) -> None:
    """The rule, which the caller holds with the endpoints of its locks, goes over to this account."""
    _change(s, _locks_of(rule_id, _account_of(rule_id)), -1, ignoring_rule=rule_id)
    _change(s, _locks_of(rule_id, sa.literal(account_id, sa.BigInteger())), 1, ignoring_rule=rule_id)


def files_become_units(s: Session, did_id: int, kind: DidKind, grouping: Grouping) -> None:
    """A rule is about to lock single files: their datasets are shared from here on.

    Before the DID is held: who changes these datasets holds them first, and their files after that.
    """
    if kind is DidKind.FILE:
        concerned: Any = sa.select(contents.c.parent_id).where(contents.c.child_id == did_id)
    elif grouping is Grouping.NONE:
        tree = closure_of(did_id, "of_single_files")
        concerned = sa.select(tree.c.id).where(tree.c.kind == literal(DidKind.DATASET))
    else:
        return
    guards.change_collections(s, sa.select(dids.c.id).where(dids.c.id.in_(concerned), sa.not_(dids.c.shared)))
    s.execute(dids.update().where(dids.c.id.in_(concerned), sa.not_(dids.c.shared)).values(shared=True))


def _mark_shared(s: Session, unit_ids: sa.Select[Any]) -> None:
    """What `files_become_units` did not know of: files that came into the DID or another dataset since."""
    above = sa.select(contents.c.parent_id).where(contents.c.child_id.in_(unit_ids))
    dataset = Unguessed(sa.and_(sa.not_(dids.c.shared), dids.c.kind == literal(DidKind.DATASET)))
    with by_index(s):
        s.execute(dids.update().where(dids.c.id.in_(above), dataset).values(shared=True))


# --- contents change ------------------------------------------------------------------------------------------------


def files_joined(s: Session, dataset_id: int, batch: sa.FromClause) -> None:
    """These files, `(id)`, are new in the dataset: who has locks on it, of rules that have ended too, holds them."""
    _content_changed(s, dataset_id, batch, 1)


def unshared_joined(s: Session, holders: Collection[tuple[int, int]], count: int, size_bytes: int) -> None:
    """The same of a dataset that shares no file: `holders` are the accounts that have locks on it, and where."""
    for account_id, endpoint_id in sorted(holders):
        _book(s, account_id, endpoint_id, count, size_bytes)


def files_left(s: Session, dataset_id: int, batch: sa.FromClause) -> None:
    """These files, `(id)`, were in the dataset until now."""
    _content_changed(s, dataset_id, batch, -1)


def _content_changed(s: Session, dataset_id: int, batch: sa.FromClause, sign: int) -> None:
    holders = (
        sa.select(rules.c.account_id, locks.c.endpoint_id)
        .join_from(locks, rules, rules.c.id == locks.c.rule_id)
        .where(locks.c.unit_id == dataset_id)
        .distinct()
        .subquery("holders")
    )
    with by_index(s):
        changed = s.execute(
            sa.select(
                holders.c.account_id,
                holders.c.endpoint_id,
                sa.func.count().label("files"),
                sa.func.sum(files.c.size_bytes).label("bytes"),
            )
            .select_from(batch)
            .join(files, files.c.did_id == batch.c.id)
            .join(holders, sa.true())
            .where(
                sa.not_(_held(holders.c.account_id, files.c.did_id, holders.c.endpoint_id, ignoring_dataset=dataset_id))
            )
            .group_by(holders.c.account_id, holders.c.endpoint_id)
        ).all()
    for row in changed:
        _book(s, row.account_id, row.endpoint_id, sign * row.files, sign * int(row.bytes))


# --- the ledger -----------------------------------------------------------------------------------------------------


def _change(s: Session, mine: sa.FromClause, sign: int, ignoring_rule: int | None = None) -> bool:
    """Book what the locks `mine`, `(account_id, unit_id, endpoint_id)`, hold and no other lock of the account does.

    Returns whether single files are among the units.
    """
    is_new = sa.not_(_locked(mine.c.account_id, mine.c.unit_id, mine.c.endpoint_id, ignoring_rule))
    whole = sa.and_(ALONE, is_new)
    query = (
        sa.select(
            mine.c.account_id,
            mine.c.endpoint_id,
            sa.func.sum(sa.case((whole, dids.c.files_total), else_=0)).label("files"),
            sa.func.sum(sa.case((whole, dids.c.bytes_total), else_=0)).label("bytes"),
            sa.func.sum(sa.case((ALONE, 0), else_=1)).label("to_compare"),
            sa.func.sum(sa.case((dids.c.kind == literal(DidKind.FILE), 1), else_=0)).label("single"),
        )
        .select_from(mine)
        .join(dids, dids.c.id == mine.c.unit_id)
        .group_by(mine.c.account_id, mine.c.endpoint_id)
    )
    with by_index(s):
        found = s.execute(query).all()
    for row in found:
        _book(s, row.account_id, row.endpoint_id, sign * int(row.files), sign * int(row.bytes))
    if any(row.to_compare for row in found):
        for row in _compared(s, mine, ignoring_rule):
            _book(s, row.account_id, row.endpoint_id, sign * row.files, sign * int(row.bytes))
    return any(row.single for row in found)


def _compared(s: Session, mine: sa.FromClause, ignoring_rule: int | None) -> Sequence[sa.Row[Any]]:
    """Of units that may share files: how many files and bytes no other lock of the account holds."""
    units = (
        sa.select(mine.c.account_id, mine.c.unit_id, mine.c.endpoint_id)
        .select_from(mine)
        .join(dids, dids.c.id == mine.c.unit_id)
        .where(sa.not_(ALONE))
        .subquery("units_compared")
    )
    held = files_of(units)
    once = (
        sa.select(held.c.account_id, held.c.endpoint_id, held.c.file_id, held.c.size_bytes)
        .where(sa.not_(_held(held.c.account_id, held.c.file_id, held.c.endpoint_id, ignoring_rule=ignoring_rule)))
        .distinct()
        .subquery("once")
    )
    with by_index(s):
        return s.execute(
            sa.select(
                once.c.account_id,
                once.c.endpoint_id,
                sa.func.count().label("files"),
                sa.func.sum(once.c.size_bytes).label("bytes"),
            ).group_by(once.c.account_id, once.c.endpoint_id)
        ).all()


def _locked(account_id: Number, unit_id: Number, endpoint_id: Number, ignoring_rule: int | None) -> Any:
    """Whether the account has a lock on this very unit there."""
    own = alias_of(locks, "same_unit")
    found = sa.select(1).where(
        own.c.unit_id == unit_id, Unguessed(sa.and_(own.c.endpoint_id == endpoint_id, _owner(own) == account_id))
    )
    if ignoring_rule is not None:
        found = found.where(Unguessed(own.c.rule_id != ignoring_rule))
    return Unguessed(sa.exists(found))


def _held(
    account_id: Number,
    file_id: Number,
    endpoint_id: Number,
    *,
    ignoring_rule: int | None = None,
    ignoring_dataset: int | None = None,
) -> sa.ColumnElement[bool]:
    """Whether a lock of the account (but of this rule, but on this dataset) holds the file there."""
    own, of_dataset = alias_of(locks, "held_alone"), alias_of(locks, "held_in_dataset")
    by_file = sa.select(1).where(
        own.c.unit_id == file_id, Unguessed(sa.and_(own.c.endpoint_id == endpoint_id, _owner(own) == account_id))
    )
    above = sa.select(1).where(
        of_dataset.c.unit_id == contents.c.parent_id,
        Unguessed(sa.and_(of_dataset.c.endpoint_id == endpoint_id, _owner(of_dataset) == account_id)),
    )
    if ignoring_rule is not None:
        by_file = by_file.where(Unguessed(own.c.rule_id != ignoring_rule))
        above = above.where(Unguessed(of_dataset.c.rule_id != ignoring_rule))
    # One inside the other, not a join: from the file to its datasets to their locks, whatever the statistics say.
    by_dataset = sa.select(1).where(contents.c.child_id == file_id, Unguessed(sa.exists(above)))
    if ignoring_dataset is not None:
        by_dataset = by_dataset.where(Unguessed(contents.c.parent_id != ignoring_dataset))
    return Unguessed(sa.or_(sa.exists(by_file), sa.exists(by_dataset)))


def _owner(lock: Any) -> sa.ScalarSelect[Any]:
    """The account of a lock: looked up lock by lock, never by reading through an account's rules."""
    return sa.select(rules.c.account_id).where(rules.c.id == lock.c.rule_id).scalar_subquery()


def _account_of(rule_id: int) -> sa.ScalarSelect[Any]:
    return sa.select(rules.c.account_id).where(rules.c.id == rule_id).scalar_subquery()


def _locks_of(rule_id: int, account_id: Any) -> sa.Subquery:
    return (
        sa.select(account_id.label("account_id"), locks.c.unit_id, locks.c.endpoint_id)
        .where(locks.c.rule_id == rule_id)
        .subquery("of_rule")
    )


def _book(s: Session, account_id: int, endpoint_id: int, count: int, size_bytes: int) -> None:
    had = s.charges.get((account_id, endpoint_id), (0, 0))
    s.charges[account_id, endpoint_id] = had[0] + count, had[1] + size_bytes
    s.before_commit[_write] = None


def _write(s: Session) -> None:
    # In the order of their keys: so two transactions never hold what the other waits for.
    changes = [(*key, *change) for key, change in sorted(s.charges.items()) if change != (0, 0)]
    s.charges.clear()
    for start in range(0, len(changes), _ROWS_AT_ONCE):  # one part, as good as always
        upsert = bulk.insert(s, usage).values(changes[start : start + _ROWS_AT_ONCE])
        added = {name: usage.c[name] + upsert.excluded[name] for name in ("files", "bytes")}
        s.execute(upsert.on_conflict_do_update(index_elements=["account_id", "endpoint_id"], set_=added))


# --- reading --------------------------------------------------------------------------------------------------------


def of_account(s: Session, account_id: int) -> dict[int, int]:
    """Endpoint id → bytes held there, with what this transaction has changed so far."""
    query = sa.select(usage.c.endpoint_id, usage.c.bytes).where(usage.c.account_id == account_id)
    held = {endpoint_id: int(size) for endpoint_id, size in s.execute(query)}
    for (owner, endpoint_id), (_, size) in s.charges.items():
        if owner == account_id:
            held[endpoint_id] = held.get(endpoint_id, 0) + size
    return held


def charged(
    s: Session, account_id: int, unit_ids: Sequence[int], endpoint_ids: Iterable[int]
) -> dict[int, dict[int, int]]:
    """Unit → endpoint → bytes of the unit that the account is charged for there already."""
    account = sa.literal(account_id, sa.BigInteger())
    batch = bulk.rows_of(s, "maybe_charged", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids])
    there = bulk.ids_of(s, "maybe_charged_at", sorted(endpoint_ids))
    found: dict[int, dict[int, int]] = {}
    whole = (
        sa.select(batch.c.unit_id, there.c.id, dids.c.bytes_total)
        .select_from(batch)
        .join(dids, dids.c.id == batch.c.unit_id)
        .join(there, sa.true())
        .where(ALONE, _locked(account, batch.c.unit_id, there.c.id, None))
    )
    with by_index(s):
        for unit_id, endpoint_id, size in s.execute(whole):
            found.setdefault(unit_id, {})[endpoint_id] = int(size)
    some = sa.select(batch.c.unit_id).join(dids, dids.c.id == batch.c.unit_id).where(sa.not_(ALONE))
    if to_compare := list(s.execute(some).scalars()):
        pairs = _held_by_unit(s, account, to_compare, there)
        once = pairs.distinct().subquery("charged_once")
        query = sa.select(once.c.unit_id, once.c.endpoint_id, sa.func.sum(once.c.size_bytes))
        with by_index(s):
            for unit_id, endpoint_id, size in s.execute(query.group_by(once.c.unit_id, once.c.endpoint_id)):
                found.setdefault(unit_id, {})[endpoint_id] = int(size)
    return found


def charged_together(
    s: Session, account_id: int, unit_ids: Sequence[int], endpoint_ids: Iterable[int]
) -> dict[int, int]:
    """Endpoint → bytes of all these units, a file in two of them once, that the account is charged for there."""
    there = bulk.ids_of(s, "maybe_charged_at", sorted(endpoint_ids))
    pairs = _held_by_unit(s, sa.literal(account_id, sa.BigInteger()), unit_ids, there).subquery("charged_pairs")
    once = sa.select(pairs.c.file_id, pairs.c.endpoint_id, pairs.c.size_bytes).distinct().subquery("charged_once")
    with by_index(s):
        query = sa.select(once.c.endpoint_id, sa.func.sum(once.c.size_bytes)).group_by(once.c.endpoint_id)
        return {endpoint_id: int(size) for endpoint_id, size in s.execute(query)}


def _held_by_unit(s: Session, account: Number, unit_ids: Sequence[int], there: sa.FromClause) -> sa.Select[Any]:
    """`(unit_id, endpoint_id, file_id, size_bytes)` of what locks of the account hold at these endpoints."""
    held = files_of(bulk.rows_of(s, "compared", {"unit_id": sa.BigInteger()}, [(u,) for u in unit_ids]))
    return (
        sa.select(held.c.unit_id, there.c.id.label("endpoint_id"), held.c.file_id, held.c.size_bytes)
        .select_from(held)
        .join(there, sa.true())
        .where(_held(account, held.c.file_id, there.c.id))
    )


#: What totals are made for.
BY = ("account", "endpoint")


def list_page(
    s: Session,
    *,
    account: str | None = None,
    where: str | None = None,
    by: str | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.Usage]:
    """What accounts hold now; with `by` the totals of each account, or of each endpoint."""
    key: tuple[sa.Column[Any], ...] = (usage.c.account_id, usage.c.endpoint_id)
    sums: list[Any] = [usage.c.files, usage.c.bytes]
    if by is not None:
        if by not in BY:
            raise Invalid(f"usage by {shown(by)} is not known", hint=f"use one of {', '.join(BY)}", field="by")
        key = (usage.c[f"{by}_id"],)
        sums = [sa.func.sum(usage.c.files).label("files"), sa.func.sum(usage.c.bytes).label("bytes")]
    query = sa.select(*key, *sums).where(usage.c.files != 0, *_concerning(s, usage, account, where))
    if by is not None:
        query = query.group_by(*key)
    if after := cursors.unpack(cursor, len(key)):
        query = query.where(sa.tuple_(*key) > sa.tuple_(*(sa.literal(each, sa.BigInteger()) for each in after)))
    found = s.execute(query.order_by(*key).limit(cursors.check_limit(limit) + 1)).mappings()
    rows = [dict(row) for row in found]
    names = _names(s, rows)
    return cursors.page(
        rows,
        limit,
        lambda row: wire.Usage(**names(row), files=int(row["files"]), bytes=int(row["bytes"])),
        lambda row: tuple(row[column.name] for column in key),
    )


def history_page(
    s: Session,
    *,
    account: str | None = None,
    where: str | None = None,
    since: datetime | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.UsageThen]:
    """How usage was, the oldest first: a row for each period in which it changed; first as it was at `since`."""
    then = usage_history
    query = sa.select(then).where(*_concerning(s, then, account, where))
    if since is not None:
        moment = sa.literal(since, Instant())
        before = then.alias("before")
        last = sa.select(sa.func.max(before.c.at)).where(
            before.c.account_id == then.c.account_id, before.c.endpoint_id == then.c.endpoint_id, before.c.at <= moment
        )
        query = query.where(then.c.at >= sa.func.coalesce(last.scalar_subquery(), moment))
    key = (then.c.at, then.c.account_id, then.c.endpoint_id)
    if after := cursors.unpack(cursor, len(key)):
        at = sa.literal(instant(after[0]), Instant())
        query = query.where(sa.tuple_(*key) > sa.tuple_(at, *(sa.literal(each, sa.BigInteger()) for each in after[1:])))
    found = s.execute(query.order_by(*key).limit(cursors.check_limit(limit) + 1)).mappings()
    rows = [dict(row) for row in found]
    names = _names(s, rows)
    return cursors.page(
        rows,
        limit,
        lambda row: wire.UsageThen(at=row["at"], **names(row), files=row["files"], bytes=row["bytes"]),
        lambda row: (micros(row["at"]), row["account_id"], row["endpoint_id"]),
    )


def note(s: Session) -> int:
    """Write down what changed since it was last written down; returns how many rows that are."""
    then = usage_history

    def last(column: str) -> Any:
        mine = sa.select(then.c[column]).where(
            then.c.account_id == usage.c.account_id, then.c.endpoint_id == usage.c.endpoint_id
        )
        # Nothing was written down as long as nothing was held.
        return sa.func.coalesce(mine.order_by(then.c.at.desc()).limit(1).scalar_subquery(), 0)

    changed = sa.select(
        usage.c.account_id, usage.c.endpoint_id, sa.literal(s.now, Instant()), usage.c.files, usage.c.bytes
    ).where(sa.or_(last("files") != usage.c.files, last("bytes") != usage.c.bytes))
    names = ["account_id", "endpoint_id", "at", "files", "bytes"]
    made = bulk.insert(s, then).from_select(names, changed)
    values = {name: made.excluded[name] for name in ("files", "bytes")}
    noted = made.on_conflict_do_update(index_elements=names[:3], set_=values).returning(then.c.account_id)
    return len(s.execute(noted).all())


def _concerning(s: Session, table: sa.Table, account: str | None, where: str | None) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if account is not None:
        found.append(table.c.account_id == accounts.account_id(s, account))
    if where is not None:
        selected = [e.id for e in expressions.select(where, endpoints.snapshot(s))]
        batch = bulk.ids_of(s, "selected", selected)
        found.append(table.c.endpoint_id.in_(sa.select(batch.c.id)))
    return found


def _names(s: Session, rows: Sequence[Mapping[Any, Any]]) -> Callable[[Mapping[Any, Any]], dict[str, str | None]]:
    """Writes the names of account and endpoint of a row; None for what the row is not about."""

    def named(table: sa.Table, column: str) -> dict[int, str]:
        ids = sorted({row[column] for row in rows if column in row})
        if not ids:
            return {}
        batch = bulk.ids_of(s, f"named_{table.name}", ids)
        query = sa.select(table.c.id, table.c.name).join(batch, batch.c.id == table.c.id)
        return {row.id: row.name for row in s.execute(query)}

    by_account = named(tables.accounts, "account_id")
    by_endpoint = named(tables.endpoints, "endpoint_id")
    return lambda row: {
        "account": by_account.get(row.get("account_id", -1)),
        "endpoint": by_endpoint.get(row.get("endpoint_id", -1)),
    }
