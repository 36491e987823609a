"""Registering files that are there, and finding them again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, dids, endpoints, replicas, rules, scopes, sites
from replica.db import tables
from replica.db.engine import Database, Session
from rules.errors import AlreadyExists, Invalid, NotFound, Refused
from rules.names import Did
from rules.permissions import Actor, Role
from rules.states import ReplicaState, TransferState
from tests.at_once import at_once

ROOT = Actor("root", Role.ADMIN)
XXH3 = "0123456789abcdef0123456789abcdef"
MD5 = "d41d8cd98f00b204e9800998ecf8427e"
COUNT = Callable[[Database], AbstractContextManager[Any]]


@pytest.fixture
def world(db: Database) -> Database:
    """A scope, three endpoints at two sites, nothing in them."""
    with db.write() as s:
        accounts.bootstrap(s)
        scopes.add(s, ROOT, wire.NewScope(name="test"))
        for site in ("DESY", "GSI"):
            sites.add(s, wire.NewSite(name=site))
        for name, site in (("desy-1", "DESY"), ("desy-2", "DESY"), ("gsi-1", "GSI")):
            endpoints.add(s, wire.NewEndpoint(name=name, site=site, url=f"file:///data/{name}"))
    return db


def new(name: str, size: int = 7, path: str | None = None, **checksums: str) -> wire.NewReplica:
    return wire.NewReplica(did=f"test:{name}", size=size, checksums=checksums or {"xxh3_128": XXH3}, path=path)


def register(
    s: Session, *files: wire.NewReplica, at: str = "desy-1", into: str | None = None, evidence: str = "hashed"
) -> wire.Registered:
    wish = wire.Registration(endpoint=at, replicas=list(files), dataset=into, evidence=evidence)  # type: ignore[arg-type]
    return replicas.register(s, ROOT, wish)


def located(s: Session, did: str) -> list[wire.Replica]:
    pages = [replicas.locate(s, Did.parse(did), None, 2)]
    while pages[-1].next is not None:
        pages.append(replicas.locate(s, Did.parse(did), pages[-1].next, 2))
    found = [replica for page in pages for replica in page.items]
    assert found == list(replicas.stream(s, Did.parse(did)))
    return found


def transfers_of(s: Session) -> list[sa.Row[Any]]:
    return list(s.execute(sa.select(tables.transfers).order_by(tables.transfers.c.id)))


# --- what a registration does ---------------------------------------------------------------------------------------


def test_what_the_caller_hashed_is_available_at_once(world: Database) -> None:
    with world.write() as s:
        answer = register(s, new("run 1/a.h5"), new("ü+%.h5", size=0), into="test:day")
        assert answer == wire.Registered(files=2, new=2, attached=2, to_verify=0)
        assert not any(queue.startswith("site.") for queue in s.wake)
        [a, u] = located(s, "test:day")
        assert (a.did, a.endpoint, a.site, a.state, a.size) == ("test:run 1/a.h5", "desy-1", "DESY", "available", 7)
        assert (a.checksums, a.evidence, a.path) == ({"xxh3_128": XXH3}, "hashed", "test/run 1/a.h5")
        assert a.url == "file:///data/desy-1/test/run%201/a.h5" and a.verified_at == s.now
        assert u.url == "file:///data/desy-1/test/%C3%BC%2B%25.h5"
        assert transfers_of(s) == []
        assert endpoints.get(s, "desy-1").used_bytes == 7
        day = dids.get(s, Did.parse("test:day"))
        assert (day.kind, day.open, day.size, day.files) == ("dataset", True, 7, 2)


def test_what_nobody_read_waits_for_a_worker_to_verify_it_in_place(world: Database) -> None:
    with world.write() as s:
        answer = register(s, new("a"), new("b"), evidence="declared")
        assert answer == wire.Registered(files=2, new=2, attached=0, to_verify=2)
        assert s.wake == {"site.DESY"}
        assert [(r.state, r.evidence, r.verified_at) for r in located(s, "test:a")] == [("copying", "declared", None)]
        for transfer in transfers_of(s):
            assert transfer.state is TransferState.QUEUED and transfer.not_before is None
            assert (transfer.size_bytes, transfer.activity) == (7, "verification")
        assert endpoints.get(s, "desy-1").used_bytes == 14


@pytest.mark.parametrize("evidence", ["hashed", "declared"])
def test_a_repeated_registration_changes_nothing(world: Database, evidence: str) -> None:
    with world.write() as s:
        register(s, new("a"), new("b"), into="test:day", evidence=evidence)
    with world.write() as s:
        again = register(s, new("b"), new("a"), into="test:day", evidence=evidence)
        assert again == wire.Registered(files=2, new=0, attached=0, to_verify=2 if evidence == "declared" else 0)
        assert len(transfers_of(s)) == (2 if evidence == "declared" else 0)
        assert endpoints.get(s, "desy-1").used_bytes == 14


def test_a_second_endpoint_is_a_second_replica_of_the_same_file(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"))
        assert register(s, new("a"), at="gsi-1").new == 0
        assert [(r.endpoint, r.state) for r in located(s, "test:a")] == [
            ("desy-1", "available"),
            ("gsi-1", "available"),
        ]


def test_a_declaration_does_not_take_back_what_was_proven(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"))
        assert register(s, new("a"), evidence="declared").to_verify == 0
        assert [r.state for r in located(s, "test:a")] == ["available"]


def test_hashing_later_makes_a_declared_replica_available(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"), evidence="declared")
        assert register(s, new("a")).to_verify == 0
        assert [(r.state, r.evidence) for r in located(s, "test:a")] == [("available", "hashed")]
        assert endpoints.get(s, "desy-1").used_bytes == 7


def test_what_is_bad_is_read_by_its_own_site_whatever_who_registers_it_says(world: Database) -> None:
    bad = sa.update(tables.replicas).values(state=ReplicaState.BAD)
    with world.write() as s:
        register(s, new("a"), new("b"))
        s.execute(bad)
        assert register(s, new("a")).to_verify == 1
        assert register(s, new("b"), evidence="declared").to_verify == 1
        assert located(s, "test:a")[0].state == located(s, "test:b")[0].state == "copying"


def test_what_is_being_deleted_cannot_be_registered(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"))
        s.execute(sa.update(tables.replicas).values(state=ReplicaState.DELETING))
        with pytest.raises(Refused, match="test:a is being deleted at desy-1"):
            register(s, new("a"))


def test_bytes_that_lay_there_already_do_not_reduce_what_the_storage_said_is_free(world: Database) -> None:
    with world.write() as s:
        endpoints.report_space(s, sites.site_id(s, "DESY"), "desy-1", 1_000)
        register(s, new("a", size=300))
        assert endpoints.get(s, "desy-1").free_bytes == 1_000


def test_a_path_is_kept_only_where_the_layout_does_not_give_it(world: Database) -> None:
    with world.write() as s:
        register(s, new("a", path="elsewhere/x.h5"), new("b", path="test/b"))
        assert [r.path for r in (*located(s, "test:a"), *located(s, "test:b"))] == ["elsewhere/x.h5", "test/b"]
        assert s.execute(sa.select(tables.replicas.c.path)).scalars().all() == ["elsewhere/x.h5", None]
        with pytest.raises(
            AlreadyExists, match=r"test:a is known at desy-1 under the path 'elsewhere/x.h5', not the path 'y'"
        ):
            register(s, new("a", path="y"))


@pytest.mark.parametrize(
    ("layout", "known_path", "path"),
    [
        ("identity", "elsewhere/x", "elsewhere/x"),
        ("identity", None, "test/known/k"),
        ("hash", "elsewhere/x", "elsewhere/x"),
        ("hash", None, "test/b8/69/known/k"),
    ],
)
def test_two_files_never_share_a_path(world: Database, layout: str, known_path: str | None, path: str) -> None:
    """Deleting one of them would take the other's bytes."""
    with world.write() as s:
        url = "memory://shared"
        endpoints.add(s, wire.NewEndpoint(name="shared", site="GSI", url=url, layout=layout))  # type: ignore[arg-type]
        register(s, new("known/k", path=known_path), at="shared")
        [known] = located(s, "test:known/k")
        assert known.path == path
    taken = "at shared is the file test:known/k, it cannot be test:other"
    with pytest.raises(AlreadyExists, match=taken), world.write() as s:
        register(s, new("fine"), new("other", path=path), at="shared")
    with world.write() as s:
        register(s, new("other", path=path))  # at another endpoint it is another file
        register(s, new("known/k", path=path), at="shared")  # and there it is what it was
        register(s, new("free", path="no/such/path"), new("more", path="x"), at="shared")


