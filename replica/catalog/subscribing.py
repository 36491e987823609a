"""Look at DIDs for a subscription, and make its rules.

Given     a subscription; DIDs that were made or changed, or that exist already.
Returns   what is to be made of a bounded slice of them, and what cannot be made and why; then how far it has come.
Promises  facts of a slice cost a handful of statements. Where it has come to is kept only after what was found on the
          way was made, so a crash repeats a slice and loses none; a rule that was made once is not made again, also
          where it was deleted since. A rule that was made stays when its DID fulfils the condition no more.
Partner   workers.subscriptions takes one step after the other, each rule in a transaction of its own;
          replica.catalog.conditions and rules.subscriptions decide.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sqlalchemy as sa

from replica import wire
from replica.catalog import bulk, conditions, events, metadata, outbox
from replica.catalog import dids as dids_
from replica.catalog import rules as rules_
from replica.catalog.events import Position, Wanted
from replica.catalog.membership import literal
from replica.db import tables
from replica.db.engine import Session
from replica.db.tables import dids, rules, subscriptions
from rules.conditions import Condition, parse
from rules.names import Did
from rules.permissions import Actor, Role
from rules.states import DidKind
from rules.subscriptions import Lacking, Template, Wish, decide

#: After what of a DID its subscriptions are asked.
KINDS = ("did.created", "did.closed", "did.reopened", "did.metadata", "did.changed", "did.undeleted")
#: DIDs that one slice looks at, and ids that it steps over: between two datasets there may be a million files.
SLICE_DIDS = 200
SLICE_IDS = 50_000
#: What could not be made is told one by one up to so many of a slice.
SKIPPED_TOLD = 50


@dataclass(frozen=True, slots=True)
class Templates:
    """A subscription's rules by their numbers. A number is given once, so that what it made is known for ever."""

    next: int = 0
    rules: Mapping[int, wire.RuleTemplate] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: Mapping[str, Any]) -> Templates:
        return cls(
            packed["next"], {number: msgspec.convert(rule, wire.RuleTemplate) for number, rule in packed["rules"]}
        )

    def packed(self) -> dict[str, Any]:
        return {"next": self.next, "rules": [[number, _short(rule)] for number, rule in self.rules.items()]}

    def changed_to(self, wanted: Sequence[wire.RuleTemplate]) -> Templates:
        """What stays as it is keeps its number."""
        left = dict(self.rules)
        following = self.next
        changed: dict[int, wire.RuleTemplate] = {}
        for rule in wanted:
            number = next((n for n, known in left.items() if known == rule), None)
            if number is None:
                number, following = following, following + 1
            left.pop(number, None)
            changed[number] = rule
        return Templates(following, changed)

    def short(self) -> list[Template]:
        return [Template(number, rule.expression, rule.source_expression) for number, rule in self.rules.items()]


@dataclass(frozen=True, slots=True)
class Candidate:
    did_id: int
    did: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Making:
    """A rule that is to be made."""

    did_id: int
    number: int
    rule: wire.NewRule


@dataclass(frozen=True, slots=True)
class Skipping:
    did: str
    number: int
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Slice:
    """What one step found, and where it began and ended."""

    subscription: int
    actor: Actor
    seen: int
    makings: list[Making]
    skippings: list[Skipping]
    before: Position
    after: Position
    backfill_before: int | None
    backfill_after: int | None
    more: bool


def due(s: Session) -> list[int]:
    """Subscriptions for which there may be something to look at."""
    end = events.end(s)
    behind = sa.tuple_(subscriptions.c.seen_tx, subscriptions.c.seen_id) < sa.tuple_(
        sa.literal(end.tx, sa.BigInteger()), sa.literal(end.id, sa.BigInteger())
    )
    query = sa.select(subscriptions.c.id).where(
        _is_active(s), sa.or_(behind, subscriptions.c.backfilled_to.is_not(None))
    )
    return list(s.execute(query.order_by(subscriptions.c.id)).scalars())


def look(s: Session, subscription_id: int) -> Slice | None:
    """The next slice: what was made or changed, and the next of what exists. None when it ended meanwhile."""
    row = s.execute(sa.select(subscriptions).where(subscriptions.c.id == subscription_id, _is_active(s))).one_or_none()
    if row is None:
        return None
    tree = parse(row.condition)
    templates = Templates.of(row.rules)
    before = Position(row.seen_tx, row.seen_id)
    found = events.read(s, before, Wanted(kinds=KINDS), SLICE_DIDS)
    ids = {event.entity_id for event in found.rows}
    reached = row.backfilled_to
    if reached is not None:
        existing, reached = _next_existing(s, reached)
        ids |= set(existing)
    candidates = _candidates(s, ids)
    there = made_already(s, row.id, [candidate.did_id for candidate in candidates])
    makings, skippings = [], []
    for candidate in candidates:
        for decided in decide(tree, templates.short(), candidate.facts):
            if (candidate.did_id, decided.number) in there:
                continue
            if isinstance(decided, Lacking):
                skippings.append(Skipping(candidate.did, decided.number, decided.reason, decided.hint))
            else:
                rule = rule_of(templates.rules[decided.number], decided, candidate.did)
                makings.append(Making(candidate.did_id, decided.number, rule))
    return Slice(
        subscription=row.id,
        actor=owner_of(s, row.account_id),
        seen=len(candidates),
        makings=makings,
        skippings=skippings,
        before=before,
        after=found.reached,
        backfill_before=row.backfilled_to,
        backfill_after=reached,
        more=found.more or reached is not None,
    )


