"""Any story of attaching, wishing, moving, failing and losing leaves every counter equal to a recount."""

from __future__ import annotations

import os
import random

import pytest

from replica.db.engine import Database
from rules.errors import AlreadyExists, Invalid, Refused
from rules.transfers import RetryPolicy
from tests.conftest import HandClock
from tests.replica.catalog.world import KB, World, done, failed

#: More, by hand: `TEST_STORIES=200 pytest tests/replica/catalog/test_the_whole_story.py`.
STORIES = int(os.environ.get("TEST_STORIES", "4"))
STEPS = int(os.environ.get("TEST_STEPS", "40"))
POLICY = RetryPolicy(attempts_max=3, base_seconds=30, cap_seconds=600)

ENDPOINTS = ("A-1", "A-2", "B-1", "C-1")
EXPRESSIONS = ("A-1", "B-1|C-1", "*", "site=A|site=B", r"*\C-1")


class Story:
    def __init__(self, db: Database, clock: HandClock, seed: int) -> None:
        self.world, self.clock, self.dice = World(db), clock, random.Random(seed)
        for name in ENDPOINTS:
            self.world.endpoint(name, capacity=30 * KB if name in ("A-1", "C-1") else None)
        self.datasets = [self.world.collection(f"d{i}") for i in range(4)]
        self.containers = [self.world.collection(f"c{i}", "container") for i in range(2)]
        self.files: list[str] = []
        self.rules: list[int] = []
        self.orders: dict[str, list[object]] = {"A": [], "B": [], "C": []}

    def step(self) -> str:
        verbs = {
            self.register: 4,
            self.attach_files: 4,
            self.detach_files: 2,
            self.nest: 2,
            self.unnest: 1,
            self.wish: 4,
            self.end: 2,
            self.claim: 5,
            self.report: 6,
            self.expire: 2,
            self.evaluate: 4,
            self.turn: 3,
            self.switch: 1,
            self.cancel_or_retry: 2,
        }
        (verb,) = self.dice.choices(list(verbs), list(verbs.values()))
        try:
            verb()
        except (Invalid, Refused, AlreadyExists) as error:
            # A refusal must leave no trace; the check that follows sees to it.
            return f"{verb.__name__}: {error.message}"
        return verb.__name__

    def register(self) -> None:
        dataset = self.dice.choice([None, *self.datasets])
        evidence = self.dice.choice(["hashed", "hashed", "declared"])
        if self.files and self.dice.random() < 0.3:
            names = self.dice.sample(self.files, min(3, len(self.files)))
            self.world.register(names, self.dice.choice(ENDPOINTS), dataset, evidence=evidence)
        else:
            count = self.dice.randint(1, 4)
            self.files += self.world.files(count, self.dice.choice(ENDPOINTS), dataset, evidence=evidence)

    def attach_files(self) -> None:
        if self.files:
            names = self.dice.sample(self.files, min(self.dice.randint(1, 4), len(self.files)))
            self.world.attach(self.dice.choice(self.datasets), *names)

    def detach_files(self) -> None:
        if self.files:
            names = self.dice.sample(self.files, min(self.dice.randint(1, 4), len(self.files)))
            self.world.detach(self.dice.choice(self.datasets), *names)

    def nest(self) -> None:
        inner = self.dice.choice([*self.datasets, self.containers[1]])
        self.world.attach(self.dice.choice(self.containers), inner)

    def unnest(self) -> None:
        self.world.detach(self.dice.choice(self.containers), self.dice.choice(self.datasets))

    def wish(self) -> None:
        did = self.dice.choice([*self.datasets, *self.containers, *self.files[:3]])
        rule = self.world.rule(
            did,
            self.dice.choice(EXPRESSIONS),
            copies=self.dice.randint(1, 2),
            grouping=self.dice.choice(["dataset", "all", "none"]),
            spread=self.dice.choice(["endpoint", "site"]),
            priority=self.dice.randint(1, 5),
        )
        if rule.id not in self.rules:
            self.rules.append(rule.id)

    def end(self) -> None:
        if self.rules:
            self.world.delete(self.world.show(self.rules.pop(self.dice.randrange(len(self.rules)))))

    def claim(self) -> None:
        site = self.dice.choice(list(self.orders))
        self.orders[site] += self.world.claim(site, self.dice.randint(1, 5)).orders

    def report(self) -> None:
        site = self.dice.choice(list(self.orders))
        held = self.orders[site]
        self.dice.shuffle(held)
        outcomes = []
        for _ in range(self.dice.randint(0, len(held))):
            order = held.pop()
            error = self.dice.choice(["timed_out", "source_missing", "checksum_differs", "no_space", "refused"])
            side = self.dice.choice(["source", "target"])
            lied = done(order, checksums={"adler32": "00000001"})
            outcomes.append(self.dice.choice([done(order), done(order), failed(order, error, side), lied]))
        if outcomes:
            self.world.report(site, outcomes, policy=POLICY)

    def expire(self) -> None:
        self.world.expire(POLICY)

    def evaluate(self) -> None:
        self.world.evaluate(limit_files=self.dice.choice([2, 5, 1_000]), times=500)

    def turn(self) -> None:
        self.clock.turn(seconds=self.dice.choice([1, 60, 200, 4_000]))

    def switch(self) -> None:
        self.world.change(self.dice.choice(ENDPOINTS), writable=self.dice.random() < 0.7)

    def cancel_or_retry(self) -> None:
        if known := self.world.transfers():
            chosen = self.dice.choice(known)
            self.dice.choice([self.world.cancel, self.world.retry])(chosen.id)


@pytest.mark.parametrize("seed", range(STORIES))
def test_counters_space_and_states_equal_a_recount_after_every_step(db: Database, clock: HandClock, seed: int) -> None:
    story = Story(db, clock, seed)
    told: list[str] = []
    try:
        for _ in range(STEPS):
            told.append(story.step())
            story.world.check()
        # When nothing fails any more, everything that has a place comes to an end.
        for name in ENDPOINTS:
            story.world.change(name, writable=True)
        story.clock.turn(hours=2)
        for _ in range(4):
            story.world.expire(POLICY)
            story.world.evaluate(times=500)
            story.world.move()
            story.clock.turn(hours=2)
        story.world.check()
        for rule_id in story.rules:
            shown = story.world.show(rule_id)
            for reason in shown.reasons:
                assert reason.code in ("no_space", "domain_used", "too_few_candidates", "lost"), reason
    except BaseException as error:
        error.add_note(f"seed {seed}: " + " · ".join(told))
        raise
