"""What every way of copying a file judges by: what is expected, what was found, and whose fault a difference is.

Given     what the catalogue knows of a file, and what was hashed on its way.
Returns   the values of a copy (Expected, Copied, Control), and the errors of differing bytes.
Promises  a difference always names both values and the side it was found at.
Partner   replica.storage.copy, copy_local, chunked and repair; rules.transfers decides what follows from the errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from replica.storage.base import Storage
from replica.storage.faults import place
from replica.storage.hashing import Fingerprint, Hasher, extra_for
from rules.checksums import ALWAYS, Checksums
from rules.errors import ChecksumDiffers, Invalid, Side, SourceChanged, TargetExists

#: How often somebody else may put a file in our way between our look and our rename.
ROUNDS = 3

#: Of a file up to this size the name is not looked at before it is copied, where looking is a request to a server.
#: Moving a few bytes in vain costs less than asking for each file, for a server like XRootD hangs up after each 404.
NO_LOOK_BYTES_MAX = 1 << 20

#: Copies get threads of their own: in asyncio's default pool, few as they are, long copies would block every `stat`.
COPYING = ThreadPoolExecutor(max_workers=32, thread_name_prefix="copy")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the catalogue knows of a file. Without checksums, the size alone decides."""

    size_bytes: int
    checksums: Checksums


@dataclass(frozen=True, slots=True)
class Copied:
    size_bytes: int
    #: xxh3_128 and adler32 of the bytes; where servers copied between themselves only what was compared.
    checksums: Checksums
    adopted: bool  #: the target already held these bytes: verified, not written
    seconds: float
    verified_by: str  #: "read back", or "digest <algorithm>" if the target answered one
    moved_bytes: int = 0  #: read from sources to be written, in this attempt; less than the size if it was resumed
    source: str = ""  #: the endpoint that most of them came from, where there were several
    moved_from: Mapping[str, int] = field(default_factory=dict)  #: endpoint → bytes, where there were several


#: What the proof of a POSIX target is read from; the module's docstring says what each one proves.
ReadBack = Literal["auto", "device", "cache"]


class Stopped(Exception):
    """The copy ended because it was asked to; nothing was published, its temporary is gone."""


class Control:
    """What a mover may ask of a running copy, and what the copy tells. Safe to use from any thread."""

    __slots__ = ("_stop", "bytes_done", "phase")

    def __init__(self) -> None:
        self._stop = False
        self.bytes_done = 0
        self.phase = "moving"

    def stop(self) -> None:
        """The copy ends with Stopped at the next piece. Too late once it publishes."""
        self._stop = True

    @property
    def stopping(self) -> bool:
        return self._stop

    def check(self) -> None:
        if self._stop:
            raise Stopped("the copy was asked to stop")


def needed(expected: Expected | None) -> tuple[str, ...]:
    """What to compute beyond the two that are always computed; Invalid if nothing could be compared in the end."""
    if expected is None or not expected.checksums:
        return ()
    extra = extra_for(expected.checksums)
    if not extra and not any(expected.checksums.get(a) for a in ALWAYS):
        known = ", ".join(c.algorithm for c in expected.checksums)
        raise Invalid(
            f"the file is known by {known} only, which cannot be computed here",
            hint="register it with another checksum",
        )
    return extra


def exactly(hasher: Hasher) -> Expected:
    return Expected(hasher.size_bytes, hasher.checksums())


def expect_size(source: Storage, path: str, size_bytes: int, expected: Expected | None) -> None:
    if expected is not None and size_bytes != expected.size_bytes:
        raise differs(source, path, "size", str(size_bytes), str(expected.size_bytes), "source")


def expect(source: Storage, path: str, hasher: Hasher, expected: Expected | None) -> None:
    if expected is None:
        return
    expect_size(source, path, hasher.size_bytes, expected)
    found = hasher.checksums().as_dict()
    for known in expected.checksums:
        value = found.get(known.algorithm)
        if value is not None and value != known.value:
            raise differs(source, path, known.algorithm, value, known.value, "source")


def same(target: Storage, path: str, again: Fingerprint, hasher: Hasher) -> None:
    """What was read back is what was read from the source."""
    if again.size_bytes != hasher.size_bytes:
        raise differs(target, path, "size", str(again.size_bytes), str(hasher.size_bytes), "target")
    if again.xxh3_128 != hasher.xxh3_128:
        raise differs(target, path, "xxh3_128", again.xxh3_128, hasher.xxh3_128, "target")


def differs(storage: Storage, path: str, what: str, found: str, wanted: str, side: Side) -> ChecksumDiffers:
    known = "the catalogue knows" if side == "source" else "the source gave"
    return ChecksumDiffers(
        f"{place(storage.name, path)} has {what} {found}, and {known} {wanted}",
        hint="the bytes there are not the file's" if side == "source" else "nothing was published; it is tried again",
        endpoint=storage.name,
        path=path,
        side=side,
    )


def changed(storage: Storage, path: str) -> SourceChanged:
    return SourceChanged(
        f"{place(storage.name, path)} changed while it was read",
        hint="somebody writes to it; wait until he has finished",
        endpoint=storage.name,
        path=path,
    )


def same_file(storage: Storage, path: str) -> Invalid:
    return Invalid(
        f"source and target are the same file: {place(storage.name, path)}",
        hint="two endpoints seem to share a disk: one copy must not be counted twice",
    )


def in_the_way(target: Storage, path: str) -> TargetExists:
    return TargetExists(
        f"{place(target.name, path)}: other files of this name keep appearing",
        hint="somebody else writes there; find out who",
        endpoint=target.name,
        path=path,
        side="target",
    )
