"""Orders: hand queued transfers to the workers of a site, and hear how they are doing.

Given     a site, from the worker's token, and how much it can take.
Returns   orders with a lease and an epoch; and, for heartbeats, which of them to stop.
Promises  only the site's own transfers; never one that another worker holds; the epoch goes up with every claim, so
          whoever lost a lease can change nothing any more. A claim is a fixed number of statements and reads the queue
          only as far as its limit, whatever the length of the queue.
Partner   rules.sources ranks the copies to read from; replica.catalog.outcomes takes the reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import endpoints as endpoints_
from replica.catalog import sites
from replica.catalog.bulk import Columns, ids_of, rows_of
from replica.catalog.membership import Unguessed, any_of, dids_named, literal, walk_by_index
from replica.db.engine import Session
from replica.db.tables import Instant, alias_of, attempts, dids, endpoints, files, replicas, rules, scopes, transfers
from rules import expressions
from rules.checksums import DIGITS
from rules.endpoints import Endpoint, Link
from rules.errors import ReplicaError
from rules.names import Did
from rules.paths import is_injective, owners, path_for
from rules.sources import Source, rank, why_none
from rules.states import TRANSFER_LEASED, Evidence, ReplicaState, TransferState

#: Sources listed in one order, best first.
SOURCES_MAX = 5
#: How long a transfer waits before somebody looks again whether it has a source. A new source ends the pause at once.
NO_SOURCE_SECONDS = 300
#: How many transfers to endpoints that are not written to are put aside by one claim.
PUT_ASIDE_MAX = 1_000
PUT_ASIDE_SECONDS = 300


class _File(msgspec.Struct, gc=False):
    """What all copies of a file have in common. Thousands of these, and nothing for the garbage collector."""

    scope: str
    name: str
    checksums: dict[str, str]

    @property
    def did(self) -> Did:
        return Did(self.scope, self.name)


class _Copy(msgspec.Struct, gc=False):
    good: bool
    deleting: bool
    verified: bool  #: not merely declared
    path: str | None


@dataclass(slots=True)
class _World:
    """What a claim knows besides the transfers it took."""

    endpoint: dict[int, Endpoint]
    place: dict[int, sa.Row[Any]]
    links: dict[tuple[int, int], Link]
    files: dict[int, _File] = field(default_factory=dict)
    #: file → endpoint → its replica
    replicas: dict[int, dict[int, _Copy]] = field(default_factory=dict)
    #: (transfer, source) → failures, and how many of them were the source's fault
    failures: dict[tuple[int, int], sa.Row[Any]] = field(default_factory=dict)
    #: Transfers that failed before.
    failed: set[int] = field(default_factory=set)
    #: rule → endpoints that it allows as sources
    allowed: dict[int, frozenset[int]] = field(default_factory=dict)
    #: transfer → the other file that lies where it would go
    taken: dict[int, Did] = field(default_factory=dict)
    #: Most files of a claim are at the same endpoints: target and sources, verified or not → the sources, best first
    ranked: dict[tuple[int, tuple[tuple[int, bool], ...]], tuple[Source, ...]] = field(default_factory=dict)


def claim(s: Session, site_id: int, claim: wire.Claim, *, lease_seconds: float) -> wire.Orders:
    """Take up to `limit` transfers of the site, the most urgent first."""
    _put_aside(s, site_id)
    walk_by_index(s)
    rows, more = _take(s, site_id, claim)
    orders: list[wire.Order] = []
    if rows:
        world = _look(s, rows)
        impossible: list[tuple[int, str, str]] = []
        for row in rows:
            order = _order(row, world)
            if isinstance(order, str):
                impossible.append((row.id, _obstacle(row, world), order))
            else:
                orders.append(order)
        _lease(s, [order.transfer for order in orders], claim.worker, lease_seconds)
        _put_back(s, impossible)
    sites.seen(s, site_id)
    return wire.Orders(orders=orders, lease_seconds=lease_seconds, more=more)


def heartbeat(s: Session, site_id: int, beat: wire.Heartbeat, *, lease_seconds: float) -> wire.HeartbeatAnswer:
    """Renew the leases; what is not the worker's any more is to be stopped."""
    alive: set[int] = set()
    if beat.beats:
        columns = {
            "id": sa.BigInteger(),
            "epoch": sa.Integer(),
            "bytes_done": sa.BigInteger(),
            "phase": sa.SmallInteger(),
        }
        batch = rows_of(
            s,
            "beats",
            columns,
            sorted((b.transfer, b.epoch, b.bytes_done, TransferState[b.phase.upper()].value) for b in beat.beats),
        )
        held = (
            sa.select(transfers.c.id, batch.c.bytes_done, batch.c.phase)
            .join(batch, sa.and_(batch.c.id == transfers.c.id, batch.c.epoch == transfers.c.epoch))
            .where(Unguessed(transfers.c.site_id == site_id), Unguessed(any_of(transfers.c.state, TRANSFER_LEASED)))
            .order_by(transfers.c.id)
        )
        mine = (held.with_for_update(of=transfers, key_share=True) if s.postgresql else held).subquery("mine")
        state = sa.type_coerce(transfers.c.state, sa.SmallInteger())
        renewed = s.execute(
            transfers.update()
            .where(transfers.c.id == mine.c.id)
            .values(
                lease_until=s.now + timedelta(seconds=lease_seconds),
                bytes_done=mine.c.bytes_done,
                # Beats may overtake each other: a transfer never goes back.
                state=sa.case((mine.c.phase > state, mine.c.phase), else_=state),
            )
            .returning(transfers.c.id)
        )
        alive = {id_ for (id_,) in renewed}
    sites.seen(s, site_id)
    stop = [b.transfer for b in beat.beats if b.transfer not in alive]
    return wire.HeartbeatAnswer(lease_seconds=lease_seconds, stop=stop)


