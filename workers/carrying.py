"""One order, from its sources to an outcome; or a list of small ones, which cost less together.

Given     orders in this worker's hands, and the storages they name.
Returns   for each its outcome, by calling `finish`: done, failed with the error and whose fault it was, or None when it
          was stopped.
Promises  no exception leaves here, each order is finished exactly once; sources are tried in turn while the failure is
          a source's; a failure of the target never blames a source; nothing is published without asking `Held`.
Partner   replica.storage.copy moves the bytes; workers.mover claims and reports.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from replica import wire
from replica.log import Sparing, get_logger
from replica.storage import chunks
from replica.storage.base import Storage
from replica.storage.copy import (
    Control,
    Copied,
    Expected,
    Lineage,
    LocalCopy,
    Source,
    Stopped,
    adopt,
    copy_chunked,
    copy_file,
    copy_local_batch,
    resumable,
)
from replica.storage.posix import PosixStorage
from replica.storage.repair import repair
from rules.checksums import Checksums
from rules.errors import Busy, Invalid, Permanent, ReplicaError, Side, SourceMissing, StorageError, Transient
from rules.sources import AT_ONCE_MAX
from workers.storages import Storages, is_local

#: Files up to this size go in lists, one thread a list: a hand-over costs as much as copying one.
SMALL_BYTES = 4 << 20
LIST_FILES = 128
LIST_BYTES = 64 << 20
#: Files of a list that are on their way at once where a server is one of the two: it is waited for, not worked for.
REMOTE_AT_ONCE = 16
#: Threads of one list: small files wait for the disk more than they work.
LIST_THREADS = 2
#: Failures of one kind are told so often, and of so many kinds it is remembered.
SAY_AGAIN_SECONDS = 20.0
KINDS_KEPT = 1_000


class Held:
    """An order in this worker's hands, from the claim until the server has heard of its end."""

    __slots__ = ("alive_until", "control", "finished", "key", "order", "running")

    def __init__(self, order: wire.Order, alive_until: float) -> None:
        self.order = order
        self.key = (order.transfer, order.epoch)
        self.control = Control()
        #: By the monotonic clock: as long as the lease is known to live.
        self.alive_until = alive_until
        self.running = False
        #: There is an outcome, or none is wanted any more.
        self.finished = False

    @property
    def alive(self) -> bool:
        return not self.control.stopping and time.monotonic() < self.alive_until

    def before_publish(self) -> None:
        """Asked by the copy right before the bytes get their name."""
        if not self.alive:
            raise Stopped("the lease is not known to be alive: nothing is published")

    @property
    def small(self) -> bool:
        """Whether it may go in a list."""
        return self.order.size <= SMALL_BYTES and (self.remote or bool(self.order.sources))

    @property
    def remote(self) -> bool:
        """Whether a server is asked for it, or takes it."""
        order = self.order
        return not (is_local(order.target_url) and all(is_local(source.url) for source in order.sources[:1]))

    @property
    def pair(self) -> tuple[str, str]:
        """From where to where. What goes in one list goes the same way: where a server hangs, no other files wait."""
        order = self.order
        if not self.remote:
            return "", ""  # the threads of a list take files of any folders
        return order.sources[0].url if order.sources else "", order.target_url

    @property
    def phase(self) -> str:
        return self.control.phase if self.running or self.finished else "claimed"

    @property
    def expected(self) -> Expected:
        return Expected(self.order.size, Checksums.of(self.order.checksums))

    @property
    def lineage(self) -> Lineage:
        """Whose temporaries a large file goes on from: earlier attempts' of this transfer."""
        return Lineage(str(self.order.transfer), self.order.epoch)

    def tag(self) -> str:
        """Of a temporary: no other attempt, of whatever epoch, writes to or publishes that name."""
        return f"{self.order.transfer}-{self.order.epoch}-{secrets.token_hex(4)}"

    def outcome(self, outcome: str, **more: object) -> wire.Outcome:
        return wire.Outcome(transfer=self.order.transfer, epoch=self.order.epoch, outcome=outcome, **more)  # type: ignore[arg-type]


