"""The storage contract: what every place that keeps bytes can do, and what each verb promises.

Given     paths relative to the endpoint's root, '/'-separated. rules.names has checked them; they are checked again
          here, because between there and here lie a network and somebody else's worker.
Returns   a Protocol, `Storage`, and the small values it speaks in.
Promises  a path that passes `check_path` cannot leave the root or touch Replica's own files beneath `.replica`.
Partner   replica.storage.conformance proves an adapter; replica.storage.copy is the main caller.

To add a kind of storage: copy the nearest adapter in the same order of verbs, run the conformance suite on it, and add
one line to replica.storage.registry.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from rules.checksums import Checksums
from rules.errors import Invalid
from rules.names import shown

if TYPE_CHECKING:
    import aiohttp

#: Replica's own folder in the root of every endpoint. rules.names keeps the name free.
OWN = ".replica"
#: Temporaries: bytes that nobody may take for a replica yet.
PARTS = f"{OWN}/part"
#: Files that stood under a replica's name with other bytes. Moved here, never deleted: they may be somebody's only
#: copy.
QUARANTINE = f"{OWN}/quarantine"
#: Says "this is the endpoint's disk": an empty mount point does not have it.
SENTINEL = f"{OWN}/endpoint"

#: What Linux takes in one call (4096 with the NUL), less room for Replica's own folders before it.
PATH_BYTES_MAX = 4000

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._\-]{0,199}\Z")

#: A piece of a file. A memoryview is valid only until the next piece is asked for: its buffer is used again.
Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Stat:
    """A file as it is now. Two equal `etag`s mean: nobody wrote to it in between, as far as the storage can tell."""

    size_bytes: int
    mtime_ns: int
    etag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing."""

    path: str
    size_bytes: int
    mtime_ns: int
    #: Why this entry can be no replica ("symbolic link", "name is not UTF-8" …); empty for an ordinary file.
    #: With a problem, `path` is for people and logs (undecodable bytes as `\\xNN`), and no verb need accept it.
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Space:
    total_bytes: int
    free_bytes: int  #: what *we* may still write, not what the superuser may


def check_path(path: str) -> str:
    """The path of a file of the endpoint, or Invalid: absolute, empty, '.', '..', NUL, or Replica's own folder."""
    segments = _segments(path)
    if segments[0].startswith(OWN):
        raise Invalid(f"the path {shown(path)} begins with '{OWN}'", hint="such names are kept for Replica's own files")
    return path


def check_readable(path: str) -> str:
    """The path of a file, published or temporary: what `stat`, `read`, `checksum` and `delete` accept."""
    return path if path.startswith(PARTS + "/") and check_part(path) else check_path(path)


def check_part(path: str) -> str:
    """The path of a temporary, as `part_path` makes them."""
    folder, _, tag = path.rpartition("/")
    if folder != PARTS or not _TAG.match(tag):
        raise Invalid(f"{shown(path)} is not a temporary", hint=f"a temporary is {PARTS}/<tag>")
    return path


def part_path(tag: str) -> str:
    """Where the temporary of one attempt lies. The tag holds transfer, epoch and a random part: a zombie of an older
    epoch can neither write into it nor publish it."""
    return check_part(f"{PARTS}/{tag}")


def check_prefix(prefix: str) -> str:
    """The folder a listing begins at; empty for all."""
    return check_path(prefix) if prefix else prefix


def _segments(path: str) -> list[str]:
    def no(reason: str) -> Invalid:
        return Invalid(f"the path {shown(path)} {reason}", hint="write it relative to the endpoint's root: a/b/c")

    if not path:
        raise no("is empty")
    if path.startswith("/"):
        raise no("is absolute")
    if "\0" in path:
        raise no("holds a NUL character")
    try:
        size_bytes = len(path.encode())
    except UnicodeEncodeError:
        raise no("is not proper Unicode text") from None
    if size_bytes > PATH_BYTES_MAX:
        raise no(f"has {size_bytes} bytes, more than {PATH_BYTES_MAX}")
    segments = path.split("/")
    for segment in segments:
        if segment in ("", ".", ".."):
            raise no(f"has the segment {segment!r}")
    return segments


