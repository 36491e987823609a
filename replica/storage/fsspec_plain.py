"""Whatever else Python's fsspec can speak to: `fsspec+PROTOCOL://…`, with what all of its file systems have in common.

Given     a URL as fsspec reads it after the `fsspec+`; every key of the endpoint's table in the credentials file goes
          to the file system as an option (`KEY_file` names a file that holds it), but for `rename_is_atomic`.
Returns   the storage contract: a source of copies always, a target only where that can be safe.
Promises  reading, looking and listing: as the contract says, as far as the file system tells the truth. An endpoint to
          be read needs nothing written there; while its folder is missing or empty it is Unreachable.

    Writing is refused (Forbidden) unless the site's administrator declares `rename_is_atomic = "yes"`, because fsspec
    cannot say it: for most of its file systems a "move" copies and deletes, and shows half of a file meanwhile. Those
    are refused whatever is declared, as is one that fails the trial of `prepare`: creating a name twice must fail.
    Where writing is allowed, these are the bounds:

    durable     fsspec has no sync: what `write` and `publish` return from is at the server, not necessarily on its
                disk. A power cut there may lose it; the next check of the endpoint finds that.
    publish     fsspec's moves replace or refuse, as the server likes. So the name is claimed first, by creating it
                exclusively with a short text in it (`_CLAIM`), and only that claim is replaced. Others may see the
                text for a moment; Replica takes it for nothing. How exclusive the creation is, the file system
                decides: some only look first. A claim that a worker left by dying is taken away after
                CLAIM_STALE_SECONDS.
    checksum    None always: fsspec's is a token, not a digest. Everything is read back.
    etag        of size, time and what else the listing has (etag, version, inode): of the size alone if it has none.
    temporaries whose file system tells no times are never collected.
    time        fsspec bounds no call; give the file system's own option for it (often `timeout`).

Partner   replica.storage.registry, which does not let it near `file` and `memory`: fsspec's `file` follows symbolic
          links out of the endpoint and syncs nothing; the adapters of Replica's own do better.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
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
from replica.storage.credentials import Settings, secret
from replica.storage.faults import from_os_error, place
from replica.storage.refusals import being_published, exists_already, not_all_kept
from replica.storage.sentinel import SENTINEL_BYTES_MAX, is_anothers, owner_in, refuse_anothers, sentinel_of
from replica.storage.threads import run
from rules.errors import (
    Forbidden,
    Refused,
    ReplicaError,
    Side,
    SourceMissing,
    Transient,
    Unreachable,
)

PIECE_BYTES = 4 << 20
CLAIM_STALE_SECONDS = 300
_CLAIM = b"This name is being published by Replica; the file comes in a moment.\n"
_CLAIM_WAIT_SECONDS = 2.0
_CLAIM_LOOK_SECONDS = 0.05
_ATOMIC = "rename_is_atomic"

#: fsspec's file systems raise these classes, often without a number.
_NUMBERS: tuple[tuple[type[OSError], int], ...] = (
    (FileNotFoundError, errno.ENOENT),
    (FileExistsError, errno.EEXIST),
    (IsADirectoryError, errno.EISDIR),
    (NotADirectoryError, errno.ENOTDIR),
    (PermissionError, errno.EACCES),
    (TimeoutError, errno.ETIMEDOUT),
    (ConnectionError, errno.EHOSTUNREACH),
)
_TIMES = ("mtime", "modified", "LastModified", "last_modified", "modify", "updated", "last_write_time")
_VERSIONS = ("etag", "ETag", "e_tag", "version", "version_id", "generation", "ino", "md5", "content_hash")

T = TypeVar("T")
Info = dict[str, Any]
Infos = list[tuple[str, Info]]

_asking = ThreadPoolExecutor(max_workers=16, thread_name_prefix="fsspec")


async def _in_thread(call: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    return await run(call, executor=_asking, undo=undo)


def file_system_of(protocol: str, url: str, settings: Settings) -> tuple[Any, str]:
    """The file system and the folder in it. Its cache of listings, and fsspec's of file systems, stay unused."""
    import fsspec

    names = {key.removesuffix("_file") for key in settings} - {_ATOMIC}
    options = {name: secret(settings, name) for name in names}
    kind = fsspec.get_filesystem_class(protocol)
    told = kind._get_kwargs_from_urls(url)
    made = kind(**{**told, **options}, skip_instance_cache=True, use_listings_cache=False)
    return made, kind._strip_protocol(url)


def renames(file_system: Any) -> bool:
    """Has it a rename of its own, or only fsspec's, which copies and deletes?"""
    from fsspec import AbstractFileSystem

    return type(file_system).mv is not AbstractFileSystem.mv


