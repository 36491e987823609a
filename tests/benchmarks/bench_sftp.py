"""How fast is a verified copy to and from an SSH server beside rclone, and what does it cost?

Question  One large file and many of 64 KiB, up (each is read back) and down (written, synced, read back), through one
          connection to OpenSSH on loopback; the same files by `rclone copy`, which cannot compare checksums here.
Sketch    SSH in Python costs per packet of 32 KiB some 50 µs beside AES: 400 MiB/s down. A small file up is 19 requests
          (eight of them looks that go in pairs), down five: 3-5 ms of one core.

    python -m tests.benchmarks.bench_sftp [--mib 256] [--files 300] [--repeats 3]

Each tool in turn (A B A B ...); ratios are medians of rclone's seconds divided by ours in the same round, by the clock
and of the processors (our process, or rclone; the server not counted). Pairs of numbers: those two, in seconds. Starts
a server of its own in /dev/shm and removes it at the end. Prints one JSON document. Needs rclone.
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
import time
from collections.abc import Awaitable, Callable
from typing import Any

from replica.storage.base import Storage
from replica.storage.copy import Expected, copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from tests.servers_ssh import OpenSSH

SMALL_BYTES = 64 << 10
AT_ONCE = 16
COPY = ("copy", "--transfers", str(AT_ONCE))


class Bench:
    """The same files by both tools, one after the other."""

    def __init__(self, server: OpenSSH, mib: int, files: int) -> None:
        self.server, self.mib = server, mib
        self.local = server.directory / "local"
        self.names = {"large": ["large/f"], "small": [f"small/{number:04}" for number in range(files)]}
        self.expected: dict[str, Expected] = {}

    async def run(self, repeats: int) -> dict[str, Any]:
        self.here, self.there = (PosixStorage(self.local / name, name=name) for name in ("here", "there"))
        self.remote = open_storage(
            self.server.url, name="remote", credentials=Credentials({self.server.url: self.server.settings})
        )
        for storage in (self.here, self.there, self.remote):
            await storage.prepare()
        for which in self.names:
            (self.local / "here" / which).mkdir()
        (self.local / "here" / "large" / "f").write_bytes(os.urandom(1 << 20) * self.mib)
        for name in self.names["small"]:
            (self.local / "here" / name).write_bytes(os.urandom(SMALL_BYTES))
        for name in (*self.names["large"], *self.names["small"]):
            self.expected[name] = Expected(*await measure(self.here, name))
        found: dict[str, Any] = {}
        for which, names in self.names.items():
            rounds: dict[str, list[tuple[Taken, Taken]]] = {"up": [], "down": []}
            for _ in range(repeats):
                await self._clear(names)
                rounds["up"].append(await self._both(self.here, self.remote, which, upwards=True))
                rounds["down"].append(await self._both(self.remote, self.there, which, upwards=False))
            await self._clear(names)
            size = self.mib if which == "large" else len(names)
            found[which] = {way: _judged(pairs, size) for way, pairs in rounds.items()}
        await self.remote.close()
        return found

    async def _both(self, source: Storage, target: Storage, which: str, *, upwards: bool) -> tuple[Taken, Taken]:
        ours = await _taken(lambda: self._ours(source, target, self.names[which]))
        local, remote = str(self.local / ("here" if upwards else "rclone") / which), f"{self._at()}/{which}"
        ends = (local, remote) if upwards else (remote, local)
        return ours, await _taken(lambda: asyncio.to_thread(run, ["rclone", "--config", "", *COPY, *ends]))

    async def _ours(self, source: Storage, target: Storage, names: list[str]) -> None:
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with gate:
                await copy_file(source, name, target, name, tag="bench", expected=self.expected[name])

        await asyncio.gather(*map(one, names))

    def _at(self) -> str:
        own, root = self.server.directory, self.server.data / "peers"
        if not root.exists():
            root.mkdir()
            self.server.give_away(root)
        where = f":sftp,host=127.0.0.1,port={self.server.port},user={self.server.user},key_file={own}/user_key"
        return f"{where},shell_type=none,known_hosts_file={own}/known_hosts,set_modtime=false:{root}"

    async def _clear(self, names: list[str]) -> None:
        for name in names:
            await self.remote.delete(name)
            await self.there.delete(name)
        for folder in (self.server.data / "peers", self.local / "rclone"):
            shutil.rmtree(folder, ignore_errors=True)


Taken = tuple[float, float]  #: seconds by the clock, and of this side's processors


async def _taken(do: Callable[[], Awaitable[object]]) -> Taken:
    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + used.ru_utime + used.ru_stime

    began, before = time.perf_counter(), cpu()
    await do()
    return time.perf_counter() - began, cpu() - before


def _judged(pairs: list[tuple[Taken, Taken]], size: int) -> dict[str, Any]:
    median = statistics.median
    return {
        "ratio": round(median(theirs[0] / ours[0] for ours, theirs in pairs), 2),
        "ratio_cpu": round(median(theirs[1] / ours[1] for ours, theirs in pairs), 2),
        "a second": round(size / median(ours[0] for ours, _ in pairs), 1),
        "ours": [round(median(ours[n] for ours, _ in pairs), 3) for n in (0, 1)],
        "rclone": [round(median(theirs[n] for _, theirs in pairs), 3) for n in (0, 1)],
    }


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--mib", type=int, default=256)
    arguments.add_argument("--files", type=int, default=300)
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    if shutil.which("rclone") is None:
        raise SystemExit("rclone is needed: apt-get install rclone")
    server = OpenSSH()
    try:
        server.start()
        found = asyncio.run(Bench(server, given.mib, given.files).run(given.repeats))
    finally:
        server.remove()
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
