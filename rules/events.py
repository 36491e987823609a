"""What happened, as those who listen choose it, and how long who does not listen is tried.

Given     patterns such as `rule.*`; how often in a row a webhook did not answer well.
Returns   the patterns, checked; the pause before the next try.
Promises  a pattern that could never fit is refused, not silently deaf; pauses double up to an hour and never meet.
Partner   replica.catalog.events reads by these patterns; workers.events delivers.

A kind is `entity.what`, for example `rule.ok`. A pattern is a kind, `entity.*`, or `*`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rules.errors import Invalid
from rules.names import shown

#: What events are about.
ENTITIES = frozenset(
    {
        *["account", "deletion", "did", "endpoint", "link", "quota", "replica", "rule", "scope", "scan", "site"],
        *["subscription", "transfer", "webhook"],
    }
)
PATTERNS_MAX = 50
PATTERN_LENGTH_MAX = 40

#: Pauses of a webhook that does not answer: the first, and the longest.
PAUSE_SECONDS = 5.0
PAUSE_MAX_SECONDS = 3_600.0
#: Who did not answer well for so long is not tried any more until a person says so.
GIVE_UP_SECONDS = 3 * 86_400.0

_PATTERN = re.compile(r"\*|(?P<entity>[a-z]+)\.(?:\*|[a-z_]+)")


def check_patterns(patterns: Sequence[str]) -> tuple[str, ...]:
    """Each once, in their order. None at all means everything."""
    if len(patterns) > PATTERNS_MAX:
        raise Invalid(f"{len(patterns)} kinds are too many", hint=f"at most {PATTERNS_MAX}", field="kinds")
    for pattern in patterns:
        found = _PATTERN.fullmatch(pattern) if len(pattern) <= PATTERN_LENGTH_MAX else None
        if found is None:
            raise Invalid(f"{shown(pattern)} is not a kind of event", hint="write rule.ok, rule.* or *", field="kinds")
        if found["entity"] is not None and found["entity"] not in ENTITIES:
            raise Invalid(
                f"there are no events of {shown(found['entity'])}",
                hint=f"there are those of {', '.join(sorted(ENTITIES))}",
                field="kinds",
            )
    return tuple(dict.fromkeys(patterns)) or ("*",)


def pause_after(failures: int, fraction: float) -> float:
    """Seconds before the next try, after so many failures in a row. `fraction` in [0, 1) is the jitter."""
    whole: float = min(PAUSE_MAX_SECONDS, PAUSE_SECONDS * 2.0 ** min(max(failures, 1) - 1, 30))
    return whole * (0.5 + fraction / 2)
