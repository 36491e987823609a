"""Many at once: space is promised once, nobody waits in a circle, and every counter is right in the end."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from replica import wire
from replica.catalog import transfers
from replica.db.engine import Database
from rules.errors import AlreadyExists, Conflict, Invalid, Refused
from rules.transfers import RetryPolicy
from tests.at_once import at_once
from tests.replica.catalog.world import MB, World, done, failed


@pytest.fixture
def world(db: Database) -> World:
    made = World(db)
    made.three()
    return made


def test_of_two_rules_at_once_that_fit_only_alone_one_is_refused(world: World) -> None:
    for i in range(5):
        small = world.endpoint(f"SMALL-{i}", capacity=6 * MB)
        datasets = []
        for name in ("a", "b"):
            datasets.append(world.collection(f"{name}{i}"))
            world.files(5, "DESY-DISK", datasets[-1], size=MB)
        made = at_once(*(lambda d=d, small=small: world.rule(d, small) for d in datasets))
        assert sorted(rule.state for rule in made) == ["replicating", "stuck"]
        assert world.used(small) == 5 * MB
    world.check()


def test_the_same_wish_from_many_at_once_is_one_rule(world: World) -> None:
    dataset = world.collection("d")
    world.files(10, "DESY-DISK", dataset)
    made = at_once(*[lambda: world.rule(dataset, "HZDR-DISK")] * 6)
    assert len({rule.id for rule in made}) == 1
    assert len(world.transfers()) == 10
    world.check()


def test_claims_at_once_share_no_transfer(world: World) -> None:
    dataset = world.collection("d")
    world.files(200, "DESY-DISK", dataset)
    world.rule(dataset, "HZDR-DISK")
    answers = at_once(*[lambda: world.claim("HZDR", 40)] * 5)
    claimed = [order.transfer for answer in answers for order in answer.orders]
    claimed += [order.transfer for order in world.claim("HZDR").orders]  # a few were looked at by two
    assert len(claimed) == len(set(claimed)) == 200


def test_a_file_attached_while_a_rule_is_added_is_protected_whoever_comes_first(world: World) -> None:
    for i in range(12):
        dataset = world.collection(f"d{i}")
        world.files(3, "DESY-DISK", dataset)
        late = world.files(3, "DESY-DISK")
        at_once(lambda d=dataset: world.rule(d, "HZDR-DISK"), lambda d=dataset, late=late: world.attach(d, *late))
        (rule,) = [r for r in map(world.show, range(1, i + 2)) if r.did == dataset]
        assert rule.files_total == 6
        assert len(world.transfers(rule=rule.id)) == 6
    world.check()


def test_reports_at_once_for_overlapping_locks_neither_block_each_other_nor_lose_a_count(world: World) -> None:
    shared = world.files(120, "DESY-DISK")
    rules = []
    for i in range(4):
        dataset = world.collection(f"d{i}")
        world.attach(dataset, *shared[i * 10 : i * 10 + 90])
        rules.append(world.rule(dataset, "HZDR-DISK|GSI-DISK", copies=2))
    parts = [(site, world.claim(site, 20).orders) for site in ("HZDR", "GSI") for _ in range(6)]
    dice = random.Random(7)
    for _, part in parts:
        dice.shuffle(part)
    answers = at_once(
        *(lambda site=site, part=part: world.report(site, [done(o) for o in part]) for site, part in parts if part)
    )
    for answer in answers:
        assert not isinstance(answer, Exception), answer
    assert sum(answer.accepted for answer in answers) == 240
    world.check()
    assert {world.show(rule).state for rule in rules} == {"ok"}


def test_everything_at_once_leaves_nothing_uncounted(world: World) -> None:
    """Eight threads do for two seconds what a busy day does; whoever is told to repeat, repeats."""
    world.endpoint("SMALL-DISK", capacity=40_000)
    datasets = [world.collection(f"d{i}") for i in range(4)]
    container = world.collection("c", "container")
    world.attach(container, *datasets[:2])
    names = world.files(60, "DESY-DISK")
    for dataset in datasets:
        world.attach(dataset, *names[:20])
    until = time.monotonic() + 2.0
    told: Counter[str] = Counter()
    wrong: list[Exception] = []
    guard = threading.Lock()
    policy = RetryPolicy(attempts_max=2, base_seconds=0, cap_seconds=0)

    def often(verb: Callable[[random.Random], object], seed: int) -> Callable[[], None]:
        dice = random.Random(seed)

        def run() -> None:
            while (time.monotonic() < until or sum(told.values()) <= 50) and not wrong:
                try:
                    verb(dice)
                    outcome = "done"
                except Conflict:
                    outcome = "repeat"
                except (Refused, AlreadyExists, Invalid):
                    outcome = "refused"
                except Exception as error:  # noqa: BLE001 - the test must see it, whatever it is
                    wrong.append(error)
                    return
                with guard:
                    told[f"{verb.__name__} {outcome}"] += 1

        return run

    def attach(dice: random.Random) -> None:
        world.attach(dice.choice(datasets), *dice.sample(names, 5))

    def detach(dice: random.Random) -> None:
        world.detach(dice.choice(datasets), *dice.sample(names, 5))

    def nest(dice: random.Random) -> None:
        dice.choice([world.attach, world.detach])(container, dice.choice(datasets))

    def wish(dice: random.Random) -> None:
        rule = world.rule(
            dice.choice([*datasets, container]),
            dice.choice(["HZDR-DISK", "GSI-DISK|HZDR-DISK", "SMALL-DISK|GSI-DISK", "*"]),
            copies=dice.randint(1, 2),
            grouping=dice.choice(["dataset", "all", "none"]),
        )
        if dice.random() < 0.6:
            world.delete(rule)

    def register(dice: random.Random) -> None:
        evidence = dice.choice(["hashed", "declared"])
        at = dice.choice(["HZDR-DISK", "GSI-DISK"])
        world.register(dice.sample(names, 3), at, dice.choice([None, *datasets]), evidence=evidence)

    def work(dice: random.Random) -> None:
        site = dice.choice(["HZDR", "GSI", "SMALL", "DESY"])
        outcomes = []
        for order in world.claim(site, 10).orders:
            bad = failed(order, dice.choice(["timed_out", "source_missing"]), dice.choice(["source", "target"]))
            outcomes.append(dice.choice([done(order), done(order), bad]))
        if outcomes:
            world.report(site, outcomes, policy=policy)

    def tidy(dice: random.Random) -> None:
        with world.db.write() as s:
            transfers.expire_leases(s, policy)
        world.evaluate(limit_files=50)

    verbs = [attach, detach, nest, wish, wish, register, work, work, tidy]
    at_once(*(often(verb, seed) for seed, verb in enumerate(verbs)))
    assert not wrong, wrong
    world.check()
    everybody = sum(told.values())
    repeated = sum(count for name, count in told.items() if name.endswith("repeat"))
    assert repeated <= everybody * 0.05, told
    assert everybody > 50, told


def test_an_order_that_is_cancelled_while_it_is_reported_ends_one_way(world: World) -> None:
    for i in range(10):
        dataset = world.collection(f"d{i}")
        world.files(1, "DESY-DISK", dataset)
        rule = world.rule(dataset, "HZDR-DISK")
        (order,) = world.claim("HZDR").orders
        _, answer = at_once(
            lambda rule=rule: world.delete(rule), lambda order=order: world.report("HZDR", [done(order)])
        )
        assert isinstance(answer, wire.ReportAnswer), answer
        (transfer,) = [t for t in world.transfers() if t.id == order.transfer]
        assert transfer.state == ("done" if answer.accepted else "cancelled")
    world.check()
