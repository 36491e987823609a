"""Which copy a transfer reads from."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from rules.endpoints import Link
from rules.sources import MEASURED_BYTES, SHARE_BYTES, Lately, Source, at_once, grades, rank, why_first, why_none
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


# --- speed, failures, load ------------------------------------------------------------------------------------------


def measured(name: str, rate: float, *, files: int = 10, failures: int = 0) -> Source:
    size = 4 * MEASURED_BYTES
    return Source(endpoint(name), verified=True, lately=Lately(files, size, size / rate if rate else 0.0, failures))


def order(*sources: Source, load: dict[int, int] | None = None) -> list[str]:
    return [s.endpoint.name for s in rank(sources, TARGET, {}, load or {})]


def test_only_a_clear_difference_in_speed_counts() -> None:
    a, b, c, d = measured("A", 50e6), measured("B", 100e6), measured("C", 49e6), measured("D", 20e6)
    assert order(a, b) == ["A", "B"], "half as fast is not clearly slower"
    assert order(c, b) == ["B", "C"]
    assert order(d, c, b, a) == ["A", "B", "C", "D"]
    near = {(a.endpoint.id, TARGET.id): Link(a.endpoint.id, TARGET.id), (d.endpoint.id, 100): Link(d.endpoint.id, 100)}
    far = {(b.endpoint.id, 100): Link(b.endpoint.id, 100, distance=2)}
    assert [s.endpoint.name for s in rank([b, d], TARGET, near | far)] == ["D", "B"], "a distance was set by a person"


def test_what_was_hardly_measured_is_tried() -> None:
    small = Source(endpoint("A"), verified=True, lately=Lately(9, MEASURED_BYTES - 1, 1e6, 0))
    assert order(measured("B", 100e6), small, Source(endpoint("C"), verified=True)) == ["A", "B", "C"]


def test_a_link_that_mostly_failed_comes_after_as_fast_ones_that_did_not() -> None:
    failing, odd = measured("A", 100e6, files=2, failures=3), measured("B", 90e6, files=9, failures=8)
    assert order(failing, odd) == ["B", "A"]
    assert order(failing, measured("C", 10e6)) == ["A", "C"], "speed was measured by what was well"


def test_of_equally_good_ones_the_one_fewer_read_from_is_first() -> None:
    a, b, c = measured("A", 90e6), measured("B", 100e6), measured("C", 1e6)
    load = {a.endpoint.id: 3, b.endpoint.id: 2}
    assert order(a, b, c, load=load) == ["B", "A", "C"]
    assert [len(equals) for equals in grades([a, b, c], TARGET, {})] == [2, 1]


def test_the_reason_names_the_first_difference() -> None:
    def why(*sources: Source, load: dict[int, int] | None = None) -> str:
        return why_first(rank(sources, TARGET, LINKS, load or {}), TARGET, LINKS, load or {})

    other = Source(endpoint("OTHER", 9), verified=True)
    far, also_far = Source(endpoint("FAR", 1), verified=True), Source(endpoint("ALSO", 3), verified=True)
    assert why(NEAR) == "NEAR: no other copy can be read"
    assert why(DISK, DOUBTED) == "DISK: DOUBTED disagreed with the catalogue before"
    assert why(DISK, TAPE) == "DISK: it is on disk, and TAPE on tape"
    assert why(DISK, DECLARED) == "DISK: it is verified, and DECLARED only declared"
    assert why(DISK, NEAR) == "NEAR: it is nearer than DISK (distance 1, not 5)"
    assert why(DISK, FAILING) == "DISK: this transfer failed less often from it than from FAILING"
    assert why(measured("FAST", 80e6), measured("SLOW", 10e6)) == (
        "FAST: SLOW was clearly slower in the last hour (10.0 MB/s, not 80.0 MB/s)"
    )
    assert (
        why(other, measured("WORSE", 0, files=0, failures=5))
        == "OTHER: most attempts from WORSE failed in the last hour"
    )
    assert why(far, also_far, load={3: 2}) == "FAR: it is as good as ALSO, and fewer read there (0, not 2)"
    assert why(far, also_far) == "ALSO: it is as good as FAR, and the first by name"


def test_a_large_file_is_read_from_several_and_a_small_one_from_one() -> None:
    assert [at_once(size, 3) for size in (0, SHARE_BYTES, 2 * SHARE_BYTES, 99 * SHARE_BYTES)] == [1, 1, 2, 3]
    assert at_once(99 * SHARE_BYTES, 99) == 4
    assert at_once(99 * SHARE_BYTES, 1) == 1
