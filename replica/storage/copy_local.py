"""The copy between two folders of this machine: no event loop, one thread and, for a large file, one behind it.

Given     as replica.storage.copy, whose steps these are; a batch of small files takes each step for many at a time.
Returns   Copied.
Promises  those of replica.storage.copy.
Partner   replica.storage.tree opens and renames; replica.storage.proof reads back.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType

from replica.storage import faultpoints
from replica.storage.barrier import everything_durable, raise_failure
from replica.storage.base import part_path
from replica.storage.faults import blaming, from_os_error, translated
from replica.storage.hashing import STRIDE_BYTES, Fingerprint, Hasher
from replica.storage.judging import (
    ROUNDS,
    Control,
    Copied,
    Expected,
    ReadBack,
    changed,
    differs,
    exactly,
    expect,
    expect_size,
    in_the_way,
    needed,
    same,
    same_file,
)
from replica.storage.posix import PIECE_BYTES, PosixStorage, drop_cache, write_all
from replica.storage.proof import WINDOW_BYTES, Proof, forget, hash_again
from replica.storage.tree import stat_of
from rules.checksums import Agreement, Checksums
from rules.errors import Broken, ReplicaError, SourceChanged, SourceMissing, StorageError, TargetExists

#: Files of one group of a batch. Each holds a descriptor open, and the first report waits for the last file.
GROUP_FILES = 256


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

    def each(step: Callable[[_Attempt], object]) -> None:
        # A list per thread, not a task per file: handing one over costs as much as copying it.
        for share in [pool.submit(some, step, attempts[n::threads]) for n in range(threads)]:
            share.result()

    def left() -> list[_Attempt]:
        return [attempt for attempt in attempts if attempt.done is None and attempt not in failures]

    try:
        each(_Attempt.begin)
        settled = _barrier(left())
        each(_Attempt.settled if settled else _Attempt.settle)
        some(_Attempt.forget, attempts)
        each(_Attempt.prove)
        each(_Attempt.publish)
        named = left()
        durable = settled and len({attempt.folder for attempt in named}) > 1 and _barrier(named)
        synced: dict[tuple[int, int], Exception | None] = {}
        if durable:
            synced = {attempt.folder: None for attempt in named}
        some(lambda attempt: attempt.make_name_durable(synced), attempts)
    finally:
        for attempt in attempts:
            attempt.close()
    return [failures.get(attempt) or attempt.result() for attempt in attempts]


def _barrier(attempts: Sequence[_Attempt]) -> bool:
    """Whether one wait for the disk made all of them durable; otherwise each one's own fsync does, or tells why not."""
    if len({attempt.device for attempt in attempts}) != 1:
        return False
    with suppress(OSError):
        return everything_durable(attempts[0].anything, len(attempts))
    return False


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
        self._proof: Proof | None = None

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self) -> None:
        self.adopt()
        if self.done is None:
            self.move()
            self.settle()
            self.forget()
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
        if self.order.expected is not None:
            return self.order.expected.size_bytes
        with suppress(ReplicaError):  # `move` will say it better
            return self.order.source.tree.stat(self.order.source_path).size_bytes
        return 0

    def adopt(self) -> None:
        order = self.order
        self._algorithms = needed(order.expected)
        self.control.check()
        with blaming("target"):
            if not refuse_same_local(order.source, order.source_path, order.target, order.target_path):
                return
        expected = order.expected
        if expected is None or not expected.checksums:
            # Nobody knows what the bytes should be, and a size proves nothing: the source must tell.
            with blaming("source"):
                expected = Expected(*measure_local(order.source, order.source_path, control=self.control))
        with blaming("target"):
            self.done = adopt_local(order.target, order.target_path, expected, self.control, order.before_publish)

    def move(self) -> None:
        order, control = self.order, self.control
        with blaming("source"):
            reading = order.source.tree.open(order.source_path)
        try:
            before = stat_of(os.fstat(reading))
            expect_size(order.source, order.source_path, before.size_bytes, order.expected)
            self._part = part_path(f"{order.tag}.{secrets.token_hex(6)}")
            self._written = order.target.tree.create_part(self._part, before.size_bytes)
            self._hasher = Hasher(self._algorithms)
            if before.size_bytes > WINDOW_BYTES:
                self._proof = Proof(self._written, control, from_device=order.read_back == "device")
            self._stream(reading, before.size_bytes)
            with blaming("source"):
                still(order.source, order.source_path, reading, before.etag)
                if self._hasher.size_bytes != before.size_bytes:
                    raise changed(order.source, order.source_path)
        finally:
            os.close(reading)
        expect(order.source, order.source_path, self._hasher, order.expected)
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
                count = read_hashing(reading, buffer, hasher.update)
            if not count:
                break
            if hasher.size_bytes > size_bytes:
                with blaming("source"):
                    raise changed(order.source, order.source_path)  # it grows while we read; it might never end
            with translated(target_label, order.target_path, "target"):
                write_all(self._written, faultpoints.through(buffer[:count]))
                if proof is not None:
                    proof.look_again(hasher.size_bytes - count, hasher.size_bytes)
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

    def settled(self) -> None:
        """`settle` where a barrier has done the waiting."""
        self.control.check()
        self.control.phase = "verifying"
        with translated(self.order.target.name, self.order.target_path, "target"):
            raise_failure(self._written)

    def forget(self) -> None:
        """The proof shall come from the device. Said for all of a batch before the first is read, it reads ahead."""
        if self._proof is None and self.order.read_back != "cache":
            with translated(self.order.target.name, self.order.target_path, "target"):
                forget(self._written, 0, self._hasher.size_bytes)

    def prove(self) -> None:
        order = self.order
        if self._proof is not None:
            again = self._proof.seen
        else:
            again = Fingerprint()
            with translated(order.target.name, order.target_path, "target"):
                hash_again(self._written, 0, self._hasher.size_bytes, again, self.control)
        same(order.target, order.target_path, again, self._hasher)
        # What was read back ends where we stopped reading; the file must end there too.
        size_bytes = os.fstat(self._written).st_size
        if size_bytes != self._hasher.size_bytes:
            wanted = str(self._hasher.size_bytes)
            raise differs(order.target, order.target_path, "size", str(size_bytes), wanted, "target")
        self._close_written()
        faultpoints.reach("after_verify")

    def publish(self) -> None:
        order = self.order
        for _ in range(ROUNDS):
            self.control.check()
            if order.before_publish is not None:
                order.before_publish()
            with blaming("target"):
                try:
                    self._folder = order.target.tree.rename(self._part, order.target_path)
                except TargetExists:
                    self.done = adopt_local(
                        order.target, order.target_path, exactly(self._hasher), self.control, order.before_publish
                    )
                    if self.done is not None:
                        return
                else:
                    self._part = ""
                    return
        raise in_the_way(order.target, order.target_path)

    def make_name_durable(self, synced: dict[tuple[int, int], Exception | None] | None = None) -> None:
        """fsync the folder; a batch remembers in `synced` which ones it had, with how it went."""
        if self._folder >= 0:
            key = self.folder
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
        size_bytes = hasher.size_bytes
        seconds = time.perf_counter() - self._began
        self.done = Copied(size_bytes, hasher.checksums(), False, seconds, "read back", moved_bytes=size_bytes)

    @property
    def anything(self) -> int:
        """A descriptor on the target's file system."""
        return self._written if self._written >= 0 else self._folder

    @property
    def device(self) -> int:
        return os.fstat(self.anything).st_dev

    @property
    def folder(self) -> tuple[int, int]:
        """Which folder has the new name."""
        found = os.fstat(self._folder)
        return found.st_dev, found.st_ino

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


