"""Bring files to an endpoint and make them known.

Given     files and folders of this machine, a scope; perhaps a dataset and an endpoint.
Returns   Uploaded: what was copied, what was there already, and every file that failed, with the reason.
Promises  all names are checked before the first byte moves; no file has its final name before it was verified; the same
          command again goes on where it was: what is there is verified and adopted, and in a folder of this machine a
          large file goes on within. When the catalogue refuses files, those that this upload put there are removed
          again, never those that it found there; of two uploads at once that adopt each other's files, one that is
          refused takes away nothing that the other one has registered.
Partner   replica.storage.copy moves and proves one file; the catalogue takes each batch in one transaction.

Storages that are reached over the network cannot be written to in ranges: a large file that was interrupted on its way
to one of them begins anew, and leaves nothing.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import stat as mode_of
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import xxhash

from replica import wire
from replica.client.parallel import FULL, THREADS, Job, Progress, Tell, in_parallel, nobody, run_here
from replica.client.places import Folder, Places, is_folder
from replica.client.sources import BadReplica, tell_of
from replica.storage import chunks
from replica.storage.base import Storage
from replica.storage.copy import (
    Control,
    Copied,
    Expected,
    Lineage,
    LocalCopy,
    copy_file,
    copy_local_batch,
    measure,
    measure_local,
)
from replica.storage.credentials import Credentials
from replica.storage.faults import blaming
from replica.storage.hashing import extra_for
from replica.storage.judging import COPYING
from replica.storage.posix import PosixStorage
from replica.storage.threads import in_thread, run
from rules.checksums import Agreement, Checksums
from rules.errors import (
    AlreadyExists,
    Conflict,
    Forbidden,
    Invalid,
    NoSpace,
    NotAllowed,
    NotFound,
    Refused,
    ReplicaError,
    SourceMissing,
    StorageError,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)
from rules.names import Did, check_scope, shown
from rules.paths import path_for
from rules.quantities import human_bytes

if TYPE_CHECKING:
    from replica.client import Client

#: Files in one registration.
BATCH = 500
#: Small files between two folders that go in one list: each step is taken for all of them, and fails for few.
LIST_FILES = 16
LIST_BYTES_MAX = 4 << 20
#: After a failure of a server's that may pass.
_PAUSES = (0.2, 1.0)
#: So many files in a row may fail at a server until the rest is not tried: as forbidden, or for any reason of its own.
_FORBIDDEN_TIMES = 3
_FAILED_TIMES = 16
#: Files that were adopted, and are looked for once more when they are registered.
_LOOKS_AT_ONCE = 16
#: So many files are looked for at each endpoint to see whether an earlier upload was on its way there.
_LOOK_AT = 100


class Failed(msgspec.Struct, kw_only=True):
    """A file that did not make it, and why."""

    did: str
    path: str
    reason: str
    hint: str = ""


class Uploaded(msgspec.Struct, kw_only=True):
    """What became of an upload. `files` = `copied` + `adopted` are registered now."""

    endpoint: str
    dataset: str | None = None
    files: int = 0
    bytes: int = 0
    copied: int = 0
    #: Found at the endpoint already, read there and proven equal.
    adopted: int = 0
    #: Of the registered files, DIDs that did not exist before.
    new: int = 0
    failed: list[Failed] = []
    #: Files that were not tried because the endpoint itself failed.
    not_tried: int = 0
    #: Registered there with the bytes that were to be uploaded, and others are there. Workers look at so many of them;
    #: or why nobody was told.
    bad_replicas: list[BadReplica] = []
    to_look_at: int = 0
    not_told: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A file to upload: its DID, the folder it is seen from, its path in it."""

    did: Did
    folder: Path
    path: str
    size_bytes: int

    @property
    def local(self) -> str:
        return os.path.join(self.folder, self.path)  # noqa: PTH118  a Path is slow to make, and there may be millions


