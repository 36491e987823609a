"""Rules over REST and through the client: who may do what, versions, plans."""

from __future__ import annotations

import pytest

from replica import wire
from replica.db.engine import Database
from rules.errors import Conflict, NotAllowed, Refused
from tests.replica.catalog.world import World
from tests.service import Service


@pytest.fixture
def dataset(service: Service, sqlite: Database) -> str:
    world = World(sqlite)
    world.endpoint("A-DISK")
    world.endpoint("B-DISK")
    dataset = world.collection("d")
    world.files(3, "A-DISK", dataset, size=10)
    return dataset


def test_a_rule_lives_its_life_through_the_client(service: Service, dataset: str) -> None:
    rules = service.client().rules
    wish = wire.NewRule(did=dataset, expression="B-DISK", ask_approval=True, metadata={"run": 7})
    plan = rules.plan(wish)
    assert [(t.endpoint, t.files, t.new_bytes) for t in plan.totals] == [("B-DISK", 3, 30)] and plan.asks
    made = rules.add(wish)
    assert made.state == "waiting_approval" and made.metadata == {"run": 7}
    assert rules.approve(made.id, "fine").state == "replicating"
    assert rules.suspend(made.id, "later").state == "suspended"
    assert rules.resume(made.id).state == "replicating"
    assert rules.plan_update(made.id, wire.RuleChange(copies=2, expression="*")).made != []
    assert rules.plan_move(made.id, wire.RuleMove(expression="A-DISK")).given_up != []
    assert rules.move(made.id, wire.RuleMove(expression="A-DISK")).expression == "A-DISK"
    updated = rules.update(made.id, wire.RuleChange(comment="mine", locked=True))
    assert (updated.comment, updated.locked) == ("mine", True)
    assert rules.plan_delete(made.id).refused and rules.plan_delete(made.id, purge=True).purge
    with pytest.raises(Refused, match="locked"):
        rules.delete(made.id)
    rules.update(made.id, wire.RuleChange(locked=False))
    rules.delete(made.id, purge=True)
    told = [e.kind.removeprefix("rule.") for e in rules.history(made.id)]
    assert told[:4] == ["added", "approved", "suspended", "resumed"] and told[-1] == "deleted"
    assert {"moved", "updated"} <= set(told)
    denied = rules.add(wire.NewRule(did=dataset, expression="B-DISK", ask_approval=True))
    assert rules.deny(denied.id, "no room").state == "expired"


def test_only_an_administrator_approves(service: Service, dataset: str) -> None:
    made = service.client().rules.add(wire.NewRule(did=dataset, expression="B-DISK", ask_approval=True))
    for verb in ("approve", "deny"):
        with pytest.raises(NotAllowed):
            getattr(service.client(service.user).rules, verb)(made.id)
    assert service.client().rules.show(made.id).state == "waiting_approval"


def test_a_change_may_depend_on_the_version_it_was_made_for(service: Service, dataset: str) -> None:
    client = service.client()
    made = client.rules.add(wire.NewRule(did=dataset, expression="B-DISK"))
    path = f"/api/v1/rules/{made.id}"
    shown = service.ask("GET", path)
    assert shown.headers["ETag"] == f'"{shown.json["version"]}"' == f'"{made.version}"'
    changed = client.rules.update(made.id, wire.RuleChange(comment="first"), version=made.version)
    assert changed.version == made.version + 1
    with pytest.raises(Conflict, match="has changed since"):
        client.rules.update(made.id, wire.RuleChange(comment="second"), version=made.version)
    late = service.ask("PATCH", path, {"comment": "second"}, "admin", {"If-Match": f'"{made.version}"'})
    assert (late.status, late.json["code"], late.json["field"]) == (412, "conflict", "If-Match")
    assert service.ask("PATCH", path, {"comment": "x"}, "admin", {"If-Match": "yesterday"}).status == 400
    assert service.ask("PATCH", path, {"comment": "x"}, "admin", {"If-Match": "*"}).status == 200


def test_a_moment_without_a_zone_is_refused(service: Service, dataset: str) -> None:
    body = {"did": dataset, "expression": "B-DISK", "not_before": "2030-01-01T00:00:00"}
    answer = service.ask("POST", "/api/v1/rules", body)
    assert (answer.status, answer.json["field"]) == (400, "not_before")
