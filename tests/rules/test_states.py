"""The tables are complete: nothing is unreachable, nothing is a trap, nothing that is over begins again."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules import states
from rules.rule_state import state_of
from rules.states import (
    FINDING,
    REPLICA,
    RULE,
    SCAN,
    SCAN_LEASED,
    SCAN_LIVE,
    SCAN_TERMINAL,
    TRANSFER,
    TRANSFER_LEASED,
    TRANSFER_TERMINAL,
    Coded,
    FindingState,
    ReplicaState,
    RuleState,
    ScanState,
    TransferEvent,
    TransferState,
    transfer_sources,
)

S = TypeVar("S", bound=Enum)

TRANSFER_EDGES = {s: frozenset(t for (f, _), t in TRANSFER.items() if f is s) for s in TransferState}


def reachable(edges: Mapping[S, frozenset[S]], beginnings: set[S]) -> set[S]:
    seen, ahead = set(beginnings), list(beginnings)
    while ahead:
        for state in edges[ahead.pop()] - seen:
            seen.add(state)
            ahead.append(state)
    return seen


@pytest.mark.parametrize(
    ("edges", "kind", "beginnings"),
    [
        (TRANSFER_EDGES, TransferState, {TransferState.QUEUED}),
        (REPLICA, ReplicaState, {ReplicaState.COPYING}),
        (RULE, RuleState, {RuleState.REPLICATING, RuleState.WAITING_APPROVAL}),
        (SCAN, ScanState, {ScanState.QUEUED}),
        (FINDING, FindingState, {FindingState.SEEN}),
    ],
)
def test_every_state_is_reachable(edges: Mapping[S, frozenset[S]], kind: type[S], beginnings: set[S]) -> None:
    assert edges.keys() == set(kind)
    assert reachable(edges, beginnings) == set(kind)


def test_only_terminal_states_cannot_be_left() -> None:
    assert {s for s, ways in TRANSFER_EDGES.items() if not ways} == TRANSFER_TERMINAL
    assert {s for s, ways in RULE.items() if not ways} == {RuleState.EXPIRED}
    assert all(REPLICA.values())
    assert {s for s, ways in SCAN.items() if not ways} == SCAN_TERMINAL
    assert SCAN_LEASED < SCAN_LIVE and SCAN_LIVE.isdisjoint(SCAN_TERMINAL)


def test_every_open_transfer_can_still_be_done_failed_or_cancelled() -> None:
    for state in set(TransferState) - TRANSFER_TERMINAL:
        assert reachable(TRANSFER_EDGES, {state}) >= TRANSFER_TERMINAL


def test_a_lease_can_always_be_lost() -> None:
    assert transfer_sources(TransferEvent.LOSE) == TRANSFER_LEASED


def test_every_open_transfer_can_be_cancelled() -> None:
    assert transfer_sources(TransferEvent.CANCEL) == set(TransferState) - TRANSFER_TERMINAL


def test_every_event_happens_somewhere() -> None:
    assert {event for _, event in TRANSFER} == set(TransferEvent)


def test_nothing_stays_where_it_is() -> None:
    assert all(f is not t for (f, _), t in TRANSFER.items())
    assert all(state not in ways for table in (REPLICA, RULE) for state, ways in table.items())


def test_the_database_codes_are_small_numbers_from_one_and_never_change() -> None:
    for kind in vars(states).values():
        if isinstance(kind, type) and issubclass(kind, Coded) and kind is not Coded:
            assert [member.value for member in kind] == list(range(1, len(kind) + 1))
            assert all(member.label == member.name.lower() for member in kind)


MOVED_BY_LOCKS = [RuleState.REPLICATING, RuleState.OK, RuleState.STUCK]
counts = st.integers(0, 3)


@given(counts, counts, counts, st.sampled_from(MOVED_BY_LOCKS))
def test_a_rule_is_ok_exactly_when_nothing_is_missing_on_its_way_or_stuck(
    missing: int, replicating: int, stuck: int, current: RuleState
) -> None:
    state = state_of(missing, replicating, stuck, current)
    assert (state is RuleState.OK) == (missing == replicating == stuck == 0)
    assert (state is RuleState.STUCK) == (missing > 0 or stuck > 0)


@given(counts, counts, counts, st.sampled_from(sorted(set(RuleState) - set(MOVED_BY_LOCKS), key=lambda s: s.value)))
def test_what_a_person_decided_about_a_rule_stays(
    missing: int, replicating: int, stuck: int, current: RuleState
) -> None:
    assert state_of(missing, replicating, stuck, current) is current


@given(counts, counts, counts, st.sampled_from(list(RuleState)))
def test_a_rule_moves_only_along_its_edges(missing: int, replicating: int, stuck: int, current: RuleState) -> None:
    state = state_of(missing, replicating, stuck, current)
    assert state is current or state in RULE[current]
