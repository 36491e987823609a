"""What the catalogue knows against what a storage lists: millions of files, in little memory.

Given     both, in any order and in parts, and a folder of this machine.
Returns   what is missing or of another size, and what nobody knows.
Promises  memory for one part in 256 of the files, however many there are: each side is dealt out by its paths into
          files, and these are compared pair by pair. What was dealt out completely is marked, so that who comes after a
          kill goes on from there. A path is compared byte by byte, as the storage has it.
Partner   workers.scanning, and `replica scan --listing`; rules.reconciling says what follows.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from zlib import crc32

import msgspec

from replica.storage.base import Entry
from rules.errors import Broken, Busy, Refused

BINS = 256
#: Folders that nobody came back to for so long are removed.
STALE_SECONDS = 7 * 86_400.0
#: Of a file whose size the listing does not tell.
NO_SIZE = -1
#: Between two fields; no path has one, and none has the NUL that ends a record.
_FIELD, _END = b"\x01", b"\0"
#: What the server takes of a path that is for people only.
_SHOWN_MAX = 2_000


@dataclass(slots=True)
class Totals:
    files: int = 0
    bytes: int = 0
    #: Of the records of all of it.
    written: int = 0


class Side:
    """One side of the comparison, being dealt out."""

    def __init__(self, folder: Path, name: str) -> None:
        self._mark = folder / f"{name}.complete"
        self._paths = [folder / f"{name}.{number:02x}" for number in range(BINS)]
        self.totals = Totals()
        self._pieces: list[list[bytes]] = [[] for _ in range(BINS)]
        self._held = 0
        self.complete = self._was_completed()
        if not self.complete:
            self._mark.unlink(missing_ok=True)
            for path in self._paths:
                path.unlink(missing_ok=True)

    def _was_completed(self) -> bool:
        """By who was here before; and nothing of it was lost since, in a power cut."""
        try:
            totals = msgspec.json.decode(self._mark.read_bytes(), type=Totals)
        except (FileNotFoundError, msgspec.MsgspecError):
            return False
        if sum(path.stat().st_size for path in self._paths if path.exists()) != totals.written:
            return False
        self.totals = totals
        return True

    def add(self, path: bytes, size: int, fields: bytes = b"") -> None:
        record = b"%d%b%b%b%b%b" % (size, _FIELD, fields, _FIELD, path, _END)
        self._pieces[crc32(path) & 0xFF].append(record)
        self.totals.files += 1
        self.totals.bytes += max(size, 0)
        self.totals.written += len(record)
        self._held += 1
        if self._held >= 100_000:
            self.write()

    def write(self) -> None:
        for path, pieces in zip(self._paths, self._pieces, strict=True):
            if pieces:
                with path.open("ab") as file:
                    file.write(b"".join(pieces))
                pieces.clear()
        self._held = 0

    def finish(self) -> None:
        self.write()
        beside = self._mark.with_suffix(".new")
        beside.write_bytes(msgspec.json.encode(self.totals))
        beside.rename(self._mark)
        self.complete = True

    def bin(self, number: int) -> Iterator[tuple[bytes, int, bytes]]:
        with suppress(FileNotFoundError):
            for record in self._paths[number].read_bytes().split(_END)[:-1]:
                size, fields, path = record.split(_FIELD, 2)
                yield path, int(size), fields


@dataclass(frozen=True, slots=True)
class Missing:
    file: int
    generation: int
    found_size: int | None


@dataclass(frozen=True, slots=True)
class Dark:
    path: str
    size: int
    mtime_ns: int
    problem: str


class Comparison:
    """`known` is filled before the listing begins, `listed` after that; each once."""

    def __init__(self, folder: Path) -> None:
        """Busy: another process is at it there; it may not know yet that it lost it."""
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise Busy(f"another process compares in {folder}") from error
        self.known = Side(folder, "known")
        self.listed = Side(folder, "listed")

    def know(self, file: int, generation: int, size: int, expected: bool, path: str) -> None:
        self.known.add(path.encode(), size, b"%d %d %d" % (file, generation, expected))

    def list_all(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            # A path with a problem is for people: it is not the name of the file, which may be another file's.
            problem = entry.problem.replace("\x01", " ").replace("\0", " ")[:200]
            path = entry.path.encode(errors="backslashreplace")
            if b"\0" in path:
                problem, path = problem or "name holds a NUL character", path.replace(b"\0", b"\\0")
            fields = b"%d %b" % (entry.mtime_ns, problem.encode(errors="replace"))
            self.listed.add(path, entry.size_bytes, fields)

    def differences(self) -> Iterator[Missing | Dark]:
        """Both sides must be complete."""
        if not (self.known.complete and self.listed.complete):
            raise Broken("what is not complete cannot be compared")
        for number in range(BINS):
            there: dict[bytes, tuple[int, bytes]] = {}
            odd: list[Dark] = []
            for path, size, fields in self.listed.bin(number):
                mtime, _, problem = fields.partition(b" ")
                if problem:
                    odd.append(
                        Dark(path.decode(errors="replace")[:_SHOWN_MAX], max(size, 0), int(mtime), problem.decode())
                    )
                else:
                    there[path] = size, mtime
            # Each path once: a thread that was left behind by a cancelled scan may have written some of it again.
            known = {path: (size, fields) for path, size, fields in self.known.bin(number)}
            for path, (size, fields) in known.items():
                file, generation, expected = map(int, fields.split(b" "))
                found = there.pop(path, None)
                if expected and (found is None or found[0] not in (size, NO_SIZE)):
                    yield Missing(file, generation, None if found is None else found[0])
            for path, (size, mtime) in there.items():
                yield Dark(path.decode(errors="backslashreplace"), max(size, 0), int(mtime), "")
            yield from odd

    def close(self) -> None:
        """What is complete stays, for who goes on with it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        self.close()
        rmtree(self.folder, ignore_errors=True)


def own_folder(base: Path | None = None) -> Path:
    """Where comparisons of this user lie, in the folder for temporary files; nobody else's to read or to plant."""
    folder = base or Path(tempfile.gettempdir()) / f"replica-scans-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Refused(f"{folder} is not a folder of ours alone", hint="remove it, or set TMPDIR to another folder")
    return folder


def remove_stale(folder: Path) -> None:
    for path in folder.iterdir():
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                rmtree(path, ignore_errors=True)
