"""Third-party copy: bytes go from one HTTP storage to another, and the worker only asks for it.

Given     two storages that are a `Party` each, and what the catalogue knows of the bytes.
Returns   Copied for bytes that lie, proven, under their final name; None where the worker must carry them itself.
Promises  a server writes to a name that nobody else has or ever had, never to a final one; nothing is published before
          size and a checksum of what the target now holds are the catalogue's; no secret goes to anyone but the two
          storages; whatever a server answers, goes on doing or fails to say, it cannot do harm.
Partner   replica.storage.copy asks first here; replica.storage.markers reads what a server tells.

The ways, in turn (WLCG HTTP-TPC):

    pull    COPY to the target, `Source:` names where to read       the target is the active party
    push    COPY to the source, `Destination:` names where to write  the source is the active party
    None    the worker streams, and sees with its own eyes whose fault it was

What real servers were seen to do decides the rest:

    "201 Created" or "202" means *started*. The last line of the answer says how it ended; when there is none, the
    temporary is looked at, once nobody writes to it any more.
    A copy that fails leaves a short or an empty file, and empties one that was there: each attempt has a temporary of
    its own, `Overwrite: F`, removed afterwards.
    A server goes on writing after we hang up: into a temporary that nobody will publish. Removing it takes the name
    from it at once; should a server make it anew, it is collected by age like every other.
    Digests in requests are ignored, and those in answers may be old or of a part: the only one believed is asked for
    after the end, of a file that did not exist before. Bytes that differ are settled by streaming, for only then
    is it known whether the source is rotten or the way to the target.

A way that a server refuses is not tried again between these two hosts for a while, one that began and failed not after
the third time in a row; the others are. Of a secret only a bearer's token is handed to the other party, and only where
it does not travel more openly than in its own storage.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, cast
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from replica.storage import faultpoints
from replica.storage.adoption import adopt_existing, measure_by, publish_proven
from replica.storage.base import Party, Storage, SupportsThirdParty, part_path
from replica.storage.faults import blaming, place
from replica.storage.judging import NO_LOOK_BYTES_MAX, Control, Copied, Expected, expect_size, needed, same_file
from replica.storage.markers import Markers, Outcome, shown_reason
from replica.storage.turns import turn
from rules.checksums import Agreement, Checksum, Checksums
from rules.errors import Busy, Invalid, NoSpace, ReplicaError, Side, SourceMissing, StorageError

#: Copies that one active host is asked for at a time, by this process.
AT_ONCE = 32
#: A way that did not do is left out so long.
REMEMBERED_SECONDS = 600.0
#: In a row, for a way that was accepted and failed later: a restarted server must not cost ten minutes of streaming.
FAILURES_MAX = 3
_PAIRS_MAX = 1_000
_REDIRECTS_MAX = 5
#: Of a refusal's text we read so much.
_REFUSAL_BYTES_MAX = 4096
#: No server computes it: not worth a request.
_OURS_ALONE = frozenset({"xxh3_128"})
V = TypeVar("V")
#: Answers of an active party that mean: this COPY is not for me, whatever the file.
_NOT_FOR_ME = frozenset({400, 401, 403, 405, 501, 502})
#: … and: a folder is missing. XRootD says 400.
_NO_FOLDER = frozenset({400, 404, 409})


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may keep silent."""

    #: Before the first byte: a tape, a queue of its own.
    first_byte_seconds: float = 120.0
    between_bytes_seconds: float = 60.0
    #: How often we look whether we are to stop.
    tick_seconds: float = 0.25
    #: Without an outcome, the temporary must have stayed the same so long before it is judged …
    settled_seconds: float = 2.0
    #: … and is given up if it still grows after that.
    settling_seconds_max: float = 60.0


class Way(enum.Enum):
    PULL = "pull"
    PUSH = "push"


class _Failed(Exception):
    """This way did not do for this file; another one may."""

    def __init__(
        self, reason: str, *, refused: bool = False, wrong_bytes: bool = False, unanswered: bool = False
    ) -> None:
        super().__init__(reason)
        #: The connection was lost before an answer: perhaps an idle one, that the server had closed.
        self.unanswered = unanswered
        #: By the server, for all files of this pair.
        self.refused = refused
        #: They arrived, and are not what the catalogue knows: another server's word will not settle that.
        self.wrong_bytes = wrong_bytes


