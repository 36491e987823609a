"""A file given its name by the act that proves it: one conditional PUT, or one conditional completion of its parts.

Given     an S3 server that was seen to keep `If-None-Match: *`, and to refuse bytes whose digest is not the one sent
          along, leaving nothing of them (replica.storage.s3_abilities).
Returns   replica.storage.base.Unseen.
Promises  nothing has the name before the server has compared the digest, and nothing that has it is replaced: S3 makes
          an object visible in one act, whole. The digest sent is that of the bytes as they came from the source, not
          of the bytes as they lie in our memory now. An answer that was lost leaves the whole file there, or nothing.
Partner   replica.storage.s3.send; without these abilities files go by a temporary (s3_publish).

A server's word that it compared the digest is in its status alone. What it repeats to us in headers, an ETag among
them, proves nothing and is not looked at. Of an object made of parts the size is looked at once more.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping

from replica.storage.faults import place
from replica.storage.refusals import exists_already
from replica.storage.s3_multipart import Upload
from replica.storage.s3_publish import MARK, Look
from replica.storage.s3_wire import Wire
from rules.checksums import Checksums
from rules.errors import Broken, Busy, ChecksumDiffers

NEW = {"If-None-Match": "*"}
#: Algorithm → the header that carries its value, in base64.
HEADERS = {"crc32c": "x-amz-checksum-crc32c", "md5": "Content-MD5"}


def digest_headers(algorithm: str, value: bytes) -> dict[str, str]:
    """What has the server compare a body with a digest."""
    told = {HEADERS[algorithm]: base64.b64encode(value).decode()}
    return {**told, "x-amz-sdk-checksum-algorithm": "CRC32C"} if algorithm == "crc32c" else told


class _Direct:
    def __init__(self, wire: Wire, key: str, path: str, look: Look, mark: str, algorithm: str) -> None:
        self._wire, self._key, self._path = wire, key, path
        self._look, self._mark, self._algorithm = look, mark, algorithm

    def _value(self, checksums: Checksums) -> bytes:
        known = checksums.get(self._algorithm)
        if not known:
            raise Broken(f"no {self._algorithm} was computed of {place(self._wire.name, self._path)}")
        return bytes.fromhex(known)

    async def _settle(self, status: int) -> None:
        if status == 409:  # two at the very same moment: the server wants one of them to come again
            raise Busy(f"{place(self._wire.name, self._path)}: somebody else writes there now", path=self._path)
        if status == 412:
            there = await self._look(self._key)
            # Ours: the connection broke after the request, and it was sent again.
            if there is None or there.mark != self._mark:
                raise exists_already(self._wire.name, self._path)


class Small(_Direct):
    """The whole body is here."""

    def __init__(
        self, wire: Wire, key: str, path: str, look: Look, *, body: bytearray, mark: str, algorithm: str
    ) -> None:
        super().__init__(wire, key, path, look, mark, algorithm)
        self._body = body

    async def publish(self, checksums: Checksums) -> str:
        headers: Mapping[str, str] = {
            MARK: self._mark,
            **NEW,
            **digest_headers(self._algorithm, self._value(checksums)),
        }
        answer = await self._wire.call(
            "PUT", self._key, path=self._path, headers=headers, body=self._body, returned=(409, 412)
        )
        await self._settle(answer.status)
        return self._algorithm

    async def drop(self) -> None:
        self._body = bytearray()


class Large(_Direct):
    """All parts are at the server."""

    def __init__(
        self, wire: Wire, key: str, path: str, look: Look, *, upload: Upload, size_bytes: int, mark: str, algorithm: str
    ) -> None:
        super().__init__(wire, key, path, look, mark, algorithm)
        self._upload: Upload | None = upload
        self._size_bytes = size_bytes

    async def publish(self, checksums: Checksums) -> str:
        assert self._upload is not None, "it was dropped"
        value = base64.b64encode(self._value(checksums)).decode()
        status = await self._upload.complete(NEW, value)
        await self._settle(status)
        if status == 200:
            self._upload = None
        there = await self._look(self._key)
        if there is None or there.size_bytes != self._size_bytes:
            raise ChecksumDiffers(
                f"{place(self._wire.name, self._path)}: the server joined the parts, and what is there has "
                f"{'nothing' if there is None else there.size_bytes} bytes of {self._size_bytes}",
                hint="it is put aside when the file is copied again; tell the operator of the storage",
                endpoint=self._wire.name,
                path=self._path,
                side="target",
            )
        return self._algorithm

    async def drop(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            await upload.abort()
