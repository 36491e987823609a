"""What an S3 server really does, as opposed to what it says: asked once by each process, with objects of our own.

Given     the bucket, and Replica's own folder in it with the endpoint's sentinel.
Returns   Abilities.
Promises  a condition or a checksum is relied upon only after the server was seen to refuse what violates it. Servers
          that do not know a header ignore it and answer 200: rclone's ignores all four, moto the condition of a copy
          and every checksum (it repeats ours to us, which proves nothing). Nothing is written but a temporary, which
          goes again.
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
_BODY = b"probe"
_NEW = {"If-None-Match": "*"}


@dataclass(frozen=True, slots=True)
class Abilities:
    put_new: bool  #: PUT with If-None-Match: * does not replace
    copy_new: bool  #: nor does a copy
    complete_new: bool  #: nor does the completion of a multipart upload
    checksums: bool  #: a wrong CRC32C is refused
    whole_checksums: bool  #: and that of a multipart upload is one of the whole object


async def ask(wire: Wire, base: str) -> Abilities:
    """One question after the other, on an object of our own: rclone's server answers 500 to two who write one key."""
    path = part_path(f"probe.{secrets.token_hex(8)}")
    key = base + path
    try:
        put_new = await _put_new(wire, key, path)
        copy_new = await _copy_new(wire, base + SENTINEL, key, path)
        complete_new = await _complete_new(wire, key, path)
        checksums = await _checksums(wire, key, path)
        whole = checksums and await _whole_checksums(wire, key, path)
    finally:
        with suppress(ReplicaError):  # what stays is collected by age, as temporaries are
            await wire.call("DELETE", key, path=path, returned=(404,))
    return Abilities(put_new, copy_new, complete_new, checksums, whole)


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


async def _checksums(wire: Wire, key: str, path: str) -> bool:
    headers = {"x-amz-checksum-crc32c": _WRONG, "x-amz-sdk-checksum-algorithm": "CRC32C"}
    wrong = await wire.call("PUT", key, path=path, headers=headers, body=_BODY, returned=(400, 412, 422, 501))
    if wrong.status not in (400, 412, 422):
        return False
    headers["x-amz-checksum-crc32c"] = _CRC32C_OF_PROBE
    right = await wire.call("PUT", key, path=path, headers=headers, body=_BODY, returned=(400, 412, 422, 501))
    return right.status == 200  # a server that refuses both knows nothing of checksums


async def _whole_checksums(wire: Wire, key: str, path: str) -> bool:
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
        return await complete(wire, key, path, upload, parts, headers=wrong, returned=(400, 412, 422, 501)) != 200
    finally:
        await abort(wire, key, path, upload)
