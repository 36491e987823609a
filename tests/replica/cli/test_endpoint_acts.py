"""Endpoints in trouble, from the command line to the catalogue and back."""

from __future__ import annotations

import pytest

from replica import wire
from replica.client.upload import upload
from rules.errors import NotAllowed
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World, carry, evaluate


def test_ban_and_unban(typed: Typed) -> None:
    shown = typed.json("endpoint", "ban", "DESY-DISK", "--reason", "fire", "--write")
    assert (shown["readable"], shown["writable"], shown["status_reason"]) == (True, False, "fire")
    assert typed.json("endpoint", "unban", "DESY-DISK")["writable"] is True
    shown = typed.json("endpoint", "ban", "DESY-DISK", "--reason", "fire")
    assert {shown[a] for a in ("readable", "writable", "deletable")} == {False}
    assert "fire" in typed("endpoint", "show", "DESY-DISK").stdout
    assert "--reason" in typed.error("endpoint", "ban", "DESY-DISK", code=2)
    assert "NOWHERE" in typed.error("endpoint", "ban", "NOWHERE", "--reason", "x", code=3)


def test_an_endpoint_is_drained_and_taken_out_of_service(typed: Typed, w: World) -> None:
    upload(w.client, [w.write()], scope="p1", dataset="raw", endpoint="DESY-DISK")
    typed("rule", "add", "p1:raw", "--copies", "1", "--to", "*")
    shown = typed.json("endpoint", "drain", "DESY-DISK", "--reason", "out of warranty")
    assert shown["draining"] is True and shown["protected"]["rules"] == 1 and shown["protected"]["files"] > 0
    assert "by 1 rule" in typed("endpoint", "show", "DESY-DISK").stdout
    assert "endpoint drain" in typed.error("endpoint", "decommission", "DESY-DISK", code=1)
    evaluate(w)
    carry(w, "HZDR")
    evaluate(w)
    assert "protected   nothing" in typed("endpoint", "show", "DESY-DISK").stdout
    assert "--forget" in typed.error("endpoint", "decommission", "DESY-DISK", code=1)
    shown = typed.json("endpoint", "decommission", "DESY-DISK", "--forget")
    assert shown["decommissioned_at"] is not None
    assert {r["endpoint"] for r in typed.json("locate", "p1:raw")} == {"HZDR-DISK"}
    assert typed.json("endpoint", "decommission", "DESY-DISK", "--undo")["decommissioned_at"] is None


def test_draining_is_undone(typed: Typed) -> None:
    typed("endpoint", "drain", "DESY-DISK")
    assert typed.json("endpoint", "drain", "DESY-DISK", "--undo")["draining"] is False


def test_links(typed: Typed) -> None:
    assert typed.json("endpoint", "link") == []
    made = typed.json("endpoint", "link", "DESY-DISK", "HZDR-DISK", "--distance", "3", "--forbid")
    assert made == {"source": "DESY-DISK", "target": "HZDR-DISK", "distance": 3, "allowed": False}
    assert typed.json("endpoint", "link", "DESY-DISK") == [made]
    assert typed.json("endpoint", "link", "HZDR-DISK") == []
    assert typed.json("endpoint", "link", "DESY-DISK", "HZDR-DISK", "--allow")["distance"] == 3
    assert "SOURCE and TARGET" in typed.error("endpoint", "link", "DESY-DISK", "--forbid", code=2)


def test_how_an_endpoint_is_cleaned_up(typed: Typed) -> None:
    shown = typed.json(
        *("endpoint", "set", "DESY-DISK", "--min-free", "1TB", "--grace", "1h", "--budget-files", "100"),
        *("--budget-bytes", "1GB", "--delete-at-once"),
    )
    wanted = {"min_free_bytes": 10**12, "grace_seconds": 3600, "budget_files": 100, "budget_bytes": 10**9}
    assert wanted.items() <= shown.items() and shown["delete_at_once"] is True
    shown = typed.json(
        "endpoint", "set", "DESY-DISK", "--min-free", "none", "--budget-files", "-1", "--delete-when-needed"
    )
    assert (shown["min_free_bytes"], shown["budget_files"], shown["delete_at_once"]) == (None, None, False)


@pytest.mark.parametrize("act", ["ban", "unban", "drain", "decommission", "link"])
def test_who_is_no_administrator_may_not(w: World, act: str) -> None:
    token = typed_token(w)
    with w.service.client(token) as user, pytest.raises(NotAllowed):
        match act:
            case "ban":
                user.endpoints.ban("DESY-DISK", wire.Ban(reason="x"))
            case "unban":
                user.endpoints.unban("DESY-DISK")
            case "drain":
                user.endpoints.drain("DESY-DISK")
            case "decommission":
                user.endpoints.decommission("DESY-DISK")
            case _:
                user.endpoints.set_link(wire.LinkChange(source="DESY-DISK", target="HZDR-DISK"))


def typed_token(w: World) -> str:
    """Of an account that may read everything and write data."""
    w.client.accounts.add(wire.NewAccount(name="nobody"))
    return w.client.accounts.key("nobody").token
