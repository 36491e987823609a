"""How many files a second does the catalogue alone take, wish, hand out and finish?

Question  On one database: register, attach, a rule for data elsewhere (locks, replicas and transfers made), a rule for
          data that is there, one file added to a dataset under five rules, claim, report, delete a rule with transfers
          to cancel. Is the cost of each operation proportional to what it changes, and how far from the targets of
          one PostgreSQL on two cores?
Sketch    A row inserted with two or three index entries costs PostgreSQL 10–20 µs, an index lookup 2–3 µs, a row
          through the driver 2–5 µs. Register: DID, file, contents, replica = 4 rows → 60–80 µs → 12,000–17,000 files/s.
          Rule elsewhere: a replica (2 indexes) and a transfer (4 indexes), each found by about 5 lookups → 60–80 µs →
          12,000–17,000 files/s. Report: attempt, transfer, replica rewritten → 60–80 µs → 12,000–17,000 files/s.
          A rule for data that is there reads contents, files and replicas twice → 5 µs a file; one file added to a
          dataset is about 40 statements, 20 ms, whatever the dataset's size.

    python -m tests.benchmarks.bench_catalogue DATABASE_URL [--sizes 1000,10000,100000] [--repeats 3]

The database must be empty and is migrated. Prints one JSON document: medians of the repeats, in files a second, and
the statements sent. What prepares an operation is not in its time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import rules
from replica.db import schema
from replica.db.engine import Database
from tests.replica.catalog.world import World, done

CLAIM = 1_000


class Bench:
    def __init__(self, url: str) -> None:
        self.db = Database(url)
        schema.migrate(self.db)
        self.world = World(self.db)
        self.world.three()
        self.statements = 0
        sa.event.listen(self.db.engine, "before_cursor_execute", self._count)
        self.names = 0

    def _count(self, *_: object) -> None:
        self.statements += 1

    def timed(self, files: int, operation: Callable[[], object]) -> dict[str, float]:
        before, started = self.statements, time.perf_counter()
        operation()
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "files_per_second": files / seconds, "statements": self.statements - before}

    def dataset(self) -> str:
        self.names += 1
        return self.world.collection(f"bench{self.names}")

    def all_at_rest(self, rule: wire.Rule) -> None:
        while self.world.show(rule).state != "ok":
            with self.db.write() as s:
                rules.evaluate_due(s)
            for order_site in ("HZDR", "GSI"):
                while orders := self.world.claim(order_site, CLAIM).orders:
                    self.world.report(order_site, [done(order) for order in orders])

    def run(self, size: int) -> dict[str, dict[str, float]]:
        world = self.world
        results: dict[str, dict[str, float]] = {}
        names: list[str] = []
        results["register"] = self.timed(size, lambda: names.extend(world.files(size, "DESY-DISK")))
        dataset = self.dataset()

        def attach() -> None:
            for start in range(0, size, wire.BULK_MAX):
                world.attach(dataset, *names[start : start + wire.BULK_MAX])

        results["attach"] = self.timed(size, attach)
        results["rule_already_there"] = self.timed(size, lambda: world.rule(dataset, "DESY-DISK"))
        made: list[wire.Rule] = []

        def elsewhere() -> None:
            made.append(world.rule(dataset, "HZDR-DISK"))
            self.evaluate_all()

        results["rule_elsewhere"] = self.timed(size, elsewhere)
        with self.claims("HZDR") as batches:
            results["claim"] = self.timed(size, lambda: batches(True))
            results["report"] = self.timed(size, lambda: batches(False))
        assert world.show(made[0]).state == "ok"
        cancelled = world.rule(dataset, "GSI-DISK", grouping="none")
        self.evaluate_all()
        results["delete_rule_with_transfers"] = self.timed(size, lambda: world.delete(cancelled))
        results["delete_rule_at_rest"] = self.timed(size, lambda: world.delete(made[0]))
        for expression in ("HZDR-DISK", "DESY-DISK|HZDR-DISK", "DESY-DISK|GSI-DISK", r"*\GSI-DISK"):
            rule = world.rule(dataset, expression)
            self.evaluate_all()
        self.all_at_rest(rule)
        (late,) = world.files(1, "DESY-DISK")
        results["attach_one_file_under_five_rules"] = self.timed(1, lambda: world.attach(dataset, late))
        return results

    def evaluate_all(self) -> None:
        for _ in range(10_000):
            with self.db.write() as s:
                if rules.evaluate_due(s) == 0:
                    return

    @contextlib.contextmanager
    def claims(self, site: str) -> Iterator[Callable[[bool], None]]:
        held: list[list[wire.Order]] = []

        def batches(claiming: bool) -> None:
            if claiming:
                while orders := self.world.claim(site, CLAIM).orders:
                    held.append(orders)
            else:
                for orders in held:
                    self.world.report(site, [done(order) for order in orders])

        yield batches


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("database_url")
    parser.add_argument("--sizes", default="1000,10000")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    bench = Bench(given.database_url)
    answer: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "sizes": {}}
    for size in (int(text) for text in given.sizes.split(",")):
        runs = [bench.run(size) for _ in range(given.repeats)]
        answer["sizes"][size] = {
            name: {key: round(statistics.median(run[name][key] for run in runs), 4) for key in runs[0][name]}
            for name in runs[0]
        }
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
