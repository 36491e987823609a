"""The body of a PUT: exactly as many bytes as its header says, or none of it counts.

Given     pieces in order, and how many bytes they are in all.
Returns   pieces of about 1 MiB for aiohttp: larger cost latency, smaller cost calls.
Promises  a source with fewer or more bytes than promised, or one that fails, breaks the connection before the last byte
          is sent: a server never gets a complete request of wrong bytes. The wait for the server to take a piece is
          bounded, the wait for the source is not ours.
Partner   replica.storage.http_session sends it; the length is always in the header, for XRootD corrupts chunked bodies.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import IO

from replica.storage.base import Piece
from rules.errors import SourceChanged

PIECE_BYTES = 1 << 20
#: Bodies up to here are held in memory: they can be sent again after a redirect, and need no "100 Continue".
SMALL_BYTES = 1 << 20
#: Less than this in the seconds allowed is a server that drips.
_DRIP_BYTES = 1 << 16
_OVER_SECONDS = 10.0
_SPOOL_BYTES_MAX = 16 << 20


class Body:
    """A body that can be sent once."""

    def __init__(self, chunks: AsyncIterator[Piece], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.started = False
        self.finished = False
        #: What the source raised: aiohttp would hide it behind an error of its own.
        self.error: Exception | None = None
        self._chunks = chunks
        self._deadline: asyncio.Timeout | None = None
        self._between = self._after = 0.0
        self._over = asyncio.Event()

    def watch(self, deadline: asyncio.Timeout, between: float, after: float) -> None:
        """`deadline` is moved: `between` seconds for each piece to be taken, `after` seconds for the answer."""
        self._deadline, self._between, self._after = deadline, between, after

    async def pieces(self) -> AsyncIterator[bytes]:
        self.started = True
        try:
            self._allow(None)
            async for piece in joined(self._chunks, self.size_bytes):
                self._allow(self._between)
                yield piece
                self._allow(None)
            self.finished = True
            self._allow(self._after)
        except Exception as error:
            self.error = error
            raise
        finally:
            self._over.set()

    async def over(self) -> None:
        """Wait until nobody takes pieces any more. A server that answers before it has read all of a body leaves
        aiohttp asking for the next piece, while the source is being closed."""
        if self.started:
            with suppress(TimeoutError):
                async with asyncio.timeout(_OVER_SECONDS):
                    await self._over.wait()

    def _allow(self, seconds: float | None) -> None:
        if self._deadline is not None and not self._deadline.expired():
            now = asyncio.get_running_loop().time()
            self._deadline.reschedule(None if seconds is None else now + seconds)


class Paced:
    """The pieces of an answer, at a pace that ends some day. TimeoutError: in so many seconds of waiting for them came
    less than 64 KiB. Time that is spent with a piece does not count."""

    def __init__(self, pieces: AsyncIterator[bytes], seconds: float) -> None:
        self._pieces = aiter(pieces)
        self._seconds = seconds
        self._in_window, self._waited = 0, 0.0

    def __aiter__(self) -> Paced:
        return self

    async def __anext__(self) -> bytes:
        began = time.monotonic()
        piece = await anext(self._pieces)
        self._in_window += len(piece)
        self._waited += time.monotonic() - began
        if self._waited > self._seconds:
            if self._in_window < _DRIP_BYTES:
                raise TimeoutError
            self._in_window, self._waited = 0, 0.0
        return piece


async def joined(chunks: AsyncIterator[Piece], size_bytes: int) -> AsyncIterator[bytes]:
    """Pieces of PIECE_BYTES and a last one, which is held back until the source has ended where it should.

    They are copies: a piece of the source is valid only until the next, and a transport may keep what it was given.
    """
    waiting: list[bytes] = []
    held = total = 0
    async for chunk in chunks:
        total += len(chunk)
        if total > size_bytes:
            raise SourceChanged(f"the source has more than the {size_bytes} bytes that were to come", side="source")
        waiting.append(bytes(chunk))
        held += len(chunk)
        if held >= PIECE_BYTES and total < size_bytes:
            yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
            waiting, held = [], 0
    if total != size_bytes:
        raise SourceChanged(f"the source ended after {total} of {size_bytes} bytes", side="source")
    if waiting:
        yield b"".join(waiting)


async def whole(chunks: AsyncIterator[Piece], size_bytes: int) -> bytes:
    return b"".join([piece async for piece in joined(chunks, size_bytes)])


async def spooled(chunks: AsyncIterator[Piece]) -> tuple[IO[bytes], int]:
    """The bytes of a source that does not say how many they are, and their number. On disk if they are many."""
    file: IO[bytes] = tempfile.SpooledTemporaryFile(_SPOOL_BYTES_MAX)  # noqa: SIM115 - the caller closes it
    try:
        size_bytes = 0
        async for chunk in chunks:
            await asyncio.to_thread(file.write, chunk)
            size_bytes += len(chunk)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file, size_bytes


async def pieces_of(file: IO[bytes]) -> AsyncIterator[Piece]:
    while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
        yield piece
