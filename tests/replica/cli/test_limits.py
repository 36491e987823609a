"""Limits and shares, from the command line to the catalogue and back."""

from __future__ import annotations

from tests.replica.cli.conftest import Typed


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
