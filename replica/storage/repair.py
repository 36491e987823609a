"""Heal a damaged file by moving only its damaged chunks.

Given     the target's file, believed damaged; good sources, best first; what the catalogue knows; and, if there is one,
          a manifest of the right chunks.
Returns   Repaired: how many chunks were moved, and the Copied of the new file.
Promises  the damaged file is never written to: a new one is made of its good chunks and of fetched ones, proven whole
          against the catalogue, and gets the name after the damaged one was moved to quarantine. Whatever goes wrong
          before that, the damaged file is where it was. A file that is whole is left alone. (A file that can only be
          copied as a whole may be moved to quarantine before the first byte is copied.)
Partner   replica.storage.chunked moves, proves and publishes; who finds the damage (a scrub, a reader) calls this.

With a manifest nothing is read from a source but the damaged chunks. Without one the source is read once, beside the
target, to find them: on a source that is far away that costs as much as copying the file, though only the damaged
chunks are written. Good chunks are shared with the damaged file (reflink) or copied by the kernel within the target.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from replica.storage import chunks as maps
from replica.storage.adoption import refuse_same
from replica.storage.base import Storage
from replica.storage.chunked import Attempt, OnFailure, by_chunks
from replica.storage.chunks import Chunk, Layout, Lineage, token_of
from replica.storage.copy import copy_file
from replica.storage.faults import blaming
from replica.storage.judging import Control, Copied, Expected, ReadBack, needed
from replica.storage.parts import Cut, Source, Tally, Whole
from replica.storage.pieces import closing
from replica.storage.posix import PosixStorage, drop_cache
from replica.storage.threads import in_thread
from rules.checksums import Agreement, Checksums
from rules.errors import Permanent, SourceMissing, StorageError, Transient


@dataclass(frozen=True, slots=True)
class Repaired:
    """`copied.adopted`: there was nothing to repair. `copied.moved_bytes`: what sources had to give."""

    copied: Copied
    damaged: tuple[int, ...]  #: numbers of the chunks that were wrong, as they were found
    chunk_bytes: int


async def repair(
    target: Storage,
    target_path: str,
    sources: Sequence[Source],
    *,
    lineage: Lineage,
    expected: Expected,
    manifest: Mapping[int, str] | None = None,
    control: Control | None = None,
    before_publish: Callable[[], None] | None = None,
    read_back: ReadBack = "auto",
    on_failure: OnFailure | None = None,
) -> Repaired:
    """`manifest`: number → xxh3_128 of the right chunks of `chunks.CHUNK_BYTES`.

    Idempotent. Raises as replica.storage.copy. A target that writes no ranges, or a file without a strong checksum, is
    copied as a whole, from the sources in turn.
    """
    control = control or Control()
    began = time.perf_counter()
    for source in sources:
        await refuse_same(source.storage, source.path, target, target_path)
    layout = Layout(expected.size_bytes, maps.CHUNK_BYTES)
    if not sources or not by_chunks(target, expected):
        return await _whole(target, target_path, sources, lineage, expected, control, before_publish, on_failure)
    control.phase = "verifying"
    there, values = await _look(target, target_path, layout, expected, control)
    if len(there) == layout.count and values.compare(expected.checksums) is Agreement.AGREE:
        copied = Copied(layout.size_bytes, values, True, time.perf_counter() - began, "read back")
        return Repaired(copied, (), layout.chunk_bytes)
    right = manifest if manifest is not None else await _at_a_source(sources, layout, expected, control, on_failure)
    good = {number: chunk for number, chunk in there.items() if right.get(number) == chunk.xxh3_128}
    control.phase = "moving"
    attempt = _Healing(sources, target, lineage, expected, control, read_back, on_failure=on_failure)
    attempt.giving = target_path, good
    copied = await attempt.run(target_path, before_publish, began)
    return Repaired(copied, tuple(n for n in range(layout.count) if n not in good), layout.chunk_bytes)


class _Healing(Attempt):
    """An attempt that begins with the good chunks of the damaged file.

    The damaged file still has the name when the new one is proven: publishing finds it there, reads it once more,
    and moves exactly that file to quarantine (replica.storage.adoption).
    """

    giving: tuple[str, dict[int, Chunk]] = ("", {})

    async def begin(self) -> None:
        await super().begin()
        path, good = self.giving
        wanted = {number: chunk for number, chunk in good.items() if number not in self.written}
        if wanted:
            with blaming("target"):
                await self.donate(path, wanted)


async def _look(
    target: Storage, path: str, layout: Layout, expected: Expected, control: Control
) -> tuple[dict[int, Chunk], Checksums]:
    """Every whole chunk of the file as it is, and the checksums of all of it."""
    with blaming("target"):
        try:
            found = await target.stat(path)
        except SourceMissing:
            return {}, Checksums()
        if isinstance(target, PosixStorage):
            await in_thread(_forget, target, path)
        token = token_of(target.url, path, found.etag)
        whole = Whole(needed(expected))
        there = await _tallied(target, path, layout, token, control, whole)
    if found.size_bytes != layout.size_bytes:
        return there, Checksums()
    return there, Checksums.of(whole.values())


def _forget(target: PosixStorage, path: str) -> None:
    """The disk is suspected, so the kernel's memory of it is no witness."""
    descriptor = target.tree.open(path)
    try:
        drop_cache(descriptor)
    finally:
        os.close(descriptor)


