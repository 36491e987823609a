"""What is in flight never exceeds a limit, and nothing that fits is refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rules.limits import PARTS, SMALL_BYTES, Key, Limit, Load, Room, parts_of

A: Key = ("read", "1")
B: Key = ("write", "2")
some = st.none() | st.integers(0, 40)


@given(some, some, st.lists(st.tuples(st.sets(st.sampled_from([A, B]), min_size=1), st.integers(0, 60)), max_size=40))
def test_all_grant_or_none_takes(files: int | None, size: int | None, wanted: list[tuple[set[Key], int]]) -> None:
    limits = {A: Limit(files, None), B: Limit(None, size)}
    room = Room(limits)
    loads: dict[Key, list[int]] = {A: [], B: []}
    for keys, each in wanted:
        refused = room.first_to_refuse(sorted(keys), each)
        fits_files = A not in keys or files is None or len(loads[A]) < files
        fits_bytes = B not in keys or size is None or sum(loads[B]) + each <= size or (not loads[B] and size > 0)
        assert (refused is None) == (fits_files and fits_bytes)
        if refused is None:
            room.take(sorted(keys), each)
            for key in keys:
                loads[key].append(each)
    assert files is None or len(loads[A]) <= files
    assert size is None or sum(loads[B]) <= size or len(loads[B]) == 1, "but for one that is larger alone"


def test_what_is_in_flight_already_counts_and_a_large_file_waits_until_it_is_alone() -> None:
    room = Room({A: Limit(files=3, bytes=100)}, {A: Load(2, 60)})
    assert room.first_to_refuse([A], 41) == A
    assert room.first_to_refuse([A], 40) is None
    assert room.files_left(A) == 1
    room.take([A], 40)
    assert room.files_left(A) == 0
    assert Room({A: Limit(bytes=100)}).first_to_refuse([A], 500) is None
    assert Room({A: Limit(bytes=0)}).first_to_refuse([A], 500) == A
    assert Room().files_left(A) is None


def test_a_file_takes_a_slot_and_small_ones_share_one() -> None:
    assert [parts_of(size) for size in (0, 1, SMALL_BYTES // 2, SMALL_BYTES - 1, SMALL_BYTES, 10**15)] == [
        *[1, 1, PARTS // 2, PARTS - 1, PARTS, PARTS]
    ]
    room = Room({A: Limit(slots=2), B: Limit(files=200, slots=2)}, {A: Load(1, 10**9, PARTS)})
    assert room.files_left(A) == PARTS
    assert room.files_left(B) == 200
    room.take([A], SMALL_BYTES // 2)
    assert room.first_to_refuse([A], SMALL_BYTES) == A, "half a slot is left"
    assert room.first_to_refuse([A], SMALL_BYTES // 2) is None
    room.take([A], SMALL_BYTES // 2)
    assert room.files_left(A) == 0
    assert not room.has_fixed_limit(A)
    assert room.has_fixed_limit(B)
