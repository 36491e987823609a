"""Named places in a copy where a test or a demonstration may make things go wrong.

Given     a handler, set by a test; or REPLICA_FAULT_POINTS in the environment of a process started by a test.
Returns   for `piece`: the bytes to go on with.
Promises  without a handler, one comparison with None and nothing else. The variable can only break a copy in ways that
          verification must catch (kill the process, flip one byte in flight) or that harm nothing (a pause); it is for
          tests, never set it elsewhere.
Partner   replica.storage.copy reaches them; tests/replica/storage and the chaos harness set them.

    after_write     the temporary is complete, nothing is proven
    after_verify    proven, not published
    after_publish   published, not reported
    piece           between the hash of a piece and its write
    chunk           a chunk of a large file was written and noted in the chunk map

REPLICA_FAULT_POINTS is `point=action[@n]`, several joined by ','; action is `kill` (SIGKILL to ourselves), `flip`
(only at `piece`) or `slow` (a pause); with `@n` it happens the n-th time only, else the first time only, but a slow
point is slow every time.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rules.errors import Invalid

ACTIONS = ("kill", "flip", "slow")
SLOW_SECONDS = 0.25
POINTS = ("after_write", "after_verify", "after_publish", "piece", "chunk")
Handler = Callable[[str, memoryview | None], bytes | None]

_handler: Handler | None = None


def reach(point: str) -> None:
    if _handler is not None:
        _handler(point, None)


def through(piece: memoryview) -> memoryview:
    """The piece as it arrives on the other side of the fault point `piece`."""
    if _handler is None:
        return piece
    replaced = _handler("piece", piece)
    return piece if replaced is None else memoryview(replaced)


def armed() -> bool:
    return _handler is not None


@contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Within, `handler(point, piece or None)` is called at each point; it may raise, kill, wait or replace."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def from_text(text: str) -> Handler:
    """The handler that REPLICA_FAULT_POINTS describes; Invalid if it cannot be read."""
    wanted: dict[str, tuple[str, int]] = {}
    for item in text.split(","):
        point, _, action = item.strip().partition("=")
        action, _, count = action.partition("@")
        flips_elsewhere = action == "flip" and point != "piece"
        if point not in POINTS or action not in ACTIONS or flips_elsewhere or not (count or "1").isdecimal():
            raise Invalid(
                f"REPLICA_FAULT_POINTS: {item[:80]!r} is not point=action[@n]",
                hint=f"points are {', '.join(POINTS)}; actions are kill, slow, and flip at piece",
            )
        wanted[point] = (action, int(count or "1"))
    reached = dict.fromkeys(wanted, 0)
    guard = threading.Lock()

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        if point not in wanted:
            return None
        action, nth = wanted[point]
        if action == "slow":
            time.sleep(SLOW_SECONDS)
            return None
        with guard:
            reached[point] += 1
            if reached[point] != nth:
                return None
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if piece is None or not len(piece):
            return None
        flipped = bytearray(piece)
        flipped[len(flipped) // 2] ^= 1
        return bytes(flipped)

    return handler


if os.environ.get("REPLICA_FAULT_POINTS"):
    _handler = from_text(os.environ["REPLICA_FAULT_POINTS"])
