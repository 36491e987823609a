"""Large files, chunk by chunk: what is gone on with, what is never believed, and who is not let in."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from replica.storage import chunked, chunks, faultpoints, memory, unfinished
from replica.storage.base import PARTS, QUARANTINE, part_path
from replica.storage.chunks import Chunk, Layout, Lineage, map_of
from replica.storage.conformance import pattern
from replica.storage.copy import Control, Expected, Source, Stopped, copy_chunked, copy_file
from replica.storage.hashing import Hasher
from rules.checksums import Checksums
from rules.errors import ChecksumDiffers, Invalid, NoSpace, SourceChanged, SourceMissing, Transient, Unreachable
from tests.replica.storage.places import BehindFolder, folder_storage, open_descriptors

MIB = 1 << 20
CHUNK = 64 << 10
CHUNKS = 40
SIZE = CHUNK * (CHUNKS - 1) + 777
CONTENT = pattern(SIZE)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(chunks, "RESUME_BYTES", 2 * CHUNK)
    monkeypatch.setattr(chunked, "WINDOW_BYTES", 4 * CHUNK)
    monkeypatch.setattr(chunked, "LEAD_BYTES", 16 * CHUNK)
    monkeypatch.setattr(chunked, "RUN_BYTES", 8 * CHUNK)
    monkeypatch.setattr(chunked, "SHARED_RUN_BYTES", 4 * CHUNK)


def expected_of(content: bytes, *algorithms: str) -> Expected:
    hasher = Hasher(algorithms)
    hasher.update(content)
    known = hasher.checksums().as_dict()
    return Expected(len(content), Checksums.of({a: known[a] for a in algorithms or known}))


EXPECTED = expected_of(CONTENT)


class Place:
    def __init__(self, storage, behind):
        self.storage = storage
        self.behind = behind

    def parts(self):
        return sorted(p for p in self.behind.paths() if p.startswith(PARTS))

    def source(self, content=CONTENT):
        if content is not None:
            self.behind.put("a/f", content)
        return Source(self.storage, "a/f")


@pytest.fixture
def make(tmp_path):
    stores = []

    def one(kind, name):
        if kind == "posix":
            return Place(folder_storage(tmp_path / name, name), BehindFolder(tmp_path / name))
        storage = memory.MemoryStorage(uuid.uuid4().hex, name=name)
        stores.append(storage.store)
        memory.behind(storage.store).prepared = True
        return Place(storage, memory.behind(storage.store))

    yield one
    for store in stores:
        memory.forget(store)


@pytest.fixture(params=["posix to posix", "posix to memory", "memory to posix", "memory to memory"])
def places(request, make):
    a, _, b = request.param.split()
    return make(a, "SOURCE"), make(b, "TARGET")


@pytest.fixture
def folders(make):
    return make("posix", "SOURCE"), make("posix", "TARGET")


async def carry(sources, target, epoch=1, expected=EXPECTED, **more):
    sources = sources if isinstance(sources, list) else [sources]
    return await copy_chunked(sources, target.storage, "b/g", lineage=Lineage("17", epoch), expected=expected, **more)


class Cut(Exception):
    """The attempt ends here, as if its lease were lost."""


def cut_after(number):
    """A handler that ends the attempt when so many chunks are noted."""
    seen = []

    def handler(point, piece):
        if point == "chunk":
            seen.append(point)
            if len(seen) == number:
                raise Cut
        return None

    return faultpoints.handling(handler)


async def interrupted(sources, target, after, epoch=1, **more):
    with cut_after(after), pytest.raises(Cut):
        await carry(sources, target, epoch, **more)


# ── the map ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_map_that_was_torn_anywhere_tells_only_what_is_whole():
    layout = Layout(SIZE, CHUNK)
    told = {n: Chunk(f"{n:032x}", n * 7, "0" * 16) for n in range(CHUNKS)}
    text = chunks.head(layout, "here") + chunks.lines(told)
    assert chunks.parse(text, layout) == ("here", told)
    dice = random.Random(4)
    for _ in range(300):
        torn = bytearray(text[: dice.randrange(len(text))])
        if torn and dice.random() < 0.5:
            torn[dice.randrange(len(torn))] ^= 1 << dice.randrange(8)
        machine, found = chunks.parse(bytes(torn), layout)
        assert found.items() <= told.items()
        assert machine in ("here", "")
    assert chunks.parse(text, Layout(SIZE + 1, CHUNK)) == ("", {})
    assert chunks.parse(text, Layout(SIZE, CHUNK * 2)) == ("", {})


def test_a_lineage_takes_its_own_and_older_attempts_only():
    mine = Lineage("17", 3)
    assert mine.may_take(mine.new_part())
    assert mine.may_take(Lineage("17", 2).new_part())
    assert not mine.may_take(Lineage("17", 4).new_part())
    assert not mine.may_take(Lineage("171", 1).new_part())
    assert not mine.may_take(Lineage("1", 1).new_part())
    assert not mine.may_take(map_of(mine.new_part()))


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_it_is_a_copy(places):
    source, target = places
    before = open_descriptors()
    copied = await carry(source.source(), target)
    assert target.behind.get("b/g") == CONTENT
    assert (copied.checksums, copied.moved_bytes, copied.source) == (EXPECTED.checksums, SIZE, "SOURCE")
    assert not target.parts()
    assert open_descriptors() <= before + 3  # the event loop's own
    assert (await carry(source.source(), target)).adopted


async def test_an_interrupted_copy_goes_on_by_another_worker(places):
    source, target = places
    await interrupted(source.source(), target, 11)
    assert len(target.parts()) == 2
    control = Control()
    copied = await carry(source.source(None), target, epoch=2, control=control)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes <= SIZE - 10 * CHUNK
    assert control.bytes_done == SIZE
    assert copied.checksums == EXPECTED.checksums
    assert not target.parts()


async def test_it_goes_on_from_another_source_when_one_fails(make):
    one, two, target = make("memory", "ONE"), make("posix", "TWO"), make("posix", "TARGET")
    sources, failed = [one.source(), two.source()], []

    def vanish(point, piece):
        if point == "chunk":
            one.behind.vanish()

    with faultpoints.handling(vanish):
        copied = await carry(sources, target, on_failure=lambda source, error: failed.append((source, error)))
    assert target.behind.get("b/g") == CONTENT
    assert [source for source, _ in failed] == sources[:1]
    assert copied.moved_bytes <= SIZE
    assert copied.source == "TWO"


async def test_without_lineage_or_strong_checksum_nothing_is_left_behind(folders):
    source, target = folders
    source.source()
    for more in ({}, {"lineage": Lineage("17"), "expected": expected_of(CONTENT, "adler32")}):

        def stop(point, piece):
            raise Cut

        with faultpoints.handling(stop), pytest.raises(Cut):
            await copy_file(source.storage, "a/f", target.storage, "b/g", tag="17-1-ab", **more)
        assert not target.parts()
    with cut_after(5), pytest.raises(Cut):
        await copy_file(source.storage, "a/f", target.storage, "b/g", tag="t", expected=EXPECTED, lineage=Lineage("17"))
    assert len(target.parts()) == 2


@pytest.mark.parametrize("algorithm", ["sha256", "md5", "xxh3_128"])
async def test_any_strong_checksum_decides(places, algorithm):
    source, target = places
    expected = expected_of(CONTENT, algorithm)
    await interrupted(source.source(), target, 9, expected=expected)
    copied = await carry(source.source(None), target, 2, expected=expected)
    assert copied.checksums.as_dict().items() >= EXPECTED.checksums.as_dict().items()
    assert copied.checksums.get(algorithm) == expected.checksums.get(algorithm)


@pytest.mark.parametrize("damage", ["flipped", "cut", "map lost", "map torn", "another size"])
async def test_what_was_kept_is_never_believed_unseen(places, damage):
    source, target = places
    await interrupted(source.source(), target, 20)
    part, its_map = target.parts()
    assert its_map == map_of(part)
    if damage == "flipped":
        target.behind.flip(part, 3 * CHUNK + 5)
    elif damage == "cut":
        target.behind.put(part, target.behind.get(part)[: 10 * CHUNK + 3])
    elif damage == "map lost":
        target.behind.remove(its_map)
    elif damage == "map torn":
        target.behind.put(its_map, target.behind.get(its_map)[:-9])
    else:
        target.behind.put(part, target.behind.get(part) + bytes(SIZE))
    if damage == "another size":  # more than the file has: such a thing is never published
        with pytest.raises(ChecksumDiffers) as told:
            await carry(source.source(None), target, 2)
        assert told.value.side == "target"
        assert target.behind.get("b/g") is None
        assert not target.parts()
    copied = await carry(source.source(None), target, 2)
    assert target.behind.get("b/g") == CONTENT
    assert not target.parts()
    moved = {"flipped": 22, "cut": 31, "map torn": 22}.get(damage, CHUNKS)
    assert copied.moved_bytes <= moved * CHUNK


async def test_a_byte_flipped_in_flight_costs_one_chunk(places):
    source, target = places
    with faultpoints.handling(faultpoints.from_text("piece=flip@3")):
        copied = await carry(source.source(), target)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes == SIZE + CHUNK


async def test_a_target_that_keeps_other_bytes_twice_is_given_up(places):
    source, target = places
    flips = []

    def flip(point, piece):
        if point == "piece" and bytes(piece[:16]) == CONTENT[2 * CHUNK : 2 * CHUNK + 16]:
            flips.append(1)
            return b"!" + bytes(piece[1:])
        return None

    with faultpoints.handling(flip), pytest.raises(ChecksumDiffers) as told:
        await carry(source.source(), target)
    assert (told.value.side, len(flips)) == ("target", 2)
    assert target.behind.get("b/g") is None
    assert not target.parts(), "a disk like that gets a new file"


async def test_a_full_target_gets_its_room_back(make):
    source, target = make("memory", "SOURCE"), make("memory", "TARGET")
    target.behind.total_bytes = SIZE - 1
    with pytest.raises(NoSpace) as told:
        await carry(source.source(), target)
    assert told.value.side == "target"
    assert not target.parts()


async def test_a_target_that_vanishes_keeps_what_it_has(folders):
    source, target = folders

    def vanish(point, piece):
        if point == "after_write":
            target.behind.vanish()

    with faultpoints.handling(vanish), pytest.raises(Unreachable) as told:
        await carry(source.source(), target)
    assert told.value.side == "target"
    target.behind.return_()
    copied = await carry(source.source(None), target, 2)
    assert (copied.moved_bytes, target.behind.get("b/g") == CONTENT) == (0, True)


async def test_a_temporary_that_is_not_ours_to_open_is_left_alone(folders):
    source, target = folders
    await interrupted(source.source(), target, 20)
    part, its_map = target.parts()
    content = target.behind.get(part)
    target.behind.remove(part)
    (target.behind.root / part).symlink_to("/etc/hostname")
    assert content
    copied = await carry(source.source(None), target, 2)
    assert copied.moved_bytes == SIZE
    assert target.behind.get("b/g") == CONTENT
    assert target.parts() == [part, its_map]


async def test_cancelled_again_and_again_it_still_waits_for_its_threads(folders):
    """Else a descriptor is closed that a thread still writes to, and its number may be another file's by then."""
    source, target = folders
    reached, go_on, ended = threading.Event(), threading.Event(), []

    def hold(point, piece):
        if point == "piece":
            reached.set()
            go_on.wait(5)
            ended.append(point)

    before = open_descriptors()
    with faultpoints.handling(hold):
        task = asyncio.create_task(carry(source.source(), target))
        await asyncio.to_thread(reached.wait, 5)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended
    assert open_descriptors() <= before + 3


