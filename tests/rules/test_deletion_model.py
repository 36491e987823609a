"""A hundred thousand random steps of a small world that deletes as rules.deletion says.

Eight deleters, attaching, rules that come and go, copies that arrive, turn bad and are found again, transfers and
undoing: no file under a rule that is satisfied falls below its copies, no last copy goes without the explicit act.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime

from rules.deletion import Delete, Facts, Why, decide
from rules.states import ReplicaState

A, B, D, C = ReplicaState.AVAILABLE, ReplicaState.BAD, ReplicaState.DELETING, ReplicaState.COPYING
NOW = datetime(2026, 6, 1, tzinfo=UTC)
STEPS = 100_000
ENDPOINTS, FILES, DATASETS = 4, 12, 5


class Model:
    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.replica = {(f, f % ENDPOINTS): A for f in range(FILES)}
        self.released: set[tuple[int, int]] = set()
        self.content: list[set[int]] = [set() for _ in range(DATASETS)]
        self.locks: set[tuple[int, int]] = set()  # (dataset, endpoint)
        #: Decided and not begun; in a worker's hands.
        self.queued: dict[tuple[int, int], bool] = {}
        self.claimed: dict[tuple[int, int], bool] = {}
        #: (file, target) → whether a worker holds it
        self.transfers: dict[tuple[int, int], bool] = {}
        #: Files of which a person said that the last copy may go.
        self.given_up: set[int] = set()
        self.removed = self.revived = 0

    def covered(self, pair: tuple[int, int]) -> bool:
        file, endpoint = pair
        return any(e == endpoint and file in self.content[d] for d, e in self.locks)

    def good(self, file: int, but: int) -> list[int]:
        return [e for e in range(ENDPOINTS) if e != but and self.replica.get((file, e)) is A]

    def facts(self, pair: tuple[int, int]) -> Facts:
        file, here = pair
        others = [t for t in self.transfers if t[0] == file and t[1] != here]
        return Facts(
            state=self.replica[pair],
            locked=self.covered(pair),
            arriving=pair in self.transfers,
            being_read=any(held for t, held in self.transfers.items() if t[0] == file),
            good_elsewhere=bool(self.good(file, here)),
            last_source=any(not [e for e in self.good(file, here) if e != t] for _, t in others),
            released_at=NOW if pair in self.released else None,
        )

    # --- what happens ---

    def delete(self) -> None:
        """One deleter looks at one endpoint, as the catalogue does: all at once, holding it."""
        here, last = self.dice.randrange(ENDPOINTS), self.dice.random() < 0.01
        for file in range(FILES):
            pair = (file, here)
            if pair not in self.replica or self.dice.random() < 0.5:
                continue
            facts = self.facts(pair)
            why = Why.LAST_COPY if last else self.dice.choice((Why.SPACE, Why.PURGE, Why.ASKED, None))
            if isinstance(decide(facts, why, NOW), Delete):
                assert not self.covered(pair)
                assert self.good(file, here) or last or facts.state is C
                self.replica[pair], self.queued[pair] = D, last
                if last:
                    self.given_up.add(file)

    def begin(self) -> None:
        if self.queued:
            pair = self.dice.choice(sorted(self.queued))
            last = self.queued[pair]
            if self.covered(pair):  # whoever locked it has taken it back
                raise AssertionError("a deletion that a lock should have taken back")
            if not self.good(*pair) and not last:
                self.replica[pair] = A
                del self.queued[pair]
            elif not any(t[0] == pair[0] for t in self.transfers):
                self.claimed[pair] = self.queued.pop(pair)

    def finish(self) -> None:
        if self.claimed:
            pair = self.dice.choice(sorted(self.claimed))
            del self.claimed[pair]
            assert self.good(*pair) or pair[0] in self.given_up
            self.removed += 1
            self.replica.pop(pair)
            self.released.discard(pair)
            if self.covered(pair):
                self.replica[pair] = C

    def wanted(self, pair: tuple[int, int]) -> None:
        """A lock covers it from now on."""
        self.released.discard(pair)
        if pair in self.queued:
            del self.queued[pair]
            self.replica[pair] = A
            self.revived += 1
        self.replica.setdefault(pair, C)
        if self.replica[pair] is not A:
            self.transfers.setdefault(pair, False)

    def lock(self) -> None:
        lock = (self.dice.randrange(DATASETS), self.dice.randrange(ENDPOINTS))
        self.locks.add(lock)
        for file in self.content[lock[0]]:
            self.wanted((file, lock[1]))

    def attach(self) -> None:
        dataset, file = self.dice.randrange(DATASETS), self.dice.randrange(FILES)
        self.content[dataset].add(file)
        for d, e in self.locks:
            if d == dataset:
                self.wanted((file, e))

    def release(self, pairs: list[tuple[int, int]]) -> None:
        for pair in pairs:
            if pair in self.replica and not self.covered(pair):
                self.released.add(pair)
                self.transfers.pop(pair, None)
                if self.replica[pair] is C:
                    del self.replica[pair]
                    self.released.discard(pair)

    def unlock(self) -> None:
        if self.locks:
            lock = self.dice.choice(sorted(self.locks))
            self.locks.remove(lock)
            self.release([(file, lock[1]) for file in self.content[lock[0]]])

    def detach(self) -> None:
        dataset = self.dice.randrange(DATASETS)
        if self.content[dataset]:
            file = self.dice.choice(sorted(self.content[dataset]))
            self.content[dataset].remove(file)
            self.release([(file, e) for d, e in self.locks if d == dataset])

    def claim(self) -> None:
        waiting = [t for t, held in self.transfers.items() if not held and self.replica[t] is not D and self.good(*t)]
        if waiting:
            self.transfers[self.dice.choice(sorted(waiting))] = True

    def arrive(self) -> None:
        moving = [t for t, held in self.transfers.items() if held]
        if moving:
            pair = self.dice.choice(sorted(moving))
            del self.transfers[pair]
            self.replica[pair] = A

    def undo(self) -> None:
        if self.queued:
            pair = self.dice.choice(sorted(self.queued))
            del self.queued[pair]
            self.replica[pair] = A
            self.released.discard(pair)

    def good_files(self) -> set[int]:
        return {file for (file, _), state in self.replica.items() if state is A}

    def begin_anew(self) -> None:
        """A person brings again what was given up, so that the story goes on."""
        for file in set(range(FILES)) - self.good_files():
            if not any(pair[0] == file for pair in self.queued | self.claimed):
                self.replica[(file, 0)] = A
                self.transfers.pop((file, 0), None)
                self.given_up.discard(file)

    def check(self) -> None:
        lost = set(range(FILES)) - self.good_files()
        assert lost <= self.given_up, f"no good copy of {lost} is left, and nobody said that it may go"
        for dataset, endpoint in self.locks:
            for file in self.content[dataset]:
                pair = (file, endpoint)
                there = self.replica.get(pair)
                assert there is not None
                assert pair not in self.queued, "protected, and a worker may be told to remove it"
                assert there is A or pair in self.transfers, "protected, gone, and nobody brings it"


def test_a_hundred_thousand_steps_lose_no_protected_and_no_last_copy():
    dice = random.Random(20260601)
    model = Model(dice)
    verbs = [
        *[model.delete] * 8, *[model.begin] * 4, *[model.finish] * 4, *[model.lock] * 3, *[model.unlock] * 3,
        *[model.attach] * 3, *[model.detach] * 2, *[model.claim] * 5, *[model.arrive] * 5, model.undo,
    ]  # fmt: skip
    for step in range(STEPS):
        dice.choice(verbs)()
        if step % 20 == 0:
            model.check()
        for file in {file for file, _ in model.replica.keys() | model.claimed.keys()} ^ set(range(FILES)):
            assert file in model.given_up, f"step {step}: the last copy of {file} is gone"
        if step % 50 == 0:
            model.begin_anew()
    assert model.removed > 1_000
    assert model.revived > 1_000
