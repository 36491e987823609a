"""The folder that a download goes to, and what is unfinished in it.

Given     a folder of this machine.
Returns   a Landing: the folder to copy into, and a lock for each large file.
Promises  unfinished files are in the hidden folder `.replica`, which is gone after the last file arrived. Of what was
          interrupted only large files are kept, with their chunk maps, so that the next download goes on with them;
          what nobody went on with for a week is cleared away by whoever comes next. Several downloads may go to one
          folder at once: they clear nothing of each other, and a large file is fetched by one of them.
Partner   replica.client.download; replica.storage.chunked writes and takes over what is kept.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from replica.client.places import Folder
from replica.storage.base import OWN, PARTS, SENTINEL
from replica.storage.chunks import Lineage
from replica.storage.copy import Expected
from rules.errors import Forbidden, Invalid, Refused
from rules.names import Did

#: Longer than anybody waits to try again, shorter than a disk stays full of what nobody wants.
KEPT_SECONDS = 7 * 24 * 3600.0
_KEPT = re.compile(r"get-[0-9a-f]{32}-")
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Landing:
    folder: Folder
    directory: Path

    @asynccontextmanager
    async def alone(self, lineage: Lineage) -> AsyncIterator[None]:
        """Within, no other download fetches this file into this folder; whoever comes second waits."""
        path = self.directory / OWN / f"{lineage.name}.lock"
        descriptor = -1
        while descriptor < 0:
            descriptor = _locked_alone(path)
            if descriptor < 0:
                await asyncio.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    async def clear(self, lineage: Lineage) -> None:
        """Nothing is left of a file's earlier attempts, now that it is there."""
        for part in await self.folder.unfinished(lineage.prefix):
            await self.folder.delete(part)


def lineage_of(did: Did, expected: Expected) -> Lineage:
    """Whose unfinished files a download goes on with: earlier ones of the same bytes."""
    known = f"{did}\0{expected.size_bytes}\0{sorted(expected.checksums.as_dict().items())}"
    return Lineage(f"get-{xxhash.xxh3_128_hexdigest(known.encode())}")


def _locked_alone(path: Path) -> int:
    """A descriptor that holds the lock; -1: somebody else has it, or took the file from under us."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return -1


@contextmanager
def landing(directory: Path) -> Iterator[Landing]:
    """A folder to copy into. Each download holds its lock shared, and whoever can have it alone, at the beginning or at
    the end, clears away what is left over, from processes that were killed too.
    """
    resolved = directory.resolve()
    for folder in (resolved, *resolved.parents):
        if (folder / SENTINEL).exists():
            raise Refused(
                f"{directory} is in the folder of an endpoint, {folder}",
                hint="download to a folder outside of it; endpoints hold only what the catalogue knows",
            )
    if directory.exists() and not directory.is_dir():
        raise Invalid(f"{directory} is not a folder", hint="choose another --dir")
    own = directory / OWN
    descriptor = -1
    try:
        while descriptor < 0:
            descriptor = _locked(directory)
    except OSError as error:
        raise Forbidden(f"{directory} cannot be written to: {error.strerror}", hint="choose another --dir") from error
    try:
        yield Landing(Folder(directory), directory)
    finally:
        if _clear(descriptor, directory):
            # The lock file last: who finds it gone makes all of it anew, who still has it open waits for us and sees.
            with suppress(OSError):
                (directory / PARTS).rmdir()
                (own / "lock").unlink()
                own.rmdir()
        os.close(descriptor)


def _locked(directory: Path) -> int:
    """A descriptor that holds the lock shared; -1 if whoever cleared away took the file from under us: try again.

    Going from alone to shared lets go for a moment, so only after that is it certain that the file is still the one.
    """
    path = directory / OWN / "lock"
    try:
        (directory / PARTS).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError):
        if not path.parent.parent.is_dir() or (directory / PARTS).is_file():
            raise  # not for somebody who clears away at this moment
        return -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return -1
    try:
        _clear(descriptor, directory)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if _is_still_there(descriptor, directory) and (directory / PARTS).is_dir():
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return -1


def _is_still_there(descriptor: int, directory: Path) -> bool:
    """Whether the lock file is the one that others find."""
    try:
        return os.path.samestat(os.fstat(descriptor), (directory / OWN / "lock").stat())
    except FileNotFoundError:
        return False


def _clear(descriptor: int, directory: Path) -> bool:
    """Remove what nobody goes on with if nobody else is copying into the folder; whether that was so.

    What was locked shared is not locked any more when it was not so. A lock on a file that is gone excludes nobody.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    if not _is_still_there(descriptor, directory):
        return False
    for part in (directory / PARTS).iterdir():
        if not _KEPT.match(part.name) or time.time() - part.stat().st_mtime > KEPT_SECONDS:
            part.unlink()
    for lock in (directory / OWN).glob("get-*.lock"):
        lock.unlink()
    return True
