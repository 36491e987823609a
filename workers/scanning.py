"""A site's scans: list what a storage has, compare it with what the catalogue knows, tell what differs.

Given     the way to the server and the open storages of a mover, which this runs beside.
Returns   nothing: findings, and files that nobody knows in quarantine.
Promises  the catalogue is asked before the listing begins, and the server asks it again with each finding. Before the
          listing and after it the storage must show the endpoint's own mark, so that a disk that is not mounted is a
          failure and not a list of losses. A listing that breaks off is none. Memory does not grow with the files, and
          transfers go on beside. What is moved to quarantine is what was found: the same size and time, looked at while
          the lease is known to be alive. Who was killed goes on with what was complete; nothing
          ends the loop but a stop.
Partner   workers.mover starts it; replica.catalog.scanning and .dark give orders; replica.storage.comparing compares.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from replica import wire
from replica.client.calls import NOTHING
from replica.client.scans import claim_call, know, order_call, told_of
from replica.storage.base import OWN, Entry, Storage
from replica.storage.comparing import Comparison, Dark, Missing, own_folder, remove_stale
from rules.errors import Busy, Conflict, NotFound, ReplicaError, SourceMissing, Unreachable
from workers.beside import Beside
from workers.runtime import LEASE_TRUSTED, REQUEST_SECONDS

#: How many entries of a listing are dealt out at a time, and how many findings are told at a time.
ENTRIES = 5_000
FINDINGS = 5_000
#: How many files are looked for side by side, or moved away.
AT_ONCE = 16

T = TypeVar("T")


class _Lost(Exception):
    """The scan is not ours any more."""


class Scanner(Beside):
    """Whether the site's storages hold what the catalogue says, and nothing else."""

    what = "scans"
    gap_seconds = 2.0

    def __init__(self, *given: Any, folder: Path | None = None, **more: Any) -> None:
        super().__init__(*given, **more)
        self._folder = folder
        self._phase = ""
        self._files = 0
        #: Counted since the start, for people and tests.
        self.scanned = self.failed = self.moved_away = 0

    async def _round(self) -> float | None:
        asked_at = time.monotonic()
        call = claim_call(wire.ScanClaim(worker=self._worker))
        work = await asyncio.wait_for(self._speak().send(call), REQUEST_SECONDS)
        self._leased(asked_at, work.lease_seconds)
        if work.scan is not None:
            await self._carry_out(work.scan)
        elif work.dark:
            await self._move_away(work.dark)
        else:
            return math.inf
        return None

    # ── one scan ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _carry_out(self, order: wire.ScanOrder) -> None:
        """With beats beside it, until it ends, is lost, or this worker is to stop."""
        self._log.info("scan.began", scan=order.scan, endpoint=order.endpoint, what=order.what, epoch=order.epoch)
        self._phase, self._files = order.what, 0
        work = asyncio.create_task(self._scan(order))
        stop = asyncio.create_task(self._stopping.wait())
        try:
            beat_at = time.monotonic() + self._lease_seconds / 3
            while not work.done():
                await asyncio.wait(
                    [work, stop],
                    timeout=max(0.0, min(1.0, beat_at - time.monotonic())),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if stop.done() and not work.done():
                    raise _Lost
                if not work.done() and time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + min(2.0, self._lease_seconds / 3)
                    await self._beat(order)
            work.result()
            self.scanned += 1
        except _Lost:
            if self._stopping.is_set():
                await self._tell_failed(order, "", given_back=True)
            else:
                self._log.info("scan.lost", scan=order.scan, epoch=order.epoch)
        except (Conflict, NotFound) as error:
            self._log.info("scan.lost", scan=order.scan, epoch=order.epoch, reason=error.message)
        except Exception as error:  # noqa: BLE001  whatever it is, it is this scan's outcome
            self.failed += 1
            message = error.message if isinstance(error, ReplicaError) else f"{type(error).__name__}: {error}"
            hint = f" ({error.hint})" if isinstance(error, ReplicaError) and error.hint else ""
            story = {} if isinstance(error, ReplicaError) else {"exc_info": error}
            self._log.warning("scan.failed", scan=order.scan, endpoint=order.endpoint, reason=message, **story)
            await self._tell_failed(order, f"{message}{hint}"[:2_000])
        finally:
            stop.cancel()
            work.cancel()
            await asyncio.gather(work, stop, return_exceptions=True)

    async def _beat(self, order: wire.ScanOrder) -> None:
        asked_at = time.monotonic()
        beat = wire.ScanBeat(scan=order.scan, epoch=order.epoch, phase=self._phase[:12], files=self._files)
        try:
            call = order_call("heartbeat", wire.HeartbeatAnswer, beat)
            answer = await asyncio.wait_for(self._speak().send(call), max(1.0, self._lease_seconds / 3))
        except (ReplicaError, TimeoutError) as error:
            await self._trouble("scans", error)
            return
        if answer.stop:
            raise _Lost
        self._alive_until = max(self._alive_until, asked_at + LEASE_TRUSTED * answer.lease_seconds)

    async def _tell_failed(self, order: wire.ScanOrder, message: str, *, given_back: bool = False) -> None:
        failed = wire.ScanFailed(scan=order.scan, epoch=order.epoch, given_back=given_back, message=message)
        try:
            await asyncio.wait_for(self._speak().send(order_call("failed", wire.Scan, failed)), 5.0)
        except (ReplicaError, TimeoutError) as error:  # its lease will end
            self._log.info("scan.not_told", scan=order.scan, reason=str(error))

    async def _patiently(self, what: str, answer: type[T], body: msgspec.Struct) -> T:
        """Until the server has heard it: what was listed for hours is not thrown away because it is restarted."""
        failures = 0
        while True:
            try:
                return await asyncio.wait_for(self._speak().send(order_call(what, answer, body)), REQUEST_SECONDS)
            except (Conflict, NotFound):
                raise
            except (ReplicaError, TimeoutError) as error:
                if isinstance(error, ReplicaError) and error.code not in ("unavailable", "busy"):
                    raise
                failures += 1
                await self._trouble("scans", error)
                await asyncio.sleep(self._back_off(failures))

    async def _scan(self, order: wire.ScanOrder) -> None:
        # The site's own endpoint, so within its roots: what other sites have is not for this worker to list.
        storage = await asyncio.to_thread(self._storages.get, order.url, name=order.endpoint, side="target")
        if order.what == "list":
            comparison = await asyncio.to_thread(self._comparison, order)
            try:
                await self._look_for_mark(storage, order.endpoint)
                await self._ask_catalogue(order, comparison)
                await self._list(storage, comparison)
                # Once more: a disk that went away meanwhile must not have lost what it did not list.
                await self._look_for_mark(storage, order.endpoint)
                scan = await self._tell(order, comparison)
            except asyncio.CancelledError:
                comparison.close()  # who comes next goes on with what is complete
                raise
            except BaseException:
                comparison.remove()
                raise
            await asyncio.to_thread(comparison.remove)
            if scan.state != "verifying":
                return
        await self._verify(order, storage)

    def _comparison(self, order: wire.ScanOrder) -> Comparison:
        folder = own_folder(self._folder)
        remove_stale(folder)
        about = hashlib.sha256(f"{self._server} {order.url} {order.began_at.isoformat()}".encode()).hexdigest()[:16]
        try:
            return Comparison(folder / f"{order.scan}-{about}")
        except Busy:
            return Comparison(folder / f"{order.scan}-{about}-{order.epoch}-{secrets.token_hex(4)}")

    async def _look_for_mark(self, storage: Storage, endpoint: str) -> None:
        """Every storage looks for its own mark before it says that a file is missing."""
        try:
            await storage.stat(f"scan-{secrets.token_hex(12)}")
        except SourceMissing:
            return
        raise Unreachable(
            f"endpoint {endpoint}: its storage shows a file that nobody can have written",
            hint="it answers for names it does not have: nothing that it lists can be believed",
            endpoint=endpoint,
        )

    async def _ask_catalogue(self, order: wire.ScanOrder, comparison: Comparison) -> None:
        self._phase, self._files = "asking", comparison.known.totals.files
        after: int | None = 0
        while after is not None and not comparison.known.complete:
            part = wire.ScanPart(scan=order.scan, epoch=order.epoch, after=after)
            answer = await self._patiently("known", wire.KnownPart, part)
            await asyncio.to_thread(know, comparison, answer.known)
            self._files = comparison.known.totals.files
            after = answer.next
        if not comparison.known.complete:
            await asyncio.to_thread(comparison.known.finish)

    async def _list(self, storage: Storage, comparison: Comparison) -> None:
        self._phase, self._files = "listing", comparison.listed.totals.files
        if comparison.listed.complete:
            return
        async for entries in _by(ENTRIES, storage.list()):
            await asyncio.to_thread(comparison.list_all, entries)
            self._files = comparison.listed.totals.files
        await asyncio.to_thread(comparison.listed.finish)

    async def _tell(self, order: wire.ScanOrder, comparison: Comparison) -> wire.Scan:
        self._phase, self._files = "comparing", 0
        differences = comparison.differences()
        missing = dark = 0
        while some := await asyncio.to_thread(_next, differences):
            told = told_of(order.scan, order.epoch, some)
            missing += len(told.missing)
            dark += len(told.dark)
            await self._patiently("found", NOTHING, told)
            self._files += len(some)
        totals = comparison.listed.totals
        compared = wire.ScanCompared(
            scan=order.scan,
            epoch=order.epoch,
            listed_files=totals.files,
            listed_bytes=totals.bytes,
            missing=missing,
            dark=dark,
        )
        return await self._patiently("compared", wire.Scan, compared)

    # ── looking once more ────────────────────────────────────────────────────────────────────────────────────────────

    async def _verify(self, order: wire.ScanOrder, storage: Storage) -> None:
        self._phase, self._files = "verifying", 0
        outcomes: list[wire.ProbeOutcome] = []
        while True:
            report = wire.ProbeReport(scan=order.scan, epoch=order.epoch, outcomes=outcomes)
            probes = (await self._patiently("probed", wire.Probes, report)).probes
            if not probes:
                return
            gate = asyncio.Semaphore(AT_ONCE)
            outcomes = list(await asyncio.gather(*(_probe(storage, probe, gate) for probe in probes)))
            self._files += len(probes)

    # ── dark files ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _move_away(self, orders: Sequence[wire.DarkOrder]) -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        said = [o for o in await asyncio.gather(*(self._move_one(order, gate) for order in orders)) if o is not None]
        self.moved_away += sum(o.outcome == "removed" for o in said)
        if said:
            report = wire.DarkReport(outcomes=said)
            answer = await self._patiently("dark", wire.ReportAnswer, report)
            if answer.stale:
                self._log.info("dark.stale", findings=answer.stale[:20], count=len(answer.stale))

    async def _move_one(self, order: wire.DarkOrder, gate: asyncio.Semaphore) -> wire.DarkOutcome | None:
        """None: the lease was lost before anything was touched."""

        def said(outcome: str, message: str = "") -> wire.DarkOutcome:
            what = {"finding": order.finding, "epoch": order.epoch, "outcome": outcome, "message": message[:2_000]}
            return msgspec.convert(what, wire.DarkOutcome)

        async with gate:
            try:
                storage = await asyncio.to_thread(self._storages.get, order.url, name=order.endpoint, side="target")
                found = await storage.stat(order.path)
                # In whole seconds, for some storages tell a listing less than they tell of one file.
                is_older = order.mtime_ns == 0 or found.mtime_ns // 10**9 == order.mtime_ns // 10**9
                if found.size_bytes != order.size or not is_older:
                    return said("kept", "it changed since it was found")
                if not self._is_alive or self._stopping.is_set():
                    return None
                where = await storage.quarantine(order.path)
            except SourceMissing:
                return said("gone")
            except Exception as error:  # noqa: BLE001  whatever it is, it is this file's outcome
                return said("failed", str(error) or type(error).__name__)
        self._log.info("dark.moved_away", endpoint=order.endpoint, path=order.path, to=where)
        return said("removed", f"now {where}")


async def _probe(storage: Storage, probe: wire.Probe, gate: asyncio.Semaphore) -> wire.ProbeOutcome:
    """Only a storage that is there, and says that the file is not, is believed."""
    async with gate:
        try:
            found = await storage.stat(probe.path)
        except SourceMissing:
            return wire.ProbeOutcome(finding=probe.finding, outcome="missing", message="not there")
        except Unreachable:
            raise
        except ReplicaError as error:
            return wire.ProbeOutcome(finding=probe.finding, outcome="unclear", message=error.message[:2_000])
    if found.size_bytes != probe.size:
        message = f"{found.size_bytes} bytes instead of {probe.size}"
        return wire.ProbeOutcome(finding=probe.finding, outcome="differs", message=message)
    return wire.ProbeOutcome(finding=probe.finding, outcome="there")


def _next(differences: Iterator[Missing | Dark]) -> list[Missing | Dark]:
    return list(islice(differences, FINDINGS))


async def _by(number: int, entries: AsyncIterator[Entry]) -> AsyncIterator[list[Entry]]:
    some: list[Entry] = []
    async for entry in entries:
        if entry.path == OWN or entry.path.startswith(f"{OWN}/"):
            continue
        some.append(entry)
        if len(some) >= number:
            yield some
            some = []
    if some:
        yield some
