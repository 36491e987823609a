"""Deleting DIDs, having them back, lifetimes, and what is given up when there is no way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import did_deletion, dids, replicas, rules
from replica.db import tables
from replica.db.engine import Database
from replica.db.tables import EPOCH
from rules.deletion import UNDELETE_SECONDS
from rules.errors import AlreadyExists, NotFound, Refused
from rules.names import Did
from tests.conftest import HandClock
from tests.replica.catalog.world import ROOT, World

D, C = "t:d", "t:c"


@pytest.fixture
def w(db: Database, clock: HandClock) -> World:
    """The dataset d with three files at DESY-DISK, in the container c."""
    world = World(db)
    world.three()
    world.collection("c", "container")
    world.register(["t:f1", "t:f2", "t:f3"], "DESY-DISK", D)
    world.attach(C, D)
    return world


def names(*texts: str) -> list[Did]:
    return [Did.parse(text) for text in texts]


def delete(w: World, *texts: str) -> int:
    with w.db.write() as s:
        return did_deletion.delete(s, names(*texts), ROOT).deleted


def undelete(w: World, *texts: str) -> int:
    with w.db.write() as s:
        return did_deletion.undelete(s, names(*texts), ROOT).undeleted


def passes(w: World) -> int:
    """What the pass does until nothing is left; returns how many steps that were."""
    for step in range(100):
        with w.db.write() as s:
            done = did_deletion.expire_due(s) or did_deletion.finish_due(s)
        if not done:
            return step
    raise AssertionError("it does not come to an end")


def listed(w: World, **options: Any) -> list[str]:
    with w.db.read() as s:
        return [found.did for found in dids.list_page(s, **options).items]


def final(clock: HandClock) -> None:
    clock.turn(seconds=UNDELETE_SECONDS)


# --- deleted and had back -------------------------------------------------------------------------------------------


def test_what_is_deleted_is_found_nowhere_and_its_name_stays_taken(w: World) -> None:
    assert delete(w, D, "t:f1") == 2
    assert delete(w, D, "t:f1") == 0
    assert listed(w) == [C, "t:f2", "t:f3"]
    assert listed(w, deleted=True) == [D, "t:f1"]
    with w.db.write() as s:
        for ask in (
            lambda: dids.get(s, Did.parse(D)),
            lambda: dids.contents(s, Did.parse(D), None, 10),
            lambda: dids.change(s, Did.parse(D), wire.DidChange(open=False)),
            lambda: dids.attach(s, Did.parse(D), names("t:f2")),
            lambda: dids.attach(s, Did.parse(C), names(D)),
            lambda: replicas.locate(s, Did.parse("t:f1"), None, 10),
            lambda: rules.add(s, ROOT, wire.NewRule(did=D, expression="*")),
        ):
            with pytest.raises(NotFound) as refusal:
                ask()
            assert "replica did undelete t:" in refusal.value.hint or refusal.value.items
        with pytest.raises(AlreadyExists, match="t:d was deleted, and its name stays taken") as taken:
            dids.add(s, ROOT, wire.NewDid(did=D))
        assert "replica did undelete t:d" in taken.value.hint
        assert dids.get(s, Did.parse(D), deleted=True).deleted_at == s.now
        assert dids.contents(s, Did.parse(C), None, 10).items == []
    with pytest.raises(AlreadyExists, match="t:f1 was deleted") as taken:
        w.register(["t:f1"], "HZDR-DISK")
    assert "replica did undelete t:f1" in taken.value.hint
    with pytest.raises(NotFound, match="t:d was deleted"):
        w.register(["t:f9"], "HZDR-DISK", D)
    assert undelete(w, D, "t:f1", "t:f2") == 2
    assert undelete(w, D) == 0
    assert set(listed(w)) == {C, "t:f1", "t:f2", "t:f3", D}
    with w.db.read() as s:
        assert [child.did for child in dids.contents(s, Did.parse(D), None, 10).items] == ["t:f1", "t:f2", "t:f3"]


def test_a_deleted_file_of_a_dataset_is_not_located_on_any_page(w: World) -> None:
    delete(w, "t:f2")
    for limit in (1, 2, 10):
        with w.db.read() as s:
            found, cursor = [], None
            while True:
                page = replicas.locate(s, Did.parse(D), cursor, limit)
                found += [replica.did for replica in page.items]
                cursor = page.next
                if cursor is None:
                    break
            assert found == ["t:f1", "t:f3"] == [replica.did for replica in replicas.stream(s, Did.parse(D))]
            assert [child.did for child in dids.contents(s, Did.parse(D), None, 10).items] == ["t:f1", "t:f3"]


@pytest.mark.parametrize("how", ["monotonic", "closed"])
def test_what_a_fixed_collection_holds_is_not_deleted_before_it(w: World, how: str) -> None:
    change = wire.DidChange(monotonic=True) if how == "monotonic" else wire.DidChange(open=False)
    with w.db.write() as s:
        dids.change(s, Did.parse(D), change)
    with pytest.raises(Refused, match=rf"t:f1 is in the {how} dataset t:d \(and 1 more like it\)") as refusal:
        delete(w, "t:f1", "t:f2", C)
    assert [item["did"] for item in refusal.value.items] == ["t:f1", "t:f2"]
    assert listed(w, deleted=True) == []
    assert delete(w, D, "t:f1") == 2
    assert delete(w, "t:f2") == 1
    with pytest.raises(Refused, match=r"t:d holds t:f[12], which was deleted as well"):
        undelete(w, D)
    assert undelete(w, D, "t:f1", "t:f2") == 3
    assert listed(w, deleted=True) == []


def test_nothing_is_taken_out_of_what_is_monotonic_and_it_stays_so(w: World) -> None:
    with w.db.write() as s:
        assert dids.add(s, ROOT, wire.NewDid(did="t:m", monotonic=True)).monotonic
        assert dids.change(s, Did.parse(D), wire.DidChange(monotonic=True)).monotonic
        for text in (D, "t:m"):
            with pytest.raises(Refused, match=f"{text} is monotonic, and stays so"):
                dids.change(s, Did.parse(text), wire.DidChange(monotonic=False))
            assert dids.change(s, Did.parse(text), wire.DidChange(monotonic=True)).monotonic
        dids.attach(s, Did.parse("t:m"), names("t:f1"))
    for parent in (D, "t:m"):
        with pytest.raises(Refused, match=f"{parent} is monotonic: nothing is ever taken out of it"):
            w.detach(parent, "t:f1")
    with w.db.write() as s:
        assert dids.change(s, Did.parse(C), wire.DidChange(monotonic=False)).monotonic is False


# --- no way back ----------------------------------------------------------------------------------------------------


def copies(w: World) -> dict[tuple[str, str], Any]:
    query = (
        sa.select(tables.dids.c.name, tables.endpoints.c.name, tables.replicas.c.tombstone_at)
        .join_from(tables.replicas, tables.dids, tables.dids.c.id == tables.replicas.c.file_id)
        .join(tables.endpoints, tables.endpoints.c.id == tables.replicas.c.endpoint_id)
    )
    with w.db.read() as s:
        return {(name, endpoint): tombstone for name, endpoint, tombstone in s.execute(query)}


def test_rules_protect_until_there_is_no_way_back_and_then_end(w: World, clock: HandClock) -> None:
    rule = w.rule(D, "HZDR-DISK")
    above = w.rule(C, "GSI-DISK")
    single = w.rule("t:f1", "DESY-DISK")
    w.move()
    delete(w, D, "t:f1")
    clock.turn(seconds=UNDELETE_SECONDS - 1)
    assert passes(w) == 0
    assert {w.show(each).state for each in (rule, above, single)} == {"ok"}
    assert [tombstone for tombstone in copies(w).values() if tombstone is not None] == []
    w.check()
    clock.turn(seconds=1)
    assert passes(w) > 0
    assert (w.show(rule).state, w.show(single).state, w.show(above).state) == ("expired", "expired", "ok")
    assert w.show(above).files_total == 0
    tombstones = copies(w)
    assert {key for key, tombstone in tombstones.items() if tombstone == EPOCH} == {
        ("f1", endpoint) for endpoint in ("DESY-DISK", "HZDR-DISK", "GSI-DISK")
    }
    assert tombstones["f2", "GSI-DISK"] not in (None, EPOCH)
    w.check()
    for text in (D, "t:f1"):
        with pytest.raises(Refused, match=f"{text} is gone for good"):
            undelete(w, text)
        with pytest.raises(AlreadyExists, match="its name stays taken") as taken, w.db.write() as s:
            dids.add(s, ROOT, wire.NewDid(did=text))
        assert "gone for good" in taken.value.hint
    # A deleted collection keeps what it held, and says so to who asks for its history.
    with w.db.read() as s:
        kinds = [entry.kind for entry in dids.history_page(s, Did.parse(D), None, 100).items]
    assert kinds[0] == "did.created" and "did.deleted" in kinds
    held = sa.select(sa.func.count()).select_from(tables.contents).where(tables.contents.c.parent_id == id_of(w, D))
    with w.db.read() as s:
        assert s.execute(held).scalar_one() == 3


def id_of(w: World, text: str) -> int:
    with w.db.read() as s:
        return dids.row_id(s, Did.parse(text), deleted=True)[0]


def test_a_file_that_is_gone_leaves_datasets_that_stay_and_is_not_missed(w: World, clock: HandClock) -> None:
    rule = w.rule(C, "HZDR-DISK|GSI-DISK", copies=2, spread="site")
    w.move()
    delete(w, "t:f1", "t:f3")
    final(clock)
    passes(w)
    shown = w.show(rule)
    assert (shown.state, shown.files_total) == ("ok", 1)
    with w.db.read() as s:
        assert dids.get(s, Did.parse(D)).files == 1
    assert {name for (name, _), tombstone in copies(w).items() if tombstone == EPOCH} == {"f1", "f3"}
    w.check()


def test_what_was_had_back_in_time_keeps_everything(w: World, clock: HandClock) -> None:
    rule = w.rule(D, "HZDR-DISK")
    w.move()
    delete(w, D, "t:f1", C)
    clock.turn(seconds=UNDELETE_SECONDS - 1)
    passes(w)
    undelete(w, D, "t:f1")
    final(clock)
    passes(w)
    assert w.show(rule).state == "ok" and w.show(rule).files_total == 3
    assert listed(w, deleted=True) == [C]
    w.check()


def test_a_pass_that_comes_late_lets_undelete_win(w: World, clock: HandClock) -> None:
    delete(w, "t:f1")
    clock.turn(days=365)
    assert undelete(w, "t:f1") == 1
    assert passes(w) == 0
    assert copies(w)["f1", "DESY-DISK"] is None


# --- lifetimes ------------------------------------------------------------------------------------------------------


def test_a_lifetime_that_is_over_deletes_as_a_person_would(w: World, clock: HandClock) -> None:
    with w.db.write() as s:
        assert dids.add(s, ROOT, wire.NewDid(did="t:short", lifetime_seconds=60)).expires_at is not None
        dids.change(s, Did.parse("t:f1"), wire.DidChange(lifetime_seconds=60))
        dids.change(s, Did.parse("t:f2"), wire.DidChange(lifetime_seconds=60))
        assert dids.change(s, Did.parse("t:f2"), wire.DidChange(lifetime_seconds=None)).expires_at is None
    clock.turn(seconds=59)
    passes(w)
    assert listed(w, deleted=True) == []
    clock.turn(seconds=1)
    passes(w)
    assert sorted(listed(w, deleted=True)) == ["t:f1", "t:short"]
    undelete(w, "t:short")
    assert passes(w) == 0
    with w.db.read() as s:
        assert dids.get(s, Did.parse("t:short")).expires_at is None
        kinds = [entry.kind for entry in dids.history_page(s, Did.parse("t:short"), None, 100).items]
    assert kinds == ["did.created", "did.expired", "did.undeleted"]
    final(clock)
    passes(w)
    assert copies(w)["f1", "DESY-DISK"] == EPOCH
    w.check()


def test_a_lifetime_waits_for_a_collection_whose_content_is_fixed(w: World, clock: HandClock) -> None:
    with w.db.write() as s:
        dids.change(s, Did.parse("t:f1"), wire.DidChange(lifetime_seconds=60))
        dids.change(s, Did.parse(D), wire.DidChange(open=False))
    clock.turn(seconds=60)
    assert passes(w) == 1
    assert listed(w, deleted=True) == []
    with w.db.write() as s:
        dids.change(s, Did.parse(D), wire.DidChange(open=True))
    clock.turn(days=1)
    passes(w)
    assert listed(w, deleted=True) == ["t:f1"]


# --- cost and history -----------------------------------------------------------------------------------------------


def test_deleting_thousands_takes_as_many_statements_as_a_few(
    w: World, clock: HandClock, count_statements: Callable[[Database], AbstractContextManager[Any]]
) -> None:
    many = [f"t:g{i}" for i in range(900)]
    w.register(many, "DESY-DISK", "t:big")
    costs = []
    for some in (many[:5], many[5:]):
        with count_statements(w.db) as statements:
            assert delete(w, *some) == len(some)
            final(clock)
            passes(w)
        costs.append(statements.count)
    assert costs[0] == costs[1] <= 150
    assert sum(tombstone == EPOCH for tombstone in copies(w).values()) == 900


def test_the_history_tells_who_did_what(w: World) -> None:
    with w.db.write() as s:
        dids.change(s, Did.parse(D), wire.DidChange(open=False), ROOT)
        dids.change(s, Did.parse(D), wire.DidChange(open=True), ROOT)
        dids.detach(s, Did.parse(D), names("t:f1"), ROOT)
        dids.attach(s, Did.parse(D), names("t:f1", "t:f2"), ROOT)
    delete(w, D)
    undelete(w, D)
    with w.db.read() as s:
        entries = dids.history_page(s, Did.parse(D), None, 100).items
        page = dids.history_page(s, Did.parse(D), None, 2)
        assert [entry.version for entry in dids.history_page(s, Did.parse(D), page.next, 2).items] == [3, 4]
    told = [(entry.kind, entry.account) for entry in entries if entry.kind != "did.attached" or entry.account]
    assert told[-6:] == [
        (f"did.{what}", "root") for what in ("closed", "reopened", "detached", "attached", "deleted", "undeleted")
    ]
    assert entries[0].kind == "did.created"
    assert [entry.version for entry in entries] == list(range(1, len(entries) + 1))
    attached = next(entry for entry in reversed(entries) if entry.kind == "did.attached")
    assert attached.payload["attached"] == 1


def test_several_parents_are_filled_at_once_or_none(w: World) -> None:
    w.collection("d2")
    w.collection("c2", "container")
    with w.db.write() as s:
        every = [
            wire.Attaching(parent="t:c2", children=["t:c", "t:d2"]),
            wire.Attaching(parent="t:d2", children=["t:f1", "t:f2", "t:f1"]),
            wire.Attaching(parent="t:d2", children=["t:f3"]),
        ]
        assert dids.attach_all(s, every, ROOT).attached == 5
        assert dids.attach_all(s, every, ROOT).attached == 0
    rule = w.rule("t:c2", "HZDR-DISK")
    w.collection("d3")
    with pytest.raises(Refused, match="t:c would contain itself"), w.db.write() as s:
        loop = [
            wire.Attaching(parent="t:d3", children=["t:f1"]),
            wire.Attaching(parent="t:c", children=["t:c2"]),
        ]
        dids.attach_all(s, loop, ROOT)
    with w.db.write() as s:
        assert dids.get(s, Did.parse("t:d3")).files == 0
        late = [
            wire.Attaching(parent="t:d3", children=["t:f1"]),
            wire.Attaching(parent="t:c", children=["t:d3"]),
        ]
        dids.attach_all(s, late, ROOT)
    w.move()
    assert w.show(rule).state == "ok"
    with w.db.read() as s:
        assert dids.get(s, Did.parse("t:c2")).files == 3  # each once, though it is in several
    w.check()
