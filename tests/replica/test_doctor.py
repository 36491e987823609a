"""The doctor names what is in force and what is wrong, with a remedy, and shows no secret."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import replica
from replica import config, doctor, wire
from replica.client import Client
from replica.client.places import prepare_here
from replica.db.engine import Database
from replica.doctor import Examination, examine
from replica.embedded import Embedded
from tests.servers import PostgreSQL, Redis

ROOT = Path(replica.__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[Embedded]:
    with Embedded(config.load(tmp_path / "system", {}, listen="127.0.0.1:0", log_level="error")) as system:
        yield system


def settings(**said: Any) -> config.Settings:
    return config.load(environ={}, **said)


def of_system(system: Embedded, **more: Any) -> config.Settings:
    return settings(server=system.url, token_file=str(system.token_file), **more)


def wrong(examination: Examination) -> list[str]:
    return [finding.message for finding in examination.findings if finding.level == "wrong"]


def remedies(examination: Examination) -> str:
    return " ".join(finding.remedy for finding in examination.findings if finding.level == "wrong")


def test_a_healthy_client_has_nothing_wrong(system: Embedded):
    examination = examine(of_system(system))
    assert wrong(examination) == []
    assert {finding.about for finding in examination.findings} == {"server", "token"}


def test_nothing_configured_is_wrong():
    examination = examine(settings())
    assert not examination.healthy
    assert "replica up" in remedies(examination)


def test_a_server_that_is_not_there(system: Embedded):
    url = system.url
    system.stop()
    examination = examine(settings(server=url, token="rpl_x"))
    assert len(wrong(examination)) == 1
    assert url in wrong(examination)[0]


def test_a_token_that_is_not_valid_or_missing_or_unreadable(system: Embedded, tmp_path: Path):
    assert "token" in wrong(examine(settings(server=system.url, token="rpl_not_known_here")))[0]
    assert wrong(examine(settings(server=system.url))) == ["there is no token"]
    assert "cannot be read" in wrong(examine(settings(server=system.url, token_file=str(tmp_path / "none"))))[0]


def test_a_token_file_that_others_can_read(system: Embedded):
    system.token_file.chmod(0o644)
    assert "chmod 600" in wrong(examine(of_system(system)))[0]


def test_a_worker_with_another_sites_token(system: Embedded):
    with Client(system.url, system.token) as client:
        for name in ("A", "B"):
            client.sites.add(name)
        key = client.sites.key("A").token
    examination = examine(settings(server=system.url, token=key, site="B"))
    assert "the token is for the site A, but `site` says B" in wrong(examination)
    assert wrong(examine(settings(server=system.url, token=key, site="A"))) == []


def test_an_endpoint_whose_disk_is_not_mounted(system: Embedded, tmp_path: Path):
    with Client(system.url, system.token) as client:
        client.sites.add("A")
        for name in ("GOOD", "AWAY"):
            url = (tmp_path / name).as_uri()
            prepare_here(client.endpoints.add(wire.NewEndpoint(name=name, site="A", url=url)))
    (tmp_path / "AWAY/.replica").rename(tmp_path / "AWAY/hidden")
    (message,) = wrong(examine(of_system(system)))
    assert message.startswith("AWAY cannot be used from this machine")


def test_roots_that_are_not_there(system: Embedded, tmp_path: Path):
    examination = examine(of_system(system, roots=[str(tmp_path), str(tmp_path / "none")]))
    assert wrong(examination) == [f"{tmp_path / 'none'} in roots is no directory"]


def test_credentials_that_others_can_read(system: Embedded, tmp_path: Path):
    file = tmp_path / "credentials.toml"
    file.write_text('["davs://a"]\ntoken = "secret"\n')
    file.chmod(0o644)
    (message,) = wrong(examine(of_system(system, credentials_file=str(file))))
    assert "open to others" in message
    file.chmod(0o600)
    examination = examine(of_system(system, credentials_file=str(file)))
    assert any("credentials for 1 beginning of URLs can be read" in f.message for f in examination.findings)


def test_a_database_without_tables_or_that_is_not_there(empty_postgresql_url: str, tmp_path: Path):
    examination = examine(settings(database_url=empty_postgresql_url))
    assert "replica migrate" in remedies(examination)
    gone = examine(settings(database_url="postgresql://replica@127.0.0.1:1/x"))
    assert "does not answer: " in wrong(gone)[0]
    assert "refused" in wrong(gone)[0]
    assert not any("replica doctor" in remedy for remedy in remedies(gone)), "that is what is being run"
    missing = tmp_path / "none.db"
    assert "no database file" in wrong(examine(settings(database_url=f"sqlite:///{missing}")))[0]
    assert not missing.exists()
    assert "not supported" in wrong(examine(settings(database_url="mysql://x/y")))[0]


def test_a_database_that_forgets_at_a_power_cut(postgresql_url: str, postgresql_server: PostgreSQL):
    """The tests' own server is such a one: it runs without fsync."""
    examination = examine(settings(database_url=postgresql_url))
    assert any("fsync is off" in message for message in wrong(examination))


def test_a_database_that_has_little_room(postgresql_url: str):
    """The tests' own server has 64 MB."""
    odd = [finding for finding in examine(settings(database_url=postgresql_url)).findings if finding.level == "odd"]
    (finding,) = (finding for finding in odd if "shared_buffers is 64MB" in finding.message)
    assert "shared_buffers = 1GB" in finding.remedy


def test_what_is_acknowledged_is_written_whatever_the_server_says(postgresql_url: str):
    """The tests' own server has synchronous_commit off."""
    with psycopg.connect(postgresql_url.replace("+psycopg", "")) as plain:
        assert plain.execute("SHOW synchronous_commit").fetchone() == ("off",)
    with Database(postgresql_url).read() as s:
        assert s.connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"


def test_a_migrated_sqlite_database_is_good(sqlite_url: str):
    examination = examine(settings(database_url=sqlite_url))
    assert wrong(examination) == []
    assert any("no broker" in finding.message for finding in examination.findings)


def test_a_broker(redis_server: Redis, sqlite_url: str):
    assert wrong(examine(settings(database_url=sqlite_url, broker_url=redis_server.url))) == []
    (message,) = wrong(examine(settings(database_url=sqlite_url, broker_url="redis://:hunter2@127.0.0.1:1/0")))
    assert "broker does not answer" in message


def test_no_secret_is_shown(system: Embedded):
    secrets = {
        "token": "rpl_canary-of-the-doctor",
        "database_url": "postgresql://u:hunter2@127.0.0.1:1/x",
        "broker_url": "redis://:hunter2@127.0.0.1:1/0",
    }
    text = doctor.as_text(examine(settings(server=system.url, **secrets)))
    assert "hunter2" not in text
    assert "canary" not in text
    assert "127.0.0.1:1" in text
    assert "(the command line)" in text


def test_the_command_prints_one_json_document_and_ends_with_1_when_anything_is_wrong(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "replica", "doctor", "-o", "json"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "REPLICA_SITE": "DESY"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert {"key": "site", "value": "DESY", "origin": "REPLICA_SITE"} in document["settings"]
    assert any(finding["level"] == "wrong" for finding in document["findings"])
