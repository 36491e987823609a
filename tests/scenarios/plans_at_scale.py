"""A plan changes nothing, and the act then does what it said: to the file, the byte and the endpoint, at any size.

    python -m tests.scenarios.plans_at_scale [--files 100000]

Adds, changes, moves and deletes rules of every grouping on datasets that share files, with a part of the data elsewhere
or on its way, a full endpoint and a quota. Before each act it asks for the plan, looks whether any table was written
to, acts, carries out all that follows, and compares. PostgreSQL is started on its own and removed at the end. Prints
one JSON document, and fails if anything differs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from replica import wire
from replica.catalog import dids, plans, quotas, replicas, rule_updates, rules
from replica.db import schema, tables
from replica.db.engine import Database, Session
from rules.names import Did
from rules.states import ReplicaState, RuleState
from tests.replica.catalog.world import ROOT, World, checksums, done, size_of
from tests.servers import PostgreSQL

CLAIM = 1_000
SIZE_BYTES = 1_000  #: about what a file of a World has
DATASETS_MAX = 1_000  #: besides the large one
SHARED = 3  #: files that a small dataset has of the one before it

P = TypeVar("P")
#: Endpoint → numbers.
Sums = dict[str, tuple[int, ...]]


@dataclass
class State:
    """What acts change, as sets."""

    locks: set[tuple[int, int]]
    held: dict[int, set[int]]  #: endpoint → files that locks of the rule hold
    begun: dict[int, set[int]]  #: endpoint → files that are available, or on their way
    released: dict[int, set[int]]  #: available, and may be deleted
    cancelled: int


@dataclass
class Checked:
    """One act and its plan."""

    name: str
    units: int = 0
    plan_seconds: float = 0.0
    plan_statements: int = 0
    act_seconds: float = 0.0
    files_made: int = 0
    files_given_up: int = 0
    copies_refused: int = 0
    differences: list[str] = field(default_factory=list)


class Story:
    """All acts one after the other, on a catalogue of about so many files."""

    def __init__(self, db: Database, files: int) -> None:
        self.db, self.world = db, World(db)
        self.checked: list[Checked] = []
        self.statements = 0
        sa.event.listen(db.engine, "before_cursor_execute", self._count)
        self._build(files)

    def _count(self, *_: object) -> None:
        self.statements += 1

    def _build(self, files: int) -> None:
        world = self.world
        for name in ("A-SOURCE", "A-DISK", "B-DISK", "B-TAPE", "C-DISK", "C-QUOTA", "D-OTHER"):
            world.endpoint(name)
        world.endpoint("D-FULL", capacity=10 * SIZE_BYTES)
        world.endpoint("D-SMALL", capacity=files * SIZE_BYTES // 5)
        with self.db.write() as s:
            limit = files * SIZE_BYTES // 7
            quotas.put(s, ROOT, wire.NewQuota(account="root", expression="C-QUOTA", limit_bytes=limit))
        self.box = world.collection("box", "container")
        large = world.collection("large")
        names = world.files(files // 2, "A-SOURCE", large)
        self.register(names[: files // 20], "B-DISK")
        small = [world.collection(f"small{i}") for i in range(min(files // 20, DATASETS_MAX))]
        size = files // 2 // len(small)
        every = [f"t:s{i}x{j}" for i in range(len(small)) for j in range(size)]
        self.register(every, "A-SOURCE")
        with self.db.write() as s:
            for i, dataset in enumerate(small):
                mine = every[i * size : i * size + size]
                if i % 5 == 4:
                    mine = mine + every[i * size - SHARED : i * size]
                self.attach(s, dataset, mine)
            self.attach(s, self.box, [large, *small])
        self.register([name for i, name in enumerate(every) if i % (3 * size) < 1.2 * size], "C-DISK")
        for i in range(0, len(small), 7):
            world.rule(small[i], "B-TAPE|A-DISK")
        gone = [world.rule(dataset, "B-DISK") for dataset in small[3::40]]
        self.settle()
        for rule in gone:
            world.delete(rule)
        for dataset in small[5::50]:
            world.rule(dataset, "C-DISK", copies=1)  # on its way when the story begins
        world.evaluate(times=100_000)
        with self.db.read() as s:
            self.name = {row.id: row.name for row in s.execute(sa.select(tables.endpoints))}
            self.size = dict(map(tuple, s.execute(sa.select(tables.files.c.did_id, tables.files.c.size_bytes))))
            self.inside: dict[int, set[int]] = defaultdict(set)
            for parent_id, child_id in s.execute(sa.select(tables.contents)):
                self.inside[parent_id].add(child_id)

    def register(self, names: Sequence[str], at: str) -> None:
        for start in range(0, len(names), wire.BULK_MAX):
            some = [
                wire.NewReplica(did=name, size=size_of(name), checksums=checksums(name))
                for name in names[start : start + wire.BULK_MAX]
            ]
            with self.db.write() as s:
                replicas.register(s, ROOT, wire.Registration(endpoint=at, replicas=some))

    def attach(self, s: Any, parent: str, children: Sequence[str]) -> None:
        for start in range(0, len(children), wire.BULK_MAX):
            dids.attach(s, Did.parse(parent), [Did.parse(c) for c in children[start : start + wire.BULK_MAX]])

    def settle(self) -> None:
        """All that is due is looked at and all that is queued arrives, until nothing follows any more."""
        while True:
            worked = self.world.evaluate(times=100_000)
            moved = 0
            for site in self.world.sites:
                while orders := self.world.claim(site, limit=CLAIM).orders:
                    moved += self.world.report(site, [done(order) for order in orders]).accepted
            if not moved and not worked:
                return

    # --- looking ---

    def written(self) -> dict[str, object]:
        """Of every table its number of rows, and the newest transaction that wrote one; on SQLite all that is in it."""
        found: dict[str, object] = {}
        with self.db.read() as s:
            for table in tables.metadata.sorted_tables:
                if s.postgresql:
                    text = f'SELECT count(*), max(xmin::text::bigint) FROM "{table.name}"'
                    found[table.name] = tuple(s.execute(sa.text(text)).one())
                else:
                    found[table.name] = sorted(repr(tuple(row)) for row in s.execute(sa.select(table)))
        return found

    def look(self, rule_id: int) -> State:
        locks, copies = tables.locks, tables.replicas
        pair = sa.select(copies.c.endpoint_id, copies.c.file_id)
        available = copies.c.state == ReplicaState.AVAILABLE
        with self.db.read() as s:
            mine = sa.select(locks.c.unit_id, locks.c.endpoint_id)
            mine = mine.where(locks.c.rule_id == rule_id)
            held: dict[int, set[int]] = defaultdict(set)
            for unit_id, endpoint_id in s.execute(mine):
                held[endpoint_id] |= {unit_id} if unit_id in self.size else self.inside[unit_id]
            there, begun = _sets(s, pair.where(available)), _sets(s, pair.where(copies.c.state == ReplicaState.COPYING))
            for endpoint_id, ids in there.items():
                begun[endpoint_id] |= ids
            return State(
                set(map(tuple, s.execute(mine.where(sa.not_(locks.c.surplus))))),
                held,
                begun,
                _sets(s, pair.where(available, copies.c.tombstone_at.is_not(None))),
                self.world.count(tables.transfers, tables.transfers.c.reason_code == "not_wanted"),
            )

    def sums(self, files: dict[int, set[int]], *, less: dict[int, set[int]]) -> Sums:
        """Endpoint → files and bytes of the one that are not in the other."""
        found: Sums = {}
        for endpoint_id, ids in files.items():
            if rest := ids - less.get(endpoint_id, set()):
                found[self.name[endpoint_id]] = len(rest), sum(self.size[each] for each in rest)
        return found

    # --- plan and act ---

    def plan(self, checked: Checked, make: Callable[..., P], *args: Any) -> P:
        before = self.written()
        sent, started = self.statements, time.perf_counter()
        with self.db.read() as s:
            plan = make(s, *args)
        checked.plan_seconds = round(time.perf_counter() - started, 2)
        checked.plan_statements = self.statements - sent
        after = self.written()
        checked.differences += [f"the plan changed {t}" for t in before if before[t] != after[t]]
        self.checked.append(checked)
        return plan

    def act(self, checked: Checked, do: Callable[[Any], Any]) -> Any:
        started = time.perf_counter()
        with self.db.write() as s:
            made = do(s)
        self.settle()
        checked.act_seconds = round(time.perf_counter() - started, 2)
        print(f"{checked.name}: plan {checked.plan_seconds} s, act {checked.act_seconds} s", file=sys.stderr)
        return made

    def compare(self, checked: Checked, what: str, planned: object, true: object) -> None:
        if planned != true:
            checked.differences.append(f"{what}: planned {planned}, done {true}")

    def add(self, name: str, **wish: Any) -> int:
        checked = Checked(name)
        new = wire.NewRule(did=self.box, **wish)
        plan = self.plan(checked, plans.plan, ROOT, new)
        before = self.look(0)
        rule_id: int = self.act(checked, lambda s: rules.add(s, ROOT, new)).id
        after = self.look(rule_id)
        units: dict[str, int] = defaultdict(int)
        for _, endpoint_id in after.locks:
            units[self.name[endpoint_id]] += 1
        self.compare(checked, "copies of units", {t.endpoint: t.units for t in plan.totals}, dict(units))
        whole = {t.endpoint: (t.files, t.bytes) for t in plan.totals}
        self.compare(checked, "files and bytes", whole, self.sums(after.held, less={}))
        new_ = {t.endpoint: (t.new_files, t.new_bytes) for t in plan.totals if t.new_files}
        made = self.sums(after.begun, less=before.begun)
        self.compare(checked, "new files and bytes", new_, made)
        self.compare(checked, "bytes that move", plan.new_bytes, sum(size for _, size in made.values()))
        with self.db.read() as s:
            row = rules.look(s, rule_id)
        self.compare(checked, "copies refused", plan.copies_missing, row.copies_missing)
        checked.units, checked.copies_refused = plan.units, plan.copies_missing
        checked.files_made = sum(count for count, _ in made.values())
        return rule_id

    def change(self, name: str, rule_id: int, change: wire.RuleChange | wire.RuleMove) -> None:
        checked = Checked(name)
        before = self.look(rule_id)
        if isinstance(change, wire.RuleMove):
            plan = self.plan(checked, rule_updates.plan_move, rule_id, change)
            self.act(checked, lambda s: rule_updates.move(s, ROOT, rule_id, change))
        else:
            plan = self.plan(checked, rule_updates.plan, rule_id, change)
            self.act(checked, lambda s: rule_updates.update(s, ROOT, rule_id, change))
        after = self.look(rule_id)

        def copies(some: set[tuple[int, int]]) -> dict[str, int]:
            found: dict[str, int] = defaultdict(int)
            for _, endpoint_id in some:
                found[self.name[endpoint_id]] += 1
            return dict(found)

        self.compare(checked, "made", {m.endpoint: m.copies for m in plan.made}, copies(after.locks - before.locks))
        gone = {g.endpoint: g.copies for g in plan.given_up}
        self.compare(checked, "given up", gone, copies(before.locks - after.locks))
        made = self.sums(after.begun, less=before.begun)
        self.compare(checked, "new", {m.endpoint: (m.files, m.bytes) for m in plan.made if m.files}, made)
        left = self.sums(after.released, less=before.released)
        self.compare(checked, "released", {g.endpoint: (g.files, g.bytes) for g in plan.given_up if g.files}, left)
        with self.db.read() as s:
            row = rules.look(s, rule_id)
        self.compare(checked, "copies refused", plan.missing_copies, row.copies_missing)
        self.compare(checked, "state", RuleState.OK, row.state)
        checked.units, checked.copies_refused = plan.units, plan.missing_copies
        checked.files_made = sum(count for count, _ in made.values())
        checked.files_given_up = sum(count for count, _ in left.values())

    def delete(self, name: str, rule_id: int) -> None:
        checked = Checked(name)
        before = self.look(rule_id)
        plan = self.plan(checked, plans.plan_delete, rule_id)
        self.act(checked, lambda s: rules.delete(s, rule_id, ROOT))
        after = self.look(rule_id)
        left = self.sums(after.released, less=before.released)
        self.compare(checked, "released", {e.endpoint: (e.files, e.bytes) for e in plan.endpoints if e.files}, left)
        self.compare(checked, "files", plan.files, sum(count for count, _ in left.values()))
        self.compare(checked, "stopped", plan.stopped, after.cancelled - before.cancelled)
        self.compare(checked, "locks left", set(), after.locks)
        checked.files_given_up = plan.files

    def tell(self) -> list[Checked]:
        good = "A-DISK|B-DISK|B-TAPE|C-DISK|D-OTHER"
        three = self.add("add dataset under a quota", expression="D-SMALL|C-QUOTA|D-FULL")
        one = self.add("add dataset ×2", expression=f"{good}|D-FULL", copies=2, spread="site")
        self.change("fewer copies", one, wire.RuleChange(copies=1))
        self.change("more copies, elsewhere", one, wire.RuleChange(copies=2, expression="B-TAPE|C-DISK|D-OTHER"))
        self.change("grouping none", one, wire.RuleChange(grouping="none"))
        self.change("move", one, wire.RuleMove(expression="A-DISK|B-DISK|D-FULL"))
        four = self.add("add all ×2", expression=f"{good}|D-FULL|A-SOURCE", grouping="all", copies=2)
        two = self.add("add none", expression="D-FULL|D-SMALL|C-QUOTA", grouping="none")
        self.change("grouping all", one, wire.RuleChange(grouping="all", expression=good))
        self.change("grouping dataset", four, wire.RuleChange(grouping="dataset", copies=1))
        self.delete("delete what shares", one)
        for rule_id in (two, three, four):
            self.delete("delete", rule_id)
        return self.checked


def _sets(s: Session, pairs: sa.Select[Any]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = defaultdict(set)
    for endpoint_id, file_id in s.execute(pairs):
        found[endpoint_id].add(file_id)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    said = parser.parse_args(words)
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    server = PostgreSQL()
    try:
        server.start()
        server.execute("CREATE DATABASE plans")
        database = Database(server.url("plans"), clock=lambda: moment)
        schema.migrate(database)
        checked = Story(database, said.files).tell()
        database.close()
    finally:
        server.remove()
    print(json.dumps({"files": said.files, "acts": [vars(each) for each in checked]}, indent=2))
    return 1 if any(each.differences for each in checked) else 0


if __name__ == "__main__":
    raise SystemExit(main())
