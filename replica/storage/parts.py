"""A temporary that is filled chunk by chunk, on any storage that writes ranges.

Given     a target that SupportsResume, and runs of chunks with the source they shall come from.
Returns   each chunk, with its checksums, once it is written; what reading back finds.
Promises  a chunk is told only after the target has taken all of it, and the map has its line; no run goes beyond its
          chunks, whatever a source sends.
Partner   replica.storage.chunked decides which chunks; replica.storage.parts_local is the same for a folder's disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import xxhash

from replica.storage import faultpoints
from replica.storage.base import Piece, Storage, SupportsResume
from replica.storage.chunks import Chunk, Layout, line, map_of
from replica.storage.faults import blaming
from replica.storage.hashing import adler32
from replica.storage.judging import Control, changed, differs
from replica.storage.pieces import closing

#: Called for each chunk that is written; in the event loop or in a thread, so it must not mind.
Done = Callable[[int, Chunk], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A file that should be what is wanted."""

    storage: Storage
    path: str


@dataclass(slots=True)
class Run:
    """Chunks in a row, on their way from one source."""

    source: Source
    token: str  #: the version of the source's file
    numbers: Sequence[int]
    began: float = field(default_factory=time.monotonic)
    bytes_done: int = 0
    #: Asked to end; a thread looks at it before each piece.
    abandoned: bool = False

    def abandon(self) -> None:
        self.abandoned = True


class Tally:
    """What is kept of a chunk's bytes as they pass."""

    __slots__ = ("_adler", "_xxh3", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self._xxh3 = xxhash.xxh3_128()
        self._adler = 1

    def update(self, piece: Piece) -> None:
        self.size_bytes += len(piece)
        self._xxh3.update(piece)
        self._adler = adler32(piece, self._adler)

    def chunk(self, source: str) -> Chunk:
        return Chunk(self._xxh3.hexdigest(), self._adler, source)


class Whole:
    """What needs all bytes in order; a chunk that turns out wrong is taken back."""

    def __init__(self, algorithms: Sequence[str]) -> None:
        self._digests: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128()}
        self._digests |= {a: hashlib.new(a, usedforsecurity=False) for a in algorithms}

    def update(self, piece: Piece) -> None:
        for digest in self._digests.values():
            digest.update(piece)

    def mark(self) -> dict[str, Any]:
        return {algorithm: digest.copy() for algorithm, digest in self._digests.items()}

    def back_to(self, mark: dict[str, Any]) -> None:
        self._digests = mark

    def values(self) -> dict[str, str]:
        return {algorithm: digest.hexdigest() for algorithm, digest in self._digests.items()}


class Part(Protocol):
    """What the engine does with a temporary, wherever it lies."""

    path: str
    #: Nobody else can write into it: only then may it be published.
    alone: bool

    async def fetch(self, wanted: Run, done: Done) -> None:
        """Write a run's chunks. Errors carry their side."""

    async def donate(self, path: str, chunks: Mapping[int, Chunk], done: Done) -> None:
        """Take chunks over from another file of the same storage, at the same places; nothing of them is believed."""

    async def prove(
        self, numbers: Sequence[int], claimed: Mapping[int, Chunk], whole: Whole, doubted: Collection[int]
    ) -> int | None:
        """Read chunks in a row back, into `whole`; the first that differs, or None. `doubted` ones were not written by
        this attempt: they are read from the device."""

    async def settle(self) -> None:
        """Durable, and exactly as long as it should be."""

    async def close(self) -> None: ...


async def fetch_stream(
    run: Run,
    layout: Layout,
    control: Control,
    write: Callable[[int, AsyncIterator[Piece]], Awaitable[None]],
    note: Callable[[bytes], Awaitable[None]],
    done: Done,
) -> None:
    """A run from a source of any kind: one request for all of it, one `write` for each chunk."""
    begin, end = layout.span(run.numbers[0])[0], layout.span(run.numbers[-1])[1]
    source = run.source
    async with closing(source.storage.read(source.path, begin, end - begin)) as pieces:
        stream = Cut(pieces)
        for number in run.numbers:
            tally = Tally()
            length = layout.length(number)
            await write(layout.span(number)[0], _tallied(stream, length, tally, run, control))
            if tally.size_bytes != length:
                with blaming("source"):
                    raise changed(source.storage, source.path)
            chunk = tally.chunk(run.token)
            await note(line(number, chunk))
            faultpoints.reach("chunk")
            done(number, chunk)


async def _tallied(stream: Cut, length: int, tally: Tally, run: Run, control: Control) -> AsyncIterator[Piece]:
    while tally.size_bytes < length:
        control.check()
        with blaming("source"):
            piece = await stream.next(length - tally.size_bytes)
        if not piece:
            return
        tally.update(piece)
        yield faultpoints.through(memoryview(piece))
        run.bytes_done += len(piece)


class Cut:
    """Pieces cut where a chunk ends."""

    def __init__(self, pieces: AsyncIterator[Piece]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    async def next(self, at_most: int) -> memoryview:
        while not self._rest:
            try:
                self._rest = memoryview(await anext(self._pieces))
            except StopAsyncIteration:
                return self._rest
        piece, self._rest = self._rest[:at_most], self._rest[at_most:]
        return piece


class ContractPart:
    """A temporary on any storage that SupportsResume."""

    def __init__(self, target: Storage, path: str, layout: Layout, control: Control, *, alone: bool = True) -> None:
        assert isinstance(target, SupportsResume)
        self.target, self._ranges = target, target
        self.path = path
        self.alone = alone
        self._layout = layout
        self._control = control

    async def fetch(self, wanted: Run, done: Done) -> None:
        with blaming("target"):
            await fetch_stream(wanted, self._layout, self._control, self._write, self._note, done)

    async def _write(self, offset: int, pieces: AsyncIterator[Piece]) -> None:
        await self._ranges.write_at(self.path, offset, pieces)

    async def _note(self, text: bytes) -> None:
        await self._ranges.append(map_of(self.path), text)

    async def donate(self, path: str, chunks: Mapping[int, Chunk], done: Done) -> None:
        with blaming("target"):
            for number, chunk in sorted(chunks.items()):
                self._control.check()
                begin, end = self._layout.span(number)
                async with closing(self.target.read(path, begin, end - begin)) as pieces:
                    await self._write(begin, pieces)
                await self._note(line(number, chunk))
                done(number, chunk)

    async def prove(
        self, numbers: Sequence[int], claimed: Mapping[int, Chunk], whole: Whole, doubted: Collection[int]
    ) -> int | None:
        begin, end = self._layout.span(numbers[0])[0], self._layout.span(numbers[-1])[1]
        with blaming("target"):
            async with closing(self.target.read(self.path, begin, end - begin)) as pieces:
                stream = Cut(pieces)
                for number in numbers:
                    mark, found, left = whole.mark(), Tally(), self._layout.length(number)
                    while left and (piece := await stream.next(left)):
                        self._control.check()
                        found.update(piece)
                        whole.update(piece)
                        left -= len(piece)
                    if left or found.chunk(claimed[number].source) != claimed[number]:
                        whole.back_to(mark)
                        return number
        return None

    async def settle(self) -> None:
        with blaming("target"):
            await self._ranges.settle(self.path)
            size_bytes = (await self.target.stat(self.path)).size_bytes
        if size_bytes != self._layout.size_bytes:
            raise differs(self.target, self.path, "size", str(size_bytes), str(self._layout.size_bytes), "target")

    async def close(self) -> None:
        return None
