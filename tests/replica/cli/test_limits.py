"""Limits and shares, from the command line to the catalogue and back."""

from __future__ import annotations

from replica import wire
from replica.client.upload import upload
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World, evaluate
from workers.concurrency import adapt


def test_limits_are_set_listed_and_taken_away(typed: Typed) -> None:
    shown = typed.json("limit", "set", "write", "DESY-DISK", "--files", "5", "--bytes", "1TB")
    assert (shown["of"], shown["files_max"], shown["bytes_max"], shown["files_in_flight"]) == (
        "DESY-DISK",
        5,
        10**12,
        0,
    )
    typed("limit", "set", "link", "HZDR-DISK", "--source", "DESY-DISK", "--files", "2")
    typed("limit", "set", "activity", "default", "--files", "0")
    typed("limit", "set", "account", "root", "--bytes", "1GB")
    assert [x["kind"] for x in typed.json("limit", "list")] == ["account", "activity", "link", "write"]
    assert "DESY-DISK → HZDR-DISK" in typed("limit", "list").stdout
    shown = typed.json("limit", "set", "write", "DESY-DISK", "--files", "none")
    assert (shown["files_max"], shown["bytes_max"]) == (None, 10**12)
    typed("limit", "set", "write", "DESY-DISK", "--bytes", "none")
    assert len(typed.json("limit", "list")) == 3
    assert "--files" in typed.error("limit", "set", "write", "DESY-DISK", code=2)
    assert "source" in typed.error("limit", "set", "link", "DESY-DISK", "--files", "1", code=1)
    assert "NOWHERE" in typed.error("limit", "set", "read", "NOWHERE", "--files", "1", code=3)


def test_shares_are_set_and_listed(typed: Typed) -> None:
    assert typed.json("limit", "share", "raw", "300") == {"name": "raw", "weight": 300}
    assert typed.json("limit", "shares") == [{"name": "raw", "weight": 300}]


def test_what_adapts_is_shown_with_its_reason_told_over_time_and_switched_off(w: World, typed: Typed) -> None:
    upload(w.client, [w.write()], endpoint="DESY-DISK", scope="p1", dataset="d")
    w.client.rules.add(wire.NewRule(did="p1:d", expression="HZDR-DISK"))
    evaluate(w)
    with w.service.client(w.client.sites.key("HZDR").token) as worker:
        assert worker.orders.claim(wire.Claim(worker="test", limit=10)).orders
    assert adapt(w.database).done == 1
    (shown,) = typed.json("limit", "list")
    assert (shown["kind"], shown["of"], shown["slots"], shown["why"]) == ("write", "HZDR-DISK", 8, "start")
    assert (shown["adaptive"], shown["files_max"], shown["reason"]) == (True, None, "8 to begin with")
    (told,) = typed.json("limit", "history", "write", "HZDR-DISK")
    assert (told["before"], told["slots"], told["why"]) == (None, 8, "start")
    assert told["measured"]["in_flight"] > 0
    assert "8 to begin with" in typed("limit", "history", "write", "HZDR-DISK").stdout
    shown = typed.json("limit", "set", "write", "HZDR-DISK", "--fixed")
    assert (shown["adaptive"], shown["slots"]) == (False, None)
    assert adapt(w.database).seen == 0
    typed("limit", "set", "write", "HZDR-DISK", "--adaptive")
    assert adapt(w.database).seen == 1
    assert adapt(w.database, adaptive_concurrency=False).done == 1
    assert typed.json("limit", "list") == []
    assert "NOWHERE" in typed.error("limit", "history", "read", "NOWHERE", code=3)
    assert "source" in typed.error("limit", "history", "link", "HZDR-DISK", code=1)
