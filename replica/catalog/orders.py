"""Orders: hand queued transfers to the workers of a site, and hear how they are doing.

Given     a site, from the worker's token, and how much it can take.
Returns   orders with a lease and an epoch; and, for heartbeats, which of them to stop.
Promises  only the site's own transfers; never one that another worker holds; the epoch goes up with every claim, so
          whoever lost a lease can change nothing any more. A claim is a fixed number of statements and reads the queue
          only as far as its limit, whatever the length of the queue. What is full, banned or has failed is passed over
          and stops nothing else. No limit on what is in flight is ever exceeded; activities get their shares.
Partner   rules.sources ranks the copies to read from, rules.lanes says who is next, rules.limits and rules.breakers who
          is not; replica.catalog.outcomes takes the reports.

The claims of one site wait for one another, so that each sees what the one before took; those of different sites only
where they share a limit, or an endpoint that is to be probed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import activities, guards, hops, lanes, limits, sites, traffic
from replica.catalog import breakers as breakers_
from replica.catalog import endpoints as endpoints_
from replica.catalog.breakers import Gate
from replica.catalog.bulk import Columns, columns_of, ids_of, rows_of
from replica.catalog.membership import Unguessed, any_of, dids_named, literal, walk_in_order
from replica.db.engine import Session
from replica.db.tables import (
    Instant,
    attempts,
    concurrency,
    dids,
    endpoints,
    files,
    reads,
    replicas,
    rules,
    scopes,
    transfers,
)
from replica.db.tables import breakers as breakers_table
from replica.db.tables import limits as limits_table
from rules import expressions
from rules.breakers import BreakerState
from rules.checksums import DIGITS
from rules.endpoints import Endpoint, Link
from rules.errors import ReplicaError
from rules.lanes import Heads, Lane
from rules.limits import SHARED, Room
from rules.names import Did
from rules.paths import is_injective, owners, path_for
from rules.shares import Shares
from rules.sources import UNUSED, Equals, Lately, Source, at_once, grades, in_order, why_first, why_none
from rules.states import TRANSFER_LEASED, Evidence, ReplicaState, TransferState

#: Sources listed in one order, best first.
SOURCES_MAX = 5
#: How long a transfer waits before somebody looks again whether it has a source. A new source ends the pause at once.
NO_SOURCE_SECONDS = 300
#: Of an activity so many times its share is read, and a few more: others may have less than theirs.
READ_AHEAD = 1.25
READ_MORE = 8


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
    damaged: bool  #: there were good bytes once
    path: str | None


@dataclass(slots=True)
class _World:
    """What a claim knows besides the transfers it took."""

    endpoint: dict[int, Endpoint]
    place: dict[int, sa.Row[Any]]
    links: dict[tuple[int, int], Link]
    room: Room
    #: (endpoint, direction) → whether it lets anything through; what is not there does
    breakers: dict[tuple[int, str], Gate]
    #: (endpoint, direction, transfer, epoch): who tries what has failed
    probes: list[tuple[int, str, int, int]] = field(default_factory=list)
    #: Transfers of which all this is known.
    looked_at: set[int] = field(default_factory=set)
    #: rule → account
    account: dict[int | None, int] = field(default_factory=dict)
    files: dict[int, _File] = field(default_factory=dict)
    #: file → endpoint → its replica
    replicas: dict[int, dict[int, _Copy]] = field(default_factory=dict)
    #: (transfer, source) → failures, and how many of them were the source's fault
    failures: dict[tuple[int, int], sa.Row[Any]] = field(default_factory=dict)
    #: Transfers that failed before.
    failed: set[int] = field(default_factory=set)
    #: rule → endpoints that it allows as sources
    allowed: dict[int, frozenset[int]] = field(default_factory=dict)
    #: file → where it is a step on its way, of files that rules allow to come from some endpoints only
    steps: dict[int, frozenset[int]] = field(default_factory=dict)
    #: transfer → the other file that lies where it would go
    taken: dict[int, Did] = field(default_factory=dict)
    #: (source, target) → what that link carried in the last hour; asked only where there is a choice
    lately: dict[tuple[int, int], Lately] = field(default_factory=dict)
    #: source → how many workers read there
    load: Counter[int] = field(default_factory=Counter)
    #: Most files of a claim are at the same endpoints: target and sources, verified or not → the sources, best first
    graded: dict[tuple[int, tuple[tuple[int, bool], ...]], tuple[Equals, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Sources for one order."""

    #: Those that are read, and counted; the first is the best.
    read: tuple[Source, ...] = ()
    #: To go on with, in their stead: nothing limits these.
    spare: tuple[Source, ...] = ()
    why: str | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(source.endpoint.id for source in self.read)


