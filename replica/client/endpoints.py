"""Endpoints: the places that store."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import NOTHING, Call, at
from replica.client.http import SyncHttp


class Endpoints:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, endpoint: wire.NewEndpoint) -> wire.Endpoint:
        return self._http.send(Call("POST", at("endpoints"), wire.Endpoint, endpoint, creates=True))

    def list(self, where: str | None = None) -> Iterator[wire.Endpoint]:
        """Those that the expression `where` selects; all without one."""
        return self._http.pages(Call("GET", at("endpoints"), wire.Page[wire.Endpoint], query={"where": where}))

    def show(self, name: str) -> wire.Endpoint:
        return self._http.send(Call("GET", at("endpoints", name), wire.Endpoint))

    def change(self, name: str, change: wire.EndpointChange) -> wire.Endpoint:
        return self._http.send(Call("PATCH", at("endpoints", name), wire.Endpoint, change))

    def report_space(self, name: str, free_bytes: int) -> None:
        """What the storage says is free; for the workers of its site."""
        self._http.send(report_space(name, free_bytes))


def report_space(name: str, free_bytes: int) -> Call[None]:
    return Call("POST", at("endpoints", name, "space"), NOTHING, wire.Space(free_bytes=free_bytes), repeatable=True)