Finish = Callable[[Held, wire.Outcome | None], None]


class Carrier:
    """Copies. `finish` is called in the event loop, once for each order."""

    def __init__(
        self, storages: Storages, finish: Finish, *, concurrency: int, sources_at_once: int = AT_ONCE_MAX
    ) -> None:
        self._storages = storages
        self._finish = finish
        #: For one large file at most; the order says how many the limits allow.
        self._sources_at_once = sources_at_once
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="carry")
        self._log = get_logger()
        self._sparing: dict[tuple[str, str | None, str], Sparing] = {}

    async def carry(self, job: list[Held]) -> None:
        if not job[0].small:
            await self._copy_one(job[0])
        elif job[0].remote:
            await self._copy_together(job)
        else:
            await self._copy_list(job)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ── a list of small files ────────────────────────────────────────────────────────────────────────────────────────

    async def _copy_list(self, job: list[Held]) -> None:
        """In one thread; what its first source fails for goes on by itself with the next ones."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._threads, self._copy_in_thread, job)
        seconds = (time.monotonic() - began) / len(job)
        again: list[tuple[Held, Exception]] = []
        for held, result in zip(job, results, strict=True):
            if isinstance(result, Copied):
                self._finish(held, _done(held, result, held.order.sources[0].endpoint, seconds))
            elif _next_may_help(held, result, 0):
                again.append((held, result))
            else:
                self._finish(held, self._ended(held, result, held.order.sources[0].endpoint))
        for held, failure in again:
            await self._copy_one(held, first=1, failure=failure)

    def _copy_in_thread(self, job: list[Held]) -> list[Copied | Exception]:
        results: dict[int, Copied | Exception] = {}
        copies: dict[int, LocalCopy] = {}
        for place, held in enumerate(job):
            order = held.order
            try:
                source = self._open(order.sources[0].url, order.sources[0].endpoint, "source")
                target = self._open(order.target_url, order.target_endpoint, "target")
                assert isinstance(source, PosixStorage)
                assert isinstance(target, PosixStorage)
                copies[place] = LocalCopy(
                    source,
                    order.sources[0].path,
                    target,
                    order.target_path,
                    tag=held.tag(),
                    expected=held.expected,
                    control=held.control,
                    before_publish=held.before_publish,
                )
            except Exception as error:  # noqa: BLE001  this order's outcome; the others go on
                results[place] = error
        try:
            results.update(zip(copies, copy_local_batch(list(copies.values()), threads=LIST_THREADS), strict=True))
        except Exception as error:  # noqa: BLE001  as above, for all of them
            results.update((place, error) for place in copies)
        return [results[place] for place in range(len(job))]

    async def _copy_together(self, job: list[Held]) -> None:
        """Several at a time, each for itself: its own sources in turn, its own outcome as soon as there is one."""
        left = iter(job)

        async def take_turns() -> None:
            for held in left:
                if held.alive:
                    held.running = True
                    await self._copy_one(held)
                else:
                    self._finish(held, None)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(REMOTE_AT_ONCE, len(job))):
                group.create_task(take_turns())

    # ── one file ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _copy_one(self, held: Held, *, first: int = 0, failure: Exception | None = None) -> None:
        """From its sources in turn, beginning with the one of that number."""
        order = held.order
        if not order.sources:
            await self._verify_in_place(held)
            return
        if failure is None and order.repair and order.size > chunks.CHUNK_BYTES:
            await self._repair(held)
            return
        if failure is None and order.size > chunks.RESUME_BYTES and await self._copy_large(held):
            return
        blamed = order.sources[first - 1].endpoint if failure is not None else None
        for index in range(first, len(order.sources)):
            source = order.sources[index]
            if failure is not None:
                self._log.info(
                    "source.failed", did=order.did, endpoint=blamed, next=source.endpoint, reason=str(failure)
                )
            began = time.monotonic()
            try:
                copied = await copy_file(
                    await self._opened(source.url, source.endpoint, "source"),
                    source.path,
                    await self._opened(order.target_url, order.target_endpoint, "target"),
                    order.target_path,
                    tag=held.tag(),
                    expected=held.expected,
                    control=held.control,
                    before_publish=held.before_publish,
                )
            except Exception as error:  # noqa: BLE001  whatever it is, it is this order's outcome
                # Of several sources' failures the one that may pass is told: while it may, not all is lost.
                if not (isinstance(failure, Transient) and isinstance(error, Permanent) and error.side == "source"):
                    failure, blamed = error, source.endpoint
                if not _next_may_help(held, error, index):
                    break
                held.control.bytes_done = 0
            else:
                self._finish(held, _done(held, copied, source.endpoint, time.monotonic() - began))
                return
        assert failure is not None
        self._finish(held, self._ended(held, failure, blamed))

    async def _copy_large(self, held: Held) -> bool:
        """By chunks, going on where an earlier attempt of this transfer ended; False if that cannot be done here."""
        order = held.order
        began = time.monotonic()
        try:
            target = await self._opened(order.target_url, order.target_endpoint, "target")
            if not resumable(target, held.expected):
                return False
            sources = await self._sources(order)
            copied = await copy_chunked(
                sources,
                target,
                order.target_path,
                lineage=held.lineage,
                expected=held.expected,
                control=held.control,
                before_publish=held.before_publish,
                at_once=min(self._sources_at_once, order.sources_at_once),
                on_failure=lambda source, error: self._source_failed(held, source.storage.name, error),
            )
        except Exception as error:  # noqa: BLE001  whatever it is, it is this order's outcome
            self._finish(held, self._ended(held, error, _blamed(order, error)))
            return True
        if not copied.adopted and copied.moved_bytes < order.size:
            self._log.info("transfer.resumed", did=order.did, transfer=order.transfer, moved_bytes=copied.moved_bytes)
        self._finish(held, _done(held, copied, copied.source or order.sources[0].endpoint, time.monotonic() - began))
        return True

    async def _repair(self, held: Held) -> None:
        """In place: the damaged file stays until a new one is proven, made of its good chunks and of fetched ones."""
        order = held.order
        began = time.monotonic()
        try:
            target = await self._opened(order.target_url, order.target_endpoint, "target")
            sources = await self._sources(order)
            repaired = await repair(
                target,
                order.target_path,
                sources,
                lineage=held.lineage,
                expected=held.expected,
                control=held.control,
                before_publish=held.before_publish,
                on_failure=lambda source, error: self._source_failed(held, source.storage.name, error),
            )
        except Exception as error:  # noqa: BLE001  whatever it is, it is this order's outcome
            self._finish(held, self._ended(held, error, _blamed(order, error)))
            return
        copied = repaired.copied
        self._log.info(
            "replica.repaired",
            did=order.did,
            transfer=order.transfer,
            endpoint=order.target_endpoint,
            damaged_chunks=len(repaired.damaged),
            chunk_bytes=repaired.chunk_bytes,
            moved_bytes=copied.moved_bytes,
        )
        done = _done(held, copied, copied.source or order.sources[0].endpoint, time.monotonic() - began)
        if not copied.adopted:
            done.moved_bytes = copied.moved_bytes
        self._finish(held, done)

    def _source_failed(self, held: Held, endpoint: str, error: Exception) -> None:
        self._log.info("source.failed", did=held.order.did, endpoint=endpoint, reason=str(error))

    async def _verify_in_place(self, held: Held) -> None:
        """No source: the bytes should be there already."""
        order = held.order
        began = time.monotonic()
        try:
            held.control.phase = "verifying"
            target = await self._opened(order.target_url, order.target_endpoint, "target")
            adopted = await adopt(target, order.target_path, held.expected, held.control, held.before_publish)
            if adopted is None:
                raise SourceMissing(
                    f"{order.did} is not at {order.target_endpoint} with the size and checksums registered, "
                    "and there is no other source",
                    hint="bytes that differ were moved to .replica/quarantine at the endpoint; register what is there",
                    endpoint=order.target_endpoint,
                    path=order.target_path,
                    side="source",
                )
            held.before_publish()  # nothing gets a name, yet only who holds the lease may say what is there
        except Exception as error:  # noqa: BLE001  this order's outcome
            self._finish(held, self._ended(held, error, order.target_endpoint))
        else:
            self._finish(held, _done(held, adopted, None, time.monotonic() - began))

    # ── storages ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _open(self, url: str, name: str, side: Side) -> Storage:
        try:
            return self._storages.get(url, name=name, side=side)
        except Invalid as error:
            raise Permanent(
                f"the URL of {name} cannot be used: {error.message}", hint=error.hint, endpoint=name, side=side
            ) from error

    async def _sources(self, order: wire.Order) -> list[Source]:
        """Those that can be opened; if none can, the first one's error."""
        sources: list[Source] = []
        failures: list[Exception] = []
        for source in order.sources:
            try:
                sources.append(Source(await self._opened(source.url, source.endpoint, "source"), source.path))
            except Exception as error:  # noqa: BLE001  the other sources may do
                failures.append(error)
        if not sources:
            raise failures[0]
        return sources

    async def _opened(self, url: str, name: str, side: Side) -> Storage:
        if (known := self._storages.known(url, name=name, side=side)) is not None:
            return known
        return await asyncio.to_thread(self._open, url, name, side)  # finding out what a path really is may hang

    # ── what became of it ────────────────────────────────────────────────────────────────────────────────────────────

    def _ended(self, held: Held, error: Exception, source: str | None) -> wire.Outcome | None:
        if isinstance(error, Stopped):
            return None
        code = error.code if isinstance(error, ReplicaError) else "broken"
        side: Side = error.side if isinstance(error, StorageError) else "unknown"
        message = str(error) or type(error).__name__
        self._tell(held, error, code, side, source, message)
        return held.outcome(
            "failed",
            # A target's failure names no source: nobody shall count it against one.
            source_endpoint=source if side == "source" else None,
            error=code,
            message=message[:4_000],
            side=side,
            retry_after_seconds=error.retry_after_seconds if isinstance(error, Busy) else None,
        )

    def _tell(self, held: Held, error: Exception, code: str, side: Side, source: str | None, message: str) -> None:
        """One line for the first failure of a kind, then now and then with how many were left out: a disk that is not
        mounted fails ten thousand files a minute. The server keeps each of them."""
        order = held.order
        kind = (order.target_endpoint, source if side == "source" else None, code)
        if kind not in self._sparing and len(self._sparing) >= KINDS_KEPT:
            self._sparing.clear()
        left_out = self._sparing.setdefault(kind, Sparing(SAY_AGAIN_SECONDS)).due()
        if left_out is None:
            return
        self._log.warning(
            "transfer.failed",
            did=order.did,
            transfer=order.transfer,
            attempt=order.attempt,
            target=order.target_endpoint,
            source=source,
            side=side,
            error=code,
            reason=message,
            left_out=left_out,
            **({} if isinstance(error, ReplicaError) else {"exc_info": error}),
        )


def _done(held: Held, copied: Copied, source: str | None, seconds: float) -> wire.Outcome:
    return held.outcome(
        "done",
        source_endpoint=None if copied.adopted else source,
        read_from=dict(copied.moved_from) if len(copied.moved_from) > 1 else {},
        size=copied.size_bytes,
        checksums=copied.checksums.as_dict(),
        adopted=copied.adopted,
        verified_by=copied.verified_by,
        seconds=max(0.0, seconds),
    )


def _blamed(order: wire.Order, error: Exception) -> str | None:
    """The source whose failure it is; None: no source's."""
    if not isinstance(error, StorageError) or error.side != "source":
        return None
    known = {source.endpoint for source in order.sources}
    return error.endpoint if error.endpoint in known else order.sources[0].endpoint


def _next_may_help(held: Held, error: Exception, index: int) -> bool:
    return isinstance(error, StorageError) and error.side == "source" and index + 1 < len(held.order.sources)
