"""Scrubs as people see and set them: how fast each endpoint is read again, how far that is, why it stopped.

Given     an endpoint's name, and what shall change.
Returns   its scrub, with what is doubted and bad there.
Promises  a disk that nobody has said anything of has the usual settings; a tape is never read unasked.
Partner   replica.catalog.checks gives out the batches; rules.integrity has the usual settings.
"""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, checks, outbox
from replica.catalog import endpoints as endpoints_
from replica.db.engine import Session
from replica.db.tables import endpoints, files, scrubs, sites, suspects
from rules.errors import Refused
from rules.permissions import Actor
from rules.states import EndpointKind


def get(s: Session, name: str) -> wire.Scrub:
    row = endpoints_.row(s, name)
    if row.kind is EndpointKind.TAPE:
        raise Refused(f"{name} is a tape: it is not read unasked", hint="the tape system verifies its own media")
    return _list(s, endpoints.c.id == row.id)[0]


def list_all(s: Session) -> wire.Scrubs:
    return wire.Scrubs(items=_list(s))


def change(s: Session, name: str, change: wire.ScrubChange, actor: Actor | None = None) -> wire.Scrub:
    """Change how an endpoint is read again; it is in force with the next batch."""
    row = endpoints_.row(s, name)
    if row.kind is EndpointKind.TAPE:
        raise Refused(f"{name} is a tape: it is not read unasked", hint="the tape system verifies its own media")
    checks.provide_rows(s, endpoints.c.id == row.id)
    given = msgspec.structs.asdict(change)
    values: dict[str, Any] = {
        key: value for key, value in given.items() if key not in ("resume", "now") and value is not msgspec.UNSET
    }
    told = dict(values)
    if change.resume:  # what is known to be wrong is found again, or was mended: it is counted anew
        values |= {"halted_at": None, "halted_why": "", "files": 0, "wrong": 0, "bytes": 0, "bad": 0, "bad_since": None}
        values |= {"trouble": "", "next_at": s.now}
        told["resumed"] = True
    if change.now:
        values |= {"next_at": s.now, "pass_began_at": s.now}
        told["now"] = True
    if values:
        s.execute(scrubs.update().where(scrubs.c.endpoint_id == row.id).values(values))
        account_id = None if actor is None else accounts.account_id(s, actor.account)
        outbox.record(s, "endpoint.scrub_changed", row.id, account_id, **told)
        s.wake.add(f"site.{row.site}")
    return get(s, name)


def _list(s: Session, *which: sa.ColumnElement[bool]) -> list[wire.Scrub]:
    doubted = (
        sa.select(
            suspects.c.endpoint_id,
            sa.func.sum(sa.case((suspects.c.was.is_(None), 1), else_=0)).label("suspicious"),
            sa.func.sum(sa.case((suspects.c.was.is_not(None), 1), else_=0)).label("bad_replicas"),
        )
        .group_by(suspects.c.endpoint_id)
        .subquery("doubted")
    )
    query = (
        sa.select(
            scrubs,
            endpoints.c.name,
            sites.c.name.label("site"),
            doubted.c.suspicious,
            doubted.c.bad_replicas,
        )
        .select_from(endpoints)
        .join(sites, sites.c.id == endpoints.c.site_id)
        .outerjoin(scrubs, scrubs.c.endpoint_id == endpoints.c.id)
        .outerjoin(doubted, doubted.c.endpoint_id == endpoints.c.id)
        .where(endpoints.c.kind == EndpointKind.DISK, endpoints.c.decommissioned_at.is_(None), *which)
        .order_by(endpoints.c.name)
    )
    newest = s.execute(sa.select(sa.func.max(files.c.did_id))).scalar() or 0
    return [_scrub(s, row, newest) for row in s.execute(query)]


def _scrub(s: Session, row: sa.Row[Any], newest: int) -> wire.Scrub:
    known = row.depth is not None
    usual = checks.usual(s.now)
    value = row._mapping if known else usual
    waits = value["pass_began_at"] > s.now
    return wire.Scrub(
        endpoint=row.name,
        site=row.site,
        **{name: value[name] for name in usual if name != "next_at"},
        pass_number=row.pass_number if known else 1,
        pass_ended_at=row.pass_ended_at,
        files=row.files or 0,
        bytes=row.bytes or 0,
        wrong=row.wrong or 0,
        progress=0.0 if waits or not newest else min(1.0, (row.reached or 0) / newest),
        next_at=value["next_at"],
        worker=row.worker,
        trouble=row.trouble or "",
        halted_at=row.halted_at,
        halted_why=row.halted_why or "",
        suspicious=int(row.suspicious or 0),
        bad=int(row.bad_replicas or 0),
    )
