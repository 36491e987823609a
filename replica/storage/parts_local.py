"""A temporary that is filled chunk by chunk on a folder's disk: one descriptor, held and locked for the whole copy.

Given     a folder as the target; sources of any kind, folders of this machine by the short way.
Returns   as replica.storage.parts.
Promises  chunks that this attempt wrote are read back from the kernel's memory and then written out, or from the device
          if that is asked for; those of others always from the device. A temporary may be published only if we have the
          lock on it and it was begun on this machine since it was started.
Partner   replica.storage.unfinished opens, locks and takes over; replica.storage.proof says what reading back proves.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial

import xxhash

from replica.storage import faultpoints, unfinished
from replica.storage.base import Piece
from replica.storage.chunks import Chunk, Layout, line, map_of, this_machine, token_of
from replica.storage.copy_local import read_hashing, still
from replica.storage.faults import blaming, translated
from replica.storage.hashing import STRIDE_BYTES, adler32
from replica.storage.judging import COPYING, Control, ReadBack, changed, differs
from replica.storage.parts import Done, Run, Tally, Whole, fetch_stream
from replica.storage.posix import PIECE_BYTES, PosixStorage, drop_cache, write_out
from replica.storage.proof import forget
from replica.storage.threads import in_thread, run
from replica.storage.tree import stat_of

#: The kernel cannot copy between these two files by itself.
_BY_HAND = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY)


class LocalPart:
    def __init__(
        self,
        target: PosixStorage,
        path: str,
        descriptor: int,
        layout: Layout,
        control: Control,
        *,
        alone: bool,
        from_device: bool,
    ) -> None:
        self.target = target
        self.path = path
        self.alone = alone
        self._descriptor = descriptor
        self._layout = layout
        self._control = control
        self._from_device = from_device
        self._map = -1
        self._abandoned = False  # nobody waits for our threads' results any more

    @classmethod
    async def begin(
        cls, target: PosixStorage, path: str, layout: Layout, control: Control, read_back: ReadBack
    ) -> LocalPart:
        descriptor = await run(partial(target.tree.create_part, path, layout.size_bytes), undo=os.close)
        unfinished.lock(descriptor)  # without locks here, no later attempt will get one either
        return cls(target, path, descriptor, layout, control, alone=True, from_device=read_back == "device")

    @classmethod
    async def take_over(
        cls,
        target: PosixStorage,
        path: str,
        mine: str,
        layout: Layout,
        control: Control,
        read_back: ReadBack,
        machine: str,
    ) -> LocalPart:
        descriptor, locked = await run(
            partial(unfinished.take_over, target.tree, path, mine), undo=lambda taken: os.close(taken[0])
        )
        alone = locked and machine == this_machine()
        return cls(target, mine, descriptor, layout, control, alone=alone, from_device=read_back == "device")

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def fetch(self, wanted: Run, done: Done) -> None:
        await self._open_map()
        if isinstance(wanted.source.storage, PosixStorage):
            await run(partial(self._fetch, wanted, _from_thread(done)), executor=COPYING, on_cancel=wanted.abandon)
        else:
            with blaming("target"):
                await fetch_stream(wanted, self._layout, self._control, self._write, self._note_soon, done)

    def _fetch(self, wanted: Run, done: Done) -> None:
        source, storage = wanted.source, wanted.source.storage
        assert isinstance(storage, PosixStorage)
        with blaming("source"):
            reading = storage.tree.open(source.path)
        try:
            before = stat_of(os.fstat(reading))
            with blaming("source"):
                if token_of(storage.url, source.path, before.etag) != wanted.token:
                    raise changed(storage, source.path)
            buffer = memoryview(bytearray(PIECE_BYTES))
            with suppress(OSError):
                os.posix_fadvise(reading, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for number in wanted.numbers:
                tally = Tally()
                at, end = self._layout.span(number)
                while at < end:
                    self._control.check()
                    if wanted.abandoned:
                        return
                    with translated(storage.name, source.path, "source"):
                        count = read_hashing(reading, buffer[: min(PIECE_BYTES, end - at)], tally.update, at)
                    if not count:
                        with blaming("source"):
                            raise changed(storage, source.path)
                    with translated(self.target.name, self.path, "target"):
                        unfinished.write_all_at(self._descriptor, faultpoints.through(buffer[:count]), at)
                    at += count
                    wanted.bytes_done += count
                chunk = tally.chunk(wanted.token)
                self._note(line(number, chunk))
                faultpoints.reach("chunk")
                done(number, chunk)
            with blaming("source"):
                still(storage, source.path, reading, before.etag)
        finally:
            os.close(reading)

    async def _write(self, offset: int, pieces: AsyncIterator[Piece]) -> None:
        async for piece in pieces:
            with translated(self.target.name, self.path, "target"):
                await in_thread(unfinished.write_all_at, self._descriptor, memoryview(piece), offset)
            offset += len(piece)

    async def donate(self, path: str, chunks: Mapping[int, Chunk], done: Done) -> None:
        await self._open_map()
        await run(partial(self._donate, path, chunks, _from_thread(done)), executor=COPYING, on_cancel=self._abandon)

    def _donate(self, path: str, chunks: Mapping[int, Chunk], done: Done) -> None:
        with blaming("target"):
            giving = self.target.tree.open(path)
        try:
            for number, chunk in sorted(chunks.items()):
                self._control.check()
                if self._abandoned:
                    return
                with translated(self.target.name, self.path, "target"):
                    copy_range(giving, self._descriptor, *self._layout.span(number))
                self._note(line(number, chunk))
                done(number, chunk)
        finally:
            os.close(giving)

    def _abandon(self) -> None:
        self._abandoned = True

    # ── the map ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _open_map(self) -> None:
        if self._map < 0:
            self._map = await run(
                partial(unfinished.open_to_append, self.target.tree, map_of(self.path)), undo=os.close
            )

    def _note(self, text: bytes) -> None:
        with translated(self.target.name, map_of(self.path), "target"):
            os.write(self._map, text)

    async def _note_soon(self, text: bytes) -> None:
        await in_thread(self._note, text)

    # ── proving ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def prove(
        self, numbers: Sequence[int], claimed: Mapping[int, Chunk], whole: Whole, doubted: Collection[int]
    ) -> int | None:
        wanted = {number: claimed[number] for number in numbers}
        from_device = self._from_device or any(number in doubted for number in numbers)
        return await run(partial(self._prove, wanted, whole, from_device), executor=COPYING, on_cancel=self._abandon)

    def _prove(self, wanted: Mapping[int, Chunk], whole: Whole, from_device: bool) -> int | None:
        descriptor = self._descriptor
        begin, end = self._layout.span(min(wanted))[0], self._layout.span(max(wanted))[1]
        with translated(self.target.name, self.path, "target"):
            if from_device:
                os.utime(descriptor)  # it is worked on, whoever collects old ones should see
                write_out(descriptor, begin, end)
                forget(descriptor, begin, end)
            buffer = memoryview(bytearray(STRIDE_BYTES))
            for number, chunk in wanted.items():
                mark, found, adler = whole.mark(), xxhash.xxh3_128(), 1
                at, stop = self._layout.span(number)
                while at < stop:
                    self._control.check()
                    if self._abandoned:
                        return None
                    count = os.preadv(descriptor, [buffer[: min(STRIDE_BYTES, stop - at)]], at)
                    if not count:
                        break
                    found.update(buffer[:count])
                    whole.update(buffer[:count])
                    if from_device:  # of these a map told it, not we
                        adler = adler32(buffer[:count], adler)
                    at += count
                differs_from_map = from_device and adler != chunk.adler32
                if at < stop or found.hexdigest() != chunk.xxh3_128 or differs_from_map:
                    whole.back_to(mark)
                    return number
            if not from_device:
                # Written out now so that the last sync finds little, forgotten so that the pages serve the next window.
                write_out(descriptor, begin, end)
                drop_cache(descriptor, begin, end - begin)
        return None

    async def settle(self) -> None:
        with translated(self.target.name, self.path, "target"):
            await in_thread(os.fsync, self._descriptor)
            size_bytes = os.fstat(self._descriptor).st_size
        if size_bytes != self._layout.size_bytes:
            raise differs(self.target, self.path, "size", str(size_bytes), str(self._layout.size_bytes), "target")

    async def close(self) -> None:
        for descriptor in (self._descriptor, self._map):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._map = -1


def _from_thread(done: Done) -> Done:
    """Called in a thread, heard in the event loop."""
    loop = asyncio.get_running_loop()

    def tell(number: int, chunk: Chunk) -> None:
        loop.call_soon_threadsafe(done, number, chunk)

    return tell


def copy_range(giving: int, taking: int, begin: int, end: int) -> None:
    """Bytes from one file to the same place of another: shared (reflink) or copied by the kernel where it can."""
    while begin < end:
        try:
            count = os.copy_file_range(giving, taking, end - begin, begin, begin)
        except OSError as error:
            if error.errno not in _BY_HAND:
                raise
            piece = os.pread(giving, min(PIECE_BYTES, end - begin), begin)
            unfinished.write_all_at(taking, memoryview(piece), begin)
            count = len(piece)
        if not count:
            return  # shorter than thought; reading back will say so
        begin += count
