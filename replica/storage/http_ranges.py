"""The part of a file that was asked for, and whether an answer is it.

Given     offset and length; the status and headers of the answer.
Returns   how many bytes the body must have, or the range to ask for instead.
Promises  nothing but exactly the range counts: neither a whole file (or a page of a proxy) with status 200, nor another
          beginning, nor a shorter or a longer part.
Partner   replica.storage.webdav counts the bytes.

XRootD 5 has faults of its own: for a range that reaches beyond the end it promises all of it, sends what there is, and
leaves the reader waiting; for one without an end it says "0--1/5" and sends nothing. Both tell the size, so the right
range can be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(-?\d{1,19})/(\d{1,19})\s*\Z", re.ASCII)


class Wrong(Exception):
    """The answer is not what was asked for; the text says why."""


@dataclass(frozen=True, slots=True)
class Range:
    offset: int
    length: int | None = None  #: None: to the end
    #: What was last known of the file's size; 0: nothing. Only a guess, that saves XRootD's second question.
    size_guess: int = 0

    @property
    def header(self) -> str:
        last = "" if self.length is None else self.offset + self.length - 1
        if self.offset < self.size_guess:
            last = self._end(self.size_guess) - 1
        return f"bytes={self.offset}-{last}"

    def _end(self, size: int) -> int:
        return size if self.length is None else min(size, self.offset + self.length)

    def judge(self, status: int, headers: Mapping[str, str]) -> tuple[int, Range | None]:
        """How many bytes must follow, and None; or 0 and the range to ask for in place of this one."""
        if status != 206:
            raise Wrong(
                "asked for a range, the server sent something whole: perhaps an error page, or it has no ranges"
            )
        if headers.get("Content-Encoding", "identity") != "identity":
            raise Wrong(f"the server encoded the bytes ({headers['Content-Encoding'][:40]!r}), which was not asked for")
        told = headers.get("Content-Range", "")
        match = _CONTENT_RANGE.match(told)
        if match is None:
            raise Wrong(f"the server does not say which range it sends ({told[:80]!r})")
        first, last, total = (int(number) for number in match.groups())
        if first != self.offset:
            raise Wrong(f"the server sends the range from {first}, not from {self.offset}")
        if self.offset >= total:
            return 0, None
        end = self._end(total)
        if last + 1 != end:
            exactly = Range(self.offset, end - self.offset)
            if exactly.header == self.header:
                raise Wrong(f"the server sends the range up to {last}, not up to {end - 1}")
            return 0, exactly
        size = headers.get("Content-Length")
        if size is not None and size != str(end - self.offset):
            raise Wrong(f"the server announces {size[:20]} bytes for a range of {end - self.offset}")
        return end - self.offset, None
