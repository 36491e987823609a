"""Sites: institutes whose workers carry out transfers."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import Call, at
from replica.client.http import SyncHttp


class Sites:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, name: str) -> wire.Site:
        return self._http.send(Call("POST", at("sites"), wire.Site, wire.NewSite(name=name), creates=True))

    def list(self) -> Iterator[wire.Site]:
        return self._http.pages(Call("GET", at("sites"), wire.Page[wire.Site]))

    def show(self, name: str) -> wire.Site:
        return self._http.send(Call("GET", at("sites", name), wire.Site))

    def key(self, name: str) -> wire.SiteToken:
        """A new token for the workers of this site; the server shows it this once."""
        return self._http.send(Call("POST", at("sites", name, "tokens"), wire.SiteToken))
