"""The state of a rule follows from its locks.

Given     how many copies are missing, on their way and stuck, and the state so far.
Returns   the state.
Promises  nobody sets a state by hand but approval and suspension, and these two stay until a person ends them.
Partner   rules.states has the edges; replica.catalog.rules counts the locks.

OK        nothing is missing, on its way or stuck
STUCK     something is missing that no endpoint could take, or is stuck: without a change it will not become OK
otherwise REPLICATING
"""

from __future__ import annotations

from rules.states import RuleState

#: What a person decided, or what is over: no lock changes it.
_STAYS = frozenset({RuleState.SUSPENDED, RuleState.WAITING_APPROVAL, RuleState.EXPIRED})


def state_of(copies_missing: int, replicating: int, stuck: int, current: RuleState) -> RuleState:
    """`copies_missing` counts copies for which no lock could be made; the other two count locks."""
    if current in _STAYS:
        return current
    if copies_missing > 0 or stuck > 0:
        return RuleState.STUCK
    return RuleState.REPLICATING if replicating > 0 else RuleState.OK
