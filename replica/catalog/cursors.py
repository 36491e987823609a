"""Pages of a list, each beginning after the last key of the one before.

Given     a cursor that an earlier page gave, or None for the first.
Returns   the key to go on after; and for the rows read, a Page with the cursor of the next.
Promises  a page costs the same wherever it is in the list; rows added or removed meanwhile neither repeat nor hide
          others; a cursor that is not one of ours is Invalid, whatever it holds.
Partner   every list of replica.catalog.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from replica import wire
from rules.errors import Invalid

R = TypeVar("R")
T = TypeVar("T")

LIMIT_MAX = 1_000
_ID_MAX = 2**63 - 1
_SORTED_LENGTH_MAX = 5_000
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?")


def check_limit(limit: int) -> int:
    if not 1 <= limit <= LIMIT_MAX:
        raise Invalid(f"a page of {limit} items is not possible", hint=f"use 1 to {LIMIT_MAX}", field="limit")
    return limit


def pack(*key: int | str) -> str:
    return base64.urlsafe_b64encode(json.dumps(key, separators=(",", ":")).encode()).decode().rstrip("=")


def unpack(cursor: str | None, length: int = 1) -> tuple[int, ...] | None:
    """The key in `cursor`; None for None."""
    if cursor is None:
        return None
    key = _decoded(cursor, 200)
    if len(key) != length or not all(type(part) is int and -1 <= part <= _ID_MAX for part in key):
        raise _foreign()
    return tuple(key)


def unpack_sorted(cursor: str) -> tuple[int, str, str, int]:
    """Of a list that is sorted by values: their kind, a number as its digits, a text, and an id."""
    match _decoded(cursor, _SORTED_LENGTH_MAX):
        case [int(kind), str(number), str(text), int(last)] if (
            _NUMBER.fullmatch(number) and 0 <= kind <= 9 and 0 <= last <= _ID_MAX and _is_text(text)
        ):
            return kind, number, text, last
    raise _foreign()


def _decoded(cursor: str, length_max: int) -> list[Any]:
    key: Any = None
    if len(cursor) <= length_max:
        with contextlib.suppress(ValueError):  # what base64, UTF-8 and JSON raise alike
            key = json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    if not isinstance(key, list):
        raise _foreign()
    return key


def _is_text(text: str) -> bool:
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)


def _foreign() -> Invalid:
    return Invalid("the cursor is not one of ours", hint="use the `next` of the page before", field="cursor")


def page(rows: Sequence[R], limit: int, item: Callable[[R], T], key: Callable[[R], tuple[Any, ...]]) -> wire.Page[T]:
    """A page of `rows`, of which one more than `limit` was asked for."""
    following = pack(*key(rows[limit - 1])) if len(rows) > limit else None
    return wire.Page(items=[item(row) for row in rows[:limit]], next=following)
