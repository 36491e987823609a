"""The shipped suite, run for every adapter here, and for every way the POSIX one can go."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from pathlib import Path

import pytest

from replica.storage import beneath, memory
from replica.storage.base import Storage, SupportsLocalPath
from replica.storage.conformance import StorageConformance
from replica.storage.posix import PosixStorage
from tests.replica.storage.places import BehindFolder


class TestPosixOnDisk(StorageConformance):
    @pytest.fixture
    async def storage(self, tmp_path):
        storage = PosixStorage(tmp_path / "root", name="disk")
        await storage.prepare()
        return storage

    @pytest.fixture
    def behind(self, storage):
        return BehindFolder(Path(storage.tree.path))

    async def test_it_keeps_the_contract_and_has_local_paths(self, storage):
        assert isinstance(storage, Storage)
        assert isinstance(storage, SupportsLocalPath)
        assert storage.local_path("a/b") == Path(storage.tree.path, "a/b")


class TestPosixInSharedMemory(TestPosixOnDisk):
    """tmpfs where the machine has one at /dev/shm, else another folder of the disk: the suite runs in any case."""

    @pytest.fixture
    async def storage(self):
        shared = Path("/dev/shm")
        folder = Path(tempfile.mkdtemp(prefix="replica-", dir=shared if shared.is_dir() else None))
        storage = PosixStorage(folder / "root", name="shm")
        await storage.prepare()
        yield storage
        shutil.rmtree(folder)


class TestPosixWithoutNewSystemCalls(TestPosixOnDisk):
    """Old kernels, strict containers and NFS: no openat2, no renameat2."""

    @pytest.fixture(autouse=True)
    def old_kernel(self, monkeypatch):
        monkeypatch.setattr(beneath, "has_openat2", lambda: False)
        monkeypatch.setattr(beneath, "_renameat2", None)


class TestMemory(StorageConformance):
    @pytest.fixture
    async def storage(self):
        store = uuid.uuid4().hex
        storage = memory.MemoryStorage(store, name="ram")
        await storage.prepare()
        yield storage
        memory.forget(store)

    @pytest.fixture
    def behind(self, storage):
        return memory.behind(storage.store)

    async def test_it_keeps_the_contract(self, storage):
        assert isinstance(storage, Storage)
