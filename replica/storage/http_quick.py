"""Small requests to one server, without what aiohttp can do besides.

Given     a method, an address of the server and headers; a small body or none.
Returns   the answer with all of its body, as aiohttp's ClientResponse as far as the adapters look at it; None where it
          must be aiohttp: httptools is not installed, or the server cannot be reached (aiohttp says why).
Promises  an answer that is not HTTP, ends early, has two lengths or more bytes than it says is an error; a connection
          with anything left over is closed, as is one whose answer nobody waited for; nothing is sent twice; no header
          of ours can hold a line break.
Partner   replica.storage.http_session decides what goes this way, and bounds the wait; httptools reads the answers.

A request by aiohttp costs 0.4 ms of CPU, and a small file takes five: one worker would ask for at most 400 files a
second. This takes a quarter of that.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
from multidict import CIMultiDict

try:
    import httptools
except ImportError:  # pragma: no cover - the extra `server` brings it; without it everything works, slower
    httptools = None  # type: ignore[assignment]

#: A body of ours, and one of an answer that is asked for this way.
SMALL_BYTES = 1 << 18
#: If it takes longer to connect, aiohttp does it, and tells why not.
_CONNECT_SECONDS = 5.0
_HEADERS_BYTES_MAX = 1 << 16
_BODY_BYTES_MAX = 8 << 20
_NO_BODY = frozenset({204, 304})


class Answer:
    """What the adapters use of aiohttp.ClientResponse. Holds no connection."""

    connection = None

    def __init__(self, method: str, status: int, headers: CIMultiDict[str], body: bytes) -> None:
        self.method, self.status, self.headers = method, status, headers
        self._body = body
        self.content = self

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "application/octet-stream").partition(";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        told = self.headers.get("Content-Length")
        return int(told) if told is not None else None

    async def read(self, size: int = -1) -> bytes:
        some = self._body if size < 0 else self._body[:size]
        self._body = self._body[len(some) :]
        return some

    async def readany(self) -> bytes:
        return await self.read()

    async def iter_any(self) -> AsyncIterator[bytes]:
        if self._body:
            yield await self.read()

    def release(self) -> None:
        return None

    def close(self) -> None:
        return None


class _Connection(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Answer] | None = None

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ask(self, method: str, request: bytes) -> Answer:
        assert self._transport is not None
        self._method = method
        self._begin()
        self._seen = False
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except BaseException:
            self.close()  # whatever comes now answers nobody; cancelled at the last moment, it may even be complete
            raise
        finally:
            self._answer = None

    @property
    def may_stay(self) -> bool:
        return self._complete and self._stays and not self.closed

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._body = bytearray()
        self._header_bytes = 0
        self._status = 0
        self._complete = self._stays = self._headers_are_in = False

    # ── asyncio's side ───────────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self.close()  # nobody asked
            return
        self._seen = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, _TooMuch):
            self._fail(aiohttp.ClientError("the answer cannot be read"))

    def eof_received(self) -> None:
        return None  # the transport closes itself

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer is None or self._answer.done():
            return
        if not self._seen:
            self._fail(aiohttp.ServerDisconnectedError())
        elif self._until_the_end and error is None:
            self._finish()
        else:
            self._fail(aiohttp.ClientPayloadError("the answer ended too early"))

    @property
    def _until_the_end(self) -> bool:
        return self._headers_are_in and not {"Content-Length", "Transfer-Encoding"} & self._headers.keys()

    def _fail(self, error: Exception) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.close()

    def _finish(self) -> None:
        self._complete = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(self._method, self._status, self._headers, bytes(self._body)))

    # ── the parser's side ────────────────────────────────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        if self._complete:
            raise _TooMuch

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _HEADERS_BYTES_MAX:
            raise _TooMuch
        self._headers.add(name.decode("utf-8", "surrogateescape"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        if self._status < 200:
            return
        self._headers_are_in = True
        self._stays = self._parser.should_keep_alive()
        if self._method == "HEAD" or self._status in _NO_BODY:
            self._finish()

    def on_body(self, piece: bytes) -> None:
        if self._complete or len(self._body) + len(piece) > _BODY_BYTES_MAX:
            raise _TooMuch
        self._body += piece

    def on_message_complete(self) -> None:
        if self._complete:
            return
        if self._status < 200:  # "100 Continue" and its like
            self._headers.clear()
            self._header_bytes = 0
            return
        self._finish()


class _TooMuch(Exception):
    """More than was asked for, or than is taken."""


class Quick:
    """The connections to one server, in one event loop."""

    def __init__(self, base: str, trust: ssl.SSLContext | bool, *, idle_seconds: float) -> None:
        split = urlsplit(base)
        self._secure = split.scheme == "https"
        self._host = split.hostname or ""
        self._port = split.port or (443 if self._secure else 80)
        self._netloc = split.netloc
        self._trust = trust
        self._idle_seconds = idle_seconds
        self._idle: deque[_Connection] = deque()

    async def ask(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, used: Any
    ) -> aiohttp.ClientResponse | None:
        """`used.reused` is set, if the connection was used before."""
        if httptools is None:
            return None
        request = self._request(method, url, headers, body)
        connection = self._waiting()
        used.reused = connection is not None
        if connection is None:
            connection = await self._connect()
        if connection is None:
            return None
        answer = await connection.ask(method, request)
        if connection.may_stay and headers.get("Connection") != "close":
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        return cast(aiohttp.ClientResponse, answer)

    def _request(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
        split = urlsplit(url)
        path = split.path + (f"?{split.query}" if split.query else "")
        lines = [f"{method} {path or '/'} HTTP/1.1", f"Host: {self._netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None or method in ("PUT", "PROPFIND"):
            lines.append(f"Content-Length: {len(body or b'')}")
        if any(c in line for line in lines for c in "\r\n\0") or " " in path:
            raise ValueError("a header or an address holds a line break or a space")
        return "\r\n".join([*lines, "\r\n"]).encode() + (body or b"")

    def _waiting(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed and time.monotonic() - connection.idle_since < self._idle_seconds:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection | None:
        trust = (ssl.create_default_context() if self._trust is True else self._trust) if self._secure else None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, connection = await asyncio.get_running_loop().create_connection(
                    _Connection, self._host, self._port, ssl=trust
                )
        except OSError:  # SSLError is one, and TimeoutError
            return None
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