def upload(
    client: Client,
    paths: Sequence[str | os.PathLike[str]],
    *,
    scope: str,
    dataset: str | None = None,
    endpoint: str | None = None,
    credentials: Credentials | None = None,
    tell: Tell = nobody,
    chosen: Callable[[str], None] = lambda _: None,
    batch: int = BATCH,
    threads: int = THREADS,
) -> Uploaded:
    """Upload files and folders. `credentials`: what opens servers. `chosen` hears which endpoint it will be, `tell` how
    far it is."""
    check_scope(scope)
    parent = dataset_did(scope, dataset)
    sources = gather(paths, scope)
    if parent in (clash := {s.did: s for s in sources}):
        raise Invalid(
            f"the dataset {parent} has the name of the file {clash[parent].local}", hint="choose another dataset name"
        )
    places = Places(credentials)

    async def go() -> Uploaded:
        try:
            place = await _choose(client, endpoint, sources, places)
            storage = places.open(place)
            chosen(place.name)
            require_scope(client, scope)
            if parent is not None:
                require_dataset(client, parent)
            upload = _Run(client, place, storage, parent, sources, tell, threads)
            for some in _batches(sources, batch):
                if not await upload.go(some):
                    break
            return upload.result
        finally:
            await places.close()

    done = run_here(go)
    if done.bad_replicas:
        done.to_look_at, done.not_told = tell_of(client, done.bad_replicas)
    return done


