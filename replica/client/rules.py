"""Rules: wishes for copies."""

from __future__ import annotations

from collections.abc import Iterator

from replica import wire
from replica.client.calls import NOTHING, Call, at
from replica.client.http import SyncHttp
from rules.names import Did


class Rules:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def add(self, rule: wire.NewRule) -> wire.Rule:
        return self._http.send(Call("POST", at("rules"), wire.Rule, rule, creates=True))

    def plan(self, rule: wire.NewRule) -> wire.RulePlan:
        """What `add` would do; changes nothing."""
        return self._http.send(Call("POST", at("rules", "plan"), wire.RulePlan, rule, repeatable=True))

    def list(
        self, did: str | Did | None = None, account: str | None = None, state: str | None = None
    ) -> Iterator[wire.Rule]:
        query = {"did": None if did is None else str(did), "account": account, "state": state}
        return self._http.pages(Call("GET", at("rules"), wire.Page[wire.Rule], query=query))

    def show(self, rule: int) -> wire.Rule:
        return self._http.send(Call("GET", at("rules", rule), wire.Rule))

    def explain(self, rule: int) -> wire.Explanation:
        return self._http.send(Call("GET", at("rules", rule, "explain"), wire.Explanation))

    def delete(self, rule: int) -> None:
        self._http.send(Call("DELETE", at("rules", rule), NOTHING))
