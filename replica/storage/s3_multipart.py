"""Multipart uploads to an S3 server: a stream in parts, several at once, or an object copied part by part.

Given     a Wire, a key, and pieces of a file in order, or another key of the same server.
Returns   nothing: the object is there, whole, or it is not there and its unfinished upload was aborted.
Promises  a part that failed in a way that may pass is sent again, the whole file is not; each part carries its CRC32C
          where the server checks it; memory stays below `PARALLEL` + 1 parts a file.
Partner   replica.storage.s3 decides the conditions; replica.storage.s3_wire sends.

An ETag of such an object is no checksum of it, and is never taken for one.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

from replica.storage.base import Piece
from replica.storage.s3_wire import Wire, quoted, text_of
from rules.errors import Busy, Permanent, ReplicaError, Transient

#: A file up to this size is one PUT. S3 wants at least 5 MiB a part, and takes 10,000.
PART_BYTES = 16 << 20
PARTS_MAX = 9_000
PARALLEL = 4
#: What one request may copy, by S3's own limit; and in which parts more is copied.
COPY_BYTES_MAX = 5 << 30
COPY_PART_BYTES = 1 << 30
#: How often a part is sent, and how long is waited between.
_TRIES = 4
_WAIT_SECONDS = 0.2
_WAIT_MAX_SECONDS = 20.0


class Parts:
    """Collects pieces into parts. With `checked`, keeps the CRC32C of each and of all."""

    def __init__(self, pieces: AsyncIterator[Piece], size_bytes: int | None, *, checked: bool) -> None:
        self._pieces = pieces
        self._left: memoryview = memoryview(b"")
        self._whole = PART_BYTES if size_bytes is None else max(PART_BYTES, -(-size_bytes // PARTS_MAX))
        self._unknown = size_bytes is None
        self._count = 0
        self._crc = _crc32c() if checked else None
        self.crc_of_all = 0
        self.size_bytes = 0

    async def next(self) -> bytearray:
        """The next part; shorter than the others, or empty, at the end. It is the caller's."""
        # Of unknown length: parts grow, so that 10,000 of them hold more than S3 takes for one object.
        bytes_ = self._whole << (self._count // 1000 if self._unknown else 0)
        self._count += 1
        part = bytearray()
        part += self._left[:bytes_]
        self._left = memoryview(bytes(self._left[bytes_:]))
        while len(part) < bytes_:
            try:
                piece = memoryview(await anext(self._pieces))
            except StopAsyncIteration:
                break
            room = bytes_ - len(part)
            part += piece[:room]
            if len(piece) > room:
                self._left = memoryview(bytes(piece[room:]))  # its buffer is used again by whoever gave it
        if self._crc is not None:
            self.crc_of_all = self._crc(part, self.crc_of_all)
        self.size_bytes += len(part)
        self.full = len(part) == bytes_
        return part

    full = False

    def crc(self, part: bytearray) -> str:
        return "" if self._crc is None else in_base64(self._crc(part, 0))


class Upload:
    """All parts are at the server, and nothing is visible."""

    def __init__(self, wire: Wire, key: str, path: str, name: str, parts: list[tuple[str, str]], crc: str) -> None:
        self._wire, self._key, self._path, self._name = wire, key, path, name
        self._parts = parts
        #: CRC32C of all of them, where the server compares it.
        self.crc = crc

    async def complete(self, condition: dict[str, str], crc: str = "") -> int:
        """Make it visible under a condition; the status, 412 included. After anything but 200 it is as it was."""
        whole = {"x-amz-checksum-crc32c": crc or self.crc, "x-amz-checksum-type": "FULL_OBJECT"} if self.crc else {}
        headers = {**condition, **whole}
        return await complete(
            self._wire, self._key, self._path, self._name, self._parts, headers=headers, returned=(409, 412)
        )

    async def abort(self) -> None:
        with suppress(ReplicaError):  # what stays is collected by age
            await abort(self._wire, self._key, self._path, self._name)

    async def finish(self, condition: dict[str, str]) -> int:
        """Complete, or abort. After a lost answer it may be complete all the same, and aborting it does nothing."""
        done = 0
        try:
            done = await self.complete(condition)
        finally:
            if done != 200:
                await self.abort()
        return done


async def upload(
    wire: Wire, key: str, path: str, parts: Parts, first: bytearray, *, headers: dict[str, str], whole_checksum: bool
) -> Upload:
    """Send all parts."""
    if whole_checksum:
        headers = {**headers, "x-amz-checksum-algorithm": "CRC32C", "x-amz-checksum-type": "FULL_OBJECT"}
    name = await begin(wire, key, path, headers)
    sent: dict[int, tuple[str, str]] = {}
    running: set[asyncio.Task[None]] = set()
    begun: list[asyncio.Task[None]] = []

    async def send(number: int, part: bytearray) -> None:
        crc = parts.crc(part) if whole_checksum else ""
        query = [("partNumber", str(number)), ("uploadId", name)]
        with_crc = {"x-amz-checksum-crc32c": crc} if crc else {}

        async def once() -> str:
            answer = await wire.call("PUT", key, path=path, query=query, headers=with_crc, body=part)
            etag = answer.headers.get("ETag", "")
            if not etag:
                raise Transient("the server took a part without saying which", endpoint=wire.name, path=path)
            return etag

        sent[number] = (await again(once), crc)

    try:
        number, part = 1, first
        while part:
            if len(running) >= PARALLEL:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            begun.append(asyncio.create_task(send(number, part)))
            running.add(begun[-1])
            number += 1
            part = await parts.next() if parts.full else bytearray()
        for sending in asyncio.as_completed(running):
            await sending
    except BaseException:
        await _end(begun)
        with suppress(ReplicaError):  # what stays is collected by age
            await abort(wire, key, path, name)
        raise
    crc = in_base64(parts.crc_of_all) if whole_checksum else ""
    return Upload(wire, key, path, name, [sent[number] for number in sorted(sent)], crc)


async def copy_in_parts(
    wire: Wire,
    source: str,
    key: str,
    path: str,
    *,
    size_bytes: int,
    etag: str,
    headers: dict[str, str],
    condition: dict[str, str],
) -> int:
    """Copy an object of the same server without its bytes passing through here. `source` is bucket/key. Returns the
    status of the completion, 412 included; Permanent if the server copies no parts."""
    name = await begin(wire, key, path, headers)
    try:
        ends = range(0, size_bytes, COPY_PART_BYTES)
        limit = asyncio.Semaphore(PARALLEL)

        async def one(number: int, at: int) -> tuple[str, str]:
            last = min(at + COPY_PART_BYTES, size_bytes) - 1
            asked = {"x-amz-copy-source": quoted(source), "x-amz-copy-source-if-match": etag}
            if size_bytes > COPY_PART_BYTES:
                asked["x-amz-copy-source-range"] = f"bytes={at}-{last}"
            query = [("partNumber", str(number)), ("uploadId", name)]

            async def once() -> str:
                patience = wire.patience(last + 1 - at)
                answer = await wire.call("PUT", key, path=path, query=query, headers=asked, quiet_seconds=patience)
                found = text_of(answer.document(), "ETag") if answer.body else ""
                if not found:
                    raise Permanent("the server does not copy parts", endpoint=wire.name, path=path)
                return found

            async with limit:
                return await again(once), ""

        parts = [*await asyncio.gather(*(one(number, at) for number, at in enumerate(ends, 1)))]
    except BaseException:
        with suppress(ReplicaError):
            await abort(wire, key, path, name)
        raise
    return await Upload(wire, key, path, name, parts, "").finish(condition)


async def again(once: Callable[[], Awaitable[str]]) -> str:
    """Try a request that may be repeated, a few times."""
    for attempt in range(_TRIES):
        try:
            return await once()
        except Transient as error:
            if attempt == _TRIES - 1:
                raise
            asked = error.retry_after_seconds if isinstance(error, Busy) else None
            await asyncio.sleep(min(_WAIT_SECONDS * 4**attempt if asked is None else asked, _WAIT_MAX_SECONDS))
    raise AssertionError


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def in_base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(4)).decode()


