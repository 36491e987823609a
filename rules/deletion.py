"""May this copy of a file be removed, and is there a need to?

Given     what is known of a replica, and what of its endpoint.
Returns   Delete, or Keep with the first reason that holds.
Promises  no clock: the moment comes in. What a rule protects, what somebody reads and the last good copy is kept,
          however great the need; only a person's explicit act lets the last copy go, and it lifts no other guard.
Partner   replica.catalog.removable says the same in SQL, while it holds the rows that could change; a test compares.

In this order, the first that holds keeps a replica:

| kept because  | when                                                                                     |
|---------------|------------------------------------------------------------------------------------------|
| not_deletable | deleting is off at the endpoint                                                          |
| deleting      | it was decided already                                                                   |
| locked        | a lock of any rule covers it, a surplus one too                                          |
| arriving      | a transfer brings it, or verifies it in place                                            |
| being_read    | a worker holds an order for this file, and may be reading this copy                      |
| last_copy     | no other copy is good: verified, at an endpoint that is read from, and not being deleted |
| last_source   | a transfer that has not ended has no other copy to read from                             |
| not_released  | no rule ever let go of it: data without rules is not garbage                             |
| not_yet       | it was released for a later moment                                                       |
| not_needed    | there is room enough, and nothing says that it shall go at once                          |

The last three do not count when a person asks for it.
What never became a copy (COPYING, and nobody declared that bytes are there) needs no other copy and no lack of space.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

from rules.states import ReplicaState

#: A tombstone of this moment means: at once, without need of space.
AT_ONCE = datetime(1970, 1, 1, tzinfo=UTC)
#: A worker that does not know yet that its transfer was cancelled may still publish what it copied: only after this
#: time what came, or did not come, is cleared away. Longer than any lease.
LEFTOVER_SECONDS = 3600
#: How long a copy that could not be removed is left in peace before it is tried anew.
FAILED_SECONDS = 6 * 3600
#: How long a DID that was deleted can be had back; only after that its last copies may go.
UNDELETE_SECONDS = 7 * 24 * 3600
#: A budget is for so long.
BUDGET_SECONDS = 3600


class Why(Enum):
    """What a deletion is for; the text in the database. None of them is the name of a reason to keep something."""

    SPACE = "space"  #: less than the endpoint's minimum is free
    PURGE = "purge"  #: the rule that ended said so, or the endpoint keeps nothing that nobody wants
    DRAINED = "drained"  #: the endpoint is being emptied
    LEFTOVER = "leftover"  #: of a transfer that was stopped under way
    ASKED = "asked"  #: by a person
    LAST_COPY = "asked_last"  #: by a person, who said that it may be the last
    FORGOTTEN = "forgotten"  #: its DID was deleted, and the time in which that could be undone has passed


#: These may take the last copy.
EXPLICIT = frozenset({Why.LAST_COPY, Why.FORGOTTEN})
#: These need no tombstone.
BY_HAND = frozenset({Why.ASKED, Why.LAST_COPY})


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one replica."""

    state: ReplicaState
    #: Somebody said that the bytes are there, and nobody has verified it.
    declared: bool = False
    #: Deleting is on at its endpoint.
    deletable: bool = True
    locked: bool = False
    arriving: bool = False
    being_read: bool = False
    #: Another copy is good.
    good_elsewhere: bool = True
    last_source: bool = False
    #: A copy on its way to another endpoint is kept or will be made here, for the next leg.
    reserved: bool = False
    #: Its DID was deleted by a person, and the time in which that can be undone has passed.
    forgotten: bool = False
    released_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    why: Why


@dataclass(frozen=True, slots=True)
class Keep:
    reason: str


#: For people: what keeps it, and what they can do.
EXPLAINED = {
    "not_deletable": ("deleting is off at the endpoint", "switch it on: `replica endpoint set NAME --deletable`"),
    "deleting": ("it is being deleted already", "look at it: `replica deletion list`"),
    "locked": ("a rule protects it", "delete the rule, or move it elsewhere"),
    "arriving": ("a transfer brings it at this moment", "wait for it, or cancel the transfer"),
    "being_read": ("a worker is copying the file at this moment", "repeat the request when that has ended"),
    "reserved": ("it is a step of a copy's way to another endpoint", "wait until that has come, or delete its rule"),
    "last_copy": (
        "there is no other good copy",
        "make one with a rule; to remove the last copy for good, say --last-copy",
    ),
    "last_source": ("a transfer has no other copy to read from", "wait for it, or delete the rule that wants it"),
    "not_released": ("no rule ever let go of it", "ask for it: `replica deletion ask`"),
    "not_yet": ("it was released for a later moment", "wait, or ask for it: `replica deletion ask`"),
    "not_needed": ("there is room enough", "ask for it: `replica deletion ask`"),
}


