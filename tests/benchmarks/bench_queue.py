"""Does a claim take longer the more is queued?

Question  On a PostgreSQL with the settings it comes with: a claim of 100 with 10,000 transfers queued, and with
          1,000,000, in the same activities and to the same targets. Less than 20 % slower?
Sketch    A lane is found by one step in an index, a transfer in it by the next entry; an index of a million entries is
          one level deeper than one of ten thousand. So nothing but a few more pages should be touched.

    python -m tests.benchmarks.bench_queue [DATABASE_URL] [--sizes 10000,1000000] [--claims 60] [--lanes 12]

Without a URL a PostgreSQL of its own is started, and removed at the end. All transfers are about the same files: the
queue has the size that is asked for, what belongs to it has not. Each claim is rolled back, so each finds the same.
Prints one JSON document: medians in milliseconds, with and without limits and breakers; fails above 1.2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import limits, transfers
from replica.db import schema, tables
from replica.db.engine import Database
from rules.states import ReplicaState, TransferState
from tests.replica.catalog.world import LEASE, MB, World
from tests.servers import PostgreSQL

GROWTH_MAX = 1.2
FILES = 1_000


class _Undo(Exception):
    """What was claimed is not."""


def prepare(db: Database, lanes: int) -> tuple[World, list[int], list[int]]:
    world = World(db)
    world.endpoint("DESY-DISK")
    targets = [world.endpoint(f"HZDR-{number}", "HZDR") for number in range(lanes)]
    world.files(FILES, "DESY-DISK", world.collection("d"), size=MB)
    with db.write() as s:
        s.connection.exec_driver_sql("DROP INDEX uq_transfers_live")
        files = list(s.execute(sa.select(tables.files.c.did_id)).scalars())
        ids = {row.name: row.id for row in s.execute(sa.select(tables.endpoints))}
        there: list[dict[str, Any]] = [
            {"file_id": file_id, "endpoint_id": ids[name], "state": ReplicaState.COPYING}
            for file_id in files
            for name in targets
        ]
        s.execute(tables.replicas.insert(), there)
    return world, files, [ids[name] for name in targets]


def fill(world: World, files: list[int], targets: list[int], count: int) -> None:
    """Up to so many, in three activities, all over the priorities."""
    with world.db.write() as s:
        have = s.execute(sa.select(sa.func.count()).select_from(tables.transfers)).scalar_one()
        n = sa.func.generate_series(have, count - 1).column_valued("n")
        values = [
            sa.literal(min(files)) + n % len(files),
            sa.literal(min(targets)) + n % len(targets),
            sa.literal(world.sites["HZDR"]),
            sa.literal(TransferState.QUEUED.value),
            n % 5 + 1,
            sa.func.concat("a", n % 3),
            sa.literal(MB),
            sa.literal(s.now, tables.Instant()) + n,
        ]
        names = ["file_id", "target_id", "site_id", "state", "priority", "activity", "size_bytes", "created_at"]
        s.execute(tables.transfers.insert().from_select(names, sa.select(*values)))
    with world.db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE transfers")


def claim_ms(world: World, claims: int) -> float:
    taken = []
    for _ in range(claims):
        try:
            with world.db.write() as s:
                started = time.perf_counter()
                asked = wire.Claim(worker="w", limit=100)
                orders = transfers.claim(s, world.sites["HZDR"], asked, lease_seconds=LEASE)
                taken.append(time.perf_counter() - started)
                assert len(orders.orders) >= 90, len(orders.orders)
                raise _Undo
        except _Undo:
            pass
    return statistics.median(taken) * 1_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?")
    parser.add_argument("--sizes", default="10000,1000000")
    parser.add_argument("--claims", type=int, default=60)
    parser.add_argument("--lanes", type=int, default=12)
    asked = parser.parse_args()
    server = None
    if asked.url is None:
        server = PostgreSQL()
        server.start()
        server.execute("CREATE DATABASE queue TEMPLATE template0")
    db = Database(asked.url or server.url("queue"))  # type: ignore[union-attr]
    try:
        schema.migrate(db)
        world, files, targets = prepare(db, asked.lanes)
        found: dict[str, dict[str, float]] = {"claim_ms": {}, "claim_with_limits_ms": {}}
        sizes = sorted(int(size) for size in asked.sizes.split(","))
        for size in sizes:
            fill(world, files, targets, size)
            claim_ms(world, 5)
            found["claim_ms"][str(size)] = round(claim_ms(world, asked.claims), 2)
            set_limit(world, "HZDR-0", 0)
            set_limit(world, "HZDR-1", 1_000)
            found["claim_with_limits_ms"][str(size)] = round(claim_ms(world, asked.claims), 2)
            set_limit(world, "HZDR-0", None)
            set_limit(world, "HZDR-1", None)
        growth = {name: round(ms[str(sizes[-1])] / ms[str(sizes[0])], 3) for name, ms in found.items()}
        print(json.dumps({**found, "lanes": asked.lanes, "growth": growth, "growth_max": GROWTH_MAX}, indent=2))
        return int(max(growth.values()) > GROWTH_MAX)
    finally:
        db.close()
        if server is not None:
            server.remove()


def set_limit(world: World, target: str, files: int | None) -> None:
    with world.db.write() as s:
        limits.set_limit(s, wire.LimitChange(kind="write", of=target, files_max=files))


if __name__ == "__main__":
    sys.exit(main())
