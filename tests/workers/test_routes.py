"""Real workers, real disks: files come over two other sites, and leave nothing there."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from replica import config, wire
from replica.client import Client
from replica.client.places import prepare_here
from replica.embedded import Embedded

FILES = {f"run/{number}.dat": os.urandom(1_000 + number) for number in range(20)}
CLOSED = [("A", "B"), ("A", "H"), ("G", "B"), ("H", "A"), ("B", "A")]


def until(true: Callable[[], Any], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def stored(disk: Path) -> dict[str, bytes]:
    return {str(p.relative_to(disk / "test")): p.read_bytes() for p in (disk / "test").rglob("*") if p.is_file()}


def test_files_come_over_two_sites_and_leave_nothing_there(tmp_path: Path) -> None:
    quick = {"control_interval_seconds": 0.3, "retry_base_seconds": 0.1, "log_level": "error"}
    settings = config.load(tmp_path / "system", {}, listen="127.0.0.1:0", **quick)
    disks = {name: tmp_path / name for name in "AGHB"}
    with Embedded(settings) as system, Client(system.url, system.token) as client:
        for name, disk in disks.items():
            client.sites.add(name)
            attributes = {"hop": True} if name in "GH" else {}
            new = wire.NewEndpoint(name=f"{name}-DISK", site=name, url=disk.as_uri(), attributes=attributes)
            prepare_here(client.endpoints.add(new))
        for source, target in CLOSED:
            client.endpoints.set_link(wire.LinkChange(source=f"{source}-DISK", target=f"{target}-DISK", allowed=False))
        client.scopes.add("test")
        client.dids.add(wire.NewDid(did="test:data"))
        replicas = []
        for name, content in FILES.items():
            path = disks["A"] / "test" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            checksums = {"xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            replicas.append(wire.NewReplica(did=f"test:{name}", size=len(content), checksums=checksums))
        client.replicas.register(
            wire.Registration(endpoint="A-DISK", replicas=replicas, dataset="test:data", evidence="hashed")
        )
        rule = client.rules.add(wire.NewRule(did="test:data", expression="B-DISK")).id
        until(lambda: client.rules.show(rule).state == "ok")
        assert stored(disks["B"]) == FILES
        (first, *_) = [t for t in client.transfers.list() if t.target == "B-DISK"]

        def route() -> wire.Route:
            found = client.transfers.show(first.id).route
            assert found is not None
            return found

        until(lambda: route().outcome == "done")
        assert [hop.endpoint for hop in route().hops] == ["G-DISK", "H-DISK"]
        until(lambda: not stored(disks["G"]) and not stored(disks["H"]))
        assert stored(disks["A"]) == FILES
        assert stored(disks["B"]) == FILES
        until(lambda: [client.endpoints.show(f"{name}-DISK").used_bytes for name in "GH"] == [0, 0])
