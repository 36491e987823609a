"""A catalogue, a listening service, two sites with a disk each, and a folder of files to bring there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from replica import wire
from replica.catalog import rules
from replica.client import Client
from replica.client.places import prepare_here
from replica.db.engine import Database
from replica.storage.copy import Expected, copy_local
from replica.storage.posix import PosixStorage
from rules.checksums import Checksums
from tests.service import Service, serving

#: Nested, with a blank, a letter outside ASCII, an empty file, and one of several pieces.
CONTENT = {
    "a.h5": b"alpha" * 1000,
    "run 1/b.h5": b"beta",
    "run 1/leer.dat": b"",
    "run 2/Füße/große Datei.raw": bytes(range(256)) * 12_000,
}


@dataclass
class World:
    database: Database
    service: Service
    client: Client
    directory: Path

    def root(self, endpoint: str) -> Path:
        return self.directory / endpoint

    def add_endpoint(self, name: str, site: str) -> wire.Endpoint:
        url = self.root(name).as_uri()
        made = self.client.endpoints.add(wire.NewEndpoint(name=name, site=site, url=url))
        prepare_here(made)
        return made

    def write(self, content: dict[str, bytes] | None = None, folder: str = "source") -> Path:
        """Files beneath a folder, which is returned."""
        for name, data in (CONTENT if content is None else content).items():
            path = self.directory / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return self.directory / folder

    def litter(self, endpoint: str) -> list[str]:
        """Temporaries and quarantined files that should not be there."""
        own = self.root(endpoint) / ".replica"
        return sorted(str(p.relative_to(own)) for p in own.rglob("*") if p.is_file() and p.name != "endpoint")


def files_in(folder: Path) -> dict[str, bytes]:
    """Everything beneath a folder, hidden or not."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def world(url: str, directory: Path) -> Iterator[World]:
    database = Database(url)
    try:
        with serving(database) as service, service.client() as client:
            made = World(database, service, client, directory)
            client.sites.add("HZDR")
            client.scopes.add("p1")
            made.add_endpoint("DESY-DISK", "DESY")
            made.add_endpoint("HZDR-DISK", "HZDR")
            yield made
    finally:
        database.close()


def evaluate(w: World) -> None:
    """What `control` does: rules that are due, until none is."""
    with w.database.write() as s:
        while rules.evaluate_due(s):
            pass


def carry(w: World, site: str) -> int:
    """What the site's worker does, once: claim, copy, report. Returns how many transfers there were."""
    with w.service.client(w.client.sites.key(site).token) as worker:
        orders = worker.orders.claim(wire.Claim(worker="test", limit=1000)).orders
        outcomes = []
        for order in orders:
            source = order.sources[0]
            copied = copy_local(
                PosixStorage(w.root(source.endpoint), name=source.endpoint),
                source.path,
                PosixStorage(w.root(order.target_endpoint), name=order.target_endpoint),
                order.target_path,
                tag=f"{order.transfer}-{order.epoch}",
                expected=Expected(order.size, Checksums.of(order.checksums)),
            )
            outcomes.append(
                wire.Outcome(
                    transfer=order.transfer,
                    epoch=order.epoch,
                    outcome="done",
                    source_endpoint=source.endpoint,
                    size=copied.size_bytes,
                    checksums=copied.checksums.as_dict(),
                    verified_by=copied.verified_by,
                )
            )
        if outcomes:
            worker.orders.report(wire.Report(worker="test", outcomes=outcomes))
    return len(outcomes)
