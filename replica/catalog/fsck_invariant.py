"""What an invariant is, and the words that the SQL of invariants is written in.

Given     nothing: the modules fsck_*.py write invariants with it.
Returns   Invariant; fragments of SQL that several of them share.
Promises  the SQL is the same for PostgreSQL and SQLite, and shares no query with the code that it watches: what both
          have wrong, neither would find.
Partner   replica.catalog.fsck runs them. In the texts, {rule.OK} is the number of that state and :now is this moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from replica.db.engine import Session
from rules import states
from rules.deletion import EXPLICIT

#: One violation: names of columns and their values.
Facts = Mapping[str, Any]
Find = Callable[[Session], Iterable[Facts]]


@dataclass(frozen=True, slots=True)
class Repair:
    """How a counter is set right."""

    #: Takes the locks without which nobody else moves these counters.
    hold: Callable[[Session, Sequence[Facts]], None]
    #: Counts again what these violations are about, and writes it down.
    recount: Callable[[Session, Sequence[Facts]], None]


@dataclass(frozen=True, slots=True)
class Invariant:
    """Something that is true at every commit."""

    name: str
    #: In one sentence.
    promise: str
    #: Selects what violates it. A column `file_id` is a DID, `endpoint_id` an endpoint: see replica.catalog.fsck.
    find: str | Find
    #: How one violation reads, with the facts by name: {file} is the name of what `file_id` stands for.
    told: str
    #: By what the smallest counter-example is the smallest.
    smallest: str = "1"
    repair: Repair | None = None


def sql(text: str) -> str:
    """The text with the numbers of states, and with fragments that stand below, put in."""
    return text.format_map(_WORDS)


def _states(enum: type[Enum], **groups: Collection[Enum]) -> SimpleNamespace:
    numbers = {state.name: str(state.value) for state in enum}
    numbers |= {name: ", ".join(str(s.value) for s in sorted(g, key=lambda s: s.value)) for name, g in groups.items()}
    return SimpleNamespace(**numbers)


_T, _D = states.TransferState, states.DeletionState
_C, _F = states.ScanState, states.FindingState
_WORDS: dict[str, Any] = {
    "kind": _states(states.DidKind),
    "grouping": _states(states.Grouping),
    "evidence": _states(states.Evidence),
    "replica": _states(states.ReplicaState),
    "rule": _states(states.RuleState, without_locks=states.RULE_WITHOUT_LOCKS),
    "transfer": _states(
        _T,
        live=set(_T) - states.TRANSFER_TERMINAL,
        leased=states.TRANSFER_LEASED,
        in_vain={_T.FAILED, _T.CANCELLED},
        over=states.TRANSFER_TERMINAL,
    ),
    "deletion": _states(_D, live=set(_D) - states.DELETION_TERMINAL, over=states.DELETION_TERMINAL),
    "scan": _states(
        states.ScanState,
        live=states.SCAN_LIVE,
        leased=states.SCAN_LEASED,
        over=states.SCAN_TERMINAL,
        complete={_C.HELD, _C.TO_VERIFY, _C.VERIFYING, _C.DONE},
    ),
    "finding": _states(_F, going={_F.ASKED, _F.CLAIMED, _F.REMOVED, _F.KEPT}, judged={_F.LOST, _F.THERE, _F.UNCLEAR}),
    # What may remove a last copy.
    "explicit": ", ".join(sorted(f"'{why.value}'" for why in EXPLICIT)),
}


def held(only: str = "true") -> str:
    """`held(rule_id, unit_id, endpoint_id, file_id, …)`: each file of each lock of a rule that has not ended."""
    return f"""
    held AS (
        SELECT l.rule_id, l.unit_id, l.endpoint_id, l.applied_to, l.surplus, c.child_id AS file_id
        FROM locks l JOIN rules r ON r.id = l.rule_id JOIN contents c ON c.parent_id = l.unit_id
        WHERE r.state <> {_WORDS["rule"].EXPIRED} AND {only}
        UNION ALL
        SELECT l.rule_id, l.unit_id, l.endpoint_id, l.applied_to, l.surplus, l.unit_id
        FROM locks l JOIN rules r ON r.id = l.rule_id JOIN files f ON f.did_id = l.unit_id
        WHERE r.state <> {_WORDS["rule"].EXPIRED} AND {only}
    )"""


def parts(only: str = "true") -> str:
    """`below(rule_id, id, kind)`: the DIDs of rules in force, and the collections below. Needs WITH RECURSIVE."""
    return f"""
    below(rule_id, id, kind) AS (
        {sql("SELECT r.id, d.id, d.kind FROM rules r JOIN dids d ON d.id = r.did_id")}
        {sql("WHERE r.state NOT IN ({rule.without_locks}) AND ")} {only}
        UNION
        SELECT b.rule_id, d.id, d.kind
        FROM below b JOIN contents c ON c.parent_id = b.id JOIN dids d ON d.id = c.child_id
        {sql("WHERE b.kind = {kind.CONTAINER}")}
    )"""


def units(only: str = "true") -> str:
    """The same, and `units(rule_id, unit_id)`: what a rule places as a whole, by its grouping."""
    return parts(only) + sql(""",
    units(rule_id, unit_id) AS (
        SELECT b.rule_id, b.id FROM below b JOIN rules r ON r.id = b.rule_id
        WHERE b.kind = {kind.FILE} OR (b.kind = {kind.DATASET} AND r.grouping <> {grouping.NONE})
        UNION
        SELECT b.rule_id, c.child_id
        FROM below b JOIN rules r ON r.id = b.rule_id JOIN contents c ON c.parent_id = b.id
        WHERE b.kind = {kind.DATASET} AND r.grouping = {grouping.NONE}
    )""")


#: `work(file_id, endpoint_id, live, vain)`: whether a transfer is under way there, and whether one ended in vain.
WORK = sql("""
    work AS (
        SELECT file_id, target_id AS endpoint_id,
               max(CASE WHEN state IN ({transfer.live}) THEN 1 ELSE 0 END) AS live,
               max(CASE WHEN state IN ({transfer.in_vain}) THEN 1 ELSE 0 END) AS vain
        FROM transfers WHERE state <> {transfer.DONE} GROUP BY file_id, target_id
    )""")
#: Bounds `held` and `units` to a few rules, which are bound as `these`.
OF_THESE = "r.id IN :these"


def ids(rows: Sequence[Facts], name: str) -> list[int]:
    return sorted({row[name] for row in rows})


def about(text: str, these: Sequence[int]) -> sa.TextClause:
    """The statement, with `these` bound where it says IN :these."""
    bound: sa.BindParameter[Any] = sa.bindparam("these", these, expanding=True)
    return sa.text(text).bindparams(bound)
