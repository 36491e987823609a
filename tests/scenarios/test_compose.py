"""The compose file, run without containers: its own commands and environment, mapped to this machine.

The same file in real containers: `compose/in-containers`.
"""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from replica.db.health import RECOMMENDED
from tests.scenarios.system import REPLICA, ROOT, Process, until
from tests.servers import PostgreSQL, Redis, free_port

FILE = ROOT / "compose/compose.yaml"
#: What a person would put into compose/.env, for a test's patience.
DOTENV = {
    "SEED_FILES": "40",
    "SEED_LARGE_MIB": "8",
    "REPLICA_LEASE_SECONDS": "4",
    "REPLICA_RETRY_BASE_SECONDS": "0.2",
}
SERVERS = ("postgres", "redis")


def interpolated(text: str) -> str:
    """`${NAME:-default}` and `$$`, as compose does it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: DOTENV.get(m[1]) or m[2], text).replace("$$", "$")


def load() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(interpolated(FILE.read_text(encoding="utf-8")))
    return loaded


SERVICES: dict[str, dict[str, Any]] = load()["services"]


def test_the_file_is_valid_by_the_compose_specification():
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_file_would_be_found(tmp_path: Path):
    """A check that never failed proves nothing."""
    broken = tmp_path / "compose.yaml"
    broken.write_text(FILE.read_text(encoding="utf-8").replace("networks: [inside]", "network: [inside]", 1))
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(broken)]
    assert subprocess.run(check, capture_output=True).returncode != 0


@pytest.mark.parametrize("site", ["desy", "hzdr"])
def test_a_worker_has_no_way_to_the_database(site: str):
    worker, other = SERVICES[f"worker-{site}"], "hzdr" if site == "desy" else "desy"
    environment = {**worker["environment"]}
    assert not [k for k, v in environment.items() if "DATABASE" in k or "postgres" in str(v)]
    assert worker["networks"] == ["sites"]
    assert SERVICES["postgres"]["networks"] == ["inside"]
    mounts = {mount.partition(":")[0]: mount for mount in worker["volumes"]}
    assert set(mounts) == {f"key-{site}", "disk-desy", "disk-hzdr"}, (
        "neither the administrator's token nor another site's"
    )
    assert mounts[f"disk-{other}"].endswith(":ro"), "it reads the other site's disk and writes to its own"
    assert mounts[f"key-{site}"].endswith(":ro")
    assert not mounts[f"disk-{site}"].endswith(":ro")


def test_the_database_is_started_with_what_is_recommended():
    assert SERVICES["postgres"]["command"] == [
        "postgres",
        *(f"-c{name}={value}" for name, value in RECOMMENDED.items()),
    ]


def test_the_run_in_real_containers_knows_all_services_and_images():
    """It cannot be part of every test run; that it still fits the file can be."""
    loader = importlib.machinery.SourceFileLoader("in_containers", str(FILE.parent / "in-containers"))
    spec = importlib.util.spec_from_loader("in_containers", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    assert set(module.SERVICES) == {name for name, service in SERVICES.items() if "profiles" not in service}
    text = (FILE.parent / "in-containers").read_text(encoding="utf-8")
    foreign = {service["image"] for service in SERVICES.values() if "build" not in service}
    foreign |= set(re.findall(r"^FROM (\S+)", (FILE.parent / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    assert foreign == {"postgres:15", "redis:7", "python:3.11-slim"}
    assert all(f"docker.io/library/{image}" in text for image in foreign)


def test_no_service_leans_on_the_order_of_starting():
    """podman ignores conditions of depends_on; a file that needs them works by luck there."""
    assert all(isinstance(service.get("depends_on", []), list) for service in SERVICES.values())


class Composed:
    """The services as processes: hosts are ports of 127.0.0.1, volumes are directories, restart policies are kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.postgresql, self.redis = PostgreSQL(), Redis()
        self.postgresql.port, self.redis.port = free_port(), free_port()
        self.api_port = free_port()
        self.processes: dict[str, Process] = {}
        self._end = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise)

    def volume(self, name: str) -> Path:
        if name.startswith("."):
            return (FILE.parent / name).resolve()
        path = self.directory / "volumes" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def here(self, text: str, service: dict[str, Any]) -> str:
        """A command's word or a variable's value, as it is on this machine."""
        targets = {mount.split(":")[1]: self.volume(mount.split(":")[0]) for mount in service.get("volumes", [])}
        for target in sorted(targets, key=len, reverse=True):
            text = re.sub(rf"{re.escape(target)}(?![\w.-])", str(targets[target]), text)
        ports = {"postgres:5432": self.postgresql.port, "redis:6379": self.redis.port, "api:8570": self.api_port}
        for address, port in ports.items():
            text = re.sub(rf"(?<![\w.-]){address}", f"127.0.0.1:{port}", text)
        return text.replace("0.0.0.0:8570", f"127.0.0.1:{self.api_port}")

    def process(self, name: str) -> Process:
        service = SERVICES[name]
        entrypoint = service.get("entrypoint") or image_entrypoint()
        words = [self.here(str(word), service) for word in [*entrypoint, *service["command"]]]
        programs = {"replica": REPLICA, "python": [sys.executable]}
        environment = {key: self.here(str(value), service) for key, value in service.get("environment", {}).items()}
        return Process(name, [*programs[words[0]], *words[1:]], environment, self.directory)

    def start(self) -> None:
        """In the worst order: whoever needs somebody is there before them."""
        for name in reversed([name for name in SERVICES if name not in (*SERVERS, "seed")]):
            self.processes[name] = self.process(name).start()
        self._supervisor.start()
        time.sleep(1.0)
        for server in (self.postgresql, self.redis):
            server.start()
        made = SERVICES["postgres"]["environment"]
        self.postgresql.execute(f"CREATE DATABASE {made['POSTGRES_DB']} TEMPLATE template0")

    def _supervise(self) -> None:
        """What the container engine does for a service with a restart policy."""
        while not self._end.wait(0.2):
            for name, process in self.processes.items():
                policy = SERVICES[name].get("restart", "no")
                if process.runs or policy == "no" or (policy == "on-failure" and process.exit_code == 0):
                    continue
                process.start()

    def run(self, name: str) -> tuple[int, str]:
        """`compose run --rm`: a service that ends by itself."""
        process = self.process(name)
        process.log.unlink(missing_ok=True)
        code = process.start().wait(90)
        return code, process.said()

    def end(self) -> None:
        self._end.set()
        if self._supervisor.is_alive():
            self._supervisor.join()
        for process in self.processes.values():
            if process.runs:
                process.kill()
        self.redis.remove()
        self.postgresql.remove()


