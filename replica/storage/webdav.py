"""The WebDAV backend: `https://host/folder`, `davs://` (the same), `http://` and `dav://`.

Given     a folder of a WebDAV server, and the settings for it (replica.storage.http_session names them).
Returns   the storage contract over HTTP.
Promises  those of the contract, as far as HTTP lets us; what a server cannot give is said here.
Partner   replica.storage.http_session carries the requests; replica.storage.webdav_claims makes publishing exclusive;
          replica.storage.webdav_names writes and reads names.

What is promised, and by whom (measured with Apache 2.4 mod_dav, rclone 1.60 and XRootD 5.5; the tests run all three):

    bytes       a PUT has always a Content-Length and breaks off if the source fails; a GET always asks for a range, and
                any answer but that very range, neither less nor more, is an error: an error page is never content.
    durable     when a PUT was answered, the bytes are as durable as the server makes them. HTTP has no fsync.
    publish     MOVE with `Overwrite: F`. XRootD ignores that header and overwrites; Apache looks first and renames
                then, and of eight publishers several "win". So a publisher first claims the name, looks whether it is
                free unless the server was seen to look itself, and only then moves: see webdav_claims. Of any number of
                Replica's publishers exactly one wins. Against others, who write to the server without claims, it is the
                server's own check that protects, and on XRootD only our look just before. rclone and dCache check and
                rename in one step: for such servers `atomic_move = "yes"` in the settings saves the claims.
    etag        the server's; XRootD has none, and its times are whole seconds: there, a file that is rewritten with
                the same size in the same second is taken for the same.
    checksum    the server's own, by `Want-Digest` or `Want-Repr-Digest`, where it has one. Of a temporary it is asked
                only after its last byte was taken: XRootD keeps the first answer. That of a published file may be the
                one from when it was written: it does not show that the disk has since lost a bit. Scrubbing reads.
    space       if the server tells a quota (RFC 4331).
    names       control characters are refused, for rclone and XRootD change or lose them; on XRootD also names of 255
                bytes, which its listings cut, and on XRootD 5 those with a '?'.

A small file written takes PUT, HEAD for the digest or GET to read it back, MOVE for the claim, PROPFIND where the
server does not look itself, MOVE; one read takes GET. Large ones are read in ranges of 1 GiB: see http_ranges.

Every `present` is a look at the sentinel: a disk that is not mounted behind the server is Unreachable, never empty.
"""

from __future__ import annotations

import asyncio
import copy
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, nullcontext
from typing import TypeVar

import aiohttp

from replica.storage.base import (
    OWN,
    PARTS,
    QUARANTINE,
    SENTINEL,
    Entry,
    Party,
    Piece,
    Space,
    Stat,
    check_part,
    check_path,
    check_prefix,
    check_readable,
)
from replica.storage.credentials import Settings
from replica.storage.digests import WANTED, digests
from replica.storage.faults import place
from replica.storage.http_body import SMALL_BYTES, Body, Paced, pieces_of, spooled, whole
from replica.storage.http_bulk import bulk
from replica.storage.http_quick import SMALL_BYTES as SMALL_ANSWER_BYTES
from replica.storage.http_ranges import Changed, Spans, Wrong
from replica.storage.http_session import Http, Timeouts
from replica.storage.multistatus import QUESTION, QUOTA_QUESTION, Found, Multistatus, NotMultistatus, mtime_ns
from replica.storage.refusals import no_room
from replica.storage.sentinel import SENTINEL_BYTES_MAX, is_anothers, owner_in, refuse_anothers, sentinel_of
from replica.storage.turns import DIGESTS_AT_ONCE, turn
from replica.storage.webdav_claims import CLAIMS, Claims, Held
from replica.storage.webdav_names import Names
from rules.errors import (
    Busy,
    Forbidden,
    Permanent,
    Refused,
    SourceChanged,
    SourceMissing,
    StorageError,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)

