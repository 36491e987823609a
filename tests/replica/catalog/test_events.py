"""The log of what happened: it is there with the change, nothing comes in behind a reader, names are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import events, outbox, webhooks
from replica.catalog.events import Position
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Invalid, NotFound
from tests.conftest import HandClock, Statements
from tests.replica.catalog.world import ROOT, World, done, failed

Counting = Callable[[Database], AbstractContextManager[Statements]]


@pytest.fixture
def world(db: Database) -> World:
    return World(db)


def record(db: Database, *kinds: str, entity_id: int = 1, **payload: object) -> None:
    with db.write() as s:
        for kind in kinds:
            outbox.record(s, kind, entity_id, **payload)


def read(db: Database, cursor: str | None = None, **wanted: object) -> wire.Events:
    with db.read() as s:
        return events.page(s, cursor=cursor, **wanted)  # type: ignore[arg-type]


def now(db: Database) -> str:
    with db.read() as s:
        return events.end(s).cursor


def kinds(found: wire.Events) -> list[str]:
    return [event.kind for event in found.items]


def test_what_is_rolled_back_never_happened(db: Database):
    with pytest.raises(RuntimeError), db.write() as s:
        outbox.record(s, "site.added", 1)
        raise RuntimeError
    with db.write() as s:
        outbox.record(s, "site.added", 2)
        with pytest.raises(RuntimeError), s.savepoint():
            outbox.record(s, "site.added", 3)
            raise RuntimeError
        with s.savepoint():
            outbox.record(s, "site.added", 4)
    assert [event.id for event in read(db).items] == [2, 4]


def test_who_tries_again_does_not_tell_what_he_undid():
    """Only `Session.savepoint` takes back what was to be told."""
    sources = (Path(events.__file__).parent).glob("*.py")
    assert [each.name for each in sources if "begin_nested" in each.read_text(encoding="utf-8")] == []


def test_versions_count_up_without_gaps_and_nothing_to_say_is_null(db: Database):
    record(db, "site.added", "site.changed", name="A", quoted='a"b\\{},NULL')
    record(db, "site.changed")
    with db.read() as s:
        rows = s.execute(sa.select(tables.events).order_by(tables.events.c.id)).all()
        assert [row.version for row in rows] == [1, 2, 3]
        assert rows[0].payload == {"name": "A", "quoted": 'a"b\\{},NULL'}
        nothing = sa.select(sa.func.count()).where(tables.events.c.payload.is_(sa.null()))
        assert s.execute(nothing).scalar_one() == 1


def test_versions_have_no_gaps_however_many_write_at_once(db: Database):
    def many() -> None:
        for _ in range(10):
            record(db, "rule.ok", "rule.stuck", entity_id=7)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(e.version for e in read(db, entity="rule", entity_id=7, limit=1_000).items) == list(range(1, 81))


def test_pages_go_on_where_the_one_before_ended_and_the_end_is_a_place_to_wait(db: Database):
    record(db, *["site.changed"] * 7)
    first = read(db, limit=3)
    second = read(db, first.next, limit=3)
    third = read(db, second.next, limit=3)
    assert [e.version for page in (first, second, third) for e in page.items] == [1, 2, 3, 4, 5, 6, 7]
    assert (first.more, second.more, third.more) == (True, True, False)
    assert read(db, third.next) == wire.Events(items=[], next=third.next, more=False)
    record(db, "site.changed")
    assert [e.version for e in read(db, third.next).items] == [8]
    assert read(db, first.items[1].cursor).items[0].version == 3
    assert read(db, "now").items == []
    assert read(db, "oldest") == read(db)


def test_kinds_entities_and_accounts_are_told_apart(db: Database, world: World):
    start = now(db)
    record(db, "rule.ok", "rule.stuck", "did.created", "site.added", entity_id=99)
    with db.write() as s:
        outbox.record(s, "rule.ok", 98, account_id=1)
    assert kinds(read(db, start, kinds=["rule.*"])) == ["rule.ok", "rule.stuck", "rule.ok"]
    assert kinds(read(db, start, kinds=["rule.ok", "did.*"])) == ["rule.ok", "did.created", "rule.ok"]
    assert [e.id for e in read(db, start, entity="rule", entity_id=98).items] == [98]
    assert [e.account for e in read(db, start, account="root", kinds=["rule.*"]).items] == ["root"]
    with pytest.raises(Invalid):
        read(db, kinds=["rules.*"])
    with pytest.raises(Invalid):
        read(db, "foreign")
    with pytest.raises(NotFound):
        read(db, account="nobody")


def test_what_is_rare_is_looked_for_in_bounded_steps(db: Database, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(events, "WINDOW", 4)
    record(db, *["site.changed"] * 6, "rule.ok")
    first = read(db, kinds=["rule.*"])
    assert (first.items, first.more) == ([], True)
    second = read(db, first.next, kinds=["rule.*"])
    assert (kinds(second), second.more) == (["rule.ok"], False)


def test_a_long_transaction_delays_and_hides_nothing(postgresql_url: str):
    """The one that begins first commits last: its events have the lower ids, and must not be passed by."""
    database = Database(postgresql_url)
    slow = database.engine.connect()
    slow.execute(sa.text("SELECT pg_current_xact_id()"))
    slow.execute(
        sa.insert(tables.events).values(
            tx=sa.text("pg_current_xact_id()::text::bigint"), at=tables.EPOCH, kind="rule.ok", entity="rule",
            entity_id=1, version=1,
        )
    )  # fmt: skip
    record(database, "rule.ok", entity_id=2)
    early = read(database)
    assert early.items == [], "the second is not told before the first is over"
    with database.read() as s:
        assert events.end(s) == Position()
    slow.commit()
    slow.close()
    record(database, "rule.ok", entity_id=3)
    late = read(database, early.next)
    assert [event.id for event in late.items] == [1, 2, 3]
    database.close()


def test_transfers_tell_their_end_in_one_statement_whatever_their_number(
    db: Database, world: World, count_statements: Counting
):
    world.three()
    world.collection("d")
    world.files(3, "DESY-DISK", "t:d")
    rule = world.rule("t:d", "HZDR-DISK")
    start = now(db)
    orders = world.claim("HZDR").orders
    world.report("HZDR", [done(orders[0]), failed(orders[1], "no_space"), failed(orders[2], "timed_out")])
    ends = read(db, start, kinds=["transfer.*"]).items
    ended = {t.id: t for t in world.transfers() if t.state in ("done", "failed")}
    assert {(e.id, e.kind) for e in ends} == {(t.id, f"transfer.{t.state}") for t in ended.values()}
    assert ended[orders[0].transfer].state == "done"
    for event in ends:
        transfer = ended[event.id]
        assert (event.version, event.did, event.target) == (1, transfer.did, "HZDR-DISK")
        assert event.payload["reason"] == transfer.reason
    before = world.count(tables.events, tables.events.c.entity == "transfer")
    world.delete(rule)
    assert world.count(tables.events, tables.events.c.entity == "transfer") == before, "not what ends with its rule"
    with count_statements(db) as statements, db.write() as s:
        outbox.record_ends(s, [(t.id, tables.TransferState.DONE) for t in ended.values()] * 300)
    assert sum("INTO events" in text for text in statements.texts) == 1


def test_names_are_told_in_a_bounded_number_of_statements(db: Database, world: World, count_statements: Counting):
    world.three()
    world.collection("d")
    world.files(2, "DESY-DISK", "t:d")
    rule = world.rule("t:d", "HZDR-DISK")
    with db.write() as s:
        endpoint = s.execute(sa.select(tables.endpoints.c.id).where(tables.endpoints.c.name == "GSI-DISK")).scalar_one()
        did = s.execute(sa.select(tables.dids.c.id).where(tables.dids.c.name == "d")).scalar_one()
        start = events.end(s).cursor
        for _ in range(50):
            outbox.record(s, "rule.ok", rule.id, endpoint_id=endpoint, unit_id=did, files=3)
            outbox.record(s, "endpoint.banned", endpoint, account_id=1)
    with count_statements(db) as statements:
        told = read(db, start, limit=1_000).items
    assert (told[0].did, told[0].payload) == ("t:d", {"endpoint": "GSI-DISK", "unit": "t:d", "files": 3})
    assert (told[1].name, told[1].account) == ("GSI-DISK", "root")
    assert statements.count <= (20 if db.url.get_backend_name() == "sqlite" else 9)


def test_old_events_are_forgotten_but_not_what_somebody_has_still_to_read(
    db: Database, clock: HandClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(events, "WINDOW", 3)
    world = World(db)
    assert world

    def forget() -> int:
        gone, reached = 0, Position()
        while reached is not None:
            with db.write() as s:
                count, reached = events.forget(s, reached, transfers=timedelta(days=7), others=timedelta(days=730))
            gone += count
        return gone

    def transfer(number: int) -> None:
        with db.write() as s:
            outbox.record_ends(s, [(number, tables.TransferState.DONE)])

    transfer(1)
    record(db, "site.added", entity_id=1)
    transfer(2)
    clock.turn(days=6)
    assert forget() == 0
    with db.write() as s:
        webhooks.add(s, ROOT, wire.NewWebhook(name="slow", url="http://127.0.0.1:1/"))
        s.execute(sa.update(tables.webhooks).values(seen_tx=0, seen_id=0))
    clock.turn(days=2)
    transfer(3)
    assert forget() == 0, "the webhook has not read them"
    clock.turn(days=23)
    assert forget() == 2, "and is not waited for any longer"
    assert ("site", 1) in {(e.entity, e.id) for e in read(db).items}
    clock.turn(days=800)
    left = world.count(tables.events)
    assert forget() == left - 1
    (last,) = read(db).items
    record(db, "site.added", entity_id=5)
    assert [e.id for e in read(db, last.cursor).items] == [5], "the id of the latest is never given again"


def test_new_readers_begin_after_all_that_has_happened(db: Database, world: World):
    record(db, "rule.ok")
    with db.write() as s:
        made = webhooks.add(s, ROOT, wire.NewWebhook(name="w", url="https://example.org/x", kinds=["rule.*"]))
        assert made.up_to_date
        assert made.secret.startswith("whs_")
    with db.read() as s:
        row = s.execute(sa.select(tables.webhooks)).one()
        assert events.page(s, cursor=Position(row.seen_tx, row.seen_id).cursor, kinds=["rule.*"]).items == []
