"""What must be true of the references that PostgreSQL does not check.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.db.tables says which they are, and why.
"""

from __future__ import annotations

import sqlalchemy as sa

from replica.catalog.fsck_invariant import Invariant
from replica.db.tables import UNCHECKED


def _dangling(column: sa.Column[int]) -> str:
    """Each number once: however many rows have it, it is one mistake."""
    [reference] = column.foreign_keys
    table, target = column.table.name, reference.column.table.name
    return f"""
        SELECT DISTINCT '{table}.{column.name}' AS place, x.{column.name} AS number
        FROM {table} x
        LEFT JOIN {target} t ON t.{reference.column.name} = x.{column.name}
        WHERE x.{column.name} IS NOT NULL AND t.{reference.column.name} IS NULL"""


INVARIANTS = (
    Invariant(
        "references",
        "What a row refers to is there.",
        " UNION ALL ".join(map(_dangling, UNCHECKED)),
        "{place} has the number {number}, which nothing has",
    ),
)
