"""Prove that the database agrees with itself.

Given     a database.
Returns   a Report: for each invariant how many violations there are, and the smallest ones in words.
Promises  looks at one moment, so that what goes on meanwhile is no violation; changes nothing unless told to repair,
          and then only counters, each under the locks without which nobody moves it. The memory it needs here does
          not grow with the catalogue: the database compares, and only a few examples come back.
Partner   the invariants are in fsck_*.py, by noun; `replica fsck` prints the report.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec
import sqlalchemy as sa

from replica.catalog import (
    fsck_contents,
    fsck_ledger,
    fsck_locks,
    fsck_references,
    fsck_replicas,
    fsck_rules,
    fsck_scans,
    fsck_work,
)
from replica.catalog.fsck_invariant import Facts, Invariant
from replica.db.engine import Database, Session
from replica.db.tables import accounts, dids, endpoints, instant, micros, scopes, sites
from rules import states
from rules.errors import Invalid

INVARIANTS: tuple[Invariant, ...] = (
    *fsck_contents.INVARIANTS,
    *fsck_replicas.INVARIANTS,
    *fsck_rules.INVARIANTS,
    *fsck_locks.INVARIANTS,
    *fsck_work.INVARIANTS,
    *fsck_scans.INVARIANTS,
    *fsck_ledger.INVARIANTS,
    *fsck_references.INVARIANTS,
)

#: So many violations of an invariant are told one by one.
EXAMPLES = 5
#: Of so many violations the counters are set right in one transaction.
_REPAIRED_AT_ONCE = 200
#: Memory that PostgreSQL may use for one sort or hash before it goes to disk.
_WORK_MEMORY = "64MB"


class Example(msgspec.Struct, frozen=True):
    message: str
    facts: dict[str, Any]


class Finding(msgspec.Struct, frozen=True):
    """What became of one invariant. `repaired`: so many of the violations were set right after they were counted."""

    invariant: str
    promise: str
    violations: int
    seconds: float
    examples: list[Example] = []
    repaired: int = 0


class Report(msgspec.Struct, frozen=True):
    findings: list[Finding]

    @property
    def clean(self) -> bool:
        return all(f.violations == f.repaired for f in self.findings)


def check(database: Database, *, only: Sequence[str] = (), repair: bool = False) -> Report:
    """Check the invariants named (all when none is), and set counters right when `repair` says so."""
    wanted = named(only)
    with database.read() as s:
        findings = examine(s, wanted)
    if repair:
        for i, invariant in enumerate(wanted):
            if findings[i].violations and invariant.repair is not None:
                findings[i] = msgspec.structs.replace(findings[i], repaired=_mend(database, invariant, findings[i]))
    return Report(findings)


def examine(s: Session, wanted: Iterable[Invariant] = INVARIANTS) -> list[Finding]:
    """The same within a transaction, as it sees the database."""
    _prepare(s)
    return [_look(s, invariant) for invariant in wanted]


def violations(s: Session, invariant: Invariant, limit: int = EXAMPLES) -> tuple[int, list[Facts]]:
    """How many there are, and the smallest of them."""
    if not isinstance(invariant.find, str):
        found = iter(invariant.find(s))
        first = list(islice(found, limit))
        return len(first) + sum(1 for _ in found), first
    every = f"SELECT v.*, count(*) OVER () AS violations FROM ({invariant.find}) v"
    text = f"{every} ORDER BY {invariant.smallest} LIMIT :limit"
    parameters = {"limit": limit} | ({"now": micros(s.now)} if ":now" in invariant.find else {})
    rows = [row._asdict() for row in s.execute(sa.text(text), parameters)]
    return (rows[0]["violations"] if rows else 0), [{k: v for k, v in r.items() if k != "violations"} for r in rows]


def named(names: Sequence[str]) -> tuple[Invariant, ...]:
    known = {invariant.name: invariant for invariant in INVARIANTS}
    for name in names:
        if name not in known:
            raise Invalid(f"there is no invariant {name!r}", hint=f"there are {', '.join(known)}", field="only")
    return tuple(known[name] for name in dict.fromkeys(names)) or INVARIANTS


def _prepare(s: Session) -> None:
    """What whole tables need on PostgreSQL: time, memory, and no loop over one of them within another."""
    if s.postgresql:
        s.execute(sa.text("SET LOCAL statement_timeout = 0"))
        s.execute(sa.text(f"SET LOCAL work_mem = '{_WORK_MEMORY}'"))
        s.execute(sa.text("SET LOCAL enable_nestloop = off"))


def _look(s: Session, invariant: Invariant) -> Finding:
    began = time.monotonic()
    count, rows = violations(s, invariant)
    facts = _with_names(s, rows)
    examples = [Example(invariant.told.format_map(f), f) for f in facts]
    return Finding(invariant.name, invariant.promise, count, round(time.monotonic() - began, 3), examples)


def _mend(database: Database, invariant: Invariant, finding: Finding) -> int:
    """Set the counters right, some at a time; returns how many violations are gone."""
    assert invariant.repair is not None
    left = finding.violations
    while True:
        with database.write() as s:
            _, rows = violations(s, invariant, _REPAIRED_AT_ONCE)
            if rows:
                invariant.repair.hold(s, rows)
                invariant.repair.recount(s, rows)
            now = violations(s, invariant, 1)[0]
        if now == 0 or now >= left:  # no further
            return max(0, finding.violations - now)
        left = now


# --- names instead of numbers -----------------------------------------------------------------------------------------

#: What a column stands for, by the last word of its name before `_id`.
_DIDS = frozenset({"did", "file", "unit", "parent", "child", "other"})
_ENDPOINTS = frozenset({"endpoint", "target", "source"})
_STATES: Mapping[str, type[states.Coded]] = {
    "rule_state": states.RuleState,
    "transfer_state": states.TransferState,
    "deletion_state": states.DeletionState,
    "replica_state": states.ReplicaState,
    "kind": states.DidKind,
    "evidence": states.Evidence,
}


def _with_names(s: Session, rows: Sequence[Facts]) -> list[dict[str, Any]]:
    """The facts with names: for `file_id` also `file`, states as words, instants as people read them."""
    wanted: dict[str, set[int]] = {}
    for row in rows:
        for column, value in row.items():
            noun = _noun(column)
            if noun and value is not None:
                wanted.setdefault(noun, set()).add(value)
    known = {noun: _names(s, noun, sorted(values)) for noun, values in wanted.items()}
    return [{k: v for column, value in row.items() for k, v in _told(column, value, known)} for row in rows]


def _noun(column: str) -> str:
    word = column.removesuffix("_id") if column.endswith("_id") else ""
    return "did" if word in _DIDS else "endpoint" if word in _ENDPOINTS else word if word in ("account", "site") else ""


def _told(column: str, value: Any, known: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[str, Any]]:
    if noun := _noun(column):
        yield column, value
        yield column.removesuffix("_id"), known.get(noun, {}).get(value, f"number {value}")
    elif value is not None and (column.endswith("_at") or column.endswith("_until")):
        yield column, instant(value).isoformat()
    elif isinstance(value, int) and (enum := next((e for end, e in _STATES.items() if column.endswith(end)), None)):
        yield column, enum(value).label
    else:
        yield column, int(value) if type(value).__name__ == "Decimal" else value


def _names(s: Session, noun: str, ids: Sequence[int]) -> dict[int, str]:
    if noun == "did":
        query = sa.select(dids.c.id, scopes.c.name + ":" + dids.c.name).join(scopes, scopes.c.id == dids.c.scope_id)
        return {row[0]: row[1] for row in s.execute(query.where(dids.c.id.in_(ids)))}
    table = {"endpoint": endpoints, "account": accounts, "site": sites}[noun]
    return {row[0]: row[1] for row in s.execute(sa.select(table.c.id, table.c.name).where(table.c.id.in_(ids)))}
