"""Must a person say yes to a rule first?

Given     how much a rule asks for, whether that can still grow, and the endpoints it may go to.
Returns   Granted, or Ask with the reason: what a person would have to look at.
Promises  without a limit at every candidate nothing is granted by itself; what can still grow never is, since a limit
          that is checked once would not hold.
Partner   replica.catalog.approvals; rules.permissions says which people may say yes.

An endpoint grants by itself what is within both of its attributes:
    auto_approve_bytes   the whole DID has at most so many bytes
    auto_approve_files   … and at most so many files
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rules.endpoints import Endpoint
from rules.quantities import counted, human_bytes

BYTES, FILES = "auto_approve_bytes", "auto_approve_files"


@dataclass(frozen=True, slots=True)
class Granted:
    """Nobody need be asked: it is within the limits of every candidate."""


@dataclass(frozen=True, slots=True)
class Ask:
    reason: str


def decide(files: int, size_bytes: int, *, closed: bool, candidates: Sequence[Endpoint]) -> Granted | Ask:
    """`closed`: nothing can be attached any more, anywhere in the DID."""
    if not candidates:
        return Ask("the expression selects no endpoint")
    if not closed:
        return Ask("the DID is open: more may be attached to it")
    for endpoint in sorted(candidates, key=lambda e: e.name):
        bytes_max, files_max = _limit(endpoint, BYTES), _limit(endpoint, FILES)
        if bytes_max is None or files_max is None:
            return Ask(f"{endpoint.name} approves nothing by itself")
        if size_bytes > bytes_max:
            return Ask(f"{human_bytes(size_bytes)} are more than the {human_bytes(bytes_max)} of {endpoint.name}")
        if files > files_max:
            return Ask(f"{counted(files, 'file')} are more than the {files_max} of {endpoint.name}")
    return Granted()


def _limit(endpoint: Endpoint, key: str) -> int | None:
    """A limit is a whole number; anything else is none, so a slip in an attribute grants nothing."""
    value = endpoint.value(key)
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value[:19])
    return value if isinstance(value, int) and value >= 0 else None
