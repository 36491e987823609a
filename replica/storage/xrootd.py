"""An XRootD server as an endpoint: `root://host:port//folder`, or `roots://` for TLS.

Given     host, port and the endpoint's folder there; from the credentials file `token` or `token_file`, which is sent
          by roots:// only. Certificates of people and of authorities are found as the library finds them
          (X509_USER_PROXY, X509_CERT_DIR). A server, or a cluster whose redirector shows one namespace.
Returns   the storage contract.
Promises  as the contract says, with these bounds, which the protocol sets:

    publish     The protocol has no rename that refuses to replace: servers differ, and Debian's 5.5.3 replaces without
                a word. So the name is claimed first, by creating it exclusively as an empty file of mode 0601, and the
                temporary is renamed over that claim, and over nothing else. Nobody's file is ever replaced, and of many
                exactly one wins. The price: for two round trips, others see an empty file. Replica itself does not: to
                it a claim is nothing (`stat`) or a problem (`list`). A worker that dies in between leaves its claim;
                after CLAIM_STALE_SECONDS the next publish takes it away.
    durable     sync after the last byte; after a rename, sync of the renamed file, which on ext4, XFS and ZFS brings
                the rename itself to the disk. The protocol cannot sync a folder.
    checksum    The server's own digest (adler32, crc32c, md5) is given for temporaries only. It computes one from the
                bytes as they lie the first time it is asked, which for a temporary is after its last byte; afterwards
                it repeats what it remembers for as long as size and second of change stay, and so hides bit rot. A
                published file has no digest here that proves anything: None, it is read back.
    etag        Times come in whole seconds: a file that is rewritten in place within the second of its last change,
                with as many bytes, keeps its etag. One that is replaced by a rename does not.
    names       '?' begins the protocol's parameters, a line break ends a name of a listing, and the 255th byte of a
                name is missing there: such names are refused, as are paths of more than PATH_MAX bytes with the
                endpoint's folder. A folder in which somebody else made a name with a line break, too long, or not
                UTF-8, cannot be listed: an error, not a gap.

Partner   replica.storage.xrootd_calls asks the server; the calls block, so they run in threads of their own.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

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
)
from replica.storage.faults import place, translated
from replica.storage.refusals import being_published, exists_already, no_room, not_all_kept
from replica.storage.sentinel import SENTINEL_BYTES_MAX, is_anothers, owner_in, refuse_anothers, sentinel_of
from replica.storage.threads import run
from replica.storage.xrootd_calls import Found, Server
from rules.checksums import DIGITS
from rules.errors import (
    Forbidden,
    Invalid,
    Refused,
    SourceMissing,
    StorageError,
    Unreachable,
)
from rules.names import shown

#: What is sent or asked for in one request.
PIECE_BYTES = 8 << 20
#: What XRootD servers take, less the folder their files lie in (their own limit is 1,024 bytes with that).
PATH_MAX = 800
#: A server lists no more of a name.
NAME_MAX = 254
#: A claim as old as this is nobody's: publishing takes a few requests, each bounded far below it.
CLAIM_STALE_SECONDS = 300
_CLAIM_MODE = 0o601
_CLAIM_WAIT_SECONDS = 2.0
_CLAIM_LOOK_SECONDS = 0.05
#: What a server computes; our names for them are its own.
_ALGORITHMS = ("adler32", "crc32c", "md5")

T = TypeVar("T")
Seen = list[tuple[str, Found]]

#: A server that does not answer holds its threads for as long as a request may take: never those of others.
_asking = ThreadPoolExecutor(max_workers=32, thread_name_prefix="xrootd")


async def _in_thread(call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    return await run(call, executor=_asking, undo=undo)


class XRootDStorage:
    def __init__(self, server: Server, root: str, *, name: str = "", url: str = "") -> None:
        self.server = server
        self.root = root.rstrip("/")
        self.name = name
        self.url = url
        self._seen = ""

    # ── the endpoint's folder ────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        await _in_thread(self._prepare)

    def _prepare(self) -> None:
        # Two endpoints in one folder would count one copy twice, and each would take the other's files for strays.
        folders = self.root.split("/")
        with translated(self.name, SENTINEL):
            for depth in range(len(folders) - 1, 0, -1):
                above = "/".join(folders[:depth])
                with suppress(FileNotFoundError, NotADirectoryError):
                    self.server.stat(f"{above}/{SENTINEL}")
                    raise Refused(
                        f"{self.root} lies within another endpoint, {above or '/'}",
                        hint="choose a folder outside of it; endpoints cannot be nested",
                    )
            self.server.make_folders(self._beneath(PARTS))
            try:
                self._put(SENTINEL, sentinel_of(self.name))
            except FileExistsError:
                refuse_anothers(self._owner(), self.name, self.root or "/")

    def _put(self, path: str, content: bytes) -> None:
        file = self.server.create(self._at(path))
        try:
            self.server.write(file, 0, content)
            self.server.sync(file, len(content))
        finally:
            self.server.close(file)

    def _owner(self) -> str:
        file = self.server.open(self._at(SENTINEL))
        try:
            return owner_in(self.server.read(file, 0, SENTINEL_BYTES_MAX)) or ""
        finally:
            self.server.close(file)

    def _reach(self) -> None:
        """Unreachable, if the folder is not the endpoint's: the disk behind it is not mounted, or is another's."""
        with translated(self.name, SENTINEL):
            try:
                found = self.server.stat(self._at(SENTINEL))
                if f"{found.identity}-{found.mtime_ns}" == self._seen:
                    return
                owner = self._owner()
            except (FileNotFoundError, NotADirectoryError):
                missing = f"{self.root or '/'} has no file {SENTINEL}; its disk is perhaps not mounted"
                raise self._gone(missing) from None
        if is_anothers(owner, self.name):
            raise self._gone(f"{self.root or '/'} belongs to the endpoint {owner}")
        self._seen = f"{found.identity}-{found.mtime_ns}"

    def _gone(self, reason: str) -> Unreachable:
        return Unreachable(
            f"endpoint {self.name or self.url}: {reason}",
            hint="mount the disk; if this really is the endpoint's disk, prepare the endpoint again",
            endpoint=self.name,
        )

    def _beneath(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _at(self, path: str) -> str:
        """Where it is at the server; Invalid for what the protocol cannot carry."""
        where = self._beneath(path)
        if problem := _not_kept(path) or (len(where.encode()) > PATH_MAX and f"has more than {PATH_MAX} bytes"):
            raise Invalid(
                f"the path {shown(path)} {problem}, which XRootD cannot keep",
                hint="give the file another name, or keep it at an endpoint of another kind",
            )
        return where

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stat(self, path: str) -> Stat:
        where = self._at(check_readable(path))
        return _stat(await _in_thread(partial(self._file, path, where)))

    def _file(self, path: str, where: str) -> Found:
        """The regular file of that name. SourceMissing, Forbidden."""
        if not self._seen:
            self._reach()
        with translated(self.name, path):
            try:
                found = self.server.stat(where)
            except (FileNotFoundError, NotADirectoryError):
                self._reach()  # missing it is only if the endpoint is there
                raise
            if _is_claim(found):
                raise FileNotFoundError(errno.ENOENT, "a name that is being published")
            if not found.is_file:
                raise Forbidden(
                    f"{place(self.name, path)} is {_kind(found)}, not a regular file",
                    hint="Replica keeps regular files only",
                    endpoint=self.name,
                    path=path,
                )
            return found

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        self._at(check_prefix(prefix))
        await _in_thread(self._reach)
        folders = [prefix]
        while folders:
            folder = folders.pop()
            for path, found in await _in_thread(partial(self._folder, folder)):
                if found.is_folder:
                    folders.append(path)
                else:
                    yield Entry(path, found.size_bytes, found.mtime_ns, _problem(path, found))
        await _in_thread(self._reach)  # folders that went away with their disk were no empty ones

    def _folder(self, folder: str) -> Seen:
        entries = []
        with translated(self.name, folder):
            try:
                listing = self.server.listing(self._beneath(folder))
            except (FileNotFoundError, NotADirectoryError):
                return []  # went away, or was replaced by a file: either is as good as seen before or after
            for name, known in listing:
                path = f"{folder}/{name}" if folder else name
                if path == OWN:
                    continue
                if len(name.encode()) >= NAME_MAX:
                    self._whole(path)
                with suppress(FileNotFoundError):
                    entries.append((path, known or self.server.stat(self._beneath(path))))
        return entries

    def _whole(self, path: str) -> None:
        """A listing has no room for the last byte of the longest names."""
        try:
            self.server.stat(self._beneath(path))
        except FileNotFoundError:
            raise OSError(errno.ENAMETOOLONG, "a name in it is longer than XRootD lists") from None

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        where = self._at(check_readable(path))
        found = await _in_thread(partial(self._file, path, where))  # opening a FIFO would hold a thread of the server
        end = found.size_bytes if length is None else min(found.size_bytes, offset + length)
        if offset >= end:
            return
        with translated(self.name, path):
            file = await _in_thread(partial(self.server.open, where), undo=self._let_go)
        try:
            while offset < end:
                wanted = min(PIECE_BYTES, end - offset)
                with translated(self.name, path):
                    piece = await _in_thread(partial(self.server.read, file, offset, wanted))
                if not piece:
                    return  # it became shorter meanwhile; the caller counts
                offset += len(piece)
                yield piece
        finally:
            await _in_thread(partial(self._let_go, file))

    def _let_go(self, file: Any) -> None:
        """Close what was only read, or is given up."""
        with suppress(OSError, StorageError):
            self.server.close(file)

    async def checksum(self, path: str, algorithm: str) -> str | None:
        where = self._at(check_readable(path))
        found = await _in_thread(partial(self._file, path, where))
        if not path.startswith(PARTS + "/") or algorithm not in _ALGORITHMS:
            return None
        return await _in_thread(partial(self._checksum, where, algorithm, found.size_bytes))

    def _checksum(self, where: str, algorithm: str, size_bytes: int) -> str | None:
        """None whatever the server answers instead of a digest: then the bytes are read back, which proves more."""
        with suppress(OSError):
            known, _, value = self.server.checksum(where, algorithm, size_bytes).partition(" ")
            value = value.strip().lower().rjust(DIGITS[algorithm], "0")
            if known == algorithm and len(value) == DIGITS[algorithm]:
                return value
        return None

    async def space(self) -> Space | None:
        await _in_thread(self._reach)
        return await _in_thread(self._space)

    def _space(self) -> Space | None:
        try:
            answer = self.server.query("SPACE", self.root or "/")
        except OSError:
            return None
        known = dict(word.partition("=")[::2] for word in answer.split("&"))
        try:
            total, free = int(known["oss.space"]), int(known["oss.free"])
            quota, used = int(known.get("oss.quota", -1)), int(known.get("oss.used", 0))
        except (KeyError, ValueError):
            return None
        if quota >= 0:
            total, free = quota, min(free, max(0, quota - used))
        return Space(total, min(free, total))

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        where = self._at(check_part(temporary))
        file = await _in_thread(partial(self._create, temporary, where, size_bytes), undo=self._let_go)
        written = 0
        buffer = bytearray()
        try:
            async for chunk in chunks:
                buffer += chunk
                if len(buffer) >= PIECE_BYTES:
                    written = await self._flush(file, temporary, written, buffer)
            written = await self._flush(file, temporary, written, buffer)
            with translated(self.name, temporary, "target"):
                await _in_thread(partial(self.server.sync, file, written))
        except BaseException:
            await _in_thread(partial(self._let_go, file))
            raise
        await _in_thread(partial(self._finish, file, temporary, where, written))

    def _create(self, temporary: str, where: str, size_bytes: int | None) -> Any:
        self._reach()
        space = self._space() if size_bytes else None
        if space is not None and size_bytes is not None and size_bytes > space.free_bytes:
            label = self.name or self.url
            raise no_room(self.name, label, temporary, free_bytes=space.free_bytes, size_bytes=size_bytes)
        with translated(self.name, temporary, "target"):
            return self.server.create(where)

    async def _flush(self, file: Any, temporary: str, written: int, buffer: bytearray) -> int:
        content = bytes(buffer)
        buffer.clear()
        if content:
            with translated(self.name, temporary, "target"):
                await _in_thread(partial(self.server.write, file, written, content))
        return written + len(content)

    def _finish(self, file: Any, temporary: str, where: str, written: int) -> None:
        with translated(self.name, temporary, "target"):
            self.server.close(file)
            kept = self.server.stat(where).size_bytes
        if kept != written:
            raise not_all_kept(self.name, temporary, kept_bytes=kept, written_bytes=written)

    async def publish(self, temporary: str, final: str) -> None:
        part, where = self._at(check_part(temporary)), self._at(check_path(final))
        await _in_thread(partial(self._publish, part, final, where))

    def _publish(self, part: str, final: str, where: str) -> None:
        self._reach()
        with translated(self.name, final, "target"):
            self._claim(final, where, self.server.stat(part).mtime_ns)
            try:
                self.server.move(part, where)
            except OSError as error:  # an answer: nothing was renamed. Without one it may be, and the claim must stay.
                self._take_away_claim(where)
                if not isinstance(error, FileExistsError):
                    raise
                self.server.move(part, where)  # a server that itself refuses to replace, even a claim
            self._sync(where)

    def _claim(self, final: str, where: str, written_ns: int) -> None:
        """Make the name ours, or TargetExists. Another's claim is waited for a moment, for it becomes a file.

        Its age is told by the server's clock alone: our temporary was written so long after the claim was made.
        """
        deadline = time.monotonic() + _CLAIM_WAIT_SECONDS
        while True:
            try:
                self.server.close(self.server.create(where, _CLAIM_MODE))
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.EBUSY):  # busy: another one who claims has it open still
                    raise
            with suppress(FileNotFoundError):
                found = self.server.stat(where)
                if not _is_claim(found):
                    raise exists_already(self.name, final)
                if written_ns - found.mtime_ns > CLAIM_STALE_SECONDS * 10**9:
                    self._take_away_claim(where)
            if time.monotonic() > deadline:
                raise being_published(self.name, final, CLAIM_STALE_SECONDS)
            time.sleep(_CLAIM_LOOK_SECONDS)

    def _take_away_claim(self, where: str) -> None:
        """By a rename first: should a file have come in the claim's place meanwhile, it is in quarantine, not lost."""
        with suppress(FileNotFoundError):
            if not _is_claim(self.server.stat(where)):
                return
            away = self._beneath(f"{QUARANTINE}/{secrets.token_hex(8)}")
            self.server.make_folders(self._beneath(QUARANTINE))
            self.server.move(where, away)
            if _is_claim(self.server.stat(away)):
                self.server.remove(away)

    def _sync(self, where: str) -> None:
        file = self.server.open(where)
        try:
            self.server.sync(file, self.server.stat(where).size_bytes)
        finally:
            self._let_go(file)

    async def delete(self, path: str) -> None:
        await _in_thread(partial(self._delete, path, self._at(check_readable(path))))

    def _delete(self, path: str, where: str) -> None:
        self._reach()
        with suppress(SourceMissing):
            self._file(path, where)  # of a folder, the server would remove the folder
            with translated(self.name, path):
                self.server.remove(where)

    async def quarantine(self, path: str) -> str:
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{check_path(path)}"
        await _in_thread(partial(self._quarantine, path, self._at(path), self._beneath(away)))
        return away

    def _quarantine(self, path: str, where: str, away: str) -> None:
        self._reach()
        self._file(path, where)
        with translated(self.name, path):
            self.server.make_folders(away.rpartition("/")[0])
            self.server.move(where, away)
            self._sync(away)

    async def collect_parts(self, older_than_seconds: float) -> int:
        return await _in_thread(partial(self._collect_parts, older_than_seconds))

    def _collect_parts(self, older_than_seconds: float) -> int:
        self._reach()
        removed = 0
        with translated(self.name, PARTS):
            for path, found in self._folder(PARTS):
                # Whole seconds, and the server's clock: what was written within this one is as old as 0.
                if found.is_file and time.time() - found.mtime_ns / 1e9 >= older_than_seconds:
                    with suppress(FileNotFoundError):
                        self.server.remove(self._at(path))
                        removed += 1
        return removed

    async def close(self) -> None:
        return None


def _is_claim(found: Found) -> bool:
    return found.is_file and found.size_bytes == 0 and found.mode.endswith(f"{_CLAIM_MODE:o}")


def _kind(found: Found) -> str:
    return "a folder" if found.is_folder else "something special"


def _problem(path: str, found: Found) -> str:
    if _is_claim(found):
        return "a publication that was not finished"
    if not found.is_file:
        return "not a regular file"
    if path.startswith(OWN):
        return "name is kept for Replica"
    return _not_kept(path) and "name that XRootD cannot keep"


def _not_kept(path: str) -> str:
    if "?" in path:
        return "has a '?'"
    if "\n" in path or "\r" in path:
        return "has a line break"
    if any(len(segment.encode()) > NAME_MAX for segment in path.split("/")):
        return f"has a name of more than {NAME_MAX} bytes"
    return ""


def _stat(found: Found) -> Stat:
    return Stat(found.size_bytes, found.mtime_ns, f"{found.identity}-{found.size_bytes:x}-{found.mtime_ns:x}")
