"""Whose a prefix of a bucket is: looked up once for all who ask at the same time.

Given     the wire to the server, and where the endpoint's prefix begins.
Returns   nothing, or Unreachable: the sentinel is not there, or it names another endpoint.
Promises  `now` looks after it was called, always: by it a file is believed to be missing, and files are removed.
          `lately` believes what was seen within SEEN_SECONDS: by it files are read and written. Of many who ask while
          a look is under way, all share the next one; so the looks of many small files cost next to nothing.
Partner   replica.storage.s3 asks before each verb; replica.storage.sentinel knows what is in the file.
"""

from __future__ import annotations

import time

from replica.storage.base import SENTINEL
from replica.storage.s3_wire import Wire
from replica.storage.sentinel import is_anothers, owner_in
from replica.storage.together import Together
from rules.errors import SourceMissing, Unreachable

#: A bucket is no disk that somebody unmounts; what changes it is an administrator's act.
SEEN_SECONDS = 1.0


class Home:
    def __init__(self, wire: Wire, base: str, *, name: str, url: str) -> None:
        self._wire, self._base, self._name, self._url = wire, base, name, url
        self._together = Together()
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
        await self._together.do(SENTINEL, self._look)

    async def _look(self) -> None:
        began = time.monotonic()
        known = await self.sentinel()
        if known is None:
            raise self._unreachable(
                f"{SENTINEL} is not in the bucket",
                "check that the URL names the right bucket and prefix; a new endpoint is prepared first",
            )
        if is_anothers(owner := owner_in(known), self._name):
            raise self._unreachable(
                f"the prefix belongs to the endpoint {owner}", "correct the URL of one of the two endpoints"
            )
        self._seen = began

    def _unreachable(self, reason: str, hint: str) -> Unreachable:
        return Unreachable(f"endpoint {self._name or self._url}: {reason}", hint=hint, endpoint=self._name)
