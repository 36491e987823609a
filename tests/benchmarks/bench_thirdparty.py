"""How many small files a second go from one HTTP storage to another, beside gfal2, the engine under FTS?

Question     2,000 files of 10 KiB between two XRootD servers of this machine by HTTP third-party copy: ours through
             `copy_file` (a temporary, the target's own adler32 compared with the catalogue's, a claim on the name, a
             MOVE that replaces nothing), gfal2's `filecopy` with checksums of both ends and without any, onto the final
             name. At least twice gfal2's rate?

Sketch       A COPY alone costs the two servers about 2 ms of the 2 cores: 500 files/s and no more, whoever asks (the
             figure `copy_alone` is that bound, measured in the same run). gfal2 asks one after the other, with five to
             seven requests a file: 160 to 230 files/s. We have about as many requests beside the COPY as gfal2, each of
             0.3 to 0.5 ms, so what we can win is that nobody waits: several files at once.

Measurement  Each tool in turn, `--repeats` times, into a folder of its own; medians, of ratios too. Starting a tool is
             not within its time, but within the CPU seconds, which are those of the client and of both servers. gfal2
             runs in Debian's Python, one file after the other and with `--threads` threads. Ratios are theirs by ours
             in seconds: above 1, we are faster. On a shared machine compare within one run only.

    python tests/benchmarks/bench_thirdparty.py [--files 2000] [--bytes 10240] [--at-once 32] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import aiohttp

from replica.storage.base import Storage
from replica.storage.copy import Expected, copy_file
from replica.storage.hashing import Hasher
from replica.storage.registry import open_storage
from tests.benchmarks.beside import counting, cpu_seconds, ratio_of
from tests.debian import need
from tests.servers_xrootd import XRootD

#: Run by Debian's Python, which has gfal2: source, target, folder, first line of names, checksums?, threads → seconds.
_GFAL2 = """
import gfal2, json, sys, threading, time
given = json.load(sys.stdin)
names, lock, failed = iter(given["names"]), threading.Lock(), []
def copy():
    context = gfal2.creat_context()
    parameters = context.transfer_parameters()
    parameters.overwrite, parameters.create_parent, parameters.timeout = False, True, 60
    if given["checksums"]:
        parameters.set_checksum(gfal2.checksum_mode.both, "ADLER32", "")
    while True:
        with lock:
            name = next(names, None)
        if name is None:
            return
        try:
            context.filecopy(parameters, given["source"] + name, given["target"] + name)
        except gfal2.GError as error:
            failed.append(str(error))
threads = [threading.Thread(target=copy) for _ in range(given["threads"])]
began = time.perf_counter()
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps({"seconds": time.perf_counter() - began, "failed": failed[:3]}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=10240)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help="run these tools only, separated by commas")
    given = parser.parse_args()
    need("python3-gfal2", "gfal2-plugin-http")
    one = XRootD("one")
    two = XRootD("two", trusting=one)
    try:
        one.start()
        two.start()
        print(json.dumps(measure(one, two, given), indent=2))
    finally:
        one.remove()
        two.remove()


