"""Who waits for whom: row locks in one order, so that two transactions never wait for each other.

Given     the rows that a transaction is about to change, or whose state it is about to rely on.
Returns   nothing; on PostgreSQL the rows are locked until the transaction ends.
Promises  everybody locks in the order account → collection → rule → endpoint → replica → transfer, and by id within
          one kind. SQLite has one writer at a time and needs none of this.
Partner   replica.catalog.locks, .rules and .outcomes call these before they count.

Deletion stands between: rule → endpoint → file → replica → deletion → transfer, and never waits for a file (see
replica.catalog.removable).

What each lock protects:
    collection   shared: its files and datasets stay as they are (a new rule counts them); exclusive: they change
    rule         its locks, counters, state and reasons
    endpoint     which replica rows exist there and used_bytes, so that space is promised once; shared: they are counted
    ledger       of an account, after the endpoints: what its quotas leave; for who holds endpoints shared also its
                 usage, whose rows are written right before the commit, in order, and held for an instant
    replica      its state: whoever counted it as missing is told when it becomes available
    transfer     its state and epoch
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from replica.catalog.membership import Unguessed, closure, covering, literal, of_pair
from replica.db.engine import Session
from replica.db.tables import dids, endpoints, replicas, rules, transfers
from rules.errors import Conflict
from rules.states import DidKind, ReplicaState

#: Ids, or a query that selects them.
Ids = sa.Select[Any] | sa.CompoundSelect[Any] | Sequence[int]


def one_at_a_time(s: Session, *what: object) -> None:
    """Equal requests wait for one another: the second sees what the first did."""
    if s.postgresql:
        digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
        s.execute(sa.select(sa.func.pg_advisory_xact_lock(int.from_bytes(digest, "big", signed=True))))


def change_collection(s: Session, did_id: int) -> None:
    """Its contents are about to change, or were just changed in this transaction."""
    if s.postgresql:
        s.execute(sa.select(dids.c.id).where(dids.c.id == did_id).with_for_update(key_share=True)).all()


def change_collections(s: Session, did_ids: sa.Select[Any] | sa.CompoundSelect[Any]) -> None:
    if s.postgresql:
        query = sa.select(dids.c.id).where(dids.c.id.in_(did_ids)).order_by(dids.c.kind.desc(), dids.c.id)
        s.execute(query.with_for_update(key_share=True)).all()


def change_ledger(s: Session, account_id: int) -> None:
    """The account's usage and what its quotas leave: for who does not hold the endpoints alone. After the endpoints."""
    one_at_a_time(s, "usage", account_id)


def keep_collections(s: Session, did_ids: Iterable[int], *, nested: bool) -> None:
    """The contents of these, and if `nested` of all collections below, stay as they are until this transaction ends."""
    if not s.postgresql:
        return
    wanted: Any = sorted(did_ids)
    if nested:
        tree = closure(sa.select(sa.literal(0).label("tag"), dids.c.id).where(dids.c.id.in_(wanted)))
        wanted = sa.select(tree.c.id).where(tree.c.kind != literal(DidKind.FILE))
    # Containers before datasets, from above to below, as who attaches to a container holds them.
    downwards = sa.select(dids.c.id).where(dids.c.id.in_(wanted)).order_by(dids.c.kind.desc(), dids.c.id)
    query = downwards.with_for_update(read=True)
    held, found = -1, len(s.execute(query).all())
    while nested and found != held:
        # Having waited for a collection, there may be more in it: look again until nothing new appears.
        held, found = found, len(s.execute(query).all())


def change_rules(s: Session, rule_ids: Ids) -> set[int]:
    """The ids of those that are held now."""
    if not s.postgresql:
        return set()
    query = sa.select(rules.c.id).where(rules.c.id.in_(rule_ids)).order_by(rules.c.id)
    return set(s.execute(query.with_for_update(key_share=True)).scalars())


def try_change_rules(s: Session, rule_ids: Sequence[int]) -> set[int]:
    """Those of these rules that nobody else holds now; never waits."""
    query = sa.select(rules.c.id).where(rules.c.id.in_(rule_ids))
    locked = query.with_for_update(skip_locked=True, key_share=True) if s.postgresql else query
    return set(s.execute(locked).scalars())


def change_rules_covering(s: Session, pairs: sa.FromClause) -> set[int]:
    """The rules that protect any of these replicas: their counters are about to change."""
    return change_rules(s, sa.select(covering(pairs).c.rule_id))


def change_rules_that_came(s: Session, pairs: sa.FromClause) -> None:
    """The rules that protect these replicas, of which all but the newest are held. It is too late to wait for these.

    Conflict when somebody else holds one.
    """
    if s.postgresql:
        wanted = set(s.execute(sa.select(covering(pairs).c.rule_id).distinct()).scalars())
        if wanted and not wanted <= try_change_rules(s, sorted(wanted)):
            raise Conflict("a rule for these files was added at this moment", hint="repeat the request")


def change_endpoints(s: Session, endpoint_ids: Ids) -> None:
    if s.postgresql:
        query = sa.select(endpoints.c.id).where(endpoints.c.id.in_(endpoint_ids)).order_by(endpoints.c.id)
        s.execute(query.with_for_update(key_share=True)).all()


def keep_endpoints(s: Session, endpoint_ids: Sequence[int]) -> int:
    """Returns how many of them are in service, now that they stay as they are."""
    if not s.postgresql:
        return len(endpoint_ids)
    query = sa.select(endpoints.c.decommissioned_at).where(endpoints.c.id.in_(endpoint_ids)).order_by(endpoints.c.id)
    return sum(since is None for since in s.execute(query.with_for_update(read=True)).scalars())


def change_replicas(s: Session, pairs: sa.FromClause, *, missing: bool = False) -> None:
    """The replicas of these pairs; with `missing` only those that are not available."""
    if not s.postgresql:
        return
    rows = (
        sa.select(replicas.c.file_id)
        .select_from(pairs)
        .join(replicas, of_pair(pairs))
        .where(Unguessed(replicas.c.state != literal(ReplicaState.AVAILABLE)) if missing else sa.true())
        .order_by(replicas.c.file_id, replicas.c.endpoint_id)
        .with_for_update(of=replicas, key_share=True)
        .subquery()
    )
    # The rows stay in the database: only their number comes back.
    s.execute(sa.select(sa.func.count()).select_from(rows)).scalar_one()


def change_transfers(s: Session, *where: sa.ColumnElement[bool]) -> None:
    if not s.postgresql:
        return
    rows = sa.select(transfers.c.id).where(*where).order_by(transfers.c.id).with_for_update(key_share=True).subquery()
    s.execute(sa.select(sa.func.count()).select_from(rows)).scalar_one()
