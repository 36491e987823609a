"""Fetch files, proven, from whichever replica this machine can read.

Given     DIDs of files, datasets or containers, and a folder.
Returns   Downloaded: what was fetched, what was there already, every file that failed, with the reason, and replicas
          that were found to be bad: the server is told of them at the end, and has them looked at.
Promises  a file has its name only when its size and checksums are those of the catalogue; a file that is there with
          other bytes is never overwritten; a replica that fails is followed by the next one; the same command again
          goes on where it was, within a large file too, however the first one ended.
Partner   replica.client.sources says from where; replica.storage.copy and chunked move and prove one file, and
          replica.client.arriving many small ones.

How a file comes
    small, from a disk here       in a list with others (copy_local_batch)
    small, from a server          one request, held in memory, compared, then written with others (arriving)
    large                         by chunks that survive the process, from several servers at once (copy_chunked)
    in between                    as a worker copies it (copy_file)
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from replica import wire
from replica.client.arriving import SMALL_BYTES, Arriving
from replica.client.landing import Landing, landing, lineage_of
from replica.client.parallel import FULL, THREADS, Job, Progress, Tell, in_parallel, nobody, run_here
from replica.client.places import Folder, Places
from replica.client.sources import BadReplica, Sources, tell_of
from replica.client.upload import LIST_FILES, Failed
from replica.storage import chunks
from replica.storage.base import Storage
from replica.storage.copy import (
    Control,
    Copied,
    Expected,
    LocalCopy,
    Source,
    copy_chunked,
    copy_file,
    copy_local_batch,
    measure_local,
    resumable,
)
from replica.storage.credentials import Credentials
from replica.storage.faults import blaming
from replica.storage.hashing import Hasher, extra_for
from replica.storage.judging import COPYING, expect, needed
from replica.storage.pieces import closing
from replica.storage.posix import PosixStorage
from replica.storage.threads import in_thread, run
from rules.checksums import Agreement, Checksums
from rules.errors import ChecksumDiffers, Invalid, Refused, ReplicaError, SourceMissing, StorageError, Transient
from rules.names import Did

if TYPE_CHECKING:
    from replica.client import Client

#: Servers that one large file comes from at the same time.
SOURCES_AT_ONCE = 3
#: Small files that are read from servers at the same time; more than these wait for their turn, or for the disk.
READS_AT_ONCE = 16
#: What a small file may have to weigh nothing else: THREADS * FULL times this is in memory at most.
LIGHT_BYTES = 256 << 10
#: Each source is tried so often: a flipped bit in flight, a server that starts anew.
ROUNDS = 2
_PAUSE_SECONDS = 0.5


class Downloaded(msgspec.Struct, kw_only=True):
    """What became of a download. `files` = `copied` + `adopted` are in the folder now, proven."""

    dir: str
    files: int = 0
    bytes: int = 0
    copied: int = 0
    #: There already, with the right bytes.
    adopted: int = 0
    #: Read from sources: less than the size of what was copied, where an earlier download had got some of it.
    moved_bytes: int = 0
    failed: list[Failed] = []
    #: Found wrong or missing. Workers of their sites look at so many of them; or why nobody was told.
    bad_replicas: list[BadReplica] = []
    to_look_at: int = 0
    not_told: str = ""


@dataclass(slots=True)
class Wanted:
    """A file to fetch, and the replicas there are of it."""

    did: Did
    expected: Expected
    replicas: list[wire.Replica] = field(default_factory=list)
    #: Something has its name in the folder.
    is_there: bool = False


def download(
    client: Client,
    dids: Sequence[str],
    *,
    dir: str | os.PathLike[str] = ".",
    from_expression: str | None = None,
    credentials: Credentials | None = None,
    tell: Tell = nobody,
    threads: int = THREADS,
) -> Downloaded:
    """Download DIDs to `dir`, each file under its name; datasets and containers with all that is in them.

    `from_expression`: only from these endpoints. `credentials`: what opens servers.
    """
    endpoints = {e.name: e for e in client.endpoints.list(where=from_expression)}
    wanted = _expand(client, dids)
    _check_distinct(wanted)
    with landing(Path(dir)) as place:
        done = run_here(lambda: _download(list(wanted.values()), endpoints, place, dir, credentials, tell, threads))
    if done.bad_replicas:
        done.to_look_at, done.not_told = tell_of(client, done.bad_replicas)
    return done


async def _download(
    wanted: list[Wanted],
    endpoints: dict[str, wire.Endpoint],
    place: Landing,
    dir: str | os.PathLike[str],
    credentials: Credentials | None,
    tell: Tell,
    threads: int,
) -> Downloaded:
    places = Places(credentials)
    sources = Sources(endpoints, places)
    result = Downloaded(dir=os.fspath(dir), failed=[], bad_replicas=[])
    files_total, bytes_total = len(wanted), sum(w.expected.size_bytes for w in wanted)
    files_done = bytes_done = 0

    def say(in_flight: int) -> None:
        tell(Progress(files_done, files_total, bytes_done + in_flight, bytes_total))

    fetch = _Fetch(sources, place)
    try:
        holding = {replica.endpoint for want in wanted for replica in want.replicas}
        await asyncio.gather(sources.look(holding), in_thread(_look, wanted, place.folder))
        async with aclosing(in_parallel(fetch.jobs(wanted, threads), threads=threads, tick=say)) as all_ended:
            async for ended in all_ended:
                want, copied = ended.key, ended.result
                files_done += 1
                bytes_done += want.expected.size_bytes
                if copied is not None:
                    result.files += 1
                    result.bytes += copied.size_bytes
                    result.adopted += copied.adopted
                    result.copied += not copied.adopted
                    result.moved_bytes += copied.moved_bytes
                elif ended.error is not None:
                    path = os.path.join(dir, want.did.name)  # noqa: PTH118  as it was typed
                    result.failed.append(
                        Failed(did=str(want.did), path=path, reason=ended.error.message, hint=ended.error.hint)
                    )
        say(0)
    finally:
        await fetch.close()
        await places.close()
    result.bad_replicas = sources.bad
    return result


# --- what is wanted ---------------------------------------------------------------------------------------------------


def _expand(client: Client, dids: Sequence[str]) -> dict[str, Wanted]:
    """Every file of the DIDs once, with its replicas. Files come from the contents: one without any replica counts."""
    wanted: dict[str, Wanted] = {}
    for text in dict.fromkeys(dids):
        found = client.dids.show(text)
        for file in _files(client, found):
            wanted.setdefault(file.did, _wanted(file))
        for replica in client.replicas.locate(found.did):
            # What was attached between the two questions is for the next download.
            if (want := wanted.get(replica.did)) is not None:
                want.replicas.append(replica)
    if not wanted:
        raise Refused("there is no file to download", hint="the dataset is empty")
    return wanted


def _files(client: Client, found: wire.Did, seen: set[str] | None = None) -> Iterator[wire.Did]:
    seen = set() if seen is None else seen
    if found.kind == "file":
        yield found
    elif found.did not in seen:
        seen.add(found.did)
        for child in client.dids.contents(found.did):
            yield from _files(client, child, seen)


def _wanted(file: wire.Did) -> Wanted:
    if file.size is None:
        raise Refused(f"the size of {file.did} is not known", hint="its registration is incomplete")
    return Wanted(Did.parse(file.did), Expected(size_bytes=file.size, checksums=Checksums.of(file.checksums)))


def _check_distinct(wanted: dict[str, Wanted]) -> None:
    """No two files may come to lie under one name, nor one beneath the other."""
    by_name: dict[str, Did] = {}
    for want in wanted.values():
        other = by_name.setdefault(want.did.name, want.did)
        if other != want.did:
            raise Invalid(
                f"{other} and {want.did} would both be {want.did.name}; nothing was downloaded",
                hint="download them to different folders with --dir",
            )
    for name, did in by_name.items():
        segments = name.split("/")
        for n in range(1, len(segments)):
            if (above := by_name.get("/".join(segments[:n]))) is not None:
                raise Invalid(
                    f"{above} would be a file where {did} needs a folder; nothing was downloaded",
                    hint="download them to different folders with --dir",
                )


def _look(wanted: Sequence[Wanted], folder: Folder) -> None:
    """Which names are taken: a look, so that a new file costs no second one. Publishing looks again."""
    for want in wanted:
        try:
            folder.tree.stat(want.did.name)
        except SourceMissing:
            continue
        except StorageError:
            pass  # something is there, and will be in the way
        want.is_there = True


def _there(want: Wanted, folder: Folder, control: Control) -> Copied | None:
    """The file if it is in the folder already, read and proven; TargetExists if other bytes have its name."""
    name, expected = want.did.name, want.expected
    began = time.perf_counter()
    try:
        if folder.tree.stat(name).size_bytes == expected.size_bytes:
            further = extra_for(expected.checksums)
            size, checksums = measure_local(folder, name, control=control, algorithms=further)
            if checksums.compare(expected.checksums) is Agreement.AGREE:
                return Copied(size, checksums, True, time.perf_counter() - began, "read back")
    except SourceMissing:
        return None
    raise folder.tree.in_the_way(name)


# --- from where -------------------------------------------------------------------------------------------------------


class _Fetch:
    """Brings files into the folder, each from the first source that gives its bytes."""

    def __init__(self, sources: Sources, place: Landing) -> None:
        self._sources = sources
        self._place = place
        self._folder = place.folder
        self._arriving = Arriving(place.folder)
        self._reading = asyncio.Semaphore(READS_AT_ONCE)
        tag = f"download-{secrets.token_hex(8)}"
        self._tags = (f"{tag}-{number}" for number in count(1))

    async def close(self) -> None:
        await self._arriving.close()

    # ── which way ────────────────────────────────────────────────────────────────────────────────────────────────────

    def jobs(self, wanted: Sequence[Wanted], threads: int) -> Iterator[Job[Wanted, Copied]]:
        """Small files from disks of this machine in lists, if there are enough of them; every other one alone."""
        listed: list[tuple[Wanted, wire.Replica]] = []
        # Many enough that every thread has a list of its own.
        worth_it = threads > 1 and len(wanted) >= threads * LIST_FILES
        for want in wanted:
            usable, _ = self._sources.of(want.replicas)
            here = bool(usable) and self._sources.is_here(usable[0])
            small = want.expected.size_bytes <= SMALL_BYTES
            if worth_it and here and small and not want.is_there:
                listed.append((want, usable[0]))
                if len(listed) == LIST_FILES:
                    yield self._list_job(listed)
                    listed = []
            else:
                light = small and not here and not want.is_there
                weight = 1 + want.expected.size_bytes // LIGHT_BYTES if light else FULL
                yield Job([want], partial(self._alone, want), weight)
        if listed:
            yield self._list_job(listed)

    def _list_job(self, listed: list[tuple[Wanted, wire.Replica]]) -> Job[Wanted, Copied]:
        return Job([want for want, _ in listed], partial(self._list, listed))

    async def _list(self, listed: list[tuple[Wanted, wire.Replica]], control: Control) -> list[Copied | Exception]:
        """In one thread; what its first source fails for goes on by itself."""
        copies = [
            LocalCopy(
                _folder_of(await self._sources.open(replica)),
                replica.path,
                self._folder,
                want.did.name,
                tag=next(self._tags),
                expected=want.expected,
                control=control,
            )
            for want, replica in listed
        ]
        results = await run(partial(copy_local_batch, copies), executor=COPYING, on_cancel=control.stop)
        for place, (want, replica) in enumerate(listed):
            error = results[place]
            if isinstance(error, StorageError) and error.side == "source":
                self._sources.failed(replica, error)
                try:
                    results[place] = await self._fetch(want, control)
                except ReplicaError as again:
                    results[place] = again
        return results

    async def _alone(self, want: Wanted, control: Control) -> list[Copied | Exception]:
        return [await self._fetch(want, control)]

    # ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _fetch(self, want: Wanted, control: Control) -> Copied:
        """The file from the first replica that gives its bytes; what is there already needs no replica."""
        if want.is_there:
            there = await run(partial(_there, want, self._folder, control), executor=COPYING, on_cancel=control.stop)
            if there is not None:
                if there.size_bytes > chunks.RESUME_BYTES:
                    await self._forget_earlier(want)
                return there
        if resumable(self._folder, want.expected):
            lineage = lineage_of(want.did, want.expected)
            async with self._place.alone(lineage):
                copied = await self._from_any(want, control)
                await self._place.clear(lineage)
            return copied
        return await self._from_any(want, control)

    async def _forget_earlier(self, want: Wanted) -> None:
        lineage = lineage_of(want.did, want.expected)
        async with self._place.alone(lineage):
            await self._place.clear(lineage)

    async def _from_any(self, want: Wanted, control: Control) -> Copied:
        """Each source in turn; those whose failure may pass once more. Only the target's failure ends it at once."""
        usable, why_not = self._sources.of(want.replicas)
        hints: list[str] = []
        for attempt in range(ROUNDS):
            reasons: dict[str, str] = {}
            again: list[wire.Replica] = []
            if attempt:
                await asyncio.sleep(_PAUSE_SECONDS)
            for some in self._together(want, usable):
                errors: dict[str, ReplicaError] = {}
                try:
                    return await self._from(want, some, control, errors)
                except ReplicaError as error:
                    if isinstance(error, StorageError) and error.side == "target":
                        raise
                    errors.setdefault(some[0].endpoint, error)
                for replica in some:
                    failure = errors.get(replica.endpoint) or Transient("it was not asked")
                    self._sources.failed(replica, failure)
                    reasons[replica.endpoint] = f"{replica.endpoint}: {_without_name(failure, replica.endpoint)}"
                    hints.append(failure.hint)
                    if isinstance(failure, Transient | ChecksumDiffers):
                        again.append(replica)
                control.bytes_done = 0
            usable = again
            why_not = [*reasons.values(), *(w for w in why_not if w.partition(": ")[0] not in reasons)]
            if not again:
                break
        raise Refused(
            f"no replica of {want.did} can be read from this machine"
            + "".join(f"\n{reason}" for reason in why_not or ["the catalogue knows of no replica"]),
            hint=next((hint for hint in hints if hint), "")
            or "run the command on a machine that has one of these disks, or make a rule for an endpoint of this one",
        )

    def _together(self, want: Wanted, usable: list[wire.Replica]) -> list[list[wire.Replica]]:
        """Sources that are read at the same time: all of a large file; else one after the other."""
        if usable and resumable(self._folder, want.expected):
            return [usable]
        return [[replica] for replica in usable]

    async def _from(
        self, want: Wanted, replicas: list[wire.Replica], control: Control, errors: dict[str, ReplicaError]
    ) -> Copied:
        """From one source, or a large file from several. `errors` gets what a source was given up for."""
        opened: list[tuple[wire.Replica, Storage]] = []
        for replica in replicas:
            try:
                opened.append((replica, await self._sources.open(replica)))
            except ReplicaError as error:
                errors[replica.endpoint] = error
        if not opened:
            raise next(iter(errors.values()))
        replica, source = opened[0]
        if resumable(self._folder, want.expected):
            copied = await self._by_chunks(want, opened, control, errors)
        elif want.expected.size_bytes <= SMALL_BYTES and not isinstance(source, PosixStorage):
            copied = await self._small(want, replica, source, control)
        else:
            copied = await copy_file(
                source,
                replica.path,
                self._folder,
                want.did.name,
                tag=next(self._tags),
                expected=want.expected,
                control=control,
            )
        for replica in replicas:
            if (failure := errors.get(replica.endpoint)) is not None:
                self._sources.failed(replica, failure)
            elif len(replicas) == 1 or replica.endpoint == copied.source:
                self._sources.answered(replica)
        return copied

    async def _small(self, want: Wanted, replica: wire.Replica, source: Storage, control: Control) -> Copied:
        """One request. The catalogue's checksum is what proves the bytes; the size tells how many to ask for."""
        expected = want.expected
        hasher = Hasher(needed(expected))
        pieces: list[bytes] = []
        async with self._reading:
            with blaming("source"):
                async with closing(source.read(replica.path, 0, expected.size_bytes)) as coming:
                    async for piece in coming:
                        hasher.update(piece)
                        pieces.append(bytes(piece))
                        control.bytes_done = hasher.size_bytes
                expect(source, replica.path, hasher, expected)
        return await self._arriving.land(want.did.name, pieces, hasher, expected, control)

    async def _by_chunks(
        self,
        want: Wanted,
        opened: list[tuple[wire.Replica, Storage]],
        control: Control,
        errors: dict[str, ReplicaError],
    ) -> Copied:
        here = isinstance(opened[0][1], PosixStorage)
        return await copy_chunked(
            [Source(storage, replica.path) for replica, storage in opened],
            self._folder,
            want.did.name,
            lineage=lineage_of(want.did, want.expected),
            expected=want.expected,
            control=control,
            at_once=1 if here else min(len(opened), SOURCES_AT_ONCE),
            on_failure=lambda source, error: errors.update({source.storage.name: error}),
        )


def _folder_of(storage: Storage) -> PosixStorage:
    assert isinstance(storage, PosixStorage)
    return storage


def _without_name(error: ReplicaError, endpoint: str) -> str:
    """The reason alone, where the line begins with the name anyway."""
    return error.message.removeprefix(f"{endpoint} ")
