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

import sqlalchemy as sa

from replica.catalog import bulk
from replica.db.engine import Session
from replica.db.tables import accounts, sites, tokens
from rules.errors import NotAuthenticated, NotFound
from rules.names import shown
from rules.permissions import Actor, Role

#: Begins every token, so that one that went astray is found by scanners of logs and repositories.
PREFIX = "rpl_"
ROOT = "root"


def bootstrap(s: Session) -> None:
    """Make the first account, an administrator, where there is none."""
    made = bulk.insert(s, accounts).values(name=ROOT, role=Role.ADMIN.value, created_at=s.now)
    s.execute(made.on_conflict_do_nothing())


def account_id(s: Session, name: str) -> int:
    found = s.execute(sa.select(accounts.c.id).where(accounts.c.name == name)).scalar()
    if found is None:
        raise NotFound(f"there is no account {shown(name)}")
    return int(found)


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
            hint="check REPLICA_TOKEN or REPLICA_TOKEN_FILE; an administrator writes a new one with "
            "`replica migrate --token-file PATH`",
        )
    return Actor(row.name, Role.SITE if row.site is not None else Role(row.role), row.site)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