def is_leftover(facts: Facts) -> bool:
    return facts.state is ReplicaState.COPYING and not facts.declared


def decide(facts: Facts, why: Why | None, now: datetime) -> Delete | Keep:
    """`why`: what the endpoint or a person wants it gone for; None: nothing does, but a tombstone may say at once."""
    may_be_last = is_leftover(facts) or facts.forgotten or why in EXPLICIT
    for reason, holds in (
        ("not_deletable", not facts.deletable),
        ("deleting", facts.state is ReplicaState.DELETING),
        ("locked", facts.locked),
        ("arriving", facts.arriving),
        ("being_read", facts.being_read),
        ("reserved", facts.reserved),
        ("last_copy", not facts.good_elsewhere and not may_be_last),
        ("last_source", facts.last_source and not is_leftover(facts)),
    ):
        if holds:
            return Keep(reason)
    if why in BY_HAND:
        return Delete(why)
    if facts.released_at is None:
        return Keep("not_released")
    if is_leftover(facts):
        old = facts.released_at <= now - timedelta(seconds=LEFTOVER_SECONDS)
        return Delete(why or Why.LEFTOVER) if old else Keep("not_yet")
    if facts.released_at > now:
        return Keep("not_yet")
    if why is None and facts.forgotten:
        return Delete(Why.FORGOTTEN)
    if why is None and facts.released_at == AT_ONCE:
        return Delete(Why.PURGE)
    return Keep("not_needed") if why is None else Delete(why)


@dataclass(frozen=True, slots=True)
class Place:
    """An endpoint as deletion sees it, at the moment at which it is held."""

    deletable: bool = True
    used_bytes: int = 0
    capacity_bytes: int | None = None
    #: What the storage last said is free, and the used_bytes of that moment.
    reported_free_bytes: int | None = None
    reported_at_used_bytes: int | None = None
    min_free_bytes: int | None = None
    delete_at_once: bool = False
    draining: bool = False
    #: Decided and not done yet: that much will be free without more.
    pending_bytes: int = 0
    budget_files: int | None = None
    budget_bytes: int | None = None
    #: Decided within BUDGET_SECONDS and not undone.
    spent_files: int = 0
    spent_bytes: int = 0

    @property
    def free_bytes(self) -> int | None:
        """The smaller of what the capacity leaves and what the storage said. None: not known. Below 0: too full."""
        free = []
        if self.capacity_bytes is not None:
            free.append(self.capacity_bytes - self.used_bytes)
        if self.reported_free_bytes is not None:
            since = self.used_bytes - (self.reported_at_used_bytes or 0)
            free.append(self.reported_free_bytes - since)
        return min(free) if free else None

    @property
    def needed_bytes(self) -> int:
        """What must go for the minimum to be free, besides what is going already."""
        free = self.free_bytes
        if self.min_free_bytes is None or free is None:
            return 0
        return max(0, self.min_free_bytes - free - self.pending_bytes)

    @property
    def why(self) -> Why | None:
        """What all that nobody protects there may go for; None: only what says so itself."""
        if self.draining:
            return Why.DRAINED
        if self.delete_at_once:
            return Why.PURGE
        return Why.SPACE if self.needed_bytes > 0 else None

    @property
    def left_files(self) -> int | None:
        return None if self.budget_files is None else max(0, self.budget_files - self.spent_files)

    @property
    def left_bytes(self) -> int | None:
        return None if self.budget_bytes is None else max(0, self.budget_bytes - self.spent_bytes)


def how_many(place: Place, why: Why | None, sizes: list[int]) -> int:
    """How many of these, taken in order, may go now: within the budget, and for space no more than are needed.

    One file that is larger than the whole budget goes alone in its hour, or it would never go.
    """
    files, room = place.left_files, place.left_bytes
    needed = place.needed_bytes if why is Why.SPACE else None
    taken = size_taken = 0
    for size in sizes:
        if files is not None and taken >= files:
            break
        if room is not None and size_taken + size > room and (taken or place.spent_files):
            break
        if needed is not None and size_taken >= needed:
            break
        taken += 1
        size_taken += size
    return taken
