"""Conditions on DIDs, asked of a database: the same answers as rules.conditions gives in memory.

Given     the tree of a condition, or the key by which a list is sorted.
Returns   SQL over a query that has `dids`, `scopes`, `accounts` and `files` (outer) in it.
Promises  values and keys are bound, never part of the text. PostgreSQL and SQLite agree with each other and with
          `rules.conditions.matches`: numbers by value, texts by code point, whatever the database's collation.
          Equality, `in` and `has` on the metadata use the GIN index of PostgreSQL.
Partner   replica.catalog.dids lists by them.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, assert_never

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from replica.catalog import cursors
from replica.catalog.membership import Unguessed
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import dids, files
from rules import conditions
from rules.conditions import And, Condition, Equals, Exists, Has, Key, Like, Not, OneOf, Or, Order, Test, Value
from rules.errors import Invalid, InvalidExpression
from rules.states import DidKind

Clause = sa.ColumnElement[bool]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
#: Texts are sorted by so many characters: more would not fit into a cursor.
_SORTED_LENGTH = 200
_MISSING = 3
#: So many DIDs, at least, are looked at to see whether what fulfils a condition is found soon.
WINDOW = 2_000


def where(s: Session, tree: Condition) -> Clause:
    """The condition as it stands in a WHERE."""
    return _clause(s, tree, negated=False)


def select_where(
    s: Session, query: sa.Select[Any], tree: Condition, *, after: int | None, limit: int
) -> sa.Select[Any]:
    """The query with the condition; it goes by id, from `after` on, or is sorted otherwise when that is None.

    PostgreSQL cannot guess how often something is in the metadata. So the next DIDs are looked at first: where enough
    of them fulfil the condition the list is read in its order; else all that do are fetched by the index, and sorted.
    """
    clause = narrowing(s, tree) if s.postgresql else None
    if clause is None:
        return query.where(where(s, tree))
    if after is not None:
        in_order = query.where(Unguessed(where(s, tree)))
        window = max(WINDOW, 20 * limit)
        beyond = sa.select(dids.c.id).where(dids.c.id > after).order_by(dids.c.id).offset(window).limit(1)
        last = s.execute(beyond).scalar_one_or_none()
        if last is None:
            return in_order
        near = in_order.where(dids.c.id > after, dids.c.id <= last).with_only_columns(dids.c.id).limit(limit + 1)
        if s.execute(sa.select(sa.func.count()).select_from(near.subquery())).scalar_one() > limit:
            return in_order
    found = sa.select(dids.c.id).where(clause).cte("found").prefix_with("MATERIALIZED")
    return query.where(where(s, tree), dids.c.id.in_(sa.select(found.c.id)))


def narrowing(s: Session, tree: Condition) -> Clause | None:
    """What of the condition PostgreSQL finds by its index on the metadata; None where that is nothing."""
    match tree:
        case Equals(key) | OneOf(key) | Has(key):
            return None if key.built_in else _test(s, tree)
        case And(parts):
            found = [clause for part in parts if (clause := narrowing(s, part)) is not None]
            return sa.and_(*found) if found else None
        case Or(parts):
            found = [clause for part in parts if (clause := narrowing(s, part)) is not None]
            return sa.or_(*found) if len(found) == len(parts) else None
    return None


def matches(s: Session, text: sa.ColumnElement[str], pattern: str) -> Clause:
    """Case counts on both databases: SQLite's LIKE does not distinguish it, its GLOB does."""
    if s.postgresql:
        for special in "\\%_":
            pattern = pattern.replace(special, f"\\{special}")
        return text.like(pattern.replace("*", "%").replace("?", "_"), escape="\\")
    return text.bool_op("GLOB")(pattern.replace("[", "[[]"))


# --- the tree -------------------------------------------------------------------------------------------------------