def _put_aside(s: Session, site_id: int) -> None:
    """What goes to an endpoint that is not written to now would only stand in the way of the rest."""
    closed = (
        sa.select(transfers.c.id)
        .join(endpoints, endpoints.c.id == transfers.c.target_id)
        .where(
            transfers.c.site_id == site_id,
            transfers.c.state == literal(TransferState.QUEUED),
            endpoints.c.site_id == site_id,
            endpoints.c.writable.is_(False),
            sa.or_(transfers.c.not_before.is_(None), transfers.c.not_before <= s.now),
        )
        .order_by(transfers.c.id)
        .limit(PUT_ASIDE_MAX)
    )
    held = closed.with_for_update(of=transfers, skip_locked=True, key_share=True) if s.postgresql else closed
    s.execute(
        transfers.update()
        .where(
            transfers.c.id.in_(held),
            sa.exists(sa.select(1).where(endpoints.c.site_id == site_id, endpoints.c.writable.is_(False))),
        )
        .values(
            not_before=s.now + timedelta(seconds=PUT_ASIDE_SECONDS),
            reason_code="writing_off",
            reason="writing is off at the target",
        )
    )


def queue(s: Session, site_id: int, limit: int) -> sa.Select[Any]:
    """The head of a site's queue. The index ix_transfers_queue has it in this order."""
    target = alias_of(endpoints, "target")
    query = (
        sa.select(
            transfers.c.id,
            transfers.c.epoch,
            transfers.c.file_id,
            transfers.c.target_id,
            transfers.c.rule_id,
            transfers.c.attempts,
            transfers.c.size_bytes,
        )
        .join(target, target.c.id == transfers.c.target_id)
        .where(
            transfers.c.site_id == site_id,
            transfers.c.state == literal(TransferState.QUEUED),
            target.c.writable,
            sa.or_(
                transfers.c.not_before.is_(None),
                transfers.c.not_before <= s.now,
                transfers.c.reason_code == "writing_off",  # it is on again
            ),
        )
        .order_by(transfers.c.priority.desc(), transfers.c.id)
        .limit(limit)
    )
    return query.with_for_update(of=transfers, skip_locked=True, key_share=True) if s.postgresql else query


