"""A damaged file is healed by its damaged chunks, and is never written to."""

from __future__ import annotations

import os

import pytest

from replica.storage import chunks, faultpoints
from replica.storage.base import QUARANTINE
from replica.storage.chunks import Lineage
from replica.storage.conformance import pattern
from replica.storage.copy import Source
from replica.storage.hashing import Hasher
from replica.storage.repair import repair
from rules.errors import ChecksumDiffers, Invalid, SourceMissing
from tests.replica.storage.test_chunked import CHUNK, CHUNKS, CONTENT, EXPECTED, SIZE, expected_of, make, small_chunks

__all__ = ["make", "small_chunks"]  # fixtures
MIB = 1 << 20


@pytest.fixture(params=["posix to posix", "posix to memory", "memory to posix", "memory to memory"])
def places(request, make):
    a, _, b = request.param.split()
    source, target = make(a, "SOURCE"), make(b, "TARGET")
    source.source()
    target.behind.put("b/g", CONTENT)
    return source, target


async def heal(sources, target, expected=EXPECTED, **more):
    sources = [Source(s.storage, "a/f") for s in (sources if isinstance(sources, list) else [sources])]
    return await repair(target.storage, "b/g", sources, lineage=Lineage("heal-17"), expected=expected, **more)


def quarantined(target):
    return [target.behind.get(p) for p in target.behind.paths() if p.startswith(QUARANTINE)]


def manifest_of(content):
    found = {}
    for number in range(-(-len(content) // CHUNK)):
        hasher = Hasher()
        hasher.update(content[number * CHUNK : (number + 1) * CHUNK])
        found[number] = hasher.checksums().get("xxh3_128")
    return found


@pytest.mark.parametrize("known", [True, False], ids=["by a manifest", "by the source"])
async def test_a_flipped_bit_costs_one_chunk(places, known):
    source, target = places
    target.behind.flip("b/g", 7 * CHUNK + 1)
    damaged = target.behind.get("b/g")
    healed = await heal(source, target, manifest=manifest_of(CONTENT) if known else None)
    assert target.behind.get("b/g") == CONTENT
    assert (healed.damaged, healed.copied.moved_bytes, healed.copied.adopted) == ((7,), CHUNK, False)
    assert healed.copied.checksums == EXPECTED.checksums
    assert quarantined(target) == [damaged]
    assert not target.parts()


async def test_a_flipped_bit_in_a_file_of_64_mib_costs_at_most_two_chunks(make, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", MIB)
    source, target = make("posix", "SOURCE"), make("posix", "TARGET")
    content = pattern(64 * MIB)
    source.source(content)
    target.behind.put("b/g", content)
    target.behind.flip("b/g", 40 * MIB)
    healed = await heal(source, target, expected_of(content))
    assert healed.copied.moved_bytes <= 2 * healed.chunk_bytes == 2 * MIB
    assert target.behind.get("b/g") == content


async def test_what_is_whole_is_left_alone(places):
    source, target = places
    healed = await heal(source, target)
    assert healed.copied.adopted
    assert (healed.damaged, healed.copied.moved_bytes, quarantined(target)) == ((), 0, [])


@pytest.mark.parametrize("length", [0, 5 * CHUNK + 3, SIZE + 99])
async def test_a_file_of_another_length_is_healed(places, length):
    source, target = places
    target.behind.put("b/g", (CONTENT + bytes(99))[:length])
    healed = await heal(source, target)
    assert target.behind.get("b/g") == CONTENT
    assert healed.copied.moved_bytes == max(0, SIZE - length // CHUNK * CHUNK if length < SIZE else 0)


async def test_a_file_that_is_gone_is_copied(places):
    source, target = places
    target.behind.remove("b/g")
    assert (await heal(source, target)).copied.moved_bytes == SIZE
    assert target.behind.get("b/g") == CONTENT


async def test_a_source_that_is_damaged_elsewhere_does_not_harm(make):
    bad, good, target = make("memory", "BAD"), make("memory", "GOOD"), make("posix", "TARGET")
    for place in (bad, good):
        place.source()
    bad.behind.flip("a/f", 3 * CHUNK)
    target.behind.put("b/g", CONTENT)
    target.behind.flip("b/g", 9 * CHUNK)
    healed = await heal([bad, good], target)
    assert target.behind.get("b/g") == CONTENT
    assert healed.damaged == (9,)
    assert healed.copied.moved_bytes == CHUNK


async def test_without_a_good_source_the_damaged_file_stays_as_it_is(places):
    source, target = places
    target.behind.flip("b/g", 9 * CHUNK)
    source.behind.flip("a/f", 3 * CHUNK)
    damaged = target.behind.get("b/g")
    with pytest.raises(ChecksumDiffers) as told:
        await heal(source, target)
    assert told.value.side == "source"
    source.behind.remove("a/f")
    with pytest.raises(SourceMissing):
        await heal(source, target)
    assert target.behind.get("b/g") == damaged
    assert quarantined(target) == []
    assert not target.parts()


async def test_the_damaged_file_keeps_its_name_and_bytes_until_the_new_one_is_proven(make):
    source, target = make("posix", "SOURCE"), make("posix", "TARGET")
    source.source()
    target.behind.put("b/g", CONTENT)
    target.behind.flip("b/g", 9 * CHUNK)
    damaged, inode = target.behind.get("b/g"), os.stat(target.behind.root / "b/g").st_ino
    seen = []

    def look(point, piece):
        assert target.behind.get("b/g") == damaged or point == "after_publish"
        seen.append(point)

    with faultpoints.handling(look):
        await heal(source, target)
    assert "after_verify" in seen
    (away,) = [p for p in target.behind.paths() if p.startswith(QUARANTINE)]
    assert os.stat(target.behind.root / away).st_ino == inode
    assert target.behind.get(away) == damaged


async def test_without_a_lease_nothing_is_moved_away(places):
    source, target = places
    target.behind.flip("b/g", 9 * CHUNK)
    damaged = target.behind.get("b/g")

    class LeaseLost(Exception):
        pass

    def ask():
        raise LeaseLost

    with pytest.raises(LeaseLost):
        await heal(source, target, before_publish=ask)
    assert target.behind.get("b/g") == damaged
    assert quarantined(target) == []
    assert (await heal(source, target)).copied.moved_bytes == 0, "the next attempt goes on"


async def test_a_file_never_heals_itself(places):
    _, target = places
    target.behind.flip("b/g", 1)
    with pytest.raises(Invalid, match="same file"):
        await repair(target.storage, "b/g", [Source(target.storage, "b/g")], lineage=Lineage("1"), expected=EXPECTED)


async def test_a_weak_checksum_decides_nothing_so_the_whole_is_copied(places):
    source, target = places
    target.behind.flip("b/g", 9 * CHUNK)
    healed = await heal(source, target, expected_of(CONTENT, "adler32"))
    assert target.behind.get("b/g") == CONTENT
    assert len(healed.damaged) == CHUNKS


async def test_what_is_copied_as_a_whole_is_asked_of_the_next_source_too(make):
    bad, good, target = make("memory", "BAD"), make("posix", "GOOD"), make("posix", "TARGET")
    bad.source(CONTENT[:-1] + b"?")
    good.source()
    target.behind.put("b/g", b"?" * SIZE)
    blamed = []
    weak = expected_of(CONTENT, "adler32")
    healed = await heal([bad, good], target, weak, on_failure=lambda source, error: blamed.append(source))
    assert target.behind.get("b/g") == CONTENT
    assert healed.copied.source == "GOOD"
    assert [source.storage.name for source in blamed] == ["BAD"]
