"""Checksums in one pass over the bytes.

Given     pieces of a file, in order.
Returns   its size and Checksums: always xxh3_128 (ours: fast, strong against accidents) and adler32 (what other
          storages of the field can answer), further algorithms on demand.
Promises  each byte is touched once per algorithm, and the lock of the interpreter is released for pieces above 64 KiB.
          None of the two fast ones is evidence against a person who wants a collision; sha256 is.
Partner   rules.checksums compares what is computed here.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import xxhash

from rules.checksums import ALWAYS, DIGITS, Checksums
from rules.errors import Invalid

_Adler = Callable[[Any, int], int]
adler32: _Adler = zlib.adler32
try:
    from zlib_ng import zlib_ng

    adler32 = zlib_ng.adler32  # 25 GB per CPU second instead of 2.8
except ImportError:  # pragma: no cover - the wheel exists for every platform we name; slow is better than absent
    pass

_Digest = Callable[[], Any]
_DIGESTS: dict[str, _Digest] = {a: partial(hashlib.new, a, usedforsecurity=False) for a in ("sha256", "md5")}
try:
    from crc32c import CRC32CHash

    _DIGESTS["crc32c"] = CRC32CHash
except ImportError:  # pragma: no cover - only the storages that check it (extra `s3`) bring it
    pass

#: What proves a file, beyond `ALWAYS`. crc32c is computed only to be compared with what a server says it received.
EXTRA = ("sha256", "md5")


def is_strong(known: Checksums) -> bool:
    """Whether one of them would not miss an error, by any accident."""
    return any(known.get(algorithm) for algorithm in ("xxh3_128", *EXTRA))


def extra_for(known: Checksums) -> tuple[str, ...]:
    """Which further algorithm is needed to prove bytes against `known`.

    None if xxh3_128 is known; else the strongest one we can compute. adler32 alone would miss one error in 2^32 and
    far more in short files, so it decides only where nothing better is known.
    """
    if known.get("xxh3_128"):
        return ()
    return next(((a,) for a in DIGITS if a in EXTRA and known.get(a)), ())


#: Read and hash by this much: the bytes are still in the processor's own cache when the next algorithm, or the hash of
#: what was read back, takes them. By pieces of 1 MiB the same work costs a third more.
STRIDE_BYTES = 256 << 10


class Fingerprint:
    """xxh3_128 alone: all it takes to see whether what was read back is what was written."""

    __slots__ = ("_xxh3", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self._xxh3 = xxhash.xxh3_128()

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        self.size_bytes += len(piece)
        self._xxh3.update(piece)

    @property
    def xxh3_128(self) -> str:
        return self._xxh3.hexdigest()


class Hasher(Fingerprint):
    """Feed it pieces in order; ask `checksums()` at any time."""

    __slots__ = ("_adler", "_more")

    def __init__(self, algorithms: Iterable[str] = ()) -> None:
        super().__init__()
        self._adler = 1
        more = [a for a in dict.fromkeys(algorithms) if a not in ALWAYS]
        for algorithm in more:
            if algorithm not in _DIGESTS:
                raise Invalid(
                    f"checksums by {algorithm[:40]!r} cannot be computed here",
                    hint=f"use {', '.join((*ALWAYS, *EXTRA))}",
                )
        self._more = [(a, _DIGESTS[a]()) for a in more]

    def update(self, piece: bytes | bytearray | memoryview) -> None:
        super().update(piece)
        self._adler = adler32(piece, self._adler)
        for _, digest in self._more:
            digest.update(piece)

    def checksums(self) -> Checksums:
        values = {"xxh3_128": self.xxh3_128, "adler32": f"{self._adler:08x}"}
        values.update((algorithm, digest.hexdigest()) for algorithm, digest in self._more)
        return Checksums.of(values)
