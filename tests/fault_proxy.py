"""A proxy that does to bytes on their way what networks, proxies and servers do to them; for HTTP, and for any TCP.

Given     the port of a real server, and for one transfer at a time the faults that shall happen to it.
Returns   `FaultProxy`: a port in front of the server. Of each fault it is known whether it happened.
Promises  without a fault every byte passes as it is, in both directions; a fault happens once. What a fault needs (a
          body, a Content-Range …) is waited for, from the exchange it was meant for on.
Partner   tests/scenarios/faults_in_flight.py; tests/servers_faulty.py is the same for third-party copies.

What is changed, and what not: bodies and answers, byte by byte; of requests the bodies only. A flipped bit in the name
that a request is for is what TLS, SSH and S3's signatures exclude; no client could notice that it was understood as
another request. The same for frames of root://, whose headers are left alone in both directions.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

#: To bodies on their way up, which is to the server.
UP = ("up_flip", "up_shift", "up_cut", "up_reset", "up_hang", "up_drip")
#: To answers. `head_flip` may make one unreadable; `extra` sends more than it said; `false_end` ends it as if whole.
DOWN = (
    *("down_flip", "down_shift", "down_cut", "down_reset", "down_hang", "down_drip"),
    *("head_flip", "head_cut", "longer", "shorter", "extra", "false_end"),
)
#: Other answers than the server's. Those with `after` let the server do what was asked, and then lie about it.
ANSWERS = (
    *("500", "502", "503", "504", "429", "403", "404", "507", "413", "500_after", "503_after", "lost_after", "stale"),
    *("page", "garbage", "redirect", "wrong_range", "whole_instead", "wrong_digest", "lost_before"),
)
RAW = ("up_flip", "up_cut", "up_reset", "up_hang", "up_drip", "down_flip", "down_cut", "down_reset", "down_hang")
_PIECE = 1 << 16
_DRIP_SECONDS = 0.2
_DIGESTS = re.compile(
    rb"(?im)^((?:Digest|Repr-Digest|x-amz-checksum-\w+): *(?:[\w-]+=:?)?)([0-9A-Za-z+/]+)", re.IGNORECASE
)


@dataclass
class Fault:
    kind: str
    turn: int = 0  #: not before the exchange of this number
    at: float = 0.0  #: where in the body, 0 to 1; for raw TCP, how many bytes pass first
    happened: bool = False
    method: bytes = b""  #: of HTTP, if only that


class _Dropped(Exception):
    """The connection ends here."""


class FaultProxy:
    """`async with` starts and ends it. `framed`: which bytes of each direction may be flipped, for raw TCP."""

    def __init__(
        self, port: int, *, http: bool = True, framed: tuple[Callable[[], Frames], Callable[[], Frames]] | None = None
    ) -> None:
        self._upstream = port
        self._http = http
        self._framed = framed or (Anything, Anything)
        self._faults: list[Fault] = []
        self._turn = 0
        self._passed = [0, 0]
        self._open: set[asyncio.StreamWriter] = set()
        self._stuck: set[asyncio.Task[None]] = set()
        self._serving: set[asyncio.Task[None]] = set()
        #: Where answers send the client who must not go there.
        self.elsewhere = "http://127.0.0.1:1/"
        self.port = 0

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        for task in [*self._serving]:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        await self._server.wait_closed()

    def arm(self, *faults: Fault) -> None:
        """For what comes next. Connections that an earlier fault has spoiled are gone."""
        self._faults = [*faults]
        self._turn = 0
        self._passed = [0, 0]
        for task in [*self._stuck]:
            task.cancel()

    def cut(self) -> None:
        """Every connection ends."""
        for writer in [*self._open]:
            writer.transport.abort()

    # ── one connection ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        up_writer = None
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream, limit=1 << 20)
            self._open |= {writer, up_writer}
            link = _Link(self, task, reader, writer, up_reader, up_writer)
            await (link.http() if self._http else link.raw(self._framed))
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError, _Dropped):
            pass
        except asyncio.CancelledError:  # at the end only; a server of asyncio would complain
            pass
        finally:
            for one in (writer, up_writer):
                if one is not None:
                    self._open.discard(one)
                    one.close()
            self._serving.discard(task)
            self._stuck.discard(task)

    def take(self, *kinds: str, body: bool = True, method: bytes = b"") -> Fault | None:
        """The next fault of these kinds, if its turn has come. It has happened then."""
        for fault in self._faults:
            if (
                not fault.happened
                and fault.kind in kinds
                and fault.turn <= self._turn
                and body
                and fault.method in (b"", method)
            ):
                fault.happened = True
                return fault
        return None


class _Link:
    def __init__(
        self,
        proxy: FaultProxy,
        task: asyncio.Task[None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        self.proxy, self.task = proxy, task
        self.reader, self.writer = reader, writer
        self.up_reader, self.up_writer = up_reader, up_writer

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def http(self) -> None:
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            self.proxy._turn += 1
            method = head.partition(b" ")[0]
            length = _length(head) or 0
            answer = self.proxy.take(*ANSWERS[:9], "page", "garbage", "redirect", "lost_before", method=method)
            if answer is not None:
                await self._instead(answer, method)
            self.up_writer.write(head)
            await self.up_writer.drain()
            body = asyncio.create_task(self._body_up(length))
            try:
                going_on = await self._answer(method)
                if not going_on:
                    return
                await body
            finally:
                if not body.done():
                    body.cancel()
                await asyncio.gather(body, return_exceptions=True)

    async def _body_up(self, length: int) -> None:
        fault = self.proxy.take(*UP, body=length > 0)
        try:
            await self._carry(self.reader, self.up_writer, length, fault)
        except _Dropped:
            self.writer.transport.abort()
            self.up_writer.transport.abort()

    async def _instead(self, fault: Fault, method: bytes) -> None:
        """Answered by us; the server never hears of it. Then the connection ends, for a body may be under way."""
        kind = fault.kind
        if kind == "lost_before":
            self._reset()
        if kind == "garbage":
            self.writer.write(b"\x16\x03\x01\x00\xa5 what is this?\r\n\r\n" * 3)
        elif kind == "page":
            self.writer.write(
                _response(b"200 OK", b"<html>Please log in</html>", b"Content-Type: text/html\r\n", method)
            )
        elif kind == "redirect":
            where = f"Location: {self.proxy.elsewhere}\r\n".encode()
            self.writer.write(_response(b"307 Temporary Redirect", b"", where, method))
        else:
            more = b"Retry-After: 1\r\n" if kind in ("503", "429") else b""
            self.writer.write(
                _response(kind.encode() + b" Sorry", b"sorry", more + b"Content-Type: text/plain\r\n", method)
            )
        await self.writer.drain()
        raise _Dropped

    async def _answer(self, method: bytes) -> bool:
        """One answer of the server's, on its way down; whether the connection lives on."""
        while True:
            head = await self.up_reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 1"):
                break
            self.writer.write(head)
        length, chunked = _length(head), b"transfer-encoding: chunked" in head.lower()
        status = head[9:12]
        empty = method == b"HEAD" or status in (b"204", b"304")
        size = 0 if empty else length
        after = self.proxy.take("500_after", "503_after", "lost_after", method=method)
        if after is not None:
            await self._drain(size, chunked and not empty)
            if after.kind == "lost_after":
                self._reset()
            code = after.kind[:3].encode() + b" Sorry"
            self.writer.write(_response(code, b"", b"", method))
            await self.writer.drain()
            return False
        head, size, fault = self._changed(head, size, chunked and not empty)
        self.writer.write(head)
        if fault is not None and fault.kind == "head_cut":
            await self.writer.drain()
            self._reset()
        if chunked and not empty:
            await self._chunks(fault)
        else:
            await self._carry(self.up_reader, self.writer, size, fault)
        if fault is not None and fault.kind == "extra":
            self.writer.write(b"and these bytes were never announced")
        await self.writer.drain()
        stale = self.proxy.take("stale")
        return stale is None and b"connection: close" not in head.lower() and size is not None

    def _changed(self, head: bytes, size: int | None, chunked: bool) -> tuple[bytes, int | None, Fault | None]:
        """The head as the client gets it, how many bytes follow, and what happens to these."""
        take, told = self.proxy.take, size is not None and size > 0
        if (fault := take("wrong_range", body=b"\r\ncontent-range:" in head.lower())) is not None:
            return (
                re.sub(rb"(?i)(content-range: *bytes )(\d+)", lambda m: m[1] + str(int(m[2]) + 7).encode(), head),
                size,
                None,
            )
        if (fault := take("whole_instead", body=head[9:12] == b"206")) is not None:
            head = re.sub(rb"(?im)^content-range:.*\r\n", b"", head).replace(b" 206 ", b" 200 ", 1)
            return head, size, None
        if (fault := take("wrong_digest", body=bool(_DIGESTS.search(head)))) is not None:
            return _DIGESTS.sub(_other_digest, head), size, None
        if (fault := take("head_flip", "head_cut")) is not None:
            at = min(int(fault.at * len(head)), len(head) - 1)
            if fault.kind == "head_cut":
                return head[:at], size, fault
            return head[:at] + bytes([head[at] ^ (1 << (at % 8))]) + head[at + 1 :], size, None
        if (fault := take("longer", "shorter", "false_end", body=told)) is not None:
            assert size is not None
            said = size + 5 if fault.kind == "longer" else max(0, size - 1 - int(fault.at * min(size - 1, 1000)))
            head = re.sub(rb"(?im)^(content-length: *)\d+", lambda m: m[1] + str(said).encode(), head)
            return head, size, Fault("down_cut", at=said / size, happened=True) if fault.kind == "false_end" else fault
        return head, size, take(*DOWN[:6], "extra", body=told or chunked)

    async def _chunks(self, fault: Fault | None) -> None:
        """A chunked body; what happens to it happens to its first chunk that has bytes."""
        while True:
            line = await self.up_reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            self.writer.write(line)
            await self._carry(self.up_reader, self.writer, size, fault if size else None)
            if size:
                fault = None
            self.writer.write(await self.up_reader.readexactly(2))
            if size == 0:
                return

    async def _drain(self, size: int | None, chunked: bool) -> None:
        if chunked:
            while size := int((await self.up_reader.readuntil(b"\r\n")).split(b";")[0], 16):
                await self.up_reader.readexactly(size + 2)
            await self.up_reader.readexactly(2)
        elif size is None:
            await self.up_reader.read()
        else:
            await self.up_reader.readexactly(size)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int | None, fault: Fault | None
    ) -> None:
        """So many bytes (None: to the end), with what happens to one of them."""
        place = int((fault.at if fault is not None else 0) * (size or 1000))
        done = 0
        while size is None or done < size:
            piece = await reader.read(_PIECE if size is None else min(_PIECE, size - done))
            if not piece:
                raise _Dropped
            if fault is not None and done <= place < done + len(piece):
                piece = await self._do(fault.kind, piece, place - done, writer)
                fault = None
            writer.write(piece)
            await writer.drain()
            done += len(piece)

    # ── any TCP ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def raw(self, framed: tuple[Callable[[], Frames], Callable[[], Frames]]) -> None:
        pumps = [
            asyncio.create_task(self._pump("up", framed[0](), self.reader, self.up_writer)),
            asyncio.create_task(self._pump("down", framed[1](), self.up_reader, self.writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, way: str, frames: Frames, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy, index = self.proxy, way == "down"
        while piece := await reader.read(_PIECE):
            spans = frames.feed(piece)
            for fault in proxy._faults:
                if fault.happened or not fault.kind.startswith(way):
                    continue
                if fault.kind.endswith(("flip", "shift")):
                    span = next((s for s in spans if proxy._passed[index] + s[1] > fault.at), None)
                    if span is None:
                        continue
                    place = max(span[0], min(span[1] - 1, int(fault.at) - proxy._passed[index]))
                elif proxy._passed[index] + len(piece) > fault.at:
                    place = max(0, int(fault.at) - proxy._passed[index])
                else:
                    continue
                fault.happened = True
                piece = await self._do(fault.kind, piece, place, writer)
            proxy._passed[index] += len(piece)
            writer.write(piece)
            await writer.drain()

    # ── what happens ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _do(self, kind: str, piece: bytes, place: int, writer: asyncio.StreamWriter) -> bytes:
        what = kind.partition("_")[2]
        if what == "flip":
            return piece[:place] + bytes([piece[place] ^ (1 << (place % 8))]) + piece[place + 1 :]
        if what == "shift":  # bytes that come twice; as many at the end of this piece are lost
            return (piece[:place] + piece[max(0, place - 9) : place] + piece[place:])[: len(piece)]
        if what not in ("cut", "reset", "hang", "drip"):
            return piece
        writer.write(piece[:place])
        with suppress(OSError):
            await writer.drain()
        if what == "cut":
            raise _Dropped
        if what == "reset":
            self._reset()
        self.proxy._stuck.add(self.task)
        for byte in piece[place:] if what == "drip" else b"":
            await asyncio.sleep(_DRIP_SECONDS)
            writer.write(bytes([byte]))
        await asyncio.Event().wait()  # until one of the two gives up, or the next transfer begins
        return b""

    def _reset(self) -> None:
        for writer in (self.writer, self.up_writer):
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        raise _Dropped


# ── which bytes of raw TCP may be flipped ────────────────────────────────────────────────────────────────────────────


class Frames:
    """Fed with what passes; tells which spans of it are content."""

    def feed(self, piece: bytes) -> list[tuple[int, int]]:
        raise NotImplementedError


class Anything(Frames):
    def feed(self, piece: bytes) -> list[tuple[int, int]]:
        return [(0, len(piece))]


class _Framed(Frames):
    """Headers of one length, which say how much follows."""

    def __init__(self, first: int, header: int, only: int | None) -> None:
        self._skip, self._header, self._only = first, header, only
        self._head = bytearray()
        self._left, self._content = 0, False

    def feed(self, piece: bytes) -> list[tuple[int, int]]:
        spans, at = [], 0
        while at < len(piece):
            if self._skip:
                step = min(self._skip, len(piece) - at)
                self._skip -= step
            elif self._left:
                step = min(self._left, len(piece) - at)
                self._left -= step
                if self._content:
                    spans.append((at, at + step))
            else:
                step = min(self._header - len(self._head), len(piece) - at)
                self._head += piece[at : at + step]
                if len(self._head) == self._header:
                    (self._left,) = struct.unpack(">I", self._head[-4:])
                    code = struct.unpack(">H", self._head[2:4])[0]
                    self._content = self._only is None or code == self._only
                    self._head.clear()
            at += step
        return spans


def xrootd_requests() -> Frames:
    """Bytes of kXR_write (3019); the handshake comes first."""
    return _Framed(20, 24, 3019)


def xrootd_answers() -> Frames:
    """Bytes of answers that say ok (0), of whatever kind: file contents, sizes and times in words."""
    return _Framed(16, 8, 0)


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _length(head: bytes) -> int | None:
    found = re.search(rb"(?im)^content-length: *(\d+)", head)
    return int(found[1]) if found else None


def _response(status: bytes, body: bytes, headers: bytes, method: bytes) -> bytes:
    size = str(len(body)).encode()
    head = b"HTTP/1.1 " + status + b"\r\n" + headers + b"Content-Length: " + size + b"\r\nConnection: close\r\n\r\n"
    return head + (b"" if method == b"HEAD" else body)


def _other_digest(found: re.Match[bytes]) -> bytes:
    value = bytearray(found[2])
    value[0] = ord("0") if value[0] != ord("0") else ord("1")
    return found[1] + bytes(value)
