"""Datasets and containers: what they hold, what they refuse, how they are listed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, dids, endpoints, replicas, scopes, sites
from replica.db import tables
from replica.db.engine import Database, Session
from rules.errors import AlreadyExists, Invalid, NotFound, Refused
from rules.names import Did
from rules.permissions import Actor, Role
from tests.at_once import at_once

ROOT = Actor("root", Role.ADMIN)
MD5 = "d41d8cd98f00b204e9800998ecf8427e"


def did(name: str) -> Did:
    return Did.parse(f"test:{name}")


def make(s: Session, name: str, kind: str = "dataset", **metadata: object) -> None:
    dids.add(s, ROOT, wire.NewDid(did=f"test:{name}", kind=kind, metadata=metadata))  # type: ignore[arg-type]


def make_files(s: Session, *names: str, size: int = 3) -> None:
    files = [wire.NewReplica(did=f"test:{name}", size=size, checksums={"md5": MD5}) for name in names]
    replicas.register(s, ROOT, wire.Registration(endpoint="e", replicas=files, evidence="hashed"))


@pytest.fixture
def world(db: Database) -> Database:
    """Files f0 … f9, datasets d1 and d2, containers c1, c2 and c3; nothing attached."""
    with db.write() as s:
        accounts.bootstrap(s)
        scopes.add(s, ROOT, wire.NewScope(name="test"))
        sites.add(s, wire.NewSite(name="DESY"))
        endpoints.add(s, wire.NewEndpoint(name="e", site="DESY", url="memory://e"))
        make_files(s, *(f"f{i}" for i in range(10)))
        for name in ("d1", "d2"):
            make(s, name)
        for name in ("c1", "c2", "c3"):
            make(s, name, "container")
    return db


# --- holding --------------------------------------------------------------------------------------------------------


def test_attaching_is_counted_once_and_may_be_repeated(world: Database) -> None:
    with world.write() as s:
        assert dids.attach(s, did("d1"), [did("f0"), did("f1"), did("f0")]).attached == 2
        assert dids.attach(s, did("d1"), [did("f1"), did("f2")]).attached == 1
        assert dids.detach(s, did("d1"), [did("f1"), did("f5")]).detached == 1
        assert [child.did for child in dids.contents(s, did("d1"), None, 10).items] == ["test:f0", "test:f2"]


def test_sizes_count_a_file_once_however_often_it_is_below(world: Database) -> None:
    with world.write() as s:
        dids.attach(s, did("d1"), [did("f0"), did("f1")])
        dids.attach(s, did("d2"), [did("f1"), did("f2")])
        dids.attach(s, did("c1"), [did("d1"), did("d2")])
        dids.attach(s, did("c2"), [did("c1"), did("d2")])
        got = dids.get(s, did("c2"))
        assert (got.kind, got.files, got.size) == ("container", 3, 9)
        assert (dids.get(s, did("c3")).files, dids.get(s, did("c3")).size) == (0, 0)
        f = dids.get(s, did("f1"))
        assert (f.kind, f.files, f.size, f.checksums) == ("file", 1, 3, {"md5": MD5})


@pytest.mark.parametrize(
    ("parent", "child", "message"),
    [
        ("d1", "d2", "test:d2 is a dataset; a dataset does not hold that"),
        ("d1", "c1", "test:c1 is a container; a dataset does not hold that"),
        ("c1", "f0", "test:f0 is a file; a container does not hold that"),
        ("f0", "f1", "test:f0 is a file and holds nothing"),
    ],
)
def test_each_kind_holds_only_what_it_may(world: Database, parent: str, child: str, message: str) -> None:
    with pytest.raises(Invalid, match=message), world.write() as s:
        dids.attach(s, did(parent), [did(child)])


def test_nothing_ever_contains_itself(world: Database) -> None:
    with world.write() as s:
        dids.attach(s, did("c1"), [did("c2")])
        dids.attach(s, did("c2"), [did("c3")])
    for parent, child in (("c1", "c1"), ("c2", "c1"), ("c3", "c1"), ("c3", "c2")):
        with pytest.raises(Refused, match=f"test:{parent} would contain itself"), world.write() as s:
            dids.attach(s, did(parent), [did("d1"), did(child)])
    with world.read() as s:
        assert dids.contents(s, did("c3"), None, 10).items == []


def test_two_attachments_at_once_cannot_close_a_loop(world: Database) -> None:
    def work(parent: str, child: str) -> str:
        with world.write() as s:
            dids.attach(s, did(parent), [did(child)])
        return "done"

    outcomes = at_once(lambda: work("c1", "c2"), lambda: work("c2", "c1"))
    assert "done" in outcomes and any(isinstance(outcome, Refused) for outcome in outcomes)


def test_missing_children_are_named_and_nothing_is_attached(world: Database) -> None:
    with pytest.raises(NotFound, match=r"there is no DID test:x \(and 1 more like it\)") as refusal, world.write() as s:
        dids.attach(s, did("d1"), [did("f0"), did("x"), did("y")])
    assert [item["did"] for item in refusal.value.items] == ["test:x", "test:y"]
    with world.read() as s:
        assert dids.get(s, did("d1")).files == 0


def test_what_is_closed_does_not_change_until_it_is_opened_again(world: Database) -> None:
    with world.write() as s:
        dids.attach(s, did("d1"), [did("f0")])
        closed = dids.change(s, did("d1"), wire.DidChange(open=False))
        assert not closed.open and closed.closed_at == s.now
        assert dids.change(s, did("d1"), wire.DidChange(open=False)).closed_at == closed.closed_at
    for act in (dids.attach, dids.detach):
        with pytest.raises(Refused, match="the dataset test:d1 is closed") as refusal, world.write() as s:
            act(s, did("d1"), [did("f0")])
        assert "replica did reopen test:d1" in refusal.value.hint
    with world.write() as s:
        assert dids.change(s, did("d1"), wire.DidChange()).open is False
        opened = dids.change(s, did("d1"), wire.DidChange(open=True))
        assert opened.open and opened.closed_at is None
        assert dids.attach(s, did("d1"), [did("f1")]).attached == 1
        with pytest.raises(Invalid, match="test:f0 is a file"):
            dids.change(s, did("f0"), wire.DidChange(open=False))


def test_attaching_thousands_takes_as_many_statements_as_a_few(
    world: Database, count_statements: Callable[[Database], AbstractContextManager[Any]]
) -> None:
    with world.write() as s:
        make_files(s, *(f"g{i}" for i in range(2_000)))
    costs = []
    for parent, n in (("d1", 10), ("d2", 2_000)):
        children = [did(f"g{i}") for i in range(n)]
        for act in (dids.attach, dids.attach, dids.detach):
            with count_statements(world) as statements, world.write() as s:
                act(s, did(parent), children)
            costs.append(statements.count)
    assert costs[:3] == costs[3:]


# --- naming and finding ---------------------------------------------------------------------------------------------


def test_a_name_is_given_once(world: Database) -> None:
    with world.write() as s:
        for name, kind in (("d1", "dataset"), ("c1", "container"), ("f0", "file")):
            with pytest.raises(AlreadyExists, match=f"there is a {kind} test:{name} already"):
                make(s, name)
        with pytest.raises(NotFound, match="no scope other") as refusal:
            dids.add(s, ROOT, wire.NewDid(did="other:x"))
        assert "replica scope add other" in refusal.value.hint
        with pytest.raises(NotFound, match="no DID test:nothing"):
            dids.get(s, did("nothing"))


def listed(s: Session, **options: Any) -> list[str]:
    pages = [dids.list_page(s, limit=3, **options)]
    while pages[-1].next is not None:
        pages.append(dids.list_page(s, limit=3, cursor=pages[-1].next, **options))
    assert all(len(page.items) == 3 for page in pages[:-1])
    return [item.did.removeprefix("test:") for page in pages for item in page.items]


def test_pages_show_everything_once_and_in_order_whatever_the_names_are(world: Database) -> None:
    names = ["Ä", "a", "B", "_", "%", "z z", "ß", "ä", "日本", "-", "A"]
    with world.write() as s:
        for name in names:
            make(s, name)
        assert listed(s) == [*(f"f{i}" for i in range(10)), "d1", "d2", "c1", "c2", "c3", *names]
        assert listed(s, kind="container") == ["c1", "c2", "c3"]
        assert listed(s, scope="test", kind="file", pattern="f*") == [f"f{i}" for i in range(10)]
        with pytest.raises(NotFound, match="no scope other"):
            listed(s, scope="other")
        with pytest.raises(Invalid, match="'box' is not a kind"):
            listed(s, kind="box")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("run*", ["run1", "run_2", "run%3", "run[4]"]),
        ("RUN*", ["RUN5"]),
        ("run_*", ["run_2"]),
        ("run%*", ["run%3"]),
        ("run[*", ["run[4]"]),
        ("run[0-9]", []),
        ("run?", ["run1"]),
        ("run?2", ["run_2"]),
        ("*", ["run1", "run_2", "run%3", "run[4]", "RUN5", "x]y", "é"]),
        ("?", ["é"]),
        ("*]*", ["run[4]", "x]y"]),
        ("x", []),
        ("", []),
    ],
)
def test_patterns_mean_the_same_on_both_databases(world: Database, pattern: str, found: list[str]) -> None:
    with world.write() as s:
        scopes.add(s, ROOT, wire.NewScope(name="p"))
        for name in ("run1", "run_2", "run%3", "run[4]", "RUN5", "x]y", "é"):
            dids.add(s, ROOT, wire.NewDid(did=f"p:{name}"))
        assert [name.removeprefix("p:") for name in listed(s, scope="p", pattern=pattern)] == found


@pytest.mark.parametrize("pattern", ["*a*a*a*a*a*a*a*b", "x" * 2_000, "a\0"])
def test_a_pattern_that_would_take_for_ever_is_refused(world: Database, pattern: str) -> None:
    with pytest.raises(Invalid, match=r"the pattern .+ cannot be used"), world.read() as s:
        dids.list_page(s, pattern=pattern)


@pytest.mark.parametrize(
    "cursor", ["", "x", "!!!", "WzFd" * 100, "bnVsbA", "WzEsMl0", "WyJhIl0", "W3RydWVd", "ü", "WzFlOTld"]
)
def test_a_cursor_that_is_not_ours_is_refused(world: Database, cursor: str) -> None:
    with pytest.raises(Invalid, match="cursor is not one of ours"), world.read() as s:
        dids.list_page(s, cursor=cursor)


@pytest.mark.parametrize("limit", [0, -1, 1_001])
def test_a_page_has_bounds(world: Database, limit: int) -> None:
    with pytest.raises(Invalid, match=f"a page of {limit} items"), world.read() as s:
        dids.list_page(s, limit=limit)


# --- metadata -------------------------------------------------------------------------------------------------------


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_metadata_comes_back_as_it_went_in(world: Database) -> None:
    metadata = {
        "energy": 13.6,
        "n": 2**60,
        "tags": ["a", None, True, {"ü": "日本\u2028"}],
        "": {},
        "deep": deep(15),
        "quote": 'it\'s "x" \\ %s',
    }
    with world.write() as s:
        make(s, "m", **metadata)
    with world.read() as s:
        assert dids.get(s, did("m")).metadata == metadata
        assert dids.get(s, did("d1")).metadata == {}
        empty = sa.select(sa.func.count()).where(tables.dids.c.name == "d1", tables.dids.c.metadata.is_(sa.null()))
        assert s.execute(empty).scalar_one() == 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": "x\0"}, r"the metadata 'a' holds the character U\+0000"),
        ({"a\0": 1}, r"a key of the metadata holds the character U\+0000"),
        ({"a": {"b\0": 1}}, r"a key in the metadata 'a' holds the character U\+0000"),
        ({"a": [["\0"]]}, r"U\+0000"),
        ({"a": "\ud800"}, "is not proper Unicode text"),
        ({"a": float("nan")}, "is not a number"),
        ({"a": [float("inf")]}, "is not a number"),
        ({"a": deep(100_000)}, "the metadata 'a' is nested too deeply"),
        ({"a": deep(16)}, "nested too deeply"),
        ({"a": "x" * 70_000}, "the metadata has 700.. bytes"),
        ({"a": [0] * 40_000}, "the metadata has .* bytes"),
    ],
)
def test_metadata_that_a_database_cannot_keep_is_refused(
    world: Database, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(Invalid, match=message), world.write() as s:
        make(s, "m", **metadata)
