"""Endpoints, sites and scopes: what may be added, what is seen of them, when stuck rules hear of it."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, endpoints, scopes, sites
from replica.db import tables
from replica.db.engine import Database, Session
from rules.endpoints import Link
from rules.errors import AlreadyExists, Invalid, NotFound
from rules.permissions import Actor, Role
from rules.states import DidKind, EndpointKind, Grouping, RuleState
from tests.conftest import HandClock

ROOT = Actor("root", Role.ADMIN)


@pytest.fixture
def world(db: Database) -> Database:
    """Two sites, no endpoint."""
    with db.write() as s:
        accounts.bootstrap(s)
        for name in ("DESY", "GSI"):
            sites.add(s, wire.NewSite(name=name))
    return db


def add(s: Session, name: str, **options: Any) -> wire.Endpoint:
    return endpoints.add(s, wire.NewEndpoint(**{"name": name, "site": "DESY", "url": f"file:///d/{name}"} | options))


def test_an_endpoint_is_shown_as_it_was_added(world: Database) -> None:
    attributes: dict[str, Any] = {"tier": 1, "country": "DE", "tape": False, "load": 0.5, "x.y-z": "ü"}
    with world.write() as s:
        made = add(s, "disk-1", kind="tape", layout="hash", attributes=attributes, capacity_bytes=100)
    with world.read() as s:
        assert endpoints.get(s, "disk-1") == made
        assert (made.site, made.kind, made.layout, made.url) == ("DESY", "tape", "hash", "file:///d/disk-1")
        assert made.attributes == attributes and type(made.attributes["tape"]) is bool
        assert (made.readable, made.writable, made.deletable, made.used_bytes) == (True, True, True, 0)
        assert (made.free_bytes, made.capacity_bytes) == (100, 100)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "a b"}, Invalid, "'a b' is not a name for an endpoint"),
        ({"name": "x" * 65}, Invalid, "is not a name for an endpoint"),
        ({"site": "CERN"}, NotFound, "no site 'CERN'"),
        ({"site": "C\0"}, Invalid, "is not a name for a site"),
        ({"url": "relative"}, Invalid, "has no scheme"),
        ({"url": "ftp://x/y"}, Invalid, "scheme 'ftp', which is not supported"),
        ({"url": "file://host/d"}, Invalid, "names a host"),
        ({"url": "file:///"}, Invalid, "root of the machine"),
        ({"url": "file:///d/../etc"}, Invalid, "'..'"),
        ({"url": "file:///d/%2e%2e/etc"}, Invalid, "'..'"),
        ({"attributes": {"site": "x"}}, Invalid, "'site' is what every endpoint has"),
        ({"attributes": {"free_bytes": 1}}, Invalid, "'free_bytes' is what every endpoint has"),
        ({"attributes": {"new": True}}, Invalid, "'new' is what every endpoint has"),
        ({"attributes": {"a b": 1}}, Invalid, "is not an attribute's key"),
        ({"attributes": {"a": "x\0"}}, Invalid, r"U\+0000"),
        ({"attributes": {"a": float("nan")}}, Invalid, "is not a number"),
        ({"attributes": {"a": "x" * 1_001}}, Invalid, "has 1001 characters"),
        ({"attributes": {"a": 10**30}}, Invalid, "too large a number"),
        ({"attributes": {f"a{i}": 1 for i in range(101)}}, Invalid, "101 attributes are too many"),
    ],
)
def test_what_cannot_be_an_endpoint_is_refused(
    world: Database, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), world.write() as s:
        add(s, **({"name": "new"} | options))


@pytest.mark.parametrize(
    ("url", "clash"),
    [
        ("file:///data/a", True),
        ("file:///data/a/", True),
        ("file:///data/%61", True),
        ("file:///data/a/b", True),
        ("file:///data", True),
        ("file:///data/ab", False),
        ("file:///data/A", False),
        ("memory://a", False),
        ("memory://m", True),
    ],
)
def test_two_endpoints_never_share_a_file(world: Database, url: str, clash: bool) -> None:
    with world.write() as s:
        add(s, "first", url="file:///data/a")
        add(s, "second", url="memory://m/")
        if clash:
            with pytest.raises(AlreadyExists, match=r"shares files with the endpoint (first|second)"):
                add(s, "third", site="GSI", url=url)
        else:
            add(s, "third", site="GSI", url=url)


def test_a_name_is_given_once(world: Database) -> None:
    with world.write() as s:
        scopes.add(s, ROOT, wire.NewScope(name="test"))
        add(s, "disk")
        for act, message in (
            (lambda: add(s, "disk", url="memory://x"), "an endpoint disk already"),
            (lambda: sites.add(s, wire.NewSite(name="GSI")), "a site GSI already"),
            (lambda: scopes.add(s, ROOT, wire.NewScope(name="test")), "a scope test already"),
        ):
            with pytest.raises(AlreadyExists, match=message):
                act()


def test_a_change_touches_only_what_it_names(world: Database) -> None:
    with world.write() as s:
        add(s, "disk", attributes={"tier": 1, "old": "x"}, capacity_bytes=5)
        changed = endpoints.change(
            s, "disk", wire.EndpointChange(writable=False, attributes={"old": None, "none": None, "tier": 2, "n": "y"})
        )
        assert changed.attributes == {"tier": 2, "n": "y"}
        assert (changed.readable, changed.writable, changed.deletable, changed.capacity_bytes) == (True, False, True, 5)
        assert endpoints.change(s, "disk", wire.EndpointChange(capacity_bytes=None)).capacity_bytes is None
        assert endpoints.change(s, "disk", wire.EndpointChange()).attributes == {"tier": 2, "n": "y"}
        with pytest.raises(Invalid, match="'name' is what every endpoint has"):
            endpoints.change(s, "disk", wire.EndpointChange(attributes={"name": None}))
        with pytest.raises(NotFound, match="no endpoint 'none'"):
            endpoints.change(s, "none", wire.EndpointChange(writable=True))


def test_free_space_is_the_smaller_of_capacity_and_report_less_what_came_since(world: Database) -> None:
    with world.write() as s:
        add(s, "disk", capacity_bytes=1_000)
        add(s, "other")
        desy, gsi = sites.site_id(s, "DESY"), sites.site_id(s, "GSI")

        def use(size: int) -> int | None:
            s.execute(sa.update(tables.endpoints).where(tables.endpoints.c.name == "disk").values(used_bytes=size))
            return endpoints.get(s, "disk").free_bytes

        assert endpoints.get(s, "other").free_bytes is None
        assert use(100) == 900
        endpoints.report_space(s, desy, "disk", 300)
        assert endpoints.get(s, "disk").free_bytes == 300
        assert use(250) == 150
        assert use(900) == 0
        with pytest.raises(NotFound, match="this site has no endpoint 'disk'"):
            endpoints.report_space(s, gsi, "disk", 10**15)


def test_a_snapshot_has_what_decisions_need(world: Database) -> None:
    with world.write() as s:
        add(s, "a", attributes={"tier": 1}, capacity_bytes=10)
        b = add(s, "b", site="GSI", kind="tape")
        endpoints.change(s, "b", wire.EndpointChange(writable=False))
        one, two = endpoints.snapshot(s)
        assert (one.name, one.site, one.kind, dict(one.attributes)) == ("a", "DESY", EndpointKind.DISK, {"tier": 1})
        assert (one.writable, one.free_bytes) == (True, 10)
        assert (two.id, two.site, two.kind, two.writable, two.free_bytes) == (
            b.id,
            "GSI",
            EndpointKind.TAPE,
            False,
            None,
        )
        s.execute(sa.insert(tables.links).values(source_id=one.id, target_id=two.id, distance=3, allowed=False))
        assert endpoints.links(s) == {(one.id, two.id): Link(one.id, two.id, 3, False)}


def test_a_list_can_be_narrowed_by_an_expression(world: Database) -> None:
    with world.write() as s:
        for i in range(5):
            add(s, f"e{i}", attributes={"tier": i % 2})
        first = endpoints.list_page(s, "tier=0", None, 2)
        assert [e.name for e in first.items] == ["e0", "e2"] and first.items[1].attributes == {"tier": 0}
        rest = endpoints.list_page(s, "tier=0", first.next, 2)
        assert [e.name for e in rest.items] == ["e4"] and rest.next is None
        assert len(endpoints.list_page(s, None, None, 100).items) == 5
        with pytest.raises(Invalid):
            endpoints.list_page(s, "tier=", None, 100)


def test_new_facts_make_stuck_rules_due_and_leave_the_others(world: Database, clock: HandClock) -> None:
    with world.write() as s:
        scopes.add(s, ROOT, wire.NewScope(name="test"))
        root = accounts.account_id(s, "root")
        scope = scopes.ids(s, ["test"])["test"]
        values = {"scope_id": scope, "name": "d", "kind": DidKind.DATASET, "account_id": root, "created_at": s.now}
        made = sa.insert(tables.dids).values(values).returning(tables.dids.c.id)
        rule = {
            "did_id": s.execute(made).scalar_one(),
            "account_id": root,
            "copies": 1,
            "expression": "*",
            "grouping": Grouping.DATASET,
            "spread": "endpoint",
            "priority": 3,
            "activity": "default",
            "created_at": s.now,
            "updated_at": s.now,
        }
        for state in (RuleState.STUCK, RuleState.OK):
            s.execute(sa.insert(tables.rules).values(rule | {"state": state}))

    def due(s: Session) -> list[Any]:
        return list(s.execute(sa.select(tables.rules.c.evaluate_at).order_by(tables.rules.c.id)).scalars())

    for number, act in enumerate(
        (lambda s: add(s, "disk"), lambda s: endpoints.change(s, "disk", wire.EndpointChange(writable=False)))
    ):
        now = clock.turn(seconds=number + 1)
        with world.write() as s:
            act(s)
            assert "evaluation" in s.wake
            assert due(s) == [now, None]


def test_sites_are_listed_in_pages_and_tell_when_their_worker_was_heard_of(world: Database, clock: HandClock) -> None:
    with world.write() as s:
        page = sites.list_page(s, None, 1)
        assert [site.name for site in page.items] == ["DESY"] and page.items[0].worker_seen_at is None
        assert [site.name for site in sites.list_page(s, page.next, 1).items] == ["GSI"]
        sites.seen(s, sites.site_id(s, "GSI"))
        first = sites.get(s, "GSI").worker_seen_at
        assert first == clock.now
        clock.turn(seconds=1)
    with world.write() as s:  # a busy site does not write its row with every claim
        sites.seen(s, sites.site_id(s, "GSI"))
        assert sites.get(s, "GSI").worker_seen_at == first
        clock.turn(seconds=10)
    with world.write() as s:
        sites.seen(s, sites.site_id(s, "GSI"))
        assert sites.get(s, "GSI").worker_seen_at == clock.now
        assert sites.get(s, "DESY").worker_seen_at is None


def test_scopes_are_listed_with_their_owners(world: Database) -> None:
    with world.write() as s:
        for name in ("b", "a", "user.x"):
            scopes.add(s, ROOT, wire.NewScope(name=name))
        page = scopes.list_page(s, None, 2)
        rest = scopes.list_page(s, page.next, 2)
        assert [(scope.name, scope.account) for scope in (*page.items, *rest.items)] == [
            ("b", "root"),
            ("a", "root"),
            ("user.x", "root"),
        ]
        with pytest.raises(Invalid, match="is not a scope"):
            scopes.add(s, ROOT, wire.NewScope(name="a/b"))
