"""People, and workers of a site, say that replicas are bad, good or to be repaired; what is doubted, as they see it.

Given     DIDs and an endpoint, and who says it.
Returns   what became of it.
Promises  an administrator may, the worker of the endpoint's site, and who owns the file; everybody else is refused with
          the reason, and then nothing at all was done. *Good* takes back at once only what nobody has ever seen wrong
          and nobody has begun to rewrite; else a worker reads it first.
Partner   replica.catalog.integrity does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, cursors, integrity, provision, transfers
from replica.catalog import endpoints as endpoints_
from replica.catalog.bulk import Columns, insert, rows_of
from replica.catalog.integrity import Doubt, Pair
from replica.catalog.membership import Unguessed, dids_named, of_pair
from replica.catalog.provision import PAIR
from replica.catalog.removable import is_good_elsewhere
from replica.catalog.rule_states import settle
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import Instant, endpoints, files, replicas, scopes, suspects
from rules.errors import NotAllowed, NotFound, Refused
from rules.integrity import Why
from rules.names import Did
from rules.permissions import Actor, Role
from rules.states import DidKind, ReplicaState, TransferState

#: Of transfers that mend a copy which no rule asks for.
REPAIR = "repair"
_PRIORITY = 4


def declare_bad(s: Session, actor: Actor, said: wire.BadReplicas) -> wire.BadDeclared:
    """These replicas are bad, in somebody's word."""
    endpoint = endpoints_.row(s, said.endpoint)
    named = _named(s, said.dids)
    _demand(s, actor, endpoint, named)
    account_id = _account_id(s, actor)
    doubts = [Doubt(file_id, endpoint.id, said.reason) for file_id in sorted(named)]
    declared = integrity.declare_bad(s, doubts, why=Why.PERSON, proven=False, account_id=account_id)
    if declared.absent:
        raise Refused(
            f"{named[declared.absent[0][0]].did} has no copy at {said.endpoint} that could be bad; nothing was changed",
            hint="`replica locate` shows where its copies are",
            field="dids",
        )
    repairs = 0
    if said.repair:
        mendable = sorted({*declared.bad, *declared.known} - set(declared.last))
        repairs = _order(s, mendable, endpoint.site_id)
    return wire.BadDeclared(
        bad=len(declared.bad),
        known=len(declared.known),
        last_copies=[str(named[file_id].did) for file_id, _ in declared.last],
        repairs=repairs,
    )


def declare_good(s: Session, actor: Actor, said: wire.GoodReplicas) -> wire.GoodDeclared:
    """These replicas are not bad, in somebody's word: what a worker has seen wrong, one looks at again."""
    endpoint = endpoints_.row(s, said.endpoint)
    named = _named(s, said.dids)
    _demand(s, actor, endpoint, named)
    account_id = _account_id(s, actor)
    pairs = sorted((file_id, endpoint.id) for file_id in named)
    batch = rows_of(s, "said_good", PAIR, pairs)
    integrity.hold(s, batch)
    begun = tables.transfers
    # Since it was declared a worker may have begun to rewrite it, and moved its bytes away.
    rewritten = sa.select(1).where(
        begun.c.file_id == suspects.c.file_id,
        Unguessed(begun.c.target_id == suspects.c.endpoint_id),
        Unguessed(begun.c.epoch > 0),
        Unguessed(sa.or_(begun.c.finished_at.is_(None), begun.c.finished_at > suspects.c.since)),
    )
    query = (
        sa.select(
            replicas.c.file_id,
            replicas.c.endpoint_id,
            replicas.c.state,
            suspects.c.proven,
            suspects.c.was,
            sa.exists(rewritten).label("rewritten"),
        )
        .select_from(batch)
        .join(replicas, of_pair(batch))
        .outerjoin(
            suspects,
            sa.and_(suspects.c.file_id == replicas.c.file_id, suspects.c.endpoint_id == replicas.c.endpoint_id),
        )
    )
    there = {(row.file_id, row.endpoint_id): row for row in s.execute(query)}
    good: list[Pair] = []
    look: list[Pair] = []
    for pair in pairs:
        row = there.get(pair)
        if row is None or row.state not in (ReplicaState.BAD, ReplicaState.UNAVAILABLE, ReplicaState.AVAILABLE):
            raise Refused(
                f"{named[pair[0]].did} has no copy at {said.endpoint}; nothing was changed",
                hint="`replica locate` shows where its copies are",
                field="dids",
            )
        by_word = row.proven is False and row.was is ReplicaState.AVAILABLE and not row.rewritten
        if row.state is ReplicaState.BAD and by_word:
            good.append(pair)
        elif row.state is not ReplicaState.AVAILABLE or row.proven is not None:
            look.append(pair)
    integrity.taken_back(s, good, account_id)
    _have_looked_at(s, look, account_id)
    return wire.GoodDeclared(good=len(good), to_verify=len(look))