class _Run:
    """One upload on its way: copies a batch, registers it, takes back what was refused."""

    def __init__(
        self,
        client: Client,
        place: wire.Endpoint,
        storage: Storage,
        parent: Did | None,
        sources: Sequence[Source],
        tell: Tell,
        threads: int,
    ) -> None:
        self._client, self._place, self._storage, self._parent = client, place, storage, parent
        self._tell, self._threads = tell, threads
        self._folders: dict[Path, Folder] = {}
        self._files_total = len(sources)
        self._bytes_total = sum(s.size_bytes for s in sources)
        self._files_done = self._bytes_done = 0
        #: In the name of every temporary: nobody else's, and recognisable as an upload's.
        tag = f"upload-{secrets.token_hex(8)}"
        self._tags = (f"{tag}-{number}" for number in count(1))
        #: Failures of a server's since something arrived there.
        self._in_a_row = 0
        self.result = Uploaded(endpoint=place.name, dataset=str(parent) if parent else None, failed=[], bad_replicas=[])

    async def go(self, batch: Sequence[Source]) -> bool:
        """Copy and register a batch; False if there is no point in going on."""
        arrived: list[tuple[Source, Copied]] = []
        broken: ReplicaError | None = None

        def jobs() -> Iterator[Job[Source, Copied]]:
            for job in self._jobs(batch):
                if broken is not None:
                    return
                yield job

        async with aclosing(in_parallel(jobs(), threads=self._threads, tick=self._say)) as all_ended:
            async for ended in all_ended:
                self._files_done += 1
                self._bytes_done += ended.key.size_bytes
                if ended.result is not None:
                    arrived.append((ended.key, ended.result))
                    self._in_a_row = 0
                    continue
                assert ended.error is not None
                self._fail(ended.key, await in_thread(self._seen_rightly, ended.key, ended.error))
                if self._is_the_endpoints(ended.error):
                    broken = ended.error
        self._say(0)
        await self._register(arrived)
        if broken is None:
            return True
        self.result.not_tried = self._files_total - self._files_done
        return False

    def _jobs(self, batch: Sequence[Source]) -> Iterator[Job[Source, Copied]]:
        """Small files between two folders in lists, if there are enough of them; every other one alone."""
        local = isinstance(self._storage, PosixStorage)
        # Many enough that every thread has a list of its own.
        worth_it = local and self._threads > 1 and len(batch) >= self._threads * LIST_FILES
        listed: list[Source] = []
        for source in batch:
            small = source.size_bytes <= LIST_BYTES_MAX
            if worth_it and small:
                listed.append(source)
                if len(listed) == LIST_FILES:
                    yield Job(listed, partial(self._copy_list, listed))
                    listed = []
            else:
                weight = FULL // 4 if small and not local else FULL
                yield Job([source], partial(self._copy_one, source), weight)
        if listed:
            yield Job(listed, partial(self._copy_list, listed))

    async def _copy_list(self, sources: Sequence[Source], control: Control) -> Sequence[Copied | Exception]:
        assert isinstance(self._storage, PosixStorage)
        copies = [
            LocalCopy(self._folder(s), s.path, self._storage, self._path(s), tag=next(self._tags), control=control)
            for s in sources
        ]
        return await run(partial(copy_local_batch, copies), executor=COPYING, on_cancel=control.stop)

    async def _copy_one(self, source: Source, control: Control) -> Sequence[Copied | Exception]:
        """Once more, when it was a server's failure that may pass. What a lost answer left there is adopted then."""
        for pause in (*_PAUSES, None):
            try:
                return await self._copy(source, control)
            except Transient as error:
                wait = pause is not None and not isinstance(self._storage, PosixStorage) and error.side == "target"
                if pause is None or not wait or isinstance(error, TimedOut | Unreachable):
                    raise
                control.bytes_done = 0
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _copy(self, source: Source, control: Control) -> Sequence[Copied | Exception]:
        folder, target, tag = self._folder(source), self._path(source), next(self._tags)
        if source.size_bytes <= chunks.RESUME_BYTES or not isinstance(self._storage, PosixStorage):
            return [await copy_file(folder, source.path, self._storage, target, tag=tag, control=control)]
        # What it is must be known before it is known where to go on. The second reading is from memory, mostly.
        with blaming("source"):
            expected = Expected(*await measure(folder, source.path, control=control))
        with _only_one(self._place, target, expected) as lineage:
            copied = await copy_file(
                folder,
                source.path,
                self._storage,
                target,
                tag=tag,
                expected=expected,
                control=control,
                lineage=lineage,
            )
        return [copied]

    def _folder(self, source: Source) -> Folder:
        folder = self._folders.get(source.folder)
        if folder is None:
            folder = self._folders[source.folder] = Folder(source.folder)
        return folder

    def _path(self, source: Source) -> str:
        return path_for(source.did, self._place.layout)

    def _is_the_endpoints(self, error: ReplicaError) -> bool:
        """Whether the next file would fail alike. A server may forbid a single name; a disk has no such reasons."""
        if not isinstance(error, StorageError) or error.side != "target" or isinstance(error, TargetExists):
            return False
        if isinstance(error, NoSpace | Unreachable):
            return True
        if isinstance(self._storage, PosixStorage):
            return isinstance(error, Forbidden)
        self._in_a_row += 1
        return self._in_a_row >= (_FORBIDDEN_TIMES if isinstance(error, Forbidden) else _FAILED_TIMES)

    async def _register(self, arrived: list[tuple[Source, Copied]]) -> None:
        """Register what arrived. Files that the catalogue names as refused are taken back; the rest is sent again."""
        while arrived:
            registration = wire.Registration(
                endpoint=self._place.name,
                replicas=[
                    wire.NewReplica(did=str(s.did), size=c.size_bytes, checksums=c.checksums.as_dict())
                    for s, c in arrived
                ],
                dataset=str(self._parent) if self._parent else None,
                evidence="hashed",
            )
            try:
                done = await in_thread(self._client.replicas.register, registration)
            except (AlreadyExists, Conflict, Invalid, NotAllowed, NotFound, Refused) as error:
                # Only an answer that says "no" is a reason to remove: after a lost answer they may well be registered.
                reasons = {str(item.get("did")): _reason(item, error) for item in error.items}
                refused = [(s, c) for s, c in arrived if str(s.did) in reasons]
                await self._take_back(refused or arrived)
                if not refused:
                    raise
                for source, _ in refused:
                    self._fail(source, type(error)(reasons[str(source.did)], hint=error.hint))
                arrived = [(s, c) for s, c in arrived if str(s.did) not in reasons]
                continue
            lost = await self._bring_again([source for source, copied in arrived if copied.adopted])
            self.result.files += done.files - lost
            self.result.new += done.new
            self.result.copied += sum(not c.adopted for _, c in arrived)
            self.result.adopted += sum(c.adopted for _, c in arrived)
            self.result.bytes += sum(c.size_bytes for _, c in arrived)
            return

    async def _take_back(self, refused: Iterable[tuple[Source, Copied]]) -> None:
        for source, copied in refused:
            if copied.adopted or await in_thread(self._is_known_here, source.did):
                continue  # it was there before us, or somebody else has registered it meanwhile: it is not ours
            await self._storage.delete(self._path(source))
            if await in_thread(self._is_known_here, source.did):
                # In this very moment somebody registered what he had adopted from us, and looked before it was gone.
                await self._copy(source, Control())

    async def _bring_again(self, adopted: Sequence[Source]) -> int:
        """What was registered, and is gone: who had put it there has taken it back. Returns how many stay lost."""
        gate = asyncio.Semaphore(_LOOKS_AT_ONCE)

        async def one(source: Source) -> bool:
            async with gate:
                try:
                    await self._storage.stat(self._path(source))
                except SourceMissing:
                    try:
                        await self._copy(source, Control())
                    except ReplicaError as error:
                        self._fail(source, error)
                        return True
                except ReplicaError:
                    pass  # it says nothing of this file, which was read a moment ago
                return False

        return sum(await asyncio.gather(*(one(source) for source in adopted)))

    def _seen_rightly(self, source: Source, error: ReplicaError) -> ReplicaError:
        """What is in the way may be the very file of that name: then it is a replica, and must not be moved away."""
        if not isinstance(error, TargetExists) or (known := self._replica_here(source.did)) is None:
            return error
        if known.state == "available" and self._are_its_bytes(source, known):
            reason = f"{known.path} has other bytes than the catalogue says, and than what is uploaded"
            self.result.bad_replicas.append(
                BadReplica(did=known.did, endpoint=known.endpoint, path=known.path, reason=reason)
            )
            return Conflict(
                f"{source.did} is registered at {self._place.name} with just these bytes, but others are there",
                hint="its replica there is bad, and was not touched: see `replica suspects`",
            )
        return AlreadyExists(
            f"{source.did} is registered at {self._place.name} with other bytes; the replica was not touched",
            hint="a name stands for one content for ever: upload other bytes under another name",
        )

    def _are_its_bytes(self, source: Source, known: wire.Replica) -> bool:
        if known.size != source.size_bytes:
            return False
        said = Checksums.of(known.checksums)
        try:
            _, found = measure_local(self._folder(source), source.path, control=Control(), algorithms=extra_for(said))
        except ReplicaError:
            return False
        return found.compare(said) is Agreement.AGREE

    def _is_known_here(self, did: Did) -> bool:
        return self._replica_here(did) is not None

    def _replica_here(self, did: Did) -> wire.Replica | None:
        try:
            return next((r for r in self._client.replicas.locate(str(did)) if r.endpoint == self._place.name), None)
        except NotFound:
            return None

    def _fail(self, source: Source, error: ReplicaError) -> None:
        self.result.failed.append(Failed(did=str(source.did), path=source.local, reason=error.message, hint=error.hint))

    def _say(self, in_flight: int) -> None:
        self._tell(Progress(self._files_done, self._files_total, self._bytes_done + in_flight, self._bytes_total))