def _clause(s: Session, tree: Condition, *, negated: bool) -> Clause:
    """A `not` goes down to the tests: above them NULL and false are the same, and the index is seen."""
    match tree:
        case And(parts):
            return (sa.or_ if negated else sa.and_)(*(_clause(s, part, negated=negated) for part in parts))
        case Or(parts):
            return (sa.and_ if negated else sa.or_)(*(_clause(s, part, negated=negated) for part in parts))
        case Not(of):
            return _clause(s, of, negated=not negated)
    found = _test(s, tree)
    return sa.not_(sa.func.coalesce(found, sa.false(), type_=sa.Boolean())) if negated else found


def _test(s: Session, test: Test) -> Clause:
    if test.key.built_in:
        return _of_built_in(s, test)
    return _in_jsonb(s, test) if s.postgresql else _in_json(s, test)


# --- what the catalogue knows itself --------------------------------------------------------------------------------

_KIND = sa.case(
    *((dids.c.kind == kind, sa.literal_column(f"'{kind.label}'", sa.String())) for kind in DidKind), else_=None
)
_BUILT_IN: dict[str, sa.ColumnElement[Any]] = {
    "kind": _KIND,
    "name": dids.c.name,
    "scope": tables.scopes.c.name,
    "account": tables.accounts.c.name,
    "created_at": sa.type_coerce(dids.c.created_at, sa.BigInteger()),
    "closed_at": sa.type_coerce(dids.c.closed_at, sa.BigInteger()),
    "expires_at": sa.type_coerce(dids.c.expires_at, sa.BigInteger()),
    "open": dids.c.open,
    "monotonic": dids.c.monotonic,
    "size": files.c.size_bytes,
    "bytes": sa.func.coalesce(files.c.size_bytes, dids.c.bytes_total, type_=sa.BigInteger()),
    "files": sa.case((dids.c.kind == DidKind.FILE, sa.literal(1, sa.BigInteger())), else_=dids.c.files_total),
}


def _of_built_in(s: Session, test: Test) -> Clause:
    column = _BUILT_IN[test.key.path[0]]
    match test:
        case Equals(key, value):
            if key.path == ("kind",):
                return dids.c.kind == DidKind[str(value).upper()]
            return column == _bound(s, value)
        case OneOf(key, values):
            if key.path == ("kind",):
                return dids.c.kind.in_([DidKind[str(value).upper()] for value in values])
            return column.in_([_bound(s, value) for value in values])
        case Order(key, relation, value):
            compared: Clause = _COMPARE[relation](
                _by_code_point(s, column) if key.type == "text" else column, _bound(s, value)
            )
            return compared
        case Like(_, pattern):
            return matches(s, column, pattern)
        case Exists():
            return column.is_not(None)
        case Has():
            return sa.false()
    assert_never(test)


def _bound(s: Session, value: Value) -> sa.ColumnElement[Any]:
    match value:
        case bool():
            return sa.literal(value, sa.Boolean())
        case int():
            return sa.literal(value, sa.BigInteger())
        case float():
            # By its digits: PostgreSQL would otherwise compare a whole number as a floating-point one, and round it.
            return _number(s, repr(value)) if s.postgresql else sa.literal(value, sa.Float())
    return sa.literal(value, sa.String())


def _number(s: Session, digits: str) -> sa.ColumnElement[Any]:
    """On SQLite read as numbers in the metadata are: what is written alike is equal."""
    text = sa.literal(digits, sa.String())
    return sa.cast(text, sa.Numeric()) if s.postgresql else sa.func.json_extract(text, "$")


