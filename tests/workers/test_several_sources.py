"""One large file from several real servers at once, as many as its order allows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from replica import wire
from replica.storage import chunked, chunks

CONTENT = os.urandom(24 << 20)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(chunks, "RESUME_BYTES", 4 << 20)
    monkeypatch.setattr(chunked, "SHARED_RUN_BYTES", 2 << 20)


@pytest.fixture
def servers(apache: Any, rclone_server: Any) -> Any:
    """Two web servers that hold the file."""
    found = {"APACHE": apache, "RCLONE": rclone_server}
    for server in found.values():
        server.empty()
        (server.data / "f").write_bytes(CONTENT)
        server.give_away(server.data)
    yield found
    for server in found.values():
        server.empty()


def ordered(world: Any, at_once: int, *sources: tuple[str, str]) -> wire.Order:
    named = [wire.OrderSource(endpoint=name, url=url, path="f") for name, url in sources]
    order = world.order("f", CONTENT, sources=("SOURCE", "SECOND"))
    return msgspec.structs.replace(order, sources=named, sources_at_once=at_once)


def dav(server: Any) -> str:
    return server.url.replace("http://", "dav://") + "/"


async def test_web_servers_share_a_file_and_what_came_from_each_is_told(centre, world, running, servers):
    order = ordered(world, 2, *((name, dav(server)) for name, server in servers.items()))
    mover = await running()
    for again in range(8):  # a server that is asked a moment later may find that the other one has given all already
        centre.add(msgspec.structs.replace(order, transfer=order.transfer + again))
        mover.wake()
        await centre.wait_for(1 + again, 30)
        outcome = centre.outcomes[again]
        assert (outcome.outcome, outcome.size) == ("done", len(CONTENT)), outcome
        assert (world.directory / "TARGET/f").read_bytes() == CONTENT
        if outcome.read_from:
            break
        (world.directory / "TARGET/f").unlink()
    assert outcome.read_from.keys() == servers.keys()
    assert sum(outcome.read_from.values()) == len(CONTENT)


@pytest.mark.parametrize("bad", ["APACHE", "SOURCE"])
async def test_one_bad_source_of_two_costs_only_its_chunks(centre, world, running, servers, bad):
    order = ordered(world, 2, ("SOURCE", world.url("SOURCE")), ("APACHE", dav(servers["APACHE"])))
    file = world.directory / "SOURCE/f" if bad == "SOURCE" else Path(servers["APACHE"].data / "f")
    wrong = bytearray(CONTENT)
    for at in range(0, len(wrong), 2 << 20):
        wrong[at] ^= 1
    file.write_bytes(wrong)
    centre.add(order)
    await running()
    await centre.wait_for(1, 30)
    assert centre.outcomes[0].outcome == "done", centre.outcomes[0]
    assert (world.directory / "TARGET/f").read_bytes() == CONTENT


async def test_an_order_for_one_source_reads_the_others_only_in_its_stead(centre, world, running, servers):
    order = ordered(world, 1, ("SOURCE", world.url("SOURCE")), ("SECOND", world.url("SECOND")))
    centre.add(order)
    await running()
    await centre.wait_for(1, 30)
    assert (centre.outcomes[0].source_endpoint, centre.outcomes[0].read_from) == ("SOURCE", {})
    (world.directory / "SOURCE/f").unlink()
    (world.directory / "TARGET/f").unlink()
    centre.add(msgspec.structs.replace(order, transfer=99))
    (await running(label="again")).wake()
    await centre.wait_for(2, 30)
    assert (centre.outcomes[1].outcome, centre.outcomes[1].source_endpoint) == ("done", "SECOND")
