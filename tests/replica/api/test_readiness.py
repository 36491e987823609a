"""Alive, able to work, and what is said when the database is not as it should be."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from replica.api.app import create_app
from replica.auth.bearer import RecentActors
from replica.catalog import accounts
from replica.client import Client
from replica.db import schema
from replica.db.engine import Database
from rules.errors import NotAuthenticated, Unavailable
from rules.permissions import Actor, Role
from tests.servers import PostgreSQL
from tests.service import Service, listening, serving


@contextmanager
def bare(database: Database) -> Iterator[Service]:
    with listening(create_app(database)) as (host, port):
        yield Service(host, port, "rpl_unknown", "", "")


def test_alive_looks_at_nothing_and_ready_looks_at_the_database(service: Service):
    assert service.ask("GET", "/healthz", token=None).json == {"status": "ok"}
    assert service.ask("GET", "/readyz", token=None).json == {"status": "ready"}


def test_an_empty_database_is_told_with_its_remedy_everywhere_and_work_begins_when_it_is_migrated(tmp_path: Path):
    database = Database(f"sqlite:///{tmp_path / 'replica.db'}")
    with bare(database) as service:
        for target in ("/readyz", "/api/v1/whoami", "/api/v1/rules/1"):
            answer = service.ask("GET", target)
            assert (answer.status, answer.json["code"]) == (503, "unavailable")
            assert "replica migrate" in answer.json["hint"]
            assert answer.headers["Retry-After"] == "5"
        assert service.ask("GET", "/healthz").status == 200
        assert service.ask("GET", "/api/v1/openapi.json").status == 200
        with pytest.raises(Unavailable, match="schema"):
            Client(service.url, "rpl_x").ready()

        schema.migrate(database)
        with database.write() as s:
            accounts.bootstrap(s)
            token = accounts.issue_token(s, account="root", label="test")
        deadline = time.monotonic() + 10
        while (answer := service.ask("GET", "/api/v1/whoami", token=token)).status == 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert answer.json["account"] == "root"
        assert service.ask("GET", "/readyz").status == 200
    database.close()


def test_an_older_schema_is_told_with_its_remedy(sqlite: Database):
    with sqlite.write() as s:
        s.connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0000'")
    with bare(sqlite) as service:
        answer = service.ask("GET", "/api/v1/whoami")
        assert answer.status == 503
        assert "schema" in answer.json["detail"]


def test_a_database_that_is_down_is_told_without_its_address_and_comes_back(postgresql_server: PostgreSQL):
    """On a server of its own, for others use the session's at the same time."""
    server = PostgreSQL()
    server.start()
    try:
        server.execute("CREATE DATABASE down TEMPLATE template0")
        database = Database(server.url("down"))
        schema.migrate(database)
        with serving(database) as service:
            assert service.ask("GET", "/api/v1/sites").status == 200
            server.stop()
            for target in ("/readyz", "/api/v1/sites", "/api/v1/sites/DESY"):
                answer = service.ask("GET", target)
                assert (answer.status, answer.json["code"]) == (503, "unavailable"), answer.body
                for inside in ("psycopg", "socket", "postgres:", "127.0.0.1", "/tmp"):
                    assert inside not in answer.body.decode()
            assert service.ask("POST", "/api/v1/sites", {"name": "GSI"}).status == 503
            assert service.ask("GET", "/healthz").status == 200
            server.start()
            deadline = time.monotonic() + 20
            while service.ask("GET", "/readyz").status != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert [site.name for site in service.client().sites.list()] == ["DESY"]
        database.close()
    finally:
        server.remove()


def test_more_requests_than_connections_wait_their_turn(postgresql_url: str):
    database = Database(postgresql_url, pool_size=2)
    with serving(database) as service, ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(service.ask, "GET", "/api/v1/sites/DESY") for _ in range(200)]
        assert {each.result().status for each in asked} == {200}
    database.close()


def test_a_stop_finishes_what_has_begun(sqlite: Database):
    begun = threading.Event()

    def slow(*args: object) -> None:
        begun.set()
        time.sleep(1.0)

    sqlite.on_commit = slow
    with ThreadPoolExecutor(1) as pool:
        with serving(sqlite) as service:
            # what wakes somebody after its commit: an endpoint may be what a rule waited for
            asked = pool.submit(
                service.ask, "POST", "/api/v1/endpoints", {"name": "D", "site": "DESY", "url": "file:///tmp/replica-d"}
            )
            assert begun.wait(10)
        assert asked.result().status == 201
    with pytest.raises(OSError):
        service.ask("GET", "/healthz")


def test_a_token_is_remembered_for_seconds_only():
    now = [0.0]
    recent = RecentActors(10.0, lambda: now[0])
    recent.remember("rpl_a", Actor("alice", Role.USER))
    assert recent.find("rpl_a") == Actor("alice", Role.USER)
    assert recent.find("rpl_b") is None
    now[0] = 9.9
    assert recent.find("rpl_a") is not None
    now[0] = 10.0
    assert recent.find("rpl_a") is None


def test_a_token_that_was_taken_back_is_refused_after_those_seconds(sqlite: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("replica.auth.bearer.REMEMBERED_SECONDS", 0.5)
    monkeypatch.setattr(RecentActors.__init__, "__defaults__", (0.5, time.monotonic))
    with serving(sqlite) as service:
        client = service.client()
        assert client.whoami().account == "root"
        with sqlite.write() as s:
            accounts.issue_token(s, account="root", label="test", replace=True)
        time.sleep(0.6)
        with pytest.raises(NotAuthenticated):
            client.whoami()
