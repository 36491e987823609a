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

Two HTTP storages are asked to copy between themselves first (replica.storage.thirdparty): steps 2 to 4 are theirs then,
the others stay ours, and where it does not work we go through all of them.

Large files are read back and written out in windows, one thread writing while another proves. Where an interrupted
copy shall be gone on with, or several sources are used at once, replica.storage.chunked takes the same steps.

The rooms: this file is the entry and the way through the contract; copy_local the way between two folders, with the
proof in proof; adoption looks at what has the name already; judging holds the values and the errors of all of them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial

from replica.storage import faultpoints, servercopy
from replica.storage.adoption import adopt, adopt_existing, measure, publish_proven, refuse_same
from replica.storage.base import (
    Piece,
    Stat,
    Storage,
    SupportsFewQuestions,
    SupportsServerCopy,
    SupportsThirdParty,
    part_path,
)
from replica.storage.chunked import copy_chunked, resumable
from replica.storage.chunks import Lineage
from replica.storage.copy_local import LocalCopy, copy_local, copy_local_batch, measure_local
from replica.storage.faults import blaming
from replica.storage.hashing import Fingerprint, Hasher, is_strong
from replica.storage.judging import (
    COPYING,
    NO_LOOK_BYTES_MAX,
    Control,
    Copied,
    Expected,
    ReadBack,
    Stopped,
    changed,
    differs,
    exactly,
    expect,
    expect_size,
    needed,
    same,
)
from replica.storage.parts import Source
from replica.storage.pieces import closing
from replica.storage.posix import PosixStorage
from replica.storage.threads import run
from rules.checksums import Checksums
from rules.errors import Busy, ReplicaError, StorageError, TimedOut, Unreachable

__all__ = [
    "Control",
    "Copied",
    "Expected",
    "Lineage",
    "LocalCopy",
    "ReadBack",
    "Source",
    "Stopped",
    "adopt",
    "copy_chunked",
    "copy_file",
    "copy_local",
    "copy_local_batch",
    "measure",
    "measure_local",
    "resumable",
]


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
    lineage: Lineage | None = None,
) -> Copied:
    """Copy one file, whatever the two storages are. Idempotent: run again, it adopts what is there.

    With a `lineage`, a large file goes on where an earlier attempt of that lineage ended, and leaves what it has
    written for the next one when it is interrupted (replica.storage.chunked).

    Raises StorageError with its side; Stopped; and whatever `before_publish` raises. Cancelling it is like `stop`.
    """
    control = control or Control()
    if lineage is not None and expected is not None and resumable(target, expected):
        return await copy_chunked(
            [Source(source, source_path)],
            target,
            target_path,
            lineage=lineage,
            expected=expected,
            control=control,
            before_publish=before_publish,
            read_back=read_back,
        )
    needed(expected)  # Invalid before anything moves, if nothing could be compared in the end
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
            executor=COPYING,
            on_cancel=control.stop,
        )
    began = time.perf_counter()
    if isinstance(source, SupportsThirdParty) and isinstance(target, SupportsThirdParty):
        from replica.storage.thirdparty import copy_between  # heavy, and few need it

        # Looks itself at what has the name already.
        direct = await copy_between(
            source,
            source_path,
            target,
            target_path,
            tag=tag,
            expected=expected,
            control=control,
            before_publish=before_publish,
        )
        if direct is not None:
            return direct
    adopt_now = partial(adopt_existing, source, source_path, target, target_path, expected, control, before_publish)
    if not _publishing_looks(target, expected):
        adopted = await adopt_now()
        return adopted or await _carried(
            source, source_path, target, target_path, tag, expected, control, before_publish, began
        )
    await refuse_same(source, source_path, target, target_path)
    try:
        return await _carried(source, source_path, target, target_path, tag, expected, control, before_publish, began)
    except (Busy, TimedOut, Unreachable):
        raise
    except StorageError:
        # What lies there already needs no source, and no room.
        adopted = await adopt_now()
        if adopted is None:
            raise
        return adopted


def _publishing_looks(target: Storage, expected: Expected | None) -> bool:
    """Whether nobody looks at the name before the bytes move: publishing sees what has it, and moving a few bytes in
    vain costs less than asking for each file."""
    return (
        expected is not None
        and bool(expected.checksums)
        and expected.size_bytes <= NO_LOOK_BYTES_MAX
        and isinstance(target, SupportsFewQuestions)
    )


