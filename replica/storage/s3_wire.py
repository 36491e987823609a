"""One S3 server as signed HTTP requests, and its answers as values or errors of ours.

Given     where the server is, the bucket, and the site's settings (keys: see replica.storage.s3).
Returns   answers: status, headers, and the small XML documents S3 speaks in; large bodies as streams.
Promises  one table turns every refusal into a StorageError; a missing bucket is Unreachable, never an empty answer;
          a 200 that carries an error in its body is that error; redirects are not followed; no secret is ever in a
          message; secrets that lie in files are read anew for each request.
Partner   replica.storage.s3 speaks in verbs; this speaks in requests.

Why not a client library: obstore cannot list or abort unfinished uploads, copy conditionally by header, complete a
multipart upload conditionally, or read from servers that answer a range with 200 (rclone's); boto3 and aiobotocore can,
at five to ten times the CPU of a request. Signing is what one must not write oneself: it is botocore's, the bytes go
over aiohttp.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from weakref import WeakKeyDictionary
from xml.etree import ElementTree

from replica.storage.base import Piece
from replica.storage.credentials import Settings, seconds_in, secret
from replica.storage.faults import from_os_error, place
from replica.storage.http_body import Paced
from rules.errors import (
    Busy,
    Forbidden,
    NoSpace,
    Permanent,
    SourceMissing,
    StorageError,
    TimedOut,
    Transient,
    Unreachable,
)

if TYPE_CHECKING:
    import aiohttp

#: Longer error documents and listings than this are no S3's.
_DOCUMENT_BYTES_MAX = 16 << 20
_PIECE_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0
#: Silence on an open connection. A server that copies a large object sends white space meanwhile, or does not: see
#: `quiet_seconds` of a call.
_QUIET_SECONDS = 60.0
_COPIED_BYTES_A_SECOND = 1 << 20
_CONNECTIONS = 64
_UNSIGNED = "UNSIGNED-PAYLOAD"

_KEY = "correct access_key_id and secret_access_key in this worker's credentials file"
_CLOCK = "set the clock of this machine (NTP), or the server's"
_REGION = "correct `region` or `endpoint` in this worker's credentials file"
_FULL = "raise the quota of the bucket or its owner, free space there, or move data elsewhere"
_RIGHT = "give this key the right to do this in the bucket"

#: S3's error code → class and hint. Codes of Amazon, Ceph, MinIO, dCache and NetApp.
_CODES: dict[str, tuple[type[StorageError], str]] = {
    "NoSuchKey": (SourceMissing, ""),
    "NoSuchVersion": (SourceMissing, ""),
    "NoSuchBucket": (Unreachable, "make the bucket, or correct the endpoint's URL"),
    "NoSuchUpload": (Transient, "the unfinished upload was aborted meanwhile"),
    "AccessDenied": (Forbidden, _RIGHT),
    "AllAccessDisabled": (Forbidden, _RIGHT),
    "AccountProblem": (Forbidden, "ask the operator of the storage about this account"),
    "InvalidAccessKeyId": (Forbidden, _KEY),
    "SignatureDoesNotMatch": (Forbidden, _KEY),
    "InvalidToken": (Forbidden, "renew session_token"),
    "ExpiredToken": (Forbidden, "renew session_token"),
    "TokenRefreshRequired": (Forbidden, "renew session_token"),
    "RequestTimeTooSkewed": (Transient, _CLOCK),
    "RequestExpired": (Transient, _CLOCK),
    "AuthorizationHeaderMalformed": (Permanent, _REGION),
    "PermanentRedirect": (Permanent, _REGION),
    "TemporaryRedirect": (Transient, _REGION),
    "SlowDown": (Busy, ""),
    "SlowDownRead": (Busy, ""),
    "SlowDownWrite": (Busy, ""),
    "ServiceUnavailable": (Busy, ""),
    "TooManyRequests": (Busy, ""),
    "RequestLimitExceeded": (Busy, ""),
    "Throttling": (Busy, ""),
    "ThrottlingException": (Busy, ""),
    "OperationAborted": (Busy, ""),
    "ConditionalRequestConflict": (Busy, ""),
    "InternalError": (Transient, ""),
    "RequestTimeout": (TimedOut, ""),
    "IncompleteBody": (Transient, ""),
    "BadDigest": (Transient, "the bytes were damaged on their way, and refused"),
    "XAmzContentSHA256Mismatch": (Transient, "the bytes were damaged on their way, and refused"),
    "XAmzContentChecksumMismatch": (Transient, "the bytes were damaged on their way, and refused"),
    "QuotaExceeded": (NoSpace, _FULL),
    "StorageQuotaExceeded": (NoSpace, _FULL),
    "InsufficientStorage": (NoSpace, _FULL),
    "InsufficientCapacity": (NoSpace, _FULL),
    "XMinioStorageFull": (NoSpace, _FULL),
    "XMinioAdminBucketQuotaExceeded": (NoSpace, _FULL),
    "EntityTooLarge": (NoSpace, "the server does not take files of this size"),
    "KeyTooLongError": (Permanent, "the name is too long for this server"),
    "InvalidObjectState": (Permanent, "the object is archived: restore it before it is read"),
    "ObjectNotInActiveTierError": (Permanent, "the object is archived: restore it before it is read"),
}
#: Where the code is unknown, or there is none, as in every answer to HEAD.
_STATUSES: dict[int, tuple[type[StorageError], str]] = {
    301: (Permanent, _REGION),
    307: (Transient, _REGION),
    401: (Forbidden, _KEY),
    403: (Forbidden, f"{_RIGHT}, or {_KEY}: without a body the server does not say which"),
    404: (SourceMissing, ""),
    408: (TimedOut, ""),
    413: (NoSpace, "the server, or a proxy before it, does not take files of this size"),
    429: (Busy, ""),
    503: (Busy, ""),
    504: (TimedOut, ""),
    507: (NoSpace, _FULL),
}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    code: str = ""  #: S3's own word for a refusal

    @property
    def date(self) -> datetime:
        """The server's clock: ages are told by it, not by ours."""
        return when(self.headers.get("Date", "")) or datetime.now(UTC)

    def document(self) -> ElementTree.Element:
        return _parsed(self.body)


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go. `netloc` and `folder` come before every key: the bucket is in one or the other."""

    scheme: str
    host: str  #: host and port, without the bucket
    netloc: str
    folder: str  #: "/bucket" with path addressing, "" with virtual hosts
    bucket: str
    region: str
    loopback: bool

    def url(self, key: str | None) -> str:
        path = "/" if key is None and not self.folder else self.folder
        return f"{self.scheme}://{self.netloc}{path}" + ("" if key is None else f"/{quoted(key)}")


class Wire:
    """Signed requests to one bucket. May be used from several tasks and event loops."""

    def __init__(self, server: Server, settings: Settings, *, name: str) -> None:
        self.server = server
        self.name = name
        self._settings = settings
        self._quiet = seconds_in(settings, "quiet_seconds")
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = WeakKeyDictionary()

    async def call(
        self,
        method: str,
        key: str | None,
        *,
        path: str,
        query: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        body: Piece | bytearray = b"",
        returned: Sequence[int] = (),
        quiet_seconds: float | None = None,
    ) -> Answer:
        """One request with its whole answer. Refusals raise, but for the statuses in `returned`."""
        async with self._send(method, key, path, query, headers or {}, body, quiet_seconds) as response:
            quiet = quiet_seconds or self._quiet or _QUIET_SECONDS
            content = b"" if method == "HEAD" else await self._document(response, path, quiet)
            code = _code(content)
            answer = Answer(response.status, response.headers, content, code)
            if (response.status >= 300 or code) and response.status not in returned:
                raise self.refusal(answer, path)
            return answer

    @asynccontextmanager
    async def stream(
        self, key: str, *, path: str, headers: Mapping[str, str], returned: Sequence[int] = ()
    ) -> AsyncIterator[tuple[Answer, AsyncIterator[bytes]]]:
        """GET with the body piece by piece."""
        async with self._send("GET", key, path, (), headers, b"", None) as response:
            answer = Answer(response.status, response.headers)
            if response.status >= 300 and response.status not in returned:
                content = await self._document(response, path, self._quiet or _QUIET_SECONDS)
                raise self.refusal(Answer(response.status, response.headers, content, _code(content)), path)
            yield answer, Paced(response.content.iter_chunked(_PIECE_BYTES), self._quiet or _QUIET_SECONDS)

    def patience(self, size_bytes: int | None = None) -> float:
        """How long the server may be silent while it copies so much, or while it puts parts together."""
        quiet = self._quiet or _QUIET_SECONDS
        return 10 * quiet if size_bytes is None else min(10 * quiet, quiet + size_bytes / _COPIED_BYTES_A_SECOND)

    def presigned(self, key: str, seconds: int) -> str:
        """A URL that lets whoever holds it read this object for so long. It is a secret."""
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("GET", self.server.url(key))
        S3SigV4QueryAuth(self._credentials(), "s3", self.server.region, expires=seconds).add_auth(request)
        return str(request.url)

    def access_key(self) -> str | None:
        return self._settings.get("access_key_id")

    async def close(self) -> None:
        loop = asyncio.get_running_loop()
        session = self._sessions.pop(loop, None)
        if session is not None:
            await session.close()

    # ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        key: str | None,
        path: str,
        query: Sequence[tuple[str, str]],
        headers: Mapping[str, str],
        body: Piece | bytearray,
        quiet_seconds: float | None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp
        from yarl import URL

        url = self.server.url(key)
        if query:
            url += "?" + "&".join(f"{quoted(name, '')}={quoted(value, '')}" for name, value in sorted(query))
        signed = await self._signed(method, url, headers, body)
        quiet = quiet_seconds or self._quiet or _QUIET_SECONDS
        try:
            async with self._session().request(
                method,
                URL(url, encoded=True),  # as it was signed, byte by byte
                headers=signed,
                data=_Pieces(body) if len(body) > _PIECE_BYTES else body or None,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=quiet),
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broken(error, path) from None

    async def _signed(
        self, method: str, url: str, headers: Mapping[str, str], body: Piece | bytearray
    ) -> dict[str, str]:
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(method, url, headers={**headers, "Accept-Encoding": "identity"})
        # Over TLS the bytes cannot be changed on their way, over loopback they have none: there, hashing them for the
        # signature would cost more than sending them.
        if not body:
            request.context["payload"] = hashlib.sha256().hexdigest()
        elif self.server.scheme == "https" or self.server.loopback:
            request.context["payload"] = _UNSIGNED
        else:
            request.context["payload"] = (await asyncio.to_thread(hashlib.sha256, body)).hexdigest()
        _signer()(self._credentials(), "s3", self.server.region).add_auth(request)
        signed = {**dict(request.headers.items()), "User-Agent": "replica"}
        if method in ("PUT", "POST"):
            signed["Content-Length"] = str(len(body))
        return signed

    def _credentials(self) -> Any:
        from botocore.credentials import Credentials

        known = self._settings
        if self.server.scheme == "http" and not self.server.loopback and known.get("insecure") != "yes":
            raise Forbidden(
                f"endpoint {self.name or self.server.bucket}: files would go over plain http to {self.server.host}",
                hint='use https, or write insecure = "yes" for it into the worker\'s credentials file',
                endpoint=self.name,
            )
        access_key, secret_key = known.get("access_key_id"), secret(known, "secret_access_key")
        if not access_key or not secret_key:
            raise Forbidden(
                f"endpoint {self.name or self.server.bucket}: this worker has no key for it",
                hint="write access_key_id and secret_access_key_file into the worker's credentials file",
                endpoint=self.name,
            )
        return Credentials(access_key, secret_key, secret(known, "session_token"))

    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or session.closed:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=_CONNECTIONS),
                auto_decompress=False,
                read_bufsize=2 * _PIECE_BYTES,
                skip_auto_headers=("Content-Type",),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            self._sessions[loop] = session
        return session

    # ── understanding ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _document(self, response: aiohttp.ClientResponse, path: str, quiet: float) -> bytes:
        content = bytearray()
        async for piece in Paced(response.content.iter_chunked(_PIECE_BYTES), quiet):
            content += piece
            if len(content) > _DOCUMENT_BYTES_MAX:
                raise Transient(
                    f"{place(self.name, path)}: the server's answer does not end", endpoint=self.name, path=path
                )
        return bytes(content)

    def refusal(self, answer: Answer, path: str) -> StorageError:
        kind, hint = _CODES.get(answer.code) or _STATUSES.get(answer.status) or (None, "")
        if kind is None:
            kind = Transient if answer.status >= 500 or answer.status < 300 else Permanent
        reason = answer.code or f"the server answered {answer.status}"
        if hint == _CLOCK:
            reason = f"{reason}: its clock says {answer.date:%H:%M:%S}, ours {datetime.now(UTC):%H:%M:%S} UTC"
        if kind is SourceMissing:
            reason = "no such file"
        if kind is Unreachable:
            hint = hint or "check that the server runs and the bucket is there"
        error = kind(f"{place(self.name, path)}: {reason}", hint=hint, endpoint=self.name, path=path)
        if isinstance(error, Busy):
            after = answer.headers.get("Retry-After", "")
            error.retry_after_seconds = float(after) if after.isdecimal() else None
        return error

    def _broken(self, error: Exception, path: str) -> StorageError:
        """A connection that could not be made, or broke off."""
        import aiohttp

        kind: type[StorageError] = Transient
        reason, hint = f"the connection broke off ({type(error).__name__})", ""
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            kind, reason, hint = Unreachable, "TLS failed: its certificate was not accepted", _GONE
        elif isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            kind, reason, hint = Unreachable, f"no connection to {self.server.netloc}", _GONE
        elif isinstance(error, TimeoutError):
            kind, reason, hint = TimedOut, "the server was silent for too long", _GONE
        elif isinstance(error, OSError) and not isinstance(error, aiohttp.ClientError):
            return from_os_error(error, endpoint=self.name, path=path, side="target")
        return kind(f"{place(self.name, path)}: {reason}", hint=hint, endpoint=self.name, path=path)


_GONE = "check that the server runs, and that this machine may reach it"


def quoted(text: str, safe: str = "/") -> str:
    """As S3 signs it: everything but letters, digits and -_.~ as %XX."""
    return quote(text, safe=safe + "-_.~")


def when(text: str) -> datetime | None:
    """A time as S3 writes it: in headers by RFC 1123, in documents by ISO 8601."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = read(text)
        except ValueError:
            continue
        return found if found.tzinfo else found.replace(tzinfo=UTC)
    return None


