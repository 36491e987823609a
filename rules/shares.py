"""Which activity of a site is next, and which of its transfers.

Given     the weight of each activity, its deficit (what it is owed of what was handed out before), and what its first
          transfer costs.
Returns   the activity whose turn it is; and the deficits after that.
Promises  over any time in which the same activities wait, each gets its part by weight, exactly, but for less than the
          cost of the largest transfer; no dice. Within an activity the more urgent goes first, and whatever waits
          becomes more urgent, so that everything goes at last.
Partner   replica.catalog.orders asks with every claim; replica.catalog.activities keeps weights and deficits.

The round: whatever is handed out, every waiting activity is owed its part of it (its deficit grows), and the one that
gets it pays for all (its deficit shrinks). So the deficits of those that wait add up to nothing. Next is, of those
that are owed something or nothing, the one whose debt would be worked off the soonest: the earliest deadline first.
"""

from __future__ import annotations

from collections.abc import Mapping

#: What a transfer costs besides its bytes: opening, proving and publishing a file take as long as so many bytes.
FILE_COST = 1_000_000
DEFAULT_WEIGHT = 100
#: A transfer goes before those of one step more priority that came so much later.
STEP_SECONDS = 6 * 3600


def cost(size: int) -> int:
    return size + FILE_COST


def urgency(created_micros: int, priority: int) -> int:
    """The smaller, the sooner. It never changes while a transfer waits: age raises all that wait alike, so what came
    long enough ago goes before everything that comes now, whatever its priority."""
    return created_micros - priority * STEP_SECONDS * 1_000_000


class Shares:
    """The deficits of one site while transfers are handed out."""

    def __init__(self, weights: Mapping[str, int] | None = None, deficits: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self.deficits = dict(deficits or {})

    def copy(self) -> Shares:
        """To try whose turn it would be."""
        return Shares(self._weights, self.deficits)

    def weight(self, activity: str) -> int:
        return max(1, self._weights.get(activity, DEFAULT_WEIGHT))

    def next(self, costs: Mapping[str, int]) -> str:
        """`costs`: activity → what the next transfer of it costs, of all that wait."""
        if len(costs) == 1:
            return next(iter(costs))
        self._settle(costs)
        owed = [activity for activity in costs if self.deficits[activity] >= -1e-6] or list(costs)
        return min(owed, key=lambda a: ((costs[a] - self.deficits[a]) / self.weight(a), a))

    def charge(self, activity: str, paid: int, waiting: Mapping[str, int]) -> None:
        """`activity` got a transfer that costs so much, while all these were waiting, itself among them."""
        if len(waiting) == 1:
            return
        whole = sum(self.weight(a) for a in waiting)
        for a in waiting:
            self.deficits[a] = self.deficits.get(a, 0.0) + paid * self.weight(a) / whole
        self.deficits[activity] -= paid

    def _settle(self, waiting: Mapping[str, int]) -> None:
        """Who came or went changes what the others are owed: together nothing, in the proportion of their weights."""
        excess = sum(self.deficits.setdefault(a, 0.0) for a in waiting)
        if abs(excess) > 1e-6:
            whole = sum(self.weight(a) for a in waiting)
            for a in waiting:
                self.deficits[a] -= excess * self.weight(a) / whole
