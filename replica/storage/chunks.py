"""The chunk map: which chunks of an unfinished file are written, with their checksums; and whose work it is.

Given     the text of a map, as an earlier attempt left it, whole or torn.
Returns   chunks: number → checksum, and the source they came from.
Promises  a line that was not written whole is no line; a map of other sizes is no map. What a map says is a hint and
          never evidence: its chunks are hashed again, from the target's device, before they are believed.
Partner   replica.storage.chunked writes and reads maps; workers.carrying names the lineage.

A map is a text beside its temporary, `<temporary>.map`: a head, then a line for each chunk as soon as it is written.
It is only appended to, in one call a line, and never synced: after a power cut it may tell of chunks that the disk does
not have, and hashing finds those out. So no chunk waits for a journal, and nothing that a crash leaves can do harm.

Why 8 MiB. A kill loses what is on its way: at most one chunk of each source. Ten kills of a 2 GiB transfer lose at most
10 × 8 MiB, 4 % of it, and 8 % from two sources. A flipped bit costs 8 MiB. A map has some 75 bytes a chunk: 20 KB for
2 GiB, 10 MB for 1 TiB. A request to a source covers many chunks in a row, so their size costs no round trips.
"""

from __future__ import annotations

import re
import secrets
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from replica.storage.base import PARTS, part_path

CHUNK_BYTES = 8 << 20
#: Files above this size are worth a map. Below, an interrupted copy loses less than the map would cost.
RESUME_BYTES = 64 << 20
MAP_SUFFIX = ".map"
#: More than the map of any file has that we could copy; what is longer is not read to its end.
MAP_BYTES_MAX = 64 << 20
_HEAD = "replica-chunks 1"
_CHUNK = re.compile(r"(\d{1,12}) ([0-9a-f]{32}) ([0-9a-f]{8}) ([0-9a-f]{16})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk's bytes, as they were hashed on their way to the target."""

    xxh3_128: str
    adler32: int
    #: Which file they came from: `token_of` a storage, a path and its etag.
    source: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A file cut into chunks; the last one may be short."""

    size_bytes: int
    chunk_bytes: int

    @property
    def count(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    def span(self, number: int) -> tuple[int, int]:
        begin = number * self.chunk_bytes
        return begin, min(begin + self.chunk_bytes, self.size_bytes)

    def length(self, number: int) -> int:
        begin, end = self.span(number)
        return end - begin


@dataclass(frozen=True, slots=True)
class Lineage:
    """The attempts of one piece of work, each with a higher epoch than those before it.

    A temporary carries both in its name. An attempt takes over those of its own and of lower epochs, never of a higher
    one: a zombie that goes on with its next source must not take away what its successor is building.
    """

    name: str
    epoch: int = 0

    @property
    def prefix(self) -> str:
        return f"{self.name}-"

    def new_part(self) -> str:
        return part_path(f"{self.prefix}{self.epoch}-{secrets.token_hex(10)}")

    def may_take(self, temporary: str) -> bool:
        found = re.fullmatch(rf"{re.escape(PARTS)}/{re.escape(self.name)}-(\d+)-[0-9a-f.]+", temporary)
        return found is not None and int(found[1]) <= self.epoch


def map_of(temporary: str) -> str:
    return temporary + MAP_SUFFIX


def head(layout: Layout, machine: str) -> bytes:
    return _line(f"{_HEAD} {layout.size_bytes} {layout.chunk_bytes} {machine}")


def line(number: int, chunk: Chunk) -> bytes:
    return _line(f"{number} {chunk.xxh3_128} {chunk.adler32:08x} {chunk.source}")


def lines(chunks: Mapping[int, Chunk]) -> bytes:
    return b"".join(line(number, chunk) for number, chunk in sorted(chunks.items()))


def parse(text: bytes, layout: Layout) -> tuple[str, dict[int, Chunk]]:
    """The machine that wrote the temporary, and its chunks; nothing if the map is of another file or was cut short."""
    whole = _whole_lines(text)
    begins = next(whole, "").rpartition(" ")
    if begins[0] != f"{_HEAD} {layout.size_bytes} {layout.chunk_bytes}":
        return "", {}
    chunks: dict[int, Chunk] = {}
    for told in whole:
        found = _CHUNK.fullmatch(told)
        if found and int(found[1]) < layout.count:
            chunks[int(found[1])] = Chunk(found[2], int(found[3], 16), found[4])
    return begins[2], chunks


def _line(text: str) -> bytes:
    return f"{text} {zlib.crc32(text.encode()):08x}\n".encode()


def _whole_lines(text: bytes) -> Iterator[str]:
    """Lines whose own checksum holds: a crash tears the last one, a full disk any."""
    for raw in text.split(b"\n"):
        told, _, check = raw.rpartition(b" ")
        if check == b"%08x" % zlib.crc32(told):
            yield told.decode("ascii", "replace")


def token_of(url: str, path: str, etag: str) -> str:
    """A name for one version of one file at one place."""
    return xxhash.xxh3_64_hexdigest(f"{url}\0{path}\0{etag}".encode())


@lru_cache(maxsize=1)
def this_machine() -> str:
    """This kernel, since it was started: whoever held a file open under another one is out of our sight."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(16)  # nobody's but this process's: nothing of others is believed to be ended
