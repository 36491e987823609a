"""Fetch files, proven, from whichever replica this machine can read.

Given     DIDs of files, datasets or containers, and a folder.
Returns   Downloaded: what was fetched, what was there already, and every file that failed, with the reason.
Promises  a file has its name only when its size and checksums are those of the catalogue; a file that is there with
          other bytes is never overwritten; a replica that fails is followed by the next one; the same command again
          goes on where it was.
Partner   replica.client.places says which replicas are here; replica.storage.copy moves and proves one file.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from replica import wire
from replica.client.parallel import THREADS, Progress, Tell, in_parallel, nobody
from replica.client.places import Endpoint, Folder, Places, landing
from replica.client.upload import Failed
from replica.storage.copy import Control, Copied, Expected, copy_local, measure_local
from replica.storage.hashing import extra_for
from rules.checksums import Agreement, Checksums
from rules.errors import Invalid, Refused, SourceMissing, StorageError, Unreachable
from rules.names import Did

if TYPE_CHECKING:
    from replica.client import Client


class Downloaded(msgspec.Struct, kw_only=True):
    """What became of a download. `files` = `copied` + `adopted` are in the folder now, proven."""

    dir: str
    files: int = 0
    bytes: int = 0
    copied: int = 0
    #: There already, with the right bytes.
    adopted: int = 0
    failed: list[Failed] = []


@dataclass(slots=True)
class Wanted:
    """A file to fetch, and the replicas there are of it."""

    did: Did
    expected: Expected
    replicas: list[wire.Replica] = field(default_factory=list)


def download(
    client: Client,
    dids: Sequence[str],
    *,
    dir: str | os.PathLike[str] = ".",
    from_expression: str | None = None,
    tell: Tell = nobody,
    threads: int = THREADS,
) -> Downloaded:
    """Download DIDs to `dir`, each file under its name; datasets and containers with all that is in them."""
    endpoints = {e.name: e for e in client.endpoints.list(where=from_expression)}
    wanted = _expand(client, dids)
    _check_distinct(wanted)
    sources = _Sources(endpoints)
    result = Downloaded(dir=os.fspath(dir), failed=[])
    files_total, bytes_total = len(wanted), sum(w.expected.size_bytes for w in wanted.values())
    files_done = bytes_done = 0

    def say(in_flight: int) -> None:
        tell(Progress(files_done, files_total, bytes_done + in_flight, bytes_total))

    with landing(Path(dir)) as folder:
        tag = f"download-{secrets.token_hex(8)}"
        jobs = ((want, sources.job(want, folder, f"{tag}-{n}")) for n, want in enumerate(wanted.values(), 1))
        for ended in in_parallel(jobs, threads=threads, tick=say):
            want = ended.key
            files_done += 1
            bytes_done += want.expected.size_bytes
            if ended.result is not None:
                result.files += 1
                result.bytes += ended.result.size_bytes
                result.adopted += ended.result.adopted
                result.copied += not ended.result.adopted
            else:
                assert ended.error is not None
                path = os.path.join(dir, want.did.name)  # noqa: PTH118  as it was typed
                result.failed.append(
                    Failed(did=str(want.did), path=path, reason=ended.error.message, hint=ended.error.hint)
                )
        say(0)
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


class _Sources:
    """Which replicas may be read, and how; asked from several threads."""

    def __init__(self, endpoints: dict[str, wire.Endpoint]) -> None:
        self._endpoints = endpoints
        self._places = Places()

    def job(self, want: Wanted, folder: Folder, tag: str) -> Callable[[Control], Copied]:
        return lambda control: self._fetch(want, folder, tag, control)

    def _fetch(self, want: Wanted, folder: Folder, tag: str, control: Control) -> Copied:
        """The file from the first replica that gives its bytes; what is there already needs no replica."""
        there = _there(want, folder, control)
        if there is not None:
            return there
        why_not: list[str] = []
        for replica in sorted(want.replicas, key=self._rank):
            try:
                source = self._open(replica)
                return copy_local(
                    source, replica.path, folder, want.did.name, tag=tag, expected=want.expected, control=control
                )
            except StorageError as error:
                if error.side == "target":
                    raise
                why_not.append(f"{replica.endpoint}: {error.message}")
        raise Refused(
            f"no replica of {want.did} can be read from this machine"
            + "".join(f"\n{reason}" for reason in why_not or ["the catalogue knows of no replica"]),
            hint="run the command on a machine that has one of these disks, or make a rule for an endpoint of this one",
        )

    def _open(self, replica: wire.Replica) -> Endpoint:
        endpoint = self._endpoints.get(replica.endpoint)
        if endpoint is None:
            raise Unreachable("it is not among the endpoints asked for")
        if replica.state != "available":
            raise Unreachable(f"the replica is {replica.state}")
        if not endpoint.readable:
            raise Unreachable("it is not readable")
        return self._places.open(endpoint)

    def _rank(self, replica: wire.Replica) -> tuple[bool, bool, str]:
        """Available before others, disk before tape; then by name, so that the same command does the same."""
        endpoint = self._endpoints.get(replica.endpoint)
        return replica.state != "available", endpoint is None or endpoint.kind != "disk", replica.endpoint