def _believes(source: Storage, target: Storage, expected: Expected | None) -> bool:
    """Whether the source need not be asked what it has: its bytes must have a strong checksum, and that tells all."""
    return (
        expected is not None
        and is_strong(expected.checksums)
        and isinstance(source, SupportsFewQuestions | PosixStorage)
        and not isinstance(target, SupportsServerCopy)
    )


async def _carried(
    source: Storage,
    source_path: str,
    target: Storage,
    target_path: str,
    tag: str,
    expected: Expected | None,
    control: Control,
    before_publish: Callable[[], None] | None,
    began: float,
) -> Copied:
    """Steps 2 to 7, with bytes that pass through here, or that the target's server fetched."""
    part = part_path(f"{tag}.{secrets.token_hex(6)}")
    published = False
    try:
        algorithms = (*needed(expected), *await servercopy.digests_of(target))
        before: Stat | None = None
        if _believes(source, target, expected):
            assert expected is not None
            size_bytes = expected.size_bytes
            if isinstance(source, SupportsFewQuestions):
                source.believed(source_path, size_bytes)
        else:
            with blaming("source"):
                before = await source.stat(source_path)
                expect_size(source, source_path, before.size_bytes, expected)
            size_bytes = before.size_bytes
        control.check()
        known = expected.checksums if expected is not None else Checksums()
        by_server = before and await servercopy.copied(
            source, source_path, before, target, part, known, algorithms, control.check
        )
        hasher = by_server or Hasher(algorithms)
        if not by_server:
            with blaming("target"):
                async with closing(_hashed(source, source_path, size_bytes, hasher, control, before)) as pieces:
                    if isinstance(target, SupportsFewQuestions):
                        await target.write_new(part, pieces, size_bytes=size_bytes)
                    else:
                        await target.write(part, pieces, size_bytes=size_bytes)
        with blaming("source"):
            if before is not None:
                after = await source.stat(source_path)
                if after.etag != before.etag or hasher.size_bytes != after.size_bytes:
                    raise changed(source, source_path)
            expect(source, source_path, hasher, expected)
        faultpoints.reach("after_write")
        with blaming("target"):
            control.phase = "verifying"
            verified_by = "read back" if by_server else await _prove(target, part, hasher, control)
            faultpoints.reach("after_verify")
            there = await publish_proven(target, part, target_path, exactly(hasher), control, before_publish)
            if there is not None:
                return there
            published = True
            faultpoints.reach("after_publish")
            return Copied(
                hasher.size_bytes,
                hasher.checksums(),
                False,
                time.perf_counter() - began,
                verified_by,
                moved_bytes=hasher.size_bytes,
            )
    finally:
        # After a publish there is nothing of that name any more. A failure here hides no better error: what stays is
        # collected by age.
        if not published:
            with suppress(ReplicaError):
                await target.delete(part)


async def _hashed(
    source: Storage, path: str, size_bytes: int, hasher: Hasher, control: Control, before: Stat | None
) -> AsyncIterator[Piece]:
    """What the target writes: the source's bytes, hashed as they pass. Errors in here are the source's."""
    with blaming("source"):
        async with closing(source.read(path)) as pieces:
            async for piece in pieces:
                control.check()
                hasher.update(piece)
                if hasher.size_bytes > size_bytes:
                    raise await _other_size(source, path, size_bytes, before)  # it might never end
                yield faultpoints.through(memoryview(piece))
                control.bytes_done = hasher.size_bytes
        if hasher.size_bytes != size_bytes:
            raise await _other_size(source, path, size_bytes, before)


async def _other_size(source: Storage, path: str, size_bytes: int, before: Stat | None) -> StorageError:
    """It changes while we read; or it never had that size, if it was not asked before."""
    found = await source.stat(path) if before is None else before
    if found.size_bytes != size_bytes:
        return differs(source, path, "size", str(found.size_bytes), str(size_bytes), "source")
    return changed(source, path)


async def _prove(target: Storage, part: str, hasher: Hasher, control: Control) -> str:
    # A folder has no digest of its own, and need not be asked.
    for known in () if isinstance(target, PosixStorage) else hasher.checksums():
        answered = await target.checksum(part, known.algorithm)
        if answered is not None:
            if answered.lower().rjust(len(known.value), "0") != known.value:
                raise differs(target, part, known.algorithm, answered, known.value, "target")
            return f"digest {known.algorithm}"
    again = Fingerprint()
    async with closing(target.read(part)) as pieces:
        async for piece in pieces:
            control.check()
            again.update(piece)
    same(target, part, again, hasher)
    return "read back"
