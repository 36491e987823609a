"""JSON that means one thing only.

Given     the bytes of a request and the struct they should be.
Returns   the struct, or Invalid with the field that is at fault.
Promises  refused: a key given twice, nesting deeper than DEPTH_MAX, the character U+0000 (PostgreSQL has no text with
          it), NaN, a byte-order mark, and everything else that is not plain JSON in UTF-8. Types are not bent: an
          integer is written without a fraction (3, not 3.0 or "3").
Partner   replica.wire has the structs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec

from rules.errors import Invalid

DEPTH_MAX = 32
_DETAIL_MAX = 400
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`\Z")
_LENGTH = re.compile(r"`str` of length <= (?P<most>\d+)")
_NAMED = re.compile(r"field `(?P<name>[^`]+)`")


def decoder(kind: Any) -> Callable[[bytes], Any]:
    """What turns the bytes of a request into `kind`."""
    decode = msgspec.json.Decoder(kind).decode

    def checked(body: bytes) -> Any:
        try:
            value = decode(body)
            _check_shape(body)
        except msgspec.ValidationError as error:
            raise invalid(error) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Invalid(f"the body is not JSON: {str(error)[:_DETAIL_MAX]}", hint="send JSON in UTF-8") from error
        except RecursionError as error:
            raise _too_deep() from error
        return value

    return checked


def invalid(error: msgspec.ValidationError) -> Invalid:
    """In a validation error's words, with the path of the field that it is about."""
    text = str(error)
    found = _PATH.search(text)
    path = found["path"] if found else ""
    text = _PATH.sub("", text)
    at = f"{path[:200]}: " if path else ""
    if named := _NAMED.search(text):
        path = f"{path}.{named['name']}" if path else named["name"]
    if longest := _LENGTH.search(text):
        return Invalid(f"{at}more than {longest['most']} characters", hint="shorten it", field=path[:200])
    hint = "/api/v1/openapi.json lists the fields, their types and limits"
    return Invalid(f"{at}{text[0].lower()}{text[1:_DETAIL_MAX]}", hint=hint, field=path[:200])


def _check_shape(body: bytes) -> None:
    """What a typed decoder lets pass. It has been decoded, so it is JSON."""
    if b"\\u0000" in body and _NUL.search(body):
        raise Invalid("a text of the body holds the character U+0000", hint="leave it out: no text can hold it")
    value = json.loads(body, object_pairs_hook=_no_key_twice)
    # What has few brackets cannot be deep; most requests end here.
    if body.count(b"[") + body.count(b"{") <= DEPTH_MAX:
        return
    level = [value]
    for _ in range(DEPTH_MAX):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    together = dict(pairs)
    if len(together) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Invalid(f"the key {twice[:80]!a} is there twice", hint="keep one of the two", field=twice[:80])
    return together


def _too_deep() -> Invalid:
    return Invalid(f"the body is nested more than {DEPTH_MAX} levels deep", hint="flatten it")
