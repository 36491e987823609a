import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replica import wire
from replica.client import landing as client_landing
from replica.client.download import download
from replica.client.landing import landing
from replica.client.parallel import Progress
from replica.client.upload import upload
from replica.storage import faultpoints
from rules.errors import Forbidden, Invalid, NotFound, Refused
from tests.replica.client.world import CONTENT, World, files_in, world


@pytest.fixture
def w(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    """With a dataset p1:raw that is whole at both endpoints."""
    with world(sqlite_url, tmp_path) as made:
        source = made.write()
        upload(made.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK")
        upload(made.client, [source], scope="p1", dataset="raw", endpoint="HZDR-DISK")
        yield made


def test_a_dataset_comes_back_as_it_was(w: World):
    done = download(w.client, ["p1:raw"], dir=w.directory / "back")
    assert (done.files, done.copied, done.adopted, done.failed) == (4, 4, 0, [])
    assert done.bytes == sum(map(len, CONTENT.values()))
    assert files_in(w.directory / "back") == CONTENT
    assert not (w.directory / "back/.replica").exists()


def test_files_and_containers_are_downloaded_too(w: World):
    w.client.dids.add(wire.NewDid(did="p1:inner", kind="container"))
    w.client.dids.add(wire.NewDid(did="p1:box", kind="container"))
    w.client.dids.attach("p1:inner", ["p1:raw"])
    w.client.dids.attach("p1:box", ["p1:inner", "p1:raw"])
    download(w.client, ["p1:box"], dir=w.directory / "all")
    assert files_in(w.directory / "all") == CONTENT
    download(w.client, ["p1:a.h5", "p1:a.h5"], dir=w.directory / "one")
    assert files_in(w.directory / "one") == {"a.h5": CONTENT["a.h5"]}


def test_what_is_there_and_right_is_left_alone(w: World):
    back = w.directory / "back"
    download(w.client, ["p1:raw"], dir=back)
    (back / "a.h5").unlink()
    before = (back / "run 1/b.h5").stat()
    done = download(w.client, ["p1:raw"], dir=back)
    assert (done.files, done.copied, done.adopted) == (4, 1, 3)
    assert (back / "run 1/b.h5").stat().st_mtime_ns == before.st_mtime_ns
    assert files_in(back) == CONTENT


@pytest.mark.parametrize("other", [b"alphA" * 1000, b"short"])
def test_what_is_there_and_different_is_not_overwritten(w: World, other: bytes):
    w.write({"a.h5": other}, "back")
    done = download(w.client, ["p1:raw"], dir=w.directory / "back")
    assert done.files == 3
    assert [(f.did, "exists already with other bytes" in f.reason) for f in done.failed] == [("p1:a.h5", True)]
    assert "a.h5" in done.failed[0].path
    assert files_in(w.directory / "back") == CONTENT | {"a.h5": other}


def test_a_bad_replica_is_followed_by_the_next_one(w: World):
    """DESY comes first by name; its bytes are changed, its file is gone, its file is too short."""
    desy = w.root("DESY-DISK") / "p1"
    (desy / "a.h5").write_bytes(b"alphA" * 1000)
    (desy / "run 1/b.h5").unlink()
    (desy / "run 2/Füße/große Datei.raw").write_bytes(b"short")
    done = download(w.client, ["p1:raw"], dir=w.directory / "back")
    assert (done.files, done.failed) == (4, [])
    assert files_in(w.directory / "back") == CONTENT


def test_when_all_replicas_fail_each_says_why(w: World):
    (w.root("DESY-DISK") / "p1/a.h5").write_bytes(b"alphA" * 1000)
    shutil.rmtree(w.root("HZDR-DISK"))
    done = download(w.client, ["p1:raw"], dir=w.directory / "back")
    assert (done.files, len(done.failed)) == (3, 1)
    reason = done.failed[0].reason
    assert "DESY-DISK: " in reason
    assert "xxh3_128" in reason
    assert "HZDR-DISK: " in reason
    assert "cannot be opened" in reason
    assert "a.h5" not in files_in(w.directory / "back")


def test_only_the_endpoints_asked_for_are_read(w: World):
    shutil.rmtree(w.root("DESY-DISK") / "p1")
    done = download(w.client, ["p1:a.h5"], dir=w.directory / "back", from_expression="site=DESY")
    assert "HZDR-DISK: it is not among the endpoints asked for" in done.failed[0].reason
    assert download(w.client, ["p1:a.h5"], dir=w.directory / "back", from_expression="site=HZDR").files == 1


def test_an_endpoint_that_is_not_readable_is_not_read(w: World):
    w.client.endpoints.change("DESY-DISK", wire.EndpointChange(readable=False))
    w.client.endpoints.change("HZDR-DISK", wire.EndpointChange(readable=False))
    done = download(w.client, ["p1:a.h5"], dir=w.directory / "back")
    assert "it is not readable" in done.failed[0].reason


def test_a_file_that_is_there_needs_no_replica(w: World):
    download(w.client, ["p1:raw"], dir=w.directory / "back")
    shutil.rmtree(w.root("DESY-DISK"))
    shutil.rmtree(w.root("HZDR-DISK"))
    assert download(w.client, ["p1:raw"], dir=w.directory / "back").adopted == 4


def test_a_flipped_bit_is_fetched_again_from_elsewhere_or_fails(w: World):
    flip = faultpoints.from_text("piece=flip")
    with faultpoints.handling(flip):
        done = download(w.client, ["p1:a.h5"], dir=w.directory / "back")
    assert len(done.failed) == 1
    assert files_in(w.directory / "back") == {}
    assert download(w.client, ["p1:a.h5"], dir=w.directory / "back").files == 1


# --- what is refused before anything moves ----------------------------------------------------------------------------


def test_two_files_of_one_name_are_refused(w: World):
    w.client.scopes.add("p2")
    upload(w.client, [w.write({"a.h5": b"other"}, "other")], scope="p2", endpoint="DESY-DISK")
    with pytest.raises(Invalid, match=r"p1:a\.h5 and p2:a\.h5 would both be a\.h5"):
        download(w.client, ["p1:raw", "p2:a.h5"], dir=w.directory / "back")
    assert not (w.directory / "back").exists()


def test_a_file_where_another_needs_a_folder_is_refused(w: World):
    w.client.scopes.add("p2")
    upload(w.client, [w.write({"run 1": b"other"}, "other")], scope="p2", endpoint="DESY-DISK")
    with pytest.raises(Invalid, match="needs a folder"):
        download(w.client, ["p1:raw", "p2:run 1"], dir=w.directory / "back")


def test_what_does_not_exist_is_not_found(w: World):
    with pytest.raises(NotFound):
        download(w.client, ["p1:nothing"], dir=w.directory / "back")
    assert not (w.directory / "back").exists()


def test_an_empty_dataset_is_refused(w: World):
    w.client.dids.add(wire.NewDid(did="p1:empty"))
    with pytest.raises(Refused, match="no file"):
        download(w.client, ["p1:empty"], dir=w.directory / "back")


def test_the_folder_of_an_endpoint_is_no_place_to_download_to(w: World):
    for folder in (w.root("DESY-DISK"), w.root("DESY-DISK") / "p1/deeper"):
        with pytest.raises(Refused, match="folder of an endpoint"):
            download(w.client, ["p1:raw"], dir=folder)


def test_a_file_is_no_folder(w: World):
    w.write({"x": b""}, "there")
    for path in ("there/x", "there/x/y"):
        with pytest.raises((Invalid, Forbidden)):
            download(w.client, ["p1:raw"], dir=w.directory / path)


# --- unfinished files -------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_no_unfinished_file(w: World):
    slow = threading.Event()

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        slow.wait(0.1)
        return None

    def interrupt(now: Progress) -> None:
        raise KeyboardInterrupt

    with faultpoints.handling(handler), pytest.raises(KeyboardInterrupt):
        download(w.client, ["p1:run 2/Füße/große Datei.raw"], dir=w.directory / "back", tell=interrupt)
    assert list((w.directory / "back").iterdir()) == []


def test_the_next_download_clears_what_a_killed_one_left_and_goes_on(w: World):
    back = w.directory / "back"
    script = f"""
from replica.client import Client
from replica.client.download import download
download(Client({w.service.url!r}, {w.service.admin!r}), ["p1:raw"], dir={str(back)!r}, threads=1)
"""
    killed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"REPLICA_FAULT_POINTS": "after_write=kill@3"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert list((back / ".replica/part").iterdir()) != []
    done = download(w.client, ["p1:raw"], dir=back)
    assert (done.copied, done.adopted) == (2, 2)
    assert files_in(back) == CONTENT
    assert not (back / ".replica").exists()


def test_several_downloads_to_one_folder_do_not_disturb_each_other(w: World):
    back = w.directory / "back"

    def go(_: int) -> None:
        with w.service.client() as client:
            assert download(client, ["p1:raw"], dir=back).failed == []

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(go, range(4)))
    assert files_in(back) == CONTENT
    assert not (back / ".replica").exists()


def test_the_hidden_folder_comes_and_goes_while_others_do_the_same(tmp_path: Path):
    """Each enters, finds its place for unfinished files, and leaves; whoever is last clears away."""
    end = time.monotonic() + 1.0

    def go(number: int) -> None:
        while time.monotonic() < end:
            with landing(tmp_path / "x"):
                mine = tmp_path / f"x/.replica/part/{number}"
                mine.write_text("mine")
                time.sleep(0.0005)
                mine.unlink()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(go, range(6)))
    assert list((tmp_path / "x").iterdir()) == []


