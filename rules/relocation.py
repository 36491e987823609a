"""A copy gets on no further, or its endpoint is to be emptied: does it stay, or is it brought elsewhere?

Given     what is known of the copy's trouble, and of the endpoint.
Returns   Stay, with the seconds until it is worth looking again; or Move. Both say why.
Promises  same facts, same answer. What is complete moves only when its endpoint is drained. Nobody moves at the first
          hiccup, each further move of the same rule takes twice the patience, and `replace=never` is obeyed.
Partner   replica.catalog.relocation gathers the facts, and carries a move out only where another endpoint can take
          the copy.

A move is expensive and a trouble often passes: so there is patience. It is short where a person has said that nothing
can be written, long where things merely fail, and none where a person wants the endpoint empty. It begins anew with
every file that comes, and when the endpoint is switched on again.
"""

from __future__ import annotations

from dataclasses import dataclass

from rules.quantities import counted

__all__ = ["DEFAULT_PATIENCE", "NEVER", "Decision", "Move", "Patience", "Stay", "Trouble", "decide"]

#: An endpoint or a rule with the attribute `replace=never` keeps its copies whatever happens.
NEVER = "never"


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds a copy may get on no further before it is brought elsewhere."""

    stuck_seconds: float = 6 * 3600.0
    writing_off_seconds: float = 3600.0
    #: However often it was moved before.
    longest_seconds: float = 4 * 86_400.0


DEFAULT_PATIENCE = Patience()


@dataclass(frozen=True, slots=True)
class Trouble:
    """One copy of one unit, or of everything a rule holds together, that may have to move."""

    complete: bool
    draining: bool
    writable: bool
    #: For how long it got on no further; None: it does.
    seconds: float | None
    #: How often copies of the rule were brought elsewhere since it was last satisfied.
    moves_before: int = 0
    #: The endpoint's or the rule's word on it; empty: none.
    replace: str = ""


@dataclass(frozen=True, slots=True)
class Stay:
    why: str
    #: When to ask again; None: when something changes.
    again_in_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Move:
    why: str


Decision = Stay | Move


def decide(trouble: Trouble, patience: Patience = DEFAULT_PATIENCE) -> Decision:
    if trouble.draining:
        return Stay("its copies shall never be replaced") if trouble.replace == NEVER else Move("it is being drained")
    if trouble.complete or trouble.seconds is None:
        return Stay("nothing is wrong")
    if trouble.replace == NEVER:
        return Stay("its copies shall never be replaced")
    first = patience.stuck_seconds if trouble.writable else patience.writing_off_seconds
    grace = min(first * 2 ** min(trouble.moves_before, 20), max(first, patience.longest_seconds))
    if trouble.seconds < grace:
        return Stay("it may pass", grace - trouble.seconds)
    why = "nothing more arrived there" if trouble.writable else "nothing could be written there"
    return Move(f"{why} for {_lasting(trouble.seconds)}")


def _lasting(seconds: float) -> str:
    if seconds < 2 * 3600:
        return counted(int(seconds // 60), "minute")
    return counted(int(seconds // 3600), "hour")