def _reason(item: dict[str, object], error: ReplicaError) -> str:
    """What the catalogue has against one file of a batch."""
    if "known" in item:
        return f"{item.get('did')} is known with {item.get('field')} {item['known']}, not {item.get('given')}"
    return str(item.get("reason") or error.message)


@contextmanager
def _only_one(place: wire.Endpoint, target: str, expected: Expected) -> Iterator[Lineage | None]:
    """Whose unfinished file an upload goes on with: that of the same bytes, from this user and machine to the same
    place. None while another process is at it: it must not lose its file to us, and of the two the first one wins.

    The lock is a name of the kernel's, which goes with the process that has it, by whatever death.
    """
    known = f"{socket.gethostname()}\0{os.getuid()}\0{place.url}\0{target}\0{expected}"
    name = f"upload-{xxhash.xxh3_128_hexdigest(known.encode())}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        try:
            held.bind(f"\0replica-{name}")
        except OSError:
            yield None
        else:
            yield Lineage(name)


# --- what is to be uploaded -------------------------------------------------------------------------------------------


def gather(paths: Sequence[str | os.PathLike[str]], scope: str) -> list[Source]:
    """All files with their DIDs; refuses, before anything moved, what cannot be named or read as a file."""
    sources: list[Source] = []
    odd: list[str] = []
    for given in paths:
        path = Path(given)
        try:
            found = path.lstat()
        except OSError as error:
            raise Invalid(
                f"{_legible(path)} cannot be uploaded: {(error.strerror or '').lower()}; nothing was uploaded",
                hint="check its name, and that you may read it",
            ) from error
        if mode_of.S_ISDIR(found.st_mode):
            for name, size in files_in(path, odd):
                sources.append(Source(_did(scope, name, path / name), path, name, size))
        elif mode_of.S_ISREG(found.st_mode):
            absolute = path.absolute()
            sources.append(Source(_did(scope, absolute.name, path), path.parent, absolute.name, found.st_size))
        else:
            odd.append(_legible(path))
    if odd:
        more = f", and {len(odd) - 1} more are not either" if len(odd) > 1 else ""
        raise Refused(
            f"{odd[0]} is not a regular file{more}; nothing was uploaded",
            hint="links, sockets and devices are not uploaded: leave them out, or name the file that a link points to",
        )
    if not sources:
        raise Refused("there is no file to upload", hint="the folder is empty; did you mean another one?")
    _check_distinct(sources)
    return sources


