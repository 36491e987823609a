"""Deletions: the decision that a copy shall go, written down before anybody touches its bytes.

Given     an endpoint that needs room or keeps nothing that nobody wants; or a person's wish, or second thoughts.
Returns   how many were decided on; or the deletion as people see it.
Promises  nothing that a rule protects, that is being read or that is the last good copy is chosen, whatever happens at
          the same moment: the endpoint and the files are held before they are looked at (replica.catalog.removable has
          the argument). Budgets and need are counted while the endpoint is held, so several passes together do not
          exceed them. Until its grace is over, and a worker has begun, each decision can be undone. About ten
          statements for any number of files.
Partner   rules.deletion decides; replica.catalog.removals hands the orders to site workers and hears of their end.

What a transfer that was stopped leaves at an endpoint keeps its replica row, and is cleared away as a leftover. Bytes
that no row speaks of are for scans to find.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import (
    accounts,
    cursors,
    dids,
    endpoints,
    guards,
    locks,
    outbox,
    provision,
    removable,
    revival,
    sites,
)
from replica.catalog.bulk import rows_of
from replica.catalog.membership import Unguessed, any_of, by_index, closure_of, files_of, literal, units
from replica.catalog.provision import PAIR, wake_sites
from replica.catalog.rule_states import settle
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import deletions, replicas, scopes
from rules.deletion import AT_ONCE, BUDGET_SECONDS, EXPLAINED, LEFTOVER_SECONDS, Place, Why, how_many
from rules.errors import Conflict, Invalid, NotFound, Refused
from rules.names import Did, shown
from rules.permissions import Actor
from rules.states import DELETION_TERMINAL, DeletionState, DidKind, Evidence, Grouping, ReplicaState

#: How many replicas one transaction looks at.
SLICE_FILES = 10_000
LIVE = tuple(state for state in DeletionState if state not in DELETION_TERMINAL)

#: A place in the order in which replicas go: tombstone and last access, as numbers, and the file.
Reached = tuple[int, int, int]

_SINCE = sa.type_coerce(replicas.c.tombstone_at, sa.BigInteger())
_ACCESSED = sa.func.coalesce(sa.type_coerce(replicas.c.accessed_at, sa.BigInteger()), sa.literal_column("0"))


@dataclass(frozen=True, slots=True)
class Decided:
    """What one look at an endpoint came to."""

    looked_at: int = 0
    files: int = 0
    bytes: int = 0
    #: Reason → how many were kept for it.
    kept: Counter[str] = field(default_factory=Counter)
    #: Where to go on looking; None: there is nothing more, or no need, or no budget left.
    reached: Reached | None = None


# --- by need --------------------------------------------------------------------------------------------------------


def endpoints_to_look_at(s: Session) -> list[int]:
    """Those where something could go now. Changes and holds nothing."""
    e = tables.endpoints
    here = replicas.c.endpoint_id == e.c.id
    released = sa.exists(
        sa.select(1).where(here, replicas.c.tombstone_at.is_not(None), replicas.c.tombstone_at <= s.now)
    )
    at_once = sa.exists(sa.select(1).where(here, replicas.c.tombstone_at == AT_ONCE))
    leftovers = sa.exists(_leftovers(s).where(here).correlate(e))
    query = sa.select(e, at_once.label("at_once"), leftovers.label("leftovers")).where(e.c.deletable, released)
    return [
        row.id
        for row in s.execute(query.order_by(e.c.id)).all()
        if row.at_once or row.leftovers or _place(s, row).why is not None
    ]


def decide(s: Session, endpoint_id: int, after: Reached | None = None, limit: int = SLICE_FILES) -> Decided:
    """Look at the next replicas there that nobody protects, the longest unprotected first, and mark what goes."""
    endpoint = _hold(s, endpoint_id)
    if not endpoint.deletable:
        return Decided()
    place = _place(s, endpoint)
    with by_index(s):
        window = _window(s, endpoint_id, place.why, after, limit)
        full = len(window) == limit
        if not full and place.why is None:
            window += _leftover_window(s, endpoint_id, limit)
        if not window:
            return Decided()
        judged = {it[0]: it for it in _judge(s, endpoint_id, window, place.why)}
        in_order = [judged[file_id] for file_id in window if file_id in judged]
        goes = [it for it in in_order if it[3] in _WHYS]
        allowed = how_many(place, place.why, [size for _, size, _, _ in goes])
        chosen, _ = _mark(s, endpoint, goes[:allowed])
    return Decided(
        looked_at=len(window),
        files=len(chosen),
        bytes=sum(size for _, size, _, _ in chosen),
        kept=Counter(verdict for _, _, _, verdict in in_order if verdict not in _WHYS),
        reached=_place_in_order(s, endpoint_id, window[-1]) if full and allowed == len(goes) else None,
    )


_WHYS = frozenset(why.value for why in Why)


def _hold(s: Session, endpoint_id: int) -> sa.Row[Any]:
    query = sa.select(tables.endpoints).where(tables.endpoints.c.id == endpoint_id)
    return s.execute(query.with_for_update(key_share=True) if s.postgresql else query).one()


def _place(s: Session, e: sa.Row[Any]) -> Place:
    """Counted only where it matters: most endpoints have neither a minimum nor a budget."""
    here = deletions.c.endpoint_id == e.id
    total, number = sa.func.coalesce(sa.func.sum(deletions.c.size_bytes), 0), sa.func.count()
    pending = spent_files = spent_bytes = 0
    if e.min_free_bytes is not None and not (e.draining or e.delete_at_once):
        pending = int(s.execute(sa.select(total).where(here, any_of(deletions.c.state, LIVE))).scalar_one())
    if e.budget_files is not None or e.budget_bytes is not None:
        since = s.now - timedelta(seconds=BUDGET_SECONDS)
        spent = sa.select(number, total).where(
            here, deletions.c.created_at > since, deletions.c.state != literal(DeletionState.UNDONE)
        )
        spent_files, spent_bytes = map(int, s.execute(spent).one())
    return Place(
        deletable=e.deletable,
        used_bytes=e.used_bytes,
        capacity_bytes=e.capacity_bytes,
        reported_free_bytes=e.reported_free_bytes,
        reported_at_used_bytes=e.reported_at_used_bytes,
        min_free_bytes=e.min_free_bytes,
        delete_at_once=e.delete_at_once,
        draining=e.draining,
        pending_bytes=pending,
        budget_files=e.budget_files,
        budget_bytes=e.budget_bytes,
        spent_files=spent_files,
        spent_bytes=spent_bytes,
    )


def _window(s: Session, endpoint_id: int, why: Why | None, after: Reached | None, limit: int) -> list[int]:
    """The next of them in their order; what is not for everything that nobody protects is for what goes at once."""
    order = (_SINCE, _ACCESSED, replicas.c.file_id)
    query = (
        sa.select(replicas.c.file_id)
        .where(
            replicas.c.endpoint_id == endpoint_id,
            replicas.c.tombstone_at.is_not(None),
            replicas.c.tombstone_at <= (AT_ONCE if why is None else s.now),
            Unguessed(replicas.c.state != literal(ReplicaState.DELETING)),
        )
        .order_by(*order)
        .limit(limit)
    )
    if after is not None:
        query = query.where(sa.tuple_(*order) > sa.tuple_(*(sa.literal(part, sa.BigInteger()) for part in after)))
    return list(s.execute(query).scalars().all())


def _place_in_order(s: Session, endpoint_id: int, file_id: int) -> Reached:
    this = replicas.c.file_id == file_id, replicas.c.endpoint_id == endpoint_id
    since, accessed = s.execute(sa.select(_SINCE, _ACCESSED).where(*this)).one()
    return since, accessed, file_id


def _leftovers(s: Session) -> sa.Select[Any]:
    return sa.select(sa.literal_column("1")).where(
        replicas.c.state == literal(ReplicaState.COPYING),
        replicas.c.tombstone_at.is_not(None),
        Unguessed(replicas.c.evidence.is_distinct_from(literal(Evidence.DECLARED))),
        Unguessed(replicas.c.tombstone_at.between(AT_ONCE, s.now - timedelta(seconds=LEFTOVER_SECONDS))),
    )


def _leftover_window(s: Session, endpoint_id: int, limit: int) -> list[int]:
    query = _leftovers(s).with_only_columns(replicas.c.file_id)
    # What goes at once was in the window before.
    later = replicas.c.tombstone_at > AT_ONCE
    return list(s.execute(query.where(replicas.c.endpoint_id == endpoint_id, later).limit(limit)).scalars().all())


#: A replica, and what is to become of it: file, bytes, its state, the verdict. Plain, for there are many.
_Judged = sa.Row[*tuple[Any, ...]]


def _judge(s: Session, endpoint_id: int, file_ids: Sequence[int], why: Why | None) -> Sequence[_Judged]:
    """The replicas of these files there. Files that somebody else holds are left out. `by_index`."""
    held = removable.hold_files(s, file_ids)
    if not held:
        return ()
    maybe = removable.possible(s, held, [endpoint_id])
    query = sa.select(
        replicas.c.file_id,
        _size_of_file(),
        sa.type_coerce(replicas.c.state, sa.SmallInteger()),
        removable.verdict(s.now, why, maybe),
    ).where(removable.one_of(s, replicas.c.file_id, held), Unguessed(replicas.c.endpoint_id == endpoint_id))
    return s.execute(query).all()


def _size_of_file() -> sa.ScalarSelect[int]:
    return sa.select(tables.files.c.size_bytes).where(tables.files.c.did_id == replicas.c.file_id).scalar_subquery()


def _mark(
    s: Session, endpoint: sa.Row[Any], judged: Sequence[_Judged], account_id: int | None = None
) -> tuple[Sequence[_Judged], int | None]:
    """Write down what shall go; the endpoint and the files are held. Returns what goes, and the first deletion's id.

    The replicas are held from here on: one that somebody has found damaged since it was judged is left for later. Two
    statements for each state and reason there are. `by_index`.
    """
    alike: dict[tuple[int, str], list[int]] = {}
    for file_id, _, was, verdict in judged:
        alike.setdefault((was, verdict), []).append(file_id)
    marked: list[int] = []
    for (was, why), file_ids in sorted(alike.items()):
        marked += _write_down(s, endpoint, file_ids, was, why, account_id)
    if not marked:
        return [], None
    chosen = judged
    if len(marked) < len(judged):
        still = set(marked)
        chosen = [it for it in judged if it[0] in still]
    first = s.execute(
        sa.select(deletions.c.id).where(
            deletions.c.file_id == min(marked),
            Unguessed(deletions.c.endpoint_id == endpoint.id),
            any_of(deletions.c.state, LIVE),
        )
    ).scalar_one()
    outbox.record(
        s,
        "deletion.decided",
        first,
        account_id,
        endpoint=endpoint.name,
        files=len(chosen),
        bytes=sum(size for _, size, _, _ in chosen),
        why=dict(Counter(verdict for _, _, _, verdict in chosen)),
    )
    if endpoint.grace_seconds == 0:
        wake_sites(s, {endpoint.site_id})
    return chosen, first


def _write_down(
    s: Session, endpoint: sa.Row[Any], file_ids: Sequence[int], was: int, why: str, account_id: int | None
) -> Sequence[int]:
    """The files of those of these replicas that still were in the state in which they were judged."""
    files = removable.among(s, file_ids)

    def these(state: sa.ColumnElement[bool]) -> tuple[sa.ColumnElement[bool], ...]:
        there = Unguessed(replicas.c.endpoint_id == endpoint.id)
        return files(replicas.c.file_id), there, Unguessed(state)

    as_judged = sa.type_coerce(replicas.c.state, sa.SmallInteger()) == was
    changed = s.execute(replicas.update().where(*these(as_judged)).values(state=ReplicaState.DELETING)).rowcount
    # Nobody else marks any here while the endpoint is held, and none was marked when they were judged.
    constants = {
        "endpoint_id": endpoint.id,
        "site_id": endpoint.site_id,
        "state": DeletionState.QUEUED,
        "was": ReplicaState(was),
        "why": why,
        "account_id": account_id,
        "not_before": s.now + timedelta(seconds=endpoint.grace_seconds),
        "created_at": s.now,
    }
    values = [sa.literal(value, deletions.c[name].type).label(name) for name, value in constants.items()]
    marked = (
        sa.select(replicas.c.file_id, replicas.c.generation, _size_of_file().label("size_bytes"), *values)
        .where(*these(replicas.c.state == literal(ReplicaState.DELETING)))
        .order_by(replicas.c.file_id)
    )
    made = deletions.insert().from_select(["file_id", "generation", "size_bytes", *constants], marked)
    s.execute(made)
    if changed == len(file_ids):
        return file_ids  # nearly always, and they need not be brought here
    return s.execute(marked.with_only_columns(replicas.c.file_id)).scalars().all()


# --- by hand --------------------------------------------------------------------------------------------------------


def ask(s: Session, actor: Actor, new: wire.NewDeletion) -> wire.Deletion:
    """Decide on one replica because a person wants it gone. Refused for every reason but that nothing needs room."""
    did = Did.parse(new.did)
    file_id, kind = dids.row_id(s, did)
    if kind is not DidKind.FILE:
        raise Invalid(f"{did} is a {kind.label}, not a file", hint="name one of its files", field="did")
    endpoint = _hold(s, endpoints.row(s, new.endpoint).id)
    held = replicas.c.file_id == file_id, replicas.c.endpoint_id == endpoint.id
    if s.execute(sa.select(replicas.c.file_id).where(*held)).one_or_none() is None:
        raise NotFound(
            f"{did} has no replica at {endpoint.name}", hint=f"look where it is: `replica locate {did}`", field="did"
        )
    why = Why.LAST_COPY if new.last_copy else Why.ASKED
    with by_index(s):
        found = _judge(s, endpoint.id, [file_id], why)
    if not found:
        raise Conflict(f"{did} is being changed at this moment", hint="repeat the request")
    ((_, size, _, verdict),) = found
    reason = "not_deletable" if not endpoint.deletable else verdict
    if reason not in _WHYS:
        message, hint = EXPLAINED[reason]
        raise Refused(f"{did} stays at {endpoint.name}: {message}", hint=hint)
    if how_many(_place(s, endpoint), why, [size]) == 0:
        raise Refused(
            f"what may be deleted at {endpoint.name} within an hour is used up",
            hint="wait, or raise the endpoint's budget",
        )
    with by_index(s):
        _, deletion_id = _mark(s, endpoint, found, accounts.account_id(s, actor.account))
    if deletion_id is None:
        raise Conflict(f"{did} is being changed at this moment", hint="repeat the request")
    return get(s, deletion_id)


def undo(s: Session, actor: Actor, deletion_id: int) -> wire.Deletion:
    """Take it back while no worker has claimed it. The replica is not chosen again until a rule lets go of it anew."""
    row = s.execute(sa.select(deletions).where(deletions.c.id == deletion_id)).one_or_none()
    if row is None:
        raise _missing(deletion_id)
    if row.state is not DeletionState.QUEUED:
        raise _too_late(row)
    _return(s, [(row.file_id, row.endpoint_id)], "a person took it back")
    now = s.execute(sa.select(deletions).where(deletions.c.id == deletion_id)).one()
    if now.state is not DeletionState.UNDONE:
        raise _too_late(now)
    outbox.record(s, "deletion.undone", deletion_id, accounts.account_id(s, actor.account))
    return get(s, deletion_id)


def _return(s: Session, pairs: list[tuple[int, int]], reason: str) -> int:
    """Hold what their return changes, in order, and take them back; returns how many are available by it."""
    batch = rows_of(s, "returning", PAIR, sorted(pairs))
    guards.change_rules_covering(s, batch)
    guards.change_endpoints(s, sorted({endpoint_id for _, endpoint_id in pairs}))
    guards.change_rules_that_came(s, batch)
    back = revival.take_back(s, sorted(pairs), reason)
    if back:
        available = rows_of(s, "back", PAIR, back)
        touched = provision.count_available(s, available, 1)
        locks.sources_appeared(s, available)
        locks.end_needless(s, available)
        settle(s, touched)
    return len(back)


# --- for people -----------------------------------------------------------------------------------------------------


def get(s: Session, deletion_id: int) -> wire.Deletion:
    row = s.execute(_select().where(deletions.c.id == deletion_id)).one_or_none()
    if row is None:
        raise _missing(deletion_id)
    return _deletion(row)


def list_page(
    s: Session,
    *,
    state: str | None = None,
    endpoint: str | None = None,
    did: Did | None = None,
    site: str | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.Deletion]:
    """Deletions by id. `did`: of all its files."""
    query = _select().order_by(deletions.c.id).limit(cursors.check_limit(limit) + 1)
    if state is not None:
        if state.upper() not in DeletionState.__members__:
            states = ", ".join(each.label for each in DeletionState)
            raise Invalid(f"{shown(state)} is not a state of a deletion", hint=f"use one of {states}", field="state")
        query = query.where(deletions.c.state == DeletionState[state.upper()])
    if endpoint is not None:
        query = query.where(deletions.c.endpoint_id == endpoints.row(s, endpoint).id)
    if site is not None:
        query = query.where(deletions.c.site_id == sites.site_id(s, site))
    if did is not None:
        did_id, kind = dids.row_id(s, did)
        if kind is DidKind.FILE:
            query = query.where(deletions.c.file_id == did_id)
        else:
            held = files_of(units(closure_of(did_id), Grouping.DATASET).subquery("units"))
            query = query.where(deletions.c.file_id.in_(sa.select(held.c.file_id)))
    if after := cursors.unpack(cursor):
        query = query.where(deletions.c.id > after[0])
    return cursors.page(s.execute(query).all(), limit, _deletion, lambda row: (row.id,))


def _select() -> sa.Select[Any]:
    d, e, a = tables.dids, tables.endpoints, tables.accounts
    return (
        sa.select(
            deletions,
            d.c.name.label("did_name"),
            scopes.c.name.label("did_scope"),
            e.c.name.label("endpoint"),
            tables.sites.c.name.label("site"),
            a.c.name.label("account"),
        )
        .join_from(deletions, d, d.c.id == deletions.c.file_id)
        .join(scopes, scopes.c.id == d.c.scope_id)
        .join(e, e.c.id == deletions.c.endpoint_id)
        .join(tables.sites, tables.sites.c.id == deletions.c.site_id)
        .outerjoin(a, a.c.id == deletions.c.account_id)
    )


def _deletion(row: sa.Row[Any]) -> wire.Deletion:
    return wire.Deletion(
        id=row.id,
        did=f"{row.did_scope}:{row.did_name}",
        endpoint=row.endpoint,
        site=row.site,
        state=row.state.label,
        why=row.why,
        bytes=row.size_bytes,
        generation=row.generation,
        attempts=row.attempts,
        account=row.account,
        reason=row.reason,
        created_at=row.created_at,
        not_before=row.not_before,
        finished_at=row.finished_at,
    )


def _too_late(row: sa.Row[Any]) -> Refused:
    if row.state is DeletionState.CLAIMED:
        return Refused(
            f"deletion {row.id} is under way: the bytes may be gone at any moment",
            hint="add a rule for the file there: it is copied again when the deletion has ended",
        )
    return Refused(f"deletion {row.id} has ended: it is {row.state.label}", hint="there is nothing to undo")


def _missing(deletion_id: int) -> NotFound:
    return NotFound(f"there is no deletion {deletion_id}", hint="`replica deletion list` shows them", field="deletion")
