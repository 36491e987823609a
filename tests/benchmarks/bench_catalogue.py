"""How many files a second does the catalogue alone take, wish, hand out, finish and let go, and does it stay so?

Question  On a PostgreSQL with the settings that Replica recommends: each row of the table of targets in the design of
          the catalogue, for datasets of 1,000 to 1,000,000 files. Is the cost for a file the same in all sizes, and how
          far is each operation from what the database needs for the bare rows? How much memory does it take?
Sketch    A row inserted with two or three index entries costs PostgreSQL 5-10 µs, an index lookup 2-3 µs, a row
          through the driver 2-5 µs. Register: DID, file, replica = 3 rows -> 30-50 µs -> 20,000-30,000 files/s. Rule
          elsewhere: a replica (2 indexes) and a transfer (4 indexes) -> 40-50 µs -> 20,000 files/s. Report: attempt,
          transfer, replica rewritten -> 60-90 µs -> 11,000-16,000 files/s. A rule on what is protected there is a row.

    python -m tests.benchmarks.bench_catalogue [DATABASE_URL] [--sizes 1000,10000,100000,1000000] [--repeats 3]

Without a URL a PostgreSQL of its own is started, on the disk of TMPDIR, and removed at the end. A database that is
given must be empty, and is migrated. Prints one JSON document: medians of the repeats (one, above 10,000 files), in
files a second; the statements sent; how many times longer it took than to insert the same number of bare rows in this
run (`times_bare`), which shared machines change less than seconds; the cost for a file in the largest size against
that in the size of 10,000 (`growth`); and the largest resident memory of this process. What prepares an operation is
not in its time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import deletions, removals, replicas, rules
from replica.catalog.bulk import Columns, rows_of
from replica.collector import settle_in
from replica.db import schema
from replica.db.engine import Database
from rules.names import Did
from tests.replica.catalog.world import ROOT, World, checksums, done, size_of
from tests.servers import PostgreSQL

CLAIM = 1_000
#: Rows written for each file: what `times_bare` is measured against.
ROWS = {
    "register": 3,
    "attach": 1,
    "rule_elsewhere": 2,
    "five_rules_after_a_tenth_more": 1,
    "claim": 1,
    "report": 3,
    "delete_rule_with_transfers": 2,
    "delete_rule_at_rest": 1,
    "deletion_marked": 2,
    "deletion_forgotten": 2,
    "deletion_marked_at_two_endpoints": 2,
    "deletion_forgotten_by_two_sites": 2,
    "list_replicas": 1,
}
#: From the design: files a second, or milliseconds for all.
TARGETS = {
    "register": 20_000,
    "attach": 50_000,
    "rule_elsewhere": 20_000,
    "rule_protected_there": "50 ms",
    "five_rules_after_a_tenth_more": 10_000,
    "report": 10_000,
    "delete_rule_at_rest": 100_000,
    "delete_rule_with_transfers": 30_000,
    "deletion_marked": 40_000,
    "deletion_forgotten": 40_000,
    "deletion_marked_at_two_endpoints": 40_000,
    "deletion_forgotten_by_two_sites": 40_000,
    "attach_one_file_under_five_rules": "20 ms",
    "list_replicas": 100_000,
}
GROWTH_MAX = 1.5
#: Above, two sites that delete at once are not measured: it takes as long as all the rest.
TWO_SITES_MAX = 100_000
MEMORY_MB_MAX = 400

Result = dict[str, float]


class Bench:
    def __init__(self, url: str) -> None:
        self.db = Database(url)
        schema.migrate(self.db)
        self.world = World(self.db)
        self.world.three()
        self.statements = 0
        sa.event.listen(self.db.engine, "before_cursor_execute", self._count)
        self.names = 0
        self.results: dict[str, Result] = {}

    def _count(self, *_: object) -> None:
        self.statements += 1

    # --- what is measured ---

    @contextlib.contextmanager
    def measured(self, name: str, files: int) -> Iterator[None]:
        """May be entered again: then times and statements are added up."""
        before, started = self.statements, time.perf_counter()
        yield
        result = self.results.setdefault(name, {"files": 0, "seconds": 0.0, "statements": 0})
        result["files"] += files
        result["seconds"] += time.perf_counter() - started
        result["statements"] += self.statements - before

    def run(self, size: int) -> dict[str, Result]:
        self.results = {}
        world, measured = self.world, self.measured
        dataset = self.dataset()
        self.register(size, "DESY-DISK", "register", dataset)
        with measured("rule_already_there", size):
            world.rule(dataset, "DESY-DISK")
        with measured("rule_protected_there", size):
            world.rule(dataset, "DESY-DISK", priority=2)
        with measured("rule_elsewhere_answered", size):
            elsewhere = world.rule(dataset, "HZDR-DISK", purge=True)
        with measured("rule_elsewhere", size):
            evaluate_all(self.db)
        self.results["rule_elsewhere"]["seconds"] += self.results["rule_elsewhere_answered"]["seconds"]
        self.carry_out("HZDR")
        assert world.show(elsewhere).state == "ok"
        cancelled = world.rule(dataset, "GSI-DISK")
        evaluate_all(self.db)
        self.delete(cancelled, "delete_rule_with_transfers", size)
        self.list(dataset, size)
        self.five_rules(dataset, size)
        self.delete(elsewhere, "delete_rule_at_rest", size + size // 10)
        self.let_go(["HZDR"], "deletion_marked", "deletion_forgotten")
        if size <= TWO_SITES_MAX:
            self.two_sites(size)
        return self.results

    def register(self, size: int, at: str, name: str, dataset: str) -> None:
        for start in range(0, size, wire.BULK_MAX):
            files = [self.name() for _ in range(min(wire.BULK_MAX, size - start))]
            given = [wire.NewReplica(did=n, size=size_of(n), checksums=checksums(n)) for n in files]
            with self.measured(name, len(files)), self.db.write() as s:
                replicas.register(s, ROOT, wire.Registration(endpoint=at, evidence="hashed", replicas=given))
            with self.measured("attach" if name == "register" else f"{name}_attach", len(files)):
                self.world.attach(dataset, *files)

    def carry_out(self, site: str, of: str = "") -> None:
        while True:
            before, started = self.statements, time.perf_counter()
            orders = self.world.claim(site, CLAIM).orders
            if not orders:
                return
            claimed = self.results.setdefault(f"{of}claim", {"files": 0, "seconds": 0.0, "statements": 0})
            claimed["files"] += len(orders)
            claimed["seconds"] += time.perf_counter() - started
            claimed["statements"] += self.statements - before
            outcomes = [done(order) for order in orders]
            with self.measured(f"{of}report", len(orders)):
                self.world.report(site, outcomes)

    def delete(self, rule: wire.Rule, name: str, size: int) -> None:
        with self.measured(f"{name}_answered", size):
            self.world.delete(rule)
        with self.measured(name, size):
            evaluate_all(self.db)
        self.results[name]["seconds"] += self.results[f"{name}_answered"]["seconds"]

    def list(self, dataset: str, size: int) -> None:
        with self.measured("list_replicas", 2 * size), self.db.read() as s:
            assert sum(1 for _ in replicas.stream(s, Did.parse(dataset))) == 2 * size

    def five_rules(self, dataset: str, size: int) -> None:
        """There are three already."""
        for expression in ("DESY-DISK|HZDR-DISK", "HZDR-DISK"):
            self.world.rule(dataset, expression)
        more = size // 10
        for start in range(0, more, wire.BULK_MAX):
            files = self.world.files(min(wire.BULK_MAX, more - start), "DESY-DISK")
            with self.measured("five_rules_after_a_tenth_more", 5 * len(files)):
                self.world.attach(dataset, *files)
                evaluate_all(self.db)
        while self.world.move("HZDR"):
            pass
        each = []
        for late in self.world.files(11, "DESY-DISK"):
            before, started = self.statements, time.perf_counter()
            self.world.attach(dataset, late)
            each.append((time.perf_counter() - started, self.statements - before))
        self.results["attach_one_file_under_five_rules"] = {
            "files": 1,
            "seconds": statistics.median(seconds for seconds, _ in each),
            "statements": each[-1][1],
        }
        while self.world.move("HZDR"):
            pass
        with self.db.read() as s:
            here = [rule for rule in rules.list_page(s, did=Did.parse(dataset)).items if "HZDR" in rule.expression]
        for rule in here[1:]:
            self.world.delete(rule)

    def two_sites(self, size: int) -> None:
        """Copies at two sites, which both let them go at the same time."""
        for site in ("HZDR", "GSI"):
            dataset = self.dataset()
            self.register(size, "DESY-DISK", "of_two_sites", dataset)
            rule = self.world.rule(dataset, f"{site}-DISK", purge=True)
            evaluate_all(self.db)
            self.carry_out(site, "of_two_sites_")
            self.world.delete(rule)
            evaluate_all(self.db)
        self.let_go(["HZDR", "GSI"], "deletion_marked_at_two_endpoints", "deletion_forgotten_by_two_sites")

    def let_go(self, sites: list[str], marked: str, forgotten: str) -> None:
        """The copies of a rule that purges are decided on, handed out and forgotten: by each site at the same time."""
        with self.db.read() as s:
            waiting = deletions.endpoints_to_look_at(s)
        files = self.each(marked, self.decide, waiting)
        claimed = [self.claim_deletions(site) for site in sites]
        assert files == self.each(forgotten, self.forget, claimed)

    def each(self, name: str, do: Callable[[Any], int], things: list[Any]) -> int:
        """As many threads as things, all of them measured together; returns the sum of what they did."""
        before, started = self.statements, time.perf_counter()
        with ThreadPoolExecutor(len(things)) as threads:
            files = sum(threads.map(do, things))
        seconds, statements = time.perf_counter() - started, self.statements - before
        self.results[name] = {"files": files, "seconds": seconds, "statements": statements}
        return files

    def decide(self, endpoint_id: int) -> int:
        """Slice by slice, each from where the last one ended: as the pass does."""
        files, reached = 0, None
        while True:
            with self.db.write() as s:
                decided = deletions.decide(s, endpoint_id, reached)
            files, reached = files + decided.files, decided.reached
            if reached is None:
                return files

    def claim_deletions(self, site: str) -> list[tuple[int, wire.DeletionReport]]:
        """All of a site's orders, as reports that all of it is gone."""
        id_, reports = self.world.sites[site], []
        while True:
            with self.db.write() as s:
                claim = wire.DeletionClaim(worker=f"{site}/1", limit=CLAIM)
                orders = removals.claim(s, id_, claim, lease_seconds=3_600).orders
            if not orders:
                return reports
            gone = [wire.DeletionOutcome(deletion=o.deletion, epoch=o.epoch, outcome="removed") for o in orders]
            reports.append((id_, wire.DeletionReport(worker=f"{site}/1", outcomes=gone)))

    def forget(self, reports: list[tuple[int, wire.DeletionReport]]) -> int:
        for site_id, report in reports:
            with self.db.write() as s:
                removals.report(s, site_id, report, fraction=0.5)
        return sum(len(report.outcomes) for _, report in reports)

    # --- what is needed for it ---

    def name(self) -> str:
        self.names += 1
        return f"t:run/{self.names // 10_000}/frame_{self.names:08}.h5"

    def dataset(self) -> str:
        self.names += 1
        return self.world.collection(f"bench{self.names}")

    def bare(self, rows: int = 50_000) -> dict[str, float]:
        """What the database itself needs, now: a row with one index, a round trip, a commit."""
        with self.db.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS bare")
            connection.exec_driver_sql("CREATE TABLE bare (id bigint PRIMARY KEY, other bigint, text text)")
        table = sa.table("bare", sa.column("id"), sa.column("other"), sa.column("text"))
        columns: Columns = {"id": sa.BigInteger(), "other": sa.BigInteger(), "text": sa.String()}
        given = [(i, i, f"run/0/frame_{i:08}.h5") for i in range(rows)]
        started = time.perf_counter()
        for start in range(0, rows, 10_000):
            with self.db.write() as s:
                batch = rows_of(s, "bare_rows", columns, given[start : start + 10_000])
                s.execute(sa.insert(table).from_select(list(columns), sa.select(batch)))
        row = (time.perf_counter() - started) / rows
        with self.db.engine.connect() as connection:
            started = time.perf_counter()
            for _ in range(200):
                connection.exec_driver_sql("SELECT 1")
            trip = (time.perf_counter() - started) / 200
        with self.db.engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE bare")
        return {"row_us": round(row * 1e6, 2), "round_trip_us": round(trip * 1e6, 1)}


