"""Webhooks: servers elsewhere that are told what happens."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import NOTHING, Call, at
from replica.client.http import SyncHttp


class Webhooks:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, webhook: wire.NewWebhook) -> wire.WebhookMade:
        """Its secret is shown this once."""
        return self._http.send(Call("POST", at("webhooks"), wire.WebhookMade, webhook))

    def list(self) -> Iterator[wire.Webhook]:
        return self._http.pages(Call("GET", at("webhooks"), wire.Page[wire.Webhook]))

    def show(self, name: str) -> wire.Webhook:
        return self._http.send(Call("GET", at("webhooks", name), wire.Webhook))

    def change(self, name: str, *, enabled: bool, from_now: bool = False) -> wire.Webhook:
        """`from_now`: leave out what happened while it was disabled."""
        change = wire.WebhookChange(enabled=enabled, from_now=from_now)
        return self._http.send(Call("PATCH", at("webhooks", name), wire.Webhook, change))

    def test(self, name: str) -> wire.Webhook:
        """Send it an event of its own; `show` tells what became of it."""
        return self._http.send(Call("POST", at("webhooks", name, "test"), wire.Webhook))

    def delete(self, name: str) -> None:
        self._http.send(Call("DELETE", at("webhooks", name), NOTHING))
