"""Subscriptions: rules for what is new, what is changed and what exists; each once, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import dids, events, metadata, rules, subscribing, subscriptions
from replica.db import tables
from replica.db.engine import Database
from rules.errors import AlreadyExists, Broken, Conflict, InvalidExpression, NotAllowed, Refused
from rules.names import Did
from rules.permissions import Actor, Role
from tests.conftest import HandClock, Statements
from tests.replica.catalog.world import ROOT, World
from workers import subscriptions as pass_

Counting = Callable[[Database], AbstractContextManager[Statements]]
RAW = "kind = dataset and metadata.type = raw"
AT_ITS_SITE = wire.RuleTemplate(expression="site={metadata.at}")


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    world = World(db)
    world.three()
    return world


def add(db: Database, name: str = "raw", *templates: wire.RuleTemplate, actor: Actor = ROOT, **more: object) -> None:
    with db.write() as s:
        new = wire.NewSubscription(
            **{"name": name, "condition": RAW, "rules": list(templates or [AT_ITS_SITE])} | more  # type: ignore[arg-type]
        )
        subscriptions.add(s, actor, new)


def show(db: Database, name: str = "raw") -> wire.Subscription:
    with db.read() as s:
        return subscriptions.get(s, name)


def make(db: Database, name: str, kind: str = "dataset", **values: object) -> str:
    with db.write() as s:
        dids.add(s, ROOT, wire.NewDid(did=f"t:{name}", kind=kind, metadata=values))
    return f"t:{name}"


def run(db: Database) -> int:
    """Until there is nothing more; how many rules were made."""
    made = 0
    for _ in range(100):
        report = pass_.apply(db)
        made += report.done
        if not report.more:
            return made
    raise AssertionError("it does not come to an end")


def wishes(db: Database, did: str) -> list[str]:
    with db.read() as s:
        return [rule.expression for rule in rules.list_page(s, did=Did.parse(did)).items]


def test_what_is_new_gets_its_rules_once_and_what_does_not_match_gets_none(db: Database, world: World):
    make(db, "old", type="raw", at="DESY")
    add(db, "raw", AT_ITS_SITE, wire.RuleTemplate(expression="HZDR-DISK|GSI-DISK", copies=2, priority=5))
    new = make(db, "new", type="raw", at="DESY")
    other = make(db, "other", type="log", at="DESY")
    container = make(db, "container", kind="container", type="raw", at="DESY")
    assert run(db) == 2
    assert wishes(db, new) == ["site=DESY", "HZDR-DISK|GSI-DISK"]
    assert wishes(db, other) == wishes(db, container) == wishes(db, "t:old") == []
    with db.read() as s:
        made = rules.list_page(s, did=Did.parse(new)).items[1]
    assert (made.copies, made.priority, made.account) == (2, 5, "root")
    assert run(db) == 0
    with db.write() as s:
        dids.change(s, Did.parse(new), wire.DidChange(open=False))
    assert run(db) == 0, "looking again makes nothing again"
    assert show(db).rules_made == 2
    world.check()


def test_what_is_given_metadata_later_is_looked_at_again(db: Database, world: World):
    add(db)
    did = make(db, "d", type="log")
    assert run(db) == 0
    with db.write() as s:
        metadata.change(s, Did.parse(did), wire.MetadataChange(set={"type": "raw", "at": "HZDR"}))
    assert run(db) == 1
    assert wishes(db, did) == ["site=HZDR"]
    with db.write() as s:
        metadata.change(s, Did.parse(did), wire.MetadataChange(set={"type": "log"}))
    assert run(db) == 0
    assert wishes(db, did) == ["site=HZDR"], "what was made stays"


def test_what_metadata_lack_is_told_and_never_half_a_rule(db: Database, world: World):
    add(db, "raw", AT_ITS_SITE, wire.RuleTemplate(expression="GSI-DISK"))
    did = make(db, "d", type="raw")
    bad = make(db, "bad", type="raw", at="NOWHERE")
    assert run(db) == 2
    assert wishes(db, did) == wishes(db, bad) == ["GSI-DISK"]
    skipped = {s.did: s for s in show(db).skipped}
    assert "metadata.at" in skipped[did].reason
    assert "replica did meta" in skipped[did].hint
    assert skipped[bad].reason
    assert all(s.rule == 0 for s in skipped.values())
    with db.read() as s:
        told = events.page(s, kinds=["subscription.skipped"]).items
    assert {(e.did, e.name) for e in told} == {(did, "raw"), (bad, "raw")}
    with db.write() as s:
        metadata.change(s, Did.parse(did), wire.MetadataChange(set={"at": "DESY"}))
    run(db)
    assert sorted(wishes(db, did)) == ["GSI-DISK", "site=DESY"]


def test_a_backfill_looks_at_everything_in_bounded_slices_and_again_without_harm(
    db: Database, world: World, monkeypatch: pytest.MonkeyPatch, count_statements: Counting
):
    monkeypatch.setattr(subscribing, "SLICE_DIDS", 4)
    monkeypatch.setattr(subscribing, "SLICE_IDS", 6)
    old = [make(db, f"old{n}", type="raw", at="DESY") for n in range(6)]
    world.files(20, "DESY-DISK", old[0])
    old += [make(db, f"late{n}", type="raw", at="DESY") for n in range(5)]
    with db.read() as s:
        last = s.execute(sa.select(sa.func.max(tables.dids.c.id))).scalar_one()
    add(db, backfill=True)
    slices = 0
    while show(db).backfilling:
        with count_statements(db) as statements, db.read() as s:
            (subscription,) = subscribing.due(s)
            found = subscribing.look(s, subscription)
        assert found is not None
        assert found.seen <= 4
        assert statements.count <= 20
        pass_.apply(db)
        slices += 1
    assert slices >= last // 6
    assert all(wishes(db, did) == ["site=DESY"] for did in old)
    with db.write() as s:
        (gone,) = s.execute(sa.select(tables.rules.c.id).where(tables.rules.c.did_id == 1)).scalars()
        rules.delete(s, gone)
        assert subscriptions.backfill(s, ROOT, "raw").backfilling
    assert run(db) == 0
    assert wishes(db, old[0]) == [], "what a person deleted is not made again"
    assert show(db).rules_made == len(old)


def test_a_preview_says_what_a_backfill_makes_and_changes_nothing(db: Database, world: World):
    ready = make(db, "ready", type="raw", at="HZDR")
    world.files(3, "DESY-DISK", ready, size=100)
    there = make(db, "there", type="raw", at="DESY")
    world.files(2, "DESY-DISK", there, size=100)
    lacking = make(db, "lacking", type="raw")
    make(db, "other", type="log")
    new = wire.NewSubscription(name="x", condition=RAW, rules=[AT_ITS_SITE])

    def state() -> list[int]:
        return [world.count(table) for table in tables.metadata.sorted_tables]

    before = state()
    with db.read() as s:
        found = subscriptions.preview(s, ROOT, new)
    assert state() == before
    assert (found.examined, found.matching, found.more) == (4, 3, False)
    planned = {did.did: did.rules[0] for did in found.dids}
    assert (planned[ready].expression, planned[ready].new_bytes) == ("site=HZDR", 300)
    assert planned[there].new_bytes == 0
    assert "metadata.at" in planned[lacking].skipped
    assert found.new_bytes.get("HZDR-DISK") == 300
    assert not any(size for name, size in found.new_bytes.items() if name != "HZDR-DISK")
    with db.read() as s:
        assert len(subscriptions.preview(s, ROOT, new, limit=1).dids) == 1
    add(db, backfill=True)
    with db.read() as s:
        assert subscriptions.preview_of(s, "raw") == found
    assert run(db) == 2
    assert world.move() == 3
    with db.read() as s:
        again = subscriptions.preview_of(s, "raw")
    assert {did.did: did.rules[0].exists for did in again.dids} == {ready: True, there: True, lacking: False}


def test_one_bad_did_or_subscription_holds_up_no_other(db: Database, world: World, monkeypatch: pytest.MonkeyPatch):
    add(db, "first")
    add(db, "second", wire.RuleTemplate(expression="GSI-DISK"))
    names = [make(db, name, type="raw", at="DESY") for name in ("a", "bad", "c", "raced")]
    real, tries = rules.add, []

    def adding(s: object, actor: object, new: wire.NewRule, **more: object) -> wire.Rule:
        if new.did == "t:bad":
            raise Broken("the database refused a statement of ours")
        if new.did == "t:raced" and len(tries) < 2:
            tries.append(1)
            raise Conflict("lost a race")
        return real(s, actor, new, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(rules, "add", adding)
    assert run(db) == 6
    assert [wishes(db, name) for name in names] == [["site=DESY", "GSI-DISK"], [], *[["site=DESY", "GSI-DISK"]] * 2]
    assert "refused a statement" in show(db, "second").skipped[0].reason
    with db.write() as s:
        s.execute(sa.update(tables.subscriptions).where(tables.subscriptions.c.name == "first").values(condition="("))
    make(db, "e", type="raw", at="DESY")
    assert run(db) == 1
    assert (show(db, "first").enabled, show(db, "second").enabled) == (False, True)


def test_a_crash_between_two_rules_loses_none_and_two_processes_make_none_twice(db: Database, world: World):
    add(db, "raw", AT_ITS_SITE, wire.RuleTemplate(expression="GSI-DISK"))
    names = [make(db, f"d{n}", type="raw", at="DESY") for n in range(3)]
    with db.read() as s:
        (subscription,) = subscribing.due(s)
        found = subscribing.look(s, subscription)
    assert found is not None
    for making in found.makings[:3]:
        with db.write() as s:
            subscribing.make(s, found, making)
    # …and here it ended; or another process came to the same slice:
    assert run(db) == 3
    for making in found.makings:
        with db.write() as s:
            subscribing.make(s, found, making)
    with db.write() as s:
        assert not subscribing.reached(s, found, [])
    assert [len(wishes(db, name)) for name in names] == [2, 2, 2]
    assert world.count(tables.rules) == 6


def test_a_changed_rule_is_a_new_one_beside_what_its_predecessor_made(db: Database, world: World):
    other = wire.RuleTemplate(expression="GSI-DISK")
    add(db, "raw", AT_ITS_SITE, other)
    did = make(db, "d", type="raw", at="DESY")
    run(db)
    with db.write() as s:
        wanted = [other, wire.RuleTemplate(expression="HZDR-DISK")]
        changed = subscriptions.change(s, ROOT, "raw", wire.SubscriptionChange(rules=wanted))
        subscriptions.backfill(s, ROOT, "raw")
    assert changed.numbers == [1, 2]
    assert changed.rules == wanted
    assert run(db) == 1
    assert wishes(db, did) == ["site=DESY", "GSI-DISK", "HZDR-DISK"]


def test_disabled_it_waits_and_enabled_it_goes_on_where_it_was(db: Database, world: World, clock: HandClock):
    add(db, lifetime_seconds=86_400)

    def enable(enabled: bool) -> None:
        with db.write() as s:
            subscriptions.change(s, ROOT, "raw", wire.SubscriptionChange(enabled=enabled))

    enable(False)
    did = make(db, "d", type="raw", at="DESY")
    assert run(db) == 0
    enable(True)
    assert run(db) == 1
    assert wishes(db, did) == ["site=DESY"]
    clock.turn(days=2)
    make(db, "late", type="raw", at="DESY")
    assert run(db) == 0, "its time is over"
    with db.read() as s:
        told = [e.kind for e in events.page(s, kinds=["subscription.*"]).items]
    assert told == ["subscription.added", "subscription.disabled", "subscription.enabled"]


def test_deleted_its_rules_stay_and_its_number_is_never_another_ones(db: Database, world: World):
    add(db)
    did = make(db, "d", type="raw", at="DESY")
    run(db)
    with db.write() as s:
        subscriptions.delete(s, ROOT, "raw")
    assert wishes(db, did) == ["site=DESY"]
    add(db, backfill=True)
    assert run(db) == 1, "a new subscription of that name has made nothing yet"


def test_what_cannot_be_is_refused_with_its_field(db: Database, world: World):
    for wrong, field in (
        ({"condition": "kind ="}, "condition"),
        ({"rules": [wire.RuleTemplate(expression="site={metadata.at}&")]}, "expression"),
        ({"rules": [wire.RuleTemplate(expression="NO-DISK")]}, "expression"),
        ({"rules": [wire.RuleTemplate(expression="*", source_expression="{x}")]}, "source_expression"),
    ):
        with pytest.raises((InvalidExpression, Refused)) as refused:
            add(db, "x", **wrong)
        assert refused.value.field == field
    add(db)
    with pytest.raises(AlreadyExists):
        add(db)
    with db.write() as s:
        s.execute(sa.insert(tables.accounts).values(name="alice", role="user", created_at=s.now))
    alice = Actor("alice", Role.USER)
    with pytest.raises(NotAllowed), db.write() as s:
        subscriptions.delete(s, alice, "raw")
    add(db, "hers", wire.RuleTemplate(expression="GSI-DISK"), actor=alice)
    did = make(db, "d", type="raw", at="DESY")
    run(db)
    with db.read() as s:
        assert {rule.account for rule in rules.list_page(s, did=Did.parse(did)).items} == {"root", "alice"}
    with db.write() as s:
        subscriptions.delete(s, alice, "hers")