#: An order, and what it reads from.
_Given = tuple[wire.Order, _Chosen]


def claim(s: Session, site_id: int, claim: wire.Claim, *, lease_seconds: float) -> wire.Orders:
    """Take up to `limit` transfers of the site: activities by their shares, in each the most urgent first."""
    walk_in_order(s)
    lanes.let_in(s, site_id)
    orders: list[wire.Order] = []
    more = full = False
    if waiting := lanes.keys(s, site_id):
        held_off = _hold_off(s, site_id)
        room = limits.room(s) if held_off.limited else Room()
        breakers = breakers_.of_claims(s) if held_off.broken else {}
        place = {row.id: row for row in endpoints_.rows(s)}
        turns = activities.shares(s, site_id, {key.activity for key in waiting})
        open_ = [(key, most) for key in waiting if (most := _most(key, place, room, breakers)) != 0]
        full = len(open_) < len(waiting)
        if open_:
            read = lanes.heads(s, site_id, _windows(open_, turns, claim.limit + 1))
            world = _look(s, _likely(read, turns, room, claim), place, room, breakers)
            orders, more, held_up = _hand_out(s, claim, Heads(read, turns), world, lease_seconds)
            full = full or held_up
            activities.keep(s, site_id, turns)
        full = full and held_off.limited
    sites.seen(s, site_id)
    return wire.Orders(orders=orders, lease_seconds=lease_seconds, more=more, full=full)


@dataclass(frozen=True, slots=True)
class _HeldOff:
    limited: bool
    broken: bool


def _hold_off(s: Session, site_id: int) -> _HeldOff:
    """Other claims that could take the same, or exceed the same limits."""
    both = (limits_table, concurrency)
    limited = sa.or_(*(sa.exists(sa.select(1).select_from(table)) for table in both))
    shared = sa.or_(*(sa.exists().where(table.c.kind.in_(sorted(SHARED))) for table in both))
    broken = sa.exists().where(breakers_table.c.state != BreakerState.CLOSED.value)
    flags = sa.select(limited.label("limited"), shared.label("shared"), broken.label("broken"))
    guards.one_at_a_time(s, "claims", site_id)
    found = s.execute(flags).one()
    if found.shared:
        guards.one_at_a_time(s, "limits")
    if found.broken:
        breakers_.hold(s)
    return _HeldOff(bool(found.limited), bool(found.broken))


def _most(
    key: lanes.Key, place: dict[int, sa.Row[Any]], room: Room, breakers: dict[tuple[int, str], Gate]
) -> int | None:
    """How many of a lane can go at most; None: any number."""
    target = place[key.target_id]
    if not target.writable:
        return 0
    kind, _, of = key.waits_for.partition(":")
    gates = [breakers.get((key.target_id, "write"))]
    if kind == "read":
        gates.append(breakers.get((int(of), "read")))
    if Gate.SHUT in gates:
        return 0
    most = [room.files_left(("write", str(key.target_id))), room.files_left(("activity", key.activity))]
    if kind:
        most.append(room.files_left((kind, of)))
    if Gate.PROBE in gates:
        most.append(1)
    return min((each for each in most if each is not None), default=None)


