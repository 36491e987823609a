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

Where each question is a request to a server, fewer are asked, and no less is proven: a small file's name is looked at
by publishing only (1), or when something else fails; a source whose bytes must have a strong checksum need not say
before what it has, nor after that it has it still (3), for another file has another checksum.

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

An S3 server that compares a digest in the act that gives the name needs no temporary (replica.storage.s3_direct): there
steps 2 and 4 to 7 are one request, made after steps 3 and 6, and nothing has the name before the digest was compared.

Large files are proven in windows, behind the writer: from the cache the writer reads each piece back himself while
another thread writes out; from the device that thread does both. Where an interrupted copy shall be gone on with, or
several sources are used at once, replica.storage.chunked takes the same steps.

The rooms: this file is the entry; copy_stream the way through the contract; copy_local the way between two folders,
with the proof in proof; adoption looks at what has the name already; judging holds the values and the errors of all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from replica.storage.adoption import adopt, measure
from replica.storage.base import Storage, SupportsThirdParty, supports
from replica.storage.chunked import copy_chunked, resumable
from replica.storage.chunks import Lineage
from replica.storage.copy_local import LocalCopy, copy_local, copy_local_batch, measure_local
from replica.storage.copy_stream import Stream
from replica.storage.judging import (
    COPYING,
    Control,
    Copied,
    Expected,
    ReadBack,
    Stopped,
    needed,
)
from replica.storage.parts import Source
from replica.storage.posix import PosixStorage
from replica.storage.threads import run

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
    needed(expected)  # Invalid at once, if nothing could be compared in the end
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
    if supports(source, SupportsThirdParty) and supports(target, SupportsThirdParty):
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
    return await Stream(source, source_path, target, target_path, tag, expected, control, before_publish).run()
