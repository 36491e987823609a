"""Deleting DIDs, having them back, and what follows when nobody wants them back.

Given     names; or the clock.
Returns   how many were deleted, had back, or are gone for good.
Promises  what is deleted is not found any more, and goes on being protected by the rules it is under until it is final.
          Only then its rules end, it leaves its parents, and for a file the last copy may go. What is in a monotonic or
          closed collection is not deleted. Statements do not grow with the number of DIDs, but with their parents.
Partner   replica.catalog.removable asks whether a file is final; workers.expiry comes by.

Deleted and final are two instants of a DID: `deleted_at`, and `final_at`, which is in the future as long as there is a
way back, and NULL when all that follows is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import bulk, dids, outbox, removable, rules
from replica.catalog.membership import Unguessed, by_index, is_covered, literal
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import EPOCH, alias_of, contents, replicas
from rules.deletion import UNDELETE_SECONDS
from rules.errors import Invalid, Refused
from rules.names import Did
from rules.permissions import Actor
from rules.states import DidKind, RuleState

#: How many DIDs one transaction works on.
BATCH = 1_000
#: What cannot be deleted when its lifetime is over, because of where it is, is looked at again so much later.
POSTPONED = timedelta(days=1)

_d = tables.dids.c


def delete(
    s: Session, names: Sequence[Did], actor: Actor | None = None, *, undo_seconds: float = UNDELETE_SECONDS
) -> wire.Deleted:
    """Delete them all, or none. What is deleted already stays as it is."""
    _check_number(names)
    found = dids.resolve(s, names, deleted=True)
    rows = _hold(s, [id_ for id_, _ in found.values()])
    alive = {did: id_ for did, (id_, _) in found.items() if rows[id_].deleted_at is None}
    fixed = _fixed(s, list(alive.values()))
    dids.refuse(
        Refused,
        {did: f"{did} is in {fixed[id_]}" for did, id_ in alive.items() if id_ in fixed},
        "what that holds is fixed",
        "delete the collection in the same call, or reopen a closed one; out of a monotonic one nothing is ever taken",
    )
    final_at = s.now + timedelta(seconds=undo_seconds)
    _mark(s, list(alive.values()), deleted_at=s.now, final_at=final_at)
    account_id = dids.account_of(s, actor)
    for did, id_ in alive.items():
        outbox.record(s, "did.deleted", id_, account_id, did=str(did), final_at=final_at.isoformat())
    return wire.Deleted(deleted=len(alive), final_at=final_at)


def undelete(s: Session, names: Sequence[Did], actor: Actor | None = None) -> wire.Undeleted:
    """Have them all back, or none; what was not deleted stays as it is."""
    _check_number(names)
    found = dids.resolve(s, names, deleted=True)
    rows = _hold(s, [id_ for id_, _ in found.values()])
    gone = {did: id_ for did, (id_, _) in found.items() if rows[id_].deleted_at is not None}
    dids.refuse(
        Refused,
        {did: f"{did} is gone for good" for did, id_ in gone.items() if rows[id_].final_at is None},
        "",
        "use another name: a name stands for one content for ever",
    )
    lacking = _lacking(s, list(gone.values()))
    dids.refuse(
        Refused,
        {did: f"{did} holds {lacking[id_]}, which was deleted as well" for did, id_ in gone.items() if id_ in lacking},
        "what it holds is fixed",
        "have what it holds back in the same call",
    )
    # A lifetime that is over would delete it again.
    stays = sa.case((_d.expires_at <= s.now, None), else_=_d.expires_at)
    _mark(s, list(gone.values()), deleted_at=None, final_at=None, expires_at=stays)
    account_id = dids.account_of(s, actor)
    for did, id_ in gone.items():
        outbox.record(s, "did.undeleted", id_, account_id, did=str(did))
    return wire.Undeleted(undeleted=len(gone))


def expire_due(s: Session, *, undo_seconds: float = UNDELETE_SECONDS) -> int:
    """Delete what has lived its lifetime, as a person would; returns how many were due."""
    due = _held_due(s, _d.expires_at <= s.now, _d.deleted_at.is_(None))
    fixed = _fixed(s, [row.id for row in due])
    over = [row for row in due if row.id not in fixed]
    _mark(s, [row.id for row in over], deleted_at=s.now, final_at=s.now + timedelta(seconds=undo_seconds))
    _mark(s, list(fixed), expires_at=s.now + POSTPONED)
    for row in over:
        if row.kind is not DidKind.FILE:
            outbox.record(s, "did.expired", row.id)
    return len(due)


def finish_due(s: Session) -> int:
    """One step of what follows when there is no way back any more; returns 0 when there is nothing to do.

    Steps are short, so that nobody waits for them: one rule ends; or one parent lets go of what is final; or the copies
    of files without rules and parents are given up.
    """
    return _end_a_rule(s) or _leave_a_parent(s) or _give_up(s)


# --- one step -------------------------------------------------------------------------------------------------------


def _end_a_rule(s: Session) -> int:
    r = tables.rules.c
    due = (
        sa.select(tables.dids.c.id, r.id.label("rule_id"))
        .join_from(tables.dids, tables.rules, r.did_id == _d.id)
        .where(_d.final_at <= s.now, Unguessed(r.state != literal(RuleState.EXPIRED)))
        .order_by(_d.final_at, r.id)
        .limit(1)
    )
    with by_index(s):
        found = s.execute(due).one_or_none()
    # Held in the order of all: the DID, then its rule. Whoever had it back meanwhile keeps the rule.
    if found is None or not _hold_due(s, [found.id]):
        return 0
    if rules.hold(s, found.rule_id).state is not RuleState.EXPIRED:
        rules._end(s, found.rule_id, kind="rule.expired")
    return 1


def _leave_a_parent(s: Session) -> int:
    """Parents that are final themselves keep what they held, for their history."""
    parent = alias_of(tables.dids, "parent")
    held = (
        sa.select(contents.c.parent_id, contents.c.child_id)
        .select_from(tables.dids)
        .join(contents, contents.c.child_id == _d.id)
        .join(parent, parent.c.id == contents.c.parent_id)
        .where(
            _d.final_at <= s.now,
            sa.or_(parent.c.deleted_at.is_(None), parent.c.final_at > s.now),
        )
        .order_by(_d.final_at, contents.c.parent_id)
    )
    with by_index(s):
        first = s.execute(held.limit(1)).one_or_none()
        if first is None:
            return 0
        those = held.where(contents.c.parent_id == first.parent_id).limit(BATCH)
        children = [row.child_id for row in s.execute(those)]
    # From above to below, as everybody holds collections.
    _hold(s, [first.parent_id, *children])
    final = _hold_due(s, children)
    if not final:
        return 0
    detached = dids.detach_ids(s, first.parent_id, final)
    outbox.record(s, "did.detached", first.parent_id, detached=detached, deleted=True)
    return len(final)


def _give_up(s: Session) -> int:
    done = _held_due(s, _d.final_at <= s.now)
    batch = bulk.ids_of(s, "given_up", [row.id for row in done])
    unprotected = sa.not_(is_covered(replicas.c.file_id, replicas.c.endpoint_id))
    with by_index(s):
        s.execute(
            replicas.update()
            # What a worker may still publish was let go a moment ago, and goes when it cannot any more.
            .where(replicas.c.file_id.in_(sa.select(batch.c.id)), unprotected, sa.not_(removable.is_leftover()))
            .values(tombstone_at=EPOCH)
        )
    _mark(s, [row.id for row in done], final_at=None)
    return len(done)


# --- rows -----------------------------------------------------------------------------------------------------------


def _check_number(names: Sequence[Did]) -> None:
    if len(names) > wire.BULK_MAX:
        raise Invalid(f"{len(names)} are too many for one call", hint=f"at most {wire.BULK_MAX}", field="dids")


def _hold(s: Session, ids: Sequence[int]) -> dict[int, sa.Row[Any]]:
    """These DIDs as they are until the transaction ends: nothing is attached to them or takes them in meanwhile."""
    batch = bulk.ids_of(s, "held_dids", sorted(ids))
    query = (
        sa.select(_d.id, _d.kind, _d.deleted_at, _d.final_at)
        .join_from(batch, tables.dids, _d.id == batch.c.id)
        .order_by(_d.kind.desc(), _d.id)
    )
    return {row.id: row for row in s.execute(query.with_for_update(of=tables.dids) if s.postgresql else query)}


def _hold_due(s: Session, ids: Sequence[int]) -> list[int]:
    """Those of these that are due, now that nobody else can have them back."""
    now = s.now
    return [id_ for id_, row in _hold(s, ids).items() if row.final_at is not None and row.final_at <= now]


def _held_due(s: Session, when: sa.ColumnElement[bool], *where: sa.ColumnElement[bool]) -> Sequence[sa.Row[Any]]:
    """A batch of what is due and nobody else works on."""
    query = sa.select(_d.id, _d.kind).where(when, *where).order_by(_d.kind.desc(), _d.id).limit(BATCH)
    with by_index(s):
        return s.execute(query.with_for_update(skip_locked=True) if s.postgresql else query).all()


def _mark(s: Session, ids: Sequence[int], **values: Any) -> None:
    if ids:
        batch = bulk.ids_of(s, "marked_dids", ids)
        s.execute(tables.dids.update().where(_d.id.in_(sa.select(batch.c.id))).values(values))


def _fixed(s: Session, ids: Sequence[int]) -> dict[int, str]:
    """Of these, what is in a collection that stays and whose content is fixed: by id, which collection."""
    if not ids:
        return {}
    parent = alias_of(tables.dids, "parent")
    batch, going = bulk.ids_of(s, "leaving_dids", ids), bulk.ids_of(s, "going_dids", ids)
    query = (
        sa.select(contents.c.child_id, parent.c.monotonic, parent.c.kind, parent.c.name, tables.scopes.c.name)
        .select_from(batch)
        .join(contents, contents.c.child_id == batch.c.id)
        .join(parent, parent.c.id == contents.c.parent_id)
        .join(tables.scopes, tables.scopes.c.id == parent.c.scope_id)
        .where(
            parent.c.deleted_at.is_(None),
            sa.or_(parent.c.monotonic, sa.not_(parent.c.open)),
            parent.c.id.not_in(sa.select(going.c.id)),
        )
    )
    with by_index(s):
        return {
            child_id: f"the {'monotonic' if monotonic else 'closed'} {kind.label} {scope}:{name}"
            for child_id, monotonic, kind, name, scope in s.execute(query)
        }


def _lacking(s: Session, ids: Sequence[int]) -> dict[int, str]:
    """Of these collections, those whose content is fixed and partly deleted: by id, one that would be missing."""
    if not ids:
        return {}
    child, parent = alias_of(tables.dids, "child"), alias_of(tables.dids, "parent")
    batch, coming = bulk.ids_of(s, "returning_dids", ids), bulk.ids_of(s, "coming_dids", ids)
    query = (
        sa.select(parent.c.id, child.c.name, tables.scopes.c.name)
        .select_from(batch)
        .join(parent, parent.c.id == batch.c.id)
        .join(contents, contents.c.parent_id == parent.c.id)
        .join(child, child.c.id == contents.c.child_id)
        .join(tables.scopes, tables.scopes.c.id == child.c.scope_id)
        .where(
            sa.or_(parent.c.monotonic, sa.not_(parent.c.open)),
            child.c.deleted_at.is_not(None),
            child.c.id.not_in(sa.select(coming.c.id)),
        )
        .limit(dids.ITEMS_MAX)
    )
    with by_index(s):
        return {parent_id: f"{scope}:{name}" for parent_id, name, scope in s.execute(query)}
