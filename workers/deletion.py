"""Decide which copies go: those that nobody protects, where room is needed or nothing unwanted is kept.

Given     the database.
Returns   a Report; `more` while there may be something to decide.
Promises  one endpoint and one bounded slice of its copies in one transaction; no bytes are touched here. What must
          stay does not hide what is behind it: a look goes on where the last one ended. That is remembered in the
          process, and losing it costs a second look.
Partner   replica.catalog.deletions decides; the sites' workers (workers.removing) carry it out.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from replica.catalog import deletions, removals
from replica.catalog.deletions import Reached
from replica.db.engine import Database
from replica.log import get_logger
from workers.runtime import Report

#: How many slices one pass looks at, of all endpoints together.
SLICES = 20

#: Where each endpoint's next look begins.
_reached: WeakKeyDictionary[Database, dict[int, Reached]] = WeakKeyDictionary()


def delete(db: Database) -> Report:
    with db.read() as s:
        waiting = deletions.endpoints_to_look_at(s)
    reached = _reached.setdefault(db, {})
    seen = done = slices = 0
    while waiting and slices < SLICES:
        again: list[int] = []
        for endpoint_id in waiting:
            with db.write() as s:
                decided = deletions.decide(s, endpoint_id, reached.pop(endpoint_id, None))
            slices += 1
            seen += decided.looked_at
            done += decided.files
            if decided.files:
                get_logger().info("deletion.decided", endpoint=endpoint_id, files=decided.files, bytes=decided.bytes)
            if decided.reached is not None:
                reached[endpoint_id] = decided.reached
                again.append(endpoint_id)
        waiting = again
    # Only what is kept, again and again, is no reason to hurry.
    return Report(seen=seen if done else 0, done=done, more=bool(waiting) and done > 0)


def release(db: Database) -> Report:
    """Take back deletions whose worker fell silent."""
    with db.write() as s:
        lost = removals.expire_leases(s)
    return Report(seen=lost, done=lost, more=lost > 0)
