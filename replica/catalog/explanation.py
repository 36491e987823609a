"""A rule in sentences: what is wanted, what is there, what moves, what is stuck, why, and what happens next.

Given     the id of a rule.
Returns   wire.Explanation.
Promises  every number comes from the same transaction; a rule that is not satisfied is never without a sentence that
          says what it waits for.
Partner   `replica rule explain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import sqlalchemy as sa

from replica import wire
from replica.catalog import forecasts, routes, rule_views, waiting
from replica.catalog.hops import HOPS
from replica.catalog.waiting import Group
from replica.db.engine import Session
from replica.db.tables import endpoints, locks, rules
from rules.errors import NotFound
from rules.quantities import counted, human_bytes
from rules.states import TRANSFER_LEASED, RuleState, TransferState

#: How many locks are listed one by one.
LOCKS_MAX = 1_000

_WAITS_FOR = {
    "no_source": "no endpoint that may be read holds a good copy",
    "writing_off": "writing is off at the target",
}


def explain(s: Session, rule_id: int) -> wire.Explanation:
    rows = s.execute(rule_views.select().where(rules.c.id == rule_id)).all()
    if not rows:
        raise NotFound(f"there is no rule {rule_id}", hint="`replica rule list` shows them", field="rule")
    rule = forecasts.with_eta(s, rule_views.rules_of(s, rows)[0])
    found = waiting.groups(s, rule_id) if rule.state not in ("expired", "ok") else []
    moving = [group for group in found if group.state is not None]
    by_state: dict[str, int] = {}
    for group in moving:
        assert group.state is not None
        by_state[group.state.label] = by_state.get(group.state.label, 0) + group.files
    return wire.Explanation(
        rule=rule,
        locks=_locks(s, rule_id),
        transfers=by_state,
        sentences=[*_sentences(s, rule, rows[0], moving)],
        waiting=waiting.of_rule(s, rule, rows[0], found),
    )


def _locks(s: Session, rule_id: int) -> list[wire.Lock]:
    query = (
        sa.select(locks, endpoints.c.name.label("endpoint"))
        .join(endpoints, endpoints.c.id == locks.c.endpoint_id)
        .where(locks.c.rule_id == rule_id)
        .order_by(locks.c.surplus, locks.c.unit_id, locks.c.endpoint_id)
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
            surplus=row.surplus,
        )
        for row in rows
    ]


def _sentences(s: Session, rule: wire.Rule, row: sa.Row[Any], moving: Sequence[Group]) -> Iterator[str]:
    copies = "1 copy" if rule.copies == 1 else f"{rule.copies} copies"
    spread = "" if rule.spread == "endpoint" else f", no two in one {rule.spread}"
    yield f"{rule.account} wants {copies} of {rule.did} at `{rule.expression}`{spread}."
    if row.state is RuleState.EXPIRED:
        yield f"The rule ended at {_when(rule.updated_at)} and protects nothing any more."
        return
    if row.state is RuleState.WAITING_APPROVAL:
        yield "It waits for approval: it protects nothing and moves nothing until a person says yes."
    elif row.not_before is not None and row.not_before > s.now:
        yield f"It begins at {_when(row.not_before)}: it protects nothing and moves nothing until then."
    elif row.state is RuleState.SUSPENDED:
        yield "It is suspended: it protects what is there and covers what is attached, and its transfers wait."
    have = "has" if rule.files_available == 1 else "have"
    yield (
        f"The DID has {counted(rule.files_total, 'file')} with {human_bytes(rule.bytes_total)}; "
        f"{rule.files_available} of {rule.files_total} {have} every copy that is wanted."
    )
    if row.state is RuleState.OK:
        yield "Every copy is there and was verified: the rule is satisfied."
    if rule.expires_at is not None:
        yield f"It ends at {_when(rule.expires_at)}{', once it is unlocked' if rule.locked else ''}."
    if rule.locked:
        yield "It is locked: nobody can delete it or take a copy from it."
    yield from _eta_sentences(rule)
    yield from _moving_sentences(s, rule.id, moving)
    yield from _kept_sentences(s, rule.id)
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


def _kept_sentences(s: Session, rule_id: int) -> Iterator[str]:
    """Copies that are not wished any more, and are no copies that count."""
    sums = (sa.func.count().label("copies"), sa.func.sum(locks.c.files_available).label("files"))
    query = (
        sa.select(endpoints.c.name, *sums)
        .join_from(locks, endpoints)
        .where(locks.c.rule_id == rule_id, locks.c.surplus)
        .group_by(endpoints.c.name)
        .order_by(endpoints.c.name)
    )
    for endpoint, copies, files in s.execute(query):
        what = "1 copy of a unit" if copies == 1 else f"{copies} copies of units"
        verb = "is" if copies == 1 else "are"
        yield (
            f"{what} at {endpoint} ({counted(int(files), 'file')} there) {verb} not wished any more, "
            f"and {verb} kept until everything that is wished is there."
        )


def _eta_sentences(rule: wire.Rule) -> Iterator[str]:
    eta = rule.eta
    if eta is None:
        if rule.state == "replicating" and rule.eta_note:
            yield f"When it will be done cannot be told: {rule.eta_note}."
    elif eta.likely is None or eta.pessimistic is None:
        yield f"It is not done before {_when(eta.optimistic)}: {rule.eta_note}."
    else:
        band = f"between {_when(eta.optimistic)} and {_when(eta.pessimistic)}"
        yield f"As the links were lately, it is done at about {_when(eta.likely)}, {band}."


def _moving_sentences(s: Session, rule_id: int, moving: Sequence[Group]) -> Iterator[str]:
    for row in moving:
        count = counted(row.files, "file")
        one = row.files == 1
        wait = "waits" if one else "wait"
        size = human_bytes(int(row.bytes))
        if row.state is not None and row.state in TRANSFER_LEASED:
            done = f", {human_bytes(int(row.done))} of it done" if row.done else ""
            does = {
                TransferState.CLAIMED: "was handed to a worker" if one else "were handed to a worker",
                TransferState.MOVING: "is on its way" if one else "are on their way",
            }.get(row.state, "is being verified" if one else "are being verified")
            yield f"{count} ({size}{done}) {does} for {row.target}."
        elif row.code is None:
            yield f"{count} ({size}) {wait} for a worker of {row.target}."
        else:
            why = _WAITS_FOR.get(row.code) or row.reason or row.code
            help_ = waiting.HELPS.get(row.code)
            helps = f" What helps: {help_}." if help_ else ""
            again = ""
            if row.not_before is not None and row.not_before > s.now:
                again = f" The next try is at {_when(row.not_before)}."
            yield f"{count} ({size}) {wait} to go to {row.target}: {why}.{helps}{again}".replace("..", ".")
    if any(row.code == HOPS for row in moving):
        for endpoint, files in routes.progress(s, rule_id).items():
            yield f"{counted(files, 'file')} of these {'has' if files == 1 else 'have'} come as far as {endpoint}."


_when = waiting.when
