"""HTTP to one storage: pooled connections, its credentials, redirects followed by hand.

Given     the storage's URL and its settings from the credentials file.
Returns   `request(method, url)`: the response of the server that finally answered, or a StorageError.
Promises  a secret goes to the storage's own scheme, host and port, and there only beneath its folder; a redirect leads
          to that host or to one that the settings name, never from https to http; plain http only to this machine, or
          if the settings say `insecure = "yes"`; every wait is bounded; nothing is sent twice but a request that may be
          (see `request`), once, when the server closed an idle connection under it.
Partner   replica.storage.webdav is the verbs; replica.storage.http_faults names what went wrong.

Settings read here, all optional:

    token, token_file             a bearer token
    user, password(_file)         or a name and password
    ca_file                       certificates of the authorities to trust, besides the system's (PEM)
    redirects                     further hosts this server may send us to: "pool1.example.org pool2.example.org:8443"
    quiet_seconds                 how long the server may be silent; without it 120 before an answer, 60 within
    digest_seconds                how long it may compute a digest: 3600
    insecure = "yes"              plain http to another machine: bytes and secrets can be read and changed on the way

Connections belong to an event loop, a storage does not: every loop that asks gets a pool of its own, made at its first
request, and forgotten when that loop is closed. `close` ends the pool of the loop it is called in, and those of loops
that still run in other threads. The pools have no limit of their own: a copy within one storage needs two connections
at once, and with a limit enough of them would wait for each other for ever; who starts copies limits them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import math
import ssl
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from http import HTTPStatus
from types import SimpleNamespace
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

import aiohttp
from yarl import URL

from replica.storage.base import Party
from replica.storage.credentials import Settings, seconds_in, secret
from replica.storage.faults import place
from replica.storage.http_body import Body
from replica.storage.http_faults import refused, translated_http
from replica.storage.http_quick import SMALL_BYTES, Quick
from rules.errors import Forbidden, Invalid, StorageError, Transient
from rules.names import shown

#: Shorter than Apache's KeepAliveTimeout of 5 s: a connection is given up by us, not under a request of ours.
_IDLE_SECONDS = 4.0
_REDIRECTS_MAX = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
#: May be sent again, if the first one met a connection that the server had closed.
_IDEMPOTENT = frozenset({"GET", "HEAD", "PROPFIND", "DELETE", "OPTIONS"})
#: May be answered by another host. The others change names, and a name is the storage's own.
_MAY_LEAVE = frozenset({"GET", "HEAD", "PUT"})
#: Their answers are short, or nobody wants them.
_SMALL_ANSWERS = frozenset({"HEAD", "PUT", "MKCOL", "MOVE", "DELETE"})
_COMMON = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "replica"}
_PORTS = {"https": 443, "http": 80}
_REASON_BYTES_MAX = 2048
READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Timeouts:
    connect: float = 30.0
    first_byte: float = 120.0  #: between the end of a request and the beginning of its answer
    between: float = 60.0  #: without 64 KiB received, or without 1 MiB taken by the server
    digest: float = 3600.0  #: a server that reads a large file to compute one
    expect: float = 5.0  #: for "100 Continue", before the body is sent without it

    @classmethod
    def of(cls, settings: Settings) -> Timeouts:
        """As the settings say; where they say nothing, as above."""
        usual, quiet, digest = cls(), seconds_in(settings, "quiet_seconds"), seconds_in(settings, "digest_seconds")
        if quiet is None:
            return usual if digest is None else replace(usual, digest=digest)
        return cls(
            connect=min(usual.connect, quiet),
            first_byte=quiet,
            between=quiet,
            digest=digest or usual.digest,
            expect=min(usual.expect, quiet),
        )


@dataclass(slots=True)
class Pool:
    """What belongs to one event loop."""

    session: aiohttp.ClientSession
    #: For small requests, past it.
    quick: Quick
    #: See `Webdav.present`: the question that is being asked, and the one that will be asked after it.
    asking: asyncio.Task[StorageError | None] | None = None
    to_ask: asyncio.Task[StorageError | None] | None = None
    #: By the monotonic clock: when the last question was asked that was answered well.
    present_at: float = -math.inf
    #: See `Claims.server_looks`.
    trying: asyncio.Task[bool | None] | None = None
    background: set[asyncio.Task[None]] = field(default_factory=set)


class Http:
    def __init__(self, url: str, settings: Settings, *, name: str = "", timeouts: Timeouts | None = None) -> None:
        split = urlsplit(url)
        self.name = name
        self.timeouts = timeouts or Timeouts.of(settings)
        self._settings = settings
        self.scheme = "https" if split.scheme in ("https", "davs") else "http"
        self.origin = _origin(split._replace(scheme=self.scheme))
        #: host:port, as a key.
        self.host = f"{self.origin[1]}:{self.origin[2]}"
        self.base_path = quote(unquote(split.path).rstrip("/"), safe="/~")
        #: The root, percent-encoded, without a slash at its end.
        self.base = f"{self.scheme}://{split.netloc}{self.base_path}"
        self._elsewhere = _hosts(settings.get("redirects", ""))
        self._insecure = settings.get("insecure", "").lower() == "yes"
        self._has_secret = not settings.keys().isdisjoint(("token", "token_file", "user"))
        self._ssl: ssl.SSLContext | None = None
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}
        self._lock = threading.Lock()
        #: What the server calls itself.
        self.server = "?"
        #: Whether the server sends "100 Continue" as it should; None: nobody has tried.
        self.continues: bool | None = None

    def __repr__(self) -> str:
        return f"<Http {self.base}>"

    # ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def request(
        self,
        method: str,
        url: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Body | None = None,
        seconds: float | None = None,
        resend: bool | None = None,
        quick: bool | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The final response to a request, whatever its status; `path` is for messages.

        `quick`: the answer is small (None: that of such a method always is).
        `resend`: it may be sent twice (None: GET and its like may). A Body is never sent twice once a piece was taken.
        """
        may_resend = method in _IDEMPOTENT if resend is None else resend
        quick = method in _SMALL_ANSWERS if quick is None else quick
        with translated_http(self.name, path, method):
            try:
                response = await self._follow(method, url, path, dict(headers or {}), body, seconds, may_resend, quick)
                try:
                    yield response
                finally:
                    response.release()  # closes the connection if the body was not read to its end
            finally:
                if isinstance(body, Body):
                    await body.over()

    async def check(self, response: aiohttp.ClientResponse, path: str, *good: int) -> None:
        """Raise what the status means, unless it is one of `good`."""
        if response.status not in good:
            raise await self.refusal(response, path)

    async def refusal(self, response: aiohttp.ClientResponse, path: str) -> StorageError:
        return refused(
            response.status,
            response.method,
            endpoint=self.name,
            path=path,
            reason=await self._reason(response),
            retry_after=response.headers.get("Retry-After", ""),
        )

    async def _reason(self, response: aiohttp.ClientResponse) -> str:
        """What a server said in plain text, in one short line; pages for browsers are left out."""
        text = ""
        if response.content_type == "text/plain" and response.method != "HEAD":
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                text = (await response.content.read(_REASON_BYTES_MAX)).decode(errors="replace")
        line = " ".join(text.split())
        for key in ("token", "password"):
            hidden = secret(self._settings, key)
            if hidden:
                line = line.replace(hidden, "…")
        if not line:
            with contextlib.suppress(ValueError):
                line = HTTPStatus(response.status).phrase
        return "".join(c for c in line if c.isprintable())[:200]

    async def _follow(
        self,
        method: str,
        url: str,
        path: str,
        headers: dict[str, str],
        body: bytes | Body | None,
        seconds: float | None,
        may_resend: bool,
        quick: bool,
    ) -> aiohttp.ClientResponse:
        for _ in range(_REDIRECTS_MAX + 1):
            response = await self._send(method, url, path, headers, body, seconds, may_resend, quick)
            self.server = response.headers.get("Server", "")
            if response.status not in _REDIRECTS or "Location" not in response.headers:
                return response
            location = urljoin(url, response.headers["Location"])
            response.release()
            self._permit(method, url, location, response.status, path)
            if isinstance(body, Body) and body.started:
                raise Transient(
                    f"{place(self.name, path)}: the server sent us elsewhere after it had taken a part of the body",
                    endpoint=self.name,
                    path=path,
                )
            url = location
        raise Transient(
            f"{place(self.name, path)}: more than {_REDIRECTS_MAX} redirects", endpoint=self.name, path=path
        )

    async def _send(
        self,
        method: str,
        url: str,
        path: str,
        headers: dict[str, str],
        body: bytes | Body | None,
        seconds: float | None,
        may_resend: bool,
        quick: bool,
    ) -> aiohttp.ClientResponse:
        self._refuse_plain(url, path)
        session = self.pool().session
        more = self._authorization(url, path) | headers
        if method == "DELETE" and self.server.startswith(("XrootD", "?")):
            # XRootD 5 closes after a DELETE of nothing, though it says it keeps alive: the next MOVE would fail.
            more["Connection"] = "close"
        expect = isinstance(body, Body) and self.continues is not False
        quick = quick and not isinstance(body, Body) and len(body or b"") <= SMALL_BYTES and self._is_beneath(url)
        for again in (False, True):
            used = SimpleNamespace(reused=False)
            wait = self.timeouts.connect + (seconds or self.timeouts.first_byte)
            try:
                async with asyncio.timeout(
                    self.timeouts.connect + self.timeouts.expect if expect else wait
                ) as deadline:
                    if isinstance(body, Body):
                        body.watch(deadline, self.timeouts.between, seconds or self.timeouts.first_byte)
                        more["Content-Length"] = str(body.size_bytes)
                    elif quick and (answer := await self.pool().quick.ask(method, url, _COMMON | more, body, used)):
                        return answer
                    return await session.request(
                        method,
                        URL(url, encoded=True),
                        headers=more,
                        data=body.pieces() if isinstance(body, Body) else body,
                        expect100=expect,
                        allow_redirects=False,
                        trace_request_ctx=used,
                    )
            except (TimeoutError, aiohttp.ClientError) as error:
                if isinstance(body, Body):
                    if body.error is not None:
                        raise body.error from None
                    if body.started:
                        raise
                    if expect and not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
                        # It sends none. Nothing of the body was taken.
                        expect = self.continues = False
                        continue
                stale = used.reused and isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError))
                if again or not stale or not (may_resend or isinstance(body, Body)):
                    raise
        raise AssertionError("unreachable")

    # ── who may see what ─────────────────────────────────────────────────────────────────────────────────────────────

    def _is_beneath(self, url: str) -> bool:
        """Written just as the storage's own URL; what is not may still be `is_own`."""
        return (url + "/").startswith(self.base + "/")

    def is_own(self, url: str) -> bool:
        """Within the storage: the only place its secrets are sent to."""
        split = urlsplit(url)
        beneath = (split.path + "/").startswith(self.base_path + "/") and "/../" not in unquote(split.path + "/")
        return _origin(split) == self.origin and beneath

    def party(self, url: str, path: str) -> Party:
        """For a third-party copy, which replica.storage.thirdparty sends itself: one end of it, with its secrets."""
        self._refuse_plain(url, path)
        elsewhere = frozenset(host if port is None else f"{host}:{port}" for host, port in self._elsewhere)
        return Party(url, self.pool().session, self._authorization(url, path), elsewhere)

    def _authorization(self, url: str, path: str) -> dict[str, str]:
        if not (self._has_secret and self.is_own(url)):
            return {}
        try:
            if token := secret(self._settings, "token"):
                return {"Authorization": f"Bearer {token}"}
            if user := self._settings.get("user"):
                pair = f"{user}:{secret(self._settings, 'password') or ''}".encode()
                return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}
        except Invalid as error:
            raise self._forbidden(path, error.message, error.hint) from None
        return {}

    def _permit(self, method: str, url: str, location: str, status: int, path: str) -> None:
        """May a redirect be followed? Messages name the host it led to, not the address: that may hold a secret."""
        try:
            split = urlsplit(location)
            origin = _origin(split)
        except ValueError:
            raise self._forbidden(path, "the server sent us to an address that cannot be read") from None
        where = f"the server sent us to {shown(split.hostname or '?')} with status {status}"
        if split.scheme not in _PORTS or "@" in split.netloc:
            raise self._forbidden(path, f"{where}, by {split.scheme or 'no'} address: not followed")
        if split.scheme == "http" and urlsplit(url).scheme == "https":
            raise self._forbidden(path, f"{where}, from https to http: not followed")
        if status == HTTPStatus.SEE_OTHER and method not in ("GET", "HEAD"):
            raise self._forbidden(path, f"{where} after {method}: not followed")
        if origin == self.origin:
            return
        host, port = origin[1], origin[2]
        if method not in _MAY_LEAVE or not ({(host, port), (host, None)} & self._elsewhere):
            raise self._forbidden(
                path,
                f"{where}: not followed",
                "if that host belongs to the storage, name it in `redirects` of the credentials file of this worker",
            )

    def _refuse_plain(self, url: str, path: str) -> None:
        if url.startswith("https://") or (self._is_beneath(url) and _is_this_machine(self.origin[1])):
            return
        split = urlsplit(url)
        if split.scheme == "http" and not self._insecure and not _is_this_machine(split.hostname or ""):
            raise self._forbidden(
                path,
                f"plain http to {shown(split.hostname or '?')} is refused: bytes and secrets could be read and changed",
                'use https, or say insecure = "yes" in the credentials file of this worker',
            )

    def _forbidden(self, path: str, reason: str, hint: str = "") -> Forbidden:
        return Forbidden(f"{place(self.name, path)}: {reason}", hint=hint, endpoint=self.name, path=path)

    # ── the pools ────────────────────────────────────────────────────────────────────────────────────────────────────

    def pool(self) -> Pool:
        loop = asyncio.get_running_loop()
        found = self._pools.get(loop)
        if found is None or found.session.closed:
            with self._lock:
                for other in [other for other in self._pools if other.is_closed()]:
                    self._pools.pop(other).session.detach()  # its connections ended with its loop
                quick = Quick(self.base, self._trust(), idle_seconds=_IDLE_SECONDS)
                found = self._pools[loop] = Pool(self._open(), quick)
        return found

    def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS, ssl=self._trust())
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self.timeouts.connect, sock_read=self.timeouts.between
            ),
            auto_decompress=False,  # bytes are bytes: a server that compresses them is refused
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=_COMMON,
            read_bufsize=READ_BYTES,
            trace_configs=[tracing],
        )
        # aiohttp would send a PUT again whose body is consumed. What may be sent twice is decided here.
        session._retry_connection = False
        return session

    def _trust(self) -> ssl.SSLContext | bool:
        if self.scheme == "http" and not self._elsewhere:
            return True
        if self._ssl is None:
            self._ssl = ssl.create_default_context()
            ca_file = self._settings.get("ca_file")
            if ca_file:
                try:
                    self._ssl.load_verify_locations(cafile=ca_file)
                except OSError as error:  # SSLError is one
                    raise Forbidden(
                        f"endpoint {self.name or self.base}: ca_file {shown(ca_file)} cannot be read: {error.strerror}",
                        hint="it is a PEM file; the credentials file of this worker names it",
                        endpoint=self.name,
                    ) from None
        return self._ssl

    async def close(self) -> None:
        with self._lock:
            pools, self._pools = self._pools, {}
        mine = asyncio.get_running_loop()
        for loop, pool in pools.items():
            if loop is mine:
                pool.quick.close()
                await pool.session.close()
            elif loop.is_running():
                loop.call_soon_threadsafe(pool.quick.close)
                asyncio.run_coroutine_threadsafe(pool.session.close(), loop)
            else:
                pool.session.detach()


async def _note_reuse(_: aiohttp.ClientSession, context: SimpleNamespace, __: object) -> None:
    if (used := context.trace_request_ctx) is not None:
        used.reused = True


def _origin(split: SplitResult) -> tuple[str, str, int | None]:
    return split.scheme, (split.hostname or "").lower(), split.port or _PORTS.get(split.scheme)


def _hosts(text: str) -> frozenset[tuple[str, int | None]]:
    """host or host:port, separated by spaces or commas; without a port, any port."""
    hosts = set()
    for item in text.replace(",", " ").split():
        split = urlsplit(f"//{item}")
        try:
            hosts.add(((split.hostname or "").lower(), split.port))
        except ValueError:
            raise Invalid(
                f"{shown(item)} in `redirects` of the credentials file is not host or host:port",
                hint='redirects = "pool1.example.org pool2.example.org:8443"',
            ) from None
    return frozenset(hosts)


@lru_cache(maxsize=1000)
def _is_this_machine(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
