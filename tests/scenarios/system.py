"""The real system as separate processes, to be broken and watched heal.

Given     an empty directory and the sites wanted: PostgreSQL, Redis, API, control and a worker for each are started.
Returns   System: processes that can be killed, frozen and restarted; a client; what is on the disks, read without the
          system; a Poller that watches final names from beginning to end.
Promises  nothing is faked: every process is the command an operator types, with short timers from its environment;
          all of them end with the test, whatever becomes of it.
Partner   tests/scenarios/test_*.py, tests/scenarios/full.py, tests/benchmarks/bench_system.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg

from replica import wire
from replica.client import Client
from replica.client.places import prepare_here
from rules.errors import ReplicaError
from rules.names import Did
from rules.paths import path_for
from tests.servers import PostgreSQL, Redis, free_port

ROOT = Path(__file__).resolve().parents[2]
REPLICA = [sys.executable, "-m", "replica.cli.main"]

#: Production's timers, shrunk alike: a test waits for a lost lease, not for two minutes.
TIMERS = {
    "REPLICA_LEASE_SECONDS": "4",
    "REPLICA_POLL_SECONDS": "1",
    "REPLICA_CONTROL_INTERVAL_SECONDS": "0.5",
    "REPLICA_RETRY_BASE_SECONDS": "0.2",
}
LEASE_SECONDS = float(TIMERS["REPLICA_LEASE_SECONDS"])
#: Replica's own folder at an endpoint: temporaries live there, nothing in it is a replica.
OWN = ".replica"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def clean_environment() -> dict[str, str]:
    """Ours without any setting of Replica or pytest: what a process knows is what its test told it."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("REPLICA_", "PYTEST_"))}
    return ours | {"PYTHONPATH": str(ROOT)}


