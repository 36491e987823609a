"""S3, against two real servers: the shipped suite, and what is special to objects."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Iterator
from contextlib import suppress

import aiohttp
import pytest

from replica.storage import s3, s3_multipart
from replica.storage.base import OWN, PARTS, Storage, SupportsPresigned, SupportsServerCopy, part_path
from replica.storage.conformance import StorageConformance, listed, pattern, read_all, refusal, write
from replica.storage.copy import Expected, copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.memory import MemoryStorage, forget
from replica.storage.registry import open_storage
from replica.storage.s3_home import SEEN_SECONDS
from rules.checksums import Agreement
from rules.errors import Busy, Forbidden, Invalid, Refused, SourceMissing, TargetExists, Transient, Unreachable
from tests.servers_s3 import SETTINGS, Moto, RcloneS3, S3Server, Strict

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    yield from _running(Moto())


@pytest.fixture(scope="module")
def rclone() -> Iterator[S3Server]:
    yield from _running(RcloneS3())


@pytest.fixture(scope="module")
def strict() -> Iterator[S3Server]:
    yield from _running(Strict())


def _running(server: S3Server) -> Iterator[S3Server]:
    try:
        server.start()
        yield server
    finally:
        server.remove()


class BehindBucket:
    """conformance.Behind for a prefix of a bucket, by a client that is not ours."""

    def __init__(self, server: S3Server, bucket: str, prefix: str = "") -> None:
        self.client, self.bucket, self.base = server.client(), bucket, f"{prefix}/" if prefix else ""
        self.away: dict[str, bytes] = {}

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.base + path, Body=content)

    def get(self, path: str) -> bytes | None:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=self.base + path)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def remove(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.base + path)

    def flip(self, path: str, at: int = 0) -> None:
        content = bytearray(self.get(path))
        content[at] ^= 1
        self.put(path, bytes(content))

    def paths(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.base)
        return sorted(line["Key"].removeprefix(self.base) for page in pages for line in page.get("Contents", ()))

    def uploads(self) -> list[str]:
        return [u["Key"] for u in self.client.list_multipart_uploads(Bucket=self.bucket).get("Uploads", ())]

    def vanish(self) -> None:
        """Nothing of it is there any more, and then the bucket is not."""
        self.away = {path: self.get(path) for path in self.paths()}
        for path in self.away:
            self.remove(path)
        self.client.delete_bucket(Bucket=self.bucket)

    def return_(self) -> None:
        self.client.create_bucket(Bucket=self.bucket)
        for path, content in self.away.items():
            self.put(path, content)


class Place:
    """A bucket of its own, and storages opened on it."""

    def __init__(self, server: S3Server, prefix: str = "") -> None:
        self.server, self.prefix, self.bucket = server, prefix, f"bucket-{next(_numbers)}"
        server.client().create_bucket(Bucket=self.bucket)
        self.behind = BehindBucket(server, self.bucket, prefix)
        self.opened: list[Storage] = []

    async def open(self, name: str = "store", prefix: str | None = None) -> s3.S3Storage:
        url = self.server.url(self.bucket, self.prefix if prefix is None else prefix)
        storage = open_storage(url, name=name, credentials=Credentials({self.server.url(self.bucket): SETTINGS}))
        self.opened.append(storage)
        await storage.prepare()
        return storage

    async def close(self) -> None:
        for storage in self.opened:
            await storage.close()


class S3Conformance(StorageConformance):
    #: S3 advises against control characters, and moto's server loses them: the adapter takes none.
    refused_paths = frozenset({"line\nbreak"})
    notices_seconds = SEEN_SECONDS + 0.01

    @pytest.fixture
    def behind(self, place):
        return place.behind

    @pytest.fixture
    async def storage(self, place):
        return await place.open()

    async def test_it_keeps_the_contract(self, storage):
        assert isinstance(storage, Storage)
        assert isinstance(storage, SupportsServerCopy)
        assert isinstance(storage, SupportsPresigned)


class TestMoto(S3Conformance):
    @pytest.fixture
    async def place(self, moto):
        place = Place(moto)
        yield place
        await place.close()

    async def test_it_is_seen_what_the_server_does(self, storage):
        able = await storage._abilities()
        assert (able.put_new, able.copy_new, able.complete_new, able.checksums, able.md5) == (
            True,
            False,
            True,
            False,
            False,
        )


class TestRclone(S3Conformance):
    @pytest.fixture
    async def place(self, rclone):
        place = Place(rclone, "a/prefix")
        yield place
        await place.close()

    async def test_it_is_seen_what_the_server_does(self, storage):
        able = await storage._abilities()
        assert (able.put_new, able.copy_new, able.complete_new, able.checksums, able.md5) == (False,) * 5


class TestStrict(S3Conformance):
    @pytest.fixture
    async def place(self, strict):
        place = Place(strict, "prefix")
        yield place
        await place.close()

    async def test_it_is_seen_what_the_server_does(self, storage):
        able = await storage._abilities()
        assert (able.put_new, able.copy_new, able.complete_new, able.checksums, able.whole_checksums) == (True,) * 5


# ── what is special to objects ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["moto", "rclone", "strict"])
async def place(request) -> Place:
    place = Place(request.getfixturevalue(request.param))
    yield place
    await place.close()


@pytest.fixture
async def on_moto(moto):
    place = Place(moto)
    yield place
    await place.close()


@pytest.fixture
async def on_rclone(rclone):
    place = Place(rclone)
    yield place
    await place.close()


async def test_of_publishers_in_many_processes_exactly_one_wins_each_name(place):
    """Eight storages that share nothing but the server, and three names they all want."""
    storages = [await place.open() for _ in range(8)]
    for number, storage in enumerate(storages):
        for name in "abc":
            await write(storage, part_path(f"{name}{number}"), f"{name}{number}".encode())

    async def published(storage, part, name):
        for _ in range(5):
            with suppress(Transient):  # rclone's server now and then fails for one of two that make a folder at once
                return await storage.publish(part, name)
        return await storage.publish(part, name)

    outcomes = await asyncio.gather(
        *(published(s, part_path(f"{name}{n}"), name) for name in "abc" for n, s in enumerate(storages)),
        return_exceptions=True,
    )
    assert outcomes.count(None) == 3
    assert all(isinstance(o, TargetExists) for o in outcomes if o is not None), outcomes
    for at, name in enumerate("abc"):
        winner = outcomes[at * 8 : at * 8 + 8].index(None)
        assert place.behind.get(name) == f"{name}{winner}".encode()
    assert not [p for p in place.behind.paths() if "publishing" in p]


async def test_a_flag_of_a_killed_publisher_is_waited_for_and_then_taken_down(on_rclone, monkeypatch):
    storage = await on_rclone.open()
    await write(storage, part_path("t1"), b"x")
    folder = hashlib.sha256(b"f").hexdigest()[:32]
    on_rclone.behind.put(f"{OWN}/publishing/{folder}-0000", b"")
    monkeypatch.setattr("replica.storage.s3_flags._WAIT_SECONDS_MAX", 0.0)
    error = await refusal(Busy, lambda: storage.publish(part_path("t1"), "f"))
    assert "killed" in error.hint
    assert on_rclone.behind.get("f") is None
    monkeypatch.setattr("replica.storage.s3_flags.FLAG_SECONDS_MAX", 0.0)  # an age is never told too small
    await storage.publish(part_path("t1"), "f")
    assert on_rclone.behind.get("f") == b"x"


async def test_a_large_file_goes_in_parts_and_comes_back_whole(place, monkeypatch):
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 << 20)
    storage, content = await place.open(), pattern((5 << 20) * 3 + 17)
    ours = MemoryStorage(place.bucket)
    await ours.prepare()
    await write(ours, part_path("t"), content)
    await ours.publish(part_path("t"), "large")
    copied = await copy_file(ours, "large", storage, "there", tag="t1")
    proof = "digest crc32c" if (await storage._abilities()).whole_checksums else "read back"
    assert (copied.size_bytes, copied.verified_by) == (len(content), proof)
    assert place.behind.get("there") == content
    again = await copy_file(storage, "there", ours, "back", tag="t2", expected=Expected(*await measure(ours, "large")))
    assert again.checksums.compare(copied.checksums) is Agreement.AGREE
    assert place.behind.uploads() == []
    forget(place.bucket)


async def test_a_write_that_fails_leaves_no_unfinished_upload(place, monkeypatch):
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 << 20)
    storage = await place.open()

    async def breaks_off():
        for _ in range(11):
            yield bytes(1 << 20)
        raise SourceMissing("the source went away")

    await refusal(SourceMissing, lambda: storage.write(part_path("t1"), breaks_off()))
    assert place.behind.uploads() == []
    assert place.behind.get(part_path("t1")) is None


async def test_stale_uploads_are_aborted_and_those_of_others_are_not(on_rclone):
    storage = await on_rclone.open(prefix="ours")
    begin = on_rclone.behind.client.create_multipart_upload
    for key in (f"ours/{part_path('dead')}", "ours/published/by/copying", "theirs"):
        begin(Bucket=on_rclone.bucket, Key=key)
    assert await storage.collect_parts(3600) == 0
    assert await storage.collect_parts(0) == 2
    assert on_rclone.behind.uploads() == ["theirs"]


async def test_above_the_limit_of_one_copy_the_server_copies_parts(on_moto, monkeypatch):
    storage, content = await on_moto.open(), pattern((5 << 20) * 2 + 5)
    await write(storage, part_path("t1"), content)
    monkeypatch.setattr("replica.storage.s3_publish.COPY_BYTES_MAX", 1 << 20)
    monkeypatch.setattr(s3_multipart, "COPY_PART_BYTES", 5 << 20)
    await storage.publish(part_path("t1"), "f")
    assert on_moto.behind.get("f") == content
    assert on_moto.behind.get(await storage.quarantine("f")) == content


async def test_a_listing_of_many_pages_names_every_key_once(place, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_KEYS", 7)
    storage = await place.open()
    names = [f"{odd}{n}/{odd}" for n in range(5) for odd in ("a b", "+", "%20", "ü", "&<>\"'", "x")]
    for name in names:
        place.behind.put(name, b"1")
    assert sorted(e.path for e in await listed(storage)) == sorted(names)


async def test_folder_markers_are_no_files(on_moto):
    storage = await on_moto.open()
    on_moto.behind.put("folder/", b"")
    on_moto.behind.put("folder//x", b"")
    assert {e.path: bool(e.problem) for e in await listed(storage)} == {"folder/": True, "folder//x": True}


async def test_in_a_bucket_with_versions_a_delete_marker_is_nothing(on_moto):
    on_moto.behind.client.put_bucket_versioning(Bucket=on_moto.bucket, VersioningConfiguration={"Status": "Enabled"})
    storage = await on_moto.open()
    on_moto.behind.put("f", b"first")
    await storage.delete("f")
    await refusal(SourceMissing, lambda: storage.stat("f"))
    await refusal(SourceMissing, lambda: read_all(storage, "f"))
    assert await listed(storage) == []
    await write(storage, part_path("t1"), b"second")
    await storage.publish(part_path("t1"), "f")
    before = await storage.stat("f")
    on_moto.behind.put("f", b"second")  # the same bytes in the same second, and another version
    assert (await storage.stat("f")).etag != before.etag


async def test_a_presigned_url_reads_one_file_and_nothing_else(on_rclone):
    storage = await on_rclone.open()
    on_rclone.behind.put("a b/ü", b"content")
    url = storage.presigned("a b/ü", 60)
    assert "replica-secret-key" not in url
    async with aiohttp.ClientSession() as session:
        from yarl import URL

        async with session.get(URL(url, encoded=True)) as answer:
            assert (answer.status, await answer.read()) == (200, b"content")
        async with session.get(URL(url.replace("%C3%BC", "other"), encoded=True)) as answer:
            assert answer.status == 403
    for seconds in (0, 8 * 24 * 3600):
        with pytest.raises(Invalid):
            storage.presigned("a", seconds)


async def test_within_one_server_the_server_copies_and_the_copy_is_proven(place, monkeypatch):
    source, other = await place.open("from", prefix="here"), Place(place.server)
    target = await other.open("to")
    content = pattern(1_000_001)
    place.server.client().put_object(Bucket=place.bucket, Key="here/f", Body=content)
    expected = Expected(*await measure(source, "f"))
    read, monkeypatched = s3.S3Storage.read, []

    def only_the_target(self, path, *rest):
        monkeypatched.append((self.name, path.startswith(PARTS)))
        return read(self, path, *rest)

    monkeypatch.setattr(s3.S3Storage, "read", only_the_target)
    copied = await copy_file(source, "f", target, "f", tag="t1", expected=expected)
    assert monkeypatched == [("to", True)]
    assert (copied.checksums, copied.verified_by) == (expected.checksums, "read back")
    assert other.behind.get("f") == content
    await other.close()


async def test_what_a_server_copied_wrongly_is_streamed_instead(place, monkeypatch):
    storage = await place.open()
    content = pattern(100_000)
    place.behind.put("f", content)
    expected = Expected(*await measure(storage, "f"))
    copy_from = s3.S3Storage.copy_from

    async def wrongly(self, source, path, temporary, **rest):
        done = await copy_from(self, source, path, temporary, **rest)
        place.behind.flip(temporary, 5)
        return done

    monkeypatch.setattr(s3.S3Storage, "copy_from", wrongly)
    await copy_file(storage, "f", storage, "g", tag="t1", expected=expected)
    assert place.behind.get("g") == content


async def test_a_wrong_key_is_forbidden_and_told_by_nobody(on_rclone):
    await on_rclone.open()
    url = on_rclone.server.url(on_rclone.bucket)
    for settings in ({**SETTINGS, "secret_access_key": "hush-hush-hush"}, {}):
        storage = open_storage(url, name="store", credentials=Credentials({url: settings} if settings else {}))
        for verb in (lambda s=storage: s.stat("f"), lambda s=storage: listed(s), lambda s=storage: s.delete("f")):
            error = await refusal(Forbidden, verb)
            assert "access_key" in error.hint
            assert "hush" not in f"{error!r}{error.hint}{storage!r}{vars(storage)!r}"
        await storage.close()


async def test_nothing_goes_over_plain_http_to_another_machine_unless_it_is_said(monkeypatch):
    monkeypatch.setattr("aiohttp.ClientSession.request", None)  # nothing may be sent
    for url, settings in (
        ("s3+http://192.0.2.1/bucket", SETTINGS),
        ("s3://bucket", {**SETTINGS, "endpoint": "http://192.0.2.1"}),
    ):
        storage = open_storage(url, credentials=Credentials({url: settings}))
        assert "insecure" in (await refusal(Forbidden, lambda s=storage: s.stat("f"))).hint
        with pytest.raises(Forbidden):
            storage.presigned("f", 60)


async def test_a_prefix_belongs_to_one_endpoint_and_none_lies_in_another(on_moto):
    await on_moto.open("first", prefix="a")
    await refusal(Refused, lambda: on_moto.open("second", prefix="a"))
    await refusal(Refused, lambda: on_moto.open("second", prefix="a/b"))
    await on_moto.open("second", prefix="ab")


async def test_an_emptied_or_wrong_bucket_is_unreachable(place):
    storage = await place.open()
    place.behind.remove(f"{OWN}/endpoint")
    for verb in (lambda: listed(storage), lambda: storage.stat("f"), lambda: read_all(storage, "f")):
        assert "bucket" in (await refusal(Unreachable, verb)).message


async def test_a_name_too_long_for_a_key_is_refused_before_anything_happens(on_moto):
    storage = await on_moto.open()
    await refusal(Invalid, lambda: storage.stat("/".join(["x" * 99] * 11)))


@pytest.mark.parametrize(
    ("url", "settings", "goes_to"),
    [
        ("s3://beamtimes/raw/x%20y", {"region": "eu-central-1"}, "https://beamtimes.s3.eu-central-1.amazonaws.com/k"),
        ("s3://with.dots", {}, "https://s3.us-east-1.amazonaws.com/with.dots/k"),
        ("s3://beamtimes", {"endpoint": "https://s3.desy.de:9000"}, "https://s3.desy.de:9000/beamtimes/k"),
        ("s3+https://s3.desy.de/beamtimes", {}, "https://s3.desy.de/beamtimes/k"),
        ("s3+https://s3.desy.de/bucket", {"addressing": "virtual"}, "https://bucket.s3.desy.de/k"),
        ("s3+http://10.0.0.1/bucket", {"insecure": "yes"}, "http://10.0.0.1/bucket/k"),
        ("s3+http://localhost:90/bucket/a/b", {}, "http://localhost:90/bucket/k"),
    ],
)
def test_a_url_says_where_requests_go(url, settings, goes_to):
    storage = open_storage(url, credentials=Credentials({url: settings}))
    assert storage.server.url("k") == goes_to


@pytest.mark.parametrize(
    ("url", "settings"),
    [
        ("s3://", {}),
        ("s3://b", {}),
        ("s3://bucket//x", {}),
        ("s3://bucket/../x", {}),
        ("s3://bucket/a%2Fb", {}),
        ("s3://bucket/%0a", {}),
        ("s3://bucket/.replica/part", {}),
        ("s3://key:secret@bucket", {}),
        ("s3://bucket?versionId=1", {}),
        ("s3+https://host", {}),
        ("s3+https:///bucket", {}),
        ("s3://bucket", {"endpoint": "https://key@10.0.0.1"}),
        ("s3://bucket", {"endpoint": "ftp://10.0.0.1"}),
        ("s3://bucket", {"addressing": "both"}),
        ("s3://bucket", {"region": "x@evil.example"}),
    ],
)
def test_what_is_no_s3_url_is_refused(url, settings):
    with pytest.raises(Invalid):
        open_storage(url, credentials=Credentials({url: settings} if "@" not in url else {}))
