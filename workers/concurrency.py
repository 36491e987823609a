"""Adapt how many slots may be taken at once to what was measured.

Given     the database, and whether anything shall adapt.
Returns   a Report.
Promises  a fixed number of statements; two control processes decide one after the other, and the second finds nothing
          to decide. Switched off, only what people set holds.
Partner   replica.catalog.concurrency.
"""

from __future__ import annotations

from replica.catalog import concurrency
from replica.db.engine import Database
from workers.runtime import Report


def adapt(db: Database, *, adaptive_concurrency: bool = True) -> Report:
    with db.write() as s:
        seen, done = concurrency.adapt(s) if adaptive_concurrency else (0, concurrency.switch_off(s))
    return Report(seen=seen, done=done)
