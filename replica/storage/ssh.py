"""Sessions with an SFTP server: who we are, whom we believe, and requests with a time limit and errors of Replica's.

Given     host, port and root folder of a URL, and the settings of replica.storage.credentials for it:
              user                 required
              key_file             a private key in a file; key_passphrase(_file) if it is encrypted
              password(_file)      instead of a key, or after it
              quiet_seconds        how long one answer may take; without it 120
              known_hosts_file     who the server must be; without it the user's ~/.ssh/known_hosts and the machine's
                                   /etc/ssh/ssh_known_hosts
Returns   Session: one SFTP channel, whose requests take absolute paths as bytes.
Promises  a host key that the known hosts do not vouch for is refused, always, before anything secret is sent; nothing
          is taken from ~/.ssh/config, from an agent or from keys that were not written down; a server that went silent
          is noticed; a handle that the server opened for a caller who is gone is closed.
Partner   replica.storage.sftp makes the storage contract of it; replica.storage.sftp_faults knows the errors.

There is one connection per event loop (a storage may be used from the loops of several threads: each gets its own, as
asyncio's objects demand), opened when first asked for and again after it was lost. On it go up to SESSIONS channels:
a server works through the requests of one channel in order, so that an fsync there holds up everything behind it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar, cast
from weakref import WeakKeyDictionary

import asyncssh
from asyncssh.packet import PacketDecodeError

from replica.storage.credentials import Settings, seconds_in, secret
from replica.storage.gathering import Gathering
from replica.storage.sftp_faults import from_ssh, from_unexpected
from replica.storage.threads import in_thread
from rules.errors import Forbidden, TimedOut, Unreachable

T = TypeVar("T")

#: Channels on one connection. OpenSSH allows 10 (MaxSessions), of which a person may want some.
SESSIONS = 4
#: TCP, key exchange and login.
CONNECT_SECONDS = 20.0
#: A server silent for three of these is gone. Only then, and not by TCP alone, a pulled cable is noticed.
KEEPALIVE_SECONDS = 15.0
#: One answer. The server's SSH may live while the disk behind it hangs: keepalives do not see that.
ANSWER_SECONDS = 120.0
#: An fsync writes out all that the server's cache still holds of a file.
SYNC_SECONDS = 900.0
#: The fastest first: with a processor's AES it is twice as fast as ChaCha20, which asyncssh prefers.
_CIPHERS = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes256-ctr",
)
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")

# It tells every connection and channel at level INFO.
logging.getLogger("asyncssh").setLevel(logging.WARNING)


class Session:
    """One SFTP channel. Errors are those of sftp_faults; `path` in them is the caller's, set by `about`."""

    def __init__(self, client: asyncssh.SFTPClient, endpoint: str, *, answer_seconds: float | None = None) -> None:
        self.answer_seconds = answer_seconds or ANSWER_SECONDS
        self._client = client
        self._endpoint = endpoint
        self._closing: set[asyncio.Task[None]] = set()
        self.alive = True
        self.busy = 0
        #: The real path of the root folder, once known.
        self.root: bytes | None = None
        #: Until when (loop time) a folder is taken for one, and no link, without being looked at again.
        self.folders: dict[str, float] = {}
        #: Bytes of one read or write request: what the server allows, or 16 KiB.
        self.block_bytes = min(client.limits.max_read_len, client.limits.max_write_len) or 16384

    async def ask(self, request: Awaitable[T], path: str, seconds: float | None = None) -> T:
        """The answer to one request."""
        with self.about(path):
            async with asyncio.timeout(seconds or self.answer_seconds):
                return await request

    @contextmanager
    def about(self, path: str) -> Iterator[None]:
        """Within, asyncssh's errors become Replica's, about `path`; the session is given up where it must be."""
        try:
            yield
        except (asyncssh.SFTPError, asyncssh.Error, OSError, PacketDecodeError) as error:
            found = from_ssh(error, endpoint=self._endpoint, path=path)
            if isinstance(found, Unreachable | TimedOut):
                self.give_up()
            raise found from error

    def give_up(self) -> None:
        self.alive = False
        self._client.exit()

    async def lstat(self, path: bytes, shown: str) -> asyncssh.SFTPAttrs:
        return await self.ask(self._client.lstat(path), shown)

    async def realpath(self, path: bytes, shown: str) -> bytes:
        return cast(bytes, await self.ask(self._client.realpath(path), shown))

    async def mkdir(self, path: bytes, shown: str) -> None:
        await self.ask(self._client.mkdir(path), shown)

    async def remove(self, path: bytes, shown: str) -> None:
        await self.ask(self._client.remove(path), shown)

    async def link(self, old: bytes, new: bytes, shown: str) -> None:
        """A second name for a file. Fails if there is something of the new name."""
        await self.ask(self._client.link(old, new), shown)

    async def move(self, old: bytes, new: bytes, shown: str) -> None:
        """rename(2): it would replace, so the new name must be one that nobody else can choose."""
        await self.ask(self._client.posix_rename(old, new), shown)

    async def statvfs(self, path: bytes, shown: str) -> asyncssh.SFTPVFSAttrs:
        return await self.ask(self._client.statvfs(path), shown)

    async def entries(self, folder: bytes, shown: str) -> AsyncGenerator[asyncssh.SFTPName, None]:
        """The lines of one folder, "." and ".." among them."""
        names = self._client.scandir(folder)
        try:
            while True:
                try:
                    yield await self.ask(anext(names), shown)
                except StopAsyncIteration:
                    return
        finally:
            with suppress(asyncssh.Error, OSError):
                await names.aclose()  # type: ignore[attr-defined]  # a generator, declared as an iterator

    @asynccontextmanager
    async def open(self, path: bytes, mode: str, shown: str) -> AsyncIterator[Handle]:
        """A file ("rb", "xb"), or a folder where the server lets it be opened for reading, as OpenSSH does."""
        # A request that is cancelled is answered all the same, with a handle that nobody would close.
        opening = asyncio.ensure_future(self._client.open(path, mode, block_size=None))
        try:
            file = await self.ask(asyncio.shield(opening), shown)
        except BaseException:
            opening.add_done_callback(self._close_late)
            raise
        try:
            yield Handle(self, file, shown)
        finally:
            self._close(file)

    def _close_late(self, opening: asyncio.Task[asyncssh.SFTPClientFile]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._close(opening.result())

    def _close(self, file: asyncssh.SFTPClientFile) -> None:
        """Not waited for: what must be durable was synced, and nothing else depends on it."""

        async def close() -> None:
            with suppress(asyncssh.Error, OSError, ValueError):
                await asyncio.wait_for(file.close(), self.answer_seconds)

        if self.alive:
            task = asyncio.get_running_loop().create_task(close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def settle(self) -> None:
        """Wait for what is still being closed."""
        if self._closing:
            await asyncio.wait([*self._closing], timeout=1)


class Handle:
    """An open file at the server."""

    def __init__(self, session: Session, file: asyncssh.SFTPClientFile, shown: str) -> None:
        self._session = session
        self._file = file
        self._shown = shown

    async def stat(self) -> asyncssh.SFTPAttrs:
        return await self._session.ask(self._file.stat(), self._shown)

    async def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes; fewer only at the end of the file."""
        data = cast(bytes, await self._session.ask(self._file.read(length, offset), self._shown))
        while 0 < len(data) < length:
            rest = self._file.read(length - len(data), offset + len(data))
            more = cast(bytes, await self._session.ask(rest, self._shown))
            if not more:
                break
            data += more
        return data

    async def write(self, offset: int, data: bytes) -> None:
        await self._session.ask(self._file.write(data, offset), self._shown)

    async def sync(self) -> None:
        await self._session.ask(self._file.fsync(), self._shown, SYNC_SECONDS)


class _Here:
    """What one event loop has."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.connection: asyncssh.SSHClientConnection | None = None
        self.sessions: list[Session] = []
        #: How many channels the server lets us have.
        self.most = SESSIONS


class Connections:
    def __init__(self, host: str, port: int, settings: Settings, *, endpoint: str, url: str) -> None:
        self._host, self._port, self._settings = host, port, settings
        self._endpoint, self._url = endpoint, url
        self._quiet = seconds_in(settings, "quiet_seconds")
        self._connect_seconds = min(CONNECT_SECONDS, self._quiet or CONNECT_SECONDS)
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Here] = WeakKeyDictionary()
        self._guard = threading.Lock()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[Session]:
        """The channel of this event loop that has least to do. Unreachable, Forbidden."""
        loop = asyncio.get_running_loop()
        with self._guard:
            here = self._loops.setdefault(loop, _Here())
        async with here.lock:
            session = await self._choose(here)
            session.busy += 1
        try:
            yield session
        finally:
            session.busy -= 1

    async def _choose(self, here: _Here) -> Session:
        here.sessions = [session for session in here.sessions if session.alive]
        least = min(here.sessions, key=lambda session: session.busy, default=None)
        if least is None:
            least = await self._first(here)
        elif least.busy and len(here.sessions) < here.most and here.connection is not None:
            try:
                least = await self._start(here.connection)
                here.sessions.append(least)
            except Unreachable:
                here.most = len(here.sessions)
        return least

    async def _first(self, here: _Here) -> Session:
        """A channel on the connection that is there, if it still lives, else on a new one."""
        if here.connection is not None:
            with suppress(Unreachable):
                here.sessions = [await self._start(here.connection)]
                return here.sessions[0]
            here.connection.abort()
        here.connection, here.most = None, SESSIONS
        here.connection = await self._connect()
        here.sessions = [await self._start(here.connection)]
        return here.sessions[0]

    async def _start(self, connection: asyncssh.SSHClientConnection) -> Session:
        try:
            async with asyncio.timeout(self._connect_seconds):
                client = await connection.start_sftp_client()
                return Session(client, self._endpoint, answer_seconds=self._quiet)
        except (asyncssh.SFTPError, asyncssh.Error, OSError, PacketDecodeError) as error:
            raise self._unreachable("it gives us no SFTP session", error) from error

    async def _connect(self) -> asyncssh.SSHClientConnection:
        options = await in_thread(self._options)
        host_keys: list[asyncssh.SSHKey] = []
        try:
            return await asyncssh.connect(
                self._host,
                self._port,
                client_factory=lambda: _NotingHostKey(host_keys),
                tunnel=Gathering(),
                config=None,
                agent_path=None,
                client_host_keysign=False,
                gss_host=None,
                encryption_algs=_CIPHERS,
                connect_timeout=self._connect_seconds,
                login_timeout=self._connect_seconds,
                keepalive_interval=min(KEEPALIVE_SECONDS, self._quiet or KEEPALIVE_SECONDS),
                keepalive_count_max=3,
                **options,
            )
        except asyncssh.HostKeyNotVerifiable as error:
            raise self._strange_host(host_keys, error) from error
        except asyncssh.PermissionDenied as error:
            raise self._forbidden(
                f"the server does not let {self._settings['user']} in",
                "correct user, key_file or password in the credentials file, or have the public key added there",
            ) from error
        except (asyncssh.KeyExchangeFailed, asyncssh.ProtocolNotSupported) as error:
            raise self._forbidden(
                f"no common algorithm ({error.reason})", "the server's SSH is too old, or too strict, for this one"
            ) from error
        except (asyncssh.Error, OSError, PacketDecodeError) as error:
            raise self._unreachable("no connection", error) from error

    def _options(self) -> dict[str, object]:
        """What of asyncssh.connect depends on the settings. Read anew for each connection: keys and lists change."""
        settings = self._settings
        if not settings.get("user"):
            raise self._forbidden(
                "no credentials were given for it",
                f'add ["{self._url}"] with user and key_file (or password_file) to the credentials file of this site',
            )
        key, password = settings.get("key_file"), secret(settings, "password")
        if key is None and password is None:
            raise self._forbidden("there is neither key_file nor password for it", "add one to the credentials file")
        return {
            "username": settings["user"],
            "client_keys": None if key is None else [self._key(key)],
            "password": password,
            "known_hosts": self._known_hosts(),
        }

    def _key(self, path: str) -> asyncssh.SSHKey:
        try:
            return asyncssh.read_private_key(Path(path).expanduser(), secret(self._settings, "key_passphrase"))
        except (OSError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise self._forbidden(
                f"its key_file {path} cannot be used: {reason}",
                "it is a private key in OpenSSH's or PEM form, readable by the worker's user; "
                "key_passphrase_file opens an encrypted one",
            ) from None

    def _known_hosts(self) -> asyncssh.SSHKnownHosts:
        """Never None, by which asyncssh means: believe everybody."""
        given = self._settings.get("known_hosts_file")
        paths = [Path(path).expanduser() for path in ([given] if given else _KNOWN_HOSTS)]
        try:
            return asyncssh.read_known_hosts([str(path) for path in paths if given or path.is_file()])
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise self._forbidden(
                f"its known_hosts_file {paths[0]} cannot be read: {reason}", "it has the form of ~/.ssh/known_hosts"
            ) from None

    def _strange_host(self, keys: list[asyncssh.SSHKey], error: asyncssh.HostKeyNotVerifiable) -> Forbidden:
        where = self._settings.get("known_hosts_file") or " or ".join(_KNOWN_HOSTS)
        shown = f" ({keys[-1].get_algorithm()} {keys[-1].get_fingerprint()})" if keys else f" ({error.reason})"
        return self._forbidden(
            f"its host key{shown} is not one that {where} vouches for",
            f"somebody may be in between: ask the server's administrator whether that is its key; only then add the "
            f"line that `ssh-keyscan -p {self._port} {self._host}` prints to {where}",
        )

    def _forbidden(self, reason: str, hint: str) -> Forbidden:
        return Forbidden(f"endpoint {self._label}: {reason}", hint=hint, endpoint=self._endpoint)

    def _unreachable(self, what: str, error: Exception) -> Unreachable:
        return Unreachable(
            f"endpoint {self._label}: {what} ({from_unexpected(error)})",
            hint=f"check that an SFTP server runs at {self._host}, port {self._port}, and that it is not overloaded",
            endpoint=self._endpoint,
        )

    @property
    def _label(self) -> str:
        return self._endpoint or self._url

    async def close(self) -> None:
        """Of this event loop in order, those of others as soon as they come to it."""
        with self._guard:
            loops, self._loops = [*self._loops.items()], WeakKeyDictionary()
        for loop, here in loops:
            if here.connection is None:
                continue
            if loop is asyncio.get_running_loop():
                for session in here.sessions:
                    await session.settle()
                    session.give_up()
                here.connection.close()
                with suppress(TimeoutError, asyncssh.Error, OSError):
                    await asyncio.wait_for(here.connection.wait_closed(), 5)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(here.connection.abort)


class _NotingHostKey(asyncssh.SSHClient):
    """Asked only about a key that the known hosts do not have. The answer is always no; the key is for the message."""

    def __init__(self, keys: list[asyncssh.SSHKey]) -> None:
        self._keys = keys

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        self._keys.append(key)
        return False
