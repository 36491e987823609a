"""fsspec's file systems: the suite against its own local one, and what is refused because fsspec cannot promise it."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from replica.storage import fsspec_plain
from replica.storage.base import PARTS, QUARANTINE, part_path
from replica.storage.conformance import StorageConformance, listed, read_all, refusal, write
from replica.storage.credentials import Credentials
from replica.storage.fsspec_plain import FsspecStorage
from replica.storage.registry import open_storage
from rules.errors import Busy, Forbidden, Invalid, Refused, SourceMissing, TargetExists, Transient, Unreachable
from tests.replica.storage.places import BehindFolder


def over(file_system, root, *, declared=True) -> FsspecStorage:
    return FsspecStorage(lambda: (file_system, str(root)), declared=declared, name="LONGTAIL", url=f"fsspec+x://{root}")


@pytest.fixture
async def storage(tmp_path):
    storage = over(LocalFileSystem(), tmp_path / "root")
    await storage.prepare()
    return storage


@pytest.fixture
def behind(tmp_path):
    return BehindFolder(tmp_path / "root")


class TestFsspecLocal(StorageConformance):
    pass


async def test_without_a_declaration_it_is_read_and_never_written(tmp_path, behind):
    storage = over(LocalFileSystem(), tmp_path / "root", declared=False)
    await refusal(Unreachable, storage.prepare)
    behind.put("a/f", b"bytes")
    await storage.prepare()
    assert await read_all(storage, "a/f") == b"bytes"
    assert [e.path for e in await listed(storage)] == ["a/f"]
    for verb in (
        lambda: write(storage, part_path("t1"), b"x"),
        lambda: storage.publish(part_path("t1"), "g"),
        lambda: storage.delete("a/f"),
        lambda: storage.quarantine("a/f"),
    ):
        error = await refusal(Forbidden, verb)
        assert "rename_is_atomic" in error.hint
    assert behind.paths() == ["a/f"]
    behind.remove("a/f")
    (behind.root / "a").rmdir()
    await refusal(Unreachable, lambda: storage.stat("a/f"))


async def test_a_file_system_that_moves_by_copying_is_read_only_whatever_is_declared():
    memory = MemoryFileSystem(global_store=False, skip_instance_cache=True)
    memory.pipe("/data/f", b"bytes")
    storage = over(memory, "/data")
    error = await refusal(Forbidden, storage.prepare)
    assert "copying" in error.message
    assert list(memory.store) == ["/data/f"]
    readable = over(memory, "/data", declared=False)
    assert await read_all(readable, "f") == b"bytes"
    assert [(e.path, e.size_bytes) for e in await listed(readable)] == [("f", 5)]


async def test_a_file_system_that_creates_a_name_twice_is_refused(tmp_path):
    class Careless(LocalFileSystem):
        def open(self, path, mode="rb", **options):
            return super().open(path, mode.replace("x", "w"), **options)

    error = await refusal(Refused, over(Careless(), tmp_path / "root").prepare)
    assert "exclusively" in error.message
    assert BehindFolder(tmp_path / "root").paths() == []


async def test_a_claim_is_nothing_to_readers_and_is_taken_away_when_its_worker_died(storage, behind, monkeypatch):
    monkeypatch.setattr(fsspec_plain, "_CLAIM_WAIT_SECONDS", 0.1)
    behind.put("f", fsspec_plain._CLAIM)
    await refusal(SourceMissing, lambda: storage.stat("f"))
    assert [e.problem for e in await listed(storage)] == ["a publication that was not finished"]
    await write(storage, part_path("t1"), b"content")
    await refusal(Busy, lambda: storage.publish(part_path("t1"), "f"))
    made = (behind.root / "f").stat().st_mtime - fsspec_plain.CLAIM_STALE_SECONDS - 10
    os.utime(behind.root / "f", (made, made))
    await storage.publish(part_path("t1"), "f")
    assert behind.get("f") == b"content"
    assert not any(p.startswith((PARTS, QUARANTINE)) for p in behind.paths())


async def test_a_file_system_whose_rename_refuses_gets_the_name_freed_first(tmp_path, behind):
    class Strict(LocalFileSystem):
        def mv(self, path1, path2, **options):
            if self.exists(path2):
                raise FileExistsError(path2)
            super().mv(path1, path2, **options)

    storage = over(Strict(), tmp_path / "root")
    await storage.prepare()
    await write(storage, part_path("t1"), b"content")
    await storage.publish(part_path("t1"), "f")
    assert behind.get("f") == b"content"
    await write(storage, part_path("t2"), b"other")
    await refusal(TargetExists, lambda: storage.publish(part_path("t2"), "f"))


async def test_a_star_in_a_name_is_a_star(storage, behind):
    behind.put("*", b"1")
    behind.put("other", b"2")
    await storage.delete("*")
    assert behind.get("other") == b"2"
    assert behind.get("*") is None


async def test_symbolic_links_are_not_followed(storage, behind, tmp_path):
    (tmp_path / "outside").write_bytes(b"secret")
    (behind.root / "link").symlink_to(tmp_path / "outside")
    await refusal(Forbidden, lambda: storage.stat("link"))
    await refusal(Forbidden, lambda: read_all(storage, "link"))
    assert [(e.path, e.problem) for e in await listed(storage)] == [("link", "symbolic link")]


async def test_foreign_errors_are_transient_and_their_texts_stay_out_of_messages(storage, behind, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("GET https://store/?token=s3cret failed")

    behind.put("f", b"x")
    monkeypatch.setattr(storage.fs, "info", fails)
    error = await refusal(Transient, lambda: storage.stat("f"))
    assert "RuntimeError" in error.message
    assert "s3cret" not in error.message


@pytest.mark.parametrize(
    "url",
    [
        "fsspec+file:///data/x",
        "fsspec+local:///data/x",
        "fsspec+memory://x",
        "fsspec+root://host//x",
        "fsspec+simplecache://x",
        "fsspec+zip://x",
        "fsspec+nothing://host/x",
        "fsspec+://host/x",
        "fsspec+ftp://",
        "fsspec+ftp://host/a/../b",
        "fsspec+ftp://user:secret@host/x",
        "fsspec+ftp://host/x::file:///etc",
    ],
)
def test_urls_that_do_not_name_one_storage_are_refused(url):
    with pytest.raises(Invalid):
        open_storage(url)


async def test_options_come_from_the_credentials_and_secrets_from_their_files(tmp_path: Path, monkeypatch):
    asked = {}

    class Recording(LocalFileSystem):
        protocol = "webhdfs"

        def __init__(self, **options):
            asked.update(options)
            super().__init__()

        @classmethod
        def _strip_protocol(cls, path):
            return path.replace("webhdfs://host/x", str(tmp_path / "root"))

    (tmp_path / "key").write_text("s3cret\n")
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda protocol: Recording)
    table = {"user": "replica", "password_file": str(tmp_path / "key"), "rename_is_atomic": "yes"}
    credentials = Credentials({"fsspec+webhdfs://host": table})
    storage = open_storage("fsspec+webhdfs://host/x", name="LONGTAIL", credentials=credentials)
    assert asked == {}
    await storage.prepare()
    assert asked["user"] == "replica"
    assert asked["password"] == "s3cret"
    assert "rename_is_atomic" not in asked
