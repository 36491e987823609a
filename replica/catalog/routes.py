"""Routes: the stored plans by which files come to targets that no copy of them may go to directly.

Given     transfers that were found to have no allowed link from any good copy.
Returns   how many were looked at; for people, the route of a transfer and where on it the file is.
Promises  one open route for a transfer at most. Its steps have replica rows, which book the space, from the moment it
          is made; only the first leg is ordered, each further one by the commit of the one before (see .hops).
          A step that fails, or can no longer be one, ends the route with the reason, and another way is looked for,
          which leaves it out for an hour. When the transfer has ended, however it did, what was made for the route
          goes: what was there before stays, and so does what a rule or another route wants.
Partner   rules.routes finds the way; workers.routes calls `close` and `plan`.

Held in the order of replica.catalog.guards: endpoints that may be steps, replicas, transfers; one pass at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import endpoints as endpoints_
from replica.catalog import guards, hops, locks, provision
from replica.catalog.bulk import Columns, ids_of, rows_of
from replica.catalog.hops import HOPS, NO_LINK, NO_ROUTE
from replica.catalog.membership import Unguessed, any_of, by_index, literal, of_pair
from replica.catalog.provision import IN_VAIN, LIVE, PAIR
from replica.db.engine import Session
from replica.db.tables import Instant, breakers, endpoints, replicas, route_hops, routes, rules, transfers
from rules import expressions
from rules.endpoints import Endpoint, Link
from rules.errors import ReplicaError
from rules.routes import Route, allowed, find, what_is_wrong, why_none
from rules.sources import Source
from rules.states import Evidence, ReplicaState, TransferState

#: Transfers that one transaction looks at.
SLICE = 1_000
#: Then it is looked again whether the way is still one, or there is one now.
RECHECK_SECONDS = 300
#: A step at which a route failed is left out so long.
LEFT_OUT_SECONDS = 3600


@dataclass(slots=True)
class _Copy:
    state: ReplicaState
    verified: bool
    declared: bool
    released: bool
    live: bool  #: a transfer to there has not ended
    open: bool  #: a step of some open route
    vain_at: datetime | None  #: when a transfer to there last ended in vain


@dataclass(slots=True)
class _Open:
    id: int
    source_id: int
    created_at: datetime
    hops: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _World:
    endpoint: dict[int, Endpoint]
    links: dict[tuple[int, int], Link]
    #: file → endpoint → its replica
    copies: dict[int, dict[int, _Copy]]
    #: transfer → its open route
    open: dict[int, _Open]
    #: transfer → steps at which routes of its failed lately
    failed: dict[int, set[int]]
    #: Endpoints that are left alone since they failed.
    shut: frozenset[int]
    free: dict[int, int]


@dataclass(slots=True)
class _Found:
    """What follows for all of them."""

    #: (transfer, code, reason): they wait
    wait: list[tuple[int, str, str]] = field(default_factory=list)
    #: They can be read directly.
    go: list[int] = field(default_factory=list)
    #: transfer → its new route
    new: dict[int, Route] = field(default_factory=dict)
    #: (file, endpoint) → the transfer for which a leg is ordered
    order: dict[tuple[int, int], sa.Row[Any]] = field(default_factory=dict)


# --- making -----------------------------------------------------------------------------------------------------------


def plan(s: Session) -> int:
    """Find ways for some of those that wait for one; returns for how many it looked."""
    waiting = sa.exists(sa.select(1).where(*_unrouted()))
    if not s.execute(sa.select(waiting)).scalar_one():
        return 0
    guards.one_at_a_time(s, "routes")
    rows = s.execute(
        sa.select(transfers, rules.c.source_expression)
        .outerjoin(rules, rules.c.id == transfers.c.rule_id)
        .where(*_unrouted())
        .order_by(transfers.c.id)
        .limit(SLICE)
    ).all()
    if not rows:
        return 0
    world = _look(s, rows)
    if wrong := _end_what_is_wrong(s, rows, world):
        world = _look(s, rows)
    steps = _steps_themselves(s, rows)
    found = _Found()
    for row in rows:
        if row.id in steps and row.id not in world.open:
            found.wait.append((row.id, "no_source", "no copy may go to this step of a route any more"))
        else:
            _decide(row, world, found, wrong.get(row.id, ""))
    _make(s, rows, world, found)
    _tell(s, found)
    if steps:
        hops.not_coming(s, rows_of(s, "closed_steps", PAIR, sorted(steps.values())))
    return len(rows)


def _unrouted() -> tuple[sa.ColumnElement[bool], ...]:
    return transfers.c.state == literal(TransferState.QUEUED), transfers.c.reason_code == sa.literal_column(
        f"'{NO_LINK}'"
    )


def _look(s: Session, rows: Sequence[sa.Row[Any]]) -> _World:
    """The endpoints that may be steps are held before anything is looked at."""
    ids = ids_of(s, "unrouted", [row.id for row in rows])
    open_ = _open_routes(s, ids)
    known = endpoints_.values(s, endpoints_.rows(s), with_attributes=True)
    could = {e.id for e in known if e.attributes.get("hop")} | {hop for route in open_.values() for hop in route.hops}
    guards.change_endpoints(s, sorted(could))
    now = endpoints_.values(s, endpoints_.rows(s), with_attributes=True)
    files = sorted({row.file_id for row in rows})
    failed: dict[int, set[int]] = {}
    since = s.now - timedelta(seconds=LEFT_OUT_SECONDS)
    lately = sa.select(routes.c.transfer_id, routes.c.failed_id).join(ids, ids.c.id == routes.c.transfer_id)
    for transfer_id, hop in s.execute(lately.where(routes.c.failed_id.is_not(None), routes.c.closed_at > since)):
        failed.setdefault(transfer_id, set()).add(hop)
    return _World(
        endpoint={e.id: e for e in now},
        links=endpoints_.links(s),
        copies=_copies(s, files),
        open=open_,
        failed=failed,
        shut=frozenset(s.execute(sa.select(breakers.c.endpoint_id).where(breakers.c.state != "closed")).scalars()),
        free={e.id: e.free_bytes for e in now if e.free_bytes is not None},
    )


def _open_routes(s: Session, ids: sa.FromClause) -> dict[int, _Open]:
    query = (
        sa.select(routes.c.transfer_id, routes.c.id, routes.c.source_id, routes.c.created_at, route_hops.c.endpoint_id)
        .join(ids, ids.c.id == routes.c.transfer_id)
        .join(route_hops, route_hops.c.route_id == routes.c.id)
        .where(routes.c.closed_at.is_(None))
        .order_by(routes.c.id, route_hops.c.place)
    )
    found: dict[int, _Open] = {}
    for transfer_id, route_id, source_id, created_at, hop in s.execute(query):
        found.setdefault(transfer_id, _Open(route_id, source_id, created_at)).hops.append(hop)
    return found


def _copies(s: Session, file_ids: Sequence[int]) -> dict[int, dict[int, _Copy]]:
    wanted = ids_of(s, "files_unrouted", file_ids)
    vain = (
        sa.select(sa.func.max(transfers.c.finished_at))
        .where(
            transfers.c.file_id == replicas.c.file_id,
            Unguessed(sa.and_(transfers.c.target_id == replicas.c.endpoint_id, any_of(transfers.c.state, IN_VAIN))),
        )
        .scalar_subquery()
    )
    query = sa.select(
        replicas.c.file_id,
        replicas.c.endpoint_id,
        replicas.c.state,
        replicas.c.evidence,
        replicas.c.tombstone_at,
        provision.is_live(replicas.c.file_id, replicas.c.endpoint_id).label("live"),
        hops.is_hop(replicas.c.file_id, replicas.c.endpoint_id).label("open"),
        sa.type_coerce(vain, Instant()).label("vain_at"),
    ).join(wanted, wanted.c.id == replicas.c.file_id)
    found: dict[int, dict[int, _Copy]] = {}
    with by_index(s):
        for row in s.execute(query):
            declared = row.evidence is Evidence.DECLARED
            verified = row.evidence is not None and not declared
            released = row.tombstone_at is not None
            found.setdefault(row.file_id, {})[row.endpoint_id] = _Copy(
                row.state, verified, declared, released, bool(row.live), bool(row.open), row.vain_at
            )
    return found


def _steps_themselves(s: Session, rows: Sequence[sa.Row[Any]]) -> dict[int, tuple[int, int]]:
    """Those of these transfers that bring a step of a route: no route is made for a leg."""
    batch = rows_of(s, "maybe_steps", {"id": sa.BigInteger(), **PAIR}, [(r.id, r.file_id, r.target_id) for r in rows])
    query = sa.select(batch.c.id, batch.c.file_id, batch.c.endpoint_id)
    with by_index(s):
        found = s.execute(query.where(hops.is_hop(batch.c.file_id, batch.c.endpoint_id))).all()
    return {id_: (file_id, endpoint_id) for id_, file_id, endpoint_id in found}


def _end_what_is_wrong(s: Session, rows: Sequence[sa.Row[Any]], world: _World) -> dict[int, str]:
    """Routes that cannot be gone to the end; returns why, by transfer. What was made for them is not there any more."""
    ended: list[tuple[int, str, str, int | None]] = []
    why: dict[int, str] = {}
    for row in rows:
        route = world.open.get(row.id)
        if route is not None:
            wrong, step = _what_is_wrong(route, world.copies.get(row.file_id, {}), world.endpoint[row.target_id], world)
            if wrong:
                ended.append((route.id, "failed", wrong, step))
                why[row.id] = f"{wrong}; "
    _close(s, ended)
    return why


def _decide(row: sa.Row[Any], world: _World, found: _Found, before: str) -> None:
    there = world.copies.get(row.file_id, {})
    target = world.endpoint[row.target_id]
    route = world.open.get(row.id)
    avoid = world.failed.get(row.id, set())
    if route is not None:
        _go_on(row, route, there, world, found)
        return
    sources = _sources(row, there, world)
    if any(allowed(world.links, source.endpoint, target) for source in sources):
        found.go.append(row.id)
        return
    steps = [e for e in world.endpoint.values() if e.id not in avoid and _may_take(e.id, there, world)]
    free = {id_: size for id_, size in world.free.items() if id_ not in there}  # what has a row is booked already
    way = find(sources, target, steps, world.links, row.size_bytes, free)
    if way is None:
        left_out = ", ".join(sorted(world.endpoint[id_].name for id_ in avoid))
        because = f"; {left_out} failed and {'is' if len(avoid) == 1 else 'are'} left out for a time" if avoid else ""
        reason = f"no copy may go to {target.name} directly, and {why_none(sources, target, steps)}{because}"
        found.wait.append((row.id, NO_ROUTE, before + reason))
        return
    found.new[row.id] = way
    for hop in way.hops:
        if hop.id not in there:
            there[hop.id] = _Copy(ReplicaState.COPYING, False, False, False, False, True, None)
            found.order.setdefault((row.file_id, -hop.id), row)  # its replica is to be made
            if hop.id in world.free:
                world.free[hop.id] -= row.size_bytes
    if there[way.hops[0].id].state is not ReplicaState.AVAILABLE:
        found.order.setdefault((row.file_id, way.hops[0].id), row)
    names = " and ".join(hop.name for hop in way.hops)
    told = f"{before}it comes from {way.source.name} over {names}, since it may not go to {target.name} directly"
    found.wait.append((row.id, HOPS, told))


def _sources(row: sa.Row[Any], there: Mapping[int, _Copy], world: _World) -> list[Source]:
    only: frozenset[int] | None = None
    if row.source_expression is not None:
        try:
            chosen = expressions.select(row.source_expression, world.endpoint.values())
        except ReplicaError:
            chosen = ()
        only = frozenset(e.id for e in chosen)
    return [
        Source(world.endpoint[id_], verified=copy.verified)
        for id_, copy in sorted(there.items())
        if copy.state is ReplicaState.AVAILABLE
        and id_ != row.target_id
        and world.endpoint[id_].readable
        and (only is None or id_ in only or copy.open)
    ]


def _may_take(endpoint_id: int, there: Mapping[int, _Copy], world: _World) -> bool:
    """Whether the file can come to there as a step, as far as what is there already is concerned."""
    if endpoint_id in world.shut:
        return False
    copy = there.get(endpoint_id)
    if copy is None:
        return True
    leftover = copy.released and not copy.declared
    return copy.state is ReplicaState.COPYING and (copy.open or copy.live or leftover)


def _next(route: _Open, there: Mapping[int, _Copy]) -> tuple[int, list[int]]:
    """Where the file is by now, and the steps still before it."""
    at, rest = route.source_id, route.hops
    for place, hop in enumerate(route.hops):
        copy = there.get(hop)
        if copy is not None and copy.state is ReplicaState.AVAILABLE:
            at, rest = hop, route.hops[place + 1 :]
    return at, rest


def _what_is_wrong(route: _Open, there: Mapping[int, _Copy], target: Endpoint, world: _World) -> tuple[str, int | None]:
    """Why the rest of the route cannot be gone, and the step that is to blame."""
    at, rest = _next(route, there)
    begun = at != route.source_id
    steps = [world.endpoint[id_] for id_ in rest]
    if wrong := what_is_wrong(world.endpoint[at] if begun else None, steps, target, world.links):
        return wrong, None
    if not rest:
        return "", None
    step, copy = steps[0], there.get(rest[0])
    if not begun and not any(
        copy.state is ReplicaState.AVAILABLE
        and world.endpoint[id_].readable
        and allowed(world.links, world.endpoint[id_], step)
        for id_, copy in there.items()
    ):
        return f"no copy may go to {step.name} any more", None
    if copy is None or copy.state is not ReplicaState.COPYING:
        return f"the copy at {step.name} is not to be had", None
    if step.id in world.shut and not copy.live:
        return f"{step.name} is left alone since it failed", None
    if not copy.live and copy.vain_at is not None and copy.vain_at >= route.created_at:
        return f"the transfer to {step.name} failed or was cancelled", step.id
    return "", None


def _go_on(row: sa.Row[Any], route: _Open, there: Mapping[int, _Copy], world: _World, found: _Found) -> None:
    at, rest = _next(route, there)
    if not rest:
        found.go.append(row.id)
        return
    if not there[rest[0]].live:
        found.order.setdefault((row.file_id, rest[0]), row)
    names = " and ".join(world.endpoint[id_].name for id_ in route.hops)
    source, target = world.endpoint[route.source_id].name, world.endpoint[row.target_id].name
    told = f"it comes from {source} over {names}, since it may not go to {target} directly"
    where = f"; it is at {world.endpoint[at].name}" if at != route.source_id else ""
    found.wait.append((row.id, HOPS, told + where))


def _make(s: Session, rows: Sequence[sa.Row[Any]], world: _World, found: _Found) -> None:
    new = {pair: row for pair, row in found.order.items() if pair[1] < 0}
    made = {(file_id, -negative) for file_id, negative in new}
    columns: Columns = {
        **PAIR,
        "size_bytes": sa.BigInteger(),
        "rule_id": sa.BigInteger(),
        "priority": sa.SmallInteger(),
        "activity": sa.String(),
    }

    def wanted(name: str, pairs: Mapping[tuple[int, int], sa.Row[Any]]) -> sa.FromClause:
        values = [(*pair, r.size_bytes, r.rule_id, r.priority, r.activity) for pair, r in sorted(pairs.items())]
        return rows_of(s, name, columns, values)

    if made:
        provision.reserve(s, wanted("steps_made", {(f, -e): row for (f, e), row in new.items()}))
    if found.new:
        leftovers = _take_leftovers(s, rows, found)
        _write(s, rows, found, made | leftovers)
    legs = {pair: row for pair, row in found.order.items() if pair[1] > 0}
    if legs:
        provision.order(s, wanted("legs", legs))


def _take_leftovers(s: Session, rows: Sequence[sa.Row[Any]], found: _Found) -> set[tuple[int, int]]:
    """What transfers that were stopped left at steps is nobody's: it is a step now, and goes with the route."""
    pairs = sorted({(row.file_id, hop.id) for row in rows if row.id in found.new for hop in found.new[row.id].hops})
    batch = rows_of(s, "steps", PAIR, pairs)
    taken = s.execute(
        replicas.update()
        .where(
            of_pair(batch),
            Unguessed(replicas.c.state == literal(ReplicaState.COPYING)),
            Unguessed(replicas.c.tombstone_at.is_not(None)),
            Unguessed(replicas.c.evidence.is_distinct_from(literal(Evidence.DECLARED))),
        )
        .values(tombstone_at=None)
        .returning(replicas.c.file_id, replicas.c.endpoint_id)
    )
    return {(file_id, endpoint_id) for file_id, endpoint_id in taken}


