"""How fast is a verified copy to and from S3 beside `rclone copy`, on the same server?

Question     One large file and many of 64 KiB from a folder to an S3 server on loopback and back: what part of the
             speed of `rclone copy` (which compares an MD5 or ETag where there is one) has a copy whose every byte is
             hashed, proven at the server, and published by an act that never replaces?

Sketch       Where the server keeps conditions and compares digests (`strict`, as Amazon, Ceph and MinIO do), a small
             file is one request up and one down, rclone needs two up (PUT, HEAD) and one down; a large one is its
             parts, once. Where it keeps no conditions (`rclone`'s own server), a small file is six requests and its
             bytes are copied once more by the server; a large one is read back besides.

Measurement  Each tool in turn, `--repeats` times (A B A B ...), targets removed before each; ratios are medians of
             seconds of rclone divided by ours in the same round. CPU seconds are user and system of our process, of
             rclone, and of the server under each. `requests` a file are counted in a run of its own, untimed.

    python tests/benchmarks/bench_s3.py --dir /dev/shm [--server strict|rclone] [--mib 256] [--files 400] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from replica.storage.base import Storage
from replica.storage.copy import Expected, copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from replica.storage.s3_wire import Wire
from tests.servers_s3 import ACCESS_KEY, SECRET_KEY, SETTINGS, RcloneS3, S3Server, Strict, find_rclone

MIB = 1 << 20
SMALL_BYTES = 64 << 10
AT_ONCE = 16
COUNTED = 20
SERVERS: dict[str, Callable[[], S3Server]] = {"strict": Strict, "rclone": RcloneS3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--server", choices=SERVERS, default="strict")
    parser.add_argument("--mib", type=int, default=256, help="of the large file; 0: none")
    parser.add_argument("--files", type=int, default=400, help="small ones; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    server = SERVERS[given.server]()
    try:
        server.start()
        with tempfile.TemporaryDirectory(prefix="bench-s3-", dir=given.dir) as scratch:
            bench = Bench(server, Path(scratch), given.mib, given.files)
            found = asyncio.run(bench.run(given.repeats))
        print(json.dumps({"server": given.server, **found}, indent=2))
    finally:
        server.remove()


class Bench:
    def __init__(self, server: S3Server, scratch: Path, mib: int, files: int) -> None:
        self.server, self.scratch, self.mib, self.files = server, scratch, mib, files
        self.names = {"large": ["large/f"] if mib else [], "small": [f"small/{n:05}" for n in range(files)]}
        self.expected: dict[str, Expected] = {}

    async def run(self, repeats: int) -> dict[str, object]:
        here, there = (PosixStorage(self.scratch / name, name=name) for name in ("here", "there"))
        client = self.server.client()
        for bucket in ("ours", "theirs"):
            client.create_bucket(Bucket=bucket)
        url = self.server.url("ours")
        remote = open_storage(url, name="s3", credentials=Credentials({url: SETTINGS}))
        for storage in (here, there, remote):
            await storage.prepare()
        await self._fill(here)
        self.here, self.there, self.remote = here, there, remote
        found: dict[str, object] = {}
        for which, names in self.names.items():
            if names:
                found[which] = await self._measured(which, repeats)
        await remote.close()
        return found

    async def _fill(self, here: PosixStorage) -> None:
        block = os.urandom(16 * MIB)
        for which in self.names:
            (self.scratch / "here" / which).mkdir()
        for name in self.names["small"]:
            (self.scratch / "here" / name).write_bytes(os.urandom(SMALL_BYTES))
        for name in self.names["large"]:
            with (self.scratch / "here" / name).open("wb") as file:
                for _ in range(self.mib // 16):
                    file.write(block)
        for name in (*self.names["small"], *self.names["large"]):
            self.expected[name] = Expected(*await measure(here, name))

    async def _measured(self, which: str, repeats: int) -> dict[str, object]:
        runs: dict[str, tuple[Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]] = {
            "up": (
                lambda: self._ours(self.here, self.remote, self.names[which]),
                lambda: self._rclone(str(self.scratch / "here" / which), f"x:theirs/{which}"),
            ),
            "down": (
                lambda: self._ours(self.remote, self.there, self.names[which]),
                lambda: self._rclone(f"x:theirs/{which}", str(self.scratch / "rclone" / which)),
            ),
        }
        rounds: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {"up": [], "down": []}
        for _ in range(repeats):
            await self._clear(which)
            for way, (ours, theirs) in runs.items():
                rounds[way].append((await self._timed(ours), await self._timed(theirs)))
        found: dict[str, object] = {}
        size = self.mib if which == "large" else self.files
        for way, pairs in rounds.items():
            mine, others = ([pair[side] for pair in pairs] for side in (0, 1))
            found[way] = {
                "ratio": round(statistics.median(b["wall"] / a["wall"] for a, b in pairs), 2),
                "ratio_cpu": round(statistics.median(b["cpu"] / a["cpu"] for a, b in pairs), 2),
                "MiB/s" if which == "large" else "files/s": {
                    "ours": round(size / statistics.median(a["wall"] for a in mine), 1),
                    "rclone": round(size / statistics.median(b["wall"] for b in others), 1),
                },
                "ours": {key: round(statistics.median(a[key] for a in mine), 3) for key in mine[0]},
                "rclone": {key: round(statistics.median(b[key] for b in others), 3) for key in others[0]},
            }
        await self._clear(which)
        if which == "small":
            found["requests"] = await self._requests()
        return found

    # ── the two tools ────────────────────────────────────────────────────────────────────────────────────────────────

    async def _ours(self, source: Storage, target: Storage, names: list[str]) -> None:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with limit:
                await copy_file(source, name, target, name, tag="bench", expected=self.expected[name])

        await asyncio.gather(*map(one, names))

    async def _rclone(self, source: str, target: str, *more: str) -> str:
        command = [str(find_rclone()), "copy", "--config", "", "--transfers", str(AT_ONCE), *more, source, target]
        environment = {**os.environ, **{f"RCLONE_CONFIG_X_{key}": value for key, value in self._settings().items()}}
        done = await asyncio.to_thread(
            lambda: subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr

    def _settings(self) -> dict[str, str]:
        return {
            "TYPE": "s3",
            "PROVIDER": "Rclone" if isinstance(self.server, RcloneS3) else "Minio",
            "ENDPOINT": self.server.endpoint,
            "ACCESS_KEY_ID": ACCESS_KEY,
            "SECRET_ACCESS_KEY": SECRET_KEY,
        }

    # ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _timed(self, run: Callable[[], Awaitable[object]]) -> dict[str, float]:
        def cpu() -> tuple[float, float, float]:
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            return time.process_time(), used.ru_utime + used.ru_stime, _cpu_of(self.server.process.pid)

        before, began = cpu(), time.perf_counter()
        await run()
        wall = time.perf_counter() - began
        own, children, server = (b - a for a, b in zip(before, cpu(), strict=True))
        return {"wall": wall, "cpu": own + children, "cpu_of_the_server": server}

    async def _clear(self, which: str) -> None:
        client = self.server.client()
        for name in self.names[which]:
            await self.remote.delete(name)
            await self.there.delete(name)
            client.delete_object(Bucket="theirs", Key=name)
        shutil.rmtree(self.scratch / "rclone", ignore_errors=True)

    async def _requests(self) -> dict[str, dict[str, float]]:
        """Of both tools, a file."""
        names = self.names["small"][:COUNTED]
        some = self.scratch / "some"
        some.mkdir()
        for name in names:
            shutil.copy(self.scratch / "here" / name, some)
        found = {}
        for way, (source, target), (of, to) in (
            ("up", (self.here, self.remote), (str(some), "x:theirs/some")),
            ("down", (self.remote, self.there), ("x:theirs/some", str(self.scratch / "some-back"))),
        ):
            async with _counted() as requests:
                await self._ours(source, target, names)
            told = (await self._rclone(of, to, "-vv", "--dump", "headers")).count("HTTP REQUEST")
            found[way] = {
                "ours": round(requests.total() / len(names), 2),
                **{method: round(n / len(names), 2) for method, n in requests.items()},
                "rclone": round(told / len(names), 2),
            }
        return found


@asynccontextmanager
async def _counted() -> AsyncIterator[Counter[str]]:
    requests: Counter[str] = Counter()
    send = Wire._send

    def counting(self: Wire, method: str, *rest: Any, **more: Any) -> Any:
        requests[method] += 1
        return send(self, method, *rest, **more)

    Wire._send = counting  # type: ignore[method-assign]
    try:
        yield requests
    finally:
        Wire._send = send  # type: ignore[method-assign]


def _cpu_of(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
