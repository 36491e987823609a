"""Which places can this machine touch: endpoints whose disk is here, and a person's own folders.

Given     endpoints as the server lists them; folders of this machine.
Returns   storages to copy from and to, or the reason why there is none.
Promises  an endpoint counts as here only if its folder exists and its sentinel says that it is this endpoint: a folder
          of the same name on another machine is not mistaken for it.
Partner   replica.client.upload, replica.client.download and `replica register`.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import stat as mode_of
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from replica import wire
from replica.storage.base import OWN, PARTS, SENTINEL
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from replica.storage.tree import Tree
from rules.errors import Forbidden, Invalid, Refused, ReplicaError, TargetExists, Unreachable


class Places:
    """Opens each endpoint once and remembers what came of it."""

    def __init__(self) -> None:
        self._known: dict[str, Endpoint | str] = {}

    def open(self, endpoint: wire.Endpoint) -> Endpoint:
        """The endpoint's storage; Unreachable with the reason if this machine cannot touch it."""
        known = self._known.get(endpoint.name)
        if known is None:
            known = self._known[endpoint.name] = _open(endpoint)
        if isinstance(known, str):
            raise Unreachable(
                f"{endpoint.name} cannot be reached from this machine: {known}",
                hint=f"mount its disk, or run this on the machine that has it; a new folder is made ready by "
                f"`replica endpoint prepare {endpoint.name}`",
                endpoint=endpoint.name,
            )
        return known

    def reason(self, endpoint: wire.Endpoint) -> str:
        """Why this machine cannot touch it; empty if it can."""
        try:
            self.open(endpoint)
        except Unreachable as error:
            return error.message.partition(": ")[2]
        return ""


def _open(endpoint: wire.Endpoint) -> Endpoint | str:
    try:
        storage = open_storage(endpoint.url, name=endpoint.name)
        if not isinstance(storage, PosixStorage):
            return f"{endpoint.url} is no folder"
        storage.tree.space()
        owner = json.loads(Path(storage.tree.path, SENTINEL).read_text(encoding="utf-8")).get("endpoint")
    except ReplicaError as error:
        return error.message
    except (OSError, ValueError, AttributeError) as error:
        return f"its file {SENTINEL} cannot be read ({error})"
    if owner and owner != endpoint.name:
        return f"{storage.tree.path} belongs to the endpoint {owner}"
    return Endpoint(storage.tree.path, name=endpoint.name, url=endpoint.url)


def prepare_here(endpoint: wire.Endpoint) -> None:
    """Make the endpoint's folder, with Replica's mark in it, on this machine. Idempotent."""
    storage = open_storage(endpoint.url, name=endpoint.name)
    if isinstance(storage, PosixStorage):
        storage.tree.prepare()


def is_this_machine(server: str) -> bool:
    """Whether a server's URL leads back to the machine that asks."""
    host = urlsplit(server).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Endpoint(PosixStorage):
    """An endpoint that a person writes to. A worker moves what is in its way to quarantine; a person is told."""

    tree: _KeepingTree

    def __init__(self, root: str, *, name: str, url: str) -> None:
        super().__init__(root, name=name, url=url)
        self.tree = _KeepingTree(root, name=name)


class Folder(PosixStorage):
    """A person's own folder: it has no sentinel, its files may have several names, and nothing is moved away."""

    tree: _FolderTree

    def __init__(self, root: str | Path) -> None:
        super().__init__(Path(root).absolute(), name=f"the folder {os.fspath(root)}")
        self.tree = _FolderTree(os.fspath(root), name=f"the folder {os.fspath(root)}")


class _KeepingTree(Tree):
    def quarantine(self, path: str, *, only: str = "") -> str:
        raise self.in_the_way(path)

    def in_the_way(self, path: str) -> TargetExists:
        return TargetExists(
            f"{self.path}/{path} exists already with other bytes; it was not touched",
            hint="move it away or choose another name, and try again",
            endpoint=self.name,
            path=path,
            side="target",
        )


class _FolderTree(_KeepingTree):
    @contextmanager
    def root(self) -> Iterator[int]:
        try:
            root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unreachable(
                f"the folder {self.path} cannot be opened: {error.strerror}", endpoint=self.name
            ) from error
        try:
            yield root
        finally:
            os.close(root)

    def _regular(self, root: int, path: str, descriptor: int) -> os.stat_result:
        found = os.fstat(descriptor)
        if not mode_of.S_ISREG(found.st_mode):
            raise Forbidden(
                f"{path} in {self.name} is not a regular file",
                hint="only regular files are copied",
                endpoint=self.name,
                path=path,
            )
        return found


@contextmanager
def landing(directory: Path) -> Iterator[Folder]:
    """A folder to copy into. Within, unfinished files are in its hidden folder `.replica`; afterwards that is gone.

    Several downloads may go to one folder at once: each holds the lock shared, and whoever can have it alone, at the
    beginning or at the end, clears away what is left over, from processes that were killed too.
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
        yield Folder(directory)
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
    """Remove unfinished files if nobody else is copying into the folder; whether that was so.

    What was locked shared is not locked any more when it was not so. A lock on a file that is gone excludes nobody.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    if not _is_still_there(descriptor, directory):
        return False
    for part in (directory / PARTS).iterdir():
        part.unlink()
    return True