def evaluate_all(db: Database) -> None:
    for _ in range(100_000):
        with db.write() as s:
            if rules.evaluate_due(s) == 0:
                return


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


def median_of(runs: list[dict[str, Result]], bare_us: float) -> dict[str, Result]:
    answer: dict[str, Result] = {}
    for name in runs[0]:
        seconds = statistics.median(run[name]["seconds"] for run in runs)
        files = runs[0][name]["files"]
        answer[name] = {
            "milliseconds": round(seconds * 1000, 1),
            "files_per_second": round(files / seconds),
            "statements": statistics.median(run[name]["statements"] for run in runs),
        }
        if name in ROWS:
            answer[name]["times_bare"] = round(seconds * 1e6 / files / ROWS[name] / bare_us, 1)
    return answer


def growth(sizes: dict[int, Any]) -> dict[str, float]:
    """The cost for a file in the largest size, against that in the size next to 10,000."""
    small, large = min(sizes, key=lambda size: abs(size - 10_000)), max(sizes)
    if small == large:
        return {}
    return {
        name: round(sizes[large][name]["times_bare"] / sizes[small][name]["times_bare"], 2)
        for name in ROWS
        if sizes[small].get(name, {}).get("times_bare")
    }


def measure(url: str, sizes: list[int], repeats: int) -> dict[str, Any]:
    bench = Bench(url)
    settle_in()  # as a server does
    answer: dict[str, Any] = {"machine": machine(), "targets": TARGETS, "sizes": {}, "bare": {}}
    for size in sizes:
        bare, runs = [bench.bare()], []
        for _ in range(repeats if size <= 10_000 else 1):
            runs.append(bench.run(size))
            bare.append(bench.bare())
        row_us = statistics.median(b["row_us"] for b in bare)
        answer["bare"][size] = {key: statistics.median(b[key] for b in bare) for key in bare[0]}
        answer["sizes"][size] = median_of(runs, row_us)
    answer["growth"] = growth(answer["sizes"])
    answer["growth_max"] = GROWTH_MAX
    answer["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    answer["memory_mb_max"] = MEMORY_MB_MAX
    bench.db.close()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("database_url", nargs="?")
    parser.add_argument("--sizes", default="1000,10000,100000")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    sizes = [int(text) for text in given.sizes.split(",")]
    with _database(given.database_url) as url:
        print(json.dumps(measure(url, sizes, given.repeats), indent=2))


@contextlib.contextmanager
def _database(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    server = PostgreSQL(durable=True)
    try:
        server.start()
        server.execute("CREATE DATABASE bench")
        yield server.url("bench")
    finally:
        server.remove()


if __name__ == "__main__":
    main()