# ── whose bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_source_with_other_bytes_is_to_blame_and_leaves_nothing(places):
    source, target = places
    source.source()
    source.behind.flip("a/f", 5 * CHUNK)
    with pytest.raises(ChecksumDiffers) as told:
        await carry(source.source(None), target)
    assert (told.value.side, told.value.endpoint) == ("source", "SOURCE")
    assert EXPECTED.checksums.get("xxh3_128") in told.value.message
    assert target.behind.get("b/g") is None
    assert not target.parts()


@pytest.mark.parametrize("at_once", [1, 2])
async def test_bytes_of_a_bad_source_are_found_and_only_they_are_moved_again(make, at_once):
    bad, good, target = make("memory", "BAD"), make("memory", "GOOD"), make("posix", "TARGET")
    bad.source()
    for at in range(0, SIZE, 2 * CHUNK):  # every other chunk, so that whatever it gives holds a bad one
        bad.behind.flip("a/f", at)
    failed = []
    copied = await carry(
        [bad.source(None), good.source()],
        target,
        at_once=at_once,
        on_failure=lambda source, error: failed.append((source.storage.name, error.code)),
    )
    assert target.behind.get("b/g") == CONTENT
    assert failed == [("BAD", "checksum_differs")]
    assert copied.moved_bytes <= (2 if at_once == 2 else 1.6) * SIZE


