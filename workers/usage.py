"""Write down how much accounts hold, so that it can be told over time.

Given     the database.
Returns   a Report.
Promises  one statement; a row only for what changed since it was last written down.
Partner   replica.catalog.usage.
"""

from __future__ import annotations

from replica.catalog import usage
from replica.db.engine import Database
from workers.runtime import Report


def note(db: Database) -> Report:
    with db.write() as s:
        noted = usage.note(s)
    return Report(seen=noted, done=noted, more=False)
