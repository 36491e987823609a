"""Worlds to try policies in.

Given     nothing.
Returns   TRACES: name → Trace.
Promises  between them what §5 of the literature on transfer engines complains of: small files and large ones, capacity
          that changes, errors that come and go, storages that several links share, disks that thrash, queues too short
          to tell anything, and measurements full of noise.
Partner   replica.simulation.play.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from replica.simulation.model import Storage, Way

MB, GB = 1e6, 1e9


@dataclass(frozen=True, slots=True)
class Change:
    """From this second on the capacity of a link or storage is multiplied by so much."""

    at: float
    of: str
    factor: float


@dataclass(frozen=True, slots=True)
class Errors:
    """Between these seconds so many more files fail, whatever is in flight."""

    since: float
    until: float
    part: float


@dataclass(frozen=True, slots=True)
class Resize:
    """From this second on the files are of this size."""

    at: float
    size: float


@dataclass(frozen=True, slots=True)
class Trace:
    name: str
    what: str
    ways: Sequence[Way]
    storages: Sequence[Storage]
    changes: Sequence[Change] = ()
    errors: Sequence[Errors] = ()
    resizes: Sequence[Resize] = ()
    #: How much capacities vary, and how much of that is left after a step.
    noise: float = 0.05
    memory: float = 0.5
    #: (every so many seconds, so many files come) on each link; None: there is always enough.
    comes: tuple[float, int] | None = None
    seconds: float = 3 * 3600.0
    by_name: Mapping[str, Storage] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {storage.name: storage for storage in self.storages})


def _two(best: int = 64, **fields: float) -> tuple[Storage, Storage]:
    return Storage("A", 4 * GB, 128), Storage("B", 4 * GB, best, **fields)


def _way(**fields: float) -> Way:
    usual = {"capacity": 1.25 * GB, "stream": 60 * MB, "overhead": 2.0, "size": 1 * GB}
    return Way("A", "B", **{**usual, **fields})


_ALL = (
    Trace("steady", "10 Gb/s, files of 1 GB, nothing happens", [_way()], _two()),
    Trace(
        "small_files",
        "files of 200 kB, of which most of the time goes into opening and proving them",
        [_way(size=0.2 * MB, overhead=0.5)],
        _two(best=80, thrash=1.2),
    ),
    Trace(
        "large_files",
        "files of 20 GB: one takes minutes",
        [_way(size=20 * GB, stream=100 * MB)],
        _two(best=24, thrash=0.5),
    ),
    Trace(
        "capacity_halves",
        "the storage carries half from one hour on, and all again after two",
        [_way()],
        (Storage("A", 4 * GB, 128), Storage("B", 1.2 * GB, 30, thrash=0.5)),
        changes=[Change(3600, "B", 0.5), Change(7200, "B", 1.0)],
    ),
    Trace(
        "errors_burst",
        "for ten minutes of each hour a quarter of all files fails",
        [_way()],
        _two(best=40),
        errors=[Errors(h * 3600 + 1200, h * 3600 + 1800, 0.25) for h in range(3)],
    ),
    Trace(
        "shared_storage",
        "three links from one disk that serves 24 at once",
        [Way("A", target, 1.25 * GB, 60 * MB, 2.0, 1 * GB) for target in ("B", "C", "D")],
        (Storage("A", 1.3 * GB, 24, thrash=0.6), *(Storage(name, 4 * GB, 64) for name in "BCD")),
    ),
    Trace(
        "thrashing_disk",
        "a disk that serves eight well and thirty badly",
        [_way(stream=50 * MB)],
        (Storage("A", 4 * GB, 128), Storage("B", 0.35 * GB, 8, thrash=1.0, errors=0.15)),
    ),
    Trace(
        "short_bursts",
        "forty files come every five minutes: seldom enough to learn from",
        [_way(size=2 * GB)],
        _two(best=40),
        comes=(300.0, 40),
    ),
    Trace(
        "noisy_wan",
        "a long way, whose capacity others use, too",
        [_way(stream=25 * MB, overhead=6.0, capacity=0.8 * GB)],
        _two(best=80),
        noise=0.25,
        memory=0.8,
    ),
    Trace(
        "other_sizes",
        "large files, then small ones, then large ones again",
        [_way()],
        _two(best=48, thrash=1.2),
        resizes=[Resize(3600, 2 * MB), Resize(7200, 1 * GB)],
    ),
)

TRACES: Mapping[str, Trace] = MappingProxyType({trace.name: trace for trace in _ALL})
