"""How fast is the SFTP backend beside rclone and sftp on the same server, and how many small files a second?

Question  512 MiB up and down, checksums computed on the way, and 500 files of 64 KiB up (verified: each is read back)
          and down, through one connection to OpenSSH on loopback; the same bytes by `rclone copy` and `sftp -b`.
Sketch    SSH in Python costs per packet of 32 KiB some 50 µs beside AES: 400 MiB/s down. A small file published and
          read back is about 25 requests of 100-200 µs: 200-400 files/s, all of it one core of the client.

    python -m tests.benchmarks.bench_sftp [--mib 512] [--files 500]

Starts a server of its own in /dev/shm and removes it at the end. Prints one JSON document. Needs rclone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any

from replica.storage.base import part_path
from replica.storage.copy import Expected, copy_file, measure
from replica.storage.credentials import Credentials
from replica.storage.hashing import Hasher
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from tests.servers_ssh import OpenSSH

SMALL_BYTES = 64 << 10
AT_ONCE = 16


async def timed(do: Callable[[], Awaitable[object]]) -> dict[str, float]:
    began, cpu = time.perf_counter(), time.process_time()
    await do()
    return {"seconds": round(time.perf_counter() - began, 3), "cpu_seconds": round(time.process_time() - cpu, 3)}


def run(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    return round(time.perf_counter() - began, 3)


async def bench(server: OpenSSH, mib: int, files: int) -> dict[str, Any]:
    local = server.directory / "local"
    posix = PosixStorage(local, name="here")
    await posix.prepare()
    (local / "big").write_bytes(os.urandom(1 << 20) * mib)
    (local / "small").mkdir()
    for number in range(files):
        (local / "small" / f"{number:04}").write_bytes(os.urandom(SMALL_BYTES))
    remote = open_storage(server.url, name="there", credentials=Credentials({server.url: server.settings}))
    await remote.prepare()
    expected = {path: Expected(*await measure(posix, path)) for path in ("big", *small(files))}
    gate = asyncio.Semaphore(AT_ONCE)

    async def copy(source: Any, target: Any, path: str, to: str) -> None:
        async with gate:
            await copy_file(source, path, target, to, tag="bench", expected=expected[path])

    async def many(source: Any, target: Any, to: str) -> None:
        await asyncio.gather(*(copy(source, target, path, f"{to}/{path}") for path in small(files)))

    async def write_only() -> None:
        await remote.write(part_path("only"), posix.read("big"), size_bytes=mib << 20)

    async def read_only() -> None:
        hasher = Hasher()
        async for piece in remote.read("up/big"):
            hasher.update(piece)

    found: dict[str, Any] = {
        "up, verified": await timed(lambda: copy(posix, remote, "big", "up/big")),
        "up, write and sync alone": await timed(write_only),
        "down, read and hash alone": await timed(read_only),
        "small up, verified": await timed(lambda: many(posix, remote, "up")),
    }
    await remote.delete(part_path("only"))
    expected["up/big"] = expected["big"]
    for path in small(files):
        expected[f"up/{path}"] = expected[path]
    found["down, verified"] = await timed(lambda: copy(remote, posix, "up/big", "down/big"))

    async def many_down() -> None:
        await asyncio.gather(*(copy(remote, posix, f"up/{path}", f"down/{path}") for path in small(files)))

    found["small down, verified"] = await timed(many_down)
    await remote.delete("up/big")
    await posix.delete("down/big")
    await remote.close()
    return found


def small(files: int) -> list[str]:
    return [f"small/{number:04}" for number in range(files)]


def peers(server: OpenSSH) -> dict[str, float]:
    own, root = server.directory, server.data / "peers"
    root.mkdir()
    server.give_away(root)
    where = f":sftp,host=127.0.0.1,port={server.port},user={server.user},key_file={own}/user_key,shell_type=none"
    where += f",known_hosts_file={own}/known_hosts,set_modtime=false:{root}"
    rclone = ["rclone", "--config", "", "copyto"]
    many = ["rclone", "--config", "", "copy", "--transfers", str(AT_ONCE)]
    login = ["-q", "-P", str(server.port), "-i", f"{own}/user_key", "-o", f"UserKnownHostsFile={own}/known_hosts"]
    found = {
        "rclone up": run([*rclone, f"{own}/local/big", f"{where}/big"]),
        "rclone down": run([*rclone, f"{where}/big", f"{own}/rclone-down"]),
        "rclone small up": run([*many, f"{own}/local/small", f"{where}/small"]),
        "rclone small down": run([*many, f"{where}/small", f"{own}/rclone-small"]),
    }
    for path in (own / "rclone-down", root / "big"):
        path.unlink()
    for name, line in (("up", f"put {own}/local/big {root}/sftp"), ("down", f"get {root}/sftp {own}/sftp-down")):
        (own / "batch").write_text(line + "\n")
        found[f"sftp {name}"] = run(["sftp", "-b", f"{own}/batch", *login, f"{server.user}@127.0.0.1"])
    return found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--mib", type=int, default=512)
    arguments.add_argument("--files", type=int, default=500)
    given = arguments.parse_args()
    if shutil.which("rclone") is None:
        raise SystemExit("rclone is needed: apt-get install rclone")
    server = OpenSSH()
    try:
        server.start()
        ours = asyncio.run(bench(server, given.mib, given.files))
        theirs = peers(server)
    finally:
        server.remove()
    ratios = {
        "up: write and sync / rclone": theirs["rclone up"] / ours["up, write and sync alone"]["seconds"],
        "up: write, sync, read back / rclone": theirs["rclone up"] / ours["up, verified"]["seconds"],
        "down: read and hash / rclone": theirs["rclone down"] / ours["down, read and hash alone"]["seconds"],
        "down: verified on disk / rclone": theirs["rclone down"] / ours["down, verified"]["seconds"],
        "down: read and hash / sftp": theirs["sftp down"] / ours["down, read and hash alone"]["seconds"],
        "up: write and sync / sftp": theirs["sftp up"] / ours["up, write and sync alone"]["seconds"],
        "small up / rclone": theirs["rclone small up"] / ours["small up, verified"]["seconds"],
        "small down / rclone": theirs["rclone small down"] / ours["small down, verified"]["seconds"],
    }
    rates = {
        "MiB/s up": given.mib / ours["up, write and sync alone"]["seconds"],
        "MiB/s down": given.mib / ours["down, read and hash alone"]["seconds"],
        "small files/s up": given.files / ours["small up, verified"]["seconds"],
        "small files/s down": given.files / ours["small down, verified"]["seconds"],
    }
    rounded = [{key: round(value, 2) for key, value in found.items()} for found in (rates, ratios)]
    print(json.dumps({"ours": ours, "peers": theirs, "rates": rounded[0], "ratios": rounded[1]}, indent=2))


if __name__ == "__main__":
    main()
