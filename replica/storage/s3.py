"""Objects of an S3 server: `s3://bucket/prefix`, `s3+https://host/bucket/prefix`.

Given     a bucket that is there, a prefix in it that is this endpoint's alone, and a key that may read, write and
          delete beneath it (and list the bucket and its unfinished uploads).
Returns   the storage contract.
Promises  those of the contract, and in particular:

          send        where the server was seen to keep conditions and to compare digests, a file gets its name by the
                      one request that proves it: a conditional PUT below 16 MiB, a conditional completion of parts
                      above (replica.storage.s3_direct). Elsewhere it goes by `write` and `publish`.
          publish     is a copy by the server, then a removal of the temporary: S3 has no rename. It never replaces.
                      Three ways, the best that this server was seen to honour; replica.storage.s3_publish says
                      exactly what each promises, replica.storage.s3_abilities how it is found out.
          checksum    of a temporary: the CRC32C, or else MD5, that the server compared with the bytes as they came in,
                      where it was seen to refuse a wrong one and to keep nothing of it. Of a published file nothing:
                      what S3 keeps there is a record of that day, not of the bytes as they lie now. An ETag is never
                      taken for a checksum, nor is a header in which the server repeats what it was told.
          write       one PUT below 16 MiB, else parts, four at once, each sent again by itself. Nothing is visible
                      before all is there; the unfinished upload of a failed write is aborted.
          ours        nothing is removed, moved away, listed or called missing before the sentinel was looked at and
                      names this endpoint or none; reading and writing believe a look of the last second (s3_home).
          names       keys of at most 1024 bytes with prefix and room for the quarantine's, without control characters
                      (S3 advises against them, and servers lose them): others are Invalid before anything is sent.
          versions    a bucket may keep versions: a delete marker is "nothing there", what is deleted can be had back
                      by the bucket's owner.
          clocks      ages are told by the server's clock.
          quarantine  a copy by the server, looked at, then a removal on the condition that the ETag is still that of
                      the copied object. Servers that ignore this condition leave a window of one request.
Partner   replica.storage.s3_wire (requests), s3_multipart (parts), s3_direct and s3_publish (names), s3_url (URLs).

Settings in the credentials file: access_key_id, secret_access_key or secret_access_key_file, session_token or
session_token_file, region ("us-east-1"), endpoint (for s3://), addressing ("path"; "virtual" for Amazon), insecure.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Generic, TypeVar
from urllib.parse import unquote_plus

from replica.storage import s3_abilities, s3_multipart
from replica.storage.base import (
    OWN,
    PARTS,
    QUARANTINE,
    SENTINEL,
    Entry,
    Piece,
    Space,
    Stat,
    Storage,
    Unseen,
    check_part,
    check_path,
    check_prefix,
    check_readable,
)
from replica.storage.credentials import Settings
from replica.storage.faults import place
from replica.storage.refusals import exists_already
from replica.storage.s3_abilities import Abilities
from replica.storage.s3_direct import Large, Small, digest_headers
from replica.storage.s3_flags import FLAG_SECONDS_MAX, FLAGS, Flags, Raised
from replica.storage.s3_home import Home
from replica.storage.s3_multipart import COPY_BYTES_MAX, Parts, abort, copy_in_parts, upload
from replica.storage.s3_publish import MARK, Publisher, Written
from replica.storage.s3_wire import Answer, Server, Wire, quoted, text_of, when
from replica.storage.sentinel import owner_in, refuse_anothers, sentinel_of
from rules.errors import (
    Invalid,
    Refused,
    SourceChanged,
    SourceMissing,
    StorageError,
    Transient,
)
from rules.names import shown

T = TypeVar("T")

KEY_BYTES_MAX = 1024
#: What the quarantine puts before a path.
_ROOM_BYTES = len(f"{QUARANTINE}/{'0' * 16}/")
PAGE_KEYS = 1000
#: S3's own limit for signed URLs: a week.
PRESIGNED_SECONDS_MAX = 7 * 24 * 3600
#: So many unpublished temporaries of this process are known by heart.
_REMEMBERED = 10_000
#: A body is hashed where we are up to this size: another thread would cost more.
_INLINE_BYTES = 256 << 10
_WITH_CHECKSUM = {"x-amz-checksum-mode": "ENABLED"}
_NEW = {"If-None-Match": "*"}


@dataclass(frozen=True, slots=True)
class _Sent:
    """A temporary as the server's answer to its PUT told it."""

    written: Written
    digest: str  #: by which the server compared it; empty: by none
    value: str


