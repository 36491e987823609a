"""Some pieces of work at a time, in one event loop.

Given     jobs: what to await, with a Control to stop it and to see how far it is; a job may be for several files.
Returns   each file's result, or the error it ended with, as they come.
Promises  never more jobs are taken from the iterator than can be begun; when the caller leaves early (Ctrl-C, an
          error), running jobs are stopped and waited for, so that nothing outlives the call.
Partner   replica.client.upload and replica.client.download.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import Any, Generic, TypeVar

from replica.storage.copy import Control
from replica.storage.threads import end_tasks
from rules.errors import ReplicaError

K = TypeVar("K")
R = TypeVar("R")

#: Large files, and lists of small ones between two disks, at a time: copying and hashing release the interpreter.
THREADS = 4
#: What one thread can bear: the weight of a large file. Small ones that come from or go to a server wait more than they
#: work, and weigh less.
FULL = 64
_TICK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is; `bytes_done` counts what unfinished files have, too."""

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int


Tell = Callable[[Progress], None]


def nobody(_: Progress) -> None:
    """The Tell of callers who do not want to know."""


@dataclass(frozen=True, slots=True)
class Job(Generic[K, R]):
    """Work for some files: a result or an error for each of them, or one error for all."""

    keys: Sequence[K]
    run: Callable[[Control], Awaitable[Sequence[R | Exception]]]
    #: How much of what may run at a time it takes.
    weight: int = FULL

    async def begun(self, control: Control) -> Sequence[R | Exception]:
        return await self.run(control)


@dataclass(frozen=True, slots=True)
class Ended(Generic[K, R]):
    key: K
    result: R | None
    error: ReplicaError | None


async def in_parallel(
    jobs: Iterable[Job[K, R]],
    *,
    threads: int = THREADS,
    tick: Callable[[int], None] = lambda _: None,
) -> AsyncGenerator[Ended[K, R], None]:
    """Run the jobs. `tick` is called several times a second with the bytes that running jobs have done.

    Close it (contextlib.aclosing) when leaving early.
    """
    room = threads * FULL
    waiting = iter(jobs)
    following = next(waiting, None)
    running: dict[asyncio.Task[Sequence[R | Exception]], tuple[Job[K, R], Control]] = {}
    try:
        while True:
            while following is not None and (following.weight <= room or not running):
                control = Control()
                running[asyncio.create_task(following.begun(control))] = (following, control)
                room -= following.weight
                following = next(waiting, None)
            if not running:
                return
            done, _ = await asyncio.wait(running, timeout=_TICK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            tick(sum(control.bytes_done for task, (_, control) in running.items() if task not in done))
            for task in done:
                job, _ = running.pop(task)
                room += job.weight
                for ended in _ended(job, task):
                    yield ended
    finally:
        for _, control in running.values():
            control.stop()
        await end_tasks(list(running))


def _ended(job: Job[K, R], task: asyncio.Task[Sequence[R | Exception]]) -> Iterator[Ended[K, R]]:
    error = task.exception()
    results: Sequence[R | BaseException] = [error] * len(job.keys) if error is not None else task.result()
    for key, result in zip(job.keys, results, strict=True):
        if isinstance(result, ReplicaError):
            yield Ended(key, None, result)
        elif isinstance(result, BaseException):
            raise result
        else:
            yield Ended(key, result, None)


def run_here(main: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Run to the end from code that is not asynchronous; also in a notebook, whose thread has a loop that runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    begun: Queue[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Queue()

    async def noted() -> R:
        begun.put((asyncio.get_running_loop(), asyncio.current_task()))
        return await main()

    with ThreadPoolExecutor(1, thread_name_prefix="replica") as pool:
        future = pool.submit(lambda: asyncio.run(noted()))
        try:
            return future.result()
        except BaseException:
            loop, task = begun.get()
            if task is not None and not future.done():  # Ctrl-C
                loop.call_soon_threadsafe(task.cancel)
            raise
