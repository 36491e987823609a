"""In which order the heads of a queue's lanes are handed out.

Given     lanes: transfers of one activity to one target that wait for the same, the most urgent first, as far as they
          were read; and the shares of the activities.
Returns   one transfer after another; who asks says of each what became of it.
Promises  activities take turns by rules.shares, and within an activity the most urgent of all its lanes goes first. A
          lane that is held up stops no other. Where more would have to be read to tell what is next, it stops.
Partner   replica.catalog.lanes reads them, as far as a claim can need them; replica.catalog.orders asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rules.shares import FILE_COST, Shares, cost


@dataclass(slots=True)
class Lane:
    activity: str
    target_id: int
    #: The limit or endpoint that these have been found to wait for; empty: not known of any.
    waits_for: str = ""
    #: (urgency, id, size, whatever else), the smallest first.
    rows: Sequence[tuple[int, int, int, Any]] = ()
    #: More is in the lane than was read.
    cut: bool = False
    _at: int = field(default=0)

    @property
    def head(self) -> tuple[int, int, int, Any] | None:
        return self.rows[self._at] if self._at < len(self.rows) else None

    @property
    def over(self) -> bool:
        """Nothing more can come from it."""
        return self._at >= len(self.rows) and not self.cut

    def step(self) -> None:
        self._at += 1

    def close(self) -> None:
        self._at, self.cut = len(self.rows), False


class Heads:
    """The lanes of a site while they are handed out."""

    def __init__(self, lanes: Sequence[Lane], shares: Shares) -> None:
        self._shares = shares
        self._lanes: dict[str, list[Lane]] = {}
        for lane in lanes:
            if not lane.over:
                self._lanes.setdefault(lane.activity, []).append(lane)
        self._first = {activity: self._front(activity) for activity in list(self._lanes)}
        self._now: Lane | None = None
        #: It stopped because more would have to be read, not because nothing was left.
        self.stopped = False

    def next(self) -> Lane | None:
        """The lane whose head is next; None: that is all. Say `took`, `passed` or `held_up` before the next call."""
        waiting = self._costs()
        if not waiting:
            return None
        lane = self._first[self._shares.next(waiting)]
        if lane is None or lane.head is None:
            self.stopped = True
            return None
        self._now = lane
        return lane

    def took(self) -> None:
        """The head goes."""
        lane = self._lane()
        assert lane.head is not None
        self._shares.charge(lane.activity, cost(lane.head[2]), self._costs())
        self._step(lane)

    def passed(self) -> None:
        """The head does not go, and was put elsewhere."""
        self._step(self._lane())

    def held_up(self) -> None:
        """Nothing of this lane can go now."""
        lane = self._lane()
        lane.close()
        self._renew(lane)

    def _lane(self) -> Lane:
        assert self._now is not None
        return self._now

    def _step(self, lane: Lane) -> None:
        lane.step()
        self._renew(lane)

    def _renew(self, lane: Lane) -> None:
        if lane.over:
            self._lanes[lane.activity].remove(lane)
        if self._lanes[lane.activity]:
            self._first[lane.activity] = self._front(lane.activity)
        else:
            del self._lanes[lane.activity], self._first[lane.activity]

    def _front(self, activity: str) -> Lane | None:
        """The lane with the most urgent head; None: a lane was read to where it was cut, so nobody knows."""
        lanes = self._lanes[activity]
        if len(lanes) > 1 and any(lane.head is None for lane in lanes):
            return None
        return min(lanes, key=lambda lane: lane.head[:2] if lane.head else (0, 0))

    def _costs(self) -> dict[str, int]:
        return {
            activity: FILE_COST if lane is None or lane.head is None else cost(lane.head[2])
            for activity, lane in self._first.items()
        }
