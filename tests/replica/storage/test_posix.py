"""The POSIX backend against hostile and broken folders, with the new system calls and without them."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from replica.storage import beneath
from replica.storage.base import PARTS, SENTINEL, part_path
from replica.storage.conformance import listed, read_all, write
from replica.storage.posix import PosixStorage
from rules.errors import Forbidden, Refused, SourceMissing, StorageError, TargetExists, Transient, Unreachable
from tests.replica.storage.places import as_nobody, folder_storage, open_descriptors


@pytest.fixture(params=["openat2", "by segments"], autouse=True)
def way(request, monkeypatch):
    if request.param == "by segments":
        monkeypatch.setattr(beneath, "has_openat2", lambda: False)
        monkeypatch.setattr(beneath, "_renameat2", None)
    return request.param


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def storage(root):
    return folder_storage(root, "DISK")


@pytest.fixture
def outside(tmp_path):
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    (folder / "f").write_bytes(b"secret")
    return folder


async def every_verb_refuses(storage, path, kind=Forbidden):
    part = part_path(f"t{os.urandom(4).hex()}")
    await write(storage, part, b"x")
    for verb in (
        lambda: storage.stat(path),
        lambda: read_all(storage, path),
        lambda: storage.checksum(path, "adler32"),
        lambda: storage.delete(path),
        lambda: storage.quarantine(path),
        lambda: storage.publish(part, path),
    ):
        with pytest.raises(kind):
            await asyncio.wait_for(verb(), 5)
    await storage.delete(part)


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("points_to", ["outside", "inside", "nowhere", "itself"])
async def test_a_link_in_place_of_a_file_is_never_followed(storage, root, outside, points_to):
    (root / "real").write_bytes(b"x")
    to = {"outside": outside / "secret", "inside": "real", "nowhere": "no/such", "itself": "link"}[points_to]
    (root / "link").symlink_to(to)
    await every_verb_refuses(storage, "link", (Forbidden, TargetExists))
    assert (root / "link").is_symlink()
    assert (outside / "secret").read_bytes() == b"secret"


@pytest.mark.parametrize("at", ["link/f", "real/link/f"])
async def test_a_link_in_place_of_a_folder_is_never_followed(storage, root, outside, at):
    (root / "real").mkdir()
    (root / at).parent.symlink_to(outside)
    await every_verb_refuses(storage, at)
    assert sorted(p.name for p in outside.iterdir()) == ["f", "secret"]
    with pytest.raises(Forbidden):
        await write_and_publish(storage, f"{Path(at).parent}/new/deep/file")
    assert sorted(p.name for p in outside.iterdir()) == ["f", "secret"]


async def test_replicas_own_folder_swapped_for_a_link_is_not_followed(storage, root, outside):
    (root / PARTS).rmdir()
    (root / PARTS).symlink_to(outside)
    with pytest.raises(Forbidden):
        await write(storage, part_path("t1"), b"x")
    with pytest.raises(StorageError):
        await storage.collect_parts(0)
    assert sorted(p.name for p in outside.iterdir()) == ["f", "secret"]


def test_links_swapped_in_while_we_work_lead_nowhere(storage, root, outside):
    """An attacker who may write into the root swaps a folder and a link as fast as he can."""
    (root / "d").mkdir()
    (root / "d" / "f").write_bytes(b"ours")
    before = {p.name: p.read_bytes() for p in outside.iterdir()}
    ended = threading.Event()

    def attack():
        while not ended.is_set():
            try:
                os.rename(root / "d", root / "away")
                os.symlink(outside, root / "d")
                time.sleep(0.0002)
                os.unlink(root / "d")
                os.rename(root / "away", root / "d")
            except OSError:
                continue
            time.sleep(0.0002)

    attacker = threading.Thread(target=attack)
    attacker.start()
    outcomes = {"right": 0, "refused": 0}
    try:
        until = time.monotonic() + 1.0
        number = 0
        while time.monotonic() < until:
            number += 1
            part = part_path(f"t{number}")
            os.close(storage.tree.create_part(part))
            for verb in (
                lambda: read_now(storage, "d/f"),
                lambda part=part, number=number: storage.tree.publish(part, f"d/new{number}"),
                lambda number=number: storage.tree.delete(f"d/new{number}"),
                lambda: storage.tree.delete("d/secret"),
                lambda: storage.tree.quarantine("d/secret"),
            ):
                try:
                    verb()
                    outcomes["right"] += 1
                except StorageError:
                    outcomes["refused"] += 1
    finally:
        ended.set()
        attacker.join()
    assert {p.name: p.read_bytes() for p in outside.iterdir()} == before
    assert outcomes["right"] and outcomes["refused"], "the attack never met us; it proved nothing"


def read_now(storage, path):
    descriptor = storage.tree.open(path)
    try:
        assert os.read(descriptor, 100) == b"ours"
    finally:
        os.close(descriptor)


async def test_a_hard_link_is_refused_for_it_may_be_a_file_of_others(storage, root, outside):
    os.link(outside / "secret", root / "linked")
    for verb in (lambda: storage.stat("linked"), lambda: read_all(storage, "linked")):
        with pytest.raises(Forbidden, match="hard links"):
            await verb()
    await storage.delete("linked")  # our name goes, the file of others stays
    assert (outside / "secret").read_bytes() == b"secret"


async def test_the_second_name_of_a_killed_publish_is_tidied_up(storage, root):
    await write(storage, part_path("t1"), b"whole")
    os.link(root / PARTS / "t1", root / "f")  # killed between link and unlink
    assert await read_all(storage, "f") == b"whole"
    assert (await storage.stat("f")).size_bytes == 5
    assert not (root / PARTS / "t1").exists()


# ── things that are no files ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_fifo_a_socket_and_a_folder_are_refused_without_waiting(storage, root):
    os.mkfifo(root / "fifo")
    (root / "folder").mkdir()
    here = os.getcwd()
    os.chdir(root)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)
    for path in ("fifo", "socket", "folder"):
        await every_verb_refuses(storage, path, StorageError)
        assert (root / path).exists()


async def test_a_file_in_place_of_a_folder(storage, root):
    (root / "f").write_bytes(b"x")
    with pytest.raises(SourceMissing):
        await storage.stat("f/below")
    await storage.delete("f/below")
    assert await listed(storage, "f") == []
    with pytest.raises(TargetExists, match="f/below") as told:
        await write_and_publish(storage, "f/below")
    assert told.value.hint
    assert (root / "f").read_bytes() == b"x"


async def test_a_listing_names_what_can_be_no_replica(storage, root, outside):
    (root / "good").write_bytes(b"123")
    (root / "link").symlink_to(outside / "secret")
    (root / "linked folder").symlink_to(outside)
    os.mkfifo(root / "fifo")
    (root / ".replicas").write_bytes(b"")
    os.close(os.open(os.fsencode(root) + b"/caf\xe9", os.O_CREAT | os.O_WRONLY))
    os.mkdir(os.fsencode(root) + b"/d\xff")
    os.close(os.open(os.fsencode(root) + b"/d\xff/f", os.O_CREAT | os.O_WRONLY))
    found = {e.path: e.problem for e in await listed(storage)}
    assert found == {
        "good": "",
        "link": "symbolic link",
        "linked folder": "symbolic link",
        "fifo": "FIFO",
        ".replicas": "name is kept for Replica",
        "caf\\xe9": "name is not UTF-8",
        "d\\xff/f": "name is not UTF-8",
    }
    for path in found:
        path.encode()


async def test_a_listing_survives_a_path_longer_than_the_kernel_takes(storage, root):
    (root / "good").write_bytes(b"x")
    here = os.open(root, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("x" * 200, dir_fd=here)
        below = os.open("x" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    found = await listed(storage)
    assert "good" in {e.path for e in found}
    assert len(found) == 2  # the deep file, or the folder it lies in with the reason


async def test_a_thousand_entries_come_through_once_each(storage, root):
    for number in range(2500):
        (root / f"{number % 7}").mkdir(exist_ok=True)
        (root / f"{number % 7}" / f"{number}").touch()
    found = [e.path for e in await listed(storage)]
    assert len(found) == len(set(found)) == 2500


def test_a_folder_we_may_not_read_fails_the_listing_instead_of_shortening_it(way):
    def as_user(folder):
        storage = folder_storage(folder / "root", "DISK")
        (folder / "root" / "closed").mkdir(mode=0)
        (folder / "root" / "open").touch()
        with pytest.raises(Forbidden, match="closed"):
            list(storage.tree.walk())

    as_nobody(as_user)


# ── the root ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_endpoint_where_we_may_not_write_is_refused_in_our_words():
    def as_user(folder):
        (folder / "closed").mkdir(mode=0)
        with pytest.raises(Forbidden, match="Permission denied"):
            folder_storage(folder / "closed" / "root", "DISK")

    as_nobody(as_user)


def test_a_folder_that_was_closed_to_us_is_a_matter_of_rights_and_not_of_mounting():
    def as_user(folder):
        storage = folder_storage(folder / "root", "DISK")
        for closed in (folder / "root", folder / "root/.replica"):
            closed.chmod(0)
            with pytest.raises(Forbidden, match="may not be opened") as told:
                asyncio.run(storage.stat("f"))
            assert "mount" not in told.value.hint
            closed.chmod(0o755)

    as_nobody(as_user)


async def test_a_disk_that_is_not_mounted_is_told_from_an_empty_one(storage, root):
    (root / "f").write_bytes(b"x")
    root.rename(root.with_name("away"))
    with pytest.raises(Unreachable, match="cannot be opened"):
        await listed(storage)
    root.mkdir()
    with pytest.raises(Unreachable, match="perhaps not mounted") as told:
        await listed(storage)
    assert "mount" in told.value.hint
    root.rmdir()
    root.with_name("away").rename(root)
    assert [e.path for e in await listed(storage)] == ["f"]


async def test_a_sentinel_that_is_a_link_is_none(storage, root, outside):
    (root / SENTINEL).unlink()
    (root / SENTINEL).symlink_to(outside / "secret")
    with pytest.raises(Unreachable):
        await storage.stat("f")


async def test_the_root_itself_may_be_reached_through_a_link(storage, root, tmp_path):
    (root / "f").write_bytes(b"x")
    (tmp_path / "alias").symlink_to(root)
    assert await read_all(PosixStorage(tmp_path / "alias"), "f") == b"x"


async def test_a_twin_prefix_is_another_folder(storage, root, tmp_path):
    (tmp_path / "root10").mkdir()
    (tmp_path / "root10" / "f").write_bytes(b"x")
    with pytest.raises(SourceMissing):
        await storage.stat("f")


def test_two_endpoints_never_share_a_folder(storage, root, tmp_path):
    PosixStorage(root, name="DISK").tree.prepare()
    with pytest.raises(Refused, match="DISK"):
        PosixStorage(root, name="OTHER").tree.prepare()
    with pytest.raises(Refused, match="within another endpoint"):
        PosixStorage(root / "below", name="OTHER").tree.prepare()
    (tmp_path / "alias").symlink_to(root)
    with pytest.raises(Refused, match="DISK"):
        PosixStorage(tmp_path / "alias", name="OTHER").tree.prepare()
    assert not (root / "below").exists()


def test_a_disk_whose_sentinel_was_lost_can_be_prepared_again(storage, root):
    (root / "f").write_bytes(b"x")
    (root / SENTINEL).unlink()
    storage.tree.prepare()
    assert storage.tree.stat("f").size_bytes == 1


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def write_and_publish(storage, path, content=b"x"):
    part = part_path(f"t{os.urandom(4).hex()}")
    await write(storage, part, content)
    try:
        await storage.publish(part, path)
    finally:
        await storage.delete(part)


async def test_a_name_the_file_system_cannot_take_is_permanent(storage):
    for path in ("x" * 256, "a/" + "x" * 256 + "/b"):
        with pytest.raises(StorageError, match="too long") as told:
            await write_and_publish(storage, path)
        assert not isinstance(told.value, Transient)


async def test_an_empty_parts_folder_may_be_tidied_away(storage, root):
    (root / PARTS).rmdir()
    await write_and_publish(storage, "a/f")
    assert (root / "a/f").read_bytes() == b"x"


async def test_a_cancelled_write_does_not_touch_descriptors_of_others(storage, root, monkeypatch):
    """The thread that writes must have ended before its descriptor is closed and the number given to another file."""
    writing, go_on = threading.Event(), threading.Event()
    real = os.write
    closed_before = []

    def slow(descriptor, view):
        writing.set()
        go_on.wait(5)
        try:
            os.fstat(descriptor)
        except OSError:
            closed_before.append(descriptor)
        return real(descriptor, view)

    monkeypatch.setattr(os, "write", slow)
    before = open_descriptors()
    task = asyncio.create_task(write(storage, part_path("t1"), b"x" * 1000))
    await asyncio.to_thread(writing.wait, 5)
    task.cancel()
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not closed_before
    assert open_descriptors() == before


async def test_no_verb_keeps_a_descriptor(storage, root):
    (root / "f").write_bytes(b"x")
    (root / "d").mkdir()
    await write_and_publish(storage, "warm/up")
    before = open_descriptors()
    for _ in range(20):
        await write_and_publish(storage, f"a/{os.urandom(4).hex()}")
        await read_all(storage, "f")
        await listed(storage)
        await storage.space()
        await storage.collect_parts(0)
        for failing in (storage.stat("no/such"), read_all(storage, "d"), storage.quarantine("no"), storage.stat("d/x")):
            with pytest.raises(StorageError):
                await failing
        with pytest.raises(TargetExists):
            await write_and_publish(storage, "f")
    assert open_descriptors() == before


async def test_the_disk_of_another_endpoint_mounted_here_is_unreachable(tmp_path):
    """Its files would be taken for ours: counted as copies, and moved to quarantine as wrong ones."""
    storages = [PosixStorage(tmp_path / name, name=name) for name in ("ONE", "TWO")]
    for storage in storages:
        await storage.prepare()
        (tmp_path / storage.name / "f").write_bytes(b"bytes")
        assert (await storage.stat("f")).size_bytes == 5
    for old, new in (("ONE", "away"), ("TWO", "ONE"), ("away", "TWO")):
        (tmp_path / old).rename(tmp_path / new)
    for storage in storages:
        for verb in (storage.stat("f"), storage.delete("f"), storage.quarantine("f")):
            with pytest.raises(Unreachable, match="belongs to the endpoint"):
                await verb
    assert (tmp_path / "ONE" / "f").exists()
