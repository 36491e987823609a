"""Doubts about replicas, and verdicts: suspicious, bad, good again.

Given     replicas, why somebody doubts them, and what their own site's worker found.
Returns   what changed; counters, transfers, reasons and states of the rules concerned are as if evaluated anew.
Promises  a bad replica is no source and counts for no rule from the same commit on, and is healed from a good one by
          the ordinary queue. A last copy that is bad stays where it is: its rule is stuck and says why. Nothing is
          good again by a word alone once a worker has proven it bad. A fixed number of statements for any number.
Partner   rules.integrity has the words; replica.catalog.checks sends workers to look; replica.catalog.outcomes, the
          scan of an endpoint and people raise doubts by `suspect` and `declare_bad`.

    s        suspect(s, [Doubt(file_id, endpoint_id, "what was seen")], why=Why.SCAN)      a worker is sent to look
    s        declare_bad(s, [Doubt(…)], why=Why.SCAN, proven=True)                         it is known: heal it

Both hold what they change, in the order of replica.catalog.guards, unless `held` says that the caller does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from replica.catalog import guards, locks, outbox, provision, reasons
from replica.catalog.bulk import Columns, insert, rows_of
from replica.catalog.membership import Unguessed, any_of, covering, is_wished, literal, of_pair
from replica.catalog.provision import PAIR
from replica.catalog.removable import is_good_elsewhere
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session
from replica.db.tables import Instant, State, dids, endpoints, files, replicas, rules, scopes, suspects, transfers
from rules.integrity import Why
from rules.states import TRANSFER_LEASED, Evidence, ReplicaState, TransferState

#: Of a rule's reasons, and of transfers that nobody can carry out.
LAST_COPY_BAD = "last_copy_bad"
LAST_COPY_HINT = (
    "every copy that is known is bad: register a good one, or have this one looked at again with `replica good`; "
    "what lies there is kept"
)
#: States in which there are bytes to doubt.
_THERE = (ReplicaState.AVAILABLE, ReplicaState.UNAVAILABLE, ReplicaState.BAD)
_MESSAGE_MAX = 2_000

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Doubt:
    """One replica, and what was seen of it, as a person reads it."""

    file_id: int
    endpoint_id: int
    message: str

    @property
    def pair(self) -> Pair:
        return self.file_id, self.endpoint_id


@dataclass(slots=True)
class Declared:
    """What became of a declaration."""

    #: Bad now that were not before.
    bad: list[Pair] = field(default_factory=list)
    #: Bad already: only who says so, and why, is new.
    known: list[Pair] = field(default_factory=list)
    #: Of both, those of which no good copy is known.
    last: list[Pair] = field(default_factory=list)
    #: Not there, on their way, or being deleted: there is nothing to declare.
    absent: list[Pair] = field(default_factory=list)


def suspect(s: Session, doubts: Sequence[Doubt], *, why: Why, account_id: int | None = None) -> int:
    """These disagreed with the catalogue: workers of their sites are sent to look. Returns how many are doubted anew.

    Nothing else changes: a doubt is no verdict. What is bad, or not there, cannot be doubted more.
    """
    by_pair = {doubt.pair: doubt.message for doubt in doubts}
    if not by_pair:
        return 0
    columns: Columns = {**PAIR, "message": sa.String()}
    batch = rows_of(s, "doubted", columns, [(*pair, text[:_MESSAGE_MAX]) for pair, text in sorted(by_pair.items())])
    now = sa.literal(s.now, Instant())
    rows = (
        sa.select(
            batch.c.file_id,
            batch.c.endpoint_id,
            sa.literal(why.value),
            batch.c.message,
            sa.literal(account_id, sa.BigInteger()),
            now,
            now,
        )
        .select_from(batch)
        .join(replicas, of_pair(batch))
        .where(Unguessed(any_of(replicas.c.state, (ReplicaState.AVAILABLE, ReplicaState.UNAVAILABLE))))
        .order_by(batch.c.file_id, batch.c.endpoint_id)
    )
    names = ["file_id", "endpoint_id", "why", "message", "account_id", "since", "due_at"]
    made = insert(s, suspects).from_select(names, rows).on_conflict_do_nothing()
    new = [(f, e) for f, e in s.execute(made.returning(suspects.c.file_id, suspects.c.endpoint_id))]
    if len(new) < len(by_pair):  # doubted before: it is looked at now
        new += _doubted_anew(s, batch, why, account_id)
        s.execute(
            suspects.update()
            .where(
                suspects.c.file_id == batch.c.file_id,
                Unguessed(suspects.c.endpoint_id == batch.c.endpoint_id),
                suspects.c.was.is_(None),
                sa.or_(suspects.c.due_at.is_(None), suspects.c.due_at > s.now),
                suspects.c.lease_until.is_(None),
            )
            .values(due_at=s.now, message=batch.c.message)
        )
    _tell(s, "replica.suspicious", {pair: {"reason": by_pair[pair]} for pair in new}, account_id)
    wake_sites_of(s, {endpoint_id for _, endpoint_id in by_pair})
    return len(new)


def _doubted_anew(s: Session, batch: sa.FromClause, why: Why, account_id: int | None) -> list[Pair]:
    """Those that were bad once and were healed, which nobody has written down yet: that verdict is over."""
    there = sa.select(1).where(
        replicas.c.file_id == suspects.c.file_id,
        replicas.c.endpoint_id == suspects.c.endpoint_id,
        Unguessed(any_of(replicas.c.state, (ReplicaState.AVAILABLE, ReplicaState.UNAVAILABLE))),
    )
    over = (
        suspects.update()
        .where(
            suspects.c.file_id == batch.c.file_id,
            Unguessed(suspects.c.endpoint_id == batch.c.endpoint_id),
            suspects.c.was.is_not(None),
            sa.exists(there),
        )
        .values(
            why=why.value,
            message=batch.c.message,
            account_id=account_id,
            since=s.now,
            proven=False,
            was=None,
            due_at=s.now,
            attempts=0,
            lease_until=None,
        )
        .returning(suspects.c.file_id, suspects.c.endpoint_id)
    )
    return [(f, e) for f, e in s.execute(over)]


def declare_bad(
    s: Session,
    doubts: Sequence[Doubt],
    *,
    why: Why,
    proven: bool,
    account_id: int | None = None,
    held: bool = False,
) -> Declared:
    """These are bad from now on. `proven`: their own site's worker read them wrong, or found nothing, twice."""
    by_pair = {doubt.pair: doubt.message[:_MESSAGE_MAX] for doubt in doubts}
    declared = Declared()
    if not by_pair:
        return declared
    pairs = rows_of(s, "declared", PAIR, sorted(by_pair))
    if not held:
        hold(s, pairs)
    guards.change_rules_that_came(s, pairs)
    there = _states(s, pairs)
    declared.absent = sorted(pair for pair in by_pair if there.get(pair) not in _THERE)
    concerned = sorted(pair for pair in by_pair if there.get(pair) in _THERE)
    if not concerned:
        return declared
    declared.known = [pair for pair in concerned if there[pair] is ReplicaState.BAD]
    declared.bad = [pair for pair in concerned if there[pair] is not ReplicaState.BAD]
    _write_down(s, [(pair, there[pair], by_pair[pair]) for pair in concerned], why, proven, account_id)
    touched: set[int] = set()
    if declared.bad:
        batch = rows_of(s, "now_bad", PAIR, declared.bad)
        s.execute(replicas.update().where(of_pair(batch)).values(state=ReplicaState.BAD))
        if counted := [pair for pair in declared.bad if there[pair] is ReplicaState.AVAILABLE]:
            touched.update(provision.count_available(s, rows_of(s, "no_longer", PAIR, counted), -1))
    batch = rows_of(s, "all_bad", PAIR, concerned)
    last = sa.select(replicas.c.file_id, replicas.c.endpoint_id).select_from(batch).join(replicas, of_pair(batch))
    declared.last = sorted((f, e) for f, e in s.execute(last.where(sa.not_(is_good_elsewhere(doubted_too=True)))))
    hopeless = set(declared.last)
    if healing := [pair for pair in concerned if pair not in hopeless]:
        touched.update(_heal(s, healing))
    if declared.last:
        touched.update(_give_up(s, {pair: by_pair[pair] for pair in declared.last}))
    settle(s, touched)
    told = {pair: {"reason": by_pair[pair], "last_copy": pair in hopeless} for pair in declared.bad}
    _tell(s, "replica.bad", told, account_id)
    return declared


