"""Metadata: changed, found by conditions alike in memory and on both databases, sorted, and found by an index."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.compiler import compiles

from replica import wire
from replica.catalog import accounts, conditions, dids, metadata, scopes
from replica.db import tables
from replica.db.engine import Database, Session
from rules.conditions import And, Condition, Equals, Exists, Has, Key, Like, Not, OneOf, Or, Order, matches, parse
from rules.errors import Invalid, InvalidExpression, NotFound
from rules.names import Did
from rules.permissions import Actor, Role
from tests.replica.catalog.world import World, size_of

ROOT = Actor("root", Role.ADMIN)


def did(name: str) -> Did:
    return Did.parse(f"t:{name}")


def make(s: Session, name: str, kind: str = "dataset", **values: object) -> None:
    dids.add(s, ROOT, wire.NewDid(did=f"t:{name}", kind=kind, metadata=values))  # type: ignore[arg-type]


@pytest.fixture
def world(db: Database) -> Database:
    with db.write() as s:
        accounts.bootstrap(s)
        scopes.add(s, ROOT, wire.NewScope(name="t"))
    return db


def found(s: Session, where: str | None = None, *, limit: int = 1_000, **options: Any) -> list[str]:
    pages = [dids.list_page(s, where=where, limit=limit, **options)]
    while pages[-1].next is not None:
        pages.append(dids.list_page(s, where=where, limit=limit, cursor=pages[-1].next, **options))
    return [item.did.removeprefix("t:") for page in pages for item in page.items]


# --- changing -------------------------------------------------------------------------------------------------------


def test_keys_are_set_and_unset_and_the_others_stay(world: Database) -> None:
    with world.write() as s:
        make(s, "d", run=1, proposal={"pi": "x", "end": "2026-01-01"})
        change = wire.MetadataChange(
            set={"run": 2, "proposal.end": "2027-01-01", "a.b.c": [1], '"x.y"': True, "kind": "raw"},
            unset=["proposal.pi"],
        )
        after = metadata.change(s, did("d"), change, ROOT).metadata
        expected = {"run": 2, "proposal": {"end": "2027-01-01"}, "a": {"b": {"c": [1]}}, "x.y": True, "kind": "raw"}
        assert after == expected == metadata.get(s, did("d")).metadata == dids.get(s, did("d")).metadata
        # What becomes empty goes as well; what is not there is no error; what is below no object replaces it.
        change = wire.MetadataChange(set={"run.n": 5}, unset=["a.b.c", "nothing.at.all", "proposal", '"x.y"', "kind"])
        assert metadata.change(s, did("d"), change).metadata == {"run": {"n": 5}}
        assert metadata.change(s, did("d"), wire.MetadataChange(unset=["metadata.run"])).metadata == {}
        empty = sa.select(tables.dids.c.id).where(tables.dids.c.metadata.is_(sa.null()))
        assert len(s.execute(empty).all()) == 1


def test_many_are_changed_together_or_not_at_all(
    world: Database, count_statements: Callable[[Database], AbstractContextManager[Any]]
) -> None:
    with world.write() as s:
        for i in range(300):
            make(s, f"d{i}", n=i)
    costs = []
    for n in (3, 300):
        with count_statements(world) as statements, world.write() as s:
            changes = [wire.MetadataOf(did=f"t:d{i}", set={"m": f"{n}-{i}"}) for i in range(n)]
            assert metadata.change_many(s, changes, ROOT).changed == n
            assert metadata.change_many(s, changes, ROOT).changed == 0
        costs.append(statements.count)
    assert costs[0] == costs[1] <= 40
    with world.read() as s:
        assert metadata.get(s, did("d7")).metadata == {"n": 7, "m": "300-7"}
        assert [h.kind for h in dids.history_page(s, did("d7"), None, 10).items] == ["did.created", "did.metadata"]
    for wrong, error in (
        (wire.MetadataOf(did="t:none", set={"a": 1}), NotFound),
        (wire.MetadataOf(did="t:d1", set={"a": "\0"}), Invalid),
        (wire.MetadataOf(did="t:d1", set={"a..b": 1}), Invalid),
        (wire.MetadataOf(did="t:d1", set={"a": 2**64}), Invalid),
    ):
        with pytest.raises(error), world.write() as s:
            metadata.change_many(s, [wire.MetadataOf(did="t:d0", set={"a": 1}), wire.MetadataOf(did="t:d2"), wrong])
    with world.read() as s:
        assert "a" not in metadata.get(s, did("d0")).metadata


# --- the three agree ------------------------------------------------------------------------------------------------

KEYS = ["a", "b", "a b", 'q"\\', "ü", "0", "$", "A"]
NUMBERS: st.SearchStrategy[int | float] = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**53, 2**53 + 1, 2**62, 2**63 - 1, -(2**63), 10**18]),
    st.sampled_from([0.1, -0.0, 1.0, 1.5, 2.0**53, 1e22, 1e-7, 5e-324, 1e300, 9007199254740994.0]),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
)
TEXTS = st.sampled_from(
    [
        "",
        "a",
        "A",
        "b",
        "B",
        "ab",
        "Z",
        "z",
        "é",
        "\U0001f600",
        "\uffee",
        "1",
        "1.0",
        "true",
        "null",
        "a%_[*]b",
        "x'\"\\",
        "日本",
    ]
) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
SCALARS: st.SearchStrategy[Any] = NUMBERS | TEXTS | st.booleans()
VALUES = st.recursive(
    SCALARS | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)
DOCUMENTS = st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4) | st.none()
PATHS = st.lists(st.sampled_from(KEYS), min_size=1, max_size=2).map(lambda path: Key(tuple(path)))
PATTERNS = st.text(alphabet="ab*?%_[]A1é\\'", max_size=5).filter(lambda p: p.count("*") <= 5)
TESTS: st.SearchStrategy[Condition] = st.one_of(
    st.builds(Equals, PATHS, SCALARS),
    st.builds(OneOf, PATHS, st.lists(SCALARS, min_size=1, max_size=3).map(tuple)),
    st.builds(Order, PATHS, st.sampled_from(["<", "<=", ">", ">="]), NUMBERS | TEXTS),
    st.builds(Like, PATHS, PATTERNS),
    st.builds(Has, PATHS, SCALARS),
    st.builds(Exists, PATHS),
)
TREES = st.recursive(
    TESTS,
    lambda inner: st.one_of(
        inner.map(Not),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: And(tuple(parts))),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: Or(tuple(parts))),
    ),
    max_leaves=5,
)


@pytest.fixture
def both(sqlite_url: str, postgresql_url: str) -> Iterator[list[Database]]:
    databases = [Database(sqlite_url), Database(postgresql_url)]
    for database in databases:
        with database.write() as s:
            accounts.bootstrap(s)
            scopes.add(s, ROOT, wire.NewScope(name="t"))
    yield databases
    for database in databases:
        database.close()


class Undo(Exception):
    pass


def answers(database: Database, documents: list[Any], trees: list[Condition]) -> list[list[bool]]:
    """For each tree, for which of the documents it holds; the database is as before afterwards."""
    result: list[list[bool]] = []
    with pytest.raises(Undo), database.write() as s:
        base = {"scope_id": 1, "kind": 2, "account_id": 1, "created_at": 0, "open": True}
        insert = sa.text(
            "INSERT INTO dids (id, name, metadata, scope_id, kind, account_id, created_at, open)"
            " VALUES (:id, :name, CAST(:metadata AS {}), :scope_id, :kind, :account_id, :created_at, :open)".format(
                "JSONB" if s.postgresql else "TEXT"
            )
        )
        rows = [
            {"id": i, "name": str(i), "metadata": None if d is None else json.dumps(d), **base}
            for i, d in enumerate(documents, 1)
        ]
        s.execute(insert, rows)
        columns = [sa.case((conditions.where(s, tree), 1), else_=0).label(f"holds_{i}") for i, tree in enumerate(trees)]
        table = s.execute(dids.select().with_only_columns(*columns).order_by(tables.dids.c.id)).all()
        result = [[bool(row[i]) for row in table] for i in range(len(trees))]
        raise Undo
    return result


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(documents=st.lists(DOCUMENTS, min_size=3, max_size=12), trees=st.lists(TREES, min_size=4, max_size=10))
def test_memory_and_both_databases_agree(both: list[Database], documents: list[Any], trees: list[Condition]) -> None:
    expected = [[matches(tree, {"metadata": document}) for document in documents] for tree in trees]
    for database in both:
        for tree, got, wanted in zip(trees, answers(database, documents, trees), expected, strict=True):
            assert got == wanted, (database.engine.dialect.name, tree, documents)


def test_texts_are_compared_by_code_point_and_numbers_by_value(both: list[Database]) -> None:
    texts = ["", "A", "B", "Z", "a", "a b", "ab", "z", "ß", "é", "日本", "\uffee", "\U0001f600"]
    numbers = [-(2**63), -1.5, -1, 0, 1e-300, 0.1, 1, 1.5, 2**53, 2**53 + 1, 2**53 + 2, 2**63 - 1, 1e22, 1e300]
    for values in (texts, numbers):
        documents = [{"a": value} for value in values]
        trees: list[Condition] = [Order(Key(("a",)), "<", value) for value in values]
        for database in both:
            for i, got in enumerate(answers(database, documents, trees)):
                assert got == [j < i for j in range(len(values))], values[i]


def test_built_in_keys_mean_the_same_in_memory_and_in_both_databases(db: Database) -> None:
    w = World(db)
    w.endpoint("E")
    w.collection("d1")
    w.collection("c1", "container")
    w.register(["t:f1", "t:f2"], "E", "t:d1")
    with db.write() as s:
        dids.change(s, did("d1"), wire.DidChange(open=False, lifetime_seconds=3600))
        dids.add(s, ROOT, wire.NewDid(did="t:D2", monotonic=True))
        every = metadata.facts(s, range(1, 100))
        today = f"{s.now:%Y-%m-%d}"
        for text in [
            *("kind = file", "kind in (dataset, container)", "kind != file", "kind like '*a*'", "kind > dataset"),
            *("name = d1", "name in (d1, c1)", "name like 'd*'", "name like '?1'", "name < a", "name >= 'f1'"),
            *("scope = t", "scope != t", "scope like 't*'", "account = root", "account > z", "not account = x"),
            *(
                f"created_at = {today}",
                f"created_at < {today}",
                f"created_at <= {today}",
                "created_at in 2020-01-01..2020-12-31",
            ),
            *(
                f"closed_at >= {today}",
                "exists closed_at",
                "not exists expires_at",
                f"expires_at > {today}T00:00:00+00:00",
            ),
            *("open = true", "open = false", "not open = true", "open != true", "monotonic = true"),
            *("files = 1", "files >= 1", "files in (0, 2)", "exists files", f"size = {size_of('t:f1')}", "size > 0.5"),
            *(
                f"bytes = {size_of('t:f1') + size_of('t:f2')}",
                "bytes < 1kB",
                "not exists bytes",
                "not bytes > 0",
                "bytes != 0",
            ),
        ]:
            tree = parse(text)
            expected = sorted(facts["name"] for facts in every.values() if matches(tree, facts))
            assert sorted(found(s, text)) == expected, text
        assert len(every) == 5


# --- listing --------------------------------------------------------------------------------------------------------


def test_a_condition_joins_the_other_filters_and_pages_go_on(world: Database) -> None:
    with world.write() as s:
        for i in range(30):
            make(s, f"d{i:02}", "container" if i % 3 == 0 else "dataset", n=i, even=i % 2 == 0)
        expected = [f"d{i:02}" for i in range(30) if i % 2 == 0 and i % 3]
        for limit in (1, 4, 1_000):
            assert found(s, "even = true", kind="dataset", limit=limit) == expected
        assert found(s, "n in (3, 4, 25) and not even = true", scope="t", pattern="d*") == ["d03", "d25"]
        with pytest.raises(InvalidExpression) as refusal:
            found(s, "n ?")
        assert (refusal.value.column, refusal.value.field) == (3, "where")


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_sorting_by_any_key_puts_what_has_none_last(world: Database, limit: int) -> None:
    long = "x" * 300
    values: list[Any] = [
        3,
        "b",
        None,
        1.5,
        True,
        "B",
        [1],
        -2,
        1e22,
        False,
        "é",
        2**53 + 1,
        2**53,
        "",
        3,
        {"x": 1},
        long,
    ]
    with world.write() as s:
        for i, value in enumerate(values):
            make(s, f"d{i}", v=value)
        make(s, "none")
        numbers = [7, 3, 0, 14, 12, 11, 8]
        texts = [13, 5, 1, 16, 10]
        ascending = [*numbers, *texts, 9, 4]
        descending = [4, 9, *reversed(texts), 8, 11, 12, 0, 14, 3, 7]
        rest = ["d2", "d6", "d15", "none"]
        assert found(s, sort="v", limit=limit) == [f"d{i}" for i in ascending] + rest
        assert found(s, sort="-metadata.v", limit=limit) == [f"d{i}" for i in descending] + rest
        assert found(s, "v > 0", sort="-v", limit=limit) == [f"d{i}" for i in (8, 11, 12, 0, 14, 3)]


def test_sorting_by_what_the_catalogue_knows(world: Database) -> None:
    with world.write() as s:
        for name in ("b", "A", "a", "Ä"):
            make(s, name, "container" if name == "a" else "dataset")
        dids.change(s, did("A"), wire.DidChange(open=False, lifetime_seconds=50))
        for sort, expected in (
            ("name", ["A", "a", "b", "Ä"]),
            ("-name", ["Ä", "b", "a", "A"]),
            ("-kind", ["b", "A", "Ä", "a"]),
            ("created_at", ["b", "A", "a", "Ä"]),
            ("-closed_at", ["A", "b", "a", "Ä"]),
            ("open", ["A", "b", "a", "Ä"]),
            ("-open", ["b", "a", "Ä", "A"]),
            ("files", ["b", "A", "Ä", "a"]),
        ):
            for limit in (1, 100):
                assert found(s, sort=sort, limit=limit) == expected, sort


@pytest.mark.parametrize("sort", ["", "-", "--name", "a b", "a=1", "name.x", 'a"); DROP TABLE dids; --'])
def test_what_is_no_key_sorts_nothing(world: Database, sort: str) -> None:
    with pytest.raises(Invalid) as refusal, world.read() as s:
        found(s, sort=sort)
    assert refusal.value.field == "sort"


@pytest.mark.parametrize(
    "key",
    [
        *(
            [1],
            [0, "0", "", -1],
            [0, "x", "", 1],
            [0, "1e99999999999", "", 1],
            [0, "1", "\0", 1],
            [0, "1", "\ud800", 1],
        ),
        *([0, 1, "", 1], [0, "1", 5, 1], [0, "1", "", 2**63], [True], "x", [0, "1", "x" * 6_000, 1], None),
    ],
)
def test_a_cursor_of_a_sorted_list_that_is_not_ours_is_refused(world: Database, key: Any) -> None:
    import base64

    cursor = base64.urlsafe_b64encode(json.dumps(key).encode()).decode().rstrip("=")
    with pytest.raises(Invalid, match="cursor is not one of ours"), world.read() as s:
        dids.list_page(s, sort="v", cursor=cursor)


def test_whatever_is_asked_is_a_value_and_never_sql(world: Database) -> None:
    odd = ["'", "';--", '"', "\\", "%s", "%(a)s", ":a", "?", "$.a", "{a}", "a'b\"c", "') OR 1=1 --", "{'a'}"]
    with world.write() as s:
        for i, text in enumerate(odd):
            make(s, f"d{i}", **{text: text, "n": i})
        for i, text in enumerate(odd):
            key = conditions_key(text)
            for condition in (
                f"{key} = {quoted(text)}",
                f"{key} in ({quoted(text)})",
                f"{key} >= {quoted(text)}",
                f"exists {key}",
            ):
                assert found(s, condition) == [f"d{i}"], condition
            if "?" not in text:
                assert found(s, f"{key} like {quoted(text)}") == [f"d{i}"]
            assert found(s, sort=key)[0] == f"d{i}"


def conditions_key(text: str) -> str:
    return str(Key((text,)))


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- speed ----------------------------------------------------------------------------------------------------------


class Explain(sa.sql.expression.Executable, sa.sql.expression.ClauseElement):
    inherit_cache = False

    def __init__(self, query: sa.Select[Any]) -> None:
        self.query = query


@compiles(Explain)
def _explain(element: Explain, compiler: Any, **kw: Any) -> str:
    return f"EXPLAIN {compiler.process(element.query, **kw)}"


def plan_of(s: Session, query: sa.Select[Any]) -> str:
    return "\n".join(str(line) for (line,) in s.execute(Explain(query)))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "run = 17",
            "proposal.pi = x",
            "run in (1, 2) and detector like 'a*'",
            "tags has raw",
            "good = true and kind = file",
        ),
        *("run = 1 or detector = x", "(run = 1 or run > 5 and good = true) and not a = 1"),
    ],
)
def test_equality_of_metadata_is_found_by_the_index(postgresql_url: str, text: str) -> None:
    database = Database(postgresql_url)
    with database.write() as s:
        s.execute(sa.text("SET LOCAL enable_seqscan = off"))
        s.execute(sa.text("SET LOCAL enable_indexscan = off"))
        clause = conditions.narrowing(s, parse(text))
        assert clause is not None
        plan = plan_of(s, sa.select(tables.dids.c.id).where(clause))
        assert "ix_dids_metadata" in plan, plan
        query = (
            conditions.select_where(s, dids.select(), parse(text), after=None, limit=100)
            .order_by(tables.dids.c.id)
            .limit(101)
        )
        s.execute(sa.text("SET LOCAL enable_seqscan = off"))
        whole = plan_of(s, query)
        assert "ix_dids_metadata" in whole, whole
    database.close()


@pytest.mark.parametrize("text", ["run > 5", "not run = 5", "run = 5 or run > 7", "name = x", "exists run"])
def test_the_index_is_not_asked_for_what_it_does_not_know(postgresql_url: str, text: str) -> None:
    database = Database(postgresql_url)
    with database.read() as s:
        assert conditions.narrowing(s, parse(text)) is None
    database.close()


def test_how_it_is_found_does_not_change_what_is_found(world: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in the order of the list, or fetched by the index and sorted."""
    with world.write() as s:
        for i in range(60):
            make(s, f"d{i:02}", odd=i % 2, rare=i % 25)
    for window in (1, 5_000):
        monkeypatch.setattr(conditions, "WINDOW", window)
        with world.read() as s:
            for limit in (1, 2, 100):
                assert found(s, "odd = 1", limit=limit) == [f"d{i:02}" for i in range(1, 60, 2)]
                assert found(s, "rare = 3", limit=limit) == ["d03", "d28", "d53"]


def test_a_search_takes_few_statements(
    world: Database, count_statements: Callable[[Database], AbstractContextManager[Any]]
) -> None:
    with world.write() as s:
        for i in range(20):
            make(s, f"d{i}", n=i)
    costs = set()
    for n, sort in itertools.product((2, 20), ("n",)):
        with count_statements(world) as statements, world.read() as s:
            assert len(found(s, f"n in ({', '.join(map(str, range(n)))})", sort=sort, scope="t")) == n
        costs.add(statements.count)
    assert len(costs) == 1 and max(costs) <= 10
