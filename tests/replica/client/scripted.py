"""A server that does exactly what a test tells it, for what a healthy one never does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Instead of an answer: close the connection, or say nothing until the client gives up.
CLOSE = b"close"
SILENCE = b"silence"


@dataclass
class Scripted:
    """`answers`: one for each request, in the order in which they come."""

    answers: list[bytes]
    requests: list[bytes] = field(default_factory=list)
    port: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self, listener: socket.socket) -> None:
        while not self._over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while request := _request(connection):
                self.requests.append(request)
                answer = self.answers.pop(0) if self.answers else CLOSE
                if answer == SILENCE:
                    self._over.wait(30)
                if answer in (CLOSE, SILENCE):
                    return
                connection.sendall(answer)
                if b"Connection: close" in answer or b"X-Then: close" in answer:
                    return

    def stop(self) -> None:
        self._over.set()


@contextlib.contextmanager
def scripted(*answers: bytes) -> Iterator[Scripted]:
    server = Scripted(list(answers))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.port = listener.getsockname()[1]
        thread = threading.Thread(target=server.serve, args=(listener,), daemon=True)
        thread.start()
        yield server
        server.stop()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def answer(body: bytes, status: str = "200 OK", media_type: str = "application/json", *headers: str) -> bytes:
    more = "".join(f"{header}\r\n" for header in headers)
    head = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def chunked(*parts: bytes, end: bool = True) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if end else b"")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
    return head + b"Connection: close\r\n\r\n" + body


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:")), 0)
    while len(body) < length:
        part = connection.recv(65536)
        if not part:
            return b""
        body += part
    return head + b"\r\n\r\n" + body