def proven_good(s: Session, pairs: Sequence[Pair]) -> int:
    """Their own site's worker has read all of these, and they are the catalogue's: evidence. The caller has called
    `hold`. Returns how many count again that did not."""
    return _good(s, pairs, evidence=True)


def taken_back(s: Session, pairs: Sequence[Pair], account_id: int | None = None) -> int:
    """Nobody but a person had said that these are bad, and says so no more: they are what they were before. The caller
    has called `hold` and seen that no worker was sent to rewrite them meanwhile."""
    return _good(s, pairs, evidence=False, account_id=account_id)


def not_taken_for_good(s: Session, pairs: Sequence[Pair]) -> set[int]:
    """These are available, and cannot be shown to be good: they count for no rule until somebody has looked, and are
    brought anew where one wishes it. The caller holds them; returns the rules concerned, for the caller to settle."""
    batch = rows_of(s, "not_shown", PAIR, sorted(pairs))
    s.execute(replicas.update().where(of_pair(batch)).values(state=ReplicaState.UNAVAILABLE))
    touched = set(provision.count_available(s, batch, -1))
    if provision.provide(s, _wanted(s, pairs), touched).left_stuck:
        look_soon(s, touched)
    return touched


def hold(s: Session, pairs: sa.FromClause) -> None:
    """The rules that cover these, their endpoints, and they themselves."""
    guards.change_rules_covering(s, pairs)
    guards.change_endpoints(s, sa.select(pairs.c.endpoint_id))
    guards.change_replicas(s, pairs)


