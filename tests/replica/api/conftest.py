"""A service over SQLite for what is about HTTP alone; over both databases where the database has a part in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from replica.db import schema
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


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One for all tests of a module that leave nothing behind."""
    database = Database(f"sqlite:///{tmp_path_factory.mktemp('shared') / 'replica.db'}")
    schema.migrate(database)
    with serving(database) as running:
        yield running
    database.close()


@pytest.fixture
def service_on_both(db: Database) -> Iterator[Service]:
    with serving(db) as running:
        yield running
