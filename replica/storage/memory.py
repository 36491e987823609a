"""The contract in memory: `memory://name`, for tests and demonstrations.

Given     a name; all storages of one name in this process see the same files.
Returns   the storage contract, and a back door (`behind`) through which a test plays the world: losing, flipping and
          planting bytes without the storage's knowledge.
Promises  the same refusals and the same atomicity as a disk, except that nothing survives the process.
Partner   replica.storage.conformance holds it to the contract.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from replica.storage.base import (
    OWN,
    QUARANTINE,
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
from replica.storage.faults import place
from replica.storage.hashing import Hasher
from replica.storage.refusals import exists_already, no_room
from rules.checksums import ALWAYS
from rules.errors import SourceMissing, Transient, Unreachable

_PIECE_BYTES = 1 << 20
_versions = itertools.count(1)


@dataclass(slots=True)
class _File:
    content: bytes | bytearray
    mtime_ns: int = field(default_factory=time.time_ns)
    version: int = field(default_factory=lambda: next(_versions))


@dataclass
class Behind:
    """One store as the world sees it. Tests change it directly; the storage learns of nothing."""

    files: dict[str, _File] = field(default_factory=dict)
    prepared: bool = False
    #: Total size it pretends to have; None: no limit.
    total_bytes: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, path: str, content: bytes) -> None:
        self.files[path] = _File(content)

    def get(self, path: str) -> bytes | None:
        file = self.files.get(path)
        return None if file is None else bytes(file.content)

    def remove(self, path: str) -> None:
        del self.files[path]

    def flip(self, path: str, at: int = 0) -> None:
        """One bit turns, and no time stamp tells."""
        content = bytearray(self.files[path].content)
        content[at] ^= 1
        self.files[path].content = bytes(content)

    def paths(self) -> list[str]:
        return sorted(self.files)

    def vanish(self) -> None:
        """The disk is not there any more; `return_` brings it back."""
        self.prepared = False

    def return_(self) -> None:
        self.prepared = True


_stores: dict[str, Behind] = {}


def behind(store: str) -> Behind:
    """The back door of `memory://<store>`."""
    return _stores.setdefault(store, Behind())


def forget(store: str) -> None:
    """Remove a store with all its files, as a test does at its end."""
    _stores.pop(store, None)


class MemoryStorage:
    def __init__(self, store: str, *, name: str = "", url: str = "") -> None:
        self.store = store
        self.name = name
        self.url = url or f"memory://{store}"

    async def prepare(self) -> None:
        behind(self.store).prepared = True

    def _reach(self) -> Behind:
        store = behind(self.store)
        if not store.prepared:
            raise Unreachable(
                f"endpoint {self.name or self.url}: nothing of that name was prepared in this process",
                hint="memory storages do not survive the process; prepare the endpoint again",
                endpoint=self.name,
            )
        return store

    def _file(self, path: str) -> _File:
        check_readable(path)
        file = self._reach().files.get(path)
        if file is None:
            raise SourceMissing(f"{place(self.name, path)}: no such file", endpoint=self.name, path=path)
        return file

    async def stat(self, path: str) -> Stat:
        file = self._file(path)
        return Stat(len(file.content), file.mtime_ns, f"{file.version:x}")

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        check_prefix(prefix)
        folder = f"{prefix}/" if prefix else ""
        for path, file in [*self._reach().files.items()]:
            if path.startswith(folder) and not path.startswith(f"{OWN}/"):
                yield Entry(path, len(file.content), file.mtime_ns)

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        content = self._file(path).content
        end = len(content) if length is None else min(len(content), offset + length)
        for begin in range(offset, end, _PIECE_BYTES):
            await asyncio.sleep(0)  # a real storage lets others work here, and can be cancelled here
            piece = content[begin : min(begin + _PIECE_BYTES, end)]
            yield piece if isinstance(piece, bytes) else bytes(piece)

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        check_part(temporary)
        store = self._reach()
        if temporary in store.files:
            raise exists_already(self.name, temporary, "unknown")
        self._fit(store, temporary, size_bytes or 0)
        store.files[temporary] = _File(b"")
        content = bytearray()
        async for chunk in chunks:
            content += chunk
            self._fit(store, temporary, len(content))
        store.files[temporary] = _File(bytes(content))

    def _fit(self, store: Behind, path: str, size_bytes: int) -> None:
        free = _free(store)
        if free is not None and size_bytes > free:
            raise no_room(self.name, self.name or self.url, path, free_bytes=free, size_bytes=size_bytes)

    async def publish(self, temporary: str, final: str) -> None:
        check_part(temporary)
        check_path(final)
        store = self._reach()
        with store.lock:
            if final in store.files:
                raise exists_already(self.name, final)
            self._file(temporary)
            store.files[final] = store.files.pop(temporary)

    async def delete(self, path: str) -> None:
        check_readable(path)
        self._reach().files.pop(path, None)

    async def quarantine(self, path: str) -> str:
        check_path(path)
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{path}"
        store = self._reach()
        with store.lock:
            self._file(path)
            store.files[away] = store.files.pop(path)
        return away

    async def checksum(self, path: str, algorithm: str) -> str | None:
        """Memory is the one storage whose digest we compute ourselves, at this moment, from the bytes as they lie."""
        file = self._file(path)
        if algorithm not in ALWAYS:
            return None
        hasher = Hasher()
        hasher.update(file.content)
        return hasher.checksums().get(algorithm)

    async def space(self) -> Space | None:
        store = self._reach()
        free = _free(store)
        return None if store.total_bytes is None or free is None else Space(store.total_bytes, free)

    async def collect_parts(self, older_than_seconds: float) -> int:
        store = self._reach()
        limit = time.time_ns() - older_than_seconds * 1e9
        stale = [p for p, f in store.files.items() if p.startswith(f"{OWN}/part/") and f.mtime_ns <= limit]
        for path in stale:
            store.files.pop(path, None)
        return len(stale)

    async def close(self) -> None:
        return None

    async def begin(self, temporary: str, size_bytes: int) -> None:
        check_part(temporary)
        store = self._reach()
        if temporary in store.files:
            raise exists_already(self.name, temporary, "unknown")
        self._fit(store, temporary, size_bytes)
        store.files[temporary] = _File(b"")

    async def write_at(self, temporary: str, offset: int, pieces: AsyncIterator[Piece]) -> None:
        check_part(temporary)
        async for piece in pieces:
            file = self._unpublished(temporary)  # looked for anew each time: it may have been taken over meanwhile
            content = file.content if isinstance(file.content, bytearray) else bytearray(file.content)
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(piece)] = piece
            file.content, file.mtime_ns, file.version = content, time.time_ns(), next(_versions)
            offset += len(piece)

    def _unpublished(self, temporary: str) -> _File:
        file = self._reach().files.get(temporary)
        if file is None:
            raise Transient(f"{place(self.name, temporary)} went away", endpoint=self.name, path=temporary)
        return file

    async def settle(self, temporary: str) -> None:
        check_part(temporary)
        file = self._unpublished(temporary)
        file.content = bytes(file.content)

    async def append(self, temporary: str, text: bytes) -> None:
        check_part(temporary)
        before = self._reach().files.get(temporary)
        self._reach().files[temporary] = _File((before.content if before else b"") + text)

    async def unfinished(self, prefix: str) -> Sequence[str]:
        check_part(part_path(prefix))
        return [path for path in self._reach().files if path.startswith(part_path(prefix))]

    async def take_over(self, temporary: str, mine: str) -> bool:
        check_part(temporary)
        check_part(mine)
        store = self._reach()
        with store.lock:
            file = self._file(temporary)
            file.mtime_ns = time.time_ns()
            store.files[mine] = store.files.pop(temporary)
        return True  # whoever writes looks for the name each time


def _free(store: Behind) -> int | None:
    if store.total_bytes is None:
        return None
    return max(0, store.total_bytes - sum(len(f.content) for f in store.files.values()))
