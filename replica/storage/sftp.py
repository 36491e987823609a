"""Any machine with an SSH server as an endpoint: `sftp://host[:port]/absolute/path`.

Given     a folder at a server, and the settings that replica.storage.ssh reads (user, key_file, password, known hosts).
Returns   the storage contract.
Promises  those of the contract, on OpenSSH's server and others that offer hardlink@, posix-rename@ and
          fsync@openssh.com; `prepare` tries these, and refuses a server or file system that lacks them.
Partner   replica.storage.ssh holds the connections and knows who the server is; replica.storage.sftp_faults its errors.

What the protocol allows, and what is made of it:

    never replacing   SFTP's own rename replaces on some servers, and looks first and then renames on OpenSSH where the
                      file system has no hard links. So a file is published by a hard link, which no server makes over
                      an existing name, and its temporary name is removed. `prepare` tries that, and refuses a place
                      that cannot. Killed between the two, a file has both names until the temporary is collected.
    durability        the bytes are synced by fsync@openssh.com before `write` returns. So are the folders whose lines
                      changed before `publish`, `delete` and `quarantine` return: OpenSSH on Linux opens a folder for
                      reading like a file and syncs it. Where a server does not let a folder be opened, its line is as
                      durable as the server's file system makes it by itself (seconds, with a journal): a power cut may
                      take back a publish, never leave a part of a file.
    symbolic links    none is followed: each segment is looked at before a path is used (a folder again after a second,
                      the file and the sentinel each time). Version 3 of the protocol knows only names, no descriptors
                      of folders, so somebody with an account at the server who may write in the root can put a link
                      there between look and use. Who must not be trusted so far needs a server that keeps this user
                      in the root (ChrootDirectory). Links above the root are the administrator's: they are resolved
                      once a session.
    changes           version 3 tells times in seconds and no inode. A file rewritten within the second, at the same
                      size, has the same etag; its checksum alone shows it.
    digests           OpenSSH computes none: what was written is read back. Through the server's cache, that is: it has
                      no way to be asked for the disk.
    listings          OpenSSH leaves out, without a word, entries that it cannot look at. Where these are all of
                      a folder (no right to enter it), that is noticed and raised; one entry on a damaged disk is not.
    lost answers      a connection lost is Unreachable, whatever was under way; what was looking and not yet acting is
                      tried once more on a new connection, so that one that dropped while idle costs nothing.

Blocks of up to 255 KiB are in flight, AHEAD at a time, for one file; more than 2 MiB (the window of OpenSSH, and ours)
are never on the way in one channel, so one file gets at most 2 MiB for each round trip.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import TypeVar

import asyncssh

from replica.storage.base import (
    OWN,
    PARTS,
    QUARANTINE,
    SENTINEL,
    Entry,
    Piece,
    Space,
    Stat,
    check_part,
    check_path,
    check_prefix,
    check_readable,
    part_path,
)
from replica.storage.credentials import Settings
from replica.storage.faults import place
from replica.storage.refusals import no_room
from replica.storage.sentinel import SENTINEL_BYTES_MAX, is_anothers, owner_in, refuse_anothers, sentinel_of
from replica.storage.sftp_faults import Unexplained
from replica.storage.ssh import Connections, Handle, Session
from replica.storage.together import Together
from rules.errors import (
    Forbidden,
    NoSpace,
    Permanent,
    Refused,
    SourceMissing,
    StorageError,
    TargetExists,
    Transient,
    Unreachable,
)
from rules.quantities import human_bytes

T = TypeVar("T")

#: Requests of one file on the way. The server answers them in order; more only takes memory.
AHEAD = 16
#: How long a folder that was seen to be one is not looked at again, and of how many that is remembered.
_FOLDER_SECONDS = 1.0
_FOLDERS_REMEMBERED = 10_000
#: Less than this free after a write failed: it failed because the disk is full, though the server does not say so.
_FULL_BYTES = 1 << 20
#: POSIX's NAME_MAX and PATH_MAX, as Linux has them.
_NAME_BYTES_MAX = 255
_SERVER_PATH_BYTES_MAX = 4095
_REMOVED_AT_ONCE = 32

_KINDS = {
    asyncssh.FILEXFER_TYPE_DIRECTORY: "a folder",
    asyncssh.FILEXFER_TYPE_SYMLINK: "a symbolic link",
    asyncssh.FILEXFER_TYPE_SOCKET: "a socket",
    asyncssh.FILEXFER_TYPE_CHAR_DEVICE: "a character device",
    asyncssh.FILEXFER_TYPE_BLOCK_DEVICE: "a block device",
    asyncssh.FILEXFER_TYPE_FIFO: "a FIFO",
}


class SftpStorage:
    def __init__(
        self, host: str, port: int, root: str, settings: Settings | None = None, *, name: str = "", url: str = ""
    ) -> None:
        self.name = name
        self.url = url or f"sftp://{host}:{port}{root}"
        #: How messages call this endpoint.
        self.label = name or self.url
        self._folder = root
        self._connections = Connections(host, port, settings or {}, endpoint=name, url=self.url)
        #: The sentinel that was read last: it says that this is our disk.
        self._seen: tuple[int, int] | None = None
        #: Temporaries written here that have no other name yet.
        self._wrote: set[str] = set()
        self._together = Together()

    # ── the root ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        async with self._connections.session() as session:
            root = await self._resolve(session)
            await self._refuse_nested(session, root)
            await self._make_root(session, root)
            session.root = root
            await self._make_folders(session, PARTS)
            await self._claim(session)
            await self._try_publishing(session)

    async def _resolve(self, session: Session) -> bytes:
        """The real path of the root, which need not be there yet."""
        there, missing = self._folder.encode(), b""
        while True:
            try:
                return (await session.realpath(there, self._folder)).rstrip(b"/") + missing
            except SourceMissing:
                there, _, last = there.rpartition(b"/")
                missing = b"/" + last + missing

    async def _refuse_nested(self, session: Session, root: bytes) -> None:
        # Two endpoints on one disk would count one copy twice, and each would take the other's files for strays.
        above = root
        while above != b"/":
            above = above.rpartition(b"/")[0] or b"/"
            with suppress(SourceMissing, Forbidden):
                await session.lstat(above.rstrip(b"/") + b"/" + SENTINEL.encode(), SENTINEL)
                raise Refused(
                    f"{_shown(root)} lies within another endpoint, {_shown(above)}",
                    hint="choose a folder outside of it; endpoints cannot be nested",
                )

    async def _make_root(self, session: Session, root: bytes) -> None:
        segments = root.split(b"/")[1:]
        for count in range(1, len(segments) + 1):
            folder = b"/" + b"/".join(segments[:count])
            try:
                await session.lstat(folder, _shown(folder))
            except SourceMissing:
                await session.mkdir(folder, _shown(folder))

    async def _claim(self, session: Session) -> None:
        if await self._lstat(session, SENTINEL) is not None:
            owner = await self._owner(session)
            refuse_anothers(owner, self.name, self._folder, file=f"{self._folder}/{SENTINEL}")
            return
        async with session.open(self._real(session, SENTINEL), "xb", SENTINEL) as handle:
            await handle.write(0, sentinel_of(self.name))
            await handle.sync()
        await self._sync(session, OWN)

    async def _owner(self, session: Session) -> str:
        async with session.open(self._real(session, SENTINEL), "rb", SENTINEL) as handle:
            return owner_in(await handle.read(0, SENTINEL_BYTES_MAX)) or ""

    async def _try_publishing(self, session: Session) -> None:
        """Is there a file system behind it that can publish without replacing? FAT and some others cannot."""
        one, two = (self._real(session, part_path(f"try.{secrets.token_hex(6)}")) for _ in range(2))
        try:
            async with session.open(one, "xb", PARTS):
                pass
            await session.link(one, two, PARTS)
            with suppress(Unexplained, TargetExists):
                await session.link(one, two, PARTS)
                raise self._no_links("the server makes a hard link over an existing file")
        except (Unexplained, Forbidden) as error:
            raise self._no_links(f"a hard link cannot be made there ({error.message})") from error
        finally:
            for path in (one, two):
                with suppress(StorageError):
                    await session.remove(path, PARTS)

    def _no_links(self, reason: str) -> Forbidden:
        return Forbidden(
            f"endpoint {self.label}: {reason}, so files cannot be published without the risk of replacing others",
            hint="use a folder that the user may write to, on a file system with hard links (not FAT or exFAT)",
            endpoint=self.name,
        )

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _at(self, path: str) -> AsyncIterator[tuple[Session, asyncssh.SFTPAttrs | None]]:
        """A session, and what it sees at `path` (None: nothing), in one round trip.

        A connection that was lost while nobody used it is made anew here, where nothing was changed yet.
        """
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(self._connections.session())
            try:
                found = await self._look(session, path)
            except Unreachable:
                if session.alive:  # it is the disk that is not there
                    raise
                session = await stack.enter_async_context(self._connections.session())
                found = await self._look(session, path)
            yield session, found

    async def _look(self, session: Session, path: str) -> asyncssh.SFTPAttrs | None:
        if session.root is None:
            session.root = await self._resolve(session)
        self._refuse_too_long(session, path)
        names = _prefixes(path) if path else []
        now = asyncio.get_running_loop().time()
        names = [name for name in names[:-1] if session.folders.get(name, 0.0) < now] + names[-1:]
        sentinel, *found = await asyncio.gather(*(self._lstat(session, name) for name in (SENTINEL, *names)))
        if sentinel is None:
            session.root = None  # a link above it may have been changed
            raise self._unreachable(f"{self._folder} has no file {SENTINEL}; its disk is perhaps not mounted there")
        await self._refuse_another(session, sentinel)
        for name, folder in zip(names[:-1], found[:-1], strict=True):
            if folder is not None and folder.type == asyncssh.FILEXFER_TYPE_SYMLINK:
                raise Forbidden(
                    f"{place(self.name, path)}: its folder {repr(name)[1:-1]} is a symbolic link",
                    hint="Replica follows none: replace it by the folder",
                    endpoint=self.name,
                    path=path,
                )
            if folder is None or folder.type != asyncssh.FILEXFER_TYPE_DIRECTORY:
                return None
            if len(session.folders) >= _FOLDERS_REMEMBERED:
                session.folders.clear()
            session.folders[name] = now + _FOLDER_SECONDS
        return found[-1] if found else None

    def _refuse_too_long(self, session: Session, path: str) -> None:
        """The server would say so too, but only once the folders above it were made."""
        longest = max(len(segment.encode()) for segment in path.split("/"))
        if longest > _NAME_BYTES_MAX or len(self._real(session, path)) > _SERVER_PATH_BYTES_MAX:
            raise Permanent(
                f"{place(self.name, path)}: the name is too long",
                hint=f"a name has at most {_NAME_BYTES_MAX} bytes, a path with its root {_SERVER_PATH_BYTES_MAX}",
                endpoint=self.name,
                path=path,
            )

    async def _lstat(self, session: Session, path: str) -> asyncssh.SFTPAttrs | None:
        try:
            return await session.lstat(self._real(session, path), path)
        except SourceMissing:
            return None

    def _real(self, session: Session, path: str) -> bytes:
        return self._beneath(session, path.encode())

    def _beneath(self, session: Session, path: bytes) -> bytes:
        assert session.root is not None, "the root is resolved before any path beneath it"
        return session.root + b"/" + path if path else session.root

    async def _refuse_another(self, session: Session, sentinel: asyncssh.SFTPAttrs) -> None:
        """The disk of another endpoint, mounted there by mistake: its files would be taken for ours."""
        if sentinel.type != asyncssh.FILEXFER_TYPE_REGULAR:
            raise self._unreachable(f"{self._folder}/{SENTINEL} is not a regular file")
        seen = (sentinel.size or 0, sentinel.mtime or 0)
        if seen == self._seen or not self.name:
            return
        owner = await self._owner(session)
        if is_anothers(owner, self.name):
            raise self._unreachable(f"{self._folder} belongs to the endpoint {owner}")
        self._seen = seen

    def _unreachable(self, reason: str) -> Unreachable:
        return Unreachable(
            f"endpoint {self.label}: {reason}",
            hint="mount the disk there; if this really is the endpoint's disk, prepare the endpoint again",
            endpoint=self.name,
        )

    def _regular(self, path: str, found: asyncssh.SFTPAttrs | None, but: str = "") -> asyncssh.SFTPAttrs:
        if found is None:
            raise SourceMissing(f"{place(self.name, path)}: No such file", endpoint=self.name, path=path)
        if found.type != asyncssh.FILEXFER_TYPE_REGULAR:
            raise Forbidden(
                f"{place(self.name, path)} is {_kind(found)}, not a regular file{but}",
                hint="Replica keeps regular files only",
                endpoint=self.name,
                path=path,
            )
        return found

    async def stat(self, path: str) -> Stat:
        check_readable(path)
        async with self._at(path) as (_, found):
            found = self._regular(path, found)
            size, mtime = found.size or 0, found.mtime or 0
            return Stat(size, mtime * 10**9, f"{size:x}-{mtime:x}")

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        check_prefix(prefix)
        async with self._at(prefix) as (session, found):
            if prefix and (found is None or found.type != asyncssh.FILEXFER_TYPE_DIRECTORY):
                if found is not None and found.type == asyncssh.FILEXFER_TYPE_SYMLINK:
                    yield _entry(prefix.encode(), found)
                return
            folders = [prefix.encode()]
            while folders:
                folder = folders.pop()
                async with aclosing(self._children(session, folder)) as children:
                    async for path, attributes in children:
                        if attributes.type == asyncssh.FILEXFER_TYPE_DIRECTORY:
                            folders.append(path)
                        else:
                            yield _entry(path, attributes)
                if len(session.root or b"") + len(folder) + 257 > _SERVER_PATH_BYTES_MAX:
                    yield Entry(_shown(folder), 0, 0, "path is too long: the server may leave out what is in it")
            # A disk taken away meanwhile leaves folders that are not there: they are not to be taken for empty.
            await self._look(session, "")

    async def _children(
        self, session: Session, folder: bytes
    ) -> AsyncGenerator[tuple[bytes, asyncssh.SFTPAttrs], None]:
        shown, empty = _shown(folder), True
        real = self._beneath(session, folder)
        try:
            async with aclosing(session.entries(real, shown)) as entries:
                async for entry in entries:
                    empty = False
                    name = entry.filename if isinstance(entry.filename, bytes) else entry.filename.encode()
                    if b"/" in name:
                        raise Transient(
                            f"endpoint {self.label}: the server lists {_shown(name)!r} as a name in {shown!r}",
                            hint="that is no name: the server is broken, or not what it should be",
                            endpoint=self.name,
                        )
                    path = folder + b"/" + name if folder else name
                    if name not in (b".", b"..") and path != OWN.encode():
                        yield path, entry.attrs
            if empty:
                # Not even a "." of its own: without the right to enter a folder OpenSSH shows it as empty.
                await session.lstat(real + b"/.", shown)
        except SourceMissing:
            return  # went away, or was replaced by a file: either is as good as seen before or after

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        check_readable(path)
        async with self._at(path) as (session, found):
            size = self._regular(path, found).size or 0
            end = size if length is None else min(size, offset + length)
            async with (
                session.open(self._real(session, path), "rb", path) as handle,
                aclosing(_read_ahead(handle, offset, end, session.block_bytes)) as pieces,
            ):
                async for piece in pieces:
                    yield piece

    async def checksum(self, path: str, algorithm: str) -> str | None:
        check_readable(path)
        if path in self._wrote:
            return None  # it is there: nobody need be asked
        with suppress(Unreachable):  # one request where all is well; `stat` knows what is wrong where it is not
            async with self._connections.session() as session:
                found = await self._lstat(session, path) if session.root is not None else None
                if found is not None and found.type == asyncssh.FILEXFER_TYPE_REGULAR:
                    return None
        await self.stat(path)
        return None  # OpenSSH computes none; reading back is the proof

    async def space(self) -> Space | None:
        async with self._at("") as (session, _):
            return await self._space(session)

    async def _space(self, session: Session) -> Space | None:
        try:
            found = await session.statvfs(self._real(session, ""), "")
        except (Forbidden, Unexplained):
            return None
        return Space(
            found.frsize * found.blocks, found.frsize * (found.bavail if found.favail or not found.files else 0)
        )

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        check_part(temporary)
        async with self._at(temporary) as (session, found):
            if found is not None:
                raise self._exists(temporary)
            await self._fit(session, temporary, size_bytes)
            async with self._new(session, temporary) as handle, self._explained(session, temporary):
                await _write_ahead(handle, chunks, session.block_bytes)
                await _written(handle.sync())
        if len(self._wrote) >= _FOLDERS_REMEMBERED:
            self._wrote.clear()
        self._wrote.add(temporary)

    async def _fit(self, session: Session, temporary: str, size_bytes: int | None) -> None:
        space = await self._space(session) if size_bytes is not None else None
        if space is not None and size_bytes is not None and size_bytes > space.free_bytes:
            raise no_room(self.name, self.label, temporary, free_bytes=space.free_bytes, size_bytes=size_bytes)

    @asynccontextmanager
    async def _new(self, session: Session, temporary: str) -> AsyncIterator[Handle]:
        """The temporary, empty and ours alone."""
        async with AsyncExitStack() as stack:
            opening = session.open(self._real(session, temporary), "xb", temporary)
            try:
                handle = await stack.enter_async_context(opening)
            except SourceMissing:  # somebody tidied up in our folder
                await self._make_folders(session, PARTS)
                opening = session.open(self._real(session, temporary), "xb", temporary)
                handle = await stack.enter_async_context(opening)
            except Unexplained as error:
                if await self._lstat(session, temporary) is not None:
                    raise self._exists(temporary) from None
                async with self._explained(session, temporary):
                    raise _WriteFailed(error) from error
            yield handle

    @asynccontextmanager
    async def _explained(self, session: Session, temporary: str) -> AsyncIterator[None]:
        """Within, a write that failed for no given reason failed for want of space, if there is no space."""
        try:
            yield
        except _WriteFailed as failed:
            error = failed.error
            space = await self._space(session) if isinstance(error, Unexplained) else None
            if space is None or space.free_bytes >= _FULL_BYTES:
                raise error from None
            raise NoSpace(
                f"{place(self.name, temporary)}: the write failed, and {human_bytes(space.free_bytes)} are free there",
                hint="free space or inodes there (df, df -i), or move data elsewhere",
                endpoint=self.name,
                path=temporary,
                side="target",
            ) from error

    def _exists(self, path: str, reason: str = "exists already") -> TargetExists:
        return TargetExists(f"{place(self.name, path)} {reason}", endpoint=self.name, path=path, side="target")

    async def publish(self, temporary: str, final: str) -> None:
        check_part(temporary)
        check_path(final)
        folder = final.rpartition("/")[0]
        async with self._at(final) as (session, found):
            if found is not None:
                raise self._exists(final)
            try:
                await self._link(session, temporary, final)
            except SourceMissing:  # most often the folder is there, so it is not looked for before
                await self._make_folders(session, folder, final)
                await self._link(session, temporary, final)
            # It has its name. What happens to the other one changes nothing: it is collected when it is old.
            self._wrote.discard(temporary)
            with suppress(StorageError):
                await session.remove(self._real(session, temporary), temporary)
            await self._together.do(folder, lambda: self._sync(session, folder))

    async def _link(self, session: Session, temporary: str, final: str) -> None:
        try:
            await session.link(self._real(session, temporary), self._real(session, final), final)
        except Unexplained:
            if await self._lstat(session, final) is not None:
                raise self._exists(final) from None
            raise

    async def _make_folders(self, session: Session, folder: str, wanted_for: str = "") -> None:
        names = _prefixes(folder) if folder else []
        found = await asyncio.gather(*(self._lstat(session, name) for name in names))
        for name, there in zip(names, found, strict=True):
            if there is None:
                try:
                    await session.mkdir(self._real(session, name), name)
                    await self._sync(session, name.rpartition("/")[0])
                    continue
                except (Unexplained, TargetExists):  # somebody else was faster
                    there = await self._lstat(session, name)
                    if there is None:
                        raise
            if there.type != asyncssh.FILEXFER_TYPE_DIRECTORY:
                raise self._exists(wanted_for or folder, f"cannot be: {_kind(there)} stands where a folder is needed")

    async def _sync(self, session: Session, folder: str) -> None:
        """The folder's lines are on the disk, where the server lets folders be opened."""
        async with AsyncExitStack() as stack:
            try:
                handle = await stack.enter_async_context(session.open(self._real(session, folder), "rb", folder))
            except (Unexplained, Permanent):
                return
            await handle.sync()

    async def delete(self, path: str) -> None:
        check_readable(path)
        self._wrote.discard(path)
        async with self._at(path) as (session, found):
            if found is None:
                return
            self._regular(path, found, ": not deleted")
            with suppress(SourceMissing):
                await session.remove(self._real(session, path), path)
            folder = path.rpartition("/")[0]
            if folder != PARTS:
                await self._together.do(folder, lambda: self._sync(session, folder))

    async def quarantine(self, path: str) -> str:
        check_path(path)
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{path}"
        async with self._at(path) as (session, found):
            self._regular(path, found, ": not moved")
            await self._make_folders(session, away.rpartition("/")[0])
            # Not by a link, which a server refuses for the files of others. The new name is nobody's but ours.
            await session.move(self._real(session, path), self._real(session, away), path)
            for folder in (away.rpartition("/")[0], path.rpartition("/")[0]):
                await self._sync(session, folder)
        return away

    async def collect_parts(self, older_than_seconds: float) -> int:
        async with self._at(PARTS) as (session, found):
            if found is None:
                return 0
            limit = await self._now_there(session) - older_than_seconds
            async with aclosing(self._children(session, PARTS.encode())) as children:
                stale = [
                    path
                    async for path, attributes in children
                    if (attributes.mtime or 0) <= limit and attributes.type != asyncssh.FILEXFER_TYPE_DIRECTORY
                ]
            removed = 0
            for begin in range(0, len(stale), _REMOVED_AT_ONCE):
                some = stale[begin : begin + _REMOVED_AT_ONCE]
                removed += sum(await asyncio.gather(*(self._removed(session, path) for path in some)))
            return removed

    async def _removed(self, session: Session, path: bytes) -> bool:
        try:
            await session.remove(self._beneath(session, path), _shown(path))
        except SourceMissing:
            return False
        return True

    async def _now_there(self, session: Session) -> float:
        """The server's clock, by which its files' ages are told. Ours, if nothing can be written there any more."""
        probe = part_path(f"now.{secrets.token_hex(6)}")
        try:
            async with session.open(self._real(session, probe), "xb", probe) as handle:
                found = await handle.stat()
        except (Transient, Permanent) as error:
            if isinstance(error, Unreachable):
                raise
            return time.time()
        finally:
            with suppress(StorageError):
                await session.remove(self._real(session, probe), probe)
        return float(found.mtime or 0)

    async def close(self) -> None:
        await self._connections.close()