def repair(s: Session, actor: Actor, wish: wire.RepairWish) -> wire.Transfer:
    """Mend a replica that is bad or cannot be shown, from good copies, also where no rule asks for it. The transfer
    that does it."""
    endpoint = endpoints_.row(s, wish.endpoint)
    named = _named(s, [wish.did])
    _demand(s, actor, endpoint, named)
    (file_id,) = named
    batch = rows_of(s, "to_repair", PAIR, [(file_id, endpoint.id)])
    integrity.hold(s, batch)
    query = sa.select(replicas.c.state, is_good_elsewhere(doubted_too=True).label("curable"))
    row = s.execute(query.select_from(batch).join(replicas, of_pair(batch))).one_or_none()
    if row is None or row.state not in (ReplicaState.BAD, ReplicaState.UNAVAILABLE):
        state = "not there" if row is None else row.state.label
        raise Refused(
            f"{wish.did} at {wish.endpoint} is {state}: there is nothing to repair",
            hint="say that it is bad first: `replica bad`",
            field="did",
        )
    if not row.curable:
        raise Refused(
            f"there is no good copy of {wish.did} to repair it from",
            hint=integrity.LAST_COPY_HINT,
            field="did",
        )
    _order(s, [(file_id, endpoint.id)], endpoint.site_id)
    t = tables.transfers
    newest = sa.select(sa.func.max(t.c.id)).where(t.c.file_id == file_id, t.c.target_id == endpoint.id)
    return transfers.get(s, s.execute(newest).scalar_one())


def list_page(s: Session, *, endpoint: str | None, cursor: str | None, limit: int) -> wire.Page[wire.Suspect]:
    """What is doubted and what is bad, by the number of the file."""
    cursors.check_limit(limit)
    accounts_table = tables.accounts
    query = (
        sa.select(
            suspects,
            replicas.c.state,
            tables.dids.c.name.label("did_name"),
            scopes.c.name.label("scope"),
            endpoints.c.name.label("endpoint"),
            accounts_table.c.name.label("account"),
        )
        .join(replicas, of_pair(suspects))
        .join(tables.dids, tables.dids.c.id == suspects.c.file_id)
        .join(scopes, scopes.c.id == tables.dids.c.scope_id)
        .join(endpoints, endpoints.c.id == suspects.c.endpoint_id)
        .outerjoin(accounts_table, accounts_table.c.id == suspects.c.account_id)
        .order_by(suspects.c.file_id, suspects.c.endpoint_id)
        .limit(limit + 1)
    )
    if endpoint is not None:
        query = query.where(suspects.c.endpoint_id == endpoints_.row(s, endpoint).id)
    if after := cursors.unpack(cursor, 2):
        query = query.where(sa.tuple_(suspects.c.file_id, suspects.c.endpoint_id) > sa.tuple_(*after))
    rows = s.execute(query).all()
    return cursors.page(rows, limit, _suspect, lambda row: (row.file_id, row.endpoint_id))


def _suspect(row: sa.Row[Any]) -> wire.Suspect:
    return wire.Suspect(
        did=f"{row.scope}:{row.did_name}",
        endpoint=row.endpoint,
        state=row.state.label,
        why=row.why,
        message=row.message,
        proven=row.proven,
        account=row.account,
        since=row.since,
        due_at=row.due_at,
        attempts=row.attempts,
    )


# --- who may ----------------------------------------------------------------------------------------------------------


