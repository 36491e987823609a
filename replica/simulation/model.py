"""What links and storages carry at one moment, by how much is in flight.

Given     links, storages, and how many files are in flight on each link.
Returns   for each link: bytes a second, and the part of its files that fail.
Promises  nothing is carried that a stream, a link or a storage does not allow; more in flight than serves a storage
          well slows it down and makes it fail. Pure: the same gives the same.
Partner   replica.simulation.play asks it once for each step.

A file takes its overhead, in which nothing flows, and then its bytes at the speed of its stream: n files in flight ask
for n·size / (overhead + size / stream). Of that links and storages let through what they can, each an equal part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Storage:
    name: str
    #: Bytes a second in all, while no more than `best` are in flight.
    capacity: float
    best: int = 64
    #: By how much it is slower with twice as many, in bytes and in opening files: 1 / (1 + thrash).
    thrash: float = 0.3
    #: The part of files that fail with twice as many, besides those that always do.
    errors: float = 0.1


@dataclass(frozen=True, slots=True)
class Way:
    """A link and what is to go over it."""

    source: str
    target: str
    capacity: float
    stream: float
    overhead: float
    size: float
    errors: float = 0.002

    @property
    def name(self) -> str:
        return f"{self.source}:{self.target}"


def flow(
    ways: Sequence[Way],
    storages: Mapping[str, Storage],
    flights: Sequence[float],
    weather: Mapping[str, float],
    extra_errors: float = 0.0,
) -> list[tuple[float, float]]:
    """`weather`: by what the capacity of a link or storage is multiplied at the moment."""
    loads: dict[str, float] = {}
    for way, n in zip(ways, flights, strict=True):
        for end in (way.source, way.target):
            loads[end] = loads.get(end, 0.0) + n
    slower = {name: _slower(storages[name], load) for name, load in loads.items()}
    rates = []
    for way, n in zip(ways, flights, strict=True):
        overhead = way.overhead * max(slower[way.source], slower[way.target])
        asked = n * way.size / (overhead + way.size / way.stream)
        rates.append(min(asked, way.capacity * weather.get(way.name, 1.0)))
    for name in loads:
        most = storages[name].capacity * weather.get(name, 1.0) / slower[name]
        mine = [i for i, way in enumerate(ways) if name in (way.source, way.target)]
        asked = sum(rates[i] for i in mine)
        if asked > most:
            for i in mine:
                rates[i] *= most / asked
    carried = []
    for way, rate in zip(ways, rates, strict=True):
        failing = way.errors + extra_errors
        for end in (way.source, way.target):
            failing += storages[end].errors * max(0.0, loads[end] / storages[end].best - 1.2)
        carried.append((rate, min(0.9, failing)))
    return carried


def _slower(storage: Storage, load: float) -> float:
    return 1.0 + storage.thrash * max(0.0, load / storage.best - 1.0)


def good(rate: float, failing: float) -> float:
    """Bytes a second of files that do not fail; those that do fail half way."""
    return rate * (1 - failing) / (1 - failing / 2)
