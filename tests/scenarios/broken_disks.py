"""Disks that are full, read-only, not mounted any more or closed to us: what the engine makes of them, and who is told.

    python -m tests.scenarios.broken_disks

Given     Linux that lets this account have a mount namespace (as root, or with user namespaces); what is mounted is
          seen by nobody else.
Returns   the whole system in one process, with four real file systems that break at the same moment and one that does
          not; figures as JSON, and 1 if something was not as it should be.
Promises  the same for root and for anybody: the process plays in namespaces of its own, without the right of root to
          open what is closed (CAP_DAC_OVERRIDE).
Partner   tests/scenarios/test_broken_disks.py; tests/workers/test_broken_servers.py says the same of storages
          on other machines.

Each broken disk must be told apart (no_space, forbidden, unreachable, forbidden), its endpoint be left alone with the
reason, the rules that wait for it name it, the other endpoint's work go on meanwhile, and all heal when the disks do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import xxhash

PROJECT = Path(__file__).parents[2]
INSIDE = "REPLICA_TEST_INSIDE"
SIZE = 64 << 10
FILES = 4
#: Disk → why its endpoint is left alone, and what everybody is told.
BROKEN = {
    "FULL": ("full", "FULL-DISK has"),
    "READONLY": ("denied", "Read-only file system"),
    "GONE": ("away", "perhaps not mounted"),
    "CLOSED": ("denied", "may not be opened"),
}


def main(words: Sequence[str] | None = None) -> int:
    if os.environ.get(INSIDE) != "1":
        return _again_inside()
    with tempfile.TemporaryDirectory(prefix="replica-disks-") as scratch:
        try:
            told = play(Path(scratch))
        finally:
            for place in Path(scratch).glob("*[A-Z]*"):
                subprocess.run(["umount", "--lazy", place], capture_output=True)
    print(json.dumps(told, indent=2))
    return 1 if told["wrong"] else 0


def _again_inside() -> int:
    """In a mount namespace of our own, without the right to pass by permissions."""
    command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-m", __spec__.name]
    ways = [["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"]]
    if os.geteuid() == 0:
        ways.append(["unshare", "--mount", "--propagation", "private"])
    for way in ways:
        if subprocess.run([*way, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0:
            return subprocess.run([*way, *command], env=os.environ | {INSIDE: "1"}, cwd=PROJECT).returncode
    print(
        "no mount namespace can be had here: run as root, or allow user namespaces "
        "(sysctl kernel.unprivileged_userns_clone=1 user.max_user_namespaces=10000)",
        file=sys.stderr,
    )
    return 2


def mount(path: Path, options: str = f"size={8 << 20}") -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "replica", path], check=True)


class Disk:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount(path)

    def break_(self, how: str) -> None:
        if how == "FULL":
            with (self.path / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while filler.write(bytes(4096)):
                    pass
        elif how == "READONLY":
            subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)
        elif how == "GONE":
            subprocess.run(["mount", "--bind", self.path, self._kept()], check=True)
            subprocess.run(["umount", self.path], check=True)
        elif how == "CLOSED":
            self.path.chmod(0o000)

    def mend(self, how: str) -> None:
        if how == "FULL":
            (self.path / "filler").unlink()
        elif how == "READONLY":
            subprocess.run(["mount", "-o", "remount,rw", self.path], check=True)
        elif how == "GONE":
            subprocess.run(["mount", "--move", self._kept(), self.path], check=True)
        elif how == "CLOSED":
            self.path.chmod(0o755)

    def _kept(self) -> Path:
        kept = self.path.with_name(self.path.name + ".kept")
        kept.mkdir(exist_ok=True)
        return kept


def until(true: Callable[[], Any], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise SystemExit(f"it did not come true within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def play(scratch: Path) -> dict[str, Any]:
    from replica import config
    from replica.client import Client
    from replica.embedded import Embedded

    scratch.chmod(0o755)
    quick = {"listen": "127.0.0.1:0", "control_interval_seconds": 0.3, "retry_base_seconds": 0.1, "log_level": "error"}
    quick["poll_seconds"] = 0.5
    settings = config.load(scratch / "system", {}, **quick)
    with Embedded(settings) as system, Client(system.url, system.token) as client:
        return _Play(scratch, system, client).run()


class _Play:
    def __init__(self, scratch: Path, system: Any, client: Any) -> None:
        self.system, self.client = system, client
        self.disks = {name: Disk(scratch / name) for name in ("SOURCE", "GOOD", *BROKEN)}
        self.files = {f"f{number}": os.urandom(SIZE) for number in range(FILES)}
        self.wrong: list[str] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        self._declare()
        for how in BROKEN:
            self.disks[how].break_(how)
        began = time.monotonic()
        rules = {name: self._wish(name) for name in (*BROKEN, "GOOD")}
        until(lambda: self._state(rules["GOOD"]) == "ok", "the endpoint that is well gets its copies meanwhile")
        self.seconds["good"] = round(time.monotonic() - began, 1)
        seen = {how: self._told(how, rules[how]) for how in BROKEN}
        self.seconds["told"] = round(time.monotonic() - began, 1)
        for how in BROKEN:
            self.disks[how].mend(how)
        # Hours later, as far as anybody can tell: the pauses are over.
        self.system.db.clock = lambda: datetime.now(UTC) + timedelta(hours=3)
        self.system.passes.wake_all()
        for how in BROKEN:
            self._retry(rules[how])
            until(lambda how=how: self._state(rules[how]) == "ok", f"{how} heals")
            self._compare(how)
        self._compare("GOOD")
        self.seconds["healed"] = round(time.monotonic() - began, 1)
        return {"seconds": self.seconds, "seen": seen, "wrong": self.wrong}

    def _declare(self) -> None:
        from replica import wire
        from replica.client.places import prepare_here

        client = self.client
        for name, disk in self.disks.items():
            client.sites.add(name)
            endpoint = wire.NewEndpoint(name=f"{name}-DISK", site=name, url=disk.path.as_uri())
            prepare_here(client.endpoints.add(endpoint))
        client.scopes.add("test")
        client.dids.add(wire.NewDid(did="test:data"))
        replicas = []
        for name, content in self.files.items():
            file = self.disks["SOURCE"].path / "test" / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
            checksums = {"xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            replicas.append(wire.NewReplica(did=f"test:{name}", size=SIZE, checksums=checksums))
        client.replicas.register(
            wire.Registration(endpoint="SOURCE-DISK", replicas=replicas, dataset="test:data", evidence="hashed")
        )

    def _wish(self, name: str) -> int:
        from replica import wire

        return int(self.client.rules.add(wire.NewRule(did="test:data", expression=f"{name}-DISK", copies=1)).id)

    def _state(self, rule: int) -> str:
        return str(self.client.rules.show(rule).state)

    def _told(self, how: str, rule: int) -> dict[str, Any]:
        """What an operator sees; waits until the endpoint is left alone."""
        why, words = BROKEN[how]
        endpoint = f"{how}-DISK"

        def breakers() -> list[Any]:
            return [b for b in self.client.endpoints.show(endpoint).breakers if b.direction == "write"]

        until(lambda: breakers(), f"{endpoint} is left alone")
        (breaker,) = breakers()
        transfers = list(self.client.transfers.list(rule=rule))
        reasons = {t.reason or "" for t in transfers}
        shown = self._cli("endpoint", "show", endpoint)
        listed = self._cli("transfer", "list", "--rule", str(rule))
        explained = self._cli("rule", "explain", str(rule))
        if breaker.why != why:
            self._say(f"{endpoint} is left alone for {breaker.why}, not {why}")
        if not all(words in reason for reason in reasons) or words not in breaker.message:
            self._say(f"transfers to {endpoint} do not tell {words!r}: {reasons}, {breaker.message}")
        for text, what in ((shown, "endpoint show"), (listed, "transfer list"), (explained, "rule explain")):
            if endpoint not in text or words not in text:
                self._say(f"`{what}` does not tell {words!r} of {endpoint}: {text}")
        if "writing, since" not in " ".join(shown.split()):
            self._say(f"`endpoint show` does not tell that {endpoint} is left alone: {shown}")
        if how == "GONE" and list(self.disks[how].path.iterdir()):
            self._say("something was written where the disk was mounted")
        if self._state(rule) == "ok":
            self._say(f"the rule for {endpoint} says that it is satisfied")
        return {"why": breaker.why, "message": breaker.message, "hint": breaker.hint}

    def _cli(self, *words: str) -> str:
        from click.testing import CliRunner

        from replica.cli.main import root

        environment = {"REPLICA_SERVER": self.system.url, "REPLICA_TOKEN_FILE": str(self.system.token_file)}
        done = CliRunner().invoke(root, words, env=environment | {"COLUMNS": "400"})
        if done.exit_code:
            self._say(f"`{' '.join(words)}` ended with {done.exit_code}: {done.output}")
        return done.output

    def _retry(self, rule: int) -> None:
        for transfer in self.client.transfers.list(rule=rule):
            if transfer.state == "failed":
                self.client.transfers.retry(transfer.id)

    def _compare(self, name: str) -> None:
        for file, content in self.files.items():
            there = self.disks[name].path / "test" / file
            if not there.exists() or there.read_bytes() != content:
                self._say(f"{file} is not right at {name}")
        left = list((self.disks[name].path / ".replica/part").glob("*"))
        if left:
            self._say(f"temporaries are left at {name}: {left}")

    def _say(self, what: str) -> None:
        self.wrong.append(what)


if __name__ == "__main__":
    sys.exit(main())
