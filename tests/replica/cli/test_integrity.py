"""`replica bad`, `good`, `repair`, `suspects` and `scrub` as they are typed."""

from __future__ import annotations

from pathlib import Path

from replica.client.upload import upload
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World


def test_bad_and_good_by_hand(typed: Typed, w: World, tmp_path: Path) -> None:
    upload(w.client, [w.write()], scope="p1", dataset="raw", endpoint="DESY-DISK")
    dids = sorted(r.did for r in w.client.replicas.pages("p1:raw"))
    listing = tmp_path / "bad.txt"
    listing.write_text("\n".join(dids) + "\n")
    said = typed.json("bad", "--all-at", "DESY-DISK", "--from", str(listing), "--reason", "the disk fell down")
    assert (said["bad"], said["known"], sorted(said["last_copies"])) == (len(dids), 0, dids)
    suspects = typed.json("suspects", "--endpoint", "DESY-DISK")
    assert {(s["did"], s["state"], s["why"], s["proven"]) for s in suspects} == {
        (did, "bad", "person", False) for did in dids
    }
    assert "the disk fell down" in typed("suspects").stdout
    assert "no good copy" in typed.error("repair", dids[0], "--endpoint", "DESY-DISK", code=1)
    assert typed.json("good", dids[0], "--endpoint", "DESY-DISK") == {"good": 1, "to_verify": 0}
    assert {r["state"] for r in typed.json("locate", dids[0])} == {"available"}
    said = typed.json("doubt", *dids, "--endpoint", "DESY-DISK")
    assert said == {"to_look_at": 1, "passed_over": len(dids) - 1, "too_many": 0}, "the others are bad already"
    (event,) = typed.json("events", "--kinds", "account.doubted")
    assert event["payload"]["replicas"] == 1
    assert "0 replicas to be looked at" in typed("doubt", dids[0], "--endpoint", "DESY-DISK").stdout
    assert "--endpoint" in typed.error("bad", dids[0], code=2)
    assert "name DIDs" in typed.error("good", "--endpoint", "DESY-DISK", code=2)


def test_scrubs_are_set_and_shown(typed: Typed) -> None:
    shown = typed.json("scrub", "show", "DESY-DISK")
    assert (shown["depth"], shown["period_seconds"], shown["halted_at"]) == ("deep", 90 * 86_400, None)
    shown = typed.json(
        "scrub", "set", "DESY-DISK", "--rate", "5MB", "--days", "30", "--guard", "50", "--depth", "shallow"
    )
    assert (shown["bytes_per_second"], shown["period_seconds"], shown["guard_fraction"]) == (
        5_000_000,
        30 * 86_400,
        0.5,
    )
    assert typed.json("scrub", "set", "DESY-DISK", "--rate", "none")["bytes_per_second"] is None
    listed = {s["endpoint"]: s["depth"] for s in typed.json("scrub", "list")}
    assert listed["DESY-DISK"] == "shallow"
    assert "--help" in typed.error("scrub", "set", "DESY-DISK", code=2)
    assert "NOWHERE" in typed.error("scrub", "show", "NOWHERE", code=3)
