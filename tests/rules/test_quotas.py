"""What quotas leave: all that select an endpoint must have room; what selects nothing limits nothing."""

from __future__ import annotations

from rules.placement import Quota
from rules.quotas import Standing, limiting, standing
from tests.rules.factories import endpoint

ENDPOINTS = (
    endpoint("DESY-DISK", 1, country="de"),
    endpoint("HZDR-DISK", 2, country="de"),
    endpoint("CERN-DISK", 3, country="ch"),
)
HELD = {1: 40, 3: 5}


def test_a_quota_is_used_up_at_all_of_its_endpoints_together() -> None:
    german = standing("country=de", 100, ENDPOINTS, HELD)
    assert [e.name for e in german.endpoints] == ["DESY-DISK", "HZDR-DISK"]
    assert (german.used_bytes, german.left_bytes, german.over_bytes) == (40, 60, 0)


def test_what_is_held_beyond_a_quota_is_told_and_leaves_nothing() -> None:
    over = standing("DESY-DISK", 30, ENDPOINTS, HELD)
    assert (over.used_bytes, over.left_bytes, over.over_bytes) == (40, 0, 10)
    assert limiting([over], [1]) == (Quota(frozenset({1}), 0),)


def test_an_expression_that_selects_nothing_any_more_limits_nothing_and_says_so() -> None:
    gone = standing("country=fr", 0, ENDPOINTS, HELD)
    assert gone == Standing((), 0, 0, gone.problem) and "selects no endpoint" in gone.problem
    unknown = standing("PARIS-DISK", 0, ENDPOINTS, HELD)
    assert "no endpoint" in unknown.problem
    assert limiting([gone, unknown], [1, 2, 3]) == ()


def test_a_changed_attribute_counts_at_once() -> None:
    moved = (endpoint("DESY-DISK", 1, country="fr"), *ENDPOINTS[1:])
    assert standing("country=de", 100, moved, HELD).used_bytes == 0
    assert standing("country=fr", 100, moved, HELD).used_bytes == 40


def test_placement_hears_of_the_quotas_that_speak_of_its_candidates() -> None:
    every, swiss = standing("*", 100, ENDPOINTS, HELD), standing("country=ch", 10, ENDPOINTS, HELD)
    assert limiting([every, swiss], [2]) == (Quota(frozenset({1, 2, 3}), 55),)
    assert limiting([every, swiss], [2, 3]) == (Quota(frozenset({1, 2, 3}), 55), Quota(frozenset({3}), 5))
    assert limiting([], [1]) == ()
