"""End what was meant to end: rules and DIDs by their lifetime, deleted DIDs for good, kept answers by their age.

Given     the database.
Returns   a Report.
Promises  an expired rule protects nothing any more and deletes nothing either: that is another pass's decision. A DID
          whose lifetime is over is deleted as a person would delete it, and can be had back as long.
Partner   replica.catalog.rules, replica.catalog.did_deletion, replica.catalog.idempotency.
"""

from __future__ import annotations

from replica.catalog import concurrency, did_deletion, idempotency, rules, traffic
from replica.db.engine import Database
from rules.deletion import UNDELETE_SECONDS
from workers.runtime import Report


def expire(db: Database) -> Report:
    with db.write() as s:
        ended = rules.expire_due(s)
    return Report(seen=ended, done=ended, more=ended > 0)


def expire_dids(db: Database, *, undelete_seconds: float = UNDELETE_SECONDS) -> Report:
    with db.write() as s:
        done = did_deletion.expire_due(s, undo_seconds=undelete_seconds)
    if not done:
        with db.write() as s:
            done = did_deletion.finish_due(s)
    return Report(seen=done, done=done, more=done > 0)


def forget(db: Database) -> Report:
    with db.write() as s:
        forgotten = idempotency.forget_old(s) + traffic.forget_old(s) + concurrency.forget_old(s)
    return Report(seen=forgotten, done=forgotten, more=forgotten > 0)
