"""S3 through a proxy that breaks things, as real servers and networks do."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web
from crc32c import crc32c
from yarl import URL

from replica.storage import s3_multipart
from replica.storage.base import part_path
from replica.storage.conformance import listed, pattern, read_all, refusal, write
from replica.storage.copy import copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.memory import MemoryStorage, forget
from replica.storage.registry import open_storage
from replica.storage.s3_wire import Answer, Server, Wire
from rules.errors import (
    Busy,
    ChecksumDiffers,
    Forbidden,
    NoSpace,
    Permanent,
    SourceChanged,
    StorageError,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)
from tests.replica.storage.test_s3 import Place
from tests.servers_s3 import SETTINGS, Moto

Fault = Callable[["Passing"], Awaitable[web.StreamResponse | None]]


class Passing:
    """One request on its way to the server."""

    def __init__(self, request: web.Request, body: bytes, session: aiohttp.ClientSession, server: str) -> None:
        self.request, self.body, self._session, self._server = request, body, session, server

    async def forward(self) -> web.Response:
        async with self._session.request(
            self.request.method,
            URL(self._server + self.request.raw_path, encoded=True),
            headers={k: v for k, v in self.request.headers.items() if k != "Content-Length"},
            data=self.body or None,
        ) as answer:
            body = await answer.read()
            headers = {k: v for k, v in answer.headers.items() if k not in ("Content-Length", "Connection", "Date")}
            if self.request.method == "HEAD":
                headers["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, headers=headers, body=body)

    def reset(self) -> None:
        assert self.request.transport is not None
        self.request.transport.abort()


class Proxy:
    def __init__(self, server: str) -> None:
        self.server, self.url, self.fault = server, "", None
        self.seen: list[str] = []

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        self._runner = web.AppRunner(web.Application(client_max_size=1 << 30), handler_cancellation=True)
        self._runner.app.router.add_route("*", "/{any:.*}", self._handle)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        passing = Passing(request, await request.read(), self._session, self.server)
        self.seen.append(f"{request.method} {request.raw_path}")
        broken = await self.fault(passing) if self.fault is not None else None
        return broken or await passing.forward()

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()


@pytest.fixture(scope="module")
def moto():
    server = Moto()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
async def broken(moto):
    """A storage behind a proxy; the proxy; and what is really in the bucket."""
    place, proxy = Place(moto), Proxy(moto.endpoint)
    await proxy.start()
    url = f"s3+http://{proxy.url}/{place.bucket}"
    storage = open_storage(url, name="store", credentials=Credentials({url: SETTINGS}))
    await storage.prepare()
    yield storage, proxy, place.behind
    await storage.close()
    await proxy.stop()


def error_document(status: int, code: str, **headers: str) -> web.Response:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    return web.Response(status=status, text=body, headers=headers, content_type="application/xml")


async def test_a_truncated_answer_is_an_error_and_no_short_file(broken):
    storage, proxy, behind = broken
    behind.put("f", pattern(3_000_000))

    async def cut(passing):
        if passing.request.method != "GET" or "/f" not in passing.request.path:
            return None
        whole = await passing.forward()
        response = web.StreamResponse(headers={"Content-Length": str(len(whole.body))})
        await response.prepare(passing.request)
        await response.write(whole.body[:1_000_000])
        passing.reset()
        return response

    async def shorter(passing):
        """Worse: a whole answer of a part of the file, which only its range betrays."""
        answer = await passing.forward()
        if passing.request.method == "GET" and "/f" in passing.request.path:
            answer.body = answer.body[:-7]
        return answer

    proxy.fault = cut
    await refusal(Transient, lambda: read_all(storage, "f"))
    await refusal(Transient, lambda: measure(storage, "f"))
    proxy.fault = shorter
    await refusal(Transient, lambda: read_all(storage, "f", 0, 2_000_000))
    await refusal(SourceChanged, lambda: measure(storage, "f"))


async def test_a_server_that_ignores_ranges_is_read_rightly(broken):
    storage, proxy, behind = broken
    content = pattern(2_000_000)
    behind.put("f", content)

    async def no_ranges(passing):
        passing.request = passing.request.clone(
            headers={k: v for k, v in passing.request.headers.items() if k != "Range"}
        )
        return await passing.forward()

    proxy.fault = no_ranges
    assert await read_all(storage, "f", 1_500_000, 7) == content[1_500_000:1_500_007]
    assert await read_all(storage, "f", 1_999_999) == content[-1:]


async def test_slow_down_is_busy_and_says_when_to_come_again(broken):
    storage, proxy, _ = broken

    async def slow(passing):
        return error_document(503, "SlowDown", **{"Retry-After": "7"})

    proxy.fault = slow
    for verb in (lambda: storage.stat("f"), lambda: listed(storage), lambda: write(storage, part_path("t"), b"x")):
        assert (await refusal(Busy, verb)).retry_after_seconds == 7


@pytest.mark.parametrize("how", ["reset", "slow down"])
async def test_a_part_that_broke_is_sent_again_and_the_others_are_not(broken, monkeypatch, how):
    storage, proxy, behind = broken
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_multipart, "_WAIT_SECONDS", 0.0)
    content, left = pattern((5 << 20) * 2 + 9), [2]

    async def second_part(passing):
        if "partNumber=2" not in passing.request.raw_path or not left[0]:
            return None
        left[0] -= 1
        if how == "slow down":
            return error_document(503, "SlowDown", **{"Retry-After": "0"})
        passing.reset()
        return web.Response()

    proxy.fault, proxy.seen = second_part, []
    await write(storage, part_path("t"), content)
    assert behind.get(part_path("t")) == content
    parts = [line.partition("partNumber=")[2][:1] for line in proxy.seen if "partNumber" in line]
    assert sorted(parts) == ["1", "2", "2", "2", "3"]


async def test_a_part_that_never_arrives_fails_the_write_and_aborts_the_upload(broken, monkeypatch):
    storage, proxy, behind = broken
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_multipart, "_WAIT_SECONDS", 0.0)

    async def never(passing):
        return error_document(500, "InternalError") if "partNumber=2" in passing.request.raw_path else None

    proxy.fault = never
    await refusal(Transient, lambda: write(storage, part_path("t"), pattern((5 << 20) * 2)))
    assert behind.uploads() == []
    assert behind.get(part_path("t")) is None


async def test_a_wrong_size_told_by_head_is_found_before_anything_is_published(broken):
    storage, proxy, behind = broken
    ours = await _memory(content := pattern(50_000))

    async def wrong(passing):
        answer = await passing.forward()
        if passing.request.method == "HEAD" and answer.status == 200:
            answer.headers["Content-Length"] = str(len(content) - 1)
        return answer

    behind.put("f", content)
    proxy.fault = wrong
    with pytest.raises((SourceChanged, Transient, Permanent)):
        await copy_file(storage, "f", ours, "copy", tag="t1")
    with pytest.raises(StorageError):
        await ours.stat("copy")
    # As a target: the copy that the server made is looked at, and its size told is not that of the temporary …
    told = [len(content) - 1]

    async def another(passing):
        answer = await passing.forward()
        if passing.request.method == "HEAD" and answer.status == 200:
            answer.headers["Content-Length"] = str(told.pop() if told else len(content))
        return answer

    await write(storage, part_path("t2"), content)
    proxy.fault = another
    await refusal(ChecksumDiffers, lambda: storage.publish(part_path("t2"), "g"))
    forget("s3-faults")


@pytest.mark.parametrize("stage", ["complete", "delete"])
async def test_a_copy_whose_answer_was_lost_is_known_by_its_mark(broken, stage):
    storage, proxy, behind = broken
    await write(storage, part_path("t"), b"content")
    left = [1]

    async def lose(passing):
        request = passing.request
        if left[0] and (request.method, "uploadId" in request.raw_path) == (
            ("POST", True) if stage == "complete" else ("DELETE", False)
        ):
            left[0] = 0
            await passing.forward()
            passing.reset()
            return web.Response()
        return None

    proxy.fault = lose
    await storage.publish(part_path("t"), "f")
    assert behind.get("f") == b"content"
    assert behind.uploads() == []


async def test_a_copy_that_never_happened_is_told(broken):
    storage, proxy, behind = broken
    await write(storage, part_path("t"), b"content")

    async def never(passing):
        """200 and white space while it worked, then an error: as Amazon's servers answer a long copy."""
        long = passing.request.method == "POST" and "uploadId" in passing.request.raw_path
        return error_document(200, "InternalError") if long else None

    proxy.fault = never
    await refusal(Transient, lambda: storage.publish(part_path("t"), "f"))
    assert behind.get("f") is None
    proxy.fault = None
    behind.put("f", b"theirs")
    await refusal(TargetExists, lambda: storage.publish(part_path("t"), "f"))
    assert behind.get("f") == b"theirs"


