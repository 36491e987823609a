"""The copy of one file: stream, hash, write unpublished, compare, prove, publish.

Given     two storages and a path at each, what the catalogue knows of the bytes, and a tag for the temporary.
Returns   Copied: size and checksums of bytes that are, at this moment, durable under their final name.
Promises  the final path never holds a part of a file or unproven bytes; nothing is ever overwritten; whatever goes
          wrong, the temporary is removed and the error says whose side it was; killed at any point and run again, it
          ends right.
Partner   workers.mover and replica.client run it; rules.transfers decides what follows from its errors.

The steps, for every pair of storages (`copy_file` through the contract, `copy_local` straight between two folders):

    1  something has the final name already: the same bytes are adopted, others are moved to quarantine
    2  read the source once, hashing; write what was read into a temporary on the target
    3  the source must not have changed meanwhile, and must be what the catalogue expects
    4  make the temporary durable
    5  prove it independently of what we hold in memory: the target's own digest, or read back
    6  ask for permission (`before_publish`: does the lease still live?), then rename without replacing; the same
       question comes before anything is moved to quarantine, and only the very file that was found wrong is moved
    7  make the name durable, and only then return

What reading back proves on a POSIX target depends on `read_back`:

    device  written out, forgotten by the kernel (posix_fadvise), read again: the bytes come from the device, or from
            the device's own cache; no operating system can look behind that. On tmpfs, and on network file systems that
            ignore the advice, it is no more than `cache`.
    cache   read again from the kernel's memory, then written out and synced: our buffers, hashes, offsets and short
            writes are proven, and that the kernel has the right bytes to write; not that the disk kept them. A disk
            that reports no error and keeps others is found by scrubbing.
    auto    (the default) device up to one window of 32 MiB, where the sync costs more than the proof; cache above,
            where the proof would cost more than the copy: 0.3 to 0.5 of the speed of `cp` from the device, 0.65 to
            0.8 from the cache, on a disk about as fast as `cp` (tests/benchmarks/bench_copy.py).

Large files are read back and written out in windows, one thread writing while another proves.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Literal

from replica.storage import faultpoints, servercopy
from replica.storage.base import Piece, Storage, part_path
from replica.storage.faults import blaming, from_os_error, place, translated
from replica.storage.hashing import Hasher, extra_for
from replica.storage.posix import PIECE_BYTES, PosixStorage, drop_cache, write_all, write_out
from replica.storage.threads import run
from replica.storage.tree import stat_of
from rules.checksums import ALWAYS, Agreement, Checksums
from rules.errors import (
    Broken,
    ChecksumDiffers,
    Invalid,
    ReplicaError,
    Side,
    SourceChanged,
    SourceMissing,
    StorageError,
    TargetExists,
)

#: A file is proven in windows of this size: long enough for the disk to work in large requests, short enough that the
#: pages of one window serve the next but two. A copy of any size takes about 100 MiB of cache from others, no more.
WINDOW_BYTES = 32 << 20
_WINDOWS_WAITING = 2
#: Files of one group of a batch. Each holds a descriptor open, and the first report waits for the last file.
GROUP_FILES = 256
#: How often somebody else may put a file in our way between our look and our rename.
_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Expected:
    """What the catalogue knows of a file. Without checksums, the size alone decides."""

    size_bytes: int
    checksums: Checksums


@dataclass(frozen=True, slots=True)
class Copied:
    size_bytes: int
    checksums: Checksums  #: xxh3_128 and adler32 of the bytes, always
    adopted: bool  #: the target already held these bytes: verified, not written
    seconds: float
    verified_by: str  #: "read back", or "digest <algorithm>" if the target answered one


#: What the proof of a POSIX target is read from; the module's docstring says what each one proves.
ReadBack = Literal["auto", "device", "cache"]


class Stopped(Exception):
    """The copy ended because it was asked to; nothing was published, its temporary is gone."""


class Control:
    """What a mover may ask of a running copy, and what the copy tells. Safe to use from any thread."""

    __slots__ = ("_stop", "bytes_done", "phase")

    def __init__(self) -> None:
        self._stop = False
        self.bytes_done = 0
        self.phase = "moving"

    def stop(self) -> None:
        """The copy ends with Stopped at the next piece. Too late once it publishes."""
        self._stop = True

    @property
    def stopping(self) -> bool:
        return self._stop

    def check(self) -> None:
        if self._stop:
            raise Stopped("the copy was asked to stop")


#: Copies get threads of their own: in asyncio's default pool, few as they are, long copies would block every `stat`.
_copying = ThreadPoolExecutor(max_workers=32, thread_name_prefix="copy")


# ── through the contract ─────────────────────────────────────────────────────────────────────────────────────────────


async def copy_file(
    source: Storage,
    source_path: str,
    target: Storage,
    target_path: str,
    *,
    tag: str,
    expected: Expected | None = None,
    control: Control | None = None,
    before_publish: Callable[[], None] | None = None,
    read_back: ReadBack = "auto",
) -> Copied:
    """Copy one file, whatever the two storages are. Idempotent: run again, it adopts what is there.

    Raises StorageError with its side; Stopped; and whatever `before_publish` raises. Cancelling it is like `stop`.
    """
    control = control or Control()
    algorithms = _needed(expected)
    if isinstance(source, PosixStorage) and isinstance(target, PosixStorage):
        return await run(
            partial(
                copy_local,
                source,
                source_path,
                target,
                target_path,
                tag=tag,
                expected=expected,
                control=control,
                before_publish=before_publish,
                read_back=read_back,
            ),
            executor=_copying,
            on_cancel=control.stop,
        )
    began = time.perf_counter()
    adopted = await _adopt_existing(source, source_path, target, target_path, expected, control, before_publish)
    if adopted is not None:
        return adopted
    part = part_path(f"{tag}.{secrets.token_hex(6)}")
    try:
        algorithms = (*algorithms, *await servercopy.digests_of(target))
        with blaming("source"):
            before = await source.stat(source_path)
            _expect_size(source, source_path, before.size_bytes, expected)
            control.check()
        known = expected.checksums if expected is not None else Checksums()
        by_server = await servercopy.copied(source, source_path, before, target, part, known, algorithms, control.check)
        hasher = by_server or Hasher(algorithms)
        if not by_server:
            with blaming("target"):
                async with _closing(_hashed(source, source_path, before.size_bytes, hasher, control)) as pieces:
                    await target.write(part, pieces, size_bytes=before.size_bytes)
        with blaming("source"):
            after = await source.stat(source_path)
            if after.etag != before.etag or hasher.size_bytes != after.size_bytes:
                raise _changed(source, source_path)
            _expect(source, source_path, hasher, expected)
        faultpoints.reach("after_write")
        with blaming("target"):
            control.phase = "verifying"
            verified_by = "read back" if by_server else await _prove(target, part, hasher, control)
            faultpoints.reach("after_verify")
            for _ in range(_ROUNDS):
                control.check()
                if before_publish is not None:
                    before_publish()
                try:
                    await target.publish(part, target_path)
                except TargetExists:
                    there = await adopt(target, target_path, _exactly(hasher), control, before_publish)
                    if there is not None:
                        return there
                else:
                    faultpoints.reach("after_publish")
                    return Copied(
                        hasher.size_bytes, hasher.checksums(), False, time.perf_counter() - began, verified_by
                    )
            raise _in_the_way(target, target_path)
    finally:
        # After a publish there is nothing of that name any more. A failure here hides no better error: what stays is
        # collected by age.
        with suppress(ReplicaError):
            await target.delete(part)


async def adopt(
    target: Storage,
    target_path: str,
    expected: Expected,
    control: Control | None = None,
    permit: Callable[[], None] | None = None,
) -> Copied | None:
    """Look at what has the name already: these bytes → Copied(adopted); others → quarantine and None; nothing → None.

    Idempotent. The bytes are read back, whatever the catalogue believes. Invalid: `expected` has no checksum that can
    be computed here, so nothing could be proven. `permit` is asked before anything is moved away, and may raise.
    """
    control = control or Control()
    if not expected.checksums:
        raise Invalid("an existing file cannot be adopted by its size alone", hint="give a checksum")
    algorithms = _needed(expected)
    began = time.perf_counter()
    with blaming("target"):
        if isinstance(target, PosixStorage):
            return await run(
                partial(_adopt_local, target, target_path, expected, control, permit),
                executor=_copying,
                on_cancel=control.stop,
            )
        try:
            found = await target.stat(target_path)
            if found.size_bytes == expected.size_bytes:
                control.phase = "verifying"
                size, checksums = await _measure(target, target_path, algorithms, control)
                if checksums.compare(expected.checksums) is Agreement.AGREE:
                    return Copied(size, checksums, True, time.perf_counter() - began, "read back")
            control.check()
            if permit is not None:
                permit()
            await target.quarantine(target_path)
        except SourceMissing:
            return None  # nothing there, or somebody else took it away
        finally:
            control.phase = "moving"
    return None


async def measure(storage: Storage, path: str, *, control: Control | None = None) -> tuple[int, Checksums]:
    """Size and checksums of a file where it lies. SourceChanged if it changed while it was read."""
    control = control or Control()
    if isinstance(storage, PosixStorage):
        return await run(
            partial(measure_local, storage, path, control=control), executor=_copying, on_cancel=control.stop
        )
    return await _measure(storage, path, (), control)


async def _measure(storage: Storage, path: str, algorithms: Sequence[str], control: Control) -> tuple[int, Checksums]:
    before = await storage.stat(path)
    hasher = Hasher(algorithms)
    async with _closing(storage.read(path)) as pieces:
        async for piece in pieces:
            control.check()
            hasher.update(piece)
    after = await storage.stat(path)
    if after.etag != before.etag or hasher.size_bytes != after.size_bytes:
        raise _changed(storage, path)
    return hasher.size_bytes, hasher.checksums()


async def _adopt_existing(
    source: Storage,
    source_path: str,
    target: Storage,
    target_path: str,
    expected: Expected | None,
    control: Control,
    permit: Callable[[], None] | None,
) -> Copied | None:
    control.check()
    with blaming("target"):
        try:
            await target.stat(target_path)
        except SourceMissing:
            return None
    if source.url == target.url and source_path == target_path:
        raise _same_file(source, source_path)
    if expected is None or not expected.checksums:
        # Nobody knows what the bytes should be, and a size proves nothing: the source must tell.
        with blaming("source"):
            expected = Expected(*await measure(source, source_path, control=control))
    return await adopt(target, target_path, expected, control, permit)


async def _hashed(
    source: Storage, path: str, size_bytes: int, hasher: Hasher, control: Control
) -> AsyncIterator[Piece]:
    """What the target writes: the source's bytes, hashed as they pass. Errors in here are the source's."""
    with blaming("source"):
        async with _closing(source.read(path)) as pieces:
            async for piece in pieces:
                control.check()
                hasher.update(piece)
                if hasher.size_bytes > size_bytes:
                    raise _changed(source, path)  # it grows while we read; it might never end
                yield faultpoints.through(memoryview(piece))
                control.bytes_done = hasher.size_bytes


@asynccontextmanager
async def _closing(pieces: AsyncIterator[Piece]) -> AsyncIterator[AsyncIterator[Piece]]:
    """Left early, a generator holds its descriptor or connection until the collector comes; this does not wait."""
    try:
        yield pieces
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()


async def _prove(target: Storage, part: str, hasher: Hasher, control: Control) -> str:
    for known in hasher.checksums():
        answered = await target.checksum(part, known.algorithm)
        if answered is not None:
            if answered.lower().rjust(len(known.value), "0") != known.value:
                raise _differs(target, part, known.algorithm, answered, known.value, "target")
            return f"digest {known.algorithm}"
    again = Hasher()
    async with _closing(target.read(part)) as pieces:
        async for piece in pieces:
            control.check()
            again.update(piece)
    _same(target, part, again, hasher)
    return "read back"


# ── straight between two folders ─────────────────────────────────────────────────────────────────────────────────────


def copy_local(
    source: PosixStorage,
    source_path: str,
    target: PosixStorage,
    target_path: str,
    *,
    tag: str,
    expected: Expected | None = None,
    control: Control | None = None,
    before_publish: Callable[[], None] | None = None,
    read_back: ReadBack = "auto",
) -> Copied:
    """`copy_file` for two folders of this machine, in this thread (and a second one for the proof of a large file)."""
    order = LocalCopy(
        source, source_path, target, target_path, tag, expected, control or Control(), before_publish, read_back
    )
    with _Attempt(order) as attempt:
        attempt.run()
        return attempt.result()


@dataclass(frozen=True, slots=True)
class LocalCopy:
    """One file of a batch; the fields are the arguments of `copy_local`."""

    source: PosixStorage
    source_path: str
    target: PosixStorage
    target_path: str
    tag: str
    expected: Expected | None = None
    control: Control = field(default_factory=Control)
    before_publish: Callable[[], None] | None = None
    read_back: ReadBack = "auto"


def copy_local_batch(orders: Sequence[LocalCopy], *, threads: int = 4) -> list[Copied | Exception]:
    """Many small files, each step for a group of them before the next one; one outcome per order, in the same order.

    No file is reported before it is as durable as after `copy_local`, but the disk is waited for less often: all
    temporaries of a group are on their way out before the first sync waits, so one commit of the file system's journal
    serves many, and each folder is fsynced once. One file's failure is its own outcome and stops no other; a file above
    a window is copied by itself when its turn comes.
    """
    outcomes: list[Copied | Exception] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="copy") as pool:
        for begin in range(0, len(orders), GROUP_FILES):
            outcomes += _copy_group(orders[begin : begin + GROUP_FILES], pool, threads)
    return outcomes


def _copy_group(orders: Sequence[LocalCopy], pool: ThreadPoolExecutor, threads: int) -> list[Copied | Exception]:
    attempts = [_Attempt(order) for order in orders]
    failures: dict[_Attempt, Exception] = {}

    def some(step: Callable[[_Attempt], object], share: Iterable[_Attempt]) -> None:
        for attempt in share:
            if attempt.done is None and attempt not in failures:
                try:
                    step(attempt)
                except Exception as error:  # noqa: BLE001 - this file's outcome; the others go on
                    failures[attempt] = error

    try:
        for step in (_Attempt.begin, _Attempt.settle, _Attempt.prove, _Attempt.publish):
            # A list per thread, not a task per file: handing one over costs as much as copying it.
            for share in [pool.submit(some, step, attempts[n::threads]) for n in range(threads)]:
                share.result()
        synced: dict[tuple[int, int], Exception | None] = {}
        for attempt in attempts:
            if attempt.done is None and attempt not in failures:
                try:
                    attempt.make_name_durable(synced)
                except Exception as error:  # noqa: BLE001
                    failures[attempt] = error
    finally:
        for attempt in attempts:
            attempt.close()
    return [failures.get(attempt) or attempt.result() for attempt in attempts]


class _Attempt:
    """One copy between two folders, step by step: `run` is the whole story, a batch tells it for many at a time."""

    def __init__(self, order: LocalCopy) -> None:
        self.order = order
        self.control = order.control
        #: Set when there is nothing more to do.
        self.done: Copied | None = None
        self._algorithms: tuple[str, ...] = ()
        self._began = time.perf_counter()
        self._part = ""
        self._written = -1  # descriptor of the temporary
        self._folder = -1  # descriptor of the folder that holds the new name
        self._hasher = Hasher()
        self._proof: _Proof | None = None

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self) -> None:
        self.adopt()
        if self.done is None:
            self.move()
            self.settle()
            self.prove()
            self.publish()
        if self.done is None:
            self.make_name_durable()

    def begin(self) -> None:
        """The first steps of a small file; a large one is worth its own syncs and is done in one go."""
        if self._size_at_source() > WINDOW_BYTES:
            self.run()
            return
        self.adopt()
        if self.done is None:
            self.move()
            # "Forget these pages" of dirty ones means "begin to write them": `settle` then finds most of the work done.
            drop_cache(self._written)

    def _size_at_source(self) -> int:
        with suppress(ReplicaError):  # `move` will say it better
            return self.order.source.tree.stat(self.order.source_path).size_bytes
        return 0

    def adopt(self) -> None:
        order = self.order
        self._algorithms = _needed(order.expected)
        self.control.check()
        with blaming("target"):
            try:
                there = order.target.tree.open(order.target_path)
            except SourceMissing:
                return
        try:
            self._refuse_same_file(there)
        finally:
            os.close(there)
        expected = order.expected
        if expected is None or not expected.checksums:
            # Nobody knows what the bytes should be, and a size proves nothing: the source must tell.
            with blaming("source"):
                expected = Expected(*measure_local(order.source, order.source_path, control=self.control))
        with blaming("target"):
            self.done = _adopt_local(order.target, order.target_path, expected, self.control, order.before_publish)

    def _refuse_same_file(self, there: int) -> None:
        # Two endpoints on one disk, or a bind mount: to quarantine "the wrong target" would take the source away.
        with suppress(StorageError):  # a source that is not there, or cannot be reached, is another file
            here = self.order.source.tree.open(self.order.source_path)
            try:
                if os.path.sameopenfile(here, there):
                    raise _same_file(self.order.source, self.order.source_path)
            finally:
                os.close(here)

    def move(self) -> None:
        order, control = self.order, self.control
        with blaming("source"):
            reading = order.source.tree.open(order.source_path)
        try:
            before = stat_of(os.fstat(reading))
            _expect_size(order.source, order.source_path, before.size_bytes, order.expected)
            self._part = part_path(f"{order.tag}.{secrets.token_hex(6)}")
            self._written = order.target.tree.create_part(self._part, before.size_bytes)
            self._hasher = Hasher(self._algorithms)
            if before.size_bytes > WINDOW_BYTES:
                self._proof = _Proof(self._written, control, from_device=order.read_back == "device")
            self._stream(reading, before.size_bytes)
            with blaming("source"):
                _still(order.source, order.source_path, reading, before.etag)
                if self._hasher.size_bytes != before.size_bytes:
                    raise _changed(order.source, order.source_path)
        finally:
            os.close(reading)
        _expect(order.source, order.source_path, self._hasher, order.expected)
        faultpoints.reach("after_write")

    def _stream(self, reading: int, size_bytes: int) -> None:
        order, control, hasher, proof = self.order, self.control, self._hasher, self._proof
        source_label, target_label = order.source.name, order.target.name
        buffer = memoryview(bytearray(min(PIECE_BYTES, size_bytes + 1)))
        window = 0  # where the window begins that `proof` has not been given yet
        with suppress(OSError):
            os.posix_fadvise(reading, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while True:
            control.check()
            with translated(source_label, order.source_path, "source"):
                count = os.readv(reading, [buffer])
            if not count:
                break
            piece = buffer[:count]
            hasher.update(piece)
            if hasher.size_bytes > size_bytes:
                with blaming("source"):
                    raise _changed(order.source, order.source_path)  # it grows while we read; it might never end
            with translated(target_label, order.target_path, "target"):
                write_all(self._written, faultpoints.through(piece))
            control.bytes_done = hasher.size_bytes
            if proof is not None and hasher.size_bytes - window >= WINDOW_BYTES:
                proof.add(window, hasher.size_bytes)
                window = hasher.size_bytes
                proof.raise_early(self._blame)
        if proof is not None:
            proof.add(window, hasher.size_bytes)

    def _blame(self, error: BaseException) -> BaseException:
        if isinstance(error, OSError):
            return from_os_error(error, endpoint=self.order.target.name, path=self.order.target_path, side="target")
        return error

    def settle(self) -> None:
        self.control.check()
        self.control.phase = "verifying"
        if self._proof is not None:
            self._proof.finish(self._blame)
        with translated(self.order.target.name, self.order.target_path, "target"):
            os.fsync(self._written)  # should it fail, this temporary is given up: a second fsync may lie

    def prove(self) -> None:
        order = self.order
        if self._proof is not None:
            again = self._proof.hasher
        else:
            again = Hasher()
            with translated(order.target.name, order.target_path, "target"):
                if order.read_back != "cache":
                    forget(self._written, 0, self._hasher.size_bytes)
                _hash_again(self._written, 0, self._hasher.size_bytes, again, self.control)
        _same(order.target, order.target_path, again, self._hasher)
        # What was read back ends where we stopped reading; the file must end there too.
        size_bytes = os.fstat(self._written).st_size
        if size_bytes != self._hasher.size_bytes:
            wanted = str(self._hasher.size_bytes)
            raise _differs(order.target, order.target_path, "size", str(size_bytes), wanted, "target")
        self._close_written()
        faultpoints.reach("after_verify")

    def publish(self) -> None:
        order = self.order
        for _ in range(_ROUNDS):
            self.control.check()
            if order.before_publish is not None:
                order.before_publish()
            with blaming("target"):
                try:
                    self._folder = order.target.tree.rename(self._part, order.target_path)
                except TargetExists:
                    self.done = _adopt_local(
                        order.target, order.target_path, _exactly(self._hasher), self.control, order.before_publish
                    )
                    if self.done is not None:
                        return
                else:
                    self._part = ""
                    return
        raise _in_the_way(order.target, order.target_path)

    def make_name_durable(self, synced: dict[tuple[int, int], Exception | None] | None = None) -> None:
        """fsync the folder; a batch remembers in `synced` which ones it had, with how it went."""
        if self._folder >= 0:
            found = os.fstat(self._folder)
            key = (found.st_dev, found.st_ino)
            if synced is None or key not in synced:
                failure: Exception | None = None
                try:
                    with translated(self.order.target.name, self.order.target_path, "target"):
                        os.fsync(self._folder)
                except ReplicaError as error:
                    failure = error
                if synced is not None:
                    synced[key] = failure
            else:
                failure = synced[key]
            self._close_folder()
            if failure is not None:
                raise failure
        faultpoints.reach("after_publish")
        hasher = self._hasher
        self.done = Copied(hasher.size_bytes, hasher.checksums(), False, time.perf_counter() - self._began, "read back")

    def result(self) -> Copied:
        if self.done is None:
            raise Broken("a copy ended without an outcome")
        return self.done

    def close(self) -> None:
        """Let go of everything; a temporary that was not published is removed. Idempotent."""
        if self._proof is not None:
            self._proof.abandon()
        self._close_written()
        self._close_folder()
        if self._part:
            # A failure here hides no better error: what stays is collected by age.
            with suppress(ReplicaError):
                self.order.target.tree.delete(self._part)
            self._part = ""

    def _close_written(self) -> None:
        if self._written >= 0:
            os.close(self._written)
            self._written = -1

    def _close_folder(self) -> None:
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1


class _Proof:
    """Reads back what another thread writes, window by window, and sees that it is written out."""

    def __init__(self, descriptor: int, control: Control, *, from_device: bool) -> None:
        self.hasher = Hasher()
        self._descriptor = descriptor
        self._control = control
        self._from_device = from_device
        #: Bounded: a writer that runs ahead of the proof fills the memory with pages that must all be written out.
        self._windows: queue.Queue[tuple[int, int] | None] = queue.Queue(_WINDOWS_WAITING)
        self._failure: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="proof", daemon=True)
        self._thread.start()

    def add(self, begin: int, end: int) -> None:
        self._windows.put((begin, end))

    def raise_early(self, translate: Callable[[BaseException], BaseException]) -> None:
        if self._failure is not None:
            raise translate(self._failure)

    def finish(self, translate: Callable[[BaseException], BaseException]) -> None:
        """Wait until every window was read; raises what went wrong there."""
        self._windows.put(None)
        self._thread.join()
        self.raise_early(translate)

    def abandon(self) -> None:
        """End soon, whatever is still to be read; returns when the descriptor is not used any more."""
        self._abandoned = True
        if self._thread.is_alive():
            self._windows.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (window := self._windows.get()) is not None:
            if self._failure is not None or self._abandoned:
                continue  # still taking windows, so that nobody waits for room
            begin, end = window
            try:
                if self._from_device:
                    write_out(self._descriptor, begin, end)
                    forget(self._descriptor, begin, end)
                _hash_again(self._descriptor, begin, end, self.hasher, self._control, lambda: self._abandoned)
                if not self._from_device:
                    # Proven already; written out now so that the last sync finds little, and forgotten so that the
                    # pages serve the next window: a large copy must not push everybody else's files out of the cache.
                    write_out(self._descriptor, begin, end)
                    drop_cache(self._descriptor, begin, end - begin)
            except BaseException as error:  # noqa: BLE001 - carried to the thread that waits for us
                self._failure = error


def forget(descriptor: int, begin: int, end: int) -> None:
    """Have bytes that were written out read from the device again, all of them at once."""
    drop_cache(descriptor, begin, end - begin)
    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)


def _hash_again(
    descriptor: int,
    begin: int,
    end: int,
    hasher: Hasher,
    control: Control,
    abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Hash what a descriptor now gives between two places; less than asked for if the file ends before."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, max(end - begin, 1))))
    while begin < end and not abandoned():
        control.check()
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - begin)]], begin)
        if not count:
            break  # shorter than what was written: the comparison will say so
        hasher.update(buffer[:count])
        begin += count


def measure_local(
    storage: PosixStorage,
    path: str,
    *,
    control: Control | None = None,
    algorithms: Sequence[str] = (),
    fresh: bool = False,
) -> tuple[int, Checksums]:
    """Size and checksums of a file where it lies; `fresh` reads it from the device, not from the cache.

    SourceChanged if size, time or the file itself changed while it was read.
    """
    control = control or Control()
    descriptor = storage.tree.open(path)
    try:
        with translated(storage.name, path):
            before = stat_of(os.fstat(descriptor))
            hasher = Hasher(algorithms)
            if fresh:
                drop_cache(descriptor)
            buffer = memoryview(bytearray(min(PIECE_BYTES, before.size_bytes + 1)))
            while count := os.readv(descriptor, [buffer]):
                control.check()
                hasher.update(buffer[:count])
                if hasher.size_bytes > before.size_bytes:
                    raise _changed(storage, path)
            _still(storage, path, descriptor, before.etag)
            if hasher.size_bytes != before.size_bytes:
                raise _changed(storage, path)
    finally:
        os.close(descriptor)
    return hasher.size_bytes, hasher.checksums()


def _adopt_local(
    target: PosixStorage,
    path: str,
    expected: Expected,
    control: Control,
    permit: Callable[[], None] | None = None,
) -> Copied | None:
    began = time.perf_counter()
    algorithms = _needed(expected)
    try:
        for _ in range(_ROUNDS):
            found = target.tree.stat(path)
            if found.size_bytes == expected.size_bytes:
                control.phase = "verifying"
                size, checksums = measure_local(target, path, control=control, algorithms=algorithms, fresh=True)
                if checksums.compare(expected.checksums) is Agreement.AGREE:
                    target.tree.make_durable(path)
                    return Copied(size, checksums, True, time.perf_counter() - began, "read back")
            # Whoever lost the lease while he looked must not take away what his successor put there since.
            control.check()
            if permit is not None:
                permit()
            with suppress(SourceChanged):  # another file by now: that one must be looked at
                target.tree.quarantine(path, only=found.etag)
                return None
    except SourceMissing:
        return None  # nothing there, or somebody else took it away
    finally:
        control.phase = "moving"
    raise _in_the_way(target, path)


def _still(storage: PosixStorage, path: str, descriptor: int, etag: str) -> None:
    """The descriptor's file was not written to, and the path still names it."""
    try:
        if stat_of(os.fstat(descriptor)).etag == etag == storage.tree.stat(path).etag:
            return
    except SourceMissing:
        pass
    raise _changed(storage, path)


