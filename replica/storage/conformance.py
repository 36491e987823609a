"""What every storage adapter must do: a suite to be run against a real server of its kind.

Given     a pytest class that inherits `StorageConformance` and has two fixtures: `storage`, prepared and empty, and
          `behind`, which reads and writes the same place behind the storage's back.
Returns   the usual verdict of tests.
Promises  it needs nothing but the contract; each test begins with an empty storage and states one promise by its name.
Partner   replica.storage.base states the promises; tests/replica/storage/test_conformance.py runs it for our adapters.

    class TestMine(StorageConformance):
        @pytest.fixture
        async def storage(self): ...
        @pytest.fixture
        def behind(self, storage): ...
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import ClassVar, Protocol, TypeVar

from replica.storage.base import PARTS, QUARANTINE, SENTINEL, Entry, Piece, Storage, SupportsResume, part_path
from replica.storage.copy import Expected, adopt, copy_file, measure
from replica.storage.hashing import Hasher
from replica.storage.sentinel import sentinel_of
from rules.checksums import Agreement
from rules.errors import Invalid, ReplicaError, SourceMissing, TargetExists, Transient, Unreachable
from rules.names import shown

E = TypeVar("E", bound=ReplicaError)

#: None of these may reach the storage, whatever the verb.
HOSTILE_PATHS = (
    "",
    "/",
    "/etc/passwd",
    "..",
    "../outside",
    "a/../../outside",
    "a/..",
    "./a",
    "a/./b",
    "a//b",
    "a/",
    "//server/x",
    "a\0b",
    "a/\0",
    "lone\ud800surrogate",
    "/".join(["too", "long"] * 500),
    ".replica",
    ".replica/endpoint",
    ".replica/part",
    ".replica/part/../endpoint",
    ".replica/part/a/b",
    ".replica/quarantine/x",
    ".replicas",
)

#: Names that are odd and yet names: they are kept exactly as given.
ODD_PATHS = (
    "plain",
    "a/b/c/d/e/f/g",
    "...",
    "-rf",
    "~root",
    "a b",
    "a:b",
    "%2e%2e%2f",
    "a%00b",
    "back\\slash",
    "$(id);`id`|&*?[a]{b}",
    "'\"<svg onload=alert(1)>",
    "line\nbreak",
    "ünïcödé/Ελληνικά/日本語",
    "e\u0301 and \u00e9",
    "emoji 👩\u200d🔬",
    "x" * 255,
    "/".join(["deep"] * 100),
)


class Behind(Protocol):
    """The same place, seen without the storage."""

    def put(self, path: str, content: bytes) -> None: ...

    def get(self, path: str) -> bytes | None: ...

    def remove(self, path: str) -> None: ...

    def flip(self, path: str, at: int = 0) -> None:
        """Turn one bit of the file's content, leaving size and times as they are."""

    def paths(self) -> list[str]:
        """Every file there, Replica's own ones included."""
        ...

    def vanish(self) -> None:
        """The disk or server is gone."""

    def return_(self) -> None: ...


