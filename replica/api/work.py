"""Catalogue functions in threads, each in one transaction that begins and ends here.

Given     a Database and a function of the catalogue.
Returns   what the function returns, after the commit.
Promises  no more transactions at once than the database has connections: the others wait in line instead of failing,
          up to a bound. Orders and tokens have a line of their own, so that a heartbeat never waits behind bulk work.
          On SQLite, which has one writer, one thread writes. A write that lost a race is done again.
          A keyed write has one effect, whoever sends it how often: its answer is stored with its effect.
Partner   replica.api.routing hands this to the handlers; replica.catalog does the work.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Concatenate, ParamSpec, TypeVar

import msgspec

from replica.catalog import idempotency
from replica.db import schema
from replica.db.engine import Database, Session
from rules.errors import Conflict, ReplicaError, Unavailable

P = ParamSpec("P")
T = TypeVar("T")

#: Requests that wait in one line; more are refused at once, so that an overload stays bounded.
WAITING_MAX = 1_000
#: How often a write that lost a race is tried.
WRITE_TRIES = 3
#: Items that a stream fetches and encodes at a time.
STREAM_BATCH = 1_000
#: How often a server with an unfit schema looks whether it has been migrated.
SCHEMA_SECONDS = 1.0

encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines


@dataclass(frozen=True, slots=True)
class Key:
    """An Idempotency-Key, for whom it holds, and what was asked under it."""

    account: str
    key: str
    request_hash: bytes


class Replayed(Exception):
    """The answer that this key got the first time."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__()
        self.status = status
        self.body = body


class Line:
    """Threads, and how many wait for them."""

    def __init__(self, name: str, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"replica-api-{name}")
        self._most = WAITING_MAX + threads
        self._inside = 0

    async def run(self, work: Callable[[], T]) -> T:
        if self._inside >= self._most:
            raise Unavailable("the server has more to do than it can", hint="nothing was changed; try again in a while")
        self._inside += 1
        done = asyncio.get_running_loop().run_in_executor(self._pool, partial(contextvars.copy_context().run, work))
        # Counted until the thread is free again, also when the one who asked has gone away.
        done.add_done_callback(self._leave)
        return await asyncio.shield(done)

    def _leave(self, done: asyncio.Future[T]) -> None:
        self._inside -= 1
        if not done.cancelled():
            done.exception()  # nobody may be left to ask for it

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Work:
    def __init__(self, db: Database) -> None:
        self.db = db
        size = db.pool_size
        self._people = Line("request", size)
        self._quick = Line("quick", max(2, size // 2))
        self._streams = asyncio.Semaphore(max(1, size // 4))
        one_writer = db.url.get_backend_name() == "sqlite"
        self._writers = Line("writer", 1) if one_writer else None
        self._schema_error: ReplicaError | None = Unavailable("the database was not looked at yet")
        self._schema_at = 0.0
        self._schema_lock = asyncio.Lock()

    async def read(
        self, quick: bool, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        def work() -> T:
            with self.db.read() as s:
                return function(s, *args, **kwargs)

        return await (self._quick if quick else self._people).run(work)

    async def write(
        self,
        quick: bool,
        key: Key | None,
        status: int,
        function: Callable[Concatenate[Session, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """With a `key`: Replayed where its work is done already. `status` is what its answer will have."""

        def once() -> T:
            with self.db.write() as s:
                if key is not None:
                    _replay(s, key)
                result = function(s, *args, **kwargs)
                if key is not None:
                    idempotency.store(s, key.account, key.key, key.request_hash, status, encode(result))
                return result

        def work() -> T:
            for tries_left in reversed(range(WRITE_TRIES)):
                try:
                    return once()
                except ReplicaError as error:
                    if key is not None:
                        # Perhaps the same request, sent twice, was quicker: then its answer is ours, too.
                        with self.db.read() as s:
                            _replay(s, key)
                    if not isinstance(error, Conflict) or not tries_left:
                        raise
            raise AssertionError("the last try returns or raises")

        return await (self._writers or (self._quick if quick else self._people)).run(work)

    async def lines(
        self, function: Callable[Concatenate[Session, P], Iterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Stream:
        """A stream whose first part is there: what is wrong from the beginning is raised here."""

        def parts() -> Generator[bytes, None, None]:
            count = 0
            with self.db.read() as s, closing(_generator(function(s, *args, **kwargs))) as items:
                while batch := list(islice(items, STREAM_BATCH)):
                    count += len(batch)
                    yield _encode_lines(batch)
            yield encode({"end": True, "count": count}) + b"\n"

        try:
            async with asyncio.timeout(30):
                await self._streams.acquire()
        except TimeoutError:
            raise Unavailable("too many lists are being read", hint="try again in a while, or page by page") from None
        stream = Stream(parts(), self._people, self._streams.release)
        try:
            await stream.advance()
        except BaseException:
            await stream.close()
            raise
        return stream

    async def aside(self, work: Callable[[], T]) -> T:
        """Work that needs no database, only a thread."""
        return await self._quick.run(work)

    async def check_schema(self) -> None:
        """Unavailable with the remedy while the schema is not this release's; once it is, asked no more."""
        if self._schema_error is None:
            return
        async with self._schema_lock:
            if self._schema_error is not None and time.monotonic() >= self._schema_at:
                await self._look_at_schema()
        if self._schema_error is not None:
            raise self._schema_error.with_traceback(None)

    async def check_now(self) -> None:
        """The same, whatever was seen before."""
        async with self._schema_lock:
            await self._look_at_schema()
        if self._schema_error is not None:
            raise self._schema_error.with_traceback(None)

    async def _look_at_schema(self) -> None:
        try:
            await self._quick.run(partial(schema.check, self.db))
            self._schema_error = None
        except ReplicaError as error:
            self._schema_error = error
            self._schema_at = time.monotonic() + SCHEMA_SECONDS

    def close(self) -> None:
        """Waits for the transactions that have begun."""
        for line in (self._people, self._quick, self._writers):
            if line is not None:
                line.close()


class Stream:
    """Parts of an answer, fetched one at a time in a thread; between two parts it holds a connection but no thread."""

    def __init__(self, parts: Generator[bytes, None, None], line: Line, release: Callable[[], None]) -> None:
        self._parts = parts
        self._line = line
        self._release: Callable[[], None] | None = release
        # Who goes away in the middle leaves a thread that is still fetching.
        self._one = threading.Lock()
        self.part: bytes | None = None

    async def advance(self) -> None:
        """The following part into `part`; None at the end."""
        self.part = await self._line.run(self._next)

    async def close(self) -> None:
        """Ends the transaction, wherever the reading stopped."""
        release, self._release = self._release, None
        if release is None:
            return
        try:
            await self._line.run(self._end)
        finally:
            release()

    def _next(self) -> bytes | None:
        with self._one:
            return next(self._parts, None)

    def _end(self) -> None:
        with self._one:
            self._parts.close()


def _replay(s: Session, key: Key) -> None:
    done = idempotency.find(s, key.account, key.key, key.request_hash)
    if done is not None:
        raise Replayed(*done)


def _generator(items: Iterator[T]) -> Generator[T, None, None]:
    """Something that can be closed, whatever kind of iterator it was."""
    yield from items
