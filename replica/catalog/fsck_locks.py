"""What must be true of locks: of what they protect, and of what they count.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.placing, .locks, .provision and .outcomes keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

from replica.catalog import guards
from replica.catalog.fsck_invariant import OF_THESE, WORK, Facts, Invariant, Repair, about, held, ids, parts, sql, units
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session

_COUNTED = sql("""
    counted AS (
        SELECT h.rule_id, h.unit_id, h.endpoint_id, count(*) AS files, sum(f.size_bytes) AS bytes,
               sum(CASE WHEN r.state = {replica.AVAILABLE} THEN 1 ELSE 0 END) AS available,
               sum(CASE WHEN r.state <> {replica.AVAILABLE} AND w.vain = 1 AND w.live = 0 THEN 1 ELSE 0 END) AS stuck,
               sum(CASE WHEN r.file_id IS NULL THEN f.size_bytes ELSE 0 END) AS unbooked
        FROM held h
        JOIN files f ON f.did_id = h.file_id
        LEFT JOIN replicas r ON r.file_id = h.file_id AND r.endpoint_id = h.endpoint_id
        LEFT JOIN work w ON w.file_id = h.file_id AND w.endpoint_id = h.endpoint_id
        GROUP BY h.rule_id, h.unit_id, h.endpoint_id
    )""")

_COUNTERS = sql(
    f"WITH {held()}, {WORK}, {_COUNTED}"
    """
    SELECT l.rule_id, l.unit_id, l.endpoint_id, l.files_total, l.files_available, l.files_stuck, l.bytes_total,
           coalesce(t.files, 0) AS files_true, coalesce(t.available, 0) AS available_true,
           coalesce(t.stuck, 0) AS stuck_true, coalesce(t.bytes, 0) AS bytes_true
    FROM locks l
    JOIN rules r ON r.id = l.rule_id AND r.state <> {rule.EXPIRED}
    LEFT JOIN counted t ON t.rule_id = l.rule_id AND t.unit_id = l.unit_id AND t.endpoint_id = l.endpoint_id
    WHERE l.files_total <> coalesce(t.files, 0) OR l.files_available <> coalesce(t.available, 0)
       OR l.files_stuck <> coalesce(t.stuck, 0) OR l.bytes_total <> coalesce(t.bytes, 0)"""
)

#: The same for the locks of a few rules, walked by index.
_MEND = sql(
    f"WITH {held(OF_THESE)}, {WORK}, {_COUNTED}"
    """
    UPDATE locks SET files_total = t.files, files_available = t.available, files_stuck = t.stuck,
           bytes_total = t.bytes,
           bytes_pending = CASE WHEN locks.applied_to IS NULL OR locks.surplus THEN 0 ELSE t.unbooked END
    FROM (
        SELECT l.rule_id, l.unit_id, l.endpoint_id,
               coalesce(c.files, 0) AS files, coalesce(c.available, 0) AS available, coalesce(c.stuck, 0) AS stuck,
               coalesce(c.bytes, 0) AS bytes, coalesce(c.unbooked, 0) AS unbooked
        FROM locks l
        LEFT JOIN counted c ON c.rule_id = l.rule_id AND c.unit_id = l.unit_id AND c.endpoint_id = l.endpoint_id
    ) t
    WHERE locks.rule_id = t.rule_id AND locks.unit_id = t.unit_id AND locks.endpoint_id = t.endpoint_id
      AND locks.rule_id IN :these"""
)


def _hold_rules(s: Session, rows: Sequence[Facts]) -> None:
    # No counter of a lock moves without its rule.
    guards.change_rules(s, ids(rows, "rule_id"))


def _recount_locks(s: Session, rows: Sequence[Facts]) -> None:
    rule_ids = ids(rows, "rule_id")
    s.execute(about(_MEND, rule_ids))
    look_soon(s, rule_ids)  # its reasons, too, may be those of wrong counters
    settle(s, rule_ids)


RECOUNT = Repair(_hold_rules, _recount_locks)

INVARIANTS = (
    Invariant(
        "lock-counters",
        "A lock counts the files and bytes of its unit, those that are available, and those that nothing brings.",
        _COUNTERS,
        "rule {rule_id} on {unit} at {endpoint} counts {files_total} files of {bytes_total} bytes, {files_available}"
        " available, {files_stuck} stuck; there are {files_true} of {bytes_true}, {available_true} available,"
        " {stuck_true} stuck",
        smallest="files_true, rule_id, unit_id, endpoint_id",
        repair=RECOUNT,
    ),
    Invariant(
        "lock-pending",
        "Bytes that are reserved and not booked belong to wished locks that are still being worked off.",
        sql("""
            SELECT l.rule_id, l.unit_id, l.endpoint_id, l.bytes_pending
            FROM locks l JOIN rules r ON r.id = l.rule_id AND r.state <> {rule.EXPIRED}
            WHERE l.bytes_pending < 0 OR ((l.applied_to IS NULL OR l.surplus) AND l.bytes_pending <> 0)"""),
        "rule {rule_id} on {unit} at {endpoint} reserves {bytes_pending} bytes",
        repair=RECOUNT,
    ),
    Invariant(
        "lock-unit",
        "What a rule wishes and locks is in its DID, as its grouping takes it.",
        f"WITH RECURSIVE {units()}"
        + sql("""
            SELECT l.rule_id, l.unit_id, l.endpoint_id
            FROM locks l JOIN rules r ON r.id = l.rule_id
            LEFT JOIN units u ON u.rule_id = l.rule_id AND u.unit_id = l.unit_id
            WHERE r.state <> {rule.EXPIRED} AND r.revised_to IS NULL AND NOT l.surplus AND u.unit_id IS NULL"""),
        "rule {rule_id} locks {unit} at {endpoint}, which is no unit of it",
    ),
    Invariant(
        "lock-surplus",
        "What a rule keeps until all that it wishes is there is in its DID, however it was grouped before.",
        f"WITH RECURSIVE {parts('r.id IN (SELECT rule_id FROM locks WHERE surplus)')}"
        + sql("""
            SELECT l.rule_id, l.unit_id, l.endpoint_id
            FROM locks l JOIN rules r ON r.id = l.rule_id
            LEFT JOIN below b ON b.rule_id = l.rule_id AND b.id = l.unit_id
            WHERE r.state <> {rule.EXPIRED} AND l.surplus AND b.id IS NULL
              AND NOT EXISTS (SELECT 1 FROM contents c JOIN below d ON d.id = c.parent_id
                              WHERE c.child_id = l.unit_id AND d.rule_id = l.rule_id)"""),
        "rule {rule_id} keeps {unit} at {endpoint}, which is not in its DID",
    ),
    Invariant(
        "lock-rule",
        "A rule that waits for approval locks nothing.",
        sql("""
            SELECT l.rule_id, l.unit_id, l.endpoint_id FROM locks l JOIN rules r ON r.id = l.rule_id
            WHERE r.state = {rule.WAITING_APPROVAL}"""),
        "rule {rule_id} waits for approval and locks {unit} at {endpoint}",
    ),
    Invariant(
        "lock-released",
        "The locks of a rule that has ended are being released.",
        sql("""
            SELECT l.rule_id, count(*) AS locks FROM locks l JOIN rules r ON r.id = l.rule_id
            WHERE r.state = {rule.EXPIRED} AND r.evaluate_at IS NULL GROUP BY l.rule_id"""),
        "rule {rule_id} has ended, and nobody releases its {locks} locks",
    ),
    Invariant(
        "lock-number",
        "A rule locks a unit at no more endpoints than it wishes copies.",
        sql("""
            SELECT l.rule_id, l.unit_id, r.copies, count(*) AS locked
            FROM locks l JOIN rules r ON r.id = l.rule_id
            WHERE NOT l.surplus AND r.state <> {rule.EXPIRED} AND r.revised_to IS NULL
            GROUP BY l.rule_id, l.unit_id, r.copies HAVING count(*) > r.copies"""),
        "rule {rule_id} wishes {copies} copies of {unit} and locks {locked}",
        smallest="locked, rule_id, unit_id",
    ),
    Invariant(
        "lock-provided",
        "Every copy that a rule wishes and misses is on its way, has failed, or its rule is due.",
        f"WITH {held()}, {WORK}"
        + sql("""
            SELECT h.rule_id, h.unit_id, h.endpoint_id, h.file_id,
                   CASE WHEN p.file_id IS NULL THEN 'has no replica there' ELSE 'is not brought there' END AS what
            FROM held h
            JOIN rules r ON r.id = h.rule_id
            LEFT JOIN replicas p ON p.file_id = h.file_id AND p.endpoint_id = h.endpoint_id
            LEFT JOIN work w ON w.file_id = h.file_id AND w.endpoint_id = h.endpoint_id
            WHERE h.applied_to IS NULL AND NOT h.surplus
              AND (p.file_id IS NULL OR p.state <> {replica.AVAILABLE} AND w.file_id IS NULL)
              AND (r.evaluate_at IS NULL OR r.evaluate_at > :now)"""),
        "rule {rule_id} on {unit} wishes {file} at {endpoint}: it {what}, and nobody looks",
        smallest="rule_id, unit_id, endpoint_id, file_id",
    ),
)
