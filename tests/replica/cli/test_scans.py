"""`replica scan` as a person types it, with a worker beside it and with a listing."""

from __future__ import annotations

import asyncio
import gzip
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from replica import wire
from tests.service import SITE
from workers.mover import Mover

ENDPOINT = "SCANNED"


@contextmanager
def working(w: Any) -> Iterator[None]:
    """A real worker of the site."""
    mover = Mover(w.service.url, lambda: w.service.worker, poll_seconds=0.2, stop_seconds=2.0)
    thread = threading.Thread(target=lambda: asyncio.run(mover.run()))
    thread.start()
    try:
        yield
    finally:
        mover.stop()
        thread.join(20)


@pytest.fixture
def files(w: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Thirty files, of which one is not there; one that nobody knows; and TMPDIR, where comparisons lie."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if ENDPOINT not in {e.name for e in w.client.endpoints.list()}:
        w.add_endpoint(ENDPOINT, SITE)
    names = [f"f{i}" for i in range(30)]
    scope = next(w.client.scopes.list()).name
    replicas = [wire.NewReplica(did=f"{scope}:{n}", size=3, checksums={"adler32": "00000001"}) for n in names]
    w.client.replicas.register(wire.Registration(endpoint=ENDPOINT, replicas=replicas, evidence="hashed"))
    folder = w.root(ENDPOINT) / scope
    folder.mkdir()
    for name in [*names[1:], "dark"]:
        (folder / name).write_bytes(b"abc")
    return [f"{scope}/{name}" for name in names]


def test_a_scan_is_waited_for_and_shown(w, typed, files):
    assert "was never scanned" in typed.error("scan", ENDPOINT, "--last", code=3)
    begun = typed.json("scan", ENDPOINT, "--no-wait")
    assert begun["state"] == "queued"
    with working(w):
        done = typed.json("scan", ENDPOINT)
    assert (done["id"], done["state"], done["endpoint"]) == (begun["id"], "done", ENDPOINT)
    assert (done["known_files"], done["listed_files"], done["missing_files"], done["dark_files"]) == (30, 30, 1, 1)
    assert {(f["kind"], f["state"], f["path"]) for f in done["findings"]} == {
        ("missing", "seen", files[0]), ("dark", "seen", files[0].replace("f0", "dark"))
    }  # fmt: skip
    shown = typed("scan", ENDPOINT, "--last").stdout
    assert files[0] in shown
    assert "missing" in shown
    assert [s["id"] for s in typed.json("scan", ENDPOINT, "--history")] == [begun["id"]]
    assert typed.json("scan", ENDPOINT, "--remove-dark")["removed_files"] == 0
    typed("scan", ENDPOINT, "--last", "--history", code=2)


def test_a_fraction_that_is_too_large_is_exit_code_1(w, typed, files):
    folder = w.root(ENDPOINT) / files[0].split("/")[0]
    for path in folder.iterdir():
        path.unlink()
    with working(w):
        held = typed.json("scan", ENDPOINT, code=1)
        assert (held["state"], held["missing_files"]) == ("held", 30)
        assert "nothing is done" in typed("scan", ENDPOINT, "--last", code=1).stderr
        accepted = typed.json("scan", ENDPOINT, "--accept-fraction")
        assert (accepted["id"], accepted["state"], accepted["lost_files"]) == (held["id"], "done", 0)


def test_a_disk_that_is_not_there_is_exit_code_1(w, typed, files):
    os.rename(w.root(ENDPOINT) / ".replica", w.root("away"))
    with working(w):
        assert "not mounted" in typed("scan", ENDPOINT, code=1).stderr


@pytest.mark.parametrize("packed", [False, True])
def test_a_listing_is_compared_here(w, typed, files, tmp_path, packed):
    lines = ["path,size", *(f"{path},3" for path in files[2:]), f"{files[1]},4", "stranger,5", ".replica/endpoint,70"]
    text = "\n".join(lines).encode()
    listing = tmp_path / "listing"
    listing.write_bytes(gzip.compress(text) if packed else text)
    # By itself it is taken for a day older than its file: what was proven since is not missed.
    done = typed.json("scan", ENDPOINT, "--listing", listing)
    assert (done["state"], done["missing_files"], done["differing_files"], done["dark_files"]) == ("done", 0, 0, 1)
    done = typed.json("scan", ENDPOINT, "--listing", listing, "--listed-at", "2100-01-01")
    assert (done["state"], done["missing_files"], done["differing_files"], done["dark_files"]) == ("done", 1, 1, 1)
    assert done["listed_by"] == "person"
    listing.write_bytes(b"a,b,c,d\n")
    assert "line 1" in typed.error("scan", ENDPOINT, "--listing", listing, code=1)
    assert typed.json("scan", ENDPOINT, "--last")["state"] == "done"
