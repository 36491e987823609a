"""Disks that break under a running system: full, read-only, gone, closed. The whole story, on real file systems."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_broken_disks_are_told_apart_others_work_on_and_all_heal():
    command = [sys.executable, "-m", "tests.scenarios.broken_disks"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    assert {name: seen["why"] for name, seen in told["seen"].items()} == {
        "FULL": "full",
        "READONLY": "denied",
        "GONE": "away",
        "CLOSED": "denied",
    }