def _windows(open_: list[tuple[lanes.Key, int | None]], turns: Shares, limit: int) -> list[tuple[lanes.Key, int]]:
    """How many of each lane are read: what its activity may get, shared among its lanes."""
    count = Counter(key.activity for key, _ in open_)
    whole = sum(turns.weight(activity) for activity in count)
    windows = []
    for key, most in open_:
        window = limit
        if len(count) > 1:
            window = min(window, math.ceil(READ_AHEAD * limit * turns.weight(key.activity) / whole) + READ_MORE)
        if count[key.activity] > 1:
            window = min(window, math.ceil(READ_AHEAD * window / count[key.activity]) + READ_MORE)
        windows.append((key, window if most is None else min(window, most)))
    return windows


def _likely(read: Sequence[Lane], turns: Shares, room: Room, claim: wire.Claim) -> list[sa.Row[Any]]:
    """What would go if all sources had room, and one more: of nothing else anything is asked."""
    trial = [Lane(lane.activity, lane.target_id, lane.waits_for, lane.rows, lane.cut) for lane in read]
    heads, room = Heads(trial, turns.copy()), room.copy()
    rows: list[sa.Row[Any]] = []
    left = claim.limit_bytes
    while len(rows) <= claim.limit and (left is None or left >= 0) and (lane := heads.next()) is not None:
        assert lane.head is not None
        _, _, size, row = lane.head
        keys = [("write", str(lane.target_id)), ("activity", lane.activity)]
        if room.first_to_refuse(keys, size) is not None:
            heads.held_up()
            continue
        room.take(keys, size)
        rows.append(row)
        left = None if left is None else left - size
        heads.took()
    return rows


def _hand_out(
    s: Session, claim: wire.Claim, heads: Heads, world: _World, lease_seconds: float
) -> tuple[list[wire.Order], bool, bool]:
    """What goes, whether more is waiting that could go, and whether something has no room."""
    given: list[_Given] = []
    impossible: list[tuple[int, str, str]] = []
    waits: list[tuple[int, str]] = []
    left = claim.limit_bytes
    more = full = False
    while (lane := heads.next()) is not None:
        assert lane.head is not None
        row = lane.head[3]
        if len(given) >= claim.limit or (left is not None and given and row.size_bytes > left):
            more = True
            break
        if _shut(lane, row, world):
            full = True
            heads.held_up()
            continue
        if row.id not in world.looked_at:  # others do not go that should have: the next claim looks at this one
            more = True
            break
        decided = _order(row, world)
        if isinstance(decided, str):
            impossible.append((row.id, _obstacle(row, world), decided))
            heads.passed()
            continue
        if isinstance(decided, _Waits):
            full = True
            if decided.key == lane.waits_for:
                heads.held_up()
            else:
                waits.append((row.id, decided.key))
                heads.passed()
            continue
        _take(row, decided[1].ids, world)
        given.append(decided)
        left = None if left is None else left - row.size_bytes
        heads.took()
    _lease(s, given, claim.worker, lease_seconds)
    _put_back(s, impossible)
    if any(code == hops.NO_LINK for _, code, _ in impossible):
        s.wake.add(hops.PASS)
    _send_to_lanes(s, waits)
    breakers_.probe(s, world.probes)
    return [order for order, _ in given], more or heads.stopped or bool(waits), full


def _shut(lane: Lane, row: sa.Row[Any], world: _World) -> bool:
    """Nothing of this lane can go any more, whatever its source."""
    if world.breakers.get((row.target_id, "write")) is Gate.SHUT:
        return True
    keys = [("write", str(row.target_id)), ("activity", lane.activity)]
    return world.room.first_to_refuse(keys, row.size_bytes) is not None


