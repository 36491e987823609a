"""Every error of the system, as one tree.

Given     a kind of refusal or failure.
Returns   an exception whose message names the thing, the reason and the remedy.
Promises  decisions ask the *branch* (transient? permanent? whose side?), never the text.
Partner   replica.api.errors maps each class to a status and back; replica.storage.faults translates foreign errors.

    ReplicaError
    ├─ Invalid            a name, expression, request or setting that cannot be right          400
    │  └─ InvalidExpression  with the column and what was expected there
    ├─ NotAuthenticated   no token, or one that is not known                                   401
    ├─ NotAllowed         known, but may not do this                                           403
    ├─ NotFound           kind and key                                                         404
    ├─ AlreadyExists      kind and key                                                         409
    ├─ Conflict           somebody moved the row first; try again                              409
    ├─ Refused            understood and impossible now; the person can act on it              422
    ├─ Unavailable        the service cannot answer now (database down, wrong schema)          503
    ├─ StorageError       endpoint, path, side
    │  ├─ Transient       retry elsewhere or later
    │  │  ├─ TimedOut  ├─ Busy(retry_after_seconds)  ├─ Unreachable
    │  │  └─ SourceChanged   the bytes changed while they were read
    │  └─ Permanent       a decision is needed, not a retry
    │     ├─ SourceMissing  ├─ TargetExists  ├─ NoSpace  ├─ Forbidden
    │     └─ ChecksumDiffers
    └─ Broken             an invariant failed: our bug                                         500
"""

from __future__ import annotations

from typing import ClassVar, Literal

Side = Literal["source", "target", "unknown"]


class ReplicaError(Exception):
    """Something went wrong; the message says what, and `hint` what to do about it."""

    #: Stable machine-readable name of the class, printed as `code` in JSON and in problem documents.
    code: ClassVar[str] = "error"

    def __init__(self, message: str = "", *, hint: str = "", field: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())
        #: A sentence a person can act on; empty where the message says it all.
        self.hint = hint
        #: The field of the request that is at fault; empty when it is not one field.
        self.field = field
        #: For bulk requests: the items at fault, each with its own reason; empty when it is the request as a whole.
        self.items: list[dict[str, object]] = []

    @property
    def message(self) -> str:
        return str(self.args[0])


class Invalid(ReplicaError):
    """The request cannot be right as it stands."""

    code = "invalid"


class InvalidExpression(Invalid):
    """An endpoint expression that cannot be read; `column` counts from 1."""

    code = "invalid_expression"

    def __init__(self, message: str = "", *, column: int = 0, hint: str = "", field: str = "expression") -> None:
        super().__init__(message, hint=hint, field=field)
        self.column = column


class NotAuthenticated(ReplicaError):
    """The request carries no valid token."""

    code = "not_authenticated"


class NotAllowed(ReplicaError):
    """This actor may not do this."""

    code = "not_allowed"


class NotFound(ReplicaError):
    """Nothing of that name exists."""

    code = "not_found"


class AlreadyExists(ReplicaError):
    """Something of that name exists already, and is not the same."""

    code = "already_exists"


class Conflict(ReplicaError):
    """Somebody changed it first; read again and repeat."""

    code = "conflict"


class Refused(ReplicaError):
    """Understood, but not possible now."""

    code = "refused"


class Unavailable(ReplicaError):
    """The service cannot answer now."""

    code = "unavailable"


class StorageError(ReplicaError):
    """A storage endpoint did not do what was asked."""

    code = "storage_error"

    def __init__(
        self, message: str = "", *, hint: str = "", endpoint: str = "", path: str = "", side: Side = "unknown"
    ) -> None:
        super().__init__(message, hint=hint)
        self.endpoint = endpoint
        self.path = path
        #: Whose fault: a failure of the target must never blame the source.
        self.side: Side = side


class Transient(StorageError):
    """The storage failed in a way that may pass."""

    code = "storage_transient"


class TimedOut(Transient):
    """The storage did not answer in time."""

    code = "timed_out"


class Busy(Transient):
    """The storage asked to come back later."""

    code = "busy"
    retry_after_seconds: float | None = None


class Unreachable(Transient):
    """The storage, or the disk behind it, is not there."""

    code = "unreachable"


class SourceChanged(Transient):
    """The file changed while it was read."""

    code = "source_changed"


class Permanent(StorageError):
    """Trying the same again will not help."""

    code = "storage_permanent"


class SourceMissing(Permanent):
    """The file is not at the source."""

    code = "source_missing"


class TargetExists(Permanent):
    """Other bytes are already under this name."""

    code = "target_exists"


class NoSpace(Permanent):
    """The target is full."""

    code = "no_space"


class Forbidden(Permanent):
    """The storage does not let us read or write there."""

    code = "forbidden"


class ChecksumDiffers(Permanent):
    """The bytes are not those the catalogue knows."""

    code = "checksum_differs"


class Broken(ReplicaError):
    """An invariant of Replica itself failed; please report it."""

    code = "broken"