def _write(s: Session, rows: Sequence[sa.Row[Any]], found: _Found, made: set[tuple[int, int]]) -> None:
    columns: Columns = {name: sa.BigInteger() for name in ("transfer_id", "file_id", "target_id", "source_id")}
    mine = [row for row in rows if row.id in found.new]
    values = [(row.id, row.file_id, row.target_id, found.new[row.id].source.id) for row in mine]
    batch = rows_of(s, "new_routes", columns, values)
    inserted = s.execute(
        routes.insert()
        .from_select([*columns, "created_at"], sa.select(batch, sa.literal(s.now, Instant())))
        .returning(routes.c.id, routes.c.transfer_id)
    )
    number = {transfer_id: id_ for id_, transfer_id in inserted}
    steps: Columns = {
        "route_id": sa.BigInteger(),
        "place": sa.SmallInteger(),
        **PAIR,
        "made": sa.Boolean(),
    }
    every = [
        (number[row.id], place, row.file_id, hop.id, (row.file_id, hop.id) in made)
        for row in mine
        for place, hop in enumerate(found.new[row.id].hops, 1)
    ]
    s.execute(route_hops.insert().from_select(list(steps), sa.select(rows_of(s, "new_steps", steps, every))))


def _tell(s: Session, found: _Found) -> None:
    still = _unrouted()
    if found.wait:
        columns: Columns = {"id": sa.BigInteger(), "code": sa.String(), "reason": sa.String()}
        batch = rows_of(s, "told", columns, [(id_, code, reason[:2_000]) for id_, code, reason in sorted(found.wait)])
        s.execute(
            transfers.update()
            .where(transfers.c.id == batch.c.id, *still)
            .values(
                reason_code=batch.c.code,
                reason=batch.c.reason,
                not_before=s.now + timedelta(seconds=RECHECK_SECONDS),
            )
        )
    if found.go:
        freed = s.execute(
            transfers.update()
            .where(transfers.c.id.in_(sa.select(ids_of(s, "freed", sorted(found.go)).c.id)), *still)
            .values(reason_code=None, reason=None, not_before=None)
            .returning(transfers.c.site_id)
        )
        provision.wake_sites(s, {site_id for (site_id,) in freed})


