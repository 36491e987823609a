"""What goes over the links: counted in periods, where estimates come from.

Given     the endings of transfers, as a batch of reports has them.
Returns   how fast the links to some endpoints were lately, and each link in the last hour.
Promises  one statement for a batch of reports, in the transaction of the reports; nobody waits in a circle for it.
Partner   replica.catalog.outcomes writes it, replica.catalog.forecasts and .orders read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

import sqlalchemy as sa

from replica.catalog.bulk import Columns, insert, rows_of
from replica.db.engine import Session
from replica.db.tables import Instant, instant, micros, traffic
from rules.concurrency import LOAD_ERRORS
from rules.estimates import Period
from rules.sources import Lately

PERIOD_SECONDS = 300
#: How far estimates look back, and how many periods of that they take.
LOOK_BACK_SECONDS = 24 * 3600
PERIODS_MAX = 12
#: Older periods are forgotten.
KEEP_SECONDS = 90 * 24 * 3600
#: How far the choice of a source looks back.
LATELY_SECONDS = 3600
FORGET_MAX = 10_000

_COLUMNS: Columns = {
    "source_id": sa.BigInteger(),
    "target_id": sa.BigInteger(),
    "since": Instant(),
    "files": sa.BigInteger(),
    "bytes": sa.BigInteger(),
    "seconds": sa.Float(),
    "failures": sa.BigInteger(),
    "strained": sa.BigInteger(),
    "source_failures": sa.BigInteger(),
}
_ADDED = ("files", "bytes", "seconds", "failures", "strained", "source_failures")


class Ending(Protocol):
    """What of the end of an attempt is counted."""

    outcome: str
    error: str
    size: int
    seconds: float
    side: str
    #: Of a file that came from several sources: what came from each.
    read_from: dict[int, int] | None

    @property
    def source_id(self) -> int | None: ...
    @property
    def target_id(self) -> int: ...


def add(s: Session, endings: Iterable[Ending]) -> None:
    """Count these attempts. Last in the transaction, since everybody who uses these links waits for its commit."""
    since = _period(s.now)
    sums: dict[tuple[int, int], list[float]] = {}
    for ending in endings:
        if ending.source_id is None or ending.outcome not in ("done", "failed", "lost"):
            continue  # verified in place, or given back: no link was used
        total = sums.setdefault((ending.source_id, ending.target_id), [0, 0, 0.0, 0, 0, 0])
        if ending.outcome != "done":
            total[3] += 1
            total[4] += ending.error in LOAD_ERRORS
            total[5] += ending.side != "target"
            continue
        total[0] += 1
        for source_id, size in (ending.read_from or {ending.source_id: ending.size}).items():
            total = sums.setdefault((source_id, ending.target_id), [0, 0, 0.0, 0, 0, 0])
            total[1] += size
            total[2] += ending.seconds
    if not sums:
        return
    # In the order of their keys: two transactions never hold what the other waits for.
    rows = [
        (source, target, since, int(files), int(size), float(seconds), int(failures), int(strained), int(own))
        for (source, target), (files, size, seconds, failures, strained, own) in sorted(sums.items())
    ]
    batch = rows_of(s, "traffic_added", _COLUMNS, rows)
    upsert = insert(s, traffic).from_select(
        list(_COLUMNS),
        sa.select(*(batch.c[name] for name in _COLUMNS))
        .where(sa.true())
        .order_by(batch.c.source_id, batch.c.target_id),
    )
    s.execute(
        upsert.on_conflict_do_update(
            index_elements=["source_id", "target_id", "since"],
            set_={name: traffic.c[name] + upsert.excluded[name] for name in _ADDED},
        )
    )


def recent(s: Session, target_ids: Sequence[int]) -> dict[int, list[Period]]:
    """Target → what came there in its latest periods, newest first."""
    query = (
        sa.select(
            traffic.c.target_id,
            traffic.c.since,
            *(sa.func.sum(traffic.c[name]).label(name) for name in _ADDED),
        )
        .where(
            traffic.c.target_id.in_(sorted(target_ids)),
            traffic.c.since >= s.now - timedelta(seconds=LOOK_BACK_SECONDS),
        )
        .group_by(traffic.c.target_id, traffic.c.since)
        .order_by(traffic.c.since.desc())
    )
    found: dict[int, list[Period]] = {}
    for row in s.execute(query):
        periods = found.setdefault(row.target_id, [])
        if len(periods) < PERIODS_MAX:
            lasted = min(max((s.now - row.since).total_seconds(), 1.0), float(PERIOD_SECONDS))
            periods.append(Period(lasted, int(row.files), int(row.bytes), float(row.seconds), int(row.failures)))
    return found


@dataclass(frozen=True, slots=True)
class Counted:
    """What one period has of a link."""

    source_id: int
    target_id: int
    since: datetime
    files: int
    bytes: int
    seconds: float
    strained: int


def since(s: Session, seconds: float) -> list[Counted]:
    """All links in the periods of so long."""
    names = ("source_id", "target_id", "since", "files", "bytes", "seconds", "strained")
    query = sa.select(*(traffic.c[name] for name in names))
    query = query.where(traffic.c.since >= _period(s.now - timedelta(seconds=seconds)))
    return [Counted(*row) for row in s.execute(query)]


def period_of(moment: datetime) -> datetime:
    """When the period began that this moment is in."""
    return _period(moment)


def lately(s: Session, target_ids: Sequence[int]) -> dict[tuple[int, int], Lately]:
    """(source, target) → what that link carried in the last hour."""
    sums = (sa.func.sum(traffic.c[name]).label(name) for name in ("files", "bytes", "seconds", "source_failures"))
    query = (
        sa.select(traffic.c.source_id, traffic.c.target_id, *sums)
        .where(
            traffic.c.target_id.in_(sorted(target_ids)),
            traffic.c.since >= s.now - timedelta(seconds=LATELY_SECONDS),
        )
        .group_by(traffic.c.source_id, traffic.c.target_id)
    )
    return {
        (row.source_id, row.target_id): Lately(
            int(row.files), int(row.bytes), float(row.seconds), int(row.source_failures)
        )
        for row in s.execute(query)
    }


def forget_old(s: Session) -> int:
    """Forget some periods that nobody looks back to; returns how many. 0: none was left."""
    old = (
        sa.select(traffic.c.source_id, traffic.c.target_id, traffic.c.since)
        .where(traffic.c.since < s.now - timedelta(seconds=KEEP_SECONDS))
        .limit(FORGET_MAX)
    )
    key = sa.tuple_(traffic.c.source_id, traffic.c.target_id, traffic.c.since)
    return s.execute(sa.delete(traffic).where(key.in_(old))).rowcount


def _period(moment: datetime) -> datetime:
    length = PERIOD_SECONDS * 1_000_000
    return instant(micros(moment) // length * length)
