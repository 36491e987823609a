"""Long lists: page by page with cursors, or as one stream that says at its end that it is whole."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from replica import wire
from replica.catalog import replicas
from replica.db.engine import Database
from rules.errors import NotFound, Unavailable
from tests.service import Service, serving

FILES = 2_500


def fill(service: Service, files: int = FILES) -> None:
    with service.client() as client:
        client.scopes.add("s")
        client.endpoints.add(wire.NewEndpoint(name="DESY-DISK", site="DESY", url="file:///tmp/replica-desy-disk"))
        client.dids.add(wire.NewDid(did="s:d"))
        client.dids.add(wire.NewDid(did="s:empty"))
        new = [wire.NewReplica(did=f"s:f/{i:05}", size=i, checksums={"adler32": f"{i:08x}"}) for i in range(files)]
        done = client.replicas.register(
            wire.Registration(endpoint="DESY-DISK", replicas=new, dataset="s:d", evidence="hashed")
        )
        assert (done.files, done.new, done.attached) == (files, files, files)


def test_stream_and_pages_give_the_same_and_all_of_it(service_on_both: Service):
    fill(service_on_both)
    with service_on_both.client() as client:
        streamed = list(client.replicas.locate("s:d"))
        assert {(found.did, found.size) for found in streamed} == {(f"s:f/{i:05}", i) for i in range(FILES)}
        assert len(streamed) == FILES
        paged = list(client.replicas.pages("s:d"))
        assert sorted(paged, key=lambda found: found.did) == sorted(streamed, key=lambda found: found.did)
        assert len(list(client.dids.contents("s:d"))) == FILES
        assert list(client.replicas.locate("s:empty")) == []
        assert len(list(client.replicas.locate("s:f/00007"))) == 1


def test_the_last_line_says_how_many_there_were(service: Service):
    fill(service, 10)
    answer = service.ask("GET", "/api/v1/dids/s/d/replicas", headers={"Accept": "application/x-ndjson"})
    assert answer.headers["Content-Type"] == "application/x-ndjson"
    *lines, last = answer.body.decode().splitlines()
    assert json.loads(last) == {"end": True, "count": 10}
    assert len([json.loads(line)["did"] for line in lines]) == 10


def test_what_is_wrong_from_the_beginning_is_a_problem_and_no_stream(service: Service):
    with pytest.raises(NotFound):
        list(service.client().replicas.locate("s:nothing"))
    answer = service.ask("GET", "/api/v1/dids/s/d/replicas", token=None, headers={"Accept": "application/x-ndjson"})
    assert answer.status == 401


def test_a_stream_that_breaks_in_the_middle_ends_without_its_trailer(service: Service, monkeypatch: pytest.MonkeyPatch):
    fill(service)
    whole = replicas.stream

    def breaking(*args, **kwargs):
        for number, item in enumerate(whole(*args, **kwargs)):
            if number == 1_500:
                raise RuntimeError("the database went away; its password is hunter2")
            yield item

    monkeypatch.setattr(replicas, "stream", breaking)
    seen = []
    with pytest.raises(Unavailable):
        seen.extend(service.client().replicas.locate("s:d"))
    assert 0 < len(seen) < FILES
    monkeypatch.undo()
    assert len(list(service.client().replicas.locate("s:d"))) == FILES


def test_readers_who_go_away_or_fall_asleep_give_their_connection_back(db: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("replica.api.routing.STALL_SECONDS", 0.5)
    whole = replicas.stream

    def endless(*args, **kwargs):
        items = list(whole(*args, **kwargs))
        while True:
            yield from items

    with serving(db) as service:
        fill(service)
        monkeypatch.setattr(replicas, "stream", endless)
        asleep = []
        for _ in range(2 * db.pool_size):
            connection = http.client.HTTPConnection(service.host, service.port, timeout=60)
            headers = {"Authorization": f"Bearer {service.admin}", "Accept": "application/x-ndjson"}
            connection.request("GET", "/api/v1/dids/s/d/replicas", headers=headers)
            asleep.append(connection)  # and nothing is ever read from it
        for connection in asleep[::2]:
            connection.close()
        assert service.ask("GET", "/api/v1/sites").status == 200
        deadline = time.monotonic() + 60
        while db.engine.pool.checkedout():  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, db.engine.pool.status()
            time.sleep(0.1)
        monkeypatch.setattr(replicas, "stream", whole)
        assert len(list(service.client().replicas.locate("s:d"))) == FILES
        for connection in asleep:
            connection.close()


def test_lists_are_followed_by_their_cursors(service: Service):
    with service.client() as client:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(client.scopes.add, [f"scope{i:03}" for i in range(230)]))
        assert sorted(scope.name for scope in client.scopes.list()) == [f"scope{i:03}" for i in range(230)]
    first = service.ask("GET", "/api/v1/scopes?limit=229").json
    assert len(first["items"]) == 229
    second = service.ask("GET", f"/api/v1/scopes?cursor={first['next']}").json
    assert (len(second["items"]), second["next"]) == (1, None)
