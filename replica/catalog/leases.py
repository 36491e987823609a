"""Leases as a whole.

Given     the word of somebody who knows that no worker lives any more.
Returns   how many leases there were.
Promises  nobody is robbed of an order but the dead: an epoch given before can report nothing afterwards.
Partner   replica.embedded, whose workers live and die with it; replica.catalog.outcomes gives the orders back.
"""

from __future__ import annotations

from datetime import timedelta

from replica.catalog.membership import any_of, literal
from replica.db.engine import Session
from replica.db.tables import deletions, transfers
from rules.states import TRANSFER_LEASED, DeletionState


def end_all(s: Session) -> int:
    """Every lease ends now. Only for whoever is the only one with workers, before the first of them starts."""
    over = s.now - timedelta(microseconds=1)
    leased = any_of(transfers.c.state, TRANSFER_LEASED)
    deleting = deletions.c.state == literal(DeletionState.CLAIMED)
    ended = s.execute(deletions.update().where(deleting).values(lease_until=over)).rowcount
    return ended + s.execute(transfers.update().where(leased).values(lease_until=over)).rowcount