def image_entrypoint() -> list[str]:
    text = (FILE.parent / "Dockerfile").read_text(encoding="utf-8")
    found: list[str] = json.loads(text.split("\nENTRYPOINT ")[1].splitlines()[0])
    return found


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    system = Composed(tmp_path_factory.mktemp("compose"))
    try:
        system.start()
        yield system
    finally:
        system.end()


def test_the_demo_world_is_replicated_between_the_two_sites(composed: Composed):
    code, said = composed.run("seed")
    assert code == 0, said + "".join(f"\n--- {p.name}\n{p.said()[-2000:]}" for p in composed.processes.values())
    wanted = seed_module().expected(int(DOTENV["SEED_FILES"]), int(DOTENV["SEED_LARGE_MIB"]) << 20)
    assert len(wanted) == 41
    for site in ("desy", "hzdr"):
        disk = composed.volume(f"disk-{site}")
        for name, digest in wanted.items():
            assert sha256(disk / "demo" / name) == digest, f"{name} at {site}"


def test_seeding_again_finds_everything_there(composed: Composed):
    composed.run("seed")
    code, said = composed.run("seed")
    assert code == 0, said
    assert "41 of them were there already" in said


def test_a_running_worker_knows_no_database_and_only_its_own_token(composed: Composed):
    for site in ("desy", "hzdr"):
        known = composed.processes[f"worker-{site}"].environ()
        assert known["REPLICA_SERVER"], "this is the environment of a worker"
        assert not [k for k, v in known.items() if "DATABASE" in k or str(composed.postgresql.port) in v]
        assert known["REPLICA_TOKEN_FILE"] == str(composed.volume(f"key-{site}") / "token")


def test_a_worker_that_is_killed_is_started_again_and_one_that_is_stopped_ends_in_order(composed: Composed):
    worker = composed.processes["worker-hzdr"]
    pid = worker.pid
    os.kill(pid, signal.SIGKILL)
    until("the worker runs again", lambda: worker.runs and worker.pid != pid)
    control = composed.process("control").start()
    time.sleep(2.0)
    assert control.stop() == 0, control.said()


def seed_module() -> Any:
    spec = importlib.util.spec_from_file_location("seed", FILE.parent / "seed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
