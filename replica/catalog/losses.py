"""Replicas that were believed to be good and are not there as they should be, as scans of endpoints find it.

Given     replicas, each with the generation that was looked at, what was seen, and since when that look holds.
Returns   which of them are bad now, and which of these were the last good copy.
Promises  only what is still available in that generation, and was not proven since: what somebody brought back
          meanwhile stays good. What then follows is what follows for every replica that is found bad.
Partner   replica.catalog.integrity, which alone declares; replica.catalog.scanning and .dark, of what a scan found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from replica.catalog import integrity
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.integrity import Declared, Doubt
from replica.catalog.membership import Unguessed, literal, of_pair, walk_by_index
from replica.catalog.provision import PAIR
from replica.catalog.rule_states import settle
from replica.db.engine import Session
from replica.db.tables import Instant, replicas
from rules.integrity import Why
from rules.states import ReplicaState


@dataclass(frozen=True, slots=True)
class Lost:
    file_id: int
    endpoint_id: int
    generation: int
    message: str


def declare(s: Session, lost: Sequence[Lost], *, looked_at: datetime) -> Declared:
    """Its own site found, more than once, that these bytes are not there. What was proven after `looked_at` is not
    meant."""
    doubts = _held(s, lost, looked_at)
    return integrity.declare_bad(s, doubts, why=Why.SCAN, proven=True, held=True)


def doubt(s: Session, lost: Sequence[Lost]) -> None:
    """These may be gone, by an act of ours: they are not taken for good any more, and a worker looks."""
    doubts = _held(s, lost, s.now)
    if doubts:
        integrity.suspect(s, doubts, why=Why.SCAN)
        settle(s, integrity.not_taken_for_good(s, [doubt.pair for doubt in doubts]))


def _held(s: Session, lost: Sequence[Lost], looked_at: datetime) -> list[Doubt]:
    """What is still as it was looked at, with all that follows from it held."""
    if not lost:
        return []
    walk_by_index(s)
    said = {(each.file_id, each.endpoint_id): each.message for each in lost}
    columns: Columns = {**PAIR, "generation": sa.Integer()}
    these = rows_of(s, "looked_at", columns, sorted((x.file_id, x.endpoint_id, x.generation) for x in lost))
    integrity.hold(s, these)
    query = (
        sa.select(replicas.c.file_id, replicas.c.endpoint_id)
        .select_from(these)
        .join(replicas, of_pair(these))
        .where(
            Unguessed(replicas.c.state == literal(ReplicaState.AVAILABLE)),
            Unguessed(replicas.c.generation == these.c.generation),
            Unguessed(replicas.c.verified_at <= sa.literal(looked_at, Instant())),
        )
    )
    return [Doubt(f, e, said[f, e]) for f, e in sorted((row.file_id, row.endpoint_id) for row in s.execute(query))]
