"""What must be true of rules: their states, their reasons, and that what is called OK is.

Given     nothing.
Returns   INVARIANTS, for replica.catalog.fsck.
Promises  see there.
Partner   replica.catalog.rules, .rule_states, .evaluation and .reasons keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

from replica.catalog import guards
from replica.catalog.fsck_invariant import OF_THESE, Facts, Invariant, Repair, about, held, ids, sql, units
from replica.catalog.reasons import NOT_MOVED
from replica.catalog.rule_states import look_soon, settle
from replica.db.engine import Session

#: A stuck rule that has no reason is looked at within this time, which is longer than any evaluation is put off.
SOON_MICROSECONDS = 30_000_000

#: `lacking(rule_id, missing)`: copies of units without a lock, of rules that are in force.
_LACKING = sql("""
    wished AS (SELECT rule_id, count(*) AS units FROM units GROUP BY rule_id),
    locked AS (SELECT rule_id, count(*) AS locks FROM locks WHERE NOT surplus GROUP BY rule_id),
    lacking AS (
        SELECT r.id AS rule_id, r.copies * coalesce(w.units, 0) - coalesce(l.locks, 0) AS missing
        FROM rules r LEFT JOIN wished w ON w.rule_id = r.id LEFT JOIN locked l ON l.rule_id = r.id
        WHERE r.state NOT IN ({rule.without_locks})
    )""")


def _hold_rules(s: Session, rows: Sequence[Facts]) -> None:
    guards.change_rules(s, ids(rows, "rule_id"))


def _recount_missing(s: Session, rows: Sequence[Facts]) -> None:
    rule_ids = ids(rows, "rule_id")
    text = f"""WITH RECURSIVE {units(OF_THESE)}, {_LACKING}
        UPDATE rules SET copies_missing = CASE WHEN l.missing < 0 THEN 0 ELSE l.missing END
        FROM lacking l WHERE l.rule_id = rules.id AND rules.id IN :these"""
    s.execute(about(text, rule_ids))
    look_soon(s, rule_ids)  # its reasons, too, may be those of wrong counters
    settle(s, rule_ids)


INVARIANTS = (
    Invariant(
        "rule-ok-copies",
        "A rule that is OK locks each of its units at as many endpoints as it wishes copies.",
        f"WITH RECURSIVE {units()}"
        + sql("""
            SELECT u.rule_id, u.unit_id, r.copies, count(l.endpoint_id) AS locked
            FROM units u JOIN rules r ON r.id = u.rule_id
            LEFT JOIN locks l ON l.rule_id = u.rule_id AND l.unit_id = u.unit_id AND NOT l.surplus
            WHERE r.state = {rule.OK}
            GROUP BY u.rule_id, u.unit_id, r.copies HAVING count(l.endpoint_id) <> r.copies"""),
        "rule {rule_id} is OK, wishes {copies} copies of {unit} and locks {locked}",
    ),
    Invariant(
        "rule-ok-files",
        "Every file of a rule that is OK is available wherever the rule locks it.",
        f"WITH {held()}"
        + sql("""
            SELECT h.rule_id, h.unit_id, h.file_id, h.endpoint_id
            FROM held h JOIN rules r ON r.id = h.rule_id
            LEFT JOIN replicas p ON p.file_id = h.file_id AND p.endpoint_id = h.endpoint_id
            WHERE r.state = {rule.OK} AND NOT h.surplus AND (p.state IS NULL OR p.state <> {replica.AVAILABLE})"""),
        "rule {rule_id} is OK, and {file} is not available at {endpoint}",
        smallest="rule_id, unit_id, file_id, endpoint_id",
    ),
    Invariant(
        "rule-ok-spread",
        "A rule that is OK and spreads by site has no two copies of a unit at one site.",
        sql("""
            SELECT l.rule_id, l.unit_id, e.site_id, count(*) AS copies
            FROM locks l JOIN rules r ON r.id = l.rule_id JOIN endpoints e ON e.id = l.endpoint_id
            WHERE r.state = {rule.OK} AND r.spread = 'site' AND NOT l.surplus
            GROUP BY l.rule_id, l.unit_id, e.site_id HAVING count(*) > 1"""),
        "rule {rule_id} has {copies} copies of {unit} at the site {site}",
    ),
    Invariant(
        "rule-ok-surplus",
        "A rule that is OK keeps nothing that it does not wish any more, but for a moment.",
        sql("""
            SELECT l.rule_id, l.unit_id, l.endpoint_id FROM locks l JOIN rules r ON r.id = l.rule_id
            WHERE r.state = {rule.OK} AND l.surplus AND (r.evaluate_at IS NULL OR r.evaluate_at > :now + """)
        + f"{SOON_MICROSECONDS})",
        "rule {rule_id} is OK and still keeps {unit} at {endpoint}, which it does not wish",
    ),
    Invariant(
        "rule-missing",
        "copies_missing of a rule is the number of copies that have no lock, unless they are being placed.",
        f"WITH RECURSIVE {units()}, {_LACKING}"
        + sql("""
            SELECT r.id AS rule_id, r.copies_missing, l.missing AS missing_true
            FROM rules r JOIN lacking l ON l.rule_id = r.id
            WHERE r.copies_missing < 0
               OR r.placed_to IS NULL AND r.revised_to IS NULL
                  AND r.copies_missing <> CASE WHEN l.missing < 0 THEN 0 ELSE l.missing END"""),
        "rule {rule_id} counts {copies_missing} copies without an endpoint, there are {missing_true}",
        smallest="missing_true, rule_id",
        repair=Repair(_hold_rules, _recount_missing),
    ),
    Invariant(
        "rule-state",
        "The state of a rule follows from its locks.",
        sql("""
            WITH open AS (
                SELECT rule_id,
                       max(CASE WHEN files_stuck > 0 AND files_available < files_total THEN 1 ELSE 0 END) AS stuck,
                       max(CASE WHEN files_available < files_total OR applied_to IS NOT NULL THEN 1 ELSE 0 END) AS open
                FROM locks WHERE NOT surplus GROUP BY rule_id
            ),
            expected AS (
                SELECT r.id, CASE
                    WHEN r.copies_missing > 0 OR coalesce(o.stuck, 0) = 1 THEN {rule.STUCK}
                    WHEN r.placed_to IS NOT NULL OR r.revised_to IS NOT NULL OR coalesce(o.open, 0) = 1
                    THEN {rule.REPLICATING}
                    ELSE {rule.OK} END AS state
                FROM rules r LEFT JOIN open o ON o.rule_id = r.id
            )
            SELECT r.id AS rule_id, r.state AS rule_state, e.state AS true_rule_state
            FROM rules r JOIN expected e ON e.id = r.id
            WHERE r.state IN ({rule.REPLICATING}, {rule.OK}, {rule.STUCK}) AND r.state <> e.state"""),
        "rule {rule_id} is {rule_state} and should be {true_rule_state}",
    ),
    Invariant(
        "rule-due",
        "Somebody will look again at every rule that is not satisfied, or that what is queued does not follow yet.",
        sql("""
            SELECT r.id AS rule_id, r.state AS rule_state FROM rules r
            WHERE (r.state IN ({rule.REPLICATING}, {rule.STUCK}) OR r.followed_to IS NOT NULL)
              AND r.evaluate_at IS NULL"""),
        "rule {rule_id} is {rule_state}, and nobody will look again",
    ),
    Invariant(
        "rule-reasons",
        "A stuck rule says why, or is about to be looked at.",
        sql("""
            SELECT r.id AS rule_id, r.evaluate_at FROM rules r
            WHERE r.state = {rule.STUCK} AND (r.evaluate_at IS NULL OR r.evaluate_at > :now + """)
        + f"{SOON_MICROSECONDS}) AND NOT EXISTS (SELECT 1 FROM reasons x WHERE x.rule_id = r.id)",
        "rule {rule_id} is stuck, gives no reason, and is looked at only {evaluate_at}",
    ),
    Invariant(
        "rule-reasons-gone",
        "Rules that are OK or have ended have no reasons, but for copies that are to leave an endpoint.",
        sql(
            """
            SELECT x.rule_id, r.state AS rule_state, x.code FROM reasons x JOIN rules r ON r.id = x.rule_id
            WHERE r.state = {rule.EXPIRED} OR r.state = {rule.OK}"""
            + f" AND x.code <> '{NOT_MOVED}'"
        ),
        "rule {rule_id} is {rule_state}, with the reason {code}",
    ),
    Invariant(
        "rule-of-subscription",
        "A subscription makes each of its rules for a DID once.",
        sql("""
            SELECT min(r.id) AS rule_id, r.did_id, r.subscription_id, r.template, count(*) AS made
            FROM rules r WHERE r.subscription_id IS NOT NULL
            GROUP BY r.did_id, r.subscription_id, r.template HAVING count(*) > 1 OR r.template IS NULL"""),
        "subscription {subscription_id} made rule {template} for {did} {made} times",
    ),
)
