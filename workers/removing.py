"""A site's removal loop: claim some deletions, remove their bytes side by side, tell what became of each.

Given     the way to the server and the open storages of a mover, which this runs beside.
Returns   nothing: paths without files, and reports.
Promises  a file is removed only while the lease of its order is known to be alive, by the monotonic clock, asked right
          before the removal; what is not of the order's size is somebody else's and stays; nothing there is as good as
          removed; each outcome is reported until the server has heard it; nothing ends the loop but a stop.
Partner   workers.mover starts it; replica.catalog.removals gives orders and takes reports.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from replica import wire
from replica.log import Sparing
from replica.storage.base import Storage
from rules.errors import Busy, Invalid, Permanent, Refused, ReplicaError, SourceMissing
from workers.beside import Beside
from workers.runtime import LEASE_TRUSTED, REQUEST_SECONDS

#: How many one claim takes, and how many of them are removed side by side.
CLAIM_FILES = 1_000
AT_ONCE = 8
#: After so long what is done is told, also when not all is.
REPORT_SECONDS = 5.0
#: Failures are told so often.
SAY_AGAIN_SECONDS = 20.0


class Remover(Beside):
    """What the site shall keep no longer. At the stop, what has not begun is given back, and what is known is told."""

    what = "removals"

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._sparing = Sparing(SAY_AGAIN_SECONDS)
        self._waiting: deque[wire.DeletionOrder] = deque()
        self._running: dict[int, wire.DeletionOrder] = {}
        self._outcomes: list[wire.DeletionOutcome] = []
        #: Not ours any more, as the server said.
        self._lost: set[int] = set()
        #: Counted since the start, for people and tests.
        self.removed = self.failed = self.given_back = 0

    async def _round(self) -> float | None:
        more = await self._claim()
        if self._waiting:
            await self._work_off()
        return None if more else math.inf

    async def _claim(self) -> bool:
        asked_at = time.monotonic()
        claim = wire.DeletionClaim(worker=self._worker, limit=CLAIM_FILES)
        answer = await asyncio.wait_for(self._speak().deletions.claim(claim), REQUEST_SECONDS)
        self._leased(asked_at, answer.lease_seconds)
        self._lost.clear()
        self._waiting.extend(answer.orders)
        if answer.orders:
            self._log.debug("deletions.claimed", orders=len(answer.orders), more=answer.more)
        return answer.more

    async def _work_off(self) -> None:
        """All that was claimed, with beats and reports as time goes on."""
        helpers = [asyncio.create_task(self._remove_some()) for _ in range(min(AT_ONCE, len(self._waiting)))]
        beat_at = time.monotonic() + self._lease_seconds / 3
        try:
            while helpers:
                now = time.monotonic()
                patience = max(0.0, min(REPORT_SECONDS, beat_at - now))
                _, pending = await asyncio.wait(helpers, timeout=patience, return_when=asyncio.ALL_COMPLETED)
                helpers = list(pending)
                if helpers and time.monotonic() >= beat_at:
                    answered = await self._beat()
                    beat_at = time.monotonic() + self._lease_seconds / (3 if answered else 12)
                if helpers and self._outcomes:
                    await self._tell(once=True)
        finally:
            for helper in helpers:
                helper.cancel()
        while self._waiting:
            self._give_back(self._waiting.popleft())
        await self._tell()

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _remove_some(self) -> None:
        while self._waiting and not self._stopping.is_set():
            order = self._waiting.popleft()
            if not self._is_mine(order):
                continue  # it comes back to the queue by itself
            self._running[order.deletion] = order
            try:
                outcome = await self._remove(order)
            finally:
                self._running.pop(order.deletion, None)
            if outcome is not None:
                self._outcomes.append(outcome)

    def _is_mine(self, order: wire.DeletionOrder) -> bool:
        return order.deletion not in self._lost and self._is_alive

    async def _remove(self, order: wire.DeletionOrder) -> wire.DeletionOutcome | None:
        """None: the lease was lost before the bytes were touched; whoever has it now removes them."""
        try:
            storage = await asyncio.to_thread(self._open, order)
            try:
                found = await storage.stat(order.path)
            except SourceMissing:
                found = None
            if found is not None:
                if order.size is not None and found.size_bytes != order.size:
                    raise Refused(
                        f"there are {found.size_bytes} bytes at {order.path}, not the {order.size} of {order.did}: "
                        "not removed"
                    )
                if not self._is_mine(order):
                    return None
                await storage.delete(order.path)
        except Exception as error:  # noqa: BLE001  whatever it is, it is this order's outcome
            return self._not_removed(order, error)
        self.removed += 1
        return wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome="removed")

    def _open(self, order: wire.DeletionOrder) -> Storage:
        try:
            return self._storages.get(order.url, name=order.endpoint, side="target")
        except Invalid as error:
            raise Permanent(
                f"the URL of {order.endpoint} cannot be used: {error.message}", hint=error.hint, endpoint=order.endpoint
            ) from error

    def _not_removed(self, order: wire.DeletionOrder, error: Exception) -> wire.DeletionOutcome:
        self.failed += 1
        code = error.code if isinstance(error, ReplicaError) else "broken"
        message = str(error) or type(error).__name__
        left_out = self._sparing.due()
        if left_out is not None:
            story = {} if isinstance(error, ReplicaError) else {"exc_info": error}
            self._log.warning(
                "deletion.failed",
                did=order.did,
                deletion=order.deletion,
                endpoint=order.endpoint,
                error=code,
                reason=message,
                left_out=left_out,
                **story,
            )
        return wire.DeletionOutcome(
            deletion=order.deletion,
            epoch=order.epoch,
            outcome="failed",
            error=code,
            message=message[:4_000],
            retry_after_seconds=error.retry_after_seconds if isinstance(error, Busy) else None,
        )

    def _give_back(self, order: wire.DeletionOrder) -> None:
        if self._is_mine(order):
            self.given_back += 1
            back = wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome="given_back")
            self._outcomes.append(back)

    # ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _beat(self) -> bool:
        asked_at = time.monotonic()
        mine = [*self._running.values(), *self._waiting]
        told = [wire.DeletionBeat(deletion=o.deletion, epoch=o.epoch) for o in mine]
        told += [wire.DeletionBeat(deletion=o.deletion, epoch=o.epoch) for o in self._outcomes]
        heartbeat = wire.DeletionHeartbeat(worker=self._worker, beats=told)
        try:
            answer = await asyncio.wait_for(self._speak().deletions.heartbeat(heartbeat), self._lease_seconds / 3)
        except (ReplicaError, TimeoutError) as error:
            await self._trouble("removals", error)
            return False
        self._lease_seconds = answer.lease_seconds
        self._lost.update(answer.stop)
        self._alive_until = max(self._alive_until, asked_at + LEASE_TRUSTED * answer.lease_seconds)
        return True

    async def _tell(self, *, once: bool = False) -> None:
        """Until the server has heard it, or only try."""
        failures = 0
        while self._outcomes:
            batch = self._outcomes[:CLAIM_FILES]
            try:
                await self._report(batch)
            except (ReplicaError, TimeoutError) as error:
                await self._trouble("removals", error)
                if once:
                    return
                failures += 1
                await asyncio.sleep(self._back_off(failures))
                continue
            del self._outcomes[: len(batch)]

    async def _report(self, batch: Sequence[wire.DeletionOutcome]) -> None:
        report = wire.DeletionReport(worker=self._worker, outcomes=list(batch))
        try:
            answer = await asyncio.wait_for(self._speak().deletions.report(report), REQUEST_SECONDS)
        except Invalid as error:
            if len(batch) > 1:
                for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                    await self._report(half)
                return
            # One outcome that the server cannot take must not hold up the others; its lease will end.
            self._log.error("outcome.refused", deletion=batch[0].deletion, reason=error.message)
            return
        if answer.stale:
            self._log.info("report.stale", deletions=answer.stale[:20], count=len(answer.stale))
