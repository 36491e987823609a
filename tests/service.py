"""The REST service, listening for real: in a thread with a loop of its own, over the database of a test."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from replica import log, wire
from replica.api.app import create_app, start
from replica.catalog import accounts, sites
from replica.client import Client
from replica.db import tables
from replica.db.engine import Database

SITE = "DESY"


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Service:
    """A running service, a token for each role, and two ways to speak to it."""

    host: str
    port: int
    admin: str
    user: str
    worker: str

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def client(self, token: str | None = None) -> Client:
        return Client(self.url, token or self.admin)

    def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        token: str | None = "admin",
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """As it is written, without a client that would mend it. `token`: a role, a token, or None."""
        more = dict(headers or {})
        if token is not None:
            more.setdefault("Authorization", f"Bearer {getattr(self, token, token)}")
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            more.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        try:
            connection.request(method, target, body, more)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        """Bytes there, all bytes back until the server closes; ask it to with `Connection: close`."""
        with socket.create_connection((self.host, self.port), timeout=30) as connection:
            connection.sendall(request)
            parts = []
            while part := connection.recv(65536):
                parts.append(part)
            return b"".join(parts)


async def _end_others() -> None:
    """As asyncio.run does at its end: aiohttp goes on a while for a client that left in the middle of a body."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@contextlib.contextmanager
def listening(app: Any, port: int = 0) -> Iterator[tuple[str, int]]:
    """An application served on loopback for the time of the block."""
    log.configure("info")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    try:
        runner, port = run(start(app, "127.0.0.1", port))
        try:
            yield "127.0.0.1", port
        finally:
            run(runner.cleanup())
            run(_end_others())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def serving(db: Database, **settings: Any) -> Iterator[Service]:
    """The service over a migrated database, which gets an administrator, a user, a site and its worker."""
    with db.write() as s:
        accounts.bootstrap(s)
        s.execute(sa.insert(tables.accounts).values(name="alice", role="user", created_at=s.now))
        sites.add(s, wire.NewSite(name=SITE))
        admin = accounts.issue_token(s, account="root", label="test")
        user = accounts.issue_token(s, account="alice", label="test")
        worker = sites.issue_token(s, SITE).token
    with listening(create_app(db, **settings)) as (host, port):
        yield Service(host, port, admin, user, worker)
