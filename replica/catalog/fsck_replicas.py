"""What must be true of replicas and of the space they take.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.replicas, .outcomes, .provision, .locks and .deletions keep them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import sqlalchemy as sa

from replica.catalog import guards
from replica.catalog.bulk import Columns, rows_of
from replica.catalog.fsck_invariant import Facts, Invariant, Repair, about, ids, sql
from replica.catalog.membership import by_index
from replica.db.engine import Session
from replica.db.tables import dids, replicas, scopes
from rules.paths import owners

#: How many paths are compared at once.
_PATHS = 5_000


def _hold_endpoints(s: Session, rows: Sequence[Facts]) -> None:
    guards.change_endpoints(s, ids(rows, "endpoint_id"))


def _recount_endpoints(s: Session, rows: Sequence[Facts]) -> None:
    true = (
        "(SELECT coalesce(sum(f.size_bytes), 0) FROM replicas r JOIN files f ON f.did_id = r.file_id"
        " WHERE r.endpoint_id = endpoints.id)"
    )
    # The storage said what is free when so much was used: of that number it is as wrong.
    values = f"used_bytes = {true}, reported_at_used_bytes = reported_at_used_bytes + {true} - used_bytes"
    s.execute(about(f"UPDATE endpoints SET {values} WHERE id IN :these", ids(rows, "endpoint_id")))


@contextlib.contextmanager
def _in_loops(s: Session) -> Iterator[None]:
    """A batch is looked up row by row, unlike everything else that fsck asks PostgreSQL."""
    if s.postgresql:
        s.execute(sa.text("SET LOCAL enable_nestloop = on"))
    yield
    if s.postgresql:
        s.execute(sa.text("SET LOCAL enable_nestloop = off"))


def _shared_paths(s: Session) -> Iterator[Facts]:
    """Replicas whose own path is the one that the endpoint's layout gives to another file there."""
    columns: Columns = {
        "endpoint_id": sa.BigInteger(),
        "path": sa.String(),
        "file_id": sa.BigInteger(),
        "scope": sa.String(),
        "name": sa.String(),
    }
    page = sa.text(
        "SELECT r.endpoint_id, r.path, r.file_id, e.layout FROM replicas r JOIN endpoints e ON e.id = r.endpoint_id"
        " WHERE r.path IS NOT NULL AND (r.endpoint_id, r.path) > (:after, :path)"
        " ORDER BY r.endpoint_id, r.path LIMIT :paths"
    )
    after: tuple[int, str] = (0, "")
    with _in_loops(s), by_index(s):
        while rows := s.execute(page, {"after": after[0], "path": after[1], "paths": _PATHS}).all():
            after = (rows[-1].endpoint_id, rows[-1].path)
            could = [
                (row.endpoint_id, row.path, row.file_id, did.scope, did.name)
                for row in rows
                for did in owners(row.path, row.layout)
            ]
            if not could:
                continue
            batch = rows_of(s, "own_paths", columns, could)
            query = (
                sa.select(batch.c.endpoint_id, batch.c.path, batch.c.file_id, replicas.c.file_id.label("other_id"))
                .join(scopes, scopes.c.name == batch.c.scope)
                .join(dids, sa.and_(dids.c.scope_id == scopes.c.id, dids.c.name == batch.c.name))
                .join(replicas, sa.and_(replicas.c.file_id == dids.c.id, replicas.c.endpoint_id == batch.c.endpoint_id))
                .where(replicas.c.path.is_(None), replicas.c.file_id != batch.c.file_id)
                .order_by(batch.c.endpoint_id, batch.c.path)
            )
            yield from (row._asdict() for row in s.execute(query).all())


