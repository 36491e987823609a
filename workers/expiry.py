"""End what was meant to end: rules by their lifetime, kept answers by their age.

Given     the database.
Returns   a Report.
Promises  an expired rule protects nothing any more and deletes nothing either: that is another pass's decision.
Partner   replica.catalog.rules, replica.catalog.idempotency.
"""

from __future__ import annotations

from replica.catalog import idempotency, rules
from replica.db.engine import Database
from workers.runtime import Report


def expire(db: Database) -> Report:
    with db.write() as s:
        ended = rules.expire_due(s)
    return Report(seen=ended, done=ended, more=ended > 0)


def forget(db: Database) -> Report:
    with db.write() as s:
        forgotten = idempotency.forget_old(s)
    return Report(seen=forgotten, done=forgotten, more=forgotten > 0)
