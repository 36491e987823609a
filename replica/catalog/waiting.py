"""What a rule waits for: every unit that is not satisfied, gathered by why and where.

Given     a rule, as its row and as people see it.
Returns   wire.Waiting: why, since when, what happens next, and what a person can do.
Promises  every file that lacks a copy is in one of them for each copy it lacks; a fixed number of statements, and a
          line for each reason and endpoint, whatever the number of files.
Partner   replica.catalog.explanation puts it into sentences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import locks as locks_
from replica.catalog import rule_views
from replica.catalog.holdups import Holdup, Holdups
from replica.catalog.membership import Unguessed, any_of, by_index, literal, of_pair
from replica.catalog.provision import IN_VAIN, LIVE
from replica.catalog.rule_transfers import SUSPENDED, open_pairs
from replica.db.engine import Session
from replica.db.tables import alias_of, dids, endpoints, files, locks, replicas, transfers
from rules.quantities import counted
from rules.states import TRANSFER_LEASED, ReplicaState, RuleState, TransferState
from rules.transfers import classify, describe

#: How many units are named for each reason.
UNITS_MAX = 10
#: How much of the queue of a site is looked at for what goes before.
QUEUE_MAX = 5_000
#: How many places one sentence about copies without a place names.
PLACES_MAX = 8

#: For what is tried again by itself and in vain until somebody does something.
HELPS = {
    "no_space": "free space there, or move data elsewhere",
    "unreachable": "mount its disk; a new folder is made ready by `replica endpoint prepare`",
    "forbidden": "give the worker's user the right to do this there; what is mounted read-only, remount",
    "no_source": "register a good copy, allow its endpoint as a source, or switch reading on there",
    "no_link": "wait: a way over other endpoints is looked for",
    "no_route": "allow a link, or let an endpoint be a step: `replica endpoint set NAME --attribute hop=true`",
    "hops": "nothing needs to be done; `replica transfer show` says where it is",
    "writing_off": "switch writing on again: `replica endpoint unban`",
    "path_taken": "delete one of the two files, or register one of them under another path",
}


@dataclass(slots=True)
class Group:
    """Copies of files that are not there, in the same state and for the same reason, for one endpoint."""

    state: TransferState | None  #: of the transfer under way; None: there is none
    code: str | None
    target_id: int
    target: str
    site_id: int
    files: int
    bytes: int
    done: int = 0
    failed: bool = False  #: no transfer is under way, and one ended in vain
    not_before: datetime | None = None
    since: datetime | None = None
    reason: str | None = None
    attempts: int = 0
    first_id: int | None = None
    priority: int = 0
    writable: bool = True
    closed_because: str = ""
    closed_since: datetime | None = None
    holdup: Holdup | None = None


def groups(s: Session, rule_id: int) -> list[Group]:
    """Of the copies that this rule locks and that are not there, whoever asked for them first."""
    pairs = open_pairs(rule_id)
    vain = alias_of(transfers, "vain")
    ended = sa.select(1).where(
        vain.c.file_id == pairs.c.file_id,
        Unguessed(sa.and_(vain.c.target_id == pairs.c.endpoint_id, any_of(vain.c.state, IN_VAIN))),
    )
    failed = sa.case((transfers.c.id.is_not(None), 0), (sa.exists(ended), 1), else_=0)
    query = (
        sa.select(
            transfers.c.state,
            transfers.c.reason_code,
            failed.label("failed"),
            pairs.c.endpoint_id,
            sa.func.count().label("files"),
            sa.func.sum(files.c.size_bytes).label("bytes"),
            sa.func.sum(transfers.c.bytes_done).label("done"),
            sa.func.min(transfers.c.not_before).label("not_before"),
            sa.func.min(transfers.c.created_at).label("since"),
            sa.func.max(transfers.c.reason).label("reason"),
            sa.func.max(transfers.c.attempts).label("attempts"),
            sa.func.min(transfers.c.id).label("first_id"),
            sa.func.max(transfers.c.priority).label("priority"),
            transfers.c.waits_for,
            transfers.c.activity,
        )
        .select_from(pairs)
        .join(files, files.c.did_id == pairs.c.file_id)
        .outerjoin(replicas, of_pair(pairs))
        .outerjoin(
            transfers,
            sa.and_(
                transfers.c.file_id == pairs.c.file_id,
                transfers.c.target_id == pairs.c.endpoint_id,
                any_of(transfers.c.state, LIVE),
            ),
        )
        .where(sa.or_(replicas.c.state.is_(None), Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE))))
        .group_by(
            *(transfers.c.state, transfers.c.reason_code, sa.text("failed"), pairs.c.endpoint_id),
            *(transfers.c.waits_for, transfers.c.activity),
        )
    )
    with by_index(s):
        rows = s.execute(query).all()
    places = {
        row.id: row
        for row in s.execute(sa.select(endpoints).where(endpoints.c.id.in_(sorted({row.endpoint_id for row in rows}))))
    }
    holdups = Holdups(s)
    found = [_group(row, places[row.endpoint_id], holdups) for row in rows]
    return sorted(found, key=lambda g: (g.state.value if g.state else 99, g.target, g.code or "", g.failed))


def _group(row: sa.Row[Any], place: sa.Row[Any], holdups: Holdups) -> Group:
    queued = row.state is TransferState.QUEUED and row.not_before is None
    return Group(
        state=row.state,
        code=row.reason_code,
        target_id=place.id,
        target=place.name,
        site_id=place.site_id,
        files=row.files,
        bytes=int(row.bytes or 0),
        done=int(row.done or 0),
        failed=bool(row.failed),
        not_before=row.not_before,
        since=row.since,
        reason=row.reason,
        attempts=row.attempts or 0,
        first_id=row.first_id,
        priority=row.priority or 0,
        writable=place.writable,
        closed_because=place.status_reason,
        closed_since=place.status_since,
        holdup=holdups.of(place.id, row.activity, row.waits_for) if queued else None,
    )


# --- in the order in which they hold up -----------------------------------------------------------------------------


def of_rule(s: Session, rule: wire.Rule, row: sa.Row[Any], found: Sequence[Group]) -> list[wire.Waiting]:
    if row.state in (RuleState.EXPIRED, RuleState.OK):
        return []
    whole = _whole(rule, row, s.now)
    if whole is not None:
        return [whole]
    ahead = _ahead(s, [g for g in found if g.state is TransferState.QUEUED and _moves(g)])
    units = _open_units(s, rule.id) if found else {}
    made = [_of_group(s, rule, row, group, ahead, units.get(group.target_id, [])) for group in found]
    return [*_unplaced(s, rule, row), *made]


def _whole(rule: wire.Rule, row: sa.Row[Any], now: datetime) -> wire.Waiting | None:
    """A rule that has not begun waits as a whole."""
    reason = next((r for r in rule.reasons if r.code in ("waiting_approval", "not_before")), None)
    begins_later = row.not_before is not None and row.not_before > now
    if row.state is not RuleState.WAITING_APPROVAL and not begins_later:
        return None
    waits = row.state is RuleState.WAITING_APPROVAL
    return wire.Waiting(
        what="waiting_approval" if waits else "not_before",
        code="",
        endpoint=None,
        files=rule.files_total * rule.copies,
        bytes=rule.bytes_total * rule.copies,
        since=row.created_at,
        message=reason.message if reason else "it waits for a person",
        next="it begins when a person has approved it" if waits else "it begins by itself",
        next_at=None if waits else row.not_before,
        hint=reason.hint if reason else "",
        units=[rule.did],
    )


def _unplaced(s: Session, rule: wire.Rule, row: sa.Row[Any]) -> Iterator[wire.Waiting]:
    """Units that have fewer locks than copies: not looked at yet, or refused everywhere."""
    if row.placed_to is None and not row.copies_missing:
        return
    every = locks_.units_of(row.did_id, row.grouping).subquery("every")
    unit_id = every.c.unit_id
    have = (
        sa.select(sa.func.count())
        .select_from(locks)
        .where(locks.c.rule_id == rule.id, locks.c.unit_id == unit_id, locks.c.surplus.is_(False))
        .scalar_subquery()
    )
    lacking = (
        sa.select(
            unit_id,
            (row.copies - have).label("missing"),
            sa.func.coalesce(dids.c.files_total, 1).label("files"),
            sa.func.coalesce(dids.c.bytes_total, files.c.size_bytes, 0).label("bytes"),
        )
        .select_from(every)
        .join(dids, dids.c.id == unit_id)
        .outerjoin(files, files.c.did_id == unit_id)
        .where(have < row.copies)
        .subquery("lacking")
    )
    # While a round of placement goes on, what lies behind it has not been looked at.
    looked_at = sa.true() if row.placed_to is None else lacking.c.unit_id <= row.placed_to
    which = sa.case((looked_at, 1), else_=0)
    sums = sa.select(
        which.label("looked_at"),
        sa.func.count().label("units"),
        sa.func.sum(lacking.c.missing).label("missing"),
        sa.func.sum(lacking.c.files * lacking.c.missing).label("files"),
        sa.func.sum(lacking.c.bytes * lacking.c.missing).label("bytes"),
    ).group_by(sa.text("looked_at"))
    some = sa.select(lacking.c.unit_id, which.label("looked_at")).order_by(lacking.c.unit_id).limit(UNITS_MAX)
    sample = s.execute(some).all()
    text = rule_views.did_texts(s, [each.unit_id for each in sample])
    for each in s.execute(sums):
        shared: dict[str, Any] = {
            "endpoint": None,
            "files": int(each.files),
            "bytes": int(each.bytes),
            "units": [text[x.unit_id] for x in sample if x.looked_at == each.looked_at],
        }
        if not each.looked_at:
            yield wire.Waiting(
                what="placing",
                code="",
                since=row.updated_at,
                message=f"places for {int(each.missing)} copies of units are being chosen",
                next="the next slice is placed now",
                next_at=row.evaluate_at,
                **shared,
            )
            continue
        why = [r for r in rule.reasons if not _is_of_transfers(r)]
        said = "; ".join(dict.fromkeys(r.message for r in why[:PLACES_MAX])) or "no endpoint could take them"
        more = f"; and {len(why) - PLACES_MAX} more" if len(why) > PLACES_MAX else ""
        yield wire.Waiting(
            what="unplaced",
            code=why[0].code if why else "",
            since=min((r.first_seen_at for r in why), default=row.updated_at),
            message=f"no place was found: {said}{more}",
            next="it is tried again by itself, and at once when the endpoints change",
            next_at=row.evaluate_at,
            hint="; ".join(dict.fromkeys(r.hint for r in why[:PLACES_MAX] if r.hint)),
            **shared,
        )


def _is_of_transfers(reason: wire.Reason) -> bool:
    return reason.code in ("suspended", "cancelled", "lost") or (reason.endpoint is not None and not _refuses(reason))


def _refuses(reason: wire.Reason) -> bool:
    """Placement names the endpoint at the beginning of what it says."""
    return reason.message.startswith(f"{reason.endpoint}: ")


def _moves(group: Group) -> bool:
    return group.code is None and group.writable and group.holdup is None


def _of_group(
    s: Session, rule: wire.Rule, row: sa.Row[Any], g: Group, ahead: dict[int, int], units: list[str]
) -> wire.Waiting:
    what, message, then, next_at, hint = _told(s, rule, row, g, ahead.get(g.target_id))
    return wire.Waiting(
        what=what,
        code=g.holdup.code if g.holdup is not None else g.code or "",
        endpoint=g.target,
        files=g.files,
        bytes=g.bytes,
        since=g.since or row.updated_at,
        message=message,
        next=then,
        next_at=next_at,
        hint=hint,
        ahead=ahead.get(g.target_id) if g.state is TransferState.QUEUED and _moves(g) else None,
        units=units[:UNITS_MAX],
    )


def _told(
    s: Session, rule: wire.Rule, row: sa.Row[Any], g: Group, ahead: int | None
) -> tuple[str, str, str, datetime | None, str]:
    """What, why, what happens next and when, and what helps."""
    if g.state is None:
        return _told_without_transfer(rule, row, g)
    if g.state in TRANSFER_LEASED:
        return "moving", "a worker is at it", "it is verified, and then it counts", None, ""
    if g.state is TransferState.WAITING:
        if g.code == SUSPENDED:
            return (
                "suspended",
                "the rule is suspended",
                "nothing, until a person resumes it",
                None,
                (f"`replica rule resume {rule.id}`"),
            )
        return "held", g.reason or "it waits for something outside", "it goes on by itself", g.not_before, ""
    if not g.writable:
        because = f": {g.closed_because}" if g.closed_because else ""
        since = f" since {when(g.closed_since)}" if g.closed_since else ""
        return (
            "held",
            f"writing is off at {g.target}{since}{because}",
            "it goes on when writing is on again",
            None,
            (HELPS["writing_off"]),
        )
    if g.holdup is not None:
        return "held", g.holdup.message, "it goes on by itself", g.holdup.next_at, g.holdup.hint
    if g.code is None:
        site = f"a worker of {g.target}"
        if ahead is None:
            return "queued", f"it waits for {site}", "the next free worker takes it", None, ""
        more = f"more than {QUEUE_MAX}" if ahead > QUEUE_MAX else str(ahead)
        before = f"{more} transfers go before it" if ahead else "nothing goes before it"
        return (
            "queued",
            f"it waits for {site}; {before}",
            "workers take the most urgent first, then the oldest",
            None,
            "",
        )
    tried = f" ({counted(g.attempts, 'attempt')} so far)" if g.attempts else ""
    hint = HELPS.get(g.code) or describe(classify(g.code))
    kind = "retrying" if g.attempts else "held"
    return kind, f"{g.reason or g.code}{tried}", "it is tried again by itself", g.not_before, hint


def _told_without_transfer(rule: wire.Rule, row: sa.Row[Any], g: Group) -> tuple[str, str, str, datetime | None, str]:
    if g.failed:
        here = [r for r in rule.reasons if r.endpoint == g.target and not _refuses(r)]
        message = "; ".join(dict.fromkeys(r.message for r in here)) or "its transfer failed or was cancelled"
        hint = "; ".join(dict.fromkeys(r.hint for r in here if r.hint))
        return "stuck", message, "it is tried again by itself", row.evaluate_at, hint
    return (
        "ordering",
        "its transfer has not been made yet",
        "it is made when the rule is looked at",
        row.evaluate_at,
        "",
    )


def _ahead(s: Session, queued: Sequence[Group]) -> dict[int, int]:
    """Target → how many transfers of the same site go before the first of these; above QUEUE_MAX: at least so many."""
    if not queued:
        return {}
    parts = []
    for group in queued:
        # The index ix_transfers_queue has it in this order, so no more than this is read.
        head = (
            sa.select(transfers.c.id, transfers.c.priority, transfers.c.not_before)
            .where(transfers.c.site_id == group.site_id, transfers.c.state == literal(TransferState.QUEUED))
            .order_by(transfers.c.priority.desc(), transfers.c.id)
            .limit(QUEUE_MAX + 1)
            .subquery(f"before_{group.target_id}")
        )
        before = sa.or_(
            head.c.priority > group.priority,
            sa.and_(head.c.priority == group.priority, head.c.id < (group.first_id or 0)),
        )
        parts.append(
            sa.select(sa.literal(group.target_id).label("target_id"), sa.func.count().label("ahead"))
            .select_from(head)
            .where(before, sa.or_(head.c.not_before.is_(None), head.c.not_before <= s.now))
        )
    return {row.target_id: row.ahead for row in s.execute(sa.union_all(*parts))}


def _open_units(s: Session, rule_id: int) -> dict[int, list[str]]:
    """Endpoint → some units that are not complete there."""
    place = sa.func.row_number().over(partition_by=locks.c.endpoint_id, order_by=locks.c.unit_id).label("place")
    numbered = (
        sa.select(locks.c.endpoint_id, locks.c.unit_id, place)
        .where(locks.c.rule_id == rule_id, locks.c.files_available < locks.c.files_total, locks.c.surplus.is_(False))
        .subquery("numbered")
    )
    rows = s.execute(
        sa.select(numbered.c.endpoint_id, numbered.c.unit_id)
        .where(numbered.c.place <= UNITS_MAX)
        .order_by(numbered.c.endpoint_id, numbered.c.unit_id)
    ).all()
    text = rule_views.did_texts(s, sorted({row.unit_id for row in rows}))
    found: dict[int, list[str]] = {}
    for row in rows:
        found.setdefault(row.endpoint_id, []).append(text[row.unit_id])
    return found


def when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
