"""Giving an object of an S3 server another name, without ever replacing what has it.

Given     a written object, its final key, and what the server was seen to be able to do.
Returns   nothing: the copy is there, and was looked at.
Promises  by the first of three ways that the server honours:

    copy      one CopyObject with If-None-Match: *. Atomic against everybody.
    complete  a multipart upload whose parts are copied by the server, completed with If-None-Match: *. The same
              promise; three requests. Also the way of objects above 5 GiB.
    flags     for servers with neither. Of all publishers of Replica, on whatever machine, exactly one looks at the
              final name, copies, and looks again before the next one may (replica.storage.s3_flags). Against others
              who write into the endpoint there is a window: what appears between our look and our copy is replaced. A
              server that is itself not atomic (rclone's on a folder) may show a part of the object while it copies.

          After any of them the object is looked at: its size and the mark that was written into its metadata must be
          those of the temporary. A copy whose answer was lost is told from somebody else's by that mark.
Partner   replica.storage.s3.publish and .quarantine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from replica.storage.faults import place
from replica.storage.refusals import exists_already
from replica.storage.s3_abilities import Abilities
from replica.storage.s3_flags import FLAG_SECONDS_MAX, Flags
from replica.storage.s3_multipart import COPY_BYTES_MAX, copy_in_parts
from replica.storage.s3_wire import Answer, Wire, quoted
from rules.errors import (
    Busy,
    ChecksumDiffers,
    Permanent,
    SourceChanged,
    TimedOut,
    Transient,
)

#: Metadata of every object that we write: which temporary it was.
MARK = "x-amz-meta-replica-part"
#: How long a copy may take in all.
_COPY_SECONDS_MAX = FLAG_SECONDS_MAX / 2
#: A larger one is copied under a flag of its own.
_SOON_BYTES = 64 << 20
_NEW = {"If-None-Match": "*"}


@dataclass(frozen=True, slots=True)
class Written:
    """The object to be copied, as HEAD told it."""

    place: str  #: bucket/key
    size_bytes: int
    etag: str
    mark: str
    crc32c: str  #: of the whole object, base64; empty if the server keeps none

    @classmethod
    def of(cls, place: str, answer: Answer) -> Written:
        headers = answer.headers
        whole = headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT"
        crc = headers.get("x-amz-checksum-crc32c", "") if whole else ""
        size = int(headers.get("Content-Length", "-1"))
        return cls(place, size, headers.get("ETag", ""), headers.get(MARK, ""), "" if "-" in crc else crc)


Look = Callable[[str], Awaitable[Written | None]]


class Publisher:
    """`look` finds the object at a key, or None."""

    def __init__(self, wire: Wire, look: Look, flags: Flags) -> None:
        self._wire = wire
        self._look = look
        self._flags = flags

    async def publish(self, written: Written, final: str, path: str, abilities: Abilities) -> None:
        """TargetExists: something is there, and nothing was changed."""
        large = written.size_bytes > COPY_BYTES_MAX
        if abilities.copy_new and not large:
            await self._conditionally(written, final, path, self._copy)
        elif abilities.complete_new and written.size_bytes > 0:
            await self._conditionally(written, final, path, self._copy_in_parts)
        elif abilities.put_new and written.size_bytes == 0:
            await self._conditionally(written, final, path, self._put_empty)
        else:
            async with self._flags.holding(final, path, alone=written.size_bytes > _SOON_BYTES) as still_raised:
                there = await self._look(final)
                if there is not None:
                    if written.mark and there.mark == written.mark:
                        return  # our own copy, whose answer was lost
                    raise exists_already(self._wire.name, path)
                still_raised()
                try:
                    async with asyncio.timeout(_COPY_SECONDS_MAX):
                        await self._settle(written, final, path, lambda: self.copy(written, final, path))
                except TimeoutError:
                    raise TimedOut(
                        f"{place(self._wire.name, path)}: the server copies for too long",
                        endpoint=self._wire.name,
                        path=path,
                        side="target",
                    ) from None

    async def copy(self, written: Written, key: str, path: str) -> None:
        """Copy, replacing what is there: for names that nobody else knows, or while our flag is the only one."""
        await (self._copy_large if written.size_bytes > COPY_BYTES_MAX else self._copy)(written, key, path, {})

    # ── by condition ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def _conditionally(
        self,
        written: Written,
        final: str,
        path: str,
        way: Callable[[Written, str, str, dict[str, str]], Awaitable[int]],
    ) -> None:
        async def copied() -> None:
            status = await way(written, final, path, _NEW)
            if status == 409:  # two at the very same moment: the server wants one of them to come again
                raise Busy(f"{place(self._wire.name, path)}: somebody else writes there now", path=path)
            if status == 412:
                there = await self._look(final)
                # Ours already: the connection broke after the copy, and the request was sent again.
                if there is None or there.mark != written.mark or not written.mark:
                    raise exists_already(self._wire.name, path)

        await self._settle(written, final, path, copied)

    async def _copy(self, written: Written, key: str, path: str, condition: dict[str, str]) -> int:
        headers = {
            "x-amz-copy-source": quoted(written.place),
            "x-amz-copy-source-if-match": written.etag,
            **condition,
        }
        answer = await self._wire.call(
            "PUT",
            key,
            path=path,
            headers=headers,
            returned=(409, 412),
            quiet_seconds=self._wire.patience(written.size_bytes),
        )
        if answer.status == 412 and not condition:
            raise _changed(self._wire.name, path)
        return answer.status

    async def _copy_in_parts(self, written: Written, key: str, path: str, condition: dict[str, str]) -> int:
        return await copy_in_parts(
            self._wire,
            written.place,
            key,
            path,
            size_bytes=written.size_bytes,
            etag=written.etag,
            headers={MARK: written.mark} if written.mark else {},
            condition=condition,
        )

    async def _copy_large(self, written: Written, key: str, path: str, condition: dict[str, str]) -> int:
        try:
            return await self._copy_in_parts(written, key, path, condition)
        except Permanent:  # a server without copies of parts seldom has a limit for whole ones
            return await self._copy(written, key, path, condition)

    async def _put_empty(self, written: Written, key: str, path: str, condition: dict[str, str]) -> int:
        headers = {MARK: written.mark, **condition} if written.mark else condition
        return (await self._wire.call("PUT", key, path=path, headers=headers, returned=(409, 412))).status

    async def _settle(self, written: Written, final: str, path: str, copied: Callable[[], Awaitable[None]]) -> None:
        """Copy, then look: what is there must be what was written."""
        lost: Transient | None = None
        try:
            await copied()
        except Transient as error:  # no answer, or a poor one: the copy may have been made
            lost = error
        there = await self._look(final)
        if there is None:
            raise lost or Transient(
                f"{place(self._wire.name, path)}: the server copied it, and it is not there",
                endpoint=self._wire.name,
                path=path,
            )
        if written.mark and there.mark and there.mark != written.mark:
            raise exists_already(self._wire.name, path)
        if lost is not None and (not there.mark or there.mark != written.mark):
            raise lost  # nothing tells whose this is: whoever comes next compares the bytes
        if there.size_bytes != written.size_bytes or (
            there.crc32c and written.crc32c and there.crc32c != written.crc32c
        ):
            raise ChecksumDiffers(
                f"{place(self._wire.name, path)}: the server's copy has {there.size_bytes} bytes and is not what was "
                f"written ({written.size_bytes} bytes)",
                hint="it is put aside when the file is copied again; tell the operator of the storage",
                endpoint=self._wire.name,
                path=path,
                side="target",
            )


def _changed(name: str, path: str) -> SourceChanged:
    return SourceChanged(f"{place(name, path)} changed while it was copied", endpoint=name, path=path)
