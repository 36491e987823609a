"""A person's first look: three sites on this machine, which load, replicate, break, heal, and are verified.

Given     files or folders of the person, or none: then some hundred that every Python installation has; and one large
          file, written for this.
Returns   0 only if everything that was said is true; what is at the endpoints is read without Replica, by SHA-256.
Promises  nothing is staged: the worker that is killed is a real process that dies of SIGKILL in mid-copy, the byte is
          flipped between reading and writing, and both are healed by what heals them in production. A temporary
          directory is removed at the end, also after Ctrl-C.
Partner   replica.embedded runs the system, replica.client is how we speak to it, replica.storage.faultpoints flips.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape

from replica import log, wire
from replica.cli.output import printable
from replica.client import Client
from replica.client.places import prepare_here
from replica.client.upload import upload
from replica.config import Settings
from replica.embedded import Embedded
from replica.storage import faultpoints
from replica.storage.base import OWN, PARTS
from rules.errors import Refused, ReplicaError
from rules.quantities import human_bytes

SCOPE = "demo"
#: Site → its disks.
SITES = {"DESY": ("DESY-DISK",), "HZDR": ("HZDR-DISK",), "GSI": ("GSI-DISK", "GSI-SCRATCH")}
#: Whose worker is a process of its own, to be killed.
VICTIM = "GSI"
#: Packages of Python's library that are loaded when no files are given: some 400 real files.
PACKAGES = (
    "asyncio", "collections", "concurrent", "ctypes", "email", "encodings", "html", "http", "importlib", "json",
    "logging", "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "zoneinfo",
)  # fmt: skip
LARGE_BYTES = 256 << 20
LARGE_NAME = "run 17/detector image.raw"
#: Production's timers, shrunk: nobody wants to watch a lease of two minutes run out.
LEASE_SECONDS = 3.0
POLL_SECONDS = 1.0
RETRY_BASE_SECONDS = 1.0
#: For anything that should take seconds.
PATIENCE_SECONDS = 120.0


class NotTrue(Exception):
    """Something that the demonstration promises to show did not happen."""


def run(paths: Sequence[str | os.PathLike[str]], directory: str | os.PathLike[str] | None, serve: bool) -> int:
    log.configure("error")  # what is printed here says it in plainer words
    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_terminated_like_interrupted())
        try:
            work = stack.enter_context(_workplace(directory))
            show = Show(console, work, stack)
            show.sites()
            show.load([Path(path) for path in paths])
            show.wish()
            show.break_and_heal()
            show.verify()
        except (NotTrue, ReplicaError) as error:
            console.print(f"\n[bold red]Not true:[/] {escape(printable(str(error)))}")
            return 1
        except KeyboardInterrupt:
            console.print("\ninterrupted; everything is being removed" if directory is None else "\ninterrupted")
            return 130
        console.print(f"\n[bold green]All of it is true.[/] {time.monotonic() - started:.0f} s")
        if serve:
            show.stay()
    return 0


@dataclass
class Dataset:
    """Files that are loaded together, and the wish for them."""

    did: str
    #: Name within the scope → SHA-256 of the original.
    digests: dict[str, str]
    size_bytes: int
    #: The other site, besides DESY.
    target: str
    rule: int = 0


@dataclass
class Show:
    console: Console
    work: Path
    stack: contextlib.ExitStack
    datasets: list[Dataset] = field(default_factory=list)
    #: Names of the files whose bytes were flipped in flight, as the flipper saw it: how many.
    flipped: int = 0
    #: The replaced worker's process.
    victim: subprocess.Popen[bytes] | None = None

    # --- 1 sites ------------------------------------------------------------------------------------------------------

    def sites(self) -> None:
        settings = Settings(
            dir=str(self.work),
            listen="127.0.0.1:0",
            lease_seconds=LEASE_SECONDS,
            poll_seconds=POLL_SECONDS,
            control_interval_seconds=0.5,
            retry_base_seconds=RETRY_BASE_SECONDS,
            log_level="error",
        )
        self.system = Embedded(settings, elsewhere=frozenset({VICTIM}))
        self.system.start()
        self.stack.callback(self.system.stop)
        self.client = self.stack.enter_context(Client(self.system.url, self.system.token))
        for site, disks in SITES.items():
            self.client.sites.add(site)
            for disk in disks:
                prepare_here(
                    self.client.endpoints.add(wire.NewEndpoint(name=disk, site=site, url=self.disk(disk).as_uri()))
                )
        self.stack.callback(self.stop_worker)
        self.start_worker()
        self.console.print(f"[bold]Replica[/], three sites on this machine, in {self.work}\n")
        self.say("sites", "   ".join(f"[cyan]{site}[/] {', '.join(disks)}" for site, disks in SITES.items()))

    def disk(self, endpoint: str) -> Path:
        return self.work / "disks" / endpoint

    def start_worker(self) -> None:
        """The worker of the victim, as an operator starts it: `replica worker --site GSI`."""
        key = self.work / f"{VICTIM}.token"
        if not key.exists():
            with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self.client.sites.key(VICTIM).token)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("REPLICA_")} | {
            "REPLICA_SERVER": self.system.url,
            "REPLICA_TOKEN_FILE": str(key),
            "REPLICA_POLL_SECONDS": str(POLL_SECONDS),
            "REPLICA_LOG_LEVEL": "error",
        }
        with (self.work / f"worker-{VICTIM}.log").open("ab") as log:
            self.victim = subprocess.Popen(
                [sys.executable, "-m", "replica", "worker", "--site", VICTIM],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is ours to handle
            )

    def stop_worker(self) -> None:
        if self.victim is not None and self.victim.poll() is None:
            self.victim.terminate()
            try:
                self.victim.wait(10)
            except subprocess.TimeoutExpired:
                self.victim.kill()
                self.victim.wait()

    # --- 2 load -------------------------------------------------------------------------------------------------------

    def load(self, paths: list[Path]) -> None:
        self.client.scopes.add(SCOPE)
        started = time.monotonic()
        staged = self.work / "originals"
        if paths:
            self._upload("files", paths, "HZDR", "of yours")
        else:
            library = Path(sysconfig.get_path("stdlib"))
            for package in PACKAGES:
                if (library / package).is_dir():
                    ignored = shutil.ignore_patterns("__pycache__", "test", "tests", "*.so")
                    shutil.copytree(library / package, staged / "python" / package, symlinks=False, ignore=ignored)
            self._upload("python", [staged / "python"], "HZDR", f"of this Python {sys.version.split()[0]}")
        large = staged / "detector" / LARGE_NAME
        large.parent.mkdir(parents=True)
        with large.open("wb") as file:
            file.writelines(_pieces(LARGE_BYTES))
        self._upload("run-17", [staged / "detector"], VICTIM, "written for this")
        shutil.rmtree(staged)
        total = sum(dataset.size_bytes for dataset in self.datasets)
        self.say("", f"{human_bytes(total)} uploaded to DESY-DISK and registered in {time.monotonic() - started:.1f} s")

    def _upload(self, name: str, paths: list[Path], target: str, whose: str) -> None:
        did = f"{SCOPE}:{name}"
        digests = dict(_digests(paths))
        done = upload(self.client, paths, scope=SCOPE, dataset=did, endpoint="DESY-DISK")
        if done.failed:
            raise NotTrue(f"{done.failed[0].did} could not be uploaded: {done.failed[0].reason}")
        self.datasets.append(Dataset(did, digests, done.bytes, target))
        self.say(
            "load" if len(self.datasets) == 1 else "",
            f"[cyan]{did}[/]  {_files(done.files)} {whose}, {human_bytes(done.bytes)}",
        )

    # --- 3 wish -------------------------------------------------------------------------------------------------------

    def wish(self) -> None:
        first = self.datasets[0]
        # From here on every copy that this process makes goes through it: the first piece arrives with a byte changed.
        self.stack.enter_context(faultpoints.handling(self._flip_once))
        for dataset in reversed(self.datasets):
            made = self.client.rules.add(
                wire.NewRule(
                    did=dataset.did,
                    expression=_expression(dataset),
                    copies=2,
                    spread="site",
                )
            )
            dataset.rule = made.id
        for dataset in self.datasets:
            expression = _expression(dataset)
            self.say(
                "wish" if dataset is first else "",
                f"[cyan]{dataset.did}[/]  two copies, never two at one site: {expression}",
            )

    def _flip_once(self, point: str, piece: memoryview | None) -> bytes | None:
        if point != "piece" or piece is None or not len(piece) or self.flipped:
            return None
        self.flipped += 1
        changed = bytearray(piece)
        changed[len(changed) // 2] ^= 1
        return bytes(changed)

    # --- 4 break, 5 heal ----------------------------------------------------------------------------------------------

    def break_and_heal(self) -> None:
        python, large = self.datasets
        written = self._kill_in_the_middle()
        self.say(
            "break",
            f"[red]kill -9[/] of {VICTIM}'s worker, {human_bytes(written)} of {human_bytes(LARGE_BYTES)} written; "
            f"nothing under the final name",
        )
        self.start_worker()
        self._wait_ok(python)
        again = [t for t in self.client.transfers.list(rule=python.rule) if t.attempts > 1]
        if not self.flipped:
            raise NotTrue("no byte could be flipped: nothing was copied by this process")
        if not again:
            raise NotTrue("a byte was flipped in flight, and no transfer was tried again")
        self.say("", f"[red]one byte flipped[/] in flight to {again[0].target}: {_shown(again[0].did)}")
        self.say(
            "heal",
            f"[green]ok[/]  {python.did}: reading back found the byte; copied again, attempt {again[0].attempts}",
        )
        self._wait_ok(large)
        taken_over = list(self.client.transfers.list(rule=large.rule))
        attempts = max((t.attempts for t in taken_over), default=0)
        if attempts < 2:
            raise NotTrue("the worker was killed, and its transfer was not tried again")
        self.say("", f"[green]ok[/]  {large.did}: the lease ran out, a new worker took over, attempt {attempts}")

    def _kill_in_the_middle(self) -> int:
        """SIGKILL as soon as the large file is being written at the victim's disk; how many bytes were there."""
        assert self.victim is not None
        deadline = time.monotonic() + PATIENCE_SECONDS
        parts = [self.disk(disk) / PARTS for disk in SITES[VICTIM]]
        while time.monotonic() < deadline:
            for folder in parts:
                with contextlib.suppress(FileNotFoundError):
                    for part in folder.iterdir():
                        if part.stat().st_size > LARGE_BYTES // 20:
                            self.victim.send_signal(signal.SIGKILL)
                            if self.victim.wait() != -signal.SIGKILL:
                                raise NotTrue(f"{VICTIM}'s worker ended before it was killed")
                            if any((self.disk(disk) / SCOPE / LARGE_NAME).exists() for disk in SITES[VICTIM]):
                                raise NotTrue("the copy was complete before its worker could be killed")
                            return part.stat().st_size
            time.sleep(0.001)
        raise NotTrue(f"{VICTIM}'s worker did not begin to copy within {PATIENCE_SECONDS:.0f} s")

    def _wait_ok(self, dataset: Dataset) -> None:
        deadline, before = time.monotonic() + PATIENCE_SECONDS, -1
        with self.console.status(f"waiting for {dataset.did}") as status:
            while (rule := self.client.rules.show(dataset.rule)).state != "ok":
                status.update(f"{dataset.did}: {rule.locks_ok} of {rule.locks_ok + rule.locks_replicating} copies ok")
                if rule.locks_ok != before:  # as long as something goes on, a large load may take its time
                    deadline, before = time.monotonic() + PATIENCE_SECONDS, rule.locks_ok
                if time.monotonic() > deadline:
                    raise NotTrue(" ".join(self.client.rules.explain(dataset.rule).sentences))
                time.sleep(0.05)

    # --- 6 verify -----------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Without Replica: what lies in the directories, by SHA-256, against what the originals had."""
        wanted = {name: digest for dataset in self.datasets for name, digest in dataset.digests.items()}
        sites_of: dict[str, set[str]] = {name: set() for name in wanted}
        lines = []
        for site, disks in SITES.items():
            files = size_bytes = 0
            for disk in disks:
                for name, digest, size in _found(self.disk(disk)):
                    if wanted.get(name) != digest:
                        raise NotTrue(f"{disk} holds {name} with other bytes than the original")
                    if site in sites_of[name]:
                        raise NotTrue(f"{site} holds {name} twice")
                    sites_of[name].add(site)
                    files, size_bytes = files + 1, size_bytes + size
            lines.append(f"[cyan]{site}[/] {_files(files)}, {human_bytes(size_bytes)}")
        for name, sites in sites_of.items():
            if len(sites) != 2:
                raise NotTrue(f"{name} is at {len(sites)} sites, not at two")
        self._catalogue_agrees(sites_of)
        self.say("verify", "   ".join(lines))
        copies = f"{2 * len(wanted)} of {2 * len(wanted)}"
        self.say("", f"every directory read with SHA-256, without Replica: [green]{copies}[/] copies right")

    def _catalogue_agrees(self, sites_of: dict[str, set[str]]) -> None:
        known: dict[str, set[str]] = {name: set() for name in sites_of}
        for dataset in self.datasets:
            for replica in self.client.replicas.locate(dataset.did):
                if replica.state == "available":
                    known[replica.did.partition(":")[2]].add(replica.site)
        if known != sites_of:
            raise NotTrue("the catalogue does not say what is on the disks")

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def stay(self) -> None:
        self.console.print(
            f"\nIt goes on until Ctrl-C. In another shell:\n"
            f"  export REPLICA_SERVER={self.system.url}\n"
            f"  export REPLICA_TOKEN_FILE={self.work / 'token'}\n"
            f"  replica locate {self.datasets[0].did}"
        )
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()

    def say(self, step: str, text: str) -> None:
        self.console.print(f"[bold]{step:<8}[/]{text}")


