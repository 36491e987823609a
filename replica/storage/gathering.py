"""What one turn of the event loop writes to a connection, sent together.

Given     asyncssh, which sends an empty packet before every packet, each by a system call of its own.
Returns   `Gathering`, to be given to asyncssh.connect as the `tunnel` that makes its connection.
Promises  the same bytes in the same order, no later than the end of the turn in which they were written.
Partner   replica.storage.ssh. Ten requests made at once are one send instead of twenty: small files move twice as fast.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Gathering:
    async def create_connection(
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[asyncio.BaseTransport, asyncio.Protocol]:
        loop = asyncio.get_running_loop()
        transport, between = await loop.create_connection(lambda: _Between(factory()), host, port)
        return transport, between.protocol


class _Between(asyncio.Protocol):
    """Passes everything on; only the transport that it shows is another."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        self.protocol = protocol
        self.data_received = protocol.data_received  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.connection_lost = protocol.connection_lost  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.protocol.connection_made(_Gathered(transport))  # type: ignore[arg-type]


class _Gathered:
    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._send)
        self._held.append(data)

    def _send(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self._transport.write(b"".join(held))

    def close(self) -> None:
        self._send()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
