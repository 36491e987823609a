"""The same calls for asyncio: what a site's worker says to the centre, and bulk.

Given     the server's URL and a token.
Returns   AsyncClient with `.orders`, `.endpoints`, `.replicas`, `.upload`, `.download`, and `.send(call)` for what
          else there is.
Promises  as replica.client.http: errors of rules.errors, no answer at all is Unavailable, a call is sent twice only
          when that cannot have a second effect.
Partner   workers.mover uses it.
"""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import aiohttp
import msgspec
from yarl import URL

from replica import wire
from replica.client import deletions, integrity
from replica.client.calls import Call
from replica.client.endpoints import report_space
from replica.client.events import NOW, StreamReader, page_call, stream_call
from replica.client.http import (
    CONNECT_SECONDS,
    NDJSON,
    TIMEOUT_SECONDS,
    LineReader,
    checked_token,
    parse_server,
    unreachable,
)
from replica.client.orders import claim_call, heartbeat_call, report_call
from replica.client.problems import error_from
from replica.client.replicas import locate, register
from rules.errors import Unavailable
from rules.names import Did

if TYPE_CHECKING:
    from replica.client.download import Downloaded
    from replica.client.parallel import Progress, Tell
    from replica.client.upload import Uploaded

T = TypeVar("T")


class AsyncHttp:
    """Made outside of a loop or inside; the first call opens the session in the loop that runs then."""

    def __init__(self, server: str, token: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.server = parse_server(server)[0]
        self._token = checked_token(token)
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=min(CONNECT_SECONDS, timeout_seconds), sock_read=timeout_seconds
        )
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: Call[T]) -> T:
        headers = {"Accept": "application/json"}
        if call.creates:
            headers["Idempotency-Key"] = str(uuid.uuid4())
        for last in (not call.safe_to_repeat, True):
            try:
                async with self._request(call, headers) as response:
                    status, media_type, body = response.status, response.content_type, await response.read()
                break
            except (aiohttp.ClientConnectorError, TimeoutError) as error:  # not reached, or no time left
                raise self._unreachable(error) from error
            except (aiohttp.ClientError, OSError) as error:
                if last:
                    raise self._unreachable(error) from error
        if not 200 <= status < 300:
            raise error_from(status, media_type, body, self.server)
        try:
            return call.decoded(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(
                f"{self.server} answered something that Replica does not",
                hint="check the server's URL, and that client and server are of compatible releases",
            ) from error

    async def lines(self, call: Call[T]) -> AsyncIterator[T]:
        """The items of a stream as they come. Unavailable when it ends without its trailer or with a wrong count."""
        try:
            async with self._request(call, {"Accept": NDJSON}) as response:
                if response.status != 200 or response.content_type != NDJSON:
                    raise error_from(response.status, response.content_type, await response.read(), self.server)
                reader = LineReader(call)
                async for line in response.content:
                    if (item := reader.item(line)) is not None:
                        yield item
                reader.end()
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from error

    async def stream(self, call: Call[Any], headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The lines of an answer that comes bit by bit; Unavailable when it is cut off, nothing when it ends."""
        try:
            async with self._request(call, headers) as response:
                if response.status != 200 or response.content_type != headers["Accept"]:
                    raise error_from(response.status, response.content_type, await response.read(), self.server)
                async for line in response.content:
                    yield line
        except (aiohttp.ClientError, OSError) as error:
            raise self._unreachable(error) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _request(self, call: Call[Any], headers: dict[str, str]) -> Any:
        if self._session is None:
            about = {"User-Agent": "replica"}
            if self._token is not None:
                about["Authorization"] = f"Bearer {self._token}"
            self._session = aiohttp.ClientSession(headers=about, timeout=self._timeout, trust_env=False)
        headers = headers | call.conditions()
        body = call.encoded()
        if body is not None:
            headers = headers | {"Content-Type": "application/json"}
        # encoded: the names are quoted already, and must not be "normalised". No redirects: the token stays here.
        url = URL(self.server + call.target(), encoded=True)
        return self._session.request(call.method, url, data=body, headers=headers, allow_redirects=False)

    def _unreachable(self, error: BaseException) -> Exception:
        cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
        return unreachable(self.server, cause)


class AsyncOrders:
    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def claim(self, claim: wire.Claim) -> wire.Orders:
        return await self._http.send(claim_call(claim))

    async def heartbeat(self, heartbeat: wire.Heartbeat) -> wire.HeartbeatAnswer:
        return await self._http.send(heartbeat_call(heartbeat))

    async def report(self, report: wire.Report) -> wire.ReportAnswer:
        return await self._http.send(report_call(report))


class AsyncDeletions:
    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def claim(self, claim: wire.DeletionClaim) -> wire.DeletionOrders:
        return await self._http.send(deletions.claim_call(claim))

    async def heartbeat(self, heartbeat: wire.DeletionHeartbeat) -> wire.HeartbeatAnswer:
        return await self._http.send(deletions.heartbeat_call(heartbeat))

    async def report(self, report: wire.DeletionReport) -> wire.ReportAnswer:
        return await self._http.send(deletions.report_call(report))


class AsyncChecks:
    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def claim(self, claim: wire.CheckClaim) -> wire.Checks:
        return await self._http.send(integrity.claim_call(claim))

    async def heartbeat(self, heartbeat: wire.CheckHeartbeat) -> wire.CheckBeatAnswer:
        return await self._http.send(integrity.heartbeat_call(heartbeat))

    async def report(self, report: wire.CheckReport) -> wire.CheckAnswer:
        return await self._http.send(integrity.report_call(report))


class AsyncEndpoints:
    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def report_space(self, name: str, free_bytes: int) -> None:
        await self._http.send(report_space(name, free_bytes))


class AsyncReplicas:
    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def register(self, registration: wire.Registration) -> wire.Registered:
        return await self._http.send(register(registration))

    def locate(self, did: str | Did) -> AsyncIterator[wire.Replica]:
        return self._http.lines(locate(did))


class AsyncEvents:
    """As replica.client.events.Events."""

    def __init__(self, http: AsyncHttp) -> None:
        self._http = http

    async def page(
        self, since: str | None = None, kinds: Sequence[str] = (), *, limit: int = 100, **filters: Any
    ) -> wire.Events:
        return await self._http.send(page_call(since, kinds, limit=limit, **filters))

    async def list(
        self, since: str | None = None, kinds: Sequence[str] = (), **filters: Any
    ) -> AsyncIterator[wire.Event]:
        more = True
        while more:
            page = await self.page(since, kinds, limit=1_000, **filters)
            for event in page.items:
                yield event
            since, more = page.next, page.more

    async def follow(
        self, since: str | None = NOW, kinds: Sequence[str] = (), *, reconnect: bool = True, **filters: Any
    ) -> AsyncIterator[wire.Event]:
        reader = StreamReader(since)
        while True:
            try:
                async for line in self._http.stream(stream_call(kinds, **filters), reader.headers()):
                    if (event := reader.event(line)) is not None:
                        yield event
            except Unavailable:
                if not reader.begun:
                    raise
            if not reconnect:
                raise reader.ended()
            await asyncio.sleep(reader.pause())


class AsyncClient:
    """`async with AsyncClient(server, token) as client: …`"""

    def __init__(self, server: str, token: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._http = AsyncHttp(server, token, timeout_seconds=timeout_seconds)
        self._given = (server, token)
        self.orders = AsyncOrders(self._http)
        self.deletions = AsyncDeletions(self._http)
        self.checks = AsyncChecks(self._http)
        self.endpoints = AsyncEndpoints(self._http)
        self.replicas = AsyncReplicas(self._http)
        self.events = AsyncEvents(self._http)

    async def send(self, call: Call[T]) -> T:
        return await self._http.send(call)

    async def upload(self, paths: Sequence[str | os.PathLike[str]], **how: Any) -> Uploaded:
        """As replica.client.upload.upload."""
        from replica.client.upload import upload

        return await self._aside(upload, paths, **how)

    async def download(self, dids: Sequence[str], **how: Any) -> Downloaded:
        """As replica.client.download.download."""
        from replica.client.download import download

        return await self._aside(download, dids, **how)

    async def _aside(self, work: Callable[..., T], what: Sequence[Any], tell: Tell | None = None, **how: Any) -> T:
        """In a thread with a loop of its own, so that nothing here waits for hashing; `tell` is called from there. When
        the caller is cancelled it is stopped, and waited for."""
        from replica.client import Client
        from replica.storage.judging import Stopped
        from replica.storage.threads import run

        left = threading.Event()

        def telling(now: Progress) -> None:
            if left.is_set():
                raise Stopped("the caller has left")
            if tell is not None:
                tell(now)

        with Client(*self._given) as client:
            return await run(partial(work, client, what, tell=telling, **how), on_cancel=left.set)

    async def close(self) -> None:
        await self._http.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
