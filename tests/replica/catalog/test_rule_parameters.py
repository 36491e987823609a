"""Everything a rule can be besides its wish: locked, purging, asking, later, told of; and how it is changed."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, plans, rule_updates, rules, webhooks
from replica.db import tables
from replica.db.engine import Database
from replica.db.tables import EPOCH
from rules.errors import Conflict, Invalid, InvalidExpression, NotAllowed, NotFound, Refused
from rules.permissions import Actor, Role
from tests.conftest import HandClock
from tests.replica.catalog.world import ROOT, World

JANE = Actor("jane", Role.USER)


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    world = World(db)
    world.three()
    with db.write() as s:
        accounts.add(s, wire.NewAccount(name="jane"))
    return world


def dataset_of(world: World, files: int = 2, name: str = "d", at: str = "DESY-DISK") -> str:
    dataset = world.collection(name)
    world.files(files, at, dataset)
    return dataset


def update(
    world: World, rule: wire.Rule, actor: Actor = ROOT, version: int | None = None, **fields: object
) -> wire.Rule:
    with world.db.write() as s:
        return rule_updates.update(s, actor, rule.id, wire.RuleChange(**fields), version=version)


def say(world: World, verb: str, rule: wire.Rule, comment: str = "") -> wire.Rule:
    with world.db.write() as s:
        return getattr(rules, verb)(s, ROOT, rule.id, wire.Verdict(comment=comment))


def history(world: World, rule: wire.Rule) -> list[wire.HistoryEntry]:
    with world.db.read() as s:
        return rules.history_page(s, rule.id).items


def kinds(world: World, rule: wire.Rule) -> list[str]:
    entries = history(world, rule)
    assert [e.version for e in entries] == list(range(1, len(entries) + 1)), "versions have no gaps"
    return [e.kind.removeprefix("rule.") for e in entries]


def tombstones(world: World, endpoint: str) -> list[object]:
    t = tables
    with world.db.read() as s:
        query = sa.select(t.replicas.c.tombstone_at).join(t.endpoints, t.endpoints.c.id == t.replicas.c.endpoint_id)
        return list(s.execute(query.where(t.endpoints.c.name == endpoint)).scalars())


# --- locked and purge -----------------------------------------------------------------------------------------------


def test_a_locked_rule_gives_up_no_copy_before_it_is_unlocked(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world)
    rule = world.rule(dataset, "DESY-DISK", locked=True, lifetime_seconds=60)
    with pytest.raises(Refused, match="is locked"):
        world.delete(rule)
    for lost in ({"expression": "GSI-DISK"}, {"grouping": "all"}, {"spread": "site"}):
        with pytest.raises(Refused, match="is locked"):
            update(world, rule, **lost)
    assert update(world, rule, expression="DESY-DISK", comment="the same").comment == "the same"
    clock.turn(days=400)
    with world.db.write() as s:
        assert rules.expire_due(s) == 0, "its lifetime is over, and it protects on"
    assert tombstones(world, "DESY-DISK") == [None, None]
    update(world, rule, locked=False)
    with world.db.write() as s:
        assert rules.expire_due(s) == 1
    assert world.show(rule).state == "expired" and kinds(world, rule)[-1] == "expired"
    world.check()


def test_unlocking_and_deleting_more_is_one_act_and_more_copies_lose_none(world: World) -> None:
    rule = world.rule(dataset_of(world), "kind=disk", copies=1, locked=True)
    assert update(world, rule, copies=2).copies == 2
    with pytest.raises(Refused, match="is locked"):
        update(world, rule, copies=1)
    assert update(world, rule, copies=1, locked=False).copies == 1
    world.check()


def test_a_purging_rule_lets_go_at_once_what_it_alone_protected(world: World) -> None:
    dataset = dataset_of(world, 2)
    other = dataset_of(world, 1, "other")
    kept = world.rule(other, "DESY-DISK")
    world.attach(dataset, *[f.did for f in _files(world, other)])
    rule = world.rule(dataset, "DESY-DISK", purge=True)
    world.delete(rule)
    assert sorted(map(str, tombstones(world, "DESY-DISK"))) == sorted([str(EPOCH), str(EPOCH), "None"])
    world.delete(kept)
    found = tombstones(world, "DESY-DISK")
    assert found.count(EPOCH) == 2 and all(t is not None for t in found)


def _files(world: World, dataset: str) -> list[wire.Did]:
    from replica.catalog import dids
    from rules.names import Did

    with world.db.read() as s:
        return dids.contents(s, Did.parse(dataset), None, 100).items


# --- approval -------------------------------------------------------------------------------------------------------


def test_a_rule_that_asks_does_nothing_until_somebody_said_yes(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world)
    rule = world.rule(dataset, "GSI-DISK", ask_approval=True, lifetime_seconds=3600)
    assert rule.state == "waiting_approval" and rule.reasons[0].code == "waiting_approval"
    assert "GSI-DISK" not in rule.reasons[0].hint and "approve" in rule.reasons[0].hint
    assert rule.files_total == 2
    world.files(1, "DESY-DISK", dataset)
    world.evaluate()
    assert world.count(tables.locks) == world.count(tables.transfers) == 0
    explained = world.explain(rule)
    assert [w.what for w in explained.waiting] == ["waiting_approval"]
    assert explained.waiting[0].files == 3 and "waits for approval" in " ".join(explained.sentences)
    assert world.rule(dataset, "GSI-DISK", ask_approval=True, lifetime_seconds=3600).id == rule.id
    clock.turn(minutes=30)
    approved = say(world, "approve", rule, "go ahead")
    assert approved.state == "replicating" and approved.reasons == []
    assert approved.expires_at == clock.now + timedelta(hours=1), "waiting is no part of its life"
    world.move()
    assert world.show(rule).state == "ok"
    assert kinds(world, rule) == ["added", "updated", "approved", "ok"] or kinds(world, rule) == [
        "added",
        "approved",
        "ok",
    ]
    assert next(e for e in history(world, rule) if e.kind == "rule.approved").payload == {"comment": "go ahead"}
    with pytest.raises(Refused, match="does not wait for approval"):
        say(world, "approve", rule)
    world.check()


def test_a_denied_rule_has_ended_and_may_be_asked_for_again(world: World) -> None:
    dataset = dataset_of(world)
    rule = world.rule(dataset, "GSI-DISK", ask_approval=True)
    with pytest.raises(Refused, match="cannot be suspended"):
        say(world, "suspend", rule)
    denied = say(world, "deny", rule, "no room")
    assert denied.state == "expired" and denied.ended_at is not None
    assert kinds(world, rule) == ["added", "denied"]
    assert world.rule(dataset, "GSI-DISK", ask_approval=True).id != rule.id
    world.check()


def test_what_is_closed_and_within_every_candidates_limits_asks_nobody(world: World) -> None:
    from replica.catalog import dids
    from rules.names import Did

    for name in ("GSI-DISK", "HZDR-DISK"):
        world.change(name, attributes={"auto_approve_bytes": 1_000, "auto_approve_files": 2})
    small = world.collection("small")
    world.files(2, "DESY-DISK", small, size=500)
    assert world.rule(small, "GSI-DISK", ask_approval=True).state == "waiting_approval", "it is open"
    with world.db.write() as s:
        dids.change(s, Did.parse(small), wire.DidChange(open=False))
    rule = world.rule(small, "GSI-DISK|HZDR-DISK", ask_approval=True)
    assert rule.state == "replicating"
    assert kinds(world, rule)[:2] == ["added", "approved"] and history(world, rule)[1].payload == {"automatic": True}
    asked = world.rule(small, "GSI-DISK|DESY-DISK", ask_approval=True)
    assert asked.state == "waiting_approval" and "DESY-DISK approves nothing" in asked.reasons[0].message
    with world.db.read() as s:
        wish = wire.NewRule(did=small, expression="DESY-DISK", ask_approval=True)
        assert plans.plan(s, ROOT, wish).asks == "DESY-DISK approves nothing by itself"


# --- later ----------------------------------------------------------------------------------------------------------


def test_a_rule_for_later_protects_nothing_until_then_and_all_that_is_there_after(
    world: World, clock: HandClock
) -> None:
    dataset = dataset_of(world)
    start = clock.now + timedelta(days=2)
    rule = world.rule(dataset, "GSI-DISK", not_before=start, lifetime_seconds=60)
    assert [r.code for r in rule.reasons] == ["not_before"] and rule.reasons[0].next_retry_at == start
    assert rule.expires_at == start + timedelta(seconds=60)
    world.files(1, "DESY-DISK", dataset)
    assert world.evaluate() == 0 and world.count(tables.locks) == 0
    assert world.rule(dataset, "GSI-DISK", not_before=start, lifetime_seconds=60).id == rule.id
    assert [w.what for w in world.explain(rule).waiting] == ["not_before"]
    assert update(world, rule, copies=1, expression="HZDR-DISK", priority=5).reasons[0].code == "not_before"
    say(world, "suspend", rule)
    with world.db.write() as s:
        rules.resume(s, ROOT, rule.id)
    assert world.evaluate() == 0, "pausing it does not make it begin"
    world.check()
    clock.turn(days=2, seconds=1)
    world.files(1, "DESY-DISK", dataset)
    assert world.evaluate() > 0
    assert world.move() == 4 and world.show(rule).state == "ok" and world.show(rule).reasons == []
    world.check()


# --- the same wish --------------------------------------------------------------------------------------------------


def test_every_parameter_makes_another_rule_and_a_later_end_prolongs(world: World, clock: HandClock) -> None:
    dataset = dataset_of(world)
    with world.db.write() as s:
        webhooks.add(s, ROOT, wire.NewWebhook(name="me", url="https://example.org/hook"))
    first = world.rule(dataset, "DESY-DISK")
    assert world.rule(dataset, "DESY-DISK").id == first.id
    others: list[dict[str, object]] = [
        {"priority": 5},
        {"activity": "production"},
        {"locked": True},
        {"purge": True},
        {"notify": "me"},
        {"metadata": {"run": 7}},
        {"source_expression": "GSI-DISK"},
        {"lifetime_seconds": 60},
        {"not_before": clock.now + timedelta(days=1)},
    ]
    made = [world.rule(dataset, "DESY-DISK", **more).id for more in others]
    assert len({first.id, *made}) == 1 + len(others)
    assert [world.rule(dataset, "DESY-DISK", **more).id for more in others] == made
    lived = world.show(made[7])
    clock.turn(seconds=30)
    again = world.rule(dataset, "DESY-DISK", lifetime_seconds=60)
    assert again.id == lived.id and again.expires_at == clock.now + timedelta(seconds=60)
    shown = world.show(made[5])
    assert shown.metadata == {"run": 7} and world.show(made[4]).notify == "me"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("notify", {"notify": "nobody"}),
        ("metadata", {"metadata": {"text": "x" * 20_000}}),
        ("source_expression", {"source_expression": "nowhere=1"}),
    ],
)
def test_what_cannot_be_is_refused_with_its_field_when_added_and_when_changed(
    world: World, field: str, fields: dict[str, object]
) -> None:
    dataset = dataset_of(world)
    rule = world.rule(dataset, "DESY-DISK")
    for act in (lambda: world.rule(dataset, "DESY-DISK", **fields), lambda: update(world, rule, **fields)):
        with pytest.raises((Invalid, InvalidExpression, Refused)) as refused:
            act()
        assert refused.value.field == field
    assert world.show(rule).version == rule.version or world.show(rule).version == 2


# --- changes --------------------------------------------------------------------------------------------------------


def test_simple_fields_change_and_the_history_tells_from_what_to_what(world: World, clock: HandClock) -> None:
    rule = world.rule(dataset_of(world), "DESY-DISK", comment="a", metadata={"x": 1})
    changed = update(world, rule, comment="b", purge=True, lifetime_seconds=60, metadata=None)
    assert (changed.comment, changed.purge, changed.metadata) == ("b", True, None)
    assert changed.expires_at == clock.now + timedelta(seconds=60)
    assert history(world, rule)[-1].payload == {
        "comment": ["a", "b"],
        "purge": [False, True],
        "expires_at": [None, changed.expires_at.isoformat()],
        "metadata": [{"x": 1}, None],
    }
    assert update(world, rule, expires_at=None).expires_at is None
    version = world.show(rule).version
    assert update(world, rule, comment="b").version == version, "what changes nothing is no event"
    with pytest.raises(Conflict) as refused:
        update(world, rule, version=version - 1, comment="late")
    assert refused.value.field == "If-Match"
    assert update(world, rule, version=version, comment="in time").comment == "in time"
    world.delete(rule)
    with pytest.raises(Refused, match="has ended"):
        update(world, rule, comment="too late")
    with pytest.raises(NotFound):
        update(world, msgspec.structs.replace(rule, id=99), comment="x")


def test_priority_and_activity_reach_what_is_queued_but_never_below_what_another_rule_wants(world: World) -> None:
    dataset = dataset_of(world, 3)
    rule = world.rule(dataset, "GSI-DISK", priority=2)
    other = world.rule(dataset, "GSI-DISK|HZDR-DISK", copies=2, priority=4, activity="other")
    update(world, rule, priority=5, activity="production")
    to_gsi = [t for t in world.transfers() if t.target == "GSI-DISK"]
    assert {(t.priority, t.activity) for t in to_gsi} == {(5, "production")}
    update(world, rule, priority=1)
    assert {t.priority for t in world.transfers() if t.target == "GSI-DISK"} == {4}, (
        "the other rule is in more of a hurry"
    )
    world.delete(other)
    update(world, rule, priority=3)
    update(world, rule, priority=1)
    assert {t.priority for t in world.transfers(state="queued")} == {1}


def test_a_rule_changes_hands_with_its_usage(world: World) -> None:
    rule = world.rule(dataset_of(world, 2), "DESY-DISK")
    with pytest.raises(NotAllowed):
        update(world, rule, JANE, account="jane")
    assert update(world, rule, account="jane").account == "jane"
    with world.db.read() as s:
        held = s.execute(
            sa.select(tables.accounts.c.name, tables.usage.c.files)
            .join(tables.usage, tables.usage.c.account_id == tables.accounts.c.id)
            .where(tables.usage.c.files != 0)
        ).all()
    assert [tuple(row) for row in held] == [("jane", 2)]
    assert update(world, rule, JANE, comment="mine").comment == "mine"
    world.check()


def test_new_sources_are_tried_at_once(world: World) -> None:
    rule = world.rule(dataset_of(world, 2), "GSI-DISK", source_expression="HZDR-DISK")
    assert world.claim("GSI").orders == []
    assert {t.reason is not None for t in world.transfers()} == {True}
    update(world, rule, source_expression=None)
    assert len(world.claim("GSI").orders) == 2