def _take(s: Session, site_id: int, claim: wire.Claim) -> tuple[Sequence[sa.Row[Any]], bool]:
    rows = s.execute(queue(s, site_id, claim.limit + 1)).all()
    taken = 0
    room = claim.limit_bytes
    for row in rows[: claim.limit]:
        if room is not None:
            room -= row.size_bytes
            if room < 0 and taken:
                break
        taken += 1
    return rows[:taken], taken < len(rows)


def _look(s: Session, rows: Sequence[sa.Row[Any]]) -> _World:
    world = _World(
        endpoint={e.id: e for e in endpoints_.snapshot(s)},
        place={row.id: row for row in s.execute(sa.select(endpoints.c.id, endpoints.c.url, endpoints.c.layout))},
        links=endpoints_.links(s),
    )
    _look_at_files(s, rows, world)
    before = [row.id for row in rows if row.epoch]
    if before:
        _look_at_failures(s, before, world)
    if asked_by := sorted({row.rule_id for row in rows if row.rule_id is not None}):
        _look_at_limits(s, asked_by, world)
    world.taken = _taken(s, rows, world)
    return world


def _look_at_limits(s: Session, asked_by: Sequence[int], world: _World) -> None:
    """Rules that do not allow every endpoint as a source."""
    limits = sa.select(rules.c.id, rules.c.source_expression).where(
        rules.c.id.in_(asked_by), rules.c.source_expression.is_not(None)
    )
    for rule in s.execute(limits):
        try:
            chosen = expressions.select(rule.source_expression, world.endpoint.values())
        except ReplicaError:
            chosen = ()  # it selects nothing any more: then nothing is allowed
        world.allowed[rule.id] = frozenset(e.id for e in chosen)


