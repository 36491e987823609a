"""A POST that is sent twice has one effect: the first answer is kept and given again.

Given     the account, the key it chose and a hash of the whole request.
Returns   the status and body of the first answer, or None: then it is to be done, and stored.
Promises  the answer is stored in the transaction that did the work: both are there, or neither. Of several at the same
          moment one does the work, the others wait for it and get its answer, as long as `find` is asked in the
          transaction that would do the work. A key used for another request is Refused.
Partner   the middleware of replica.api.
"""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from replica.catalog import guards
from replica.catalog.accounts import account_id
from replica.db.engine import Session
from replica.db.tables import accounts, idempotency_keys
from rules.errors import Invalid, Refused

#: Longer than any client goes on repeating a request.
KEEP_SECONDS = 24 * 3600
KEY_LENGTH_MAX = 200
#: Old keys go in pieces of this size, so that no clean-up holds anybody up.
FORGET_MAX = 10_000


def find(s: Session, account: str, key: str, request_hash: bytes) -> tuple[int, bytes] | None:
    """The kept answer. Refused when the key belongs to another request."""
    if not 0 < len(key) <= KEY_LENGTH_MAX or not key.isascii() or not key.isprintable():
        raise Invalid(
            "the Idempotency-Key cannot be used",
            hint=f"use 1 to {KEY_LENGTH_MAX} printable ASCII characters",
            field="Idempotency-Key",
        )
    guards.one_at_a_time(s, "idempotency", account, key)
    row = s.execute(
        sa.select(idempotency_keys.c.request_hash, idempotency_keys.c.status, idempotency_keys.c.body)
        .join(accounts, accounts.c.id == idempotency_keys.c.account_id)
        .where(accounts.c.name == account, idempotency_keys.c.key == key)
    ).one_or_none()
    if row is None:
        return None
    if row.request_hash != request_hash:
        raise Refused(
            "this Idempotency-Key was used for another request",
            hint="use a new key for every request, and the same one only to repeat it",
            field="Idempotency-Key",
        )
    return row.status, row.body


def store(s: Session, account: str, key: str, request_hash: bytes, status: int, body: bytes) -> None:
    owner = account_id(s, account)
    s.execute(
        sa.insert(idempotency_keys).values(
            account_id=owner, key=key, request_hash=request_hash, status=status, body=body, created_at=s.now
        )
    )


def forget_old(s: Session) -> int:
    """Forget some of the answers that nobody will ask for again; returns how many. 0: none was left."""
    old = (
        sa.select(idempotency_keys.c.account_id, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at < s.now - timedelta(seconds=KEEP_SECONDS))
        .order_by(idempotency_keys.c.created_at)
        .limit(FORGET_MAX)
    )
    key = sa.tuple_(idempotency_keys.c.account_id, idempotency_keys.c.key)
    return s.execute(sa.delete(idempotency_keys).where(key.in_(old))).rowcount