INVARIANTS = (
    Invariant(
        "replica-evidence",
        "An available replica was verified: it says by what and when, and somebody's word is not enough.",
        sql("""
            SELECT r.file_id, r.endpoint_id, r.evidence, r.verified_at FROM replicas r
            WHERE r.state = {replica.AVAILABLE}
              AND (r.evidence IS NULL OR r.evidence = {evidence.DECLARED} OR r.verified_at IS NULL)"""),
        "{file} at {endpoint} is available, evidence: {evidence}, verified at: {verified_at}",
    ),
    Invariant(
        "replica-checksum",
        "Of a file that has an available replica, a checksum is known.",
        sql("""
            SELECT f.did_id AS file_id FROM files f
            WHERE f.xxh3_128 IS NULL AND f.adler32 IS NULL AND f.md5 IS NULL AND f.sha256 IS NULL
              AND EXISTS (SELECT 1 FROM replicas r WHERE r.file_id = f.did_id AND r.state = {replica.AVAILABLE})"""),
        "{file} is available, and no checksum of it is known",
    ),
    Invariant(
        "replica-generation",
        "The generation of a replica begins at 1; a live deletion means the present one.",
        sql("""
            SELECT r.file_id, r.endpoint_id, r.generation, NULL AS meant FROM replicas r WHERE r.generation < 1
            UNION ALL
            SELECT r.file_id, r.endpoint_id, r.generation, d.generation
            FROM deletions d JOIN replicas r ON r.file_id = d.file_id AND r.endpoint_id = d.endpoint_id
            WHERE d.state IN ({deletion.live}) AND d.generation <> r.generation"""),
        "{file} at {endpoint} is of generation {generation}; the deletion means {meant}",
    ),
    Invariant(
        "replica-protected",
        "No replica that a rule protects is marked as deletable.",
        # A lock that is worked off in slices protects anyhow; its slice takes the mark away.
        sql("""
            WITH marked AS (
                SELECT file_id, endpoint_id, tombstone_at FROM replicas WHERE tombstone_at IS NOT NULL
            )
            SELECT m.file_id, m.endpoint_id, l.rule_id, m.tombstone_at
            FROM marked m
            JOIN contents c ON c.child_id = m.file_id
            JOIN locks l ON l.unit_id = c.parent_id AND l.endpoint_id = m.endpoint_id
            JOIN rules r ON r.id = l.rule_id
            WHERE r.state <> {rule.EXPIRED} AND (l.applied_to IS NULL OR m.file_id <= l.applied_to)
            UNION ALL
            SELECT m.file_id, m.endpoint_id, l.rule_id, m.tombstone_at
            FROM marked m
            JOIN locks l ON l.unit_id = m.file_id AND l.endpoint_id = m.endpoint_id
            JOIN rules r ON r.id = l.rule_id
            WHERE r.state <> {rule.EXPIRED} AND (l.applied_to IS NULL OR m.file_id <= l.applied_to)"""),
        "{file} at {endpoint} is protected by rule {rule_id} and may be deleted since {tombstone_at}",
    ),
    Invariant(
        "replica-wanted",
        "A replica on its way is wanted by a rule, a step of a route, being verified, or is cleared away.",
        sql("""
            SELECT r.file_id, r.endpoint_id
            FROM replicas r
            WHERE r.state = {replica.COPYING} AND r.tombstone_at IS NULL
              AND (r.evidence IS NULL OR r.evidence <> {evidence.DECLARED})
              AND NOT EXISTS (SELECT 1 FROM transfers t WHERE t.file_id = r.file_id AND t.target_id = r.endpoint_id
                                AND t.state IN ({transfer.live}))
              AND NOT EXISTS (SELECT 1 FROM route_hops h WHERE h.file_id = r.file_id AND h.endpoint_id = r.endpoint_id
                                AND h.closed_at IS NULL)
              AND NOT EXISTS (SELECT 1 FROM locks l WHERE l.unit_id = r.file_id AND l.endpoint_id = r.endpoint_id)
              AND NOT EXISTS (SELECT 1 FROM contents c JOIN locks l ON l.unit_id = c.parent_id
                              WHERE c.child_id = r.file_id AND l.endpoint_id = r.endpoint_id)"""),
        "{file} at {endpoint} is on its way, and nobody wants it or clears it away",
    ),
    Invariant(
        "replica-bad",
        "A replica that is bad says why, and by whose word or look.",
        sql("""
            SELECT r.file_id, r.endpoint_id FROM replicas r
            WHERE r.state = {replica.BAD}
              AND NOT EXISTS (SELECT 1 FROM suspects u WHERE u.file_id = r.file_id AND u.endpoint_id = r.endpoint_id
                                AND u.was IS NOT NULL)"""),
        "{file} at {endpoint} is bad, and nobody wrote down why",
    ),
    Invariant(
        "replica-deleting",
        "A replica is being deleted if and only if there is a live deletion of it.",
        sql("""
            SELECT r.file_id, r.endpoint_id, 'is being deleted by nobody' AS what
            FROM replicas r
            WHERE r.state = {replica.DELETING}
              AND NOT EXISTS (SELECT 1 FROM deletions d WHERE d.file_id = r.file_id
                                AND d.endpoint_id = r.endpoint_id AND d.state IN ({deletion.live}))
            UNION ALL
            SELECT d.file_id, d.endpoint_id,
                   CASE WHEN r.file_id IS NULL THEN 'has a live deletion and no replica'
                        ELSE 'has a live deletion and is not being deleted' END
            FROM deletions d LEFT JOIN replicas r ON r.file_id = d.file_id AND r.endpoint_id = d.endpoint_id
            WHERE d.state IN ({deletion.live}) AND (r.state IS NULL OR r.state <> {replica.DELETING})"""),
        "{file} at {endpoint} {what}",
    ),
    Invariant(
        "replica-path",
        "No two files share bytes: a path of a replica's own is not the path of another file there.",
        _shared_paths,
        "the path {path} at {endpoint} is that of {file} and of {other}",
    ),
    Invariant(
        "endpoint-used",
        "used_bytes of an endpoint is the sum of the files of its replicas.",
        sql("""
            SELECT e.id AS endpoint_id, e.used_bytes, coalesce(t.bytes, 0) AS bytes_true
            FROM endpoints e LEFT JOIN (
                SELECT r.endpoint_id, sum(f.size_bytes) AS bytes
                FROM replicas r JOIN files f ON f.did_id = r.file_id GROUP BY r.endpoint_id
            ) t ON t.endpoint_id = e.id
            WHERE e.used_bytes <> coalesce(t.bytes, 0)"""),
        "{endpoint} counts {used_bytes} bytes, its replicas have {bytes_true}",
        smallest="bytes_true, endpoint_id",
        repair=Repair(_hold_endpoints, _recount_endpoints),
    ),
)
