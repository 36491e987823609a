"""When the copies of a rule will be there, from how fast its links were lately.

Given     one rule as people see it.
Returns   the same with a band of moments, or with the reason why none can be told.
Promises  at most three statements, none of which grows with the files of the rule: what is left is read off its open
          locks, and of the queue before it only so much is looked at.
Partner   rules.estimates makes the estimate; replica.catalog.traffic has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import traffic
from replica.catalog.membership import literal
from replica.db.engine import Session
from replica.db.tables import Instant, endpoints, locks, transfers
from rules.estimates import Estimate, Way, estimate
from rules.states import TransferState

#: How much of the queue of a site is looked at for what goes before a rule.
QUEUE_MAX = 5_000


def with_eta(s: Session, rule: wire.Rule) -> wire.Rule:
    if note := _why_none(s, rule):
        return msgspec.structs.replace(rule, eta_note=note)
    if rule.state != "replicating":
        return rule
    answer = estimate(_ways(s, rule))
    if not isinstance(answer, Estimate):
        return msgspec.structs.replace(rule, eta_note=answer.reason)

    def moment(seconds: float | None) -> Any:
        return None if seconds is None else s.now + timedelta(seconds=min(seconds, 3e9))

    eta = wire.Eta(optimistic=moment(answer.soonest), likely=moment(answer.likely), pessimistic=moment(answer.latest))
    return msgspec.structs.replace(rule, eta=eta, eta_note=answer.note)


def _why_none(s: Session, rule: wire.Rule) -> str:
    if rule.state == "waiting_approval":
        return "a person must approve it first"
    if rule.state == "suspended":
        return "it is suspended"
    if rule.state == "stuck":
        return "some of its copies cannot be made now; the reasons say why"
    if rule.state == "replicating" and rule.not_before is not None and rule.not_before > s.now:
        return f"it begins at {rule.not_before:%Y-%m-%d %H:%M} UTC"
    return ""


def _ways(s: Session, rule: wire.Rule) -> list[Way]:
    left = locks.c.files_total - locks.c.files_available
    query = (
        sa.select(
            endpoints.c.id,
            endpoints.c.name,
            endpoints.c.site_id,
            sa.func.sum(left).label("files"),
            # A lock counts its files, not the bytes of those that are there: the rest is taken for as large as all.
            sa.func.sum(sa.cast(locks.c.bytes_total, sa.Float()) * left / locks.c.files_total).label("bytes"),
        )
        .join_from(locks, endpoints, endpoints.c.id == locks.c.endpoint_id)
        .where(locks.c.rule_id == rule.id, locks.c.files_available < locks.c.files_total, locks.c.surplus.is_(False))
        .group_by(endpoints.c.id, endpoints.c.name, endpoints.c.site_id)
        .order_by(endpoints.c.name)
    )
    targets = s.execute(query).all()
    if not targets:
        return []
    periods = traffic.recent(s, [target.id for target in targets])
    ahead = _ahead(s, rule, sorted({target.site_id for target in targets}))
    return [
        Way(
            target.name,
            int(target.files),
            int(target.bytes),
            *ahead.get(target.id, (0, 0)),
            ahead_is_more=ahead.get(-target.site_id, (0, 0))[0] > QUEUE_MAX,
            periods=periods.get(target.id, ()),
        )
        for target in targets
    ]


def _ahead(s: Session, rule: wire.Rule, site_ids: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Target → files and bytes that are claimed before those of the rule; of a site under minus its id."""
    heads = []
    for site_id in site_ids:
        # The index ix_transfers_queue has it in this order, so no more than this is read.
        head = (
            sa.select(
                transfers.c.target_id,
                transfers.c.site_id,
                transfers.c.priority,
                transfers.c.created_at,
                transfers.c.not_before,
                transfers.c.size_bytes,
            )
            .where(transfers.c.site_id == site_id, transfers.c.state == literal(TransferState.QUEUED))
            .order_by(transfers.c.priority.desc(), transfers.c.id)
            .limit(QUEUE_MAX + 1)
            .subquery(f"head_{site_id}")
        )
        heads.append(sa.select(head))
    queue = sa.union_all(*heads).subquery("queue")
    query = (
        sa.select(
            queue.c.site_id,
            queue.c.target_id,
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(queue.c.size_bytes), 0),
        )
        .where(
            sa.or_(
                queue.c.priority > rule.priority,
                sa.and_(queue.c.priority == rule.priority, queue.c.created_at < sa.literal(rule.created_at, Instant())),
            ),
            sa.or_(queue.c.not_before.is_(None), queue.c.not_before <= s.now),
        )
        .group_by(queue.c.site_id, queue.c.target_id)
    )
    found: dict[int, tuple[int, int]] = {}
    for site_id, target_id, count, size in s.execute(query):
        found[target_id] = (count, int(size))
        files, total = found.get(-site_id, (0, 0))
        found[-site_id] = (files + count, total + int(size))
    return found
