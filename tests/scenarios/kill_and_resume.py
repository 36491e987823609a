"""A large transfer killed ten times at random points, and a replica with one flipped bit: how much is moved?

    python -m tests.scenarios.kill_and_resume --dir /data/scratch [--gib 2] [--kills 10] [--seed 7]

Each attempt is a process of its own, with an epoch of its own, killed by SIGKILL when it has written so much. What
it moved is what the kernel counted of its writes until it was stopped (wchar in /proc/<pid>/io), torn chunks included.
At the end the file must be right, and nothing of the attempts may be left. Then one bit of it is flipped, and `repair`
must move two chunks at most. Prints figures as JSON; exits with 1 if one of them is not reached.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import xxhash

from replica.storage.base import PARTS
from replica.storage.copy import Expected, Lineage, Source
from replica.storage.posix import PosixStorage
from replica.storage.repair import repair
from rules.checksums import Checksums

PROJECT = Path(__file__).parents[2]
MIB = 1 << 20
CARRIER = """
import asyncio, sys
from replica.storage.copy import Expected, Lineage, Source, copy_chunked
from replica.storage.posix import PosixStorage
from rules.checksums import Checksums
source, target, size, xxh3, epoch = sys.argv[1:]
asyncio.run(copy_chunked(
    [Source(PosixStorage(source), "f")], PosixStorage(target), "f", lineage=Lineage("1", int(epoch)),
    expected=Expected(int(size), Checksums.of({"xxh3_128": xxh3})),
))
"""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="a folder with room for three times the file")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=7)
    said = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="kill-and-resume-", dir=said.dir) as scratch:
        told = play(Path(scratch), int(said.gib * 1024) * MIB, said.kills, said.seed)
    print(json.dumps(told, indent=2))
    return 0 if told["reached"] else 1


def play(scratch: Path, size_bytes: int, kills: int, seed: int) -> dict[str, object]:
    source, target = PosixStorage(scratch / "source", name="SOURCE"), PosixStorage(scratch / "target", name="TARGET")
    asyncio.run(source.prepare())
    asyncio.run(target.prepare())
    expected = write_source(scratch / "source/f", size_bytes)
    digest = sha256_of(scratch / "source/f")
    dice = random.Random(seed)
    points = sorted(dice.randrange(size_bytes) for _ in range(kills))
    moved: list[int] = []
    began = time.perf_counter()
    for epoch, point in enumerate(points, 1):
        moved.append(one_attempt(scratch, expected, epoch, kill_at=max(1, point - sum(moved))))
    killed = sum(bytes_ > 0 for bytes_ in moved)
    moved.append(one_attempt(scratch, expected, kills + 1, kill_at=None))
    seconds = time.perf_counter() - began
    right = sha256_of(scratch / "target/f") == digest
    left = sorted(os.listdir(scratch / "target" / PARTS))

    flip(scratch / "target/f", dice.randrange(size_bytes))
    began = time.perf_counter()
    healed = asyncio.run(repair(target, "f", [Source(source, "f")], lineage=Lineage("heal"), expected=expected))
    heal_seconds = time.perf_counter() - began
    healed_right = sha256_of(scratch / "target/f") == digest
    ratio = sum(moved) / size_bytes
    moved_chunks = -(-healed.copied.moved_bytes // healed.chunk_bytes)
    return {
        "bytes": size_bytes,
        "kills": killed,
        "moved_mib": [round(bytes_ / MIB, 1) for bytes_ in moved],
        "moved_by_bytes": round(ratio, 4),
        "right": right,
        "left_behind": left,
        "seconds": round(seconds, 1),
        "heal": {"moved_chunks": moved_chunks, "right": healed_right, "seconds": round(heal_seconds, 1)},
        "reached": right and healed_right and not left and killed == kills and ratio <= 1.1 and moved_chunks <= 2,
    }


def write_source(path: Path, size_bytes: int) -> Expected:
    hasher = xxhash.xxh3_128()
    with path.open("wb") as file:
        for begin in range(0, size_bytes, 16 * MIB):
            block = os.urandom(min(16 * MIB, size_bytes - begin))
            hasher.update(block)
            file.write(block)
    return Expected(size_bytes, Checksums.of({"xxh3_128": hasher.hexdigest()}))


def one_attempt(scratch: Path, expected: Expected, epoch: int, *, kill_at: int | None) -> int:
    """Bytes it wrote; killed when it has written `kill_at`."""
    command = [sys.executable, "-c", CARRIER, str(scratch / "source"), str(scratch / "target")]
    command += [str(expected.size_bytes), str(expected.checksums.get("xxh3_128")), str(epoch)]
    worker = subprocess.Popen(command, cwd=PROJECT)
    try:
        written = 0
        while True:
            now = written_by(worker.pid)
            if now is None:  # it ended by itself
                break
            written = now
            if kill_at is not None and written >= kill_at:
                worker.send_signal(signal.SIGSTOP)
                written = written_by(worker.pid) or written
                break
            time.sleep(0.001)
    finally:
        if kill_at is not None:
            worker.kill()
        status = worker.wait()
    if status != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(f"attempt {epoch} ended with {status}")
    return written


def written_by(pid: int) -> int | None:
    """What a process gave to write() so far; None when it has ended."""
    try:
        told = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
        if Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z":
            return None
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(told.partition("wchar: ")[2].split()[0])


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