def until(what: str, true: Callable[[], object], seconds: float = 30.0, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(pause)


class Process:
    """One process, its environment and its log."""

    def __init__(self, name: str, words: Sequence[str], environment: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.words = list(words)
        self.environment = dict(environment)
        self.directory = directory
        self.log = directory / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.words,
                env=clean_environment() | self.environment,
                cwd=self.directory,  # no replica.toml here: the environment says it all
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # pytest may be killed
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def kill(self) -> None:
        """kill -9 of everything the process began: it has no say in it."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def stop(self, seconds: float = 20.0) -> int:
        """As an operator would: SIGTERM, and time to give back what it holds."""
        assert self._process is not None
        if self.runs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGCONT)
                self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
        return int(self._process.returncode)

    def wait(self, seconds: float) -> int:
        assert self._process is not None
        return int(self._process.wait(seconds))

    def environ(self) -> dict[str, str]:
        """What the running process itself has in its environment, by the kernel."""
        entries = Path(f"/proc/{self.pid}/environ").read_bytes().split(b"\0")
        return dict(entry.decode().partition("=")[::2] for entry in entries if entry)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class System:
    """Everything, started in order; `with` ends it."""

    def __init__(
        self,
        directory: Path,
        *,
        sites: Sequence[str] = ("DESY", "HZDR", "GSI"),
        redis: bool = True,
        durable: bool = False,
        timers: Mapping[str, str] = TIMERS,
        disks: Path | None = None,
    ) -> None:
        self.directory = directory
        self.sites = tuple(sites)
        self.timers = dict(timers)
        self.postgresql = PostgreSQL(durable=durable)
        self.redis = Redis() if redis else None
        # Without Redis its URL stays set, to a port where nothing listens: the worse case of the two.
        self.broker_url = "" if redis else f"redis://127.0.0.1:{free_port()}/0"
        self.port = free_port()
        self.server = f"http://127.0.0.1:{self.port}"
        self.disks = {site: (disks or directory / "disks") / site for site in sites}
        self.processes: list[Process] = []
        self.workers: dict[str, Process] = {}
        self._names: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            for process in self.processes:
                sys.stderr.write(f"--- {process.name}, exit code {process.exit_code}\n{process.said()[-3000:]}\n")
        self.end()

    def _start(self) -> None:
        self.postgresql.start()
        self.postgresql.execute("CREATE DATABASE replica TEMPLATE template0")
        # The tests' server forgets the last commits when it is killed; what is shown here needs one that does not.
        self.postgresql.execute("ALTER DATABASE replica SET synchronous_commit = on")
        if self.redis is not None:
            self.redis.start()
            self.broker_url = self.redis.url
        self.database_url = self.postgresql.url("replica")
        self.token_file = self.directory / "token"
        self.run("migrate", "--token-file", str(self.token_file))
        self.api = self.process("serve", self.centre(), "serve", "--listen", f"127.0.0.1:{self.port}").start()
        self.control = self.process("control", self.centre(), "control").start()
        self.client = Client(self.server, self.token_file.read_text().strip())
        until("the API is ready", self._ready)
        for site in self.sites:
            self._make_site(site)
            self.workers[site] = self.new_worker(site)

    def _ready(self) -> bool:
        assert self.api.runs, f"the API ended:\n{self.api.said()[-3000:]}"
        try:
            self.client.ready()
        except ReplicaError:
            return False
        return True

    def _make_site(self, site: str) -> None:
        self.disks[site].mkdir(parents=True)
        self.client.sites.add(site)
        made = self.client.endpoints.add(
            wire.NewEndpoint(name=f"{site}-DISK", site=site, url=self.disks[site].as_uri(), attributes={"role": "disk"})
        )
        prepare_here(made)
        key = self.directory / f"{site}.token"
        key.touch(0o600)
        key.write_text(self.client.sites.key(site).token + "\n")

    def centre(self) -> dict[str, str]:
        """What the API and control are told."""
        return self.timers | {"REPLICA_DATABASE_URL": self.database_url, "REPLICA_BROKER_URL": self.broker_url}

    def process(self, name: str, environment: Mapping[str, str], *words: str) -> Process:
        self._names[name] = self._names.get(name, 0) + 1
        unique = name if self._names[name] == 1 else f"{name}-{self._names[name]}"
        made = Process(unique, [*REPLICA, *words], environment, self.directory)
        self.processes.append(made)
        return made

    def new_worker(self, site: str, **more: str) -> Process:
        """A worker knows the API, the broker and its site's token; it has never heard of a database."""
        environment = {
            "REPLICA_SERVER": self.server,
            "REPLICA_BROKER_URL": self.broker_url,
            "REPLICA_TOKEN_FILE": str(self.directory / f"{site}.token"),
            "REPLICA_POLL_SECONDS": self.timers["REPLICA_POLL_SECONDS"],
        }
        return self.process(f"worker-{site}", environment | more, "worker", "--site", site).start()

    def run(self, *words: str) -> str:
        """A command that ends by itself, as an administrator types it at the centre."""
        environment = clean_environment() | self.centre() | {"REPLICA_SERVER": self.server}
        if self.token_file.exists():
            environment["REPLICA_TOKEN_FILE"] = str(self.token_file)
        done = subprocess.run([*REPLICA, *words], env=environment, cwd=self.directory, capture_output=True, text=True)
        assert done.returncode == 0, (
            f"replica {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def end(self) -> None:
        for process in self.processes:
            if process.runs:
                process.kill()
        if self.redis is not None:
            self.redis.remove()
        self.postgresql.remove()

    # --- breaking things ------------------------------------------------------------------------------------------

    def restart_api(self) -> None:
        self.api.kill()
        self.api = self.process("serve", self.centre(), "serve", "--listen", f"127.0.0.1:{self.port}").start()

    def restart_postgresql(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """SIGQUIT is the immediate shutdown: no goodbye to clients, recovery from the log at the next start."""
        self.postgresql.stop(how)
        self.postgresql.start()

    def lose_redis(self) -> None:
        """FLUSHALL, then a new and empty server on the same port."""
        assert self.redis is not None
        self.redis.flush()
        self.redis.stop(signal.SIGKILL)
        self.redis.start()

    # --- data -----------------------------------------------------------------------------------------------------

    def write_files(self, site: str, scope: str, sizes: Mapping[str, int]) -> Files:
        """Files written to a site's disk by "the experiment", and registered in one dataset by their checksums."""
        import xxhash

        files = Files(scope, dict(sizes))
        replicas = []
        for name, size_bytes in sizes.items():
            path = self.disks[site] / files.path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            xxh3, sha = xxhash.xxh3_128(), hashlib.sha256()
            with path.open("xb") as file:
                for piece in pieces(f"{scope}:{name}", size_bytes):
                    file.write(piece)
                    xxh3.update(piece)
                    sha.update(piece)
            files.digests[name] = sha.hexdigest()
            replicas.append(
                wire.NewReplica(did=f"{scope}:{name}", size=size_bytes, checksums={"xxh3_128": xxh3.hexdigest()})
            )
        self.client.scopes.add(scope)
        self.client.dids.add(wire.NewDid(did=files.dataset))
        for start in range(0, len(replicas), wire.BULK_MAX):
            self.client.replicas.register(
                wire.Registration(
                    endpoint=f"{site}-DISK",
                    replicas=replicas[start : start + wire.BULK_MAX],
                    dataset=files.dataset,
                    evidence="hashed",
                )
            )
        return files

    def wish(self, files: Files, copies: int) -> wire.Rule:
        return self.client.rules.add(
            wire.NewRule(did=files.dataset, expression="role=disk", copies=copies, spread="site")
        )

    def rule_state(self, rule: wire.Rule) -> str:
        """Its state; empty while the API does not answer."""
        with contextlib.suppress(ReplicaError):
            return self.client.rules.show(rule.id).state
        return ""

    def wait_ok(self, rule: wire.Rule, seconds: float = 60.0) -> None:
        try:
            until(f"rule {rule.id} is ok", lambda: self.rule_state(rule) == "ok", seconds)
        except AssertionError as error:
            story = self.query(
                "SELECT state, attempts, reason, count(*) FROM transfers GROUP BY 1, 2, 3 ORDER BY 4 DESC LIMIT 10"
            )
            said = self.client.rules.explain(rule.id).sentences
            raise AssertionError(f"{error}\n{said}\ntransfers (state, attempts, reason, count): {story}") from None

    # --- looking, without the system ------------------------------------------------------------------------------

    def query(self, statement: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.database_url) as connection:
            return connection.execute(statement.encode()).fetchall()

    def writing(self, site: str) -> bool:
        """Whether temporaries lie at the site: a copy is in the middle."""
        return any((self.disks[site] / OWN / "part").glob("*"))

    def arrived(self, site: str, files: Files) -> int:
        """How many files of `files` have their final name at the site."""
        return sum(1 for name in files.sizes if (self.disks[site] / files.path(name)).exists())

    def check_bytes(self, files: Files, sites: Iterable[str]) -> None:
        """Every byte at every site by SHA-256, which Replica never computed for these files; and nothing else there."""
        for site in sites:
            for name, digest in files.digests.items():
                path = self.disks[site] / files.path(name)
                assert path.exists(), f"{site} has no {files.path(name)}"
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                assert found == digest, f"{site} has other bytes in {files.path(name)}"
            there = {
                str(p.relative_to(self.disks[site])) for p in (self.disks[site] / files.scope).rglob("*") if p.is_file()
            }
            assert there == {files.path(name) for name in files.sizes}, f"{site} has files that nobody wished for"

    def check_one_completion_each(self, files: Files, targets: int) -> None:
        """Exactly one accepted completion for every file and target, by the table, whatever was reported how often."""
        rows = self.query(
            "SELECT t.file_id, t.target_id, count(*) FILTER (WHERE a.outcome = 'done') "
            "FROM transfers t JOIN dids d ON d.id = t.file_id JOIN scopes s ON s.id = d.scope_id "
            f"LEFT JOIN attempts a ON a.transfer_id = t.id WHERE s.name = '{files.scope}' GROUP BY 1, 2"
        )
        assert len(rows) == targets * len(files.sizes)
        wrong = [row for row in rows if row[2] != 1]
        assert not wrong, f"file, target, accepted completions: {wrong[:5]}"

    def check_workers_know_no_database(self) -> None:
        for worker in self.workers.values():
            known = worker.environ()
            assert known["REPLICA_TOKEN_FILE"], "this is the environment of a worker"
            hints = ("postgresql://", str(self.postgresql.port))
            assert not [k for k, v in known.items() if "DATABASE" in k.upper() or any(hint in v for hint in hints)]
            assert not (worker.directory / "replica.toml").exists()


@dataclass
class Files:
    """Files of one scope, all in one dataset."""

    scope: str
    sizes: dict[str, int]
    #: SHA-256 by name.
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        return f"{self.scope}:everything"

    def path(self, name: str) -> str:
        return path_for(Did.parse(f"{self.scope}:{name}"), "identity")


def pieces(name: str, size_bytes: int) -> Iterator[bytes]:
    """Bytes that follow from the name; no two pieces are equal, so that a piece in the wrong place is seen."""
    block = random.Random(name).randbytes(min(size_bytes, 1 << 20))
    for number in range(0, size_bytes, 1 << 20):
        yield (number.to_bytes(8, "big") + block[8:])[: size_bytes - number]


class Poller:
    """A reader who never rests: looks at every final name all the time and remembers whatever was not whole.

    A file must have its full size at the first moment its name is seen; a sample is read and compared at once.
    """

    READ_EVERY = 20

    def __init__(self, system: System, files: Files, sites: Iterable[str]) -> None:
        self.wrong: list[str] = []
        self.rounds = 0
        self.seen = 0
        self._waiting = {
            system.disks[site] / files.path(name): (size_bytes, files.digests[name])
            for site in sites
            for name, size_bytes in files.sizes.items()
        }
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poller")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            self._look()
            self.rounds += 1
            time.sleep(0.005)
        self._look()

    def _look(self) -> None:
        folders: dict[Path, set[str]] = {}
        for path in list(self._waiting):
            if path.parent not in folders:
                try:
                    folders[path.parent] = set(os.listdir(path.parent))
                except FileNotFoundError:
                    folders[path.parent] = set()
            if path.name in folders[path.parent]:
                self._judge(path, *self._waiting.pop(path))

    def _judge(self, path: Path, size_bytes: int, digest: str) -> None:
        self.seen += 1
        found = path.stat().st_size
        if found != size_bytes:
            self.wrong.append(f"{path} had {found} of {size_bytes} bytes under its final name")
        elif self.seen % self.READ_EVERY == 0 or size_bytes > 1 << 20:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    self.wrong.append(f"{path} had other bytes under its final name")

    def check(self, expected: int) -> None:
        assert not self.wrong, self.wrong[:5]
        assert self.seen == expected, f"the poller saw {self.seen} of {expected} files"
