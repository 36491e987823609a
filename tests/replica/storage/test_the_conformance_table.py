"""Every adapter that is registered passes the whole suite against the servers that were named; nothing is left out."""

from __future__ import annotations

from replica.storage import registry
from tests import conformance_table


def test_every_adapter_runs_the_whole_suite_against_every_server_named():
    assert conformance_table.gaps() == []
    assert len(conformance_table.suite()) > 25


def test_a_gap_is_seen(monkeypatch):
    found = conformance_table.classes()
    without = {name: one for name, one in found.items() if "Sftp" not in name}
    assert conformance_table.gaps(without) == [
        "nothing runs replica.storage.sftp:SftpStorage against OpenSSH (test_sftp.TestSftp)",
        "nothing runs the suite for sftp://",
    ]
    lazy = type("TestLazy", (found["test_s3.TestMoto"],), {"test_publishing_never_replaces": None})
    assert conformance_table.gaps(found | {"test_s3.TestMoto": lazy}) == [
        "test_s3.TestMoto leaves out test_publishing_never_replaces"
    ]
    monkeypatch.setitem(registry._SCHEMES, "gopher", registry._file)
    assert conformance_table.gaps(found) == ["nothing runs the suite for gopher://"]
    strange = found | {"test_new.TestNew": found["test_sftp.TestSftp"]}
    assert "test_new.TestNew is no column of the table" in conformance_table.gaps(strange)


def test_the_table_is_markdown_with_a_cell_for_each():
    lines = conformance_table.table().split("\n")
    assert len(lines) == 2 + len(conformance_table.suite())
    assert {line.count("|") for line in lines} == {len(conformance_table.COLUMNS) + 2}
