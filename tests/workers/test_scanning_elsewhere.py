"""Scans of real servers: their listings speak of the same paths, sizes and times as the catalogue and `stat` do."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from replica import wire
from replica.db.engine import Database
from replica.storage.base import Storage, part_path
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from tests.conftest import HandClock
from tests.servers_s3 import SETTINGS, Moto
from tests.workers.test_scanning import placed


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    server = Moto()
    try:
        server.start()
        yield server
    finally:
        server.remove()


async def scanned(storage: Storage, credentials: Credentials, db: Database, clock: HandClock, directory: Path) -> None:
    await storage.prepare()

    async def put(number: int, path: str) -> None:
        async def content() -> AsyncIterator[bytes]:
            yield path.encode()

        part = part_path(f"put{number}")
        await storage.write(part, content())
        await storage.publish(part, path)

    with placed(db, directory, storage.url, credentials) as place:
        names = [f"a b/ü{i}" for i in range(25)]
        place.sizes = {name: len(f"t/{name}".encode()) for name in names} | {"never/was": 1}
        for number, name in enumerate([*names, "dark & %41"]):
            await put(number, f"t/{name}")
        place.register(*names, "never/was")
        clock.turn(seconds=1)
        scan = await place.scan()
        assert scan.state == "done", scan.reason
        assert (scan.listed_files, scan.missing_files, scan.dark_files) == (26, 1, 1)
        clock.turn(days=8)
        scan = await place.scan()
        assert (scan.state, scan.lost_files, scan.removable_files) == ("done", 1, 1), scan.reason
        place.client.scans.remove_dark(scan.id)
        await place.work()
        assert place.client.scans.show(scan.id).removed_files == 1, place.found(scan)
        assert sorted([e.path async for e in storage.list()]) == sorted(f"t/{name}" for name in names)
        place.check()


@pytest.fixture
def db(sqlite_url: str, clock: HandClock) -> Iterator[Database]:
    """One is enough: what differs here is the storage."""
    database = Database(sqlite_url, clock=clock)
    yield database
    database.close()


async def test_s3(moto: Moto, db: Database, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("replica.storage.s3.LIST_KEYS", 10, raising=False)
    moto.client().create_bucket(Bucket="scans")
    credentials = Credentials({moto.url("scans"): SETTINGS})
    storage = open_storage(moto.url("scans", "some/where"), name="DISK", credentials=credentials)
    await scanned(storage, credentials, db, clock, tmp_path)
    # The mark is gone: perhaps it is another bucket of that name.
    moto.client().delete_object(Bucket="scans", Key="some/where/.replica/endpoint")
    await _fails(storage, credentials, db, tmp_path)


async def test_webdav(apache: Any, db: Database, clock: HandClock, tmp_path: Path):
    root = apache.data / "scans"
    root.mkdir()
    if apache.account is not None:
        os.chown(root, apache.account.pw_uid, apache.account.pw_gid)
    storage = open_storage(f"http://127.0.0.1:{apache.port}/scans", name="DISK")
    await scanned(storage, Credentials({}), db, clock, tmp_path)
    (root / ".replica" / "endpoint").unlink()
    await _fails(storage, Credentials({}), db, tmp_path)


async def _fails(storage: Storage, credentials: Credentials, db: Database, directory: Path) -> None:
    from replica.api.app import create_app
    from replica.catalog import accounts, sites
    from replica.client import Client
    from tests.service import listening  # the endpoint is there already: only a service over it
    from tests.workers.test_scanning import Place

    with db.write() as s:
        admin = accounts.issue_token(s, account="root", label="again")
        worker = sites.issue_token(s, "DESY").token
    with listening(create_app(db)) as (host, port):
        place = Place.__new__(Place)
        place.credentials, place.directory, place.db, place.trouble, place.roots = credentials, directory, db, [], ()
        place.client = Client(f"http://{host}:{port}", admin)
        place.service = type("Service", (), {"url": f"http://{host}:{port}", "worker": worker})
        scan: wire.Scan = await place.scan()
    assert (scan.state, scan.compared_at) == ("failed", None)
    await storage.close()
