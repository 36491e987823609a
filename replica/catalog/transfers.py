"""Transfers: one file, one target, one life.

Given     the id of a transfer, or what to list.
Returns   transfers as people see them; for workers, see replica.catalog.orders and .outcomes.
Promises  what has ended stays as it ended: trying again makes a new transfer. A person can stop and hurry, not decide
          what is wanted; that is what rules are for.
Partner   replica.api.transfers; the verbs of the site workers are gathered here, too.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import cursors, dids, guards, hops, provision, reasons, routes, sites
from replica.catalog.bulk import rows_of
from replica.catalog.holdups import Holdups
from replica.catalog.membership import Computed, any_of, closure_of, covering, files_of, units
from replica.catalog.orders import claim, heartbeat
from replica.catalog.outcomes import expire_leases, report
from replica.catalog.provision import PAIR
from replica.catalog.rule_states import settle
from replica.catalog.rule_transfers import SUSPENDED
from replica.db.engine import Session
from replica.db.tables import alias_of, attempts, contents, endpoints, locks, reads, replicas, scopes, transfers
from replica.db.tables import dids as dids_table
from replica.db.tables import rules as rules_table
from rules.errors import Invalid, NotFound, Refused
from rules.names import Did, shown
from rules.states import TRANSFER_LEASED, TRANSFER_TERMINAL, DidKind, Evidence, Grouping, ReplicaState, TransferState

__all__ = ["cancel", "claim", "expire_leases", "get", "heartbeat", "list_page", "report", "retry"]

_CANCELLED_HINT = "it is tried again later; to stop it for good, delete the rule that wants it"


def get(s: Session, transfer_id: int) -> wire.Transfer:
    row = s.execute(_select().where(transfers.c.id == transfer_id)).one_or_none()
    if row is None:
        raise _missing(transfer_id)
    told = _transfer(row, Holdups(s))
    told.also_from = _also_from(s, row)
    told.route = routes.of_transfer(s, row.id)
    told.step_for = routes.served_by(s, row.file_id, row.target_id)
    if row.state is TransferState.DONE:
        done = sa.select(attempts.c.bytes).where(attempts.c.transfer_id == transfer_id, attempts.c.outcome == "done")
        told.moved_bytes = s.execute(done).scalar()
    return told


def _also_from(s: Session, row: sa.Row[Any]) -> list[str]:
    if row.state not in TRANSFER_LEASED:
        return []
    query = (
        sa.select(endpoints.c.name)
        .join(reads, reads.c.source_id == endpoints.c.id)
        .where(reads.c.transfer_id == row.id, reads.c.epoch == row.epoch)
        .order_by(endpoints.c.name)
    )
    return list(s.execute(query).scalars())


def list_page(
    s: Session,
    *,
    state: str | None = None,
    rule: int | None = None,
    did: Did | None = None,
    site: str | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> wire.Page[wire.Transfer]:
    """Transfers by id. `rule`: for the copies that it locks, whoever asked for them first; `did`: of all its files."""
    query = _select().order_by(transfers.c.id).limit(cursors.check_limit(limit) + 1)
    if state is not None:
        if state.upper() not in TransferState.__members__:
            states = ", ".join(each.label for each in TransferState)
            raise Invalid(f"{shown(state)} is not a state of a transfer", hint=f"use one of {states}", field="state")
        query = query.where(transfers.c.state == TransferState[state.upper()])
    if rule is not None:
        if s.execute(sa.select(rules_table.c.id).where(rules_table.c.id == rule)).scalar() is None:
            raise NotFound(f"there is no rule {rule}", hint="`replica rule list` shows them", field="rule")
        query = query.where(_is_locked_by(rule))
    if did is not None:
        did_id, kind = dids.row_id(s, did)
        if kind is DidKind.FILE:
            query = query.where(transfers.c.file_id == did_id)
        else:
            held = files_of(units(closure_of(did_id), Grouping.DATASET).subquery("units"))
            query = query.where(transfers.c.file_id.in_(sa.select(held.c.file_id)))
    if site is not None:
        query = query.where(transfers.c.site_id == sites.site_id(s, site))
    if after := cursors.unpack(cursor):
        query = query.where(transfers.c.id > after[0])
    holdups = Holdups(s)
    return cursors.page(s.execute(query).all(), limit, lambda row: _transfer(row, holdups), lambda row: (row.id,))


def cancel(s: Session, transfer_id: int) -> wire.Transfer:
    """Stop a transfer; its worker hears of it with the next heartbeat. A rule that wants the copy asks anew later."""
    row = _hold(s, transfer_id)
    if row.state in TRANSFER_TERMINAL:
        raise Refused(f"transfer {transfer_id} has ended: it is {row.state.label}", hint="there is nothing to cancel")
    provision.cancel(s, transfers.c.id == transfer_id, "cancelled", "a person cancelled it")
    pair = rows_of(s, "cancelled", PAIR, [(row.file_id, row.target_id)])
    touched = provision.count_stuck(s, pair, 1)
    hops.not_coming(s, pair)
    s.wake.add(hops.PASS)
    message = f"transfer {transfer_id} was cancelled by a person"
    reasons.add(s, [reasons.Found(r, "cancelled", row.target_id, message, _CANCELLED_HINT, 1) for r in touched])
    settle(s, touched)
    return get(s, transfer_id)


def retry(s: Session, transfer_id: int) -> wire.Transfer:
    """Try now what has failed or was cancelled, by a new transfer; or end the pause of one that waits."""
    row = _hold(s, transfer_id)
    if row.state is TransferState.QUEUED:
        s.execute(
            transfers.update()
            .where(transfers.c.id == transfer_id)
            .values(not_before=None, reason_code=None, reason=None)
        )
        provision.wake_sites(s, {row.site_id})
        return get(s, transfer_id)
    if row.state is TransferState.DONE:
        raise Refused(f"transfer {transfer_id} is done", hint="there is nothing to try again")
    if row.state is TransferState.WAITING and row.reason_code == SUSPENDED:
        raise Refused(
            f"transfer {transfer_id} waits because its rule is suspended",
            hint="let the rule go on: `replica rule resume`",
        )
    if row.state not in TRANSFER_TERMINAL:
        raise Refused(f"transfer {transfer_id} is under way: it is {row.state.label}", hint="cancel it first")
    pair = rows_of(s, "retried", PAIR, [(row.file_id, row.target_id)])
    replica = s.execute(
        sa.select(replicas).where(replicas.c.file_id == row.file_id, replicas.c.endpoint_id == row.target_id)
    ).one_or_none()
    wanted_by = s.execute(sa.select(sa.func.min(covering(pair).c.rule_id))).scalar()
    if replica is not None and replica.state is ReplicaState.AVAILABLE:
        raise Refused(f"the file of transfer {transfer_id} is at the target", hint="there is nothing to try again")
    declared = replica is not None and replica.evidence is Evidence.DECLARED
    if wanted_by is None and not declared:
        raise Refused(f"no rule wants what transfer {transfer_id} was for", hint="add a rule")
    live = s.execute(
        sa.select(transfers.c.id).where(
            transfers.c.file_id == row.file_id,
            transfers.c.target_id == row.target_id,
            transfers.c.state.not_in(TRANSFER_TERMINAL),
        )
    ).scalar()
    if live is not None:
        raise Refused(f"transfer {live} is trying it again already", hint=f"look at it: `replica transfer show {live}`")
    guards.change_endpoints(s, [row.target_id])
    old = transfers.c
    wanted = (
        sa.select(
            old.file_id,
            old.target_id.label("endpoint_id"),
            old.size_bytes,
            sa.literal(wanted_by, sa.BigInteger()).label("rule_id"),
            old.priority,
            old.activity,
        )
        .where(old.id == transfer_id)
        .subquery("wanted")
    )
    settle(s, provision.provide_again(s, wanted))
    made = s.execute(
        sa.select(sa.func.max(transfers.c.id)).where(
            transfers.c.file_id == row.file_id, transfers.c.target_id == row.target_id
        )
    ).scalar_one()
    return get(s, made)


def _hold(s: Session, transfer_id: int) -> sa.Row[Any]:
    """The transfer, with everything held that its end changes, in the order of replica.catalog.guards."""
    query = sa.select(transfers).where(transfers.c.id == transfer_id)
    row = s.execute(query).one_or_none()
    if row is None:
        raise _missing(transfer_id)
    if not s.postgresql:
        return row
    pair = rows_of(s, "held_pair", PAIR, [(row.file_id, row.target_id)])
    guards.change_rules_covering(s, pair)
    guards.change_endpoints(s, [row.target_id])
    guards.change_replicas(s, pair)
    return s.execute(query.with_for_update(key_share=True)).one()


def _is_locked_by(rule_id: int) -> sa.ColumnElement[bool]:
    by_file = sa.select(1).where(
        locks.c.rule_id == rule_id, locks.c.unit_id == transfers.c.file_id, locks.c.endpoint_id == transfers.c.target_id
    )
    by_dataset = (
        sa.select(1)
        .select_from(contents)
        .join(locks, locks.c.unit_id == Computed(contents.c.parent_id))
        .where(
            contents.c.child_id == transfers.c.file_id,
            locks.c.rule_id == rule_id,
            locks.c.endpoint_id == transfers.c.target_id,
        )
    )
    return sa.or_(transfers.c.rule_id == rule_id, sa.exists(by_file), sa.exists(by_dataset))


#: Where a worker reads now; else where it was last tried.
_SOURCE_ID = sa.case((any_of(transfers.c.state, TRANSFER_LEASED), transfers.c.reads_id), else_=transfers.c.source_id)


def _select() -> sa.Select[Any]:
    source, target = alias_of(endpoints, "source"), alias_of(endpoints, "target")
    return (
        sa.select(
            transfers,
            dids_table.c.name.label("did_name"),
            scopes.c.name.label("did_scope"),
            source.c.name.label("source"),
            target.c.name.label("target"),
            target.c.writable.label("target_writable"),
        )
        .join_from(transfers, dids_table, dids_table.c.id == transfers.c.file_id)
        .join(scopes, scopes.c.id == dids_table.c.scope_id)
        .join(target, target.c.id == transfers.c.target_id)
        .outerjoin(source, source.c.id == _SOURCE_ID)
    )


def _transfer(row: sa.Row[Any], holdups: Holdups) -> wire.Transfer:
    reason, not_before = row.reason, row.not_before
    if row.state is TransferState.QUEUED and not_before is None:
        if not row.target_writable:
            reason = "writing is off at the target"
        elif (holdup := holdups.of(row.target_id, row.activity, row.waits_for)) is not None:
            reason, not_before = holdup.message, holdup.next_at
    return wire.Transfer(
        id=row.id,
        did=f"{row.did_scope}:{row.did_name}",
        source=row.source,
        target=row.target,
        state=row.state.label,
        attempts=row.attempts,
        priority=row.priority,
        activity=row.activity,
        bytes=row.size_bytes,
        bytes_done=row.bytes_done,
        reason=reason,
        created_at=row.created_at,
        not_before=not_before,
        finished_at=row.finished_at,
        source_why=row.source_why,
    )


def _missing(transfer_id: int) -> NotFound:
    return NotFound(f"there is no transfer {transfer_id}", hint="`replica transfer list` shows them", field="transfer")
