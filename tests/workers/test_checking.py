"""A site's looks at its own replicas, through the whole system: service, queue, worker, disks, a real server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import xxhash

from replica import wire
from replica.catalog import checks, fsck
from replica.catalog import rules as rules_
from replica.client import Client
from replica.db import tables
from replica.db.engine import Database
from replica.storage.chunks import CHUNK_BYTES
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from rules.names import Did
from rules.paths import path_for
from tests.conftest import HandClock
from tests.service import SITE, Service, serving
from workers.checking import Paced
from workers.mover import Mover

BOTH = "A|B"


class Place:
    """A service over a database, endpoints A, B, C of one site on real disks, and that site's worker when wanted."""

    def __init__(self, db: Database, clock: HandClock, service: Service, directory: Path) -> None:
        self.db, self.clock, self.service, self.directory = db, clock, service, directory
        self.client: Client = service.client()
        self.client.scopes.add("t")
        self.files = 0
        for name in "ABC":
            self.endpoint(name, (directory / name).as_uri())

    def endpoint(self, name: str, url: str, credentials: Credentials | None = None) -> None:
        if url.startswith("file:"):
            (self.directory / name).mkdir(parents=True)
        storage = open_storage(url, name=name, credentials=credentials)

        async def prepare() -> None:
            await storage.prepare()
            await storage.close()

        asyncio.run(prepare())
        self.client.endpoints.add(wire.NewEndpoint(name=name, site=SITE, url=url))
        self.client.integrity.set_scrub(name, depth="off", files_per_second=None, bytes_per_second=None)

    def put(self, content: bytes, at: str = "A") -> str:
        """Lies at the endpoint and is registered there."""
        self.files += 1
        did = f"t:run/f{self.files:03}"
        path = self.at(did, at)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        checksums = {"xxh3_128": xxhash.xxh3_128_hexdigest(content), "md5": hashlib.md5(content).hexdigest()}
        new = wire.NewReplica(did=did, size=len(content), checksums=checksums)
        self.client.replicas.register(wire.Registration(endpoint=at, replicas=[new], evidence="hashed"))
        return did

    def at(self, did: str, endpoint: str) -> Path:
        return self.directory / endpoint / path_for(Did.parse(did), "identity")

    def evaluate(self) -> None:
        for _ in range(50):
            with self.db.write() as s:
                if not rules_.evaluate_due(s, 1_000):
                    return

    def states(self, did: str) -> dict[str, str]:
        return {r.endpoint: r.state for r in self.client.replicas.pages(did)}

    def rule(self, did: str, expression: str = BOTH, copies: int = 2) -> wire.Rule:
        rule = self.client.rules.add(wire.NewRule(did=did, expression=expression, copies=copies))
        self.evaluate()
        return rule

    def ok(self, rule: wire.Rule) -> bool:
        return self.client.rules.show(rule.id).state == "ok"

    def work(self, true: Callable[[], Any], *, credentials: Credentials | None = None, seconds: float = 15.0) -> Mover:
        """The site's worker is at work until this is true."""

        async def run() -> Mover:
            async with self.worker(credentials=credentials) as mover:
                for _ in range(int(seconds / 0.02)):
                    if await asyncio.to_thread(true):
                        return mover
                    await asyncio.sleep(0.02)
                raise AssertionError(f"it did not come true: {[*self.client.integrity.suspects()]}")

        return asyncio.run(run())

    @asynccontextmanager
    async def worker(self, **options: Any) -> Any:
        mover = Mover(self.service.url, lambda: self.service.worker, poll_seconds=0.05, stop_seconds=3.0, **options)
        task = asyncio.create_task(mover.run())
        try:
            yield mover
        finally:
            mover.stop()
            await task

    def scrub(self, name: str, **change: Any) -> None:
        """Everything that was not verified in the last second is to be read."""
        self.clock.turn(days=1)
        self.client.integrity.set_scrub(name, **{"depth": "deep", "period_seconds": 1, "now": True} | change)

    def scrubbed(self, name: str) -> bool:
        return self.client.integrity.scrub(name).pass_ended_at is not None

    def moved(self) -> int:
        with self.db.read() as s:
            return s.execute(
                sa.select(tables.attempts.c.bytes).order_by(tables.attempts.c.id.desc()).limit(1)
            ).scalar_one()

    def whole(self) -> None:
        with self.db.read() as s:
            assert [f for f in fsck.examine(s) if f.violations] == []


