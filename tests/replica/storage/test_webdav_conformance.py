"""The shipped suite over WebDAV: Apache's mod_dav, rclone and XRootD, each as a real server of this machine."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from replica.storage.base import Storage
from replica.storage.conformance import StorageConformance
from replica.storage.registry import open_storage
from replica.storage.webdav import WebdavStorage
from tests.replica.storage.places import BehindFolder

_numbers = itertools.count(1)


class BehindServer(BehindFolder):
    """A server's folder, seen from this machine. What appears in it belongs to the server's account."""

    def __init__(self, root: Path, account, *, coarse: bool = False) -> None:
        super().__init__(root)
        self._account = account
        self._coarse = coarse
        self._seconds = 0

    def put(self, path: str, content: bytes) -> None:
        super().put(path, content)
        file = self.root / path
        if self._account is not None:
            for place in (file, *file.parents):
                if place == self.root:
                    break
                os.chown(place, self._account.pw_uid, self._account.pw_gid)
        if self._coarse:
            # Whole seconds are all that XRootD tells: a rewrite is seen once they differ.
            self._seconds -= 10
            found = file.stat()
            os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + self._seconds * 1_000_000_000))

    def vanish(self) -> None:
        super().vanish()
        if self._account is not None:
            os.chown(self.root, self._account.pw_uid, self._account.pw_gid)


class OverWebdav(StorageConformance):
    refused_paths = frozenset({"line\nbreak"})
    coarse = False

    @pytest.fixture
    async def opened(self, server):
        folder = f"s{next(_numbers)} %41é"
        root = server.data / folder
        root.mkdir()
        if server.account is not None:
            os.chown(root, server.account.pw_uid, server.account.pw_gid)
        port = server.port
        storage = open_storage(f"http://127.0.0.1:{port}/{folder.split()[0]}%20%2541%C3%A9", name="dav")
        await storage.prepare()
        yield storage, BehindServer(root, server.account, coarse=self.coarse)
        await storage.close()

    @pytest.fixture
    def storage(self, opened):
        return opened[0]

    @pytest.fixture
    def behind(self, opened):
        return opened[1]

    async def test_it_keeps_the_contract(self, storage):
        assert isinstance(storage, Storage)
        assert isinstance(storage, WebdavStorage)


class TestApache(OverWebdav):
    @pytest.fixture
    def server(self, apache):
        return apache


class TestRclone(OverWebdav):
    @pytest.fixture
    def server(self, rclone_server):
        return rclone_server


class TestXRootD(OverWebdav):
    refused_paths = frozenset({"line\nbreak", "$(id);`id`|&*?[a]{b}", "x" * 255})
    coarse = True

    @pytest.fixture
    def server(self, xrootd):
        return xrootd
