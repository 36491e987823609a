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

    def history(self, rule: int) -> Iterator[wire.HistoryEntry]:
        """What happened to it, from the beginning."""
        return self._http.pages(Call("GET", at("rules", rule, "history"), wire.Page[wire.HistoryEntry]))

    def update(self, rule: int, change: wire.RuleChange, *, version: int | None = None) -> wire.Rule:
        """With `version`: only if nothing has happened to the rule since it had this one; else Conflict."""
        return self._http.send(Call("PATCH", at("rules", rule), wire.Rule, change, version=version))

    def plan_update(self, rule: int, change: wire.RuleChange) -> wire.WishPlan:
        """What `update` would do to copies; changes nothing."""
        return self._http.send(Call("POST", at("rules", rule, "plan"), wire.WishPlan, change, repeatable=True))

    def move(self, rule: int, move: wire.RuleMove) -> wire.Rule:
        return self._http.send(Call("POST", at("rules", rule, "move"), wire.Rule, move, repeatable=True))

    def plan_move(self, rule: int, move: wire.RuleMove) -> wire.WishPlan:
        return self._http.send(Call("POST", at("rules", rule, "move", "plan"), wire.WishPlan, move, repeatable=True))

    def approve(self, rule: int, comment: str = "") -> wire.Rule:
        return self._http.send(Call("POST", at("rules", rule, "approve"), wire.Rule, wire.Verdict(comment=comment)))

    def deny(self, rule: int, comment: str = "") -> wire.Rule:
        return self._http.send(Call("POST", at("rules", rule, "deny"), wire.Rule, wire.Verdict(comment=comment)))

    def suspend(self, rule: int, comment: str = "") -> wire.Rule:
        verdict = wire.Verdict(comment=comment)
        return self._http.send(Call("POST", at("rules", rule, "suspend"), wire.Rule, verdict, repeatable=True))

    def resume(self, rule: int) -> wire.Rule:
        return self._http.send(Call("POST", at("rules", rule, "resume"), wire.Rule, repeatable=True))

    def delete(self, rule: int, *, purge: bool | None = None) -> None:
        """`purge`: whether copies that only this rule protects go at once, whatever the rule says."""
        self._http.send(Call("DELETE", at("rules", rule), NOTHING, query=_end(purge)))

    def plan_delete(self, rule: int, *, purge: bool | None = None) -> wire.RuleDeletePlan:
        """Which copies would lose their protection; changes nothing."""
        return self._http.send(Call("GET", at("rules", rule, "delete-plan"), wire.RuleDeletePlan, query=_end(purge)))


def _end(purge: bool | None) -> dict[str, str | None]:
    return {"purge": None if purge is None else str(purge).lower()}