@pytest.fixture
def place(db: Database, clock: HandClock, tmp_path: Path) -> Iterator[Place]:
    with serving(db) as service:
        yield Place(db, clock, service, tmp_path / "disks")


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def quarantined(place: Place, endpoint: str) -> list[bytes]:
    folder = place.directory / endpoint / ".replica" / "quarantine"
    return [p.read_bytes() for p in folder.rglob("*") if p.is_file()] if folder.exists() else []


def test_a_flipped_bit_is_found_by_the_scrub_and_healed_by_moving_one_chunk(place: Place) -> None:
    content = os.urandom(3 * CHUNK_BYTES + 12_345)
    did = place.put(content)
    rule = place.rule(did)
    place.work(lambda: place.ok(rule))
    target = place.at(did, "B")
    flip(target, CHUNK_BYTES + 77)
    wrong = target.read_bytes()
    place.scrub("B")
    place.work(lambda: place.scrubbed("B") and place.ok(rule) and target.read_bytes() == content)
    assert 0 < place.moved() <= 2 * CHUNK_BYTES
    assert quarantined(place, "B") == [wrong], "the bad bytes are kept"
    (replica,) = [r for r in place.client.replicas.pages(did) if r.endpoint == "B"]
    assert (replica.state, replica.evidence) == ("available", "copied")
    place.whole()
    kinds = [event.kind for event in place.client.events.list(kinds=["replica.*"])]
    assert kinds == ["replica.suspicious", "replica.bad"]


def test_truncated_and_vanished_files_are_found_and_come_back(place: Place) -> None:
    contents = [os.urandom(10_000 + i) for i in range(4)]
    dids = [place.put(content) for content in contents]
    rules = [place.rule(did) for did in dids]
    place.work(lambda: all(map(place.ok, rules)))
    os.truncate(place.at(dids[0], "B"), 99)
    place.at(dids[1], "B").unlink()
    flip(place.at(dids[2], "B"), 5)
    place.scrub("B")

    def right() -> bool:
        there = [place.at(did, "B") for did in dids]
        return all(path.exists() and path.read_bytes() == c for path, c in zip(there, contents, strict=True))

    place.work(lambda: place.scrubbed("B") and right() and all(map(place.ok, rules)))
    assert len(quarantined(place, "B")) == 2
    place.whole()


def test_a_disk_that_is_not_mounted_is_judged_by_nobody(place: Place) -> None:
    dids = [place.put(os.urandom(1_000)) for _ in range(30)]
    rules = [place.rule(did) for did in dids]
    place.work(lambda: all(map(place.ok, rules)))
    shutil.move(place.directory / "B", place.directory / "away")
    (place.directory / "B").mkdir()
    place.scrub("B")
    place.work(lambda: place.client.integrity.scrub("B").trouble)
    assert not list(place.client.integrity.suspects())
    assert all(place.states(did) == {"A": "available", "B": "available"} for did in dids)
    (place.directory / "B").rmdir()
    shutil.move(place.directory / "away", place.directory / "B")
    place.clock.turn(seconds=600)
    place.work(lambda: place.scrubbed("B"))
    assert not list(place.client.integrity.suspects())


