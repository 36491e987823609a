"""What is kept whatever the need, and how much goes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from rules.deletion import (
    AT_ONCE,
    BY_HAND,
    EXPLAINED,
    LEFTOVER_SECONDS,
    Delete,
    Facts,
    Keep,
    Place,
    Why,
    decide,
    how_many,
)
from rules.states import ReplicaState

NOW = datetime(2026, 6, 1, tzinfo=UTC)
GONE = Facts(ReplicaState.AVAILABLE, released_at=NOW - timedelta(days=1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"deletable": False}, "not_deletable"),
        ({"state": ReplicaState.DELETING}, "deleting"),
        ({"locked": True}, "locked"),
        ({"arriving": True}, "arriving"),
        ({"being_read": True}, "being_read"),
        ({"last_source": True}, "last_source"),
        ({"reserved": True}, "reserved"),
    ],
)
def test_nobodys_wish_and_no_need_lifts_a_guard(change, reason):
    facts = replace(GONE, **change)
    assert {why: decide(facts, why, NOW) for why in (None, *Why)} == dict.fromkeys((None, *Why), Keep(reason))


def test_the_last_copy_goes_only_by_an_explicit_act():
    alone = replace(GONE, good_elsewhere=False)
    explicit = {why for why in (None, *Why) if decide(alone, why, NOW) == Delete(why)}
    assert explicit == {Why.LAST_COPY, Why.FORGOTTEN}
    assert decide(replace(alone, forgotten=True), None, NOW) == Delete(Why.FORGOTTEN)
    for state in (ReplicaState.BAD, ReplicaState.UNAVAILABLE):  # perhaps all that is left of it
        assert decide(replace(alone, state=state), Why.PURGE, NOW) == Keep("last_copy")
    declared = replace(alone, state=ReplicaState.COPYING, declared=True)
    assert decide(declared, Why.PURGE, NOW) == Keep("last_copy")


def test_data_without_rules_is_not_garbage_but_a_person_may_ask():
    never = replace(GONE, released_at=None)
    for why in (None, Why.SPACE, Why.PURGE, Why.DRAINED):
        assert decide(never, why, NOW) == Keep("not_released")
    assert decide(never, Why.ASKED, NOW) == Delete(Why.ASKED)


def test_what_nobody_needs_the_room_of_stays_unless_it_goes_at_once():
    assert decide(GONE, None, NOW) == Keep("not_needed")
    assert decide(GONE, Why.SPACE, NOW) == Delete(Why.SPACE)
    assert decide(replace(GONE, released_at=AT_ONCE), None, NOW) == Delete(Why.PURGE)
    assert decide(replace(GONE, released_at=NOW + timedelta(seconds=1)), Why.SPACE, NOW) == Keep("not_yet")


def test_a_leftover_goes_when_no_worker_can_still_publish_it():
    leftover = Facts(ReplicaState.COPYING, good_elsewhere=False, released_at=NOW - timedelta(seconds=LEFTOVER_SECONDS))
    assert decide(leftover, None, NOW) == Delete(Why.LEFTOVER)
    assert decide(leftover, None, NOW - timedelta(seconds=1)) == Keep("not_yet")
    assert decide(replace(leftover, arriving=True), None, NOW) == Keep("arriving")


def test_every_reason_has_words_and_none_is_a_why():
    assert not EXPLAINED.keys() & {why.value for why in Why}
    assert {Why.ASKED, Why.LAST_COPY} == BY_HAND


@pytest.mark.parametrize(
    ("place", "needed"),
    [
        (Place(used_bytes=90, capacity_bytes=100), 0),
        (Place(used_bytes=90, capacity_bytes=100, min_free_bytes=30), 20),
        (Place(used_bytes=110, capacity_bytes=100, min_free_bytes=30), 40),
        (Place(used_bytes=90, capacity_bytes=100, min_free_bytes=30, pending_bytes=15), 5),
        (Place(used_bytes=90, capacity_bytes=100, min_free_bytes=30, pending_bytes=99), 0),
        (Place(used_bytes=90, min_free_bytes=30), 0),  # what is free is not known
        (Place(used_bytes=90, min_free_bytes=30, reported_free_bytes=20, reported_at_used_bytes=80), 20),
        (Place(used_bytes=70, min_free_bytes=30, reported_free_bytes=20, reported_at_used_bytes=80), 0),
        (
            Place(used_bytes=5, capacity_bytes=100, min_free_bytes=30, reported_free_bytes=1, reported_at_used_bytes=5),
            29,
        ),
    ],
)
def test_need_counts_what_is_free_and_what_will_be(place, needed):
    assert place.needed_bytes == needed
    assert place.why is (Why.SPACE if needed else None)


def test_a_draining_or_thrifty_endpoint_needs_no_need():
    assert Place(draining=True, delete_at_once=True).why is Why.DRAINED
    assert Place(delete_at_once=True).why is Why.PURGE


def test_no_more_goes_than_is_needed():
    place = Place(used_bytes=100, capacity_bytes=100, min_free_bytes=25)
    assert how_many(place, Why.SPACE, [10] * 10) == 3
    assert how_many(place, None, [10] * 10) == 10


def test_no_more_goes_than_the_budget_and_a_huge_file_goes_alone():
    assert how_many(Place(budget_files=5, spent_files=3), Why.PURGE, [1] * 9) == 2
    assert how_many(Place(budget_files=5, spent_files=7), Why.PURGE, [1] * 9) == 0
    assert how_many(Place(budget_bytes=25), Why.PURGE, [10] * 9) == 2
    assert how_many(Place(budget_bytes=25), Why.PURGE, [100, 1]) == 1
    assert how_many(Place(budget_bytes=25, spent_files=1, spent_bytes=1), Why.PURGE, [100, 1]) == 0