async def _at_a_source(
    sources: Sequence[Source], layout: Layout, expected: Expected, control: Control, on_failure: OnFailure | None
) -> dict[int, str]:
    """The chunks of the first source that has the catalogue's bytes; else of the last one that could be read."""
    told: dict[int, str] = {}
    failure: StorageError | None = None
    for source in sources:
        try:
            with blaming("source"):
                whole = Whole(needed(expected))
                chunks = await _tallied(source.storage, source.path, layout, "", control, whole)
        except StorageError as error:
            failure = error
            if on_failure is not None:
                on_failure(source, error)
            continue
        told = {number: chunk.xxh3_128 for number, chunk in chunks.items()}
        if Checksums.of(whole.values()).compare(expected.checksums) is Agreement.AGREE:
            return told
    if not told and failure is not None:
        raise failure
    return told


async def _tallied(
    storage: Storage, path: str, layout: Layout, token: str, control: Control, whole: Whole
) -> dict[int, Chunk]:
    chunks: dict[int, Chunk] = {}
    async with closing(storage.read(path, 0, layout.size_bytes)) as pieces:
        stream = Cut(pieces)
        for number in range(layout.count):
            tally, length = Tally(), layout.length(number)
            while tally.size_bytes < length and (piece := await stream.next(length - tally.size_bytes)):
                control.check()
                tally.update(piece)
                whole.update(piece)
            if tally.size_bytes < length:
                break
            chunks[number] = tally.chunk(token)
    return chunks


async def _whole(
    target: Storage,
    path: str,
    sources: Sequence[Source],
    lineage: Lineage,
    expected: Expected,
    control: Control,
    permit: Callable[[], None] | None,
    on_failure: OnFailure | None,
) -> Repaired:
    failure: StorageError | None = None
    for source in sources:
        try:
            copied = await copy_file(
                source.storage,
                source.path,
                target,
                path,
                tag=lineage.new_part().rpartition("/")[2],
                expected=expected,
                control=control,
                before_publish=permit,
            )
        except StorageError as error:
            if error.side != "source":
                raise
            if not (isinstance(failure, Transient) and isinstance(error, Permanent)):
                failure = error  # the one that may pass is told: while it may, not all is lost
            if on_failure is not None:
                on_failure(source, error)
            control.bytes_done = 0
        else:
            chunks = range(Layout(expected.size_bytes, maps.CHUNK_BYTES).count)
            damaged = () if copied.adopted else tuple(chunks)
            return Repaired(replace(copied, source=source.storage.name), damaged, maps.CHUNK_BYTES)
    raise failure or SourceMissing(
        f"{target.name}: no source was given to repair {path} from", side="source", path=path
    )
