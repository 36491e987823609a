"""What several kinds of storage refuse alike, said in the same words.

Given     the endpoint's name, the path, and the numbers a person wants to know.
Returns   the error, for the caller to raise.
Promises  each names the place and the reason.
Partner   the adapters; replica.storage.faults translates what is not theirs.
"""

from __future__ import annotations

from replica.storage.faults import place
from rules.errors import Busy, NoSpace, Side, TargetExists, Transient
from rules.quantities import human_bytes


def exists_already(endpoint: str, path: str, side: Side = "target") -> TargetExists:
    return TargetExists(f"{place(endpoint, path)} exists already", endpoint=endpoint, path=path, side=side)


def no_room(
    endpoint: str,
    label: str,
    path: str,
    *,
    free_bytes: int,
    size_bytes: int,
    hint: str = "free space there, or move data elsewhere",
) -> NoSpace:
    return NoSpace(
        f"{label} has {human_bytes(free_bytes)} free, and {human_bytes(size_bytes)} are to come",
        hint=hint,
        endpoint=endpoint,
        path=path,
        side="target",
    )


def not_all_kept(endpoint: str, path: str, *, kept_bytes: int, written_bytes: int) -> Transient:
    return Transient(
        f"{place(endpoint, path)} has {kept_bytes} bytes after {written_bytes} were written",
        endpoint=endpoint,
        path=path,
        side="target",
    )


def being_published(endpoint: str, path: str, stale_seconds: int) -> Busy:
    """Somebody else has claimed the name; a claim that is older than that is given up."""
    busy = Busy(
        f"{place(endpoint, path)} is being published by another worker, or was by one that died",
        hint=f"tried again by itself; such a claim is given up after {stale_seconds} s",
        endpoint=endpoint,
        path=path,
        side="target",
    )
    busy.retry_after_seconds = stale_seconds
    return busy