def _named(s: Session, texts: Sequence[str]) -> dict[int, sa.Row[Any]]:
    """File id → `did`, `account_id`, `owner`; NotFound naming the first that is no file."""
    given = [Did.parse(text) for text in dict.fromkeys(texts)]
    columns: Columns = {"scope": sa.String(), "name": sa.String()}
    batch = rows_of(s, "files_named", columns, [(did.scope, did.name) for did in given])
    there, walk = dids_named(s, batch)
    named = {
        (row.scope, row.name): row.id
        for row in s.execute(
            sa.select(batch.c.scope, batch.c.name, there.c.id)
            .select_from(walk)
            .where(there.c.kind == DidKind.FILE, there.c.deleted_at.is_(None))
        )
    }
    for did in given:
        if (did.scope, did.name) not in named:
            raise NotFound(f"there is no file {did}", hint="name files, not datasets", field="dids")
    ids = rows_of(s, "files_meant", {"id": sa.BigInteger()}, [(id_,) for id_ in sorted(named.values())])
    owners = (
        sa.select(
            tables.dids.c.id,
            (scopes.c.name + ":" + tables.dids.c.name).label("did"),
            tables.dids.c.account_id,
            scopes.c.account_id.label("scope_account_id"),
        )
        .select_from(ids)
        .join(tables.dids, tables.dids.c.id == ids.c.id)
        .join(scopes, scopes.c.id == tables.dids.c.scope_id)
    )
    return {row.id: row for row in s.execute(owners)}


def _demand(s: Session, actor: Actor, endpoint: sa.Row[Any], named: dict[int, sa.Row[Any]]) -> None:
    if actor.role is Role.ADMIN:
        return
    if actor.role is Role.SITE:
        if actor.site != endpoint.site:
            raise NotAllowed(
                f"{endpoint.name} is at {endpoint.site}; this token speaks for {actor.site} only",
                hint=f"ask the operators of {endpoint.site}, or an administrator",
            )
        return
    own = accounts.account_id(s, actor.account)
    for row in named.values():
        if own not in (row.account_id, row.scope_account_id):
            raise NotAllowed(
                f"{actor.account} does not own {row.did}, nor its scope",
                hint="its owner may, the worker of the endpoint's site, or an administrator; to have it looked at:"
                " `replica doubt`",
            )


def _account_id(s: Session, actor: Actor) -> int | None:
    return None if actor.role is Role.SITE else accounts.account_id(s, actor.account)


# --- orders -----------------------------------------------------------------------------------------------------------


def _have_looked_at(s: Session, pairs: Sequence[Pair], account_id: int | None) -> None:
    """By a worker of the site, now."""
    if not pairs:
        return
    columns: Columns = dict(PAIR)
    batch = rows_of(s, "looked_at", columns, sorted(pairs))
    now = sa.literal(s.now, Instant())
    values = {
        "file_id": batch.c.file_id,
        "endpoint_id": batch.c.endpoint_id,
        "why": sa.literal(Why.PERSON.value),
        "message": sa.literal("somebody said that it is good"),
        "account_id": sa.literal(account_id, sa.BigInteger()),
        "since": now,
        "due_at": now,
    }
    rows = sa.select(*values.values()).where(sa.true()).order_by(batch.c.file_id, batch.c.endpoint_id)
    made = insert(s, suspects).from_select([*values], rows)
    s.execute(
        made.on_conflict_do_update(
            index_elements=["file_id", "endpoint_id"],
            set_={"due_at": made.excluded.due_at, "why": made.excluded.why, "attempts": 0},
        )
    )
    integrity.wake_sites_of(s, {endpoint_id for _, endpoint_id in pairs})


def _order(s: Session, pairs: Sequence[Pair], site_id: int) -> int:
    """A transfer for each that has none under way; returns how many were made. The caller holds them."""
    if not pairs:
        return 0
    batch = rows_of(s, "mended", PAIR, sorted(pairs))
    settled = provision.try_again(s, batch)
    t = tables.transfers
    values: dict[str, Any] = {
        "file_id": batch.c.file_id,
        "target_id": batch.c.endpoint_id,
        "site_id": sa.literal(site_id, sa.BigInteger()),
        "state": sa.literal(TransferState.QUEUED, t.c.state.type),
        "priority": sa.literal(_PRIORITY),
        "activity": sa.literal(REPAIR),
        "size_bytes": files.c.size_bytes,
        "created_at": sa.literal(s.now, Instant()),
    }
    live = provision.is_live(batch.c.file_id, batch.c.endpoint_id)
    rows = (
        sa.select(*values.values())
        .select_from(batch)
        .join(files, files.c.did_id == batch.c.file_id)
        .where(sa.not_(live))
        .order_by(batch.c.file_id, batch.c.endpoint_id)
    )
    made = s.execute(insert(s, t).from_select([*values], rows).on_conflict_do_nothing().returning(t.c.id)).all()
    provision.wake_sites(s, {site_id})
    settle(s, settled)
    return len(made)
