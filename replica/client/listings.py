"""A listing of a storage, written to a file by whoever administers it.

Given     a file, plain or gzip: CSV of `path[,size[,checksum]]`, paths relative to the endpoint's root.
Returns   entries as a storage lists them.
Promises  reads it line by line; a line that cannot be right is an error that names it, for a line that is left out is
          taken for a missing file. What is Replica's own is left out. A name that is not UTF-8 is told as such.
Partner   `replica scan --listing`.

A path with a comma, a quote or a line break in it stands in quotes, as CSV has it. A first line that says `path` is a
heading. Checksums are read over: a listing proves no bytes.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from replica.storage.base import OWN, Entry, check_path
from replica.storage.comparing import NO_SIZE
from rules.errors import Invalid

_GZIP = b"\x1f\x8b"


def entries(path: Path) -> Iterator[Entry]:
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == _GZIP
        raw.seek(0)
        unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        with io.TextIOWrapper(unpacked, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            reader = csv.reader(lines)
            try:
                for row in reader:
                    if row and not (reader.line_num == 1 and row[0] == "path"):
                        entry = _entry(row, f"{path}, line {reader.line_num}")
                        if entry is not None:
                            yield entry
            except (csv.Error, EOFError, gzip.BadGzipFile) as error:
                raise Invalid(f"{path}, line {reader.line_num}: {error}", hint="is the file whole?") from None


def _entry(row: list[str], where: str) -> Entry | None:
    name = row[0].removeprefix("./")
    if len(row) > 3:
        raise Invalid(f"{where} has {len(row)} fields", hint="path[,size[,checksum]]; a path with commas in quotes")
    size = NO_SIZE
    if len(row) > 1 and row[1].strip():
        if not row[1].strip().isdecimal():
            raise Invalid(f"{where}: {row[1][:40]!r} is no size", hint="path[,size[,checksum]]; sizes are bytes")
        size = int(row[1])
    if name == OWN or name.startswith(f"{OWN}/"):
        return None
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        return Entry(shown, size, 0, "name is not UTF-8")
    try:
        check_path(name)
    except Invalid as error:
        raise Invalid(f"{where}: {error.message}", hint=error.hint) from None
    return Entry(name, size, 0)
