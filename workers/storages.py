"""The storages a worker speaks to, opened once each and pinned to the directories it was given.

Given     the URL in an order, and the directories this worker may touch (`roots`; none: any).
Returns   an open storage.
Promises  an order, whoever wrote it, never leads a worker out of its roots, symbolic links included: Forbidden.
Partner   replica.storage.registry opens; workers.mover asks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from replica.storage.base import Storage
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from rules.errors import Forbidden, Side

#: How many are kept open: more than any site has endpoints.
KEPT = 1_000


class Storages:
    """Safe to use from any thread. `get` may wait for a disk, so an event loop asks it in a thread."""

    def __init__(self, roots: Sequence[str] = (), credentials: Credentials | None = None) -> None:
        self.roots = tuple(roots)
        self._credentials = credentials
        self._open: dict[str, Storage] = {}
        self._lock = threading.Lock()

    def known(self, url: str, *, name: str) -> Storage | None:
        """One that is open already: nothing is waited for."""
        with self._lock:
            found = self._open.get(url)
        return found if found is not None and found.name == name else None

    def get(self, url: str, *, name: str, side: Side) -> Storage:
        if (found := self.known(url, name=name)) is not None:
            return found
        self._permit(url, name, side)
        storage = open_storage(url, name=name, credentials=self._credentials)
        with self._lock:
            while len(self._open) >= KEPT:
                self._open.pop(next(iter(self._open)))
            self._open[url] = storage
        return storage

    def _permit(self, url: str, name: str, side: Side) -> None:
        if not self.roots or not url.startswith("file:"):
            return
        path = os.path.realpath(unquote(urlsplit(url).path))
        for root in self.roots:
            real = os.path.realpath(root)
            if path == real or path.startswith(real.rstrip("/") + "/"):
                return
        raise Forbidden(
            f"this worker may not touch {url}: it is outside of the directories it was given",
            hint="add the directory to `roots` of this site's worker, or correct the endpoint's URL",
            endpoint=name,
            side=side,
        )

    async def close(self) -> None:
        with self._lock:
            storages, self._open = list(self._open.values()), {}
        for storage in storages:
            await storage.close()


def is_local(url: str) -> bool:
    """Whether files there can be copied by the kernel of this machine."""
    return url.startswith("file:")