def _look_at_files(s: Session, rows: Sequence[sa.Row[Any]], world: _World) -> None:
    wanted = ids_of(s, "files_claimed", sorted({row.file_id for row in rows}))
    named = (
        sa.select(wanted.c.id, scopes.c.name, dids.c.name, *(files.c[a] for a in DIGITS))
        .select_from(wanted)
        .join(dids, dids.c.id == wanted.c.id)
        .join(files, files.c.did_id == dids.c.id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
    )
    for file_id, scope, name, *values in s.execute(named):
        checksums = {a: value.hex() for a, value in zip(DIGITS, values, strict=True) if value is not None}
        world.files[file_id] = _File(scope, name, checksums)
    # Told by the database, so that no state need be made of each number.
    copies = (
        sa.select(
            replicas.c.file_id,
            replicas.c.endpoint_id,
            replicas.c.state == literal(ReplicaState.AVAILABLE),
            replicas.c.state == literal(ReplicaState.DELETING),
            replicas.c.evidence.is_distinct_from(literal(Evidence.DECLARED)),
            replicas.c.path,
        )
        .select_from(wanted)
        .join(replicas, replicas.c.file_id == wanted.c.id)
    )
    for file_id, endpoint_id, *copy in s.execute(copies):
        world.replicas.setdefault(file_id, {})[endpoint_id] = _Copy(*copy)


def _look_at_failures(s: Session, ids: Sequence[int], world: _World) -> None:
    """Of transfers that were claimed before: nobody else can have failed."""
    claimed = ids_of(s, "claimed", ids)
    failures = (
        sa.select(
            attempts.c.transfer_id,
            attempts.c.source_id,
            sa.func.count().label("failures"),
            sa.func.sum(sa.case((attempts.c.side == "source", 1), else_=0)).label("own"),
        )
        .join(claimed, claimed.c.id == attempts.c.transfer_id)
        .where(attempts.c.outcome == "failed", attempts.c.source_id.is_not(None))
        .group_by(attempts.c.transfer_id, attempts.c.source_id)
    )
    world.failures = {(row.transfer_id, row.source_id): row for row in s.execute(failures)}
    world.failed = {transfer_id for transfer_id, _ in world.failures}


def _taken(s: Session, rows: Sequence[sa.Row[Any]], world: _World) -> dict[int, Did]:
    """Transfers whose path at the target is another file's: its worker would take that for wrong bytes of its own and
    move it away. Registration refuses such a path, but did not know then what rules would bring there."""
    key: Columns = {name: sa.BigInteger() for name in ("id", "file_id", "endpoint_id")}
    where: list[tuple[int, int, int, str]] = []
    named: list[tuple[int, int, int, str, str]] = []
    with_paths = _with_paths(s, {row.target_id for row in rows})
    for row in rows:
        replica = world.replicas.get(row.file_id, {}).get(row.target_id)
        if replica is None:
            continue
        did = world.files[row.file_id].did
        layout = world.place[row.target_id].layout
        may_share = replica.path is not None or not is_injective(did, layout)
        if not may_share and row.target_id not in with_paths:
            continue
        path = path_for(did, layout) if replica.path is None else replica.path
        where.append((row.id, row.file_id, row.target_id, path))
        if may_share:
            others = [other for other in owners(path, layout) if other != did]
            named += [(row.id, row.file_id, row.target_id, other.scope, other.name) for other in others]
    if not where:
        return {}
    name = dids.c.name.label("name"), scopes.c.name.label("scope")
    batch = rows_of(s, "paths_claimed", {**key, "path": sa.String()}, where)
    taken = (
        sa.select(batch.c.id, *name)
        .select_from(batch)
        .join(replicas, sa.and_(replicas.c.endpoint_id == batch.c.endpoint_id, replicas.c.path == batch.c.path))
        .join(dids, dids.c.id == replicas.c.file_id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
        .where(replicas.c.file_id != batch.c.file_id)
    )
    found = {row.id: Did(row.scope, row.name) for row in s.execute(taken)}
    if named:  # where the layout gives one path to several names, which is rare, whoever was first has it
        rivals = rows_of(s, "names_claimed", {**key, "scope": sa.String(), "name": sa.String()}, named)
        other, walk = dids_named(s, rivals)
        shared = (
            sa.select(rivals.c.id, other.c.name, rivals.c.scope)
            .select_from(walk)
            .join(replicas, sa.and_(replicas.c.file_id == other.c.id, replicas.c.endpoint_id == rivals.c.endpoint_id))
            .where(
                replicas.c.path.is_(None),
                # What lies there, or waits to be cleared away: its deletion would take the other's bytes.
                sa.or_(
                    replicas.c.state != literal(ReplicaState.COPYING),
                    replicas.c.tombstone_at.is_not(None),
                    other.c.id < rivals.c.file_id,
                ),
            )
        )
        found |= {row.id: Did(row.scope, row.name) for row in s.execute(shared)}
    return found


def _with_paths(s: Session, endpoint_ids: set[int]) -> set[int]:
    """Those of these endpoints where some replica has a path of its own. Nowhere else can it be another file's, as
    long as the layout gives each name its own."""
    own = sa.select(1).where(replicas.c.endpoint_id == endpoints.c.id, replicas.c.path.is_not(None))
    return set(
        s.execute(sa.select(endpoints.c.id).where(endpoints.c.id.in_(sorted(endpoint_ids)), sa.exists(own))).scalars()
    )


def _order(row: sa.Row[Any], world: _World) -> wire.Order | str:
    """The order for one transfer, or why there is no source for it."""
    transfer_id, epoch, file_id, target_id, rule_id, tried, size = tuple(row)
    there = world.replicas.get(file_id, {})
    at_target = there.get(target_id)
    if at_target is None:
        return "its replica is not in the catalogue"  # cannot be; the next evaluation of its rule makes it
    target = world.endpoint[target_id]
    if at_target.deleting:
        return "it is being deleted there at this moment, and is copied again after that"
    if (other := world.taken.get(transfer_id)) is not None:
        return f"its path at {target.name} is that of {other}"
    ranked = _ranked(transfer_id, rule_id, target, there, world)
    if not ranked and at_target.verified:
        known = _sources(transfer_id, rule_id, there, world)
        return "; ".join(obstacle.message for obstacle in why_none(known, target, world.links))
    file, place = world.files[file_id], world.place
    did = file.did
    paths: dict[str, str] = {}

    def path_at(endpoint_id: int) -> str:
        if (own := there[endpoint_id].path) is not None:
            return own
        layout = place[endpoint_id].layout
        if layout not in paths:
            paths[layout] = path_for(did, layout)
        return paths[layout]

    return wire.Order(
        transfer=transfer_id,
        epoch=epoch + 1,
        did=str(did),
        size=size,
        checksums=file.checksums,
        target_endpoint=target.name,
        target_url=place[target_id].url,
        target_path=path_at(target_id),
        sources=[
            wire.OrderSource(
                endpoint=source.endpoint.name,
                url=place[source.endpoint.id].url,
                path=path_at(source.endpoint.id),
            )
            for source in ranked
        ],
        attempt=tried + 1,
    )


def _ranked(
    transfer_id: int, rule_id: int | None, target: Endpoint, there: dict[int, _Copy], world: _World
) -> tuple[Source, ...]:
    """The copies to read from, best first."""
    if transfer_id in world.failed or rule_id in world.allowed:
        return rank(_sources(transfer_id, rule_id, there, world), target, world.links)[:SOURCES_MAX]
    key = (target.id, tuple((endpoint_id, copy.verified) for endpoint_id, copy in there.items() if copy.good))
    ranked = world.ranked.get(key)
    if ranked is None:
        ranked = rank(_sources(transfer_id, rule_id, there, world), target, world.links)[:SOURCES_MAX]
        world.ranked[key] = ranked
    return ranked


def _sources(transfer_id: int, rule_id: int | None, there: dict[int, _Copy], world: _World) -> list[Source]:
    allowed = None if rule_id is None else world.allowed.get(rule_id)
    known = []
    for endpoint_id, copy in there.items():
        if not copy.good or (allowed is not None and endpoint_id not in allowed):
            continue
        failed = world.failures.get((transfer_id, endpoint_id))
        known.append(
            Source(
                world.endpoint[endpoint_id],
                verified=copy.verified,
                suspicious=failed is not None and failed.own > 0,
                recent_failures=0 if failed is None else failed.failures,
            )
        )
    return known


def _obstacle(row: sa.Row[Any], world: _World) -> str:
    at_target = world.replicas.get(row.file_id, {}).get(row.target_id)
    if at_target is not None and at_target.deleting:
        return "deletion_under_way"
    return "path_taken" if row.id in world.taken else "no_source"


def _lease(s: Session, ids: Sequence[int], worker: str, lease_seconds: float) -> None:
    if not ids:
        return
    batch = ids_of(s, "leased", ids)
    s.execute(
        transfers.update()
        .where(transfers.c.id == batch.c.id)
        .values(
            state=TransferState.CLAIMED,
            epoch=transfers.c.epoch + 1,
            attempts=transfers.c.attempts + 1,
            worker=worker[:128],
            lease_until=s.now + timedelta(seconds=lease_seconds),
            bytes_done=0,
            not_before=None,
            reason_code=None,
            reason=None,
        )
    )


def _put_back(s: Session, impossible: Sequence[tuple[int, str, str]]) -> None:
    if not impossible:
        return
    again = s.now + timedelta(seconds=NO_SOURCE_SECONDS)
    columns: Columns = {"id": sa.BigInteger(), "code": sa.String(), "reason": sa.String(), "not_before": Instant()}
    batch = rows_of(s, "put_back", columns, [(id_, code, reason[:2_000], again) for id_, code, reason in impossible])
    s.execute(
        transfers.update()
        .where(transfers.c.id == batch.c.id)
        .values(not_before=batch.c.not_before, reason_code=batch.c.code, reason=batch.c.reason)
    )
