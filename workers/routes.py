"""Find ways over other endpoints for what may not go to its target directly, and end those that have served.

Given     the database.
Returns   a Report; `more` while a slice was full.
Promises  one transaction a slice; two processes may do it at once: they wait for one another.
Partner   replica.catalog.routes; claims say what has no direct link.
"""

from __future__ import annotations

from replica.catalog import routes
from replica.db.engine import Database
from workers.runtime import Report


def look(db: Database) -> Report:
    with db.write() as s:
        closed = routes.close(s)
    with db.write() as s:
        planned = routes.plan(s)
    return Report(seen=closed + planned, done=closed + planned, more=routes.SLICE in (closed, planned))
