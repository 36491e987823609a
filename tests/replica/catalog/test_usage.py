"""Usage: each file once per account and endpoint, right at every commit, whatever happens in which order."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, dids, rules, usage
from replica.db import tables as t
from replica.db.engine import Database
from rules.errors import Conflict, Invalid
from rules.names import Did
from rules.permissions import Actor, Role
from rules.states import RuleState
from tests.at_once import at_once
from tests.conftest import HandClock, Statements
from tests.replica.catalog.world import World, size_of

ALICE, BOB = Actor("alice", Role.USER), Actor("bob", Role.USER)
Counting = Callable[[Database], AbstractContextManager[Statements]]


class Ledger(World):
    """A world with two accounts that can tell what they hold."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.three()
        with db.write() as s:
            for actor in (ALICE, BOB):
                accounts.add(s, wire.NewAccount(name=actor.account))

    def rule_of(self, actor: Actor, did: str, expression: str, **fields: object) -> wire.Rule:
        with self.db.write() as s:
            return rules.add(s, actor, wire.NewRule(did=did, expression=expression, **fields))

    def held(self) -> dict[tuple[str, str], tuple[int, int]]:
        """(account, endpoint) → files and bytes, by the ledger; nothing held is left out."""
        with self.db.read() as s:
            page = usage.list_page(s, limit=1_000)
        return {(str(row.account), str(row.endpoint)): (row.files, row.bytes) for row in page.items}

    def children(self, did: str) -> list[str]:
        with self.db.read() as s:
            return [child.did for child in dids.contents(s, Did.parse(did), None, 1_000).items]

    def prove(self) -> None:
        """Counts again from the locks, in plain Python; and what a dataset says of itself."""
        with self.db.read() as s:
            names = {
                kind: dict(s.execute(sa.select(kind.c.id, kind.c.name)).all()) for kind in (t.accounts, t.endpoints)
            }
            size = dict(s.execute(sa.select(t.files.c.did_id, t.files.c.size_bytes)).all())
            children: dict[int, set[int]] = {}
            for parent, child in s.execute(sa.select(t.contents.c.parent_id, t.contents.c.child_id)):
                children.setdefault(parent, set()).add(child)
            locks = s.execute(
                sa.select(t.rules.c.account_id, t.locks.c.unit_id, t.locks.c.endpoint_id).join_from(t.locks, t.rules)
            ).all()
            datasets = s.execute(
                sa.select(t.dids.c.id, t.dids.c.shared, t.dids.c.files_total).where(t.dids.c.files_total.is_not(None))
            ).all()
        held: dict[tuple[int, int], set[int]] = {}
        for account, unit, endpoint in locks:
            held.setdefault((account, endpoint), set()).update({unit} if unit in size else children.get(unit, set()))
        recounted = {
            (names[t.accounts][a], names[t.endpoints][e]): (len(files), sum(size[f] for f in files))
            for (a, e), files in held.items()
            if files
        }
        assert self.held() == recounted
        units = {unit for _, unit, _ in locks}
        parents = Counter(f for d in datasets for f in children.get(d.id, ()))
        for dataset in datasets:
            mine = children.get(dataset.id, set())
            assert dataset.files_total == len(mine)
            assert dataset.shared or not any(parents[f] > 1 or f in units for f in mine)


@pytest.fixture
def world(db: Database) -> Ledger:
    return Ledger(db)


def total(names: Sequence[str]) -> tuple[int, int]:
    return len(names), sum(size_of(n) for n in names)


def test_two_accounts_two_rules_and_four_of_ten_files_detached_leave_six_for_both(world: Ledger) -> None:
    """In Rucio the last rule's account is relieved of all of it: 10 and 2 are left."""
    dataset = world.collection("d")
    names = world.files(10, "DESY-DISK", dataset)
    world.rule_of(ALICE, dataset, "DESY-DISK")
    world.rule_of(BOB, dataset, "DESY-DISK")
    assert world.held() == {(who, "DESY-DISK"): total(names) for who in ("alice", "bob")}
    world.detach(dataset, *names[:4])
    assert world.held() == {(who, "DESY-DISK"): total(names[4:]) for who in ("alice", "bob")}
    assert all(files == 6 for files, _ in world.held().values())


