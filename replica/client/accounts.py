"""Accounts: who may sign in, and in which role."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import Call, at
from replica.client.http import SyncHttp


class Accounts:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, account: wire.NewAccount) -> wire.Account:
        return self._http.send(Call("POST", at("accounts"), wire.Account, account, creates=True))

    def list(self) -> Iterator[wire.Account]:
        return self._http.pages(Call("GET", at("accounts"), wire.Page[wire.Account]))

    def show(self, name: str) -> wire.Account:
        return self._http.send(Call("GET", at("accounts", name), wire.Account))

    def key(self, name: str) -> wire.AccountToken:
        """A new token of this account; the server shows it this once."""
        return self._http.send(Call("POST", at("accounts", name, "tokens"), wire.AccountToken))
