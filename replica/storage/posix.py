"""The POSIX backend: `file:///abs/path`.

Given     a folder.
Returns   the storage contract over replica.storage.tree, each verb in a thread.
Promises  those of the tree; a write is fsynced before it returns; a temporary is read back from the disk.
Partner   replica.storage.tree does the work; replica.storage.copy bypasses the threads for copies between two folders.

fsspec's local backend is not used: it has no fsync, moves across file systems and follows symbolic links out.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from replica.storage import unfinished
from replica.storage.base import PARTS, Entry, Piece, Space, Stat, check_path
from replica.storage.faults import translated
from replica.storage.threads import in_thread, run
from replica.storage.tree import Tree

#: Larger buffers collapse on ext4 (4 MiB: 15 % of `cp`), smaller ones cost calls.
PIECE_BYTES = 1 << 20
_ENTRIES_A_HOP = 1000


class PosixStorage:
    def __init__(self, root: str | Path, *, name: str = "", url: str = "") -> None:
        self.tree = Tree(os.fspath(root), name=name)
        self.name = name
        self.url = url or Path(root).as_uri()

    async def prepare(self) -> None:
        await in_thread(self.tree.prepare)

    async def stat(self, path: str) -> Stat:
        return await in_thread(self.tree.stat, path)

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        entries = self.tree.walk(prefix)
        try:
            while some := await in_thread(lambda: [*islice(entries, _ENTRIES_A_HOP)]):
                for entry in some:
                    yield entry
        finally:
            entries.close()

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        # Opened and read in one hand-over to a thread: for a small file that is all there is.
        begun = await run(partial(self._begin_read, path, offset, length), undo=_Begun.close)
        try:
            buffer, count, left = begun.buffer, begun.count, length
            while True:
                left = None if left is None else left - count
                offset += count
                if count:
                    yield buffer[:count]
                if count < len(buffer) or (left is not None and left <= 0):
                    return  # short of what was asked for: the file ends here
                if len(buffer) < PIECE_BYTES:
                    buffer = memoryview(bytearray(PIECE_BYTES))  # it has grown
                view = buffer if left is None else buffer[: min(left, PIECE_BYTES)]
                with translated(self.name, path):
                    count = await in_thread(_fill, begun.descriptor, view, offset)
                buffer = view
        finally:
            begun.close()

    def _begin_read(self, path: str, offset: int, length: int | None) -> _Begun:
        descriptor = self.tree.open(path)
        try:
            with translated(self.name, path):
                if path.startswith(PARTS + "/"):
                    drop_cache(descriptor)
                left = max(0, os.fstat(descriptor).st_size - offset) + 1  # one more, to see that it ends there
                wanted = min(PIECE_BYTES, left if length is None else min(length, left))
                buffer = memoryview(bytearray(max(0, wanted)))
                return _Begun(descriptor, buffer, _fill(descriptor, buffer, offset) if wanted > 0 else 0)
        except BaseException:
            os.close(descriptor)
            raise

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        descriptor = await run(partial(self.tree.create_part, temporary, size_bytes), undo=os.close)
        try:
            written, synced = 0, False
            async for chunk in chunks:
                written += len(chunk)
                synced = written == size_bytes  # the last one, as far as we know: one hand-over for both
                with translated(self.name, temporary, "target"):
                    await in_thread(_write_and_sync if synced else write_all, descriptor, memoryview(chunk))
            if not synced:
                with translated(self.name, temporary, "target"):
                    await in_thread(os.fsync, descriptor)
        finally:
            os.close(descriptor)

    async def publish(self, temporary: str, final: str) -> None:
        await in_thread(self.tree.publish, temporary, final)

    async def delete(self, path: str) -> None:
        await in_thread(self.tree.delete, path)

    async def quarantine(self, path: str) -> str:
        return await in_thread(self.tree.quarantine, path)

    async def checksum(self, path: str, algorithm: str) -> str | None:
        await self.stat(path)
        return None  # a file system keeps none that it would vouch for; reading back is the proof

    async def space(self) -> Space | None:
        return await in_thread(self.tree.space)

    async def collect_parts(self, older_than_seconds: float) -> int:
        return await in_thread(self.tree.collect_parts, older_than_seconds)

    async def close(self) -> None:
        return None

    async def begin(self, temporary: str, size_bytes: int) -> None:
        os.close(await run(partial(self.tree.create_part, temporary, size_bytes), undo=os.close))

    async def write_at(self, temporary: str, offset: int, pieces: AsyncIterator[Piece]) -> None:
        descriptor = await run(partial(unfinished.open_part, self.tree, temporary), undo=os.close)
        try:
            unfinished.lock(descriptor)
            async for piece in pieces:
                with translated(self.name, temporary, "target"):
                    await in_thread(unfinished.write_all_at, descriptor, memoryview(piece), offset)
                offset += len(piece)
        finally:
            os.close(descriptor)

    async def settle(self, temporary: str) -> None:
        descriptor = await run(partial(unfinished.open_part, self.tree, temporary), undo=os.close)
        try:
            with translated(self.name, temporary, "target"):
                await in_thread(os.fsync, descriptor)
        finally:
            os.close(descriptor)

    async def append(self, temporary: str, text: bytes) -> None:
        await in_thread(unfinished.append, self.tree, temporary, text)

    async def unfinished(self, prefix: str) -> Sequence[str]:
        return await in_thread(unfinished.names, self.tree, prefix)

    async def take_over(self, temporary: str, mine: str) -> bool:
        """True where the lock says so; of other machines on the same file system it cannot speak."""
        descriptor, alone = await run(partial(unfinished.take_over, self.tree, temporary, mine))
        os.close(descriptor)
        return alone

    def local_path(self, path: str) -> Path:
        return Path(self.tree.path, check_path(path))


@dataclass(slots=True)
class _Begun:
    """A file that was opened, and its first piece."""

    descriptor: int
    buffer: memoryview
    count: int

    def close(self) -> None:
        os.close(self.descriptor)


def _fill(descriptor: int, view: memoryview, offset: int) -> int:
    """preadv() may give less than there is; this gives less only where the file ends."""
    count = 0
    while count < len(view) and (more := os.preadv(descriptor, [view[count:]], offset + count)):
        count += more
    return count


def _write_and_sync(descriptor: int, view: memoryview) -> None:
    write_all(descriptor, view)
    os.fsync(descriptor)


def write_all(descriptor: int, view: memoryview) -> None:
    """write() may take less than it was given; this does not."""
    while view:
        view = view[os.write(descriptor, view) :]


_WAIT_WRITE_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | _WRITE | _WAIT_AFTER
_sync_file_range = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)


def write_out(descriptor: int, begin: int, end: int) -> None:
    """Bring these bytes to the device, so that they can be read back from it. Durable they are only after an fsync.

    fdatasync would do, but commits the file system's journal each time, behind everybody else who syncs.
    """
    if _sync_file_range is not None:
        length = ctypes.c_int64(end - begin)
        if _sync_file_range(ctypes.c_int(descriptor), ctypes.c_int64(begin), length, _WAIT_WRITE_WAIT) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.ENOSYS, errno.EINVAL, errno.ESPIPE):
            raise OSError(code, os.strerror(code))
    os.fdatasync(descriptor)


def drop_cache(descriptor: int, offset: int = 0, length: int = 0) -> None:
    """Ask the kernel to forget clean pages, so that the next read comes from the disk. Does nothing on tmpfs."""
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
