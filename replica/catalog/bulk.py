"""A batch of values as something SQL can select from: what makes n items cost one statement.

Given     rows of plain values and the column types.
Returns   a FROM clause to join with, the same on PostgreSQL (arrays unnested) and SQLite (a temporary table).
Promises  one statement sent on PostgreSQL whatever the number of rows, three on SQLite; the values are bound, never
          part of the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine

from replica.db.engine import Session

#: The names and types of a batch's columns.
Columns = Mapping[str, TypeEngine[Any]]


def rows_of(s: Session, name: str, columns: Columns, rows: Sequence[Sequence[Any]]) -> sa.FromClause:
    """`name` with `columns`, holding `rows`. On SQLite it lives until the next call with the same name."""
    return columns_of(s, name, columns, list(zip(*rows, strict=True)) or [()] * len(columns))


def columns_of(s: Session, name: str, columns: Columns, values: Sequence[Sequence[Any]]) -> sa.FromClause:
    """The same, of the values of each column: thousands of rows need not be made only to be taken apart."""
    if s.postgresql:
        arrays = [
            sa.bindparam(None, _array(s, type_, column), sa.Text(), unique=True)
            for type_, column in zip(columns.values(), values, strict=True)
        ]
        return _unnested(name, columns, arrays)
    _fill(s, name, columns, values)
    return _filled(name, columns)


class Batch:
    """The same for a statement that is built once, with `rows`, and executed with `holding(…)`: to build one anew costs
    more than to execute it, where there are few rows."""

    def __init__(self, name: str, columns: Columns) -> None:
        self.name = name
        self.columns = columns

    def rows(self, postgresql: bool) -> sa.FromClause:
        if postgresql:
            arrays = [sa.bindparam(f"{self.name}_{column}", type_=sa.Text()) for column in self.columns]
            return _unnested(self.name, self.columns, arrays)
        return _filled(self.name, self.columns)

    def holding(self, s: Session, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """What the statement is executed with."""
        values = list(zip(*rows, strict=True)) or [()] * len(self.columns)
        if s.postgresql:
            typed = zip(self.columns.items(), values, strict=True)
            return {f"{self.name}_{column}": _array(s, type_, value) for (column, type_), value in typed}
        _fill(s, self.name, self.columns, values)
        return {}


def _unnested(name: str, columns: Columns, arrays: Sequence[sa.BindParameter[str]]) -> sa.FromClause:
    cast = [sa.cast(array, ARRAY(type_)) for array, type_ in zip(arrays, columns.values(), strict=True)]
    typed = [sa.column(column, type_) for column, type_ in columns.items()]
    return sa.func.unnest(*cast).table_valued(*typed, name=name).render_derived()


def _filled(name: str, columns: Columns) -> sa.FromClause:
    return sa.table(f"batch_{name}", *(sa.column(column, type_) for column, type_ in columns.items())).alias(name)


def _fill(s: Session, name: str, columns: Columns, values: Sequence[Sequence[Any]]) -> None:
    table = f"batch_{name}"
    declared = ", ".join(f'"{column}" {type_.compile(s.connection.dialect)}' for column, type_ in columns.items())
    s.connection.exec_driver_sql(f"DROP TABLE IF EXISTS temp.{table}")
    s.connection.exec_driver_sql(f"CREATE TEMPORARY TABLE {table} ({declared})")
    if values[0]:
        binders = [_binder(s, type_) for type_ in columns.values()]
        bound = (map(bind, column) for bind, column in zip(binders, values, strict=True))
        marks = ", ".join("?" for _ in columns)
        s.connection.exec_driver_sql(f"INSERT INTO {table} VALUES ({marks})", list(zip(*bound, strict=True)))


def ids_of(s: Session, name: str, ids: Sequence[int]) -> sa.FromClause:
    """`name(id)` holding `ids`."""
    return columns_of(s, name, {"id": sa.BigInteger()}, [ids])


def insert(s: Session, table: sa.Table) -> Any:
    """An INSERT of the session's dialect, for `.on_conflict_do_nothing()` and `.on_conflict_do_update(…)`."""
    return insert_of(table, s.postgresql)


def insert_of(table: sa.Table, postgresql_: bool) -> Any:
    """The same for a statement that is built once."""
    return postgresql.insert(table) if postgresql_ else sqlite.insert(table)


def _array(s: Session, type_: TypeEngine[Any], values: Sequence[Any]) -> str:
    """The values as PostgreSQL writes an array: several times faster than the driver, which looks at each by itself."""
    kind = type_.dialect_impl(s.connection.dialect)
    process: Any = kind.bind_processor(s.connection.dialect)
    if isinstance(kind, sa.JSON):  # which the driver would wrap as well
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    elif process is not None and not isinstance(type_, sa.LargeBinary):  # which would wrap them for the driver
        values = [process(value) for value in values]
    kinds = set(map(type, values))
    if kinds == {int}:
        return f"{{{','.join(map(str, values))}}}"
    if kinds == {type(None)}:
        return f"{{{','.join(['NULL'] * len(values))}}}"
    if kinds == {bool}:
        return f"{{{','.join(map(str, values))}}}"
    if kinds == {bytes}:
        text = '","\\\\x'.join(map(bytes.hex, values))
        return f'{{"\\\\x{text}"}}'
    if kinds == {str}:
        text = "\n".join(values)
        if "\\" not in text and '"' not in text:
            text = '","'.join(values)
            return f'{{"{text}"}}'
    return f"{{{','.join(map(_written, values))}}}"


def _written(value: Any) -> str:
    match value:
        case None:
            return "NULL"
        case str():  # inside the quotes only these two characters mean something
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case bytes():
            return f'"\\\\x{value.hex()}"'
        case bool() | int() | float():
            return repr(value)
    raise TypeError(f"{type(value).__name__} in a batch")


def _binder(s: Session, type_: TypeEngine[Any]) -> Any:
    process = type_.dialect_impl(s.connection.dialect).bind_processor(s.connection.dialect)
    return process or (lambda value: value)
