"""Are replicas still what they were? When a doubt becomes a verdict, and when too many doubts are none.

Given     what a worker of the replica's own site found, how often it could find nothing, how much was found wrong.
Returns   what follows: a pause, a halt, how much of an endpoint may be read next.
Promises  no clock and no I/O. What could not be read decides nothing. An endpoint of which more than a part is wrong is
          a matter for a person: a server that lost a disk is not ten thousand damaged files.
Partner   replica.catalog.integrity writes verdicts down; replica.catalog.checks asks workers for them.

Suspicious  somebody disagreed with the catalogue: a copy that read it, a scrub, a scan. It stays as it is, and a worker
            of its own site is sent to read it where it lies.
Bad         that worker read it wrong twice, or found nothing twice while the storage itself was there; or a person
            said so. It is no source and counts for no rule; its bytes stay until better ones are proven.
Good again  that worker read all of it and found the catalogue's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

#: Fewer wrong files than this are no sign of anything but themselves.
GUARD_FILES = 10
#: Of a batch or of a pass, as long as nobody says otherwise.
GUARD_FRACTION = 0.1
#: So many replicas of an endpoint are declared bad unattended in a day; beyond that a person is asked.
BAD_IN_A_DAY = 100

#: Probes of one endpoint under way at once.
PROBES_AT_ONCE = 4
#: Pauses of a probe that could decide nothing: the first, and the longest.
PROBE_PAUSE_SECONDS = 60.0
PROBE_PAUSE_MAX_SECONDS = 86_400.0

#: What one account may have looked at in a day because it read something wrong: replicas, and their bytes, of which the
#: first replica may have more. What was read again within the pause is not for that.
DOUBTS_IN_A_DAY = 100
DOUBTED_BYTES_IN_A_DAY = 10**12
DOUBTS_PAUSE_SECONDS = 3_600.0

#: How an endpoint is scrubbed unless somebody says otherwise.
PERIOD_SECONDS = 90 * 86_400
BYTES_PER_SECOND = 20_000_000
FILES_PER_SECOND = 50.0
#: What one batch takes at that rate: long enough for a claim to be worth it, short enough to lose little by a kill.
BATCH_SECONDS = 60.0
BATCH_FILES = 500


class Depth(Enum):
    OFF = "off"
    SHALLOW = "shallow"  #: size, and the digest that the storage tells: a cached one hides what rots
    DEEP = "deep"  #: every byte is read and hashed by us


class Why(Enum):
    """What raised the doubt."""

    SOURCE = "source"  #: a transfer read it and disagreed
    SCRUB = "scrub"
    SCAN = "scan"
    READER = "reader"  #: a person's download read it and disagreed
    PERSON = "person"  #: somebody who may judge it said so


@dataclass(frozen=True, slots=True)
class Budget:
    """How fast an endpoint may be read; None: as fast as it goes."""

    bytes_per_second: int | None = BYTES_PER_SECOND
    files_per_second: float | None = FILES_PER_SECOND

    def seconds(self, files: int, size_bytes: int) -> float:
        """How long reading so much is to take."""
        return max(
            0.0 if not self.files_per_second else files / self.files_per_second,
            0.0 if not self.bytes_per_second else size_bytes / self.bytes_per_second,
        )

    def has_room(self, files: int, size_bytes: int) -> bool:
        """Whether a batch of so much may have another file. The first one always fits, however large."""
        return files == 0 or (files < BATCH_FILES and self.seconds(files, size_bytes) < BATCH_SECONDS)


def too_many(checked: int, wrong: int, fraction: float = GUARD_FRACTION) -> bool:
    """Whether so many wrong ones among those checked speak of the endpoint, not of its files."""
    return wrong >= GUARD_FILES and wrong > fraction * checked


def probe_pause(attempts: int) -> float:
    """Seconds until somebody looks again, after so many looks that decided nothing."""
    whole: float = PROBE_PAUSE_SECONDS * 2.0 ** min(max(attempts - 1, 0), 30)
    return min(PROBE_PAUSE_MAX_SECONDS, whole)


def fresh_seconds(period_seconds: float) -> float:
    """What was verified within so long, by whatever read it, is passed over: so nothing waits longer than one and a
    half periods, and what was copied yesterday is not read today."""
    return period_seconds / 2
