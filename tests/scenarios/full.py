"""The stories of the tests at full size: 2,000 files of 64 KiB and one of 4 GiB, to two other sites.

    python -m tests.scenarios.full [DIRECTORY]

Takes some minutes and 13 GiB of disk below DIRECTORY (the temporary directory), which is given back.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.scenarios import story
from tests.scenarios.system import Files, System

STORIES: dict[str, tuple[bool, Callable[[System, Files], None]]] = {
    "a worker killed, another frozen longer than its lease": (True, story.kill_and_freeze_workers),
    "the same, Redis never there": (False, story.kill_and_freeze_workers),
    "Redis flushed and restarted empty": (True, story.lose_redis),
    "PostgreSQL restarted without a goodbye": (True, story.restart_postgresql),
    "the API killed and restarted": (True, story.kill_api),
}


def main(words: list[str]) -> int:
    failed = 0
    for title, (redis, damage) in STORIES.items():
        print(f"{title} … ", end="", flush=True)
        with tempfile.TemporaryDirectory(prefix="replica-full-", dir=words[0] if words else None) as directory:
            try:
                with System(Path(directory), redis=redis) as system:
                    started = time.monotonic()
                    story.replicate(system, "full", story.FULL, partial(damage, system))
                    print(f"right, {time.monotonic() - started:.0f} s", flush=True)
            except AssertionError as error:
                failed += 1
                print(f"WRONG: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
