"""A WebDAV server whose COPY goes wrong on purpose: a proxy in front of a real one.

Given     a real server, and for each COPY that comes a behaviour.
Returns   `FaultyCopy`: all other requests are the real server's answers; of every COPY the headers are kept.
Promises  what it does behind the client's back it does to the real server's files, as a faulty server would.
Partner   tests/replica/storage/test_thirdparty.py: faults that real servers show only at random.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import aiohttp
from aiohttp import web

from tests.servers_xrootd import XRootD

_DROPPED = {"host", "connection", "transfer-encoding", "content-length", "keep-alive", "accept-encoding", "expect"}


class FaultyCopy:
    """`async with` starts and ends it. `behaviour` answers a COPY; None: the real server does."""

    def __init__(self, real: XRootD, behaviour: Behaviour | None = None) -> None:
        self.real = real
        self.behaviour = behaviour
        self.copies: list[dict[str, str]] = []
        self.paths: list[str] = []  #: that COPYs were sent to
        self.background: set[asyncio.Task[None]] = set()
        self._site: web.BaseSite
        self.url = ""

    async def __aenter__(self) -> FaultyCopy:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._session = aiohttp.ClientSession(auto_decompress=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.background:
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        await self._session.close()
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.method == "COPY":
            self.copies.append(dict(request.headers))
            self.paths.append(request.path.lstrip("/"))
            if self.behaviour is not None:
                return await self.behaviour(self, request)
        headers = {
            k: v.replace(self.url, self.real.url_http) for k, v in request.headers.items() if k.lower() not in _DROPPED
        }
        body = await request.read()
        async with self._session.request(
            request.method,
            self.real.url_http + request.raw_path,
            headers=headers,
            data=body or None,
            allow_redirects=False,
        ) as answer:
            content = await answer.read()
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _DROPPED}
            if request.method == "HEAD":
                kept["Content-Length"] = answer.headers.get("Content-Length", "0")
            return web.Response(status=answer.status, body=content or None, headers=kept)

    def spawn(self, work: Awaitable[None]) -> None:
        """What a server goes on doing, whoever listens."""
        task = asyncio.ensure_future(work)
        self.background.add(task)


Behaviour = Callable[[FaultyCopy, web.Request], Awaitable[web.StreamResponse]]


def marker(bytes_done: int) -> bytes:
    return (
        f"Perf Marker\nTimestamp: 1795398749\nStripe Index: 0\nStripe Bytes Transferred: {bytes_done}\n"
        "Total Stripe Count: 1\nEnd\n"
    ).encode()


def refusing(status: int, text: str = "", **headers: str) -> Behaviour:
    async def behave(_: FaultyCopy, __: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return behave


def leaving(content: bytes, last: bytes, *, markers: bytes = b"") -> Behaviour:
    """The temporary holds `content` then, and `last` is the end of the answer."""

    async def behave(server: FaultyCopy, request: web.Request) -> web.StreamResponse:
        server.real.put(request.path.lstrip("/"), content)
        answer = web.StreamResponse(status=201)
        await answer.prepare(request)
        await answer.write((markers or marker(len(content))) + last)
        return answer

    return behave


def hanging(content: bytes | None, *, dropped: bool = False) -> Behaviour:
    """A part (None: nothing) has arrived, and nothing moves any more; or the connection goes, and nobody says why."""

    async def behave(server: FaultyCopy, request: web.Request) -> web.StreamResponse:
        if content is not None:
            server.real.put(request.path.lstrip("/"), content)
        answer = web.StreamResponse(status=201)
        await answer.prepare(request)
        await answer.write(marker(len(content or b"")))
        if dropped:
            assert request.transport is not None
            request.transport.close()
            return answer
        with suppress(ConnectionError):
            while True:
                await asyncio.sleep(0.05)
                await answer.write(marker(len(content or b"")))
        return answer

    return behave


def orphaned(content: bytes, pieces: int, seconds: float, *, dropped: bool = True) -> Behaviour:
    """Goes on writing after the connection went, as XRootD does."""

    async def behave(server: FaultyCopy, request: web.Request) -> web.StreamResponse:
        file = server.real.put(request.path.lstrip("/"), b"")
        writer = file.open("ab", buffering=0)

        async def write() -> None:
            step = -(-len(content) // pieces)
            with writer:
                for begin in range(0, len(content), step):
                    await asyncio.sleep(seconds / pieces)
                    writer.write(content[begin : begin + step])

        server.spawn(write())
        answer = web.StreamResponse(status=201)
        await answer.prepare(request)
        await answer.write(marker(1))
        if dropped:
            assert request.transport is not None
            request.transport.close()
        else:
            with suppress(ConnectionError):
                while True:
                    await asyncio.sleep(0.05)
                    await answer.write(marker(1))
        return answer

    return behave
