"""Deletions that were decided and have not begun are taken back.

Given     replicas that somebody wants again: a new lock, or a person.
Returns   those that are available again, for the caller to count.
Promises  only what no worker has claimed; a replica is what it was when its deletion was decided, and has no tombstone.
          If a worker had it and did not give it back, the bytes may be gone: such a copy is not taken for good until
          somebody has looked. One statement where nothing waits to be deleted, about six otherwise.
Partner   replica.catalog.provision calls this before it makes what is missing; .deletions, when a person asks.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from replica.catalog import guards
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.membership import Unguessed, any_of, covering, literal, of_pair
from replica.db.engine import Session
from replica.db.tables import alias_of, deletions, replicas
from rules.errors import Conflict
from rules.states import DeletionState, ReplicaState

_PAIR: Columns = {"file_id": sa.BigInteger(), "endpoint_id": sa.BigInteger()}
_LIVE = (DeletionState.QUEUED, DeletionState.CLAIMED)
QUEUED = deletions.c.state == literal(DeletionState.QUEUED)


def revive(s: Session, wanted: sa.FromClause, held: Collection[int]) -> list[tuple[int, int]]:
    """What a new lock wants of `wanted` (file_id, endpoint_id); the caller holds the endpoints and the rules `held`,
    and all that cover such a replica when this returns.

    Conflict when somebody is changing another rule that wants it, too, and has not got to it: it is too late to wait.
    """
    if not s.execute(sa.select(sa.exists(sa.select(1).where(QUEUED)))).scalar_one():
        return []
    found = (
        sa.select(replicas.c.file_id, replicas.c.endpoint_id)
        .select_from(wanted)
        .join(replicas, of_pair(wanted))
        .where(Unguessed(replicas.c.state == literal(ReplicaState.DELETING)))
        .distinct()
    )
    pairs = sorted((row.file_id, row.endpoint_id) for row in s.execute(found))
    if not pairs:
        return []
    cover = covering(rows_of(s, "coming_back", _PAIR, pairs))
    query = sa.select(cover.c.rule_id).where(cover.c.rule_id.not_in(sorted(held))).distinct()
    others = set(s.execute(query).scalars())
    if others and not others <= guards.try_change_rules(s, sorted(others)):
        raise Conflict("another rule that wants these files is being changed", hint="repeat the request")
    return take_back(s, pairs, "a rule wants it again")


def take_back(
    s: Session, pairs: list[tuple[int, int]], reason: str, *, keep_tombstone: bool = False
) -> list[tuple[int, int]]:
    """Undo the deletions of these that are still queued; returns those that are available by it.

    The caller holds the endpoints and the rules that cover them, and counts.
    """
    if not pairs:
        return []
    batch = rows_of(s, "taken_back", _PAIR, pairs)
    guards.change_replicas(s, batch)
    undone = s.execute(
        deletions.update()
        .where(
            deletions.c.file_id == batch.c.file_id,
            Unguessed(deletions.c.endpoint_id == batch.c.endpoint_id),
            any_of(deletions.c.state, _LIVE),
            QUEUED,
        )
        .values(state=DeletionState.UNDONE, finished_at=s.now, reason=reason)
        .returning(deletions.c.file_id, deletions.c.endpoint_id, deletions.c.was, deletions.c.attempts)
    ).all()
    if not undone:
        return []
    columns: Columns = {**_PAIR, "was": sa.SmallInteger()}
    state = {(row.file_id, row.endpoint_id): _state_after(row.was, row.attempts) for row in undone}
    back = rows_of(s, "undone", columns, sorted((*pair, state.value) for pair, state in state.items()))
    values: dict[str, object] = {"state": back.c.was}
    if not keep_tombstone:
        # Nobody chooses it again by itself. What never was a copy stays marked, to be cleared away some day.
        never = back.c.was == literal(ReplicaState.COPYING)
        values["tombstone_at"] = sa.case((never, replicas.c.tombstone_at), else_=sa.null())
    s.execute(
        replicas.update()
        .where(of_pair(back), Unguessed(replicas.c.state == literal(ReplicaState.DELETING)))
        .values(values)
    )
    return sorted(pair for pair, state in state.items() if state is ReplicaState.AVAILABLE)


def _state_after(was: ReplicaState, attempts: int) -> ReplicaState:
    """An attempt that was not given back may have removed the bytes, whatever became of its worker."""
    return ReplicaState.UNAVAILABLE if attempts and was is ReplicaState.AVAILABLE else was


def next_generation(file_id: sa.ColumnElement[int], endpoint_id: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    """Of a replica that is made: above that of any whose deletion was ever decided at this place, so that no order to
    remove the old one can ever mean the new one."""
    gone = alias_of(deletions, "gone")
    last = sa.select(sa.func.max(gone.c.generation)).where(
        gone.c.file_id == file_id, Unguessed(gone.c.endpoint_id == endpoint_id)
    )
    return sa.func.coalesce(last.scalar_subquery(), 0) + 1