class StorageConformance:
    #: Two changes so far apart have different times; coarser than any file system's clock we know. A storage whose
    #: protocol tells less says so here, and in its docstring.
    clock_seconds: ClassVar[float] = 0.02
    #: Those of ODD_PATHS that this kind of storage cannot keep, and says so; the adapter's docstring says why.
    refused_paths: ClassVar[frozenset[str]] = frozenset()
    #: For so long what was seen of the sentinel may be believed, by verbs that take nothing away.
    notices_seconds: ClassVar[float] = 0.0

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def test_stat_tells_the_size(self, storage: Storage, behind: Behind) -> None:
        behind.put("a/b", b"12345")
        assert (await storage.stat("a/b")).size_bytes == 5

    async def test_an_untouched_file_keeps_its_etag_and_a_rewritten_one_does_not(
        self, storage: Storage, behind: Behind
    ) -> None:
        behind.put("a", b"12345")
        before = await storage.stat("a")
        assert await storage.stat("a") == before
        await asyncio.sleep(self.clock_seconds)
        behind.put("a", b"54321")
        assert (await storage.stat("a")).etag != before.etag

    async def test_what_is_not_there_is_missing(self, storage: Storage) -> None:
        for verb in (
            lambda: storage.stat("no/such"),
            lambda: read_all(storage, "no/such"),
            lambda: storage.checksum("no/such", "adler32"),
            lambda: storage.quarantine("no/such"),
        ):
            error = await refusal(SourceMissing, verb)
            assert error.path == "no/such"
            assert error.endpoint == storage.name
            assert "no/such" in error.message

    async def test_reading_gives_the_bytes(self, storage: Storage, behind: Behind) -> None:
        for content in (b"", b"x", pattern(3 * 1024 * 1024 + 17)):
            behind.put("f", content)
            assert await read_all(storage, "f") == content

    async def test_reading_a_range_gives_that_range(self, storage: Storage, behind: Behind) -> None:
        content = pattern(2 * 1024 * 1024 + 5)
        behind.put("f", content)
        for offset, length in ((0, 0), (0, 1), (1, 10), (1024 * 1024 - 1, 2), (5, None), (len(content) - 1, 100)):
            end = None if length is None else offset + length
            assert await read_all(storage, "f", offset, length) == content[offset:end]
        assert await read_all(storage, "f", len(content) + 7) == b""

    async def test_a_read_that_is_left_early_leaves_the_storage_usable(self, storage: Storage, behind: Behind) -> None:
        behind.put("f", pattern(3 * 1024 * 1024))
        async for _ in storage.read("f"):
            break
        assert (await storage.stat("f")).size_bytes == 3 * 1024 * 1024

    async def test_a_digest_is_right_or_not_given(self, storage: Storage, behind: Behind) -> None:
        content = pattern(100_001)
        behind.put("f", content)
        hasher = Hasher()
        hasher.update(content)
        for known in hasher.checksums():
            assert await storage.checksum("f", known.algorithm) in (None, known.value)
        assert await storage.checksum("f", "no-such-algorithm") is None

    # ── listing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def test_a_listing_shows_every_file_once_and_nothing_of_replicas_own(
        self, storage: Storage, behind: Behind
    ) -> None:
        files = {"a": 1, "b/c": 2, "b/d/e": 3, "bc": 4}
        for path, size in files.items():
            behind.put(path, b"x" * size)
        await write(storage, part_path("t1"), b"unpublished")
        found = await listed(storage)
        assert sorted((e.path, e.size_bytes, e.problem) for e in found) == sorted((p, s, "") for p, s in files.items())

    async def test_a_listing_of_a_folder_shows_that_folder_only(self, storage: Storage, behind: Behind) -> None:
        for path in ("b/c", "b/d/e", "bc", "a"):
            behind.put(path, b"x")
        assert sorted(e.path for e in await listed(storage, "b")) == ["b/c", "b/d/e"]
        assert await listed(storage, "no/such/folder") == []

    # ── writing, publishing ──────────────────────────────────────────────────────────────────────────────────────────

    async def test_a_written_file_is_unpublished_until_it_is_published(self, storage: Storage, behind: Behind) -> None:
        part = part_path("t1.e1.abc")
        await write(storage, part, b"hello", b" ", b"world")
        assert await listed(storage) == []
        assert await read_all(storage, part) == b"hello world"
        await storage.publish(part, "deep/er/name")
        assert behind.get("deep/er/name") == b"hello world"
        assert behind.get(part) is None

    async def test_an_empty_file_is_a_file(self, storage: Storage, behind: Behind) -> None:
        part = part_path("t1")
        await write(storage, part)
        await storage.publish(part, "empty")
        assert behind.get("empty") == b""

    async def test_two_attempts_never_write_into_one_temporary(self, storage: Storage) -> None:
        part = part_path("t1")
        await write(storage, part, b"first")
        await refusal(TargetExists, lambda: write(storage, part, b"second"))
        assert await read_all(storage, part) == b"first"

    async def test_publishing_never_replaces(self, storage: Storage, behind: Behind) -> None:
        behind.put("f", b"theirs")
        part = part_path("t1")
        await write(storage, part, b"ours")
        await refusal(TargetExists, lambda: storage.publish(part, "f"))
        assert behind.get("f") == b"theirs"
        assert await read_all(storage, part) == b"ours"

    async def test_of_many_publishing_at_once_exactly_one_wins(self, storage: Storage, behind: Behind) -> None:
        parts = [part_path(f"t{n}") for n in range(8)]
        for part in parts:
            await write(storage, part, part.encode())
        outcomes = await asyncio.gather(*(storage.publish(p, "a/b/f") for p in parts), return_exceptions=True)
        winners = [p for p, outcome in zip(parts, outcomes, strict=True) if outcome is None]
        assert len(winners) == 1
        assert all(isinstance(o, TargetExists) for o in outcomes if o is not None), outcomes
        assert behind.get("a/b/f") == winners[0].encode()

    async def test_publishing_what_is_not_there_publishes_nothing(self, storage: Storage, behind: Behind) -> None:
        await refusal(ReplicaError, lambda: storage.publish(part_path("gone"), "f"))
        assert behind.get("f") is None

    async def test_a_failing_source_of_chunks_fails_the_write(self, storage: Storage, behind: Behind) -> None:
        part = part_path("t1")

        async def chunks() -> AsyncIterator[Piece]:
            yield b"some"
            raise SourceMissing("the source went away")

        await refusal(SourceMissing, lambda: storage.write(part, chunks()))
        await storage.delete(part)
        assert behind.get(part) is None

    async def test_odd_names_are_kept_exactly(self, storage: Storage, behind: Behind) -> None:
        kept = [path for path in ODD_PATHS if path not in self.refused_paths]
        for number, path in enumerate(kept):
            part = part_path(f"t{number}")
            await write(storage, part, path.encode())
            await storage.publish(part, path)
        assert sorted(e.path for e in await listed(storage)) == sorted(kept)
        for path in kept:
            assert behind.get(path) == path.encode()
            assert await read_all(storage, path) == path.encode()

    async def test_names_that_cannot_be_kept_are_refused_before_any_effect(
        self, storage: Storage, behind: Behind
    ) -> None:
        assert self.refused_paths <= set(ODD_PATHS)
        await write(storage, part_path("t1"), b"x")
        before = behind.paths()
        for path in self.refused_paths:
            error = await refusal(Invalid, partial(storage.publish, part_path("t1"), path))
            assert shown(path) in error.message
            assert error.hint
            for verb in (partial(storage.stat, path), partial(read_all, storage, path)):
                assert isinstance(await refusal(ReplicaError, verb), Invalid | SourceMissing)
            for remove in (storage.delete, storage.quarantine):
                with suppress(Invalid, SourceMissing):
                    await remove(path)
        assert behind.paths() == before

    async def test_names_that_differ_only_in_case_are_two_files(self, storage: Storage, behind: Behind) -> None:
        for number, path in enumerate(("name", "NAME")):
            await write(storage, part_path(f"t{number}"), path.encode())
            await storage.publish(part_path(f"t{number}"), path)
        assert behind.get("name") == b"name"
        assert behind.get("NAME") == b"NAME"

    # ── deleting, quarantine, stale temporaries ──────────────────────────────────────────────────────────────────────

    async def test_deleting_is_idempotent(self, storage: Storage, behind: Behind) -> None:
        behind.put("a/f", b"x")
        behind.put("a/g", b"y")
        await storage.delete("a/f")
        await storage.delete("a/f")
        await storage.delete("never/there")
        assert behind.get("a/f") is None
        assert behind.get("a/g") == b"y"

    async def test_quarantine_keeps_the_bytes_and_frees_the_name(self, storage: Storage, behind: Behind) -> None:
        for content in (b"first", b"second"):
            behind.put("a/f", content)
            away = await storage.quarantine("a/f")
            assert away.startswith(QUARANTINE + "/")
            assert behind.get(away) == content
            assert behind.get("a/f") is None
        assert await listed(storage) == []

    async def test_stale_temporaries_are_collected_and_fresh_ones_are_not(
        self, storage: Storage, behind: Behind
    ) -> None:
        behind.put("f", b"published")
        await write(storage, part_path("t1"), b"x")
        assert await storage.collect_parts(3600) == 0
        assert any(p.startswith(PARTS) for p in behind.paths())
        await asyncio.sleep(0.02)
        assert await storage.collect_parts(0.0) == 1
        assert await storage.collect_parts(0.0) == 0
        assert not any(p.startswith(PARTS) for p in behind.paths())
        assert behind.get("f") == b"published"

    async def test_space_is_told_in_bytes_or_not_at_all(self, storage: Storage) -> None:
        space = await storage.space()
        assert space is None or 0 <= space.free_bytes <= space.total_bytes

    # ── ranges, for storages that write them ─────────────────────────────────────────────────────────────────────────

    async def test_ranges_may_be_written_in_any_order(self, storage: Storage, behind: Behind) -> None:
        if not isinstance(storage, SupportsResume):
            return  # an ability, not a promise of every storage
        content, part = pattern(3 * 1024 * 1024 + 11), part_path("17-1-ab")
        cuts = [0, 5, 1024 * 1024, 2 * 1024 * 1024 + 3, len(content)]
        await storage.begin(part, len(content))
        await refusal(TargetExists, lambda: storage.begin(part, len(content)))
        for begin, end in reversed([*pairwise(cuts)]):
            await storage.write_at(part, begin, _pieces(content[begin:end]))
        await storage.write_at(part, 7, _pieces(content[7:9]))
        await storage.settle(part)
        assert await read_all(storage, part, 3, 10) == content[3:13]
        assert await read_all(storage, part) == content
        await storage.publish(part, "f")
        assert behind.get("f") == content
        await refusal(Transient, lambda: storage.write_at(part, 0, _pieces(b"late")))
        assert behind.get("f") == content

    async def test_a_temporary_that_was_taken_over_has_only_its_new_name(
        self, storage: Storage, behind: Behind
    ) -> None:
        if not isinstance(storage, SupportsResume):
            return
        old, mine = part_path("17-1-ab"), part_path("17-2-cd")
        await storage.begin(old, 5)
        await storage.write_at(old, 0, _pieces(b"bytes"))
        await storage.append(old + ".map", b"one\n")
        await storage.append(old + ".map", b"two\n")
        await storage.begin(part_path("18-1-ef"), 1)
        assert sorted(await storage.unfinished("17-")) == [old, old + ".map"]
        assert await read_all(storage, old + ".map") == b"one\ntwo\n"
        outcomes = await asyncio.gather(*(storage.take_over(old, mine) for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(outcome, bool) for outcome in outcomes) == 1
        assert sum(isinstance(outcome, SourceMissing | TargetExists) for outcome in outcomes) == 4
        await refusal(SourceMissing, lambda: storage.stat(old))
        await refusal(ReplicaError, lambda: storage.publish(old, "f"))
        await refusal(ReplicaError, lambda: storage.write_at(old, 0, _pieces(b"zombie")))
        await storage.settle(mine)
        await storage.publish(mine, "f")
        assert behind.get("f") == b"bytes"
        assert await storage.collect_parts(3600) == 0

    # ── refusing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def test_hostile_paths_are_refused_by_every_verb(self, storage: Storage, behind: Behind) -> None:
        before = behind.paths()
        for path in HOSTILE_PATHS:
            verbs: list[Callable[[], Awaitable[object]]] = [
                partial(storage.stat, path),
                partial(read_all, storage, path),
                partial(storage.checksum, path, "adler32"),
                partial(storage.delete, path),
                partial(storage.quarantine, path),
                partial(write, storage, path, b"x"),
                partial(storage.publish, path, "final"),
                partial(storage.publish, part_path("t1"), path),
            ]
            if path:  # the empty prefix is the whole storage
                verbs.append(partial(listed, storage, path))
            for verb in verbs:
                await refusal(Invalid, verb)
        await refusal(Invalid, lambda: write(storage, "published/name", b"x"))
        await refusal(Invalid, lambda: storage.publish("published/name", "other"))
        assert behind.paths() == before

    async def test_a_storage_that_is_not_there_is_unreachable_and_never_empty(
        self, storage: Storage, behind: Behind
    ) -> None:
        behind.put("f", b"x")
        await write(storage, part_path("t1"), b"x")
        behind.vanish()
        try:
            for verb in (
                lambda: storage.stat("f"),
                lambda: read_all(storage, "f"),
                lambda: listed(storage),
                lambda: listed(storage, "no/such"),
                lambda: write(storage, part_path("t2"), b"x"),
                lambda: storage.publish(part_path("t1"), "g"),
                lambda: storage.delete("f"),
                lambda: storage.quarantine("f"),
                lambda: storage.collect_parts(0.0),
                lambda: storage.space(),
            ):
                error = await refusal(Unreachable, verb)
                assert error.endpoint == storage.name
                assert error.hint
        finally:
            behind.return_()
        assert (await storage.stat("f")).size_bytes == 1

    async def test_what_belongs_to_another_endpoint_is_never_taken_for_ours(
        self, storage: Storage, behind: Behind
    ) -> None:
        """The wrong disk or bucket stands there by now: nothing of it is removed, added to, or counted as ours."""
        behind.put("f", b"theirs")
        await write(storage, part_path("t1"), b"x")
        ours = behind.get(SENTINEL)
        if ours is None:
            return  # a storage of one process has no place that could become another's
        assert (await storage.stat("f")).size_bytes == 6
        behind.put(SENTINEL, sentinel_of("ANOTHER-ENDPOINT"))
        before = behind.paths()
        for verb in (
            lambda: storage.delete("f"),
            lambda: storage.delete("no/such"),
            lambda: storage.quarantine("f"),
            lambda: storage.collect_parts(0.0),
            lambda: storage.stat("no/such"),
            lambda: listed(storage),
        ):
            assert "ANOTHER-ENDPOINT" in (await refusal(Unreachable, verb)).message
        await asyncio.sleep(self.notices_seconds)
        for verb in (
            lambda: write(storage, part_path("t2"), b"x"),
            lambda: storage.publish(part_path("t1"), "g"),
        ):
            await refusal(Unreachable, verb)
        assert behind.paths() == before
        assert behind.get("f") == b"theirs"
        behind.put(SENTINEL, ours)
        await asyncio.sleep(self.notices_seconds)
        await storage.publish(part_path("t1"), "g")

    async def test_preparing_again_changes_nothing(self, storage: Storage, behind: Behind) -> None:
        behind.put("f", b"x")
        before = behind.paths()
        await storage.prepare()
        assert behind.paths() == before

    async def test_closing_twice_is_closing_once(self, storage: Storage) -> None:
        await storage.close()
        await storage.close()

    # ── the copy, with this storage at either end ────────────────────────────────────────────────────────────────────

    async def test_a_copy_within_the_storage_is_verified(self, storage: Storage, behind: Behind) -> None:
        content = pattern(2 * 1024 * 1024 + 1)
        behind.put("from", content)
        size, checksums = await measure(storage, "from")
        copied = await copy_file(storage, "from", storage, "to/there", tag="t1.e1", expected=Expected(size, checksums))
        assert (copied.size_bytes, copied.adopted) == (size, False)
        assert copied.checksums.compare(checksums) is Agreement.AGREE
        assert behind.get("to/there") == content
        assert not any(p.startswith(PARTS) for p in behind.paths())

    async def test_an_existing_copy_is_adopted_and_a_wrong_one_is_moved_away(
        self, storage: Storage, behind: Behind
    ) -> None:
        content = pattern(1000)
        behind.put("from", content)
        behind.put("to", content)
        expected = Expected(*await measure(storage, "from"))
        assert (await copy_file(storage, "from", storage, "to", tag="t1", expected=expected)).adopted
        behind.flip("to", 500)
        copied = await copy_file(storage, "from", storage, "to", tag="t2", expected=expected)
        assert not copied.adopted
        assert behind.get("to") == content
        assert sum(p.startswith(QUARANTINE) for p in behind.paths()) == 1
        assert await adopt(storage, "nothing/there", expected) is None


async def refusal(kind: type[E] | tuple[type[E], ...], verb: Callable[[], Awaitable[object]]) -> E:
    try:
        await verb()
    except kind as error:
        return error
    raise AssertionError(f"{kind} was expected")


async def read_all(storage: Storage, path: str, offset: int = 0, length: int | None = None) -> bytes:
    content = bytearray()
    async for piece in storage.read(path, offset, length):
        content += piece
    return bytes(content)


async def write(storage: Storage, part: str, *pieces: bytes) -> None:
    async def chunks() -> AsyncIterator[Piece]:
        for piece in pieces:
            yield piece

    await storage.write(part, chunks())


async def _pieces(*pieces: bytes) -> AsyncIterator[Piece]:
    for piece in pieces:
        yield piece


async def listed(storage: Storage, prefix: str = "") -> list[Entry]:
    return [entry async for entry in storage.list(prefix)]


def pattern(size_bytes: int) -> bytes:
    """Bytes in which no block equals another, so that a swapped or repeated one shows."""
    return array("Q", range(size_bytes // 8 + 1)).tobytes()[:size_bytes]