def last_copies(s: Session, rule_id: int, pairs: sa.FromClause) -> list[reasons.Found]:
    """Why a rule cannot have these: what is there is bad, and there is nothing to heal it from."""
    query = (
        sa.select(replicas.c.endpoint_id, sa.func.count().label("files"), sa.func.min(suspects.c.message).label("said"))
        .select_from(pairs)
        .join(replicas, of_pair(pairs))
        .outerjoin(
            suspects,
            sa.and_(suspects.c.file_id == replicas.c.file_id, suspects.c.endpoint_id == replicas.c.endpoint_id),
        )
        .where(Unguessed(is_hopeless()))
        .group_by(replicas.c.endpoint_id)
        .order_by(replicas.c.endpoint_id)
    )
    return [
        reasons.Found(
            rule_id, LAST_COPY_BAD, row.endpoint_id, _told(row.said or "it is bad"), LAST_COPY_HINT, row.files
        )
        for row in s.execute(query)
    ]


def is_hopeless() -> sa.ColumnElement[bool]:
    """Of a row of `replicas`: bad, and no good copy is known."""
    return sa.and_(replicas.c.state == literal(ReplicaState.BAD), sa.not_(is_good_elsewhere(doubted_too=True)))


def forget_what_is_over(s: Session, site_id: int) -> None:
    """Doubts of this site's replicas that are gone, on their way anew, or were proven since by somebody else."""
    its = sa.select(endpoints.c.id).where(endpoints.c.site_id == site_id)
    same = sa.and_(replicas.c.file_id == suspects.c.file_id, replicas.c.endpoint_id == suspects.c.endpoint_id)
    # What is being deleted may be had back, and is then what it was.
    still = sa.or_(
        any_of(replicas.c.state, (ReplicaState.BAD, ReplicaState.UNAVAILABLE, ReplicaState.DELETING)),
        sa.and_(
            replicas.c.state == literal(ReplicaState.AVAILABLE),
            suspects.c.was.is_(None),
            sa.or_(replicas.c.verified_at.is_(None), replicas.c.verified_at <= suspects.c.since),
        ),
    )
    s.execute(
        suspects.delete().where(
            suspects.c.endpoint_id.in_(its), sa.not_(sa.exists(sa.select(1).where(same, Unguessed(still))))
        )
    )


def wake_sites_of(s: Session, endpoint_ids: set[int]) -> None:
    if endpoint_ids:
        query = sa.select(endpoints.c.site_id).where(endpoints.c.id.in_(sorted(endpoint_ids))).distinct()
        provision.wake_sites(s, set(s.execute(query).scalars()))


# --- what follows ---------------------------------------------------------------------------------------------------


