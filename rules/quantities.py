"""Numbers as people read them.

Given     a count of bytes, or of things.
Returns   a short text in decimal units, as storages and networks are sold: `3.1 TB`; `1 file`, `2 files`.
Promises  three digits at most before the point, one after it; below 1 kB the exact number.
Partner   every message that speaks of space or of how many.
"""

from __future__ import annotations

_UNITS = ("kB", "MB", "GB", "TB", "PB", "EB")


def human_bytes(count: int) -> str:
    if abs(count) < 1000:
        return f"{count} B"
    value = float(count)
    for unit in _UNITS:
        value /= 1000
        # 999,960 bytes would print as 1000.0 kB: what rounds up to the next unit is printed in it.
        if abs(value) < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value:.1f} {_UNITS[-1]}"


def counted(count: int, thing: str) -> str:
    """`1 file`, `2 files`: for things whose plural takes an s."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
