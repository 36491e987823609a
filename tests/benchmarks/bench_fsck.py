"""How long does fsck take for a catalogue of so many files, and does its memory stay the same?

Question  Two replicas of each file at rest under a rule, and a tenth of the files on their way to a third endpoint:
          how long for each invariant, on a PostgreSQL with the settings that Replica recommends?
Sketch    The dearest ones join contents, locks and replicas whole: hashes of some millions of rows, 1-3 µs each and
          about ten of them -> tens of seconds for a million files; ten times that for ten million.

    python -m tests.benchmarks.bench_fsck [--files 1000000]

Starts a PostgreSQL of its own, on the disk of TMPDIR, and removes it. The catalogue is written with one INSERT for each
table. Prints one JSON document; fails if fsck finds anything.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import sqlalchemy as sa

from replica.catalog import fsck
from replica.db import schema
from replica.db.engine import Database
from tests.replica.catalog.world import World
from tests.servers import PostgreSQL

FILES_IN_DATASET = 10_000

_BUILD = """
INSERT INTO dids (id, scope_id, name, kind, account_id, created_at)
    SELECT 1000000000 + i, 1, 'file-number-' || i, 1, 1, 0 FROM generate_series(0, :files - 1) i
;INSERT INTO files (did_id, size_bytes, adler32)
    SELECT 1000000000 + i, 1000, 'abcd' FROM generate_series(0, :files - 1) i
;INSERT INTO dids (id, scope_id, name, kind, account_id, created_at, files_total, bytes_total)
    SELECT 1000 + d, 1, 'dataset-' || d, 2, 1, 0, :each, :each * 1000 FROM generate_series(0, :files / :each - 1) d
;INSERT INTO contents SELECT 1000 + i / :each, 1000000000 + i FROM generate_series(0, :files - 1) i
;INSERT INTO replicas (file_id, endpoint_id, state, evidence, verified_at)
    SELECT 1000000000 + i, e, 2, 3, 1 FROM generate_series(0, :files - 1) i, generate_series(1, 2) e
;INSERT INTO rules (id, did_id, account_id, copies, expression, grouping, spread, priority, activity, state,
                    created_at, updated_at)
    SELECT 1000 + d, 1000 + d, 1, 2, '*', 1, 'endpoint', 3, 'x', 2, 0, 0 FROM generate_series(0, :files / :each - 1) d
;INSERT INTO locks (rule_id, unit_id, endpoint_id, files_total, files_available, bytes_total)
    SELECT 1000 + d, 1000 + d, e, :each, :each, :each * 1000
    FROM generate_series(0, :files / :each - 1) d, generate_series(1, 2) e
;INSERT INTO rules (id, did_id, account_id, copies, expression, grouping, spread, priority, activity, state,
                    created_at, updated_at, evaluate_at)
    SELECT 900000 + d, 1000 + d, 1, 1, 'GSI-DISK', 1, 'endpoint', 3, 'x', 1, 0, 0, 9000000000000000
    FROM generate_series(0, :files / :each / 10 - 1) d
;INSERT INTO locks (rule_id, unit_id, endpoint_id, files_total, files_available, bytes_total)
    SELECT 900000 + d, 1000 + d, 3, :each, 0, :each * 1000 FROM generate_series(0, :files / :each / 10 - 1) d
;INSERT INTO replicas (file_id, endpoint_id, state)
    SELECT 1000000000 + i, 3, 1 FROM generate_series(0, :files / 10 - 1) i
;INSERT INTO transfers (file_id, target_id, site_id, state, priority, activity, size_bytes, created_at)
    SELECT 1000000000 + i, 3, 3, 1, 3, 'x', 1000, 0 FROM generate_series(0, :files / 10 - 1) i
;UPDATE endpoints e SET used_bytes = 1000 * (SELECT count(*) FROM replicas r WHERE r.endpoint_id = e.id)
;INSERT INTO usage SELECT 1, endpoint_id, sum(files_total), sum(bytes_total) FROM locks GROUP BY endpoint_id
"""


def measure(database: Database, files: int) -> dict[str, Any]:
    schema.migrate(database)
    World(database).three()
    with database.write() as s:
        s.execute(sa.text("SET LOCAL statement_timeout = 0"))
        for statement in _BUILD.split(";"):
            names = {
                name: value for name, value in (("files", files), ("each", FILES_IN_DATASET)) if f":{name}" in statement
            }
            s.execute(sa.text(statement), names)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.monotonic()
    report = fsck.check(database)
    seconds = time.monotonic() - began
    assert report.clean, [finding for finding in report.findings if finding.violations]
    dearest = sorted(report.findings, key=lambda finding: -finding.seconds)[:8]
    return {
        "files": files,
        "replicas": 2 * files + files // 10,
        "seconds": round(seconds, 1),
        "dearest": {finding.invariant: finding.seconds for finding in dearest},
        "memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "memory_grew_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    files = parser.parse_args().files // (10 * FILES_IN_DATASET) * 10 * FILES_IN_DATASET
    server = PostgreSQL()
    try:
        server.start()
        server.execute("CREATE DATABASE fsck")
        database = Database(server.url("fsck"))
        print(json.dumps(measure(database, files), indent=2))
        database.close()
    finally:
        server.remove()


if __name__ == "__main__":
    main()
