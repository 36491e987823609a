"""What a Rucio wrote down, brought over to a running service; and what is said of the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from replica.client import rucio_documents as documents
from replica.client.rucio_import import RucioImport
from replica.db.engine import Database
from rules.errors import Invalid
from tests.service import Service, serving

NOW = datetime(2026, 11, 22, tzinfo=UTC)


def rse(scheme: str = "file", prefix: str = "/data/x/", **more: Any) -> dict[str, Any]:
    """As `GET /export` shows one, shortened to what matters."""
    protocol = {
        "scheme": scheme,
        "hostname": "storage.example.org",
        "port": 443,
        "prefix": prefix,
        "impl": "rucio.rse.protocols.gfal.Default",
        "domains": {"lan": {"read": 1, "write": 1, "delete": 1}, "wan": {"read": 1, "write": 1, "delete": 1}},
    }
    return {
        "id": "0123456789abcdef",
        "rse_type": "DISK",
        "deterministic": True,
        "volatile": False,
        "staging_area": False,
        "availability_read": True,
        "availability_write": True,
        "availability_delete": True,
        "lfn2pfn_algorithm": "hash",
        "protocols": [protocol],
        "attributes": {},
        **more,
    }


EXPORT = {
    "rses": {
        "DESY-DISK": rse(
            prefix="/data/desy", attributes={"DESY-DISK": True, "site": "DESY", "tier": 1, "fast": "True"}
        ),
        "HZDR_DISK": rse(
            prefix="/data/hzdr", country_name="DE", MinFreeSpace=5_000, availability_write=False, volatile=True
        ),
        "OLD": rse(prefix="/data/old", deterministic=False),
        "SRM-ONLY": rse("srm", "/pnfs/x"),
    },
    "distances": {"DESY-DISK": {"HZDR_DISK": {"distance": 3}, "NOWHERE": {"distance": 1}}},
    "accounts": [
        {"account": "jdoe", "account_type": "USER", "email": "jdoe@example.org", "identities": [{"identity": "CN=x"}]},
        {"account": "not a name", "account_type": "USER", "email": None, "identities": []},
    ],
    "config": {"judge": {}},
}


def replica_line(name: str, states: dict[str, str], **pfns: str) -> dict[str, Any]:
    rses = {rse: [pfns.get(rse, f"file:///data/{rse}/{name}")] for rse in states}
    return {
        "scope": "p1",
        "name": name,
        "bytes": 7,
        "adler32": "0a9d02b7",
        "md5": None,
        "rses": rses,
        "states": states,
    }


DUMP = [
    {
        "scope": "p1",
        "name": "raw",
        "type": "DATASET",
        "open": False,
        "account": "jdoe",
        "project": "laser",
        "length": 2,
    },
    {"scope": "p1", "name": "all", "type": "CONTAINER", "open": True, "monotonic": True},
    {"scope": "p1", "name": "/cms/like", "type": "CONTAINER", "open": True},
    {"scope": "p1", "name": "a", "type": "FILE", "bytes": 7},
    replica_line("a", {"DESY-DISK": "AVAILABLE", "OLD": "AVAILABLE"}, OLD="file:///data/old/some/where/a.h5"),
    replica_line("b", {"DESY-DISK": "AVAILABLE", "HZDR_DISK": "BAD", "GONE": "AVAILABLE"}),
    {"scope": "p1", "name": "c", "rse": "DESY-DISK", "bytes": 7, "adler32": "0a9d02b7", "state": "A"},
    {"scope": "p1", "name": "nosum", "rse": "DESY-DISK", "bytes": 7, "state": "A"},
    {"scope": "p1", "name": "raw", "child_scope": "p1", "child_name": "a"},
    {"scope": "p1", "name": "raw", "child_scope": "p1", "child_name": "b"},
    {"scope": "p1", "name": "raw", "child_scope": "p1", "child_name": "missing"},
    {"scope": "p1", "name": "all", "child_scope": "p1", "child_name": "raw"},
    {
        "id": "f00d",
        "scope": "p1",
        "name": "raw",
        "account": "jdoe",
        "copies": 1,
        "rse_expression": "DESY-DISK",
        "grouping": "DATASET",
        "priority": 4,
        "activity": "Data Consolidation",
        "expires_at": "2027-11-22T00:00:00",
        "locked": True,
        "state": "OK",
        "notification": "YES",
    },
    {"id": "beef", "scope": "p1", "name": "raw", "copies": 1, "rse_expression": "tier=9", "state": "STUCK"},
]


@pytest.fixture
def service(sqlite_url: str) -> Iterator[Service]:
    database = Database(sqlite_url)
    with serving(database) as running:
        yield running
    database.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    export, dump = tmp_path / "export.json", tmp_path / "dump.ndjson"
    export.write_text(json.dumps(EXPORT, indent=1))
    dump.write_text("".join(json.dumps(line) + "\n" for line in reversed(DUMP)) + "this is not JSON\n\n")
    return [dump, export]


def test_a_rucio_is_brought_over_and_again_changes_nothing(service, files):
    with service.client() as client:
        first = RucioImport(client).run(files)
        again = RucioImport(client).run(files)

        assert {e.name for e in client.endpoints.list()} == {"DESY-DISK", "HZDR_DISK", "OLD"}
        desy, hzdr = client.endpoints.show("DESY-DISK"), client.endpoints.show("HZDR_DISK")
        assert (desy.site, desy.url, desy.layout) == ("DESY", "file:///data/desy", "hash")
        assert desy.attributes == {"tier": 1, "fast": True}
        assert (hzdr.site, hzdr.writable, hzdr.attributes["country_name"]) == ("HZDR_DISK", False, "DE")

        raw = client.dids.show("p1:raw")
        assert (raw.kind, raw.open, raw.metadata) == ("dataset", False, {"project": "laser"})
        assert {d.did for d in client.dids.contents("p1:raw")} == {"p1:a", "p1:b"}
        assert [d.did for d in client.dids.contents("p1:all")] == ["p1:raw"]
        where = {(r.did, r.endpoint, r.path) for r in client.replicas.locate("p1:a")}
        assert ("p1:a", "OLD", "some/where/a.h5") in where
        assert {r.evidence for r in client.replicas.locate("p1:a")} == {"declared"}

        [rule] = client.rules.list(did="p1:raw")
        assert (rule.expression, rule.priority, rule.activity) == ("DESY-DISK", 4, "Data Consolidation")
        assert rule.expires_at is not None

    assert (first.taken["endpoint"], first.taken["replica"], first.taken["content"]) == (3, 4, 3)
    assert again.taken == first.taken
    said = "\n".join(f"{u.noun}: {u.reason} {u.examples}" for u in first.unmapped)
    assert [u.count for u in first.unmapped if u.noun == "line"] == [1]
    for expected in ("SRM-ONLY", "NOWHERE", "not a name", "config", "/cms/like", "BAD", "GONE", "no checksum"):
        assert expected in said, expected
    for expected in ("is a cache", "not deterministic", "tier=9", "p1:missing", "dump.ndjson:15", "webhook"):
        assert expected in said, expected


def test_a_plan_reads_everything_and_sends_nothing(service, files):
    with service.client() as client:
        plan = RucioImport(client, plan=True).run(files)
        assert plan.taken["endpoint"] == 3
        assert plan.taken["replica"] == 4
        assert list(client.endpoints.list()) == []
        assert list(client.scopes.list()) == []


@pytest.mark.parametrize(
    ("protocols", "url"),
    [
        ([("srm", 8443, "/p"), ("davs", 2880, "/p/")], "davs://h:2880/p"),
        ([("root", 1094, "//eos/x"), ("davs", 443, "/eos/x")], "davs://h:443/eos/x"),
        ([("root", 1094, "/eos/x")], "root://h:1094/eos/x"),
    ],
)
def test_of_several_protocols_the_best_that_an_endpoint_can_use_is_taken(protocols, url):
    given = [{"scheme": s, "hostname": "h", "port": p, "prefix": x, "domains": {}} for s, p, x in protocols]
    place = documents.place_of("X", rse(protocols=given))
    assert place.endpoint.url == url
    assert documents.place_of("X", rse(protocols=given), "file:///here").endpoint.url == "file:///here"


@pytest.mark.parametrize(
    "line",
    [
        {"scope": "p1"},
        {"scope": "p1", "name": "x", "type": "ARCHIVE"},
        {"scope": "p1", "name": "x", "rse": "A", "adler32": "00000001"},
        {"scope": "p1", "name": "x", "rse_expression": "A", "grouping": "SOME"},
        {"scope": "p1", "name": "x", "rse_expression": "A", "expires_at": "soon"},
    ],
)
def test_a_line_that_cannot_be_read_says_why(line):
    with pytest.raises(Invalid) as told:
        match documents.kind_of(line):
            case "did":
                documents.did_kind(line)
            case "replica":
                list(documents.copies_of(line))
            case "rule":
                documents.rule_of(line, NOW)
    assert told.value.hint