def _states(s: Session, pairs: sa.FromClause) -> dict[Pair, ReplicaState]:
    query = sa.select(replicas.c.file_id, replicas.c.endpoint_id, replicas.c.state)
    return {(f, e): state for f, e, state in s.execute(query.select_from(pairs).join(replicas, of_pair(pairs)))}


def _write_down(
    s: Session,
    rows: Sequence[tuple[Pair, ReplicaState, str]],
    why: Why,
    proven: bool,
    account_id: int | None,
) -> None:
    columns: Columns = {**PAIR, "was": State(ReplicaState), "message": sa.String()}
    batch = rows_of(s, "written_down", columns, [(*pair, was, message) for pair, was, message in rows])
    now = sa.literal(s.now, Instant())
    values = {
        "file_id": batch.c.file_id,
        "endpoint_id": batch.c.endpoint_id,
        "why": sa.literal(why.value),
        "message": batch.c.message,
        "account_id": sa.literal(account_id, sa.BigInteger()),
        "since": now,
        "proven": sa.literal(proven),
        "was": batch.c.was,
    }
    query = sa.select(*values.values()).where(sa.true()).order_by(batch.c.file_id, batch.c.endpoint_id)
    made = insert(s, suspects).from_select([*values], query)
    new = made.excluded
    bad_before = new.was == literal(ReplicaState.BAD)
    s.execute(
        made.on_conflict_do_update(
            index_elements=["file_id", "endpoint_id"],
            set_={
                "why": new.why,
                "message": new.message,
                "account_id": new.account_id,
                "since": sa.case((bad_before, suspects.c.since), else_=new.since),
                # Once proven, no word makes it unproven.
                "proven": sa.or_(new.proven, sa.and_(bad_before, suspects.c.proven)),
                "was": sa.case((bad_before, suspects.c.was), else_=new.was),
                "due_at": None,
                "lease_until": None,
                "attempts": 0,
            },
        )
    )


def _wanted(s: Session, pairs: Sequence[Pair]) -> sa.Subquery:
    """What rules wish of these, as replica.catalog.provision takes it."""
    cover = covering(rows_of(s, "to_heal", PAIR, sorted(pairs)))
    return (
        sa.select(
            cover.c.file_id,
            cover.c.endpoint_id,
            sa.func.max(files.c.size_bytes).label("size_bytes"),
            sa.func.min(rules.c.id).label("rule_id"),
            sa.func.max(rules.c.priority).label("priority"),
            sa.func.min(rules.c.activity).label("activity"),
        )
        .join(files, files.c.did_id == cover.c.file_id)
        .join(rules, rules.c.id == cover.c.rule_id)
        .where(is_wished(cover.c.file_id, cover.c.endpoint_id))
        .group_by(cover.c.file_id, cover.c.endpoint_id)
        .subquery("wanted")
    )


def _covered_by(s: Session, pairs: Sequence[Pair]) -> set[int]:
    cover = covering(rows_of(s, "covered_by", PAIR, sorted(pairs)))
    return set(s.execute(sa.select(cover.c.rule_id).distinct()).scalars())


def _heal(s: Session, pairs: Sequence[Pair]) -> set[int]:
    """Transfers from the good copies, where rules wish it."""
    touched = _covered_by(s, pairs)
    if touched and provision.provide(s, _wanted(s, pairs), touched).left_stuck:
        look_soon(s, touched)
    return touched


