"""`replica events`, `webhook` and `subscription` as they are typed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from aiohttp import web

from replica import wire
from replica.client.events import Events
from replica.db.engine import Database
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World
from tests.service import listening
from tests.workers.test_events import Hook
from workers import events as delivery
from workers import subscriptions as making


@pytest.fixture
def db(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.close()


def test_events_are_listed_and_followed(w: World, typed: Typed, monkeypatch: pytest.MonkeyPatch):
    typed("scope", "add", "s")
    typed("did", "add", "s:d")
    typed("did", "close", "s:d")
    lines = [json.loads(line) for line in typed("events", "--kinds", "did.*", "-o", "ndjson").stdout.splitlines()]
    assert [(line["kind"], line["did"]) for line in lines] == [("did.created", "s:d"), ("did.closed", "s:d")]
    assert len(typed.json("events", "--kinds", "did.created,did.closed", "--since", lines[0]["cursor"])) == 1
    assert "did.closed" in typed("events").stdout
    assert typed.error("events", "--kinds", "nonsense", code=1).startswith("replica: 'nonsense'")

    found = [
        wire.Event(cursor=f"c{n}", kind="rule.ok", entity="rule", id=n, version=1, at=datetime.now(UTC)) for n in (1, 2)
    ]
    asked = []

    def follow(self: Events, since: str, kinds: list[str], **filters: object):
        asked.append((since, kinds))
        return iter(found)

    monkeypatch.setattr(Events, "follow", follow)
    lines = typed("events", "--follow", "--kinds", "rule.*", "-o", "ndjson").stdout.splitlines()
    assert [json.loads(line)["cursor"] for line in lines] == ["c1", "c2"]
    assert "rule.ok  rule 1" in typed("events", "-f", "--since", "c1").stdout
    assert asked == [("now", ["rule.*"]), ("c1", [])]


def test_a_webhook_from_its_making_to_its_end(w: World, typed: Typed, db: Database):
    hook = Hook()

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", hook.take)
    with listening(app) as (host, port):
        secret = typed("webhook", "add", "w", f"http://{host}:{port}/w", "--kinds", "rule.*").stdout.strip()
        assert secret.startswith("whs_")
        stopped = threading.Event()

        def deliver() -> None:
            while not stopped.wait(0.05):
                delivery.deliver(db)

        thread = threading.Thread(target=deliver)
        thread.start()
        try:
            assert typed.json("webhook", "test", "w")["delivered_at"]
            hook.answers["/w"] = 418
            assert "418" in typed("webhook", "test", "w", code=1).stderr
        finally:
            stopped.set()
            thread.join()
    typed("webhook", "test", "w", "--wait", "0s", code=5)
    shown = typed("webhook", "show", "w").stdout
    assert secret not in shown
    assert "418" in shown
    assert typed.json("webhook", "disable", "w")["enabled"] is False
    typed.error("webhook", "test", "w", code=1)
    assert typed.json("webhook", "enable", "w", "--from-now")["up_to_date"] is True
    assert [found["name"] for found in typed.json("webhook", "list")] == ["w"]
    typed("webhook", "delete", "w")
    typed.error("webhook", "show", "w", code=3)


def test_a_subscription_from_its_preview_to_its_end(w: World, typed: Typed, db: Database, tmp_path):
    typed("scope", "add", "s")
    with w.service.client() as client:
        client.dids.add(wire.NewDid(did="s:d", metadata={"type": "raw", "at": "B"}))
        client.dids.add(wire.NewDid(did="s:e", metadata={"type": "raw"}))
        endpoint = next(iter(client.endpoints.list()))
        made_for = ("--where", "metadata.type = raw", "--to", f"{endpoint.name}|site={{metadata.at}}")
    preview = typed("subscription", "preview", *made_for).stdout
    assert "2 of 2 datasets and containers fulfil the condition" in preview
    assert "no rule: the metadata have no metadata.at" in preview
    extra = tmp_path / "rule.json"
    extra.write_text(json.dumps({"expression": endpoint.name, "priority": 5}))
    made = typed.json("subscription", "add", "raw", *made_for, "--rule", f"@{extra}", "--backfill")
    assert [rule["priority"] for rule in made["rules"]] == [3, 5]
    assert made["backfilling"] is True
    making.apply(db)
    shown = typed("subscription", "show", "raw").stdout
    assert "s:e: the metadata have no metadata.at" in shown
    assert typed.json("subscription", "show", "raw")["rules_made"] >= 2
    assert typed.json("subscription", "preview", "raw")["matching"] == 2
    assert typed.json("subscription", "disable", "raw")["enabled"] is False
    assert typed.json("subscription", "enable", "raw")["enabled"] is True
    changed = typed.json("subscription", "update", "raw", "--where", "kind = dataset", "--rule", endpoint.name)
    assert (changed["condition"], len(changed["rules"]), changed["numbers"]) == ("kind = dataset", 1, [2])
    assert typed.json("subscription", "backfill", "raw")["backfilling"] is True
    assert [found["name"] for found in typed.json("subscription", "list")] == ["raw"]
    error = typed.error("subscription", "add", "x", "--where", "kind = = x", "--to", "*", code=1)
    assert "  kind = = x\n" in error
    assert "^" in error
    typed("subscription", "add", "x", "--to", "*", code=2)
    typed("subscription", "add", "x", "--where", "kind = dataset", code=2)
    typed("subscription", "preview", "raw", *made_for, code=2)
    typed("subscription", "delete", "raw")
    typed.error("subscription", "show", "raw", code=3)
