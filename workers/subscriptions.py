"""Make the rules of subscriptions: for DIDs that are new or were changed, and for what exists.

Given     the database.
Returns   a Report.
Promises  a bounded slice of each subscription; each rule in a transaction of its own; what cannot be made is kept with
          its reason and holds up neither its DID's other rules, nor other DIDs, nor other subscriptions. Two processes
          may do it at once.
Partner   replica.catalog.subscribing finds what is to be made and keeps how far it has come.
"""

from __future__ import annotations

from replica.catalog import subscribing
from replica.catalog.subscribing import Making, Skipping, Slice
from replica.db.engine import Database
from replica.log import get_logger
from rules.errors import Conflict, InvalidExpression, ReplicaError, Unavailable
from workers.runtime import Report

#: How often a rule is tried that lost a race.
TRIES = 3


def apply(db: Database) -> Report:
    """One slice of every subscription that has something to look at."""
    with db.read() as s:
        waiting = subscribing.due(s)
    seen = made = 0
    more = False
    for subscription in waiting:
        try:
            found = _slice(db, subscription)
            if found is None:
                continue
            skippings = [*found.skippings, *(why for making in found.makings if (why := _make(db, found, making)))]
            with db.write() as s:
                went_on = subscribing.reached(s, found, skippings)
        except Unavailable:
            raise  # the database itself: the others would fare no better
        except ReplicaError:
            get_logger().exception("subscription.failed", subscription=subscription)
            continue
        seen += found.seen
        made += len(found.makings) + len(found.skippings) - len(skippings)
        more |= found.more and went_on
    return Report(seen=seen, done=made, more=more)


def _slice(db: Database, subscription: int) -> Slice | None:
    try:
        with db.read() as s:
            return subscribing.look(s, subscription)
    except InvalidExpression as error:  # a release that reads less than the one that took it
        with db.write() as s:
            subscribing.broken(s, subscription, error.message)
        return None


def _make(db: Database, found: Slice, making: Making) -> Skipping | None:
    """None when it was made; else why not."""
    for tries_left in reversed(range(TRIES)):
        try:
            with db.write() as s:
                subscribing.make(s, found, making)
        except Unavailable:
            raise
        except ReplicaError as error:
            if isinstance(error, Conflict) and tries_left:
                continue
            hint = error.hint or "once that is mended, `replica subscription backfill` makes it"
            return Skipping(making.rule.did, making.number, error.message, hint)
        else:
            return None
    raise AssertionError("the last try returns")