# --- ending -----------------------------------------------------------------------------------------------------------

_REASONS = {
    TransferState.DONE: ("done", "the file has come"),
    TransferState.CANCELLED: ("cancelled", "nobody wants the copy any more"),
    TransferState.FAILED: ("failed", "the last leg failed"),
}


def close(s: Session) -> int:
    """End some of the routes whose transfer has ended; returns how many."""
    over = (
        sa.select(routes.c.id, transfers.c.state)
        .join(transfers, transfers.c.id == routes.c.transfer_id)
        .where(routes.c.closed_at.is_(None), Unguessed(sa.not_(any_of(transfers.c.state, LIVE))))
        .order_by(routes.c.id)
        .limit(SLICE)
    )
    if not s.execute(over).all():
        return 0
    guards.one_at_a_time(s, "routes")
    rows = s.execute(over).all()
    _close(s, [(row.id, *_REASONS[row.state], None) for row in rows])
    return len(rows)


def _close(s: Session, ended: Sequence[tuple[int, str, str, int | None]]) -> None:
    """What was made for them is released, unless another route needs it; then it goes with that one."""
    if not ended:
        return
    ids = ids_of(s, "closing", sorted(id_ for id_, *_ in ended))
    steps = s.execute(sa.select(route_hops).join(ids, ids.c.id == route_hops.c.route_id)).all()
    guards.change_endpoints(s, sorted({step.endpoint_id for step in steps}))
    columns: Columns = {
        "id": sa.BigInteger(),
        "outcome": sa.String(),
        "reason": sa.String(),
        "failed_id": sa.BigInteger(),
    }
    batch = rows_of(s, "closed", columns, [(id_, o, reason[:2_000], step) for id_, o, reason, step in sorted(ended)])
    s.execute(
        routes.update()
        .where(routes.c.id == batch.c.id)
        .values(closed_at=s.now, outcome=batch.c.outcome, reason=batch.c.reason, failed_id=batch.c.failed_id)
    )
    s.execute(route_hops.update().where(route_hops.c.route_id.in_(sa.select(ids.c.id))).values(closed_at=s.now))
    mine = sorted({(step.file_id, step.endpoint_id) for step in steps if step.made})
    if not mine:
        return
    pairs = rows_of(s, "made_for_routes", PAIR, mine)
    pair = sa.tuple_(route_hops.c.file_id, route_hops.c.endpoint_id)
    inherited = s.execute(
        route_hops.update()
        .where(pair.in_(sa.select(pairs.c.file_id, pairs.c.endpoint_id)), route_hops.c.closed_at.is_(None))
        .values(made=True)
        .returning(route_hops.c.file_id, route_hops.c.endpoint_id)
    )
    kept = {(file_id, endpoint_id) for file_id, endpoint_id in inherited}
    locks.let_go(s, [each for each in mine if each not in kept])


