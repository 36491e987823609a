"""Files that get their name by the very request that proves them, at an S3 server that keeps conditions and digests."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from replica.storage import s3_multipart
from replica.storage.base import QUARANTINE, SupportsDirect
from replica.storage.conformance import pattern, refusal
from replica.storage.copy import Expected, Stopped, copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.hashing import Hasher
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from rules.errors import ChecksumDiffers, Invalid, SourceMissing, TargetExists, Transient, Unreachable
from tests.replica.storage.test_s3 import Place
from tests.replica.storage.test_s3_faults import Proxy, error_document
from tests.servers_s3 import SETTINGS, Strict

SIZES = [1000, (5 << 20) * 2 + 5]


@pytest.fixture(scope="module")
def server():
    server = Strict()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
async def at(server, monkeypatch):
    """A storage behind a proxy; the proxy; what is really in the bucket."""
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 << 20)
    place, proxy = Place(server), Proxy(server.endpoint)
    await proxy.start()
    url = f"s3+http://{proxy.url}/{place.bucket}"
    storage = open_storage(url, name="store", credentials=Credentials({url: SETTINGS}))
    await storage.prepare()
    assert isinstance(storage, SupportsDirect)
    proxy.seen.clear()
    yield storage, proxy, place.behind
    await storage.close()
    await proxy.stop()


@pytest.fixture
async def here(tmp_path):
    storage = PosixStorage(tmp_path / "here", name="here")
    await storage.prepare()
    return storage


async def file(here: PosixStorage, size: int, name: str = "f", of: int = 0) -> tuple[bytes, Expected]:
    content = pattern(size + of)[of:]
    here.local_path(name).write_bytes(content)
    return content, Expected(*await measure(here, name))


async def test_a_small_file_is_one_request_up_and_one_down(at, here):
    storage, proxy, behind = at
    content, expected = await file(here, 64 << 10)
    await storage.digests()
    proxy.seen.clear()
    copied = await copy_file(here, "f", storage, "a/f", tag="t1", expected=expected)
    assert (copied.verified_by, behind.get("a/f")) == ("digest crc32c", content)
    assert [line.split()[0] for line in proxy.seen] == ["PUT"]
    proxy.seen.clear()
    await copy_file(storage, "a/f", here, "back", tag="t2", expected=expected)
    assert here.local_path("back").read_bytes() == content
    assert [line.split()[0] for line in proxy.seen] == ["GET"]


@pytest.mark.parametrize("size", SIZES)
async def test_bytes_that_were_damaged_on_their_way_never_get_the_name(at, here, size, monkeypatch):
    storage, proxy, behind = at
    content, expected = await file(here, size)

    async def flip(passing):
        if passing.request.method == "PUT" and len(passing.body) > 900:
            body = bytearray(passing.body)
            body[500] ^= 1
            passing.body = bytes(body)
        return None

    proxy.fault = flip
    monkeypatch.setattr(s3_multipart, "_WAIT_SECONDS", 0.0)
    error = await refusal(Transient, lambda: copy_file(here, "f", storage, "f", tag="t1", expected=expected))
    assert error.side == "target"
    assert behind.get("f") is None
    assert behind.uploads() == []
    proxy.fault = None
    assert not (await copy_file(here, "f", storage, "f", tag="t2", expected=expected)).adopted
    assert behind.get("f") == content


async def test_bytes_that_changed_in_our_memory_never_get_the_name(at, here):
    """The digest that is sent is that of the bytes as they came from the source."""
    storage, _, behind = at
    for size in SIZES:
        content = pattern(size)
        hasher = Hasher(("crc32c",))
        hasher.update(content[:-1] + b"!")
        unseen = await storage.send("f", pieces(content), size_bytes=size)
        await refusal(Transient, lambda u=unseen, h=hasher: u.publish(h.checksums()))
        await unseen.drop()
        assert (behind.get("f"), behind.uploads()) == (None, [])


@pytest.mark.parametrize("size", SIZES)
async def test_of_many_at_once_exactly_one_gets_the_name(at, size):
    storage, _, behind = at
    contents = [bytes([n]) * size for n in range(5)]

    async def one(content):
        hasher = Hasher(("crc32c",))
        hasher.update(content)
        unseen = await storage.send("f", pieces(content), size_bytes=size)
        try:
            return await unseen.publish(hasher.checksums())
        finally:
            await unseen.drop()

    outcomes = await asyncio.gather(*map(one, contents), return_exceptions=True)
    assert outcomes.count("crc32c") == 1
    assert all(isinstance(o, TargetExists) for o in outcomes if o != "crc32c"), outcomes
    assert behind.get("f") == contents[outcomes.index("crc32c")]
    assert behind.uploads() == []


@pytest.mark.parametrize("size", SIZES)
async def test_after_a_lost_answer_the_file_is_there_once_and_right(at, here, size):
    storage, proxy, behind = at
    content, expected = await file(here, size)
    await storage.digests()
    left = [1]

    async def lose(passing):
        final = "x-amz-checksum-crc32c" in passing.request.headers and "partNumber" not in passing.request.raw_path
        if left[0] and final:
            left[0] = 0
            await passing.forward()
            passing.reset()
            return web.Response()
        return None

    proxy.fault = lose
    for tag in ("t1", "t2"):
        try:
            await copy_file(here, "f", storage, "f", tag=tag, expected=expected)
            break
        except Transient:
            assert tag == "t1"
    assert left == [0]
    assert behind.get("f") == content
    assert not [path for path in behind.paths() if path.startswith(QUARANTINE)]
    assert behind.uploads() == []


@pytest.mark.parametrize("size", SIZES)
async def test_who_may_not_publish_any_more_leaves_nothing(at, here, size):
    storage, _, behind = at
    _, expected = await file(here, size)
    before = behind.paths()

    def lost():
        raise Stopped("the lease is gone")

    with pytest.raises(Stopped):
        await copy_file(here, "f", storage, "f", tag="t1", expected=expected, before_publish=lost)
    assert (behind.paths(), behind.uploads()) == (before, [])


async def test_wrong_bytes_of_that_name_are_put_aside_and_right_ones_adopted(at, here):
    storage, _, behind = at
    for size in SIZES:
        content, expected = await file(here, size)
        behind.put("f", b"x" * size)
        assert not (await copy_file(here, "f", storage, "f", tag="t1", expected=expected)).adopted
        assert behind.get("f") == content
        assert (await copy_file(here, "f", storage, "f", tag="t2", expected=expected)).adopted
        behind.remove("f")
    assert sum(path.startswith(QUARANTINE) for path in behind.paths()) == 2


async def test_what_does_not_agree_at_first_is_looked_at_with_care(at, here, tmp_path):
    """Quickly read, a difference blames nobody: the second, careful look says what is wrong."""
    storage, _, behind = at
    content, expected = await file(here, 1000)
    behind.put("f", content[:-1] + b"!")
    error = await refusal(ChecksumDiffers, lambda: copy_file(storage, "f", here, "g", tag="t1", expected=expected))
    assert (error.side, error.endpoint) == ("source", "store")
    behind.put("f", content + b"longer")
    error = await refusal(ChecksumDiffers, lambda: copy_file(storage, "f", here, "g", tag="t2", expected=expected))
    assert "size" in error.message
    behind.remove("f")
    error = await refusal(SourceMissing, lambda: copy_file(storage, "f", here, "g", tag="t3", expected=expected))
    assert error.side == "source"
    assert not here.local_path("g").exists()
    # The source is gone, and its bytes are there already.
    here.local_path("g").write_bytes(content)
    assert (await copy_file(storage, "f", here, "g", tag="t4", expected=expected)).adopted
    # Two storages of one place: the file is no second copy of itself.
    behind.put("f", content)
    twin = open_storage(storage.url, name="store", credentials=Credentials({storage.url: SETTINGS}))
    await refusal(Invalid, lambda: copy_file(storage, "f", twin, "f", tag="t5", expected=expected))
    await twin.close()


async def test_a_digest_that_is_refused_too_late_is_not_believed(at, here):
    """A server that keeps the wrong bytes it refuses would give them the name."""
    storage, proxy, behind = at

    async def too_late(passing):
        headers = passing.request.headers
        told = headers.get("x-amz-checksum-crc32c") or headers.get("Content-MD5") or ""
        if passing.request.method != "PUT" or not told.startswith("AAAAAA") or "uploadId" in passing.request.raw_path:
            return None
        behind.put(passing.request.path.split("/", 2)[2], passing.body)
        return error_document(400, "BadDigest")

    proxy.fault = too_late
    fresh = open_storage(storage.url, name="store", credentials=Credentials({storage.url: SETTINGS}))
    await fresh.prepare()
    assert await fresh.digests(1000) == ()
    content, expected = await file(here, 1000)
    assert (await copy_file(here, "f", fresh, "f", tag="t1", expected=expected)).verified_by == "read back"
    assert behind.get("f") == content
    await fresh.close()


async def test_parts_that_are_refused_too_late_are_not_believed(at, here):
    """As above, of a server that joins the parts and refuses their digest then."""
    storage, proxy, behind = at

    async def too_late(passing):
        headers = passing.request.headers
        if passing.request.method != "POST" or headers.get("x-amz-checksum-crc32c") != "AAAAAA==":
            return None
        behind.put(passing.request.path.split("/", 2)[2], b"probe")
        return error_document(400, "BadDigest")

    proxy.fault = too_late
    fresh = open_storage(storage.url, name="store", credentials=Credentials({storage.url: SETTINGS}))
    await fresh.prepare()
    assert (await fresh.digests(1000), await fresh.digests(SIZES[1])) == (("crc32c",), ())
    content, expected = await file(here, SIZES[1])
    assert (await copy_file(here, "f", fresh, "f", tag="t1", expected=expected)).verified_by == "read back"
    assert behind.get("f") == content
    assert not [path for path in behind.paths() if "probe" in path]
    await fresh.close()


async def test_nothing_is_sent_to_a_bucket_that_is_another_endpoints(at, here, monkeypatch):
    storage, _, behind = at
    monkeypatch.setattr("replica.storage.s3_home.SEEN_SECONDS", 0.0)
    _, expected = await file(here, 1000)
    await storage.digests()
    behind.put(".replica/endpoint", b'{"endpoint": "OTHER"}')
    before = behind.paths()
    error = await refusal(Unreachable, lambda: copy_file(here, "f", storage, "f", tag="t1", expected=expected))
    assert "OTHER" in error.message
    assert behind.paths() == before


async def pieces(content: bytes):
    yield content
