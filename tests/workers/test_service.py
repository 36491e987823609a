"""`replica worker`, `replica control` and `replica serve` as the processes that they are."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import replica
from replica import config, wire
from replica.catalog import accounts, dids, endpoints, rules, scopes, sites
from replica.db import schema
from replica.db.engine import Database
from replica.hints import Hints
from rules.errors import Invalid
from rules.permissions import Actor, Role
from tests.servers import Redis, free_port
from workers.service import Passes, run_control, run_worker

ROOT = Path(replica.__file__).parents[1]
#: Of many pieces. A copy takes long by a pause at each, not by its size: a disk must not decide what a test says.
LARGE_BYTES = 16 << 20


class Process:
    def __init__(self, directory: Path, *words: str, **environment: str) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("REPLICA_")}
        self.log = directory / f"{words[0]}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "replica", *words],
                cwd=directory,
                env=clean | {"PYTHONPATH": str(ROOT)} | environment,
                stdout=log,
                stderr=log,
            )

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        return self.process.wait(20)

    def events(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line)["event"] for line in lines if line.startswith("{")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def one(*words: str, **environment: str) -> Process:
        made.append(Process(tmp_path, *words, **environment))
        return made[-1]

    yield one
    for process in made:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait()


async def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("broker", ["none", "absent", "there"])
async def test_a_worker_works_with_and_without_a_broker(centre, world, start, broker, request):
    environment = {"REPLICA_SERVER": centre.url, "REPLICA_TOKEN": centre.token, "REPLICA_SITE": "DESY"}
    if broker != "none":
        url = "redis://127.0.0.1:1/0" if broker == "absent" else request.getfixturevalue("redis_server").url
        environment["REPLICA_BROKER_URL"] = url
    environment["REPLICA_POLL_SECONDS"] = "3600" if broker == "there" else "0.5"
    worker = start("worker", **environment)
    centre.add(world.order("first", b"first"))
    await centre.wait_for(1, 20)
    centre.add(world.order("second", b"second"))
    if broker == "there":
        await asyncio.sleep(1.0)
        assert len(centre.outcomes) == 1
        hints = Hints(environment["REPLICA_BROKER_URL"])
        deadline = time.monotonic() + 10
        while len(centre.outcomes) < 2 and time.monotonic() < deadline:
            hints.wake({"site.DESY"})
            await asyncio.sleep(0.1)
        hints.close()
    await centre.wait_for(2, 10)
    assert await asyncio.to_thread(worker.end) == 0
    assert "mover.stopped" in worker.events()


async def test_a_worker_that_is_told_to_stop_gives_back_what_it_holds(centre, world, start):
    for i in range(20):
        centre.add(world.order(f"f{i}", os.urandom(LARGE_BYTES)))
    environment = {"REPLICA_SERVER": centre.url, "REPLICA_TOKEN": centre.token, "REPLICA_SITE": "DESY"}
    worker = start("worker", **environment, REPLICA_FAULT_POINTS="piece=slow")
    await until(lambda: centre.leases)
    assert await asyncio.to_thread(worker.end) == 0
    assert centre.leases == {}


async def test_a_killed_worker_leaves_nothing_under_a_final_name_and_the_next_one_goes_on(centre, world, start):
    centre.lease_seconds = 2.0
    centre.add(world.order("a", b"small"))
    environment = {"REPLICA_SERVER": centre.url, "REPLICA_TOKEN": centre.token, "REPLICA_SITE": "DESY"}
    first = start("worker", **environment, REPLICA_FAULT_POINTS="after_verify=kill")
    assert await asyncio.to_thread(first.process.wait, 20) == -signal.SIGKILL
    assert not (world.directory / "TARGET/a").exists()
    await until(lambda: centre.requeue_lost() == 1)
    start("worker", **environment)
    await centre.wait_for(1, 20)
    assert (centre.outcomes[0].epoch, centre.outcomes[0].outcome) == (2, "done")


async def test_a_worker_killed_before_its_report_is_followed_by_one_that_adopts(centre, world, start):
    centre.lease_seconds = 2.0
    centre.add(world.order("a", b"small"))
    environment = {"REPLICA_SERVER": centre.url, "REPLICA_TOKEN": centre.token, "REPLICA_SITE": "DESY"}
    first = start("worker", **environment, REPLICA_FAULT_POINTS="after_publish=kill")
    assert await asyncio.to_thread(first.process.wait, 20) == -signal.SIGKILL
    assert (world.directory / "TARGET/a").read_bytes() == b"small"
    await until(lambda: centre.requeue_lost() == 1)
    start("worker", **environment)
    await centre.wait_for(1, 20)
    assert (centre.outcomes[0].outcome, centre.outcomes[0].adopted) == ("done", True)


async def test_a_frozen_worker_that_thaws_after_its_lease_reports_nothing_as_done(centre, world, start):
    centre.lease_seconds = 1.0
    centre.add(world.order("a", os.urandom(LARGE_BYTES)))
    environment = {"REPLICA_SERVER": centre.url, "REPLICA_TOKEN": centre.token, "REPLICA_SITE": "DESY"}
    worker = start("worker", **environment, REPLICA_POLL_SECONDS="3600", REPLICA_FAULT_POINTS="piece=slow")
    await until(lambda: centre.leases)
    worker.process.send_signal(signal.SIGSTOP)
    await until(lambda: centre.requeue_lost() == 1)
    centre.queue.clear()  # another worker has it
    worker.process.send_signal(signal.SIGCONT)
    await until(lambda: "order.dropped" in worker.events())
    assert centre.outcomes == []
    assert not (world.directory / "TARGET/a").exists()


def test_a_worker_needs_no_database_driver():
    code = (
        "import sys, workers.service, workers.mover, workers.consumer, workers.tasks\n"
        "print([m for m in ('sqlalchemy', 'psycopg', 'alembic', 'replica.db', 'replica.catalog') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("run", "said", "missing"),
    [
        (run_worker, {"server": "http://h", "token": "rpl_x"}, "site"),
        (run_worker, {"site": "A", "token": "rpl_x"}, "server"),
        (run_worker, {"site": "A", "server": "http://h"}, "token_file"),
        (run_control, {}, "database_url"),
    ],
)
def test_what_a_process_cannot_do_without_is_named(run, said, missing):
    with pytest.raises(Invalid) as caught:
        run(config.load(environ={}, **said))
    assert caught.value.field == missing
    assert caught.value.hint


# --- control ---


ROOT_ACTOR = Actor("root", Role.ADMIN)


def declare(db: Database, lifetime_seconds: int | None = None) -> int:
    """A rule that cannot be fulfilled yet: its endpoint takes nothing."""
    with db.write() as s:
        accounts.bootstrap(s)
        sites.add(s, wire.NewSite(name="A"))
        endpoints.add(s, wire.NewEndpoint(name="A-DISK", site="A", url="file:///data/a"))
        scopes.add(s, ROOT_ACTOR, wire.NewScope(name="test"))
        dids.add(s, ROOT_ACTOR, wire.NewDid(did="test:data"))
        new = wire.NewRule(did="test:data", expression="A-DISK", lifetime_seconds=lifetime_seconds)
        return rules.add(s, ROOT_ACTOR, new).id


async def test_control_waits_for_the_schema_and_then_works(start, tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'replica.db'}"
    control = start("control", REPLICA_DATABASE_URL=url, REPLICA_CONTROL_INTERVAL_SECONDS="0.2")
    await until(lambda: "pass.waits" in control.events())
    db = Database(url)
    schema.migrate(db)
    rule = declare(db, lifetime_seconds=1)

    def state() -> str:
        with db.read() as s:
            return rules.get(s, rule).state

    await until(lambda: state() == "expired")
    assert await asyncio.to_thread(control.end) == 0
    assert control.events()[-1] == "control.stopped"
    db.close()


def test_a_commit_of_the_own_process_wakes_a_pass_without_any_broker(db: Database):
    passes = Passes(db, pace_seconds=3600.0)
    hints = Hints(None, also=passes.wake)
    db.on_commit = hints.wake
    passes.start()
    try:
        deadline = time.monotonic() + 10
        while any(loop.rounds < 1 for loop in passes.loops):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        before = {loop.name: loop.rounds for loop in passes.loops}
        with db.write() as s:
            s.wake.add("evaluation")
        while {loop.name for loop in passes.loops if loop.rounds > before[loop.name]} != {"evaluation"}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        assert passes.stop(5)


# --- serve ---


async def test_serve_answers_before_the_database_is_ready_and_stops_in_order(
    start, tmp_path: Path, redis_server: Redis
):
    url, port = f"sqlite:///{tmp_path / 'replica.db'}", free_port()
    serve = start(
        "serve", REPLICA_DATABASE_URL=url, REPLICA_LISTEN=f"127.0.0.1:{port}", REPLICA_BROKER_URL=redis_server.url
    )

    def status(path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    await until(lambda: status("/healthz") == 200)
    assert status("/readyz") == 503
    db = Database(url)
    schema.migrate(db)
    db.close()
    await until(lambda: status("/readyz") == 200)
    assert await asyncio.to_thread(serve.end) == 0
    assert serve.events()[-1] == "api.stopped"


async def test_serve_names_a_port_that_is_taken(start, tmp_path: Path, centre):
    port = centre.url.rpartition(":")[2]
    url = f"sqlite:///{tmp_path / 'replica.db'}"
    serve = start("serve", REPLICA_DATABASE_URL=url, REPLICA_LISTEN=f"127.0.0.1:{port}")
    assert await asyncio.to_thread(serve.process.wait, 20) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in serve.log.read_text()