def _take(row: sa.Row[Any], source_ids: tuple[int, ...], world: _World) -> None:
    account_id = world.account.get(row.rule_id)
    world.room.take(limits.keys_of(row.target_id, source_ids, row.activity, account_id), row.size_bytes)
    world.load.update(source_ids)
    ends = [(row.target_id, "write"), *((source_id, "read") for source_id in source_ids)]
    for end in ends:
        if world.breakers.get(end) is Gate.PROBE:
            world.breakers[end] = Gate.SHUT
            world.probes.append((*end, row.id, row.epoch + 1))


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


def _look(
    s: Session,
    rows: Sequence[sa.Row[Any]],
    place: dict[int, sa.Row[Any]],
    room: Room,
    breakers: dict[tuple[int, str], Gate],
) -> _World:
    asked_by = sorted({row.rule_id for row in rows if row.rule_id is not None})
    asked = s.execute(
        sa.select(rules.c.id, rules.c.account_id, rules.c.source_expression).where(rules.c.id.in_(asked_by))
    )
    wishes = asked.all() if asked_by else []
    limited = [wish for wish in wishes if wish.source_expression is not None]
    known = endpoints_.values(s, place.values(), with_attributes=bool(limited))
    world = _World(
        endpoint={e.id: e for e in known},
        place=place,
        links=endpoints_.links(s),
        room=room,
        breakers=breakers,
        account={wish.id: wish.account_id for wish in wishes},
        looked_at={row.id for row in rows},
    )
    _look_at_files(s, rows, world)
    before = [row.id for row in rows if row.epoch]
    if before:
        _look_at_failures(s, before, world)
    _look_at_limits(limited, world)
    if limited:
        world.steps = hops.sources_of(s, (row.file_id for row in rows))
    _look_at_links(s, rows, world)
    world.taken = _taken(s, rows, world)
    return world


def _look_at_limits(limited: Sequence[sa.Row[Any]], world: _World) -> None:
    """Rules that do not allow every endpoint as a source."""
    for rule in limited:
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
            any_of(replicas.c.state, (ReplicaState.UNAVAILABLE, ReplicaState.BAD)),
            replicas.c.path,
        )
        .select_from(wanted)
        .join(replicas, replicas.c.file_id == wanted.c.id)
    )
    for file_id, endpoint_id, *copy in s.execute(copies):
        world.replicas.setdefault(file_id, {})[endpoint_id] = _Copy(*copy)


def _look_at_links(s: Session, rows: Sequence[sa.Row[Any]], world: _World) -> None:
    """Speed, failures and load, of which only a choice between several copies makes use."""

    def choice(row: sa.Row[Any]) -> bool:
        there = world.replicas.get(row.file_id, {})
        return sum(1 for endpoint_id, copy in there.items() if copy.good and endpoint_id != row.target_id) > 1

    targets = {row.target_id for row in rows if choice(row)}
    if targets:
        world.lately = traffic.lately(s, sorted(targets))
        world.load = limits.readers(s)