def measure(one: XRootD, two: XRootD, given: argparse.Namespace) -> dict[str, object]:
    block = os.urandom(given.bytes + given.files)
    contents = {f"f{n:06}": block[n : n + given.bytes] for n in range(given.files)}
    for name, content in contents.items():
        folder = one.data / "data/small"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    one.put("data/small/last", b"")  # and all of it belongs to the server
    known = {name: _expected(content) for name, content in contents.items()}

    def replica(folder: str) -> float:
        return asyncio.run(_ours(one, two, folder, known, given.at_once))

    def alone(folder: str) -> float:
        return asyncio.run(_copy_alone(one, two, folder, [*known], given.at_once))

    def gfal2(checksums: bool, threads: int) -> Callable[[str], float]:
        def run(folder: str) -> float:
            order = {
                "source": f"{one.url_http}/data/small/",
                "target": f"{two.url_http}/{folder}/",
                "names": [*known],
                "checksums": checksums,
                "threads": threads,
            }
            told = subprocess.run(
                ["/usr/bin/python3", "-c", _GFAL2], input=json.dumps(order), capture_output=True, text=True, check=True
            )
            answer = json.loads(told.stdout)
            assert not answer["failed"], answer["failed"]
            return float(answer["seconds"])

        return run

    tools: dict[str, Callable[[str], float]] = {
        "replica": replica,
        "gfal2_verified": gfal2(True, 1),
        "gfal2_verified_threads": gfal2(True, given.threads),
        "gfal2_unverified": gfal2(False, 1),
        "copy_alone": alone,
    }
    if given.only:
        tools = {name: tools[name] for name in given.only.split(",")}
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    cpu: dict[str, list[float]] = {name: [] for name in tools}
    servers = [server.process.pid for server in (one, two) if server.process is not None]
    for repeat in range(given.repeats):
        for name, tool in tools.items():
            folder = f"data/{name}{repeat}"
            (two.data / folder).mkdir(parents=True)
            two._give_away(two.data)
            before = cpu_seconds(*servers)
            seconds[name].append(tool(folder))
            cpu[name].append(cpu_seconds(*servers) - before)
            for file, content in contents.items():
                assert (two.data / folder / file).read_bytes() == content, (name, file)
            two.empty()
    others = [name for name in tools if name != "replica"]
    rates = {name: given.files / statistics.median(values) for name, values in seconds.items()}
    return {
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "files": given.files,
        "bytes_each": given.bytes,
        "at_once": given.at_once,
        "files_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "replica_divided_by": {
            name: ratio_of(seconds[name], seconds["replica"]) for name in tools if name != "replica"
        },
        "cpu_seconds": {name: round(statistics.median(values), 2) for name, values in cpu.items()},
        "their_cpu_divided_by_ours": {name: ratio_of(cpu[name], cpu["replica"]) for name in others},
        "requests_a_file_of_ours": asyncio.run(_requests(one, two, known, given.at_once)),
    }


async def _requests(one: XRootD, two: XRootD, known: dict[str, Expected], at_once: int) -> dict[str, float]:
    """To the target, with those that are made once for all files."""
    (two.data / "data/counted").mkdir(parents=True)
    two._give_away(two.data)
    async with counting(two.port) as (base, counts):
        await _copied(one, f"{base}/data/counted", known, at_once)
    return {method: round(count / len(known), 2) for method, count in sorted(counts.items())}


def _expected(content: bytes) -> Expected:
    hasher = Hasher()
    hasher.update(content)
    return Expected(len(content), hasher.checksums())


async def _ours(one: XRootD, two: XRootD, folder: str, known: dict[str, Expected], at_once: int) -> float:
    return await _copied(one, f"{two.url_http}/{folder}", known, at_once)


async def _copied(one: XRootD, to: str, known: dict[str, Expected], at_once: int) -> float:
    source = open_storage(f"{one.url_http}/data", name="ONE")
    target = open_storage(to, name="TWO")
    await source.prepare()
    await target.prepare()

    async def copy(name: str, source: Storage = source, target: Storage = target) -> None:
        copied = await copy_file(source, f"small/{name}", target, name, tag=f"bench-{name}", expected=known[name])
        assert copied.verified_by == "digest adler32"
        # Streaming would have told this too.
        assert copied.checksums.get("xxh3_128") is None

    try:
        return await _timed([*known], copy, at_once)
    finally:
        await source.close()
        await target.close()


async def _copy_alone(one: XRootD, two: XRootD, folder: str, names: list[str], at_once: int) -> float:
    """Nothing but the COPY: what the two servers can do."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4)) as session:

        async def copy(name: str) -> None:
            headers = {"Source": f"{one.url_http}/data/small/{name}", "Overwrite": "F", "Credential": "none"}
            url = f"{two.url_http}/{folder}/{name}"
            async with session.request("COPY", url, headers=headers) as answer:
                assert "success" in await answer.text()

        return await _timed(names, copy, at_once)


async def _timed(names: list[str], copy: Callable[[str], Awaitable[None]], at_once: int) -> float:
    left = iter(names)

    async def work() -> None:
        for name in left:
            await copy(name)

    began = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
