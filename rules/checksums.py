"""Checksums as values: do two of them agree, differ, or can it not be told?

Given     algorithm names and hexadecimal values from people, storages and the catalogue.
Returns   Checksum and Checksums values; comparing two sets gives an Agreement.
Promises  a missing algorithm is never taken for agreement; values are compared in lower case with leading zeros.
Partner   replica.storage.hashing computes them; replica.catalog stores them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from rules.errors import Invalid

#: Algorithm → length of its value in hexadecimal digits. Strong ones first: the order in which they are preferred.
DIGITS: Mapping[str, int] = MappingProxyType({"sha256": 64, "xxh3_128": 32, "md5": 32, "crc32c": 8, "adler32": 8})

#: What every copy made by Replica computes in its one pass over the bytes.
ALWAYS = ("xxh3_128", "adler32")


_HEXADECIMAL = frozenset("0123456789abcdef")


#: Algorithm → its place in DIGITS, and its digits.
_PLACES = {algorithm: (place, digits) for place, (algorithm, digits) in enumerate(DIGITS.items())}
#: What is known of a file's content, as a catalogue keeps it: bytes or nothing, in the order of DIGITS.
Packed = tuple[bytes | None, ...]


class Agreement(Enum):
    AGREE = "agree"  #: at least one common algorithm, and all common ones are equal
    DIFFER = "differ"  #: a common algorithm has two values
    UNKNOWN = "unknown"  #: no common algorithm: nothing was proven


@dataclass(frozen=True, slots=True)
class Checksum:
    """One checksum; `value` is lower-case hexadecimal with its leading zeros."""

    algorithm: str
    value: str

    def __post_init__(self) -> None:
        digits = DIGITS.get(self.algorithm)
        if digits is None:
            raise Invalid(f"unknown checksum algorithm {self.algorithm[:40]!r}", hint=f"use one of {', '.join(DIGITS)}")
        value = self.value.lower()
        if self.algorithm in ("adler32", "crc32c"):
            value = value.rjust(digits, "0")  # storages are known to drop leading zeros
        if len(value) != digits or not _HEXADECIMAL.issuperset(value):
            raise Invalid(
                f"{self.value[:80]!r} is not a value of {self.algorithm}", hint=f"it has {digits} hexadecimal digits"
            )
        object.__setattr__(self, "value", value)


@dataclass(frozen=True, slots=True)
class Checksums:
    """What is known of one file's content: at most one value an algorithm."""

    items: tuple[Checksum, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Checksums:
        """From `{algorithm: hexadecimal}`; raises Invalid naming the one that cannot be right."""
        return cls(tuple(Checksum(a, values[a]) for a in DIGITS if a in values) + cls._unknown(values))

    @staticmethod
    def _unknown(values: Mapping[str, str]) -> tuple[Checksum, ...]:
        return tuple(Checksum(a, v) for a, v in values.items() if a not in DIGITS)  # raises, naming it

    def __iter__(self) -> Iterator[Checksum]:
        return iter(self.items)

    def __bool__(self) -> bool:
        return bool(self.items)

    def get(self, algorithm: str) -> str | None:
        return next((c.value for c in self.items if c.algorithm == algorithm), None)

    def as_dict(self) -> dict[str, str]:
        return {c.algorithm: c.value for c in self.items}

    def compare(self, other: Checksums) -> Agreement:
        mine, theirs = self.as_dict(), other.as_dict()
        common = mine.keys() & theirs.keys()
        if not common:
            return Agreement.UNKNOWN
        return Agreement.AGREE if all(mine[a] == theirs[a] for a in common) else Agreement.DIFFER


def packed(values: Mapping[str, str]) -> Packed:
    """`Checksums.of`, for thousands at a time; raises as it does."""
    found: list[bytes | None] = [None] * len(DIGITS)
    for algorithm, value in values.items():
        if algorithm not in _PLACES:
            return _packed_slowly(values)
        place, digits = _PLACES[algorithm]
        try:
            found[place] = content = bytes.fromhex(value)
        except ValueError:
            return _packed_slowly(values)
        # White space between the digits, which `fromhex` takes, leaves too few of them.
        if len(value) != digits or len(content) * 2 != digits:
            return _packed_slowly(values)
    return tuple(found)


def _packed_slowly(values: Mapping[str, str]) -> Packed:
    """What is wrong is refused; what lacks leading zeros is not."""
    given = Checksums.of(values).as_dict()
    return tuple(bytes.fromhex(given[algorithm]) if algorithm in given else None for algorithm in DIGITS)
