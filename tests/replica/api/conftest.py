"""A service over SQLite for what is about HTTP alone; over both databases where the database has a part in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from replica.db.engine import Database
from tests.service import Service, serving


@pytest.fixture
def sqlite(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.close()


@pytest.fixture
def service(sqlite: Database) -> Iterator[Service]:
    with serving(sqlite) as running:
        yield running


@pytest.fixture
def service_on_both(db: Database) -> Iterator[Service]:
    with serving(db) as running:
        yield running
