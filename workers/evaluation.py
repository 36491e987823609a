"""Evaluate the rules that are due, a bounded slice at a time.

Given     the database.
Returns   a Report; `more` while anything was due.
Promises  one transaction a slice; two processes may do it at once; a slice that fails is rolled back and found again.
Partner   replica.catalog.rules gathers the facts and applies what rules.placement decides.
"""

from __future__ import annotations

from replica.catalog import rules
from replica.db.engine import Database
from workers.runtime import Report

#: Files worked on in one transaction: long enough to be worth it, short enough that nobody waits for it.
SLICE_FILES = 20_000


def evaluate(db: Database) -> Report:
    with db.write() as s:
        done = rules.evaluate_due(s, limit_files=SLICE_FILES)
    return Report(seen=done, done=done, more=done > 0)
