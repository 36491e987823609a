"""What must be true of transfers and deletions: who holds them, how they end, and that nobody does things twice.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.orders, .outcomes and .deletions keep them.
"""

from __future__ import annotations

from replica.catalog.fsck_invariant import Invariant, sql

INVARIANTS = (
    Invariant(
        "transfer-once",
        "At most one transfer of a file to a target is under way.",
        sql("""
            SELECT t.file_id, t.target_id, count(*) AS live, min(t.id) AS transfer_id
            FROM transfers t WHERE t.state IN ({transfer.live})
            GROUP BY t.file_id, t.target_id HAVING count(*) > 1"""),
        "{live} transfers bring {file} to {target} at once, the first is {transfer_id}",
    ),
    Invariant(
        "transfer-replica",
        "A transfer that is under way has a replica that is not available yet, at an endpoint of its site.",
        sql("""
            SELECT t.id AS transfer_id, t.file_id, t.target_id,
                   CASE WHEN r.file_id IS NULL THEN 'has no replica there'
                        WHEN r.state = {replica.AVAILABLE} THEN 'is available there'
                        ELSE 'belongs to the workers of another site' END AS what
            FROM transfers t JOIN endpoints e ON e.id = t.target_id
            LEFT JOIN replicas r ON r.file_id = t.file_id AND r.endpoint_id = t.target_id
            WHERE t.state IN ({transfer.live})
              AND (r.file_id IS NULL OR r.state = {replica.AVAILABLE} OR t.site_id <> e.site_id)"""),
        "transfer {transfer_id} brings {file} to {target}, which {what}",
    ),
    Invariant(
        "transfer-lease",
        "A worker holds a lease on what it was given, and on nothing else; what waits says for what.",
        sql("""
            SELECT t.id AS transfer_id, t.state AS transfer_state, t.worker, t.lease_until, t.reason_code
            FROM transfers t
            WHERE t.state IN ({transfer.leased}) AND (t.lease_until IS NULL OR t.worker IS NULL)
               OR t.state NOT IN ({transfer.leased}) AND t.lease_until IS NOT NULL
               OR t.state = {transfer.WAITING} AND t.reason_code IS NULL"""),
        "transfer {transfer_id} is {transfer_state}; worker: {worker}, lease: {lease_until}, reason: {reason_code}",
    ),
    Invariant(
        "transfer-suspended",
        "What waits because its rules are suspended is wanted by no other rule, unless that is being seen to.",
        sql("""
            SELECT t.id AS transfer_id, t.file_id, t.target_id, l.rule_id
            FROM transfers t
            JOIN contents c ON c.child_id = t.file_id
            JOIN locks l ON l.unit_id = c.parent_id AND l.endpoint_id = t.target_id
            JOIN rules r ON r.id = l.rule_id
            WHERE t.state = {transfer.WAITING} AND t.reason_code = 'suspended' AND r.followed_to IS NULL
              AND r.state NOT IN ({rule.SUSPENDED}, {rule.EXPIRED}) AND NOT l.surplus AND l.applied_to IS NULL
            UNION ALL
            SELECT t.id, t.file_id, t.target_id, l.rule_id
            FROM transfers t
            JOIN locks l ON l.unit_id = t.file_id AND l.endpoint_id = t.target_id
            JOIN rules r ON r.id = l.rule_id
            WHERE t.state = {transfer.WAITING} AND t.reason_code = 'suspended' AND r.followed_to IS NULL
              AND r.state NOT IN ({rule.SUSPENDED}, {rule.EXPIRED}) AND NOT l.surplus AND l.applied_to IS NULL"""),
        "transfer {transfer_id} of {file} to {target} waits, and rule {rule_id}, which wants it, is not suspended",
    ),
    Invariant(
        "transfer-finished",
        "A transfer has the moment of its end if and only if it has ended.",
        sql("""
            SELECT t.id AS transfer_id, t.state AS transfer_state, t.finished_at FROM transfers t
            WHERE (t.state IN ({transfer.over})) <> (t.finished_at IS NOT NULL)"""),
        "transfer {transfer_id} is {transfer_state}, ended: {finished_at}",
    ),
    Invariant(
        "transfer-attempts",
        "A transfer was not attempted more often than it was claimed.",
        sql("""
            SELECT t.id AS transfer_id, t.attempts, t.epoch FROM transfers t
            WHERE t.attempts < 0 OR t.attempts > t.epoch"""),
        "transfer {transfer_id} has {attempts} attempts in {epoch} claims",
    ),
    Invariant(
        "attempt-once",
        "Every claim ends once, and no claim reports that was not made; a transfer succeeds at most once.",
        sql("""
            SELECT a.transfer_id, a.epoch, count(*) AS ends, t.epoch AS claims
            FROM attempts a JOIN transfers t ON t.id = a.transfer_id
            GROUP BY a.transfer_id, a.epoch, t.epoch HAVING count(*) > 1 OR a.epoch > t.epoch
            UNION ALL
            SELECT a.transfer_id, max(a.epoch), count(*), max(t.epoch)
            FROM attempts a JOIN transfers t ON t.id = a.transfer_id
            WHERE a.outcome = 'done' GROUP BY a.transfer_id HAVING count(*) > 1"""),
        "claim {epoch} of transfer {transfer_id} ended {ends} times; it was claimed {claims} times",
    ),
    Invariant(
        "probe-lease",
        "A worker holds a look at a replica if and only if one is wanted, and says since when.",
        sql("""
            SELECT u.file_id, u.endpoint_id, u.worker, u.lease_until, u.due_at FROM suspects u
            WHERE u.lease_until IS NOT NULL AND (u.due_at IS NULL OR u.worker IS NULL OR u.claimed_at IS NULL)"""),
        "the look at {file} at {endpoint} is in the hands of {worker} until {lease_until}, wanted since {due_at}",
    ),
    Invariant(
        "scrub-place",
        "A scrub's place is before the end of the batch that is under way, and it stands still where it was halted.",
        sql("""
            SELECT c.endpoint_id, c.reached, c.upto, c.worker, c.lease_until, c.halted_at FROM scrubs c
            WHERE c.reached < 0 OR c.files < 0 OR c.wrong < 0 OR c.wrong > c.files
               OR (c.lease_until IS NULL) <> (c.upto IS NULL) OR (c.upto IS NOT NULL AND c.upto < c.reached)
               OR (c.lease_until IS NOT NULL AND (c.worker IS NULL OR c.claimed_at IS NULL))
               OR (c.halted_at IS NOT NULL AND (c.lease_until IS NOT NULL OR c.halted_why = ''))"""),
        "the scrub of {endpoint} is at {reached}, its batch ends at {upto}; worker: {worker}, lease: {lease_until}",
    ),
    Invariant(
        "route-transfer",
        "A route serves a transfer of its file to its target, over other endpoints than that.",
        sql("""
            SELECT r.id AS route_id, r.transfer_id, r.file_id, r.target_id
            FROM routes r LEFT JOIN transfers t ON t.id = r.transfer_id
            WHERE t.id IS NULL OR t.file_id <> r.file_id OR t.target_id <> r.target_id
               OR EXISTS (SELECT 1 FROM route_hops h WHERE h.route_id = r.id
                            AND (h.endpoint_id = r.target_id OR h.file_id <> r.file_id))"""),
        "route {route_id} of {file} to {target} does not fit transfer {transfer_id} or its own steps",
    ),
    Invariant(
        "route-closed",
        "A route has steps, which are open as long as it is; one that is closed says how it ended.",
        sql("""
            SELECT r.id AS route_id, r.closed_at, r.outcome FROM routes r
            WHERE (r.closed_at IS NULL) <> (r.outcome IS NULL)
               OR NOT EXISTS (SELECT 1 FROM route_hops h WHERE h.route_id = r.id)
               OR EXISTS (SELECT 1 FROM route_hops h WHERE h.route_id = r.id
                            AND (h.closed_at IS NULL) <> (r.closed_at IS NULL))"""),
        "route {route_id} was closed at {closed_at} as {outcome}, and its steps were not, or the other way round",
    ),
    Invariant(
        "route-reserved",
        "While a route is in force, each of its steps has a replica that is not being deleted.",
        sql("""
            SELECT h.route_id, h.file_id, h.endpoint_id
            FROM route_hops h JOIN routes r ON r.id = h.route_id JOIN transfers t ON t.id = r.transfer_id
            LEFT JOIN replicas p ON p.file_id = h.file_id AND p.endpoint_id = h.endpoint_id
            WHERE h.closed_at IS NULL AND t.state IN ({transfer.live})
              AND (p.state IS NULL OR p.state = {replica.DELETING})"""),
        "{file} is a step of route {route_id} at {endpoint}, and has no replica there that stays",
    ),
    Invariant(
        "route-waiting",
        "A transfer that waits since it comes over other endpoints has a route.",
        sql("""
            SELECT t.id AS transfer_id, t.file_id, t.target_id FROM transfers t
            WHERE t.state = {transfer.QUEUED} AND t.reason_code = 'hops'
              AND NOT EXISTS (SELECT 1 FROM routes r WHERE r.transfer_id = t.id AND r.closed_at IS NULL)"""),
        "transfer {transfer_id} of {file} to {target} waits for a route that is not there",
    ),
    Invariant(
        "transfer-reads",
        "Other sources are counted for claims that were made, and are neither the first source nor the target.",
        sql("""
            SELECT x.transfer_id, x.epoch, x.source_id, t.epoch AS claims
            FROM reads x LEFT JOIN transfers t ON t.id = x.transfer_id
            WHERE t.id IS NULL OR x.epoch > t.epoch OR x.source_id = t.target_id
               OR x.epoch = t.epoch AND t.state IN ({transfer.leased}) AND x.source_id = t.reads_id"""),
        "claim {epoch} of transfer {transfer_id}, which was claimed {claims} times, counts {source} once more",
    ),
    Invariant(
        "deletion-once",
        "At most one deletion of a replica is under way.",
        sql("""
            SELECT d.file_id, d.endpoint_id, count(*) AS live, min(d.id) AS deletion_id
            FROM deletions d WHERE d.state IN ({deletion.live})
            GROUP BY d.file_id, d.endpoint_id HAVING count(*) > 1"""),
        "{live} deletions of {file} at {endpoint} are under way, the first is {deletion_id}",
    ),
    Invariant(
        "deletion-lease",
        "A deletion is held by a worker if and only if it was claimed, and by one of the endpoint's site.",
        sql("""
            SELECT d.id AS deletion_id, d.state AS deletion_state, d.worker, d.lease_until, d.endpoint_id
            FROM deletions d JOIN endpoints e ON e.id = d.endpoint_id
            WHERE d.state = {deletion.CLAIMED} AND (d.lease_until IS NULL OR d.worker IS NULL)
               OR d.state <> {deletion.CLAIMED} AND d.lease_until IS NOT NULL
               OR d.site_id <> e.site_id"""),
        "deletion {deletion_id} at {endpoint} is {deletion_state}; worker: {worker}, lease: {lease_until}",
    ),
    Invariant(
        "deletion-finished",
        "A deletion has the moment of its end if and only if it has ended.",
        sql("""
            SELECT d.id AS deletion_id, d.state AS deletion_state, d.finished_at FROM deletions d
            WHERE (d.state IN ({deletion.over})) <> (d.finished_at IS NOT NULL)"""),
        "deletion {deletion_id} is {deletion_state}, ended: {finished_at}",
    ),
    Invariant(
        "deletion-attempts",
        "A deletion was not attempted more often than it was claimed.",
        sql("""
            SELECT d.id AS deletion_id, d.attempts, d.epoch FROM deletions d
            WHERE d.attempts < 0 OR d.attempts > d.epoch"""),
        "deletion {deletion_id} has {attempts} attempts in {epoch} claims",
    ),
    Invariant(
        "deletion-covered",
        "Nothing that a rule protects waits to be deleted.",
        sql("""
            SELECT d.id AS deletion_id, d.file_id, d.endpoint_id, l.rule_id
            FROM deletions d
            JOIN contents c ON c.child_id = d.file_id
            JOIN locks l ON l.unit_id = c.parent_id AND l.endpoint_id = d.endpoint_id
            JOIN rules r ON r.id = l.rule_id
            WHERE d.state = {deletion.QUEUED} AND r.state <> {rule.EXPIRED} AND l.applied_to IS NULL
            UNION ALL
            SELECT d.id, d.file_id, d.endpoint_id, l.rule_id
            FROM deletions d
            JOIN locks l ON l.unit_id = d.file_id AND l.endpoint_id = d.endpoint_id
            JOIN rules r ON r.id = l.rule_id
            WHERE d.state = {deletion.QUEUED} AND r.state <> {rule.EXPIRED} AND l.applied_to IS NULL"""),
        "deletion {deletion_id} of {file} at {endpoint}, which rule {rule_id} protects",
    ),
    Invariant(
        "deletion-last-copy",
        "Unless a person said so, what is being deleted has another copy that is good, or was when it was decided.",
        # A copy that was good may be found damaged at any time, but then its replica is still there.
        sql("""
            SELECT d.id AS deletion_id, d.file_id, d.endpoint_id, d.why
            FROM deletions d
            WHERE d.state IN ({deletion.live}) AND d.was = {replica.AVAILABLE} AND d.why NOT IN ({explicit})
              AND NOT EXISTS (
                  SELECT 1 FROM replicas r WHERE r.file_id = d.file_id AND r.endpoint_id <> d.endpoint_id
                    AND r.state <> {replica.DELETING} AND (r.state <> {replica.COPYING} OR r.evidence IS NOT NULL))"""),
        "deletion {deletion_id} would remove the last copy of {file}, at {endpoint}; it is for: {why}",
    ),
)