@dataclass(slots=True)
class _Record:
    failures: int = 0
    not_before: float = 0.0


class Memory:
    """What worked between two hosts. Of this process, and lost with it: finding out again costs two requests."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str, Way], _Record] = {}

    def ways(self, source: str, target: str, now: float) -> list[Way]:
        found = ((way, self._records.get((source, target, way))) for way in Way)
        return [way for way, record in found if record is None or record.not_before <= now]

    def succeeded(self, source: str, target: str, way: Way) -> None:
        self._records.pop((source, target, way), None)

    def failed(self, source: str, target: str, way: Way, now: float, *, refused: bool) -> None:
        while len(self._records) >= 2 * _PAIRS_MAX:
            del self._records[next(iter(self._records))]
        record = self._records.setdefault((source, target, way), _Record())
        record.failures += 1
        if refused or record.failures >= FAILURES_MAX:
            record.not_before = now + REMEMBERED_SECONDS


memory = Memory()


async def copy_between(
    source: Storage,
    source_path: str,
    target: Storage,
    target_path: str,
    *,
    tag: str,
    expected: Expected | None,
    control: Control,
    before_publish: Callable[[], None] | None = None,
    patience: Patience = Patience(),
) -> Copied | None:
    """Have the two storages copy the file. None: they cannot, or did not, and nothing of it is left.

    Raises as `copy_file` does, where carrying the bytes ourselves would end no better. A file of which no checksum is
    known is never left to others: there would be nothing to hold their word against.
    """
    if not isinstance(source, SupportsThirdParty) or not isinstance(target, SupportsThirdParty):
        return None
    if expected is None or not expected.checksums:
        return None
    began = time.perf_counter()
    if source.url == target.url and source_path == target_path:
        raise same_file(source, source_path)
    looked = expected.size_bytes > NO_LOOK_BYTES_MAX
    look = partial(adopt_existing, source, source_path, target, target_path, expected, control, before_publish)
    if looked and (there := await look()) is not None:
        return there
    hosts = _host(source.url), _host(target.url)
    ways, asked_again = memory.ways(*hosts, time.monotonic()), False
    while ways:
        way = ways[0]
        copy = _Attempt(way, source, source_path, target, target_path, tag, expected, control, before_publish, patience)
        try:
            copied = await copy.run(began)
        except _Failed as failure:
            control.bytes_done, control.phase = 0, "moving"
            if failure.wrong_bytes:
                memory.failed(*hosts, way, time.monotonic(), refused=False)
                return None
            if failure.unanswered and not asked_again:
                asked_again = True
                continue
            # What lies there already needs no source, and no reason why it cannot be copied.
            if not looked and (there := await look()) is not None:
                return there
            looked = True
            await copy.explain()
            ways.remove(way)
            memory.failed(*hosts, way, time.monotonic(), refused=failure.refused)
        else:
            memory.succeeded(*hosts, way)
            return copied
    return None


@dataclass(slots=True)
class _Attempt:
    """One file, one way, one temporary."""

    way: Way
    source: Storage
    source_path: str
    target: Storage
    target_path: str
    tag: str
    expected: Expected
    control: Control
    before_publish: Callable[[], None] | None
    patience: Patience
    part: str = field(init=False)

    def __post_init__(self) -> None:
        self.part = part_path(f"{self.tag}.{secrets.token_hex(6)}")

    async def run(self, began: float) -> Copied:
        self.control.check()
        asked = published = False
        try:
            active, passive = await self._parties()
            async with _turn(active.url, self.control, self.patience.tick_seconds):
                asked = True
                outcome = await self._ask(active, passive)
            if outcome.kind == "failure":
                raise _Failed(outcome.text)
            self.control.phase = "verifying"
            if outcome.kind == "unknown":
                await self._settle()
            faultpoints.reach("after_write")
            checksums, verified_by = await self._verify()
            faultpoints.reach("after_verify")
            self.control.bytes_done = self.expected.size_bytes
            there = await publish_proven(
                self.target, self.part, self.target_path, self.expected, self.control, self.before_publish
            )
            if there is not None:
                return there
            published = True
            faultpoints.reach("after_publish")
        finally:
            if asked and not published:
                # A failure here hides no better error: what stays is collected by age.
                with suppress(ReplicaError):
                    await self.target.delete(self.part)
        size_bytes = self.expected.size_bytes
        seconds = time.perf_counter() - began
        return Copied(size_bytes, checksums, False, seconds, verified_by, moved_bytes=size_bytes)

    async def explain(self) -> None:
        """Why no way would do: what the source and the target themselves say, for a server's text decides nothing."""
        with blaming("source"):
            found = await self.source.stat(self.source_path)
            expect_size(self.source, self.source_path, found.size_bytes, self.expected)
        with blaming("target"):
            space = await self.target.space()
        if space is not None and space.free_bytes < self.expected.size_bytes:
            raise self._no_space(f"{space.free_bytes} bytes are free, {self.expected.size_bytes} are needed")

    # ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _parties(self) -> tuple[Party, Party]:
        # Looked at by `copy_between`; to look again at what a protocol asks for takes longer than all else here.
        source, target = cast(SupportsThirdParty, self.source), cast(SupportsThirdParty, self.target)
        reading, writing = await source.party(self.source_path), await target.party(self.part)
        for party, storage in ((reading, self.source), (writing, self.target)):
            # Whatever an adapter makes of a path: a server is sent nowhere but to the two storages.
            if _origin(party.url) != _origin(storage.url):
                raise _Failed(f"{place(storage.name, '')}: its files lie elsewhere", refused=True)
        await _make_folders(writing, self.target)
        return (writing, reading) if self.way is Way.PULL else (reading, writing)

    async def _ask(self, active: Party, passive: Party) -> Outcome:
        headers = copy_headers(self.way, active, passive)
        try:
            return await self._watched(active, headers)
        except _NoFolder as refusal:
            # Somebody removed Replica's own folder since we made it.
            _folders_made.discard(self.target.url)
            target = passive if self.way is Way.PUSH else active
            await _make_folders(target, self.target)
            try:
                return await self._watched(active, headers)
            except _NoFolder:
                raise _Failed(str(refusal), refused=refusal.refused) from refusal

    async def _watched(self, active: Party, headers: Mapping[str, str]) -> Outcome:
        """The COPY, with one eye on whether bytes move and one on whether they are still wanted."""
        markers = Markers()
        exchange = asyncio.create_task(self._exchange(active, headers, markers))
        seen, since = 0, time.monotonic()
        try:
            while not (await asyncio.wait({exchange}, timeout=self.patience.tick_seconds))[0]:
                self.control.check()
                now = time.monotonic()
                if (done := markers.bytes_done) > seen:
                    seen, since = done, now
                    self.control.bytes_done = min(seen, self.expected.size_bytes)
                silent_max = self.patience.between_bytes_seconds if seen else self.patience.first_byte_seconds
                if now - since > silent_max:
                    # Some servers do not tell; what has arrived does.
                    if (there := await self._arrived()) <= seen:
                        raise _Failed(f"no byte moved for {silent_max:g} s")
                    seen, since = there, time.monotonic()
            return exchange.result()
        finally:
            if not exchange.done():
                exchange.cancel()
                await asyncio.wait({exchange})
                with suppress(asyncio.CancelledError, Exception):
                    exchange.result()

    async def _exchange(self, active: Party, headers: Mapping[str, str], markers: Markers) -> Outcome:
        url, started = active.url, False
        try:
            for _ in range(_REDIRECTS_MAX):
                # Followed by hand: aiohttp would make a GET of it, and go wherever it is sent.
                async with active.session.request(
                    "COPY", _as_is(url), headers=headers, allow_redirects=False, timeout=_NO_TIMEOUT
                ) as answer:
                    if answer.status in (301, 302, 307, 308):
                        url, headers = _redirected(active, url, answer.headers.get("Location", ""), headers)
                        continue
                    if answer.status not in (200, 201, 202, 204):
                        await self._refused(answer)
                    started = True
                    async for piece in answer.content.iter_any():
                        markers.feed(piece)
                    return markers.outcome()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if started:
                return markers.outcome()  # a last line may have come before the connection went
            lost = isinstance(error, OSError | aiohttp.ServerDisconnectedError)
            unanswered = lost and not isinstance(error, aiohttp.ClientConnectorError | TimeoutError)
            reason = f"{_host(url)} cannot be asked: {shown_reason(str(error))}"
            raise _Failed(reason, unanswered=unanswered) from error
        raise _Failed("too many redirects", refused=True)

    async def _refused(self, answer: aiohttp.ClientResponse) -> None:
        text = shown_reason((await answer.content.read(_REFUSAL_BYTES_MAX)).decode(errors="replace"))
        reason = f"COPY was answered by {answer.status} {text}".rstrip()
        if answer.status in (429, 503):
            busy = Busy(
                f"{place(self._active_storage.name, '')} is busy: {reason}",
                endpoint=self._active_storage.name,
                path=self.target_path,
                side=self._active_side,
            )
            with suppress(ValueError):
                busy.retry_after_seconds = float(answer.headers.get("Retry-After", ""))
            raise busy
        if answer.status == 507:
            raise self._no_space(reason)
        refused = answer.status in _NOT_FOR_ME
        if answer.status in _NO_FOLDER:
            raise _NoFolder(reason, refused=refused)
        raise _Failed(reason, refused=refused)

    @property
    def _active_storage(self) -> Storage:
        return self.target if self.way is Way.PULL else self.source

    @property
    def _active_side(self) -> Side:
        return "target" if self.way is Way.PULL else "source"

    def _no_space(self, reason: str) -> NoSpace:
        return NoSpace(
            f"{place(self.target.name, self.target_path)} does not fit: {reason}",
            hint="free space there, or move data elsewhere",
            endpoint=self.target.name,
            path=self.target_path,
            side="target",
        )

    # ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _arrived(self) -> int:
        with suppress(StorageError):
            return (await self.target.stat(self.part)).size_bytes
        return 0

    async def _settle(self) -> None:
        """Return when nobody seems to write to the temporary any more."""
        until = time.monotonic() + self.patience.settling_seconds_max
        before = None
        while True:
            self.control.check()
            try:
                found = await self.target.stat(self.part)
            except StorageError as error:
                raise _Failed(f"the server's answer ended without an outcome: {error.message}") from error
            if before is not None and found == before:
                return
            if time.monotonic() > until:
                raise _Failed("the server's answer ended without an outcome, and the file still grows")
            before = found
            await asyncio.sleep(self.patience.settled_seconds)

    async def _verify(self) -> tuple[Checksums, str]:
        """What the target has now is what the catalogue knows; the checksums that were compared, and how."""
        with blaming("target"):
            self.control.check()
            for known in self.expected.checksums:
                if known.algorithm in _OURS_ALONE:
                    continue
                size_bytes, answered = await self._told(known.algorithm)
                if size_bytes != self.expected.size_bytes:
                    raise _Failed(f"{size_bytes} bytes arrived, not {self.expected.size_bytes}")
                with suppress(Invalid):  # what is no value of this algorithm is no answer
                    if answered is None:
                        continue
                    if Checksum(known.algorithm, answered) != known:
                        reason = f"{known.algorithm} is {answered[:80]}, not {known.value}"
                        raise _Failed(reason, wrong_bytes=True)
                    return Checksums((known,)), f"digest {known.algorithm}"
            size_bytes, checksums = await measure_by(self.target, self.part, needed(self.expected), self.control)
        if size_bytes != self.expected.size_bytes:
            raise _Failed(f"{size_bytes} bytes arrived, not {self.expected.size_bytes}")
        right = checksums.compare(self.expected.checksums) is Agreement.AGREE
        if not right:
            raise _Failed("what was read back is not what the catalogue knows", wrong_bytes=True)
        return checksums, "read back"

    async def _told(self, algorithm: str) -> tuple[int, str | None]:
        try:
            return await self._while_wanted(cast(SupportsThirdParty, self.target).told(self.part, algorithm))
        except SourceMissing:
            raise _Failed("nothing arrived") from None

    async def _while_wanted(self, asking: Coroutine[None, None, V]) -> V:
        """A server may need an hour for the digest of a large file; a copy that is to stop does not wait for it."""
        question = asyncio.create_task(asking)
        try:
            while not (await asyncio.wait({question}, timeout=self.patience.tick_seconds))[0]:
                self.control.check()
            return question.result()
        finally:
            if not question.done():
                question.cancel()
                await asyncio.wait({question})


