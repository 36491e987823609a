"""The part of a file that was asked for, and whether an answer is it.

Given     offset and length; the status and headers of the answer.
Returns   how many bytes the body must have, or the range to ask for instead.
Promises  nothing but exactly the range counts: neither a whole file (or a page of a proxy) with status 200, nor another
          beginning, nor a shorter or a longer part; what is read by several ranges is one file, as far as its server
          tells: the same size, and the same ETag where there is one.
Partner   replica.storage.webdav counts the bytes.

A large file is asked for in ranges below 2 GiB: XRootD 5 announces a longer one with its length modulo 4 GiB, or as 0
bytes, and then sends all of it, into the answer to the next question. It has more faults of its own: for a range that
reaches beyond the end it promises all of it, sends what there is, and leaves the reader waiting; for one without an end
it says "0--1/5" and sends nothing. It tells the size, so the right range can be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CONTENT_RANGE = re.compile(r"\s*bytes\s+(\d{1,19})-(-?\d{1,19})/(\d{1,19})\s*\Z", re.ASCII)


#: At most so much is asked for at once.
SPAN_BYTES = 1 << 30


class Wrong(Exception):
    """The answer is not what was asked for; the text says why."""


class Changed(Exception):
    """The file is another one than at the first question."""


class Spans:
    """The ranges by which a part of a file is read, one after the other."""

    def __init__(self, offset: int, length: int | None, size_guess: int) -> None:
        #: The first byte that is not wanted any more; None: to the end of the file.
        self._end = None if length is None else offset + length
        self._file: tuple[int, str] | None = None
        self._corrected = False
        #: What to ask for next; None: all was told.
        self.wanted: Range | None = self._next(offset, size_guess)

    @property
    def begun(self) -> bool:
        return self._file is not None

    def _next(self, offset: int, size: int) -> Range:
        """From there on, if the file has that size; 0: nobody knows."""
        ends = [end for end in (size or None, self._end) if end is not None]
        if ends and min(ends) - offset > SPAN_BYTES:
            return Range(offset, SPAN_BYTES, size)
        return Range(offset, None if self._end is None else self._end - offset, size)

    def judge(self, status: int, headers: Mapping[str, str]) -> int:
        """How many bytes must follow; 0: none do. `wanted` is then what to ask for next, or in place of this."""
        asked = self.wanted
        assert asked is not None
        count, instead = asked.judge(status, headers)
        size = _size_of(headers)
        if instead is not None:
            if self._corrected:
                raise Wrong("the server sends another range than it was asked for, again")
            self._corrected = True
            self.wanted = self._next(asked.offset, size)
            return 0
        file = size, _opaque(headers.get("ETag", ""))
        if self.begun and file != self._file:
            raise Changed("it changed while it was read: its size or its ETag is another one")
        self._file = file
        after = asked.offset + count
        self.wanted = self._next(after, size) if count and after < min(size, self._end or size) else None
        return count


def _opaque(etag: str) -> str:
    """An ETag without the mark of weakness: Apache marks that of a file for as long as it is younger than a second, and
    the same file's a moment later is the same without it."""
    return etag.removeprefix("W/")


def _size_of(headers: Mapping[str, str]) -> int:
    """The size of the whole file, of an answer that was judged."""
    match = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
    assert match is not None
    return int(match[3])


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

    @property
    def bytes_asked(self) -> int:
        """0: nobody knows."""
        if self.offset < self.size_guess:
            return self._end(self.size_guess) - self.offset
        return self.length or 0

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
