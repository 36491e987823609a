"""The copy of a large file, chunk by chunk: gone on with after an interruption, from one source or several at once.

Given     sources, best first; a target that writes ranges; the strong checksum the catalogue knows; the lineage.
Returns   Copied, as replica.storage.copy; `moved_bytes` tells what this attempt had to move.
Promises  all that replica.storage.copy promises, and: what an interrupted attempt wrote is used again, by any worker,
          from any source; bytes of several sources are never mixed unnoticed; only what differs is moved again.
Partner   replica.storage.chunks keeps the map, parts and parts_local write and read back; workers.carrying asks.

What is proven, and how
    chunk      its xxh3_128 is computed while the source is read, and again from what the target gives back: each byte
               that is published was read back. A chunk that differs is moved once more, then the target is given up.
    whole      xxh3_128 (and sha256 or md5, where the catalogue knows nothing better) cannot be combined from chunks,
               so it is computed by that same reading back, which goes through the file in order behind the writers. It
               must be the catalogue's. No byte is read a second time for it.
    adler32    combined from the chunks' values; must be the catalogue's too, where it knows one.

Bytes of several sources
    Sources of one file are one file only if the catalogue's checksum says so in the end. If it does not, each chunk
    that did not come from the first source is compared with it and, where it differs, moved again from there; then the
    whole is read once more. If it still differs, the bytes are that source's and it is to blame; the next one is
    compared. So one bad source among several costs the chunks that are bad. Without a strong checksum nothing could
    decide: such files are copied by replica.storage.copy from one source at a time.

Taking over, and zombies
    An attempt that died, or was declared dead, left a temporary and a map. Only attempts of the same lineage with an
    epoch not below its own may take it: a zombie cannot take what its successor builds. The temporary is renamed to a
    new name, which is atomic: of two who try, one gets it, and for a zombie the path it would publish is gone; should
    it ask for the old name, it publishes nothing. What remains is a zombie's open descriptor, through which it could
    write into the file after our proof, or even after it was published. Against that:
    -  every writer holds a lock on its open file until the last descriptor is closed. We go on in the same file only if
       we got the lock and the file was begun under this very kernel: then no descriptor that writes is left anywhere;
    -  else (a stopped process holds it, or another machine wrote it) its chunks are given to a new file of ours, shared
       by reflink or copied by the kernel within the target, and the old one is never published;
    -  either way each chunk is hashed again from the device before it counts, so what a zombie wrote into it before is
       found out; what it writes into the old file later is in no file that is published.
    Storages that look for the name at each write (memory) refuse a zombie's next write instead.

What is kept after a failure: all that is written, unless the target is at fault (a disk that failed a sync may lie the
second time, and a full one needs the room) or the whole was proven wrong. Kept temporaries are collected by age.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from replica.storage import chunks as maps
from replica.storage import faultpoints
from replica.storage.adoption import adopt, publish_proven, refuse_same
from replica.storage.base import Storage, SupportsResume
from replica.storage.chunks import MAP_SUFFIX, Chunk, Layout, Lineage, map_of, this_machine, token_of
from replica.storage.combine import adler32_combine
from replica.storage.faults import blaming
from replica.storage.judging import Control, Copied, Expected, ReadBack, changed, differs, expect_size, needed
from replica.storage.parts import ContractPart, Part, Run, Source, Tally, Whole
from replica.storage.parts_local import LocalPart
from replica.storage.pieces import closing
from replica.storage.posix import PosixStorage
from replica.storage.proof import WINDOW_BYTES
from replica.storage.threads import end_tasks
from rules.checksums import Agreement, Checksums
from rules.errors import (
    Broken,
    Busy,
    Forbidden,
    Permanent,
    ReplicaError,
    SourceMissing,
    StorageError,
    TimedOut,
    Transient,
    Unreachable,
)

#: How far writers may be ahead of the proof: what they wrote waits in memory for it.
LEAD_BYTES = 4 * WINDOW_BYTES
#: What is asked of a source in one go: of several less, so that they share the work evenly.
RUN_BYTES = 128 << 20
SHARED_RUN_BYTES = 32 << 20
#: A run is taken from a source that would need so many times longer for the rest of it than another one.
SLOWER = 2.0
LOOK_SECONDS = 0.1

_STRONG = ("xxh3_128", "sha256", "md5")
OnFailure = Callable[[Source, ReplicaError], None]


def by_chunks(target: Storage, expected: Expected) -> bool:
    """Whether a file can be put together there, and be proven in the end."""
    strong = any(expected.checksums.get(algorithm) for algorithm in _STRONG)
    return isinstance(target, SupportsResume) and strong


def resumable(target: Storage, expected: Expected | None) -> bool:
    """Whether a copy to there goes on where another one ended."""
    return expected is not None and expected.size_bytes > maps.RESUME_BYTES and by_chunks(target, expected)


async def copy_chunked(
    sources: Sequence[Source],
    target: Storage,
    target_path: str,
    *,
    lineage: Lineage,
    expected: Expected,
    control: Control | None = None,
    before_publish: Callable[[], None] | None = None,
    read_back: ReadBack = "auto",
    at_once: int = 1,
    on_failure: OnFailure | None = None,
) -> Copied:
    """Copy one file for which `resumable` holds, from its sources in turn, or from `at_once` of them at the same time.

    Idempotent. Raises the target's failure, or when every source failed the one among theirs that may pass;
    `on_failure` hears of each source that was given up.
    """
    control = control or Control()
    control.check()
    began = time.perf_counter()
    for source in sources:
        await refuse_same(source.storage, source.path, target, target_path)
    there = await adopt(target, target_path, expected, control, before_publish)
    if there is not None:
        return there
    attempt = Attempt(sources, target, lineage, expected, control, read_back, at_once, on_failure)
    return await attempt.run(target_path, before_publish, began)


@dataclass(slots=True)
class _Feed:
    """A source at work."""

    source: Source
    run: Run | None = None
    moving: asyncio.Task[None] | None = None
    #: Of the runs it finished.
    bytes_done: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        return self.bytes_done / self.seconds if self.seconds else 0.0

    def left_seconds(self, layout: Layout) -> float:
        """What the rest of its run will take, if it goes on as it began."""
        assert self.run is not None
        elapsed = time.monotonic() - self.run.began
        total = sum(layout.length(number) for number in self.run.numbers)
        return elapsed * (total - self.run.bytes_done) / max(self.run.bytes_done, 1)


class Attempt:
    """One attempt at one file. `written` and what follows from it is touched by the event loop only."""

    def __init__(
        self,
        sources: Sequence[Source],
        target: Storage,
        lineage: Lineage,
        expected: Expected,
        control: Control,
        read_back: ReadBack = "auto",
        at_once: int = 1,
        on_failure: OnFailure | None = None,
    ) -> None:
        self.layout = Layout(expected.size_bytes, maps.CHUNK_BYTES)
        #: Chunks that the temporary has, right or wrong.
        self.written: dict[int, Chunk] = {}
        #: Of them, those that another attempt or another file gave.
        self.doubted: set[int] = set()
        self.moved_bytes = 0
        self._sources = sources
        self._target = target
        self._lineage = lineage
        self._expected = expected
        self._control = control
        self._read_back = read_back
        self._at_once = max(1, at_once)
        self._on_failure = on_failure
        self._algorithms = needed(expected)
        self._whole = Whole(self._algorithms)
        self._part: Part | None = None
        self._missing: set[int] = set(range(self.layout.count))
        self._proven = 0  # chunks before this one are proven
        self._redone: set[int] = set()
        self._moved_from: dict[str, int] = {}
        self._failure: ReplicaError | None = None
        self._failed: set[int] = set()  # places of sources that are given up
        self._changed = asyncio.Event()
        self._void = False  # what is written is of no use to a later attempt

    async def run(self, target_path: str, permit: Callable[[], None] | None, began: float) -> Copied:
        published = False
        try:
            await self.begin()
            await self._fill()
            found = await self._agree()
            part = self.part
            self._control.phase = "verifying"
            await part.settle()
            await part.close()  # from here on, not even we can write to it
            faultpoints.reach("after_verify")
            exactly = Expected(self.layout.size_bytes, found)
            there = await publish_proven(self._target, part.path, target_path, exactly, self._control, permit)
            published = True
            if there is not None:
                self._void = True
                return there
            faultpoints.reach("after_publish")
            most = max(self._moved_from, key=lambda name: self._moved_from[name], default="")
            return Copied(
                self.layout.size_bytes,
                found,
                False,
                time.perf_counter() - began,
                "read back",
                moved_bytes=self.moved_bytes,
                source=most,
                moved_from=dict(self._moved_from),
            )
        except StorageError as error:
            at_target = error.side == "target" and not isinstance(error, Unreachable | TimedOut | Busy)
            self._void = self._void or at_target
            raise
        finally:
            await self._leave(published)

    @property
    def part(self) -> Part:
        if self._part is None:
            raise Broken("a copy has no temporary")
        return self._part

    # ── the temporary ────────────────────────────────────────────────────────────────────────────────────────────────

    async def begin(self) -> None:
        """Take over what an earlier attempt left, or begin anew."""
        with blaming("target"):
            for old, machine, kept in await self._earlier():
                with suppress(Forbidden):  # another user's: not ours to go on with, nor to remove
                    if self._part is None and kept:
                        await self._take(old, machine, kept)
                    else:
                        await self._discard(old)
            if self._part is None:
                self._part = await self._new()

    async def _earlier(self) -> list[tuple[str, str, dict[int, Chunk]]]:
        """Temporaries of this lineage, the fullest first, each with its map."""
        assert isinstance(self._target, SupportsResume)
        found = []
        names = await self._target.unfinished(self._lineage.prefix)
        for old in {name.removesuffix(MAP_SUFFIX) for name in names}:
            if self._lineage.may_take(old):
                machine, kept = "", dict[int, Chunk]()
                with suppress(SourceMissing, Forbidden):
                    machine, kept = maps.parse(await self._map_text(map_of(old)), self.layout)
                found.append((old, machine, kept if old in names else {}))
        return sorted(found, key=lambda one: len(one[2]), reverse=True)

    async def _map_text(self, path: str) -> bytes:
        text = bytearray()
        async with closing(self._target.read(path, 0, maps.MAP_BYTES_MAX)) as pieces:
            async for piece in pieces:
                text += piece
        return bytes(text)

    async def _take(self, old: str, machine: str, kept: dict[int, Chunk]) -> None:
        """Go on in it, or give its chunks to one of our own; neither, if somebody else was faster."""
        mine = self._lineage.new_part()
        # Before the rename: killed between the two, there is a map too many and no temporary without one.
        await self._note_head(mine, kept)
        taken: Part
        try:
            if isinstance(self._target, PosixStorage):
                taken = await LocalPart.take_over(
                    self._target, old, mine, self.layout, self._control, self._read_back, machine
                )
            else:
                assert isinstance(self._target, SupportsResume)
                alone = await self._target.take_over(old, mine)
                taken = ContractPart(self._target, mine, self.layout, self._control, alone=alone)
        except StorageError as error:
            await self._target.delete(map_of(mine))
            if isinstance(error, SourceMissing):
                return
            raise
        await self._target.delete(map_of(old))
        if taken.alone:
            self._part = taken
            for number, chunk in kept.items():
                self._keep(number, chunk)
        else:
            await taken.close()
            self._part = await self._new()
            await self.donate(mine, kept)
            await self._discard(mine)

    async def donate(self, path: str, kept: dict[int, Chunk]) -> None:
        """Have chunks from another file of the target."""
        await self.part.donate(path, kept, self._keep)
        await asyncio.sleep(0)  # what threads told is heard before we look

    def _keep(self, number: int, chunk: Chunk) -> None:
        self.written[number] = chunk
        self.doubted.add(number)
        self._missing.discard(number)
        self._count()

    async def _new(self) -> Part:
        path = self._lineage.new_part()
        if isinstance(self._target, PosixStorage):
            part: Part = await LocalPart.begin(self._target, path, self.layout, self._control, self._read_back)
        else:
            assert isinstance(self._target, SupportsResume)
            await self._target.begin(path, self.layout.size_bytes)
            part = ContractPart(self._target, path, self.layout, self._control)
        await self._note_head(path, {})
        return part

    async def _note_head(self, path: str, kept: dict[int, Chunk]) -> None:
        assert isinstance(self._target, SupportsResume)
        await self._target.append(map_of(path), maps.head(self.layout, this_machine()) + maps.lines(kept))

    async def _discard(self, path: str) -> None:
        await self._target.delete(path)
        await self._target.delete(map_of(path))

    async def _leave(self, published: bool) -> None:
        if self._part is None:
            return
        await self._part.close()
        # A failure here hides no better error: what stays is collected by age.
        with suppress(ReplicaError):
            if not published and not self._void and self.written:
                return  # the next attempt goes on from here
            await self._target.delete(self._part.path)
            await self._target.delete(map_of(self._part.path))

    # ── moving ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _fill(self) -> None:
        """Until every chunk is written and proven."""
        proving = asyncio.create_task(self._prove())
        feeding: dict[asyncio.Task[None], int] = {}
        feeds: dict[int, _Feed] = {}
        try:
            while not proving.done():
                waiting = [n for n in range(len(self._sources)) if n not in self._failed and n not in feeds]
                for place in waiting[: self._at_once - len(feeding)]:
                    feeds[place] = feed = _Feed(self._sources[place])
                    feeding[asyncio.create_task(self._feed(feed, feeds))] = place
                if not feeding and self._missing and len(self._failed) == len(self._sources):
                    raise self._all_failed()
                await asyncio.wait({proving, *feeding}, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
                self._control.check()
                for task in [task for task in feeding if task.done()]:
                    place = feeding.pop(task)
                    del feeds[place]
                    self._ended(place, task)
            proving.result()
        finally:
            tasks = [proving, *feeding, *(f.moving for f in feeds.values() if f.moving is not None)]
            await end_tasks(tasks)

    def _ended(self, place: int, task: asyncio.Task[None]) -> None:
        """A feed ends only by an error: a source's costs the source, any other the attempt."""
        error = task.exception()
        if not isinstance(error, StorageError) or error.side != "source":
            raise error or Broken("a source ended before the file did")
        self._give_up(place, error)

    def _give_up(self, place: int, error: ReplicaError) -> None:
        self._failed.add(place)
        passing = isinstance(self._failure, Transient) and isinstance(error, Permanent)
        if not passing:  # of several failures the one that may pass is told: while it may, not all is lost
            self._failure = error
        if self._on_failure is not None:
            self._on_failure(self._sources[place], error)

    def _all_failed(self) -> ReplicaError:
        return self._failure or SourceMissing(f"{self._target.name}: no source was given", side="source")

    async def _feed(self, feed: _Feed, feeds: dict[int, _Feed]) -> None:
        """Runs from one source, for as long as there are any."""
        token = await self._token(feed.source)
        while True:
            numbers = self._next_run() or await self._from_a_slower_one(feed, feeds)
            if not numbers:
                await self._wait(LOOK_SECONDS)
                continue
            feed.run = run = Run(feed.source, token, numbers)
            feed.moving = asyncio.create_task(self._move(run))
            try:
                await asyncio.wait([feed.moving])
            finally:
                feed.moving.cancel()
            left = [number for number in numbers if number not in self.written]
            feed.bytes_done += run.bytes_done
            feed.seconds += time.monotonic() - run.began
            feed.run = None
            if run.abandoned:
                continue  # another source has them now
            self._missing.update(left)
            self._tell()
            if feed.moving.cancelled():
                raise asyncio.CancelledError
            feed.moving.result()

    async def _move(self, run: Run) -> None:
        await self.part.fetch(run, lambda number, chunk: self._wrote(run, number, chunk))
        await asyncio.sleep(0)  # what threads told is heard before the run counts as ended
        if not run.abandoned and await self._token(run.source) != run.token:
            with blaming("source"):
                raise changed(run.source.storage, run.source.path)

    async def _token(self, source: Source) -> str:
        with blaming("source"):
            found = await source.storage.stat(source.path)
            expect_size(source.storage, source.path, found.size_bytes, self._expected)
        return token_of(source.storage.url, source.path, found.etag)

    def _next_run(self) -> list[int]:
        """The first missing chunks in a row, not too far ahead of the proof."""
        if not self._missing:
            return []
        first = min(self._missing)
        chunk_bytes = self.layout.chunk_bytes
        run_bytes = RUN_BYTES if self._at_once == 1 else SHARED_RUN_BYTES
        beyond = min(first + max(1, run_bytes // chunk_bytes), self._proven + max(1, LEAD_BYTES // chunk_bytes))
        numbers = []
        for number in range(first, beyond):
            if number not in self._missing:
                break
            numbers.append(number)
        self._missing.difference_update(numbers)
        return numbers

    async def _from_a_slower_one(self, feed: _Feed, feeds: dict[int, _Feed]) -> list[int]:
        """What is left of the run of a source that this one would overtake. Nobody writes to it when this returns."""
        for other in feeds.values():
            run, moving = other.run, other.moving
            if other is feed or run is None or moving is None or run.abandoned or not feed.rate:
                continue
            left = [number for number in run.numbers if number not in self.written]
            would_take = sum(self.layout.length(number) for number in left) / feed.rate
            if left and other.left_seconds(self.layout) > SLOWER * would_take + LOOK_SECONDS:
                run.abandon()
                moving.cancel()
                await asyncio.wait([moving])
                return [number for number in left if number not in self.written]
        return []

    def _wrote(self, run: Run, number: int, chunk: Chunk) -> None:
        self.written[number] = chunk
        length = self.layout.length(number)
        self.moved_bytes += length
        name = run.source.storage.name
        self._moved_from[name] = self._moved_from.get(name, 0) + length
        self._count()

    def _count(self) -> None:
        self._control.bytes_done = min(self.layout.size_bytes, len(self.written) * self.layout.chunk_bytes)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait(self, seconds: float) -> None:
        """Until something changed, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # wait_for of Python 3.11 may swallow a cancellation
                await self._changed.wait()

    # ── proving ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _prove(self) -> None:
        """Read back in order, a window behind the writers; what differs is moved again, once."""
        window = max(1, WINDOW_BYTES // self.layout.chunk_bytes)
        while self._proven < self.layout.count:
            numbers = range(self._proven, min(self.layout.count, self._proven + window))
            while any(number not in self.written for number in numbers):
                await self._wait(1.0)
            if numbers.stop == self.layout.count:
                self._control.phase = "verifying"
                faultpoints.reach("after_write")
            differing = await self.part.prove(numbers, self.written, self._whole, self.doubted)
            self._proven = numbers.stop if differing is None else differing
            if differing is not None:
                self._redo(differing)
            self._tell()

    def _redo(self, number: int) -> None:
        if number not in self.doubted:
            if number in self._redone:
                told = f"{number} other than it was written, twice"
                raise differs(self._target, self.part.path, "chunk", told, self.written[number].xxh3_128, "target")
            self._redone.add(number)
        self.doubted.discard(number)
        del self.written[number]
        self._missing.add(number)
        self._control.phase = "moving"

    # ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _checksums(self) -> Checksums:
        adler = 1
        for number in range(self.layout.count):
            adler = adler32_combine(adler, self.written[number].adler32, self.layout.length(number))
        return Checksums.of(self._whole.values() | {"adler32": f"{adler:08x}"})

    async def _agree(self) -> Checksums:
        """The whole is the catalogue's; else what differs from a source is moved again from there."""
        found = self._checksums()
        if found.compare(self._expected.checksums) is Agreement.AGREE:
            return found
        for place, source in enumerate(self._sources):
            if place in self._failed:
                continue
            try:
                differing = await self._as_at(source)
            except StorageError as error:
                if error.side != "source":
                    raise
                self._give_up(place, error)
                continue
            if differing:
                self._proven, self._whole = 0, Whole(self._algorithms)
                await self._fill()
                found = self._checksums()
                if found.compare(self._expected.checksums) is Agreement.AGREE:
                    return found
            self._give_up(place, self._wrong(source, found))
        self._void = True  # every source that answered was compared, and none has the catalogue's bytes
        raise self._all_failed()

    async def _as_at(self, source: Source) -> bool:
        """Have every chunk as this source has it; whether any was not."""
        token = await self._token(source)
        differing = False
        for number in range(self.layout.count):
            chunk = self.written[number]
            if chunk.source == token:
                continue
            with blaming("source"):
                there = await self._at_source(source, token, number)
            if there.xxh3_128 != chunk.xxh3_128:
                differing = True
                await self._move(Run(source, token, [number]))
                self.doubted.discard(number)
            else:
                self.written[number] = there
        return differing

    async def _at_source(self, source: Source, token: str, number: int) -> Chunk:
        begin, end = self.layout.span(number)
        tally = Tally()
        async with closing(source.storage.read(source.path, begin, end - begin)) as pieces:
            async for piece in pieces:
                self._control.check()
                tally.update(piece)
        return tally.chunk(token)

    def _wrong(self, source: Source, found: Checksums) -> ReplicaError:
        for known in self._expected.checksums:
            value = found.get(known.algorithm)
            if value is not None and value != known.value:
                return differs(source.storage, source.path, known.algorithm, value, known.value, "source")
        return Broken("checksums differ, and none of them does")
