"""Transfers: one file on its way to one endpoint."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import Call, at
from replica.client.http import SyncHttp
from rules.names import Did


class Transfers:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def list(
        self,
        state: str | None = None,
        rule: int | None = None,
        did: str | Did | None = None,
        site: str | None = None,
    ) -> Iterator[wire.Transfer]:
        query = {"state": state, "rule": rule, "did": None if did is None else str(did), "site": site}
        return self._http.pages(Call("GET", at("transfers"), wire.Page[wire.Transfer], query=query))

    def show(self, transfer: int) -> wire.Transfer:
        return self._http.send(Call("GET", at("transfers", transfer), wire.Transfer))

    def cancel(self, transfer: int) -> wire.Transfer:
        return self._http.send(Call("POST", at("transfers", transfer, "cancel"), wire.Transfer))

    def retry(self, transfer: int) -> wire.Transfer:
        """Try a failed one again, at once."""
        return self._http.send(Call("POST", at("transfers", transfer, "retry"), wire.Transfer))
