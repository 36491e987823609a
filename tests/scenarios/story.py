"""What is done to the system while it copies, in the words of the tests.

Given     a running System, files written at DESY, and how large the run is.
Returns   nothing: whatever is not right in the end is an AssertionError.
Promises  each damage happens in the middle: some files are on their way and not all are there, or the story fails and
          says so.
Partner   test_workers_die.py and its like tell these stories with a few files, full.py with thousands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.scenarios.system import LEASE_SECONDS, Files, Poller, System, until

SOURCE = "DESY"
TARGETS = ("HZDR", "GSI")


@dataclass(frozen=True)
class Size:
    """How much is copied, and how long that may take."""

    files: int
    small_bytes: int
    large_bytes: int
    patience_seconds: float

    def names(self) -> dict[str, int]:
        small = {f"run {n % 7}/event-{n:05}.dat": self.small_bytes for n in range(self.files)}
        return small | {"run 0/large.dat": self.large_bytes}


COMMIT = Size(200, 64 << 10, 64 << 20, 60.0)
#: What issue and README promise.
FULL = Size(2_000, 64 << 10, 4 << 30, 600.0)


def replicate(system: System, scope: str, size: Size, damage: Callable[[Files], None]) -> None:
    """Files at DESY, a rule for three copies at three sites, the damage; then everything is right at all of them."""
    files = system.write_files(SOURCE, scope, size.names())
    with Poller(system, files, TARGETS) as poller:
        rule = system.wish(files, copies=1 + len(TARGETS))
        damage(files)
        system.wait_ok(rule, size.patience_seconds)
    system.check_bytes(files, system.sites)
    poller.check(len(files.sizes) * len(TARGETS))
    system.check_one_completion_each(files, len(TARGETS))
    system.check_workers_know_no_database()


def in_the_middle(system: System, files: Files, strikes: Mapping[str, Callable[[], None]]) -> None:
    """At each site its strike, as soon as the site's worker writes; the sites begin in any order.

    The worker writes when a temporary is there, or the first files have arrived. They must not be all.
    """
    waiting = dict(strikes)

    def struck() -> bool:
        for site, strike in list(waiting.items()):
            if system.writing(site) or system.arrived(site, files):
                assert system.arrived(site, files) < len(files.sizes), f"all files were at {site} before the damage"
                strike()
                del waiting[site]
        return not waiting

    until("files are on their way", struck, pause=0.001)


def kill_and_freeze_workers(system: System, files: Files) -> None:
    """HZDR's worker is killed -9 and replaced. GSI's stops for longer than its lease while another takes over, and then
    goes on as if nothing had happened: a zombie with the orders of an older epoch."""
    zombie = system.workers["GSI"]
    in_the_middle(system, files, {"HZDR": system.workers["HZDR"].kill, "GSI": zombie.freeze})
    for site in TARGETS:
        system.workers[site] = system.new_worker(site)
    time.sleep(LEASE_SECONDS + 1.0)
    zombie.resume()


def lose_redis(system: System, files: Files) -> None:
    in_the_middle(system, files, {"HZDR": system.lose_redis})


def restart_postgresql(system: System, files: Files) -> None:
    in_the_middle(system, files, {"HZDR": system.restart_postgresql})


def kill_api(system: System, files: Files) -> None:
    in_the_middle(system, files, {"HZDR": system.restart_api})