class _NoFolder(_Failed):
    """Perhaps only a folder is missing."""


# ── headers, and who may see them ────────────────────────────────────────────────────────────────────────────────────


def copy_headers(way: Way, active: Party, passive: Party) -> dict[str, str]:
    """Of the COPY. Raises `_Failed` if the other party's secret may not be told to this one."""
    headers = {
        **active.headers,
        "Source" if way is Way.PULL else "Destination": passive.url,
        "Overwrite": "F",
        "Credential": "none",
        "X-Number-Of-Streams": "1",
        # We compare ourselves; a source that keeps no checksums must not make the copy fail.
        "RequireChecksumVerification": "false",
    }
    for name, value in passive.headers.items():
        # A password would be the other server's for ever, and any other header is not meant for a third one.
        if name.lower() != "authorization" or not value.lower().startswith("bearer "):
            raise _Failed(f"the secret of {_host(passive.url)} is not one to hand on", refused=True)
        if urlsplit(active.url).scheme != "https" and urlsplit(passive.url).scheme == "https":
            raise _Failed(f"the token of {_host(passive.url)} would travel in the open", refused=True)
        headers[f"TransferHeader{name.title()}"] = value
    return headers


def _redirected(active: Party, url: str, location: str, headers: Mapping[str, str]) -> tuple[str, Mapping[str, str]]:
    """Where a COPY goes on, and with what: the same host, or one that was written down as a part of this storage."""
    to = urljoin(url, location)
    if _origin(to) == _origin(active.url):
        return to, headers
    parts = urlsplit(to)
    named = {_host(to), parts.hostname} & active.may_redirect_to
    if named and parts.scheme == urlsplit(active.url).scheme and "@" not in parts.netloc:
        return to, {name: value for name, value in headers.items() if name not in active.headers}
    raise _Failed(f"{_host(url)} sends us to {shown_reason(_host(to))}, which is not its own", refused=True)