@dataclass(frozen=True, slots=True)
class _Found:
    """One line of a server's listing."""

    key: str
    size_bytes: int
    modified: datetime
    age_seconds: float  #: by the server's clock, which tells whole seconds: never too little by more than one


class _Shared(Generic[T]):
    """A question that many may ask at once: whoever comes while it is under way gets the same answer."""

    def __init__(self, ask: Callable[[], Coroutine[None, None, T]]) -> None:
        self._ask = ask
        self._task: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        task = self._task
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = self._task = asyncio.create_task(self._ask())
        return await asyncio.shield(task)


class S3Storage:
    def __init__(self, server: Server, prefix: str, settings: Settings, *, name: str = "", url: str = "") -> None:
        self.name = name
        self.url = url
        self.server = server
        self._base = f"{prefix}/" if prefix else ""
        self._wire = Wire(server, settings, name=name)
        self._publisher = Publisher(self._wire, self._look, Flags(self._wire, self._base, self._raised))
        self._able: Abilities | None = None
        #: Temporaries that were written here, until they have another name or are gone.
        self._sent: dict[str, _Sent] = {}
        self._asking = _Shared(self._ask_abilities)
        self._home = Home(self._wire, self._base, name=name, url=url)

    # ── is it there ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        await self._refuse_nesting()
        known = await self._home.sentinel()
        if known is None:
            # The condition matters where two prepare one prefix; servers that ignore it are asked again below.
            await self._wire.call(
                "PUT",
                self._key(SENTINEL),
                path=SENTINEL,
                headers=_NEW,
                body=sentinel_of(self.name),
                returned=(409, 412),
            )
            known = await self._home.sentinel() or ""
        refuse_anothers(owner_in(known), self.name, self.url, what="prefix")
        await self._abilities()

    async def _refuse_nesting(self) -> None:
        # Two endpoints in one prefix would count one copy twice, and each would take the other's files for strays.
        above = self._base.split("/")[:-1]
        for depth in range(len(above)):
            key = "/".join([*above[:depth], SENTINEL])
            if await self._look(key) is not None:
                raise Refused(
                    f"{self.url} lies within another endpoint of this bucket, at {'/'.join(above[:depth]) or '/'}",
                    hint="choose a prefix outside of it; endpoints cannot be nested",
                )

    async def _missing(self, path: str) -> SourceMissing:
        await self._home.now()
        return SourceMissing(f"{place(self.name, path)}: no such file", endpoint=self.name, path=path)

    async def _abilities(self) -> Abilities:
        if self._able is None:
            self._able = await self._asking()
        return self._able

    async def _ask_abilities(self) -> Abilities:
        await self._home.now()
        return await s3_abilities.ask(self._wire, self._base)

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stat(self, path: str) -> Stat:
        await self._home.lately()
        return self._stat_of(await self._head(path), path)

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        check_prefix(prefix)
        await self._home.now()
        whole = bool(prefix)
        async for found in self._keys(f"{prefix}/" if prefix else ""):
            path = found.key[len(self._base) :]
            if path.startswith(f"{OWN}/"):
                whole = whole or path == SENTINEL
                continue
            problem = self._problem(path)
            shown_path = path if not problem else path.encode("utf-8", "backslashreplace").decode()
            yield Entry(shown_path, found.size_bytes, _nanoseconds(found.modified), problem)
        if not whole:  # rclone's server lists nothing when a folder goes away meanwhile
            raise self._odd(
                SENTINEL, "it is there, and the server's listing leaves it out, so it left out other files too"
            )

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        key = self._readable(path)
        if length is not None and length <= 0:
            await self.stat(path)
            return
        await self._home.lately()
        ranged = offset > 0 or length is not None
        last = "" if length is None else str(offset + length - 1)
        headers = {"Range": f"bytes={offset}-{last}"} if ranged else {}
        try:
            async with self._wire.stream(key, path=path, headers=headers, returned=(416,)) as (answer, pieces):
                if answer.status == 416:  # begins beyond the end
                    return
                async for piece in self._cut(answer, pieces, path, offset, length):
                    yield piece
        except SourceMissing:
            raise await self._missing(path) from None

    async def _cut(
        self, answer: Answer, pieces: AsyncIterator[bytes], path: str, offset: int, length: int | None
    ) -> AsyncIterator[Piece]:
        """What was asked for, of what was sent: a server may ignore the range, or say 200 and send it all the same."""
        begin, end, whole = _range(answer)
        if begin > offset:
            raise self._odd(path, "the server sent another range than it was asked for")
        got = begin
        wanted = None if length is None else offset + length
        async for piece in pieces:
            at, got = got, got + len(piece)
            view = memoryview(piece)[max(0, offset - at) :]
            if wanted is not None and got > wanted:
                view = view[: max(0, len(view) - (got - wanted))]
            if len(view):
                yield view
            if wanted is not None and got >= wanted:
                return
        if end is not None and got != end:
            raise self._odd(path, f"the server sent {got - begin} bytes of {end - begin}")
        if wanted is not None and whole is not None and got < min(wanted, whole):
            raise self._odd(path, "the server sent less than it was asked for")

    async def checksum(self, path: str, algorithm: str) -> str | None:
        sent = self._sent.get(path)
        if sent is not None:  # the server took it with this digest, and would have refused it with another one
            return sent.value if sent.digest == algorithm else None
        answer = await self._head(path)
        if not path.startswith(PARTS + "/") or algorithm not in await self.digests():
            return None
        known = Written.of("", answer).crc32c
        try:
            return base64.b64decode(known, validate=True).hex() or None
        except binascii.Error:
            return None

    async def digests(self, size_bytes: int | None = None) -> tuple[str, ...]:
        """By which algorithm this server was seen to check what it is sent: for files of that size, or for all."""
        digest = (await self._abilities()).digest(size_bytes, s3_multipart.PART_BYTES)
        return (digest,) if digest else ()

    async def space(self) -> Space | None:
        await self._home.now()
        return None

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        key = self._key(check_part(temporary))
        await self._home.lately()
        able = await self._abilities()
        if not (able.put_new and able.complete_new) and await self._look(key) is not None:
            raise exists_already(self.name, temporary)
        headers = {MARK: secrets.token_hex(16)}
        parts = Parts(chunks, size_bytes, checked=able.checksums)
        first = await parts.next()
        digest, etag = "", ""
        if parts.full:
            whole = able.whole_checksums
            sent = await upload(self._wire, key, temporary, parts, first, headers=headers, whole_checksum=whole)
            status = await sent.finish(_NEW if able.complete_new else {})
        else:
            digest = able.digest(len(first), s3_multipart.PART_BYTES)
            value = await _digest_of(first, parts.crc_of_all, digest)
            answer = await self._wire.call(
                "PUT",
                key,
                path=temporary,
                headers={
                    **headers,
                    **(_NEW if able.put_new else {}),
                    **(digest_headers(digest, value) if digest else {}),
                },
                body=first,
                returned=(409, 412),
            )
            status, etag = answer.status, answer.headers.get("ETag", "")
            if status not in (409, 412) and etag:
                written = Written(f"{self.server.bucket}/{key}", len(first), etag, headers[MARK], "")
                self._remember(temporary, _Sent(written, digest, value.hex()))
        if status in (409, 412):
            there = await self._look(key)
            # Ours: the connection broke after the PUT, and the request was sent again.
            if there is None or there.mark != headers[MARK]:
                raise exists_already(self.name, temporary)

    def _remember(self, temporary: str, sent: _Sent) -> None:
        if len(self._sent) >= _REMEMBERED:
            self._sent.clear()  # each is asked for at the server then
        self._sent[temporary] = sent

    async def send(self, final: str, chunks: AsyncIterator[Piece], *, size_bytes: int) -> Unseen | None:
        """SupportsDirect."""
        key = self._published(final)
        await self._home.lately()
        able = await self._abilities()
        digest = able.direct(size_bytes, s3_multipart.PART_BYTES)
        if not digest:
            return None
        mark = secrets.token_hex(16)
        parts = Parts(chunks, size_bytes, checked=size_bytes >= s3_multipart.PART_BYTES)
        first = await parts.next()
        if size_bytes < s3_multipart.PART_BYTES:
            if parts.full:
                raise self._odd(final, "its source gave more than it has")
            return Small(self._wire, key, final, self._look, body=first, mark=mark, algorithm=digest)
        sent = await upload(self._wire, key, final, parts, first, headers={MARK: mark}, whole_checksum=True)
        return Large(
            self._wire,
            key,
            final,
            self._look,
            upload=sent,
            size_bytes=parts.size_bytes,
            mark=mark,
            algorithm=digest,
        )

    async def publish(self, temporary: str, final: str) -> None:
        key = self._key(check_part(temporary))
        target = self._published(final)
        await self._home.lately()
        able = await self._abilities()
        sent = self._sent.get(temporary)
        # What a PUT was answered is not asked for again: the copy is made of the object of that ETag, or not at all.
        written = sent.written if sent is not None else await self._look(key)
        if written is None:
            raise await self._missing(temporary)
        await self._publisher.publish(written, target, final, able)
        self._sent.pop(temporary, None)
        with suppress(StorageError):  # the name is given; what stays is collected by age
            await self._wire.call("DELETE", key, path=temporary)

    async def copy_from(self, source: Storage, path: str, temporary: str, *, expected: Stat) -> bool:
        """SupportsServerCopy, for two buckets or prefixes of one server that one key opens."""
        if not isinstance(source, S3Storage) or not self._same_server(source):
            return False
        key = self._key(check_part(temporary))
        await self._home.lately()
        await self._abilities()
        if await self._look(key) is not None:
            raise exists_already(self.name, temporary)
        answer = await source._head(path)
        if source._stat_of(answer, path) != expected:
            raise _changed(source.name, path)
        place = f"{source.server.bucket}/{source._readable(path)}"
        etag, headers = answer.headers.get("ETag", ""), {MARK: secrets.token_hex(16)}
        if expected.size_bytes > COPY_BYTES_MAX:
            await copy_in_parts(
                self._wire,
                place,
                key,
                temporary,
                size_bytes=expected.size_bytes,
                etag=etag,
                headers=headers,
                condition={},
            )
            return True
        headers |= {"x-amz-copy-source": quoted(place), "x-amz-copy-source-if-match": etag}
        headers["x-amz-metadata-directive"] = "REPLACE"
        patience = self._wire.patience(expected.size_bytes)
        copied = await self._wire.call(
            "PUT", key, path=temporary, headers=headers, returned=(412,), quiet_seconds=patience
        )
        if copied.status == 412:
            raise _changed(source.name, path)
        return True

    def _same_server(self, source: S3Storage) -> bool:
        return (
            (self.server.scheme, self.server.host, self.server.region)
            == (source.server.scheme, source.server.host, source.server.region)
            and self._wire.access_key() is not None
            and self._wire.access_key() == source._wire.access_key()
        )

    def presigned(self, path: str, seconds: int) -> str:
        """A URL by which whoever holds it may read this file, without a key, for so long. Never log it. No effect."""
        if not 1 <= seconds <= PRESIGNED_SECONDS_MAX:
            raise Invalid(f"a signed URL cannot be valid for {seconds} seconds", hint="from 1 second to 7 days")
        return self._wire.presigned(self._readable(path), seconds)

    # ── removing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def delete(self, path: str) -> None:
        key = self._readable(path)
        self._sent.pop(path, None)
        if not path.startswith(PARTS + "/"):
            await self._home.now()  # a file of this name may be another endpoint's
        try:
            await self._wire.call("DELETE", key, path=path)
        except SourceMissing:
            await self._home.now()

    async def quarantine(self, path: str) -> str:
        key = self._published(path)
        await self._home.now()
        found = await self._look(key)
        if found is None:
            raise await self._missing(path)
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{path}"
        await self._publisher.copy(found, self._key(away), path)
        copied, again = await self._look(self._key(away)), await self._look(key)
        if copied is None or copied.size_bytes != found.size_bytes:
            raise self._odd(path, "the server's copy in quarantine is not there, or not whole; nothing was removed")
        if again is None or again != found:
            raise _changed(self.name, path)
        removed = await self._wire.call(
            "DELETE", key, path=path, headers={"If-Match": found.etag}, returned=(404, 409, 412, 501)
        )
        if removed.status == 501:  # a server that knows the condition, and has it not
            await self._wire.call("DELETE", key, path=path)
        if removed.status in (409, 412):
            raise _changed(self.name, path)
        return away

    async def collect_parts(self, older_than_seconds: float) -> int:
        await self._home.now()
        removed = 0
        for folder, limit in ((PARTS, older_than_seconds), (FLAGS, max(older_than_seconds, FLAG_SECONDS_MAX))):
            async for found in self._keys(f"{folder}/"):
                if found.age_seconds >= limit:
                    await self._wire.call("DELETE", found.key, path=folder, returned=(404,))
                    removed += 1
        return removed + await self._abort_uploads(older_than_seconds)

    async def _abort_uploads(self, older_than_seconds: float) -> int:
        """Every unfinished upload beneath the prefix: those of temporaries, and those by which names were given."""
        removed = 0
        markers: list[tuple[str, str]] = []
        while True:
            query = [("uploads", ""), ("prefix", self._base), ("encoding-type", "url"), *markers]
            answer = await self._wire.call("GET", None, path=PARTS, query=query, returned=(403, 405, 501))
            if answer.status != 200:
                return removed  # not known here, or not permitted: the operator of the storage removes them by age
            page = answer.document()
            for line in page.iterfind("{*}Upload"):
                began, key = when(text_of(line, "Initiated")), unquote_plus(text_of(line, "Key"))
                if began is None or not key.startswith(self._base):
                    continue
                if (answer.date - began).total_seconds() + 1 >= older_than_seconds:
                    await abort(self._wire, key, PARTS, text_of(line, "UploadId"))
                    removed += 1
            following = [
                (name, unquote_plus(text_of(page, f"Next{tag}")))
                for name, tag in (("key-marker", "KeyMarker"), ("upload-id-marker", "UploadIdMarker"))
            ]
            if text_of(page, "IsTruncated") != "true" or following == markers:
                return removed
            markers = following

    async def close(self) -> None:
        await self._wire.close()

    # ── keys and answers ─────────────────────────────────────────────────────────────────────────────────────────────

    def _key(self, path: str) -> str:
        return self._base + path

    def _readable(self, path: str) -> str:
        return self._key(self._fit(check_readable(path)))

    def _published(self, path: str) -> str:
        return self._key(self._fit(check_path(path)))

    def _fit(self, path: str) -> str:
        if problem := self._unfit(path):
            raise Invalid(
                f"the path {shown(path)} {problem}, and {self.name or self.url} is an S3 storage",
                hint="keep this file at another kind of endpoint, or give it another name",
            )
        return path

    def _unfit(self, path: str) -> str:
        if any(c < " " or c == "\x7f" for c in path):
            return "holds a control character"
        room = KEY_BYTES_MAX - len(self._base.encode()) - _ROOM_BYTES
        size = len(path.encode())
        return f"has {size} bytes, more than {room}" if size > room else ""

    def _problem(self, path: str) -> str:
        """Why a key in the bucket can be no replica."""
        if path.endswith("/"):
            return "folder marker"
        try:
            check_path(path)
        except Invalid:
            return "not a path: an empty segment, '.', '..', or a name kept for Replica"
        return self._unfit(path)

    async def _head(self, path: str) -> Answer:
        try:
            return await self._wire.call("HEAD", self._readable(path), path=path, headers=_WITH_CHECKSUM)
        except SourceMissing:
            raise await self._missing(path) from None

    async def _look(self, key: str) -> Written | None:
        answer = await self._wire.call("HEAD", key, path=key, headers=_WITH_CHECKSUM, returned=(404,))
        return None if answer.status == 404 else Written.of(f"{self.server.bucket}/{key}", answer)

    def _stat_of(self, answer: Answer, path: str) -> Stat:
        headers = answer.headers
        size, modified = headers.get("Content-Length", ""), when(headers.get("Last-Modified", ""))
        if not size.isdecimal() or modified is None:
            raise self._odd(path, "the server does not tell its size and time")
        version = headers.get("x-amz-version-id", "")
        tag = " ".join((headers.get("ETag", ""), size, headers.get("Last-Modified", ""), version)).rstrip()
        return Stat(int(size), _nanoseconds(modified), tag)

    async def _raised(self, folder: str) -> Raised:
        return [(f.key, f.age_seconds) async for f in self._keys(folder)]

    async def _keys(self, beginning: str) -> AsyncIterator[_Found]:
        """Every key that begins so, page by page."""
        after = ""
        while True:
            query = [("list-type", "2"), ("prefix", self._key(beginning)), ("encoding-type", "url")]
            query.append(("max-keys", str(PAGE_KEYS)))
            if after:
                query.append(("continuation-token", after))
            answer = await self._wire.call("GET", None, path=beginning or "/", query=query)
            page = answer.document()
            if page.tag.rpartition("}")[2] != "ListBucketResult":
                raise self._odd(beginning, "the server answered a listing with something else")
            decoded = unquote_plus if text_of(page, "EncodingType") == "url" else str
            for line in page.iterfind("{*}Contents"):
                key, modified = decoded(text_of(line, "Key")), when(text_of(line, "LastModified"))
                size = text_of(line, "Size")
                if modified is None or not size.isdecimal() or not key.startswith(self._key(beginning)):
                    raise self._odd(beginning, "the server's listing has a line that cannot be read")
                age = (answer.date - modified).total_seconds() + 1
                yield _Found(key, int(size), modified, age)
            if text_of(page, "IsTruncated") != "true":
                return
            following = text_of(page, "NextContinuationToken")
            if not following or following == after:
                raise self._odd(beginning, "the server's listing is cut off and cannot be continued")
            after = following

    def _odd(self, path: str, reason: str) -> Transient:
        return Transient(f"{place(self.name, path)}: {reason}", endpoint=self.name, path=path)


