"""Scopes: who may give names, so that two groups never fight over one.

Given     a scope's name and the actor who wants it.
Returns   the scope and its owner.
Promises  a scope is made explicitly, never by using it: a typing error is not a new scope.
Partner   replica.catalog.dids and replicas look names up here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import scopes
from rules.errors import AlreadyExists, NotFound
from rules.names import check_scope
from rules.permissions import Actor


def add(s: Session, actor: Actor, new: wire.NewScope) -> wire.Scope:
    name = check_scope(new.name)
    owner = accounts.account_id(s, actor.account)
    made = bulk.insert(s, scopes).values(name=name, account_id=owner, created_at=s.now).on_conflict_do_nothing()
    if s.execute(made.returning(scopes.c.id)).one_or_none() is None:
        raise AlreadyExists(f"there is a scope {name} already", hint="choose another name", field="name")
    return wire.Scope(name=name, account=actor.account, created_at=s.now)


def get(s: Session, name: str) -> wire.Scope:
    row = s.execute(_select().where(scopes.c.name == name)).one_or_none()
    if row is None:
        raise _missing(name)
    return _scope(row)


def list_page(s: Session, cursor: str | None, limit: int) -> wire.Page[wire.Scope]:
    query = _select().order_by(scopes.c.id).limit(cursors.check_limit(limit) + 1)
    if after := cursors.unpack(cursor):
        query = query.where(scopes.c.id > after[0])
    return cursors.page(s.execute(query).all(), limit, _scope, lambda row: (row.id,))


def ids(s: Session, names: Collection[str]) -> dict[str, int]:
    """The id of each scope; NotFound names the first that does not exist."""
    wanted = sorted(set(names))
    given = bulk.rows_of(s, "given_scopes", {"name": sa.String()}, [(name,) for name in wanted])
    query = sa.select(scopes.c.name, scopes.c.id).join(given, given.c.name == scopes.c.name)
    found = {row.name: int(row.id) for row in s.execute(query)}
    for name in wanted:
        if name not in found:
            raise _missing(name)
    return found


def _missing(name: str) -> NotFound:
    return NotFound(f"there is no scope {name}", hint=f"make it with `replica scope add {name}`", field="scope")


def _select() -> sa.Select[Any]:
    columns = scopes.c.id, scopes.c.name, scopes.c.created_at, tables.accounts.c.name.label("account")
    return sa.select(*columns).join_from(scopes, tables.accounts)


def _scope(row: sa.Row[Any]) -> wire.Scope:
    return wire.Scope(name=row.name, account=row.account, created_at=row.created_at)