async def test_chunks_of_an_earlier_bad_source_do_not_spoil_the_next_attempt(make):
    bad, good, target = make("posix", "BAD"), make("posix", "GOOD"), make("posix", "TARGET")
    bad.source()
    bad.behind.flip("a/f", 3 * CHUNK)
    await interrupted(bad.source(None), target, 10)
    copied = await carry(good.source(), target, 2)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes <= SIZE - 9 * CHUNK + CHUNK


async def test_a_source_that_changes_while_it_is_read_is_told_so(places):
    source, target = places
    source.source()
    changes = []

    def change(point, piece):
        if point == "chunk" and not changes:
            time.sleep(0.02)
            source.behind.put("a/f", CONTENT[::-1])
            changes.append(1)

    with faultpoints.handling(change), pytest.raises((SourceChanged, ChecksumDiffers)) as told:
        await carry(source.source(None), target)
    assert told.value.side == "source"
    assert target.behind.get("b/g") is None
    source.behind.put("a/f", CONTENT)
    await carry(source.source(None), target, 2)
    assert target.behind.get("b/g") == CONTENT


async def test_of_several_failures_the_one_that_may_pass_is_told(make):
    one, two, target = make("memory", "ONE"), make("memory", "TWO"), make("memory", "TARGET")
    one.behind.vanish()
    with pytest.raises(Unreachable) as told:
        await carry([one.source(None), two.source(None)], target)
    assert (told.value.side, told.value.endpoint) == ("source", "ONE")
    with pytest.raises(SourceMissing):
        await carry([two.source(None)], target)