def files_in(folder: Path, odd: list[str]) -> Iterator[tuple[str, int]]:
    """Paths of the files beneath a folder, relative to it, sorted; what is neither file nor folder goes to `odd`."""
    below = [""]
    while below:
        prefix = below.pop()
        try:
            with os.scandir(folder / prefix) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise Refused(
                f"the folder {_legible(folder / prefix)} cannot be read: {(error.strerror or '').lower()};"
                " nothing was uploaded",
                hint="ask its owner for the right to read it, or leave it out",
            ) from error
        folders = []
        for entry in found:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif entry.is_file(follow_symlinks=False):
                yield name, entry.stat(follow_symlinks=False).st_size
            else:
                odd.append(_legible(folder / name))
        below.extend(reversed(folders))


def _legible(path: Path) -> str:
    """The path on one line, its unprintable characters as escapes."""
    return repr(os.fspath(path))[1:-1]


def _did(scope: str, name: str, path: Path) -> Did:
    try:
        return Did.of(scope, unicodedata.normalize("NFC", name))
    except Invalid as error:
        raise Invalid(
            f"{_legible(path)} cannot be uploaded: {error.message}; nothing was uploaded",
            hint=f"rename the file; {error.hint}" if error.hint else "rename the file",
        ) from error


def _check_distinct(sources: Sequence[Source]) -> None:
    seen: dict[str, Source] = {}
    for source in sources:
        name = source.did.name
        if (other := seen.setdefault(name, source)) is not source:
            raise Invalid(
                f"{other.local} and {source.local} would both be {source.did}; nothing was uploaded",
                hint="upload the folder that holds both, so that their paths tell them apart",
            )
    for source in sources:
        segments = source.did.name.split("/")
        for n in range(1, len(segments)):
            if (above := seen.get("/".join(segments[:n]))) is not None:
                raise Invalid(
                    f"{above.did} would be a file and a folder: {source.local} lies beneath it; nothing was uploaded",
                    hint="rename one of them",
                )


def _batches(sources: Sequence[Source], size: int) -> Iterator[Sequence[Source]]:
    rest = iter(sources)
    while some := list(islice(rest, size)):
        yield some


# --- where it goes ----------------------------------------------------------------------------------------------------


