"""What a server says of a file's checksum in its headers.

Given     the headers `Digest` (RFC 3230) and `Repr-Digest` (RFC 9530).
Returns   algorithm → hexadecimal, as in rules.checksums; what is unknown or cannot be told for sure is left out.
Promises  never a value that could be read in two ways: leaving one out costs a read-back, a wrong one a good file.
Partner   replica.storage.webdav asks; rules.checksums compares.

Servers differ: adler32 is hexadecimal and may have lost its leading zeros; md5 and sha-256 are base64, but some write
them in hexadecimal; crc32c was base64 in XRootD up to 5.8.0 and is hexadecimal since.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator

from rules.checksums import DIGITS

#: What the headers call an algorithm → what we call it.
_NAMES = {
    "adler32": "adler32",
    "adler": "adler32",
    "crc32c": "crc32c",
    "md5": "md5",
    "sha-256": "sha256",
    "sha256": "sha256",
}
#: Our name → what is asked for in `Want-Digest` and in `Want-Repr-Digest`.
WANTED = {
    "adler32": ("adler32", "adler"),
    "crc32c": ("crc32c", "crc32c"),
    "md5": ("md5", "md5"),
    "sha256": ("sha-256", "sha-256"),
}
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


def digests(digest: str, repr_digest: str) -> dict[str, str]:
    """The values of both headers (empty: not there). One that is said twice and differently is left out."""
    found: dict[str, set[str]] = {}
    for name, value in (*_items(digest), *_items(repr_digest)):
        algorithm = _NAMES.get(name.lower())
        if algorithm is not None:
            found.setdefault(algorithm, set()).add(_hexadecimal(algorithm, value))
    return {a: value for a, values in found.items() if len(values) == 1 and (value := next(iter(values)))}


def _items(header: str) -> Iterator[tuple[str, str]]:
    for item in header.split(","):
        name, _, value = item.strip().partition("=")
        value = value.partition(";")[0].strip().strip('"')
        if value.startswith(":") and value.endswith(":"):  # bytes in a structured field
            value = value[1:-1]
        yield name.strip(), value


def _hexadecimal(algorithm: str, value: str) -> str:
    """Empty, if it cannot be told."""
    digits = DIGITS[algorithm]
    if value.startswith(("0x", "0X")):
        value = value[2:]
    if _HEXADECIMAL.issuperset(value):
        if len(value) == digits:
            return value.lower()
        if algorithm == "adler32" and 0 < len(value) < digits:
            return value.lower().rjust(digits, "0")
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return ""
    return content.hex() if len(content) * 2 == digits else ""
