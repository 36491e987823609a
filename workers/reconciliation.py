"""Scans by the timetable, and scans whose worker fell silent.

Given     the database, and how often and how carefully endpoints are scanned.
Returns   a Report.
Promises  few rows each time: endpoints are few, and scans are fewer. No storage is touched here.
Partner   replica.catalog.scans and .scanning; workers.scanning at the sites does the work.
"""

from __future__ import annotations

from replica.catalog import scanning, scans
from replica.db.engine import Database
from replica.log import get_logger
from rules.reconciling import Policy
from workers.runtime import Report

DEFAULT = Policy()


def schedule(
    db: Database,
    *,
    scan_grace_seconds: float = DEFAULT.grace_seconds,
    scan_dark_grace_seconds: float = DEFAULT.dark_grace_seconds,
    scan_fraction_max: float = DEFAULT.fraction_max,
    scan_every_days: float = DEFAULT.every_days,
) -> Report:
    policy = Policy(scan_grace_seconds, scan_dark_grace_seconds, scan_fraction_max, scan_every_days)
    with db.write() as s:
        begun = scans.schedule(s, policy)
    if begun:
        get_logger().info("scans.begun", scans=begun)
    return Report(seen=begun, done=begun)


def release(db: Database) -> Report:
    with db.write() as s:
        lost = scanning.expire_leases(s)
    return Report(seen=lost, done=lost)