# --- for people -------------------------------------------------------------------------------------------------------


def of_transfer(s: Session, transfer_id: int) -> wire.Route | None:
    """Its latest route."""
    query = sa.select(routes).where(routes.c.transfer_id == transfer_id).order_by(routes.c.id.desc()).limit(1)
    route = s.execute(query).one_or_none()
    if route is None:
        return None
    steps = s.execute(
        sa.select(route_hops.c.endpoint_id, replicas.c.state)
        .outerjoin(replicas, of_pair(route_hops))
        .where(route_hops.c.route_id == route.id)
        .order_by(route_hops.c.place)
    ).all()
    ids = [route.source_id, *(step.endpoint_id for step in steps), route.target_id]
    name = {r.id: r.name for r in s.execute(sa.select(endpoints.c.id, endpoints.c.name).where(endpoints.c.id.in_(ids)))}
    live = sa.select(transfers.c.id, transfers.c.target_id, transfers.c.state).where(
        transfers.c.file_id == route.file_id, transfers.c.target_id.in_(ids), any_of(transfers.c.state, LIVE)
    )
    leg = {row.target_id: row for row in s.execute(live)}
    return wire.Route(
        id=route.id,
        source=name[route.source_id],
        target=name[route.target_id],
        hops=[
            wire.RouteHop(
                endpoint=name[step.endpoint_id],
                state="reserved" if step.state is ReplicaState.COPYING else step.state.label if step.state else "gone",
                transfer=leg[step.endpoint_id].id if step.endpoint_id in leg else None,
            )
            for step in steps
        ],
        outcome=route.outcome,
        reason=route.reason,
        created_at=route.created_at,
        closed_at=route.closed_at,
    )