#: How long is waited before another try at what is locked.
_LOCKED_PAUSES = (0.05, 0.2, 1.0)
#: Less than this in `Timeouts.between` seconds of waiting is a server that drips.
_DRIP_BYTES = 1 << 16
#: For a file at least this large the server's quota is looked at before the first byte.
_LOOK_FOR_SPACE_BYTES = 64 << 20
_REMEMBERED = 10_000
#: Before a temporary is written, it is enough to have seen the endpoint's disk so long ago: publishing is what counts.
_PRESENT_SECONDS = 1.0

V = TypeVar("V")


class WebdavStorage:
    def __init__(
        self, url: str, *, name: str = "", settings: Settings | None = None, timeouts: Timeouts | None = None
    ) -> None:
        settings = settings or {}
        self.name = name
        self.url = url
        self.http = Http(url, settings, name=name, timeouts=timeouts)
        self.names = Names(self)
        self._claims = None if settings.get("atomic_move", "").lower() == "yes" else Claims(self)
        #: Temporaries that this process is writing now, wrote to their end, or published. The second needs no look
        #: whether it is there, the third none whether it is gone.
        self._writing: set[str] = set()
        self._written: dict[str, int] = {}
        self._published: dict[str, None] = {}
        #: What `stat` last told: only a guess of how much there is to read.
        self._sizes: dict[str, int] = {}
        self._folders: dict[str, None] = {}
        self._no_digest: set[str] = set()
        self._tells_quota = True

    # ── the endpoint ─────────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        await self._refuse_nested()
        if await self.look("") is None:
            await self.make_folder("")
        for folder in (OWN, PARTS, CLAIMS):
            await self.make_folder(folder)
        owner = await self._owner()
        if owner is None:
            await self._leave_sentinel()
            owner = await self._owner()
        refuse_anothers(owner, self.name, self.url)

    async def _leave_sentinel(self) -> None:
        """XRootD now and then answers "locked" for a moment after somebody has looked for the file."""
        for pause in (*_LOCKED_PAUSES, None):
            try:
                return await self.put_small(SENTINEL, sentinel_of(self.name), fresh=True)
            except TargetExists:
                return None  # somebody prepares it at the same time
            except Busy:
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        return None

    async def _refuse_nested(self) -> None:
        """Two endpoints on one disk would count one copy twice. What we may not read is not looked at."""
        above = self.http.base_path
        while above:
            above = above.rpartition("/")[0]
            root = self.http.base.removesuffix(self.http.base_path) + above
            try:
                async with self.http.request("GET", f"{root}/{SENTINEL}", SENTINEL) as response:
                    found = response.status == 200 and owner_in(await response.content.read(SENTINEL_BYTES_MAX))
            except StorageError:
                continue
            if isinstance(found, str):
                raise Refused(
                    f"{self.url} lies within another endpoint, {root}/",
                    hint="choose a folder outside of it; endpoints cannot be nested",
                )

    async def present(self, within_seconds: float = 0.0) -> None:
        """Unreachable, unless the endpoint's sentinel is there now, or was when it was asked for so long ago.

        Asked together: who comes while a look is under way shares the next one, which begins after it came, or that
        very one, if it need not be later.
        """
        pool = self.http.pool()
        if time.monotonic() - pool.present_at < within_seconds:
            return
        looking = pool.asking if within_seconds else None
        if looking is None or looking.done():
            if pool.to_ask is None:
                pool.to_ask = asyncio.get_running_loop().create_task(self._look_for_sentinel())
            looking = pool.to_ask
        error = await asyncio.shield(looking)
        if error is not None:
            raise copy.copy(error)  # several callers raise it, and each blames another side

    async def _look_for_sentinel(self) -> StorageError | None:
        pool = self.http.pool()
        if pool.asking is not None:
            await asyncio.wait([pool.asking])
        pool.asking, pool.to_ask = pool.to_ask, None
        began, pool.present_at = time.monotonic(), -math.inf
        try:
            owner = await self._owner()
        except StorageError as error:
            return error
        if owner is None:
            return self._unreachable(f"there is no {SENTINEL}: its disk is perhaps not mounted at the server")
        if is_anothers(owner, self.name):
            return self._unreachable(f"it belongs to the endpoint {owner}")
        pool.present_at = began
        return None

    async def _owner(self) -> str | None:
        """Whose sentinel is there; None: there is none."""
        async with self.http.request("GET", self.names.url(SENTINEL), SENTINEL) as response:
            if response.status in (404, 410):
                return None
            await self.http.check(response, SENTINEL, 200)
            owner = owner_in(await response.content.read(SENTINEL_BYTES_MAX))
        if owner is None:
            raise self._unreachable(f"what is sent as {SENTINEL} is something else: is this a page of a proxy?")
        return owner

    def _unreachable(self, reason: str) -> Unreachable:
        return Unreachable(
            f"endpoint {self.name or self.url}: {reason}",
            hint="mount the disk at the server; if this really is the endpoint's folder, prepare the endpoint again",
            endpoint=self.name,
        )

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def stat(self, path: str) -> Stat:
        self.names.check(check_readable(path))
        found = await self.look(path)
        if found is None:
            await self.present()
            raise self._missing(path)
        if found.is_folder:
            raise self.error(Forbidden, path, "is a folder, not a file", "Replica keeps files only")
        if found.size_bytes is None:
            raise self.error(Transient, path, "the server does not tell its size")
        _remember(self._sizes, path, found.size_bytes)
        etag = found.etag or f"{found.size_bytes:x}-{found.mtime_ns:x}"
        return Stat(found.size_bytes, found.mtime_ns, etag)

    async def look(self, path: str, *, folder: bool = False) -> Found | None:
        """What is there, file or folder; None: nothing. Says nothing about whether the disk is mounted."""
        url = self.names.url(path) + ("/" if folder or not path else "")
        async with aclosing(self.propfind(url, path, "0", QUESTION)) as resources:
            async for found in resources:
                if found.status in (404, 410):
                    return None
                if found.status != 200:
                    raise self.error(Forbidden, path, f"the server may not look at it (status {found.status})")
                return found
        return None

    async def propfind(self, url: str, path: str, depth: str, question: bytes) -> AsyncGenerator[Found, None]:
        """Every resource the server names; none at all: there is nothing (404)."""
        headers = {"Depth": depth, "Content-Type": "application/xml"}
        async with self.http.request(
            "PROPFIND", url, path, headers=headers, body=question, quick=depth == "0"
        ) as response:
            if response.status in (404, 410):
                return
            if response.status == 200:
                raise self.error(Permanent, path, "PROPFIND was answered with a page: this is no WebDAV folder")
            await self.http.check(response, path, 207)
            document = Multistatus()
            try:
                async for piece in Paced(response.content.iter_any(), self.http.timeouts.between):
                    for found in document.feed(piece):
                        yield found
                document.close()
            except NotMultistatus as error:
                raise self.error(Transient, path, f"the answer to PROPFIND cannot be read: {error}") from None

    async def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        self.names.check(check_prefix(prefix))
        await self.present()
        folders = [prefix] if await self._is_folder(prefix) else []
        while folders:
            folder = folders.pop()
            async with aclosing(self.children(folder)) as children:
                async for path, found, problem in children:
                    if path == OWN:
                        continue
                    if found.is_folder and not problem:
                        folders.append(path)
                    elif problem or found.size_bytes is None:
                        yield Entry(path, 0, 0, problem or "the server does not tell its size")
                    else:
                        yield Entry(path, found.size_bytes, found.mtime_ns)
        # A disk that went away meanwhile looks like folders that are gone.
        await self.present()

    async def _is_folder(self, prefix: str) -> bool:
        if not prefix:
            return True
        found = await self.look(prefix)
        return found is not None and found.is_folder

    async def children(self, folder: str) -> AsyncGenerator[tuple[str, Found, str], None]:
        """Path, description and problem of everything that lies directly in a folder; nothing, if it is not there."""
        seen = set()
        url = self.names.url(folder) + "/"
        async with aclosing(self.propfind(url, folder, "1", QUESTION)) as resources:
            async for found in resources:
                path, problem = await self.names.child(folder, found.href)
                if path == folder or path in seen:
                    continue
                seen.add(path)
                if found.status != 200:
                    raise self.error(Forbidden, path, f"the server may not look at it (status {found.status})")
                yield path, found, problem

    async def space(self) -> Space | None:
        await self.present()
        async with aclosing(self.propfind(self.names.url("") + "/", "", "0", QUOTA_QUESTION)) as resources:
            async for found in resources:
                if found.available_bytes is not None:
                    return Space(found.available_bytes + (found.used_bytes or 0), found.available_bytes)
        self._tells_quota = False
        return None

    def believed(self, path: str, size_bytes: int) -> None:
        _remember(self._sizes, path, size_bytes)

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def read(self, path: str, offset: int = 0, length: int | None = None) -> AsyncIterator[Piece]:
        self.names.check(check_readable(path))
        if length is not None and length <= 0:
            await self.stat(path)
            return
        spans = Spans(offset, length, self._sizes.get(path, self._written.get(path, 0)))
        while (wanted := spans.wanted) is not None:
            headers = {"Range": wanted.header}
            small = 0 < wanted.bytes_asked <= SMALL_ANSWER_BYTES
            async with self.http.request("GET", self.names.url(path), path, headers=headers, quick=small) as response:
                if response.status in (404, 410):
                    await self.present()
                    raise self._missing(path)
                if response.status == 416 or (response.status == 200 and response.content_length == 0):
                    if spans.begun:
                        raise self.error(SourceChanged, path, "it became shorter while it was read")
                    return  # at its end, or beyond
                await self.http.check(response, path, 206, 200)
                try:
                    expected = spans.judge(response.status, response.headers)
                    if expected:
                        async with aclosing(self._exactly(expected, response, path)) as pieces:
                            async for piece in pieces:
                                yield piece
                except Changed as error:
                    response.close()
                    raise self.error(SourceChanged, path, str(error)) from None
                except Wrong as error:
                    response.close()  # whatever else comes on this connection belongs to no other question
                    raise self.error(Transient, path, str(error)) from None

    async def _exactly(self, expected: int, response: aiohttp.ClientResponse, path: str) -> AsyncGenerator[Piece, None]:
        """The body, if it has that many bytes, and comes at a pace that ends some day."""
        now = asyncio.get_running_loop().time
        between = self.http.timeouts.between
        total = in_window = 0
        waited = 0.0
        pieces = bulk(response, expected, silent_seconds=between) or _any_pieces(response)
        async with aclosing(pieces):
            while True:
                began = now()
                piece = await anext(pieces, b"")
                if not piece:
                    break
                total += len(piece)
                in_window += len(piece)
                waited += now() - began
                if waited > between:
                    if in_window < _DRIP_BYTES:
                        reason = f"{in_window} bytes in {waited:.0f} s"
                        raise self.error(TimedOut, path, f"the server drips: {reason}", "look what it is busy with")
                    in_window, waited = 0, 0.0
                if total > expected:
                    raise Wrong(f"the server sent more than the {expected} bytes of the range")
                yield piece
        if total != expected:
            raise Wrong(f"the body ended after {total} of {expected} bytes")

    async def checksum(self, path: str, algorithm: str) -> str | None:
        self.names.check(check_readable(path))
        wanted = WANTED.get(algorithm)
        # A server that is asked for the checksum of a file still being written may keep that of its beginning.
        if path in self._writing:
            return None
        if path in self._written and (wanted is None or algorithm in self._no_digest):
            return None
        _, answer = await self._head(path, algorithm)
        if wanted and answer is None and path in self._written:
            self._no_digest.add(algorithm)
        return answer

    async def told(self, path: str, algorithm: str) -> tuple[int, str | None]:
        self.names.check(check_readable(path))
        size_bytes, answer = await self._head(path, algorithm)
        return (await self.stat(path)).size_bytes if size_bytes is None else size_bytes, answer

    async def _head(self, path: str, algorithm: str) -> tuple[int | None, str | None]:
        wanted = WANTED.get(algorithm)
        headers = {"Want-Digest": wanted[0], "Want-Repr-Digest": f"{wanted[1]}=10"} if wanted else {}
        seconds = self.http.timeouts.digest if wanted else None
        async with (
            turn(self.http.host, "digest", DIGESTS_AT_ONCE) if wanted else nullcontext(),
            self.http.request("HEAD", self.names.url(path), path, headers=headers, seconds=seconds) as response,
        ):
            if response.status in (404, 410):
                await self.present()
                raise self._missing(path)
            await self.http.check(response, path, 200)
            told = response.headers
            found = digests(",".join(told.getall("Digest", [])), ",".join(told.getall("Repr-Digest", [])))
            return response.content_length, found.get(algorithm)

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def write(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int | None = None) -> None:
        check_part(temporary)
        present, there = await asyncio.gather(self.present(), self.look(temporary), return_exceptions=True)
        for failed in (present, there):
            if isinstance(failed, BaseException):
                raise failed
        if there is not None:
            raise self.error(TargetExists, temporary, "exists already")
        await self._write(temporary, chunks, size_bytes)

    async def write_new(self, temporary: str, chunks: AsyncIterator[Piece], *, size_bytes: int) -> None:
        check_part(temporary)
        await self.present(_PRESENT_SECONDS)  # XRootD would make the folders on the disk beneath
        await self._write(temporary, chunks, size_bytes)

    async def _write(self, temporary: str, chunks: AsyncIterator[Piece], size_bytes: int | None) -> None:
        self._writing.add(temporary)
        try:
            if size_bytes is None:
                # Chunked bodies are not for every server: XRootD 5 fails two of three, and keeps a short file.
                file, size_bytes = await spooled(chunks)
                with file:
                    await self._put(temporary, pieces_of(file), size_bytes)
            else:
                await self._put(temporary, chunks, size_bytes)
        finally:
            self._writing.discard(temporary)
        _remember(self._written, temporary, size_bytes)

    async def _put(self, temporary: str, chunks: AsyncIterator[Piece], size_bytes: int) -> None:
        if size_bytes <= SMALL_BYTES:
            await self.put_small(temporary, await whole(chunks, size_bytes))
            return
        await self._refuse_too_large(temporary, size_bytes)
        if self.http.continues is None:
            await self._try_continue(temporary)
        body = Body(chunks, size_bytes)
        async with self.http.request(
            "PUT", self.names.url(temporary), temporary, headers=_BYTES, body=body
        ) as response:
            if body.error is not None:
                raise body.error
            await self._check_put(response, temporary)
            if not body.finished:
                raise self.error(Transient, temporary, "the server said it had it before all of it was sent")

    async def _try_continue(self, temporary: str) -> None:
        """Find out with one byte whether a large body may wait for "100 Continue": so it is not sent in vain when the
        server refuses it, or names another that takes it. XRootD 5 says "Connection: Close" in it, which ends the
        request for any client that reads it."""
        probe = f"{PARTS}/probe-{secrets.token_hex(8)}"
        body = Body(_one_byte(), 1)
        try:
            async with self.http.request("PUT", self.names.url(probe), probe, headers=_BYTES, body=body) as response:
                await response.read()
        except Transient:
            self.http.continues = False
        else:
            self.http.continues = self.http.continues is None
        await self.remove(probe)

    async def put_small(self, path: str, content: bytes, *, fresh: bool = False) -> None:
        """`fresh`: do not replace, where the server can tell."""
        headers = _BYTES | {"If-None-Match": "*"} if fresh else _BYTES
        async with self.http.request(
            "PUT", self.names.url(path), path, headers=headers, body=content, resend=True
        ) as response:
            await self._check_put(response, path)

    async def _check_put(self, response: aiohttp.ClientResponse, path: str) -> None:
        if response.status in (404, 409):
            folder = path.rpartition("/")[0]
            await self.present()
            await self.make_folder(folder)
            raise self.error(Transient, path, f"its folder {folder} was gone, and was made again")
        await self.http.check(response, path, 200, 201, 204)
        await response.read()

    async def _refuse_too_large(self, temporary: str, size_bytes: int) -> None:
        if size_bytes < _LOOK_FOR_SPACE_BYTES or not self._tells_quota:
            return
        space = await self.space()
        if space is not None and size_bytes > space.free_bytes:
            raise no_room(
                self.name,
                self.name or self.url,
                temporary,
                free_bytes=space.free_bytes,
                size_bytes=size_bytes,
                hint="free space there, raise the quota, or move data elsewhere",
            )

    async def publish(self, temporary: str, final: str) -> None:
        check_part(temporary)
        self.names.check(check_path(final))
        # What is claimed with lies on the endpoint's disk: no claim is held while that is not mounted.
        await self.present(0.0 if self._claims is None else _PRESENT_SECONDS)
        destination = await self.names.destination(final)
        if self._claims is None:
            await self._publish_now(temporary, final, destination, Held())
        else:
            looks = await self._claims.server_looks()
            async with self._claims.holding(final) as held:
                if not looks and await self.look(final) is not None:
                    raise self.exists(final)
                await self._publish_now(temporary, final, destination, held)
        self._written.pop(temporary, None)
        _remember(self._published, temporary, None)

    async def _publish_now(self, temporary: str, final: str, destination: str, held: Held) -> None:
        folder = final.rpartition("/")[0]
        if folder and folder not in self._folders:
            await self.make_folders(folder)
        with held.move(self, final):
            refusal = await self.move(temporary, final, destination)
            if isinstance(refusal, TimedOut):
                raise refusal  # a proxy gave up waiting; the server may not have
        if refusal is None:
            return
        # What a server answers when the folder is not there is 403, 404, 409 or 500. So look what it was.
        self._folders.clear()
        if await self.look(temporary) is None:
            await self.present()
            raise self.error(Transient, temporary, "it went away before it could be published")
        if await self.look(final) is not None:
            raise self.exists(final)
        if folder:
            await self.make_folders(folder)
        with held.move(self, final):
            refusal = await self.move(temporary, final, destination)
            if isinstance(refusal, TimedOut):
                raise refusal  # a proxy gave up waiting; the server may not have
        if refusal is not None:
            refusal.side = "target"
            raise refusal

    async def move(self, path: str, to: str, destination: str = "", *, folder: bool = False) -> StorageError | None:
        """Rename without replacing; None: done, else why not."""
        slash = "/" if folder else ""
        where = (destination or await self.names.destination(to)) + slash
        headers = {"Destination": where, "Overwrite": "F"}
        for again in (False, True):
            try:
                async with self.http.request("MOVE", self.names.url(path) + slash, to, headers=headers) as response:
                    if response.status in (201, 204):
                        await response.read()
                        return None
                    if response.status != 200:
                        return await self.http.refusal(response, to)
            except Transient as error:
                # A busy Apache closes idle connections, under a request too. If what was to be moved still lies there,
                # nothing happened; if not, nobody can tell who moved it.
                lost = isinstance(error.__cause__, aiohttp.ServerDisconnectedError)
                if again or not lost or await self.look(path, folder=folder) is None:
                    raise
            else:
                return await self._really_moved(path, to, folder)
        return None

    async def _really_moved(self, path: str, to: str, folder: bool) -> StorageError | None:
        """200 is what no server of WebDAV answers to a MOVE, and what every log-in page of a proxy does."""
        if await self.look(path, folder=folder) is not None or await self.look(to, folder=folder) is None:
            return self.error(Transient, to, "MOVE was answered with status 200, and nothing was moved")
        return None

    def exists(self, path: str) -> StorageError:
        error = self.error(TargetExists, path, "exists already")
        error.side = "target"
        return error

    async def delete(self, path: str) -> None:
        self.names.check(check_readable(path))
        if path in self._published:
            return None  # we gave it another name; no other writer ever has this one
        if not path.startswith(PARTS + "/"):
            await self.present()  # a file of this name may be another endpoint's, whose disk stands there by now
            # DELETE takes a folder with all that is in it.
            found = await self.look(path)
            if found is None:
                return await self.present()
            if found.is_folder:
                raise self.error(Forbidden, path, "is a folder, not a file: not deleted", "remove it by hand")
        if not await self.remove(path):
            await self.present()
        self._written.pop(path, None)
        return None

    async def remove(self, path: str, *, folder: bool = False) -> bool:
        """False: there was nothing."""
        url = self.names.url(path) + ("/" if folder else "")
        async with self.http.request("DELETE", url, path) as response:
            if response.status in (404, 410):
                return False
            await self.http.check(response, path, 200, 202, 204)
            await response.read()
        return True

    async def quarantine(self, path: str) -> str:
        await self.stat(path)
        check_path(path)
        await self.present()
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{path}"
        await self.make_folders(away.rpartition("/")[0])
        refusal = await self.move(path, away)
        if refusal is not None:
            if await self.look(path) is None:
                await self.present()
                raise self._missing(path)
            raise refusal
        return away

    async def make_folders(self, folder: str) -> None:
        """The folder and those above it, up to the endpoint's root, which must be there."""
        missing = [folder]
        while missing:
            parent = missing[-1].rpartition("/")[0]
            if missing[-1] in self._folders or await self.make_folder(missing[-1], may_lack_parent=bool(parent)):
                missing.pop()
            else:
                missing.append(parent)

    async def make_folder(self, folder: str, *, may_lack_parent: bool = False) -> bool:
        """True: it is there now; False, only if asked for: the one above it is not there."""
        url = self.names.url(folder) + "/"
        async with self.http.request("MKCOL", url, folder, resend=True) as response:
            made = response.status in (200, 201, 204)
            refusal = await self.http.refusal(response, folder)
        if not made:
            # Of two who make it at once, one gets 405, or 403 from Apache.
            found = await self.look(folder, folder=True) if response.status not in (401, 507) else None
            if found is None and may_lack_parent and response.status in (403, 404, 409, 500):
                return False
            if found is None:
                raise refusal
            if not found.is_folder:
                raise self.error(TargetExists, folder, "a file stands where a folder is needed")
        _remember(self._folders, folder, None)
        return True

    async def party(self, path: str) -> Party:
        self.names.check(check_readable(path))
        return self.http.party(self.names.url(path), path)

    async def collect_parts(self, older_than_seconds: float) -> int:
        await self.present()
        limit = await self.now_ns() - older_than_seconds * 1e9
        stale = [
            path
            async for path, found, problem in self.children(PARTS)
            if not problem and not found.is_folder and found.mtime_ns <= limit and path not in self._writing
        ]
        removed = 0
        for path in stale:
            removed += await self.remove(path)
            self._written.pop(path, None)
        if self._claims is not None:
            await self._claims.collect(limit)
        return removed

    async def now_ns(self) -> int:
        """The server's clock, or ours where it does not tell the time (XRootD)."""
        async with self.http.request("HEAD", self.names.url(SENTINEL), SENTINEL) as response:
            return mtime_ns(response.headers.get("Date", "")) or time.time_ns()

    async def close(self) -> None:
        if self._claims is not None:
            await self._claims.close()
        await self.http.close()

    # ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def error(self, kind: type[StorageError], path: str, reason: str, hint: str = "") -> StorageError:
        return kind(f"{place(self.name, path)}: {reason}", hint=hint, endpoint=self.name, path=path)

    def _missing(self, path: str) -> SourceMissing:
        return SourceMissing(f"{place(self.name, path)}: no such file", endpoint=self.name, path=path)


async def _one_byte() -> AsyncIterator[Piece]:
    yield b"x"


async def _any_pieces(response: aiohttp.ClientResponse) -> AsyncGenerator[Piece, None]:
    while piece := await response.content.readany():
        yield piece


_BYTES = {"Content-Type": "application/octet-stream"}


def _remember(memory: dict[str, V], key: str, value: V) -> None:
    memory[key] = value
    while len(memory) > _REMEMBERED:
        memory.pop(next(iter(memory)), None)
