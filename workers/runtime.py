"""What every unattended process is made of: bells, loops, a watch over them, and a way to stop.

Given     functions that do one bounded round of work and say whether there is more.
Returns   threads that run them when woken or when their time has come.
Promises  a failing round is told once with its story and tried again, later and later, never given up; a loop whose
          round never ends is noticed; SIGTERM and SIGINT let rounds finish, a second signal does not.
Partner   workers.app has the timetable, workers.service starts it.
"""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from replica.log import Logger, Sparing, cause_of, get_logger
from rules.errors import Conflict, ReplicaError, Unavailable

#: A worker counts its lease as lost when this part of it has passed without an answer: the server's clock is not ours.
LEASE_TRUSTED = 0.8
#: No claim or report is waited for longer; then it is said again.
REQUEST_SECONDS = 60.0
#: What a loop waits at most between two failing rounds.
BACK_OFF_MAX_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one pass did. `more`: it stopped at its bound, and should run again at once."""

    seen: int = 0
    done: int = 0
    more: bool = False


# ── bells: queue → who wants to know ─────────────────────────────────────────────────────────────────────────────────

_bells: dict[str, list[Callable[[], None]]] = {}
_bells_lock = threading.Lock()


@contextmanager
def listening(queue: str, wake: Callable[[], None]) -> Iterator[None]:
    """While inside, `ring(queue)` calls `wake`, from any thread."""
    with _bells_lock:
        _bells.setdefault(queue, []).append(wake)
    try:
        yield
    finally:
        with _bells_lock:
            _bells[queue].remove(wake)


def ring(queue: str) -> None:
    with _bells_lock:
        found = list(_bells.get(queue, ()))
    for wake in found:
        wake()


# ── loops ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Looper(threading.Thread):
    """Runs `round_` when woken or after `seconds` ± `jitter`; at once again when it says that there is more."""

    def __init__(
        self,
        name: str,
        round_: Callable[[], bool],
        *,
        seconds: float,
        jitter: float = 0.2,
        back_off_seconds: float = 0.5,
        dice: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._round = round_
        self._seconds = seconds
        self._jitter = jitter
        self._back_off = back_off_seconds
        self._dice = dice
        self._condition = threading.Condition()
        self._woken = True  # the first look is at once
        self._stopping = False
        self._log: Logger = get_logger(loop=name)
        self._sparing = Sparing(60)
        self.rounds = 0
        #: Failing rounds in a row.
        self.failures = 0
        #: By the monotonic clock: since when the present round runs; None between rounds.
        self.busy_since: float | None = None

    def wake(self) -> None:
        with self._condition:
            self._woken = True
            self._condition.notify()

    def stop(self, seconds: float | None = None) -> bool:
        """No round begins any more; True when the last one has ended within `seconds` (None: do not wait)."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if seconds is not None and self.ident is not None and self is not threading.current_thread():
            self.join(seconds)
        return not self.is_alive()

    def run(self) -> None:
        while self._wait():
            self.busy_since = time.monotonic()
            more = self._one_round()
            self.busy_since = None
            if more:
                self.wake()

    def _wait(self) -> bool:
        """Until it is time for a round; False when there shall be none."""
        with self._condition:
            if self.failures:
                # Being woken does not shorten this: hints come by the thousand while a database is away.
                pause = min(BACK_OFF_MAX_SECONDS, self._back_off * 2 ** min(self.failures - 1, 16))
                self._condition.wait_for(lambda: self._stopping, pause * (0.5 + self._dice() / 2))
            else:
                spread = 1 + self._jitter * (2 * self._dice() - 1)
                self._condition.wait_for(lambda: self._woken or self._stopping, self._seconds * spread)
            self._woken = False
            return not self._stopping

    def _one_round(self) -> bool:
        try:
            more = self._round()
        except (Unavailable, Conflict) as error:
            # Foreseen and passing: the sentence says it all, and saying it every time would bury the rest.
            self.failures += 1
            left_out = self._sparing.due()
            if left_out is not None:
                said = {"reason": error.message, "cause": cause_of(error), "hint": error.hint}
                self._log.warning("pass.waits", **{k: v for k, v in said.items() if v}, left_out=left_out)
            return False
        except Exception as error:  # noqa: BLE001  the top of a pass: the story is kept and the loop goes on
            self.failures += 1
            left_out = self._sparing.due()
            if left_out is not None:
                hint = error.hint if isinstance(error, ReplicaError) else ""
                self._log.exception("pass.failed", hint=hint, failures=self.failures, left_out=left_out)
            return False
        if self.failures:
            self._log.info("pass.works_again", failures=self.failures)
            self._sparing.reset()
        self.failures = 0
        self.rounds += 1
        return more


# ── a process's life ─────────────────────────────────────────────────────────────────────────────────────────────────


class Life:
    """From the start to SIGTERM, SIGINT or `end()`; the main thread waits in `wait()`."""

    def __init__(self) -> None:
        # A pipe, not an Event: a signal handler that sets an Event may meet its lock held by the thread it interrupts.
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ended = False
        self.exit_code = 0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT end this life in order; the second one ends the process where it stands."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            os._exit(128 + number)
        self.end()

    def end(self, exit_code: int = 0) -> None:
        self._ended = True
        self.exit_code = self.exit_code or exit_code
        try:
            os.write(self._write, b".")
        except BlockingIOError:
            return  # it has been told often enough

    @property
    def ended(self) -> bool:
        return self._ended

    def wait(self, seconds: float | None = None) -> bool:
        """Until the end; False when `seconds` passed before it came."""
        if self._ended:
            return True
        select.select([self._read], [], [], seconds)
        return self._ended

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Watchdog(threading.Thread):
    """Ends a process that no longer does anything, so that its supervisor starts it anew.

    `busy_since` of each watched thing: None, or the moment at which what it is doing now began.
    """

    def __init__(self, watched: Callable[[], list[Any]], life: Life, *, limit_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._watched = watched
        self._life = life
        self._limit = limit_seconds

    def run(self) -> None:
        while not self._life.wait(self._limit / 10):
            self.look()

    def look(self) -> None:
        now = time.monotonic()
        for thing in self._watched():
            since = thing.busy_since
            if since is not None and now - since > self._limit:
                get_logger().error("process.wedged", loop=thing.name, seconds=round(now - since))
                self._life.end(exit_code=75)  # EX_TEMPFAIL: start me again
