"""`replica rule …` as it is typed: plans, changes, approval, pauses, history."""

from __future__ import annotations

import pytest

from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World


@pytest.fixture
def raw(w: World, typed: Typed) -> str:
    """A dataset of four files at DESY-DISK."""
    from replica import wire

    typed("did", "add", "p1:raw")
    w.client.replicas.register(
        wire.Registration(
            endpoint="DESY-DISK",
            dataset="p1:raw",
            evidence="hashed",
            replicas=[wire.NewReplica(did=f"p1:f{i}", size=1000, checksums={"adler32": f"{i:08x}"}) for i in range(4)],
        )
    )
    return "p1:raw"


def test_a_rule_is_changed_paused_moved_and_its_history_told(typed: Typed, raw: str) -> None:
    made = typed.json(
        *("rule", "add", raw, "--to", "HZDR-DISK", "--locked", "--purge", "--metadata", '{"run": 7}'),
        *("--expires", "2100-01-01"),
    )
    number = str(made["id"])
    assert (made["locked"], made["purge"], made["metadata"]) == (True, True, {"run": 7})
    assert made["expires_at"].startswith("2100-01-01T00:00:00")
    assert "is locked" in typed.error("rule", "delete", number, code=1)
    changed = typed.json("rule", "update", number, "--unlock", "--for-ever", "--priority", "5", "--comment", "now")
    assert (changed["locked"], changed["expires_at"], changed["priority"]) == (False, None, 5)
    plan = typed("rule", "update", number, "--copies", "2", "--to", "kind=disk", "--plan").stdout
    assert "DESY-DISK" in plan and "nothing was changed" in plan
    assert typed.json("rule", "suspend", number, "--comment", "wait")["state"] == "suspended"
    explained = typed("rule", "explain", number).stdout
    assert "It is suspended" in explained and f"what helps: `replica rule resume {number}`" in explained
    assert typed.json("rule", "resume", number)["state"] == "replicating"
    assert typed.json("rule", "move", number, "--to", "DESY-DISK")["expression"] == "DESY-DISK"
    told = [e["kind"] for e in typed.json("rule", "history", number)]
    assert told[:4] == ["rule.added", "rule.updated", "rule.suspended", "rule.resumed"]
    table = typed("rule", "history", number).stdout
    assert "priority: 3 → 5" in table and "root" in table
    plans = typed.json("rule", "delete", number, "--plan")
    assert plans[0]["purge"] is True and plans[0]["files"] == 4 and plans[0]["last_copies"] == 4
    text = typed("rule", "delete", number, "--plan", "--no-purge").stdout
    assert "4 copies of files" in text and "when space is needed" in text and "nothing was changed" in text
    typed("rule", "delete", number)
    assert typed.json("rule", "show", number)["state"] == "expired"


def test_a_rule_asks_and_is_answered(typed: Typed, raw: str) -> None:
    plan = typed("rule", "add", raw, "--to", "HZDR-DISK", "--ask-approval", "--plan").stdout
    assert "a person would be asked first" in plan
    made = typed.json("rule", "add", raw, "--to", "HZDR-DISK", "--ask-approval")
    assert made["state"] == "waiting_approval"
    assert "approve" in typed("rule", "show", str(made["id"])).stdout
    assert typed.json("rule", "approve", str(made["id"]), "--comment", "ok")["state"] == "replicating"
    other = typed.json("rule", "add", raw, "--to", "DESY-DISK", "--ask-approval", "--not-before", "2100-01-01T12:00")
    assert typed.json("rule", "deny", str(other["id"]))["state"] == "expired"
    assert "does not wait" in typed.error("rule", "deny", str(other["id"]), code=1)


@pytest.mark.parametrize(
    "words",
    [
        ("update", "1"),
        ("update", "1", "--for-ever", "--lifetime", "3d"),
        ("update", "1", "--metadata", "[1]"),
        ("update", "1", "--metadata", "{"),
        ("update", "1", "--expires", "tomorrow"),
        ("move", "1"),
    ],
)
def test_what_is_typed_wrongly_is_a_usage_error(typed: Typed, words: tuple[str, ...]) -> None:
    typed("rule", *words, code=2)
