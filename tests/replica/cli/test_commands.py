"""Every command of a client against a service that listens."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replica.client.upload import upload
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import CONTENT, World, carry, evaluate, files_in

ROOT = Path(__file__).parents[3]


@pytest.fixture
def raw(w: World) -> str:
    """A dataset that lies at DESY."""
    upload(w.client, [w.write()], scope="p1", dataset="raw", endpoint="DESY-DISK")
    return "p1:raw"


# --- places -----------------------------------------------------------------------------------------------------------


def test_whoami(typed: Typed):
    assert typed.json("whoami") == {"account": "root", "role": "admin", "site": None}


def test_sites(typed: Typed):
    assert typed.json("site", "add", "GSI")["name"] == "GSI"
    assert [s["name"] for s in typed.json("site", "list")] == ["DESY", "HZDR", "GSI"]
    assert typed.json("site", "show", "GSI")["worker_seen_at"] is None
    assert "GSI" in typed.error("site", "add", "GSI", code=1)
    assert "NOWHERE" in typed.error("site", "show", "NOWHERE", code=3)


def test_the_key_of_a_site_is_a_token_of_its_worker(typed: Typed, w: World):
    """Plain, so that `replica site key DESY > desy.token` is all there is to do."""
    shown = typed("site", "key", "DESY").stdout
    assert len(shown.split()) == 1
    with w.service.client(shown.strip()) as worker:
        assert worker.whoami().site == "DESY"
    assert typed.json("site", "key", "DESY")["site"] == "DESY"


def test_endpoints(typed: Typed, w: World):
    made = typed.json(
        *("endpoint", "add", "GSI-TAPE", "--site", "HZDR", "--url", w.root("gsi").as_uri(), "--kind", "tape"),
        *("--attribute", "tier=1", "--attribute", "country=DE", "--attribute", "fast", "--capacity", "10TB"),
    )
    assert made["attributes"] == {"tier": 1, "country": "DE", "fast": True}
    assert (made["kind"], made["capacity_bytes"], made["free_bytes"]) == ("tape", 10**13, 10**13)
    assert [e["name"] for e in typed.json("endpoint", "list")] == ["DESY-DISK", "HZDR-DISK", "GSI-TAPE"]
    assert [e["name"] for e in typed.json("endpoint", "list", "--where", "kind=tape")] == ["GSI-TAPE"]
    changed = typed.json(
        *("endpoint", "set", "GSI-TAPE", "--attribute", "tier=2", "--attribute", "fast=", "--not-writable")
    )
    assert (changed["attributes"], changed["writable"], changed["readable"]) == (
        {"tier": 2, "country": "DE"},
        False,
        True,
    )
    table = typed("endpoint", "show", "GSI-TAPE").stdout
    assert "capacity    10.0 TB" in table
    assert "NOWHERE" in typed.error("endpoint", "set", "NOWHERE", "--writable", code=3)


def test_a_new_endpoint_is_made_ready_on_the_machine_of_the_server(typed: Typed, w: World):
    typed("endpoint", "add", "NEW", "--site", "HZDR", "--url", w.root("deep/new").as_uri())
    assert (w.root("deep/new") / ".replica/endpoint").exists()


def test_a_new_endpoint_may_be_made_ready_later(typed: Typed, w: World):
    added = typed("endpoint", "add", "NEW", "--site", "HZDR", "--url", w.root("new").as_uri(), "--no-prepare")
    assert "replica endpoint prepare NEW" in added.stderr
    assert not w.root("new").exists()
    typed("endpoint", "prepare", "NEW")
    assert (w.root("new") / ".replica/endpoint").exists()


def test_an_endpoint_that_cannot_be_made_ready_says_so(typed: Typed, w: World):
    w.write({"file": b""}, "in")
    done = typed("endpoint", "add", "NEW", "--site", "HZDR", "--url", w.root("in/file/x").as_uri(), code=1)
    assert "NEW was added, but could not be made ready" in done.stderr


def test_a_bad_expression_is_shown_with_a_caret(typed: Typed):
    message = typed.error("endpoint", "list", "--where", "kind=disk & & site=X", code=1)
    lines = message.splitlines()
    at = lines.index("  kind=disk & & site=X")
    assert lines[at + 1].index("^") == 2 + "kind=disk & & site=X".index("& site")


# --- names ------------------------------------------------------------------------------------------------------------


def test_scopes(typed: Typed):
    assert typed.json("scope", "add", "p2")["name"] == "p2"
    assert {s["name"] for s in typed.json("scope", "list")} == {"p1", "p2"}
    assert "not a scope" in typed.error("scope", "add", "../x", code=1)


def test_datasets_and_containers(typed: Typed, raw: str):
    assert typed.json("did", "add", "p1:box", "--container")["kind"] == "container"
    assert typed.json("did", "add", "p1:more")["kind"] == "dataset"
    assert typed.json("did", "attach", "p1:box", raw, "p1:more") == {"attached": 2}
    assert typed.json("did", "attach", "p1:more", "p1:a.h5", "p1:run 1/b.h5") == {"attached": 2}
    assert typed.json("did", "detach", "p1:more", "p1:a.h5") == {"detached": 1}
    assert [d["did"] for d in typed.json("did", "contents", "p1:more")] == ["p1:run 1/b.h5"]
    assert typed.json("did", "close", "p1:more")["open"] is False
    assert "closed" in typed.error("did", "attach", "p1:more", "p1:a.h5", code=1)
    assert typed.json("did", "reopen", "p1:more")["open"] is True
    shown = typed.json("did", "show", raw)
    assert (shown["files"], shown["size"]) == (len(CONTENT), sum(map(len, CONTENT.values())))


def test_dids_are_listed_by_pattern_and_kind(typed: Typed, raw: str):
    def listed(*words: str) -> set[str]:
        return {d["did"] for d in typed.json("did", "list", *words)}

    assert listed("p1:run 1/*") == {"p1:run 1/b.h5", "p1:run 1/leer.dat"}
    assert listed("p1", "--kind", "dataset") == {raw}
    assert listed("--scope", "p1", "*.h5") == {"p1:a.h5", "p1:run 1/b.h5"}
    assert len(listed()) == len(CONTENT) + 1
    assert len(typed("did", "list", "p1", "-o", "ndjson").stdout.splitlines()) == len(CONTENT) + 1


@pytest.mark.parametrize("did", ["p1:a/../b", "p1:" + "x" * 10_000, "p1:a\nb", "noscope", "p1:", "p1://x"])
def test_a_name_that_cannot_be_right_is_explained(typed: Typed, did: str):
    message = typed.error("did", "show", did, code=1)
    assert "hint: " in message
    assert len(message) < 500


def test_what_is_not_there_is_exit_3(typed: Typed):
    for command in (("did", "show"), ("locate",), ("download",), ("did", "contents"), ("did", "close")):
        assert "p1:nothing" in typed.error(*command, "p1:nothing", code=3)
        assert "p1:nothing" in typed.error(*command, "p1:nothing", "-o", "json", code=3)


# --- who --------------------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_exit_4(typed: Typed):
    typed.environment["REPLICA_TOKEN"] = "rpl_wrong"
    assert "token" in typed.error("whoami", code=4)


def test_what_is_not_allowed_is_exit_4(typed: Typed, w: World):
    typed.environment["REPLICA_TOKEN"] = w.service.user
    assert "alice" in typed.error("site", "add", "X", code=4)


def test_the_token_file_of_the_command_line_wins(typed: Typed, w: World, tmp_path: Path):
    token = tmp_path / "token"
    token.write_text(w.service.user + "\n")
    token.chmod(0o600)
    assert typed.json("whoami")["account"] == "root"
    assert typed.json("whoami", "--token-file", token)["account"] == "alice"
    assert typed.json("--token-file", token, "whoami")["account"] == "alice"
    token.chmod(0o644)
    assert "chmod 600" in typed("whoami", "--token-file", token).stderr


def test_the_common_options_stand_anywhere(typed: Typed, w: World):
    server = typed.environment.pop("REPLICA_SERVER")
    for words in (
        ("-o", "json", "--server", server, "site", "list"),
        ("site", "--server", server, "list", "-o", "json"),
        ("-o", "table", "site", "-o", "ndjson", "list", "--server", server, "-o", "json"),
    ):
        assert len(json.loads(typed(*words).stdout)) == 2


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_upload_locate_download(typed: Typed, w: World):
    source = w.write()
    done = typed.json("upload", source, "--scope", "p1", "--dataset", "raw", "--endpoint", "DESY-DISK")
    assert (done["files"], done["copied"], done["failed"], done["dataset"]) == (4, 4, [], "p1:raw")
    located = typed.json("locate", "p1:raw")
    assert {r["did"] for r in located} == {f"p1:{name}" for name in CONTENT}
    for replica in located:
        assert (replica["endpoint"], replica["state"], replica["evidence"]) == ("DESY-DISK", "available", "hashed")
        path = w.root("DESY-DISK") / replica["path"]
        assert path.read_bytes() == CONTENT[replica["did"].removeprefix("p1:")]
        assert set(replica["checksums"]) == {"xxh3_128", "adler32"}
    done = typed.json("download", "p1:raw", "--dir", "back")
    assert (done["files"], done["failed"]) == (4, [])
    assert files_in(w.directory / "back") == CONTENT
    assert "4 found there already" in typed("download", "p1:raw", "--dir", "back").stdout


def test_one_file_is_one_file(typed: Typed, w: World):
    source = w.write({"a.h5": b"x"})
    assert (
        "1 file, 1 B, is registered at DESY-DISK"
        in typed("upload", source, "--scope", "p1", "--endpoint", "DESY-DISK").stdout
    )
    assert "1 file, 1 B, is in back" in typed("download", "p1:a.h5", "--dir", "back").stdout


def test_a_failed_file_is_named_and_the_exit_code_is_1(typed: Typed, w: World, raw: str):
    w.write({"a.h5": b"mine"}, "back")
    done = typed("download", raw, "--dir", "back", code=1)
    assert "3 files" in done.stdout
    assert "p1:a.h5 failed: " in done.stderr
    assert "exists already with other bytes" in done.stderr
    assert "hint: move it away" in done.stderr
    again = typed("download", raw, "--dir", "back", "-o", "json", code=1)
    assert [f["did"] for f in json.loads(again.stdout)["failed"]] == ["p1:a.h5"]


def test_download_points_into_the_expression(typed: Typed, raw: str):
    message = typed.error("download", raw, "--dir", "back", "--from", "site=", code=1)
    assert "  site=\n" in message
    assert "^" in message


def test_files_are_registered_where_they_lie(typed: Typed, w: World):
    folder = w.root("DESY-DISK") / "old/2019"
    folder.mkdir(parents=True)
    (folder / "x.dat").write_bytes(b"x")
    (folder / "y.dat").write_bytes(b"yy")
    done = typed.json(*("register", folder / "x.dat", "--scope", "p1", "--endpoint", "DESY-DISK", "--dataset", "old"))
    assert done == {"files": 1, "new": 1, "attached": 1, "to_verify": 0}
    (replica,) = typed.json("locate", "p1:old/2019/x.dat")
    assert (replica["path"], replica["state"], replica["evidence"]) == ("old/2019/x.dat", "available", "hashed")
    assert replica["checksums"]["adler32"] == "00790079"
    done = typed.json("register", folder, "--scope", "p1", "--endpoint", "DESY-DISK")
    assert (done["files"], done["new"]) == (2, 1)
    typed("download", "p1:old", "--dir", "back")
    assert files_in(w.directory / "back") == {"old/2019/x.dat": b"x"}


def test_the_whole_endpoint_may_be_registered_without_our_own_folder(typed: Typed, w: World):
    (w.root("DESY-DISK") / "x.dat").write_bytes(b"x")
    done = typed.json("register", w.root("DESY-DISK"), "--scope", "p1", "--endpoint", "DESY-DISK")
    assert done["files"] == 1


def test_what_is_not_beneath_the_endpoint_is_not_registered(typed: Typed, w: World):
    source = w.write()
    words = ("--scope", "p1", "--endpoint", "DESY-DISK")
    assert "is not beneath" in typed.error("register", source / "a.h5", *words, code=1)
    assert "is not beneath" in typed.error("register", w.root("DESY-DISK") / "../source/a.h5", *words, code=1)
    (w.root("DESY-DISK") / "link").symlink_to(source / "a.h5")
    typed.error("register", w.root("DESY-DISK") / "link", *words, code=1)
    typed.error("register", w.root("DESY-DISK") / "missing", *words, code=1)
    assert typed.json("did", "list", "p1") == []


def test_a_list_is_registered_and_waits_for_a_worker(typed: Typed, w: World):
    (w.root("DESY-DISK") / "lists").mkdir()
    (w.root("DESY-DISK") / "lists/x.dat").write_bytes(b"x")
    line = {"did": "p1:x", "size": 1, "checksums": {"adler32": "00790079"}, "path": "lists/x.dat"}
    done = typed.json(
        *("register", "--endpoint", "DESY-DISK", "--from", "-", "--dataset", "p1:listed"),
        stdin=json.dumps(line) + "\n\n",
    )
    assert done == {"files": 1, "new": 1, "attached": 1, "to_verify": 1}
    assert [r["state"] for r in typed.json("locate", "p1:x")] == ["copying"]


def test_a_bad_line_of_a_list_is_named(typed: Typed):
    good = '{"did": "p1:x", "size": 1, "checksums": {"adler32": "00790079"}}\n'
    for bad in ('{"did": "p1:y"}', "nonsense", '{"did": "p1:y", "size": -1, "checksums": {}}', "[]"):
        message = typed.error("register", "--endpoint", "DESY-DISK", "--from", "-", code=1, stdin=good + bad + "\n")
        assert "line 2 of the list" in message
        assert "nothing was registered" in message
    assert typed.json("did", "list", "p1") == []


# --- wishes -----------------------------------------------------------------------------------------------------------


def test_a_rule_is_added_listed_shown_explained_and_deleted(typed: Typed, raw: str):
    made = typed.json(
        *("rule", "add", raw, "--copies", "2", "--to", "kind=disk", "--spread", "site", "--lifetime", "30d"),
        *("--priority", "4", "--activity", "production", "--comment", "for the paper", "--from", "site=DESY"),
    )
    assert (made["did"], made["copies"], made["expression"], made["grouping"]) == (raw, 2, "kind=disk", "dataset")
    assert (made["state"], made["files_total"]) == ("replicating", 4)
    assert made["expires_at"] is not None
    number = str(made["id"])
    assert [r["id"] for r in typed.json("rule", "list")] == [made["id"]]
    assert [r["id"] for r in typed.json("rule", "list", raw, "--state", "replicating")] == [made["id"]]
    assert typed.json("rule", "list", "--state", "stuck") == []
    assert typed.json("rule", "show", number)["comment"] == "for the paper"
    explained = typed.json("rule", "explain", number)
    assert {lock["endpoint"] for lock in explained["locks"]} == {"DESY-DISK", "HZDR-DISK"}
    text = typed("rule", "explain", number).stdout
    assert "root wants 2 copies of p1:raw" in text
    assert "p1:raw at HZDR-DISK: 0 of 4 files" in text
    assert typed.json("rule", "delete", number) == {"deleted": [made["id"]]}
    assert "99" in typed.error("rule", "show", "99", code=3)


def test_a_plan_changes_nothing(typed: Typed, raw: str):
    plan = typed.json("rule", "add", raw, "--copies", "2", "--to", "kind=disk", "--plan")
    assert {c["endpoint"] for c in plan["copies"]} == {"DESY-DISK", "HZDR-DISK"}
    text = typed("rule", "add", raw, "--copies", "3", "--to", "kind=disk", "--plan").stdout
    assert "nothing was changed" in text
    assert typed.json("rule", "list") == []


def test_a_bad_expression_of_a_rule_is_shown_with_a_caret(typed: Typed, raw: str):
    message = typed.error("rule", "add", raw, "--to", "kind=disk", "--from", "site=DESY|", code=1)
    lines = message.splitlines()
    assert "  site=DESY|" in lines
    assert "^" in lines[lines.index("  site=DESY|") + 1]
    assert "NOWHERE" in typed.error("rule", "add", raw, "--to", "NOWHERE", code=1)
    assert typed.json("rule", "list") == []


def test_waiting_ends_when_the_copies_are_there(typed: Typed, w: World, raw: str):
    def work() -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            evaluate(w)
            if carry(w, "HZDR"):
                return
            time.sleep(0.1)

    worker = threading.Thread(target=work)
    worker.start()
    made = typed.json("rule", "add", raw, "--copies", "2", "--to", "kind=disk", "--wait")
    worker.join()
    assert (made["state"], made["locks_ok"], made["files_available"]) == ("ok", 8, 4)
    assert {r["endpoint"] for r in typed.json("locate", raw)} == {"DESY-DISK", "HZDR-DISK"}
    assert files_in(w.root("HZDR-DISK") / "p1") == CONTENT
    # The wish is fulfilled already: waiting for it takes no time.
    assert typed.json("rule", "add", raw, "--copies", "2", "--to", "kind=disk", "--wait", "0.1")["state"] == "ok"


def test_waiting_in_vain_is_exit_5(typed: Typed, raw: str):
    done = typed("rule", "add", raw, "--copies", "2", "--to", "kind=disk", "--wait", "0.3", "-o", "json", code=5)
    assert json.loads(done.stdout)["state"] == "replicating"
    assert "not yet ok after 0.3 s" in done.stderr


def test_while_waiting_for_a_stuck_rule_the_reason_is_said(typed: Typed, w: World, raw: str):
    w.root("HZDR-DISK")
    done = typed("rule", "add", raw, "--copies", "3", "--to", "kind=disk", "--wait", "0.3", code=5)
    assert "is stuck" in done.stderr


def test_a_rule_that_is_deleted_is_not_waited_for(typed: Typed, w: World, raw: str):
    def delete() -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            for found in w.client.rules.list():
                w.client.rules.delete(found.id)
                return
            time.sleep(0.05)

    deleting = threading.Thread(target=delete)
    deleting.start()
    result = typed("rule", "add", raw, "--copies", "2", "--to", "kind=disk", "--wait", "20", code=1)
    deleting.join()
    assert "ended while it was waited for" in result.stderr


# --- work -------------------------------------------------------------------------------------------------------------


def test_transfers_are_listed_shown_cancelled_and_tried_again(typed: Typed, w: World, raw: str):
    rule = typed.json("rule", "add", raw, "--copies", "2", "--to", "kind=disk")["id"]
    evaluate(w)
    listed = typed.json("transfer", "list", "--rule", str(rule))
    assert {t["did"] for t in listed} == {f"p1:{name}" for name in CONTENT}
    assert {(t["target"], t["state"]) for t in listed} == {("HZDR-DISK", "queued")}
    assert typed.json("transfer", "list", "--site", "DESY") == []
    assert len(typed.json("transfer", "list", "--did", "p1:a.h5", "--state", "queued")) == 1
    number = str(listed[0]["id"])
    assert typed.json("transfer", "show", number)["id"] == listed[0]["id"]
    (cancelled,) = typed.json("transfer", "cancel", number)
    assert cancelled["state"] == "cancelled"
    assert "transfer" in typed.error("transfer", "show", "999", code=3)
    assert "HZDR-DISK" in typed("transfer", "list").stdout


def test_watching_ends_when_all_transfers_have_ended(typed: Typed, w: World, raw: str):
    typed("rule", "add", raw, "--copies", "2", "--to", "kind=disk")
    evaluate(w)
    worker = threading.Timer(0.5, carry, (w, "HZDR"))
    worker.start()
    ended = typed.json("transfer", "watch", "--interval", "0.1")
    worker.join()
    assert {t["state"] for t in ended} == {"done"}
    assert len(ended) == len(CONTENT)
    watched = typed("transfer", "watch", str(ended[0]["id"]))
    assert "done  100 %" in watched.stdout
    assert "ended: 1 well, 0 failed" in watched.stderr


# --- as a process -----------------------------------------------------------------------------------------------------


def run(w: World, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "REPLICA_SERVER": w.service.url,
        "REPLICA_TOKEN": w.service.admin,
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "replica", *words]
    return subprocess.run(command, cwd=w.directory, env=environment, capture_output=True, text=True, check=False)


def test_the_same_as_processes(w: World, raw: str):
    done = run(w, "locate", raw, "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)) == len(CONTENT)
    done = run(w, "did", "show", "p1:nothing", "-o", "json")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("replica: there is no DID p1:nothing")
    done = run(w, "download", raw, "--dir", "back")
    assert done.returncode == 0, done.stderr
    assert files_in(w.directory / "back") == CONTENT
