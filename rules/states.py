"""Every state of the system and every way from one to another, on one page.

Given     nothing: this is a table to read.
Returns   enums whose values are what the database stores, and edges as data.
Promises  a row moves only along an edge listed here; terminal states never change; numbers are never re-used.
Partner   replica.catalog moves rows with UPDATE … WHERE state IN (…); tests walk these tables for completeness.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import TypeVar

S = TypeVar("S", bound=Enum)


class Coded(Enum):
    """An enum stored as a small number and printed in lower case."""

    @property
    def label(self) -> str:
        return self.name.lower()


class DidKind(Coded):
    FILE = 1  #: bytes, with a size and checksums
    DATASET = 2  #: holds files
    CONTAINER = 3  #: holds datasets and containers


class EndpointKind(Coded):
    DISK = 1
    TAPE = 2


class Grouping(Coded):
    DATASET = 1  #: each dataset whole on one set of endpoints (the default)
    ALL = 2  #: everything on the same set of endpoints
    NONE = 3  #: each file for itself


class Evidence(Coded):
    """What proved a replica; only what *we* computed from the bytes counts as verified."""

    DECLARED = 1  #: somebody said so; nothing was read
    HASHED = 2  #: the registering client read the bytes where they lie
    COPIED = 3  #: our copy hashed the source while writing, and the target was read back or answered a digest
    SCRUBBED = 4  #: read again later


class ReplicaState(Coded):
    COPYING = 1  #: wanted; a transfer is on its way, or will be when the rule is evaluated again
    AVAILABLE = 2  #: size and checksum were proven at this endpoint
    UNAVAILABLE = 3  #: was available; its endpoint cannot show it now
    BAD = 4  #: known wrong: never a source; kept until another good copy replaces it
    DELETING = 5  #: a deletion order was given


class RuleState(Coded):
    REPLICATING = 1  #: copies are missing and on their way
    OK = 2  #: every copy is available
    STUCK = 3  #: something needs a retry or a person; the reasons say what
    SUSPENDED = 4  #: a person paused it; it still protects and still covers new files
    WAITING_APPROVAL = 5  #: a person must say yes first
    EXPIRED = 6  #: its lifetime ended or it was deleted; it protects nothing any more


class TransferState(Coded):
    QUEUED = 1  #: in the table, nobody's; `not_before` may hold it back
    CLAIMED = 2  #: a worker holds a lease and has not begun
    MOVING = 3  #: bytes are on their way; the lease is renewed by heartbeats
    VERIFYING = 4  #: all bytes were written; the target is being proven
    WAITING = 5  #: for something outside (tape, approval, space); always with a reason and a deadline
    DONE = 6  #: verified and published
    FAILED = 7  #: attempts or deadline used up; the rule is told and may ask anew
    CANCELLED = 8  #: not wanted any more; bytes may still land, deletion sweeps them


class DeletionState(Coded):
    QUEUED = 1  #: decided; until `not_before` has passed and a worker claims it, it can be undone
    CLAIMED = 2  #: a worker holds a lease; the bytes may be gone at any moment
    DONE = 3  #: the bytes are gone, and so is the replica
    FAILED = 4  #: attempts used up; the replica stays and is looked at again
    UNDONE = 5  #: taken back while no worker had it: the replica is what it was, if the bytes cannot be gone


class ScanState(Coded):
    QUEUED = 1  #: asked for; no worker has begun
    LISTING = 2  #: a worker has the catalogue's word, lists the storage, and compares
    HELD = 3  #: too much is missing or dark to be believed; a person must say that it is so
    TO_VERIFY = 4  #: what was missing twice waits for a worker that looks once more
    VERIFYING = 5  #: a worker looks for it, file by file
    DONE = 6
    FAILED = 7  #: the storage could not be listed, or too many workers were lost; nothing was concluded
    CANCELLED = 8  #: held, and overtaken by a newer scan


class FindingState(Coded):
    SEEN = 1  #: by one scan, or not for long enough
    CONFIRMED = 2  #: by two scans, and the grace between them is over
    LOST = 3  #: looked for once more and not found: the replica was declared bad
    THERE = 4  #: looked for once more, and it is there, or nobody expects it any more
    UNCLEAR = 5  #: it could not be looked for; the next scan tries again
    ASKED = 6  #: dark, and a person said that it shall go
    CLAIMED = 7  #: a worker may be moving it to quarantine at this moment
    REMOVED = 8  #: it is in quarantine
    KEPT = 9  #: it changed, or became known, and stays


class TransferEvent(Enum):
    CLAIM = "claim"
    BEGIN = "begin"
    WRITTEN = "written"
    VERIFY = "verify"
    LOSE = "lose"  #: the lease ran out, or the worker gave it back
    FAIL_FOR_NOW = "fail_for_now"  #: retried after a pause
    FAIL_FOR_GOOD = "fail_for_good"
    HOLD = "hold"
    RESUME = "resume"
    CANCEL = "cancel"


_T, _E = TransferState, TransferEvent

TRANSFER: Mapping[tuple[TransferState, TransferEvent], TransferState] = MappingProxyType(
    {
        (_T.QUEUED, _E.CLAIM): _T.CLAIMED,
        (_T.QUEUED, _E.HOLD): _T.WAITING,
        (_T.QUEUED, _E.CANCEL): _T.CANCELLED,
        (_T.CLAIMED, _E.BEGIN): _T.MOVING,
        (_T.CLAIMED, _E.LOSE): _T.QUEUED,
        (_T.CLAIMED, _E.VERIFY): _T.DONE,  # a small file is done before its first heartbeat
        (_T.CLAIMED, _E.FAIL_FOR_NOW): _T.QUEUED,
        (_T.CLAIMED, _E.FAIL_FOR_GOOD): _T.FAILED,
        (_T.CLAIMED, _E.CANCEL): _T.CANCELLED,
        (_T.MOVING, _E.WRITTEN): _T.VERIFYING,
        (_T.MOVING, _E.VERIFY): _T.DONE,
        (_T.MOVING, _E.LOSE): _T.QUEUED,
        (_T.MOVING, _E.FAIL_FOR_NOW): _T.QUEUED,
        (_T.MOVING, _E.FAIL_FOR_GOOD): _T.FAILED,
        (_T.MOVING, _E.CANCEL): _T.CANCELLED,  # bytes may still land; deletion sweeps them
        (_T.VERIFYING, _E.VERIFY): _T.DONE,
        (_T.VERIFYING, _E.LOSE): _T.QUEUED,
        (_T.VERIFYING, _E.FAIL_FOR_NOW): _T.QUEUED,
        (_T.VERIFYING, _E.FAIL_FOR_GOOD): _T.FAILED,
        (_T.VERIFYING, _E.CANCEL): _T.CANCELLED,
        (_T.WAITING, _E.RESUME): _T.QUEUED,
        (_T.WAITING, _E.FAIL_FOR_GOOD): _T.FAILED,  # its deadline passed
        (_T.WAITING, _E.CANCEL): _T.CANCELLED,
    }
)

_R = ReplicaState
REPLICA: Mapping[ReplicaState, frozenset[ReplicaState]] = MappingProxyType(
    {
        _R.COPYING: frozenset({_R.AVAILABLE, _R.DELETING}),
        _R.AVAILABLE: frozenset({_R.UNAVAILABLE, _R.BAD, _R.DELETING}),
        _R.UNAVAILABLE: frozenset({_R.AVAILABLE, _R.BAD, _R.DELETING}),
        _R.BAD: frozenset({_R.COPYING, _R.AVAILABLE, _R.DELETING}),
        # Undone before the order was claimed it is what it was; could the bytes not be removed, nobody knows what is
        # there; wanted anew after they were, it is on its way again; else the row goes.
        _R.DELETING: frozenset({_R.AVAILABLE, _R.UNAVAILABLE, _R.BAD, _R.COPYING}),
    }
)

_U = RuleState
RULE: Mapping[RuleState, frozenset[RuleState]] = MappingProxyType(
    {
        _U.WAITING_APPROVAL: frozenset({_U.REPLICATING, _U.EXPIRED}),
        _U.REPLICATING: frozenset({_U.OK, _U.STUCK, _U.SUSPENDED, _U.EXPIRED}),
        _U.OK: frozenset({_U.REPLICATING, _U.STUCK, _U.SUSPENDED, _U.EXPIRED}),
        _U.STUCK: frozenset({_U.REPLICATING, _U.OK, _U.SUSPENDED, _U.EXPIRED}),
        _U.SUSPENDED: frozenset({_U.REPLICATING, _U.OK, _U.STUCK, _U.EXPIRED}),
        _U.EXPIRED: frozenset(),
    }
)

_D = DeletionState
DELETION: Mapping[DeletionState, frozenset[DeletionState]] = MappingProxyType(
    {
        _D.QUEUED: frozenset({_D.CLAIMED, _D.UNDONE}),
        # QUEUED: the lease ran out, or it is tried again; UNDONE: it is not, as a rule wants the copy again.
        _D.CLAIMED: frozenset({_D.QUEUED, _D.DONE, _D.FAILED, _D.UNDONE}),
        _D.DONE: frozenset(),
        _D.FAILED: frozenset(),
        _D.UNDONE: frozenset(),
    }
)
DELETION_TERMINAL = frozenset({_D.DONE, _D.FAILED, _D.UNDONE})

_C = ScanState
SCAN: Mapping[ScanState, frozenset[ScanState]] = MappingProxyType(
    {
        _C.QUEUED: frozenset({_C.LISTING, _C.CANCELLED}),
        # QUEUED: the lease ran out, or was given back.
        _C.LISTING: frozenset({_C.QUEUED, _C.HELD, _C.TO_VERIFY, _C.DONE, _C.FAILED}),
        _C.HELD: frozenset({_C.TO_VERIFY, _C.DONE, _C.CANCELLED}),
        _C.TO_VERIFY: frozenset({_C.VERIFYING}),
        _C.VERIFYING: frozenset({_C.TO_VERIFY, _C.DONE, _C.FAILED}),
        _C.DONE: frozenset(),
        _C.FAILED: frozenset(),
        _C.CANCELLED: frozenset(),
    }
)
SCAN_TERMINAL = frozenset({_C.DONE, _C.FAILED, _C.CANCELLED})
#: At most one of these at an endpoint. One that is held hinders nobody: a newer one takes its place.
SCAN_LIVE = frozenset({_C.QUEUED, _C.LISTING, _C.TO_VERIFY, _C.VERIFYING})
SCAN_LEASED = frozenset({_C.LISTING, _C.VERIFYING})

_F = FindingState
FINDING: Mapping[FindingState, frozenset[FindingState]] = MappingProxyType(
    {
        _F.SEEN: frozenset({_F.CONFIRMED}),
        _F.CONFIRMED: frozenset({_F.LOST, _F.THERE, _F.UNCLEAR, _F.ASKED}),
        _F.LOST: frozenset(),
        _F.THERE: frozenset(),
        _F.UNCLEAR: frozenset(),
        _F.ASKED: frozenset({_F.CLAIMED, _F.KEPT}),
        _F.CLAIMED: frozenset({_F.ASKED, _F.REMOVED, _F.KEPT}),
        _F.REMOVED: frozenset(),
        _F.KEPT: frozenset(),
    }
)

#: States in which a rule has no locks: not yet, or not any more.
RULE_WITHOUT_LOCKS = frozenset({_U.WAITING_APPROVAL, _U.EXPIRED})
#: States that no event leaves.
TRANSFER_TERMINAL = frozenset({_T.DONE, _T.FAILED, _T.CANCELLED})
#: States in which a worker holds a lease.
TRANSFER_LEASED = frozenset({_T.CLAIMED, _T.MOVING, _T.VERIFYING})


def transfer_sources(event: TransferEvent) -> frozenset[TransferState]:
    """The states in which `event` may happen: what goes into the WHERE of the UPDATE that carries it out."""
    return frozenset(state for state, e in TRANSFER if e is event)
