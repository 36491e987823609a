"""One bit of a large replica rots: the whole system finds it, and heals it by moving at most two chunks.

    python -m tests.scenarios.flipped_bit [--gib 2] [--dir DIR]

PostgreSQL, Redis, API, control and a worker at each of two sites, each a process. A file is brought to the second site;
one bit of it is flipped behind Replica's back, with its time as it was; the site's worker is told to scrub. Then: the
scrub doubts it, a probe proves it bad, the rule's state says so, a transfer repairs it in place. Prints what was moved
and how long each step took as JSON; exits with 1 if more than two chunks were moved, or anything is not right.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from replica import wire
from replica.storage.chunks import CHUNK_BYTES
from tests.scenarios.system import System, until

MIB = 1 << 20
DID = "t:large"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--dir", type=Path, help="a folder with room for four times the file; else the temporary one")
    said = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="flipped-bit-", dir=said.dir) as scratch:
        told = play(Path(scratch), int(said.gib * 1024) * MIB)
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
    return 0 if told["reached"] else 1


def play(scratch: Path, size_bytes: int) -> dict[str, Any]:
    with System(scratch, sites=("DESY", "HZDR")) as system:
        client = system.client
        client.scopes.add("t")
        digest = _write(system.disks["DESY"] / "large", size_bytes)
        new = wire.NewReplica(did=DID, size=size_bytes, checksums={"xxh3_128": digest}, path="large")
        client.replicas.register(wire.Registration(endpoint="DESY-DISK", replicas=[new], evidence="hashed"))
        began = time.monotonic()
        rule = client.rules.add(wire.NewRule(did=DID, expression="*", copies=2))
        until("both copies are there", lambda: client.rules.show(rule.id).state == "ok", 600)
        copied = time.monotonic()
        (place,) = [r for r in client.replicas.pages(DID) if r.endpoint == "HZDR-DISK"]
        target = system.disks["HZDR"] / place.path
        _flip(target, size_bytes // 2 + 12_345)
        before = {t.id for t in client.transfers.list(did=DID)}
        client.integrity.set_scrub("HZDR-DISK", bytes_per_second=None, period_seconds=1, now=True)
        until("it is found", lambda: _healing(client, before), 300)
        found = time.monotonic()
        until("it is healed", lambda: _healing(client, before) and client.rules.show(rule.id).state == "ok", 600)
        healed = time.monotonic()
        (id_,) = {t.id for t in client.transfers.list(did=DID)} - before
        moved = client.transfers.show(id_).moved_bytes or 0
        right = _digest(target) == digest and target.stat().st_size == size_bytes
        kept = [p for p in (system.disks["HZDR"] / ".replica" / "quarantine").rglob("*") if p.is_file()]
        kinds = [event.kind for event in client.events.list(kinds=["replica.*"])]
        system.run("fsck")
        return {
            "bytes": size_bytes,
            "chunk_bytes": CHUNK_BYTES,
            "moved_bytes": moved,
            "right": right,
            "bad_bytes_kept": len(kept) == 1 and kept[0].stat().st_size == size_bytes,
            "events": kinds,
            "seconds": {
                "copy": round(copied - began, 2),
                "scrub_and_probe": round(found - copied, 2),
                "repair": round(healed - found, 2),
            },
            "reached": right and len(kept) == 1 and 0 < moved <= 2 * CHUNK_BYTES,
        }


def _healing(client: Any, before: set[int]) -> bool:
    return bool({t.id for t in client.transfers.list(did=DID)} - before)


def _write(path: Path, size_bytes: int) -> str:
    hasher = xxhash.xxh3_128()
    block = os.urandom(MIB)
    with path.open("wb") as file:
        for number in range(size_bytes // MIB):
            piece = number.to_bytes(8, "big") + block[8:]
            hasher.update(piece)
            file.write(piece)
    return hasher.hexdigest()


def _flip(path: Path, offset: int) -> None:
    at = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(at.st_atime_ns, at.st_mtime_ns))


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(MIB):
            hasher.update(piece)
    return hasher.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
