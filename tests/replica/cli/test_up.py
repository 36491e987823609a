"""`replica up` and the commands of the README, each a process of its own, as a person has them in two shells."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.replica.client.world import CONTENT, files_in

ROOT = Path(__file__).parents[3]
REPLICA = [sys.executable, "-m", "replica"]


def clean() -> dict[str, str]:
    """An environment that says nothing of Replica."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("REPLICA_")}
    return kept | {"PYTHONPATH": str(ROOT)}


def run(words: list[str], directory: Path, more: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=directory, env=clean() | more, capture_output=True, text=True, check=False)


@dataclass
class Shell:
    directory: Path
    exports: dict[str, str]
    process: subprocess.Popen[str]

    def __call__(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [*REPLICA, *words],
            cwd=self.directory,
            env=clean() | self.exports,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "-o", "json"))


def up(directory: Path) -> Shell:
    with (directory / "up.log").open("a") as log:
        process = subprocess.Popen(
            [*REPLICA, "up", "--dir", "state", "--port", "0"],
            cwd=directory,
            env=clean(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    exports = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line)[1:])
    assert exports.keys() == {"REPLICA_SERVER", "REPLICA_TOKEN_FILE"}, (directory / "up.log").read_text()
    return Shell(directory, exports, process)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    running = up(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


def test_the_commands_of_the_readme(shell: Shell, tmp_path: Path):
    for name, data in CONTENT.items():
        path = tmp_path / "run-17" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for site in ("DESY", "HZDR"):
        shell("site", "add", site)
        url = (tmp_path / site).as_uri()
        shell("endpoint", "add", f"{site}-DISK", "--site", site, "--url", url, "--attribute", "country=de")
    shell("scope", "add", "p1234")
    shell("upload", "./run-17", "--scope", "p1234", "--dataset", "run-17", "--endpoint", "DESY-DISK")
    shell("rule", "add", "p1234:run-17", "--copies", "2", "--to", "kind=disk", "--spread", "site", "--wait", "60")
    located = shell.json("locate", "p1234:run-17")
    assert {(r["endpoint"], r["state"]) for r in located} == {("DESY-DISK", "available"), ("HZDR-DISK", "available")}
    for site in ("DESY", "HZDR"):
        lying = {r["path"]: r["did"].removeprefix("p1234:") for r in located if r["site"] == site}
        assert {lying[p]: (tmp_path / site / p).read_bytes() for p in lying} == CONTENT
    assert "the rule is satisfied" in shell("rule", "explain", "1")
    shell("download", "p1234:run-17", "--dir", "./again")
    assert files_in(tmp_path / "again") == CONTENT

    before = shell.json("rule", "show", "1")
    shell("rule", "update", "1", "--to", "country=de", "--copies", "2", "--plan")
    assert shell.json("rule", "show", "1") == before
    shell("rule", "suspend", "1")
    shell("rule", "resume", "1")
    shell("did", "meta", "p1234:run-17", "set", "datatype=raw", "run=17")
    assert "p1234:run-17" in shell("did", "find", "datatype = raw and run in 10..20")
    shell("subscription", "add", "raw", "--where", "datatype = raw", "--to", "kind=disk", "--copies", "2", "--backfill")
    shell("quota", "set", "root", "country=de", "10TB")
    assert "HZDR-DISK" in shell("usage")
    shell("endpoint", "drain", "HZDR-DISK", "--reason", "end of warranty")
    assert shell.json("endpoint", "show", "HZDR-DISK")["draining"]
    shell("deletion", "list")
    assert "rule.added" in shell("events", "--kinds", "rule.*")
    assert shell.json("rule", "show", "1")["state"] == "ok"

    shell.process.send_signal(signal.SIGTERM)
    assert shell.process.wait(20) == 0
    shell("whoami", code=6)

    again = up(tmp_path)
    assert again.json("rule", "show", "1")["state"] == "ok"
    assert again.exports["REPLICA_TOKEN_FILE"] == shell.exports["REPLICA_TOKEN_FILE"]
    again.process.send_signal(signal.SIGINT)
    assert again.process.wait(20) == 0


def test_a_client_without_the_servers_parts_says_what_to_install(tmp_path: Path):
    script = "import sys; sys.modules['sqlalchemy'] = None; from replica.cli.main import main; main()"
    for command in ("up", "serve", "control", "migrate"):
        done = subprocess.run(
            [sys.executable, "-c", script, command],
            cwd=tmp_path,
            env=clean(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("replica: sqlalchemy is not installed: this is a client only\nhint: ")