async def test_a_file_is_never_copied_onto_itself(folders, tmp_path):
    source, _ = folders
    source.source()
    (tmp_path / "alias").symlink_to(source.behind.root)
    for target in (source.storage, folder_storage(tmp_path / "alias", "SOURCE")):
        with pytest.raises(Invalid, match="same file"):
            await copy_chunked(
                [Source(source.storage, "a/f")], target, "a/f", lineage=Lineage("1"), expected=expected_of(b"x" * SIZE)
            )
    assert source.behind.get("a/f") == CONTENT


# ── several at once ──────────────────────────────────────────────────────────────────────────────────────────────────


class Slow(memory.MemoryStorage):
    """Gives what it has, each piece after so long; None: never."""

    seconds: float | None = 0.0
    pieces = 0

    async def read(self, path, offset=0, length=None):
        async for piece in super().read(path, offset, length):
            for begin in range(0, len(piece), CHUNK):
                if self.seconds is None:
                    await asyncio.Event().wait()
                await asyncio.sleep(self.seconds)
                self.pieces += 1
                yield piece[begin : begin + CHUNK]


def slow_place(make, name, seconds):
    place = make("memory", name)
    place.storage = Slow(place.storage.store, name=name)
    place.storage.seconds = seconds
    return place


@pytest.mark.parametrize("kind", ["posix", "memory"])
async def test_several_sources_share_a_file(make, kind):
    one, two, target = slow_place(make, "ONE", 0.002), slow_place(make, "TWO", 0.002), make(kind, "TARGET")
    copied = await carry([one.source(), two.source()], target, at_once=2)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes == SIZE
    assert min(one.storage.pieces, two.storage.pieces) >= CHUNKS // 5


@pytest.mark.parametrize("hanging", [0, 1])
async def test_a_source_that_hangs_loses_its_chunks(make, hanging):
    places = [slow_place(make, "ONE", 0.001), slow_place(make, "TWO", 0.001)]
    places[hanging].storage.seconds = None
    target = make("posix", "TARGET")
    async with asyncio.timeout(20):
        copied = await carry([p.source() for p in places], target, at_once=2)
    assert target.behind.get("b/g") == CONTENT
    assert copied.source == places[1 - hanging].storage.name
    assert copied.moved_bytes == SIZE


async def test_a_stop_ends_a_copy_whose_source_hangs(make):
    source, target, control = slow_place(make, "ONE", None), make("posix", "TARGET"), Control()
    task = asyncio.create_task(carry(source.source(), target, control=control))
    await asyncio.sleep(0.05)
    control.stop()
    async with asyncio.timeout(5):
        with pytest.raises(Stopped):
            await task
    assert not target.parts(), "nothing was written, so nothing is kept"