def test_a_file_is_charged_once_however_many_rules_of_the_account_hold_it(world: Ledger) -> None:
    one, two = world.collection("one"), world.collection("two")
    names = world.files(6, "DESY-DISK", one)
    world.attach(two, *names[3:])
    more = world.files(2, "DESY-DISK", two)
    first = world.rule_of(ALICE, one, "DESY-DISK")
    again = world.rule_of(ALICE, one, "DESY-DISK", comment="the same by other words", grouping="all")
    both = world.rule_of(ALICE, two, "DESY-DISK")
    single = world.rule_of(ALICE, names[0], "DESY-DISK")
    assert world.held() == {("alice", "DESY-DISK"): total([*names, *more])}
    world.delete(first)
    assert world.held() == {("alice", "DESY-DISK"): total([*names, *more])}
    world.delete(again)
    assert world.held() == {("alice", "DESY-DISK"): total([names[0], *names[3:], *more])}
    world.delete(both)
    assert world.held() == {("alice", "DESY-DISK"): total(names[:1])}
    world.delete(single)
    assert world.held() == {}


def test_what_is_attached_is_charged_at_once_to_whoever_has_rules_above(world: Ledger) -> None:
    box, dataset = world.collection("box", "container"), world.collection("d")
    world.attach(box, dataset)
    world.rule_of(ALICE, box, "DESY-DISK|HZDR-DISK", copies=2)
    world.rule_of(BOB, box, "HZDR-DISK", grouping="none")
    names = world.files(5, "DESY-DISK", dataset)
    world.prove()
    assert world.held() == {
        ("alice", "DESY-DISK"): total(names),
        ("alice", "HZDR-DISK"): total(names),
        ("bob", "HZDR-DISK"): total(names),
    }
    world.detach(box, dataset)
    assert world.held() == {}


def test_a_rule_that_changes_hands_takes_its_charge_along(world: Ledger) -> None:
    one, two = world.collection("one"), world.collection("two")
    names = world.files(4, "DESY-DISK", one)
    world.attach(two, *names[2:])
    rule = world.rule_of(ALICE, one, "DESY-DISK")
    world.rule_of(ALICE, names[0], "DESY-DISK")
    world.rule_of(BOB, two, "DESY-DISK")
    with world.db.write() as s:
        bob = accounts.account_id(s, "bob")
        usage.change_account(s, rule.id, bob)
        s.execute(t.rules.update().where(t.rules.c.id == rule.id).values(account_id=bob))
    world.prove()
    assert world.held() == {("alice", "DESY-DISK"): total(names[:1]), ("bob", "DESY-DISK"): total(names)}


def test_what_is_undone_was_never_charged(world: Ledger) -> None:
    dataset = world.collection("d")
    world.files(3, "DESY-DISK", dataset)
    with world.db.write() as s:
        with pytest.raises(Conflict), s.savepoint():
            rules.add(s, ALICE, wire.NewRule(did=dataset, expression="DESY-DISK"))
            raise Conflict("somebody else was faster")
        rules.add(s, BOB, wire.NewRule(did=dataset, expression="DESY-DISK"))
    world.prove()
    assert {account for account, _ in world.held()} == {"bob"}


