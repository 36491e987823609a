"""Which copy a transfer reads from."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from rules.endpoints import Link
from rules.sources import Source, rank, why_none
from rules.states import EndpointKind
from tests.rules.factories import endpoint

TARGET = endpoint("TARGET", 100)
DISK = Source(endpoint("DISK", 1), verified=True)
NEAR = Source(endpoint("NEAR", 2), verified=True)
TAPE = Source(endpoint("TAPE", 3, kind=EndpointKind.TAPE), verified=True)
DECLARED = Source(endpoint("DECLARED", 4), verified=False)
DOUBTED = Source(endpoint("DOUBTED", 5), verified=True, suspicious=True)
FAILING = Source(endpoint("FAILING", 6), verified=True, recent_failures=3)
CLOSED = Source(endpoint("CLOSED", 7, readable=False), verified=True)
CUT_OFF = Source(endpoint("CUT-OFF", 8), verified=True)
ITSELF = Source(TARGET, verified=True)
LINKS = {(i, 100): Link(i, 100, distance=1 if i == 2 else 5, allowed=i != 8) for i in range(1, 9)}
ALL = [DISK, NEAR, TAPE, DECLARED, DOUBTED, FAILING, CLOSED, CUT_OFF, ITSELF]


def ranked(*sources: Source) -> list[str]:
    return [s.endpoint.name for s in rank(sources, TARGET, LINKS)]


def test_the_order_is_suspicion_medium_proof_distance_failures_name() -> None:
    assert ranked(*ALL) == ["NEAR", "DISK", "FAILING", "DECLARED", "TAPE", "DOUBTED"]


def test_a_distance_outweighs_failures_but_proof_outweighs_a_distance() -> None:
    near_failing = Source(NEAR.endpoint, verified=True, recent_failures=9)
    assert ranked(DISK, near_failing) == ["NEAR", "DISK"]
    near_declared = Source(NEAR.endpoint, verified=False)
    assert ranked(DISK, near_declared) == ["DISK", "NEAR"]


def test_failures_come_before_names_and_names_before_numbers() -> None:
    a, b, c = (endpoint(name, id) for name, id in (("A", 7), ("B", 2), ("C", 1)))
    some = [Source(a, verified=True, recent_failures=1), Source(c, verified=True), Source(b, verified=True)]
    assert [s.endpoint.name for s in rank(some, TARGET, {})] == ["B", "C", "A"]


def test_a_link_nobody_described_is_allowed_at_distance_one() -> None:
    new = Source(endpoint("NEW", 9), verified=True)
    assert ranked(DISK, new) == ["NEW", "DISK"]


def test_a_suspicious_copy_is_better_than_none() -> None:
    assert ranked(DOUBTED, CLOSED) == ["DOUBTED"]


@given(st.lists(st.sampled_from(ALL), unique_by=id), st.randoms(use_true_random=False))
def test_the_order_of_the_facts_does_not_count(sources: list[Source], dice: random.Random) -> None:
    before = rank(sources, TARGET, LINKS)
    dice.shuffle(sources)
    assert rank(sources, TARGET, LINKS) == before


@given(st.lists(st.sampled_from(ALL), unique_by=id))
def test_every_source_is_ranked_or_has_a_reason(sources: list[Source]) -> None:
    usable = {s.endpoint.id for s in rank(sources, TARGET, LINKS)}
    left_out = {o.endpoint_id for o in why_none(sources, TARGET, LINKS)}
    assert not usable & left_out
    assert (usable | left_out) - {None} == {s.endpoint.id for s in sources}


def test_when_nothing_can_be_read_there_is_a_reason_for_each() -> None:
    assert [(o.code, o.message) for o in why_none([ITSELF, CUT_OFF, CLOSED], TARGET, LINKS)] == [
        ("reading_off", "CLOSED: reading is off"),
        ("link_not_allowed", "CUT-OFF: transfers to TARGET are not allowed"),
        ("is_target", "TARGET: is the target itself"),
    ]


def test_when_there_is_no_copy_that_is_the_reason() -> None:
    assert [(o.endpoint_id, o.code) for o in why_none([], TARGET, LINKS)] == [(None, "no_source")]
