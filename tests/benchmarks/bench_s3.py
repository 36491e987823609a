"""How fast is a verified copy to and from S3 beside `rclone copy`, on the same server?

Question     One large file and many of 64 KiB from a folder to rclone's S3 server on loopback and back: what part of
             the speed of `rclone copy` (which compares an MD5 or ETag) is left when every byte is hashed, read back
             from the server, and published by a copy that never replaces?

Sketch       rclone moves the bytes once. We move them up, read them back, and the server copies them to their final
             name: on loopback, where the server's work is the same kind of work as ours and on the same cores, three
             times the bytes, so an upload should take two to three times as long; on a server that was seen to check
             CRC32C nothing is read back. Downloads move the bytes once on either side, and the folder's copy is
             read back from its cache. Of small files each costs about nine requests on a server without conditions
             (flags), five on one that has them; rclone needs two.

Measurement  Medians of `--repeats` runs, each tool in turn, targets removed before each. `put` is our upload without
             proof and publication, which shows where the rest goes. Ratios are seconds of rclone divided by ours.

    python tests/benchmarks/bench_s3.py --dir /data/scratch [--gib 1, or 0] [--files 1000, or 0] [--repeats 1]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from replica.storage.base import Storage, part_path
from replica.storage.copy import copy_file
from replica.storage.credentials import Credentials
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from tests.servers_s3 import ACCESS_KEY, SECRET_KEY, SETTINGS, RcloneS3, find_rclone

MIB = 1 << 20
SMALL_BYTES = 64 << 10
AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    server = RcloneS3()
    try:
        server.start()
        with tempfile.TemporaryDirectory(prefix="bench-s3-", dir=given.dir) as scratch:
            found = asyncio.run(measure(server, Path(scratch), int(given.gib * 1024) * MIB, given.files, given.repeats))
        print(json.dumps(found, indent=2))
    finally:
        server.remove()


async def measure(server: RcloneS3, scratch: Path, large: int, files: int, repeats: int) -> dict[str, object]:
    here, there = PosixStorage(scratch / "here", name="here"), PosixStorage(scratch / "there", name="there")
    await here.prepare()
    await there.prepare()
    client = server.client()
    for bucket in ("ours", "theirs"):
        client.create_bucket(Bucket=bucket)
    url = server.url("ours")
    remote = open_storage(url, name="s3", credentials=Credentials({url: SETTINGS}))
    await remote.prepare()
    block = os.urandom(16 * MIB)
    (scratch / "here" / "large").mkdir()
    (scratch / "here" / "small").mkdir()
    with (scratch / "here" / "large" / "f").open("wb") as file:
        for begin in range(0, large, len(block)):
            file.write(block[: large - begin])
    for number in range(files):
        (scratch / "here" / "small" / f"{number:06}").write_bytes(block[number * 64 : number * 64 + SMALL_BYTES])
    names = {"large": ["large/f"], "small": [f"small/{n:06}" for n in range(files)]}

    async def ours(source: Storage, target: Storage, which: str) -> None:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with limit:
                assert not (await copy_file(source, name, target, name, tag="bench")).adopted

        await asyncio.gather(*map(one, names[which]))

    async def put(which: str) -> None:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(number: int, name: str) -> None:
            async with limit:
                await remote.write(part_path(f"put{number}"), here.read(name))

        await asyncio.gather(*(one(n, name) for n, name in enumerate(names[which])))

    async def rclone(source: str, target: str) -> None:
        command = [str(find_rclone()), "copy", "--config", "", "--transfers", str(AT_ONCE), source, target]
        assert await asyncio.to_thread(lambda: subprocess.run(command, env=_environment(server)).returncode) == 0

    result: dict[str, object] = {"files": files, "large_bytes": large}
    for which, size in [(which, size) for which, size in (("large", large), ("small", files)) if size]:
        local = str(scratch / "here" / which)
        runs: dict[str, Callable[[], Awaitable[None]]] = {
            "put": lambda which=which: put(which),
            "rclone_up": lambda local=local, which=which: rclone(local, f"x:theirs/{which}"),
            "up": lambda which=which: ours(here, remote, which),
            "rclone_down": lambda which=which: rclone(f"x:theirs/{which}", str(scratch / "rclone" / which)),
            "down": lambda which=which: ours(remote, there, which),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats):
            if repeat:
                for name in names[which]:
                    await remote.delete(name)
                    await there.delete(name)
                client_delete(server, which, names[which])
                shutil.rmtree(scratch / "rclone")
            for name, run in runs.items():
                began = time.perf_counter()
                await run()
                seconds[name].append(time.perf_counter() - began)
                if name == "put":
                    await remote.collect_parts(0)
        middle = {name: statistics.median(took) for name, took in seconds.items()}
        result[which] = {
            "seconds": {name: round(took, 3) for name, took in middle.items()},
            ("MiB_per_second" if which == "large" else "files_per_second"): {
                name: round((size / MIB if which == "large" else size) / took, 1) for name, took in middle.items()
            },
            "ratio_up": round(middle["rclone_up"] / middle["up"], 2),
            "ratio_put": round(middle["rclone_up"] / middle["put"], 2),
            "ratio_down": round(middle["rclone_down"] / middle["down"], 2),
        }
    result["data_at_server"] = str(server.directory.parent)
    await remote.close()
    return result


def client_delete(server: RcloneS3, which: str, names: list[str]) -> None:
    client = server.client()
    for name in names:
        client.delete_object(Bucket="theirs", Key=name)


def _environment(server: RcloneS3) -> dict[str, str]:
    remote = {
        "TYPE": "s3",
        "PROVIDER": "Rclone",
        "ENDPOINT": server.endpoint,
        "ACCESS_KEY_ID": ACCESS_KEY,
        "SECRET_ACCESS_KEY": SECRET_KEY,
    }
    return {**os.environ, **{f"RCLONE_CONFIG_X_{key}": value for key, value in remote.items()}}


if __name__ == "__main__":
    main()
