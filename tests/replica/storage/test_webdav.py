"""WebDAV servers that misbehave: whatever they send, no wrong byte is taken for content, and no secret leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from replica.storage import http_bulk, http_ranges
from replica.storage.base import part_path
from replica.storage.conformance import listed, read_all, refusal, write
from replica.storage.copy import Expected, copy_file
from replica.storage.digests import digests
from replica.storage.hashing import Hasher
from replica.storage.http_faults import refused, seconds_of
from replica.storage.http_quick import Quick
from replica.storage.http_session import Http, Timeouts
from replica.storage.memory import MemoryStorage, behind, forget
from replica.storage.multistatus import Multistatus, NotMultistatus
from replica.storage.webdav import WebdavStorage
from rules.errors import (
    Busy,
    ChecksumDiffers,
    Forbidden,
    NoSpace,
    SourceChanged,
    SourceMissing,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)
from tests.replica.storage.places import open_descriptors

TOKEN = "very-secret-token"
CONTENT = bytes(range(256)) * 1024
_QUICK = Timeouts(connect=2, first_byte=1, between=0.2, digest=1, expect=0.5)


@asynccontextmanager
async def serving(answer, *, settings=None):
    """A storage at a server that answers by `answer(request)`; None: as a good server with one file, CONTENT."""
    seen = []

    async def handle(request):
        seen.append(request)
        given = await answer(request)
        return given if given is not None else await _good(request)

    runner = web.AppRunner(_application(handle), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    storage = WebdavStorage(
        f"http://127.0.0.1:{port}/d", name="dav", settings={"token": TOKEN, **(settings or {})}, timeouts=_QUICK
    )
    storage.seen = seen
    try:
        yield storage
    finally:
        await storage.http.close()
        await runner.cleanup()


def _application(handle):
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", handle)
    return application


async def _good(request):
    if request.path == "/d/.replica/endpoint":
        return web.Response(body=json.dumps({"endpoint": "dav"}).encode())
    if request.method == "PROPFIND":
        return _listing(request.path) if request.path == "/d/f" else web.Response(status=404)
    if request.method == "PUT":
        await request.read()
        return web.Response(status=201)
    if request.method in ("GET", "HEAD"):
        return _part(CONTENT)
    return web.Response(status=204 if request.method == "DELETE" else 201)


def _part(body, *, content_range=None, **more):
    told = content_range or f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"
    return web.Response(status=206, body=body, headers={"Content-Range": told, **more})


def _listing(*hrefs):
    size = len(CONTENT)
    each = "".join(
        f"<D:response><D:href>{h}</D:href><D:propstat><D:prop><D:getcontentlength>{size}</D:getcontentlength>"
        f"<D:resourcetype/></D:prop><D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
        for h in hrefs
    )
    text = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{each}</D:multistatus>'
    return web.Response(status=207, text=text, content_type="application/xml")


def on_get(make):
    async def answer(request):
        if request.method == "GET" and request.path == "/d/f":
            made = make(request)
            return await made if asyncio.iscoroutine(made) else made
        return None

    return answer


def raw(head, body, *, then="reset", pause=0.0, times=1):
    """Written to the connection as it is."""

    async def send(request):
        transport = request.transport
        transport.write(head)
        for _ in range(times):
            transport.write(body)
            await asyncio.sleep(pause)
        if then == "reset":
            transport.abort()
        elif then == "close":
            transport.close()
        else:
            await asyncio.sleep(5)
        return web.Response()

    return send


_HEAD = (
    f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(CONTENT)}\r\n"
    f"Content-Range: bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}\r\n\r\n"
).encode()


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (raw(_HEAD, CONTENT[:1000], then="close"), Transient),
        (raw(_HEAD, CONTENT[:1000], then="reset"), Transient),
        (raw(_HEAD, CONTENT[:1000], then="hang"), TimedOut),
        (raw(_HEAD, b"x", pause=0.05, times=30), TimedOut),
        (raw(_HEAD.replace(b"Content-Length", b"X-Length"), CONTENT + b"tail", then="close"), Transient),
        (raw(b"nonsense\r\n\r\n", b"", then="close"), Transient),
        (lambda _: _part(CONTENT, content_range=f"bytes 1-{len(CONTENT)}/{len(CONTENT) + 1}"), Transient),
        (lambda _: _part(CONTENT, content_range=f"bytes 0-{len(CONTENT) - 1}/*"), Transient),
        (lambda _: _part(CONTENT[:-1]), Transient),
        (lambda _: _part(CONTENT[:-1], content_range=f"bytes 0-{len(CONTENT) - 2}/{len(CONTENT)}"), Transient),
        (lambda _: _part(CONTENT, **{"Content-Encoding": "br"}), Transient),
        (lambda _: web.Response(text="<html>please log in", content_type="text/html"), Transient),
        (lambda _: web.Response(status=200, body=CONTENT), Transient),
        (lambda _: web.Response(status=500, text="boom"), Transient),
        (lambda _: web.Response(status=403), Forbidden),
        (lambda _: web.Response(status=404), SourceMissing),
        (lambda _: web.Response(status=500, text=f"token {TOKEN} no space left on device"), NoSpace),
    ],
)
@pytest.mark.parametrize("way", ["aiohttp", "bulk", "quick"])
async def test_a_wrong_answer_is_an_error_and_never_content(make, error, way, monkeypatch):
    """By aiohttp; taken from the socket, as large ones are; past aiohttp, as small ones are."""
    monkeypatch.setattr(http_bulk, "BULK_BYTES", 1 if way == "bulk" else 1 << 30)
    async with serving(on_get(make)) as storage:
        if way == "quick":
            storage.believed("f", len(CONTENT))
            # A small answer has one limit of time for all of it; a server that drips may give up first.
            error = (TimedOut, Transient) if error is TimedOut else error
        failed = await refusal(error, lambda: read_all(storage, "f"))
        assert TOKEN not in failed.message + failed.hint
        assert failed.endpoint == "dav"
        assert failed.path == "f"


async def test_a_good_answer_is_content(monkeypatch):
    async with serving(on_get(lambda _: None)) as storage:
        assert await read_all(storage, "f") == CONTENT
        monkeypatch.setattr(http_bulk, "BULK_BYTES", 1)
        monkeypatch.setattr(http_bulk, "_PIECE_BYTES", 1000)
        assert await read_all(storage, "f") == CONTENT
        storage.believed("f", len(CONTENT))
        assert await read_all(storage, "f") == CONTENT


_OK = b"HTTP/1.1 200 OK\r\nServer: x\r\n"
_SMUGGLED = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nDigest: adler32=666\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "status", "stays"),
    [
        (_OK + b"Content-Length: 5\r\n\r\nhello", 200, True),
        (_OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 200, True),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + _OK + b"Content-Length: 5\r\n\r\nhello", 200, True),
        (_OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello", 200, False),
        (_OK + b"\r\nhello", 200, False),  # up to the end of the connection
        (_OK + b"Content-Length: 5\r\n\r\nhello" + _SMUGGLED, 200, False),
        (_OK + b"Content-Length: 5\r\n\r\nhel", None, False),
        (_OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!", None, False),
        (_OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", None, False),
        (_OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel", None, False),
        (_OK + b"X: " + b"x" * 100_000 + b"\r\n\r\n", None, False),
        (_OK + b"Content-Length: 99000000\r\n\r\n" + bytes(9_000_000), None, False),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", None, False),
        (b"SSH-2.0-OpenSSH\r\n", None, False),
        (b"", None, False),
    ],
)
async def test_a_small_answer_is_read_exactly_or_not_at_all(answer, status, stays):
    """… and nothing that is left over on a connection answers the next question."""
    served = []

    async def serve(reader, writer):
        with contextlib.suppress(OSError):
            while await reader.readuntil(b"\r\n\r\n"):
                served.append(writer)
                writer.write(answer)
                await writer.drain()
                if not stays:
                    writer.write_eof()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    quick = Quick(base, True, idle_seconds=4)
    used = SimpleNamespace(reused=False)
    for number in range(2):
        if status is None:
            with pytest.raises(aiohttp.ClientError):
                await quick.ask("GET", f"{base}/f", {}, None, used)
        else:
            got = await quick.ask("GET", f"{base}/f", {}, None, used)
            assert (got.status, await got.read()) == (status, b"hello")
            assert "Digest" not in got.headers
        assert used.reused is (stays and number == 1)
    assert len(set(served)) == (1 if stays else 2)
    quick.close()
    server.close()


async def test_a_connection_is_closed_when_its_answer_came_too_late():
    """Who was cancelled at the moment of the answer has no use for it, and nobody else has the connection."""
    accepted, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        accepted.set()
        await reader.read()
        closed.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    quick, made = Quick(base, True, idle_seconds=4), []
    connect = quick._connect

    async def noted():
        made.append(await connect())
        return made[0]

    quick._connect = noted
    asking = asyncio.create_task(quick.ask("GET", f"{base}/f", {}, None, SimpleNamespace()))
    await accepted.wait()
    made[0].data_received(_OK + b"Content-Length: 5\r\n\r\nhello")
    asking.cancel()
    await asyncio.wait([asking])
    assert asking.cancelled()
    await asyncio.wait_for(closed.wait(), 5)
    server.close()


async def test_a_header_of_ours_holds_no_line_break():
    quick = Quick("http://127.0.0.1:9", True, idle_seconds=4)
    for headers, path in (({"X": "a\r\nY: b"}, "/f"), ({"X\n": "a"}, "/f"), ({}, "/f HTTP/1.1\r\nX: y")):
        with pytest.raises(ValueError, match="line break"):
            await quick.ask("GET", f"http://127.0.0.1:9{path}", headers, None, SimpleNamespace())


async def test_a_large_answer_that_nobody_wants_any_more_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(http_bulk, "BULK_BYTES", 1)
    monkeypatch.setattr(http_bulk, "_PIECE_BYTES", 1000)
    before = open_descriptors()
    async with serving(on_get(raw(_HEAD, CONTENT[:5000], then="hang"))) as storage:
        pieces = storage.read("f")
        assert len(await anext(pieces)) > 0
        await pieces.aclose()
        reading = asyncio.create_task(read_all(storage, "f"))
        await asyncio.sleep(0.05)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert open_descriptors() <= before


async def test_a_large_file_is_read_in_ranges_of_one_and_the_same_file(monkeypatch):
    """XRootD announces a range of 2 GiB with no bytes at all, and sends it into the answer to the next question."""
    monkeypatch.setattr(http_ranges, "SPAN_BYTES", 100_000)
    changes = {}

    def part(request):
        first, last = (int(n) for n in request.headers["Range"].removeprefix("bytes=").split("-"))
        total = len(CONTENT) + (1 if first and changes.get("size") else 0)
        etag = '"two"' if first and changes.get("etag") else '"one"'
        if changes.get("young") and not first:
            etag = f"W/{etag}"  # Apache, of a file that was written within the last second
        told = f"bytes {first}-{last}/{total}"
        return _part(CONTENT[first : last + 1], content_range=told, ETag=etag)

    async with serving(on_get(part)) as storage:
        storage.believed("f", len(CONTENT))
        assert await read_all(storage, "f") == CONTENT
        asked = [r.headers["Range"] for r in storage.seen]
        assert asked == ["bytes=0-99999", "bytes=100000-199999", "bytes=200000-262143"]
        assert await read_all(storage, "f", 50_000, 120_000) == CONTENT[50_000:170_000]
        changes["young"] = True
        assert await read_all(storage, "f") == CONTENT
        for what in ("size", "etag"):
            changes[what] = True
            await refusal(SourceChanged, lambda: read_all(storage, "f"))
            changes.clear()


async def test_busy_tells_when_to_come_back():
    for status in (429, 503):
        later = on_get(lambda _, s=status: web.Response(status=s, headers={"Retry-After": "17"}))
        async with serving(later) as storage:
            assert (await refusal(Busy, lambda: read_all(storage, "f"))).retry_after_seconds == 17
    assert seconds_of("Thu, 01 Jan 1970 00:00:00 GMT") in (None, 0.0)
    assert seconds_of("soon") is None


def test_a_status_has_one_meaning():
    for status, kind in ((401, Forbidden), (404, SourceMissing), (412, TargetExists), (423, Busy), (507, NoSpace)):
        assert type(refused(status, "GET", endpoint="e", path="p")) is kind
    assert type(refused(599, "GET", endpoint="e", path="p")) is Transient


# ── redirects and secrets ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/data/%2e%2e/secret", "/data/../secret", "/data/x/.%2E/../..", "/database", "/dat"])
def test_no_secret_goes_beside_the_storages_folder_however_it_is_spelled(path: str):
    http = Http("davs://se.example.org/data", {"token": "canary"}, name="X")
    assert http.is_own("https://SE.example.org:443/data/a%2520..b/..c")
    assert not http.is_own(f"https://se.example.org{path}")
    assert http._authorization(f"https://se.example.org{path}", "x") == {}


async def test_a_redirect_is_followed_only_to_hosts_that_were_named_and_no_secret_goes_along():
    elsewhere = []

    async def other(request):
        elsewhere.append(request)
        return _part(CONTENT)

    async with serving(other) as there:
        place = there.http.base.removesuffix("/d")

        def send_away(_):
            return web.Response(status=307, headers={"Location": f"{place}/pool/f?authz=theirs"})

        async with serving(on_get(send_away)) as storage:
            failed = await refusal(Forbidden, lambda: read_all(storage, "f"))
            assert "redirects" in failed.hint
            assert "theirs" not in failed.message
            assert elsewhere == []
        host = place.removeprefix("http://")
        async with serving(on_get(send_away), settings={"redirects": f"other.example {host}"}) as storage:
            assert await read_all(storage, "f") == CONTENT
            assert storage.seen[0].headers["Authorization"] == f"Bearer {TOKEN}"
        assert "Authorization" not in elsewhere[0].headers


async def test_a_secret_stays_beneath_its_folder():
    async def answer(request):
        if request.path == "/d/f":
            return web.Response(status=302, headers={"Location": "/login"})
        return web.Response(text="who are you?")

    async with serving(answer) as storage:
        await refusal(Transient, lambda: read_all(storage, "f"))
        assert "Authorization" not in storage.seen[1].headers
    for hostile in ("ftp://127.0.0.1/f", "http://user:pw@127.0.0.1/f", "/d/f", "http://127.0.0.1:99999/f"):
        loops = on_get(lambda _, to=hostile: web.Response(status=302, headers={"Location": to}))
        async with serving(loops) as storage:
            await refusal((Forbidden, Transient), lambda: read_all(storage, "f"))


async def test_plain_http_to_another_machine_is_refused_before_anything_is_sent():
    storage = WebdavStorage("http://192.0.2.1/d", name="far", settings={"token": TOKEN})
    failed = await refusal(Forbidden, lambda: storage.stat("f"))
    assert "insecure" in failed.hint
    await storage.close()


async def test_a_server_that_does_not_answer_is_unreachable():
    storage = WebdavStorage("http://127.0.0.1:9/d", name="off", timeouts=_QUICK)
    assert (await refusal(Unreachable, lambda: storage.stat("f"))).hint
    assert (await refusal(Unreachable, lambda: write(storage, part_path("t"), b"x"))).hint
    await storage.close()


async def test_another_endpoints_disk_is_not_ours():
    async def answer(request):
        return web.Response(text='{"endpoint": "other"}') if request.path.endswith("/endpoint") else None

    async with serving(answer) as storage:
        assert "other" in (await refusal(Unreachable, lambda: listed(storage))).message


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _pieces(*pieces):
    for piece in pieces:
        yield piece


@pytest.mark.parametrize("size", [1000, 3 << 20])
async def test_a_body_of_another_length_than_promised_is_never_complete(size):
    complete = []

    async def answer(request):
        if request.method == "PUT" and "probe" not in request.path:
            assert request.headers["Content-Length"] == str(size)
            complete.append(len(await request.read()))
        return None

    async with serving(answer) as storage:
        for sent in (size - 1, size + 1):
            failed = await refusal(
                SourceChanged, lambda n=sent: storage.write(part_path("t"), _pieces(bytes(n)), size_bytes=size)
            )
            assert failed.side == "source"
        assert complete == []
        await storage.write(part_path("t"), _pieces(*[bytes(100)] * (size // 100), bytes(size % 100)), size_bytes=size)
        assert complete == [size]


async def test_a_full_server_says_so_before_the_body_is_sent():
    asked = []

    async def chunks():
        asked.append(1)
        yield bytes(2 << 20)

    async def answer(request):
        full = request.method == "PUT" and "probe" not in request.path
        return web.Response(status=507) if full else None

    async with serving(answer) as storage:
        storage.http.continues = True
        await refusal(NoSpace, lambda: storage.write(part_path("t"), chunks(), size_bytes=2 << 20))


async def test_a_digest_that_differs_fails_the_copy_and_is_not_asked_for_while_writing():
    async def answer(request):
        if request.method == "HEAD":
            return web.Response(headers={"Digest": "UNIXcksum=1, adler32=12345"})
        return None

    store = MemoryStorage("webdav-digest", name="ram")
    await store.prepare()
    behind("webdav-digest").put("f", CONTENT)
    async with serving(answer) as storage:
        failed = await refusal(ChecksumDiffers, lambda: copy_file(store, "f", storage, "g", tag="t1"))
        assert failed.side == "target"
        assert not any(request.method == "MOVE" for request in storage.seen)
        storage._writing.add(part_path("t9"))
        assert await storage.checksum(part_path("t9"), "adler32") is None
    forget("webdav-digest")


def test_digests_are_read_in_every_spelling():
    md5 = {"md5": "5d41402abc4b2a76b9719d911017c592"}
    assert digests("adler32=62c0215", "") == {"adler32": "062c0215"}
    assert digests("ADLER32=062C0215,md5=XUFAKrxLKna5cZ2REBfFkg==", "") == {"adler32": "062c0215"} | md5
    assert digests("md5=5d41402abc4b2a76b9719d911017c592", "") == md5
    assert digests("crc32c=mnG8TA==", "") == {"crc32c": "9a71bc4c"} == digests("crc32c=9a71bc4c", "")
    assert digests("", "adler=:BiwCFQ==:, unknown=:AAAA:") == {"adler32": "062c0215"}
    assert digests("sha-512=abc, crc32c=71bc4c, md5=, adler32=xyz, =, nonsense", "") == {}
    assert digests("adler32=1", "adler=:BiwCFQ==:") == {}


# ── listings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "href",
    [
        "/etc/passwd",
        "/d/../x",
        "/d/a/b",
        "/d/%2e%2e",
        "http://elsewhere.example/d/f",
        "/dd/f",
        "//elsewhere.example/d/f",
    ],
)
async def test_a_listing_that_leaves_the_folder_is_refused(href):
    async def answer(request):
        return _listing("/d/", href) if request.method == "PROPFIND" else None

    async with serving(answer) as storage:
        await refusal(Forbidden, lambda: listed(storage))


async def test_hrefs_are_understood_in_every_form():
    async def answer(request):
        if request.method == "PROPFIND" and request.headers["Depth"] == "1":
            host = request.headers["Host"]
            return _listing(
                "/d", "/d/a%20b", f"http://{host}/d/%C3%BC", "plain", "/d/a%0Ab", "/d/%FF", "/d/x%2Fy", "plain"
            )
        return _listing(request.raw_path) if request.method == "PROPFIND" else None

    async with serving(answer) as storage:
        found = await listed(storage)
        assert sorted(e.path for e in found if not e.problem) == ["a b", "plain", "ü"]
        assert sorted(e.path for e in found if e.problem) == ["\\xff", "a\\nb", "x%2Fy"]


@pytest.mark.parametrize(
    "text",
    [
        '<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa">]><multistatus xmlns="DAV:">&a;</multistatus>',
        '<multistatus xmlns="DAV:"><response><href>' + "a" * (2 << 20),
        '<multistatus xmlns="DAV:"><response><href>/d/f</href></response>',
        "<html><body>hello</body></html>",
        '<multistatus xmlns="DAV:">' + "<a>" * 100,
        "",
    ],
)
def test_a_hostile_document_is_refused(text):
    document = Multistatus()
    with pytest.raises(NotMultistatus):
        document.feed(text.encode())
        document.close()


# ── event loops ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_threads_with_loops_of_their_own_share_one_storage():
    async with serving(on_get(lambda _: None)) as storage:
        got = []

        def elsewhere():
            # The second time, the first loop is closed.
            got.extend(asyncio.run(read_all(storage, "f")) == CONTENT for _ in range(2))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        assert await read_all(storage, "f") == CONTENT
        await asyncio.to_thread(thread.join)
        assert got == [True, True]
        assert await read_all(storage, "f") == CONTENT


# ── real servers ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_publishers_of_different_processes_race_and_one_wins(apache, xrootd):
    """Eight storages that know nothing of each other: MOVE alone would let several win on both servers."""
    for number, url in enumerate((apache.url, xrootd.url_http)):
        storages = [WebdavStorage(f"{url}/race{number}", name="dav") for _ in range(8)]
        await storages[0].prepare()
        for n, storage in enumerate(storages):
            await write(storage, part_path(f"t{n}"), b"%d" % n)
        outcomes = await asyncio.gather(
            *(s.publish(part_path(f"t{n}"), "a/f") for n, s in enumerate(storages)), return_exceptions=True
        )
        winners = [n for n, outcome in enumerate(outcomes) if outcome is None]
        assert len(winners) == 1, outcomes
        assert all(isinstance(o, TargetExists) for o in outcomes if o is not None), outcomes
        assert await read_all(storages[0], "a/f") == b"%d" % winners[0]
        for storage in storages:
            await storage.close()


async def test_a_claim_whose_holder_died_is_broken(apache, monkeypatch):
    url = f"{apache.url}/claims"
    dead, alive = (WebdavStorage(url, name="dav") for _ in range(2))
    await dead.prepare()
    await write(alive, part_path("t1"), b"x")
    context = dead._claims.holding("f")
    await context.__aenter__()
    monkeypatch.setattr("replica.storage.webdav_claims._WAIT_SECONDS", 0.0)
    assert (await refusal(Busy, lambda: alive.publish(part_path("t1"), "f"))).retry_after_seconds
    monkeypatch.setattr("replica.storage.webdav_claims._STALE_SECONDS", 0.0)
    monkeypatch.setattr("replica.storage.webdav_claims._WAIT_SECONDS", 10.0)
    await alive.publish(part_path("t1"), "f")
    assert await read_all(alive, "f") == b"x"
    await context.__aexit__(None, None, None)
    for storage in (dead, alive):
        await storage.close()


async def test_a_small_file_takes_few_requests_and_a_server_that_replaces_is_looked_at_before(
    apache, rclone_server, xrootd, monkeypatch
):
    asked = []
    send = Http._send

    async def counted(self, method, *arguments):
        asked.append(method)
        return await send(self, method, *arguments)

    store = MemoryStorage("webdav-few", name="ram")
    await store.prepare()
    hasher = Hasher()
    hasher.update(CONTENT)
    expected = Expected(len(CONTENT), hasher.checksums())
    for url, looks, proof in (
        (apache.url, True, "GET"),
        (rclone_server.url, True, "GET"),
        (xrootd.url_http, False, "HEAD"),
    ):
        storage = WebdavStorage(f"{url}/few", name="dav")
        await storage.prepare()
        for number in range(3):
            behind("webdav-few").put(f"f{number}", CONTENT)
            if number == 2:
                asked.clear()
                monkeypatch.setattr(Http, "_send", counted)
            await copy_file(store, f"f{number}", storage, f"g/f{number}", tag="t", expected=expected)
        assert await storage._claims.server_looks() is looks
        assert asked == ["PUT", proof, "MOVE", *([] if looks else ["PROPFIND"]), "MOVE"]
        asked.clear()
        await copy_file(storage, "g/f2", store, f"back{looks}{proof}{url[-5:]}", tag="t", expected=expected)
        assert asked == ["GET"]
        monkeypatch.undo()
        # What has the name already is found though nobody looked, and needs no source.
        behind("webdav-few").remove("f2")
        assert (await copy_file(store, "f2", storage, "g/f2", tag="t", expected=expected)).adopted
        await storage.close()
    forget("webdav-few")


async def test_who_has_published_is_in_nobodys_way(apache, monkeypatch):
    monkeypatch.setattr("replica.storage.webdav_claims._PARKED_SECONDS", 0.2)
    one, two = (WebdavStorage(f"{apache.url}/parked", name="dav") for _ in range(2))
    await one.prepare()
    for number in range(3):  # the same name by the same and by another one, again and again
        for n, storage in enumerate((one, one, two)):
            await write(storage, part_path(f"t{number}{n}"), b"x")
            await storage.publish(part_path(f"t{number}{n}"), "f")
            await refusal(TargetExists, lambda: write_and_publish(two, "f"))
            await storage.delete("f")
    await one.close()
    await two.close()
    left = [path.name for path in (apache.data / "parked/.replica/publish").iterdir()]
    assert left == []


async def test_a_publisher_who_was_cancelled_while_he_claimed_blocks_nobody(apache, monkeypatch):
    one, two = (WebdavStorage(f"{apache.url}/cancelled", name="dav") for _ in range(2))
    await one.prepare()
    await write(one, part_path("t1"), b"x")
    await one.publish(part_path("t1"), "e")  # its claim goes on from here to the next name
    await write(one, part_path("t2"), b"x")
    move = one.move

    async def cut(path, to, *arguments, **more):
        await move(path, to, *arguments, **more)
        monkeypatch.undo()
        raise asyncio.CancelledError

    monkeypatch.setattr(one, "move", cut)
    with pytest.raises(asyncio.CancelledError):
        await one.publish(part_path("t2"), "f")
    await write(two, part_path("t3"), b"y")
    await two.publish(part_path("t3"), "f")
    assert await read_all(two, "f") == b"y"
    for storage in (one, two):
        await storage.close()


async def test_a_claim_is_begun_anew_for_the_name_that_was_claimed_last(apache, monkeypatch):
    """A folder that never left would look like that of somebody who died."""
    storage = WebdavStorage(f"{apache.url}/anew", name="dav")
    await storage.prepare()
    move, moves = storage.move, []

    async def told(path, to, *arguments, **more):
        moves.append((path, to))
        return await move(path, to, *arguments, **more)

    monkeypatch.setattr(storage, "move", told)
    for number in range(2):
        await write(storage, part_path(f"t{number}"), b"x")
        await storage.publish(part_path(f"t{number}"), "f")
        await storage.delete("f")
    assert not [path for path, to in moves if path == to]
    await storage.close()


async def write_and_publish(storage, final):
    part = part_path(f"w{secrets.token_hex(4)}")
    await write(storage, part, b"y")
    try:
        await storage.publish(part, final)
    finally:
        await storage.delete(part)


async def test_https_needs_a_trusted_authority_and_passwords_are_sent(apache, xrootd):
    refused_there = WebdavStorage(xrootd.url_https, name="tls")
    assert "ca_file" in (await refusal(Unreachable, refused_there.prepare)).hint
    await refused_there.close()
    trusted = WebdavStorage(xrootd.url_https, name="tls", settings={"ca_file": str(xrootd.ca_file)})
    await trusted.prepare()
    await write(trusted, part_path("t1"), b"x" * 100)
    assert await trusted.checksum(part_path("t1"), "adler32") is not None
    await trusted.close()
    anybody = WebdavStorage(f"{apache.url}/locked", name="locked")
    await refusal(Forbidden, anybody.prepare)
    await anybody.close()
    known = WebdavStorage(
        f"{apache.url}/locked", name="locked", settings={"user": "replica", "password": "correct horse"}
    )
    await known.prepare()
    await known.close()


async def test_files_beyond_two_gibibytes_can_be_read_from_xrootd(xrootd):
    """All of one, in pieces that nobody keeps: it has holes, but for its last byte."""
    storage = WebdavStorage(f"{xrootd.url_http}/beyond", name="dav")
    await storage.prepare()
    with xrootd.put("beyond/f", b"").open("r+b") as file:
        file.seek(2 << 30)
        file.write(b"x")
    total, last = 0, b""
    async for piece in storage.read("f"):
        total, last = total + len(piece), bytes(piece[-1:])
    assert (total, last) == ((2 << 30) + 1, b"x")
    await storage.close()
