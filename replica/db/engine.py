"""The database: one way to begin a read, one way to begin a write, for PostgreSQL and SQLite alike.

Given     a URL, and optionally a clock that a test turns by hand.
Returns   Database, whose `read()` and `write()` give a Session.
Promises  leaving `write()` commits, an exception rolls back; a write on SQLite begins IMMEDIATE; queues that the
          work named in `session.wake` are told after the commit, never before; driver errors come out as ours.
Partner   replica.catalog takes a Session first and never commits; replica.hints carries the wake-ups.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, CursorResult, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.sql import Executable

from replica.clock import Clock
from replica.db.tables import instant
from rules.errors import Broken, Conflict, Invalid, ReplicaError, Unavailable

#: PostgreSQL: transaction-local bounds, so that one request cannot hold the others for ever.
STATEMENT_TIMEOUT_SECONDS = 120
#: SQLite: how long a writer waits for the one writer before it.
SQLITE_BUSY_SECONDS = 30

Wake = Callable[[set[str]], None]


class Session:
    """One open transaction. Catalogue functions take it first; only who began it ends it."""

    def __init__(self, connection: Connection, clock: Clock | None) -> None:
        self.connection = connection
        self.dialect = connection.dialect.name
        self._clock = clock
        #: Queues to wake after the commit: the name of a site's queue, or of a pass.
        self.wake: set[str] = set()
        #: Done once each, right before the commit: what is gathered during the transaction and written in one go.
        self.before_commit: dict[Callable[[Session], None], None] = {}
        #: What happened, to be told to whoever listens (see replica.catalog.outbox).
        self.events: list[Any] = []
        #: (account, endpoint) → files and bytes by which its usage changes (see replica.catalog.usage).
        self.charges: dict[tuple[int, int], tuple[int, int]] = {}
        #: What writes them.
        self.tell: Callable[[Session], None] | None = None

    @cached_property
    def now(self) -> datetime:
        """The moment of this transaction by the database's clock: leases of all servers are measured by one clock."""
        if self._clock is not None:
            return self._clock()
        if self.dialect == "postgresql":
            query = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"
        else:
            query = "SELECT CAST((julianday('now') - 2440587.5) * 86400000000.0 AS INTEGER)"
        return instant(int(self.connection.exec_driver_sql(query).scalar_one()))

    def execute(
        self, statement: Executable, parameters: Sequence[Any] | dict[str, Any] | None = None
    ) -> CursorResult[*tuple[Any, ...]]:
        return self.connection.execute(statement, parameters)

    def finish(self) -> None:
        """Write what was gathered; what happened comes last, so that nobody holds events while he waits for others."""
        while self.before_commit:
            acts, self.before_commit = self.before_commit, {}
            for act in acts:
                act(self)
        if self.events and self.tell is not None:
            self.tell(self)

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """What fails inside is undone and was never told; the transaction goes on. The exception comes out."""
        told, charged = len(self.events), dict(self.charges)
        try:
            with self.connection.begin_nested():
                yield
        except BaseException:
            del self.events[told:]
            self.charges = charged
            raise

    @property
    def postgresql(self) -> bool:
        return self.dialect == "postgresql"


class Database:
    """An engine with the two kinds of transaction."""

    def __init__(self, url: str, *, clock: Clock | None = None, wake: Wake | None = None, pool_size: int = 10) -> None:
        self.url = sa.engine.make_url(url)
        self.clock = clock
        #: How many transactions may go on at once without one waiting for another's connection.
        self.pool_size = pool_size
        #: Told the queues to wake after a commit. Must not raise and must not block.
        self.on_commit: Wake = wake or (lambda queues: None)
        #: Told the same, for whoever listens in this process. Under the same conditions.
        self.listeners: list[Wake] = []
        self.engine = _engine(self.url, pool_size)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent look; nothing can be written by mistake."""
        with our_errors(), self.engine.connect() as connection:
            if connection.dialect.name == "postgresql":
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            else:
                connection.exec_driver_sql("BEGIN")
            yield Session(connection, self.clock)
            connection.rollback()

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        with our_errors():
            with self.engine.connect() as connection:
                if connection.dialect.name == "sqlite":
                    # A plain BEGIN would take the write lock at the first write and fail if anybody wrote since.
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                session = Session(connection, self.clock)
                yield session
                session.finish()
                connection.commit()
            if session.wake:
                self.on_commit(session.wake)
                for listener in self.listeners:
                    listener(session.wake)

    def close(self) -> None:
        self.engine.dispose()


def _engine(url: sa.engine.URL, pool_size: int) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = sa.create_engine(
            url, connect_args={"timeout": SQLITE_BUSY_SECONDS, "check_same_thread": False}, pool_size=pool_size
        )

        @sa.event.listens_for(engine, "connect")
        def _pragmas(connection: sqlite3.Connection, record: object) -> None:
            connection.isolation_level = None  # we say BEGIN ourselves
            connection.execute("PRAGMA journal_mode=WAL")
            # FULL, not NORMAL: an acknowledged rule must survive a power cut.
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA temp_store=MEMORY")
            connection.execute("PRAGMA cache_size=-65536")

        return engine
    if url.get_backend_name() != "postgresql":
        raise Invalid(
            f"the database {url.get_backend_name()!r} is not supported",
            hint="use postgresql://… or sqlite:///PATH",
            field="database_url",
        )
    engine = sa.create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            # No JIT: it compiles for half a second what runs for ten milliseconds, whenever a guess is too high.
            "options": f"-c statement_timeout={STATEMENT_TIMEOUT_SECONDS}s -c timezone=UTC -c jit=off",
        },
    )

    @sa.event.listens_for(engine, "connect")
    def _durable(connection: Any, record: object) -> None:
        # What was acknowledged must survive a crash, whatever the server's default; a stronger one than "on" stays.
        connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
        connection.commit()

    return engine


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Driver errors, told by kind and not by text, become ours. A half-done transaction was rolled back by then."""
    try:
        yield
    except ReplicaError:
        raise
    except IntegrityError as error:
        # The catalogue checks before it writes; who gets here lost a race against an equal request.
        raise Conflict("somebody changed the same rows at this moment", hint="repeat the request") from error
    except sa.exc.TimeoutError as error:
        raise Unavailable("all database connections are in use", hint="try again in a few seconds") from error
    except OperationalError as error:
        sqlstate = getattr(error.orig, "sqlstate", None)
        if sqlstate in ("40001", "40P01"):
            raise Conflict("two requests wanted the same rows", hint="repeat the request") from error
        raise Unavailable(
            "the database does not answer",
            hint="nothing was changed; try again. An operator finds the cause with `replica doctor`",
        ) from error
    except DBAPIError as error:
        raise Broken("the database refused a statement of ours") from error
