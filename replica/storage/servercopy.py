"""The third-party way of a copy: the target's server fetches the file by itself.

Given     two storages, the source as it was just seen, and what the catalogue knows of the bytes.
Returns   the hasher that has seen every byte of the temporary as it lies on the target; None: it was not made so.
Promises  nothing is believed: the whole temporary is read back. Where it is not what the catalogue knows, or the server
          refused, the temporary is removed and the bytes are streamed instead; so a server's bad copy never puts the
          blame on the source.
Partner   replica.storage.copy asks here before it streams; replica.storage.base.SupportsServerCopy does the work.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import cast

from replica.storage.base import Stat, Storage, SupportsDigests, SupportsServerCopy, supports
from replica.storage.faults import blaming
from replica.storage.hashing import Hasher
from rules.checksums import Agreement, Checksums
from rules.errors import Busy, Forbidden, TimedOut, Transient, Unreachable


async def copied(
    source: Storage,
    source_path: str,
    before: Stat,
    target: Storage,
    part: str,
    known: Checksums,
    algorithms: tuple[str, ...],
    check: Callable[[], None],
) -> Hasher | None:
    """`check` raises when the copy shall stop."""
    if not known or not supports(target, SupportsServerCopy):
        return None  # without a checksum to compare with, reading the source is the only proof
    seen = Hasher(algorithms)
    try:
        with blaming("target"):
            if not await cast(SupportsServerCopy, target).copy_from(source, source_path, part, expected=before):
                return None
            pieces = target.read(part)
            assert isinstance(pieces, AsyncGenerator)
            async with aclosing(pieces):
                async for piece in pieces:
                    check()
                    seen.update(piece)
            if seen.size_bytes == before.size_bytes and seen.checksums().compare(known) is Agreement.AGREE:
                return seen
    except (Busy, TimedOut, Unreachable):
        raise
    except (Forbidden, Transient):
        pass  # the worker itself may still read there, or says better why not
    with blaming("target"):
        await target.delete(part)
    return None


async def digests_of(target: Storage, size_bytes: int) -> tuple[str, ...]:
    """What the hasher must compute so that the target's own digest can be compared with it."""
    if not supports(target, SupportsDigests):
        return ()
    with blaming("target"):
        return await cast(SupportsDigests, target).digests(size_bytes)
