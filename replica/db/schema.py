"""Is the schema of this database the one this release was written for, and how it becomes that.

Given     a Database.
Returns   `migrate` brings it to this release's schema; `check` says nothing when it is there, else raises Unavailable.
Promises  two migrations at once: one waits, then finds nothing to do; a step that cannot have its table within
          seconds gives up, changing nothing, instead of making everybody queue behind it.
Partner   the steps are in replica.db.migrations; every process that opens the database calls `check` first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError

from replica.db.engine import Database, our_errors
from rules.errors import Unavailable

#: Any number, the same for ever: whoever migrates holds this advisory lock.
_ADVISORY_LOCK = 7_364_201_101
_LOCK_NOT_AVAILABLE = "55P03"
#: How long one migration waits for another to end, and a step for a table that is in use.
WAIT_SECONDS = 60.0
TABLE_WAIT_SECONDS = 5
#: A step may take longer than a request.
STEP_SECONDS = 3600


def migrate(database: Database) -> str:
    """Run the missing steps and return the revision reached. What is complete already is left alone."""
    if database.url.get_backend_name() == "sqlite":
        with database.write() as s:  # SQLite's write lock keeps everybody else out
            return _upgrade(s.connection)
    with our_errors(), _alone(database), database.engine.connect() as connection:
        connection.exec_driver_sql(f"SET lock_timeout = '{TABLE_WAIT_SECONDS}s'")
        connection.exec_driver_sql(f"SET statement_timeout = '{STEP_SECONDS}s'")
        connection.commit()  # so that every step has a transaction of its own
        try:
            return _upgrade(connection)
        except OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
                raise
            raise Unavailable(
                "the migration did not get a table that others are using; the step was rolled back",
                hint="run `replica migrate` again when there is less traffic",
            ) from error
        finally:
            connection.invalidate()  # the settings above are not for whoever gets this connection next


def check(database: Database) -> None:
    """Unavailable, with the remedy, unless the schema is exactly this release's."""
    with database.read() as s:
        found, newest = _revision(s.connection), _newest()
    if found is None:
        raise Unavailable("the database schema is empty", hint="run `replica migrate`")
    if found != newest:
        raise Unavailable(
            f"the database schema is older than this release of Replica: it is {found}, needed is {newest}",
            hint="run `replica migrate`",
        )


def _upgrade(connection: Connection) -> str:
    _revision(connection)
    if connection.dialect.name == "postgresql":
        connection.rollback()  # alembic begins its own
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    return _newest()


def _revision(connection: Connection) -> str | None:
    """The step the database is at, None before the first. Unavailable when it is one that we do not know."""
    found = MigrationContext.configure(connection).get_current_revision()
    if found not in (None, *(step.revision for step in ScriptDirectory.from_config(_config()).walk_revisions())):
        raise Unavailable(
            f"the database schema is newer than this release of Replica: it is {found}, known is {_newest()}",
            hint="install the newer release here too; an older one must not work on it",
        )
    return found


def _newest() -> str:
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "there is a first step"
    return head


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "replica.db:migrations")
    config.set_main_option("path_separator", "os")
    return config


@contextlib.contextmanager
def _alone(database: Database) -> Iterator[None]:
    """Nobody else migrates meanwhile.

    On a connection of its own, in no transaction, and by trying again and again: a step that makes an index
    CONCURRENTLY waits for every older snapshot, and so for a statement that waits for us.
    """
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as guard:
        deadline = time.monotonic() + WAIT_SECONDS
        while not guard.scalar(sa.select(sa.func.pg_try_advisory_lock(_ADVISORY_LOCK))):
            if time.monotonic() > deadline:
                raise Unavailable(
                    "another migration of this database is running",
                    hint="wait for it to end; then run `replica migrate` again",
                )
            time.sleep(0.2)
        try:
            yield
        finally:
            guard.execute(sa.select(sa.func.pg_advisory_unlock(_ADVISORY_LOCK)))