# ── many requests in flight ──────────────────────────────────────────────────────────────────────────────────────────


async def _read_ahead(handle: Handle, offset: int, end: int, block_bytes: int) -> AsyncGenerator[bytes, None]:
    waiting: deque[tuple[asyncio.Task[bytes], int]] = deque()
    try:
        while offset < end or waiting:
            while offset < end and len(waiting) < AHEAD:
                take = min(block_bytes, end - offset)
                waiting.append((asyncio.create_task(handle.read(offset, take)), take))
                offset += take
            task, take = waiting[0]
            piece = await task
            waiting.popleft()
            if piece:
                yield piece
            if len(piece) < take:
                return  # it is shorter by now; the copy will see
    finally:
        await _drop(task for task, _ in waiting)


class _WriteFailed(Exception):
    """Our own request failed, and not the source of the chunks."""

    def __init__(self, error: StorageError) -> None:
        super().__init__(str(error))
        self.error = error


async def _write_ahead(handle: Handle, chunks: AsyncIterator[Piece], block_bytes: int) -> None:
    waiting: deque[asyncio.Task[None]] = deque()
    offset = 0
    try:
        async with aclosing(_in_blocks(chunks, block_bytes)) as blocks:
            async for block in blocks:
                if len(waiting) >= AHEAD:
                    await _written(waiting[0])
                    waiting.popleft()
                waiting.append(asyncio.create_task(handle.write(offset, block)))
                offset += len(block)
        for task in waiting:
            await _written(task)
    finally:
        await _drop(waiting)