def read_hashing(
    descriptor: int, buffer: memoryview, update: Callable[[memoryview], None], at: int | None = None
) -> int:
    """Fill the buffer from a file, from that place or (None) from where it stands, and hash it on the way by `update`;
    how much there was, 0 at the end."""
    filled = 0
    while filled < len(buffer):
        stride = buffer[filled : filled + STRIDE_BYTES]
        count = os.readv(descriptor, [stride]) if at is None else os.preadv(descriptor, [stride], at + filled)
        if not count:
            break
        update(stride[:count])
        filled += count
    return filled


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
            while read_hashing(descriptor, buffer, hasher.update):
                control.check()
                if hasher.size_bytes > before.size_bytes:
                    raise changed(storage, path)
            still(storage, path, descriptor, before.etag)
            if hasher.size_bytes != before.size_bytes:
                raise changed(storage, path)
    finally:
        os.close(descriptor)
    return hasher.size_bytes, hasher.checksums()


def refuse_same_local(source: PosixStorage, source_path: str, target: PosixStorage, target_path: str) -> bool:
    """Whether the target is there. Invalid if it is the source itself: two endpoints on one disk, or a bind mount; to
    quarantine "the wrong target" would take the source away."""
    try:
        there = target.tree.open(target_path)
    except SourceMissing:
        return False
    try:
        with suppress(StorageError):  # a source that is not there, or cannot be reached, is another file
            here = source.tree.open(source_path)
            try:
                if os.path.sameopenfile(here, there):
                    raise same_file(source, source_path)
            finally:
                os.close(here)
    finally:
        os.close(there)
    return True


def adopt_local(
    target: PosixStorage,
    path: str,
    expected: Expected,
    control: Control,
    permit: Callable[[], None] | None = None,
) -> Copied | None:
    began = time.perf_counter()
    algorithms = needed(expected)
    try:
        for _ in range(ROUNDS):
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
    raise in_the_way(target, path)


def still(storage: PosixStorage, path: str, descriptor: int, etag: str) -> None:
    """The descriptor's file was not written to, and the path still names it."""
    try:
        if stat_of(os.fstat(descriptor)).etag == etag == storage.tree.stat(path).etag:
            return
    except SourceMissing:
        pass
    raise changed(storage, path)
