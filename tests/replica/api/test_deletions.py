"""Deletions over REST: people ask and undo, a worker removes at its own site only."""

from __future__ import annotations

import pytest

from replica import wire
from rules.errors import Invalid, NotAllowed, NotFound, Refused
from tests.service import Service


@pytest.fixture
def world(service_on_both: Service) -> Service:
    """A file at DESY and at GSI, which no rule wants."""
    with service_on_both.client() as client:
        client.sites.add("GSI")
        client.scopes.add("s")
        for site in ("DESY", "GSI"):
            client.endpoints.add(
                wire.NewEndpoint(name=f"{site}-DISK", site=site, url=f"file:///tmp/replica-deletions-{site.lower()}")
            )
            file = wire.NewReplica(did="s:f", size=5, checksums={"xxh3_128": "f" * 32})
            client.replicas.register(wire.Registration(endpoint=f"{site}-DISK", replicas=[file], evidence="hashed"))
    return service_on_both


def worker(service: Service, site: str):
    with service.client() as admin:
        return service.client(admin.sites.key(site).token)


def test_ask_undo_ask_remove(world: Service):
    with world.client() as client:
        asked = client.deletions.ask("s:f", "DESY-DISK")
        assert (asked.state, asked.why, asked.account, asked.bytes) == ("queued", "asked", "root", 5)
        with pytest.raises(Refused, match="no other good copy"):
            client.deletions.ask("s:f", "GSI-DISK")
        assert client.deletions.undo(asked.id).state == "undone"
        asked = client.deletions.ask("s:f", "DESY-DISK")
        desy, gsi = worker(world, "DESY"), worker(world, "GSI")
        assert gsi.deletions.claim(wire.DeletionClaim(worker="w")).orders == []
        (order,) = desy.deletions.claim(wire.DeletionClaim(worker="w")).orders
        assert (order.deletion, order.path, order.size, order.generation) == (asked.id, "s/f", 5, 1)
        beat = wire.DeletionHeartbeat(worker="w", beats=[wire.DeletionBeat(deletion=order.deletion, epoch=order.epoch)])
        assert desy.deletions.heartbeat(beat).stop == []
        assert gsi.deletions.heartbeat(beat).stop == [order.deletion]
        outcome = wire.DeletionOutcome(deletion=order.deletion, epoch=order.epoch, outcome="removed")
        report = wire.DeletionReport(worker="w", outcomes=[outcome])
        assert gsi.deletions.report(report).stale == [order.deletion]
        assert [desy.deletions.report(report).accepted for _ in range(2)] == [1, 0]
        with pytest.raises(Invalid, match="twice"):
            desy.deletions.report(wire.DeletionReport(worker="w", outcomes=[outcome, outcome]))
        assert [r.endpoint for r in client.replicas.locate("s:f")] == ["GSI-DISK"]
        assert [(d.id, d.state) for d in client.deletions.list(endpoint="DESY-DISK")][-1] == (asked.id, "done")
        assert [d.id for d in client.deletions.list(state="undone", did="s:f", site="DESY")] == [asked.id - 1]
        assert client.deletions.show(asked.id).state == "done"
        last = client.deletions.ask("s:f", "GSI-DISK", last_copy=True)
        assert last.why == "asked_last"
        with pytest.raises(NotFound):
            client.deletions.show(99)
        with pytest.raises(Invalid):
            list(client.deletions.list(state="lost"))


def test_who_is_no_administrator_deletes_nothing(world: Service):
    with world.client(world.user) as user:
        assert list(user.deletions.list()) == []
        with pytest.raises(NotAllowed):
            user.deletions.ask("s:f", "DESY-DISK")
        with pytest.raises(NotAllowed):
            user.deletions.claim(wire.DeletionClaim(worker="w"))
    with worker(world, "DESY") as site, pytest.raises(NotAllowed):
        site.deletions.ask("s:f", "DESY-DISK")
