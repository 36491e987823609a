"""Fixtures that every floor uses: real databases, a real Redis, a clock turned by hand, a counter of statements."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa

from replica.db import schema
from replica.db.engine import Database
from tests.servers import PostgreSQL, Redis
from tests.servers_dav import Apache, Rclone
from tests.servers_xrootd import XRootD, running

_numbers = itertools.count(1)


# The same examples every time, however slow the machine: a test that fails is one that fails again.
hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[PostgreSQL]:
    server = PostgreSQL()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    """A Redis for the session; `.url`. Who stops it starts it again."""
    server = Redis()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def _xrootd_pair() -> Iterator[tuple[XRootD, XRootD]]:
    one = XRootD("one")
    for pair in running(one, XRootD("two", trusting=one)):
        yield pair[0], pair[1]


@pytest.fixture
def xrootd_pair(_xrootd_pair: tuple[XRootD, XRootD]) -> tuple[XRootD, XRootD]:
    """Two empty XRootD servers that trust each other's certificates. Who stops one starts it again."""
    for server in _xrootd_pair:
        server.empty()
    return _xrootd_pair


@pytest.fixture
def xrootd(xrootd_pair: tuple[XRootD, XRootD]) -> XRootD:
    """An empty XRootD server; `.url_http`, `.url_https`, `.url_root`, `.data`."""
    return xrootd_pair[0]


@pytest.fixture(scope="session")
def apache() -> Iterator[Apache]:
    """Apache's mod_dav for the session; `.url`, `.data`. Who stops it starts it again."""
    server = Apache()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[Rclone]:
    """`rclone serve webdav` for the session; `.url`, `.data`. Who stops it starts it again."""
    server = Rclone()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def empty_postgresql_url(postgresql_server: PostgreSQL) -> Iterator[str]:
    """The URL of a database without tables."""
    yield from _temporary_database(postgresql_server, "template0")


@pytest.fixture
def postgresql_url(postgresql_server: PostgreSQL, _postgresql_template: str) -> Iterator[str]:
    """The URL of a migrated database that only this test uses."""
    yield from _temporary_database(postgresql_server, _postgresql_template)


def _temporary_database(server: PostgreSQL, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    server.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield server.url(name)
    server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def _postgresql_template(postgresql_server: PostgreSQL) -> str:
    postgresql_server.execute("CREATE DATABASE template_migrated TEMPLATE template0")
    _migrate(postgresql_server.url("template_migrated"))
    return "template_migrated"


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    _migrate(f"sqlite:///{path}")
    return path


def _migrate(url: str) -> None:
    database = Database(url)
    schema.migrate(database)
    database.close()


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """The URL of a migrated SQLite database that only this test uses."""
    return f"sqlite:///{shutil.copyfile(_sqlite_template, tmp_path / 'replica.db')}"


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A migrated database, once of each kind. Its clock is `clock` in a test that asks for that too."""
    url = request.getfixturevalue(f"{request.param}_url")
    clock = request.getfixturevalue("clock") if "clock" in request.fixturenames else None
    database = Database(url, clock=clock)
    yield database
    database.close()


class HandClock:
    """Stands still until a test turns it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **by: float) -> datetime:
        """`clock.turn(seconds=30)`; the words are those of timedelta."""
        self.now += timedelta(**by)
        return self.now


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@dataclass
class Statements:
    """What was sent to a database; many rows given to one statement at once count as one."""

    texts: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.texts)


@pytest.fixture
def count_statements() -> Callable[[Database], AbstractContextManager[Statements]]:
    """`with count_statements(db) as statements: …; assert statements.count <= 10`"""

    @contextlib.contextmanager
    def counting(database: Database) -> Iterator[Statements]:
        statements = Statements()

        def seen(
            connection: object, cursor: object, text: str, parameters: object, context: object, executemany: bool
        ) -> None:
            statements.texts.append(text)

        sa.event.listen(database.engine, "before_cursor_execute", seen)
        try:
            yield statements
        finally:
            sa.event.remove(database.engine, "before_cursor_execute", seen)

    return counting