def make(s: Session, slice_: Slice, making: Making) -> None:
    """One rule, unless the subscription ended, or somebody else made it, meanwhile."""
    active = sa.select(subscriptions.c.id).where(subscriptions.c.id == slice_.subscription, _is_active(s))
    if s.execute(active).scalar() is None:
        return
    if (making.did_id, making.number) not in made_already(s, slice_.subscription, [making.did_id]):
        rules_.add(s, slice_.actor, making.rule, subscription_id=slice_.subscription, template=making.number)


def reached(s: Session, slice_: Slice, skippings: Sequence[Skipping]) -> bool:
    """All of the slice is done: go on behind it. False when another process has done so, or it is to begin anew."""
    moved = s.execute(
        subscriptions.update()
        .where(
            subscriptions.c.id == slice_.subscription,
            subscriptions.c.seen_tx == slice_.before.tx,
            subscriptions.c.seen_id == slice_.before.id,
            subscriptions.c.backfilled_to.is_not_distinct_from(slice_.backfill_before),
        )
        .values(seen_tx=slice_.after.tx, seen_id=slice_.after.id, backfilled_to=slice_.backfill_after)
    )
    if not moved.rowcount:
        return False
    for skipping in skippings[:SKIPPED_TOLD]:
        _tell_skipped(s, slice_, skipping)
    left = len(skippings) - SKIPPED_TOLD
    if left > 0:
        last = skippings[-1]
        reason = f"{last.reason} (one of {left} that are not told one by one)"
        _tell_skipped(s, slice_, Skipping(last.did, last.number, reason, last.hint))
    return True


def broken(s: Session, subscription_id: int, reason: str) -> None:
    """Nobody can read what it says, so it stops until a person has looked at it."""
    stopped = subscriptions.update().where(subscriptions.c.id == subscription_id, subscriptions.c.enabled)
    if s.execute(stopped.values(enabled=False, updated_at=s.now)).rowcount:
        outbox.record(s, "subscription.disabled", subscription_id, reason=reason)


def owner_of(s: Session, account_id: int) -> Actor:
    """Whose rules they are: what this account may not do, its subscriptions may not do either."""
    row = s.execute(sa.select(tables.accounts).where(tables.accounts.c.id == account_id)).one()
    return Actor(row.name, Role(row.role))


# --- what there is --------------------------------------------------------------------------------------------------


def fulfilling(s: Session, tree: Condition, limit: int) -> tuple[int, int, list[Candidate]]:
    """How many datasets and containers there are, how many of them fulfil the condition, and the first of these."""
    every = sa.select(sa.func.count()).select_from(dids).where(_is_collection())
    query = dids_.select().with_only_columns(
        dids.c.id, sa.func.count().over().label("matching"), maintain_column_froms=True
    )
    found = query.where(_is_collection(), conditions.where(s, tree)).order_by(dids.c.id).limit(limit)
    rows = s.execute(found).all()
    candidates = _candidates(s, [row.id for row in rows])
    return s.execute(every).scalar_one(), rows[0].matching if rows else 0, candidates


def made_already(s: Session, subscription_id: int, did_ids: Sequence[int]) -> set[tuple[int, int]]:
    """`(DID, template)` of the rules that it made for these."""
    if not did_ids:
        return set()
    given = bulk.ids_of(s, "looked_at", sorted(did_ids))
    query = (
        sa.select(rules.c.did_id, rules.c.template)
        .join(given, given.c.id == rules.c.did_id)
        .where(rules.c.subscription_id == subscription_id)
    )
    return {(row.did_id, row.template) for row in s.execute(query)}


def rule_of(template: wire.RuleTemplate, wish: Wish, did: str) -> wire.NewRule:
    fields = {name: getattr(template, name) for name in template.__struct_fields__}
    filled = {"expression": wish.expression, "source_expression": wish.source_expression}
    return wire.NewRule(**fields | filled, did=did)


def _next_existing(s: Session, after: int) -> tuple[list[int], int | None]:
    """The next datasets and containers, and up to which id these are all; None at the end."""
    upto = after + SLICE_IDS
    query = sa.select(dids.c.id).where(dids.c.id > after, dids.c.id <= upto, _is_collection())
    ids = list(s.execute(query.order_by(dids.c.id).limit(SLICE_DIDS)).scalars())
    if len(ids) == SLICE_DIDS:
        return ids, ids[-1]
    last = s.execute(sa.select(sa.func.max(dids.c.id))).scalar() or 0
    return ids, upto if upto < last else None


def _candidates(s: Session, ids: Collection[int]) -> list[Candidate]:
    facts = metadata.facts(s, ids) if ids else {}
    return [
        Candidate(did_id, str(Did(known["scope"], known["name"])), known)
        for did_id, known in sorted(facts.items())
        if known["kind"] != DidKind.FILE.label
    ]


def _is_collection() -> sa.ColumnElement[bool]:
    return sa.and_(dids.c.kind != literal(DidKind.FILE), dids.c.deleted_at.is_(None))


def _is_active(s: Session) -> sa.ColumnElement[bool]:
    unlimited = subscriptions.c.expires_at.is_(None)
    return sa.and_(subscriptions.c.enabled, sa.or_(unlimited, subscriptions.c.expires_at > s.now))


def _tell_skipped(s: Session, slice_: Slice, skipping: Skipping) -> None:
    outbox.record(
        s,
        "subscription.skipped",
        slice_.subscription,
        did=skipping.did,
        rule=skipping.number,
        reason=skipping.reason,
        hint=skipping.hint,
    )


def _short(rule: wire.RuleTemplate) -> dict[str, Any]:
    """What differs from the defaults, so that a later release can change these and add others."""
    given: dict[str, Any] = msgspec.to_builtins(rule)
    fields = {known.name: known for known in msgspec.structs.fields(wire.RuleTemplate)}
    return {name: value for name, value in given.items() if fields[name].required or fields[name].default != value}
