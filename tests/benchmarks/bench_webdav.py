"""WebDAV beside rclone and curl, on the same server and the same files: a large one and thousands of small ones.

Question     Upload and download at least as fast as rclone; a large download at least 0.8 times as fast as `curl -o`?
             At what cost in CPU seconds and in requests a file?

Sketch       Of small files the requests decide: each costs client and server 0.2 to 0.4 ms. Ours are PUT, a proof (the
             server's digest, or GET), a claim, a look where the server does not look itself, MOVE; for a download GET
             alone. rclone's are PUT and PROPFIND, or GET; nothing it wrote is proven.
             Of large ones it is copying of memory: socket to buffer to page cache, and the hashes.

Measurement  In turn: ours, theirs, ours, theirs; the median of the ratios `theirs / ours` (above 1, we are faster).
             CPU: user and system, of the client with its children and of the server. `rclone` hashes nothing, for such
             servers tell it no checksum; `rclone, checked` is followed by `rclone check --download`, which is what it
             has for what we always do. `curl` neither hashes nor checks; ours beside it hashes what it reads. Ours is
             run within this process, theirs are started anew, as they are used. Requests are counted by a proxy, in a
             run of their own. Everything lies on /dev/shm, but XRootD's files where attributes can be kept.

    python -m tests.benchmarks.bench_webdav apache|rclone|xrootd [--gib 1] [--files 2000] [--bytes 10240] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from replica.storage.base import part_path
from replica.storage.copy import Expected, copy_file
from replica.storage.hashing import Hasher
from replica.storage.posix import PosixStorage
from replica.storage.webdav import WebdavStorage
from tests.benchmarks.beside import counting, cpu_seconds, ratio_of
from tests.servers_dav import Apache, Rclone, _DavServer
from tests.servers_xrootd import XRootD

AT_ONCE = 16
COUNTED_FILES = 100


class Bench:
    def __init__(self, server: Any, scratch: Path, given: argparse.Namespace) -> None:
        self.server, self.scratch, self.given = server, scratch, given
        self.base = server.url_http if isinstance(server, XRootD) else server.url
        self.small: dict[str, Expected] = {}
        self.round = 0

    # ── what is copied ───────────────────────────────────────────────────────────────────────────────────────────────

    async def prepare(self) -> None:
        storage = WebdavStorage(f"{self.base}/b", name="dav")
        await storage.prepare()
        await storage.close()
        for name in ("source", "target"):
            await PosixStorage(self.scratch / name, name=name).prepare()
        block = os.urandom(self.given.bytes + self.given.files)
        (self.scratch / "source/small").mkdir()
        for n in range(self.given.files):
            content = block[n : n + self.given.bytes]
            (self.scratch / f"source/small/f{n:05}").write_bytes(content)
            self.small[f"f{n:05}"] = _expected([content])
        piece = os.urandom(1 << 20)
        with (self.scratch / "source/large").open("wb") as file:
            for _ in range(self.large_mib):
                file.write(piece)
        self.large = _expected([piece] * self.large_mib)
        for where, what in (("there/small", "small"), ("there/large", "large")):
            place = self.server.data / "b" / where
            place.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", self.scratch / "source" / what, place], check=True)
        give = self.server._give_away if isinstance(self.server, XRootD) else self.server.give_away
        give(self.server.data)

    @property
    def large_mib(self) -> int:
        return max(1, int(self.given.gib * 1024))

    # ── ours ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def up(self, names: dict[str, Expected], folder: str, base: str) -> None:
        source = PosixStorage(self.scratch / "source", name="source")
        target = WebdavStorage(f"{base}/b", name="dav")

        async def one(name: str, expected: Expected) -> None:
            to = f"up{self.round}/{name}"
            await copy_file(source, f"{folder}{name}", target, to, tag=name, expected=expected)

        await _all(names, one)
        await target.close()

    async def put(self, base: str) -> None:
        """Large, hashed, and not read back: what rclone does, and hashes."""
        source = PosixStorage(self.scratch / "source", name="source")
        target = WebdavStorage(f"{base}/b", name="dav")
        hasher = Hasher()

        async def pieces() -> Any:
            async for piece in source.read("large"):
                hasher.update(piece)
                yield piece

        await target.write(part_path("put"), pieces(), size_bytes=self.large.size_bytes)
        assert hasher.checksums() == self.large.checksums
        await target.delete(part_path("put"))
        await target.close()

    async def down(self, names: dict[str, Expected], folder: str, base: str) -> None:
        source = WebdavStorage(f"{base}/b", name="dav")
        target = PosixStorage(self.scratch / "target", name="target")

        async def one(name: str, expected: Expected) -> None:
            to = f"down{self.round}/{name}"
            await copy_file(source, f"there/{folder}{name}", target, to, tag=name, expected=expected)

        await _all(names, one)
        await source.close()

    async def get(self, base: str) -> None:
        """Large, hashed, and not read back: what curl does, and hashes."""
        source = WebdavStorage(f"{base}/b", name="dav")
        source.believed("there/large", self.large.size_bytes)
        hasher = Hasher()
        with (self.scratch / "got").open("wb", buffering=0) as file:
            async for piece in source.read("there/large"):
                writing = asyncio.get_running_loop().run_in_executor(None, file.write, piece)
                hasher.update(piece)
                await writing
        assert hasher.checksums() == self.large.checksums
        await source.close()

    # ── theirs ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def rclone(self, *arguments: object, base: str) -> None:
        options = ["--config", "/dev/null", "--webdav-url", f"{base}/b", "--transfers", str(AT_ONCE)]
        options += ["--checkers", str(AT_ONCE), "--ignore-times"]
        subprocess.run(["/usr/bin/rclone", *options, *map(str, arguments)], check=True, capture_output=True)

    def rclone_up(self, what: str, base: str, *, check: bool = False) -> None:
        source, to = self.scratch / "source" / what, f":webdav:rclone{self.round}"
        self.rclone("copy", source, to, base=base)
        if check:
            self.rclone(
                "check", "--download", source if source.is_dir() else source.parent, to, *_only(source), base=base
            )

    def rclone_down(self, what: str, base: str, *, check: bool = False) -> None:
        to = self.scratch / f"target/rclone{self.round}"
        self.rclone("copy", f":webdav:there/{what}", to, base=base)
        if check:
            there = ":webdav:there" + ("" if what == "large" else f"/{what}")
            self.rclone("check", "--download", there, to, *_only(self.scratch / "source" / what), base=base)

    def curl(self, base: str) -> None:
        subprocess.run(["curl", "-sf", "-o", self.scratch / "got", f"{base}/b/there/large"], check=True)

    # ── in turn ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def beside(self, ours: Callable[[], object], theirs: dict[str, Callable[[], object]]) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        for _ in range(self.given.repeats):
            for name, do in {"ours": ours, **theirs}.items():
                self.round += 1
                before, began = self._cpu(), time.perf_counter()
                do()
                seconds.setdefault(name, []).append(time.perf_counter() - began)
                cpu.setdefault(name, []).append(self._cpu() - before)
                self._clear()
        return {
            "seconds": {name: round(statistics.median(values), 2) for name, values in seconds.items()},
            "cpu_seconds": {name: round(statistics.median(values), 2) for name, values in cpu.items()},
            "ratio": {name: ratio_of(seconds[name], seconds["ours"]) for name in theirs},
            "cpu_ratio": {name: ratio_of(cpu[name], cpu["ours"]) for name in theirs},
        }

    def _cpu(self) -> float:
        return cpu_seconds(self.server.process.pid)

    def _clear(self) -> None:
        for folder in (*self.server.data.glob("b/*"), *(self.scratch / "target").glob("*")):
            if folder.name not in ("there", ".replica"):
                shutil.rmtree(folder)

    async def counted(self, do: Callable[[str], Awaitable[None] | None], *, in_thread: bool) -> dict[str, float]:
        async with counting(self.server.port) as (base, counts):
            self.round += 1
            await (asyncio.to_thread(do, base) if in_thread else do(base))  # type: ignore[arg-type,misc]
        self._clear()
        return {method: round(n / COUNTED_FILES, 2) for method, n in sorted(counts.items())}

    def measure(self) -> dict[str, Any]:
        large = {"large": self.large}
        run, base = asyncio.run, self.base
        few = {name: self.small[name] for name in [*self.small][:COUNTED_FILES]}
        return {
            "small_upload": self.beside(
                lambda: run(self.up(self.small, "small/", base)),
                {
                    "rclone": partial(self.rclone_up, "small", base),
                    "rclone, checked": partial(self.rclone_up, "small", base, check=True),
                },
            ),
            "small_download": self.beside(
                lambda: run(self.down(self.small, "small/", base)),
                {"rclone": partial(self.rclone_down, "small", base)},
            ),
            "large_upload": self.beside(
                lambda: run(self.up(large, "", base)),
                {"rclone, checked": partial(self.rclone_up, "large", base, check=True)},
            ),
            "large_upload, not read back": self.beside(
                lambda: run(self.put(base)), {"rclone": partial(self.rclone_up, "large", base)}
            ),
            "large_download": self.beside(
                lambda: run(self.down(large, "", base)),
                {"rclone, checked": partial(self.rclone_down, "large", base, check=True)},
            ),
            "large_download, not read back": self.beside(
                lambda: run(self.get(base)),
                {"rclone": partial(self.rclone_down, "large", base), "curl": partial(self.curl, base)},
            ),
            "requests_a_file": {
                "ours, up": run(self.counted(lambda to: self.up(few, "small/", to), in_thread=False)),
                "ours, down": run(self.counted(lambda to: self.down(few, "small/", to), in_thread=False)),
            },
        }


def _only(source: Path) -> list[str]:
    return [] if source.is_dir() else ["--include", f"/{source.name}", "--one-way"]


def _expected(pieces: list[bytes]) -> Expected:
    hasher = Hasher()
    for piece in pieces:
        hasher.update(piece)
    return Expected(hasher.size_bytes, hasher.checksums())


async def _all(names: dict[str, Expected], one: Callable[[str, Expected], Awaitable[None]]) -> None:
    left = iter(names.items())

    async def work() -> None:
        for name, expected in left:
            await one(name, expected)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("server", choices=["apache", "rclone", "xrootd"])
    parser.add_argument("--gib", type=float, default=1.0, help="of the large file (4 for the figure that is asked for)")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=10240)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    server: _DavServer | XRootD = {"apache": Apache, "rclone": Rclone, "xrootd": XRootD}[given.server]()
    scratch = Path(tempfile.mkdtemp(prefix="replica-bench-", dir="/dev/shm"))
    try:
        server.start()
        bench = Bench(server, scratch, given)
        asyncio.run(bench.prepare())
        print(json.dumps({"server": given.server, **vars(given), **bench.measure()}, indent=1))
    finally:
        server.remove()
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
