"""A worker over REST: it gets the work of its own site, and can touch nothing else whatever it says."""

import pytest

from replica import wire
from rules.errors import Invalid, NotAllowed, NotFound
from tests.service import Service

XXH3 = "f" * 32


@pytest.fixture
def world(service_on_both: Service) -> Service:
    """A file at DESY that a rule wants at GSI as well."""
    with service_on_both.client() as client:
        client.sites.add("GSI")
        for site in ("DESY", "GSI"):
            client.endpoints.add(
                wire.NewEndpoint(name=f"{site}-DISK", site=site, url=f"file:///tmp/replica-orders-{site.lower()}")
            )
        client.scopes.add("s")
        client.dids.add(wire.NewDid(did="s:d"))
        file = wire.NewReplica(did="s:f", size=5, checksums={"xxh3_128": XXH3})
        client.replicas.register(
            wire.Registration(endpoint="DESY-DISK", replicas=[file], dataset="s:d", evidence="hashed")
        )
        client.rules.add(wire.NewRule(did="s:d", expression="GSI-DISK"))
    return service_on_both


def worker(service: Service, site: str):
    with service.client() as admin:
        return service.client(admin.sites.key(site).token)


def test_claim_heartbeat_and_report_make_the_copy_available(world: Service):
    gsi = worker(world, "GSI")
    (order,) = gsi.orders.claim(wire.Claim(worker="w")).orders
    assert (order.did, order.size, order.target_endpoint) == ("s:f", 5, "GSI-DISK")
    assert [source.endpoint for source in order.sources] == ["DESY-DISK"]
    beat = wire.Beat(transfer=order.transfer, epoch=order.epoch, bytes_done=3)
    assert gsi.orders.heartbeat(wire.Heartbeat(worker="w", beats=[beat])).stop == []
    outcome = wire.Outcome(
        transfer=order.transfer,
        epoch=order.epoch,
        outcome="done",
        source_endpoint="DESY-DISK",
        size=5,
        checksums={"xxh3_128": XXH3},
    )
    report = wire.Report(worker="w", outcomes=[outcome])
    first, again = gsi.orders.report(report), gsi.orders.report(report)
    assert (first.accepted, first.stale) == (1, [])
    assert (again.accepted, again.stale) == (0, [order.transfer])
    with world.client() as client:
        assert {r.endpoint: r.state for r in client.replicas.locate("s:f")} == {
            "DESY-DISK": "available",
            "GSI-DISK": "available",
        }
        assert [rule.state for rule in client.rules.list()] == ["ok"]
        assert client.sites.show("GSI").worker_seen_at is not None


def test_another_sites_worker_sees_nothing_of_it_and_changes_nothing(world: Service):
    gsi, desy = worker(world, "GSI"), worker(world, "DESY")
    assert desy.orders.claim(wire.Claim(worker="thief")).orders == []
    (order,) = gsi.orders.claim(wire.Claim(worker="w")).orders
    beat = wire.Beat(transfer=order.transfer, epoch=order.epoch)
    assert desy.orders.heartbeat(wire.Heartbeat(worker="thief", beats=[beat])).stop == [order.transfer]
    for outcome in ("done", "failed", "given_back"):
        forged = wire.Outcome(
            transfer=order.transfer, epoch=order.epoch, outcome=outcome, size=5, checksums={"xxh3_128": XXH3}
        )
        answer = desy.orders.report(wire.Report(worker="thief", outcomes=[forged]))
        assert (answer.accepted, answer.stale) == (0, [order.transfer])
    assert world.client().transfers.show(order.transfer).state == "claimed"
    with pytest.raises(NotFound):
        desy.endpoints.report_space("GSI-DISK", 0)
    gsi.endpoints.report_space("GSI-DISK", 123)
    assert world.client().endpoints.show("GSI-DISK").free_bytes == 123


def test_a_worker_reads_no_wishes_no_names_and_no_people(world: Service):
    gsi = worker(world, "GSI")
    for forbidden in (
        lambda: list(gsi.rules.list()),
        lambda: gsi.dids.show("s:d"),
        lambda: list(gsi.transfers.list()),
        lambda: gsi.sites.key("DESY"),
        lambda: list(gsi.replicas.locate("s:d")),
    ):
        with pytest.raises(NotAllowed):
            forbidden()


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"epoch": 2**63},
        {"epoch": 2**40},
        {"epoch": 99},
        {"epoch": "1"},
        {"transfer": 2**63},
        {"transfer": -1},
        {"transfer": 10**6},
        {"size": -1},
        {"size": 2**63},
        {"checksums": {"xxh3_128": "F"}},
        {"checksums": {"no-such": "00"}},
        {"checksums": {"xxh3_128": "0" * 32}},
        {"seconds": -1},
        {"outcome": "verified"},
        {"state": "done"},
        {"source_endpoint": "NOWHERE", "size": 6},
        {"outcome": "failed", "error": "from_the_future"},
        {"outcome": "failed", "error": "' OR 1=1--", "message": "\x1b[2J\r\nforged line"},
        {"outcome": "failed", "error": "busy", "retry_after_seconds": 1e300},
        {"outcome": "failed", "error": "busy", "retry_after_seconds": -1},
        {"outcome": "failed", "error": "source_missing", "source_endpoint": "GSI-DISK", "side": "source"},
    ],
)
def test_a_report_that_cannot_be_right_makes_no_replica_available_and_no_error_of_ours(world: Service, change: dict):
    gsi = worker(world, "GSI")
    (order,) = gsi.orders.claim(wire.Claim(worker="w")).orders
    outcome = {
        "transfer": order.transfer,
        "epoch": order.epoch,
        "outcome": "done",
        "size": 5,
        "checksums": {"xxh3_128": XXH3},
    } | change
    answer = world.ask("POST", "/api/v1/orders/report", {"worker": "w", "outcomes": [outcome]}, gsi._http._token)
    assert answer.status in (200, 400), answer.body
    assert {r.endpoint: r.state for r in world.client().replicas.locate("s:f")}["GSI-DISK"] != "available"


def test_two_outcomes_for_one_order_in_one_report_are_refused(world: Service):
    gsi = worker(world, "GSI")
    (order,) = gsi.orders.claim(wire.Claim(worker="w")).orders
    back = wire.Outcome(transfer=order.transfer, epoch=order.epoch, outcome="given_back")
    failed = wire.Outcome(transfer=order.transfer, epoch=order.epoch, outcome="failed", error="timed_out")
    with pytest.raises(Invalid, match="twice"):
        gsi.orders.report(wire.Report(worker="w", outcomes=[back, failed]))
    assert world.client().transfers.show(order.transfer).state == "claimed"
