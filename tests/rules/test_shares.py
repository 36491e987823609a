"""Activities get their shares, the urgent goes first, and nothing waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rules.lanes import Heads, Lane
from rules.shares import STEP_SECONDS, Shares, cost, urgency

MB = 1_000_000
sizes = st.lists(st.integers(0, 50 * MB), min_size=1, max_size=8)


@given(
    st.lists(st.tuples(st.integers(1, 1_000), sizes), min_size=2, max_size=6), st.lists(st.integers(1, 40), max_size=12)
)
def test_over_many_claims_each_activity_has_its_part_but_for_one_transfer(
    activities: list[tuple[int, list[int]]], claims: list[int]
) -> None:
    """Every activity always waits; claims of any length, with nothing kept between them but the deficits."""
    weights = {f"a{n}": weight for n, (weight, _) in enumerate(activities)}
    queue = {f"a{n}": sizes for n, (_, sizes) in enumerate(activities)}
    got = dict.fromkeys(weights, 0)
    count = dict.fromkeys(weights, 0)
    largest = max(cost(size) for sizes in queue.values() for size in sizes)
    deficits: dict[str, float] = {}
    for length in claims:
        shares = Shares(weights, deficits)
        for _ in range(length):
            waiting = {a: cost(queue[a][count[a] % len(queue[a])]) for a in queue}
            activity = shares.next(waiting)
            shares.charge(activity, waiting[activity], waiting)
            got[activity] += waiting[activity]
            count[activity] += 1
            for a in weights:
                due = sum(got.values()) * weights[a] / sum(weights.values())
                assert abs(got[a] - due) <= largest + 1, (a, got, due)
        deficits = shares.deficits


def test_who_comes_later_is_owed_nothing_for_the_time_before() -> None:
    shares = Shares()
    alone = {"a": cost(MB)}
    for _ in range(100):
        shares.charge(shares.next(alone), cost(MB), alone)
    both = {"a": cost(MB), "b": cost(MB)}
    turns = []
    for _ in range(10):
        turns.append(shares.next(both))
        shares.charge(turns[-1], cost(MB), both)
    assert sorted(turns) == ["a"] * 5 + ["b"] * 5


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_age_overtakes_priority(low: int, high: int, later: int) -> None:
    first = urgency(0, low)
    second = urgency(later * 1_000_000, high)
    assert (first <= second) == (later >= (high - low) * STEP_SECONDS)


def drained(lanes: list[Lane], shares: Shares, room: dict[int, int]) -> list[int]:
    """Ids in the order in which they go; to each target only so many."""
    heads, gone = Heads(lanes, shares), []
    while (lane := heads.next()) is not None:
        assert lane.head is not None
        if room.get(lane.target_id, 1) == 0:
            heads.held_up()
            continue
        room[lane.target_id] = room.get(lane.target_id, 10**9) - 1
        gone.append(lane.head[1])
        heads.took()
    return gone


def test_a_full_target_stops_no_other_and_the_most_urgent_of_all_lanes_goes_first() -> None:
    lanes = [
        Lane("x", 1, "", [(n, n, 1, None) for n in (1, 3, 5)], cut=True),
        Lane("x", 2, "", [(n, n, 1, None) for n in (2, 4, 6)]),
    ]
    assert drained(lanes, Shares(), {1: 2}) == [1, 2, 3, 4, 6]


def test_it_stops_where_it_would_have_to_know_more() -> None:
    lanes = [
        Lane("x", 1, "", [(1, 1, 1, None), (3, 3, 1, None)], cut=True),
        Lane("x", 2, "", [(n, n, 1, None) for n in (2, 4, 6)]),
    ]
    heads = Heads(lanes, Shares())
    gone = []
    while (lane := heads.next()) is not None:
        assert lane.head is not None
        gone.append(lane.head[1])
        heads.took()
    assert (gone, heads.stopped) == ([1, 2, 3], True), "what follows 3 in its lane may be more urgent than 4"


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 5), st.integers(0, 9)), max_size=60),
    st.integers(1, 7),
)
def test_everything_is_handed_out_in_the_end(made: list[tuple[str, int, int, int]], window: int) -> None:
    """Through windows of any size, while more urgent ones keep coming at first."""
    waiting = {n: (a, t, urgency(at * 3_600_000_000, p)) for n, (a, t, p, at) in enumerate(made)}
    deficits: dict[str, float] = {}
    for _ in range(200):
        if not waiting:
            break
        by_lane: dict[tuple[str, int], list[tuple[int, int, int, None]]] = {}
        for n, (activity, target, urgent) in sorted(waiting.items()):
            by_lane.setdefault((activity, target), []).append((urgent, n, MB, None))
        lanes = [Lane(a, t, "", sorted(rows)[:window], len(rows) > window) for (a, t), rows in by_lane.items()]
        shares = Shares({}, deficits)
        gone = drained(lanes, shares, {})
        assert gone, "every claim hands something out"
        deficits = shares.deficits
        for n in gone:
            del waiting[n]
    assert not waiting