def test_a_file_does_not_come_to_lie_under_the_path_that_another_was_given(world: Database) -> None:
    """Verifying it there would find "wrong" bytes and move the other's away."""
    with world.write() as s:
        register(s, new("a", path="test/b"))
    taken = "'test/b' at desy-1 is the file test:a, it cannot be test:b as well"
    for evidence in ("hashed", "declared"):
        with pytest.raises(AlreadyExists, match=taken), world.write() as s:
            register(s, new("fine"), new("b"), evidence=evidence)
    with pytest.raises(AlreadyExists, match="'test/d' at desy-1 is the file test:c"), world.write() as s:
        register(s, new("c", path="test/d"), new("d"))
    with world.write() as s:
        register(s, new("b"), at="desy-2")


def test_names_that_rucio_would_put_under_one_path_are_not_both_taken(world: Database) -> None:
    with world.write() as s:
        for scope in ("user.08", "user"):
            scopes.add(s, ROOT, wire.NewScope(name=scope))
        endpoints.add(s, wire.NewEndpoint(name="rucio", site="GSI", url="memory://rucio", layout="hash"))
        one = wire.NewReplica(did="user.08:n559", size=7, checksums={"xxh3_128": XXH3})
        other = wire.NewReplica(did="user:6d/n559", size=8, checksums={"xxh3_128": XXH3[::-1]})
    with pytest.raises(AlreadyExists, match="as well"), world.write() as s:
        register(s, one, other, at="rucio")
    with world.write() as s:
        register(s, one, at="rucio")
    with pytest.raises(AlreadyExists, match=r"is the file user\.08:n559, it cannot"), world.write() as s:
        register(s, other, at="rucio")
    with world.write() as s:
        register(s, one, at="rucio")