def _look_at_failures(s: Session, ids: Sequence[int], world: _World) -> None:
    """Of transfers that were claimed before: nobody else can have failed."""
    claimed = ids_of(s, "claimed", ids)
    failures = (
        sa.select(
            attempts.c.transfer_id,
            attempts.c.source_id,
            sa.func.sum(sa.case((attempts.c.side != "target", 1), else_=0)).label("failures"),
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


@dataclass(frozen=True, slots=True)
class _Waits:
    """For room under a limit, or for an endpoint that has failed."""

    key: str


def _order(row: sa.Row[Any], world: _World) -> _Given | _Waits | str:
    """The order for one transfer and the sources that it counts at; what it waits for; or why there is no source."""
    there = world.replicas.get(row.file_id, {})
    at_target = there.get(row.target_id)
    if at_target is None:
        return "its replica is not in the catalogue"  # cannot be; the next evaluation of its rule makes it
    target = world.endpoint[row.target_id]
    if at_target.deleting:
        return "it is being deleted there at this moment, and is copied again after that"
    if (other := world.taken.get(row.id)) is not None:
        return f"its path at {target.name} is that of {other}"
    account_id = world.account.get(row.rule_id)
    if account_id is not None and world.room.first_to_refuse([("account", str(account_id))], row.size_bytes):
        return _Waits(f"account:{account_id}")
    graded = _graded(row, target, world)
    if not graded and at_target.verified:
        known = _sources(row, target, world)
        return "; ".join(obstacle.message for obstacle in why_none(known, target, world.links))
    chosen = _with_room(row, graded, target, world)
    if isinstance(chosen, _Waits):
        return chosen
    return _written(row, there, chosen, world), chosen


def _with_room(row: sa.Row[Any], graded: tuple[Equals, ...], target: Endpoint, world: _World) -> _Chosen | _Waits:
    """The best source that has room; as many equally good ones as a large file is read from; and others to go on
    with, which no person limits. What adapts has room to spare for the rare order that goes on with another."""
    ranked = in_order(graded, world.load)
    read: list[Source] = []
    spare: list[Source] = []
    waits: str | None = None
    most = 1
    for source in ranked:
        id_ = source.endpoint.id
        gate = world.breakers.get((id_, "read"))
        keys = limits.source_keys(id_, row.target_id)
        refused = ("read", str(id_)) if gate is Gate.SHUT else world.room.first_to_refuse(keys, row.size_bytes)
        if refused is not None:
            waits = waits or ":".join(refused)
        elif gate is Gate.PROBE:
            return _Chosen((source,), (), f"{source.endpoint.name}: it failed before, and is tried again by this")
        elif not read:
            read.append(source)
            most = at_once(row.size_bytes, len(next(equals for equals in graded if source in equals)))
        elif len(read) < most and any(source in equals and read[0] in equals for equals in graded):
            read.append(source)
        elif not any(map(world.room.has_fixed_limit, keys)):
            spare.append(source)
    if not read:
        return _Chosen() if waits is None else _Waits(waits)
    return _Chosen(tuple(read), tuple(spare[: SOURCES_MAX - len(read)]), _why(ranked, read[0], target, world))


def _why(ranked: Sequence[Source], first: Source, target: Endpoint, world: _World) -> str:
    """Why this one is read first, though another may have been the best."""
    place = ranked.index(first)
    why = why_first(ranked[place:], target, world.links, world.load)
    return f"{why}; {ranked[0].endpoint.name} came before it, and is at a limit or failed" if place else why


def _written(row: sa.Row[Any], there: dict[int, _Copy], chosen: _Chosen, world: _World) -> wire.Order:
    file, place = world.files[row.file_id], world.place
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
        transfer=row.id,
        epoch=row.epoch + 1,
        did=str(did),
        size=row.size_bytes,
        checksums=file.checksums,
        target_endpoint=place[row.target_id].name,
        target_url=place[row.target_id].url,
        target_path=path_at(row.target_id),
        sources=[
            wire.OrderSource(
                endpoint=source.endpoint.name,
                url=place[source.endpoint.id].url,
                path=path_at(source.endpoint.id),
            )
            for source in (*chosen.read, *chosen.spare)
        ],
        attempt=row.attempts + 1,
        repair=there[row.target_id].damaged,
        sources_at_once=max(1, len(chosen.read)),
    )


def _graded(row: sa.Row[Any], target: Endpoint, world: _World) -> tuple[Equals, ...]:
    """The copies to read from, best first."""
    if row.id in world.failed or row.rule_id in world.allowed:
        return grades(_sources(row, target, world), target, world.links)
    there = world.replicas.get(row.file_id, {})
    key = (target.id, tuple((endpoint_id, copy.verified) for endpoint_id, copy in there.items() if copy.good))
    graded = world.graded.get(key)
    if graded is None:
        graded = grades(_sources(row, target, world), target, world.links)
        world.graded[key] = graded
    return graded


def _sources(row: sa.Row[Any], target: Endpoint, world: _World) -> list[Source]:
    allowed = None if row.rule_id is None else world.allowed.get(row.rule_id)
    if allowed is not None:
        allowed |= world.steps.get(row.file_id, frozenset())
    known = []
    for endpoint_id, copy in world.replicas.get(row.file_id, {}).items():
        if not copy.good or (allowed is not None and endpoint_id not in allowed):
            continue
        failed = world.failures.get((row.id, endpoint_id))
        known.append(
            Source(
                world.endpoint[endpoint_id],
                verified=copy.verified,
                suspicious=failed is not None and failed.own > 0,
                recent_failures=0 if failed is None else int(failed.failures),
                lately=world.lately.get((endpoint_id, target.id), UNUSED),
            )
        )
    return known


def _obstacle(row: sa.Row[Any], world: _World) -> str:
    at_target = world.replicas.get(row.file_id, {}).get(row.target_id)
    if at_target is not None and at_target.deleting:
        return "deletion_under_way"
    if row.id in world.taken:
        return "path_taken"
    target = world.endpoint[row.target_id]
    known = _sources(row, target, world)
    shut = {obstacle.code for obstacle in why_none(known, target, world.links)}
    return hops.NO_LINK if "link_not_allowed" in shut else "no_source"


def _lease(s: Session, given: Sequence[_Given], worker: str, lease_seconds: float) -> None:
    if not given:
        return
    columns: Columns = {"id": sa.BigInteger(), "reads_id": sa.BigInteger(), "why": sa.String()}
    values = (
        [order.transfer for order, _ in given],
        [next(iter(chosen.ids), None) for _, chosen in given],
        [None if chosen.why is None else chosen.why[:500] for _, chosen in given],
    )
    batch = columns_of(s, "leased", columns, values)
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
            waits_for="",
            reads_id=batch.c.reads_id,
            source_why=batch.c.why,
        )
    )
    others = [(order.transfer, order.epoch, id_) for order, chosen in given for id_ in chosen.ids[1:]]
    if others:
        _read_from_as_well(s, others)


