"""Faults in flight, thousands of them, at every storage that is spoken to over a network: what arrives, what is told?

    python -m tests.scenarios.faults_in_flight [--faults 10000] [--seed 7] [--at apache …] [--lanes 6]

Between the worker's engine and real servers stands a proxy (tests.fault_proxy) that flips bits, cuts and resets
connections, hangs, drips, and answers what servers and proxies answer when they are ill. Orders go through
workers.carrying, as in a worker: small files and, with small thresholds, large ones by chunks; to the server and from
it; onto a free name, onto a name that has the right bytes already, and onto one that has others.

Checked after each transfer, on the server's own disk, past the proxy:

    bytes       what was reported done is there, whole and right; what was not is absent or right. A right file that was
                there stays; a wrong one is there, or in quarantine. Sources stay as they are.
    end         it ended in bounded time, by an outcome of the StorageError tree that blames the side that was ill.
    again       tried again without faults it is done, or told that it may pass.

And at the end: descriptors and tasks are as many as at the beginning, and no temporary is left that collecting by age
does not remove. The same seed gives the same faults to the same transfers. Prints figures as JSON; exits with 1 if
anything was wrong, and tells what.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from replica import log, wire
from replica.storage import chunks
from replica.storage.base import PARTS, QUARANTINE
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from rules import errors
from tests import fault_proxy
from tests.fault_proxy import Fault, FaultProxy
from workers.carrying import Carrier, Held
from workers.storages import Storages

#: How long the engine waits for a silent server here.
QUIET_SECONDS = 2
#: No transfer with up to three faults may take longer: each costs a few silences at most.
BOUND_SECONDS = 90.0
RESUME_BYTES, CHUNK_BYTES = 512 << 10, 128 << 10
SMALL = (0, 1, 1000, 65_536, 300_000)
LARGE = (600_000, 1_200_000, 2_100_000)
_STORAGE_ERRORS = {
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.StorageError)
}
_MAY_PASS = {
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.Transient)
}
#: Hanging costs seconds; it is rarer than the others.
_SLOW = ("up_hang", "down_hang", "up_drip", "down_drip")


# ── the servers ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Disk:
    """What a server keeps, seen past the proxy: a folder."""

    def __init__(self, root: Path, own: Callable[[Path], None] = lambda _: None) -> None:
        self.root, self._own = root, own

    def put(self, path: str, content: bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        for made in (file, *file.parents):
            if made == self.root:
                break
            self._own(made)

    def get(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def is_claim(self, path: str) -> bool:
        return (self.root / path).stat().st_mode & 0o777 == 0o601

    def beneath(self, folder: str) -> list[str]:
        return [str(file.relative_to(self.root)) for file in (self.root / folder).rglob("*") if file.is_file()]


class Bucket:
    """The same for an S3 server that keeps everything in its memory."""

    def __init__(self, client: Any, bucket: str, prefix: str) -> None:
        self.client, self.bucket, self.prefix = client, bucket, prefix + "/"

    def put(self, path: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + path, Body=content)

    def get(self, path: str) -> bytes | None:
        try:
            return bytes(self.client.get_object(Bucket=self.bucket, Key=self.prefix + path)["Body"].read())
        except self.client.exceptions.NoSuchKey:
            return None

    def is_claim(self, path: str) -> bool:
        return False

    def remove(self, path: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + path)

    def beneath(self, folder: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + folder)
        return [line["Key"].removeprefix(self.prefix) for page in pages for line in page.get("Contents", ())]


@dataclass
class Place:
    """A kind of storage over its server."""

    name: str
    port: int
    #: URL of a lane's folder by lane and port, what opens it, and the disk behind.
    url: Callable[[str, int], str]
    settings: Callable[[int, Path], dict[str, str]]
    disk: Callable[[str], Any]
    http: bool = True
    framed: Any = None
    kinds: Sequence[str] = (*fault_proxy.UP, *fault_proxy.DOWN, *fault_proxy.ANSWERS)
    sizes: Sequence[int] = (*SMALL, *SMALL, *LARGE)


def _folder(server: Any, data: Path) -> Callable[[str], Disk]:
    account = server.account

    def own(path: Path) -> None:
        if account is not None:
            os.chown(path, account.pw_uid, account.pw_gid)

    def disk(lane: str) -> Disk:
        (data / lane).mkdir()
        own(data / lane)
        return Disk(data / lane, own)

    return disk


def _dav(name: str, server: Any) -> Place:
    return Place(
        name, server.port, lambda lane, port: f"http://127.0.0.1:{port}/{lane}", _plain, _folder(server, server.data)
    )


def _plain(port: int, scratch: Path) -> dict[str, str]:
    return {}


class Served(Disk):
    """A folder that the server keeps a memory of: written to through it, read where it lies."""

    def __init__(self, bucket: Bucket, root: Path) -> None:
        super().__init__(root)
        self.put, self.remove = bucket.put, bucket.remove  # type: ignore[method-assign]


def _s3(name: str, server: Any, disk: Callable[[str], Any]) -> Place:
    from tests.servers_s3 import SETTINGS

    server.client().create_bucket(Bucket="faults")

    def url(lane: str, port: int) -> str:
        return f"s3+http://127.0.0.1:{port}/faults/{lane}"

    return Place(
        name, server.port, url, lambda port, scratch: dict(SETTINGS), disk, sizes=(*SMALL, *SMALL, *LARGE, 6_000_000)
    )


def _start(name: str, stack: ExitStack) -> Place:
    """The server of that kind, removed when the stack ends."""

    def started(server: Any) -> Any:
        stack.callback(server.remove)
        server.start()
        return server

    if name in ("apache", "rclone"):
        from tests.servers_dav import Apache, Rclone

        return _dav(name, started(Apache() if name == "apache" else Rclone()))
    if name == "xrootd-dav":
        from tests.servers_xrootd import XRootD

        return _dav(name, started(XRootD("dav")))
    if name == "moto":
        from tests.servers_s3 import Moto

        moto = started(Moto())
        client = moto.client()
        return _s3(name, moto, lambda lane: Bucket(client, "faults", lane))
    if name == "rclone-s3":
        from tests.servers_s3 import RcloneS3

        server = started(RcloneS3())
        kept, client = server.directory / "data/faults", server.client()
        return _s3(name, server, lambda lane: Served(Bucket(client, "faults", lane), kept / lane))
    if name == "root":
        from tests.servers_xrootd import XRootD

        server = started(XRootD("root"))
        framed = (fault_proxy.xrootd_requests, fault_proxy.xrootd_answers)
        url = lambda lane, port: f"root://127.0.0.1:{port}//{lane}"  # noqa: E731
        disk = _folder(server, server.data)
        return Place(name, server.port, url, _plain, disk, http=False, framed=framed, kinds=fault_proxy.RAW)
    assert name == "sftp", name
    from tests.servers_ssh import OpenSSH

    ssh = started(OpenSSH())
    public = (ssh.directory / "host_key.pub").read_text()

    def known(port: int, scratch: Path) -> dict[str, str]:
        file = scratch / f"known_hosts_{port}"
        file.write_text(f"[127.0.0.1]:{port} {public}")
        return ssh.settings | {"known_hosts_file": str(file)}

    def url_there(lane: str, port: int) -> str:
        return f"sftp://127.0.0.1:{port}{ssh.data}/{lane}"

    return Place(name, ssh.port, url_there, known, _folder(ssh, ssh.data), http=False, kinds=fault_proxy.RAW)


PLACES = ("apache", "rclone", "xrootd-dav", "rclone-s3", "moto", "root", "sftp")


# ── one lane: one transfer after another through one proxy ───────────────────────────────────────────────────────────


@dataclass
class Verdict:
    """What the whole run has seen."""

    wanted: int
    happened: Counter[str] = field(default_factory=Counter)
    by_place: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    transfers: int = 0
    slowest_seconds: float = 0.0
    bytes_moved: int = 0

    @property
    def enough(self) -> bool:
        return self.happened.total() >= self.wanted or len(self.wrong) >= 50


class Engine:
    """workers.carrying, with orders of ours."""

    def __init__(self, storages: Storages) -> None:
        self._ended: dict[tuple[int, int], asyncio.Future[wire.Outcome | None]] = {}
        self.carrier = Carrier(storages, self._finish, concurrency=8)
        self.transfers = 0

    def _finish(self, held: Held, outcome: wire.Outcome | None) -> None:
        self._ended[held.key].set_result(outcome)

    async def carry(self, order: wire.Order) -> wire.Outcome | None:
        held = Held(order, time.monotonic() + 3600)
        self._ended[held.key] = asyncio.get_running_loop().create_future()
        try:
            await self.carrier.carry([held])
            return self._ended[held.key].result()
        finally:
            del self._ended[held.key]


@dataclass
class Lane:
    place: Place
    name: str
    dice_seed: str
    proxy: FaultProxy
    engine: Engine
    there: Any  #: the server's disk
    here: Disk  #: a folder of this machine
    urls: tuple[str, str]  #: of the server through the proxy, and of the folder
    verdict: Verdict

    async def run(self, stop: Callable[[], bool]) -> None:
        number = 0
        while not stop():
            number += 1
            await Transfer(self, number).run()


class Transfer:
    def __init__(self, lane: Lane, number: int) -> None:
        self.lane, self.verdict = lane, lane.verdict
        self.dice = dice = random.Random(f"{lane.dice_seed}/{number}")
        self.up = dice.random() < 0.6
        self.size = dice.choice(lane.place.sizes)
        self.path = f"d{number % 5}/f{number}"
        self.content = dice.randbytes(self.size)
        self.before = dice.choices(("free", "right", "wrong"), (82, 12, 6))[0]
        self.faults = [self._fault() for _ in range(dice.choices((1, 2, 3), (70, 22, 8))[0])]
        lane.engine.transfers += 1
        self.id = lane.engine.transfers
        self.source, self.target = (lane.here, lane.there) if self.up else (lane.there, lane.here)
        self.other = bytes([*self.content[:-1], self.content[-1] ^ 1]) if self.content else b"other"

    def _fault(self) -> Fault:
        dice, place = self.dice, self.lane.place
        kind = dice.choice(place.kinds)
        while kind in _SLOW and dice.random() < 0.7:
            kind = dice.choice(place.kinds)
        if place.http:
            return Fault(kind, turn=1 + int(dice.expovariate(1 / 4)), at=dice.random())
        most = dice.choice((400, 3_000, 3_000 + self.size))
        return Fault(kind, at=dice.randrange(most))

    def __str__(self) -> str:
        way = "to" if self.up else "from"
        told = ", ".join(f"{f.kind}@{f.turn}/{f.at:.3f}{'' if f.happened else ' (never)'}" for f in self.faults)
        return f"{self.lane.name} {self.path}: {self.size} bytes {way} it, name {self.before}, {told}"

    async def run(self) -> None:
        await asyncio.to_thread(self._lay_out)
        lane = self.lane
        lane.proxy.arm(*self.faults)
        began = time.monotonic()
        outcome = await self._attempt(1)
        seconds = time.monotonic() - began
        happened = [fault.kind for fault in self.faults if fault.happened]
        self.verdict.happened.update(happened)
        self.verdict.by_place[lane.place.name] += len(happened)
        self.verdict.transfers += 1
        self.verdict.slowest_seconds = max(self.verdict.slowest_seconds, seconds)
        await asyncio.to_thread(self._look, outcome)
        lane.proxy.arm()
        if outcome is not None and outcome.outcome != "done":
            again = await self._attempt(2)
            await asyncio.to_thread(self._look, again)
            told = "none" if again is None else again.error or again.outcome
            self.verdict.again[told] += 1
            if told != "done" and told not in _MAY_PASS:
                self._say(f"without faults it failed with {again}, after {outcome}")
        await asyncio.to_thread(self._clear)

    def _lay_out(self) -> None:
        self.source.put(self.path, self.content)
        if self.before != "free":
            self.target.put(self.path, self.content if self.before == "right" else self.other)

    async def _attempt(self, epoch: int) -> wire.Outcome | None:
        server, folder = self.lane.urls
        source, target = ("here", self.lane.name) if self.up else (self.lane.name, "here")
        urls = {"here": folder, self.lane.name: server}
        order = wire.Order(
            transfer=self.id,
            epoch=epoch,
            did=f"test:{self.path}",
            size=self.size,
            checksums={"xxh3_128": xxhash.xxh3_128_hexdigest(self.content)},
            target_endpoint=target,
            target_url=urls[target],
            target_path=self.path,
            sources=[wire.OrderSource(endpoint=source, url=urls[source], path=self.path)],
            attempt=epoch,
        )
        try:
            async with asyncio.timeout(BOUND_SECONDS):
                outcome = await self.lane.engine.carry(order)
        except TimeoutError:
            self._say(f"it did not end within {BOUND_SECONDS:.0f} s")
            return None
        told = "none" if outcome is None else outcome.error or outcome.outcome
        self.verdict.outcomes[told] += epoch == 1
        if outcome is None:
            self._say("it ended without an outcome")
        elif outcome.outcome != "done":
            if outcome.error not in _STORAGE_ERRORS:
                self._say(f"its error is {outcome.error}: {outcome.message}")
            if outcome.side != ("target" if self.up else "source"):
                self._say(f"it blames the {outcome.side}: {outcome.error}: {outcome.message}")
        return outcome

    def _look(self, outcome: wire.Outcome | None) -> None:
        found = self.target.get(self.path)
        done = outcome is not None and outcome.outcome == "done"
        if done and found != self.content:
            self._say(f"it was reported done, and {self._describe(found)} is there")
        if self.before == "right" and found != self.content:
            self._say(f"a right file was there, and now {self._describe(found)} is")
        if not done and found == b"" and self.target.is_claim(self.path):
            found = (
                None  # replica.storage.xrootd says so: a name that is being published is an empty file of odd rights
            )
        if not done and found not in (None, self.content) and not (self.before == "wrong" and found == self.other):
            self._say(f"it failed, and {self._describe(found)} has the name")
        if self.before == "wrong" and found != self.other:
            kept = [self.target.get(path) for path in self.target.beneath(QUARANTINE)]
            if self.other not in kept:
                self._say("the bytes that had the name are neither there nor in quarantine")
        if self.source.get(self.path) != self.content:
            self._say("the source's file changed")

    def _describe(self, found: bytes | None) -> str:
        if found is None:
            return "nothing"
        differing = sum(a != b for a, b in zip(found, self.content, strict=False))
        return f"a file of {len(found)} bytes, {differing} of them wrong,"

    def _say(self, what: str) -> None:
        self.verdict.wrong.append(f"{self}: {what}")

    def _clear(self) -> None:
        for disk in (self.source, self.target):
            disk.remove(self.path)
        for path in self.target.beneath(QUARANTINE) if self.before == "wrong" else ():
            self.target.remove(path)


# ── the whole ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def small_thresholds() -> Iterator[None]:
    """Files of half a megabyte are large."""
    before = chunks.RESUME_BYTES, chunks.CHUNK_BYTES
    chunks.RESUME_BYTES, chunks.CHUNK_BYTES = RESUME_BYTES, CHUNK_BYTES
    try:
        yield
    finally:
        chunks.RESUME_BYTES, chunks.CHUNK_BYTES = before


@asynccontextmanager
async def lanes_at(
    places: Sequence[Place], lanes: int, seed: int, scratch: Path, verdict: Verdict, quiet_seconds: int
) -> AsyncIterator[list[Lane]]:
    async with AsyncExitStack() as stack:
        tables: dict[str, dict[str, str]] = {}
        engine = Engine(storages := Storages(credentials=Credentials(tables)))
        made = []
        for place in places:
            for number in range(lanes):
                name = f"{place.name}-{number}"
                proxy = await stack.enter_async_context(FaultProxy(place.port, http=place.http, framed=place.framed))
                here = Disk(scratch / name)
                for url, at in ((place.url(name, proxy.port), place.port), (place.url(name, place.port), place.port)):
                    port = proxy.port if url == place.url(name, proxy.port) else at
                    tables[url] = place.settings(port, scratch) | {"quiet_seconds": str(quiet_seconds)}
                    tables[url]["digest_seconds"] = str(2 * quiet_seconds)
                there = place.disk(name)
                credentials = Credentials(tables)
                for url, endpoint in ((place.url(name, place.port), name), (here.root.as_uri(), "here")):
                    storage = open_storage(url, name=endpoint, credentials=credentials)
                    await storage.prepare()
                    await storage.close()
                urls = (place.url(name, proxy.port), here.root.as_uri())
                made.append(Lane(place, name, f"{seed}/{name}", proxy, engine, there, here, urls, verdict))
        storages._credentials = Credentials(tables)
        try:
            yield made
        finally:
            engine.carrier.close()
            await storages.close()


async def collected(lane: Lane) -> str:
    """What collecting by age leaves of the temporaries; it should be nothing."""
    url = lane.place.url(lane.name, lane.place.port)
    settings = lane.place.settings(lane.place.port, lane.here.root)
    for address, endpoint, disk in ((url, lane.name, lane.there), (lane.urls[1], "here", lane.here)):
        storage = open_storage(address, name=endpoint, credentials=Credentials({address: settings}))
        try:
            await storage.collect_parts(0.0)
            if left := await asyncio.to_thread(disk.beneath, PARTS):
                return f"{endpoint}: temporaries are left: {left[:5]}"
        finally:
            await storage.close()
    return ""


async def play(
    names: Sequence[str],
    faults: int,
    seed: int,
    lanes: int,
    *,
    seconds: float = 3600.0,
    each: int | None = None,
    kinds: Sequence[str] | None = None,
    quiet_seconds: int = QUIET_SECONDS,
) -> dict[str, Any]:
    """`each`: so many transfers a lane, whatever happens to them; else until there were enough faults."""
    log.configure("error", stream=io.StringIO())
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    verdict = Verdict(faults)
    began, cpu = time.monotonic(), time.process_time()
    with ExitStack() as stack, small_thresholds():
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="replica-faults-")))
        places = [_start(name, stack) for name in names]
        for place in places:
            place.kinds = kinds or place.kinds
        before: tuple[int, int] | None = None
        async with lanes_at(places, lanes, seed, scratch, verdict, quiet_seconds) as made:
            await asyncio.sleep(0.2)
            before = _held()
            until = time.monotonic() + seconds

            async def one(lane: Lane) -> None:
                if each is not None:
                    for number in range(1, each + 1):
                        await Transfer(lane, number).run()
                else:
                    await lane.run(lambda: verdict.enough or time.monotonic() > until)

            await asyncio.gather(*(one(lane) for lane in made))
            for lane in made:
                lane.proxy.arm()
                if told := await collected(lane):
                    verdict.wrong.append(told)
        await asyncio.sleep(1.0)
        descriptors, tasks = _held()
        # Listening sockets of the proxies were counted before and are gone now; so nothing may be left above that.
        if descriptors > before[0] or tasks > before[1]:
            verdict.wrong.append(f"descriptors {before[0]} → {descriptors}, tasks {before[1]} → {tasks}")
    return {
        "faults": verdict.happened.total(),
        "transfers": verdict.transfers,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "slowest_seconds": round(verdict.slowest_seconds, 1),
        "by_place": dict(sorted(verdict.by_place.items())),
        "by_kind": dict(sorted(verdict.happened.items())),
        "outcomes": dict(verdict.outcomes.most_common()),
        "again": dict(verdict.again.most_common()),
        "descriptors": [before[0], descriptors],
        "tasks": [before[1], tasks],
        "wrong": verdict.wrong,
    }


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--lanes", type=int, default=6, help="transfers at once at each server")
    parser.add_argument("--at", nargs="*", choices=PLACES, default=list(PLACES))
    parser.add_argument("--seconds", type=float, default=3600.0, help="end after so long, however few there were")
    parser.add_argument("--kinds", nargs="*", help="these faults only")
    said = parser.parse_args(words)
    told = asyncio.run(play(said.at, said.faults, said.seed, said.lanes, seconds=said.seconds, kinds=said.kinds))
    print(json.dumps(told, indent=2))
    return 1 if told["wrong"] or told["faults"] < said.faults else 0


if __name__ == "__main__":
    sys.exit(main())