def served_by(s: Session, file_id: int, target_id: int) -> list[int]:
    """The transfers that wait for this copy, as a step on their way."""
    query = (
        sa.select(routes.c.transfer_id)
        .join(route_hops, route_hops.c.route_id == routes.c.id)
        .where(
            route_hops.c.file_id == file_id,
            route_hops.c.endpoint_id == target_id,
            route_hops.c.closed_at.is_(None),
        )
        .order_by(routes.c.transfer_id)
        .limit(100)
    )
    return list(s.execute(query).scalars())


def progress(s: Session, rule_id: int) -> dict[str, int]:
    """Endpoint → how many files that come for the rule over others are at it, as the furthest step so far."""
    furthest = (
        sa.select(route_hops.c.route_id, sa.func.max(route_hops.c.place).label("place"))
        .join(routes, routes.c.id == route_hops.c.route_id)
        .join(transfers, transfers.c.id == routes.c.transfer_id)
        .join(replicas, of_pair(route_hops))
        .where(
            transfers.c.rule_id == rule_id,
            routes.c.closed_at.is_(None),
            replicas.c.state == literal(ReplicaState.AVAILABLE),
        )
        .group_by(route_hops.c.route_id)
        .subquery("furthest")
    )
    same = sa.and_(route_hops.c.route_id == furthest.c.route_id, route_hops.c.place == furthest.c.place)
    query = (
        sa.select(endpoints.c.name, sa.func.count().label("files"))
        .select_from(furthest)
        .join(route_hops, same)
        .join(endpoints, endpoints.c.id == route_hops.c.endpoint_id)
        .group_by(endpoints.c.name)
        .order_by(endpoints.c.name)
    )
    return {row.name: row.files for row in s.execute(query)}