@pytest.mark.parametrize("link", [".replica", ".replica/part"])
def test_a_planted_link_does_not_have_a_download_delete_other_files(w: World, link: str):
    """Whoever may write to a shared folder, or packs an archive, could put it there."""
    precious = w.directory / "precious"
    (precious / "part").mkdir(parents=True)
    (precious / "thesis.tex").write_text("years of work")
    (precious / "part/two.tex").write_text("years of work")
    back = w.directory / "back"
    (back / link).parent.mkdir(parents=True)
    (back / link).symlink_to(precious)
    with pytest.raises(Forbidden) as refused:
        download(w.client, ["p1:raw"], dir=back)
    assert ".replica" in refused.value.message
    assert refused.value.hint
    assert sorted(files_in(precious)) == ["part/two.tex", "thesis.tex"]


def test_a_hidden_folder_of_somebody_elses_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """He could exchange a file between its proof and its name."""
    (tmp_path / ".replica/part").mkdir(parents=True)
    (tmp_path / ".replica").chmod(0o777)
    with landing(tmp_path):
        assert (tmp_path / ".replica").stat().st_mode & 0o777 == 0o700
    (tmp_path / ".replica").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with landing(tmp_path):
        pass  # a file system on which everything belongs to one
    (tmp_path / ".replica").mkdir()
    monkeypatch.setattr(client_landing, "_owner_of_new", lambda *_: 4711)
    with pytest.raises(Forbidden, match="belongs to somebody else"), landing(tmp_path):
        pass