async def _written(request: Awaitable[None]) -> None:
    try:
        await request
    except StorageError as error:
        raise _WriteFailed(error) from error


async def _drop(tasks: Iterable[asyncio.Task[T]]) -> None:
    left = [*tasks]
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _in_blocks(chunks: AsyncIterator[Piece], block_bytes: int) -> AsyncGenerator[bytes, None]:
    """The same bytes in requests of the best size; each is a copy, as a chunk's buffer is used again."""
    held = bytearray()
    async for chunk in chunks:
        left = memoryview(chunk)
        while left:
            if not held and len(left) >= block_bytes:
                yield bytes(left[:block_bytes])
                left = left[block_bytes:]
                continue
            take = left[: block_bytes - len(held)]
            held += take
            left = left[len(take) :]
            if len(held) == block_bytes:
                yield bytes(held)
                held.clear()
    if held:
        yield bytes(held)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _prefixes(path: str) -> list[str]:
    """a, a/b, a/b/c"""
    segments = path.split("/")
    return ["/".join(segments[:count]) for count in range(1, len(segments) + 1)]


def _entry(path: bytes, found: asyncssh.SFTPAttrs) -> Entry:
    shown = _shown(path)
    problem = ""
    if found.type != asyncssh.FILEXFER_TYPE_REGULAR:
        problem = _kind(found).partition(" ")[2]
    elif path.startswith(OWN.encode()):
        problem = "name is kept for Replica"
    if shown.encode() != path:
        problem = "name is not UTF-8"
    return Entry(shown, found.size or 0, (found.mtime or 0) * 10**9, problem)


def _kind(found: asyncssh.SFTPAttrs) -> str:
    return _KINDS.get(found.type, "something unknown")


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