@runtime_checkable
class Storage(Protocol):
    """A place that keeps bytes.

    Every verb raises rules.errors.StorageError with endpoint and path (Unreachable when the storage is not there:
    never an empty answer instead), and Invalid for a path that cannot be right. All verbs may be called from several
    tasks at once. `side` in their errors is "unknown": only the caller knows whether this is the source or the target.
    """

    #: The endpoint's name, for messages; empty where the storage was opened without one.
    name: str
    #: What it was opened by. Holds no secret.
    url: str

    async def prepare(self) -> None:
        """Make the storage ready to be an endpoint: called once, when the endpoint is created.

        Idempotent. Partial effects: folders may exist after a failure. Refused: it belongs to another endpoint.
        """
        ...

    async def stat(self, path: str) -> Stat:
        """Size and time of a file, published or temporary.

        Idempotent, no effect. SourceMissing: nothing there. Forbidden: there is something, and it is no regular file.
        """
        ...

    def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Every file beneath the folder `prefix`, in no promised order; Replica's own folder is left out.

        A path is the very one that `publish` was given, and that `stat` takes; the size is that of `stat`, the time at
        least in whole seconds. What no verb can speak of (a link, a name that is no text) is an entry with a problem.

        No effect. What appears or goes away meanwhile may or may not be seen; what stays is seen exactly once. A folder
        that is not there is an empty one. What cannot be read raises: a listing never leaves out in silence, for a
        missing line is taken for a missing file.
        """
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        """The bytes from `offset` on, at most `length`; each piece is valid until the next one is asked for.

        Idempotent, no effect; pieces come in order. A temporary is read from where it is durable, not from a cache.
        SourceMissing, Forbidden. Beyond the end: no pieces.
        """
        ...

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        """Write an unpublished file, `part_path(tag)`. When this returns, the bytes survive a power cut.

        Not idempotent: TargetExists if the temporary is there. After an error the temporary may exist, incomplete:
        `delete` it. NoSpace: full, before the first byte if `size_bytes` says so.
        """
        ...

    async def publish(self, temporary: str, final: str) -> None:
        """Give a written temporary its name. Atomic and durable; makes folders; never replaces.

        TargetExists: something has the name already, and nothing was changed. Not idempotent: after a lost answer,
        look at `final`. Readers see no file or the whole file, never a part.
        """
        ...

    async def delete(self, path: str) -> None:
        """Remove a file, published or temporary. Idempotent: nothing there is success. Folders stay."""
        ...

    async def quarantine(self, path: str) -> str:
        """Move a wrong file out of the way, into Replica's own folder; returns where it is now. Nothing is lost.

        Not idempotent: SourceMissing if nothing is there (somebody else may have been faster).
        """
        ...

    async def checksum(self, path: str, algorithm: str) -> str | None:
        """The storage's own digest, hexadecimal as in rules.checksums; None: it has none that it computed from the
        bytes as they lie. No effect. SourceMissing."""
        ...

    async def space(self) -> Space | None:
        """How much fits; None: the storage does not say."""
        ...

    async def collect_parts(self, older_than_seconds: float) -> int:
        """Remove temporaries nobody wrote to for so long; returns how many. Idempotent. A copy that still lives then
        fails with a Transient error, publishing nothing."""
        ...

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        ...


@runtime_checkable
class SupportsLocalPath(Protocol):
    """The files are ordinary files of this machine."""

    def local_path(self, path: str) -> Path:
        """Where the file lies, for programs that want a name (a reader on the same node). Nothing is opened, and
        nothing holds the path in place: Replica itself never opens a file this way."""
        ...


@runtime_checkable
class SupportsServerCopy(Protocol):
    """The server copies by itself between two places that it keeps: no byte passes through the worker."""

    async def copy_from(self, source: Storage, path: str, temporary: str, *, expected: Stat) -> bool:
        """Make `temporary` here a copy of a file of `source`. False: this is not possible for this source; no effect.

        SourceChanged: the source is not as `expected`. TargetExists: the temporary is there. As after a failed write,
        the temporary may exist after an error: `delete` it. What the server made is not proven by this: read it back.
        """
        ...


@runtime_checkable
class SupportsDigests(Protocol):
    """The storage compares what it is sent with a digest that is sent along; `checksum` of a temporary tells it."""

    async def digests(self, size_bytes: int | None = None) -> tuple[str, ...]:
        """The algorithms for a file of that size, after the server was seen to refuse a wrong digest. No effect but the
        first look at it."""
        ...


class Unseen(Protocol):
    """A file that is at the storage, or ready to be sent there, and has no name yet."""

    async def publish(self, checksums: Checksums) -> str:
        """Give it its name, if nothing has it, and if the storage finds that what it received has the checksum that it
        compares by; returns that algorithm. In one act: nobody ever sees a part of it, or other bytes.

        `checksums` are of the bytes as they were read at the source. TargetExists: something has the name, nothing was
        changed, and it may be asked again. After another error it may have happened: look at the name.
        """
        ...

    async def drop(self) -> None:
        """Let go of what was not published. Idempotent, raises nothing; after `publish` it does nothing."""
        ...


@runtime_checkable
class SupportsDirect(Protocol):
    """A file can be given its name by the same act that compares it with a digest: it needs no temporary."""

    async def send(self, final: str, chunks: AsyncIterator[Piece], *, size_bytes: int) -> Unseen | None:
        """Take the chunks, all of them, for a file of that name. None: this is not possible here for a file of this
        size; no effect, and no chunk was taken. After an error nothing of it is visible, ever."""
        ...


@runtime_checkable
class SupportsFewQuestions(Protocol):
    """Every question is a request to a server: what the copy knows already need not be asked."""

    def believed(self, path: str, size_bytes: int) -> None:
        """What the catalogue knows of a file's size. Only a guess of how much there is to read; nobody is asked."""
        ...

    async def write_new(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int) -> None:
        """`write`, under a name that was drawn at random for it: nobody looks whether something has it already."""
        ...


