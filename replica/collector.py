"""Python's cycle collector, as a process that lives long and makes much at once wants it.

Given     nothing: called once, when everything that a process needs was imported and made.
Returns   nothing.
Promises  what is there by then is not looked at again, and the collector runs once for fifty thousand new objects, not
          for seven hundred: a batch of ten thousand rows was looked through dozens of times while it was read, for a
          third of the time of some operations. Cycles are still found; reference counting does the rest.
Partner   replica.api.serve, replica.embedded and workers.service call it.
"""

from __future__ import annotations

import gc

#: New objects until the youngest are looked at.
NEW_OBJECTS = 50_000


def settle_in() -> None:
    """The process is complete: from here on there is work."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW_OBJECTS, 20, 20)
