"""How fast is a verified, durable copy beside `cp`, which promises neither?

Question     One 4 GiB file from folder to folder of one disk through `copy_local`, and 10,000 files of 64 KiB through
             `copy_local_batch`: what part of the speed of `cp` and `cp -r` is left when every byte is hashed, synced,
             read back and compared? And what does it cost to read back from the device instead of the kernel's cache?

Sketch       Hashing costs nothing visible (31 GB per CPU second), so copying alone should equal `cp`. Writing out and
             reading back moves the bytes over the disk twice more, where `cp` leaves them in memory: with a disk about
             as fast as `cp`, one after the other would end near 0.4. Doing both window by window while the rest is
             still being written overlaps them, as far as the disk does reads and writes at once: 0.5 to 0.6. Reading
             back from the kernel's cache leaves only the writing out, so about the speed of a synced `cp`.
             (Found: 0.33 to 0.5 from the device, 0.65 to 0.8 from the cache, the latter equal to a synced `cp`.)
             Small files: a sync each costs 1.3 ms, twice the whole `cp` of one; grouped, most of that is shared:
             0.4 to 0.8.

Measurement  Medians of `--repeats` runs, each tool in turn, on the same disk and the same source in cache, target
             removed and written out before each run and not within its time. `cp_durable` is `cp` followed by `sync`
             of its files, the fair peer of a copy that survives a power cut (still unverified). `cp_checked` is `cp -r`
             and then a pass of xxh3 over the copies; `rclone` compares its own checksums by default; neither waits for
             the disk, so a folder in memory (`--dir /dev/shm`) shows the engine alone. Ratios are seconds of
             the peer divided by ours: above 1, we are faster. On a shared machine compare within one run only.

CPU          Seconds of user and system time of this process for each GiB, beside those of a bare loop that reads and
             writes the same file in pieces of 1 MiB and then syncs it; the second one also reads back what it wrote,
             which is the least that a proof costs. `copy_chunked` is the copy that can be gone on with.
             (Found: hashing is 0.08 of the 0.6 s; the rest is moving pages in and out of the kernel's memory.)

    python tests/benchmarks/bench_copy.py --dir /data/scratch [--gib 4] [--files 10000] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import xxhash

from replica.storage.copy import (
    Expected,
    Lineage,
    LocalCopy,
    ReadBack,
    Source,
    copy_chunked,
    copy_local,
    copy_local_batch,
)
from replica.storage.hashing import STRIDE_BYTES
from replica.storage.posix import PosixStorage
from rules.checksums import Checksums

MIB = 1 << 20
SMALL_BYTES = 64 << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the disk to be measured")
    parser.add_argument("--gib", type=float, default=4.0)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-copy-", dir=given.dir) as scratch:
        print(json.dumps(measure(Path(scratch), int(given.gib * (1 << 30)), given.files, given.repeats), indent=2))


def measure(scratch: Path, large_bytes: int, files: int, repeats: int) -> dict[str, object]:
    source, target = PosixStorage(scratch / "source", name="source"), PosixStorage(scratch / "target", name="target")
    asyncio.run(source.prepare())
    asyncio.run(target.prepare())
    at_source, at_target = scratch / "source", scratch / "target"
    block = os.urandom(16 * MIB)
    hasher = xxhash.xxh3_128()
    with (at_source / "large").open("wb") as file:
        for begin in range(0, large_bytes, len(block)):
            hasher.update(block[: large_bytes - begin])
            file.write(block[: large_bytes - begin])
    expected = Expected(large_bytes, Checksums.of({"xxh3_128": hasher.hexdigest()}))
    small = at_source / "small"
    for number in range(files):
        folder = small / f"{number % 20:02}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:06}").write_bytes(block[number * 64 : number * 64 + SMALL_BYTES])
    names = [f"small/{n % 20:02}/{n:06}" for n in range(files)]
    known = {name: xxhash.xxh3_128((at_source / name).read_bytes()).hexdigest() for name in names}

    def durable(*command: str) -> None:
        subprocess.run(command, check=True)
        for folder, _, found in os.walk(at_target):
            if ".replica" in folder:
                continue
            subprocess.run(["sync", folder, *(os.path.join(folder, name) for name in found)], check=True)

    def one(read_back: ReadBack = "auto") -> None:
        copied = copy_local(source, "large", target, "large", tag="bench", read_back=read_back)
        assert copied.size_bytes == large_bytes and not copied.adopted

    def chunked() -> None:
        copied = asyncio.run(
            copy_chunked([Source(source, "large")], target, "large", lineage=Lineage("bench"), expected=expected)
        )
        assert copied.moved_bytes == large_bytes

    def bare(read_back: bool = False) -> None:
        buffer = memoryview(bytearray(MIB))
        with (at_source / "large").open("rb", buffering=0) as reading, (at_target / "large").open("wb") as writing:
            while count := reading.readinto(buffer):
                os.write(writing.fileno(), buffer[:count])
            os.fsync(writing.fileno())
        if read_back:
            with (at_target / "large").open("rb", buffering=0) as reading:
                while reading.readinto(buffer):
                    pass

    def loop() -> None:
        for name in names:
            copy_local(source, name, target, name, tag="bench")

    def batch() -> None:
        outcomes = copy_local_batch([LocalCopy(source, name, target, name, tag="bench") for name in names])
        bad = [o for o in outcomes if isinstance(o, Exception)]
        assert not bad, bad[0]

    def checked(names: list[str]) -> None:
        """What a careful person does after `cp`: read the copies, compare with the checksums that are known."""
        buffer = memoryview(bytearray(STRIDE_BYTES))
        for name in names:
            digest = xxhash.xxh3_128()
            with (at_target / name).open("rb", buffering=0) as reading:
                while count := reading.readinto(buffer):
                    digest.update(buffer[:count])
            assert digest.hexdigest() == known[name]

    def cp_checked(way: list[str], names: list[str]) -> None:
        subprocess.run(way, check=True)
        checked(names)

    def rclone(*args: str) -> None:
        subprocess.run(["rclone", "--config", os.devnull, *args], check=True)

    large_way = ["cp", str(at_source / "large"), str(at_target / "large")]
    small_way = ["cp", "-r", str(small), str(at_target / "small")]
    cpu: dict[str, list[float]] = {}
    large = compare(
        {
            "cp": lambda: subprocess.run(large_way, check=True),
            "cp_durable": lambda: durable(*large_way),
            "rclone": lambda: rclone("copyto", str(at_source / "large"), str(at_target / "large")),
            "copy_local": one,
            "copy_local_device": lambda: one("device"),
            "copy_chunked": chunked,
            "bare_loop": bare,
            "bare_loop_read_back": lambda: bare(True),
        },
        at_target,
        repeats,
        cpu,
    )
    little = compare(
        {
            "cp": lambda: subprocess.run(small_way, check=True),
            "cp_durable": lambda: durable(*small_way),
            "cp_checked": lambda: cp_checked(small_way, names),
            "rclone": lambda: rclone("copy", "--transfers", "16", str(small), str(at_target / "small")),
            "copy_local": loop,
            "copy_local_batch": batch,
        },
        at_target,
        repeats,
    )
    return {
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "repeats": repeats,
        "large": {
            "bytes": large_bytes,
            **report(large, ["copy_local", "copy_local_device", "copy_chunked"]),
            "cpu": report_cpu(cpu, large_bytes),
        },
        "small": {"files": files, "bytes_each": SMALL_BYTES, **report(little, ["copy_local", "copy_local_batch"])},
    }


def compare(
    ways: dict[str, Callable[[], object]], target: Path, repeats: int, cpu: dict[str, list[float]] | None = None
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            for found in target.iterdir():
                if found.name != ".replica":
                    shutil.rmtree(found) if found.is_dir() else found.unlink()
            os.sync()
            began, used = time.perf_counter(), time.process_time()
            run()
            seconds[way].append(time.perf_counter() - began)
            if cpu is not None:
                cpu.setdefault(way, []).append(time.process_time() - used)
    return seconds


def report(seconds: dict[str, list[float]], ours: list[str]) -> dict[str, object]:
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "seconds": {
            way: {"median": round(median[way], 3), "spread": [round(min(v), 3), round(max(v), 3)]}
            for way, v in seconds.items()
        },
        "ratios": {
            f"{way} / {peer}": round(median[peer] / median[way], 2)
            for way in ours
            for peer in ("cp", "cp_durable", "cp_checked", "rclone")
            if peer in median
        },
    }


def report_cpu(cpu: dict[str, list[float]], large_bytes: int) -> dict[str, object]:
    gib = large_bytes / (1 << 30)
    per_gib = {way: statistics.median(v) / gib for way, v in cpu.items() if not way.startswith("cp")}
    return {
        "seconds_per_gib": {way: round(v, 3) for way, v in per_gib.items()},
        **{
            f"by_{peer}": {way: round(v / per_gib[peer], 2) for way, v in per_gib.items()}
            for peer in ("bare_loop", "bare_loop_read_back")
        },
    }


if __name__ == "__main__":
    main()
