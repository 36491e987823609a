"""A site's looks at its own replicas: probes of what is doubted, and scrubs, beside its mover.

Given     the way to the server and the open storages of a mover, which this runs beside.
Returns   nothing: findings, reported until the server has heard them.
Promises  nothing is ever written to a storage here. What cannot be reached or read decides nothing. *Missing* is said
          only by a storage that is itself there, and twice; *differs* of a probe after two whole reads from the device.
          A scrub reads no faster than its order says, in threads of its own: transfers are not held up by it.
Partner   workers.mover starts it; replica.catalog.checks gives the orders and takes the findings.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from replica import wire
from replica.log import Sparing
from replica.storage.base import Storage
from replica.storage.copy import Control, Expected, Stopped, measure_local
from replica.storage.hashing import Hasher
from replica.storage.judging import changed, needed
from replica.storage.pieces import closing
from replica.storage.posix import PIECE_BYTES, PosixStorage
from replica.storage.threads import run
from rules.checksums import Agreement, Checksums
from rules.errors import Busy, Invalid, ReplicaError, SourceMissing, Unreachable
from rules.integrity import Depth
from workers.beside import Beside
from workers.runtime import LEASE_TRUSTED, REQUEST_SECONDS

#: Probes read side by side; a scrub reads one file after the other.
PROBES_AT_ONCE = 2
#: What was found is told so often, so that a kill loses little.
REPORT_SECONDS = 5.0
#: Between the two looks that must both find nothing.
LOOK_AGAIN_SECONDS = 0.2
#: Of a file whose checksum a server is asked for: what servers of the field can tell.
TOLD_BY_SERVERS = ("sha256", "md5", "crc32c", "adler32")


class Paced(Control):
    """A read that goes no faster than so many bytes a second, over all that one batch reads."""

    __slots__ = ("_before", "_began", "_pieces", "_rate")

    def __init__(self, bytes_per_second: int | None) -> None:
        super().__init__()
        self._rate = bytes_per_second
        self._began = time.monotonic()
        self._before = self._pieces = 0

    def lag_seconds(self) -> float:
        """How far reading is ahead of its rate."""
        if not self._rate:
            return 0.0
        read = self._before + max(0, self._pieces - 1) * PIECE_BYTES
        return max(0.0, self._began + read / self._rate - time.monotonic())

    def check(self) -> None:
        """Called in a thread before each piece: there it may sleep, and still hears that it shall stop."""
        self._pieces += 1
        while (lag := self.lag_seconds()) > 0:
            super().check()
            time.sleep(min(lag, 0.1))
        super().check()

    def heard(self, size_bytes: int) -> None:
        """The same in an event loop, which must not sleep: only stopping."""
        self._before += size_bytes
        super().check()

    def file_ended(self, size_bytes: int) -> None:
        """Of a file that was read by `check`."""
        self._before += size_bytes
        self._pieces = 0


class Checker(Beside):
    """Whether what the site keeps is still right. At the stop, what has not been looked at is given back."""

    what = "checks"

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._sparing = Sparing(20.0)
        #: In hands, by file and endpoint; and the batch.
        self._probes: dict[tuple[int, int], wire.Check] = {}
        self._scrub: wire.ScrubOrder | None = None
        self._controls: set[Control] = set()
        #: Its own: a paced read sleeps, and copies must not wait for it.
        self._threads: ThreadPoolExecutor | None = None
        #: Counted since the start, for people and tests.
        self.checked = self.wrong = 0
        self.bytes_read = 0

    async def run(self) -> None:
        self._threads = ThreadPoolExecutor(PROBES_AT_ONCE, thread_name_prefix="check")
        try:
            await super().run()
        finally:
            for control in self._controls:
                control.stop()
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def _round(self) -> float | None:
        asked_at = time.monotonic()
        claim = wire.CheckClaim(worker=self._worker)
        answer = await asyncio.wait_for(self._speak().checks.claim(claim), REQUEST_SECONDS)
        self._leased(asked_at, answer.lease_seconds)
        self._probes = {(check.file, check.endpoint_id): check for check in answer.probes}
        self._scrub = answer.scrub
        if not answer.probes and answer.scrub is None:
            return answer.again_seconds or None
        beating = asyncio.create_task(self._beat_for_ever())
        stopping = asyncio.create_task(self._stop_reads())
        try:
            if answer.probes:
                await self._probe_all(answer.probes)
            if answer.scrub is not None:
                await self._scrub_batch(answer.scrub)
        finally:
            for task in (beating, stopping):
                task.cancel()
            await asyncio.gather(beating, stopping, return_exceptions=True)
            self._probes, self._scrub = {}, None
        return None

    async def _stop_reads(self) -> None:
        await self._stopping.wait()
        for control in self._controls:
            control.stop()

    # ── probes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _probe_all(self, checks: list[wire.Check]) -> None:
        slots = asyncio.Semaphore(PROBES_AT_ONCE)

        async def one(check: wire.Check) -> wire.CheckOutcome:
            async with slots:
                return await self._probe(check)

        findings = await asyncio.gather(*(one(check) for check in checks))
        mine = [f for f in findings if (f.file, f.endpoint_id) in self._probes]
        if mine:
            await self._tell(wire.CheckReport(worker=self._worker, probes=mine))

    async def _probe(self, check: wire.Check) -> wire.CheckOutcome:
        """Two looks that agree, if the first one finds it wrong."""
        if self._stopping.is_set() or (check.file, check.endpoint_id) not in self._probes:
            return _finding(check, "given_back")
        first = await self._look(check, Control())
        if first.outcome not in ("differs", "missing"):
            return first
        await asyncio.sleep(LOOK_AGAIN_SECONDS)
        second = await self._look(check, Control())
        if second.outcome == first.outcome:
            self.wrong += 1
            return second
        if second.outcome in ("failed", "given_back"):
            return second
        return _finding(
            check, "unsteady", message=f"{first.message or first.outcome}; looked at again: {second.outcome}"
        )

    # ── scrubs ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _scrub_batch(self, order: wire.ScrubOrder) -> None:
        control = Paced(order.bytes_per_second)
        look = self._look if order.depth == Depth.DEEP.value else self._look_shallow
        findings: list[wire.CheckOutcome] = []
        told_at = time.monotonic()
        trouble, over = "", True
        for check in order.checks:
            if self._stopping.is_set() or self._scrub is None:
                over = False
                break
            try:
                finding = await look(check, control, raising=True)
            except (Unreachable, Busy) as error:  # of the storage, not of this file: nothing after it is better
                trouble = str(error)
                break
            if finding.outcome == "given_back":
                over = False
                break
            findings.append(finding)
            self.wrong += finding.outcome in ("differs", "missing")
            if time.monotonic() - told_at > REPORT_SECONDS:
                if not await self._tell_scrub(order, findings, over=False):
                    return
                findings, told_at = [], time.monotonic()
            while (lag := control.lag_seconds()) > 0 and not self._stopping.is_set():
                await self._pause(min(lag, 1.0))
        if self._scrub is None:
            return
        # Stopped: the rest is another batch, and whoever claims it need not wait for a lease to end.
        rest = "" if over or trouble else "the worker was stopped"
        await self._tell_scrub(order, findings, over=over and not trouble, trouble=trouble or rest)

    async def _tell_scrub(
        self, order: wire.ScrubOrder, findings: list[wire.CheckOutcome], *, over: bool, trouble: str = ""
    ) -> bool:
        report = wire.ScrubReport(
            endpoint_id=order.endpoint_id, epoch=order.epoch, findings=findings, over=over, trouble=trouble[:4_000]
        )
        answer = await self._tell(wire.CheckReport(worker=self._worker, scrub=report))
        return answer is not None and answer.scrub_goes_on

    # ── one look ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _look(self, check: wire.Check, control: Control, *, raising: bool = False) -> wire.CheckOutcome:
        """All bytes, from the device. `raising`: what is the storage's fault, not the file's, comes out."""
        self._controls.add(control)
        try:
            expected = Expected(check.size, Checksums.of(check.checksums))
            algorithms = needed(expected)
            storage = await asyncio.to_thread(self._open, check)
            found = await storage.stat(check.path)
            if found.size_bytes != check.size:
                return _finding(
                    check, "differs", message=f"{check.path} has {found.size_bytes} bytes, the catalogue {check.size}"
                )
            size, checksums = await self._read(storage, check.path, algorithms, control)
            self.checked += 1
            self.bytes_read += size
            if size == check.size and checksums.compare(expected.checksums) is Agreement.AGREE:
                return _finding(check, "ok", size=size, checksums=checksums.as_dict())
            return _finding(check, "differs", message=_differs(check, size, checksums))
        except SourceMissing as error:
            return _finding(check, "missing", message=str(error))
        except Stopped:
            return _finding(check, "given_back")
        except (Unreachable, Busy) as error:
            if raising:
                raise
            return self._failed(check, error)
        except Exception as error:  # noqa: BLE001  whatever it is, it says nothing of the bytes
            return self._failed(check, error)
        finally:
            self._controls.discard(control)

    async def _look_shallow(self, check: wire.Check, control: Control, *, raising: bool = False) -> wire.CheckOutcome:
        """The size, and what the storage itself tells of the content."""
        try:
            storage = await asyncio.to_thread(self._open, check)
            found = await storage.stat(check.path)
            self.checked += 1
            if found.size_bytes != check.size:
                return _finding(
                    check, "differs", message=f"{check.path} has {found.size_bytes} bytes, the catalogue {check.size}"
                )
            for algorithm in TOLD_BY_SERVERS:
                known = check.checksums.get(algorithm)
                told = None if known is None else await storage.checksum(check.path, algorithm)
                if told is None:
                    continue
                if told != known:
                    text = f"the storage says that {check.path} has {algorithm} {told}, the catalogue {known}"
                    return _finding(check, "differs", message=text)
                break
            return _finding(check, "ok", size=found.size_bytes)
        except SourceMissing as error:
            return _finding(check, "missing", message=str(error))
        except (Unreachable, Busy) as error:
            if raising:
                raise
            return self._failed(check, error)
        except Exception as error:  # noqa: BLE001  as above
            return self._failed(check, error)

    async def _read(
        self, storage: Storage, path: str, algorithms: tuple[str, ...], control: Control
    ) -> tuple[int, Checksums]:
        if isinstance(storage, PosixStorage):
            read = partial(measure_local, storage, path, control=control, algorithms=algorithms, fresh=True)
            assert self._threads is not None
            size, checksums = await run(read, executor=self._threads, on_cancel=control.stop)
            if isinstance(control, Paced):
                control.file_ended(size)
            return size, checksums
        before = await storage.stat(path)
        hasher = Hasher(algorithms)
        async with closing(storage.read(path)) as pieces:
            async for piece in pieces:
                hasher.update(piece)
                if isinstance(control, Paced):
                    control.heard(len(piece))
                    if (lag := control.lag_seconds()) > 0:
                        await asyncio.sleep(lag)
                else:
                    control.check()
        after = await storage.stat(path)
        if after.etag != before.etag or hasher.size_bytes != after.size_bytes:
            raise changed(storage, path)
        return hasher.size_bytes, hasher.checksums()

    def _open(self, check: wire.Check) -> Storage:
        return self._storages.get(check.url, name=check.endpoint, side="target")

    def _failed(self, check: wire.Check, error: Exception) -> wire.CheckOutcome:
        code = error.code if isinstance(error, ReplicaError) else "broken"
        message = str(error) or type(error).__name__
        left_out = self._sparing.due()
        if left_out is not None:
            story = {} if isinstance(error, ReplicaError) else {"exc_info": error}
            self._log.warning(
                "check.failed",
                did=check.did,
                endpoint=check.endpoint,
                error=code,
                reason=message,
                left_out=left_out,
                **story,
            )
        return _finding(check, "failed", error=code, message=message[:4_000])

    # ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _beat_for_ever(self) -> None:
        pause = self._lease_seconds / 3
        while True:
            await asyncio.sleep(pause)
            asked_at = time.monotonic()
            probes = [
                wire.ProbeBeat(file=c.file, endpoint_id=c.endpoint_id, epoch=c.epoch) for c in self._probes.values()
            ]
            scrub = None if self._scrub is None else (self._scrub.endpoint_id, self._scrub.epoch)
            beat = wire.CheckHeartbeat(worker=self._worker, probes=probes, scrub=scrub)
            try:
                answer = await asyncio.wait_for(self._speak().checks.heartbeat(beat), self._lease_seconds / 3)
            except (ReplicaError, TimeoutError) as error:
                await self._trouble("checks", error)
                pause = self._lease_seconds / 12
                continue
            pause = answer.lease_seconds / 3
            self._alive_until = asked_at + LEASE_TRUSTED * answer.lease_seconds
            for key in [key for key in self._probes if key[0] in answer.stop]:
                del self._probes[key]
            if answer.stop_scrub and self._scrub is not None:
                self._scrub = None
                for control in self._controls:
                    control.stop()

    async def _tell(self, report: wire.CheckReport) -> wire.CheckAnswer | None:
        """Until the server has heard it, or it cannot count any more."""
        failures = 0
        while True:
            try:
                answer = await asyncio.wait_for(self._speak().checks.report(report), REQUEST_SECONDS)
            except Invalid as error:
                self._log.error("findings.refused", reason=error.message)
                return None
            except (ReplicaError, TimeoutError) as error:
                await self._trouble("checks", error)
                failures += 1
                if self._stopping.is_set() or not self._is_alive:
                    return None  # the lease ends by itself, and somebody looks again
                await asyncio.sleep(self._back_off(failures))
                continue
            if answer.stale:
                self._log.info("findings.stale", files=answer.stale[:20], count=len(answer.stale))
            return answer


def _finding(check: wire.Check, outcome: str, **more: object) -> wire.CheckOutcome:
    return wire.CheckOutcome(file=check.file, endpoint_id=check.endpoint_id, epoch=check.epoch, outcome=outcome, **more)  # type: ignore[arg-type]


def _differs(check: wire.Check, size: int, checksums: Checksums) -> str:
    if size != check.size:
        return f"{check.path} has {size} bytes, the catalogue {check.size}"
    found = checksums.as_dict()
    algorithm = next(a for a, known in check.checksums.items() if a in found and found[a] != known)
    known = check.checksums[algorithm]
    return f"{check.path} has {algorithm} {found[algorithm]}, and the catalogue knows {known}"
