"""How fast is the whole distributed system?

Question  How many files of 64 KiB become replicas in a second, from the wish to `ok`, through PostgreSQL with its
          default durability, Redis, API, control and a worker for each of three sites, all on this machine? What part
          of the speed of `cp -r` is that? How soon does the first byte move in an idle system? And one 4 GiB file?
Sketch    10,000 files × (open, read, hash, write, sync, read back, rename) ≈ 1–2 ms each on one core, two cores, minus
          a third for API, database and Celery → expect 500–1,000 files/s; a claim and a report per hundreds of files
          leave the database idle. Wish to first byte: evaluation on a hint ≈ 30 ms + claim on a hint ≈ 30 ms.
          4 GiB: written once and read back once, so half of `cp`, or of the disk.

    python -m tests.benchmarks.bench_system [--files N] [--large-mib N] [--directory DIR]

Prints one JSON document; exit code 1 if a floor is missed. What is measured excludes writing and registering the files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.scenarios.system import OWN, Files, System, until

#: Those of production, but for what only matters when something breaks.
TIMERS = {
    "REPLICA_LEASE_SECONDS": "120",
    "REPLICA_POLL_SECONDS": "30",
    "REPLICA_CONTROL_INTERVAL_SECONDS": "5",
    "REPLICA_RETRY_BASE_SECONDS": "30",
}
SMALL_BYTES = 64 << 10
IDLE_ROUNDS = 5
#: Floors on two cores.
FILES_PER_SECOND_MIN = 300
FIRST_BYTE_SECONDS_MAX = 1.0


def replicate(system: System, files: Files, copies: int = 2) -> float:
    """Seconds from the wish to `ok`, as somebody who waits sees it."""
    started = time.perf_counter()
    rule = system.wish(files, copies)
    until("the rule is ok", lambda: system.rule_state(rule) == "ok", 1800, pause=0.02)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Cp:
    """`cp -r`, alone and with the `sync` without which the copy is only in memory."""

    seconds: float
    synced_seconds: float

    @classmethod
    def of(cls, source: Path, target: Path) -> Cp:
        _forget_cache(source)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", source, target], check=True)
        seconds = time.perf_counter() - started
        subprocess.run(["sync", "-f", target], check=True)
        synced = time.perf_counter() - started
        shutil.rmtree(target)
        _forget_cache(source)
        return cls(seconds, synced)

    def figures(self, ours_seconds: float) -> dict[str, float]:
        """How fast we are as a part of its speed."""
        return {
            "cp_seconds": round(self.seconds, 2),
            "cp_and_sync_seconds": round(self.synced_seconds, 2),
            "ratio_to_cp": round(self.seconds / ours_seconds, 3),
            "ratio_to_cp_and_sync": round(self.synced_seconds / ours_seconds, 3),
        }


def _forget_cache(folder: Path) -> None:
    """Both ways read from the disk, as far as the kernel lets us say so."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def small_files(system: System, count: int, directory: Path) -> dict[str, Any]:
    files = system.write_files("DESY", "small", {f"d{n % 100:02}/f{n:06}": SMALL_BYTES for n in range(count)})
    subprocess.run(["sync", "-f", directory], check=True)
    source = system.disks["DESY"] / "small"
    cp = Cp.of(source, directory / "cp")
    seconds = replicate(system, files)
    where = {r.endpoint for r in system.client.replicas.locate(files.dataset)}
    system.check_bytes(files, sorted(name.removesuffix("-DISK") for name in where))
    return {
        "files": count,
        "seconds": round(seconds, 2),
        "files_per_second": round(count / seconds, 1),
        **cp.figures(seconds),
    }


def large_file(system: System, size_bytes: int, directory: Path) -> dict[str, Any]:
    files = system.write_files("DESY", "large", {"large.dat": size_bytes})
    subprocess.run(["sync", "-f", directory], check=True)
    source = system.disks["DESY"] / "large"
    cp = Cp.of(source, directory / "cp")
    seconds = replicate(system, files)
    return {
        "mib": size_bytes >> 20,
        "seconds": round(seconds, 2),
        "mib_per_second": round((size_bytes >> 20) / seconds, 1),
        **cp.figures(seconds),
    }


def first_byte(system: System) -> dict[str, Any]:
    """From the wish until a byte of the file is at the other site, as a temporary or whole."""
    found = []
    for number in range(IDLE_ROUNDS):
        files = system.write_files("DESY", f"idle{number}", {"one.dat": SMALL_BYTES})
        time.sleep(2.0)  # idle: whatever the registration woke is asleep again
        targets = [disk for site, disk in system.disks.items() if site != "DESY"]
        started = time.perf_counter()
        rule = system.wish(files, 2)
        until(
            "the first byte is at another site",
            partial(_has_bytes, targets, files),
            60,
            pause=0.001,
        )
        found.append(time.perf_counter() - started)
        system.wait_ok(rule)
    return {"median_seconds": round(statistics.median(found), 3), "all_seconds": [round(s, 3) for s in found]}


def _has_bytes(disks: list[Path], files: Files) -> bool:
    return any((disk / files.path("one.dat")).exists() or any((disk / OWN / "part").glob("*")) for disk in disks)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--large-mib", type=int, default=4096)
    parser.add_argument("--directory", help="on the disk to be measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replica-bench-", dir=options.directory) as name:
        directory = Path(name)
        with System(directory, durable=True, timers=TIMERS) as system:
            result = {
                "machine": f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}",
                "load_before": os.getloadavg()[0],
                "wish_to_first_byte": first_byte(system),
                "small": small_files(system, options.files, directory),
                "large": large_file(system, options.large_mib << 20, directory),
            }
    result["floors_held"] = held = {
        f"files per second >= {FILES_PER_SECOND_MIN}": result["small"]["files_per_second"] >= FILES_PER_SECOND_MIN,
        f"wish to first byte < {FIRST_BYTE_SECONDS_MAX} s": result["wish_to_first_byte"]["median_seconds"]
        < FIRST_BYTE_SECONDS_MAX,
    }
    print(json.dumps(result, indent=2))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
