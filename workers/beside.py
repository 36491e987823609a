"""What runs beside a site's mover, in its event loop: ask for work, do it, wait for a bell or for a while.

Given     the way to the server and the open storages of the mover.
Returns   nothing.
Promises  nothing ends the loop but the stop; while the server does not answer it asks ever less often; no two workers
          ask in step.
Partner   workers.removing, scanning and checking say what a round is; workers.mover starts them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar

from replica.client import AsyncClient
from replica.log import get_logger
from rules.errors import ReplicaError
from workers.runtime import LEASE_TRUSTED
from workers.storages import Storages

BACK_OFF_MAX_SECONDS = 60.0


class Beside:
    """`run` in the mover's event loop; `wake` from there, too."""

    #: How the mover's log calls it.
    what: ClassVar[str]
    #: Between two rounds that found nothing, however often the bell rings.
    gap_seconds: ClassVar[float] = 0.0

    def __init__(
        self,
        speak: Callable[[], AsyncClient],
        trouble: Callable[[str, Exception], Awaitable[None]],
        storages: Storages,
        *,
        server: str,
        worker: str,
        stopping: asyncio.Event,
        poll_seconds: float,
        dice: Callable[[], float],
    ) -> None:
        self._speak = speak
        self._trouble = trouble
        self._storages = storages
        self._server = server
        self._worker = worker
        self._stopping = stopping
        self._poll_seconds = poll_seconds
        self._dice = dice
        self._woken = asyncio.Event()
        self._log = get_logger(worker=worker)
        self._lease_seconds = 120.0
        self._alive_until = 0.0

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        """Until the stop."""
        failures = 0
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                seconds = await self._round()
            except (ReplicaError, TimeoutError) as error:
                failures += 1
                await self._trouble(self.what, error)
                await self._pause(self._back_off(failures))
                continue
            failures = 0
            if seconds is not None:
                await self._pause(min(self.gap_seconds, self._poll_seconds))
                await self._pause(min(seconds, self._poll_seconds * (0.5 + self._dice())), self._woken)

    async def _round(self) -> float | None:
        """Ask, work, tell. Returns after how long to ask again, if no bell rings and no poll is due; None: at once."""
        raise NotImplementedError

    def _back_off(self, failures: int) -> float:
        return float(min(BACK_OFF_MAX_SECONDS, 0.5 * 2 ** min(failures, 10)) * (0.5 + self._dice() / 2))

    def _leased(self, asked_at: float, lease_seconds: float) -> None:
        """Counted from before the question, so that the server can only think of it as longer."""
        self._lease_seconds = lease_seconds
        self._alive_until = asked_at + LEASE_TRUSTED * lease_seconds

    @property
    def _is_alive(self) -> bool:
        return time.monotonic() < self._alive_until

    async def _pause(self, seconds: float, woken: asyncio.Event | None = None) -> None:
        if seconds <= 0:
            return
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._stopping, woken) if event is not None]
        try:
            await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waiting:
                wait.cancel()
