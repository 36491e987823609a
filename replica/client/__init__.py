"""Replica for programs: the verbs of the command line, with typed results.

Given     the server's URL and a token.
Returns   Client (at once) and AsyncClient (asyncio, what a worker needs); structs of replica.wire.
Promises  errors are those of rules.errors. Importing this imports no database, no broker, and no aiohttp before
          AsyncClient is asked for.
Partner   replica.api answers.

    with Client("http://127.0.0.1:8570", token) as client:
        rule = client.rules.add(wire.NewRule(did="p1:raw", expression="kind=disk", copies=2, spread="site"))
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from replica import wire
from replica.client.accounts import Accounts
from replica.client.calls import Call, at
from replica.client.deletions import Deletions
from replica.client.dids import Dids
from replica.client.endpoints import Endpoints
from replica.client.events import Events
from replica.client.http import TIMEOUT_SECONDS, SyncHttp
from replica.client.integrity import Integrity
from replica.client.limits import Limits
from replica.client.orders import Orders
from replica.client.quotas import Quotas, Usage
from replica.client.replicas import Replicas
from replica.client.rules import Rules
from replica.client.scans import Scans
from replica.client.scopes import Scopes
from replica.client.sites import Sites
from replica.client.subscriptions import Subscriptions
from replica.client.transfers import Transfers
from replica.client.webhooks import Webhooks

if TYPE_CHECKING:
    from replica.client.aio import AsyncClient

__all__ = ["AsyncClient", "Client"]

T = TypeVar("T")


class Client:
    """One server, one token; may be used by several threads."""

    def __init__(self, server: str, token: str | None = None, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._http = SyncHttp(server, token, timeout_seconds=timeout_seconds)
        self.accounts = Accounts(self._http)
        self.quotas = Quotas(self._http)
        self.usage = Usage(self._http)
        self.sites = Sites(self._http)
        self.endpoints = Endpoints(self._http)
        self.limits = Limits(self._http)
        self.scopes = Scopes(self._http)
        self.dids = Dids(self._http)
        self.replicas = Replicas(self._http)
        self.integrity = Integrity(self._http)
        self.rules = Rules(self._http)
        self.transfers = Transfers(self._http)
        self.deletions = Deletions(self._http)
        self.scans = Scans(self._http)
        self.orders = Orders(self._http)
        self.events = Events(self._http)
        self.subscriptions = Subscriptions(self._http)
        self.webhooks = Webhooks(self._http)

    @property
    def server(self) -> str:
        return self._http.server

    def whoami(self) -> wire.Whoami:
        return self._http.send(Call("GET", at("whoami"), wire.Whoami))

    def ready(self) -> None:
        """Returns when the server can work; else Unavailable with the reason and the remedy."""
        self._http.send(Call("GET", "/readyz", wire.Health))

    def send(self, call: Call[T]) -> T:
        return self._http.send(call)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":
        from replica.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
