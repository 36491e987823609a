"""What has the final name already, and how a proven temporary gets it.

Given     a storage, a path, and what the bytes should be.
Returns   Copied for bytes that were there before us; None where there is room.
Promises  bytes are read before they are believed; wrong ones are moved to quarantine, never deleted, only after
          `permit` was asked, and only if they were seen twice, the same: else a good file would be moved away for what
          a network, or a page of somebody else's, told of it once. Nothing is ever replaced.
Partner   replica.storage.copy, chunked and repair.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from replica.storage.base import Storage
from replica.storage.copy_local import adopt_local, measure_local, refuse_same_local
from replica.storage.faults import blaming, place
from replica.storage.hashing import Hasher
from replica.storage.judging import (
    COPYING,
    ROUNDS,
    Control,
    Copied,
    Expected,
    changed,
    in_the_way,
    needed,
    same_file,
)
from replica.storage.pieces import closing
from replica.storage.posix import PosixStorage
from replica.storage.threads import run
from rules.checksums import Agreement, Checksums
from rules.errors import Invalid, SourceMissing, TargetExists, Transient


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
    algorithms = needed(expected)
    began = time.perf_counter()
    with blaming("target"):
        if isinstance(target, PosixStorage):
            return await run(
                partial(adopt_local, target, target_path, expected, control, permit),
                executor=COPYING,
                on_cancel=control.stop,
            )
        try:
            found = None
            for _ in range(2):
                earlier, found = found, await _seen(target, target_path, expected, algorithms, control)
                size, checksums = found
                if checksums is not None and checksums.compare(expected.checksums) is Agreement.AGREE:
                    return Copied(size, checksums, True, time.perf_counter() - began, "read back")
                control.check()
            if found != earlier:
                raise _unsteady(target, target_path)
            if permit is not None:
                permit()
            await target.quarantine(target_path)
        except SourceMissing:
            return None  # nothing there, or somebody else took it away
        finally:
            control.phase = "moving"
    return None


async def _seen(
    target: Storage, path: str, expected: Expected, algorithms: Sequence[str], control: Control
) -> tuple[int, Checksums | None]:
    """What is there; of another size, it need not be read."""
    size_bytes = (await target.stat(path)).size_bytes
    if size_bytes != expected.size_bytes:
        return size_bytes, None
    control.phase = "verifying"
    return await measure_by(target, path, algorithms, control)


def _unsteady(target: Storage, path: str) -> Transient:
    return Transient(
        f"{place(target.name, path)}: what has the name reads differently each time",
        hint="something between here and the disk changes bytes: look at its network, memory and controller",
        endpoint=target.name,
        path=path,
        side="target",
    )


async def measure(storage: Storage, path: str, *, control: Control | None = None) -> tuple[int, Checksums]:
    """Size and checksums of a file where it lies. SourceChanged if it changed while it was read."""
    control = control or Control()
    if isinstance(storage, PosixStorage):
        return await run(
            partial(measure_local, storage, path, control=control), executor=COPYING, on_cancel=control.stop
        )
    return await measure_by(storage, path, (), control)


async def measure_by(storage: Storage, path: str, algorithms: Sequence[str], control: Control) -> tuple[int, Checksums]:
    """`measure` through the contract, with further algorithms."""
    before = await storage.stat(path)
    hasher = Hasher(algorithms)
    async with closing(storage.read(path)) as pieces:
        async for piece in pieces:
            control.check()
            hasher.update(piece)
    after = await storage.stat(path)
    if after.etag != before.etag or hasher.size_bytes != after.size_bytes:
        raise changed(storage, path)
    return hasher.size_bytes, hasher.checksums()


async def adopt_existing(
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
        raise same_file(source, source_path)
    if expected is None or not expected.checksums:
        # Nobody knows what the bytes should be, and a size proves nothing: the source must tell.
        with blaming("source"):
            expected = Expected(*await measure(source, source_path, control=control))
    return await adopt(target, target_path, expected, control, permit)


async def publish_proven(
    target: Storage,
    part: str,
    target_path: str,
    exactly: Expected,
    control: Control,
    permit: Callable[[], None] | None,
) -> Copied | None:
    """Give a proven temporary its name, as `publish_by`. After a Copied the temporary is still there."""
    give = partial(target.publish, part, target_path)
    return await publish_by(give, target, target_path, exactly, control, permit)


async def publish_by(
    give: Callable[[], Awaitable[None]],
    target: Storage,
    target_path: str,
    exactly: Expected,
    control: Control,
    permit: Callable[[], None] | None,
) -> Copied | None:
    """Let `give` give proven bytes their name, asking `permit` before each try. Copied: somebody else was faster, with
    the same bytes."""
    with blaming("target"):
        for _ in range(ROUNDS):
            control.check()
            if permit is not None:
                permit()
            try:
                await give()
            except TargetExists:
                there = await adopt(target, target_path, exactly, control, permit)
                if there is not None:
                    return there
            else:
                return None
    raise in_the_way(target, target_path)


async def refuse_same(source: Storage, source_path: str, target: Storage, target_path: str) -> None:
    """Invalid if both are one file: its "wrong target" would be quarantined, and with it the source."""
    if source.url == target.url and source_path == target_path:
        raise same_file(source, source_path)
    if isinstance(source, PosixStorage) and isinstance(target, PosixStorage):
        await run(partial(refuse_same_local, source, source_path, target, target_path), executor=COPYING)
