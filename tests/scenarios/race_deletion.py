"""Eight deleters against attaching, rules that come and rules that go: nothing protected and no last copy is lost.

`python -m tests.scenarios.race_deletion [OPERATIONS] [SEED]` does it 2,000 times on a PostgreSQL of its own; the
ordinary tests do a few hundred on both databases. The bytes are a set in memory: what a worker was told to remove is
gone from it at once, what a transfer brought is in it.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import sqlalchemy as sa

from replica.db import schema, tables
from replica.db.engine import Database
from replica.db.tables import replicas
from rules.errors import Conflict, NotFound, Refused
from rules.states import DidKind, ReplicaState
from tests.replica.catalog.cleaning import CleanWorld, removed
from tests.replica.catalog.world import done
from tests.servers import PostgreSQL

ENDPOINTS = ("DESY-DISK", "HZDR-DISK", "GSI-DISK")
FILES, DATASETS, DELETERS = 60, 4, 8


class Race:
    def __init__(self, db: Database, operations: int, seed: int = 1) -> None:
        self.world = CleanWorld(db)
        self.world.three()
        for name in ENDPOINTS:
            self.world.set_endpoint(name, delete_at_once=True)
        self.names = self.world.files(FILES, ENDPOINTS[0], size=10)
        self.world.register(self.names, ENDPOINTS[1], size=10)
        for name in ENDPOINTS[:2]:
            self.world.released(self.names, name)
        self.datasets = [self.world.collection(f"d{i}") for i in range(DATASETS)]
        for dataset, name in zip(self.datasets, self.names, strict=False):
            self.world.attach(dataset, name)
        #: What is on the disks, as the workers left it.
        self.bytes = {(name, at) for name in self.names for at in ENDPOINTS[:2]}
        self.guard = threading.Lock()
        self.operations = operations
        self.seed = seed
        self.told: Counter[str] = Counter()
        self.wrong: list[BaseException] = []

    # --- what goes on at the same time ---

    def delete(self, dice: random.Random) -> None:
        at = dice.choice(ENDPOINTS)
        self._count("decided", self.world.clean(at).files)
        site = at.split("-")[0]
        orders = self.world.take(site, limit=dice.randint(1, 10)).orders
        for order in orders:
            with self.guard:
                self.bytes.remove((order.did, order.endpoint))
                left = [at for did, at in self.bytes if did == order.did]
            assert left, f"the bytes of {order.did} were at {order.endpoint} only"
        if orders:
            self._count("removed", self.world.tell(site, *map(removed, orders)).accepted)

    def attach(self, dice: random.Random) -> None:
        self.world.attach(dice.choice(self.datasets), *dice.sample(self.names, 3))

    def detach(self, dice: random.Random) -> None:
        self.world.detach(dice.choice(self.datasets), *dice.sample(self.names, 20))

    def add_rule(self, dice: random.Random) -> None:
        self.world.rule(dice.choice(self.datasets), "*", copies=dice.choice((1, 1, 2)))

    def end_rule(self, dice: random.Random) -> None:
        r = tables.rules
        with self.world.look() as s:
            alive = list(s.execute(sa.select(r.c.id).where(r.c.ended_at.is_(None)).order_by(r.c.id)).scalars())
        if len(alive) > 2:
            self.world.delete(self.world.show(dice.choice(alive)))

    def move(self, dice: random.Random) -> None:
        at = dice.choice(ENDPOINTS)
        site = at.split("-")[0]
        orders = self.world.claim(site, 20).orders
        with self.guard:
            self.bytes |= {(order.did, order.target_endpoint) for order in orders}
        if orders:
            self._count("copied", self.world.report(site, [done(order) for order in orders]).accepted)

    def evaluate(self, dice: random.Random) -> None:
        self.world.evaluate(times=1_000)

    def look(self, dice: random.Random) -> None:
        """One consistent look: everything is counted rightly, and every file has a good copy."""
        self.world.check()
        with self.world.look() as s:
            good = sa.select(replicas.c.file_id).where(replicas.c.state == ReplicaState.AVAILABLE)
            d = tables.dids
            lost = s.execute(sa.select(d.c.name).where(d.c.kind == DidKind.FILE, d.c.id.not_in(good))).scalars().all()
        assert not lost, f"no good copy is left of {lost}"

    # --- the race ---

    def _count(self, what: str, many: int = 1) -> None:
        with self.guard:
            self.told[what] += many

    def _run(self, verb: Callable[[random.Random], None], number: int, times: int) -> None:
        dice = random.Random(self.seed * 1_000 + number)
        for _ in range(times):
            if self.wrong:
                return
            try:
                verb(dice)
                self._count(verb.__name__)
            except Conflict:
                self._count("repeat")
            except (Refused, NotFound):
                self._count("refused")
            except BaseException as error:  # noqa: BLE001  told at the end, in the thread of the test
                self.wrong.append(error)

    def run(self) -> Counter[str]:
        verbs = [self.delete] * DELETERS
        verbs += [self.attach, self.attach, self.detach, self.add_rule, self.add_rule, self.end_rule, self.end_rule]
        verbs += [self.move, self.move, self.evaluate, self.look]
        times = self.operations // len(verbs)
        threads = [
            threading.Thread(target=self._run, args=(verb, i, times), daemon=True) for i, verb in enumerate(verbs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
            assert not thread.is_alive(), "somebody waits for ever"
        if self.wrong:
            raise self.wrong[0]
        self.settle()
        return self.told

    def settle(self) -> None:
        """All that was begun comes to its end: then every rule that can be is satisfied, and the disks agree."""
        dice = random.Random(self.seed)
        for _ in range(20):
            self.evaluate(dice)
            for at in ENDPOINTS:
                site = at.split("-")[0]
                while orders := self.world.claim(site).orders:
                    self.bytes |= {(order.did, order.target_endpoint) for order in orders}
                    self.world.report(site, [done(order) for order in orders])
                for order in self.world.take(site).orders:
                    self.bytes.remove((order.did, order.endpoint))
                    self.world.tell(site, removed(order))
        self.look(dice)
        with self.world.look() as s:
            e, d = tables.endpoints, tables.dids
            query = sa.select(d.c.name, e.c.name).select_from(replicas).join(d, d.c.id == replicas.c.file_id)
            query = query.join(e, e.c.id == replicas.c.endpoint_id).where(replicas.c.state == ReplicaState.AVAILABLE)
            there = {(f"t:{name}", at) for name, at in s.execute(query)}
        assert there <= self.bytes, f"the catalogue has what no disk has: {sorted(there - self.bytes)[:5]}"


def main() -> None:
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    server = PostgreSQL()
    try:
        server.start()
        server.execute("CREATE DATABASE race TEMPLATE template0")
        db = Database(server.url("race"), pool_size=20)
        schema.migrate(db)
        began = time.monotonic()
        told = Race(db, operations, seed).run()
        print(f"{operations} operations in {time.monotonic() - began:.1f} s:", dict(sorted(told.items())))
        db.close()
    finally:
        server.remove()


if __name__ == "__main__":
    main()
