"""The body of a large answer, taken from its socket into buffers that are used again.

Given     an answer of which only the headers were read, and how many bytes follow.
Returns   its bytes in pieces of up to 1 MiB, each valid until the next one; None where that cannot be done (TLS).
Promises  the same bytes in the same order as aiohttp would give; the connection is not used again; nobody waits for a
          silent server longer than `silent_seconds`; no thread is left behind.
Partner   replica.storage.webdav counts them.

aiohttp copies a body three times, in pieces of at most 256 KiB, all of it in the event loop's thread. Here another
thread waits for the socket while the loop's hashes and a third one writes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import aiohttp

from replica.storage.base import Piece
from replica.storage.threads import run

#: From here on it pays: the connection is given up for it.
BULK_BYTES = 8 << 20
_PIECE_BYTES = 1 << 20
#: A piece may be smaller when bytes come slowly: who reads wants to know that they do, and may want to stop.
_PIECE_SECONDS = 0.25

#: Threads that wait for servers. In asyncio's default pool, few as they are, they would block every `stat`.
_WAITING = ThreadPoolExecutor(max_workers=128, thread_name_prefix="receive")


def bulk(
    response: aiohttp.ClientResponse, size_bytes: int, *, silent_seconds: float
) -> AsyncGenerator[Piece, None] | None:
    connection = response.connection
    transport = connection.transport if connection is not None else None
    if (
        size_bytes < BULK_BYTES
        or transport is None
        or transport.get_extra_info("sslcontext") is not None
        or "Transfer-Encoding" in response.headers
        or response.content_length != size_bytes
    ):
        return None
    found = transport.get_extra_info("socket")
    if not isinstance(transport, asyncio.ReadTransport) or found is None:
        return None
    transport.pause_reading()
    received = []
    while some := response.content.read_nowait(-1):
        received.append(some)
        transport.pause_reading()  # making room in its buffer, aiohttp may have gone on; nothing was read since
    return _pieces(response, _Receiver(found.fileno(), silent_seconds), b"".join(received), size_bytes)


class _Receiver:
    """A socket of which nobody else reads."""

    def __init__(self, descriptor: int, silent_seconds: float) -> None:
        self._socket = socket.socket(fileno=os.dup(descriptor))
        self._socket.settimeout(silent_seconds)

    def fill(self, view: memoryview) -> int:
        """As much as comes for a moment; 0 only at the end."""
        began = time.monotonic()
        count = 0
        while count < len(view):
            some = self._socket.recv_into(view[count:])
            count += some
            if not some or time.monotonic() - began > _PIECE_SECONDS:
                break
        return count

    def interrupt(self) -> None:
        """Whoever waits in `fill` comes back."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


async def _pieces(
    response: aiohttp.ClientResponse, receiver: _Receiver, received: bytes, size_bytes: int
) -> AsyncGenerator[Piece, None]:
    buffers = [memoryview(bytearray(_PIECE_BYTES)) for _ in range(2)]
    left = size_bytes - len(received)

    def begin() -> asyncio.Task[int]:
        view = buffers[0][: min(left, _PIECE_BYTES)]
        filling = run(lambda: receiver.fill(view), executor=_WAITING, on_cancel=receiver.interrupt)
        return asyncio.get_running_loop().create_task(filling)

    filling = begin() if left else None
    try:
        if received:
            yield received
        while filling is not None:
            count = await filling
            filling = None
            if not count:
                return
            left -= count
            piece = buffers[0][:count]
            buffers.reverse()
            if left:
                filling = begin()
            yield piece
    finally:
        if filling is not None:
            receiver.interrupt()
            filling.cancel()
            await asyncio.wait({filling})
        receiver.close()
        response.close()
