"""What must be true of scans and of what they found.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.scans, .scanning and .dark keep them.
"""

from __future__ import annotations

from replica.catalog.fsck_invariant import Invariant, sql

INVARIANTS = (
    Invariant(
        "scan-once",
        "At most one scan of an endpoint is under way.",
        sql("""
            SELECT x.endpoint_id, count(*) AS live, min(x.id) AS scan_id
            FROM scans x WHERE x.state IN ({scan.live}) GROUP BY x.endpoint_id HAVING count(*) > 1"""),
        "{live} scans of {endpoint} are under way, the first is {scan_id}",
    ),
    Invariant(
        "scan-lease",
        "A scan is held by somebody if and only if it is carried out, and by a worker of the endpoint's site.",
        sql("""
            SELECT x.id AS scan_id, x.state AS scan_state, x.worker, x.lease_until, x.endpoint_id
            FROM scans x JOIN endpoints e ON e.id = x.endpoint_id
            WHERE x.state IN ({scan.leased}) AND (x.lease_until IS NULL OR x.worker IS NULL OR x.began_at IS NULL)
               OR x.state NOT IN ({scan.leased}) AND x.lease_until IS NOT NULL
               OR x.site_id <> e.site_id"""),
        "scan {scan_id} of {endpoint} is in state {scan_state}; worker: {worker}, lease: {lease_until}",
    ),
    Invariant(
        "scan-finished",
        "A scan has the moment of its end if and only if it has ended, and only a complete one ended well.",
        sql("""
            SELECT x.id AS scan_id, x.state AS scan_state, x.compared_at, x.finished_at FROM scans x
            WHERE (x.state IN ({scan.over})) <> (x.finished_at IS NOT NULL)
               OR x.compared_at IS NULL AND x.state IN ({scan.complete})"""),
        "scan {scan_id} is in state {scan_state}; compared: {compared_at}, ended: {finished_at}",
    ),
    Invariant(
        "finding-scan",
        "What was found belongs to a scan of that endpoint; what is missing is a file that there is.",
        sql("""
            SELECT f.id AS finding_id, f.scan_id, f.endpoint_id, f.kind FROM findings f
            LEFT JOIN scans x ON x.id = f.scan_id LEFT JOIN files n ON n.did_id = f.file_id
            WHERE x.id IS NULL OR x.endpoint_id <> f.endpoint_id
               OR (f.kind IN ('missing', 'differs')) <> (n.did_id IS NOT NULL AND f.generation IS NOT NULL)"""),
        "finding {finding_id} of scan {scan_id} at {endpoint}: {kind}",
    ),
    Invariant(
        "finding-lease",
        "Only what is dark is moved away, and a worker holds it while it is.",
        sql("""
            SELECT f.id AS finding_id, f.endpoint_id, f.kind, f.state AS finding_state, f.lease_until FROM findings f
            WHERE (f.state = {finding.CLAIMED}) <> (f.lease_until IS NOT NULL)
               OR f.kind <> 'dark' AND f.state IN ({finding.going})
               OR f.kind = 'dark' AND f.state IN ({finding.judged})"""),
        "finding {finding_id} at {endpoint} is {kind}, in state {finding_state}; lease: {lease_until}",
    ),
)
