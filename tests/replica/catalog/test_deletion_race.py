"""Deleters against everybody else, at the same moment. `python -m tests.scenarios.race_deletion` does it for longer."""

from __future__ import annotations

import pytest

from replica.db.engine import Database
from tests.scenarios.race_deletion import Race


@pytest.mark.parametrize("seed", [7])
def test_eight_deleters_lose_nothing_that_is_protected_and_no_last_copy(postgresql_url: str, seed: int) -> None:
    db = Database(postgresql_url, pool_size=20)
    told = Race(db, 190, seed).run()
    db.close()
    assert told["removed"] > 0
    assert told["decided"] > 0
    assert told["repeat"] < 100