async def test_a_listing_that_cannot_be_continued_is_no_short_one(broken):
    storage, proxy, behind = broken
    behind.put("f", b"x")

    async def cut_off(passing):
        answer = await passing.forward()
        answer.body = answer.body.replace(b"<IsTruncated>false", b"<IsTruncated>true")
        return answer

    proxy.fault = cut_off
    await refusal(Transient, lambda: listed(storage))


async def test_a_digest_is_believed_only_where_a_wrong_one_is_refused(moto):
    """moto repeats whatever CRC32C it was sent; behind this proxy it is checked, as by Amazon."""
    place, proxy = Place(moto), Proxy(moto.endpoint)
    await proxy.start()

    async def checking(passing):
        told = passing.request.headers.get("x-amz-checksum-crc32c")
        if told is None:
            return None
        if passing.request.method == "POST":
            return error_document(400, "BadDigest") if told == "AAAAAA==" else None
        right = base64.b64encode(crc32c(passing.body).to_bytes(4)).decode()
        return None if told == right else error_document(400, "BadDigest")

    proxy.fault = checking
    url = f"s3+http://{proxy.url}/{place.bucket}"
    storage = open_storage(url, name="store", credentials=Credentials({url: SETTINGS}))
    await storage.prepare()
    assert await storage.digests() == ("crc32c",)
    for size in (1000, (16 << 20) * 2 + 1):
        ours = await _memory(content := pattern(size))
        copied = await copy_file(ours, "f", storage, f"f{size}", tag="t1")
        assert copied.verified_by == "digest crc32c"
        assert place.behind.get(f"f{size}") == content
        forget("s3-faults")
    assert await storage.checksum("f1000", "crc32c") is None  # of a published file: a record, no proof
    await storage.close()
    await proxy.stop()