class FsspecStorage:
    def __init__(
        self, opened: Callable[[], tuple[Any, str]], *, declared: bool = False, name: str = "", url: str = ""
    ) -> None:
        self.name = name
        self.url = url
        self._opened = opened
        self._declared = declared
        self._known: tuple[Any, str] | None = None

    @classmethod
    def of(cls, protocol: str, url: str, settings: Settings, *, name: str, full_url: str) -> FsspecStorage:
        declared = settings.get(_ATOMIC) == "yes"
        return cls(partial(file_system_of, protocol, url, settings), declared=declared, name=name, url=full_url)

    # ── the endpoint's folder ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def fs(self) -> Any:
        return self._open()[0]

    def _open(self) -> tuple[Any, str]:
        if self._known is None:
            try:
                with _told(self.name, ""):
                    made, root = self._opened()
            except ImportError as error:
                raise self._gone(f"fsspec lacks a library for it: {error}", "install what it names") from None
            self._known = made, root.rstrip("/")
        return self._known

    def _at(self, path: str) -> str:
        return f"{self._open()[1]}/{path}" if path else self._open()[1]

    async def prepare(self) -> None:
        await _in_thread(self._prepare)

    def _prepare(self) -> None:
        if not self._declared:
            self._reach()
            return
        self._writable("")
        with _told(self.name, SENTINEL):
            self.fs.makedirs(self._at(PARTS), exist_ok=True)
            self._try_exclusive()
            try:
                self._put(SENTINEL, sentinel_of(self.name))
            except FileExistsError:
                refuse_anothers(self._owner(), self.name, self.url)

    def _try_exclusive(self) -> None:
        trial = f"{PARTS}/trial.{secrets.token_hex(8)}"
        try:
            self._put(trial, b"first")
            self._put(trial, b"second")
        except FileExistsError:
            return
        except (ValueError, NotImplementedError):
            pass  # it knows no exclusive creation
        finally:
            with suppress(OSError):
                self.fs.rm_file(self._at(trial))
        raise Refused(
            f"{self.url}: this file system cannot create a name exclusively, so it can be no target of copies",
            hint=f"remove {_ATOMIC} from its table in the credentials file: then it is an endpoint to read from",
        )

    def _put(self, path: str, content: bytes) -> None:
        with self.fs.open(self._at(path), "xb") as file:
            file.write(content)

    def _owner(self) -> str:
        with self.fs.open(self._at(SENTINEL), "rb") as file:
            return owner_in(file.read(SENTINEL_BYTES_MAX)) or ""

    def _reach(self) -> None:
        """Unreachable, if the folder is not the endpoint's: the disk behind it is not mounted, or is another's."""
        with _told(self.name, ""):
            try:
                if not self._declared:
                    if not self.fs.ls(self._at(""), detail=False):
                        raise self._gone("its folder is empty; its disk is perhaps not mounted")
                    return
                self.fs.info(self._at(SENTINEL))
                owner = self._owner()
            except (FileNotFoundError, NotADirectoryError):
                what = SENTINEL if self._declared else "its folder"
                raise self._gone(f"{what} is not there; its disk is perhaps not mounted") from None
        if is_anothers(owner, self.name):
            raise self._gone(f"it belongs to the endpoint {owner}")

    def _gone(self, reason: str, hint: str = "mount the disk; if it really is this one, prepare the endpoint") -> Any:
        return Unreachable(f"endpoint {self.name or self.url}: {reason}", hint=hint, endpoint=self.name)

    def _writable(self, path: str) -> None:
        if self._declared and renames(self.fs):
            return
        if self._declared:
            reason = "its file system moves by copying and deleting"
            hint = "use another kind of storage for copies that are written"
        else:
            reason = "nobody declared that its renames are atomic"
            hint = f'if they are, write {_ATOMIC} = "yes" into its table in the credentials file'
        raise Forbidden(
            f"endpoint {self.name or self.url} is for reading only: {reason}",
            hint=hint,
            endpoint=self.name,
            path=path,
            side="target",
        )

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stat(self, path: str) -> Stat:
        return _stat(await _in_thread(partial(self._file, check_readable(path))))

    def _file(self, path: str) -> Info:
        """What is known of the regular file of that name. SourceMissing, Forbidden."""
        with _told(self.name, path):
            try:
                found: Info = self.fs.info(self._at(path))
            except (FileNotFoundError, NotADirectoryError):
                self._reach()  # missing it is only if the endpoint is there
                raise
            if self._is_claim(path, found):
                raise FileNotFoundError(errno.ENOENT, "a name that is being published")
            if problem := _problem(path, found):
                raise Forbidden(
                    f"{place(self.name, path)} is no regular file ({problem})",
                    hint="Replica keeps regular files only",
                    endpoint=self.name,
                    path=path,
                )
            return found

    def _is_claim(self, path: str, found: Info) -> bool:
        if found["type"] != "file" or found["size"] != len(_CLAIM):
            return False
        with self.fs.open(self._at(path), "rb") as file:
            return bool(file.read() == _CLAIM)

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        check_prefix(prefix)
        await _in_thread(self._reach)
        folders = [prefix]
        while folders:
            folder = folders.pop()
            for path, found in await _in_thread(partial(self._folder, folder)):
                problem = _problem(path, found)
                if found["type"] == "directory" and not found.get("islink"):
                    folders.append(path)
                elif await _in_thread(partial(self._is_claim, path, found)):
                    yield Entry(path, found["size"], _mtime_ns(found), "a publication that was not finished")
                else:
                    yield Entry(path, found["size"] or 0, _mtime_ns(found), problem)
        await _in_thread(self._reach)  # folders that went away with their disk were no empty ones

    def _folder(self, folder: str) -> Infos:
        with _told(self.name, folder):
            beneath = self._at(folder) + "/"
            try:
                found = self.fs.ls(self._at(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []  # went away, or was replaced by a file: either is as good as seen before or after
            names = [(str(info["name"]).rstrip("/"), info) for info in found]
            paths = [(name.removeprefix(beneath), info) for name, info in names if name.startswith(beneath)]
            entries = [(f"{folder}/{name}" if folder else name, info) for name, info in paths]
            return [(path, info) for path, info in entries if path != OWN]

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        found = await _in_thread(partial(self._file, check_readable(path)))
        end = found["size"] if length is None else min(found["size"], offset + length)
        if offset >= end:
            return
        file = await _in_thread(partial(self._begin_reading, path, offset), undo=_let_go)
        try:
            while offset < end:
                piece = await _in_thread(partial(self._piece, path, file, min(PIECE_BYTES, end - offset)))
                if not piece:
                    return  # it became shorter meanwhile; the caller counts
                offset += len(piece)
                yield piece
        finally:
            await _in_thread(partial(_let_go, file))

    def _begin_reading(self, path: str, offset: int) -> Any:
        with _told(self.name, path):
            file = self.fs.open(self._at(path), "rb", block_size=PIECE_BYTES)
            file.seek(offset)
            return file

    def _piece(self, path: str, file: Any, length: int) -> bytes:
        with _told(self.name, path):
            return bytes(file.read(length))

    async def checksum(self, path: str, algorithm: str) -> str | None:
        await self.stat(path)
        return None

    async def space(self) -> Space | None:
        await _in_thread(self._reach)
        return None

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        check_part(temporary)
        file = await _in_thread(partial(self._create, temporary), undo=_let_go)
        written = 0
        try:
            async for chunk in chunks:
                written += len(chunk)
                await _in_thread(partial(self._append, temporary, file, bytes(chunk)))
        except BaseException:
            await _in_thread(partial(_let_go, file))
            raise
        await _in_thread(partial(self._finish, temporary, file, written))

    def _create(self, temporary: str) -> Any:
        self._writable(temporary)
        self._reach()
        with _told(self.name, temporary, "target"):
            self.fs.makedirs(self._at(PARTS), exist_ok=True)
            return self.fs.open(self._at(temporary), "xb", block_size=PIECE_BYTES)

    def _append(self, temporary: str, file: Any, content: bytes) -> None:
        with _told(self.name, temporary, "target"):
            file.write(content)

    def _finish(self, temporary: str, file: Any, written: int) -> None:
        with _told(self.name, temporary, "target"):
            file.close()
            kept = self.fs.info(self._at(temporary))["size"]
        if kept != written:
            raise not_all_kept(self.name, temporary, kept_bytes=kept, written_bytes=written)

    async def publish(self, temporary: str, final: str) -> None:
        await _in_thread(partial(self._publish, check_part(temporary), check_path(final)))

    def _publish(self, temporary: str, final: str) -> None:
        self._writable(final)
        self._reach()
        with _told(self.name, final, "target"):
            part = self.fs.info(self._at(temporary))
            self.fs.makedirs(self._at(final.rpartition("/")[0]), exist_ok=True)
            self._claim(final, _mtime_ns(part))
            try:
                self.fs.mv(self._at(temporary), self._at(final))
            except OSError as error:
                self._take_away_claim(final)
                if not isinstance(error, FileExistsError):
                    raise
                self.fs.mv(self._at(temporary), self._at(final))  # it refuses by itself to replace, even a claim

    def _claim(self, final: str, written_ns: int) -> None:
        """Make the name ours, or TargetExists. Another's claim is waited for a moment, for it becomes a file."""
        deadline = time.monotonic() + _CLAIM_WAIT_SECONDS
        while True:
            try:
                self._put(final, _CLAIM)
                return
            except FileExistsError:
                pass
            with suppress(FileNotFoundError):
                found = self.fs.info(self._at(final))
                # A claim that is being written has not got all of its text.
                if not self._is_claim(final, found) and (found["size"] or time.monotonic() > deadline):
                    raise exists_already(self.name, final)
                # By the server's clock alone: our temporary was written so long after the claim was made.
                if found["size"] and written_ns - _mtime_ns(found) > CLAIM_STALE_SECONDS * 10**9:
                    self._take_away_claim(final)
                elif time.monotonic() > deadline:
                    raise being_published(self.name, final, CLAIM_STALE_SECONDS)
            time.sleep(_CLAIM_LOOK_SECONDS)

    def _take_away_claim(self, final: str) -> None:
        """By a rename first: should a file have come in the claim's place meanwhile, it is in quarantine, not lost."""
        with suppress(FileNotFoundError):
            if not self._is_claim(final, self.fs.info(self._at(final))):
                return
            away = f"{QUARANTINE}/{secrets.token_hex(8)}"
            self.fs.makedirs(self._at(QUARANTINE), exist_ok=True)
            self.fs.mv(self._at(final), self._at(away))
            if self._is_claim(away, self.fs.info(self._at(away))):
                self.fs.rm_file(self._at(away))

    async def delete(self, path: str) -> None:
        await _in_thread(partial(self._delete, check_readable(path)))

    def _delete(self, path: str) -> None:
        self._reach()
        with suppress(SourceMissing):
            self._file(path)
            self._writable(path)
            with _told(self.name, path):
                self.fs.rm_file(self._at(path))  # not `rm`, which reads '*' as any name

    async def quarantine(self, path: str) -> str:
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{check_path(path)}"
        await _in_thread(partial(self._quarantine, path, away))
        return away

    def _quarantine(self, path: str, away: str) -> None:
        self._reach()
        self._file(path)
        self._writable(path)
        with _told(self.name, path):
            self.fs.makedirs(self._at(away.rpartition("/")[0]), exist_ok=True)
            self.fs.mv(self._at(path), self._at(away))

    async def collect_parts(self, older_than_seconds: float) -> int:
        return await _in_thread(partial(self._collect_parts, older_than_seconds))

    def _collect_parts(self, older_than_seconds: float) -> int:
        self._reach()
        removed = 0
        for path, found in self._folder(PARTS):
            made = _mtime_ns(found) / 1e9
            if found["type"] == "file" and made and time.time() - made >= older_than_seconds:
                with suppress(SourceMissing), _told(self.name, path):
                    self.fs.rm_file(self._at(path))
                    removed += 1
        return removed

    async def close(self) -> None:
        return None


def _let_go(file: Any) -> None:
    with suppress(Exception):
        file.close()


@contextmanager
def _told(endpoint: str, path: str, side: Side = "unknown") -> Iterator[None]:
    """Within, whatever a file system raises becomes the StorageError it means. Foreign texts may hold secrets."""
    try:
        yield
    except (ReplicaError, ImportError):
        raise
    except OSError as error:
        number = error.errno or next((n for kind, n in _NUMBERS if isinstance(error, kind)), 0)
        plain = OSError(number, os.strerror(number)) if number else OSError(type(error).__name__)
        raise from_os_error(plain, endpoint=endpoint, path=path, side=side) from error
    except Exception as error:  # any library may be behind fsspec, with errors of its own
        raise Transient(
            f"{place(endpoint, path)}: its file system failed with {type(error).__name__}",
            hint="the worker's log has all of it",
            endpoint=endpoint,
            path=path,
            side=side,
        ) from error


def _problem(path: str, found: Info) -> str:
    if found.get("islink"):
        return "symbolic link"
    if found["type"] != "file" or found["size"] is None:
        return f"{found['type']}, not a file of known size"
    return "name is kept for Replica" if path.startswith(OWN) and not path.startswith(PARTS) else ""


def _stat(found: Info) -> Stat:
    versions = "-".join(str(found[key]) for key in _VERSIONS if found.get(key))
    return Stat(found["size"], _mtime_ns(found), f"{found['size']:x}-{_mtime_ns(found):x}-{versions}")


def _mtime_ns(found: Mapping[str, Any]) -> int:
    """0: the file system does not say."""
    told = next((found[key] for key in _TIMES if found.get(key)), 0)
    if isinstance(told, str):
        try:
            told = datetime.fromisoformat(told)
        except ValueError:
            return 0
    if isinstance(told, datetime):
        told = (told if told.tzinfo else told.replace(tzinfo=UTC)).timestamp()
    return int(told * 1e9) if isinstance(told, int | float) else 0
