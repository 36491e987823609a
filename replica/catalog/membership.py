"""Who holds whom: from a container down to its files, and from a file up to the rules that cover it.

Given     row ids of DIDs, or pairs of a file and an endpoint.
Returns   SQL to join with. The unit of a lock is a dataset or a single file, so everything has two branches.
Promises  a walk down never looks into a dataset to find datasets, so its cost does not depend on the files.
Partner   replica.catalog.placing and .locks put these into their statements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from replica.catalog.bulk import ids_of
from replica.db.engine import Session
from replica.db.tables import alias_of, contents, dids, files, locks, replicas, rules, scopes
from rules.states import DidKind, Grouping, RuleState


def closure(roots: sa.Select[Any], name: str = "closure") -> sa.CTE:
    """`(tag, id, kind)`: the roots and all collections below them. `roots` selects `(tag, id)`."""
    start = roots.subquery()
    walk = sa.select(start.c.tag, start.c.id, dids.c.kind).join(dids, dids.c.id == start.c.id).cte(name, recursive=True)
    child = alias_of(dids, f"{name}_child")
    return walk.union(
        sa.select(walk.c.tag, child.c.id, child.c.kind)
        .select_from(walk)
        .join(contents, contents.c.parent_id == walk.c.id)
        .join(child, child.c.id == contents.c.child_id)
        .where(walk.c.kind == literal(DidKind.CONTAINER))
    )


def closure_of(did_id: int, name: str = "closure") -> sa.CTE:
    """The closure of one DID; its tag is 0."""
    columns: list[sa.ColumnElement[Any]] = [sa.literal(0).label("tag"), sa.literal(did_id, sa.BigInteger()).label("id")]
    return closure(sa.select(*columns), name)


def ancestors(s: Session, ids: list[int]) -> sa.CTE:
    """`(id)`: the given DIDs and every collection above them."""
    return ancestors_of(ids_of(s, "below", ids), s.postgresql)


def ancestors_of(start: sa.FromClause, postgresql: bool) -> sa.CTE:
    """The same of `start`, `(id)`."""
    walk = sa.select(start.c.id).cte("ancestors", recursive=True)
    if postgresql:  # one by one, whatever it thinks of their number: all contents would be read instead
        above = sa.select(contents.c.parent_id).where(contents.c.child_id == walk.c.id).offset(0).lateral("above")
        return walk.union(sa.select(above.c.parent_id).select_from(walk.join(above, sa.true())))
    return walk.union(
        sa.select(contents.c.parent_id).select_from(walk).join(contents, contents.c.child_id == walk.c.id)
    )


def looked_up(
    postgresql: bool, batch: sa.FromClause, column: sa.ColumnElement[Any], rows: sa.Select[Any], name: str
) -> tuple[sa.FromClause, sa.FromClause]:
    """Those of `rows` of which `column` has a number of the batch, `(id)`; and what to select them from.

    PostgreSQL goes from each number to its rows by an index, in the order of the batch. Of tables that are new it
    thinks that they are small, and would now and then read all of one to find the rows of a few numbers.
    """
    if not postgresql:
        found = rows.where(column.in_(sa.select(batch.c.id))).subquery(name)
        return found, found
    each = rows.where(column == batch.c.id).offset(0).lateral(name)
    return each, batch.join(each, sa.true())


def units(tree: sa.CTE, grouping: Grouping) -> sa.Select[Any]:
    """`(tag, unit_id)`: what a rule on the root places as a whole."""
    if grouping is not Grouping.NONE:
        return sa.select(tree.c.tag, tree.c.id.label("unit_id")).where(
            tree.c.kind.in_([literal(DidKind.DATASET), literal(DidKind.FILE)])
        )
    single = sa.select(tree.c.tag, tree.c.id.label("unit_id")).where(tree.c.kind == literal(DidKind.FILE))
    held = (
        sa.select(tree.c.tag, contents.c.child_id.label("unit_id"))
        .select_from(tree)
        .join(contents, contents.c.parent_id == tree.c.id)
        .where(tree.c.kind == literal(DidKind.DATASET))
    )
    # Not UNION ALL: a file in two datasets of the tree is one unit.
    both = held.union(single).subquery()
    return sa.select(both.c.tag, both.c.unit_id)


def files_of(of: sa.FromClause, *, after: str | None = None, upto: str | None = None) -> sa.Subquery:
    """The columns of `of`, which has `unit_id`, with `file_id` and `size_bytes`: one row for each file of each unit.

    `after` and `upto` name columns of `of` that bound the file ids: greater than the one, at most the other.
    """
    columns = list(of.c)
    held = (
        sa.select(*columns, contents.c.child_id.label("file_id"), files.c.size_bytes)
        .select_from(of)
        .join(contents, contents.c.parent_id == of.c.unit_id)
        .join(files, files.c.did_id == contents.c.child_id)
    )
    if after is not None:
        held = held.where(contents.c.child_id > of.c[after])
    if upto is not None:
        held = held.where(contents.c.child_id <= of.c[upto])
    single = (
        sa.select(*columns, files.c.did_id.label("file_id"), files.c.size_bytes)
        .select_from(of)
        .join(files, files.c.did_id == of.c.unit_id)
    )
    return sa.union_all(held, single).subquery("unit_files")


def covering(pairs: sa.FromClause) -> sa.Subquery:
    """`(rule_id, unit_id, endpoint_id, file_id)`: every lock that covers a pair, once for each pair it covers."""
    lock = (locks.c.rule_id, locks.c.unit_id, locks.c.endpoint_id)
    by_dataset = (
        sa.select(*lock, pairs.c.file_id)
        .select_from(pairs)
        .join(contents, contents.c.child_id == pairs.c.file_id)
        .join(
            locks,
            sa.and_(
                locks.c.unit_id == Computed(contents.c.parent_id), Unguessed(locks.c.endpoint_id == pairs.c.endpoint_id)
            ),
        )
    )
    by_file = (
        sa.select(*lock, pairs.c.file_id)
        .select_from(pairs)
        .join(locks, sa.and_(locks.c.unit_id == pairs.c.file_id, Unguessed(locks.c.endpoint_id == pairs.c.endpoint_id)))
    )
    return sa.union_all(by_dataset, by_file).subquery("cover")


def is_covered(
    file_id: sa.ColumnElement[Any],
    endpoint_id: sa.ColumnElement[Any],
    ignoring_rule: int | None = None,
    *,
    ignoring_ended: bool = False,
) -> sa.ColumnElement[bool]:
    """Whether any rule (but `ignoring_rule`) protects the file at the endpoint.

    `ignoring_ended`: rules whose locks are being removed do not count.
    """

    def protects(lock: Any) -> Iterator[sa.ColumnElement[bool]]:
        if ignoring_rule is not None:
            yield Unguessed(lock.c.rule_id != ignoring_rule)
        if ignoring_ended:
            yield sa.not_(_has_ended(lock))

    return has_lock("lock", file_id, endpoint_id, protects)


def is_wished(
    file_id: sa.ColumnElement[Any], endpoint_id: sa.ColumnElement[Any], by_rule: int | None = None
) -> sa.ColumnElement[bool]:
    """Whether any rule, or this one, wants the file at the endpoint by a lock that it has not given up. One that has
    ended wants nothing."""

    def wishes(lock: Any) -> Iterator[sa.ColumnElement[bool]]:
        yield Unguessed(lock.c.surplus.is_(False))
        yield sa.not_(_has_ended(lock)) if by_rule is None else Unguessed(lock.c.rule_id == by_rule)

    return has_lock("wish", file_id, endpoint_id, wishes)


def has_lock(
    name: str,
    file_id: sa.ColumnElement[Any],
    endpoint_id: sa.ColumnElement[Any],
    where: Callable[[Any], Iterable[sa.ColumnElement[bool]]],
) -> sa.ColumnElement[bool]:
    """Whether the file at the endpoint has a lock of which `where` is true: its own, or that of a dataset it is in."""
    own, of_dataset = alias_of(locks, f"own_{name}"), alias_of(locks, f"dataset_{name}")

    def there(lock: Any) -> Iterator[sa.ColumnElement[bool]]:
        yield Unguessed(lock.c.endpoint_id == endpoint_id)
        yield from where(lock)

    by_file = sa.select(1).where(own.c.unit_id == file_id, *there(own))
    # One inside the other, not a join: with statistics of a time when there were few locks, a join reads all of them.
    above = sa.select(1).where(of_dataset.c.unit_id == contents.c.parent_id, *there(of_dataset))
    by_dataset = sa.select(1).where(contents.c.child_id == file_id, Unguessed(sa.exists(above)))
    return Unguessed(sa.or_(sa.exists(by_file), sa.exists(by_dataset)))


def _has_ended(lock: sa.FromClause) -> sa.ColumnElement[bool]:
    ended = sa.select(1).where(rules.c.id == lock.c.rule_id, Unguessed(rules.c.state == literal(RuleState.EXPIRED)))
    return Unguessed(sa.exists(ended))


@contextlib.contextmanager
def by_index(s: Session) -> Iterator[None]:
    """Statements that look up a few rows for each of many: on PostgreSQL by an index, also while a table is so new
    that reading all of it seems to be nothing."""
    if s.postgresql:
        s.execute(sa.text("SET LOCAL enable_seqscan = off"))
    yield
    if s.postgresql:
        s.execute(sa.text("SET LOCAL enable_seqscan = on"))


def _switched(to: str, *names: str) -> sa.TextClause:
    """Until the transaction ends."""
    return sa.text("SELECT " + ", ".join(f"set_config('enable_{name}', '{to}', true)" for name in names))


_ALONG_INDEXES = _switched("off", "seqscan", "hashjoin", "nestloop", "sort")
_AS_IT_LIKES = _switched("on", "seqscan", "hashjoin", "nestloop", "sort")
_INTO_INDEXES = _switched("off", "seqscan", "hashjoin", "mergejoin")
_IN_THEIR_ORDER = _switched("off", "seqscan", "hashjoin", "mergejoin", "bitmapscan", "sort", "incremental_sort")


@contextlib.contextmanager
def side_by_side(s: Session) -> Iterator[None]:
    """Statements that join large parts of two tables which indexes have in the same order: on PostgreSQL along these,
    row by row, without looking anything up, sorting or keeping it."""
    if s.postgresql:
        s.execute(_ALONG_INDEXES)
    yield
    if s.postgresql:
        s.execute(_AS_IT_LIKES)


def walk_by_index(s: Session) -> None:
    """From here on in this transaction PostgreSQL goes from each row of a batch to what belongs to it by an index.

    For a thousand rows it would rather read a table of some ten thousand as a whole, once for each statement, and sort
    it: that costs more than a thousand look-ups, and the more the larger the table is.
    """
    if s.postgresql:
        s.execute(_INTO_INDEXES)


def walk_in_order(s: Session) -> None:
    """The same, and what is first in the order of an index is found there, whatever PostgreSQL thinks of its size."""
    if s.postgresql:
        s.execute(_IN_THEIR_ORDER)


def literal(state: Any) -> sa.ColumnElement[Any]:
    """A state written into the statement: a bound value would hide from the planner that a partial index fits."""
    return sa.literal_column(str(state.value), sa.SmallInteger())


def any_of(column: sa.ColumnElement[Any], states: Any) -> sa.ColumnElement[bool]:
    """`column IN (…)` with the numbers in the text, in the order in which the partial indexes have them."""
    return column.in_([literal(state) for state in sorted(states, key=lambda state: state.value)])


class Unguessed(sa.ColumnElement[bool]):
    """A condition that PostgreSQL checks row by row, without an index and without a guess how many rows it leaves.

    Of a batch, and of a table that is new, PostgreSQL knows nothing. It then guesses that an endpoint has a handful of
    replicas, begins with these, and reads all of a dataset again for each: hours instead of a second. With nothing to
    guess it goes from the file to its replicas by the primary key, which is right whatever the numbers are.
    """

    inherit_cache = True
    type = sa.Boolean()
    _traverse_internals: Any = [("condition", sa.sql.visitors.InternalTraversal.dp_clauseelement)]  # noqa: RUF012

    def __init__(self, condition: sa.ColumnElement[bool]) -> None:
        self.condition = condition


@compiles(Unguessed)
def _plainly(element: Unguessed, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.condition.self_group(), **kw))


@compiles(Unguessed, "postgresql")
def _case(element: Unguessed, compiler: Any, **kw: Any) -> str:
    return f"CASE WHEN {compiler.process(element.condition, **kw)} THEN true ELSE false END"


class Computed(sa.ColumnElement[int]):
    """A number that has no index on PostgreSQL, so that a join is walked in the direction in which it is written."""

    inherit_cache = True
    type = sa.BigInteger()
    _traverse_internals: Any = [("number", sa.sql.visitors.InternalTraversal.dp_clauseelement)]  # noqa: RUF012

    def __init__(self, number: sa.ColumnElement[int]) -> None:
        self.number = number


@compiles(Computed)
def _as_it_is(element: Computed, compiler: Any, **kw: Any) -> str:
    return str(compiler.process(element.number, **kw))


@compiles(Computed, "postgresql")
def _plus_nothing(element: Computed, compiler: Any, **kw: Any) -> str:
    return f"({compiler.process(element.number, **kw)} + 0)"


def of_pair(pairs: sa.FromClause) -> sa.ColumnElement[bool]:
    """The replica of a pair of `file_id` and `endpoint_id`."""
    return sa.and_(replicas.c.file_id == pairs.c.file_id, Unguessed(replicas.c.endpoint_id == pairs.c.endpoint_id))


def replicas_of(s: Session, pairs: sa.FromClause) -> tuple[sa.FromClause, sa.FromClause]:
    """The replicas of these pairs, and what to select them from.

    PostgreSQL walks from each pair to its replica, and tests what else is asked about it after that: asked of a batch
    and of a table that it takes for small, it would rather ask it of every replica there is.
    """
    if not s.postgresql:
        return replicas, pairs.join(replicas, of_pair(pairs))
    there = (
        sa.select(replicas)
        .where(replicas.c.file_id == pairs.c.file_id, replicas.c.endpoint_id == pairs.c.endpoint_id)
        .offset(0)
        .lateral("there")
    )
    return there, pairs.join(there, sa.true())


def dids_named(s: Session, names: sa.FromClause) -> tuple[sa.FromClause, sa.FromClause]:
    """The DIDs of these, which have `name` and either `scope_id` or `scope`, and what to select them from.

    PostgreSQL looks every name up by the index: with statistics of a time when a scope held little it would rather
    read all of the scope for each.
    """
    walk, scope_id = names, names.c.get("scope_id")
    if scope_id is None:
        walk, scope_id = names.join(scopes, scopes.c.name == names.c.scope), scopes.c.id
    this = sa.and_(dids.c.scope_id == scope_id, dids.c.name == names.c.name)
    if not s.postgresql:
        return dids, walk.join(dids, this)
    there = sa.select(dids.c.id, dids.c.kind, dids.c.name, dids.c.deleted_at).where(this).offset(0).lateral("named")
    return there, walk.join(there, sa.true())


def of_lock(these: sa.FromClause) -> sa.ColumnElement[bool]:
    """The lock of a row with `rule_id`, `unit_id` and `endpoint_id`."""
    return sa.and_(
        locks.c.rule_id == these.c.rule_id,
        locks.c.unit_id == these.c.unit_id,
        locks.c.endpoint_id == these.c.endpoint_id,
    )
