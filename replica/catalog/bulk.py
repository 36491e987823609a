"""A batch of values as something SQL can select from: what makes n items cost one statement.

Given     rows of plain values and the column types.
Returns   a FROM clause to join with, the same on PostgreSQL (arrays unnested) and SQLite (a temporary table).
Promises  one statement sent on PostgreSQL whatever the number of rows, three on SQLite; the values are bound, never
          part of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine

from replica.db.engine import Session


def rows_of(s: Session, name: str, columns: Mapping[str, TypeEngine[Any]], rows: Sequence[Sequence[Any]]) -> sa.FromClause:
    """`name` with `columns`, holding `rows`. On SQLite it lives until the next call with the same name."""
    if s.postgresql:
        arrays = [
            sa.cast(sa.bindparam(None, [row[i] for row in rows], type_=ARRAY(type_), unique=True), ARRAY(type_))
            for i, type_ in enumerate(columns.values())
        ]
        typed = [sa.column(column, type_) for column, type_ in columns.items()]
        return sa.func.unnest(*arrays).table_valued(*typed, name=name).render_derived()
    table = f"batch_{name}"
    declared = ", ".join(f'"{column}" {type_.compile(s.connection.dialect)}' for column, type_ in columns.items())
    s.connection.exec_driver_sql(f"DROP TABLE IF EXISTS temp.{table}")
    s.connection.exec_driver_sql(f"CREATE TEMPORARY TABLE {table} ({declared})")
    if rows:
        binders = [_binder(s, type_) for type_ in columns.values()]
        marks = ", ".join("?" for _ in columns)
        s.connection.exec_driver_sql(
            f"INSERT INTO {table} VALUES ({marks})",
            [tuple(bind(value) for bind, value in zip(binders, row, strict=True)) for row in rows],
        )
    return sa.table(table, *(sa.column(column, type_) for column, type_ in columns.items())).alias(name)


def ids_of(s: Session, name: str, ids: Sequence[int]) -> sa.FromClause:
    """`name(id)` holding `ids`."""
    return rows_of(s, name, {"id": sa.BigInteger()}, [(i,) for i in ids])


def _binder(s: Session, type_: TypeEngine[Any]) -> Any:
    process = type_.dialect_impl(s.connection.dialect).bind_processor(s.connection.dialect)
    return process or (lambda value: value)