def _origin(url: str) -> tuple[str, str]:
    return _HTTP.get(urlsplit(url).scheme, urlsplit(url).scheme), _host(url)


def _host(url: str) -> str:
    """host:port, as a key and for messages; never a user's name, which a URL here cannot have."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if _HTTP.get(parts.scheme, parts.scheme) == "https" else 80)
    except ValueError:
        return "?"
    return f"{parts.hostname}:{port}"


_HTTP = {"davs": "https", "dav": "http"}
_NO_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30)


def _as_is(url: str) -> URL:
    return URL(url, encoded=True)


# ── folders, and turns ───────────────────────────────────────────────────────────────────────────────────────────────

#: URLs of storages whose folder of temporaries was made by this process.
_folders_made: set[str] = set()


async def _make_folders(target: Party, storage: Storage) -> None:
    """A COPY makes no parents. Whether it worked is seen when something is put there."""
    if storage.url in _folders_made:
        return
    parts = target.url.rpartition("/")[0]
    try:
        for folder in (parts.rpartition("/")[0] + "/", parts + "/"):
            async with target.session.request(
                "MKCOL", _as_is(folder), headers=target.headers, allow_redirects=False, timeout=_MKCOL_TIMEOUT
            ) as answer:
                await answer.content.read(_REFUSAL_BYTES_MAX)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise _Failed(f"{_host(target.url)} cannot be asked: {shown_reason(str(error))}") from error
    while len(_folders_made) >= _PAIRS_MAX:
        _folders_made.pop()
    _folders_made.add(storage.url)


_MKCOL_TIMEOUT = aiohttp.ClientTimeout(total=60)


@asynccontextmanager
async def _turn(url: str, control: Control, tick_seconds: float) -> AsyncIterator[None]:
    """One of the copies that this host is asked for at a time."""
    mine = turn(_host(url), "copy", AT_ONCE)
    if mine.locked():
        waiting = asyncio.create_task(mine.acquire())
        try:
            while not (await asyncio.wait({waiting}, timeout=tick_seconds))[0]:
                control.check()
        except BaseException:
            if not waiting.cancel():
                mine.release()
            raise
    else:
        await mine.acquire()
    try:
        yield
    finally:
        mine.release()
