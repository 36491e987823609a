"""Small files that came over the network get their names, many in one go.

Given     the bytes of a file, held in memory, and what the catalogue knows of them.
Returns   Copied, when the file is durable under its name.
Promises  those of replica.storage.copy, by the same steps: written under another name, synced, read back from the disk,
          renamed without replacing. Each step is taken for all files that are waiting, so that the disk is waited for
          once where it would be waited for a hundred times.
Partner   replica.client.download reads the bytes, and has compared them with the catalogue.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from replica.client.places import Folder
from replica.storage import faultpoints
from replica.storage.base import part_path
from replica.storage.copy import Control, Copied, Expected
from replica.storage.copy_local import adopt_local
from replica.storage.faults import blaming, translated
from replica.storage.hashing import Hasher
from replica.storage.judging import COPYING, same
from replica.storage.posix import drop_cache, write_all
from replica.storage.proof import forget, hash_again
from replica.storage.threads import run
from rules.errors import Broken, ReplicaError, TargetExists

#: Files larger than this are not held in memory.
SMALL_BYTES = 4 << 20
GROUP_FILES = 64
#: Groups at a time, each in a thread: one is synced while others are written, and syncs at the same time cost one.
GROUPS = 4


@dataclass(slots=True)
class Arrival:
    """A file in memory, on its way to its name."""

    name: str
    pieces: Sequence[bytes]
    hasher: Hasher
    expected: Expected
    control: Control
    done: asyncio.Future[Copied] = field(repr=False)
    began: float = field(default_factory=time.perf_counter)
    part: str = ""
    descriptor: int = -1
    #: Of the folder that holds the new name.
    folder: int = -1
    result: Copied | ReplicaError | None = None


class Arriving:
    """For one folder, in one event loop."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._waiting: list[Arrival] = []
        self._landing: set[asyncio.Task[None]] = set()

    async def land(
        self, name: str, pieces: Sequence[bytes], hasher: Hasher, expected: Expected, control: Control
    ) -> Copied:
        """Whoever waits for a file that is being written, and is cancelled, leaves it to its group."""
        done: asyncio.Future[Copied] = asyncio.get_running_loop().create_future()
        self._waiting.append(Arrival(name, pieces, hasher, expected, control, done))
        self._begin()
        return await done

    def _begin(self) -> None:
        if self._waiting and len(self._landing) < GROUPS:
            group, self._waiting = self._waiting[:GROUP_FILES], self._waiting[GROUP_FILES:]
            task = asyncio.ensure_future(self._land(group))
            self._landing.add(task)
            task.add_done_callback(self._landing.discard)

    async def _land(self, group: list[Arrival]) -> None:
        try:
            await run(lambda: _land(self._folder, group), executor=COPYING)
            for arrival in group:
                if not arrival.done.done():
                    if isinstance(arrival.result, Copied):
                        arrival.done.set_result(arrival.result)
                    else:
                        arrival.done.set_exception(arrival.result or Broken("a file arrived without an outcome"))
        except BaseException as error:
            for arrival in group:
                if not arrival.done.done():
                    arrival.done.set_exception(error)
            raise
        finally:
            asyncio.get_running_loop().call_soon(self._begin)

    async def close(self) -> None:
        """Groups that are on their way come to their end: their threads still use descriptors."""
        self._waiting.clear()
        while self._landing:
            await asyncio.wait(self._landing)


def _land(folder: Folder, group: list[Arrival]) -> None:
    try:
        for step in (_write, _sync, _prove, _name):
            _each(step, folder, group)
        synced: dict[tuple[int, int], ReplicaError | None] = {}
        _each(lambda folder, arrival: _make_name_durable(folder, arrival, synced), folder, group)
    finally:
        for arrival in group:
            for descriptor in (arrival.descriptor, arrival.folder):
                if descriptor >= 0:
                    os.close(descriptor)
            if arrival.part:
                with suppress(ReplicaError):  # what stays is cleared away by the next download
                    folder.tree.delete(arrival.part)


def _each(step: Callable[[Folder, Arrival], None], folder: Folder, group: list[Arrival]) -> None:
    for arrival in group:
        if arrival.result is None:
            try:
                with blaming("target"), translated(folder.name, arrival.name, "target"):
                    step(folder, arrival)
            except ReplicaError as error:
                arrival.result = error


def _write(folder: Folder, arrival: Arrival) -> None:
    part = part_path(f"arrived-{secrets.token_hex(12)}")
    arrival.descriptor = folder.tree.create_part(part, arrival.hasher.size_bytes)
    arrival.part = part
    for piece in arrival.pieces:
        write_all(arrival.descriptor, faultpoints.through(memoryview(piece)))
    arrival.pieces = ()
    drop_cache(arrival.descriptor)  # of dirty pages: begin to write them
    faultpoints.reach("after_write")


def _sync(folder: Folder, arrival: Arrival) -> None:
    os.fsync(arrival.descriptor)


def _prove(folder: Folder, arrival: Arrival) -> None:
    size_bytes = os.fstat(arrival.descriptor).st_size
    forget(arrival.descriptor, 0, size_bytes)
    again = Hasher()
    hash_again(arrival.descriptor, 0, size_bytes, again, arrival.control)
    same(folder, arrival.name, again, arrival.hasher)
    os.close(arrival.descriptor)
    arrival.descriptor = -1
    faultpoints.reach("after_verify")


def _name(folder: Folder, arrival: Arrival) -> None:
    try:
        arrival.folder = folder.tree.rename(arrival.part, arrival.name)
    except TargetExists:
        # Somebody else was faster: the same bytes are adopted, others are not touched.
        arrival.result = adopt_local(folder, arrival.name, arrival.expected, arrival.control)
        if arrival.result is None:
            raise
    else:
        arrival.part = ""


def _make_name_durable(folder: Folder, arrival: Arrival, synced: dict[tuple[int, int], ReplicaError | None]) -> None:
    found = os.fstat(arrival.folder)
    key = (found.st_dev, found.st_ino)
    if key not in synced:
        synced[key] = None
        try:
            with translated(folder.name, arrival.name, "target"):
                os.fsync(arrival.folder)
        except ReplicaError as error:
            synced[key] = error
    if (failure := synced[key]) is not None:
        raise failure
    faultpoints.reach("after_publish")
    hasher = arrival.hasher
    seconds = time.perf_counter() - arrival.began
    arrival.result = Copied(
        hasher.size_bytes, hasher.checksums(), False, seconds, "read back", moved_bytes=hasher.size_bytes
    )
