"""Events over REST: page by page, and as they happen, until one of the two sides stops."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from aiohttp import web

from replica import wire
from replica.api import events as api
from replica.api.app import create_app
from replica.catalog import accounts, outbox
from replica.client import AsyncClient
from replica.client.events import StreamReader
from replica.db.engine import Database
from rules.errors import Invalid, NotAllowed, Unavailable
from tests.service import Service, listening, serving

STREAM = {"Accept": "text/event-stream"}


def happen(db: Database, *kinds: str, entity_id: int = 1) -> None:
    with db.write() as s:
        for kind in kinds:
            outbox.record(s, kind, entity_id)


@contextmanager
def stream(service: Service, target: str = "/api/v1/events", **headers: str) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(service.host, service.port, timeout=20)
    try:
        token = {"Authorization": f"Bearer {service.user}"}
        connection.request("GET", target, headers=STREAM | token | headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        yield response
    finally:
        connection.close()


def take(response: http.client.HTTPResponse, count: int) -> list[wire.Event]:
    reader, found = StreamReader(None), []
    while len(found) < count:
        line = response.readline()
        assert line, f"it ended after {len(found)} events"
        if (event := reader.event(line)) is not None:
            found.append(event)
    return found


def begun(response: http.client.HTTPResponse) -> str:
    """The first thing that is sent is where to go on."""
    assert response.readline() == b": \n"
    place = response.readline()
    assert response.readline() == b"\n"
    return place.removeprefix(b"id: ").strip().decode()


def test_pages_and_filters(service_on_both: Service, db: Database):
    happen(db, "rule.ok", "rule.stuck", "site.added", entity_id=5)
    with service_on_both.client(service_on_both.user) as client:
        assert [e.kind for e in client.events.list(kinds=["rule.*"])] == ["rule.ok", "rule.stuck"]
        page = client.events.page(kinds=["rule.*"], limit=1, entity="rule", id=5)
        assert page.more
        assert [e.kind for e in client.events.list(page.next, ["rule.*"])] == ["rule.stuck"]
        with pytest.raises(Invalid):
            client.events.page(kinds=["nonsense"])
    answer = service_on_both.ask("GET", "/api/v1/events?kinds=rule.ok,%20site.*").json
    assert [item["kind"] for item in answer["items"]][-1] == "site.added"


def test_a_stream_tells_what_happens_and_goes_on_where_it_was_cut(service_on_both: Service, db: Database):
    happen(db, "rule.ok")
    with stream(service_on_both, "/api/v1/events?kinds=rule.*,did.*") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        place = begun(response)
        happen(db, "rule.stuck", "site.added", "did.created")
        found = take(response, 2)
        assert [e.kind for e in found] == ["rule.stuck", "did.created"], "from now on, and only what was wanted"
    happen(db, "rule.ok")
    with stream(service_on_both, **{"Last-Event-ID": found[0].cursor}) as response:
        assert [e.kind for e in take(response, 3)] == ["site.added", "did.created", "rule.ok"]
    with stream(service_on_both, f"/api/v1/events?cursor={place}") as response:
        assert take(response, 1)[0].kind == "rule.stuck"
    with stream(service_on_both, "/api/v1/events?cursor=oldest") as response:
        assert take(response, 1)[0].version == 1


def test_another_process_is_heard_and_silence_says_that_it_is_alive(
    service: Service, sqlite: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(api, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(api, "HEARTBEAT_SECONDS", 0.1)
    elsewhere = Database(sqlite.url.render_as_string(hide_password=False))
    with stream(service) as response:
        begun(response)
        assert begun(response), "a comment and a place, as at the beginning"
        happen(elsewhere, "rule.ok")
        assert take(response, 1)[0].kind == "rule.ok"
    elsewhere.close()


def test_a_stop_ends_streams_in_order(db: Database):
    with serving(db) as service:
        connection = http.client.HTTPConnection(service.host, service.port, timeout=20)
        connection.request("GET", "/api/v1/events", headers=STREAM | {"Authorization": f"Bearer {service.user}"})
        response = connection.getresponse()
        begun(response)
        began = time.monotonic()
    assert time.monotonic() - began < 10, "nobody waits for a stream"
    assert response.read() == b"", "it ends, and is not cut off"
    connection.close()


def test_there_are_only_so_many_readers_and_each_gives_its_place_back(
    service: Service, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(api, "STREAMS_MAX", 2)
    monkeypatch.setattr(api, "HEARTBEAT_SECONDS", 0.05)
    with stream(service) as one, stream(service) as two:
        begun(one), begun(two)
        refused = service.ask("GET", "/api/v1/events", headers=STREAM)
        assert (refused.status, refused.json["code"]) == (503, "unavailable")
    deadline = time.monotonic() + 20
    while service.ask("GET", "/api/v1/events?kinds=nonsense", headers=STREAM).status != 400:
        assert time.monotonic() < deadline, "who went away still has a place"
        time.sleep(0.05)


def test_who_does_not_take_what_he_is_sent_is_cut_off(
    service: Service, sqlite: Database, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("replica.api.routing.STALL_SECONDS", 0.3)
    with sqlite.write() as s:
        for _ in range(5_000):
            outbox.record(s, "rule.ok", 1, words="x" * 2_000)
    sending, cut = api._send, threading.Event()

    async def watched(response: web.StreamResponse, part: bytes) -> None:
        try:
            await sending(response, part)
        except TimeoutError:
            cut.set()
            raise

    monkeypatch.setattr(api, "_send", watched)
    with stream(service, "/api/v1/events?cursor=oldest") as response:
        assert cut.wait(60)  # and takes nothing; then what is on its way, and no more
        with pytest.raises((http.client.IncompleteRead, ConnectionError, AssertionError)):
            take(response, 5_000)


def test_what_is_wrong_is_a_problem_and_no_stream(service: Service):
    assert service.ask("GET", "/api/v1/events?kinds=x", headers=STREAM).json["field"] == "kinds"
    assert service.ask("GET", "/api/v1/events?cursor=x", headers=STREAM).status == 400
    assert service.ask("GET", "/api/v1/events", headers=STREAM, token=None).status == 401
    assert service.ask("GET", "/api/v1/events", headers=STREAM, token="worker").status == 403


def test_a_client_that_follows_outlives_a_restart(sqlite: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("replica.client.events.PAUSES_SECONDS", (0.05,))
    with sqlite.write() as s:
        accounts.bootstrap(s)
        token = accounts.issue_token(s, account="root", label="test")
    found: list[str] = []
    there = threading.Event()
    with listening(create_app(sqlite)) as (host, port):
        service = Service(host, port, token, token, token)

        def follow() -> None:
            for event in service.client().events.follow("oldest", ["rule.*"]):
                found.append(event.kind)
                there.set()
                if len(found) == 2:
                    return

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        happen(sqlite, "rule.ok")
        assert there.wait(20)
    happen(sqlite, "rule.stuck")
    with listening(create_app(sqlite), port=port):
        thread.join(20)
    assert found == ["rule.ok", "rule.stuck"]
    with pytest.raises(Unavailable):
        next(service.client().events.follow())


async def test_the_same_for_asyncio(sqlite: Database):
    with serving(sqlite) as service:
        async with AsyncClient(service.url, service.user) as client:
            happen(sqlite, "rule.ok", "rule.stuck")
            assert [e.kind async for e in client.events.list(kinds=["rule.*"])] == ["rule.ok", "rule.stuck"]
            async with asyncio.timeout(20):
                async for event in client.events.follow("oldest", ["rule.*"]):
                    if event.kind == "rule.stuck":
                        break


def test_webhooks_are_for_administrators_and_their_secret_is_shown_once(service: Service):
    new = wire.NewWebhook(name="w", url="http://127.0.0.1:9/hook", kinds=["rule.*"])
    with service.client() as client:
        made = client.webhooks.add(new)
        assert made.secret not in str(service.ask("GET", "/api/v1/webhooks").json)
        assert client.webhooks.show("w").kinds == ["rule.*"]
        assert not client.webhooks.change("w", enabled=False).enabled
        assert client.webhooks.change("w", enabled=True, from_now=True).enabled
        assert client.webhooks.test("w").name == "w"
        for url in (
            "ftp://x/",
            "http://",
            "http://u:p@x/",
            "javascript:alert(1)",
            "http://x/#a",
            "http://x:99999/",
            "x",
        ):
            with pytest.raises(Invalid) as refused:
                client.webhooks.add(wire.NewWebhook(name="x", url=url))
            assert refused.value.field == "url"
        assert [w.name for w in client.webhooks.list()] == ["w"]
    with service.client(service.user) as client:
        for act in (
            lambda: client.webhooks.add(new),
            lambda: client.webhooks.show("w"),
            lambda: list(client.webhooks.list()),
        ):
            with pytest.raises(NotAllowed):
                act()
    with service.client() as client:
        client.webhooks.delete("w")
        assert list(client.webhooks.list()) == []


def test_subscriptions_over_rest(service: Service):
    with service.client() as client:
        client.scopes.add("s")
        client.endpoints.add(wire.NewEndpoint(name="DESY-DISK", site="DESY", url="file:///tmp/replica-desy-disk"))
        client.dids.add(wire.NewDid(did="s:d", metadata={"type": "raw", "at": "DESY"}))
    with service.client(service.user) as client:
        new = wire.NewSubscription(
            name="raw", condition="metadata.type = raw", rules=[wire.RuleTemplate(expression="site={metadata.at}")]
        )
        assert client.subscriptions.preview(new).matching == 1
        made = client.subscriptions.add(new)
        assert (made.account, made.backfilling, made.rules) == ("alice", False, new.rules)
        assert client.subscriptions.preview("raw").dids[0].rules[0].expression == "site=DESY"
        assert client.subscriptions.backfill("raw").backfilling
        changed = client.subscriptions.change("raw", wire.SubscriptionChange(comment="x", enabled=False))
        assert (changed.comment, changed.enabled, changed.condition) == ("x", False, new.condition)
        assert [s.name for s in client.subscriptions.list()] == ["raw"]
        assert client.subscriptions.show("raw") == changed
        client.subscriptions.delete("raw")
        assert list(client.subscriptions.list()) == []
