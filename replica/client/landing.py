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
import errno
import fcntl
import os
import re
import secrets
import stat
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
_LOCKS = re.compile(r"get-.*\.lock")
_PART = PARTS.removeprefix(f"{OWN}/")
_LOCKED = "lock"
_LOCK = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Landing:
    folder: Folder
    #: Of the hidden folder.
    own: int

    @asynccontextmanager
    async def alone(self, lineage: Lineage) -> AsyncIterator[None]:
        """Within, no other download fetches this file into this folder; whoever comes second waits."""
        name = f"{lineage.name}.lock"
        descriptor = -1
        while descriptor < 0:
            descriptor = _locked_alone(self.own, name)
            if descriptor < 0:
                await asyncio.sleep(_LOOK_SECONDS)
        try:
            yield
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.own)
            os.close(descriptor)

    async def clear(self, lineage: Lineage) -> None:
        """Nothing is left of a file's earlier attempts, now that it is there."""
        for part in await self.folder.unfinished(lineage.prefix):
            await self.folder.delete(part)


def lineage_of(did: Did, expected: Expected) -> Lineage:
    """Whose unfinished files a download goes on with: earlier ones of the same bytes."""
    known = f"{did}\0{expected.size_bytes}\0{sorted(expected.checksums.as_dict().items())}"
    return Lineage(f"get-{xxhash.xxh3_128_hexdigest(known.encode())}")


def _locked_alone(own: int, name: str) -> int:
    """A descriptor that holds the lock; -1: somebody else has it, or took the file from under us."""
    descriptor = os.open(name, _LOCK, 0o600, dir_fd=own)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still_there(descriptor, own, name):
            return descriptor
    except BlockingIOError:
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
    hidden: _Hidden | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while hidden is None:
            hidden = _enter(directory)
    except OSError as error:
        raise Forbidden(f"{directory} cannot be written to: {error.strerror}", hint="choose another --dir") from error
    try:
        yield Landing(Folder(directory), hidden.own)
    finally:
        _leave(directory, hidden)


# --- the hidden folder ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Hidden:
    """Descriptors of the hidden folder, of the one within for unfinished files, and of the lock.

    What is cleared away is named by these and by no path: in a folder that others may write to, a path could have
    become a link to where somebody's only copies are.
    """

    own: int = -1
    parts: int = -1
    lock: int = -1

    def close(self) -> None:
        for descriptor in (self.lock, self.parts, self.own):
            if descriptor >= 0:
                os.close(descriptor)


def _enter(directory: Path) -> _Hidden | None:
    """With the lock, shared; None if whoever cleared away took something from under us: try again.

    Going from alone to shared lets go for a moment, so only after that is it certain that the file is still the one.
    """
    hidden = _Hidden()
    root = os.open(directory, _FOLDER)
    try:
        try:
            hidden.own = _own_folder(root, OWN, directory)
            hidden.parts = _own_folder(hidden.own, _PART, directory)
            hidden.lock = os.open(_LOCKED, _LOCK, 0o600, dir_fd=hidden.own)
            _clear(hidden)
            fcntl.flock(hidden.lock, fcntl.LOCK_SH)
            if (
                _is_still_there(hidden.own, root, OWN)
                and _is_still_there(hidden.parts, hidden.own, _PART)
                and _is_still_there(hidden.lock, hidden.own, _LOCKED)
            ):
                found, hidden = hidden, _Hidden()
                return found
        except FileNotFoundError:
            pass
        return None
    finally:
        hidden.close()
        os.close(root)


def _leave(directory: Path, hidden: _Hidden) -> None:
    try:
        # The lock file last: who finds it gone makes all of it anew, who still has it open waits for us and sees.
        with suppress(OSError):
            if _clear(hidden):
                os.rmdir(_PART, dir_fd=hidden.own)
                os.unlink(_LOCKED, dir_fd=hidden.own)
                (directory / OWN).rmdir()
    finally:
        hidden.close()


def _own_folder(above: int, name: str, directory: Path) -> int:
    """A folder of ours that nobody else can write to: what is proven in it must be what gets its name."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
    try:
        descriptor = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _not_ours(directory, "is not what it should be: a link, or no folder") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise _not_ours(directory, "belongs to somebody else") from None
        raise
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() and found.st_uid != _owner_of_new(descriptor, directory):
            raise _not_ours(directory, "belongs to somebody else")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            with suppress(OSError):  # a file system without rights: all who have it mounted may write anyway
                os.fchmod(descriptor, 0o700)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _owner_of_new(folder: int, directory: Path) -> int:
    """Whom a file belongs to that we make: on some file systems that is always the same one, whoever makes it."""
    name = f"whose-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(name, _LOCK | os.O_EXCL, 0o600, dir_fd=folder)
    except PermissionError:
        raise _not_ours(directory, "belongs to somebody else") from None
    try:
        return os.fstat(descriptor).st_uid
    finally:
        os.close(descriptor)
        os.unlink(name, dir_fd=folder)


def _not_ours(directory: Path, reason: str) -> Forbidden:
    return Forbidden(
        f"{directory / OWN}, where unfinished files would be, {reason}",
        hint="look what it is and remove it if nobody downloads to there, or choose another --dir",
    )


def _is_still_there(descriptor: int, folder: int, name: str) -> bool:
    """Whether what others find by this name is the same."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _clear(hidden: _Hidden) -> bool:
    """Remove what nobody goes on with if nobody else is copying into the folder; whether that was so.

    What was locked shared is not locked any more when it was not so. A lock on a file that is gone excludes nobody.
    """
    try:
        fcntl.flock(hidden.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    if not _is_still_there(hidden.lock, hidden.own, _LOCKED):
        return False
    mine = os.fstat(hidden.own).st_uid
    for name in os.listdir(hidden.parts):  # noqa: PTH208  of a descriptor
        found = os.stat(name, dir_fd=hidden.parts, follow_symlinks=False)
        is_kept = _KEPT.match(name) and found.st_uid == mine and time.time() - found.st_mtime <= KEPT_SECONDS
        if not is_kept and not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=hidden.parts)
    for name in os.listdir(hidden.own):  # noqa: PTH208
        if _LOCKS.fullmatch(name):
            os.unlink(name, dir_fd=hidden.own)
    return True
