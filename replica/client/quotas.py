"""Quotas and usage: how much accounts may hold where, and what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from replica import wire
from replica.client.calls import NOTHING, Call, at
from replica.client.http import SyncHttp


class Quotas:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def set(self, quota: wire.NewQuota) -> wire.Quota:
        """The account's quota with the same expression gets the new limit."""
        return self._http.send(Call("POST", at("quotas"), wire.Quota, quota, repeatable=True))

    def list(self, account: str | None = None) -> Iterator[wire.Quota]:
        return self._http.pages(Call("GET", at("quotas"), wire.Page[wire.Quota], query={"account": account}))

    def show(self, quota: int) -> wire.Quota:
        return self._http.send(Call("GET", at("quotas", quota), wire.Quota))

    def remove(self, quota: int) -> None:
        self._http.send(Call("DELETE", at("quotas", quota), NOTHING))


class Usage:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def list(
        self,
        account: str | None = None,
        endpoint: str | None = None,
        by: Literal["account", "endpoint"] | None = None,
    ) -> Iterator[wire.Usage]:
        """What is held now at the endpoints the expression selects; with `by`, totals."""
        query = {"account": account, "endpoint": endpoint, "by": by}
        return self._http.pages(Call("GET", at("usage"), wire.Page[wire.Usage], query=query))

    def history(
        self, account: str | None = None, endpoint: str | None = None, since: datetime | None = None
    ) -> Iterator[wire.UsageThen]:
        query = {"account": account, "endpoint": endpoint, "since": since}
        return self._http.pages(Call("GET", at("usage", "history"), wire.Page[wire.UsageThen], query=query))
