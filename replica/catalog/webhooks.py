"""Webhooks: servers elsewhere that are told what happens.

Given     a name and a URL; later the outcome of each delivery.
Returns   the webhook and how it fares; what is to be delivered next, and the secret that signs it.
Promises  what a webhook has to be told is read from the log by a position that moves only after the delivery: it can
          come twice, it cannot be lost, and it comes in order. Of two processes one delivers: the other finds the
          webhook taken until its time is over. The secret is shown once.
Partner   workers.events delivers, outside of any transaction; rules.events says when to try again.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, bulk, cursors, events, outbox
from replica.catalog.events import Position, Wanted
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import webhooks
from rules.errors import AlreadyExists, Invalid, NotFound, Refused
from rules.events import GIVE_UP_SECONDS, check_patterns, pause_after
from rules.names import check_word, shown
from rules.permissions import Actor

WEBHOOKS_MAX = 100
#: Events that one delivery has at most.
BATCH_MAX = 100
#: Begins every secret, so that one that went astray is found by scanners of logs and repositories.
PREFIX = "whs_"
_ERROR_MAX = 1_000


def add(s: Session, actor: Actor, new: wire.NewWebhook) -> wire.WebhookMade:
    """It is told what happens from now on."""
    check_word(new.name, "a webhook")
    now = events.end(s)
    values = {
        "name": new.name,
        "account_id": accounts.account_id(s, actor.account),
        "url": _check_url(new.url),
        "secret": PREFIX + secrets.token_urlsafe(32),
        "kinds": list(check_patterns(new.kinds)),
        "created_at": s.now,
        "seen_tx": now.tx,
        "seen_id": now.id,
    }
    if s.execute(sa.select(sa.func.count()).select_from(webhooks)).scalar_one() >= WEBHOOKS_MAX:
        raise Refused(f"there are {WEBHOOKS_MAX} webhooks already", hint="delete one that nobody needs any more")
    made = bulk.insert(s, webhooks).values(values).on_conflict_do_nothing().returning(webhooks)
    row = s.execute(made).one_or_none()
    if row is None:
        raise AlreadyExists(f"there is a webhook {new.name} already", hint="choose another name", field="name")
    outbox.record(s, "webhook.added", row.id, row.account_id, name=new.name)
    known = _webhook(row, actor.account, up_to_date=True)
    return wire.WebhookMade(**{name: getattr(known, name) for name in known.__struct_fields__}, secret=row.secret)


def get(s: Session, name: str) -> wire.Webhook:
    row = s.execute(_select().where(webhooks.c.name == name)).one_or_none()
    if row is None:
        raise _missing(name)
    return _webhook(row, row.account, up_to_date=events.end(s) <= Position(row.seen_tx, row.seen_id))


def list_page(s: Session, cursor: str | None, limit: int) -> wire.Page[wire.Webhook]:
    query = _select().order_by(webhooks.c.id).limit(cursors.check_limit(limit) + 1)
    if after := cursors.unpack(cursor):
        query = query.where(webhooks.c.id > after[0])
    end = events.end(s)

    def webhook(row: sa.Row[Any]) -> wire.Webhook:
        return _webhook(row, row.account, up_to_date=end <= Position(row.seen_tx, row.seen_id))

    return cursors.page(s.execute(query).all(), limit, webhook, lambda row: (row.id,))


def change(s: Session, actor: Actor, name: str, change: wire.WebhookChange) -> wire.Webhook:
    """Enable or disable. One that is enabled goes on where it was, as far as that is still kept, and at once."""
    row = _hold(s, name)
    values: dict[str, Any] = {"enabled": change.enabled}
    if change.enabled:
        values |= {"failures": 0, "failing_since": None, "next_try_at": None, "last_error": ""}
        if change.from_now:
            values |= _at(events.end(s))
    s.execute(webhooks.update().where(webhooks.c.id == row.id).values(values))
    if change.enabled != row.enabled:
        what = "webhook.enabled" if change.enabled else "webhook.disabled"
        outbox.record(s, what, row.id, accounts.account_id(s, actor.account), name=name)
    return get(s, name)


def delete(s: Session, actor: Actor, name: str) -> None:
    row = _hold(s, name)
    s.execute(webhooks.delete().where(webhooks.c.id == row.id))
    outbox.record(s, "webhook.deleted", row.id, accounts.account_id(s, actor.account), name=name)


def test(s: Session, actor: Actor, name: str) -> wire.Webhook:
    """Send it an event of its own, at once; whether it came is told by `get`."""
    row = _hold(s, name)
    if not row.enabled:
        raise Refused(f"the webhook {name} is disabled", hint=f"enable it: `replica webhook enable {name}`")
    s.execute(webhooks.update().where(webhooks.c.id == row.id).values(next_try_at=None))
    outbox.record(s, "webhook.test", row.id, accounts.account_id(s, actor.account), name=name)
    return get(s, name)


# --- delivering -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one webhook is to be sent now."""

    id: int
    name: str
    url: str
    secret: str
    before: Position
    after: Position
    events: list[wire.Event]
    #: Until when it is ours alone.
    lease: datetime


