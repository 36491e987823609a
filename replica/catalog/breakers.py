"""Breakers: endpoints that failed are left alone for a while, and then tried by one transfer.

Given     how transfers ended at their endpoints, as a batch of reports has it.
Returns   for claims: what lets nothing through, or just one; for people: why, since when and until when.
Promises  one statement for a batch of reports in which nothing failed and nothing had; who changes breakers or sends a
          probe waits for whoever does so, so there is one probe at a time. A probe is over when its claim is, however
          that ended. Opening and closing are told as events of the endpoint.
Partner   rules.breakers decides; replica.catalog.outcomes reports, replica.catalog.orders asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any, Protocol

import sqlalchemy as sa

from replica import wire
from replica.catalog import guards, outbox
from replica.catalog.bulk import Columns, insert, rows_of
from replica.catalog.membership import any_of
from replica.db.engine import Session
from replica.db.tables import breakers, endpoints, sites, transfers
from rules.breakers import HINTS, Breaker, BreakerState, Ended, after, is_own_fault
from rules.states import TRANSFER_LEASED

READ, WRITE = "read", "write"
#: (endpoint, direction)
End = tuple[int, str]


class Gate(Enum):
    """What an endpoint that failed lets through."""

    SHUT = "shut"
    PROBE = "probe"  #: one, to see


class Ending(Protocol):
    """What of the end of an attempt says something about endpoints."""

    id: int
    epoch: int
    outcome: str
    error: str
    message: str
    side: str
    retry_after_seconds: float | None

    @property
    def source_id(self) -> int | None: ...
    @property
    def target_id(self) -> int: ...


def hold(s: Session) -> None:
    """Nobody else changes a breaker or sends a probe until this transaction ends. Last of all that is held."""
    guards.one_at_a_time(s, "breakers")


def of_claims(s: Session) -> dict[End, Gate]:
    """What does not let everything through. The caller holds breakers."""
    return {
        (row.endpoint_id, row.direction): Gate.PROBE if not row.probing and row.probe_at <= s.now else Gate.SHUT
        for row in s.execute(_with_probes().where(breakers.c.state != BreakerState.CLOSED.value))
    }


def probe(s: Session, probes: Sequence[tuple[int, str, int, int]]) -> None:
    """These transfers try what has failed: (endpoint, direction, transfer, epoch)."""
    for endpoint_id, direction, transfer, epoch in probes:
        s.execute(
            breakers.update()
            .where(breakers.c.endpoint_id == endpoint_id, breakers.c.direction == direction)
            .values(state=BreakerState.HALF_OPEN.value, probe_transfer=transfer, probe_epoch=epoch)
        )


def learn(s: Session, endings: Iterable[Ending]) -> None:
    """From how these ended. Last in the transaction, since whoever learns of a failure waits for its commit."""
    said = [each for ending in endings for each in _said(ending)]
    if not said:
        return
    ends = sorted({end for end, _, _ in said})
    known = breakers.c.endpoint_id.in_(sorted({endpoint_id for endpoint_id, _ in ends}))
    nothing_failed = not any(told.code for _, told, _ in said)
    if nothing_failed and s.execute(sa.select(breakers.c.state).where(known)).first() is None:
        return
    hold(s)
    rows = {(row.endpoint_id, row.direction): row for row in s.execute(_with_probes().where(known))}
    now = {end: _breaker(rows.get(end)) for end in ends}
    was = dict(now)
    for end, told, epoch in said:
        row = rows.get(end)
        probes = row is not None and (row.probe_transfer, row.probe_epoch) == (told.transfer, epoch)
        now[end] = after(now[end], Ended(told.transfer, told.code, told.message, told.retry_after_seconds, probes))
    _write(s, {end: now[end] for end in ends if now[end] != was[end]}, rows)


def forget(s: Session, endpoint_id: int) -> None:
    """A person says that it is well again: it is tried at once."""
    if s.execute(sa.delete(breakers).where(breakers.c.endpoint_id == endpoint_id)).rowcount:
        wake(s)


def of_endpoint(s: Session, endpoint_id: int) -> list[wire.Breaker]:
    query = _with_probes().where(breakers.c.endpoint_id == endpoint_id, breakers.c.state != BreakerState.CLOSED.value)
    return [
        wire.Breaker(
            direction=row.direction,
            state=BreakerState.HALF_OPEN.value if row.probing else BreakerState.OPEN.value,
            why=row.why,
            message=row.message,
            since=row.since,
            probe_at=None if row.probing else row.probe_at,
            hint=HINTS.get(row.why, ""),
        )
        for row in s.execute(query.order_by(breakers.c.direction))
    ]


def wake(s: Session) -> None:
    """What waited may go: any site may read from there."""
    s.wake.update(f"site.{name}" for name in s.execute(sa.select(sites.c.name)).scalars())


def _with_probes() -> sa.Select[Any]:
    alive = sa.exists().where(
        transfers.c.id == breakers.c.probe_transfer,
        transfers.c.epoch == breakers.c.probe_epoch,
        any_of(transfers.c.state, TRANSFER_LEASED),
    )
    return sa.select(breakers, sa.and_(breakers.c.state == BreakerState.HALF_OPEN.value, alive).label("probing"))


def _said(ending: Ending) -> Iterable[tuple[End, Ended, int]]:
    """What this end says of endpoints: (which, how it ended there, epoch)."""
    if ending.outcome == "done":
        if ending.source_id is not None:
            yield (ending.source_id, READ), Ended(ending.id), ending.epoch
            yield (ending.target_id, WRITE), Ended(ending.id), ending.epoch
    elif ending.outcome == "failed" and is_own_fault(ending.error):
        told = Ended(ending.id, ending.error, ending.message[:2_000], ending.retry_after_seconds)
        if ending.side == "source" and ending.source_id is not None:
            yield (ending.source_id, READ), told, ending.epoch
        elif ending.side == "target":
            yield (ending.target_id, WRITE), told, ending.epoch


def _breaker(row: sa.Row[Any] | None) -> Breaker:
    if row is None:
        return Breaker()
    return Breaker(BreakerState(row.state), row.failures, row.openings, row.last_transfer, row.why, row.message)


def _write(s: Session, changed: dict[End, Breaker], rows: dict[End, sa.Row[Any]]) -> None:
    if not changed:
        return
    ids = sorted({endpoint_id for endpoint_id, _ in changed})
    query = sa.select(endpoints.c.id, endpoints.c.name).where(endpoints.c.id.in_(ids))
    name = {row.id: row.name for row in s.execute(query)}
    well = sorted(end for end, breaker in changed.items() if breaker == Breaker())
    if well:
        s.execute(sa.delete(breakers).where(sa.tuple_(breakers.c.endpoint_id, breakers.c.direction).in_(well)))
    kept = []
    for end, breaker in sorted(changed.items()):
        row = rows.get(end)
        was_closed = row is None or row.state == BreakerState.CLOSED.value
        about: dict[str, Any] = {"name": name[end[0]], "direction": end[1]}
        probe_at = None
        if breaker.opened_for is not None:
            probe_at = s.now + timedelta(seconds=breaker.opened_for)
            about |= {"why": breaker.why, "reason": breaker.message, "probe_at": probe_at.isoformat()}
        if breaker.state is not BreakerState.CLOSED and was_closed:
            outbox.record(s, "endpoint.breaker_opened", end[0], **about)
        elif breaker.state is BreakerState.CLOSED and not was_closed:
            outbox.record(s, "endpoint.breaker_closed", end[0], **about)
            wake(s)
        if breaker != Breaker():
            since = s.now if row is None or was_closed else row.since
            kept.append(
                (
                    *(*end, breaker.state.value, breaker.failures, breaker.openings, breaker.last_transfer),
                    *(breaker.why, breaker.message, since, probe_at, None, None),
                )
            )
    if not kept:
        return
    columns: Columns = {column.name: column.type for column in breakers.columns}
    batch = rows_of(s, "breakers_now", columns, kept)
    upsert = insert(s, breakers).from_select(list(columns), sa.select(batch).where(sa.true()))
    keys = ["endpoint_id", "direction"]
    changes = {name: upsert.excluded[name] for name in columns if name not in keys}
    s.execute(upsert.on_conflict_do_update(index_elements=keys, set_=changes))
