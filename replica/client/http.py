"""Short calls over http.client: a laptop needs nothing heavier.

Given     the server's URL and a token.
Returns   the typed answer of a Call, the items of a paged list, or the lines of a stream.
Promises  errors are those of rules.errors; no answer at all is Unavailable. A connection that the server dropped while
          it was idle is replaced without anybody noticing; a call is sent a second time only when that cannot have
          a second effect. The token goes to the server it was given for and nowhere else: redirects are not followed.
Partner   replica.api answers; replica.client.aio is the same for asyncio.
"""

from __future__ import annotations

import http.client
import select
import socket
import threading
import uuid
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from replica import wire
from replica.client.calls import Call, next_page
from replica.client.problems import error_from
from rules.errors import Invalid, ReplicaError, Unavailable
from rules.names import shown

T = TypeVar("T")

#: Longer than any statement may take on the server, so that it is the server that says why.
TIMEOUT_SECONDS = 150.0
CONNECT_SECONDS = 10.0
NDJSON = "application/x-ndjson"
#: What a dropped or refused connection looks like from here.
_LOST = (http.client.HTTPException, OSError)


class SyncHttp:
    """Keeps one connection a thread, for as long as the server does."""

    def __init__(self, server: str, token: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.server, self._tls, self._host, self._port, self._prefix = parse_server(server)
        self._token = checked_token(token)
        self._timeout = timeout_seconds
        self._mine = threading.local()
        #: Of all threads; a thread that ends takes its own along.
        self._all: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()

    def send(self, call: Call[T]) -> T:
        """The answer, or the error that the server sent."""
        headers = {"Accept": "application/json"}
        if call.creates:
            headers["Idempotency-Key"] = str(uuid.uuid4())
        for last in (not call.safe_to_repeat, True):
            try:
                response = self._begin(call, headers)
                body = response.read()
                break
            except TimeoutError as error:
                self._drop()
                raise self._unreachable(error) from error
            except _LOST as error:
                self._drop()
                if last:
                    raise self._unreachable(error) from error
        return self._understood(call, response, body)

    def pages(self, call: Call[wire.Page[T]]) -> Iterator[T]:
        """All items, following the cursors."""
        while True:
            page = self.send(call)
            yield from page.items
            if page.next is None:
                return
            call = next_page(call, page.next)

    def lines(self, call: Call[T]) -> Iterator[T]:
        """The items of a stream as they come. Unavailable when it ends without its trailer or with a wrong count."""
        # A stream has a connection of its own: who stops reading in the middle spoils it for nobody.
        stream = SyncHttp(self.server, self._token, timeout_seconds=self._timeout)
        try:
            response = stream._begin(call, {"Accept": NDJSON})
            media_type = response.headers.get("Content-Type", "")
            if response.status != 200 or not media_type.startswith(NDJSON):
                raise error_from(response.status, media_type, response.read(), self.server)
            reader = LineReader(call)
            for line in response:
                if (item := reader.item(line)) is not None:
                    yield item
            reader.end()
        except _LOST as error:
            raise self._unreachable(error) from error
        finally:
            stream.close()

    def stream(self, call: Call[Any], headers: dict[str, str]) -> Iterator[bytes]:
        """The lines of an answer that comes bit by bit; Unavailable when it is cut off, nothing when it ends."""
        stream = SyncHttp(self.server, self._token, timeout_seconds=self._timeout)
        try:
            response = stream._begin(call, headers)
            media_type = response.headers.get("Content-Type", "")
            if response.status != 200 or not media_type.startswith(headers["Accept"]):
                raise error_from(response.status, media_type, response.read(), self.server)
            yield from response
        except _LOST as error:
            raise self._unreachable(error) from error
        finally:
            stream.close()

    def close(self) -> None:
        for connection in list(self._all):
            connection.close()
        self._mine = threading.local()

    def _begin(self, call: Call[Any], headers: dict[str, str]) -> http.client.HTTPResponse:
        """Send, and wait for the head of the answer."""
        headers = headers | {"User-Agent": "replica"} | call.conditions()
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        body = call.encoded()
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection = self._connection()
        except OSError as error:  # nothing was sent, and a second try in the same moment would meet the same
            raise self._unreachable(error) from error
        connection.request(call.method, self._prefix + call.target(), body, headers)
        return connection.getresponse()

    def _understood(self, call: Call[T], response: http.client.HTTPResponse, body: bytes) -> T:
        if not 200 <= response.status < 300:
            raise error_from(response.status, response.headers.get("Content-Type", ""), body, self.server)
        try:
            return call.decoded(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(
                f"{self.server} answered something that Replica does not",
                hint="check the server's URL, and that client and server are of compatible releases",
            ) from error

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        if connection is not None and connection.sock is not None and _closed_by_peer(connection.sock):
            self._drop()
            connection = None
        if connection is None:
            kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
            connection = kind(self._host, self._port, timeout=min(CONNECT_SECONDS, self._timeout))
            connection.connect()
            connection.sock.settimeout(self._timeout)
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._mine.connection = connection
            self._all.add(connection)
        return connection

    def _drop(self) -> None:
        connection: http.client.HTTPConnection | None = getattr(self._mine, "connection", None)
        if connection is not None:
            connection.close()
            del self._mine.connection

    def _unreachable(self, error: BaseException) -> ReplicaError:
        return unreachable(self.server, error)


class LineReader:
    """Lines of NDJSON into items; knows whether the end was the end."""

    def __init__(self, call: Call[Any]) -> None:
        self._decode = msgspec.json.Decoder(call.answer).decode
        self._seen = 0
        self._said: int | None = None

    def item(self, line: bytes) -> Any:
        """The item of this line; None for the trailer."""
        if not line.endswith(b"\n") or self._said is not None:
            raise self._cut()
        if line.startswith(b'{"end":'):
            self._said = msgspec.json.decode(line, type=Trailer).count
            return None
        self._seen += 1
        try:
            return self._decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._cut() from error

    def end(self) -> None:
        if self._said != self._seen:
            raise self._cut()

    def _cut(self) -> ReplicaError:
        return Unavailable(
            f"the list was cut off after {self._seen} items", hint="repeat the request; what came is incomplete"
        )


class Trailer(msgspec.Struct):
    """The last line of every stream."""

    end: bool
    count: int


def parse_server(server: str) -> tuple[str, bool, str, int, str]:
    """The URL without a slash at its end, TLS or not, host, port, and the path before `/api`."""
    wrong = Invalid(
        f"{shown(server) if '@' not in server else 'what was given'} is not the URL of a server",  # no password in it
        hint="write it like https://replica.example:8570",
        field="server",
    )
    try:
        parts = urlsplit(server)
        port = parts.port
    except ValueError as error:
        raise wrong from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise wrong
    tls = parts.scheme == "https"
    return server.rstrip("/"), tls, parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/")


def checked_token(token: str | None) -> str | None:
    """White space around it is forgiven (a file's last newline); anything that could end the header is not."""
    if token is None:
        return None
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise Invalid("the token holds characters that no token has", hint="copy it again, in one line", field="token")
    return token


def unreachable(server: str, error: BaseException) -> ReplicaError:
    if isinstance(error, ReplicaError):
        return error
    if isinstance(error, TimeoutError):
        reason = "did not answer in time"
    elif isinstance(error, ConnectionRefusedError):
        reason = "refuses the connection: nothing listens there"
    elif isinstance(error, socket.gaierror):
        reason = "has a host name that is not known"
    else:
        reason = f"broke the connection ({type(error).__name__})"
    return Unavailable(
        f"the server {server} {reason}", hint="is it running? `replica serve` or `replica up` starts one"
    )


def _closed_by_peer(sock: socket.socket) -> bool:
    """An idle connection that has something to read has been closed (or is out of step): not to be used again."""
    try:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return True
