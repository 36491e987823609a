"""A site's transfer loop: claim some orders, copy them side by side, tell what became of each.

Given     the server and this site's token; no database, no broker.
Returns   nothing: files under their final names, and reports.
Promises  an order is worked on only while its lease is known to be alive, by the monotonic clock, and published only
          after asking that clock again; each outcome is reported until the server has heard it; a report that comes
          twice does no harm; a failure of the target never blames a source; nothing ends the loop but `stop`.
Partner   replica.storage.copy moves one file; replica.catalog.transfers gives orders and takes reports.

Beside all that go workers.removing, which removes what the site shall keep no longer, workers.scanning, which looks
whether its storages hold what the catalogue says, and workers.checking, which looks whether what they hold is right.

    claim ──▶ waiting ──▶ a slot: one large file, or a list of small ones ──▶ outcomes ──▶ report
      ▲          │                       ▲
      └── room ──┘          heartbeat ───┘  every third of a lease: progress there, "stop these" back

While the slots copy, the next orders are claimed and the last outcomes are told: nobody waits for a round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from replica import wire
from replica.client import AsyncClient
from replica.log import Sparing, get_logger
from replica.storage.base import Storage
from replica.storage.credentials import Credentials
from rules.errors import Invalid, NoSpace, NotAllowed, NotAuthenticated, ReplicaError, Unavailable
from workers.beside import Beside
from workers.carrying import LIST_BYTES, LIST_FILES, Carrier, Held
from workers.checking import Checker
from workers.removing import Remover
from workers.runtime import LEASE_TRUSTED, REQUEST_SECONDS
from workers.scanning import Scanner
from workers.storages import Storages

#: How much is claimed ahead of the slots.
WAITING_FILES = 1_000
WAITING_BYTES = 1 << 30
CLAIM_FILES = 500
#: When outcomes are told: so many are ready, or so long after the last or the first of them.
REPORT_FILES = 200
REPORT_FILES_MAX = 2_000
REPORT_QUIET_SECONDS = 0.05
REPORT_LATEST_SECONDS = 0.15
#: Between two claims that found nothing, however often the bell rings.
CLAIM_GAP_SECONDS = 0.02
BACK_OFF_MAX_SECONDS = 20.0
#: Temporaries that nobody wrote to for so long are nobody's; looked for at the first order for an endpoint, then daily.
STALE_PART_SECONDS = 48 * 3600.0
COLLECT_EVERY_SECONDS = 24 * 3600.0
SPACE_EVERY_SECONDS = 60.0

_Loop = TypeVar("_Loop", bound=Beside)


class Mover:
    """One site's worker. `run` in an event loop; `wake` and `stop` from any thread."""

    def __init__(
        self,
        server: str,
        token: Callable[[], str | None],
        *,
        label: str = "",
        roots: Sequence[str] = (),
        sources: Sequence[str] = (),
        credentials: Credentials | None = None,
        concurrency: int = 4,
        poll_seconds: float = 30.0,
        stop_seconds: float = 10.0,
        finish_seconds: float = 2.0,
        dice: Callable[[], float] = random.random,
    ) -> None:
        self.server = server
        self.name = f"mover {label}".strip()
        self.worker = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(3)}"
        self.concurrency = concurrency
        self.poll_seconds = poll_seconds
        #: How long a stop may take in all, and how long of it a large file is given to finish.
        self.stop_seconds = stop_seconds
        self.finish_seconds = finish_seconds
        self._storages = Storages(roots, credentials, sources)
        #: Counted since the start, for people and tests.
        self.done = self.failed = self.given_back = self.lost = self.bytes_done = 0
        #: By the monotonic clock: the last sign of life of the loop; None when it does not run.
        self.busy_since: float | None = None

        self._token = token
        self._dice = dice
        self._log = get_logger(worker=self.worker, **({"site": label} if label else {}))
        self._client: AsyncClient | None = None
        self._lease_seconds = 120.0
        #: At the last claim something waited for what is in flight to end.
        self._full = False
        self._held: dict[tuple[int, int], Held] = {}
        self._waiting: deque[Held] = deque()
        self._waiting_bytes = 0
        self._running = self._running_large = 0
        self._outcomes: deque[wire.Outcome] = deque()
        self._told_space: dict[str, float] = {}
        self._collected: dict[str, float] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state_lock = threading.Lock()
        self._stopping = False
        loops = ("claim", "report", "heartbeat", "removals", "scans", "checks")
        self._sparing = {what: Sparing(60) for what in loops}

    # ── from outside ─────────────────────────────────────────────────────────────────────────────────────────────────

    def wake(self) -> None:
        """There may be orders: look now. From any thread, at any time."""
        self._from_outside(self._wake_all)

    def _wake_all(self) -> None:
        self._woken.set()
        self.remover.wake()
        self.scanner.wake()
        self.checker.wake()

    def stop(self) -> None:
        """Claim nothing more, finish or give back what is held, report, and return from `run`."""
        with self._state_lock:
            self._stopping = True
        self._from_outside(lambda: self._stop_asked.set())

    def _from_outside(self, do: Callable[[], object]) -> None:
        with self._state_lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(do)

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        self._woken = asyncio.Event()
        self._stop_asked = asyncio.Event()
        #: Something changed for a slot (orders came), for the claimer (room), for the beater (something is held).
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._holding = asyncio.Event()
        self._to_report = asyncio.Event()
        if self._outcomes:
            self._to_report.set()
        self._carrier = Carrier(self._storages, self._finish, concurrency=self.concurrency)
        self.remover = self._beside(Remover)
        self.scanner = self._beside(Scanner)
        self.checker = self._beside(Checker)
        with self._state_lock:
            self._loop = asyncio.get_running_loop()
            if self._stopping:
                self._stop_asked.set()
        self.busy_since = time.monotonic()
        slots = [asyncio.create_task(self._slot()) for _ in range(self.concurrency)]
        claimer = asyncio.create_task(self._claim_for_ever())
        others = [asyncio.create_task(self._beat_for_ever()), asyncio.create_task(self._report_for_ever())]
        beside = [asyncio.create_task(loop.run()) for loop in (self.remover, self.scanner, self.checker)]
        self._log.info("mover.started", server=self.server, concurrency=self.concurrency)
        try:
            asked = asyncio.create_task(self._stop_asked.wait())
            tasks = [asked, claimer, *beside, *others, *slots]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[1:]:
                if task.done():
                    task.result()  # none of them ends by itself: this raises what went wrong
            await self._wind_up(claimer)
            # What they hold is given back and told; while the server does not answer, nothing else can be done for it.
            await asyncio.wait(beside, timeout=self.stop_seconds / 4)
        finally:
            for task in (*slots, claimer, *beside, *others, *self._background):
                task.cancel()
            for held in self._held.values():
                held.control.stop()
            await asyncio.gather(*slots, claimer, *beside, *others, *self._background, return_exceptions=True)
            # Should something have broken, who begins anew has no outcome for these: their leases must end.
            self._held.clear()
            self._waiting.clear()
            self._waiting_bytes = 0
            with self._state_lock:
                self._loop = None
            self.busy_since = None
            self._carrier.close()
            await self._storages.close()
            await self._drop_client()
            self._log.info("mover.stopped", done=self.done, failed=self.failed, given_back=self.given_back)

    def _beside(self, kind: type[_Loop]) -> _Loop:
        return kind(
            self._speak,
            self._trouble,
            self._storages,
            server=self.server,
            worker=self.worker,
            stopping=self._stop_asked,
            poll_seconds=self.poll_seconds,
            dice=self._dice,
        )

    async def _wind_up(self, claimer: asyncio.Task[None]) -> None:
        """Give back what has not begun, let the rest finish or stop it, and tell the server all of it."""
        deadline = time.monotonic() + self.stop_seconds
        # A claim that is on its way is waited for: orders that nobody knows to hold would wait for their lease to end.
        await asyncio.wait([claimer], timeout=min(2.0, self.stop_seconds / 2))
        while self._waiting:
            held = self._waiting.popleft()
            self._finish(held, held.outcome("given_back"))
        finish_by = time.monotonic() + min(self.finish_seconds, self.stop_seconds / 2)
        while self._running and time.monotonic() < finish_by:
            await asyncio.sleep(0.02)
        unfinished = [held for held in self._held.values() if not held.finished]
        for held in unfinished:
            held.control.stop()
        # A thread that waits for a disk hears that only when the disk answers. It cannot publish any more, so its order
        # can be given back without it; that needs the time that is left for telling the server.
        while self._running and time.monotonic() < deadline - self.stop_seconds / 4:
            await asyncio.sleep(0.02)
        for held in unfinished:
            self._finish(held, None)
        while self._held and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self._held:
            # Their leases end by themselves; nothing of theirs can be published without one.
            self._log.warning("mover.stopped_with_orders", orders=len(self._held))

    # ── claiming ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _claim_for_ever(self) -> None:
        failures = 0
        while not self._stopping:
            self.busy_since = time.monotonic()
            self._room.clear()
            if len(self._waiting) > WAITING_FILES - CLAIM_FILES or self._waiting_bytes >= WAITING_BYTES:
                await self._first_of(self._room.wait())
                continue
            self._woken.clear()
            try:
                more = await self._claim()
            except (ReplicaError, TimeoutError) as error:
                failures += 1
                await self._trouble("claim", error)
                # A hint does not shorten this: while the server is down, they come by the thousand when it is back.
                await self._first_of(asyncio.sleep(self._pause(failures)))
                continue
            if failures:
                self._works_again("claim")
                failures = 0
            if more:
                continue
            await self._first_of(asyncio.sleep(CLAIM_GAP_SECONDS))
            await self._first_of(self._woken.wait(), timeout=self.poll_seconds * (0.5 + self._dice()))

    async def _claim(self) -> bool:
        asked_at = time.monotonic()
        claim = wire.Claim(
            worker=self.worker,
            limit=min(CLAIM_FILES, WAITING_FILES - len(self._waiting)),
            limit_bytes=max(1, WAITING_BYTES - self._waiting_bytes),
        )
        orders = await asyncio.wait_for(self._speak().orders.claim(claim), REQUEST_SECONDS)
        self._lease_seconds = orders.lease_seconds
        self._full = orders.full
        for order in orders.orders:
            # Counted from before the question, so that the server can only think of it as longer.
            held = Held(order, asked_at + LEASE_TRUSTED * orders.lease_seconds)
            known = self._held.get(held.key)
            if known is not None:
                continue
            self._held[held.key] = held
            self._waiting.append(held)
            self._waiting_bytes += order.size
        if orders.orders:
            self._log.debug("orders.claimed", orders=len(orders.orders), more=orders.more)
            self._work.set()
            self._holding.set()
            self._look_after(orders.orders)
        return orders.more

    # ── copying ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _slot(self) -> None:
        while True:
            job = self._next_job()
            if not job:
                self._work.clear()
                await self._work.wait()
                continue
            large = not job[0].small
            self._running += 1
            self._running_large += large
            try:
                await self._carrier.carry(job)
            finally:
                self._running -= 1
                self._running_large -= large

    def _next_job(self) -> list[Held]:
        """The first of the waiting; if it is small, those behind it that may go with it, up to a fair share of them."""
        job: list[Held] = []
        size = 0
        share = min(LIST_FILES, math.ceil(len(self._waiting) / self.concurrency))
        passed: deque[Held] = deque()
        only_small = self._only_small()
        while self._waiting and not self._stopping and len(job) < share:
            held = self._waiting.popleft()
            if not held.alive:
                self._waiting_bytes -= held.order.size
                self._finish(held, None)
                continue
            fits = not job or (held.pair == job[0].pair and size + held.order.size <= LIST_BYTES)
            if not (fits and (held.small or not (job or only_small))):
                passed.append(held)
                continue
            self._waiting_bytes -= held.order.size
            held.running = not (held.small and held.remote)  # in a list of those, each begins when its turn comes
            job.append(held)
            size += held.order.size
            if not held.small:
                break
        self._waiting.extendleft(reversed(passed))
        self._room.set()
        return job

    def _only_small(self) -> bool:
        """All slots but this one carry large files, and small ones wait: they shall not wait for all of that."""
        busy = 1 < self.concurrency <= self._running_large + 1
        return busy and any(held.small for held in self._waiting)

    # ── outcomes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, held: Held, outcome: wire.Outcome | None) -> None:
        if held.finished:
            return
        held.finished = True
        if outcome is None and self._stopping and time.monotonic() < held.alive_until:
            outcome = held.outcome("given_back")
        if outcome is None:  # the lease was lost, or nobody wants it any more: nobody wants to hear of it either
            self.lost += 1
            self._held.pop(held.key, None)
            self._log.info("order.dropped", did=held.order.did, transfer=held.order.transfer, epoch=held.order.epoch)
            return
        match outcome.outcome:
            case "done":
                self.done += 1
                self.bytes_done += outcome.size or 0
            case "given_back":
                self.given_back += 1
            case "failed":
                self.failed += 1
                if outcome.error == NoSpace.code:  # the server should know soon how full it is
                    self._told_space.pop(held.order.target_endpoint, None)
                    self._look_after([held.order])
        self._outcomes.append(outcome)
        self._to_report.set()

    async def _report_for_ever(self) -> None:
        while True:
            await self._to_report.wait()
            self._to_report.clear()
            await self._linger()
            while self._outcomes:
                batch = [self._outcomes.popleft() for _ in range(min(REPORT_FILES_MAX, len(self._outcomes)))]
                await self._tell(batch)

    async def _linger(self) -> None:
        """A little, for more to come along; not at all when nothing else is on its way."""
        first = time.monotonic()
        while len(self._outcomes) < REPORT_FILES and (self._waiting or self._running):
            left = first + REPORT_LATEST_SECONDS - time.monotonic()
            if left <= 0:
                return
            try:
                await asyncio.wait_for(self._to_report.wait(), min(left, REPORT_QUIET_SECONDS))
            except TimeoutError:
                return
            self._to_report.clear()

    async def _tell(self, batch: list[wire.Outcome]) -> None:
        """Until the server has heard it: even after the lease's end, when nobody else has the order it still counts."""
        failures = 0
        while True:
            try:
                report = wire.Report(worker=self.worker, outcomes=batch)
                answer = await asyncio.wait_for(self._speak().orders.report(report), REQUEST_SECONDS)
            except Invalid as error:
                if len(batch) > 1:
                    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
                        await self._tell(half)
                    return
                # One outcome that the server cannot take must not hold up the others; its lease will end.
                self._log.error("outcome.refused", transfer=batch[0].transfer, reason=error.message)
                break
            except (ReplicaError, TimeoutError) as error:
                failures += 1
                await self._trouble("report", error)
                await asyncio.sleep(self._pause(failures))
            else:
                if failures:
                    self._works_again("report")
                if self._full:  # what ended made room, of which no hint need tell
                    self._woken.set()
                if answer.stale:
                    self._log.info("report.stale", transfers=answer.stale[:20], count=len(answer.stale))
                break
        for outcome in batch:
            self._held.pop((outcome.transfer, outcome.epoch), None)

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _beat_for_ever(self) -> None:
        beating: asyncio.Task[bool] | None = None
        due = time.monotonic() + self._lease_seconds / 3
        failures = 0
        while True:
            if not self._held:
                self._holding.clear()
                await self._holding.wait()
                due = time.monotonic() + self._lease_seconds / 3
            await asyncio.sleep(min(1.0, self._lease_seconds / 24))
            now = self.busy_since = time.monotonic()
            for held in self._held.values():
                if now >= held.alive_until and not held.finished and not held.control.stopping:
                    self._log.warning("lease.lost", did=held.order.did, transfer=held.order.transfer)
                    held.control.stop()
            if beating is not None and beating.done():
                failures = 0 if beating.result() else failures + 1
                # Until it is answered again it is asked more often: the orders depend on it.
                pause = self._lease_seconds / (12 if failures else 3)
                due, beating = now + pause, None
            if beating is None and now >= due and self._held:
                beating = asyncio.create_task(self._beat())

    async def _beat(self) -> bool:
        asked_at = time.monotonic()
        told = list(self._held.values())[: wire.BULK_MAX]
        beats = [
            wire.Beat(
                transfer=held.order.transfer,
                epoch=held.order.epoch,
                bytes_done=held.control.bytes_done,
                phase=held.phase,  # type: ignore[arg-type]
            )
            for held in told
        ]
        try:
            answer = await asyncio.wait_for(
                self._speak().orders.heartbeat(wire.Heartbeat(worker=self.worker, beats=beats)), self._lease_seconds / 3
            )
        except (ReplicaError, TimeoutError) as error:
            await self._trouble("heartbeat", error)
            return False
        self._works_again("heartbeat")
        self._lease_seconds = answer.lease_seconds
        stop = set(answer.stop)
        for held in told:
            if held.order.transfer in stop:
                if not held.finished:
                    self._log.info("order.stopped", did=held.order.did, transfer=held.order.transfer)
                held.control.stop()
            else:
                held.alive_until = max(held.alive_until, asked_at + LEASE_TRUSTED * answer.lease_seconds)
        return True

    # ── endpoints met on the way ─────────────────────────────────────────────────────────────────────────────────────

    def _look_after(self, orders: Sequence[wire.Order]) -> None:
        """Now and then: say how much room a target has, and clear away what killed workers left there."""
        now = time.monotonic()
        for name, url in {order.target_endpoint: order.target_url for order in orders}.items():
            if now - self._told_space.get(name, -math.inf) >= SPACE_EVERY_SECONDS:
                self._told_space[name] = now
                self._in_background(self._tell_space(name, url))
            if now - self._collected.get(name, -math.inf) >= COLLECT_EVERY_SECONDS:
                self._collected[name] = now
                self._in_background(self._collect(name, url))

    async def _tell_space(self, name: str, url: str) -> None:
        space = await (await self._target(url, name)).space()
        if space is not None:
            await self._speak().endpoints.report_space(name, space.free_bytes)

    async def _collect(self, name: str, url: str) -> None:
        collected = await (await self._target(url, name)).collect_parts(STALE_PART_SECONDS)
        if collected:
            self._log.info("parts.collected", endpoint=name, files=collected)

    async def _target(self, url: str, name: str) -> Storage:
        return await asyncio.to_thread(self._storages.get, url, name=name, side="target")

    def _in_background(self, work: Awaitable[None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except (ReplicaError, OSError, TimeoutError) as error:
                self._log.debug("endpoint.not_looked_after", reason=str(error))

        task = asyncio.create_task(guarded())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _speak(self) -> AsyncClient:
        if self._client is None:
            try:
                self._client = AsyncClient(self.server, self._token())
            except Invalid as error:  # the token file is not there yet, or is being written
                raise Unavailable(error.message, hint=error.hint) from error
        return self._client

    async def _drop_client(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(OSError):
                await client.close()

    async def _trouble(self, what: str, error: Exception) -> None:
        if isinstance(error, NotAuthenticated | NotAllowed):
            await self._drop_client()  # the next one is made with the token as it is then: it may have been renewed
        left_out = self._sparing[what].due()
        if left_out is not None:
            reason = error.message if isinstance(error, ReplicaError) else "no answer in time"
            hint = error.hint if isinstance(error, ReplicaError) else ""
            log = self._log.warning if isinstance(error, Unavailable | TimeoutError) else self._log.error
            log(f"{what}.not_answered", reason=reason, hint=hint, left_out=left_out)

    def _works_again(self, what: str) -> None:
        self._sparing[what].reset()

    def _pause(self, failures: int) -> float:
        return float(min(BACK_OFF_MAX_SECONDS, 0.25 * 2 ** min(failures, 10)) * (0.5 + self._dice() / 2))

    async def _first_of(self, awaitable: Awaitable[object], timeout: float | None = None) -> None:
        """Wait for it, for `timeout`, or for the end, whichever comes first."""
        waiting = asyncio.ensure_future(awaitable)
        stopping = asyncio.ensure_future(self._stop_asked.wait())
        try:
            await asyncio.wait([waiting, stopping], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            stopping.cancel()


class MoverThread(threading.Thread):
    """A mover with an event loop of its own. What should never happen is logged, and it begins anew."""

    def __init__(self, mover: Mover) -> None:
        super().__init__(name=mover.name, daemon=True)
        self.mover = mover
        self._log = get_logger()
        self._ending = threading.Event()

    def run(self) -> None:
        pause = 1.0
        while True:
            try:
                asyncio.run(self.mover.run())
                return
            except Exception:  # noqa: BLE001  a mover that dies in silence would leave its site without one
                self._log.exception("mover.broke", next_start_in_seconds=pause)
            if self._ending.wait(pause):
                return
            pause = min(60.0, pause * 2)

    def wake(self) -> None:
        self.mover.wake()

    def stop(self, seconds: float | None = None) -> bool:
        self._ending.set()
        self.mover.stop()
        if seconds is not None and self.ident is not None:
            self.join(seconds)
        return not self.is_alive()

    @property
    def busy_since(self) -> float | None:
        return self.mover.busy_since