def _read_from_as_well(s: Session, others: Sequence[tuple[int, int, int]]) -> None:
    """Count these sources too; what claims that are over had is forgotten on this occasion."""
    alive = sa.select(1).where(
        transfers.c.id == reads.c.transfer_id,
        transfers.c.epoch == reads.c.epoch,
        any_of(transfers.c.state, TRANSFER_LEASED),
    )
    s.execute(sa.delete(reads).where(sa.not_(sa.exists(alive))))
    columns: Columns = {name: sa.BigInteger() for name in ("transfer_id", "epoch", "source_id")}
    batch = rows_of(s, "read_as_well", columns, others)
    s.execute(reads.insert().from_select(list(columns), sa.select(batch)))


def _send_to_lanes(s: Session, waits: Sequence[tuple[int, str]]) -> None:
    """What was found to wait for something stands in the way of nothing else, and is looked at when that is there."""
    if waits:
        batch = rows_of(s, "waiting_for", {"id": sa.BigInteger(), "key": sa.String()}, waits)
        s.execute(transfers.update().where(transfers.c.id == batch.c.id).values(waits_for=batch.c.key))


def _put_back(s: Session, impossible: Sequence[tuple[int, str, str]]) -> None:
    if not impossible:
        return
    again = s.now + timedelta(seconds=NO_SOURCE_SECONDS)
    columns: Columns = {"id": sa.BigInteger(), "code": sa.String(), "reason": sa.String(), "not_before": Instant()}
    batch = rows_of(s, "put_back", columns, [(id_, code, reason[:2_000], again) for id_, code, reason in impossible])
    s.execute(
        transfers.update()
        .where(transfers.c.id == batch.c.id)
        .values(not_before=batch.c.not_before, reason_code=batch.c.code, reason=batch.c.reason, waits_for="")
    )
