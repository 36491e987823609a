"""Batches come out as they went in, whatever is in them: PostgreSQL's are written as text, by us."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from replica.catalog import bulk
from replica.db.engine import Database
from replica.db.tables import Instant, State
from rules.states import ReplicaState

HOSTILE = [
    "",
    " ",
    "a,b",
    "{}",
    "{a}",
    '"',
    '""',
    "\\",
    '\\"',
    "\\\\x41",
    "NULL",
    "null",
    "'",
    "%s",
    ":x",
    "\n\t",
    "ü日本",
    "$1",
]


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (sa.String(), [*HOSTILE, None]),
        (sa.LargeBinary(), [b"", b"\0", b'\\"{},', bytes(range(256)), None]),
        (sa.BigInteger(), [0, -1, 2**63 - 1, -(2**63)]),
        (sa.BigInteger(), [None, 1, None]),
        (sa.BigInteger(), [None]),
        (sa.Float(), [0.1, 1e300, -0.0, None]),
        (sa.Boolean(), [True, False, None]),
        (State(ReplicaState), [*ReplicaState, None]),
        (Instant(), [datetime(2026, 1, 2, 3, 4, 5, 678901, UTC), None]),
    ],
)
def test_every_value_survives(db: Database, type_: sa.types.TypeEngine[object], values: list[object]) -> None:
    with db.read() as s:
        batch = bulk.rows_of(s, "values", {"ord": sa.Integer(), "value": type_}, list(enumerate(values)))
        assert list(s.execute(sa.select(batch.c.value).order_by(batch.c.ord)).scalars()) == values


def test_an_empty_batch_is_a_table_without_rows(db: Database) -> None:
    with db.read() as s:
        batch = bulk.rows_of(s, "no_rows", {"a": sa.BigInteger(), "b": sa.String()}, [])
        assert s.execute(sa.select(batch)).all() == []


def test_a_batch_is_one_statement_on_postgresql_and_never_more_for_more_rows(
    db: Database, count_statements: object
) -> None:
    costs = []
    for n in (1, 5_000):
        with db.read() as s, count_statements(db) as statements:  # type: ignore[operator]
            ids = bulk.ids_of(s, "many", range(n))
            assert s.execute(sa.select(sa.func.count()).select_from(ids)).scalar_one() == n
            costs.append((s.postgresql, statements.count))
    assert costs[0] == costs[1] and (costs[0] == (True, 1) or costs[0][1] <= 4)
