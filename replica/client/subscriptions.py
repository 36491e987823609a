"""Subscriptions: rules for all data that fulfil a condition."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import NOTHING, Call, at
from replica.client.http import SyncHttp


class Subscriptions:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, subscription: wire.NewSubscription) -> wire.Subscription:
        return self._http.send(Call("POST", at("subscriptions"), wire.Subscription, subscription, creates=True))

    def list(self) -> Iterator[wire.Subscription]:
        return self._http.pages(Call("GET", at("subscriptions"), wire.Page[wire.Subscription]))

    def show(self, name: str) -> wire.Subscription:
        return self._http.send(Call("GET", at("subscriptions", name), wire.Subscription))

    def preview(self, subscription: str | wire.NewSubscription, *, limit: int = 20) -> wire.SubscriptionPreview:
        """What it would make for what exists: of one that there is, by its name, or of one that may be."""
        query = {"limit": limit}
        if isinstance(subscription, str):
            path = at("subscriptions", subscription, "preview")
            return self._http.send(Call("GET", path, wire.SubscriptionPreview, query=query))
        path = at("subscriptions", "preview")
        call = Call("POST", path, wire.SubscriptionPreview, subscription, query=query, repeatable=True)
        return self._http.send(call)

    def change(self, name: str, change: wire.SubscriptionChange) -> wire.Subscription:
        return self._http.send(Call("PATCH", at("subscriptions", name), wire.Subscription, change))

    def backfill(self, name: str) -> wire.Subscription:
        """Let it look at all that exist."""
        path = at("subscriptions", name, "backfill")
        return self._http.send(Call("POST", path, wire.Subscription, repeatable=True))

    def delete(self, name: str) -> None:
        self._http.send(Call("DELETE", at("subscriptions", name), NOTHING))