@pytest.mark.parametrize(
    ("status", "code", "kind", "hint"),
    [
        (503, "SlowDown", Busy, ""),
        (429, "", Busy, ""),
        (403, "AccessDenied", Forbidden, "right"),
        (403, "SignatureDoesNotMatch", Forbidden, "secret_access_key"),
        (403, "ExpiredToken", Forbidden, "session_token"),
        (403, "RequestTimeTooSkewed", Transient, "clock"),
        (403, "QuotaExceeded", NoSpace, "quota"),
        (403, "InvalidObjectState", Permanent, "restore"),
        (404, "NoSuchBucket", Unreachable, "bucket"),
        (404, "NoSuchUpload", Transient, "aborted"),
        (301, "PermanentRedirect", Permanent, "region"),
        (400, "BadDigest", Transient, "damaged"),
        (400, "SomethingNew", Permanent, ""),
        (500, "InternalError", Transient, ""),
        (504, "", TimedOut, ""),
        (507, "", NoSpace, "space"),
        (599, "", Transient, ""),
    ],
)
def test_each_refusal_is_the_one_it_means(status, code, kind, hint):
    wire = Wire(Server("https", "h", "h", "/b", "b", "r", False), {}, name="store")
    error = wire.refusal(Answer(status, {}, code=code), "a/b")
    assert type(error) is kind
    assert hint in error.hint
    assert (error.endpoint, error.path) == ("store", "a/b")
    assert (code or str(status)) in error.message


async def test_a_server_that_is_silent_is_waited_for_no_longer_than_said(broken, monkeypatch):
    storage, proxy, _ = broken
    hold = asyncio.Event()

    async def silent(passing):
        await hold.wait()
        return web.Response()

    proxy.fault = silent
    monkeypatch.setattr("replica.storage.s3_wire._QUIET_SECONDS", 0.05)
    await refusal(TimedOut, lambda: read_all(storage, "f"))
    hold.set()
    proxy.fault = None
    await proxy.stop()
    await refusal(Unreachable, lambda: storage.stat("f"))
    await proxy.start()


async def _memory(content: bytes) -> MemoryStorage:
    ours = MemoryStorage("s3-faults")
    await ours.prepare()
    await write(ours, part_path("t"), content)
    await ours.publish(part_path("t"), "f")
    return ours
