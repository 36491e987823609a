"""Whose a prefix of a bucket is: looked up once for all who ask at the same time.

Given     the wire to the server, and where the endpoint's prefix begins.
Returns   nothing, or Unreachable: the sentinel is not there, or it names another endpoint.
Promises  `now` looks after it was called, always: by it a file is believed to be missing, and files are removed.
          `lately` believes what was seen within SEEN_SECONDS: by it files are read and written. Of many who ask while
          a look is under way, all share the next one; so the looks of many small files cost next to nothing.
Partner   replica.storage.s3 asks before each verb; replica.storage.sentinel knows what is in the file.
"""

from __future__ import annotations

import asyncio
import copy
import time
from weakref import WeakKeyDictionary

from replica.storage.base import SENTINEL
from replica.storage.s3_wire import Wire
from replica.storage.sentinel import is_anothers, owner_in
from rules.errors import SourceMissing, StorageError, Unreachable

#: A bucket is no disk that somebody unmounts; what changes it is an administrator's act.
SEEN_SECONDS = 1.0


class _Looks:
    """Those of one event loop."""

    def __init__(self) -> None:
        self.running: asyncio.Task[StorageError | None] | None = None
        self.next: asyncio.Task[StorageError | None] | None = None


class Home:
    def __init__(self, wire: Wire, base: str, *, name: str, url: str) -> None:
        self._wire, self._base, self._name, self._url = wire, base, name, url
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, _Looks] = WeakKeyDictionary()
        #: When the last look began that found our sentinel.
        self._seen = float("-inf")

    async def sentinel(self) -> str | None:
        """What is in the file; None: there is none."""
        try:
            answer = await self._wire.call("GET", self._base + SENTINEL, path=SENTINEL)
        except SourceMissing:
            return None
        return answer.body.decode(errors="replace")

    async def lately(self) -> None:
        if time.monotonic() - self._seen > SEEN_SECONDS:
            await self.now()

    async def now(self) -> None:
        """It is there and ours, or Unreachable: an emptied or a wrong bucket looks like one without our file."""
        looks = self._loops.setdefault(asyncio.get_running_loop(), _Looks())
        if looks.next is None:
            looks.next = asyncio.create_task(self._look(looks))
        error = await asyncio.shield(looks.next)
        if error is not None:
            raise copy.copy(error)  # several callers raise it, and each blames another side

    async def _look(self, looks: _Looks) -> StorageError | None:
        if looks.running is not None:
            await asyncio.wait([looks.running])
        looks.running, looks.next = looks.next, None
        began = time.monotonic()
        try:
            known = await self.sentinel()
        except StorageError as error:
            return error
        if known is None:
            return self._unreachable(
                f"{SENTINEL} is not in the bucket",
                "check that the URL names the right bucket and prefix; a new endpoint is prepared first",
            )
        if is_anothers(owner := owner_in(known), self._name):
            return self._unreachable(
                f"the prefix belongs to the endpoint {owner}", "correct the URL of one of the two endpoints"
            )
        self._seen = began
        return None

    def _unreachable(self, reason: str, hint: str) -> Unreachable:
        return Unreachable(f"endpoint {self._name or self._url}: {reason}", hint=hint, endpoint=self._name)
