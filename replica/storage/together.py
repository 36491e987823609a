"""The same thing done once for all who want it at the same time.

Given     an act by a key, and callers who need it done after they came.
Returns   nothing, or the act's StorageError, to each of them.
Promises  the act that serves a caller begins after the caller came. While one is under way, all who come share the next
          one, so of a hundred at once two or three are done. A caller who is cancelled cancels nobody else's.
Partner   replica.storage.s3_home (is it our bucket) and replica.storage.sftp (the lines of a folder are on the disk).
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable
from weakref import WeakKeyDictionary

from rules.errors import StorageError

Act = Callable[[], Awaitable[None]]


class _Turn:
    def __init__(self) -> None:
        self.running: asyncio.Task[StorageError | None] | None = None
        self.next: asyncio.Task[StorageError | None] | None = None


class Together:
    """May be used from several event loops; each does its own."""

    def __init__(self) -> None:
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Turn]] = WeakKeyDictionary()

    async def do(self, key: str, act: Act) -> None:
        """`act` of one of those who wait is done for all of them."""
        turns = self._loops.setdefault(asyncio.get_running_loop(), {})
        turn = turns.setdefault(key, _Turn())
        if turn.next is None:
            turn.next = asyncio.create_task(self._run(turns, key, turn, act))
        error = await asyncio.shield(turn.next)
        if error is not None:
            raise copy.copy(error)  # several raise it, and each says more about it

    async def _run(self, turns: dict[str, _Turn], key: str, turn: _Turn, act: Act) -> StorageError | None:
        if turn.running is not None:
            await asyncio.wait([turn.running])
        turn.running, turn.next = turn.next, None
        try:
            await act()
        except StorageError as error:
            return error
        finally:
            if turn.next is None and turns.get(key) is turn:
                del turns[key]
        return None
