"""Accounts and the tokens that prove them.

Given     an account's name, or a token that somebody presents.
Returns   a new token, shown this once; or the Actor it belongs to.
Promises  the database holds hashes only, so who reads it can be nobody; a token is recognised by one look-up of its
          hash, so how long that takes tells nothing about other tokens.
Partner   replica.auth reads the token from a request; rules.permissions says what the Actor may do.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import bulk, cursors
from replica.db.engine import Session
from replica.db.tables import accounts, sites, tokens
from rules.errors import AlreadyExists, NotAuthenticated, NotFound
from rules.names import check_word, shown
from rules.permissions import Actor, Role, demand

#: Begins every token, so that one that went astray is found by scanners of logs and repositories.
PREFIX = "rpl_"
ROOT = "root"


def bootstrap(s: Session) -> None:
    """Make the first account, an administrator, where there is none."""
    made = bulk.insert(s, accounts).values(name=ROOT, role=Role.ADMIN.value, created_at=s.now)
    s.execute(made.on_conflict_do_nothing())


def add(s: Session, new: wire.NewAccount) -> wire.Account:
    name = check_word(new.name, "an account")
    made = bulk.insert(s, accounts).values(name=name, role=Role(new.role).value, created_at=s.now)
    row = s.execute(made.on_conflict_do_nothing().returning(*accounts.c)).one_or_none()
    if row is None:
        raise AlreadyExists(f"there is an account {name} already", hint="choose another name", field="name")
    return _account(row)


def get(s: Session, name: str) -> wire.Account:
    return _account(_row(s, name))


def list_page(s: Session, cursor: str | None, limit: int) -> wire.Page[wire.Account]:
    query = sa.select(accounts).order_by(accounts.c.id).limit(cursors.check_limit(limit) + 1)
    if after := cursors.unpack(cursor):
        query = query.where(accounts.c.id > after[0])
    return cursors.page(s.execute(query).all(), limit, _account, lambda row: (row.id,))


def name_of(s: Session, account_id: int) -> str:
    name: str = s.execute(sa.select(accounts.c.name).where(accounts.c.id == account_id)).scalar_one()
    return name


def account_id(s: Session, name: str) -> int:
    return int(_row(s, name).id)


def demand_own(s: Session, actor: Actor, action: str, thing: str, owner_id: int) -> None:
    """NotAllowed where the actor may not do this to a thing that belongs to that account."""
    owner = s.execute(sa.select(accounts.c.name).where(accounts.c.id == owner_id)).scalar_one()
    demand(actor, action, thing, owner)


def issue_key(s: Session, name: str) -> wire.AccountToken:
    """A token for the person or program behind the account. Older ones stay valid: each machine may have its own."""
    return wire.AccountToken(account=name, token=issue_token(s, account=_row(s, name).name, label="key"))


def issue_token(s: Session, *, account: str, label: str, site: str | None = None, replace: bool = False) -> str:
    """A new token. With `site` it is good for that site's orders only; `replace` ends the older ones of this label."""
    owner = account_id(s, account)
    place = None
    if site is not None:
        place = s.execute(sa.select(sites.c.id).where(sites.c.name == site)).scalar()
        if place is None:
            raise NotFound(f"there is no site {shown(site)}", hint="`replica site list` shows all", field="site")
    if replace:
        same = sa.and_(
            tokens.c.account_id == owner, tokens.c.label == label, tokens.c.site_id.is_not_distinct_from(place)
        )
        s.execute(sa.delete(tokens).where(same))
    token = PREFIX + secrets.token_urlsafe(32)
    s.execute(
        sa.insert(tokens).values(hash=_hash(token), account_id=owner, site_id=place, label=label[:64], created_at=s.now)
    )
    return token


def authenticate(s: Session, token: str) -> Actor:
    """Whose token this is; NotAuthenticated when nobody's."""
    row = s.execute(
        sa.select(accounts.c.name, accounts.c.role, sites.c.name.label("site"))
        .join_from(tokens, accounts)
        .join(sites, sites.c.id == tokens.c.site_id, isouter=True)
        .where(tokens.c.hash == _hash(token))
    ).one_or_none()
    if row is None:
        raise NotAuthenticated(
            "the token is not known here",
            hint="check REPLICA_TOKEN or REPLICA_TOKEN_FILE; an administrator makes a new one with "
            "`replica account key NAME`, the first with `replica migrate --token-file PATH`",
        )
    return Actor(row.name, Role.SITE if row.site is not None else Role(row.role), row.site)


def _row(s: Session, name: str) -> sa.Row[Any]:
    row = s.execute(sa.select(accounts).where(accounts.c.name == name)).one_or_none()
    if row is None:
        raise NotFound(f"there is no account {shown(name)}", hint="`replica account list` shows all", field="account")
    return row


def _account(row: sa.Row[Any]) -> wire.Account:
    return wire.Account(name=row.name, role=row.role, created_at=row.created_at)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
