"""The whole system in one process: it starts, works, stops and goes on, also after kill -9."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

import replica
from replica import config, wire
from replica.client import Client
from replica.client.places import prepare_here
from replica.embedded import Embedded
from rules.errors import Refused

ROOT = Path(replica.__file__).parents[1]


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def settings(directory: Path, **more: Any) -> config.Settings:
    quick = {"control_interval_seconds": 0.5, "retry_base_seconds": 0.1, "log_level": "error"}
    return config.load(directory, {}, **({"listen": "127.0.0.1:0"} | quick | more))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


class World:
    """Two sites with a disk each, and files at the first."""

    def __init__(self, directory: Path) -> None:
        self.disks = {name: directory / "disks" / name for name in ("A", "B")}

    def declare(self, client: Client) -> None:
        for name, path in self.disks.items():
            client.sites.add(name)
            prepare_here(client.endpoints.add(wire.NewEndpoint(name=f"{name}-DISK", site=name, url=path.as_uri())))
        client.scopes.add("test")
        client.dids.add(wire.NewDid(did="test:data"))

    def register(self, client: Client, files: dict[str, bytes]) -> None:
        replicas = []
        for name, content in files.items():
            path = self.disks["A"] / "test" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            checksums = {"xxh3_128": xxhash.xxh3_128_hexdigest(content)}
            replicas.append(wire.NewReplica(did=f"test:{name}", size=len(content), checksums=checksums))
        client.replicas.register(
            wire.Registration(endpoint="A-DISK", replicas=replicas, dataset="test:data", evidence="hashed")
        )

    def wish(self, client: Client) -> int:
        return client.rules.add(wire.NewRule(did="test:data", expression="kind=disk", copies=2, spread="site")).id

    def arrived(self, files: dict[str, bytes]) -> bool:
        there = {name: self.disks["B"] / "test" / name for name in files}
        return all(path.exists() for path in there.values()) and all(
            path.read_bytes() == files[name] for name, path in there.items()
        )


FILES = {f"run 1/ü{i}.dat": os.urandom(100 + i) for i in range(50)}


def test_a_wish_is_fulfilled_without_anything_installed(tmp_path: Path, world: World):
    with Embedded(settings(tmp_path / "system")) as system, Client(system.url, system.token) as client:
        world.declare(client)
        world.register(client, FILES)
        rule = world.wish(client)
        until(lambda: client.rules.show(rule).state == "ok")
        assert world.arrived(FILES)


def test_from_a_wish_to_the_first_byte_is_less_than_a_second(tmp_path: Path, world: World):
    """With polling as good as switched off: what is quick here is quick by hints, through Celery."""
    slow = settings(tmp_path / "system", poll_seconds=3600.0, control_interval_seconds=3600.0)
    with Embedded(slow) as system, Client(system.url, system.token) as client:
        world.declare(client)
        until(lambda: set(system.movers) == {"A", "B"})
        time.sleep(1.0)
        world.register(client, {"one": b"one"})
        began = time.monotonic()
        world.wish(client)
        until(lambda: world.arrived({"one": b"one"}))
        assert time.monotonic() - began < 1.0


def test_a_new_site_has_its_worker_soon(tmp_path: Path):
    with Embedded(settings(tmp_path / "system")) as system, Client(system.url, system.token) as client:
        client.sites.add("NEW")
        until(lambda: "NEW" in system.movers, 3)
        until(lambda: client.sites.show("NEW").worker_seen_at is not None, 5)


def test_a_site_whose_worker_is_elsewhere_gets_none_here(tmp_path: Path):
    with (
        Embedded(settings(tmp_path / "system"), elsewhere=frozenset({"FAR"})) as system,
        Client(system.url, system.token) as client,
    ):
        client.sites.add("FAR")
        client.sites.add("NEAR")
        until(lambda: system.movers, 5)
        assert set(system.movers) == {"NEAR"}


def test_after_a_stop_it_goes_on_where_it_was(tmp_path: Path, world: World):
    with Embedded(settings(tmp_path / "system")) as system, Client(system.url, system.token) as client:
        world.declare(client)
        world.register(client, FILES)
        token = system.token
    with Embedded(settings(tmp_path / "system")) as system, Client(system.url, token) as client:
        assert system.token == token
        assert {site.name for site in client.sites.list()} == {"A", "B"}
        assert set(system.movers) == {"A", "B"}
        rule = world.wish(client)
        until(lambda: client.rules.show(rule).state == "ok")


def test_a_stop_is_quick_and_can_be_repeated(tmp_path: Path):
    system = Embedded(settings(tmp_path / "system"))
    system.start()
    began = time.monotonic()
    system.stop()
    system.stop()
    assert time.monotonic() - began < 3


def test_what_it_writes_is_for_its_owner_only(tmp_path: Path):
    with Embedded(settings(tmp_path / "system")) as system:
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in system.dir.iterdir()}
        assert modes.keys() >= {"token", "lock", "replica.db"}
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE(system.dir.stat().st_mode) == 0o700
        assert system.token_file.read_text().strip() == system.token


def test_a_token_file_that_was_opened_or_lost_is_put_right(tmp_path: Path):
    with Embedded(settings(tmp_path / "system")) as system:
        first = system.token
        system.token_file.chmod(0o644)
    with Embedded(settings(tmp_path / "system")) as system:
        assert system.token == first
        assert stat.S_IMODE(system.token_file.stat().st_mode) == 0o600
        system.token_file.unlink()
    with Embedded(settings(tmp_path / "system")) as system:
        assert system.token != first
        assert system.token_file.read_text().strip() == system.token


def test_one_directory_has_one_process(tmp_path: Path):
    with Embedded(settings(tmp_path / "system")):
        with pytest.raises(Refused) as caught:
            Embedded(settings(tmp_path / "system")).start()
        assert f"process {os.getpid()}" in caught.value.message
    with Embedded(settings(tmp_path / "system")):
        pass


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
def test_an_address_that_others_can_reach_is_refused(tmp_path: Path, address: str):
    with pytest.raises(Refused, match="this machine only"):
        Embedded(settings(tmp_path / "system", listen=address)).start()


def test_a_port_that_was_asked_for_and_is_taken_is_an_error_and_leaves_nothing_running(tmp_path: Path):
    with Embedded(settings(tmp_path / "one")) as system:
        port = system.url.rpartition(":")[2]
        with pytest.raises(Refused, match=port):
            Embedded(settings(tmp_path / "two", listen=f"127.0.0.1:{port}")).start()
        with Embedded(settings(tmp_path / "two")):
            pass


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path):
    import sqlite3

    with Embedded(settings(tmp_path / "system")):
        pass
    with sqlite3.connect(tmp_path / "system/replica.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999_from_the_future'")
    with pytest.raises(Exception, match="newer"):
        Embedded(settings(tmp_path / "system")).start()


# --- as a process ---


class Process:
    """`replica up`, and what it printed."""

    def __init__(self, directory: Path, **environment: str) -> None:
        quick = {"REPLICA_CONTROL_INTERVAL_SECONDS": "0.5", "REPLICA_RETRY_BASE_SECONDS": "0.1"}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("REPLICA_")}
        with (directory.parent / f"{directory.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "replica", "up", "--dir", str(directory), "--port", "0"],
                env=clean | {"PYTHONPATH": str(ROOT)} | quick | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        self.lines = [self.process.stdout.readline() for _ in range(2)]

    def client(self) -> Client:
        url = re.fullmatch(r"export REPLICA_SERVER=(\S+)\n", self.lines[0])
        file = re.fullmatch(r"export REPLICA_TOKEN_FILE=(\S+)\n", self.lines[1])
        assert url, self.lines
        assert file, self.lines
        return Client(url[1], Path(file[1]).read_text().strip())

    def end(self, how: signal.Signals) -> tuple[int, float]:
        began = time.monotonic()
        self.process.send_signal(how)
        return self.process.wait(20), time.monotonic() - began


@pytest.fixture
def up() -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(directory: Path, **environment: str) -> Process:
        made.append(Process(directory, **environment))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_process_in_order(tmp_path: Path, up, how: signal.Signals):
    process = up(tmp_path / "system")
    process.client().ready()
    code, seconds = process.end(how)
    assert code == 0
    assert seconds < 4


def test_after_kill_9_it_goes_on_at_once(tmp_path: Path, world: World, up):
    """Killed in mid-copy, its leases are two minutes long; the next start does not wait for them."""
    content = os.urandom(8 << 20)
    files = {f"f{i}": content for i in range(3)}
    process = up(tmp_path / "system", REPLICA_FAULT_POINTS="after_verify=kill")
    client = process.client()
    world.declare(client)
    world.register(client, files)
    rule = world.wish(client)
    assert process.process.wait(20) == -signal.SIGKILL
    assert not (world.disks["B"] / "test").exists() or not world.arrived(files)
    client = up(tmp_path / "system").client()
    began = time.monotonic()
    until(lambda: client.rules.show(rule).state == "ok")
    assert time.monotonic() - began < 15
    assert world.arrived(files)
    assert max(transfer.attempts for transfer in client.transfers.list(rule=rule)) == 2


def test_a_second_process_is_refused_and_names_the_first(tmp_path: Path, up):
    process = up(tmp_path / "system")
    second = subprocess.run(
        [sys.executable, "-m", "replica", "up", "--dir", str(tmp_path / "system"), "--port", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert str(process.process.pid) in second.stderr
    process.client().ready()
