"""What must be true of usage and of events.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.usage and .outbox keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from replica.catalog.fsck_invariant import Facts, Invariant, Repair, about, ids, sql
from replica.db.engine import Session
from replica.db.tables import accounts, rules

_TRUE = """
    SELECT account_id, endpoint_id, count(*) AS files, sum(size_bytes) AS bytes FROM (
        SELECT DISTINCT account_id, endpoint_id, file_id FROM (
            SELECT r.account_id, l.endpoint_id, c.child_id AS file_id
            FROM locks l JOIN rules r ON r.id = l.rule_id JOIN contents c ON c.parent_id = l.unit_id
            WHERE {only}
            UNION ALL
            SELECT r.account_id, l.endpoint_id, l.unit_id
            FROM locks l JOIN rules r ON r.id = l.rule_id
            WHERE {only}
        ) locked
    ) once JOIN files f ON f.did_id = once.file_id GROUP BY account_id, endpoint_id"""

_USAGE = f"""
    SELECT coalesce(u.account_id, t.account_id) AS account_id, coalesce(u.endpoint_id, t.endpoint_id) AS endpoint_id,
           coalesce(u.files, 0) AS files, coalesce(u.bytes, 0) AS bytes,
           coalesce(t.files, 0) AS files_true, coalesce(t.bytes, 0) AS bytes_true
    FROM usage u FULL JOIN ({_TRUE.format(only="true")}) t
      ON t.account_id = u.account_id AND t.endpoint_id = u.endpoint_id
    WHERE coalesce(u.files, 0) <> coalesce(t.files, 0) OR coalesce(u.bytes, 0) <> coalesce(t.bytes, 0)"""


def _hold_accounts(s: Session, rows: Sequence[Facts]) -> None:
    if s.postgresql:
        these = ids(rows, "account_id")
        s.execute(sa.select(accounts.c.id).where(accounts.c.id.in_(these)).order_by(accounts.c.id).with_for_update())
        mine = sa.select(rules.c.id).where(rules.c.account_id.in_(these)).order_by(rules.c.id)
        s.execute(mine.with_for_update(key_share=True)).all()


def _recount_usage(s: Session, rows: Sequence[Facts]) -> None:
    account_ids = ids(rows, "account_id")
    s.execute(about("UPDATE usage SET files = 0, bytes = 0 WHERE account_id IN :these", account_ids))
    text = f"""INSERT INTO usage (account_id, endpoint_id, files, bytes)
        SELECT account_id, endpoint_id, files, bytes FROM ({_TRUE.format(only="r.account_id IN :these")}) t WHERE true
        ON CONFLICT (account_id, endpoint_id) DO UPDATE SET files = excluded.files, bytes = excluded.bytes"""
    s.execute(about(text, account_ids))


INVARIANTS = (
    Invariant(
        "usage",
        "What an account uses at an endpoint is what its rules lock there, each file once.",
        _USAGE,
        "{account} is charged {files} files of {bytes} bytes at {endpoint},"
        " its rules hold {files_true} of {bytes_true}",
        smallest="files_true, account_id, endpoint_id",
        repair=Repair(_hold_accounts, _recount_usage),
    ),
    Invariant(
        "event-versions",
        "The events of an entity count it up by one, without a gap, to the version that it has.",
        # A transfer has one event only, its end. The oldest may have been forgotten.
        sql("""
            SELECT e.entity, e.entity_id AS of_id, count(*) AS events, min(e.version) AS first, max(e.version) AS last,
                   v.version
            FROM events e LEFT JOIN versions v ON v.entity = e.entity AND v.entity_id = e.entity_id
            WHERE e.entity <> 'transfer'
            GROUP BY e.entity, e.entity_id, v.version
            HAVING max(e.version) - min(e.version) + 1 <> count(*) OR count(DISTINCT e.version) <> count(*)
                OR min(e.version) < 1 OR v.version IS NULL OR v.version <> max(e.version)"""),
        "the {entity} {of_id} has {events} events with versions {first} to {last}, and its version is {version}",
    ),
    Invariant(
        "idempotency",
        "What is kept of an answered request is enough to answer it again.",
        sql("""
            SELECT k.account_id, k.key, k.status FROM idempotency_keys k
            WHERE k.status < 200 OR k.status > 599 OR length(k.request_hash) <> 32"""),
        "the key {key} of {account} holds status {status}",
    ),
)
