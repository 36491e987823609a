"""Webhooks: a real server that takes, fails, hangs, sends us elsewhere, or answers without end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from aiohttp import web

from replica import wire
from replica.catalog import events, outbox, webhooks
from replica.db import tables
from replica.db.engine import Database
from tests.conftest import HandClock
from tests.replica.catalog.world import ROOT, World
from tests.service import listening
from workers import events as pass_


class Hook:
    """Keeps what it was sent; answers as told."""

    def __init__(self) -> None:
        self.got: list[wire.Delivery] = []
        self.requests: list[tuple[dict[str, str], bytes]] = []
        #: Path → what to do: a status, "hang", "elsewhere", "endless".
        self.answers: dict[str, Any] = {}
        self.released = threading.Event()
        self.url = ""

    async def take(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((dict(request.headers), body))
        answer = self.answers.get(request.path, 204)
        if answer == "hang":
            while not self.released.is_set():
                await asyncio.sleep(0.01)
        elif answer == "elsewhere":
            raise web.HTTPTemporaryRedirect(f"{self.url}/other?secret=1")
        elif answer == "endless":
            response = web.StreamResponse(status=500)
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                while True:
                    await response.write(b"x" * 65_536)
            return response
        elif answer != 204:
            return web.Response(status=answer, text="we are\nclosed " + "!" * 5_000)
        self.got.append(msgspec.json.decode(body, type=wire.Delivery))
        return web.Response(status=204)


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", hook.take)
    with listening(app) as (host, port):
        hook.url = f"http://{host}:{port}"
        yield hook
        hook.released.set()


@pytest.fixture
def world(db: Database, clock: HandClock) -> World:
    return World(db)


def add(db: Database, hook: Hook, name: str = "w", kinds: list[str] | None = None) -> wire.WebhookMade:
    with db.write() as s:
        return webhooks.add(s, ROOT, wire.NewWebhook(name=name, url=f"{hook.url}/{name}", kinds=kinds or []))


def show(db: Database, name: str = "w") -> wire.Webhook:
    with db.read() as s:
        return webhooks.get(s, name)


def happen(db: Database, count: int = 1, kind: str = "site.changed", entity_id: int = 1) -> None:
    with db.write() as s:
        for _ in range(count):
            outbox.record(s, kind, entity_id)


def versions(hook: Hook, name: str = "w") -> list[int]:
    return [e.version for d in hook.got if d.webhook == name for e in d.events if e.kind == "site.changed"]


def test_a_webhook_is_told_in_order_and_in_batches_what_it_wanted(db: Database, world: World, hook: Hook):
    made = add(db, hook, kinds=["site.*"])
    happen(db, 250)
    happen(db, 3, "did.created")
    report = pass_.deliver(db)
    assert (report.done, report.more) == (3, False)
    assert versions(hook) == list(range(1, 251))
    assert [len(d.events) for d in hook.got] == [100, 100, 50]
    assert {e.kind for d in hook.got for e in d.events} == {"site.changed"}
    headers, body = hook.requests[0]
    assert headers["Content-Type"] == "application/json"
    assert headers["Replica-Signature"] == pass_.signature(made.secret, headers["Replica-Timestamp"], body)
    shown = show(db)
    assert shown.up_to_date
    assert shown.delivered_at is not None
    assert not hasattr(shown, "secret")
    assert pass_.deliver(db).seen == 0
    assert len(hook.requests) == 3, "nothing is sent twice that was taken"


def test_who_fails_is_tried_later_and_later_and_then_told_everything(
    db: Database, world: World, hook: Hook, clock: HandClock
):
    add(db, hook)
    hook.answers["/w"] = 503
    happen(db)
    pass_.deliver(db)
    shown = show(db)
    assert (shown.failures, shown.failing_since) == (1, clock.now)
    assert "it answered 503" in shown.last_error
    assert len(shown.last_error) < 500
    assert shown.next_try_at is not None
    assert clock.now < shown.next_try_at
    pass_.deliver(db)
    assert len(hook.requests) == 1, "not before its time"
    clock.turn(seconds=6)
    happen(db)
    pass_.deliver(db)
    assert (len(hook.requests), show(db).failures) == (2, 2)
    hook.answers.clear()
    clock.turn(hours=1)
    pass_.deliver(db)
    assert versions(hook) == [1, 2]
    shown = show(db)
    assert (shown.failures, shown.failing_since, shown.last_error, shown.next_try_at) == (0, None, "", None)


def test_after_three_days_it_is_disabled_and_a_person_enables_it_again(
    db: Database, world: World, hook: Hook, clock: HandClock
):
    add(db, hook)
    hook.answers["/w"] = 500
    happen(db)
    for hours in (0, 1, 30, 41, 1, 1):
        clock.turn(hours=hours)
        pass_.deliver(db)
    shown = show(db)
    assert (shown.enabled, shown.failures) == (False, 4)
    with db.read() as s:
        (told,) = events.page(s, kinds=["webhook.disabled"]).items
    assert (told.name, told.payload["failures"]) == ("w", 4)
    assert "500" in told.payload["reason"]
    asked = len(hook.requests)
    pass_.deliver(db)
    assert len(hook.requests) == asked
    hook.answers.clear()
    with db.write() as s:
        webhooks.change(s, ROOT, "w", wire.WebhookChange(enabled=True))
    pass_.deliver(db)
    assert versions(hook) == [1], "what happened meanwhile is told"
    with db.write() as s:
        webhooks.change(s, ROOT, "w", wire.WebhookChange(enabled=False))
    happen(db)
    with db.write() as s:
        assert webhooks.change(s, ROOT, "w", wire.WebhookChange(enabled=True, from_now=True)).enabled
    pass_.deliver(db)
    assert versions(hook) == [1], "unless it is not wanted"


def test_a_redirect_is_not_followed_and_no_answer_is_read_to_its_end(db: Database, world: World, hook: Hook):
    for name, answer in (("elsewhere", "elsewhere"), ("endless", "endless")):
        add(db, hook, name)
        hook.answers[f"/{name}"] = answer
    happen(db)
    pass_.deliver(db)
    assert hook.got == []
    assert "sends us to" in show(db, "elsewhere").last_error
    assert "it answered 500" in show(db, "endless").last_error
    assert len(show(db, "endless").last_error) < 400


def test_one_that_hangs_holds_up_no_other(db: Database, world: World, hook: Hook, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pass_, "ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(pass_, "LOOK_SECONDS", 0.05)
    add(db, hook, "hangs")
    add(db, hook, "well")
    hook.answers["/hangs"] = "hang"
    happen(db)
    thread = threading.Thread(target=pass_.deliver, args=(db,))
    thread.start()
    for _ in range(500):
        if versions(hook, "well"):
            break
        threading.Event().wait(0.01)
    happen(db)  # while the other still hangs
    thread.join(30)
    assert versions(hook, "well") == [1, 2]
    assert "did not answer within" in show(db, "hangs").last_error
    assert show(db, "hangs").failures == 1


def test_nobody_there_is_a_reason_too(db: Database, world: World):
    with db.write() as s:
        webhooks.add(s, ROOT, wire.NewWebhook(name="w", url="http://127.0.0.1:9/"))
    happen(db)
    pass_.deliver(db)
    assert "cannot be reached" in show(db).last_error


def test_of_two_processes_one_delivers_and_what_a_dead_one_took_comes_again(
    db: Database, world: World, hook: Hook, clock: HandClock
):
    add(db, hook)
    happen(db)
    with db.read() as s:
        (webhook,) = webhooks.waiting(s)
    with db.write() as s:
        mine, _ = webhooks.claim(s, webhook, 60)
    with db.write() as s:
        assert webhooks.claim(s, webhook, 60) == (None, False)
    assert mine is not None
    pass_.deliver(db)
    assert hook.requests == []
    clock.turn(seconds=61)  # the first one died, or so it seems
    happen(db)
    pass_.deliver(db)
    assert versions(hook) == [1, 2]
    with db.write() as s:
        assert not webhooks.delivered(s, mine), "too late: another one has gone on"
    with db.write() as s:
        assert not webhooks.failed(s, mine, "too late", 0.5)
    assert (show(db).failures, show(db).up_to_date) == (0, True)


def test_a_rule_that_names_a_webhook_is_told_to_it_whatever_its_kinds(db: Database, world: World, hook: Hook):
    world.three()
    add(db, hook, kinds=["site.added"])
    world.collection("d")
    world.files(1, "DESY-DISK", "t:d")
    named = world.rule("t:d", "HZDR-DISK", notify="w")
    world.rule("t:d", "GSI-DISK")
    world.move()
    pass_.deliver(db)
    told = [e for d in hook.got for e in d.events]
    assert {(e.entity, e.id) for e in told} == {("rule", named.id)}
    assert "rule.ok" in [e.kind for e in told]


def test_a_test_comes_at_once_and_only_to_its_own(db: Database, world: World, hook: Hook, clock: HandClock):
    add(db, hook, "a", ["site.added"])
    add(db, hook, "b", ["site.added"])
    hook.answers["/a"] = 500
    with db.write() as s:
        webhooks.test(s, ROOT, "a")
    pass_.deliver(db)
    assert show(db, "a").failures == 1
    hook.answers.clear()
    with db.write() as s:
        webhooks.test(s, ROOT, "a")
    pass_.deliver(db)  # without waiting for its pause
    assert [(d.webhook, [e.kind for e in d.events]) for d in hook.got] == [("a", ["webhook.test", "webhook.test"])]
    with db.read() as s:
        assert s.execute(sa.select(tables.webhooks.c.seen_id)).scalars().all()


def test_old_events_are_forgotten_by_a_pass(db: Database, world: World, clock: HandClock):
    happen(db, 3)
    clock.turn(days=400)
    happen(db)
    assert pass_.forget(db).done == 0
    assert pass_.forget(db, keep_events_days=100).done >= 3
    with db.read() as s:
        assert [e.version for e in events.page(s, kinds=["site.changed"]).items] == [4]
