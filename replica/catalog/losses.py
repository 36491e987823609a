"""Replicas that were believed to be good and are not: declared, and made anew where a rule wants them.

Given     replicas, each with the generation that was looked at, and since when that look holds.
Returns   which of them were declared, and which of these were the last good copy.
Promises  only what is still available in that generation, and was not proven since: what somebody brought back
          meanwhile stays good. Counters, rules and transfers follow in the same transaction. About fifteen statements
          for any number.
Partner   replica.catalog.scanning, of what a scan missed; the one seam between finding a loss and healing it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from replica.catalog import guards, outbox, provision
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.membership import Unguessed, covering, is_wished, literal, of_pair, walk_by_index
from replica.catalog.provision import PAIR
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session
from replica.db.tables import Instant, alias_of, dids, endpoints, files, replicas, rules, scopes
from rules.errors import Conflict
from rules.states import ReplicaState

#: File, endpoint, generation.
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Declared:
    pairs: Sequence[tuple[int, int]] = ()
    #: Of these: no other good copy is known.
    last: Sequence[tuple[int, int]] = ()


class _ItChanged(Exception):
    """A rule that was added meanwhile covers one of them, and is not held."""


def declare(s: Session, triples: Sequence[Triple], state: ReplicaState, *, looked_at: datetime) -> Declared:
    """`looked_at`: what was proven after that is not meant. BAD: its own site found that the bytes are not there."""
    if not triples:
        return Declared()
    walk_by_index(s)
    if not s.postgresql:
        return _declare(s, triples, state, looked_at)
    for _ in range(5):
        with contextlib.suppress(_ItChanged), s.savepoint():
            return _declare(s, triples, state, looked_at)
    raise Conflict("rules for these files are being added faster than they can be counted", hint="report again")


def _declare(s: Session, triples: Sequence[Triple], state: ReplicaState, looked_at: datetime) -> Declared:
    columns: Columns = {**PAIR, "generation": sa.Integer()}
    these = rows_of(s, "looked_at", columns, sorted(triples))
    held = guards.change_rules_covering(s, these)
    guards.change_endpoints(s, sorted({endpoint_id for _, endpoint_id, _ in triples}))
    guards.change_replicas(s, these)
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
    guilty = sorted((row.file_id, row.endpoint_id) for row in s.execute(query))
    if not guilty:
        return Declared()
    pairs = rows_of(s, "declared", PAIR, guilty)
    s.execute(replicas.update().where(of_pair(pairs)).values(state=state))
    touched = provision.count_available(s, pairs, -1)
    if s.postgresql and not set(touched) <= held:
        raise _ItChanged
    if provision.provide(s, _wanted(pairs), touched).left_stuck:
        look_soon(s, touched)
    settle(s, touched)
    last = _without_another(s, guilty)
    return Declared(guilty, last)


def _wanted(pairs: sa.FromClause) -> sa.Subquery:
    """What `provide` takes: the copies of these that a rule wishes."""
    cover = covering(pairs)
    return (
        sa.select(
            cover.c.file_id,
            cover.c.endpoint_id,
            sa.func.max(files.c.size_bytes).label("size_bytes"),
            sa.func.min(rules.c.id).label("rule_id"),
            sa.func.max(rules.c.priority).label("priority"),
            sa.func.min(rules.c.activity).label("activity"),
        )
        .join(files, files.c.did_id == cover.c.file_id)
        .join(rules, rules.c.id == cover.c.rule_id)
        .where(is_wished(cover.c.file_id, cover.c.endpoint_id))
        .group_by(cover.c.file_id, cover.c.endpoint_id)
        .subquery("wanted")
    )


def _without_another(s: Session, guilty: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Said loudly, one by one: of these files nothing good is left that anybody knows of."""
    pairs = rows_of(s, "maybe_last", PAIR, guilty)
    other = alias_of(replicas, "other")
    good = sa.select(1).where(
        other.c.file_id == pairs.c.file_id, Unguessed(other.c.state == literal(ReplicaState.AVAILABLE))
    )
    query = (
        sa.select(pairs.c.file_id, pairs.c.endpoint_id, scopes.c.name.label("scope"), dids.c.name, endpoints.c.name)
        .select_from(pairs)
        .join(dids, dids.c.id == pairs.c.file_id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
        .join(endpoints, endpoints.c.id == pairs.c.endpoint_id)
        .where(sa.not_(sa.exists(good)))
        .order_by(pairs.c.file_id)
    )
    last = []
    for file_id, endpoint_id, scope, name, endpoint in s.execute(query).all():
        outbox.record(s, "replica.lost", file_id, did=f"{scope}:{name}", endpoint=endpoint, last_copy=True)
        last.append((file_id, endpoint_id))
    return last
