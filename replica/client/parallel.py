"""Some copies at a time, in threads.

Given     jobs: what to call, with a Control to stop it and to see how far it is.
Returns   each job's result, or the error it ended with, as they come.
Promises  never more jobs are taken from the iterator than can soon be begun; when the caller leaves early (Ctrl-C, an
          error), running copies are stopped and waited for, so that no thread outlives the call.
Partner   replica.client.upload and replica.client.download.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from replica.storage.copy import Control
from rules.errors import ReplicaError

K = TypeVar("K")
R = TypeVar("R")

#: One thread a file: copying, hashing and waiting for the disk release the interpreter.
THREADS = 4
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
class Ended(Generic[K, R]):
    key: K
    result: R | None
    error: ReplicaError | None


def in_parallel(
    jobs: Iterable[tuple[K, Callable[[Control], R]]],
    *,
    threads: int = THREADS,
    tick: Callable[[int], None] = lambda _: None,
) -> Iterator[Ended[K, R]]:
    """Run the jobs. `tick` is called several times a second with the bytes that running jobs have done."""
    waiting = iter(jobs)
    running: dict[Future[R], tuple[K, Control]] = {}
    pool = ThreadPoolExecutor(threads, thread_name_prefix="copy")
    try:
        while True:
            for key, job in islice(waiting, threads * 2 - len(running)):
                control = Control()
                running[pool.submit(job, control)] = (key, control)
            if not running:
                return
            done, _ = wait(running, _TICK_SECONDS, FIRST_COMPLETED)
            tick(sum(control.bytes_done for future, (_, control) in running.items() if future not in done))
            for future in done:
                key, _ = running.pop(future)
                error = future.exception()
                if error is None:
                    yield Ended(key, future.result(), None)
                elif isinstance(error, ReplicaError):
                    yield Ended(key, None, error)
                else:
                    raise error
    finally:
        for _, control in running.values():
            control.stop()
        pool.shutdown(wait=True, cancel_futures=True)
