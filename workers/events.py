"""Tell webhooks what happened, and forget what is too old to be told.

Given     the database.
Returns   a Report.
Promises  nothing is sent inside a transaction; of a webhook one delivery at a time, in order; one that hangs holds up
          no other; what it answers is read no further than a line; redirects are not followed, so nothing is signed
          for a server that nobody named. A delivery counts when the answer is 2xx.
Partner   replica.catalog.webhooks says what is next and keeps what became of it; replica.catalog.events has the log.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import TypeVar

import aiohttp
import msgspec
from yarl import URL

from replica import wire
from replica.catalog import events, webhooks
from replica.catalog.webhooks import Parcel
from replica.db.engine import Database, Session
from replica.log import get_logger
from workers.runtime import Report

T = TypeVar("T")

#: A webhook that needs longer for its answer has failed.
ANSWER_SECONDS = 20.0
CONNECT_SECONDS = 5.0
#: How long a delivery is one process's alone: longer than it can take.
LEASE_SECONDS = 60.0
#: Deliveries at the same time.
AT_ONCE = 20
#: No delivery begins later in a round; the next round is at once.
ROUND_SECONDS = 60.0
#: While deliveries are under way, how soon others are looked for.
LOOK_SECONDS = 1.0
#: Of an answer that is a refusal, so much is kept for people.
ANSWER_MAX = 300

#: What one round of forgetting does at most.
FORGET_MAX = 200_000


def deliver(db: Database) -> Report:
    """Everything that is due now."""
    with db.read() as s:
        if not webhooks.waiting(s):  # as ever: no loop and no thread for nothing
            return Report()
    return asyncio.run(_Round(db).run())


class _Round:
    def __init__(self, db: Database) -> None:
        self._db = db
        self._ends = time.monotonic() + ROUND_SECONDS
        #: The database has one thread of this pass, as it has one connection of every pass.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="events")
        self.sent = 0
        self.failed = 0

    async def run(self) -> Report:
        flying: dict[int, asyncio.Task[bool]] = {}
        more = True
        timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS, sock_connect=CONNECT_SECONDS)
        try:
            async with aiohttp.ClientSession(
                timeout=timeout,
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
                connector=aiohttp.TCPConnector(limit=AT_ONCE, force_close=True),
            ) as http:
                while flying or more:
                    more = False
                    if time.monotonic() < self._ends:
                        known = frozenset(flying)
                        for webhook_id in await self._read(lambda s: webhooks.waiting(s, but=known)):  # noqa: B023
                            if len(flying) < AT_ONCE:
                                flying[webhook_id] = asyncio.create_task(self._one(http, webhook_id))
                    if flying:
                        await asyncio.wait(flying.values(), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED")
                    for webhook_id in [id_ for id_, task in flying.items() if task.done()]:
                        more |= flying.pop(webhook_id).result()
        finally:
            self._thread.shutdown()
        return Report(seen=self.sent + self.failed, done=self.sent, more=time.monotonic() >= self._ends)

    async def _one(self, http: aiohttp.ClientSession, webhook_id: int) -> bool:
        """One delivery to one webhook; True when there may be another at once."""
        parcel, more = await self._write(partial(_claim, webhook_id=webhook_id))
        if parcel is None:
            return more
        reason = await post(http, parcel, time.time())
        if reason is None:
            self.sent += 1
            return await self._write(partial(webhooks.delivered, parcel=parcel)) and more
        self.failed += 1
        get_logger().warning("webhook.failed", webhook=parcel.name, reason=reason)
        await self._write(partial(webhooks.failed, parcel=parcel, reason=reason, fraction=random.random()))
        return False

    async def _read(self, function: Callable[[Session], T]) -> T:
        def work() -> T:
            with self._db.read() as s:
                return function(s)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _write(self, function: Callable[[Session], T]) -> T:
        def work() -> T:
            with self._db.write() as s:
                return function(s)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _claim(s: Session, webhook_id: int) -> tuple[Parcel | None, bool]:
    return webhooks.claim(s, webhook_id, LEASE_SECONDS)


async def post(http: aiohttp.ClientSession, parcel: Parcel, now: float) -> str | None:
    """Send it; None when it was taken, else why not, in a sentence."""
    body = msgspec.json.encode(wire.Delivery(webhook=parcel.name, events=parcel.events))
    moment = str(int(now))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "replica",
        "Accept-Encoding": "identity",
        "Replica-Webhook": parcel.name,
        "Replica-Timestamp": moment,
        "Replica-Signature": signature(parcel.secret, moment, body),
    }
    try:
        url = URL(parcel.url)
        async with http.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            if 200 <= answer.status < 300:
                return None
            if 300 <= answer.status < 400:
                there = answer.headers.get("Location", "")[:ANSWER_MAX]
                return (
                    f"it answered {answer.status} and sends us to {there!a}: make the webhook anew with the right URL"
                )
            said = await answer.content.read(ANSWER_MAX)
            return f"it answered {answer.status}: {said.decode(errors='replace')!a}"
    except TimeoutError:
        return f"it did not answer within {ANSWER_SECONDS:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"it cannot be reached: {str(error) or type(error).__name__}"


def signature(secret: str, moment: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), moment.encode() + b"." + body, hashlib.sha256).hexdigest()


def forget(db: Database, keep_transfer_events_days: int = 7, keep_events_days: int = 730) -> Report:
    """Walks through what may be old, a bounded slice in a transaction."""
    transfers, others = timedelta(days=keep_transfer_events_days), timedelta(days=keep_events_days)
    forgotten = 0
    reached: events.Position | None = events.Position()
    while reached is not None and forgotten < FORGET_MAX:
        with db.write() as s:
            count, reached = events.forget(s, reached, transfers=transfers, others=others)
        forgotten += count
    return Report(seen=forgotten, done=forgotten, more=reached is not None)