def waiting(s: Session, *, but: frozenset[int] = frozenset()) -> list[int]:
    """Webhooks that something may have to be sent to now; not those of `but`."""
    end = events.end(s)
    behind = sa.tuple_(webhooks.c.seen_tx, webhooks.c.seen_id) < sa.tuple_(
        sa.literal(end.tx, sa.BigInteger()), sa.literal(end.id, sa.BigInteger())
    )
    due = sa.or_(webhooks.c.next_try_at.is_(None), webhooks.c.next_try_at <= s.now)
    found = s.execute(sa.select(webhooks.c.id).where(webhooks.c.enabled, due, behind).order_by(webhooks.c.id))
    return [id_ for id_ in found.scalars() if id_ not in but]


def claim(s: Session, webhook_id: int, lease_seconds: float) -> tuple[Parcel | None, bool]:
    """What is next for it, ours until the lease is over; None when there is nothing, or somebody else has it. And
    whether it is worth while to ask again."""
    query = sa.select(webhooks).where(
        webhooks.c.id == webhook_id,
        webhooks.c.enabled,
        sa.or_(webhooks.c.next_try_at.is_(None), webhooks.c.next_try_at <= s.now),
    )
    row = s.execute(query.with_for_update(skip_locked=True) if s.postgresql else query).one_or_none()
    if row is None:
        return None, False
    before = Position(row.seen_tx, row.seen_id)
    wanted = Wanted(kinds=tuple(row.kinds), notify=(row.name, row.id))
    found = events.read(s, before, wanted, BATCH_MAX)
    if not found.rows:  # nothing of it was wanted
        if found.reached != before:
            s.execute(webhooks.update().where(webhooks.c.id == row.id).values(_at(found.reached)))
        return None, found.more
    until = s.now + timedelta(seconds=lease_seconds)
    s.execute(webhooks.update().where(webhooks.c.id == row.id).values(next_try_at=until))
    parcel = Parcel(
        id=row.id,
        name=row.name,
        url=row.url,
        secret=row.secret,
        before=before,
        after=found.reached,
        events=events.told(s, found.rows),
        lease=until,
    )
    return parcel, found.more


def delivered(s: Session, parcel: Parcel) -> bool:
    """Go on behind it. False when somebody else has done so, or it is to begin elsewhere."""
    values = {"failures": 0, "failing_since": None, "next_try_at": None, "last_error": "", "delivered_at": s.now}
    return _note(s, parcel, values | _at(parcel.after))


def failed(s: Session, parcel: Parcel, reason: str, fraction: float) -> bool:
    """Try again later; whoever did not answer well for days is disabled. `fraction` in [0, 1) is the jitter."""
    query = sa.select(webhooks).where(webhooks.c.id == parcel.id)
    row = s.execute(query.with_for_update() if s.postgresql else query).one_or_none()
    if row is None:
        return False
    since = row.failing_since or s.now
    over = s.now - since >= timedelta(seconds=GIVE_UP_SECONDS)
    values = {
        "failures": row.failures + 1,
        "failing_since": since,
        "last_error": reason[:_ERROR_MAX],
        "next_try_at": None if over else s.now + timedelta(seconds=pause_after(row.failures + 1, fraction)),
        "enabled": not over,
    }
    if not _note(s, parcel, values):
        return False
    if over:
        outbox.record(
            s, "webhook.disabled", row.id, name=row.name, reason=reason[:_ERROR_MAX], failures=row.failures + 1
        )
    return True


def _note(s: Session, parcel: Parcel, values: dict[str, Any]) -> bool:
    """Only while it is as it was taken: whoever took it after us decides."""
    ours = sa.and_(
        webhooks.c.id == parcel.id,
        webhooks.c.enabled,
        webhooks.c.seen_tx == parcel.before.tx,
        webhooks.c.seen_id == parcel.before.id,
    )
    # `test` and `enable` end a lease early, and nobody may have taken it since.
    taken_by_us = sa.or_(webhooks.c.next_try_at == parcel.lease, webhooks.c.next_try_at.is_(None))
    return bool(s.execute(webhooks.update().where(ours, taken_by_us).values(values)).rowcount)


def _at(position: Position) -> dict[str, int]:
    return {"seen_tx": position.tx, "seen_id": position.id}


# --- below ----------------------------------------------------------------------------------------------------------


def _check_url(url: str) -> str:
    def no(reason: str) -> Invalid:
        return Invalid(f"the URL {reason}", hint="write it like https://example.org/replica", field="url")

    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  raises where it is no number
    except ValueError as error:
        raise no("cannot be read") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise no("is not one of http or https with a host")
    if parts.username is not None or parts.password is not None:
        raise no("has a password in it, and is shown to administrators")
    if parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise no("has a fragment, white space or characters that must be percent-encoded")
    return url


def _hold(s: Session, name: str) -> sa.Row[Any]:
    query = sa.select(webhooks).where(webhooks.c.name == name)
    row = s.execute(query.with_for_update() if s.postgresql else query).one_or_none()
    if row is None:
        raise _missing(name)
    return row


def _select() -> sa.Select[Any]:
    return sa.select(webhooks, tables.accounts.c.name.label("account")).join_from(webhooks, tables.accounts)


def _webhook(row: sa.Row[Any], account: str, *, up_to_date: bool) -> wire.Webhook:
    return wire.Webhook(
        id=row.id,
        name=row.name,
        account=account,
        url=row.url,
        kinds=row.kinds,
        enabled=row.enabled,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
        failures=row.failures,
        failing_since=row.failing_since,
        last_error=row.last_error,
        next_try_at=row.next_try_at,
        up_to_date=up_to_date,
    )


def _missing(name: str) -> NotFound:
    return NotFound(f"there is no webhook {shown(name)}", hint="`replica webhook list` shows them", field="webhook")
