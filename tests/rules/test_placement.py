"""Where copies go: never too many, never too close together, never more than fits; and always the same."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.endpoints import Endpoint
from rules.placement import Choice, Plan, Quota, Refusal, Unit, Wish, place
from rules.quantities import human_bytes
from tests.rules.factories import TB, endpoint

# ---- Everything at once, in small numbers, so that spaces and domains are short

IDS = range(1, 7)
small_endpoints = st.lists(
    st.builds(
        lambda i, site, free, writable, attributes: endpoint(
            f"E{i}", i, site=f"S{site}", free_bytes=free, writable=writable, **attributes
        ),
        st.sampled_from(IDS),
        st.integers(1, 3),
        st.none() | st.integers(-3, 25),
        st.sampled_from([True, True, True, False]),
        st.fixed_dictionaries(
            {}, optional={"country": st.sampled_from(["DE", "FR"]), "w": st.sampled_from([0, 1, "5", "x"])}
        ),
    ),
    max_size=6,
    unique_by=lambda e: e.id,
)
small_units = st.lists(
    st.builds(
        Unit,
        st.integers(1, 9),
        st.integers(0, 10),
        st.dictionaries(st.sampled_from(IDS), st.integers(0, 10), max_size=3),
        st.frozensets(st.sampled_from(range(1, 9)), max_size=2),  # 7 and 8 are never candidates
    ),
    max_size=6,
    unique_by=lambda u: u.id,
)
wishes = st.builds(
    Wish,
    st.integers(1, 5),
    st.integers(0, 4),
    st.sampled_from(["endpoint", "site", "country", "nosuch"]),
    st.sampled_from([None, None, "w"]),
)
quotas = st.none() | st.dictionaries(st.sampled_from(IDS), st.integers(-2, 25))


def each(quota: Mapping[int, int] | None) -> list[Quota]:
    """Quotas of single endpoints."""
    return [Quota(frozenset({e}), left) for e, left in (quota or {}).items()]


def domain(e: Endpoint, wish: Wish) -> object:
    return e.id if wish.spread == "endpoint" else e.value(wish.spread)


def of_unit(plan: Plan, unit: Unit) -> list[Choice]:
    return [c for c in plan.choices if c.unit_id == unit.id]


def refusal_of(plan: Plan, unit: Unit) -> Refusal | None:
    return next((r for r in plan.refusals if r.unit_id == unit.id), None)


@given(wishes, small_units, small_endpoints, quotas, st.randoms(use_true_random=False))
def test_the_same_facts_give_the_same_plan_in_whatever_order(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quota: dict[int, int] | None, dice: random.Random
) -> None:
    plan = place(wish, units, candidates, each(quota))
    dice.shuffle(units)
    dice.shuffle(candidates)
    assert place(wish, units, candidates, each(quota)[::-1]) == plan


@given(wishes, small_units, small_endpoints, quotas)
def test_a_plan_never_places_too_many_copies_nor_two_in_one_domain(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quota: dict[int, int] | None
) -> None:
    plan = place(wish, units, candidates, each(quota))
    by_id = {e.id: e for e in candidates}
    for unit in units:
        chosen = [by_id[c.endpoint_id] for c in of_unit(plan, unit)]
        if chosen:
            assert len(chosen) + len(unit.locked) <= wish.copies
        held = [domain(by_id[i], wish) for i in unit.locked if i in by_id]
        domains = [domain(e, wish) for e in chosen]
        assert None not in domains
        assert len(set(domains)) == len(domains)
        assert not set(domains) & set(held)
        assert not unit.locked & {e.id for e in chosen}


@given(wishes, small_units, small_endpoints, quotas)
def test_a_plan_never_commits_more_than_there_is(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quota: dict[int, int] | None
) -> None:
    plan = place(wish, units, candidates, each(quota))
    by_unit = {u.id: u for u in units}
    new: Counter[int] = Counter()
    for choice in plan.choices:
        unit = by_unit[choice.unit_id]
        assert choice.new_bytes == max(0, unit.bytes - unit.present.get(choice.endpoint_id, 0))
        assert choice.why
        new[choice.endpoint_id] += choice.new_bytes
    for e in candidates:
        if new[e.id]:
            assert e.free_bytes is None or new[e.id] <= e.free_bytes
            assert quota is None or e.id not in quota or new[e.id] <= quota[e.id]
            assert e.writable


@given(wishes, small_units, small_endpoints, quotas)
def test_a_unit_has_all_its_copies_or_a_refusal_that_names_every_candidate_not_chosen(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quota: dict[int, int] | None
) -> None:
    plan = place(wish, units, candidates, each(quota))
    for unit in units:
        chosen = of_unit(plan, unit)
        refusal = refusal_of(plan, unit)
        missing = max(0, wish.copies - len(unit.locked)) - len(chosen)
        assert (refusal is None) == (missing == 0)
        if refusal is None:
            continue
        assert refusal.missing_copies == missing
        named = Counter(o.endpoint_id for o in refusal.obstacles if o.endpoint_id is not None)
        assert named == Counter(e.id for e in candidates if e.id not in {c.endpoint_id for c in chosen})
        assert refusal.obstacles
        names = {e.id: e.name for e in candidates}
        for obstacle in refusal.obstacles:
            assert obstacle.endpoint_id is None or obstacle.message.startswith(names[obstacle.endpoint_id] + ": ")


def can_take(e: Endpoint, unit: Unit, wish: Wish, quota: dict[int, int]) -> bool:
    """What the specification says of one unit and one endpoint, written a second time."""
    new = max(0, unit.bytes - unit.present.get(e.id, 0))
    whole = unit.present.get(e.id, -1) >= unit.bytes
    return (
        e.id not in unit.locked
        and domain(e, wish) is not None
        and (wish.weight is None or e.attributes.get(wish.weight) in (1, "5"))
        and (e.writable or whole)
        and (new == 0 or e.free_bytes is None or new <= e.free_bytes)
        and (unit.bytes == 0 or e.id not in quota or unit.bytes <= quota[e.id])
    )


@given(wishes, small_units.filter(bool), small_endpoints, quotas)
def test_as_many_copies_are_found_as_there_are_for_any_choice_of_endpoints(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quota: dict[int, int] | None
) -> None:
    unit = units[0]
    held = {domain(e, wish) for e in candidates if e.id in unit.locked}
    able = [e for e in candidates if can_take(e, unit, wish, quota or {}) and domain(e, wish) not in held]
    wanted = max(0, wish.copies - len(unit.locked))
    best = max(
        n for n in range(wanted + 1) if any(len({domain(e, wish) for e in some}) == n for some in combinations(able, n))
    )
    assert len(place(wish, [unit], candidates, each(quota)).choices) == best


@given(wishes, small_units, small_endpoints, quotas)
def test_a_unit_that_gets_nothing_changes_nothing_for_the_others(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quota: dict[int, int] | None
) -> None:
    plan = place(wish, units, candidates, each(quota))
    hopeless = {r.unit_id for r in plan.refusals if not any(c.unit_id == r.unit_id for c in plan.choices)}
    assert place(wish, [u for u in units if u.id not in hopeless], candidates, each(quota)).choices == plan.choices


shared_quotas = st.lists(st.builds(Quota, st.frozensets(st.sampled_from(IDS)), st.integers(-2, 40)), max_size=3)
charged_units = st.lists(
    st.builds(
        Unit,
        st.integers(1, 9),
        st.integers(0, 10),
        st.dictionaries(st.sampled_from(IDS), st.integers(0, 10), max_size=3),
        st.frozensets(st.sampled_from(IDS), max_size=1),
        st.dictionaries(st.sampled_from(IDS), st.integers(0, 10), max_size=3),
    ),
    max_size=6,
    unique_by=lambda u: u.id,
)


@given(wishes, charged_units, small_endpoints, shared_quotas)
def test_a_quota_that_endpoints_share_is_never_over_committed(
    wish: Wish, units: list[Unit], candidates: list[Endpoint], quotas: list[Quota]
) -> None:
    plan = place(wish, units, candidates, quotas)
    by_unit = {u.id: u for u in units}
    for quota in quotas:
        charges = [
            max(0, by_unit[c.unit_id].bytes - by_unit[c.unit_id].charged.get(c.endpoint_id, 0))
            for c in plan.choices
            if c.endpoint_id in quota.endpoint_ids
        ]
        assert sum(charges) <= max(0, quota.bytes_left)


# ---- Preference

DISK = endpoint("HZDR-DISK", 1, site="HZDR", free_bytes=10 * TB, country="DE", w=1)
TAPE = endpoint("HZDR-TAPE", 2, site="HZDR", free_bytes=90 * TB, country="DE", w=9)
GSI = endpoint("GSI-DISK", 3, site="GSI", free_bytes=10 * TB, country="DE", w=0)
DESY = endpoint("DESY-DISK", 4, site="DESY", free_bytes=10 * TB)
MANY = [Unit(i, 1, present={}) for i in range(3000)]
EQUAL = [endpoint(f"E{i}", i, free_bytes=TB) for i in range(1, 6)]


def test_what_is_already_there_comes_first_and_the_most_of_it() -> None:
    unit = Unit(7, 5 * TB, present={GSI.id: 3 * TB, DESY.id: 1 * TB})
    plan = place(Wish(1, 2), [unit], [DISK, TAPE, GSI, DESY])
    assert [(c.endpoint_id, c.new_bytes) for c in plan.choices] == [(GSI.id, 2 * TB), (DESY.id, 4 * TB)]
    assert plan.choices[0].why == "3.0 TB of 5.0 TB are there already"


def test_a_unit_that_is_whole_somewhere_needs_neither_space_nor_writing() -> None:
    full = endpoint("FULL", 9, free_bytes=-5, writable=False)
    unit = Unit(7, TB, present={9: TB}, charged={9: TB})
    plan = place(Wish(1, 1), [unit], [full, DISK], quotas=each({9: -1}))
    assert [(c.endpoint_id, c.new_bytes) for c in plan.choices] == [(9, 0)]
    assert plan.choices[0].why == "all of it is there already"


def test_an_empty_unit_does_not_go_where_writing_is_off_unless_it_is_there() -> None:
    closed = endpoint("CLOSED", 9, writable=False)
    assert place(Wish(1, 1), [Unit(7, 0, present={})], [closed]).refusals
    assert place(Wish(1, 1), [Unit(7, 0, present={9: 0})], [closed]).choices


def test_an_empty_unit_stays_where_it_is() -> None:
    for e in EQUAL:
        plan = place(Wish(1, 1), [Unit(7, 0, present={e.id: 0})], EQUAL)
        assert [c.endpoint_id for c in plan.choices] == [e.id]


def test_a_lock_counts_as_a_copy_and_uses_its_domain_up() -> None:
    unit = Unit(7, TB, present={}, locked=frozenset({DISK.id}))
    assert place(Wish(1, 1), [unit], [DISK, GSI]) == Plan((), ())
    plan = place(Wish(1, 2, spread="site"), [unit], [DISK, TAPE, GSI])
    assert [c.endpoint_id for c in plan.choices] == [GSI.id]


def test_a_lock_outside_of_the_candidates_counts_too() -> None:
    assert place(Wish(1, 1), [Unit(7, TB, present={}, locked=frozenset({99}))], [DISK]) == Plan((), ())


def where(plan: Plan) -> dict[int, frozenset[int]]:
    found: dict[int, set[int]] = {}
    for choice in plan.choices:
        found.setdefault(choice.unit_id, set()).add(choice.endpoint_id)
    return {unit: frozenset(ids) for unit, ids in found.items()}


@pytest.mark.parametrize("copies", [1, 2])
def test_a_new_endpoint_takes_its_share_and_moves_nothing_between_the_others(copies: int) -> None:
    before = where(place(Wish(1, copies), MANY, EQUAL))
    after = where(place(Wish(1, copies), MANY, [*EQUAL, endpoint("NEW", 6, free_bytes=TB)]))
    assert all(after[u.id] - {6} <= before[u.id] for u in MANY)
    moved = sum(before[u.id] != after[u.id] for u in MANY) / len(MANY)
    assert moved == pytest.approx(copies / 6, abs=0.04)


def test_units_spread_in_proportion_to_free_space_times_weight() -> None:
    some = [endpoint("A", 1, free_bytes=1 * TB, w=1), endpoint("B", 2, free_bytes=2 * TB, w="3")]
    share = Counter(c.endpoint_id for c in place(Wish(1, 1, weight="w"), MANY, some).choices)
    assert share[2] / share[1] == pytest.approx(6, rel=0.2)


def test_unknown_space_is_unlimited_and_takes_part() -> None:
    some = [endpoint("A", 1), endpoint("B", 2, free_bytes=1000 * TB)]
    share = Counter(c.endpoint_id for c in place(Wish(1, 1), MANY, some).choices)
    assert share[2] / share[1] == pytest.approx(1, rel=0.2)
    assert place(Wish(1, 1), [Unit(1, 10**21, present={})], some).choices[0].endpoint_id == 1


def test_different_rules_draw_different_lots() -> None:
    assert where(place(Wish(1, 1), MANY[:50], EQUAL)) != where(place(Wish(2, 1), MANY[:50], EQUAL))


def test_the_lots_are_the_same_in_every_process_and_version() -> None:
    plan = place(Wish(42, 1), [Unit(i, 1, present={}) for i in range(1, 13)], EQUAL)
    assert [c.endpoint_id for c in plan.choices] == [1, 2, 4, 3, 5, 5, 4, 5, 4, 3, 3, 1]


def test_space_is_used_up_while_placing() -> None:
    units = [Unit(i, 4 * TB, present={}) for i in range(1, 5)]
    plan = place(Wish(1, 1), units, [DISK])
    assert [c.unit_id for c in plan.choices] == [1, 2]
    assert [r.unit_id for r in plan.refusals] == [3, 4]


# ---- What is said


def said(wish: Wish, unit: Unit, *candidates: Endpoint, quota: dict[int, int] | None = None) -> list[tuple[str, str]]:
    (refusal,) = place(wish, [unit], candidates, each(quota)).refusals
    return [(o.code, o.message) for o in refusal.obstacles]


BIG = Unit(7, 13_100_000_000_000, present={})


def test_a_refusal_says_how_much_is_short() -> None:
    assert said(Wish(1, 1), BIG, DISK) == [("no_space", "HZDR-DISK: 3.1 TB short")]
    assert said(Wish(1, 1), BIG, TAPE, quota={TAPE.id: 13 * TB}) == [("over_quota", "HZDR-TAPE: quota 100.0 GB short")]


def test_a_refusal_says_that_writing_is_off_and_why() -> None:
    assert said(Wish(1, 1), BIG, endpoint("GSI-TAPE", writable=False)) == [("writing_off", "GSI-TAPE: writing is off")]
    broken = replace(endpoint("GSI-TAPE", writable=False), status="the robot is stuck")
    assert said(Wish(1, 1), BIG, broken) == [("writing_off", "GSI-TAPE: writing is off: the robot is stuck")]


def test_nothing_new_goes_to_an_endpoint_that_is_drained_even_where_it_is_already() -> None:
    drained = replace(DISK, draining=True, status="out of warranty")
    unit = Unit(7, TB, present={DISK.id: TB})
    assert said(Wish(1, 1), unit, drained) == [("draining", "HZDR-DISK: is being drained: out of warranty")]
    assert [c.endpoint_id for c in place(Wish(1, 1), [unit], [drained, GSI]).choices] == [GSI.id]


def test_a_unit_does_not_go_back_to_where_it_was_brought_away_from() -> None:
    unit = Unit(7, TB, present={DISK.id: TB}, left=frozenset({DISK.id}))
    assert [code for code, _ in said(Wish(1, 1), unit, DISK)] == ["left"]
    assert [c.endpoint_id for c in place(Wish(1, 1), [unit], [DISK, GSI]).choices] == [GSI.id]


def test_what_its_account_keeps_there_already_is_not_charged_again() -> None:
    quota = [Quota(frozenset({DISK.id, GSI.id}), TB)]
    unit = Unit(7, 3 * TB, present={}, charged={GSI.id: 2 * TB})
    assert [c.endpoint_id for c in place(Wish(1, 2), [unit], [DISK, GSI], quota).choices] == [GSI.id]


def test_a_refusal_says_which_copy_uses_the_domain() -> None:
    assert said(Wish(1, 2, spread="site"), Unit(7, TB, present={2: TB}), DISK, TAPE) == [
        ("too_few_candidates", "2 copies with spread site are wanted; the candidates allow 1"),
        ("domain_used", "HZDR-DISK: shares site HZDR with HZDR-TAPE, which has a copy"),
    ]
    assert said(Wish(1, 2), Unit(7, TB, present={}, locked=frozenset({1})), DISK) == [
        ("too_few_candidates", "2 copies with spread endpoint are wanted; the candidates allow 1"),
        ("domain_used", "HZDR-DISK: already holds a copy for this rule"),
    ]


def test_a_refusal_says_which_attribute_is_missing() -> None:
    assert said(Wish(1, 1, spread="country"), BIG, DESY)[1] == (
        "no_domain",
        "DESY-DISK: has no attribute country to spread by",
    )
    for e in (GSI, DESY):
        assert said(Wish(1, 1, weight="w"), BIG, e) == [
            ("no_weight", f"{e.name}: its attribute w is not a number above 0")
        ]


def test_without_candidates_that_is_said() -> None:
    assert said(Wish(1, 2), BIG) == [
        ("too_few_candidates", "2 copies with spread endpoint are wanted; the candidates allow 0")
    ]


def test_a_unit_gets_the_copies_that_fit_and_is_refused_for_the_rest() -> None:
    plan = place(Wish(1, 3), [Unit(7, 50 * TB, present={DESY.id: 45 * TB})], [DISK, TAPE, GSI, DESY])
    assert {c.endpoint_id for c in plan.choices} == {TAPE.id, DESY.id}
    assert [(r.missing_copies, [o.message for o in r.obstacles]) for r in plan.refusals] == [
        (1, ["GSI-DISK: 40.0 TB short", "HZDR-DISK: 40.0 TB short"])
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (3_100_000_000_000, "3.1 TB"),
        (-1500, "-1.5 kB"),
        (2 * 10**21, "2000.0 EB"),
    ],
)
def test_bytes_are_printed_in_decimal_units(count: int, text: str) -> None:
    assert human_bytes(count) == text
