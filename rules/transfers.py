"""After this outcome of a transfer, what next?

Given     the `code` of the error that ended an attempt, how many attempts were made, and what is left to try.
Returns   Again, after a pause, or GiveUp with the reason.
Promises  no clock and no dice: the jitter comes in as a number, so a test can say what the pause is. Every transfer
          ends: nothing goes on beyond `attempts_max`. A pause is never longer than `cap_seconds`.
Partner   rules.errors has the codes; replica.catalog.transfers writes `not_before` or ends the transfer.

| class          | the pause before the next attempt                        | given up after                       |
|----------------|----------------------------------------------------------|--------------------------------------|
| transient      | jitter × base × 2^(attempts−1)                           | attempts_max                         |
| throttled      | what the storage asked for, and jitter × base            | attempts_max                         |
| target_full    | half the cap to the whole cap: space does not come soon  | attempts_max                         |
| auth           | none the first time (the token is renewed), then as transient | FEW_ATTEMPTS                    |
| source_missing | none with another source, else as transient              | attempts_max, alone FEW_ATTEMPTS     |
| checksum       | none with another source, else as transient              | attempts_max, alone FEW_ATTEMPTS     |
| permanent      | –                                                        | at once                              |

The jitter is full (between nothing and the whole pause): transfers that failed together must not come back together.
`attempts` counts every attempt of the transfer, whatever ended it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

#: Attempts after which a failure that repetition rarely mends is believed.
FEW_ATTEMPTS = 3


class ErrorClass(Enum):
    TRANSIENT = "transient"  #: may pass by itself
    THROTTLED = "throttled"  #: the storage asked for a pause
    TARGET_FULL = "target_full"
    AUTH = "auth"  #: a token or a permission
    SOURCE_MISSING = "source_missing"
    CHECKSUM = "checksum"  #: the bytes read are not those of the catalogue
    PERMANENT = "permanent"  #: a person or a decision is needed


CLASS_OF: Mapping[str, ErrorClass] = MappingProxyType(
    {
        "error": ErrorClass.TRANSIENT,
        "conflict": ErrorClass.TRANSIENT,
        "unavailable": ErrorClass.TRANSIENT,
        "storage_error": ErrorClass.TRANSIENT,
        "storage_transient": ErrorClass.TRANSIENT,
        "timed_out": ErrorClass.TRANSIENT,
        "unreachable": ErrorClass.TRANSIENT,
        "source_changed": ErrorClass.TRANSIENT,
        "busy": ErrorClass.THROTTLED,
        "no_space": ErrorClass.TARGET_FULL,
        "not_authenticated": ErrorClass.AUTH,
        "not_allowed": ErrorClass.AUTH,
        "forbidden": ErrorClass.AUTH,
        "source_missing": ErrorClass.SOURCE_MISSING,
        "checksum_differs": ErrorClass.CHECKSUM,
        "invalid": ErrorClass.PERMANENT,
        "invalid_expression": ErrorClass.PERMANENT,
        "not_found": ErrorClass.PERMANENT,
        "already_exists": ErrorClass.PERMANENT,
        "refused": ErrorClass.PERMANENT,
        "storage_permanent": ErrorClass.PERMANENT,
        "target_exists": ErrorClass.PERMANENT,
        "broken": ErrorClass.PERMANENT,
    }
)

_HINTS: Mapping[ErrorClass, str] = MappingProxyType(
    {
        ErrorClass.TRANSIENT: "It is tried again by itself; look at the endpoint if it goes on.",
        ErrorClass.THROTTLED: "The storage asked for a pause and gets it; lower the endpoint's limits if it goes on.",
        ErrorClass.TARGET_FULL: "Free space at the target, or let the rule choose another endpoint.",
        ErrorClass.AUTH: "Check the credentials and permissions of the site's worker at the endpoint.",
        ErrorClass.SOURCE_MISSING: "The catalogue knows a copy that the storage does not; reconcile that endpoint.",
        ErrorClass.CHECKSUM: "The source's bytes are not those of the catalogue; have its copies verified.",
        ErrorClass.PERMANENT: "Repeating will not help; the message says what a person must decide.",
    }
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    attempts_max: int = 8
    base_seconds: float = 30
    cap_seconds: float = 3600


@dataclass(frozen=True, slots=True)
class Again:
    """Another attempt, not before `delay_seconds` have passed."""

    delay_seconds: float
    error_class: ErrorClass


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The transfer has failed; the rule is told and may ask anew."""

    error_class: ErrorClass
    reason: str


def classify(error_code: str) -> ErrorClass:
    """The class of an error's code. A code nobody knows may come from a newer worker: it is taken for transient."""
    return CLASS_OF.get(error_code, ErrorClass.TRANSIENT)


def describe(error_class: ErrorClass) -> str:
    """What a person can do about it."""
    return _HINTS[error_class]


def after_failure(
    error_code: str,
    attempts: int,
    policy: RetryPolicy,
    fraction: float,
    retry_after_seconds: float | None = None,
    other_sources: int = 0,
) -> Again | GiveUp:
    """What follows the `attempts`-th attempt, which failed. `fraction` in [0, 1) is the jitter."""
    error_class = classify(error_code)
    if error_class is ErrorClass.PERMANENT:
        return GiveUp(error_class, f"{error_code}: trying the same again will not help")
    limit = _attempts_max(error_class, policy, other_sources)
    if attempts >= limit:
        return GiveUp(error_class, f"{error_code}: {attempts} of {limit} attempts are used up")
    delay = _pause(error_class, attempts, policy, fraction, retry_after_seconds, other_sources)
    return Again(min(delay, policy.cap_seconds), error_class)


def _attempts_max(error_class: ErrorClass, policy: RetryPolicy, other_sources: int) -> int:
    match error_class:
        case ErrorClass.AUTH:
            return min(FEW_ATTEMPTS, policy.attempts_max)
        case ErrorClass.SOURCE_MISSING | ErrorClass.CHECKSUM if other_sources <= 0:
            return min(FEW_ATTEMPTS, policy.attempts_max)
        case _:
            return policy.attempts_max


def _pause(
    error_class: ErrorClass,
    attempts: int,
    policy: RetryPolicy,
    fraction: float,
    retry_after_seconds: float | None,
    other_sources: int,
) -> float:
    match error_class:
        case ErrorClass.SOURCE_MISSING | ErrorClass.CHECKSUM if other_sources > 0:
            return 0
        case ErrorClass.AUTH if attempts <= 1:
            return 0
        case ErrorClass.TARGET_FULL:
            return policy.cap_seconds * (1 + fraction) / 2
        # A storage may answer nonsense (negative, not a number): then it has asked for nothing.
        case ErrorClass.THROTTLED if retry_after_seconds is not None and retry_after_seconds >= 0:
            return retry_after_seconds + fraction * policy.base_seconds
        case _:
            return fraction * _backoff(attempts, policy)


def _backoff(attempts: int, policy: RetryPolicy) -> float:
    doublings = min(max(attempts - 1, 0), 64)  # bounded, or a large number of attempts would overflow
    return min(policy.base_seconds * 2.0**doublings, policy.cap_seconds)
