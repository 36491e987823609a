"""What a fault on the way taught us, each by itself; tests/scenarios/faults_in_flight.py looks for the next one."""

from __future__ import annotations

import asyncio
import time

import pytest

from replica.storage.adoption import adopt
from replica.storage.base import Stat, part_path
from replica.storage.credentials import Credentials
from replica.storage.hashing import Hasher
from replica.storage.http_body import Body, Paced
from replica.storage.http_session import Http, Timeouts
from replica.storage.judging import Expected
from replica.storage.memory import MemoryStorage
from replica.storage.multistatus import Multistatus, NotMultistatus
from replica.storage.registry import open_storage
from rules.errors import Invalid, TimedOut, Transient
from tests import fault_proxy
from tests.fault_proxy import Fault, FaultProxy

CONTENT = b"the bytes that should be there"


@pytest.fixture
async def memory():
    storage = MemoryStorage("faults", name="M")
    await storage.prepare()

    async def pieces():
        yield CONTENT

    await storage.write(part_path("t1"), pieces())
    await storage.publish(part_path("t1"), "f")
    yield storage
    await storage.delete("f")


def expected(content: bytes) -> Expected:
    hasher = Hasher()
    hasher.update(content)
    return Expected(len(content), hasher.checksums())


@pytest.mark.parametrize("lie", ["bytes", "size"])
async def test_a_good_file_is_not_put_aside_for_what_was_told_of_it_once(memory, monkeypatch, lie):
    stat, read, lies = memory.stat, memory.read, [True]

    async def lying_stat(path):
        found = await stat(path)
        if lie == "size" and lies and lies.pop():
            return Stat(found.size_bytes + 1, found.mtime_ns, found.etag)
        return found

    async def lying_read(path, offset=0, length=None):
        async for piece in read(path, offset, length):
            yield b"#" + bytes(piece[1:]) if lie == "bytes" and lies and lies.pop() else piece

    monkeypatch.setattr(memory, "stat", lying_stat)
    monkeypatch.setattr(memory, "read", lying_read)
    adopted = await adopt(memory, "f", expected(CONTENT))
    assert adopted is not None and adopted.adopted
    assert (await stat("f")).size_bytes == len(CONTENT)


async def test_a_file_that_reads_differently_each_time_is_left_where_it_is(memory, monkeypatch):
    read, count = memory.read, iter(range(100))

    async def lying_read(path, offset=0, length=None):
        async for piece in read(path, offset, length):
            yield bytes([next(count)]) + bytes(piece[1:])

    monkeypatch.setattr(memory, "read", lying_read)
    with pytest.raises(Transient, match="differently") as refused:
        await adopt(memory, "f", expected(CONTENT))
    assert refused.value.side == "target"
    assert (await memory.stat("f")).size_bytes == len(CONTENT)


def test_an_encoding_that_nobody_knows_is_an_answer_that_cannot_be_read():
    with pytest.raises(NotMultistatus):
        Multistatus().feed(b'<?xml version="1.0" encoding="UTG-8"?><D:multistatus xmlns:D="DAV:"/>')


async def test_an_answer_that_drips_is_given_up_and_one_that_waits_for_its_reader_is_not():
    async def dripping():
        while True:
            await asyncio.sleep(0.01)
            yield b"x"

    with pytest.raises(TimeoutError):
        async for _ in Paced(dripping(), 0.05):
            pass

    async def at_once():
        for _ in range(5):
            yield b"x"

    async for _ in Paced(at_once(), 0.02):
        await asyncio.sleep(0.01)


async def test_a_server_that_answers_before_it_has_the_body_leaves_the_source_alone():
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await reader.read(1)
        writer.write(b"HTTP/1.1 502 Bad\r\nContent-Length: 0\r\n\r\n")

    ended = asyncio.Event()

    async def chunks():
        try:
            yield b"x" * 2_000_000
            await asyncio.sleep(3600)
        finally:
            ended.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = Http(f"http://127.0.0.1:{port}/", {}, timeouts=Timeouts(between=5))
    source = chunks()
    async with http.request("PUT", f"http://127.0.0.1:{port}/f", "f", body=Body(source, 4_000_000)) as response:
        assert response.status == 502
    await source.aclose()  # raises if somebody is still in it
    assert ended.is_set()
    await http.close()
    server.close()


async def test_an_xrootd_server_that_stops_in_the_middle_of_an_answer_costs_a_bounded_time(xrootd):
    framed = (fault_proxy.xrootd_requests, fault_proxy.xrootd_answers)
    async with FaultProxy(xrootd.port, http=False, framed=framed) as proxy:
        url = f"root://127.0.0.1:{proxy.port}//data"
        storage = open_storage(url, name="GRID", credentials=Credentials({url: {"quiet_seconds": "1"}}))
        await storage.prepare()
        content = b"bytes" * 100_000
        xrootd.put("data/f", content)
        await storage.stat("f")
        proxy.arm(Fault("down_hang", at=100_000))
        began = time.monotonic()
        with pytest.raises(TimedOut):
            async for _ in storage.read("f"):
                pass
        assert time.monotonic() - began < 20
        # The connection is as stuck as it was; nobody has cut it.
        assert b"".join([bytes(piece) async for piece in storage.read("f")]) == content


async def test_a_page_of_a_proxy_is_no_publication(apache):
    (apache.data / "page").mkdir()
    apache.give_away(apache.data / "page")
    async with FaultProxy(apache.port) as proxy:
        storage = open_storage(f"http://127.0.0.1:{proxy.port}/page", name="DAV")
        await storage.prepare()
        await _written(storage, part_path("t1"), CONTENT)
        # First the name is claimed, then it is given; where no claims are needed, it is given at once.
        proxy.arm(Fault("page", method=b"MOVE"))
        await storage.publish(part_path("t1"), "f")
        assert (apache.data / "page/f").read_bytes() == CONTENT
        await _written(storage, part_path("t2"), CONTENT)
        storage._claims = None  # as with `atomic_move`
        proxy.arm(Fault("page", method=b"MOVE"))
        await storage.publish(part_path("t2"), "g")
        assert (apache.data / "page/g").read_bytes() == CONTENT
        await storage.close()


async def _written(storage, part, content):
    async def pieces():
        yield content

    await storage.write(part, pieces(), size_bytes=len(content))


def test_how_long_a_server_may_be_silent_is_a_setting():
    assert Timeouts.of({}) == Timeouts()
    assert Timeouts.of({"quiet_seconds": "300"}).between == 300
    assert Timeouts.of({"digest_seconds": "7200"}).digest == 7200
    for wrong in ("0", "-1", "soon", "nan", "inf"):
        with pytest.raises(Invalid):
            Timeouts.of({"quiet_seconds": wrong})
