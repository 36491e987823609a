"""The steps of open routes: what is reserved for them, and how the next leg begins.

Given     pairs of a file and an endpoint where a copy has come, or will not come.
Returns   conditions for the statements of others; the transfers of next legs.
Promises  the next leg is ordered by the commit that makes the copy of the leg before it available. While a route is
          open, nobody deletes its steps or stops their transfers.
Partner   replica.catalog.routes makes and ends routes; .locks, .removable and .outcomes ask here.

A route in force is one that is open, and whose transfer has not ended: when that ends, the pass closes the route. But
for a registration, only that pass changes rows of routes, and holds the endpoints of their steps as that does: so
nobody who holds transfers or replicas waits in a circle.
"""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from replica.catalog import provision
from replica.catalog.bulk import ids_of
from replica.catalog.membership import Unguessed, literal
from replica.db.engine import Session
from replica.db.tables import alias_of, links, route_hops, routes, transfers
from rules.states import TransferState

#: The pass that looks at routes.
PASS = "routes"
#: Why a transfer waits: nobody has looked for a way yet; there is none; it comes over others.
NO_LINK, NO_ROUTE, HOPS = "no_link", "no_route", "hops"
#: A new source may end these.
FOR_A_SOURCE = ("no_source", NO_LINK, NO_ROUTE, HOPS)

_OPEN = route_hops.c.closed_at.is_(None)
_QUEUED = Unguessed(transfers.c.state == literal(TransferState.QUEUED))


def any_open(s: Session) -> bool:
    """There are few, mostly none: then nobody looks any further."""
    return bool(s.execute(sa.select(sa.exists(sa.select(1).where(_OPEN)))).scalar_one())


def is_hop(file_id: sa.ColumnElement[int], endpoint_id: sa.ColumnElement[int]) -> sa.ColumnElement[bool]:
    hop = alias_of(route_hops, "hop")
    found = sa.select(1).where(
        hop.c.file_id == file_id, Unguessed(hop.c.endpoint_id == endpoint_id), hop.c.closed_at.is_(None)
    )
    return Unguessed(sa.exists(found))


def others_own(s: Session, pairs: sa.FromClause) -> None:
    """Somebody says that these are theirs: routes use them, and leave them there."""
    if any_open(s):
        pair = sa.tuple_(route_hops.c.file_id, route_hops.c.endpoint_id)
        theirs = pair.in_(sa.select(pairs.c.file_id, pairs.c.endpoint_id))
        s.execute(route_hops.update().where(theirs, _OPEN).values(made=False))


def arrived(s: Session, pairs: sa.FromClause) -> None:
    """Order the next legs."""
    if not any_open(s):
        return
    here, onward = alias_of(route_hops, "here"), alias_of(route_hops, "onward")
    wanted = (
        sa.select(
            onward.c.file_id,
            onward.c.endpoint_id,
            sa.func.max(transfers.c.size_bytes).label("size_bytes"),
            sa.func.min(transfers.c.rule_id).label("rule_id"),
            sa.func.max(transfers.c.priority).label("priority"),
            sa.func.min(transfers.c.activity).label("activity"),
        )
        .select_from(pairs)
        .join(here, sa.and_(here.c.file_id == pairs.c.file_id, here.c.endpoint_id == pairs.c.endpoint_id))
        .join(onward, sa.and_(onward.c.route_id == here.c.route_id, onward.c.place == here.c.place + 1))
        .join(routes, routes.c.id == here.c.route_id)
        .join(transfers, transfers.c.id == routes.c.transfer_id)
        .where(here.c.closed_at.is_(None), _QUEUED)
        .group_by(onward.c.file_id, onward.c.endpoint_id)
        .subquery("wanted")
    )
    provision.order(s, wanted)


def not_coming(s: Session, pairs: sa.FromClause) -> None:
    """What would come over these steps needs another way: the pass looks for it."""
    if not any_open(s):
        return
    concerned = (
        sa.select(routes.c.transfer_id)
        .select_from(pairs)
        .join(
            route_hops,
            sa.and_(route_hops.c.file_id == pairs.c.file_id, route_hops.c.endpoint_id == pairs.c.endpoint_id),
        )
        .join(routes, routes.c.id == route_hops.c.route_id)
        .where(_OPEN)
    )
    s.execute(
        transfers.update()
        .where(transfers.c.id.in_(concerned), _QUEUED, Unguessed(transfers.c.reason_code == HOPS))
        .values(reason_code=NO_LINK)
    )
    s.wake.add(PASS)


def can_go_on(pairs: sa.FromClause) -> sa.ColumnElement[bool]:
    """Of a row of `transfers` that waits for a source: one of the copies that came may be one. What comes over others
    is not disturbed by a step from which no link leads to its target."""
    closed = sa.select(1).where(
        links.c.source_id == pairs.c.endpoint_id,
        links.c.target_id == transfers.c.target_id,
        sa.not_(links.c.allowed),
    )
    direct = sa.select(1).where(
        pairs.c.file_id == transfers.c.file_id, sa.not_(sa.exists(closed.correlate(pairs, transfers)))
    )
    return Unguessed(
        sa.or_(
            transfers.c.reason_code.is_distinct_from(HOPS), sa.exists(direct.select_from(pairs).correlate(transfers))
        )
    )


def look_again(s: Session, target_id: int) -> None:
    """A link to there was changed."""
    freed = s.execute(
        transfers.update()
        .where(
            transfers.c.target_id == target_id,
            _QUEUED,
            Unguessed(transfers.c.reason_code.in_((NO_LINK, NO_ROUTE, HOPS))),
        )
        .values(not_before=None, reason_code=None, reason=None)
        .returning(transfers.c.site_id)
    )
    provision.wake_sites(s, {site_id for (site_id,) in freed})


def sources_of(s: Session, file_ids: Iterable[int]) -> dict[int, frozenset[int]]:
    """File → where it is a step: rules that limit sources mean where data comes from, not over what it comes."""
    wanted = ids_of(s, "on_their_way", sorted(set(file_ids)))
    query = (
        sa.select(route_hops.c.file_id, route_hops.c.endpoint_id)
        .join(wanted, wanted.c.id == route_hops.c.file_id)
        .where(_OPEN)
    )
    found: dict[int, set[int]] = {}
    for file_id, endpoint_id in s.execute(query):
        found.setdefault(file_id, set()).add(endpoint_id)
    return {file_id: frozenset(ids) for file_id, ids in found.items()}