# ── what both ways judge by ──────────────────────────────────────────────────────────────────────────────────────────


def _needed(expected: Expected | None) -> tuple[str, ...]:
    """What to compute beyond the two that are always computed; Invalid if nothing could be compared in the end."""
    if expected is None or not expected.checksums:
        return ()
    extra = extra_for(expected.checksums)
    if not extra and not any(expected.checksums.get(a) for a in ALWAYS):
        known = ", ".join(c.algorithm for c in expected.checksums)
        raise Invalid(
            f"the file is known by {known} only, which cannot be computed here",
            hint="register it with another checksum",
        )
    return extra


def _exactly(hasher: Hasher) -> Expected:
    return Expected(hasher.size_bytes, hasher.checksums())


def _expect_size(source: Storage, path: str, size_bytes: int, expected: Expected | None) -> None:
    if expected is not None and size_bytes != expected.size_bytes:
        raise _differs(source, path, "size", str(size_bytes), str(expected.size_bytes), "source")


def _expect(source: Storage, path: str, hasher: Hasher, expected: Expected | None) -> None:
    if expected is None:
        return
    _expect_size(source, path, hasher.size_bytes, expected)
    found = hasher.checksums().as_dict()
    for known in expected.checksums:
        value = found.get(known.algorithm)
        if value is not None and value != known.value:
            raise _differs(source, path, known.algorithm, value, known.value, "source")


