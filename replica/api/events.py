"""What happens, over REST: page by page, or as it happens.

Given     a cursor and what of the events is wanted.
Returns   a page; or, where text/event-stream is accepted, server-sent events until one of the two sides stops.
Promises  between events a reader costs neither a connection nor a thread; whether there is anything new is asked once
          for all of them. Who does not take what he is sent is cut off; he comes back with `Last-Event-ID` and misses
          nothing. There are at most STREAMS_MAX readers. A stop of the server ends every stream in order.
Partner   replica.catalog.events reads; commits of this process wake sooner than the next look.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

import msgspec
from aiohttp import web

from replica import wire
from replica.api import routing
from replica.api.paging import Limit, Word
from replica.api.routing import STARTED, Context, Routes
from replica.api.work import Work, encode
from replica.catalog import events, outbox
from replica.db.engine import Database
from replica.log import get_logger
from rules.errors import ReplicaError, Unavailable

routes = Routes("events", "What happened.")

EVENT_STREAM = "text/event-stream"
#: Readers at the same time.
STREAMS_MAX = 64
#: How soon an event of another process is seen.
LOOK_SECONDS = 1.0
#: A stream in which nothing happens says so; proxies cut what is silent for long.
HEARTBEAT_SECONDS = 15.0
#: Events that are read and sent at a time.
BATCH = 200


class Search(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    limit: Limit = 100
    #: The `next` of the page before, or an event's cursor; `oldest`, or `now`: after all that has happened.
    cursor: Word | None = None
    #: Patterns such as rule.*, with commas between them.
    kinds: Word = ""
    entity: Word | None = None
    #: With `entity`: of which one.
    id: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] | None = None
    #: Who did it.
    account: Word | None = None


@routes.get("/events", "event.read")
async def list_(context: Context, query: Search) -> wire.Events | web.StreamResponse:
    """List what happened, in order.

    With `Accept: text/event-stream` as server-sent events, without end and from now on: `id` is the cursor, `event` the
    kind, `data` the event as here. `Last-Event-ID`, or else `cursor`, says where to go on.
    """
    if EVENT_STREAM in context.request.headers.get("Accept", ""):
        return await _stream(context, query)
    return await context.read(
        events.page,
        cursor=query.cursor,
        kinds=_kinds(query),
        entity=query.entity,
        entity_id=query.id,
        account=query.account,
        limit=query.limit,
    )


class Feed:
    """Knows whether there is anything new, for all readers of a server."""

    def __init__(self, db: Database, work: Work) -> None:
        self._db = db
        self._work = work
        self._loop = asyncio.get_running_loop()
        #: Set when somebody wrote events in this process.
        self._woken = asyncio.Event()
        #: Up to where there is something; counts only how it changes.
        self._seen: events.Position | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.readers = 0
        self.stopping = False
        db.listeners.append(self._on_commit)

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        if self.readers >= STREAMS_MAX or self.stopping:
            raise Unavailable("too many are reading events", hint="try again in a while, or read page by page")
        self.readers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            yield
        finally:
            self.readers -= 1

    def news(self) -> asyncio.Event:
        """Set when there is something after what could be read when this was called."""
        return self._news

    def stop(self) -> None:
        self.stopping = True
        self._news.set()
        self._woken.set()

    async def close(self) -> None:
        self._db.listeners.remove(self._on_commit)
        self.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _on_commit(self, names: set[str]) -> None:
        if outbox.DELIVERY in names and self.readers:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._woken.set)

    async def _look(self) -> None:
        """While anybody reads."""
        while self.readers and not self.stopping:
            self._woken.clear()
            try:
                end = await self._work.read(False, events.end)
            except ReplicaError as error:
                get_logger().warning("events.not_looked_at", reason=error.message)
            else:
                if end != self._seen:
                    self._seen = end
                    self._news.set()
                    self._news = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._woken.wait()


FEED = web.AppKey("feed", Feed)


async def feeding(app: web.Application, db: Database, work: Work) -> AsyncIterator[None]:
    """For the application's time."""
    feed = app[FEED] = Feed(db, work)
    yield
    await feed.close()


async def _stream(context: Context, query: Search) -> web.StreamResponse:
    request = context.request
    feed = request.app[FEED]
    with feed.reader():
        cursor = request.headers.get("Last-Event-ID") or query.cursor or events.NOW
        # What is wrong with the request is said before the answer begins.
        news, found = feed.news(), await _read(context, query, cursor)
        clock = asyncio.get_running_loop().time
        response = web.StreamResponse(headers={"Content-Type": EVENT_STREAM, "X-Accel-Buffering": "no"})
        request[STARTED] = response
        await response.prepare(request)
        await _send(response, _here(found))
        sent_at = clock()
        while not feed.stopping:
            if found.items:
                await _send(response, b"".join(map(_written, found.items)))
                sent_at = clock()
            if not found.more:
                await _wait(news, sent_at + HEARTBEAT_SECONDS)
            if clock() >= sent_at + HEARTBEAT_SECONDS:
                await _send(response, _here(found))
                sent_at = clock()
            if not feed.stopping:
                news, found = feed.news(), await _read(context, query, found.next)
        await response.write_eof()
        return response


async def _read(context: Context, query: Search, cursor: str) -> wire.Events:
    return await context.read(
        events.page,
        cursor=cursor,
        kinds=_kinds(query),
        entity=query.entity,
        entity_id=query.id,
        account=query.account,
        limit=BATCH,
    )


async def _wait(news: asyncio.Event, until: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            await news.wait()


async def _send(response: web.StreamResponse, part: bytes) -> None:
    async with asyncio.timeout(routing.STALL_SECONDS):
        await response.write(part)


def _here(found: wire.Events) -> bytes:
    """Where to go on, and a sign of life: what was not wanted need not be looked through again."""
    return f": \nid: {found.next}\n\n".encode()


def _written(event: wire.Event) -> bytes:
    return f"id: {event.cursor}\nevent: {event.kind}\ndata: ".encode() + encode(event) + b"\n\n"


def _kinds(query: Search) -> list[str]:
    return [kind.strip() for kind in query.kinds.split(",") if kind.strip()]