def text_of(element: ElementTree.Element, name: str) -> str:
    """The text of a child, whatever namespace its server thinks right."""
    found = element.find(f"{{*}}{name}")
    return "" if found is None else found.text or ""


def _parsed(content: bytes) -> ElementTree.Element:
    # S3 has no use for a document type; entities that grow without end have.
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
        raise Transient("the server answered with a document type, which S3 never does")
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError:
        raise Transient("the server's answer is no XML") from None


def _code(content: bytes) -> str:
    """The code of an error document; empty for any other. An error may come with status 200, after a long copy."""
    if b"<Error" not in content[:1000]:
        return ""
    try:
        root = _parsed(content)
    except Transient:
        return ""
    return text_of(root, "Code") if root.tag.rpartition("}")[2] == "Error" else ""


class _Pieces:
    """A large body, piece by piece; from its beginning each time, for aiohttp sends a request again whose connection
    had been closed while it was idle."""

    def __init__(self, body: Piece | bytearray) -> None:
        self._view = memoryview(body)

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for begin in range(0, len(self._view), _PIECE_BYTES):
            yield self._view[begin : begin + _PIECE_BYTES]


def _signer() -> Any:
    global _Signer
    if _Signer is None:
        from botocore.auth import S3SigV4Auth

        class Signer(S3SigV4Auth):  # type: ignore[misc, unused-ignore]
            def payload(self, request: Any) -> str:
                """We know better than botocore what travels over which connection."""
                return str(request.context["payload"])

        _Signer = Signer
    return _Signer


_Signer: Any = None
