"""A rule in sentences: what is wanted, what is there, what moves, what is stuck, why, and what happens next.

Given     the id of a rule.
Returns   wire.Explanation.
Promises  every number comes from the same transaction; a rule that is not satisfied is never without a sentence that
          says what it waits for.
Partner   `replica rule explain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import rule_views
from replica.catalog.membership import files_of
from replica.db.engine import Session
from replica.db.tables import endpoints, locks, rules, transfers
from rules.errors import NotFound
from rules.quantities import counted, human_bytes
from rules.states import TRANSFER_LEASED, RuleState, TransferState

#: How many locks are listed one by one.
LOCKS_MAX = 1_000

_WAITS_FOR = {
    "no_source": "no endpoint that may be read holds a good copy; register one, or allow its endpoint as a source",
    "writing_off": "writing is off at the target; switch it on again",
}

#: For what is tried again by itself and in vain until somebody does something.
_HELPS = {
    "no_space": "free space there, or move data elsewhere",
    "unreachable": "mount its disk; a new folder is made ready by `replica endpoint prepare`",
    "forbidden": "give the worker's user the right to do this there",
}


def explain(s: Session, rule_id: int) -> wire.Explanation:
    rows = s.execute(rule_views.select().where(rules.c.id == rule_id)).all()
    if not rows:
        raise NotFound(f"there is no rule {rule_id}", hint="`replica rule list` shows them", field="rule")
    rule = rule_views.rules_of(s, rows)[0]
    moving = _moving(s, rule_id) if rule.state != "expired" else []
    by_state: dict[str, int] = {}
    for row in moving:
        by_state[row.state.label] = by_state.get(row.state.label, 0) + row.files
    return wire.Explanation(
        rule=rule,
        locks=_locks(s, rule_id),
        transfers=by_state,
        sentences=[*_sentences(s, rule, rows[0], moving)],
    )


def _locks(s: Session, rule_id: int) -> list[wire.Lock]:
    query = (
        sa.select(locks, endpoints.c.name.label("endpoint"))
        .join(endpoints, endpoints.c.id == locks.c.endpoint_id)
        .where(locks.c.rule_id == rule_id)
        .order_by(locks.c.unit_id, locks.c.endpoint_id)
        .limit(LOCKS_MAX)
    )
    rows = s.execute(query).all()
    text = rule_views.did_texts(s, sorted({row.unit_id for row in rows}))
    return [
        wire.Lock(
            unit=text[row.unit_id],
            endpoint=row.endpoint,
            files_total=row.files_total,
            files_available=row.files_available,
            files_stuck=row.files_stuck,
            bytes_total=row.bytes_total,
        )
        for row in rows
    ]


def _moving(s: Session, rule_id: int) -> Sequence[sa.Row[Any]]:
    """Transfers under way for the copies that this rule locks, whoever asked for them first."""
    mine = (
        sa.select(locks.c.unit_id, locks.c.endpoint_id)
        .where(locks.c.rule_id == rule_id, locks.c.files_available < locks.c.files_total)
        .subquery("mine")
    )
    held = files_of(mine)
    pairs = sa.select(held.c.file_id, held.c.endpoint_id).distinct().subquery("pairs")
    live = [state for state in TransferState if state.value <= TransferState.WAITING.value]
    query = (
        sa.select(
            transfers.c.state,
            transfers.c.reason_code,
            endpoints.c.name.label("target"),
            sa.func.count().label("files"),
            sa.func.sum(transfers.c.size_bytes).label("bytes"),
            sa.func.sum(transfers.c.bytes_done).label("done"),
            sa.func.min(transfers.c.not_before).label("not_before"),
            sa.func.max(transfers.c.reason).label("reason"),
        )
        .select_from(pairs)
        .join(
            transfers,
            sa.and_(transfers.c.file_id == pairs.c.file_id, transfers.c.target_id == pairs.c.endpoint_id),
        )
        .join(endpoints, endpoints.c.id == transfers.c.target_id)
        .where(transfers.c.state.in_(live))
        .group_by(transfers.c.state, transfers.c.reason_code, endpoints.c.name)
        .order_by(transfers.c.state, endpoints.c.name, transfers.c.reason_code)
    )
    return s.execute(query).all()


def _sentences(s: Session, rule: wire.Rule, row: sa.Row[Any], moving: Sequence[sa.Row[Any]]) -> Iterator[str]:
    copies = "1 copy" if rule.copies == 1 else f"{rule.copies} copies"
    spread = "" if rule.spread == "endpoint" else f", no two in one {rule.spread}"
    yield f"{rule.account} wants {copies} of {rule.did} at `{rule.expression}`{spread}."
    if row.state is RuleState.EXPIRED:
        yield f"The rule ended at {_when(rule.updated_at)} and protects nothing any more."
        return
    have = "has" if rule.files_available == 1 else "have"
    yield (
        f"The DID has {counted(rule.files_total, 'file')} with {human_bytes(rule.bytes_total)}; "
        f"{rule.files_available} of {rule.files_total} {have} every copy that is wanted."
    )
    if row.state is RuleState.OK:
        yield "Every copy is there and was verified: the rule is satisfied."
    if rule.expires_at is not None:
        yield f"It ends at {_when(rule.expires_at)}."
    yield from _moving_sentences(s, moving)
    if row.placed_to is not None:
        yield "Places for the rest are being chosen now."
    if row.copies_missing:
        # The unit is a dataset or, for grouping none, a file.
        what = {"none": "file", "all": "dataset", "dataset": "dataset"}[rule.grouping]
        copies, have = ("1 copy", "has") if row.copies_missing == 1 else (f"{row.copies_missing} copies", "have")
        yield f"{copies} of a {what} {have} no place yet; nothing of that was begun."
    if rule.locks_stuck:
        if rule.locks_stuck == 1:
            yield "1 copy of a file failed or was cancelled, and waits for the next try."
        else:
            yield f"{rule.locks_stuck} copies of files failed or were cancelled, and wait for the next try."
    for reason in rule.reasons:
        hint = f" What helps: {reason.hint[:1].lower()}{reason.hint[1:]}." if reason.hint else ""
        count = counted(reason.files, "file")
        yield f"{reason.message} ({count}, first seen {_when(reason.first_seen_at)}).{hint}".replace("..", ".")
    if row.state is RuleState.STUCK and row.evaluate_at is not None:
        yield f"It is tried again by itself at {_when(row.evaluate_at)}."
    if rule.locks_replicating and not moving and row.evaluate_at is not None:
        yield f"The copies still missing are asked for at {_when(row.evaluate_at)}."


def _moving_sentences(s: Session, moving: Sequence[sa.Row[Any]]) -> Iterator[str]:
    for row in moving:
        count = counted(row.files, "file")
        one = row.files == 1
        wait = "waits" if one else "wait"
        size = human_bytes(int(row.bytes))
        if row.state in TRANSFER_LEASED:
            done = f", {human_bytes(int(row.done))} of it done" if row.done else ""
            does = {
                TransferState.CLAIMED: "was handed to a worker" if one else "were handed to a worker",
                TransferState.MOVING: "is on its way" if one else "are on their way",
            }.get(row.state, "is being verified" if one else "are being verified")
            yield f"{count} ({size}{done}) {does} for {row.target}."
        elif row.reason_code is None:
            yield f"{count} ({size}) {wait} for a worker of {row.target}."
        else:
            why = _WAITS_FOR.get(row.reason_code) or row.reason or row.reason_code
            help_ = _HELPS.get(row.reason_code)
            helps = f" What helps: {help_}." if help_ else ""
            again = ""
            if row.not_before is not None and row.not_before > s.now:
                again = f" The next try is at {_when(row.not_before)}."
            yield f"{count} ({size}) {wait} to go to {row.target}: {why}.{helps}{again}".replace("..", ".")


def _when(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
