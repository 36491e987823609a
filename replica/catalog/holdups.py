"""What keeps queued transfers from being handed out, though their moment has come: told, not stored.

Given     a transfer's target and activity, and what it was found to wait for.
Returns   a code, a sentence, until when, and what helps; or that nothing holds it up.
Promises  a fixed number of statements for any number of transfers. A million transfers that wait for one endpoint are
          not written to for that: what holds them up is a row about the endpoint.
Partner   replica.catalog.transfers and .waiting tell it; replica.catalog.orders passes over the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from replica.catalog import breakers as breakers_
from replica.catalog import limits as limits_
from replica.db.engine import Session
from replica.db.tables import breakers, endpoints
from rules.breakers import HINTS, BreakerState
from rules.limits import Key, Limit, Load, Room, told

_ROOM_HINT = "it goes on by itself; `replica limit list` shows what is full"


@dataclass(frozen=True, slots=True)
class Holdup:
    code: str
    message: str
    next_at: datetime | None
    hint: str


class Holdups:
    """As things are in this transaction."""

    def __init__(self, s: Session) -> None:
        columns = (endpoints.c.name, breakers.c.endpoint_id, breakers.c.direction, breakers.c.why)
        query = sa.select(*columns, breakers.c.message, breakers.c.probe_at, breakers.c.since)
        query = query.join_from(breakers, endpoints).where(breakers.c.state != BreakerState.CLOSED.value)
        self._open: dict[tuple[int, str], sa.Row[Any]] = {(r.endpoint_id, r.direction): r for r in s.execute(query)}
        self._limits: dict[Key, Limit] = limits_.known(s)
        self._loads: dict[Key, Load] = limits_.in_flight(s) if self._limits else {}
        self._room = Room(self._limits, self._loads)
        self._names: dict[Key, str] = limits_.names(s, self._limits) if self._limits else {}

    def of(self, target_id: int, activity: str, waits_for: str) -> Holdup | None:
        kind, _, of = waits_for.partition(":")
        ends = [(target_id, breakers_.WRITE)]
        if kind == "read":
            ends.append((int(of), breakers_.READ))
        for end in ends:
            if end in self._open:
                return _of_breaker(self._open[end])
        keys: list[Key] = [("write", str(target_id)), ("activity", activity)]
        if kind:
            keys.append((kind, of))
        full = next((key for key in keys if self._room.files_left(key) == 0), None)
        # What waits for a limit may be larger than what is left, though it is not full.
        if full is None and kind and self._room.has_limit((kind, of)):
            full = (kind, of)
        if full is None:
            return None
        message = f"{self._names[full]}: {told(full, self._limits[full])}"
        return Holdup("limit", message, None, _ROOM_HINT)


def _of_breaker(row: sa.Row[Any]) -> Holdup:
    what = "written to" if row.direction == breakers_.WRITE else "read from"
    since = f"{row.since:%Y-%m-%d %H:%M:%S} UTC"
    message = f"{row.name} is not {what} since {since}, for it failed: {row.message or row.why}"
    return Holdup(f"breaker_{row.why}", message, row.probe_at, HINTS.get(row.why, ""))