@pytest.mark.parametrize("seed", range(3))
def test_after_any_sequence_the_ledger_is_what_a_recount_says(world: Ledger, seed: int) -> None:
    dice = random.Random(seed)
    names = world.files(8, "DESY-DISK")
    datasets = [world.collection(f"d{i}") for i in range(4)]
    boxes = [world.collection(f"c{i}", "container") for i in range(2)]
    world.attach(boxes[0], datasets[0], datasets[1], boxes[1])
    world.attach(boxes[1], datasets[1], datasets[2])
    alive: list[wire.Rule] = []

    def add() -> None:
        alive.append(
            world.rule_of(
                dice.choice((ALICE, BOB)),
                dice.choice([*names[:3], *datasets, *boxes]),
                dice.choice(("DESY-DISK", "HZDR-DISK|GSI-DISK", "site=DESY|site=HZDR", "*")),
                copies=dice.choice((1, 1, 2)) if len(alive) % 2 else 1,
                grouping=dice.choice(("dataset", "all", "none")),
            )
        )

    def end() -> None:
        if alive:
            world.delete(alive.pop(dice.randrange(len(alive))))

    def attach() -> None:
        world.attach(dice.choice(datasets), *dice.sample(names, dice.randint(1, 4)))

    def detach() -> None:
        dataset = dice.choice(datasets)
        mine = world.children(dataset)
        if mine:
            world.detach(dataset, *dice.sample(mine, dice.randint(1, len(mine))))

    def nest() -> None:
        box, dataset = boxes[dice.randrange(2)], dice.choice(datasets)
        if dataset in world.children(box):
            world.detach(box, dataset)
        else:
            world.attach(box, dataset)

    for _ in range(25):
        dice.choice((add, add, end, attach, attach, detach, nest))()
        world.prove()
    for rule in alive:
        world.delete(rule)
    world.prove()
    assert world.held() == {}


def test_the_cost_of_a_rule_does_not_grow_with_the_dataset_unless_files_are_shared(
    world: Ledger, count_statements: Counting
) -> None:
    small, large = world.collection("small"), world.collection("large")
    world.files(1, "DESY-DISK", small)
    world.files(400, "DESY-DISK", large)
    counts = []
    for dataset in (small, large):
        with count_statements(world.db) as statements:
            made = world.rule_of(ALICE, dataset, "DESY-DISK")
        with count_statements(world.db) as more:
            world.delete(made)
        # Not a file was looked at for the ledger: its first statement said all.
        assert not any("held_in_dataset" in text for text in statements.texts + more.texts)
        assert sum("INTO usage" in text for text in statements.texts) == 1
        counts.append((statements.count, more.count))
    assert counts[0] == counts[1]


