"""What the rules that adapt would do, from the command line."""

from __future__ import annotations

from tests.replica.cli.conftest import Typed


def test_it_can_be_played_from_the_command_line(alone: Typed) -> None:
    scores = alone.json("simulate", "concurrency", "--trace", "steady", "--seeds", "1")
    assert [score["policy"] for score in scores] == ["ours", "fts3", "fixed_4", "fixed_32", "oracle"]
    decisions = alone.json("simulate", "concurrency", "--trace", "steady", "--decisions")
    assert {"A:B", "read:A", "write:B"} == {decision["of"] for decision in decisions}
    assert all(decision["reason"] for decision in decisions)
    assert "steady" in alone.error("simulate", "concurrency", "--trace", "dream", code=2)
