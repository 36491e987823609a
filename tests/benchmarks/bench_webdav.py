"""WebDAV on loopback beside curl and rclone: one 1 GiB file each way, and 500 files of 64 KiB through the whole copy.

    python -m tests.benchmarks.bench_webdav apache|rclone|xrootd

Ours hashes all bytes on the way (xxh3_128 and adler32), curl and rclone hash none. Upload counts the claim-free part:
PUT of a temporary from a file.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from replica.storage.base import Piece, part_path
from replica.storage.copy import copy_file
from replica.storage.hashing import Hasher
from replica.storage.memory import MemoryStorage, behind
from replica.storage.webdav import WebdavStorage
from tests.servers_dav import Apache, Rclone, rclone
from tests.servers_xrootd import XRootD

SIZE = 1 << 30
FILES, FILE_BYTES, AT_ONCE = 500, 64 << 10, 32


def timed(name: str, do: object, rounds: int = 1) -> float:
    best = min(_seconds(do) for _ in range(rounds))
    print(f"  {name:34} {best:6.2f} s  {SIZE / best / (1 << 20):7.0f} MiB/s", flush=True)
    return best


def _seconds(do: object) -> float:
    began = time.perf_counter()
    do()  # type: ignore[operator]
    return time.perf_counter() - began


async def _download(url: str, path: str, to: Path) -> None:
    storage = WebdavStorage(url, name="bench")
    hasher = Hasher()
    await storage.stat(path)
    with to.open("wb", buffering=0) as file:
        async for piece in storage.read(path):
            hasher.update(piece)
            file.write(piece)
    await storage.close()


async def _upload(url: str, source: Path) -> None:
    storage = WebdavStorage(url, name="bench")
    hasher = Hasher()

    async def pieces() -> AsyncIterator[Piece]:
        with source.open("rb", buffering=0) as file:
            while piece := file.read(1 << 20):
                hasher.update(piece)
                yield piece

    part = part_path(f"up{time.time_ns()}")
    await storage.write(part, pieces(), size_bytes=SIZE)
    await storage.delete(part)
    await storage.close()


async def _small(url: str) -> float:
    store = MemoryStorage("bench")
    await store.prepare()
    content = os.urandom(FILE_BYTES)
    for n in range(FILES):
        behind("bench").put(f"f{n}", content)
    storage = WebdavStorage(url, name="bench")
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(n: int) -> None:
        async with gate:
            await copy_file(store, f"f{n}", storage, f"small/{time.time_ns()}.{n}", tag=f"s{n}")

    began = time.perf_counter()
    await asyncio.gather(*(one(n) for n in range(FILES)))
    seconds = time.perf_counter() - began
    await storage.close()
    return FILES / seconds


def main(kind: str) -> None:
    server = {"apache": Apache, "rclone": Rclone, "xrootd": XRootD}[kind]()
    scratch = Path(tempfile.mkdtemp(prefix="replica-bench-", dir="/dev/shm"))
    try:
        server.start()
        base = server.url_http if isinstance(server, XRootD) else server.url
        url = f"{base}/b"
        asyncio.run(_prepare(url))
        print(kind)
        print(f"  64 KiB files, {AT_ONCE} at once: {asyncio.run(_small(url)):.0f} files/s", flush=True)
        source = scratch / "source"
        with source.open("wb") as file:
            for _ in range(SIZE >> 20):
                file.write(os.urandom(1 << 20))
        ours = timed("upload, hashed", lambda: asyncio.run(_upload(url, source)))
        theirs = timed("upload, rclone", lambda: _rclone_up(base, source))
        print(f"  ratio {theirs / ours:.2f} x rclone")
        out = scratch / "out"
        ours = timed("download, hashed", lambda: asyncio.run(_download(url, "big", out)))
        theirs = timed("download, curl -o", lambda: subprocess.run(["curl", "-s", "-o", out, f"{url}/big"], check=True))
        print(f"  ratio {theirs / ours:.2f} x curl")
    finally:
        subprocess.run(["rm", "-rf", scratch], check=True)
        server.remove()


def _rclone_up(base: str, source: Path) -> None:
    done = rclone("copyto", "--ignore-times", "--webdav-url", base, source, ":webdav:b/big")
    assert done.returncode == 0, done.stderr


async def _prepare(url: str) -> None:
    storage = WebdavStorage(url, name="bench")
    await storage.prepare()
    await storage.close()


if __name__ == "__main__":
    main(sys.argv[1])
