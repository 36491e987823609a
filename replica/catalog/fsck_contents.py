"""What must be true of DIDs and of what holds what.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.dids and .locks keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

from replica.catalog import guards
from replica.catalog.fsck_invariant import Facts, Invariant, Repair, about, ids, sql
from replica.db.engine import Session

_TOTALS = """
    SELECT d.id AS did_id, d.files_total, d.bytes_total,
           coalesce(t.files, 0) AS files_true, coalesce(t.bytes, 0) AS bytes_true
    FROM dids d LEFT JOIN (
        SELECT c.parent_id, count(*) AS files, sum(f.size_bytes) AS bytes
        FROM contents c JOIN files f ON f.did_id = c.child_id GROUP BY c.parent_id
    ) t ON t.parent_id = d.id
    WHERE d.kind = {kind.DATASET}
      AND (d.files_total IS NULL OR d.bytes_total IS NULL
           OR d.files_total <> coalesce(t.files, 0) OR d.bytes_total <> coalesce(t.bytes, 0))"""


def _hold_datasets(s: Session, rows: Sequence[Facts]) -> None:
    for did_id in ids(rows, "did_id"):
        guards.change_collection(s, did_id)


def _recount_datasets(s: Session, rows: Sequence[Facts]) -> None:
    held = "FROM contents c JOIN files f ON f.did_id = c.child_id WHERE c.parent_id = dids.id"
    text = (
        f"UPDATE dids SET files_total = (SELECT count(*) {held}),"
        f" bytes_total = (SELECT coalesce(sum(f.size_bytes), 0) {held}) WHERE id IN :these"
    )
    s.execute(about(text, ids(rows, "did_id")))


INVARIANTS = (
    Invariant(
        "did-kinds",
        "Every file has a size and a row in `files`, and nothing else has.",
        sql("""
            SELECT d.id AS did_id, CASE WHEN f.did_id IS NULL THEN 'has no row in files'
                                        ELSE 'is no file and has a row in files' END AS what
            FROM dids d LEFT JOIN files f ON f.did_id = d.id
            WHERE (d.kind = {kind.FILE}) <> (f.did_id IS NOT NULL)
            UNION ALL
            SELECT f.did_id, 'has less than no bytes' FROM files f WHERE f.size_bytes < 0"""),
        "{did} {what}",
    ),
    Invariant(
        "contents-kinds",
        "Datasets hold files; containers hold datasets and containers; files hold nothing.",
        sql("""
            SELECT c.parent_id, c.child_id, p.kind AS parent_kind, d.kind AS child_kind
            FROM contents c JOIN dids p ON p.id = c.parent_id JOIN dids d ON d.id = c.child_id
            WHERE NOT (p.kind = {kind.DATASET} AND d.kind = {kind.FILE}
                       OR p.kind = {kind.CONTAINER} AND d.kind <> {kind.FILE})"""),
        "the {parent_kind} {parent} holds the {child_kind} {child}",
    ),
    Invariant(
        "contents-cycle",
        "No container contains itself, however deep.",
        # Only what is both in a container and holds one can be part of a circle.
        sql("""
            WITH RECURSIVE edges AS (
                SELECT c.parent_id, c.child_id FROM contents c
                JOIN dids p ON p.id = c.parent_id JOIN dids d ON d.id = c.child_id
                WHERE p.kind = {kind.CONTAINER} AND d.kind = {kind.CONTAINER}
            ),
            suspects AS (SELECT e.parent_id AS id FROM edges e WHERE e.parent_id IN (SELECT child_id FROM edges)),
            walk(first, id) AS (
                SELECT e.parent_id, e.child_id FROM edges e WHERE e.parent_id IN (SELECT id FROM suspects)
                UNION
                SELECT w.first, e.child_id FROM walk w JOIN edges e ON e.parent_id = w.id
            )
            SELECT w.first AS did_id FROM walk w WHERE w.first = w.id"""),
        "{did} contains itself",
    ),
    Invariant(
        "did-closed",
        "A dataset or container has the moment it was closed if and only if it is closed.",
        sql("""
            SELECT d.id AS did_id, d.open, d.closed_at FROM dids d
            WHERE d.kind <> {kind.FILE} AND (d.open = (d.closed_at IS NOT NULL))"""),
        "{did} is open: {open}, closed at: {closed_at}",
    ),
    Invariant(
        "did-totals",
        "files_total and bytes_total of a dataset are those of the files in it.",
        sql(_TOTALS),
        "{did} counts {files_total} files of {bytes_total} bytes, it has {files_true} of {bytes_true}",
        smallest="files_true, did_id",
        repair=Repair(_hold_datasets, _recount_datasets),
    ),
    Invariant(
        "did-totals-of-others",
        "Only datasets count their files.",
        sql("""
            SELECT d.id AS did_id, d.kind AS did_kind FROM dids d
            WHERE d.kind <> {kind.DATASET} AND (d.files_total IS NOT NULL OR d.bytes_total IS NOT NULL)"""),
        "the {did_kind} {did} counts files",
    ),
    Invariant(
        "did-shared",
        "Where `shared` is false, no file of the dataset is in another unit of a lock.",
        sql("""
            SELECT d.id AS did_id, c.child_id AS file_id, o.parent_id AS unit_id
            FROM (SELECT child_id FROM contents c JOIN files f ON f.did_id = c.child_id
                  GROUP BY child_id HAVING count(*) > 1) twice
            JOIN contents c ON c.child_id = twice.child_id
            JOIN dids d ON d.id = c.parent_id
            JOIN contents o ON o.child_id = twice.child_id AND o.parent_id <> c.parent_id
            WHERE NOT d.shared AND EXISTS (SELECT 1 FROM locks l WHERE l.unit_id = o.parent_id)
            UNION ALL
            SELECT d.id, c.child_id, l.unit_id
            FROM (SELECT DISTINCT unit_id FROM locks) l
            JOIN files f ON f.did_id = l.unit_id
            JOIN contents c ON c.child_id = l.unit_id
            JOIN dids d ON d.id = c.parent_id
            WHERE NOT d.shared"""),
        "{did} says that it shares no file, but {file} is in the unit {unit} of a lock, too",
    ),
)
