"""Sites: institutes, each with endpoints and with workers that carry out its transfers.

Given     a site's name.
Returns   the site, the key its workers sign in with, when one was last heard of.
Promises  a site's name is given once and never changes: it names the queue its workers listen on.
Partner   replica.catalog.endpoints puts endpoints at them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors
from replica.db.engine import Session
from replica.db.tables import sites
from rules.errors import AlreadyExists, NotFound
from rules.names import check_word, shown

#: A busy site is heard of many times a second; its row is not written more often than this.
SEEN_SECONDS = 5


def add(s: Session, new: wire.NewSite) -> wire.Site:
    name = check_word(new.name, "a site")
    made = bulk.insert(s, sites).values(name=name, created_at=s.now).on_conflict_do_nothing()
    row = s.execute(made.returning(*sites.c)).one_or_none()
    if row is None:
        raise AlreadyExists(f"there is a site {name} already", hint="choose another name", field="name")
    return _site(row)


def get(s: Session, name: str) -> wire.Site:
    return _site(_row(s, name))


def site_id(s: Session, name: str) -> int:
    return int(_row(s, name).id)


def list_page(s: Session, cursor: str | None, limit: int) -> wire.Page[wire.Site]:
    query = sa.select(sites).order_by(sites.c.id).limit(cursors.check_limit(limit) + 1)
    if after := cursors.unpack(cursor):
        query = query.where(sites.c.id > after[0])
    return cursors.page(s.execute(query).all(), limit, _site, lambda row: (row.id,))


def issue_token(s: Session, name: str) -> wire.SiteToken:
    """A key for the site's workers. Older ones stay valid: each worker may have its own."""
    token = accounts.issue_token(s, account=accounts.ROOT, label="worker", site=_row(s, name).name)
    return wire.SiteToken(site=name, token=token)


def seen(s: Session, site_id: int) -> None:
    """A worker of the site was heard of just now."""
    stale = sites.c.worker_seen_at.is_(None) | (sites.c.worker_seen_at <= s.now - timedelta(seconds=SEEN_SECONDS))
    s.execute(sa.update(sites).where(sites.c.id == site_id, stale).values(worker_seen_at=s.now))


def _row(s: Session, name: str) -> sa.Row[Any]:
    row = s.execute(sa.select(sites).where(sites.c.name == check_word(name, "a site"))).one_or_none()
    if row is None:
        raise NotFound(f"there is no site {shown(name)}", hint="`replica site list` shows all", field="site")
    return row


def _site(row: sa.Row[Any]) -> wire.Site:
    return wire.Site(id=row.id, name=row.name, created_at=row.created_at, worker_seen_at=row.worker_seen_at)