def _same(target: Storage, path: str, again: Hasher, hasher: Hasher) -> None:
    """What was read back is what was read from the source."""
    if again.size_bytes != hasher.size_bytes:
        raise _differs(target, path, "size", str(again.size_bytes), str(hasher.size_bytes), "target")
    found, wanted = (h.checksums().get("xxh3_128") or "" for h in (again, hasher))
    if found != wanted:
        raise _differs(target, path, "xxh3_128", found, wanted, "target")


def _differs(storage: Storage, path: str, what: str, found: str, wanted: str, side: Side) -> ChecksumDiffers:
    known = "the catalogue knows" if side == "source" else "the source gave"
    return ChecksumDiffers(
        f"{place(storage.name, path)} has {what} {found}, and {known} {wanted}",
        hint="the bytes there are not the file's" if side == "source" else "nothing was published; it is tried again",
        endpoint=storage.name,
        path=path,
        side=side,
    )


def _changed(storage: Storage, path: str) -> SourceChanged:
    return SourceChanged(
        f"{place(storage.name, path)} changed while it was read",
        hint="somebody writes to it; wait until he has finished",
        endpoint=storage.name,
        path=path,
    )


def _same_file(storage: Storage, path: str) -> Invalid:
    return Invalid(
        f"source and target are the same file: {place(storage.name, path)}",
        hint="two endpoints seem to share a disk: one copy must not be counted twice",
    )


def _in_the_way(target: Storage, path: str) -> TargetExists:
    return TargetExists(
        f"{place(target.name, path)}: other files of this name keep appearing",
        hint="somebody else writes there; find out who",
        endpoint=target.name,
        path=path,
        side="target",
    )