def dataset_did(scope: str, dataset: str | None) -> Did | None:
    """`scope:name`, or a bare name in the scope."""
    if dataset is None:
        return None
    return Did.parse(dataset) if ":" in dataset else Did.of(scope, dataset)


def require_scope(client: Client, scope: str) -> None:
    if not any(known.name == scope for known in client.scopes.list()):
        raise NotFound(f"there is no scope {shown(scope)}", hint=f"make it with `replica scope add {scope}`")


def require_dataset(client: Client, dataset: Did) -> None:
    """Make the dataset if it is not there; Refused if nothing can be put into it."""
    try:
        found = client.dids.show(str(dataset))
    except NotFound:
        try:
            client.dids.add(wire.NewDid(did=str(dataset)))
            return
        except AlreadyExists:  # somebody was faster
            found = client.dids.show(str(dataset))
    if found.kind != "dataset":
        raise Refused(f"{dataset} is a {found.kind}, not a dataset", hint="choose another dataset")
    if not found.open:
        raise Refused(f"the dataset {dataset} is closed", hint=f"open it with `replica did reopen '{dataset}'`")


def _unfit(endpoint: wire.Endpoint) -> str:
    """Why nothing is uploaded there unless a person says so."""
    if not endpoint.writable:
        return "it is not writable"
    if endpoint.draining:
        return "it is being drained"
    return "" if endpoint.kind == "disk" else f"it is {endpoint.kind}"


async def _choose(client: Client, name: str | None, sources: Sequence[Source], places: Places) -> wire.Endpoint:
    """The endpoint named; else one of those that can be written to from here: one where an earlier try was going, or a
    disk of this machine, with most space, or a server that the credentials are for."""
    if name is not None:
        found = client.endpoints.show(name)
        if not found.writable:
            raise Refused(f"{name} is not writable", hint=f"`replica endpoint set {name} --writable` allows it")
        if found.draining:
            raise Refused(f"{name} is being drained: nothing new goes there", hint="name another endpoint")
        places.open(found)
        return found
    needed = sum(s.size_bytes for s in sources)
    obstacles: list[str] = []
    best: tuple[tuple[bool, int, int], wire.Endpoint] | None = None
    for found in client.endpoints.list():
        if reason := _unfit(found) or places.reason(found):
            obstacles.append(f"{found.name}: {reason}")
            continue
        here = is_folder(found)
        if not here and not places.has_credentials(found):
            obstacles.append(f"{found.name}: no credentials for {found.url} are known here")
            continue
        try:
            begun, free = await _look(places.open(found), found, sources)
        except ReplicaError as error:
            obstacles.append(f"{found.name}: {error.message}")
            continue
        if free is not None and free < needed and not begun:
            obstacles.append(f"{found.name}: {human_bytes(free)} are free, {human_bytes(needed)} are needed")
        elif best is None or (here, begun, free or 0) > best[0]:
            best = ((here, begun, free or 0), found)
    if best is None:
        why = "\n".join(obstacles) or "there are no endpoints"
        raise Refused(
            f"no endpoint can take the upload from this machine\n{why}",
            hint="name one with --endpoint, or run the command on a machine that has its disk, or write down in"
            " credentials_file what opens one",
        )
    return best[1]


async def _look(storage: Storage, place: wire.Endpoint, sources: Sequence[Source]) -> tuple[int, int | None]:
    """How many of the first files are there already, and how many bytes are free, if anybody knows."""
    begun = 0
    for source in sources[:_LOOK_AT]:
        try:
            found = await storage.stat(path_for(source.did, place.layout))
            begun += found.size_bytes == source.size_bytes
        except SourceMissing:
            if not isinstance(storage, PosixStorage) and not begun:
                break  # each look is a question to a server: the first file says where the earlier try was going
        except Unreachable:
            raise
        except StorageError:
            continue
    space = await storage.space()
    known = [n for n in (space.free_bytes if space else None, place.free_bytes) if n is not None]
    return begun, min(known, default=None)
