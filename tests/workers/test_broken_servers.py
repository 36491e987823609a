"""Servers that are full, closed or overloaded: an order ends with that, blames the target, and others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import xxhash

from replica import wire
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from tests.fault_proxy import Fault, FaultProxy
from tests.scenarios.faults_in_flight import Disk, Engine
from tests.servers_s3 import SETTINGS, RcloneS3
from workers.storages import Storages

CONTENT = b"bytes" * 10_000


class Site:
    """A worker's engine, a disk with a file, a well disk, and a server behind a proxy."""

    def __init__(self, source: Disk, well: Disk, url: str, proxy: FaultProxy, engine: Engine) -> None:
        self.source, self.well, self.url, self.proxy, self.engine = source, well, url, proxy, engine
        self._transfers = 0

    async def copy(self, target: str, url: str) -> wire.Outcome:
        self._transfers += 1
        path = f"f{self._transfers}"
        self.source.put(path, CONTENT)
        order = wire.Order(
            transfer=self._transfers,
            epoch=1,
            did=f"test:{path}",
            size=len(CONTENT),
            checksums={"xxh3_128": xxhash.xxh3_128_hexdigest(CONTENT)},
            target_endpoint=target,
            target_url=url,
            target_path=path,
            sources=[wire.OrderSource(endpoint="SOURCE", url=self.source.root.as_uri(), path=path)],
            attempt=1,
        )
        outcome = await self.engine.carry(order)
        assert outcome is not None
        return outcome

    async def broken_and_well(self, kind: str, method: bytes) -> wire.Outcome:
        """What becomes of an order to the broken server, while one to the well disk is done."""
        self.proxy.arm(*(Fault(kind, method=method) for _ in range(50)))
        broken, well = await asyncio.gather(self.copy("BROKEN", self.url), self.copy("WELL", self.well.root.as_uri()))
        assert well.outcome == "done"
        self.proxy.arm()
        assert (await self.copy("BROKEN", self.url)).outcome == "done"
        return broken


@pytest.fixture(scope="module")
def bucket():
    server = RcloneS3()
    try:
        server.start()
        server.client().create_bucket(Bucket="broken")
        yield server
    finally:
        server.remove()


@pytest.fixture(params=["webdav", "s3"])
async def site(request, tmp_path) -> AsyncIterator[Site]:
    server = request.getfixturevalue("apache" if request.param == "webdav" else "bucket")
    async with FaultProxy(server.port) as proxy:
        if request.param == "webdav":
            folder = server.data / tmp_path.name
            folder.mkdir()
            server.give_away(folder)
            url, settings = f"http://127.0.0.1:{proxy.port}/{tmp_path.name}", {}
        else:
            url, settings = f"s3+http://127.0.0.1:{proxy.port}/broken/{tmp_path.name.replace('[', '_')}", SETTINGS
        credentials = Credentials({url: settings})
        disks = [Disk(tmp_path / name) for name in ("SOURCE", "WELL")]
        for where, name in ((url, "BROKEN"), *((disk.root.as_uri(), disk.root.name) for disk in disks)):
            storage = open_storage(where, name=name, credentials=credentials)
            await storage.prepare()
            await storage.close()
        engine = Engine(storages := Storages(credentials=credentials))
        yield Site(*disks, url, proxy, engine)
        engine.carrier.close()
        await storages.close()


@pytest.mark.parametrize(
    ("answer", "error"),
    [("507", "no_space"), ("413", "no_space"), ("403", "forbidden"), ("429", "busy"), ("503", "busy")],
)
async def test_what_a_server_says_is_told_and_others_go_on(site, answer, error):
    outcome = await site.broken_and_well(answer, b"PUT")
    assert (outcome.error, outcome.side, outcome.source_endpoint) == (error, "target", None)
    assert "BROKEN" in outcome.message
    if answer == "429":
        assert outcome.retry_after_seconds == 1.0


async def test_a_server_that_is_away_is_unreachable(site):
    outcome = await site.broken_and_well("lost_before", b"")
    assert outcome.side == "target"
    assert outcome.error in ("storage_transient", "unreachable")
