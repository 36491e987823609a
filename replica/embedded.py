"""The whole system in one process, on SQLite: nothing to install, nothing to configure.

Given     a directory.
Returns   a running system: API on this machine only, unattended work, a mover for every site, and a Celery worker
          whose broker is this process's memory. Its URL and an administrator's token.
Promises  what was committed before a stop, or before kill -9, goes on after the next start; one process a directory:
          a second one is refused; the token file is nobody else's to read; an address that others reach is refused.
Partner   the same parts, one process each, are `replica serve`, `replica control` and `replica worker`.

    with Embedded(config.load(dir)) as system:
        Client(system.url, system.token)
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import ipaddress
import os
import secrets
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from aiohttp import web

from replica import log
from replica.api.app import create_app, start
from replica.catalog import accounts, leases, outcomes, sites
from replica.collector import settle_in
from replica.config import Settings, load
from replica.db import schema
from replica.db.engine import Database
from replica.hints import CONTROL, Hints
from replica.storage.credentials import Credentials
from rules.errors import NotAuthenticated, Refused
from workers.app import site_queue
from workers.consumer import Consumer
from workers.mover import Mover, MoverThread
from workers.runtime import Life, Looper, Watchdog, listening
from workers.service import WEDGED_SECONDS, Passes, leave

BROKER = "memory://"
DATABASE = "replica.db"
TOKEN = "token"
LOCK = "lock"
#: How soon a site that was added has its worker.
LOOK_FOR_SITES_SECONDS = 1.0
#: A stop takes at most a little more than this.
STOP_SECONDS = 2.0


def run_up(settings: Settings) -> int:
    """`replica up`: run until SIGTERM or SIGINT."""
    log.configure(settings.log_level)
    life = Life()
    with life.signals(), Embedded(settings) as system:
        if not life.ended:
            sys.stdout.write(
                f"export REPLICA_SERVER={system.url}\nexport REPLICA_TOKEN_FILE={_quoted(system.token_file)}\n"
            )
            sys.stdout.flush()
            Watchdog(system.watched, life, limit_seconds=WEDGED_SECONDS).start()
            settle_in()
        life.wait()
    if system.left_behind:
        leave(life.exit_code)
    return life.exit_code


class Embedded:
    """`start()` returns when requests are answered and orders are worked on; `stop()` when all has ended."""

    def __init__(self, settings: Settings | str | os.PathLike[str], *, elsewhere: frozenset[str] = frozenset()) -> None:
        """`elsewhere`: sites whose worker is a process of its own."""
        self.elsewhere = elsewhere
        self.settings = settings if isinstance(settings, Settings) else load(settings, {}, listen="127.0.0.1:0")
        if not self.settings.dir:
            raise Refused("the embedded system needs a directory", hint="say --dir DIR")
        self.dir = Path(self.settings.dir).expanduser().absolute()
        self.token_file = self.dir / TOKEN
        self.token = ""
        self.url = ""
        #: Site → its mover's thread.
        self.movers: dict[str, MoverThread] = {}
        #: Sites whose mover did not end in time at the last stop: its thread waits for a disk.
        self.left_behind: list[str] = []
        self._stack = ExitStack()
        #: What rings for the movers.
        self._bells = ExitStack()
        self._log = log.get_logger()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Each step registers how it is undone, so that a start that fails leaves nothing running."""
        host, port = _loopback(self.settings)
        if not log.is_configured():
            log.configure(self.settings.log_level)
        with ExitStack() as stack:
            self._make_directory()
            stack.enter_context(self._alone())
            # SQLite gives its other files the mode of this one.
            os.close(os.open(self.dir / DATABASE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self.db = Database(f"sqlite:///{self.dir / DATABASE}")
            stack.callback(self.db.close)
            schema.migrate(self.db)
            self._take_over()
            self.passes = Passes(self.db, pace_seconds=self.settings.control_interval_seconds, settings=self.settings)
            self._hints = Hints(BROKER)
            stack.callback(self._hints.close)
            self.db.on_commit = self._hints.wake
            self._api = _ApiThread(self.db, self.settings, host, port)
            stack.callback(self._api.stop)
            self.url = self._api.start_and_wait()
            stack.enter_context(listening(CONTROL, self.passes.wake_all))
            stack.callback(self.passes.stop, STOP_SECONDS)
            self.passes.start()
            self._consumer = Consumer(BROKER, (CONTROL,))
            stack.callback(self._consumer.stop, STOP_SECONDS)
            self._consumer.start()
            stack.callback(self._stop_movers)
            self._sites = Looper("sites", self._look_for_sites, seconds=LOOK_FOR_SITES_SECONDS)
            self._look_for_sites()
            stack.callback(self._sites.stop, STOP_SECONDS)
            self._sites.start()
            self._stack = stack.pop_all()
        self._log.info("embedded.started", dir=str(self.dir), url=self.url, sites=sorted(self.movers))

    def stop(self) -> None:
        """The movers first, for they give back by the API what they hold. Idempotent."""
        self._stack.close()
        self._log.info("embedded.stopped", dir=str(self.dir))

    def watched(self) -> list[object]:
        return [*self.passes.loops, *self.movers.values()]

    # ── the directory ────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_directory(self) -> None:
        try:
            self.dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise Refused(
                f"the directory {self.dir} cannot be made: {error.strerror}", hint="say another one with --dir"
            ) from error

    def _alone(self) -> ExitStack:
        """Holds DIR/lock, which names its owner, while the stack is open; the kernel lets go of a dead owner's."""
        try:
            descriptor = os.open(self.dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise Refused(f"{self.dir / LOCK} cannot be opened: {error.strerror}") from error
        held = ExitStack()
        held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            held.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise Refused(f"{self.dir / LOCK} cannot be locked: {error.strerror}") from error
            raise Refused(
                f"{self.dir} is in use by another `replica up` (process {owner or 'unknown'})",
                hint="talk to that one, stop it first, or say another --dir",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return held

    def _take_over(self) -> None:
        """The token, and the orders of the process that was here before: all its workers died with it."""
        with self.db.write() as s:
            accounts.bootstrap(s)
            if not self.elsewhere:
                leases.end_all(s)
        while True:
            with self.db.write() as s:
                if not outcomes.expire_leases(s):
                    break
        with suppress(OSError, UnicodeDecodeError):
            self.token = self.token_file.read_text(encoding="utf-8").strip()
        try:
            with self.db.read() as s:
                accounts.authenticate(s, self.token)
            self.token_file.chmod(0o600)
        except (NotAuthenticated, OSError):
            with self.db.write() as s:
                self.token = accounts.issue_token(s, account=accounts.ROOT, label="embedded", replace=True)
                # Before the commit: a token that could not be written down does not replace the one before it.
                self._write_token(self.token)

    def _write_token(self, token: str) -> None:
        """The whole file or none; never, not for a moment, open to others."""
        temporary = self.dir / f".{TOKEN}.{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(token + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.token_file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    # ── sites ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _look_for_sites(self) -> bool:
        with self.db.read() as s:
            cursor: str | None = None
            names: list[str] = []
            while True:
                page = sites.list_page(s, cursor, 1_000)
                names += [site.name for site in page.items]
                if (cursor := page.next) is None:
                    break
        for name in names:
            if name not in self.movers and name not in self.elsewhere:
                self._add_mover(name)
        return False

    def _add_mover(self, site: str) -> None:
        """With a token of its own, over the loopback, as a worker anywhere."""
        with self.db.write() as s:
            token = accounts.issue_token(s, account=accounts.ROOT, label="embedded", site=site, replace=True)
        mover = Mover(
            self.url,
            lambda: token,
            label=site,
            roots=self.settings.roots,
            sources=self.settings.sources,
            credentials=Credentials.at(self.settings.credentials_file),
            concurrency=self.settings.concurrency,
            poll_seconds=self.settings.poll_seconds,
            stop_seconds=STOP_SECONDS,
            finish_seconds=STOP_SECONDS / 2,
        )
        thread = MoverThread(mover)
        self._bells.enter_context(listening(site_queue(site), thread.wake))
        self._consumer.add_queue(site_queue(site))
        self.movers[site] = thread
        thread.start()

    def _stop_movers(self) -> None:
        for thread in self.movers.values():
            thread.stop()
        for site, thread in self.movers.items():
            if not thread.stop(STOP_SECONDS + 0.5):
                self.left_behind.append(site)
        self._bells.close()
        self.movers = {}


class _ApiThread(threading.Thread):
    """The REST service in a loop of its own."""

    def __init__(self, db: Database, settings: Settings, host: str, port: int) -> None:
        super().__init__(name="api", daemon=True)
        self._db = db
        self._settings = settings
        self._host = host
        self._port = port
        self._serving = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._url = ""

    def start_and_wait(self) -> str:
        self.start()
        self._serving.wait()
        if self._error is not None:
            raise self._error
        return self._url

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  told in the thread that waits for the start
            self._error = error
            if self._serving.is_set():
                log.get_logger().exception("api.broke")
        finally:
            self._serving.set()

    async def _serve(self) -> None:
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        runner, port = await self._listen()
        self._url = f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{port}"
        self._serving.set()
        try:
            await self._end.wait()
        finally:
            await runner.cleanup()

    def _app(self) -> web.Application:
        return create_app(
            self._db,
            lease_seconds=self._settings.lease_seconds,
            retry_base_seconds=self._settings.retry_base_seconds,
            undelete_seconds=self._settings.undelete_seconds,
            scan_policy=self._settings.scan_policy(),
        )

    async def _listen(self) -> tuple[web.AppRunner, int]:
        try:
            return await start(self._app(), self._host, self._port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Refused(f"cannot listen on {self._settings.listen}: {error.strerror or error}") from error
            if self._settings.origin("listen") != "default":
                raise Refused(
                    f"the port {self._port} is in use by another process", hint="say another one with --port; 0: any"
                ) from error
        # Nobody asked for the usual port: any other will do, and the export lines say which.
        return await start(self._app(), self._host, 0)

    def stop(self) -> None:
        if self._loop is not None and self.is_alive():
            with suppress(RuntimeError):  # it has just ended by itself
                self._loop.call_soon_threadsafe(self._end.set)
        if self.ident is not None:
            self.join(STOP_SECONDS)


def _loopback(settings: Settings) -> tuple[str, int]:
    """The embedded system has no TLS and one token for everything: it is for this machine."""
    host, port = settings.listen_address()
    try:
        if host == "localhost" or ipaddress.ip_address(host).is_loopback:
            return host, port
    except ValueError:
        pass  # a name, which may mean anything tomorrow
    raise Refused(
        f"the embedded system listens on this machine only, not on {host}",
        hint="use 127.0.0.1; for other machines run `replica serve`, `replica control` and `replica worker`",
    )


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
