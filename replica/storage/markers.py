"""The stream of performance markers with which a server tells how a third-party copy goes.

Given     the body of the answer to a COPY, in pieces cut anywhere.
Returns   how many bytes have arrived so far, and in the end what the server says became of them.
Promises  only the last line decides; anything else than a clear success or failure there is `unknown`, for it means
          that the server died, or that the connection did. A stream without end takes no memory.
Partner   replica.storage.thirdparty reads the answer; nothing here asks a clock or a network.

    Perf Marker
    Timestamp: 1795398749
    Stripe Index: 0
    Stripe Bytes Transferred: 10240
    Total Stripe Count: 1
    End
    success: Created
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

#: A line that is longer is cut: what decides stands at its beginning.
_LINE_BYTES_MAX = 4096
_TEXT_MAX = 300
#: More stripes than any server opens; a stream may name as many as it likes.
_STRIPES_MAX = 1000

_SUCCESS = re.compile(r"success\b", re.IGNORECASE)
#: dCache says `failed` in some versions; an aborted copy is a failed one.
_FAILURE = re.compile(r"(?:failure|failed|aborted)\b[:\s]*(.*)", re.IGNORECASE | re.DOTALL)
_FIELD = re.compile(r"Stripe (Index|Bytes Transferred): *([0-9]{1,18})\Z")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the server said last. `text` is its reason, fit to be shown."""

    kind: Literal["success", "failure", "unknown"]
    text: str = ""


class Markers:
    """Feed it the answer's pieces; `bytes_done` is right at any time, `outcome()` when the answer has ended."""

    def __init__(self) -> None:
        self._line = b""
        self._last = ""
        self._stripe = 0
        self._stripes: dict[int, int] = {}

    @property
    def bytes_done(self) -> int:
        return sum(self._stripes.values())

    def feed(self, piece: bytes) -> None:
        *whole, rest = piece.split(b"\n")
        for line in whole:
            self._take(self._line + line)
            self._line = b""
        self._line = (self._line + rest)[:_LINE_BYTES_MAX]

    def outcome(self) -> Outcome:
        """Of a stream that has ended: by its end, or because nobody answers any more."""
        self._take(self._line)
        self._line = b""
        if _SUCCESS.match(self._last):
            return Outcome("success")
        if failed := _FAILURE.match(self._last):
            return Outcome("failure", shown_reason(failed[1]) or "no reason given")
        return Outcome("unknown", "the server's answer ended without an outcome")

    def _take(self, line: bytes) -> None:
        text = line[:_LINE_BYTES_MAX].decode(errors="replace").strip()
        if not text:
            return
        self._last = text
        if not (field := _FIELD.match(text)):
            return
        if field[1] == "Index":
            self._stripe = int(field[2])
        elif self._stripe in self._stripes or len(self._stripes) < _STRIPES_MAX:
            self._stripes[self._stripe] = int(field[2])


def shown_reason(text: str) -> str:
    """A foreign server's words, as part of our message: one line, printable, not too long, no bearer's token."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    plain = re.sub(r"(?i)\b(bearer|basic)\s+\S+", r"\1 …", plain)
    plain = re.sub(r"(?i)\b(authz|access_token|token)=[^\s\"';&]+", r"\1=…", plain)
    return " ".join(plain.split())[:_TEXT_MAX]
