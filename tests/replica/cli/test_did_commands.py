"""`replica did`: what is typed, and what it says."""

import pytest

from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World


@pytest.fixture(autouse=True)
def data(typed: Typed, w: World) -> None:
    for i in range(4):
        typed.json(
            "did", "add", f"p1:d{i}", "--metadata", f"run={i}", "--metadata", f"type={'raw' if i % 2 else 'cooked'}"
        )


def dids(found: list[dict[str, object]]) -> list[str]:
    return [str(each["did"]) for each in found]


def test_finding(typed: Typed):
    assert dids(typed.json("did", "find", "type = raw", "--sort", "-run")) == ["p1:d3", "p1:d1"]
    assert dids(typed.json("did", "find", "run >= 1", "--where", "run < 3 or run = 9", "--limit", "1")) == ["p1:d1"]
    assert dids(typed.json("did", "list", "p1:d*", "--where", "type = raw", "--where", "run > 1")) == ["p1:d3"]
    assert dids(typed.json("did", "find", "--scope", "p1", "--kind", "container")) == []
    error = typed.error("did", "find", "run = 1 and kind = datset", code=1)
    assert "column 20: expected one of file, dataset, container" in error
    assert "\n  run = 1 and kind = datset\n" + " " * 21 + "^\n" in error
    assert "did you mean dataset?" in error


def test_metadata_of_a_new_did_is_typed_as_it_is_changed(typed: Typed):
    made = typed.json("did", "add", "p1:n", "--metadata", "proposal.end=2026-06-01", "--metadata", 'tags=["a"]')
    assert made["metadata"] == {"proposal": {"end": "2026-06-01"}, "tags": ["a"]}
    assert "256" in typed.error("did", "add", "p1:m", "--metadata", f"{'k' * 257}=1", code=1)
    assert 'keys=["proposal.end", "tags"]' in _after(typed, "did", "meta", "p1:n", "set", "proposal.end=x", "tags=y")


def _after(typed: Typed, *change: str) -> str:
    typed(*change)
    return typed("did", "history", change[2]).stdout


def test_what_cannot_be_typed_is_said(typed: Typed):
    assert "--limit" in typed.error("did", "list", "p1", "--limit", "9" * 20, code=2)
    assert "nothing to change" in typed.error("did", "set", "p1:d0", code=2)
    assert "'--lifetime'" in typed.error("did", "set", "p1:d0", "--lifetime", "soon", code=2)


def test_metadata(typed: Typed):
    assert typed.json("did", "meta", "p1:d0") == {"did": "p1:d0", "metadata": {"run": 0, "type": "cooked"}}
    after = typed.json(
        "did", "meta", "p1:d0", "set", "run=17", "proposal.end=2026-06-30", 'tags=["a"]', "ok=true", "x=="
    )
    assert after["metadata"] == {
        **{"run": 17, "type": "cooked", "proposal": {"end": "2026-06-30"}, "tags": ["a"], "ok": True, "x": "="}
    }
    assert 'proposal  {"end": "2026-06-30"}' in typed("did", "meta", "p1:d0").stdout
    assert typed.json("did", "meta", "p1:d0", "unset", "proposal", "x", "tags")["metadata"].keys() == {
        "run",
        "type",
        "ok",
    }
    assert typed.json("did", "meta", "p1:d1", "p1:d2", "set", "ok=true") == {"changed": 2}
    assert [each["did"] for each in typed.json("did", "meta", "p1:d1", "p1:d2")] == ["p1:d1", "p1:d2"]
    typed.error("did", "meta", "p1:d1", "set", code=2)
    typed.error("did", "meta", "p1:d1", "set", "x", code=2)
    typed.error("did", "meta", "p1:d1", "set", "x=[1", code=2)
    typed.error("did", "meta", "set", "x=1", code=2)
    assert "replica did list" in typed.error("did", "meta", "p1:none", code=3)


def test_lifetime_and_monotonic(typed: Typed):
    made = typed.json("did", "add", "p1:m", "--monotonic", "--lifetime", "30d")
    assert made["monotonic"] and made["expires_at"]
    assert typed.json("did", "set", "p1:m", "--lifetime", "none")["expires_at"] is None
    assert typed.json("did", "set", "p1:d0", "--monotonic", "--lifetime", "2y")["monotonic"]
    assert "open, monotonic" in typed("did", "show", "p1:d0").stdout
    assert "is not a duration" in typed.error("did", "set", "p1:d0", "--lifetime", "soon", code=2)


def test_deleting_and_having_back(typed: Typed):
    said = typed("did", "delete", "p1:d0", "p1:d1").stdout
    assert said.startswith("2 deleted; until ") and "`replica did undelete`" in said
    assert dids(typed.json("did", "list")) == ["p1:d2", "p1:d3"]
    assert dids(typed.json("did", "list", "--deleted")) == ["p1:d0", "p1:d1"]
    assert "replica did undelete p1:d0" in typed.error("did", "show", "p1:d0", code=3)
    assert "can be had back until" in typed("did", "show", "p1:d0", "--deleted").stdout
    assert "replica did undelete p1:d0" in typed.error("did", "add", "p1:d0", code=1)
    assert typed.json("did", "undelete", "p1:d0", "p1:d1") == {"undeleted": 2}
    history = typed.json("did", "history", "p1:d0")
    assert [each["kind"] for each in history] == ["did.created", "did.deleted", "did.undeleted"]
    assert "did.deleted" in typed("did", "history", "p1:d0").stdout


def test_a_scope_is_shown(typed: Typed):
    assert typed.json("scope", "show", "p1")["account"] == "root"
    assert "replica scope add" in typed.error("scope", "show", "none", code=3)
