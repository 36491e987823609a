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

    def ban(self, name: str, ban: wire.Ban) -> wire.Endpoint:
        """Reading, writing or deleting is off from now on; all of it, if the ban names nothing."""
        return self._http.send(Call("POST", at("endpoints", name, "ban"), wire.Endpoint, ban, repeatable=True))

    def unban(self, name: str) -> wire.Endpoint:
        return self._http.send(Call("POST", at("endpoints", name, "unban"), wire.Endpoint, repeatable=True))

    def drain(self, name: str, reason: str = "", *, undo: bool = False) -> wire.Endpoint:
        """Nothing new goes there, and what is protected there is brought elsewhere."""
        drain = wire.Drain(reason=reason, undo=undo)
        return self._http.send(Call("POST", at("endpoints", name, "drain"), wire.Endpoint, drain, repeatable=True))

    def decommission(self, name: str, order: wire.Decommission | None = None) -> wire.Endpoint:
        """Out of service for good."""
        path = at("endpoints", name, "decommission")
        return self._http.send(Call("POST", path, wire.Endpoint, order or wire.Decommission(), repeatable=True))

    def links(self, source: str | None = None, target: str | None = None) -> Iterator[wire.Link]:
        """What is known of the ways between endpoints; any other is allowed, at distance 1."""
        query = {"source": source, "target": target}
        return self._http.pages(Call("GET", at("links"), wire.Page[wire.Link], query=query))

    def set_link(self, change: wire.LinkChange) -> wire.Link:
        return self._http.send(Call("PATCH", at("links"), wire.Link, change))

    def report_space(self, name: str, free_bytes: int) -> None:
        """What the storage says is free; for the workers of its site."""
        self._http.send(report_space(name, free_bytes))


def report_space(name: str, free_bytes: int) -> Call[None]:
    return Call("POST", at("endpoints", name, "space"), NOTHING, wire.Space(free_bytes=free_bytes), repeatable=True)