def _files(count: int) -> str:
    return f"{count} files" if count != 1 else "one file"


def _shown(did: str) -> str:
    """A name as it may be printed: neither a terminal nor rich takes a part of it for an order."""
    return escape(printable(did.partition(":")[2]))


def _expression(dataset: Dataset) -> str:
    return f"kind=disk&(site=DESY|site={dataset.target})"


def _pieces(size_bytes: int) -> Iterator[bytes]:
    """Bytes that look like noise, as detectors' do; no two pieces are equal."""
    block = random.Random(17).randbytes(1 << 20)
    for number in range(0, size_bytes, 1 << 20):
        yield (number.to_bytes(8, "big") + block[8:])[: size_bytes - number]


def _digests(paths: list[Path]) -> Iterator[tuple[str, str]]:
    """SHA-256 of each original by the name that upload gives it: its path below the folder that was named."""
    for path in paths:
        if path.is_dir():
            for file in path.rglob("*"):
                if file.is_file():
                    yield unicodedata.normalize("NFC", file.relative_to(path).as_posix()), _sha256(file)
        else:
            yield unicodedata.normalize("NFC", path.name), _sha256(path)


def _found(disk: Path) -> Iterator[tuple[str, str, int]]:
    """Name within the scope, SHA-256 and size of everything on a disk that is not Replica's own."""
    for folder, folders, files in os.walk(disk):
        if Path(folder) == disk:
            folders[:] = [name for name in folders if name != OWN]
        for file in files:
            path = Path(folder, file)
            yield path.relative_to(disk / SCOPE).as_posix(), _sha256(path), path.stat().st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _workplace(directory: str | os.PathLike[str] | None) -> Iterator[Path]:
    """A temporary directory that is removed, or the one named, which must be empty and stays."""
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="replica-demo-", ignore_cleanup_errors=True) as made:
            yield Path(made)
        return
    path = Path(directory).absolute()
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise Refused(f"{path} is not empty", hint="name an empty or a new directory; the demo leaves its files there")
    yield path


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the demonstration as Ctrl-C does: in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, object] = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        restore: Callable[..., object] = signal.signal
        for number, handler in before.items():
            restore(number, handler)