def _give_up(s: Session, said: dict[Pair, str]) -> set[int]:
    """There is nothing to heal these from: what was to bring them ends, and their rules are stuck for that reason."""
    wanted = _wanted(s, sorted(said))
    waits = sa.and_(
        sa.tuple_(transfers.c.file_id, transfers.c.target_id).in_(sa.select(wanted.c.file_id, wanted.c.endpoint_id)),
        Unguessed(any_of(transfers.c.state, set(provision.LIVE) - TRANSFER_LEASED)),
    )
    vain_before = _in_vain(s, wanted)
    guards.change_transfers(s, waits)
    provision.cancel(s, waits, LAST_COPY_BAD, "no good copy is left to bring it from")
    live = provision.is_live(wanted.c.file_id, wanted.c.endpoint_id)
    stuck = provision.is_stuck(wanted.c.file_id, wanted.c.endpoint_id)
    nothing_yet = sa.select(wanted).where(sa.not_(live), sa.not_(stuck)).subquery("nothing_yet")
    now = sa.literal(s.now, Instant())
    values: dict[str, Any] = {
        "file_id": nothing_yet.c.file_id,
        "target_id": nothing_yet.c.endpoint_id,
        "site_id": endpoints.c.site_id,
        "rule_id": nothing_yet.c.rule_id,
        "state": literal(TransferState.FAILED),
        "priority": nothing_yet.c.priority,
        "activity": nothing_yet.c.activity,
        "size_bytes": nothing_yet.c.size_bytes,
        "created_at": now,
        "finished_at": now,
        "reason_code": sa.literal(LAST_COPY_BAD),
        "reason": sa.literal("no good copy is left to bring it from"),
    }
    rows = sa.select(*values.values()).join_from(nothing_yet, endpoints, endpoints.c.id == nothing_yet.c.endpoint_id)
    s.execute(transfers.insert().from_select([*values], rows))
    touched = _covered_by(s, sorted(said))
    if newly := sorted(set(_in_vain(s, wanted)) - set(vain_before)):
        touched.update(provision.count_stuck(s, rows_of(s, "newly_stuck", PAIR, newly), 1))
        cover = covering(rows_of(s, "told_of", PAIR, newly))
        query = sa.select(cover.c.rule_id, cover.c.file_id, cover.c.endpoint_id).distinct()
        reasons.add(
            s,
            [
                reasons.Found(rule_id, LAST_COPY_BAD, endpoint_id, _told(said[f, endpoint_id]), LAST_COPY_HINT, 1)
                for rule_id, f, endpoint_id in s.execute(query)
            ],
        )
    return touched


def _told(message: str) -> str:
    return f"the last copy is bad, and is kept: {message}"


def _in_vain(s: Session, wanted: sa.FromClause) -> list[Pair]:
    query = sa.select(wanted.c.file_id, wanted.c.endpoint_id)
    return [(f, e) for f, e in s.execute(query.where(provision.is_stuck(wanted.c.file_id, wanted.c.endpoint_id)))]


def _good(s: Session, pairs: Sequence[Pair], *, evidence: bool, account_id: int | None = None) -> int:
    if not pairs:
        return 0
    batch = rows_of(s, "good_again", PAIR, sorted(set(pairs)))
    there = _states(s, batch)
    concerned = sorted(pair for pair in set(pairs) if there.get(pair) in _THERE)
    if not concerned:
        return 0
    came = [pair for pair in concerned if there[pair] is not ReplicaState.AVAILABLE]
    batch = rows_of(s, "good_now", PAIR, concerned)
    values: dict[str, Any] = {"state": ReplicaState.AVAILABLE}
    if evidence:
        values |= {"evidence": Evidence.SCRUBBED, "verified_at": s.now}
    s.execute(replicas.update().where(of_pair(batch)).values(values))
    same = sa.tuple_(suspects.c.file_id, suspects.c.endpoint_id)
    s.execute(suspects.delete().where(same.in_(sa.select(batch.c.file_id, batch.c.endpoint_id))))
    if came:
        locks.replicas_became_available(s, rows_of(s, "came_back", PAIR, came))
    _tell(s, "replica.good", {pair: {"verified": evidence} for pair in concerned}, account_id)
    return len(came)


def _tell(s: Session, kind: str, what: Mapping[Pair, Mapping[str, Any]], account_id: int | None) -> None:
    """One event for each, by the names that people know."""
    if not what:
        return
    batch = rows_of(s, "told_by_name", PAIR, sorted(what))
    query = (
        sa.select(batch, scopes.c.name.label("scope"), dids.c.name.label("did"), endpoints.c.name.label("endpoint"))
        .select_from(batch)
        .join(dids, dids.c.id == batch.c.file_id)
        .join(scopes, scopes.c.id == dids.c.scope_id)
        .join(endpoints, endpoints.c.id == batch.c.endpoint_id)
        .order_by(batch.c.file_id, batch.c.endpoint_id)
    )
    for row in s.execute(query).all():
        more = what[row.file_id, row.endpoint_id]
        outbox.record(
            s,
            kind,
            row.file_id,
            account_id,
            did=f"{row.scope}:{row.did}",
            endpoint=row.endpoint,
            endpoint_id=row.endpoint_id,
            **more,
        )