@runtime_checkable
class SupportsPresigned(Protocol):
    """A file can be read by a URL alone."""

    def presigned(self, path: str, seconds: int) -> str:
        """A URL by which whoever holds it may read the file for so long: a secret, never logged. Invalid: too long."""


@runtime_checkable
class SupportsResume(Protocol):
    """Temporaries may be written in ranges, in any order, and be gone on with by a later attempt.

    A temporary that was begun this way is read, published and deleted by the usual verbs. Everything else of resuming
    (which chunks are there, which of them are right) is replica.storage.chunked's.
    """

    async def begin(self, temporary: str, size_bytes: int) -> None:
        """Make an unpublished file to be written in ranges. Not idempotent: TargetExists. NoSpace."""
        ...

    async def write_at(self, temporary: str, offset: int, pieces: AsyncIterator[Piece]) -> None:
        """Write one range, at the place given. Idempotent; durable only after `settle`; the file grows as needed.

        Transient if there is no such temporary (any more): somebody took it over, or collected it.
        """
        ...

    async def settle(self, temporary: str) -> None:
        """All ranges written so far survive a power cut when this returns."""
        ...

    async def append(self, temporary: str, text: bytes) -> None:
        """Add to the end of a small temporary, made if it is not there: a chunk map. In one piece, not synced."""
        ...

    async def unfinished(self, prefix: str) -> Sequence[str]:
        """The temporaries whose tag begins so, chunk maps included. No effect."""
        ...

    async def take_over(self, temporary: str, mine: str) -> bool:
        """Give another attempt's temporary a name of our own: atomic, so of several who try one gets it. It counts as
        written to now, for `collect_parts`.

        True: nobody can write into it any more. False: that is not known; it may be read from, and never be published.
        Not idempotent: SourceMissing if it is not there any more.
        """
        ...


def supports(storage: Storage, ability: Any) -> bool:
    """Whether a storage has one of these abilities. Like isinstance, which looks at every method each time, and so
    costs a small file more than its hashing."""
    known = _ABLE.get((type(storage), ability))
    if known is None:
        known = _ABLE[(type(storage), ability)] = isinstance(storage, ability)
    return known


_ABLE: dict[tuple[type, Any], bool] = {}


@dataclass(frozen=True, slots=True)
class Party:
    """One end of a copy between two storages, as its own storage describes it."""

    #: Of the file: absolute, http or https, quoted; holds no secret and is never found by asking a server.
    url: str
    #: A pool of connections that trusts what the storage trusts; it belongs to the storage.
    session: aiohttp.ClientSession = field(repr=False)
    #: What opens the storage, read anew for each copy. The secrets in it were written down for this very storage.
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Further hosts ("host" or "host:port") that the storage may send the worker on to, as its administrator wrote them
    #: down. They belong to it, but `headers` are not for them.
    may_redirect_to: frozenset[str] = frozenset()


@runtime_checkable
class SupportsThirdParty(Protocol):
    """Bytes can go from here straight to another such storage, or come from one: HTTP COPY of the WLCG."""

    async def party(self, path: str) -> Party:
        """For a file, published or temporary. No effect, and nobody is asked."""
        ...

    async def told(self, path: str, algorithm: str) -> tuple[int, str | None]:
        """Size, and `checksum` by that algorithm, in one question: for a file that has just arrived. SourceMissing."""
        ...
