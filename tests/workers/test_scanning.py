"""Scans with a real service, a real folder and real databases: what is found, what follows, and what must not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import fsck, scanning
from replica.catalog import scans as catalogue
from replica.client import AsyncClient, Client
from replica.db import tables
from replica.db.engine import Database
from replica.storage.base import Entry
from replica.storage.credentials import Credentials
from replica.storage.posix import PosixStorage
from rules.errors import Refused
from rules.reconciling import Policy
from rules.states import FindingState, ReplicaState
from tests.conftest import HandClock
from tests.service import SITE, serving
from workers.scanning import Scanner
from workers.storages import Storages

LEASE = 60.0
POLICY = Policy(every_days=7)


class Place:
    """An endpoint with files, as the catalogue and as its storage have them; and a worker that looks when told."""

    def __init__(
        self,
        db: Database,
        service: Any,
        directory: Path,
        url: str | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self.credentials = credentials
        self.db, self.service, self.directory = db, service, directory
        self.root = directory / "disk"
        self.client: Client = service.client()
        self.url = url or self.root.as_uri()
        self.sizes: dict[str, int] = {}
        self.client.endpoints.add(wire.NewEndpoint(name="DISK", site=SITE, url=self.url))
        self.client.sites.add("GSI")
        self.client.endpoints.add(wire.NewEndpoint(name="OTHER", site="GSI", url="file:///data/other"))
        self.client.scopes.add("t")
        self.client.dids.add(wire.NewDid(did="t:all"))
        self.trouble: list[Exception] = []
        self.roots: tuple[str, ...] = ()

    def register(self, *names: str, endpoint: str = "DISK", **more: Any) -> None:
        replicas = [
            wire.NewReplica(did=f"t:{n}", size=self.sizes[n], checksums={"adler32": "00000001"}, **more) for n in names
        ]
        self.client.replicas.register(
            wire.Registration(endpoint=endpoint, replicas=replicas, dataset="t:all", evidence="hashed")
        )

    def write(self, *names: str) -> None:
        for name in names:
            path = self.root / "t" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
            self.sizes[name] = len(name.encode())

    def files(self, number: int) -> list[str]:
        names = [f"d {i % 7}/ü{i:04}" for i in range(number)]
        self.write(*names)
        self.register(*names)
        return names

    def scanner(self) -> tuple[Scanner, AsyncClient]:
        speaking = AsyncClient(self.service.url, self.service.worker)

        async def trouble(what: str, error: Exception) -> None:
            self.trouble.append(error)

        scanner = Scanner(
            lambda: speaking,
            trouble,
            Storages(self.roots, self.credentials),
            server=self.service.url,
            worker="w",
            stopping=asyncio.Event(),
            poll_seconds=1000.0,
            dice=lambda: 0.5,
            folder=self.directory / "scans",
        )
        return scanner, speaking

    async def work(self) -> None:
        """All there is to do for a worker now."""
        scanner, speaking = self.scanner()
        try:
            while await scanner._round() is None:
                pass
        finally:
            await speaking.close()

    async def scan(self, **how: Any) -> wire.Scan:
        begun = self.client.scans.start("DISK", **how)
        await self.work()
        return self.client.scans.show(begun.id)

    def found(self, scan: wire.Scan) -> dict[str, tuple[str, str]]:
        return {f.path: (f.kind, f.state) for f in self.client.scans.findings(scan.id)}

    def states(self) -> dict[str, str]:
        return {r.did: r.state for r in self.client.replicas.locate("t:all") if r.endpoint == "DISK"}

    def events(self, kind: str) -> list[wire.Event]:
        return list(self.client.events.list(kinds=[kind]))

    def check(self) -> None:
        assert [f.invariant for f in fsck.check(self.db).findings if f.violations] == []


@contextmanager
def placed(
    db: Database, directory: Path, url: str | None = None, credentials: Credentials | None = None
) -> Iterator[Place]:
    with serving(db, scan_policy=POLICY, lease_seconds=LEASE) as service:
        yield Place(db, service, directory, url, credentials)


@pytest.fixture
async def place(db: Database, clock: HandClock, tmp_path: Path) -> AsyncIterator[Place]:
    with placed(db, tmp_path) as made:
        await PosixStorage(made.root, name="DISK").prepare()
        yield made
        made.check()


async def test_what_two_scans_miss_is_made_anew_and_what_is_dark_waits_for_a_person(place: Place, clock: HandClock):
    names = place.files(60)
    place.register(*names[:30], endpoint="OTHER")
    rule = place.client.rules.add(wire.NewRule(did="t:all", expression="DISK"))
    assert place.client.rules.show(rule.id).state == "ok"
    (place.root / "t" / names[0]).unlink()  # another copy is known
    (place.root / "t" / names[40]).unlink()  # the last one
    (place.root / "t" / names[1]).write_bytes(b"other")
    place.write("dark one", 'dark, "two"')
    clock.turn(seconds=1)

    first = await place.scan()
    assert first.state == "done"
    assert (first.known_files, first.listed_files) == (60, 60)
    assert (first.missing_files, first.differing_files, first.dark_files) == (2, 1, 2)
    assert {state for _, state in place.found(first).values()} == {"seen"}
    assert set(place.states().values()) == {"available"}
    assert set(place.found(await place.scan()).values()) == {
        ("missing", "seen"), ("differs", "seen"), ("dark", "seen")
    }  # fmt: skip

    clock.turn(days=1, seconds=5)
    third = await place.scan()
    assert (third.state, third.lost_files, third.last_copies, third.confirmed_files) == ("done", 3, 1, 3)
    assert {n: s for n, s in place.states().items() if s != "available"} == {
        f"t:{name}": "bad" for name in (names[0], names[1], names[40])
    }
    # As of any bad replica: healed from what is good; of the last copy its rule says why it cannot be.
    assert place.client.rules.show(rule.id).state == "stuck"
    assert sorted(t.did for t in place.client.transfers.list(state="queued")) == sorted(
        f"t:{name}" for name in names[:2]
    )
    assert {e.did: e.payload["last_copy"] for e in place.events("replica.bad")} == {
        f"t:{name}": name == names[40] for name in (names[0], names[1], names[40])
    }
    suspects = {s.did: s for s in place.client.integrity.suspects("DISK")}
    assert {(s.why, s.proven, s.state) for s in suspects.values()} == {("scan", True, "bad")}
    assert len(suspects) == 3
    assert f"scan {third.id}" in suspects[f"t:{names[40]}"].message

    assert third.removable_files == 0
    assert place.client.scans.remove_dark(third.id).moving_files == 0
    clock.turn(days=6)
    fourth = await place.scan()
    assert (fourth.missing_files, fourth.removable_files) == (0, 2)
    asked = place.client.scans.remove_dark(fourth.id)
    assert asked.moving_files == 2
    place.register("dark one")  # in the meantime somebody makes it known
    await place.work()
    after = place.client.scans.show(fourth.id)
    assert (after.moving_files, after.removed_files) == (0, 1)
    assert place.found(fourth) == {"t/dark one": ("dark", "kept"), 't/dark, "two"': ("dark", "removed")}
    assert (place.root / "t" / "dark one").exists()
    quarantined = [p for p in (place.root / ".replica" / "quarantine").rglob("*") if p.is_file()]
    assert [p.name for p in quarantined] == ['dark, "two"']
    with place.db.read() as s:  # no more than the last two scans' are kept
        assert set(s.execute(sa.select(tables.findings.c.scan_id)).scalars()) <= {third.id, fourth.id}


async def test_a_disk_that_is_not_mounted_fails_its_scan(place: Place, clock: HandClock, monkeypatch):
    place.files(30)
    clock.turn(seconds=1)
    os.rename(place.root, place.directory / "elsewhere")
    place.root.mkdir()
    scan = await place.scan()
    assert (scan.state, scan.compared_at) == ("failed", None)
    assert "not mounted" in scan.reason
    # Away while it is listed: what was listed is not believed.
    os.rmdir(place.root)
    os.rename(place.directory / "elsewhere", place.root)
    walked = PosixStorage.list

    async def cut_off(self: PosixStorage, prefix: str = "") -> AsyncIterator[Entry]:
        async for entry in walked(self, prefix):
            yield entry
            break
        os.rename(place.root / ".replica", place.directory / "mark")

    monkeypatch.setattr(PosixStorage, "list", cut_off)
    scan = await place.scan()
    assert (scan.state, scan.compared_at) == ("failed", None)
    # Another endpoint's disk in its place.
    monkeypatch.undo()
    await PosixStorage(place.root, name="ANOTHER").prepare()
    scan = await place.scan()
    assert scan.state == "failed"
    assert "belongs to the endpoint ANOTHER" in scan.reason
    assert set(place.states().values()) == {"available"}


async def test_what_changes_while_it_is_listed_is_neither_missing_nor_dark(
    place: Place, clock: HandClock, monkeypatch: pytest.MonkeyPatch
):
    names = place.files(40)
    clock.turn(seconds=1)
    walked = PosixStorage.list

    async def meanwhile(self: PosixStorage, prefix: str = "") -> AsyncIterator[Entry]:
        entries = [entry async for entry in walked(self, prefix)]
        clock.turn(seconds=10)
        # An upload: its bytes were listed, and now it is registered.
        place.write("uploaded")
        entries.append(Entry("t/uploaded", 8, 0))
        await asyncio.to_thread(place.register, "uploaded")
        # A transfer to here begins, and its bytes were listed.
        place.sizes["coming"] = 6
        await asyncio.to_thread(place.register, "coming", endpoint="OTHER")
        await asyncio.to_thread(place.client.rules.add, wire.NewRule(did="t:coming", expression="DISK"))
        entries.append(Entry("t/coming", 6, 0))
        # One was not listed, and is proven now; one goes another way and comes back; one is deleted.
        gone = {f"t/{name}" for name in names[:3]}
        with place.db.write() as s:
            r = tables.replicas
            ids = dict(s.execute(sa.select(tables.dids.c.name, tables.dids.c.id)).all())
            s.execute(r.update().where(r.c.file_id == ids[names[0]]).values(verified_at=s.now))
            s.execute(r.update().where(r.c.file_id == ids[names[1]]).values(generation=2))
            s.execute(r.update().where(r.c.file_id == ids[names[2]]).values(state=ReplicaState.UNAVAILABLE))
        for entry in entries:
            if entry.path not in gone:
                yield entry

    monkeypatch.setattr(PosixStorage, "list", meanwhile)
    scan = await place.scan()
    assert (scan.state, place.found(scan)) == ("done", {})


async def test_odd_names_are_told_and_break_nothing(place: Place, clock: HandClock):
    names = place.files(20)
    clock.turn(seconds=1)
    folder = os.fsencode(place.root / "t")
    odd = [b"\xff\xfe", b"line\nbreak", b"tab\tand\x01one", b'quote"', b"back\\xff", b"%00", b"x" * 255]
    for name in odd:
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(b"1")
    os.symlink("/etc/passwd", place.root / "t" / "link")
    os.mkfifo(place.root / "t" / "fifo")
    path = place.root / "t" / names[0]
    path.unlink()
    os.symlink("/etc/passwd", path)
    scan = await place.scan(accept_fraction=True)
    found = place.found(scan)
    assert (scan.state, scan.odd_files, scan.dark_files, scan.missing_files) == ("done", 4, 6, 1)
    assert found["t/\\xff\\xfe"][0] == found["t/link"][0] == found["t/fifo"][0] == "odd"
    assert found["t/line\nbreak"][0] == found["t/tab\tand\x01one"][0] == found["t/back\\xff"][0] == "dark"
    clock.turn(days=8)
    scan = await place.scan()
    # In its place is a link: that can be no replica, but nobody can say that nothing is there.
    kinds = [(f.kind, f.state) for f in place.client.scans.findings(scan.id) if f.path == f"t/{names[0]}"]
    assert sorted(kinds) == [("missing", "unclear"), ("odd", "seen")]
    place.client.scans.remove_dark(scan.id)
    await place.work()
    assert place.client.scans.show(scan.id).removed_files == 6
    assert (place.root / "t" / "link").is_symlink()
    assert set(place.states().values()) == {"available"}


async def test_a_killed_worker_is_replaced_and_its_work_gone_on_with(
    place: Place, clock: HandClock, monkeypatch: pytest.MonkeyPatch
):
    names = place.files(300)
    (place.root / "t" / names[0]).unlink()
    clock.turn(seconds=1)
    monkeypatch.setattr(scanning, "PART_FILES", 50)
    asked: list[int] = []
    known = scanning.known_at

    def counted(s: Any, site: str, part: wire.ScanPart) -> wire.KnownPart:
        asked.append(part.after)
        return known(s, site, part)

    monkeypatch.setattr("replica.api.scans.scanning.known_at", counted)
    walked = PosixStorage.list
    reached = asyncio.Event()

    async def hangs(self: PosixStorage, prefix: str = "") -> AsyncIterator[Entry]:
        async for entry in walked(self, prefix):
            yield entry
            reached.set()
            await asyncio.sleep(3600)

    begun = place.client.scans.start("DISK")
    assert place.client.scans.start("DISK").id == begun.id  # who asks for another joins it
    with monkeypatch.context() as slow:
        slow.setattr(PosixStorage, "list", hangs)
        scanner, speaking = place.scanner()
        task = asyncio.create_task(scanner._round())
        await reached.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await speaking.close()
    assert len(asked) == 7
    assert place.client.scans.show(begun.id).state == "listing"
    await place.work()
    assert place.client.scans.show(begun.id).state == "listing"  # it is not known yet that nobody is at it
    clock.turn(seconds=LEASE + 1)
    with place.db.write() as s:
        assert scanning.expire_leases(s) == 1
    place.check()
    await place.work()
    done = place.client.scans.show(begun.id)
    assert (done.state, done.epoch, done.missing_files) == ("done", 2, 1)
    assert len(asked) == 7, "what the catalogue knew was complete"
    # The first one comes back: nothing it says counts.
    late = wire.ScanCompared(scan=begun.id, epoch=1, listed_files=0, listed_bytes=0, missing=300, dark=0)
    with pytest.raises(Exception, match="not yours any more"), place.db.write() as s:
        scanning.compared(s, 1, late, policy=POLICY)


async def test_when_a_large_part_is_missing_a_person_is_asked(place: Place, clock: HandClock):
    names = place.files(40)
    for name in names[:20]:
        (place.root / "t" / name).unlink()
    clock.turn(seconds=1)
    scan = await place.scan()
    assert (scan.state, scan.missing_files) == ("held", 20)
    assert "20 of 40" in scan.reason
    assert [e.payload["endpoint"] for e in place.events("scan.held")] == ["DISK"]
    clock.turn(days=2)
    with place.db.write() as s:
        assert catalogue.schedule(s, POLICY) == 0, "it waits for a person"
    scan = await place.scan()
    assert (scan.state, scan.lost_files) == ("held", 0)
    assert set(place.states().values()) == {"available"}
    with pytest.raises(Refused, match="held"):
        place.client.scans.remove_dark(scan.id)
    place.client.scans.start("DISK", accept_fraction=True)
    await place.work()
    scan = place.client.scans.show(scan.id)
    assert (scan.state, scan.lost_files, scan.last_copies) == ("done", 20, 20)


async def test_a_loss_is_only_declared_when_it_is_looked_for_again(place: Place, clock: HandClock):
    """What came back, or was not listed by mistake, is found by the second look."""
    names = place.files(60)
    path = place.root / "t" / names[0]
    kept = path.read_bytes()
    path.unlink()
    clock.turn(seconds=1)
    await place.scan()
    clock.turn(days=2)
    begun = place.client.scans.start("DISK")
    scanner, speaking = place.scanner()
    verify = scanner._verify

    async def comes_back(order: Any, storage: Any) -> None:
        path.write_bytes(kept)
        await verify(order, storage)

    scanner._verify = comes_back  # type: ignore[method-assign]
    await scanner._round()
    await speaking.close()
    scan = place.client.scans.show(begun.id)
    assert (scan.state, scan.missing_files, scan.lost_files) == ("done", 1, 0)
    assert place.found(scan)[f"t/{names[0]}"] == ("missing", "there")


async def test_where_a_scrub_was_halted_for_a_person_a_scan_declares_nothing_unasked(place: Place, clock: HandClock):
    names = place.files(60)
    (place.root / "t" / names[0]).unlink()
    clock.turn(seconds=1)
    await place.scan()
    clock.turn(days=2)
    place.client.integrity.set_scrub("DISK", depth="deep")
    with place.db.write() as s:
        s.execute(tables.scrubs.update().values(halted_at=s.now, halted_why="9 of 10 replicas are wrong"))
    scan = await place.scan()
    assert (scan.state, scan.lost_files) == ("held", 0)
    assert "9 of 10" in scan.reason
    assert set(place.states().values()) == {"available"}
    place.client.scans.start("DISK", accept_fraction=True)
    await place.work()
    scan = place.client.scans.show(scan.id)
    assert (scan.state, scan.lost_files) == ("done", 1)


async def test_nobody_registers_what_is_being_moved_away(place: Place, clock: HandClock):
    place.files(30)
    place.write("dark")
    clock.turn(seconds=1)
    await place.scan()
    clock.turn(days=8)
    scan = await place.scan()
    place.client.scans.remove_dark(scan.id)
    with place.db.write() as s:
        work = scanning.claim(s, 1, wire.ScanClaim(worker="w"), lease_seconds=LEASE)
        assert [o.path for o in work.dark] == ["t/dark"]
    with pytest.raises(Refused, match="moved to quarantine at this moment"):
        place.register("dark")
    # Its worker falls silent; the next one finds that the file has changed.
    clock.turn(seconds=LEASE + 1)
    with place.db.write() as s:
        assert scanning.expire_leases(s) == 1
    (place.root / "t" / "dark").write_bytes(b"more")
    os.utime(place.root / "t" / "dark", (5, 5))
    await place.work()
    assert place.found(scan)["t/dark"] == ("dark", "kept")
    assert (place.root / "t" / "dark").read_bytes() == b"more"


async def test_the_timetable_scans_disks(place: Place, clock: HandClock):
    names = place.files(30)
    with place.db.write() as s:
        assert catalogue.schedule(s, POLICY) == 0
    clock.turn(days=8)
    place.client.endpoints.change("OTHER", wire.EndpointChange(attributes={"scan_every": 0}))
    with place.db.write() as s:
        assert (catalogue.schedule(s, POLICY), catalogue.schedule(s, POLICY)) == (1, 0)
    (place.root / "t" / names[0]).unlink()
    await place.work()
    with place.db.write() as s:
        assert catalogue.schedule(s, POLICY) == 0
    clock.turn(days=1, minutes=1)
    with place.db.write() as s:
        assert catalogue.schedule(s, POLICY) == 1, "what one scan missed is not left for a week"
    await place.work()
    assert next(place.client.scans.list("DISK")).lost_files == 1
    assert FindingState.LOST.label == "lost"


async def test_many_files_take_few_statements(
    place: Place, clock: HandClock, count_statements: Any, monkeypatch: pytest.MonkeyPatch
):
    place.files(600)
    clock.turn(seconds=1)
    place.write(*(f"dark{i}" for i in range(20)))
    with count_statements(place.db) as statements:
        scan = await place.scan()
    assert (scan.state, scan.dark_files, scan.known_files) == ("done", 20, 600)
    assert statements.count < 130


async def test_a_worker_lists_nothing_outside_of_its_roots(db: Database, clock: HandClock, tmp_path: Path):
    """Also not what it may read from: what is at another site is not this one's to tell."""
    with placed(db, tmp_path, "https://192.0.2.9/data") as place:
        place.roots = ("/data/site",)
        scan = await place.scan()
    assert scan.state == "failed"
    assert "outside of the roots" in scan.reason
