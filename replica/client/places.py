"""Which places can this machine touch: endpoints whose disk is here, servers, and a person's own folders.

Given     endpoints as the server lists them, the user's own credentials; folders of this machine.
Returns   storages to copy from and to, or the reason why there is none.
Promises  an endpoint counts as here only if its folder exists and its sentinel says that it is this endpoint: a folder
          of the same name on another machine is not mistaken for it. Whatever is opened here moves nothing away:
          a worker may bring wrong bytes to quarantine, a person is told of them.
Partner   replica.client.upload, replica.client.download and `replica register`.
"""

from __future__ import annotations

import ipaddress
import json
import os
import stat as mode_of
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from replica import wire
from replica.storage.base import SENTINEL, Storage
from replica.storage.credentials import Credentials
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from replica.storage.tree import Tree
from rules.errors import Forbidden, Invalid, ReplicaError, TargetExists, Unreachable
from rules.names import shown

#: What this machine cannot open, and what would help.
_Closed = tuple[str, str]


class Places:
    """Opens each endpoint once and remembers what came of it: folders that are here, and servers by the user's own
    credentials. Safe to use from several threads."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._known: dict[str, Storage | _Closed] = {}
        self._lock = threading.Lock()

    def open(self, endpoint: wire.Endpoint) -> Storage:
        """The endpoint's storage; Unreachable with the reason if this machine cannot touch it. Of a server nothing is
        asked yet."""
        known = self._known.get(endpoint.name)
        if known is None:
            with self._lock:
                known = self._known.get(endpoint.name) or _open(endpoint, self._credentials)
                self._known[endpoint.name] = known
        if isinstance(known, tuple):
            raise Unreachable(
                f"{endpoint.name} cannot be reached from this machine: {known[0]}",
                hint=known[1],
                endpoint=endpoint.name,
            )
        return known

    def open_here(self, endpoint: wire.Endpoint) -> Endpoint:
        """The endpoint's folder on this machine; Unreachable if there is none."""
        storage = self.open(endpoint)
        if not isinstance(storage, Endpoint):
            raise Unreachable(
                f"{endpoint.name} cannot be reached from this machine: {endpoint.url} is no folder",
                hint="run this on a machine that has its disk mounted",
                endpoint=endpoint.name,
            )
        return storage

    def reason(self, endpoint: wire.Endpoint) -> str:
        """Why this machine cannot touch it; empty if it can."""
        try:
            self.open(endpoint)
        except Unreachable as error:
            return error.message.partition(": ")[2]
        return ""

    def has_credentials(self, endpoint: wire.Endpoint) -> bool:
        return self._credentials is not None and bool(self._credentials.of(endpoint.url))

    async def close(self) -> None:
        for storage in self._known.values():
            if not isinstance(storage, tuple):
                await storage.close()


def is_folder(endpoint: wire.Endpoint) -> bool:
    """Whether it is a folder of some machine, perhaps of this one."""
    return endpoint.url.startswith("file:")


def _open(endpoint: wire.Endpoint, credentials: Credentials | None) -> Storage | _Closed:
    mount = (
        "mount its disk, or run this on the machine that has it; a new folder is made ready by "
        f"`replica endpoint prepare {endpoint.name}`"
    )
    try:
        storage = open_storage(endpoint.url, name=endpoint.name, credentials=credentials)
        if not isinstance(storage, PosixStorage):
            return keeping(storage)
        storage.tree.space()
        owner = json.loads(Path(storage.tree.path, SENTINEL).read_text(encoding="utf-8")).get("endpoint")
    except Invalid as error:
        return error.message, error.hint
    except ReplicaError as error:
        return error.message, mount
    except (OSError, ValueError, AttributeError) as error:
        return f"its file {SENTINEL} cannot be read ({error})", mount
    if owner and owner != endpoint.name:
        return f"{storage.tree.path} belongs to the endpoint {owner}", mount
    return Endpoint(storage.tree.path, name=endpoint.name, url=endpoint.url)


def keeping(storage: Storage) -> Storage:
    """The storage, as a person writes to it: nothing that stands in the way is ever moved."""

    async def refuse(path: str) -> str:
        raise in_the_way(storage.name, path, f"{shown(path)} at {storage.name or storage.url}")

    storage.quarantine = refuse  # type: ignore[method-assign]
    return storage


def in_the_way(name: str, path: str, where: str) -> TargetExists:
    return TargetExists(
        f"{where} exists already with other bytes; it was not touched",
        hint="move it away or choose another name, and try again",
        endpoint=name,
        path=path,
        side="target",
    )


async def prepare(endpoint: wire.Endpoint, credentials: Credentials | None = None) -> None:
    """Make the endpoint's folder, bucket or prefix ready, with Replica's mark in it. Idempotent.

    An act of a person or of a site's own scripts, never of a worker: where a worker finds no mark, a disk may not be
    mounted, and a mark made anew would turn "not there" into "empty": all files lost.
    """
    storage = open_storage(endpoint.url, name=endpoint.name, credentials=credentials)
    try:
        await storage.prepare()
    finally:
        await storage.close()


def prepare_here(endpoint: wire.Endpoint) -> None:
    """`prepare` for a folder of this machine, at once; other storages are left as they are."""
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
        return in_the_way(self.name, path, f"{self.path}/{path}")


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
