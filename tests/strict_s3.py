"""A small S3 server that keeps what Amazon documents and moto and rclone do not: conditions, digests, whole checksums.

Given     a port. Everything is in its memory; signatures are not looked at.
Returns   an HTTP server on 127.0.0.1, until it is killed.
Promises  an object is visible in one act, whole; `If-None-Match: *` holds for PUT, copies and completions alike, and
          `If-Match` for removals; a body whose Content-MD5, CRC32C or length differs is refused, and so is a multipart
          upload whose CRC32C of the whole object differs: it computes them all itself.
Partner   tests/servers_s3.py starts it; the conformance suite and tests/benchmarks/bench_s3.py use it.

    python tests/strict_s3.py 8333
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import sys
from email.utils import formatdate
from typing import Any
from urllib.parse import quote, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from aiohttp import web
from crc32c import crc32c

_CRC = "x-amz-checksum-crc32c"
_numbers = itertools.count(1)


class Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class Object:
    def __init__(self, body: bytes, etag: str, crc: str, meta: dict[str, str]) -> None:
        self.body, self.etag, self.crc, self.meta = body, f'"{etag}"', crc, meta
        self.modified = formatdate(usegmt=True)

    def headers(self) -> dict[str, str]:
        return {"ETag": self.etag, "Last-Modified": self.modified, "Accept-Ranges": "bytes", **self.meta}


class Upload:
    def __init__(self, key: str, meta: dict[str, str]) -> None:
        self.key, self.meta, self.parts = key, meta, dict[int, tuple[bytes, str, str]]()
        self.began = _iso()


Bucket = dict[str, Object]


class Strict:
    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, dict[str, Upload]] = {}
        self.requests = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        bucket, _, key = unquote(request.raw_path.partition("?")[0])[1:].partition("/")
        if not bucket:
            return web.json_response({"requests": self.requests})
        try:
            body = await _body(request)
            return self._bucket(request, bucket, body) if not key else self._object(request, bucket, key, body)
        except Refused as refusal:
            return _xml(f"<Error><Code>{refusal.code}</Code></Error>", status=refusal.status)

    # ── buckets ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _of(self, bucket: str) -> Bucket:
        if bucket not in self.buckets:
            raise Refused(404, "NoSuchBucket")
        return self.buckets[bucket]

    def _bucket(self, request: web.Request, bucket: str, body: bytes) -> web.Response:
        query = request.query
        if request.method == "PUT":
            self.buckets.setdefault(bucket, {})
            self.uploads.setdefault(bucket, {})
            return web.Response()
        objects = self._of(bucket)
        if request.method == "DELETE":
            if objects:
                raise Refused(409, "BucketNotEmpty")
            del self.buckets[bucket]
            return web.Response(status=204)
        if request.method == "POST" and "delete" in query:
            for line in ElementTree.fromstring(body).iterfind("{*}Object/{*}Key"):
                objects.pop(line.text or "", None)
            return _xml("<DeleteResult/>")
        if request.method == "HEAD":
            return web.Response()
        if "uploads" in query:
            return self._list_uploads(bucket, query.get("prefix", ""))
        if "location" in query:
            return _xml("<LocationConstraint/>")
        return _listing(objects, query)

    def _list_uploads(self, bucket: str, prefix: str) -> web.Response:
        lines = (
            f"<Upload><Key>{escape(quote(u.key))}</Key><UploadId>{n}</UploadId><Initiated>{u.began}</Initiated></Upload>"
            for n, u in self.uploads[bucket].items()
            if u.key.startswith(prefix)
        )
        return _xml(f"<ListMultipartUploadsResult>{''.join(lines)}</ListMultipartUploadsResult>")

    # ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _object(self, request: web.Request, bucket: str, key: str, body: bytes) -> web.Response:
        objects, query, headers = self._of(bucket), request.query, request.headers
        if request.method in ("GET", "HEAD"):
            return _answer(request, objects.get(key))
        if request.method == "POST" and "uploads" in query:
            name = f"upload{next(_numbers)}"
            self.uploads[bucket][name] = Upload(key, _meta(headers))
            return _xml(f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>")
        if "uploadId" in query:
            return self._upload(request, bucket, key, body)
        if request.method == "DELETE":
            there = objects.get(key)
            if "If-Match" in headers and (there is None or there.etag != headers["If-Match"]):
                raise Refused(404 if there is None else 412, "NoSuchKey" if there is None else "PreconditionFailed")
            objects.pop(key, None)
            return web.Response(status=204)
        if request.method != "PUT":
            raise Refused(405, "MethodNotAllowed")
        copied = self._copied(headers)
        meta = _meta(headers)
        if copied is not None:
            body = copied.body
            meta = meta if headers.get("x-amz-metadata-directive") == "REPLACE" else copied.meta
        etag, crc = _compared(headers, body)
        _new(headers, objects, key)
        made = objects[key] = Object(body, etag, crc, meta)
        if copied is not None:
            return _xml(f"<CopyObjectResult><ETag>{escape(made.etag)}</ETag></CopyObjectResult>")
        return web.Response(headers={"ETag": made.etag})

    def _copied(self, headers: Any) -> Object | None:
        if "x-amz-copy-source" not in headers:
            return None
        bucket, _, key = unquote(headers["x-amz-copy-source"]).removeprefix("/").partition("/")
        found = self._of(bucket).get(key)
        if found is None:
            raise Refused(404, "NoSuchKey")
        if headers.get("x-amz-copy-source-if-match", found.etag) != found.etag:
            raise Refused(412, "PreconditionFailed")
        return found

    def _upload(self, request: web.Request, bucket: str, key: str, body: bytes) -> web.Response:
        name, headers = request.query["uploadId"], request.headers
        upload = self.uploads[bucket].get(name)
        if upload is None:
            raise Refused(404, "NoSuchUpload")
        if request.method == "DELETE":
            del self.uploads[bucket][name]
            return web.Response(status=204)
        if request.method == "PUT":
            copied = self._copied(headers)
            if copied is not None:
                span = headers.get("x-amz-copy-source-range", "").removeprefix("bytes=")
                first, _, last = span.partition("-")
                body = copied.body[int(first) : int(last) + 1] if span else copied.body
            etag, crc = _compared(headers, body)
            upload.parts[int(request.query["partNumber"])] = (body, etag, crc)
            if copied is not None:
                return _xml(f'<CopyPartResult><ETag>"{etag}"</ETag></CopyPartResult>')
            return web.Response(headers={"ETag": f'"{etag}"'})
        told = [
            (int(p.findtext("{*}PartNumber") or 0), (p.findtext("{*}ETag") or "").strip('"'))
            for p in ElementTree.fromstring(body).iterfind("{*}Part")
        ]
        parts = [upload.parts.get(number, (b"", "", "")) for number, _ in told]
        if not told or any(part[1] != etag for part, (_, etag) in zip(parts, told, strict=True)):
            raise Refused(400, "InvalidPart")
        whole = b"".join(part[0] for part in parts)
        crc = _base64(crc32c(whole).to_bytes(4))
        if headers.get(_CRC, crc) != crc:
            raise Refused(400, "BadDigest")
        _new(headers, self.buckets[bucket], key)
        etag = hashlib.md5(b"".join(bytes.fromhex(part[1]) for part in parts)).hexdigest() + f"-{len(parts)}"
        self.buckets[bucket][key] = Object(whole, etag, crc, upload.meta)
        del self.uploads[bucket][name]
        return _xml(f'<CompleteMultipartUploadResult><ETag>"{etag}"</ETag></CompleteMultipartUploadResult>')


def _new(headers: Any, objects: Bucket, key: str) -> None:
    if headers.get("If-None-Match") == "*" and key in objects:
        raise Refused(412, "PreconditionFailed")


def _compared(headers: Any, body: bytes) -> tuple[str, str]:
    """ETag and CRC32C; BadDigest where the sender told another one."""
    md5, crc = hashlib.md5(body).digest(), _base64(crc32c(body).to_bytes(4))
    if headers.get("Content-MD5", _base64(md5)) != _base64(md5) or headers.get(_CRC, crc) != crc:
        raise Refused(400, "BadDigest")
    return md5.hex(), crc


def _meta(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower().startswith("x-amz-meta-")}


def _answer(request: web.Request, found: Object | None) -> web.Response:
    if found is None:
        raise Refused(404, "NoSuchKey")
    headers, body, status = found.headers(), memoryview(found.body), 200
    if request.headers.get("x-amz-checksum-mode") == "ENABLED":
        headers |= {_CRC: found.crc, "x-amz-checksum-type": "FULL_OBJECT"}
    span = request.headers.get("Range", "")
    if span.startswith("bytes="):
        first, _, last = span.removeprefix("bytes=").partition("-")
        begin, end = int(first), min(int(last) + 1 if last else len(body), len(body))
        if begin >= len(body):
            raise Refused(416, "InvalidRange")
        headers["Content-Range"], status = f"bytes {begin}-{end - 1}/{len(body)}", 206
        body = body[begin:end]
    if request.method == "HEAD":
        return web.Response(headers={**headers, "Content-Length": str(len(body))})
    return web.Response(status=status, headers=headers, body=body)


def _listing(objects: Bucket, query: Any) -> web.Response:
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after, most = query.get("continuation-token", "") or query.get("start-after", ""), int(query.get("max-keys", 1000))
    lines, folders, last, cut = list[str](), set[str](), "", False
    for key in sorted(k for k in objects if k.startswith(prefix) and k > after):
        if len(lines) == most:
            cut = True
            break
        last = key
        head, sign, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if sign:
            folders.add(prefix + head + sign)
            continue
        found = objects[key]
        lines.append(
            f"<Contents><Key>{escape(quote(key))}</Key><Size>{len(found.body)}</Size><ETag>{escape(found.etag)}</ETag>"
            f"<LastModified>{_iso()}</LastModified></Contents>"
        )
    lines += [f"<CommonPrefixes><Prefix>{escape(quote(f))}</Prefix></CommonPrefixes>" for f in sorted(folders)]
    more = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if cut else ""
    return _xml(
        f"<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>{str(cut).lower()}</IsTruncated>{more}"
        f"{''.join(lines)}</ListBucketResult>"
    )


async def _body(request: web.Request) -> bytes:
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    content = b"".join([piece async for piece in request.content.iter_any()])
    if len(content) != (request.content_length or 0):
        raise Refused(400, "IncompleteBody")
    if "aws-chunked" not in request.headers.get("Content-Encoding", ""):
        return content
    whole, rest = bytearray(), memoryview(content)
    while True:
        line, _, _ = bytes(rest[:200]).partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not size:
            return bytes(whole)
        begin = len(line) + 2
        whole += rest[begin : begin + size]
        rest = rest[begin + size + 2 :]


def _xml(document: str, status: int = 200) -> web.Response:
    return web.Response(status=status, text=f'<?xml version="1.0"?>{document}', content_type="application/xml")


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _iso() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


async def main(port: int) -> None:
    runner = web.ServerRunner(web.Server(Strict().handle, access_log=None, read_bufsize=1 << 20))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
