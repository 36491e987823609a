"""Take back orders whose worker fell silent.

Given     the database, whose clock alone measures leases.
Returns   a Report.
Promises  a worker that comes back finds its epoch gone: it can neither publish nor report as if nothing had been.
Partner   replica.catalog.transfers; the queue's sites are hinted after the commit.
"""

from __future__ import annotations

from replica.catalog import transfers
from replica.db.engine import Database
from workers.runtime import Report


def release(db: Database) -> Report:
    with db.write() as s:
        lost = transfers.expire_leases(s)
    return Report(seen=lost, done=lost, more=lost > 0)
