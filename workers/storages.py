"""The storages a worker speaks to, opened once each and pinned to what it was given.

Given     the URL in an order, and what this worker may touch (`roots`, `sources`; none: anything).
Returns   an open storage.
Promises  an order, whoever wrote it, never leads a worker out of its roots, symbolic links included: Forbidden. What
          was opened to read from is not thereby permitted to be written to.
Partner   workers.fences permits; replica.storage.registry opens; workers.mover asks.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from replica.storage.base import Storage
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from rules.errors import Side
from workers.fences import Fences

#: How many are kept open: more than any site has endpoints.
KEPT = 1_000


class Storages:
    """Safe to use from any thread. `get` may wait for a disk, so an event loop asks it in a thread."""

    def __init__(
        self, roots: Sequence[str] = (), credentials: Credentials | None = None, sources: Sequence[str] = ()
    ) -> None:
        self._fences = Fences(roots, sources)
        self._permitted: set[tuple[str, Side]] = set()
        self._credentials = credentials
        self._open: dict[str, Storage] = {}
        self._lock = threading.Lock()

    def known(self, url: str, *, name: str, side: Side) -> Storage | None:
        """One that is open and was permitted for this side already: nothing is waited for."""
        with self._lock:
            found = self._open.get(url)
            permitted = (url, side) in self._permitted
        return found if found is not None and found.name == name and permitted else None

    def get(self, url: str, *, name: str, side: Side) -> Storage:
        if (known := self.known(url, name=name, side=side)) is not None:
            return known
        self._fences.permit(url, name=name, side=side)
        with self._lock:
            found = self._open.get(url)
        if found is None or found.name != name:
            found = open_storage(url, name=name, credentials=self._credentials)
        with self._lock:
            while url not in self._open and len(self._open) >= KEPT:
                gone = next(iter(self._open))
                self._open.pop(gone)
                self._permitted -= {(gone, "source"), (gone, "target"), (gone, "unknown")}
            self._open[url] = found
            self._permitted.add((url, side))
        return found

    async def close(self) -> None:
        with self._lock:
            storages, self._open = list(self._open.values()), {}
        for storage in storages:
            await storage.close()


def is_local(url: str) -> bool:
    """Whether files there can be copied by the kernel of this machine."""
    return url.startswith("file:")
