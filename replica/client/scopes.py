"""Scopes: the first part of a DID, owned by an account."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import Call, at
from replica.client.http import SyncHttp


class Scopes:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, name: str) -> wire.Scope:
        return self._http.send(Call("POST", at("scopes"), wire.Scope, wire.NewScope(name=name), creates=True))

    def show(self, name: str) -> wire.Scope:
        return self._http.send(Call("GET", at("scopes", name), wire.Scope))

    def list(self) -> Iterator[wire.Scope]:
        return self._http.pages(Call("GET", at("scopes"), wire.Page[wire.Scope]))
