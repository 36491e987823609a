"""A few hundred faults in flight at every network storage; and that the checker would see what it looks for."""

from __future__ import annotations

import pytest

from replica.storage import copy_stream
from tests.scenarios.faults_in_flight import PLACES, play


async def test_faults_in_flight_make_no_wrong_replica_and_everything_ends():
    told = await play(PLACES, faults=300, seed=20_261_123, lanes=5, seconds=60, quiet_seconds=2)
    assert told["wrong"] == []
    assert told["faults"] >= 300
    assert set(told["by_place"]) == set(PLACES)


@pytest.mark.parametrize("place", ["apache", "root"])
async def test_an_engine_that_does_not_verify_is_found_out(monkeypatch, place):
    async def trusting(*_):
        return "nothing"

    monkeypatch.setattr(copy_stream.Stream, "_prove", trusting)
    told = await play([place], faults=12, seed=1, lanes=3, seconds=30, quiet_seconds=2, kinds=["up_flip"])
    assert any("reported done" in wrong and "1 of them wrong" in wrong for wrong in told["wrong"])