def test_statements_do_not_grow_with_the_files_that_are_compared(world: Ledger, count_statements: Counting) -> None:
    counts = []
    for i, size in enumerate((2, 300)):
        one, two = world.collection(f"one{i}"), world.collection(f"two{i}")
        names = world.files(size, "DESY-DISK", one)
        world.attach(two, *names)
        with count_statements(world.db) as statements:
            rule = world.rule_of(ALICE, one, "DESY-DISK")
            world.rule_of(ALICE, two, "DESY-DISK")
            world.detach(one, *names[: size // 2])
            world.delete(rule)
        counts.append(statements.count)
    assert counts[0] == counts[1]
    world.prove()


def test_rules_of_one_account_at_once_on_what_is_there_already_are_charged_once(world: Ledger) -> None:
    for i in range(4):
        dataset = world.collection(f"d{i}")
        names = world.files(3, "DESY-DISK", dataset)
        wishes = [
            lambda d=dataset, g=g: world.rule_of(ALICE, d, "DESY-DISK", grouping=g) for g in ("dataset", "all", "none")
        ]
        wishes.append(lambda n=names[0]: world.rule_of(ALICE, n, "DESY-DISK"))
        made = [rule for rule in at_once(*wishes) if isinstance(rule, wire.Rule)]
        assert len(made) == len(wishes)
        world.prove()
        assert all(
            ended is None or isinstance(ended, Conflict)
            for ended in at_once(*[lambda r=rule: world.delete(r) for rule in made])
        )
        world.prove()


def test_attaching_detaching_ruling_and_ending_at_once_keep_the_ledger_right(world: Ledger) -> None:
    datasets = [world.collection(f"d{i}") for i in range(3)]
    names = world.files(9, "DESY-DISK", datasets[0])

    def at(seed: int) -> None:
        dice = random.Random(seed)
        mine: list[wire.Rule] = []
        for _ in range(12):
            act = dice.randrange(4)
            try:
                if act == 0:
                    world.attach(dice.choice(datasets), *dice.sample(names, 3))
                elif act == 1:
                    world.detach(dice.choice(datasets), *dice.sample(names, 2))
                elif act == 2 or not mine:
                    did = dice.choice([*datasets, names[0]])
                    grouping = dice.choice(("dataset", "none"))
                    mine.append(world.rule_of((ALICE, BOB)[seed % 2], did, "DESY-DISK", grouping=grouping))
                else:
                    world.delete(mine.pop())
            except Conflict:
                pass  # whoever came second is asked to repeat

    failures = [outcome for outcome in at_once(*[lambda n=n: at(n) for n in range(4)]) if outcome is not None]
    assert failures == []
    world.prove()


# --- over time ------------------------------------------------------------------------------------------------------


def test_usage_is_written_down_where_it_changed_and_told_over_time(
    world: Ledger, clock: HandClock, count_statements: Counting
) -> None:
    def note() -> int:
        with world.db.write() as s:
            return usage.note(s)

    began = clock()
    dataset = world.collection("d")
    names = world.files(4, "DESY-DISK", dataset)
    rule = world.rule_of(ALICE, dataset, "DESY-DISK")
    other = world.rule_of(BOB, dataset, "HZDR-DISK")
    with count_statements(world.db) as statements:
        assert note() == 2
    assert sum("usage_history" in text for text in statements.texts) == 1
    clock.turn(hours=1)
    assert note() == 0
    world.detach(dataset, names[0])
    world.delete(other)
    clock.turn(hours=1)
    assert note() == 2
    with world.db.read() as s:
        every = usage.history_page(s).items
        assert [(row.account, (row.at - began) / timedelta(hours=1), row.files) for row in every] == [
            ("alice", 0, 4),
            ("bob", 0, 4),
            ("alice", 2, 3),
            ("bob", 2, 0),
        ]
        assert (every[2].files, every[2].bytes) == total(names[1:])
        # Since one o'clock: as it was then, and what became of it.
        since = usage.history_page(s, account="alice", since=began + timedelta(hours=1)).items
        assert [row.files for row in since] == [4, 3]
        assert usage.history_page(s, account="alice", since=began + timedelta(hours=3)).items == since[1:]
        assert [row.account for row in usage.history_page(s, where="HZDR-DISK").items] == ["bob", "bob"]
        first = usage.history_page(s, limit=3)
        assert first.items + usage.history_page(s, limit=3, cursor=first.next).items == every
    world.delete(rule)
    assert world.show(rule.id).state == RuleState.EXPIRED.label and note() == 1


def test_totals_by_account_and_by_endpoint(world: Ledger) -> None:
    dataset = world.collection("d")
    files, size = total(world.files(3, "DESY-DISK", dataset))
    world.rule_of(ALICE, dataset, "DESY-DISK|HZDR-DISK", copies=2)
    world.rule_of(BOB, dataset, "DESY-DISK")
    with world.db.read() as s:
        by_account = usage.list_page(s, by="account").items
        assert [(r.account, r.endpoint, r.files, r.bytes) for r in by_account] == [
            ("alice", None, 2 * files, 2 * size),
            ("bob", None, files, size),
        ]
        by_endpoint = usage.list_page(s, by="endpoint", where="*").items
        assert [(r.account, r.endpoint, r.files) for r in by_endpoint] == [
            (None, "DESY-DISK", 2 * files),
            (None, "HZDR-DISK", files),
        ]
        first = usage.list_page(s, limit=2)
        assert len(first.items) == 2 and len(usage.list_page(s, limit=2, cursor=first.next).items) == 1
        with pytest.raises(Invalid, match="is not known"):
            usage.list_page(s, by="moon")
