"""The copy of one file: what must hold whichever storages are at its ends, and whatever breaks."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from replica.storage import copy_local as copying
from replica.storage import faultpoints, memory, proof
from replica.storage.base import PARTS, QUARANTINE
from replica.storage.conformance import pattern
from replica.storage.copy import (
    Control,
    Copied,
    Expected,
    LocalCopy,
    Stopped,
    adopt,
    copy_file,
    copy_local,
    copy_local_batch,
    measure,
    measure_local,
)
from replica.storage.hashing import Hasher
from replica.storage.posix import PosixStorage
from rules.checksums import Checksums
from rules.errors import (
    ChecksumDiffers,
    Forbidden,
    Invalid,
    NoSpace,
    SourceChanged,
    SourceMissing,
    StorageError,
    TargetExists,
    Transient,
    Unreachable,
)
from tests.replica.storage.places import BehindFolder, as_nobody, folder_storage, in_child, open_descriptors

MIB = 1 << 20


def expected_of(content: bytes, *algorithms: str) -> Expected:
    hasher = Hasher(algorithms)
    hasher.update(content)
    known = hasher.checksums().as_dict()
    return Expected(len(content), Checksums.of({a: known[a] for a in algorithms or known}))


class Place:
    """A storage and its back door."""

    def __init__(self, storage, behind):
        self.storage = storage
        self.behind = behind

    def parts(self):
        return [p for p in self.behind.paths() if p.startswith(PARTS)]

    def quarantined(self):
        return [self.behind.get(p) for p in self.behind.paths() if p.startswith(QUARANTINE)]


@pytest.fixture
def make_place(tmp_path):
    stores = []

    def make(kind, name):
        if kind == "posix":
            return Place(folder_storage(tmp_path / name, name), BehindFolder(tmp_path / name))
        storage = memory.MemoryStorage(uuid.uuid4().hex, name=name)
        stores.append(storage.store)
        memory.behind(storage.store).prepared = True
        return Place(storage, memory.behind(storage.store))

    yield make
    for store in stores:
        memory.forget(store)


KINDS = ("posix", "memory")


@pytest.fixture(params=[f"{a} to {b}" for a in KINDS for b in KINDS])
def places(request, make_place):
    a, _, b = request.param.split()
    return make_place(a, "SOURCE"), make_place(b, "TARGET")


@pytest.fixture
def folders(make_place):
    return make_place("posix", "SOURCE"), make_place("posix", "TARGET")


async def run(places, expected=None, **more):
    source, target = places
    return await copy_file(source.storage, "a/f", target.storage, "b/g", tag="t1.e1", expected=expected, **more)


def run_local(places, expected=None, **more):
    source, target = places
    return copy_local(source.storage, "a/f", target.storage, "b/g", tag="t1.e1", expected=expected, **more)


# ── what it does ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 65536, MIB - 1, MIB, MIB + 1, 3 * MIB + 5])
async def test_the_bytes_arrive_and_are_told(places, size):
    source, target = places
    content = pattern(size)
    source.behind.put("a/f", content)
    copied = await run(places, expected_of(content))
    assert target.behind.get("b/g") == content
    assert (copied.size_bytes, copied.checksums, copied.adopted) == (size, expected_of(content).checksums, False)
    assert copied.verified_by in ("read back", "digest xxh3_128")
    assert copied.seconds > 0
    assert not target.parts()


@pytest.mark.parametrize("read_back", ["auto", "device", "cache"])
@pytest.mark.parametrize("size", [5, MIB, MIB + 1, 2 * MIB, 7 * MIB + 3])
async def test_a_file_of_several_windows_is_proven_while_it_is_written(folders, monkeypatch, size, read_back):
    monkeypatch.setattr(copying, "WINDOW_BYTES", MIB)
    content = pattern(size)
    folders[0].behind.put("a/f", content)
    copied = await run(folders, expected_of(content), read_back=read_back)
    assert folders[1].behind.get("b/g") == content
    assert copied.checksums == expected_of(content).checksums


async def test_nothing_need_be_known_of_the_file(places):
    places[0].behind.put("a/f", b"bytes")
    copied = await run(places)
    assert copied.checksums == expected_of(b"bytes").checksums


@pytest.mark.parametrize("algorithm", ["md5", "sha256", "adler32"])
async def test_a_foreign_checksum_is_enough_and_is_checked(places, algorithm):
    source, target = places
    source.behind.put("a/f", b"bytes")
    copied = await run(places, expected_of(b"bytes", algorithm))
    assert {"xxh3_128", "adler32", algorithm} == set(copied.checksums.as_dict())
    with pytest.raises(ChecksumDiffers) as told:
        await copy_file(
            source.storage, "a/f", target.storage, "other", tag="t", expected=expected_of(b"BYTES", algorithm)
        )
    assert told.value.side == "source"
    assert (await run(places, expected_of(b"bytes", algorithm))).adopted


async def test_a_checksum_nobody_here_can_compute_is_refused_at_once(places):
    places[0].behind.put("a/f", b"bytes")
    with pytest.raises(Invalid, match="crc32c"):
        await run(places, Expected(5, Checksums.of({"crc32c": "1"})))
    assert places[1].behind.get("b/g") is None


async def test_a_long_name_arrives(places):
    source, target = places
    name = "/".join(["n" * 255] * 4)
    source.behind.put(name, b"x")
    await copy_file(source.storage, name, target.storage, name, tag="t1")
    assert target.behind.get(name) == b"x"


async def test_progress_is_told(places):
    source, _ = places
    source.behind.put("a/f", pattern(3 * MIB))
    control, seen = Control(), []

    def look(point, piece):
        seen.append((point, control.bytes_done, control.phase))

    with faultpoints.handling(look):
        await run(places, control=control)
    assert control.bytes_done == 3 * MIB
    assert [done for point, done, _ in seen if point == "piece"] == [0, MIB, 2 * MIB]
    assert [phase for point, _, phase in seen if point == "after_verify"] == ["verifying"]
    assert [point for point, _, _ in seen][-3:] == ["after_write", "after_verify", "after_publish"]


def test_nothing_is_told_before_it_is_durable(folders, monkeypatch):
    """fsync of the bytes; they are forgotten and read; the name; fsync of the folder; only then the answer."""
    source, target = folders
    source.behind.put("a/f", b"bytes")
    story = []
    really = {"fsync": os.fsync, "drop": proof.drop_cache, "read": os.preadv}
    rename = target.storage.tree.rename

    def fsync(descriptor):
        story.append("fsync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "fsync file")
        really["fsync"](descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(proof, "drop_cache", lambda *a: (story.append("forget"), really["drop"](*a)))
    monkeypatch.setattr(os, "preadv", lambda *a: (story.append("read"), really["read"](*a))[1])
    monkeypatch.setattr(target.storage.tree, "rename", lambda *a: (story.append("rename"), rename(*a))[1])
    run_local(folders)
    told = [word for word, before in zip(story, ["", *story], strict=False) if word != before]
    # Between rename and the end: the new folder 'b' in its parent was made durable inside `rename` already.
    assert told == ["fsync file", "forget", "read", "rename", "fsync folder"]


def recorded_fsyncs(monkeypatch, root):
    """Which files and folders beneath `root` were fsynced, in order."""
    really, story = os.fsync, []

    def fsync(descriptor):
        story.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return story


def test_new_folders_are_durable_before_a_file_is_told_to_be_in_them(folders, monkeypatch):
    source, target = folders
    source.behind.put("a/f", b"bytes")
    target.behind.put("there/x", b"")
    story = recorded_fsyncs(monkeypatch, target.behind.root)
    copy_local(source.storage, "a/f", target.storage, "there/new/newer/g", tag="t1")
    assert story[1:] == ["there", "there/new", "there/new/newer"]


def test_what_is_adopted_is_made_durable_for_its_writer_may_have_died(folders, monkeypatch):
    source, target = folders
    source.behind.put("a/f", b"bytes")
    target.behind.put("b/g", b"bytes")
    story = recorded_fsyncs(monkeypatch, target.behind.root)
    assert run_local(folders).adopted
    assert story == ["b/g", "b"]


# ── the source is wrong ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_missing_source_is_missing(places):
    with pytest.raises(SourceMissing) as told:
        await run(places, expected_of(b"x"))
    assert (told.value.side, told.value.endpoint, told.value.path) == ("source", "SOURCE", "a/f")
    assert not places[1].parts()


@pytest.mark.parametrize("wrong", ["size", "content"])
async def test_a_source_that_is_not_what_the_catalogue_knows_is_never_published(places, wrong):
    source, target = places
    content = pattern(2 * MIB)
    source.behind.put("a/f", content)
    if wrong == "size":
        source.behind.put("a/f", content[:-1])
    else:
        source.behind.flip("a/f", MIB + 1)
    known = expected_of(content)
    with pytest.raises(ChecksumDiffers) as told:
        await run(places, known)
    assert (told.value.side, told.value.endpoint) == ("source", "SOURCE")
    named = str(known.size_bytes) if wrong == "size" else known.checksums.get("xxh3_128")
    assert named in told.value.message, "both values are named"
    assert target.behind.get("b/g") is None
    assert not target.parts()


@pytest.mark.parametrize("how", ["grows", "shrinks", "is rewritten", "is replaced", "is deleted"])
@pytest.mark.parametrize("known", [True, False])
async def test_a_source_that_changes_while_it_is_read_is_told_so(folders, how, known):
    source, target = folders
    content = pattern(3 * MIB)
    source.behind.put("a/f", content)
    file = source.behind.root / "a/f"

    def change(point, piece):
        if point != "piece":
            return
        if how == "grows":
            with file.open("ab") as opened:
                opened.write(b"more" * MIB)  # faster than it is read: it would never end
        elif how == "shrinks":
            os.truncate(file, MIB)
        elif how == "is rewritten":
            time.sleep(0.02)
            with file.open("r+b") as opened:
                opened.write(b"!")
        elif how == "is replaced":
            source.behind.put("a/new", content)
            os.replace(source.behind.root / "a/new", file)
        else:
            file.unlink(missing_ok=True)

    with faultpoints.handling(change), pytest.raises(SourceChanged) as told:
        await run(folders, expected_of(content) if known else None)
    assert told.value.side == "source"
    assert isinstance(told.value, Transient)
    assert target.behind.get("b/g") is None
    assert not target.parts()


async def test_a_source_in_memory_that_changes_is_told_so(make_place):
    source, target = make_place("memory", "SOURCE"), make_place("posix", "TARGET")
    source.behind.put("a/f", pattern(2 * MIB))

    def change(point, piece):
        source.behind.put("a/f", pattern(2 * MIB))

    with faultpoints.handling(change), pytest.raises(SourceChanged):
        await run((source, target))
    assert target.behind.get("b/g") is None
    assert not target.parts()


def test_a_source_we_may_not_read_is_forbidden():
    def as_user(folder):
        source, target = folder_storage(folder / "s", "SOURCE"), folder_storage(folder / "t", "TARGET")
        (folder / "s" / "f").write_bytes(b"x")
        (folder / "s" / "f").chmod(0)
        with pytest.raises(Forbidden) as told:
            copy_local(source, "f", target, "f", tag="t1")
        assert (told.value.side, told.value.endpoint) == ("source", "SOURCE")
        assert "right" in told.value.hint

    as_nobody(as_user)


def test_a_sparse_source_larger_than_the_disk_is_no_space_at_once(folders):
    source, target = folders
    source.behind.put("a/f", b"")
    free = target.storage.tree.space().free_bytes
    os.truncate(source.behind.root / "a/f", free + (1 << 30))
    began = time.monotonic()
    with pytest.raises(NoSpace) as told:
        run_local(folders)
    assert told.value.side == "target"
    assert time.monotonic() - began < 5
    assert not target.parts()


# ── the way, and the target ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("read_back", ["device", "cache"])
@pytest.mark.parametrize("window", [MIB, 32 * MIB])
async def test_a_byte_flipped_in_flight_is_never_published(places, monkeypatch, window, read_back):
    monkeypatch.setattr(copying, "WINDOW_BYTES", window)
    source, target = places
    content = pattern(3 * MIB)
    source.behind.put("a/f", content)
    with faultpoints.handling(faultpoints.from_text("piece=flip@2")), pytest.raises(ChecksumDiffers) as told:
        await run(places, expected_of(content), read_back=read_back)
    assert (told.value.side, told.value.endpoint) == ("target", "TARGET")
    assert target.behind.get("b/g") is None
    assert not target.parts()
    await run(places, expected_of(content))
    assert target.behind.get("b/g") == content


@pytest.mark.parametrize("damage", ["flipped", "cut", "lengthened"])
async def test_a_temporary_damaged_after_it_was_written_is_never_published(places, damage):
    source, target = places
    content = pattern(2 * MIB)
    source.behind.put("a/f", content)

    def harm(point, piece):
        if point == "after_write":
            (part,) = target.parts()
            if damage == "flipped":
                target.behind.flip(part, MIB)
            else:
                target.behind.put(part, content[:-1] if damage == "cut" else content + b"!")

    with faultpoints.handling(harm), pytest.raises(ChecksumDiffers) as told:
        await run(places, expected_of(content))
    assert told.value.side == "target"
    assert target.behind.get("b/g") is None
    assert not target.parts()


def test_a_disk_that_keeps_other_bytes_than_it_was_given_is_found_out(folders, monkeypatch):
    monkeypatch.setattr(copying, "WINDOW_BYTES", MIB)
    source, target = folders
    source.behind.put("a/f", pattern(5 * MIB))
    really, turns = proof.write_out, []

    def lie(descriptor, begin, end):
        really(descriptor, begin, end)
        turns.append(begin)
        if len(turns) == 3:
            byte = os.pread(descriptor, 1, begin + 7)
            os.pwrite(descriptor, bytes([byte[0] ^ 1]), begin + 7)

    monkeypatch.setattr(proof, "write_out", lie)
    with pytest.raises(ChecksumDiffers) as told:
        run_local(folders, read_back="device")
    assert told.value.side == "target"
    assert target.behind.get("b/g") is None
    assert not target.parts()


FAILING = [(errno.ENOSPC, NoSpace), (errno.EIO, Transient), (errno.EROFS, Forbidden), (errno.ESTALE, Unreachable)]


@pytest.mark.parametrize(("code", "kind"), FAILING)
@pytest.mark.parametrize("call", ["write", "fsync", "fdatasync", "preadv"])
@pytest.mark.parametrize("read_back", ["device", "cache"])
def test_a_failing_system_call_on_the_target_blames_the_target(folders, monkeypatch, call, code, kind, read_back):
    monkeypatch.setattr(copying, "WINDOW_BYTES", MIB)
    source, target = folders
    source.behind.put("a/f", pattern(4 * MIB))
    really = getattr(os, call)
    failed = []

    def fail(descriptor, *rest):
        if PARTS in os.readlink(f"/proc/self/fd/{descriptor}"):
            failed.append(descriptor)
            raise OSError(code, os.strerror(code))
        return really(descriptor, *rest)

    before = open_descriptors()
    monkeypatch.setattr(os, call, fail)
    if call == "fdatasync":
        monkeypatch.setattr(proof, "write_out", lambda descriptor, begin, end: os.fdatasync(descriptor))
    with pytest.raises(kind) as told:
        run_local(folders, read_back=read_back)
    monkeypatch.undo()
    assert (told.value.side, told.value.endpoint) == ("target", "TARGET")
    assert len(failed) == 1, "an fsync that failed once may lie the second time; the temporary is given up"
    assert target.behind.get("b/g") is None
    assert not target.parts()
    assert open_descriptors() == before
    assert not run_local(folders).adopted


def test_a_failing_fsync_of_the_folder_is_not_reported_as_done(folders, monkeypatch):
    source, target = folders
    source.behind.put("a/f", b"bytes")
    really = os.fsync

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/b") and (target.behind.root / "b/g").exists():
            raise OSError(errno.EIO, "")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Transient):
        run_local(folders)
    assert target.behind.get("b/g") == b"bytes", "it has its name; that the name stays is not yet sure"
    monkeypatch.undo()
    assert run_local(folders).adopted


def test_a_full_disk_is_no_space_and_leaves_nothing(folders):
    """RLIMIT_FSIZE stands in for a small disk: it works for every user on every machine."""
    source, target = folders
    source.behind.put("a/f", pattern(3 * MIB))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
        with pytest.raises(NoSpace) as told:
            run_local(folders)
        assert (told.value.side, told.value.endpoint) == ("target", "TARGET")
        assert told.value.hint

    in_child(limited)
    assert target.behind.get("b/g") is None
    assert not target.parts()


async def test_a_full_memory_is_no_space_and_leaves_nothing(make_place):
    source, target = make_place("posix", "SOURCE"), make_place("memory", "TARGET")
    source.behind.put("a/f", pattern(3 * MIB))
    target.behind.total_bytes = 2 * MIB
    with pytest.raises(NoSpace) as told:
        await run((source, target))
    assert told.value.side == "target"
    assert not target.behind.paths()


@pytest.mark.parametrize("closed", [PARTS, "."])
def test_a_target_we_may_not_write_to_is_forbidden(closed):
    def as_user(folder):
        source, target = folder_storage(folder / "s", "SOURCE"), folder_storage(folder / "t", "TARGET")
        (folder / "s" / "f").write_bytes(b"x")
        (folder / "t" / closed).chmod(0o555)
        with pytest.raises(Forbidden) as told:
            copy_local(source, "f", target, "f", tag="t1")
        assert (told.value.side, told.value.endpoint) == ("target", "TARGET")
        assert not (folder / "t" / "f").exists()
        assert not list((folder / "t" / PARTS).iterdir())

    as_nobody(as_user)


@pytest.mark.parametrize("at", ["piece", "after_write", "after_verify"])
def test_a_target_that_vanishes_on_the_way_is_unreachable(folders, at):
    source, target = folders
    source.behind.put("a/f", pattern(2 * MIB))
    gone = []

    def vanish(point, piece):
        if point == at and not gone:
            gone.append(True)
            target.behind.vanish()

    with faultpoints.handling(vanish), pytest.raises(Unreachable) as told:
        run_local(folders)
    assert told.value.side == "target"
    assert not target.behind.paths(), "nothing was written to the mount point beneath"
    target.behind.return_()
    assert target.behind.get("b/g") is None
    run_local(folders)
    assert target.storage.tree.collect_parts(0) == 1


@pytest.mark.parametrize("which", [0, 1])
async def test_an_end_that_is_not_there_is_unreachable_and_blamed(places, which):
    places[0].behind.put("a/f", b"x")
    places[which].behind.vanish()
    with pytest.raises(Unreachable) as told:
        await run(places)
    assert told.value.side == ("source", "target")[which]
    places[which].behind.return_()


def test_a_temporary_collected_beneath_us_is_transient(folders):
    source, target = folders
    source.behind.put("a/f", b"x")

    def collect(point, piece):
        if point == "after_verify":
            target.storage.tree.collect_parts(0)

    with faultpoints.handling(collect), pytest.raises(Transient) as told:
        run_local(folders)
    assert told.value.side == "target"
    assert target.behind.get("b/g") is None


# ── something is there already ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("known", [True, False])
async def test_the_same_bytes_are_adopted_not_written(places, known):
    source, target = places
    content = pattern(MIB + 1)
    source.behind.put("a/f", content)
    target.behind.put("b/g", content)
    wrote = []
    with faultpoints.handling(lambda point, piece: wrote.append(point)):
        copied = await run(places, expected_of(content) if known else None)
    assert copied.adopted
    assert copied.checksums == expected_of(content).checksums
    assert copied.verified_by == "read back"
    assert not wrote


async def test_what_is_there_is_adopted_even_if_the_source_is_gone(places):
    places[1].behind.put("b/g", b"bytes")
    assert (await run(places, expected_of(b"bytes"))).adopted


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("wrong", [b"", b"bytez", b"longer than it should be"])
async def test_other_bytes_are_moved_to_quarantine_and_never_lost(places, wrong, known):
    source, target = places
    source.behind.put("a/f", b"bytes")
    target.behind.put("b/g", wrong)
    copied = await run(places, expected_of(b"bytes") if known else None)
    assert not copied.adopted
    assert target.behind.get("b/g") == b"bytes"
    assert target.quarantined() == [wrong]


async def test_adopt_answers_three_ways(places):
    _, target = places
    expected = expected_of(b"bytes")
    assert await adopt(target.storage, "f", expected) is None
    target.behind.put("f", b"bytes")
    assert (await adopt(target.storage, "f", expected)).adopted
    target.behind.flip("f", 2)
    assert await adopt(target.storage, "f", expected) is None
    assert target.behind.get("f") is None
    assert len(target.quarantined()) == 1


async def test_a_size_alone_adopts_nothing(places):
    places[1].behind.put("f", b"bytes")
    with pytest.raises(Invalid):
        await adopt(places[1].storage, "f", Expected(5, Checksums()))
    places[0].behind.put("a/f", b"bytes")
    places[1].behind.put("b/g", b"BYTES")
    await run(places, Expected(5, Checksums()))
    assert places[1].behind.get("b/g") == b"bytes"
    assert places[1].quarantined() == [b"BYTES"]


async def test_a_file_is_never_copied_onto_itself(places):
    """Its "wrong target" would be quarantined, and with it the source."""
    source, _ = places
    source.behind.put("a/f", b"bytes")
    for expected in (None, expected_of(b"other")):
        with pytest.raises(Invalid, match="same file"):
            await copy_file(source.storage, "a/f", source.storage, "a/f", tag="t1", expected=expected)
    assert source.behind.get("a/f") == b"bytes"


def test_two_endpoints_on_one_disk_do_not_copy_a_file_onto_itself(folders, tmp_path):
    source, _ = folders
    source.behind.put("a/f", b"bytes")
    (tmp_path / "alias").symlink_to(source.behind.root)
    with pytest.raises(Invalid, match="same file"):
        copy_local(
            source.storage, "a/f", PosixStorage(tmp_path / "alias"), "a/f", tag="t1", expected=expected_of(b"other")
        )
    assert source.behind.get("a/f") == b"bytes"


@pytest.mark.parametrize("theirs", [b"bytes", b"other"])
async def test_a_file_that_appears_just_before_we_publish(places, theirs):
    source, target = places
    source.behind.put("a/f", b"bytes")
    asked = []

    def appear():
        if not asked:
            target.behind.put("b/g", theirs)
        asked.append(True)

    copied = await run(places, expected_of(b"bytes"), before_publish=appear)
    assert copied.adopted is (theirs == b"bytes")
    assert target.behind.get("b/g") == b"bytes"
    assert target.quarantined() == ([] if theirs == b"bytes" else [theirs])
    assert not target.parts()
    assert len(asked) == (1 if theirs == b"bytes" else 3), "the lease is asked for before each try and each removal"


async def test_somebody_who_keeps_putting_files_there_is_told_of(places):
    source, target = places
    source.behind.put("a/f", b"bytes")
    with pytest.raises(TargetExists) as told:
        await run(places, expected_of(b"bytes"), before_publish=lambda: target.behind.put("b/g", b"other"))
    assert told.value.side == "target"
    assert not target.parts()


# ── leases, stopping, cancelling ─────────────────────────────────────────────────────────────────────────────────────


class LeaseLost(Exception):
    pass


async def test_without_a_lease_nothing_is_published(places):
    source, target = places
    source.behind.put("a/f", b"bytes")

    def ask():
        raise LeaseLost

    with pytest.raises(LeaseLost):
        await run(places, before_publish=ask)
    assert target.behind.get("b/g") is None
    assert not target.parts()


@pytest.mark.parametrize("at", ["piece", "after_write", "after_verify"])
@pytest.mark.parametrize("window", [MIB, 32 * MIB])
async def test_a_stopped_copy_leaves_nothing(places, monkeypatch, at, window):
    monkeypatch.setattr(copying, "WINDOW_BYTES", window)
    source, target = places
    source.behind.put("a/f", pattern(4 * MIB))
    control = Control()

    def stop(point, piece):
        if point == at:
            control.stop()

    with faultpoints.handling(stop), pytest.raises(Stopped):
        await run(places, control=control)
    assert target.behind.get("b/g") is None
    assert not target.parts()
    if at == "piece":
        assert control.bytes_done <= 2 * MIB, "it ends at the next piece"


async def test_a_copy_stopped_before_it_began_does_nothing(places):
    places[0].behind.put("a/f", b"x")
    control = Control()
    control.stop()
    with pytest.raises(Stopped):
        await run(places, control=control)
    assert not [p for p in places[1].behind.paths() if "endpoint" not in p]


async def test_a_cancelled_copy_leaves_nothing(places):
    source, target = places
    source.behind.put("a/f", pattern(4 * MIB))
    reached, go_on = threading.Event(), threading.Event()
    asynchronous = not (isinstance(source.storage, PosixStorage) and isinstance(target.storage, PosixStorage))

    def wait(point, piece):
        if not reached.is_set():
            reached.set()
            if asynchronous:
                task.cancel()
            else:
                go_on.wait(5)

    before = open_descriptors()
    with faultpoints.handling(wait):
        task = asyncio.create_task(run(places))
        await asyncio.to_thread(reached.wait, 5)
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert target.behind.get("b/g") is None
    assert not target.parts()
    assert open_descriptors() <= before + 1  # the event loop's own


async def test_other_work_goes_on_while_a_copy_runs(folders):
    folders[0].behind.put("a/f", pattern(2 * MIB))
    go_on = threading.Event()
    with faultpoints.handling(lambda point, piece: go_on.wait(5) and None):
        task = asyncio.create_task(run(folders))
        for _ in range(10):
            await folders[0].storage.stat("a/f")
        assert not task.done()
        go_on.set()
        await task


# ── killed, raced, watched ───────────────────────────────────────────────────────────────────────────────────────────

COPIER = """
import sys
from replica.storage.copy import copy_local
from replica.storage.posix import PosixStorage
source, target = sys.argv[1:]
print("began", flush=True)
copy_local(PosixStorage(source), "a/f", PosixStorage(target), "b/g", tag="t1.e1")
"""
PROJECT = Path(__file__).parents[3]


def start_copier(folders, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", COPIER, *(str(p.behind.root) for p in folders)],
        cwd=PROJECT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("point", ["piece=kill@3", "after_write=kill", "after_verify=kill", "after_publish=kill"])
def test_killed_at_any_point_and_run_again_it_ends_right(folders, point):
    source, target = folders
    content = pattern(5 * MIB + 3)
    source.behind.put("a/f", content)
    copier = start_copier(folders, REPLICA_FAULT_POINTS=point)
    _, story = copier.communicate(timeout=30)
    assert copier.returncode == -signal.SIGKILL, story
    published = point.startswith("after_publish")
    assert target.behind.get("b/g") == (content if published else None)
    assert len(target.parts()) == (0 if published else 1)
    assert run_local(folders, expected_of(content)).adopted is published
    assert target.behind.get("b/g") == content
    assert target.storage.tree.collect_parts(3600) == 0
    assert target.storage.tree.collect_parts(0) == (0 if published else 1)


def test_killed_at_any_moment_the_name_holds_all_or_nothing(folders):
    source, target = folders
    content = pattern(32 * MIB)
    source.behind.put("a/f", content)
    digest = hashlib.sha1(content).digest()
    for number in range(4):
        copier = start_copier(folders)
        copier.stdout.readline()
        time.sleep(0.02 * number)
        copier.kill()
        copier.communicate(timeout=30)
        there = target.behind.get("b/g")
        assert there is None or hashlib.sha1(there).digest() == digest
        (target.behind.root / "b/g").unlink(missing_ok=True)
    run_local(folders, expected_of(content))
    assert target.behind.get("b/g") == content


def test_a_reader_never_sees_a_part_of_a_file(folders):
    source, target = folders
    content = pattern(300_000)
    source.behind.put("a/f", content)
    file = target.behind.root / "b/g"
    ended, seen, looks = threading.Event(), set(), []

    def watch():
        while not ended.is_set():
            try:
                seen.add(file.read_bytes() == content)
                looks.append(1)
            except FileNotFoundError:
                looks.append(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(60):
        if number % 3 == 2:
            target.behind.put("other", b"wrong")
            os.rename(target.behind.root / "other", file)
            seen.discard(False)
            target.storage.tree.quarantine("b/g")
        run_local(folders, expected_of(content))
        target.storage.tree.delete("b/g")
    ended.set()
    watcher.join()
    assert sum(looks) > 0, "the watcher never met the file; it proved nothing"
    assert seen - {False} == {True}


@pytest.mark.parametrize("same", [True, False])
def test_two_copies_racing_to_one_name_both_end_right(folders, same):
    source, target = folders
    content = pattern(400_000)
    for round_ in range(10):
        source.behind.put("a/f", content)
        at_once = threading.Barrier(2)
        outcomes = []

        def one(at_once=at_once, outcomes=outcomes, round_=round_):
            outcomes.append(
                copy_local(
                    source.storage,
                    "a/f",
                    target.storage,
                    f"b/{round_}",
                    tag="t1.e1" if same else f"t{threading.get_ident()}",
                    expected=expected_of(content),
                    before_publish=at_once.wait,
                )
            )

        racers = [threading.Thread(target=one) for _ in range(2)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(10)
        assert sorted(o.adopted for o in outcomes) == [False, True], "one wins, the other adopts"
        assert target.behind.get(f"b/{round_}") == content
        assert not target.parts()
        assert not target.quarantined()


# ── many small files ─────────────────────────────────────────────────────────────────────────────────────────────────


def orders_for(folders, files, **more):
    source, target = folders
    for path, content in files.items():
        source.behind.put(path, content)
    return [
        LocalCopy(source.storage, path, target.storage, f"to/{path}", "t1.e1", expected_of(content), **more)
        for path, content in files.items()
    ]


def test_a_batch_gives_each_file_its_own_outcome_in_order(folders, monkeypatch):
    monkeypatch.setattr(copying, "WINDOW_BYTES", MIB)
    monkeypatch.setattr(copying, "GROUP_FILES", 7)
    source, target = folders
    files = {f"{n % 3}/{n}": pattern(1000 + n) for n in range(20)} | {"large": pattern(3 * MIB), "empty": b""}
    orders = orders_for(folders, files)
    source.behind.remove("0/3")
    source.behind.flip("1/4", 10)
    target.behind.put("to/2/5", files["2/5"])
    target.behind.put("to/0/6", b"wrong")
    before = open_descriptors()
    outcomes = copy_local_batch(orders)
    assert open_descriptors() == before
    for order, outcome in zip(orders, outcomes, strict=True):
        path = order.source_path
        if path == "0/3":
            assert isinstance(outcome, SourceMissing)
        elif path == "1/4":
            assert isinstance(outcome, ChecksumDiffers)
            assert outcome.side == "source"
        else:
            assert isinstance(outcome, Copied), outcome
            assert outcome.adopted is (path == "2/5")
            assert target.behind.get(f"to/{path}") == files[path]
    assert target.behind.get("to/0/3") is target.behind.get("to/1/4") is None
    assert target.quarantined() == [b"wrong"]
    assert not target.parts()


def test_a_batch_reports_nothing_before_it_is_durable_and_syncs_each_folder_once(folders, monkeypatch):
    """On a file system of which it is not known that one wait does for all."""
    monkeypatch.setattr(copying, "everything_durable", lambda *_: False)
    orders = orders_for(folders, {f"{n % 2}/{n}": b"x" * n for n in range(1, 30)})
    for folder in ("to/0", "to/1"):
        (folders[1].behind.root / folder).mkdir(parents=True)
    really, files, synced = os.fsync, set(), []

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            assert len(files) == len(orders), "a folder is synced when all its files are"
            synced.append(os.path.basename(path))
        else:
            files.add(path)
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert all(isinstance(o, Copied) for o in copy_local_batch(orders))
    assert sorted(synced) == ["0", "1"]


def test_a_batch_waits_once_for_its_bytes_before_the_names_and_once_for_the_names(folders, monkeypatch):
    orders = orders_for(folders, {f"{n % 2}/{n}": b"x" * n for n in range(1, 30)})
    story, rename = [], folders[1].storage.tree.rename
    monkeypatch.setattr(copying, "everything_durable", lambda descriptor, files: story.append(files) or True)
    monkeypatch.setattr(folders[1].storage.tree, "rename", lambda *a: (story.append("name"), rename(*a))[1])
    assert all(isinstance(o, Copied) for o in copy_local_batch(orders))
    assert story == [29, *["name"] * 29, 29]


def test_a_file_whose_bytes_did_not_reach_the_disk_fails_alone_in_a_batch(folders, monkeypatch):
    orders = orders_for(folders, {str(n): b"x" * n for n in range(1, 30)})
    monkeypatch.setattr(copying, "everything_durable", lambda *_: True)
    failed = []

    def told_once(descriptor):
        if os.fstat(descriptor).st_size == 7:
            failed.append(descriptor)
            raise OSError(errno.EIO, "")

    monkeypatch.setattr(copying, "raise_failure", told_once)
    outcomes = copy_local_batch(orders)
    assert [n for n, outcome in enumerate(outcomes, 1) if isinstance(outcome, Exception)] == [7]
    assert len(failed) == 1
    assert not folders[1].parts()


def test_a_folder_that_cannot_be_synced_fails_all_its_files_and_no_others(folders, monkeypatch):
    monkeypatch.setattr(copying, "everything_durable", lambda *_: False)
    orders = orders_for(folders, {f"{n % 2}/{n}": b"x" * n for n in range(1, 9)})
    for folder in ("to/0", "to/1"):
        (folders[1].behind.root / folder).mkdir(parents=True)
    really = os.fsync

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/to/1"):
            raise OSError(errno.EIO, "")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    outcomes = copy_local_batch(orders)
    for order, outcome in zip(orders, outcomes, strict=True):
        assert isinstance(outcome, Transient if order.source_path.startswith("1") else Copied)
    monkeypatch.undo()
    assert all(o.adopted for o in copy_local_batch(orders))


def test_a_batch_that_is_stopped_leaves_no_temporaries(folders):
    control = Control()
    orders = orders_for(folders, {f"{n}": pattern(1000) for n in range(50)}, control=control)
    reached = []

    def stop(point, piece):
        reached.append(point)
        if len(reached) == 30:
            control.stop()

    with faultpoints.handling(stop):
        outcomes = copy_local_batch(orders)
    assert all(isinstance(o, Stopped) for o in outcomes)
    assert not folders[1].parts()
    assert copy_local_batch([]) == []


def test_two_batches_racing_to_the_same_names_both_end_right(folders):
    files = {f"{n}": pattern(5000 + n) for n in range(60)}
    orders = orders_for(folders, files)
    results = []
    racers = [threading.Thread(target=lambda: results.append(copy_local_batch(orders))) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert all(isinstance(o, Copied) for outcomes in results for o in outcomes)
    assert [sum(not outcomes[n].adopted for outcomes in results) for n in range(60)] == [1] * 60
    assert not folders[1].parts()
    assert not folders[1].quarantined()


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_measuring_tells_size_and_checksums_where_the_bytes_lie(places):
    for place in places:
        place.behind.put("a/f", pattern(2 * MIB + 1))
        assert await measure(place.storage, "a/f") == (2 * MIB + 1, expected_of(pattern(2 * MIB + 1)).checksums)
        with pytest.raises(SourceMissing):
            await measure(place.storage, "no/such")


@pytest.mark.parametrize("how", ["grows", "is replaced", "is deleted"])
def test_measuring_a_file_that_changes_is_refused(folders, monkeypatch, how):
    source, _ = folders
    source.behind.put("a/f", pattern(MIB))
    file = source.behind.root / "a/f"
    really = Hasher.update

    def update(self, piece):
        really(self, piece)
        if how == "grows":
            with file.open("ab") as opened:
                opened.write(b"more")
        elif how == "is replaced":
            source.behind.put("a/new", pattern(MIB))
            os.replace(source.behind.root / "a/new", file)
        else:
            file.unlink(missing_ok=True)

    monkeypatch.setattr(Hasher, "update", update)
    with pytest.raises(SourceChanged):
        measure_local(source.storage, "a/f")


def test_measuring_can_be_stopped(folders):
    folders[0].behind.put("a/f", pattern(MIB))
    control = Control()
    control.stop()
    with pytest.raises(Stopped):
        measure_local(folders[0].storage, "a/f", control=control)


# ── fault points ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["", "nowhere=kill", "piece", "piece=burn", "after_write=flip", "piece=flip@x"])
def test_a_fault_point_that_cannot_be_read_is_refused(text):
    with pytest.raises(Invalid):
        faultpoints.from_text(text)


def test_no_fault_point_is_set_outside_of_a_test():
    assert not faultpoints.armed()
    view = memoryview(b"x")
    assert faultpoints.through(view) is view


def test_every_failure_of_a_copy_is_a_storage_error_with_its_place(folders):
    """What the mover relies on: endpoint, path and side are always there."""
    with pytest.raises(StorageError) as told:
        run_local(folders)
    assert all((told.value.endpoint, told.value.path, told.value.message))


def swapped_after_the_look(target, monkeypatch, content):
    """Right after the file in the way was looked at, somebody else puts `content` under its name."""
    look = target.storage.tree.stat

    def stat(path):
        found = look(path)
        if path == "b/g" and not done:
            done.append(path)
            os.unlink(target.behind.root / "b/g")
            target.behind.put("b/g", content)
        return found

    done: list[str] = []
    monkeypatch.setattr(target.storage.tree, "stat", stat)


def test_only_the_file_that_was_found_wrong_is_moved_away(folders, monkeypatch):
    source, target = folders
    content = pattern(9_000)
    source.behind.put("a/f", content)
    target.behind.put("b/g", b"half of it")
    swapped_after_the_look(target, monkeypatch, content)
    copied = run_local(folders, expected_of(content))
    assert copied.adopted
    assert target.behind.get("b/g") == content
    assert target.quarantined() == []


def test_a_copy_that_lost_its_lease_moves_nothing_away(folders):
    source, target = folders
    source.behind.put("a/f", pattern(9_000))
    target.behind.put("b/g", b"half of it")

    def lost():
        raise Stopped("the lease is gone")

    with pytest.raises(Stopped):
        run_local(folders, expected_of(pattern(9_000)), before_publish=lost)
    assert target.behind.get("b/g") == b"half of it"
    assert target.quarantined() == []
