"""Whose turn it is to ask one host for something that it can do only a few times at once.

Given     the host, what is asked of it, and how many may ask at a time.
Returns   a semaphore, the same one for all that ask that host for that, in one event loop.
Promises  storages that share a host share its turns.
Partner   replica.storage.webdav asks for digests; replica.storage.thirdparty for copies.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

#: Questions for a digest that one host is asked at a time: XRootD lets one too many (its own limit is 4) wait 30 s.
DIGESTS_AT_ONCE = 2

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], asyncio.Semaphore]] = WeakKeyDictionary()


def turn(host: str, what: str, at_once: int) -> asyncio.Semaphore:
    hosts = _turns.setdefault(asyncio.get_running_loop(), {})
    found = hosts.get((host, what))
    if found is None:
        found = hosts[host, what] = asyncio.Semaphore(at_once)
    return found
