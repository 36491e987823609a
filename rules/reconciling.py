"""When does a scan's word count, and when is it too bad to be true?

Given     what a scan of an endpoint found, how often and since when; how often an endpoint is scanned.
Returns   whether a finding is confirmed; why nothing is done about any of them; when the next scan is due.
Promises  no clock: moments come in. One look never suffices: what counts was found by two scans with a grace between
          them, and not when a large part of the endpoint is missing or dark, for then the disk, the mount or the list
          is what is wrong. Only a person can say that it is so nevertheless.
Partner   replica.catalog.scans gathers and carries out; workers.scanning lists and looks once more.

| kind    | the catalogue                                 | the storage            | when confirmed                |
|---------|-----------------------------------------------|------------------------|-------------------------------|
| missing | available since before the scan, and after it | nothing of that name   | looked for again, then bad    |
| differs | the same                                      | a file of another size | looked at again, then bad     |
| dark    | no replica, transfer, deletion then or since  | a file                 | kept, until a person says     |
| odd     | cannot know it                                | a link, a strange name | told, and always kept         |
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

MISSING, DIFFERS, DARK, ODD = "missing", "differs", "dark", "odd"
KINDS = (MISSING, DIFFERS, DARK, ODD)
#: So few are believed whatever part of a small endpoint they are, unless they are half of it.
FEW = 10
#: How many leases a scan may lose before it has failed.
ATTEMPTS_MAX = 5
#: How long after a scan failed it is tried anew by itself.
FAILED_SECONDS = 86_400.0
#: The attribute of an endpoint that says how often it is scanned, in days; 0: never by itself.
EVERY = "scan_every"


@dataclass(frozen=True, slots=True)
class Policy:
    #: Between the first scan that found something missing and the one that counts.
    grace_seconds: float = 86_400.0
    #: The same for what is dark: longer than any upload takes between its bytes and its registration.
    dark_grace_seconds: float = 7 * 86_400.0
    #: What part of an endpoint may be missing, and what part dark, before a person is asked.
    fraction_max: float = 0.05
    #: How often disks are scanned that say nothing else; 0: never.
    every_days: float = 7.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one scan. `known`: available at the endpoint, as the catalogue says."""

    known: int
    listed: int
    missing: int
    dark: int


def too_many(counts: Counts, policy: Policy) -> str | None:
    """Why this is not believed without a person; None: it is."""
    for count, of, what, whole in (
        (counts.missing, counts.known, "missing or of another size", "files that should be there"),
        (counts.dark, max(counts.listed, counts.known), "unknown to the catalogue", "files there"),
    ):
        if _is_too_many(count, of, policy.fraction_max):
            share = f"{100 * count / of:.1f} %" if of else "all"
            return f"{count} of {of} {whole} are {what} ({share}; believed are {100 * policy.fraction_max:g} %)"
    return None


def _is_too_many(count: int, of: int, fraction_max: float) -> bool:
    if count == 0 or count <= of * fraction_max:
        return False
    return count > FEW or 2 * count >= of


def confirmed_if_seen_by(kind: str, began_at: datetime, policy: Policy) -> datetime:
    """A scan that began then confirms what an earlier one had seen at this moment or before."""
    grace = policy.dark_grace_seconds if kind == DARK else policy.grace_seconds
    return began_at - timedelta(seconds=grace)


@dataclass(frozen=True, slots=True)
class Scanned:
    """What is known of an endpoint's scans."""

    #: What its attribute says; None: nothing.
    every_days: float | None
    is_disk: bool
    created_at: datetime
    #: When the last scan that came to an end began to compare, and when the last one failed.
    compared_at: datetime | None = None
    failed_at: datetime | None = None
    #: Since when something is missing that one scan alone has seen.
    unconfirmed_since: datetime | None = None


def is_due(scanned: Scanned, policy: Policy, now: datetime) -> bool:
    """Whether the timetable asks for a scan. What one scan saw missing is not left for a week."""
    every = scanned.every_days
    if every is None:
        every = policy.every_days if scanned.is_disk else 0
    if not 0 < every < 100_000:
        return False
    if scanned.failed_at is not None and now < scanned.failed_at + timedelta(seconds=FAILED_SECONDS):
        return False
    due = (scanned.compared_at or scanned.created_at) + timedelta(days=every)
    if scanned.unconfirmed_since is not None:
        due = min(due, scanned.unconfirmed_since + timedelta(seconds=policy.grace_seconds))
    return now >= due