def _by_code_point(s: Session, text: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return text.collate("C") if s.postgresql else text


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


def _in_jsonb(s: Session, test: Test) -> Clause:
    at = _jsonb_at(test.key)
    match test:
        case Equals(key, value):
            return _contains(key, value)
        case OneOf(key, values):
            return sa.or_(*(_contains(key, value) for value in values))
        case Has(key, value):
            return _contains(key, [value])
        case Order(_, relation, str(value)):
            text = _by_code_point(s, _jsonb_text(at))
            return sa.and_(sa.func.jsonb_typeof(at) == "string", _COMPARE[relation](text, _bound(s, value)))
        case Order(_, relation, value):
            # As JSON, which has an order of its own: a cast to a number would be an error where there is none.
            return sa.and_(sa.func.jsonb_typeof(at) == "number", _COMPARE[relation](at, _jsonb(value)))
        case Like(_, pattern):
            return sa.and_(sa.func.jsonb_typeof(at) == "string", matches(s, _jsonb_text(at), pattern))
        case Exists():
            return sa.func.jsonb_typeof(at) != "null"
    assert_never(test)


def _jsonb_at(key: Key) -> sa.ColumnElement[Any]:
    at: sa.ColumnElement[Any] = sa.type_coerce(dids.c.metadata, JSONB())
    for segment in key.path:
        at = at.op("->", return_type=JSONB())(sa.literal(segment, sa.Text()))
    return at


def _jsonb_text(at: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    return at.op("#>>", return_type=sa.Text())(sa.literal_column("'{}'", sa.Text()))


def _jsonb(value: object) -> sa.ColumnElement[Any]:
    return sa.cast(sa.literal(json.dumps(value, ensure_ascii=False), sa.Text()), JSONB())


def _contains(key: Key, value: object) -> Clause:
    for segment in reversed(key.path):
        value = {segment: value}
    return sa.type_coerce(dids.c.metadata, JSONB()).bool_op("@>")(_jsonb(value))


# --- SQLite ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Element:
    """A value in a JSON document, as json_each gives it: walked by key, for a path of SQLite knows no odd keys."""

    rows: list[sa.TableValuedAlias]
    conditions: list[Clause]

    @property
    def last(self) -> sa.TableValuedAlias:
        return self.rows[-1]

    def select(self, *columns: Any) -> sa.Select[Any]:
        return sa.select(*columns).select_from(*self.rows).where(*self.conditions)


def _json_at(key: Key) -> _Element:
    rows: list[sa.TableValuedAlias] = []
    inside: sa.ColumnElement[Any] = sa.type_coerce(dids.c.metadata, sa.Text())
    for depth in range(len(key.path)):
        rows.append(_each(inside, f"element_{depth}"))
        inside = sa.case((rows[-1].c.type == "object", rows[-1].c.value), else_="{}")
    return _Element(rows, [row.c.key == segment for row, segment in zip(rows, key.path, strict=True)])


def _each(document: sa.ColumnElement[Any], name: str) -> sa.TableValuedAlias:
    return sa.func.json_each(document).table_valued("key", "value", "type", "atom", name=name, joins_implicitly=True)


def _in_json(s: Session, test: Test) -> Clause:
    found = _json_at(test.key)
    last = found.last.c
    match test:
        case Equals(_, value):
            holds = _json_equals(s, found.last, value)
        case OneOf(_, values):
            holds = sa.or_(*(_json_equals(s, found.last, value) for value in values))
        case Has(_, value):
            elements = _each(sa.case((last.type == "array", last.value), else_="[]"), "list_element")
            holds = sa.exists(sa.select(1).select_from(elements).where(_json_equals(s, elements, value)))
        case Order(_, relation, str(value)):
            holds = sa.and_(last.type == "text", _COMPARE[relation](last.atom, _bound(s, value)))
        case Order(_, relation, value):
            number = last.type.in_(["integer", "real"])
            holds = sa.and_(number, _COMPARE[relation](last.atom, _number(s, repr(value))))
        case Like(_, pattern):
            holds = sa.and_(last.type == "text", matches(s, last.atom, pattern))
        case Exists():
            holds = last.type != "null"
        case _:
            assert_never(test)
    return sa.exists(found.select(1).where(holds))


def _json_equals(s: Session, element: sa.TableValuedAlias, value: Value) -> Clause:
    match value:
        case bool():
            return element.c.type == ("true" if value else "false")
        case str():
            return sa.and_(element.c.type == "text", element.c.atom == _bound(s, value))
    return sa.and_(element.c.type.in_(["integer", "real"]), element.c.atom == _number(s, repr(value)))


# --- sorting --------------------------------------------------------------------------------------------------------


class Sorting:
    """The order of a list by a key: numbers, texts, then true and false; the other way round with `-key`.

    What does not have the key, or has a list there, comes last either way; what is equal, in the order of its making.
    """

    def __init__(self, s: Session, text: str) -> None:
        self._s = s
        self._descending = text.startswith("-")
        try:
            key = conditions.parse_key(text.removeprefix("-"))
        except InvalidExpression as error:
            raise Invalid(f"cannot sort by it: {error.message}", hint=error.hint, field="sort") from None
        kind, number, prefix = _of_built_in_key(key) if key.built_in else self._of_metadata(key)
        known = 2 - kind if self._descending else kind
        self.columns = (
            sa.case((kind == _MISSING, _MISSING), else_=known).label("sort_kind"),
            sa.func.coalesce(number, 0).label("sort_number"),
            _by_code_point(s, sa.func.coalesce(prefix, "", type_=sa.String())).label("sort_text"),
        )

    def order(self) -> tuple[sa.ColumnElement[Any], ...]:
        kind, *values = (column.element for column in self.columns)
        return kind, *(value.desc() if self._descending else value.asc() for value in values), dids.c.id

    def after(self, cursor: str) -> Clause:
        """What follows the row whose `key` is in the cursor."""
        kind, number, text, last = cursors.unpack_sorted(cursor)
        kind_now, number_now, text_now = (column.element for column in self.columns)
        beyond = operator.lt if self._descending else operator.gt
        bounds: list[tuple[Any, Any, Callable[[Any, Any], Any]]] = [
            (kind_now, sa.literal(kind, sa.Integer()), operator.gt),
            (number_now, _number(self._s, number), beyond),
            (text_now, sa.literal(text, sa.String()), beyond),
            (dids.c.id, sa.literal(last, sa.BigInteger()), operator.gt),
        ]
        found: Clause = sa.false()
        for column, value, is_beyond in reversed(bounds):
            found = sa.or_(is_beyond(column, value), sa.and_(column == value, found))
        return found

    @staticmethod
    def key(row: sa.Row[Any]) -> tuple[Any, ...]:
        number = row.sort_number
        return row.sort_kind, repr(number) if isinstance(number, float) else str(number), row.sort_text, row.id

    def _of_metadata(self, key: Key) -> tuple[Any, Any, Any]:
        kind: Any
        text: Any
        if self._s.postgresql:
            at = _jsonb_at(key)
            kind, text = sa.func.jsonb_typeof(at), _jsonb_text(at)
            number, true = sa.cast(text, sa.Numeric()), at == _jsonb(True)
        else:
            found = _json_at(key)
            kind, text = (found.select(column).scalar_subquery() for column in (found.last.c.type, found.last.c.atom))
            number, true = text, kind == "true"
        is_number = kind.in_(("number", "integer", "real"))
        is_text = kind.in_(("string", "text"))
        is_flag = kind.in_(("boolean", "true", "false"))
        return (
            sa.case((is_number, 0), (is_text, 1), (is_flag, 2), else_=_MISSING),
            sa.case((is_number, number), (sa.and_(is_flag, true), 1), else_=0),
            sa.case((is_text, sa.func.substr(text, 1, _SORTED_LENGTH)), else_=""),
        )


def _of_built_in_key(key: Key) -> tuple[Any, Any, Any]:
    column = _BUILT_IN[key.path[0]]
    kind = {"text": 1, "flag": 2}.get(key.type, 0)
    number = sa.case((column, 1), else_=0) if key.type == "flag" else column
    is_text = key.type == "text"
    return (
        sa.case((column.is_(None), _MISSING), else_=kind),
        sa.literal_column("0") if is_text else number,
        sa.func.substr(column, 1, _SORTED_LENGTH) if is_text else sa.literal_column("''", sa.String()),
    )
