"""How much may be in flight at once, and what is held up when it is as much as that.

Given     limits, and what is in flight under each of them.
Returns   for a transfer: the first of its limits that refuses it, or none.
Promises  no count of files ever exceeds its limit; a sum of bytes does only by a file that is larger than the limit
          alone, and such a file goes by itself, for otherwise it never would. The same for slots, which are what
          adapts: a file takes one, and small ones a part of one. A transfer goes when all its limits grant it, and
          takes from all or from none.
Partner   replica.catalog.orders asks, within the transaction that claims; replica.catalog.limits counts.

| kind     | of                                                | key             |
|----------|---------------------------------------------------|-----------------|
| read     | an endpoint that is read from                     | its id          |
| write    | an endpoint that is written to                    | its id          |
| link     | the way from one endpoint to another              | `source:target` |
| activity | what transfers are for, over all sites            | its name        |
| account  | whose rule asked for them first, over all sites   | its id          |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rules.quantities import counted, human_bytes

#: A file takes a slot; small ones go in lists, so that of files below this size many share one, by their size.
SMALL_BYTES = 4 << 20
#: So many of the smallest share a slot: slots are counted in these parts.
PARTS = 128

KINDS = ("read", "write", "link", "activity", "account")
#: Those that transfers of several sites share.
SHARED = frozenset({"read", "activity", "account"})

#: (kind, key)
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Limit:
    """None: as much as there is."""

    files: int | None = None
    bytes: int | None = None
    #: What was found to serve best (rules.concurrency), besides what people set.
    slots: int | None = None

    @property
    def fixed(self) -> bool:
        """People set something."""
        return self.files is not None or self.bytes is not None


@dataclass(slots=True)
class Load:
    """What is in flight."""

    files: int = 0
    bytes: int = 0
    #: Of slots.
    parts: int = 0

    @property
    def slots(self) -> float:
        return self.parts / PARTS


def parts_of(size: int) -> int:
    """Which part of a slot a file takes."""
    return PARTS if size >= SMALL_BYTES else max(1, size * PARTS // SMALL_BYTES)


class Room:
    """What limits leave; it shrinks with everything that is taken."""

    def __init__(self, limits: Mapping[Key, Limit] | None = None, loads: Mapping[Key, Load] | None = None) -> None:
        self._limits = limits or {}
        self._loads = {key: (loads or {}).get(key) or Load() for key in self._limits}

    def copy(self) -> Room:
        """To try what would be taken."""
        return Room(self._limits, {key: Load(load.files, load.bytes, load.parts) for key, load in self._loads.items()})

    def has_limit(self, key: Key) -> bool:
        return key in self._limits

    def has_fixed_limit(self, key: Key) -> bool:
        return key in self._limits and self._limits[key].fixed

    def files_left(self, key: Key) -> int | None:
        """How many files could go, however small; None: no limit. 0: it is full."""
        limit = self._limits.get(key)
        if limit is None:
            return None
        load = self._loads[key]
        if limit.bytes is not None and load.bytes >= limit.bytes:
            return 0
        left = None if limit.files is None else max(0, limit.files - load.files)
        if limit.slots is not None:
            parts = max(0, limit.slots * PARTS - load.parts)
            left = parts if left is None else min(left, parts)
        return left

    def first_to_refuse(self, keys: Iterable[Key], size: int) -> Key | None:
        """Of these limits; None: all of them grant a file of `size` bytes."""
        return next((key for key in keys if key in self._limits and not self._grants(key, size)), None)

    def take(self, keys: Iterable[Key], size: int) -> None:
        for key in keys:
            if key in self._limits:
                self._loads[key].files += 1
                self._loads[key].bytes += size
                self._loads[key].parts += parts_of(size)

    def _grants(self, key: Key, size: int) -> bool:
        limit, load = self._limits[key], self._loads[key]
        if limit.files is not None and load.files >= limit.files:
            return False
        if limit.slots is not None and load.parts + parts_of(size) > limit.slots * PARTS:
            return False
        if limit.bytes is None or load.bytes + size <= limit.bytes:
            return True
        return load.files == 0 and limit.bytes > 0


def told(key: Key, limit: Limit) -> str:
    """The limit as people read it, without the name of what it is of."""
    parts = [counted(limit.files, "file")] if limit.files is not None else []
    if limit.bytes is not None:
        parts.append(human_bytes(limit.bytes))
    if limit.slots is not None:
        parts.append(f"{counted(limit.slots, 'slot')} by what was measured")
    what = {"read": "read from it", "write": "written to it", "link": "on this link"}.get(key[0], "for it")
    return f"at most {' and '.join(parts)} may be in flight {what}"
