"""What tells the present moment: the database's clock, or one that a test turns by hand.

Given     nothing.
Returns   aware UTC moments.
Promises  code that decides takes `now` as a value; only whoever begins a transaction asks the clock.
Partner   replica.db.engine.Session.now, which asks the database where no other clock was given.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

Clock = Callable[[], datetime]
