"""Quotas: what may be added where, never exceeded by placing, never a reason to protect less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, plans, quotas
from replica.db import tables as t
from replica.db.engine import Database
from rules.errors import InvalidExpression, NotFound, Refused
from tests.at_once import at_once
from tests.conftest import HandClock, Statements
from tests.replica.catalog.test_usage import ALICE, BOB, Ledger
from tests.replica.catalog.world import MB, ROOT

Counting = Callable[[Database], AbstractContextManager[Statements]]


class Limited(Ledger):
    def limit(self, account: str, expression: str, limit_bytes: int) -> wire.Quota:
        with self.db.write() as s:
            return quotas.put(s, ROOT, wire.NewQuota(account=account, expression=expression, limit_bytes=limit_bytes))

    def standing(self, account: str) -> Sequence[wire.Quota]:
        with self.db.read() as s:
            return quotas.list_page(s, account=account).items

    def dataset(self, name: str, count: int, at: str = "DESY-DISK") -> str:
        dataset = self.collection(name)
        self.files(count, at, dataset, size=MB)
        return dataset

    def why(self, rule: wire.Rule) -> set[str]:
        return {reason.code for reason in self.show(rule).reasons}


@pytest.fixture
def world(db: Database) -> Limited:
    return Limited(db)


def test_what_exceeds_a_quota_is_refused_with_the_numbers_and_placed_when_there_is_room(world: Limited) -> None:
    world.limit("alice", "HZDR-DISK", 3 * MB)
    rule = world.rule_of(ALICE, world.dataset("d", 5), "HZDR-DISK")
    assert rule.state == "stuck" and world.why(rule) == {"over_quota"}
    assert "2.0 MB short" in rule.reasons[0].message and "quota" in rule.reasons[0].hint
    assert world.rule_of(BOB, "t:d", "HZDR-DISK").state == "replicating"  # nobody limits Bob
    assert world.held() == {("bob", "HZDR-DISK"): (5, 5 * MB)}
    world.limit("alice", "HZDR-DISK", 5 * MB)
    world.evaluate()
    assert world.show(rule).state == "replicating" and world.why(rule) == set()
    (quota,) = world.standing("alice")
    assert (quota.used_bytes, quota.left_bytes, quota.over_bytes) == (5 * MB, 0, 0)
    world.prove()
    world.check()


def test_a_container_that_fits_in_part_is_placed_in_part(world: Limited) -> None:
    """In Rucio 6 MB of quota take a container of 20 MB, as what is left is not counted down while placing."""
    box = world.collection("box", "container")
    for i in range(4):
        world.attach(box, world.dataset(f"d{i}", 5))
    world.limit("alice", "HZDR-DISK", 11 * MB)
    rule = world.rule_of(ALICE, box, "HZDR-DISK")
    assert rule.state == "stuck"
    assert world.held() == {("alice", "HZDR-DISK"): (10, 10 * MB)}


def test_what_the_account_holds_there_already_costs_nothing_and_what_is_merely_there_does(world: Limited) -> None:
    one, two = world.dataset("one", 4), world.collection("two")
    world.rule_of(ALICE, one, "DESY-DISK")
    with world.db.read() as s:
        names = [did for (did,) in s.execute(sa.select(t.dids.c.name).where(t.dids.c.name.like("f%")))]
    world.attach(two, *(f"t:{name}" for name in names))
    world.limit("alice", "DESY-DISK", 4 * MB)
    world.limit("bob", "DESY-DISK", 3 * MB)
    # Full, and yet: no byte of these would be new to Alice.
    for wish in ({"did": two}, {"did": one, "grouping": "all"}, {"did": one, "grouping": "none"}):
        assert world.rule_of(ALICE, wish.pop("did"), "DESY-DISK", **wish).state == "ok"
    assert world.held() == {("alice", "DESY-DISK"): (4, 4 * MB)}
    # It is all there, so nothing would move; but Bob would hold it.
    refused = world.rule_of(BOB, one, "DESY-DISK")
    assert refused.state == "stuck" and world.why(refused) == {"over_quota"}
    some = world.rule_of(BOB, two, "DESY-DISK", grouping="none")
    assert some.state == "stuck" and world.held()["bob", "DESY-DISK"] == (3, 3 * MB)
    world.prove()


def test_all_quotas_that_select_an_endpoint_must_have_room(world: Limited) -> None:
    world.limit("alice", "*", 6 * MB)
    world.limit("alice", "HZDR-DISK", 4 * MB)
    world.rule_of(ALICE, world.dataset("a", 3), "HZDR-DISK")
    assert world.why(world.rule_of(ALICE, world.dataset("b", 2), "HZDR-DISK")) == {"over_quota"}
    assert world.rule_of(ALICE, "t:b", "GSI-DISK").state == "replicating"
    assert world.why(world.rule_of(ALICE, world.dataset("c", 2), "GSI-DISK")) == {"over_quota"}
    assert world.rule_of(ALICE, world.dataset("e", 1), "GSI-DISK|HZDR-DISK").state == "replicating"
    assert [quota.left_bytes for quota in world.standing("alice")] in ([0, 0], [0, MB])


def test_an_attribute_changes_what_a_quota_is_about_at_once(world: Limited) -> None:
    world.change("HZDR-DISK", attributes={"tier": 2})
    world.limit("alice", "tier=2", MB)
    assert world.rule_of(ALICE, world.dataset("d", 2), "GSI-DISK").state == "replicating"
    world.change("GSI-DISK", attributes={"tier": 2})
    (quota,) = world.standing("alice")
    assert quota.endpoints == ["GSI-DISK", "HZDR-DISK"] and quota.over_bytes == MB
    assert world.why(world.rule_of(ALICE, world.dataset("e", 1), "GSI-DISK")) == {"over_quota"}
    for name in ("GSI-DISK", "HZDR-DISK"):
        world.change(name, attributes={"tier": None})
    (quota,) = world.standing("alice")
    assert quota.endpoints == [] and quota.problem and quota.used_bytes == 0
    assert world.rule_of(ALICE, world.dataset("f", 9), "HZDR-DISK").state == "replicating"


def test_what_comes_into_a_dataset_under_rules_is_protected_and_charged_beyond_the_quota(world: Limited) -> None:
    dataset = world.dataset("d", 2)
    world.limit("alice", "DESY-DISK", 2 * MB)
    rule = world.rule_of(ALICE, dataset, "DESY-DISK")
    world.files(3, "DESY-DISK", dataset, size=MB)
    assert world.show(rule).state == "ok" and world.held() == {("alice", "DESY-DISK"): (5, 5 * MB)}
    (quota,) = world.standing("alice")
    assert (quota.left_bytes, quota.over_bytes) == (0, 3 * MB)
    assert world.why(world.rule_of(ALICE, world.dataset("e", 1), "DESY-DISK")) == {"over_quota"}
    world.prove()


@pytest.mark.parametrize("there", [True, False], ids=["on what is there", "on what must move"])
def test_rules_of_one_account_at_once_never_exceed_its_quota_together(world: Limited, there: bool) -> None:
    wishes = []
    for i, target in enumerate(("DESY-DISK", "HZDR-DISK", "GSI-DISK") * 2):
        at = target if there else ("HZDR-DISK" if target == "GSI-DISK" else "GSI-DISK")
        dataset = world.dataset(f"d{i}", 2, at)
        wishes.append(lambda d=dataset, e=target: world.rule_of(ALICE, d, e))
    world.limit("alice", "*", 7 * MB)
    made = at_once(*wishes)
    assert sorted(rule.state == "stuck" for rule in made) == [False] * 3 + [True] * 3  # type: ignore[attr-defined]
    (quota,) = world.standing("alice")
    assert (quota.used_bytes, quota.left_bytes) == (6 * MB, MB)
    world.prove()


def test_a_plan_keeps_to_the_quota_too(world: Limited) -> None:
    world.limit("alice", "HZDR-DISK", MB)
    dataset = world.dataset("d", 2)
    with world.db.read() as s:
        plan = plans.plan(s, ALICE, wire.NewRule(did=dataset, expression="HZDR-DISK"))
        assert plan.copies == [] and "quota 1.0 MB short" in plan.refusals[0].obstacles[0]
        assert len(plans.plan(s, BOB, wire.NewRule(did=dataset, expression="HZDR-DISK")).copies) == 1


def test_a_rule_that_changes_hands_needs_room_in_the_new_account(world: Limited) -> None:
    rule = world.rule_of(ALICE, world.dataset("d", 3), "HZDR-DISK")
    world.limit("bob", "HZDR-DISK", 2 * MB)
    with pytest.raises(Refused, match=r"quota at HZDR-DISK is 1\.0 MB short"), world.db.write() as s:
        quotas.take_over(s, rule.id, accounts.account_id(s, "bob"))
    assert world.held() == {("alice", "HZDR-DISK"): (3, 3 * MB)}


def test_who_has_no_quota_pays_one_look_up(world: Limited, count_statements: Counting) -> None:
    first, second = world.dataset("a", 1), world.dataset("b", 1)
    world.limit("bob", "*", MB)
    with count_statements(world.db) as free:
        world.rule_of(ALICE, first, "DESY-DISK")
    with count_statements(world.db) as limited:
        world.rule_of(BOB, second, "DESY-DISK")
    assert 1 <= sum("FROM quotas" in text for text in free.texts) <= 2  # on PostgreSQL, once before it holds anything
    assert not any("FROM usage" in text for text in free.texts)
    assert limited.count <= free.count + 25


def test_the_same_expression_is_the_same_quota_and_removing_it_frees(world: Limited, clock: HandClock) -> None:
    first = world.limit("alice", "HZDR-DISK", MB)
    second = world.limit("alice", " HZDR-DISK ", 2 * MB)
    assert first.id == second.id and second.limit_bytes == 2 * MB
    rule = world.rule_of(ALICE, world.dataset("d", 3), "HZDR-DISK")
    with world.db.write() as s:
        quotas.remove(s, ROOT, first.id)
        with pytest.raises(NotFound, match=f"no quota {first.id}"):
            quotas.get(s, first.id)
    world.evaluate()
    assert world.show(rule).state == "replicating"
    with world.db.read() as s:
        told = s.execute(sa.select(t.events.c.kind).where(t.events.c.entity == "quota").order_by(t.events.c.id))
        assert list(told.scalars()) == ["quota.set", "quota.set", "quota.removed"]


def test_a_quota_that_cannot_be_meant_is_refused(world: Limited) -> None:
    with pytest.raises(Refused, match="selects no endpoint"):
        world.limit("alice", "tier=9", MB)
    with pytest.raises(InvalidExpression):
        world.limit("alice", "HZDR-DISK|", MB)
    with pytest.raises(NotFound, match="no account 'carol'"):
        world.limit("carol", "*", MB)