async def test_a_cancelled_copy_can_be_gone_on_with(places):
    source, target = places
    seen = []

    def cancel(point, piece):
        if point == "chunk":
            seen.append(1)
            if len(seen) == 12:
                loop.call_soon_threadsafe(task.cancel)

    loop = asyncio.get_running_loop()
    with faultpoints.handling(cancel):
        task = asyncio.create_task(carry(source.source(), target))
        with pytest.raises(asyncio.CancelledError):
            await task
    copied = await carry(source.source(None), target, 2)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes <= SIZE - 8 * CHUNK


# ── zombies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_of_many_who_take_over_one_gets_it(places):
    _, target = places
    old = Lineage("17", 1).new_part()
    await target.storage.begin(old, 5)

    async def one(n):
        return await target.storage.take_over(old, part_path(f"17-2-{n}"))

    outcomes = await asyncio.gather(*map(one, range(8)), return_exceptions=True)
    # Not always True: who came too late may have held the lock for a moment, and then it is not known.
    assert sum(isinstance(o, bool) for o in outcomes) == 1
    assert sum(isinstance(o, SourceMissing) for o in outcomes) == 7
    assert len(target.parts()) == 1


async def test_a_zombie_does_not_take_what_its_successor_builds(places):
    source, target = places
    await interrupted(source.source(), target, 10, epoch=2)
    successors = target.parts()
    await interrupted(source.source(None), target, 10, epoch=1)
    assert set(successors) < set(target.parts())
    assert (await carry(source.source(None), target, 3)).moved_bytes < SIZE


async def test_who_was_taken_over_publishes_nothing(places):
    """The old attempt wakes up with everything proven, and asks for its temporary by the old name."""
    source, target = places
    fresh = []

    def overtaken():
        if not fresh:
            successor = threading.Thread(
                target=lambda: fresh.append(asyncio.run(carry(source.source(None), target, 2)))
            )
            successor.start()
            successor.join(20)

    try:
        copied = await carry(source.source(), target, 1, before_publish=overtaken)
    except Transient as error:
        assert error.side == "target", "its temporary went away"
    else:
        assert copied.adopted, "it finds its successor's file"
    assert fresh[0].moved_bytes == 0
    assert target.behind.get("b/g") == CONTENT
    assert not target.parts()


async def test_a_writer_that_may_still_live_is_never_in_the_published_file(folders):
    """A stopped process with the temporary open: its chunks are used, its file is not."""
    source, target = folders
    await interrupted(source.source(), target, 20)
    (part, _) = target.parts()
    zombie = os.open(target.behind.root / part, os.O_RDWR)
    fcntl.flock(zombie, fcntl.LOCK_EX)

    def write_on(point, piece):
        if point == "after_verify":
            os.pwrite(zombie, b"zombie" * 1000, 100)

    try:
        with faultpoints.handling(write_on):
            copied = await carry(source.source(None), target, 2)
        os.pwrite(zombie, b"zombie" * 1000, 100)
    finally:
        os.close(zombie)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes <= SIZE - 19 * CHUNK
    assert not target.parts()


async def test_a_file_of_another_machine_is_never_published_but_used(folders, monkeypatch):
    source, target = folders
    await interrupted(source.source(), target, 20)
    part, its_map = target.parts()
    inode = os.stat(target.behind.root / part).st_ino
    text = target.behind.get(its_map)
    layout = Layout(SIZE, CHUNK)
    target.behind.put(its_map, chunks.head(layout, "elsewhere") + chunks.lines(chunks.parse(text, layout)[1]))
    zombie = os.open(target.behind.root / part, os.O_RDWR)
    try:
        copied = await carry(source.source(None), target, 2)
        os.pwrite(zombie, b"zombie", 100)
    finally:
        os.close(zombie)
    assert os.stat(target.behind.root / "b/g").st_ino != inode
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes <= SIZE - 19 * CHUNK


