"""When a scan is believed: tables of cases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from rules.reconciling import DARK, MISSING, Counts, Policy, Scanned, confirmed_if_seen_by, is_due, too_many

NOW = datetime(2026, 5, 1, tzinfo=UTC)
POLICY = Policy()


@pytest.mark.parametrize(
    ("known", "listed", "missing", "dark", "held"),
    [
        (0, 0, 0, 0, False),
        (1_000_000, 1_000_000, 50_000, 50_000, False),
        (1_000_000, 0, 50_001, 0, True),
        (1_000_000, 1_050_000, 0, 60_000, True),
        (100, 90, 10, 0, False),  # few
        (100, 89, 11, 0, True),
        (4, 3, 1, 0, False),
        (4, 2, 2, 0, True),  # half of it
        (1, 0, 1, 0, True),
        (0, 3, 0, 3, True),  # a disk that nobody knows anything of
        (10, 14, 0, 4, False),
    ],
)
def test_a_large_part_is_not_believed(known: int, listed: int, missing: int, dark: int, held: bool) -> None:
    assert (too_many(Counts(known, listed, missing, dark), POLICY) is not None) == held


def test_what_is_dark_waits_longer() -> None:
    assert confirmed_if_seen_by(MISSING, NOW, POLICY) == NOW - timedelta(days=1)
    assert confirmed_if_seen_by(DARK, NOW, POLICY) == NOW - timedelta(days=7)


def days(number: float) -> datetime:
    return NOW - timedelta(days=number)


@pytest.mark.parametrize(
    ("scanned", "due"),
    [
        (Scanned(None, True, created_at=days(8)), True),
        (Scanned(None, True, created_at=days(6)), False),
        (Scanned(None, False, created_at=days(800)), False),  # a tape library is not listed by itself
        (Scanned(30, False, created_at=days(31)), True),
        (Scanned(0, True, created_at=days(800)), False),
        (Scanned(-1, True, created_at=days(800)), False),
        (Scanned(float("nan"), True, created_at=days(800)), False),
        (Scanned(1e300, True, created_at=days(800)), False),
        (Scanned(0.5, True, created_at=days(1)), True),
        (Scanned(None, True, created_at=days(800), compared_at=days(6)), False),
        (Scanned(None, True, created_at=days(800), compared_at=days(7)), True),
        (Scanned(None, True, created_at=days(800), compared_at=days(8), failed_at=days(0.9)), False),
        (Scanned(None, True, created_at=days(800), compared_at=days(2), unconfirmed_since=days(1)), True),
        (Scanned(None, True, created_at=days(800), compared_at=days(0.5), unconfirmed_since=days(0.5)), False),
    ],
)
def test_when_a_scan_is_due(scanned: Scanned, due: bool) -> None:
    assert is_due(scanned, POLICY, NOW) == due
