import json
from pathlib import Path

import sqlalchemy as sa

from replica.catalog import fsck
from replica.db import schema
from replica.db.engine import Database
from tests.replica.catalog.world import World
from tests.replica.cli.conftest import Typed


def made(tmp_path: Path) -> World:
    database = Database(f"sqlite:///{tmp_path}/replica.db")
    schema.migrate(database)
    world = World(database)
    world.three()
    world.files(3, "DESY-DISK", world.collection("d"))
    world.rule("t:d", "DESY-DISK")
    return world


def damage(world: World) -> None:
    with world.db.write() as s:
        s.execute(sa.text("UPDATE endpoints SET used_bytes = 7"))


def test_a_clean_database_is_0_a_wrong_one_1_and_a_repaired_one_0_again(alone: Typed, tmp_path: Path):
    world = made(tmp_path)
    alone.environment = {"REPLICA_DATABASE_URL": str(world.db.url)}
    assert f"{len(fsck.INVARIANTS)} invariants checked" in alone("fsck").stdout
    damage(world)
    found = alone("fsck", code=1).stdout
    assert found.startswith("WRONG 3 times  endpoint-used: used_bytes of an endpoint is the sum")
    assert "       HZDR-DISK counts 7 bytes, its replicas have 0" in found
    assert "1 invariant checked" in alone("fsck", "--only", "usage").stdout
    assert "3 times, 3 repaired" in alone("fsck", "--repair", "counters").stdout
    assert "nothing is wrong" in alone("fsck").stdout
    world.db.close()


def test_the_database_of_up_is_found_in_its_folder(alone: Typed, tmp_path: Path):
    made(tmp_path).db.close()
    assert "nothing is wrong" in alone("fsck", "--dir", tmp_path).stdout


def test_json_has_every_invariant_and_the_facts(alone: Typed, tmp_path: Path):
    world = made(tmp_path)
    damage(world)
    alone.environment = {"REPLICA_DATABASE_URL": str(world.db.url)}
    findings = json.loads(alone("fsck", "-o", "json", code=1).stdout)["findings"]
    assert [finding["invariant"] for finding in findings] == [invariant.name for invariant in fsck.INVARIANTS]
    (wrong,) = [finding for finding in findings if finding["violations"]]
    assert wrong["examples"][0]["facts"]["endpoint"] == "HZDR-DISK"
    world.db.close()


def test_the_promises_are_listed_without_a_database(alone: Typed):
    listed = json.loads(alone("fsck", "--list", "-o", "json").stdout)
    assert {"name": "usage", "promise": next(i.promise for i in fsck.INVARIANTS if i.name == "usage")} in listed


def test_no_database_and_unknown_names_are_errors(alone: Typed, tmp_path: Path):
    assert "REPLICA_DATABASE_URL" in alone.error("fsck", code=1)
    alone.environment = {"REPLICA_DATABASE_URL": f"sqlite:///{tmp_path}/nothing.db"}
    assert "no database file" in alone.error("fsck", code=1)
    assert not (tmp_path / "nothing.db").exists()
    assert "there is no invariant 'x'" in alone.error("fsck", "--only", "x", code=1)