def _range(answer: Answer) -> tuple[int, int | None, int | None]:
    """Where the body begins and ends in the object, and the object's size, as far as the server says."""
    told = answer.headers.get("Content-Range", "")
    length = answer.headers.get("Content-Length", "")
    if told.startswith("bytes ") and "-" in told:
        span, _, whole = told.removeprefix("bytes ").partition("/")
        first, _, last = span.partition("-")
        if first.isdecimal() and last.isdecimal():
            return int(first), int(last) + 1, int(whole) if whole.isdecimal() else None
    size = int(length) if length.isdecimal() else None
    return 0, size, size


def _changed(name: str, path: str) -> SourceChanged:
    return SourceChanged(
        f"{place(name, path)} changed meanwhile",
        hint="it was left where it is, and is looked at again",
        endpoint=name,
        path=path,
    )


async def _digest_of(body: bytearray, crc: int, algorithm: str) -> bytes:
    if algorithm != "md5":
        return crc.to_bytes(4)
    if len(body) <= _INLINE_BYTES:
        return hashlib.md5(body, usedforsecurity=False).digest()
    return (await asyncio.to_thread(partial(hashlib.md5, body, usedforsecurity=False))).digest()


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _nanoseconds(time: datetime) -> int:
    since = time - _EPOCH
    return (since.days * 86400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
