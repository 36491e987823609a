"""What an S3 server really does, as opposed to what it says: asked once by each process, with objects of our own.

Given     the bucket, and Replica's own folder in it with the endpoint's sentinel.
Returns   Abilities.
Promises  a condition or a checksum is relied upon only after the server was seen to refuse what violates it. Servers
          that do not know a header ignore it and answer 200: rclone's ignores all conditions and CRC32C, moto's the
          condition of a copy and every checksum (it repeats ours to us, which proves nothing). rclone's compares an
          MD5, but at times it has an empty file after that: it is no object store, and is read back all the same.
          And a digest counts only where nothing is left of what was refused: else wrong bytes could get a name by
          being refused. Nothing is written but temporaries, which go again.
Partner   replica.storage.s3 chooses its way of publishing by these.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from dataclasses import dataclass

from replica.storage.base import SENTINEL, part_path
from replica.storage.s3_multipart import abort, begin, complete
from replica.storage.s3_wire import Wire, quoted, text_of
from rules.errors import Permanent, ReplicaError, StorageError

#: The base64 of a CRC32C that is not that of the probe's body.
_WRONG = "AAAAAA=="
_CRC32C_OF_PROBE = "VUeiOA=="
_WRONG_MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="
_MD5_OF_PROBE = "jahD/2UgWmE3Swm4HtD6NQ=="
_BODY = b"probe"
_CRC = "x-amz-checksum-crc32c"
_NEW = {"If-None-Match": "*"}


@dataclass(frozen=True, slots=True)
class Abilities:
    put_new: bool  #: PUT with If-None-Match: * does not replace
    copy_new: bool  #: nor does a copy
    complete_new: bool  #: nor does the completion of a multipart upload
    checksums: bool  #: a wrong CRC32C is refused
    whole_checksums: bool  #: and that of a multipart upload is one of the whole object
    md5: bool  #: a wrong MD5 is refused; asked only where CRC32C is not, and conditions are kept

    def digest(self, size_bytes: int | None, part_bytes: int) -> str:
        """By which the server compares a whole file of that size with what it receives; empty: by none."""
        if self.whole_checksums or (self.checksums and size_bytes is not None and size_bytes < part_bytes):
            return "crc32c"
        return "md5" if self.md5 and size_bytes is not None and size_bytes < part_bytes else ""

    def direct(self, size_bytes: int, part_bytes: int) -> str:
        """The digest by which a file of that size may be given its name in one act; empty: it may not."""
        new = self.put_new if size_bytes < part_bytes else self.complete_new
        return self.digest(size_bytes, part_bytes) if new else ""


async def ask(wire: Wire, base: str) -> Abilities:
    """One question after the other, on an object of our own: rclone's server answers 500 to two who write one key."""
    path = part_path(f"probe.{secrets.token_hex(8)}")
    key = base + path
    try:
        put_new = await _put_new(wire, key, path)
        copy_new = await _copy_new(wire, base + SENTINEL, key, path)
        complete_new = await _complete_new(wire, key, path)
        checksums = await _refuses(wire, base, _CRC, _WRONG, _CRC32C_OF_PROBE)
        whole = checksums and await _whole_checksums(wire, base)
        md5 = put_new and not checksums and await _refuses(wire, base, "Content-MD5", _WRONG_MD5, _MD5_OF_PROBE)
    finally:
        with suppress(ReplicaError):  # what stays is collected by age, as temporaries are
            await wire.call("DELETE", key, path=path, returned=(404,))
    return Abilities(put_new, copy_new, complete_new, checksums, whole, md5)


async def _put_new(wire: Wire, key: str, path: str) -> bool:
    for _ in range(2):  # the first may make it, the second must be refused
        answer = await wire.call("PUT", key, path=path, headers=_NEW, body=_BODY, returned=(400, 409, 412, 501))
    if answer.status == 412:
        return True
    await wire.call("PUT", key, path=path, body=_BODY)  # it must be there for the other questions
    return False


async def _copy_new(wire: Wire, sentinel: str, key: str, path: str) -> bool:
    headers = {**_NEW, "x-amz-copy-source": quoted(f"{wire.server.bucket}/{sentinel}")}
    answer = await wire.call("PUT", key, path=path, headers=headers, returned=(400, 409, 412, 501))
    return answer.status == 412


async def _complete_new(wire: Wire, key: str, path: str) -> bool:
    """And whether parts can be copied, without which the condition is of no use to us."""
    try:
        upload = await begin(wire, key, path, {})
    except Permanent:
        return False  # no multipart uploads here
    try:
        headers = {"x-amz-copy-source": quoted(f"{wire.server.bucket}/{key}")}
        query = [("partNumber", "1"), ("uploadId", upload)]
        part = await wire.call("PUT", key, path=path, query=query, headers=headers, returned=(400, 404, 501))
        etag = text_of(part.document(), "ETag") if part.status == 200 and part.body else ""
        if not etag:
            return False
        done = await complete(wire, key, path, upload, [(etag, "")], headers=_NEW, returned=(400, 409, 412, 501))
        return done == 412
    except StorageError as error:
        if isinstance(error, Permanent):
            return False
        raise
    finally:
        await abort(wire, key, path, upload)


async def _refuses(wire: Wire, base: str, header: str, wrong: str, right: str) -> bool:
    """A body is refused whose digest is not that of the header, and nothing stays of it; and the right one is taken: a
    server that refuses both knows nothing of digests."""
    path = part_path(f"probe.{secrets.token_hex(8)}")
    key = base + path
    more = {"x-amz-sdk-checksum-algorithm": "CRC32C"} if header == _CRC else {}

    async def put(value: str) -> int:
        headers = {header: value, **more}
        answer = await wire.call("PUT", key, path=path, headers=headers, body=_BODY, returned=(400, 412, 422, 501))
        return answer.status

    try:
        if await put(wrong) not in (400, 412, 422):
            return False
        left = await wire.call("HEAD", key, path=path, returned=(404,))
        return left.status == 404 and await put(right) == 200
    finally:
        with suppress(ReplicaError):
            await wire.call("DELETE", key, path=path, returned=(404,))


async def _whole_checksums(wire: Wire, base: str) -> bool:
    """Parts are not joined whose digest of the whole is not the one sent, and nothing has the name then."""
    path = part_path(f"probe.{secrets.token_hex(8)}")
    key = base + path
    headers = {"x-amz-checksum-algorithm": "CRC32C", "x-amz-checksum-type": "FULL_OBJECT"}
    try:
        upload = await begin(wire, key, path, headers)
    except Permanent:
        return False
    try:
        query = [("partNumber", "1"), ("uploadId", upload)]
        sent = {"x-amz-checksum-crc32c": _CRC32C_OF_PROBE}
        part = await wire.call("PUT", key, path=path, query=query, headers=sent, body=_BODY, returned=(400, 501))
        if part.status != 200:
            return False
        parts = [(part.headers.get("ETag", ""), _CRC32C_OF_PROBE)]
        wrong = {"x-amz-checksum-crc32c": _WRONG, "x-amz-checksum-type": "FULL_OBJECT"}
        if await complete(wire, key, path, upload, parts, headers=wrong, returned=(400, 412, 422, 501)) == 200:
            return False
        left = await wire.call("HEAD", key, path=path, returned=(404,))
        return left.status == 404
    finally:
        await abort(wire, key, path, upload)
        with suppress(ReplicaError):
            await wire.call("DELETE", key, path=path, returned=(404,))