def test_the_last_copy_is_kept_and_a_bad_source_is_told_from_a_bad_target(place: Place) -> None:
    content = os.urandom(50_000)
    did = place.put(content)
    flip(place.at(did, "A"), 17)
    wrong = place.at(did, "A").read_bytes()
    rule = place.rule(did, "B", copies=1)
    place.work(lambda: place.states(did)["A"] == "bad")
    assert place.at(did, "A").read_bytes() == wrong, "a last copy is never thrown away"
    (suspect,) = place.client.integrity.suspects()
    assert (suspect.endpoint, suspect.why, suspect.proven) == ("A", "source", True)
    place.whole()
    # Good bytes come back by hand; a word alone does not make them good, a worker's look does.
    place.at(did, "A").write_bytes(content)
    assert place.client.integrity.good([did], "A").to_verify == 1
    assert place.states(did)["A"] == "bad"
    place.work(lambda: place.states(did)["A"] == "available")
    place.clock.turn(hours=2)
    place.evaluate()
    place.work(lambda: place.ok(rule))
    assert place.at(did, "B").read_bytes() == content


def test_a_word_that_is_wrong_does_no_harm_and_a_repair_needs_no_rule(place: Place) -> None:
    content = os.urandom(2 * CHUNK_BYTES)
    did = place.put(content)
    place.put(b"other", "C")
    rule = place.rule(did)
    place.work(lambda: place.ok(rule))
    place.client.integrity.bad([did], "B", reason="I think so")
    place.work(lambda: place.ok(rule))  # the worker reads it, and finds that it is right
    assert quarantined(place, "B") == []
    # A copy that no rule asks for is mended when somebody says so.
    place.at(did, "C").parent.mkdir(parents=True, exist_ok=True)
    place.at(did, "C").write_bytes(content)
    new = wire.NewReplica(did=did, size=len(content), checksums={"xxh3_128": xxhash.xxh3_128_hexdigest(content)})
    place.client.replicas.register(wire.Registration(endpoint="C", replicas=[new], evidence="hashed"))
    flip(place.at(did, "C"), 3)
    assert place.client.integrity.bad([did], "C", reason="broken").repairs == 0
    assert place.client.integrity.repair(did, "C").activity == "repair"
    place.work(lambda: place.states(did)["C"] == "available")
    assert place.at(did, "C").read_bytes() == content
    assert place.moved() <= CHUNK_BYTES
    place.whole()


def test_a_scrub_that_is_killed_midway_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    dids = [place.put(os.urandom(2_000)) for _ in range(12)]
    monkeypatch.setattr(checks, "BATCH_FILES", 4)
    monkeypatch.setattr("rules.integrity.BATCH_FILES", 4)
    place.scrub("A", files_per_second=4.0)
    claims = 0

    def one_batch() -> bool:
        return place.client.integrity.scrub("A").files >= 4 * (claims + 1)

    for claims in range(3):  # each worker is stopped after a batch; the rate lets no more go at this moment
        place.work(one_batch)
        assert place.client.integrity.scrub("A").files == 4 * (claims + 1)
        place.clock.turn(seconds=0.5)
        assert place.client.integrity.scrub("A").next_at > place.clock.now
        place.clock.turn(seconds=0.6)
    place.work(lambda: place.scrubbed("A"))
    assert {r.evidence for did in dids for r in place.client.replicas.pages(did)} == {"scrubbed"}


def test_rot_behind_a_server_that_remembers_its_checksum_is_found(place: Place, xrootd: Any) -> None:
    place.endpoint("X", xrootd.url_http + "/x")
    content = os.urandom(300_000)
    did = place.put(content)
    rule = place.rule(did, "A|X")
    place.work(lambda: place.ok(rule))
    (far,) = [p for p in Path(xrootd.data).rglob("*f001*") if p.is_file()]
    at = far.stat()
    flip(far, 123_456)
    os.utime(far, ns=(at.st_atime_ns, at.st_mtime_ns))
    place.scrub("X")
    place.work(lambda: place.scrubbed("X") and place.ok(rule) and far.read_bytes() == content)
    place.whole()


def test_a_paced_read_is_as_slow_as_it_is_told() -> None:
    paced = Paced(1_000_000)
    assert paced.lag_seconds() == 0
    paced.file_ended(5_000_000)
    assert 4.5 < paced.lag_seconds() <= 5.0
    assert Paced(None).lag_seconds() == 0