# --- checksums that meet --------------------------------------------------------------------------------------------


def test_another_size_or_checksum_of_a_known_file_is_refused_with_both_values(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"), new("b"), new("c"))
    with pytest.raises(AlreadyExists) as refusal, world.write() as s:
        register(s, new("x"), new("a", size=8), new("b", xxh3_128=XXH3[::-1]), new("c"), at="gsi-1", into="test:day")
    assert "test:a is known with size 7, not 8 (and 1 more like it)" in refusal.value.message
    assert refusal.value.items == [
        {"did": "test:a", "field": "size", "known": 7, "given": 8},
        {"did": "test:b", "field": "xxh3_128", "known": XXH3, "given": XXH3[::-1]},
    ]
    with world.read() as s:  # nothing half done
        with pytest.raises(NotFound):
            dids.get(s, Did.parse("test:x"))
        with pytest.raises(NotFound):
            dids.get(s, Did.parse("test:day"))
        assert endpoints.get(s, "gsi-1").used_bytes == 0


def test_at_most_a_hundred_conflicts_are_listed(world: Database) -> None:
    with world.write() as s:
        register(s, *(new(f"f{i}") for i in range(150)))
        with pytest.raises(AlreadyExists, match="and 149 more") as refusal:
            register(s, *(new(f"f{i}", size=9) for i in range(150)))
        assert len(refusal.value.items) == 100


def test_a_checksum_is_learned_from_who_read_the_bytes_and_agrees_in_another(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"))
        register(s, new("a", md5=MD5, xxh3_128=XXH3), at="gsi-1")
        assert dids.get(s, Did.parse("test:a")).checksums == {"xxh3_128": XXH3, "md5": MD5}
        with pytest.raises(AlreadyExists, match="known with md5"):
            register(s, new("a", md5=MD5[::-1]))


def test_a_declared_checksum_is_not_learned(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"))
        register(s, new("a", md5=MD5, xxh3_128=XXH3), at="gsi-1", evidence="declared")
        assert dids.get(s, Did.parse("test:a")).checksums == {"xxh3_128": XXH3}


def test_without_a_common_checksum_nothing_is_proven_so_a_worker_looks(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"))
        assert register(s, new("a", md5=MD5), at="gsi-1").to_verify == 1
        assert dids.get(s, Did.parse("test:a")).checksums == {"xxh3_128": XXH3}
        assert [r.state for r in located(s, "test:a")] == ["available", "copying"]


def test_leading_zeros_and_case_of_a_checksum_do_not_matter(world: Database) -> None:
    with world.write() as s:
        register(s, new("a", adler32="00AB12cd"))
        assert register(s, new("a", adler32="ab12cd"), at="gsi-1").to_verify == 0


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "options", "error", "message"),
    [
        ([new("a")], {"at": "nowhere"}, NotFound, "no endpoint 'nowhere'"),
        ([new("a")], {"at": "no\0where"}, Invalid, "is not a name for an endpoint"),
        ([wire.NewReplica(did="other:a", size=1, checksums={"md5": MD5})], {}, NotFound, "no scope other"),
        ([wire.NewReplica(did="test", size=1, checksums={"md5": MD5})], {}, Invalid, "is not a DID"),
        ([new("a/../b")], {}, Invalid, "has the segment '..'"),
        ([new("x" * 10_000)], {}, Invalid, "has 10000 characters"),
        ([new("a\0b")], {}, Invalid, r"U\+0000"),
        ([new("a\ud800")], {}, Invalid, r"U\+D800"),
        ([new("a", crc32c="01234567")], {}, Invalid, "test:a: no checksum to verify it by"),
        ([new("a", md5="zz")], {}, Invalid, "test:a: 'zz' is not a value of md5"),
        ([new("a", rot13="zz")], {}, Invalid, "test:a: unknown checksum algorithm 'rot13'"),
        ([new("a", path="../b")], {}, Invalid, "test:a: the path '../b' has the segment '..'"),
        ([new("a", path="/etc/passwd")], {}, Invalid, "is absolute"),
        ([new("a", path="b\0c")], {}, Invalid, "holds a NUL"),
        ([new("a", path="b//c")], {}, Invalid, "has the segment ''"),
        ([new("a", path=".replica/parts/x")], {}, Invalid, "begins with '.replica'"),
        ([new("a"), new("a", size=8)], {}, Invalid, "test:a is given twice"),
        ([new("a", path="p"), new("b", path="p")], {}, Invalid, "are given the same path 'p'"),
        ([new("a")], {"into": "test:a"}, Invalid, "test:a cannot be a file and the dataset"),
        ([new("a")], {"into": "test:box"}, Invalid, "test:box is a container"),
        ([new("a")], {"into": "test:known"}, Invalid, "test:known is a file"),
        ([new("a")], {"into": "test:closed"}, Refused, "the dataset test:closed is closed"),
        ([new("closed")], {}, Invalid, "test:closed is a dataset, not a file"),
    ],
)
def test_what_cannot_be_right_is_told_and_leaves_no_trace(
    world: Database, files: list[wire.NewReplica], options: dict[str, str], error: type[Exception], message: str
) -> None:
    with world.write() as s:
        register(s, new("known"))
        dids.add(s, ROOT, wire.NewDid(did="test:box", kind="container"))
        dids.add(s, ROOT, wire.NewDid(did="test:closed"))
        dids.change(s, Did.parse("test:closed"), wire.DidChange(open=False))
    counted = [sa.select(sa.func.count()).select_from(table) for table in tables.metadata.sorted_tables]
    with world.read() as s:
        before = [s.execute(count).scalar_one() for count in counted]
    with pytest.raises(error, match=message), world.write() as s:
        register(s, new("fine"), *files, **options)
    with world.read() as s:
        assert before == [s.execute(count).scalar_one() for count in counted]


def test_the_same_file_twice_in_one_call_is_one(world: Database) -> None:
    with world.write() as s:
        assert register(s, new("a"), new("a"), new("b")).files == 2


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", ["hashed", "declared"])
def test_two_thousand_files_take_as_many_statements_as_ten(
    world: Database, count_statements: COUNT, evidence: str
) -> None:
    def cost(prefix: str, n: int) -> list[int]:
        files = [new(f"{prefix}/{i}", xxh3_128=XXH3) for i in range(n)]
        costs = []
        # New ones; the same again; then half of them known elsewhere, half new, and each with one checksum more.
        again = [new(f"{prefix}/{i}", xxh3_128=XXH3, md5=MD5) for i in range(n // 2, n + n // 2)]
        for batch, at in ((files, "desy-1"), (files, "desy-1"), (again, "gsi-1")):
            with count_statements(world) as statements, world.write() as s:
                register(s, *batch, at=at, into=f"test:{prefix}-set", evidence=evidence)
            costs.append(statements.count)
        return costs

    few, many = cost("few", 10), cost("many", 2_000)
    assert few == many
    with world.read() as s:
        # Two of them: whether something is being moved to quarantine there, and whether there are routes.
        assert s.postgresql is False or (max(many) <= 39 and many[0] <= 25)


def test_a_page_of_replicas_costs_the_same_in_a_small_and_in_a_large_dataset(
    world: Database, count_statements: COUNT
) -> None:
    with world.write() as s:
        register(s, *(new(f"f{i}") for i in range(5)), into="test:small")
        register(s, *(new(f"g{i}") for i in range(500)), into="test:large")
    costs = set()
    for name in ("small", "large"):
        with world.read() as s, count_statements(world) as statements:
            assert len(replicas.locate(s, Did.parse(f"test:{name}"), None, 1_000).items) in (5, 500)
        costs.add(statements.count)
    assert costs == {4}


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_container_shows_each_replica_once_even_of_a_file_in_two_of_its_datasets(world: Database) -> None:
    with world.write() as s:
        register(s, new("a"), new("b"), into="test:d1")
        register(s, new("b"), new("c"), into="test:d2", at="gsi-1")
        for name in ("inner", "outer"):
            dids.add(s, ROOT, wire.NewDid(did=f"test:{name}", kind="container"))
        dids.attach(s, Did.parse("test:inner"), [Did.parse("test:d1"), Did.parse("test:d2")])
        dids.attach(s, Did.parse("test:outer"), [Did.parse("test:inner"), Did.parse("test:d2")])
        shown = [(r.did, r.endpoint) for r in located(s, "test:outer")]
        assert sorted(shown) == [("test:a", "desy-1"), ("test:b", "desy-1"), ("test:b", "gsi-1"), ("test:c", "gsi-1")]


def test_nothing_found_is_an_empty_page_and_nothing_named_so_is_an_error(world: Database) -> None:
    with world.write() as s:
        dids.add(s, ROOT, wire.NewDid(did="test:empty"))
        assert located(s, "test:empty") == []
        with pytest.raises(NotFound, match="no DID test:nothing"):
            replicas.locate(s, Did.parse("test:nothing"), None, 10)
        with pytest.raises(NotFound):
            replicas.stream(s, Did.parse("test:nothing"))


# --- many at once ---------------------------------------------------------------------------------------------------


def test_registrations_of_overlapping_files_at_once_all_succeed(world: Database) -> None:
    """Eight writers, the same new files in different order, to two endpoints and two datasets: neither deadlock nor
    double."""
    names = [f"f{i}" for i in range(300)]
    rounds = [names[start : start + 200] for start in (0, 40, 80)]

    def work(number: int) -> int:
        made = 0
        for chosen in rounds:
            with world.write() as s:
                made += register(
                    s,
                    *(new(name) for name in (chosen if number % 2 else reversed(chosen))),
                    at=("desy-1", "gsi-1")[number % 2],
                    into=f"test:set{number // 2 % 2}",
                    evidence=("hashed", "declared")[number // 4],
                ).new
        return made

    outcomes = at_once(*(lambda number=number: work(number) for number in range(8)))
    assert [outcome for outcome in outcomes if not isinstance(outcome, int)] == []
    assert sum(outcomes) == 280  # type: ignore[arg-type]
    with world.read() as s:
        assert len(located(s, "test:set0")) == 2 * 280
        for name in ("desy-1", "gsi-1"):
            assert endpoints.get(s, name).used_bytes == 7 * 280


def test_two_contents_of_one_new_name_at_once_leave_one(world: Database) -> None:
    def work(size: int) -> wire.Registered:
        with world.write() as s:
            return register(s, *(new(f"f{i}", size=size) for i in range(200)))

    outcomes = at_once(lambda: work(1), lambda: work(2))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyExists", "Registered"]
    with world.read() as s:
        assert len(s.execute(sa.select(tables.files.c.size_bytes).distinct()).all()) == 1
        assert len(s.execute(sa.select(tables.replicas)).all()) == 200


def test_registrations_at_once_into_datasets_under_rules_keep_every_counter_true(world: Database) -> None:
    """The two datasets have their copies at the same two endpoints, so everybody wants the same rows."""
    with world.write() as s:
        for name in ("set0", "set1"):
            dids.add(s, ROOT, wire.NewDid(did=f"test:{name}"))
            rules.add(s, ROOT, wire.NewRule(did=f"test:{name}", expression="desy-1|gsi-1", copies=2))
        while rules.evaluate_due(s):
            pass

    def work(number: int) -> int:
        for round_ in range(4):
            files = [new(f"{number // 2}-{round_}-{i}") for i in range(50)]
            with world.write() as s:
                register(s, *files, at=("desy-1", "gsi-1")[number % 2], into=f"test:set{(number + round_) // 2 % 2}")
        return 1

    outcomes = at_once(*(lambda number=number: work(number) for number in range(8)))
    assert outcomes == [1] * 8
    with world.write() as s:
        while rules.evaluate_due(s):
            pass
        contents, lock = tables.contents, tables.locks
        there = (
            sa.select(sa.func.count())
            .select_from(contents)
            .join(tables.replicas, tables.replicas.c.file_id == contents.c.child_id)
            .where(
                contents.c.parent_id == lock.c.unit_id,
                tables.replicas.c.endpoint_id == lock.c.endpoint_id,
                tables.replicas.c.state == ReplicaState.AVAILABLE,
            )
        ).scalar_subquery()
        held = sa.select(sa.func.count()).where(contents.c.parent_id == lock.c.unit_id).scalar_subquery()
        rows = s.execute(sa.select(lock.c.files_total, held, lock.c.files_available, there)).all()
        assert len(rows) == 4
        assert all(total == counted and available == found for total, counted, available, found in rows)
        assert {rule.state for rule in rules.list_page(s).items} == {"ok"}
        live = s.execute(sa.select(tables.transfers.c.state)).scalars().all()
        assert set(live) <= {TransferState.DONE, TransferState.CANCELLED}
