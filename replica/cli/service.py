"""The commands that run Replica itself: demo, up, serve, worker, control, migrate, doctor.

Given     the words on the command line, the environment, replica.toml.
Returns   the exit code of what was run.
Promises  what a server needs is imported when the command runs: a client's machine need not have it installed.
Partner   replica.embedded, replica.api.serve, workers.service, replica.db.schema, replica.doctor, replica.demo.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from replica.cli.common import Command, output, settings
from replica.cli.output import say

#: What only the extra [server] brings.
_SERVER_PARTS = frozenset({"sqlalchemy", "psycopg", "alembic", "celery", "kombu", "redis", "structlog"})


@contextmanager
def serving() -> Iterator[None]:
    """Within, a missing part of the server is an error that names the remedy."""
    from rules.errors import Refused

    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _SERVER_PARTS:
            raise
        raise Refused(
            f"{error.name} is not installed: this is a client only",
            hint="install what a server needs: pip install 'replica-manager[server]'",
        ) from error


_DIR = click.option(
    "--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="Where replica.toml is looked for."
)


@click.command(cls=Command)
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the catalogue, the token and replica.toml are.  [default: ./replica-data]",
)
@click.option("--port", type=click.IntRange(0, 65535), help="Where the API listens, on this machine only; 0: any free.")
def up(directory: Path | None, port: int | None) -> int:
    """The whole system in one process: API, unattended work, and a worker for every site whose disks are here.

    Nothing to install, nothing to configure. It writes DIR/token and prints what another shell needs to use it.
    Ctrl-C stops it; the same command goes on where it was.
    """
    with serving():
        from replica.embedded import run_up

        in_force = settings(directory, listen=None if port is None else f"127.0.0.1:{port}")
        if in_force.dir is None:
            in_force = settings(Path("replica-data"), listen=None if port is None else f"127.0.0.1:{port}")
        return run_up(in_force)


@click.command(cls=Command)
@click.option("--listen", metavar="HOST:PORT", help="Where to listen.  [default: 127.0.0.1:8570]")
@_DIR
def serve(listen: str | None, directory: Path | None) -> int:
    """The API as a process of its own, on the database of REPLICA_DATABASE_URL."""
    with serving():
        from replica.api.serve import run_serve

        return run_serve(settings(directory, listen=listen))


@click.command(cls=Command)
@click.option("--site", help="Whose orders it carries out.")
@click.option("--concurrency", type=click.IntRange(1, 256), help="Files (or lists of small files) moved at once.")
@_DIR
def worker(site: str | None, concurrency: int | None, directory: Path | None) -> int:
    """The worker of one site: it moves the bytes. It knows the server and its token, and no database."""
    with serving():
        from workers.service import run_worker

        return run_worker(settings(directory, site=site, concurrency=concurrency))


@click.command(cls=Command)
@_DIR
def control(directory: Path | None) -> int:
    """Unattended work: evaluates rules, watches leases, expires what has ended."""
    with serving():
        from workers.service import run_control

        return run_control(settings(directory))


@click.command(cls=Command)
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write an administrator's token there (mode 600), unless one that is valid is there already.",
)
@_DIR
def migrate(token_file: Path | None, directory: Path | None) -> int:
    """Create the database schema or bring it up to date. Safe to repeat."""
    with serving():
        from replica.catalog import accounts
        from replica.db import schema
        from replica.db.engine import Database
        from replica.log import cause_of
        from rules.errors import Invalid, NotAuthenticated, Unavailable

        url = settings(directory).database_url
        if url is None:
            raise Invalid(
                "no database was named",
                hint="set REPLICA_DATABASE_URL, for example postgresql://replica@127.0.0.1/replica",
            )
        database = Database(url)
        try:
            try:
                revision = schema.migrate(database)
            except Unavailable as error:
                if not (cause := cause_of(error)):
                    raise
                raise Unavailable(
                    f"{error.message}: {cause}", hint="start it, or correct REPLICA_DATABASE_URL; nothing was changed"
                ) from error
            say(f"the database schema is at {revision}")
            if token_file is None:
                return 0
            with database.write() as s:
                accounts.bootstrap(s)
                try:
                    accounts.authenticate(s, token_file.read_text(encoding="utf-8").strip())
                    say(f"{token_file} holds a valid token already")
                    return 0
                except (FileNotFoundError, UnicodeDecodeError, NotAuthenticated):
                    token = accounts.issue_token(s, account="root", label="migrate", replace=True)
                # Within the transaction: a token that could not be written down does not replace the one before it.
                _write_secret(token_file, token)
            say(f"an administrator's token is in {token_file}")
        finally:
            database.close()
    return 0


def _write_secret(path: Path, text: str) -> None:
    """The whole file or none, never open to others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise


@click.command(cls=Command)
@_DIR
def doctor(directory: Path | None) -> int:
    """Say what is configured, from where, and what is wrong."""
    with serving():
        from replica import doctor as examination

        return examination.run(settings(directory), as_json=output().form != "table")


@click.command(cls=Command)
@click.argument("paths", nargs=-1, type=click.Path(exists=True, path_type=Path), metavar="[PATH…]")
@click.option("--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="Where it may write.")
@click.option("--serve", "keep", is_flag=True, help="Keep it running afterwards.")
def demo(paths: tuple[Path, ...], directory: Path | None, keep: bool) -> int:
    """Three sites on this machine: load, replicate, break, heal, verify. Exit 0 only if all of it was verified.

    It takes the files given, or else some that every Python installation has.
    """
    with serving():
        from replica import demo as show

        return show.run(paths, directory, keep)
