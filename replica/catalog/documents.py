"""JSON that people attach to things: metadata and attributes, checked before a database sees it.

Given     values decoded from JSON.
Returns   the same values.
Promises  what passes is stored and given back unchanged by PostgreSQL and SQLite alike: no NUL, which PostgreSQL
          refuses, no lone surrogate, which is no text, no NaN. No document is deep or large enough to hurt a reader.
Partner   replica.catalog.dids and endpoints.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rules.endpoints import BUILT_IN_KEYS, AttributeValue
from rules.errors import Invalid
from rules.names import check_attribute_key, shown

DEPTH_MAX = 16
BYTES_MAX = 65_536
KEY_LENGTH_MAX = 256
ATTRIBUTES_MAX = 100
ATTRIBUTE_LENGTH_MAX = 1_000
_INTEGER_MAX = 2**63 - 1


def check_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Any JSON object, within the bounds above."""
    level: list[tuple[str, Any]] = list(metadata.items())
    for key in metadata:
        _check_key(key, "a key of the metadata")
    for _ in range(DEPTH_MAX):
        deeper: list[tuple[str, Any]] = []
        for key, value in level:
            if isinstance(value, dict):
                for inner in value:
                    _check_key(inner, f"a key in the metadata {shown(key)}")
                deeper.extend((key, inner) for inner in value.values())
            elif isinstance(value, list):
                deeper.extend((key, inner) for inner in value)
            else:
                _check_scalar(value, f"the metadata {shown(key)}", "metadata")
        level = deeper
        if not level:
            break
    else:
        raise Invalid(
            f"the metadata {shown(level[0][0])} is nested too deeply",
            hint=f"at most {DEPTH_MAX} levels are kept",
            field="metadata",
        )
    size = len(json.dumps(metadata, ensure_ascii=False).encode())
    if size > BYTES_MAX:
        raise Invalid(
            f"the metadata has {size} bytes",
            hint=f"at most {BYTES_MAX} are kept; put the rest into a file",
            field="metadata",
        )
    return dict(metadata)


def check_attributes(
    attributes: Mapping[str, AttributeValue | None], endpoint: str
) -> dict[str, AttributeValue | None]:
    """An endpoint's attributes; None removes one. Keys that every endpoint has by itself are refused."""
    if len(attributes) > ATTRIBUTES_MAX:
        raise Invalid(
            f"{len(attributes)} attributes are too many", hint=f"at most {ATTRIBUTES_MAX}", field="attributes"
        )
    for key, value in attributes.items():
        check_attribute_key(key)
        if key in BUILT_IN_KEYS or key == endpoint:
            raise Invalid(
                f"{shown(key)} is what every endpoint has by itself; an attribute of that name would not be seen",
                hint="choose another key",
                field="attributes",
            )
        _check_scalar(value, f"the attribute {shown(key)}", "attributes")
        if isinstance(value, str) and len(value) > ATTRIBUTE_LENGTH_MAX:
            raise Invalid(
                f"the attribute {shown(key)} has {len(value)} characters",
                hint=f"at most {ATTRIBUTE_LENGTH_MAX}",
                field="attributes",
            )
        if type(value) is int and abs(value) > _INTEGER_MAX:
            raise Invalid(
                f"the attribute {shown(key)} is too large a number", hint="use at most 64 bits", field="attributes"
            )
    return dict(attributes)


def _check_key(key: str, what: str) -> None:
    _check_scalar(key, what, "metadata")
    if len(key) > KEY_LENGTH_MAX:
        raise Invalid(f"{what} has {len(key)} characters", hint=f"at most {KEY_LENGTH_MAX}", field="metadata")


def _check_scalar(value: object, what: str, field: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise Invalid(f"{what} holds the character U+0000", hint="remove it", field=field)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Invalid(f"{what} is not proper Unicode text", hint="it holds half a character", field=field) from None
    elif field == "metadata" and type(value) is int and not -_INTEGER_MAX - 1 <= value <= _INTEGER_MAX:
        # A database would keep it, but not find it again by its value.
        raise Invalid(f"{what} is a number of more than 64 bits", hint="write it as a text", field=field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Invalid(f"{what} is not a number", hint="NaN and infinity are not JSON", field=field)
    elif not isinstance(value, str | int | float | bool | None):
        raise Invalid(f"{what} is not JSON", field=field)