async def test_what_a_zombie_wrote_before_we_looked_is_found(folders):
    source, target = folders
    await interrupted(source.source(), target, 20)
    (part, _) = target.parts()
    with open(target.behind.root / part, "r+b") as zombie:
        zombie.seek(7 * CHUNK)
        zombie.write(b"late")
    copied = await carry(source.source(None), target, 2)
    assert target.behind.get("b/g") == CONTENT
    assert copied.moved_bytes <= SIZE - 18 * CHUNK


async def test_a_memory_zombie_cannot_write_on(make):
    target = make("memory", "TARGET")
    old, mine = Lineage("17", 1).new_part(), Lineage("17", 2).new_part()
    await target.storage.begin(old, 5)

    async def pieces():
        yield b"ab"
        await target.storage.take_over(old, mine)
        yield b"cd"

    with pytest.raises(Exception, match="went away"):
        await target.storage.write_at(old, 0, pieces())
    assert target.behind.get(mine) == b"ab"


async def test_old_temporaries_are_collected_but_not_one_that_is_gone_on_with(folders):
    source, target = folders
    await interrupted(source.source(), target, 20)
    for part in target.parts():
        os.utime(target.behind.root / part, (1, 1))
    collected = []

    def collect(point, piece):
        if point == "chunk" and not collected:
            collected.append(target.storage.tree.collect_parts(3600))

    with faultpoints.handling(collect):
        copied = await carry(source.source(None), target, 2)
    assert collected == [0]
    assert copied.moved_bytes <= SIZE - 19 * CHUNK


# ── killed ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CARRIER = """
import asyncio, json, sys
from replica.storage import chunked, chunks
from replica.storage.copy import Expected, Lineage, Source, copy_chunked
from replica.storage.posix import PosixStorage
from rules.checksums import Checksums
source, target, size, xxh3, epoch = sys.argv[1:]
chunks.CHUNK_BYTES, chunks.RESUME_BYTES = 256 << 10, 1 << 20
chunked.WINDOW_BYTES, chunked.LEAD_BYTES, chunked.RUN_BYTES = 1 << 20, 4 << 20, 4 << 20
copied = asyncio.run(copy_chunked(
    [Source(PosixStorage(source), "a/f")], PosixStorage(target), "b/g", lineage=Lineage("17", int(epoch)),
    expected=Expected(int(size), Checksums.of({"xxh3_128": xxh3})),
))
print(json.dumps(copied.moved_bytes))
"""
CARRIED_CHUNK = 256 << 10
PROJECT = Path(__file__).parents[3]


def test_killed_ten_times_a_copy_moves_little_more_than_its_bytes(folders):
    source, target = folders
    content = pattern(64 * MIB)
    source.behind.put("a/f", content)
    expected = expected_of(content)
    command = [sys.executable, "-c", CARRIER, str(source.behind.root), str(target.behind.root)]
    command += [str(len(content)), expected.checksums.get("xxh3_128")]
    dice = random.Random(17)
    moved = 0
    for epoch in range(1, 11):
        pieces = dice.randrange(1, 24)  # a chunk is one piece here, and each is moved once it passes the point
        moved += pieces * CARRIED_CHUNK
        at = dice.choice(["piece", "chunk"])
        environment = {**os.environ, "REPLICA_FAULT_POINTS": f"{at}=kill@{pieces}"}
        done = subprocess.run(
            [*command, str(epoch)], cwd=PROJECT, env=environment, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert target.behind.get("b/g") is None
    done = subprocess.run([*command, "11"], cwd=PROJECT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert moved + int(done.stdout) <= 1.1 * len(content)
    assert target.behind.get("b/g") == content
    assert not target.parts()
    assert not [p for p in target.behind.paths() if p.startswith(QUARANTINE)]


def test_a_lock_is_let_go_of_by_death_only(folders):
    """What taking over rests upon."""
    _, target = folders
    part = part_path("17-1-ab")
    os.close(target.storage.tree.create_part(part))
    hold = (
        "import sys, time; from replica.storage import unfinished; from replica.storage.tree import Tree; "
        "d = unfinished.open_part(Tree(sys.argv[1]), sys.argv[2]); print(unfinished.lock(d), flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(target.behind.root), part], cwd=PROJECT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"True\n"
        holder.send_signal(signal.SIGSTOP)
        descriptor = unfinished.open_part(target.storage.tree, part)
        assert not unfinished.lock(descriptor)
    finally:
        holder.kill()
        holder.wait(10)
    assert unfinished.lock(descriptor)
    os.close(descriptor)
