"""How many slots may be taken at once, adapted to what was measured: the facts, and the decisions that are kept.

Given     what reports counted (replica.catalog.traffic), and what is in flight at this moment.
Returns   how many links and endpoints were looked at, and how many decided about; for people, the decisions.
Promises  a fixed number of statements for any number of links. One decider at a time. Every change of a number is kept
          with its reason and what it followed from, for KEEP_SECONDS. People's limits bound every number, and where
          they say *fixed* there is none.
Partner   rules.concurrency decides; replica.catalog.limits has claims obey; workers.concurrency calls.

What arrived in a window is what reports counted in it, and what workers said is done of the files still under way: so
a file of an hour counts while it flows. Beats come every third of a lease, so where files take long a window is longer.

A number is of
    write       what is brought to an endpoint
    link        a way to it, while there are several: with one it would be the same again
    read        what is read from an endpoint, while several ways lead from it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import guards, limits, traffic
from replica.catalog.bulk import Columns, insert, rows_of
from replica.catalog.membership import any_of
from replica.db.engine import Session
from replica.db.tables import Instant, Json, concurrency, concurrency_decisions, transfers
from replica.db.tables import limits as limits_table
from rules.concurrency import HIGHEST, Adaptive, Bounds, Decision, State, Window
from rules.limits import PARTS, Key
from rules.states import TRANSFER_LEASED

#: What a window lasts at least; and where files take longer than LONG_FILE_SECONDS.
WINDOW_SECONDS, WINDOW_LONG_SECONDS, LONG_FILE_SECONDS = 55.0, 235.0, 45.0
#: A link over which nothing went for so long is as good as new, and has no number.
IDLE_SECONDS = 3 * 3600.0
#: How far back traffic is read: a window that began before it is begun anew.
LOOK_BACK_SECONDS = 900.0
#: How many numbers are kept at most: the busiest.
SUBJECTS_MAX = 2_000
KEEP_SECONDS = 14 * 24 * 3600.0
FORGET_MAX = 10_000
REASON_MAX = 400

_COUNTS = ("files", "bytes", "seconds", "strained")
_POLICY = Adaptive()


@dataclass(slots=True)
class _Measured:
    """What is known of one link or endpoint: counted by periods, and under way now."""

    periods: dict[datetime, list[float]] = field(default_factory=dict)
    slots: float = 0.0
    #: Taken by files that come to the target from another source, too: there they count once.
    slots_besides: float = 0.0
    moving: float = 0.0

    def count(self, since: datetime, values: Iterable[float]) -> None:
        sums = self.periods.setdefault(since, [0.0] * len(_COUNTS))
        for i, value in enumerate(values):
            sums[i] += value

    def counted(self, since: datetime) -> list[float]:
        """All from the period on that began then, and what is under way."""
        totals = [0.0] * len(_COUNTS)
        for period, values in self.periods.items():
            if period >= since:
                totals = [a + b for a, b in zip(totals, values, strict=True)]
        return [*totals, self.moving]


def adapt(s: Session) -> tuple[int, int]:
    """Look at everything that is busy, and decide where a window is over."""
    guards.one_at_a_time(s, "concurrency")
    fixed, bounds = _people(s)
    found = _measure(s, fixed)
    rows = {(row.kind, row.key): row for row in s.execute(sa.select(concurrency))}
    kept: list[tuple[Any, ...]] = []
    decided: list[tuple[Key, int | None, Decision]] = []
    for key in _busiest({**dict.fromkeys(rows, _Measured()), **found}, fixed):
        values, decision = _look(s.now, key, rows.get(key), found.get(key, _Measured()), _bounds_of(key, bounds))
        if values is not None:
            kept.append((*key, *values))
            if decision is not None:
                decided.append((key, rows[key].number if key in rows else None, decision))
    gone = sorted(key for key in rows if key not in {(kind, of) for kind, of, *_ in kept})
    _write(s, kept, gone)
    changed = [(key, before, decision) for key, before, decision in decided if before != decision.number]
    _remember(s, changed)
    if gone or any(before is not None and decision.number > before for _, before, decision in changed):
        limits.wake_all(s)
    return len(kept), len(changed)


def switch_off(s: Session) -> int:
    """Nothing adapts any more; returns how many numbers went."""
    guards.one_at_a_time(s, "concurrency")
    gone = s.execute(sa.delete(concurrency)).rowcount
    if gone:
        limits.wake_all(s)
    return gone


def forget_old(s: Session) -> int:
    old = (
        sa.select(concurrency_decisions.c.id)
        .where(concurrency_decisions.c.at < s.now - timedelta(seconds=KEEP_SECONDS))
        .limit(FORGET_MAX)
    )
    return s.execute(sa.delete(concurrency_decisions).where(concurrency_decisions.c.id.in_(old))).rowcount


def history(s: Session, kind: str, of: str, source: str | None, limit: int) -> wire.LimitDecisions:
    """The latest changes of one number, newest first."""
    kind, key = limits.key_of(s, kind, of, source)
    d = concurrency_decisions
    query = sa.select(d).where(d.c.kind == kind, d.c.key == key).order_by(d.c.id.desc()).limit(limit)
    return wire.LimitDecisions(
        items=[
            wire.LimitDecision(
                at=row.at, before=row.before, slots=row.number, why=row.why, reason=row.reason, measured=row.measured
            )
            for row in s.execute(query)
        ]
    )


# --- facts ----------------------------------------------------------------------------------------------------------


def _people(s: Session) -> tuple[set[Key], dict[Key, int]]:
    """Where nothing adapts, and how many files people allow."""
    fixed: set[Key] = set()
    bounds: dict[Key, int] = {}
    for row in s.execute(sa.select(limits_table).where(limits_table.c.kind.in_(limits.ADAPT))):
        if row.fixed:
            fixed.add((row.kind, row.key))
        if row.files_max is not None:
            bounds[row.kind, row.key] = row.files_max
    return fixed, bounds


def _measure(s: Session, fixed: set[Key]) -> dict[Key, _Measured]:
    links: dict[tuple[int, int], _Measured] = {}
    for row in traffic.since(s, LOOK_BACK_SECONDS):
        counts = (row.files, row.bytes, row.seconds, row.strained)
        links.setdefault((row.source_id, row.target_id), _Measured()).count(row.since, counts)
    t = transfers
    flying = (
        sa.select(
            t.c.reads_id,
            t.c.target_id,
            sa.func.sum(limits.parts_sql()).label("parts"),
            sa.func.sum(t.c.bytes_done).label("moving"),
        )
        .where(any_of(t.c.state, TRANSFER_LEASED), t.c.reads_id.is_not(None))
        .group_by(t.c.reads_id, t.c.target_id)
    )
    for source_id, target_id, parts, moving in s.execute(flying):
        link = links.setdefault((source_id, target_id), _Measured())
        link.slots += float(parts) / PARTS
        link.moving += float(moving)
    for also in s.execute(limits.read_as_well()):
        links.setdefault((also.source_id, also.target_id), _Measured()).slots_besides += float(also.parts) / PARTS
    return _subjects(links)


def _subjects(links: Mapping[tuple[int, int], _Measured]) -> dict[Key, _Measured]:
    """What numbers are of: see above."""
    ways_from = Counter(source_id for source_id, _ in links)
    ways_to = Counter(target_id for _, target_id in links)
    found: dict[Key, _Measured] = {}
    for (source_id, target_id), link in links.items():
        keys: list[Key] = [("write", str(target_id))]
        if ways_to[target_id] > 1:
            keys.append(("link", f"{source_id}:{target_id}"))
        if ways_from[source_id] > 1:
            keys.append(("read", str(source_id)))
        for key in keys:
            whole = found.setdefault(key, _Measured())
            for since, counts in link.periods.items():
                whole.count(since, counts)
            whole.slots += link.slots if key[0] == "write" else link.slots + link.slots_besides
            whole.moving += link.moving
    return found


def _busiest(found: Mapping[Key, _Measured], fixed: set[Key]) -> list[Key]:
    keys = [key for key in found if not _is_fixed(key, fixed)]
    keys.sort(key=lambda key: (-found[key].slots, -len(found[key].periods), key))
    return keys[:SUBJECTS_MAX]


def _is_fixed(key: Key, fixed: set[Key]) -> bool:
    return not fixed.isdisjoint(_above(key))


def _above(key: Key) -> list[Key]:
    """The number itself, and of a link the endpoints."""
    if key[0] != "link":
        return [key]
    source_id, _, target_id = key[1].partition(":")
    return [key, ("read", source_id), ("write", target_id)]


def _bounds_of(key: Key, people: Mapping[Key, int]) -> Bounds:
    return Bounds(highest=max(1, min([HIGHEST, *(people[each] for each in _above(key) if each in people)])))


# --- decisions ------------------------------------------------------------------------------------------------------


def _look(
    now: datetime, key: Key, row: sa.Row[Any] | None, measured: _Measured, bounds: Bounds
) -> tuple[tuple[Any, ...] | None, Decision | None]:
    """What is kept of it from now on; and the decision, if there is one. None: nothing is kept."""
    period = traffic.period_of(now)
    if row is None:
        if not measured.slots:
            return None, None  # nothing went there lately but what is over
        begun = Window(0, 0, 0, 0, measured.slots, None)
        return _values(_POLICY.decide(None, begun, bounds), now, now, period, measured, now)
    counted = measured.counted(row.counted_since)
    seconds = (now - row.measured_at).total_seconds()
    stale = seconds > LOOK_BACK_SECONDS
    grown = [0.0] * len(counted) if stale else [a - b for a, b in zip(counted, row.counted, strict=True)]
    files, size, busy, strained, moving = grown
    came = max(0.0, size + moving)
    active_at = now if measured.slots or files or strained else row.active_at
    if (now - active_at).total_seconds() > IDLE_SECONDS:
        return None, None
    flight, looks = row.flight + measured.slots, row.looks + 1
    too_many = bounds.clamp(row.number) < row.number
    if stale or (seconds < _wanted(files, busy, measured.slots) and not too_many):
        kept = (row.number, row.why, row.reason, row.state, row.decided_at)
        if stale:
            return (*kept, now, period, measured.counted(period), measured.slots, 1, active_at), None
        return (*kept, row.measured_at, row.counted_since, row.counted, flight, looks, active_at), None
    window = Window(max(seconds, 1.0), came, max(0.0, files), max(0.0, strained), flight / looks, None, max(0.0, busy))
    return _values(_POLICY.decide(State.of(row.state), window, bounds), now, now, period, measured, active_at)


def _wanted(files: float, busy: float, slots: float) -> float:
    """How long a window is to be."""
    long = busy > LONG_FILE_SECONDS * files if files else slots > 0
    return WINDOW_LONG_SECONDS if long else WINDOW_SECONDS


def _values(
    decision: Decision,
    decided_at: datetime,
    measured_at: datetime,
    period: datetime,
    measured: _Measured,
    active_at: datetime,
) -> tuple[tuple[Any, ...], Decision]:
    state = decision.state.document()
    kept = (decision.number, decision.why, decision.reason[:REASON_MAX], state, decided_at)
    return (*kept, measured_at, period, measured.counted(period), measured.slots, 1, active_at), decision


def _write(s: Session, kept: list[tuple[Any, ...]], gone: list[Key]) -> None:
    if gone:
        batch = rows_of(s, "numbers_gone", {"kind": sa.String(), "key": sa.String()}, gone)
        same = sa.exists().where(concurrency.c.kind == batch.c.kind, concurrency.c.key == batch.c.key)
        s.execute(sa.delete(concurrency).where(same))
    if not kept:
        return
    columns: Columns = {column.name: column.type for column in concurrency.columns}
    batch = rows_of(s, "numbers", columns, sorted(kept, key=lambda row: (row[0], row[1])))
    upsert = insert(s, concurrency).from_select(list(columns), sa.select(batch).where(sa.true()))
    changes = {name: upsert.excluded[name] for name in columns if name not in ("kind", "key")}
    s.execute(upsert.on_conflict_do_update(index_elements=["kind", "key"], set_=changes))


def _remember(s: Session, changed: list[tuple[Key, int | None, Decision]]) -> None:
    if not changed:
        return
    columns: Columns = {
        "kind": sa.String(),
        "key": sa.String(),
        "at": Instant(),
        "before": sa.Integer(),
        "number": sa.Integer(),
        "why": sa.String(),
        "reason": sa.String(),
        "measured": Json,
    }
    rows = [
        (*key, s.now, before, decision.number, decision.why, decision.reason[:REASON_MAX], dict(decision.values))
        for key, before, decision in changed
    ]
    batch = rows_of(s, "numbers_changed", columns, rows)
    s.execute(concurrency_decisions.insert().from_select(list(columns), sa.select(batch)))
