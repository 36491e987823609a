"""Limits: how much may be in flight at once; activities: who gets which part of it."""

from __future__ import annotations

from replica import wire
from replica.client.calls import Call, at
from replica.client.http import SyncHttp


class Limits:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def set(self, change: wire.LimitChange) -> wire.Limit:
        return self._http.send(Call("PATCH", at("limits"), wire.Limit, change))

    def activities(self) -> list[wire.Activity]:
        """Those whose weight was set."""
        return self._http.send(Call("GET", at("activities"), wire.Activities)).items

    def set_weight(self, activity: str, weight: int) -> wire.Activity:
        share = wire.NewActivity(name=activity, weight=weight)
        return self._http.send(Call("PATCH", at("activities"), wire.Activity, share))

    def history(self, kind: str, of: str, source: str | None = None, limit: int = 100) -> list[wire.LimitDecision]:
        """How what adapts was changed lately, and why, newest first."""
        words = {"kind": kind, "of": of, "source": source, "limit": limit}
        return self._http.send(Call("GET", at("limits", "history"), wire.LimitDecisions, query=words)).items

    def list(self) -> list[wire.Limit]:
        return self._http.send(Call("GET", at("limits"), wire.Limits)).items
