"""One call of the REST interface, as a value.

Given     a noun's method: verb, path, document, and what comes back.
Returns   a Call, which SyncHttp and AsyncHttp send alike; the path of a DID.
Promises  every name is percent-encoded as one segment, so a '/', '%', '?' or '#' in it stays part of the name.
Partner   replica.client.http and replica.client.aio send it; replica.api.routing has the other end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from replica import wire
from rules.errors import Invalid
from rules.names import Did

T = TypeVar("T")

BASE = "/api/v1"

#: Characters of the message of an outcome.
MESSAGE_MAX = 4_000
#: What the answer to a DELETE is read as.
NOTHING = type(None)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """`answer` is the type of the document that comes back; NoneType where none does."""

    method: str
    path: str
    answer: type[T]
    body: msgspec.Struct | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    #: It creates something: an Idempotency-Key goes with it, so that sending it again has one effect.
    creates: bool = False
    #: Doing it twice is the same as doing it once, though it is a POST.
    repeatable: bool = False
    #: Only if what is changed still has this version.
    version: int | None = None

    @property
    def safe_to_repeat(self) -> bool:
        return self.creates or self.repeatable or self.method in ("GET", "PATCH", "DELETE")

    def target(self) -> str:
        """Path and query as they go on the wire."""
        words = {
            key: value.isoformat() if isinstance(value, datetime) else value
            for key, value in self.query.items()
            if value is not None
        }
        return f"{self.path}?{urlencode(words, quote_via=quote)}" if words else self.path

    def conditions(self) -> dict[str, str]:
        """The headers that say under which condition it is to be done."""
        return {} if self.version is None else {"If-Match": f'"{self.version}"'}

    def encoded(self) -> bytes | None:
        if self.body is None:
            return None
        try:
            return msgspec.json.encode(self.body)
        except UnicodeEncodeError as error:  # a lone surrogate: a file name that is not UTF-8
            raise Invalid(
                "a text of the request is not Unicode", hint="rename what is not UTF-8; names are Unicode text"
            ) from error

    def decoded(self, body: bytes) -> T:
        if self.answer is NOTHING:
            return None  # type: ignore[return-value]
        return msgspec.json.decode(body, type=self.answer)


def at(*segments: str | int) -> str:
    """The path of `segments` below the base, each of them encoded as one."""
    return BASE + "".join(f"/{quote(str(segment), safe='')}" for segment in segments)


def at_did(did: str | Did, *more: str) -> str:
    """The path of a DID; a text is checked first, so a wrong one costs no request."""
    known = did if isinstance(did, Did) else Did.parse(did)
    return at("dids", known.scope, known.name, *more)


def printable(text: str) -> str:
    """A message quotes a storage, which may say anything: what JSON or the database cannot hold is written out."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:MESSAGE_MAX]


def next_page(call: Call[wire.Page[T]], cursor: str) -> Call[wire.Page[T]]:
    return Call(call.method, call.path, call.answer, query={**call.query, "cursor": cursor})