def _crc32c() -> Callable[[bytearray, int], int]:
    from crc32c import crc32c

    return crc32c


# ── single requests ──────────────────────────────────────────────────────────────────────────────────────────────────


async def begin(wire: Wire, key: str, path: str, headers: dict[str, str]) -> str:
    answer = await wire.call("POST", key, path=path, query=[("uploads", "")], headers=headers)
    upload = text_of(answer.document(), "UploadId")
    if not upload:
        raise Permanent("the server began a multipart upload without a name", endpoint=wire.name, path=path)
    return upload


async def complete(
    wire: Wire,
    key: str,
    path: str,
    upload: str,
    parts: list[tuple[str, str]],
    *,
    headers: dict[str, str] | None = None,
    returned: tuple[int, ...] = (),
) -> int:
    """`parts`: ETag and CRC32C (or nothing) of each, in order. Returns the status."""
    listed = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{etag.replace('&', '&amp;').replace('<', '&lt;')}</ETag>"
        + (f"<ChecksumCRC32C>{crc}</ChecksumCRC32C>" if crc else "")
        + "</Part>"
        for number, (etag, crc) in enumerate(parts, 1)
    )
    answer = await wire.call(
        "POST",
        key,
        path=path,
        query=[("uploadId", upload)],
        headers={"Content-Type": "application/xml", **(headers or {})},
        body=(
            '<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"{listed}</CompleteMultipartUpload>"
        ).encode(),
        returned=returned,
        quiet_seconds=wire.patience(),
    )
    return answer.status


async def abort(wire: Wire, key: str, path: str, upload: str) -> None:
    """Idempotent: an upload that is finished or gone is success."""
    await wire.call("DELETE", key, path=path, query=[("uploadId", upload)], returned=(404,))
