"""How fast an endpoint is scanned: `python -m tests.benchmarks.bench_scan [--files N] [--postgresql]`, JSON on stdout.

All of it: the catalogue is asked over HTTP, the folder is listed, both are compared, the findings are told. Beside it
`find -printf`, which only lists. Fails when the memory of the process grows with the files.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from replica import log, wire
from replica.db import schema
from replica.db.engine import Database
from replica.storage.posix import PosixStorage
from tests.servers import PostgreSQL
from tests.workers.test_scanning import Place, placed

#: KiB of memory that a scan of any number of files may add.
GROWTH_MAX = 300_000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--postgresql", action="store_true")
    asked = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-scan-")))
        url = f"sqlite:///{directory}/r.db"
        if asked.postgresql:
            server = PostgreSQL()
            stack.callback(server.remove)
            server.start()
            server.execute("CREATE DATABASE bench")
            url = server.url("bench")
        db = Database(url)
        stack.callback(db.close)
        schema.migrate(db)
        place = stack.enter_context(placed(db, directory))
        log.configure("error")
        asyncio.run(PosixStorage(place.root, name="DISK").prepare())
        names = [f"{i // 1000:04}/file{i:07}" for i in range(asked.files)]
        make(place, names)
        print(json.dumps(measured(place, len(names)), indent=2))


def make(place: Place, names: list[str]) -> None:
    for start in range(0, len(names), wire.BULK_MAX):
        part = names[start : start + wire.BULK_MAX]
        for name in part:
            path = place.root / "t" / name
            if name.endswith("000"):
                path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        replicas = [wire.NewReplica(did=f"t:{n}", size=0, checksums={"adler32": "00000001"}) for n in part]
        place.client.replicas.register(wire.Registration(endpoint="DISK", replicas=replicas, evidence="hashed"))
    for name in names[7 :: max(1, len(names) // 50)]:
        (place.root / "t" / name).unlink()
        (place.root / "t" / f"{name}.dark").touch()


def measured(place: Place, files: int) -> dict[str, Any]:
    began = time.monotonic()
    subprocess.run(["find", place.root, "-type", "f", "-printf", "%P,%s\\n"], stdout=subprocess.DEVNULL, check=True)
    find = time.monotonic() - began
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    scan = asyncio.run(place.scan())
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert (scan.state, scan.known_files) == ("done", files), scan
    assert scan.missing_files == scan.dark_files >= 50, scan
    growth = after.ru_maxrss - before.ru_maxrss
    assert growth < GROWTH_MAX, f"{growth} KiB more"
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "files": files,
        "seconds": round(seconds, 2),
        "files_per_second": round(files / seconds),
        "cpu_seconds_of_worker_and_server": round(cpu, 2),
        "find_seconds": round(find, 2),
        "memory_growth_kib": growth,
        "missing": scan.missing_files,
        "dark": scan.dark_files,
    }


if __name__ == "__main__":
    main()
