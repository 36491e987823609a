"""The proof of a large file on a folder's disk, window by window, while the rest is still written.

Given     the descriptor of a temporary, and the places up to which it was written.
Returns   the fingerprint of what a reader would get.
Promises  a failure here reaches the writer at its next window; nothing of the descriptor is used after `abandon`.
Partner   replica.storage.copy_local writes; replica.storage.parts_local proves chunks by the same hands.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

from replica.storage.hashing import STRIDE_BYTES, Fingerprint
from replica.storage.judging import Control
from replica.storage.posix import drop_cache, write_out

#: A file is proven in windows of this size: long enough for the disk to work in large requests, short enough that the
#: pages of one window serve the next but two. A copy of any size takes about 100 MiB of cache from others, no more.
WINDOW_BYTES = 32 << 20
WINDOWS_WAITING = 2


class Proof:
    """Sees that what another thread writes is written out, and reads it back, window by window.

    From the device that is done here, afterwards. From the kernel's memory the writer does it himself, by `look_again`
    right after each piece: the bytes are still in the processor's cache then, and looking costs half as much.
    """

    def __init__(self, descriptor: int, control: Control, *, from_device: bool) -> None:
        self.seen = Fingerprint()
        self._descriptor = descriptor
        self._control = control
        self._from_device = from_device
        #: Bounded: a writer that runs ahead of the proof fills the memory with pages that must all be written out.
        self._windows: queue.Queue[tuple[int, int] | None] = queue.Queue(WINDOWS_WAITING)
        self._failure: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="proof", daemon=True)
        self._thread.start()

    def add(self, begin: int, end: int) -> None:
        self._windows.put((begin, end))

    def look_again(self, begin: int, end: int) -> None:
        """The writer has just written this; nothing to do for a proof from the device, which comes later."""
        if not self._from_device:
            hash_again(self._descriptor, begin, end, self.seen, self._control)

    def raise_early(self, translate: Callable[[BaseException], BaseException]) -> None:
        if self._failure is not None:
            raise translate(self._failure)

    def finish(self, translate: Callable[[BaseException], BaseException]) -> None:
        """Wait until every window was read; raises what went wrong there."""
        self._windows.put(None)
        self._thread.join()
        self.raise_early(translate)

    def abandon(self) -> None:
        """End soon, whatever is still to be read; returns when the descriptor is not used any more."""
        self._abandoned = True
        if self._thread.is_alive():
            self._windows.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (window := self._windows.get()) is not None:
            if self._failure is not None or self._abandoned:
                continue  # still taking windows, so that nobody waits for room
            begin, end = window
            try:
                if self._from_device:
                    write_out(self._descriptor, begin, end)
                    forget(self._descriptor, begin, end)
                    hash_again(self._descriptor, begin, end, self.seen, self._control, lambda: self._abandoned)
                else:
                    # Proven already; written out now so that the last sync finds little, and forgotten so that the
                    # pages serve the next window: a large copy must not push everybody else's files out of the cache.
                    write_out(self._descriptor, begin, end)
                    drop_cache(self._descriptor, begin, end - begin)
            except BaseException as error:  # noqa: BLE001 - carried to the thread that waits for us
                self._failure = error


def forget(descriptor: int, begin: int, end: int) -> None:
    """Have bytes that were written out read from the device again, all of them at once."""
    drop_cache(descriptor, begin, end - begin)
    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)


def hash_again(
    descriptor: int,
    begin: int,
    end: int,
    seen: Fingerprint,
    control: Control,
    abandoned: Callable[[], bool] = lambda: False,
) -> None:
    """Hash what a descriptor now gives between two places; less than asked for if the file ends before."""
    buffer = memoryview(bytearray(min(STRIDE_BYTES, max(end - begin, 1))))
    while begin < end and not abandoned():
        control.check()
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - begin)]], begin)
        if not count:
            break  # shorter than what was written: the comparison will say so
        seen.update(buffer[:count])
        begin += count
