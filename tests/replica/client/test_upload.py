import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replica import wire
from replica.client.parallel import Progress
from replica.client.upload import gather, upload
from replica.storage import faultpoints
from replica.storage.posix import PosixStorage
from rules.errors import AlreadyExists, Invalid, NotFound, Refused, ReplicaError, Unreachable
from tests.replica.client.world import CONTENT, World, files_in, world
from tests.replica.storage.places import as_nobody


@pytest.fixture
def w(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with world(sqlite_url, tmp_path) as made:
        yield made


def at_desy(w: World) -> dict[str, bytes]:
    """What lies at the endpoint under names of the scope, unfinished files included."""
    return {n.removeprefix("p1/"): d for n, d in files_in(w.root("DESY-DISK")).items() if n.startswith("p1/")}


def test_a_folder_is_uploaded_under_its_relative_names(w: World):
    done = upload(w.client, [w.write()], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert (done.files, done.copied, done.adopted, done.new, done.failed) == (4, 4, 0, 4, [])
    assert done.bytes == sum(map(len, CONTENT.values()))
    assert at_desy(w) == CONTENT
    assert {d.did for d in w.client.dids.contents("p1:raw")} == {f"p1:{name}" for name in CONTENT}
    replicas = list(w.client.replicas.locate("p1:raw"))
    assert {(r.state, r.evidence, r.endpoint) for r in replicas} == {("available", "hashed", "DESY-DISK")}
    assert w.litter("DESY-DISK") == []


def test_nothing_is_uploaded_to_a_drained_endpoint(w: World):
    w.client.endpoints.drain("DESY-DISK", "old")
    source = w.write()
    assert upload(w.client, [source], scope="p1").endpoint == "HZDR-DISK"
    with pytest.raises(Refused, match="DESY-DISK is being drained"):
        upload(w.client, [source], scope="p1", endpoint="DESY-DISK")


def test_a_file_is_uploaded_under_its_base_name(w: World):
    source = w.write()
    upload(w.client, [source / "run 1/b.h5"], scope="p1", endpoint="DESY-DISK")
    assert w.client.dids.show("p1:b.h5").size == 4


def test_names_become_nfc(w: World):
    source = w.write({"U\u0308ber.txt": b"x"})
    upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    assert w.client.dids.show("p1:\u00dcber.txt").size == 1


def test_the_same_upload_again_adopts_what_is_there(w: World):
    source = w.write()
    upload(w.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK")
    again = upload(w.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert (again.files, again.copied, again.adopted, again.new) == (4, 0, 4, 0)


def test_an_upload_that_was_killed_between_copy_and_registration_goes_on(w: World):
    """Everything lies at the endpoint already, and the catalogue knows nothing of it."""
    source = w.write()
    for name, data in CONTENT.items():
        path = w.root("DESY-DISK") / "p1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    done = upload(w.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert (done.files, done.copied, done.adopted, done.new) == (4, 0, 4, 4)


def test_files_go_in_batches_of_one_registration_each(w: World):
    source = w.write({f"{n}.dat": bytes([n]) for n in range(25)})
    done = upload(w.client, [source], scope="p1", dataset="many", endpoint="DESY-DISK", batch=10)
    assert (done.files, done.new) == (25, 25)
    assert w.client.dids.show("p1:many").files == 25


def test_progress_reaches_the_end(w: World):
    told: list[Progress] = []
    upload(w.client, [w.write()], scope="p1", endpoint="DESY-DISK", tell=told.append)
    assert told[-1].files_done == told[-1].files_total == 4
    assert told[-1].bytes_done == told[-1].bytes_total == sum(map(len, CONTENT.values()))


# --- what is refused before the first byte moves ----------------------------------------------------------------------


def refused(w: World, *paths: Path, error: type[Exception], **more: str) -> str:
    before = files_in(w.root("DESY-DISK"))
    with pytest.raises(error) as caught:
        upload(w.client, paths, scope=more.pop("scope", "p1"), endpoint=more.pop("endpoint", "DESY-DISK"), **more)
    assert files_in(w.root("DESY-DISK")) == before
    assert not list(w.client.dids.list("p1"))
    return str(caught.value)


def test_two_files_of_one_name_are_refused(w: World):
    w.write({"a.dat": b"1"}, "one")
    w.write({"a.dat": b"2"}, "two")
    message = refused(w, w.directory / "one", w.directory / "two", error=Invalid)
    assert "one/a.dat" in message
    assert "two/a.dat" in message
    assert "p1:a.dat" in message


def test_a_file_beneath_the_name_of_another_is_refused(w: World):
    w.write({"a": b"1"}, "one")
    w.write({"a/b": b"2"}, "two")
    assert "a file and a folder" in refused(w, w.directory / "one", w.directory / "two", error=Invalid)


@pytest.mark.parametrize("name", ["line\nbreak", "back\\slash", " blank", ".replica-x", "right\u202eleft"])
def test_a_name_that_cannot_be_a_did_is_refused(w: World, name: str):
    source = w.write({"good": b"1", name: b"2"})
    assert "cannot be uploaded" in refused(w, source, error=Invalid)


def test_a_name_that_is_not_utf_8_is_refused(w: World):
    source = w.write({"good": b"1"})
    with open(os.path.join(os.fsencode(source), b"\xff.dat"), "wb"):
        pass
    refused(w, source, error=Invalid)


def test_a_link_is_refused(w: World):
    source = w.write()
    (source / "link").symlink_to("a.h5")
    (source / "run 1/other").symlink_to("/etc/passwd")
    message = refused(w, source, error=Refused)
    assert "not a regular file, and 1 more" in message
    assert "link" in refused(w, source / "link", error=Refused)


def test_a_fifo_is_refused(w: World):
    source = w.write()
    os.mkfifo(source / "pipe")
    assert "pipe" in refused(w, source, error=Refused)


def test_a_path_that_is_not_there_is_named(w: World):
    assert "nowhere" in refused(w, w.directory / "nowhere", error=Invalid)


def test_an_empty_folder_is_refused(w: World):
    (w.directory / "empty").mkdir()
    assert "no file" in refused(w, w.directory / "empty", error=Refused)


def test_an_unknown_scope_endpoint_or_bad_scope_is_refused(w: World):
    source = w.write()
    assert "p9" in refused(w, source, error=NotFound, scope="p9")
    assert "NOWHERE" in refused(w, source, error=NotFound, endpoint="NOWHERE")
    refused(w, source, error=Invalid, scope="../x")


def test_a_dataset_named_like_a_file_of_the_upload_is_refused(w: World):
    assert "a.h5" in refused(w, w.write(), error=Invalid, dataset="a.h5")


def test_a_closed_dataset_is_refused_before_bytes_move(w: World):
    w.client.dids.add(wire.NewDid(did="p1:raw"))
    w.client.dids.change("p1:raw", wire.DidChange(open=False))
    with pytest.raises(Refused, match="closed"):
        upload(w.client, [w.write()], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert at_desy(w) == {}


def test_an_endpoint_that_is_not_writable_is_refused(w: World):
    w.client.endpoints.change("DESY-DISK", wire.EndpointChange(writable=False))
    assert "not writable" in refused(w, w.write(), error=Refused)


def test_an_endpoint_whose_disk_is_not_here_is_refused(w: World):
    w.client.endpoints.add(wire.NewEndpoint(name="FAR", site="HZDR", url=(w.directory / "far").as_uri()))
    assert "FAR cannot be reached" in refused(w, w.write(), error=Unreachable, endpoint="FAR")


def test_a_folder_of_another_endpoint_is_not_taken_for_this_one(w: World):
    """As when the URL of an endpoint is right on its own machine, and another system's disk lies there on this one."""
    far = w.client.endpoints.add(wire.NewEndpoint(name="FAR", site="HZDR", url=(w.directory / "far").as_uri()))
    (w.directory / "far/.replica").mkdir(parents=True)
    (w.directory / "far/.replica/endpoint").write_text('{"endpoint": "OTHER"}')
    assert "belongs to the endpoint OTHER" in refused(w, w.write(), error=Unreachable, endpoint=far.name)


# --- which endpoint ---------------------------------------------------------------------------------------------------


def test_without_an_endpoint_a_disk_of_this_machine_is_chosen(w: World):
    w.client.endpoints.add(wire.NewEndpoint(name="FAR", site="HZDR", url="file:///nowhere/at/all"))
    w.client.endpoints.change("DESY-DISK", wire.EndpointChange(writable=False))
    chosen: list[str] = []
    done = upload(w.client, [w.write()], scope="p1", chosen=chosen.append)
    assert chosen == [done.endpoint] == ["HZDR-DISK"]


def test_the_disk_with_most_space_is_chosen_and_then_kept(w: World):
    """An upload that goes on must not begin anew elsewhere because its own first half has filled the disk."""
    w.client.endpoints.change("HZDR-DISK", wire.EndpointChange(capacity_bytes=10_000_000))
    w.client.endpoints.change("DESY-DISK", wire.EndpointChange(capacity_bytes=9_000_000))
    source = w.write()
    assert upload(w.client, [source / "run 2/Füße/große Datei.raw"], scope="p1").endpoint == "HZDR-DISK"
    again = upload(w.client, [source / "run 2/Füße/große Datei.raw"], scope="p1")
    assert (again.endpoint, again.adopted) == ("HZDR-DISK", 1)


def test_when_no_endpoint_can_take_it_each_says_why(w: World):
    w.client.endpoints.change("DESY-DISK", wire.EndpointChange(writable=False))
    w.client.endpoints.change("HZDR-DISK", wire.EndpointChange(capacity_bytes=10))
    with pytest.raises(Refused) as caught:
        upload(w.client, [w.write()], scope="p1")
    assert "DESY-DISK: it is not writable" in str(caught.value)
    assert "HZDR-DISK: 10 B are free, 3.1 MB are needed" in str(caught.value)


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_a_file_that_changes_while_it_is_read_fails_alone(w: World):
    source = w.write()
    growing = source / "run 2/Füße/große Datei.raw"

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        if point == "piece" and piece is not None and len(piece) == 1 << 20:  # only the large file has such pieces
            with growing.open("ab") as file:
                file.write(b"more")
        return None

    with faultpoints.handling(handler):
        done = upload(w.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert done.files == 3
    assert [(f.did, "changed while it was read" in f.reason) for f in done.failed] == [
        ("p1:run 2/Füße/große Datei.raw", True)
    ]
    assert "run 2/Füße/große Datei.raw" not in at_desy(w)
    assert w.litter("DESY-DISK") == []
    done = upload(w.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert (done.copied, done.adopted, done.failed) == (1, 3, [])


def test_a_file_that_vanishes_fails_alone(w: World):
    source = w.write()
    removed = threading.Event()

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        if not removed.is_set():
            removed.set()
            (source / "run 2/Füße/große Datei.raw").unlink(missing_ok=True)
        return None

    with faultpoints.handling(handler):
        done = upload(w.client, [source], scope="p1", endpoint="DESY-DISK", threads=1)
    assert (done.files, [f.did for f in done.failed]) == (3, ["p1:run 2/Füße/große Datei.raw"])


def test_a_flipped_bit_is_noticed_and_nothing_is_published(w: World):
    source = w.write({"a.dat": b"x" * 100_000})
    with faultpoints.handling(faultpoints.from_text("piece=flip")):
        done = upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    assert (done.files, len(done.failed)) == (0, 1)
    assert at_desy(w) == {}


def test_other_bytes_under_the_name_are_neither_overwritten_nor_moved(w: World):
    (w.root("DESY-DISK") / "p1").mkdir()
    (w.root("DESY-DISK") / "p1/a.h5").write_bytes(b"somebody's")
    done = upload(w.client, [w.write()], scope="p1", endpoint="DESY-DISK")
    assert done.files == 3
    assert [f.did for f in done.failed] == ["p1:a.h5"]
    assert "exists already with other bytes" in done.failed[0].reason
    assert at_desy(w)["a.h5"] == b"somebody's"
    assert w.litter("DESY-DISK") == []


def test_other_bytes_where_a_replica_is_are_told_to_go_elsewhere_and_the_replica_is_not_to_be_moved(w: World):
    upload(w.client, [w.write({"a.h5": b"the content"})], scope="p1", endpoint="DESY-DISK")
    done = upload(w.client, [w.write({"a.h5": b"another"})], scope="p1", endpoint="DESY-DISK")
    (failed,) = done.failed
    assert "p1:a.h5 is registered at DESY-DISK with other bytes" in failed.reason
    assert "another name" in failed.hint
    assert "move it away" not in failed.hint
    assert at_desy(w)["a.h5"] == b"the content"


def test_a_name_that_breaks_the_line_is_reported_on_one_line(w: World):
    with pytest.raises(Invalid) as caught:
        upload(w.client, [w.write({"a\nb": b"x"})], scope="p1", endpoint="DESY-DISK")
    assert "\n" not in caught.value.message
    assert "a\\nb cannot be uploaded" in caught.value.message


def test_what_may_not_be_read_is_named_with_a_remedy():
    def as_user(folder: Path) -> None:
        (folder / "closed").mkdir(mode=0)
        for path in (folder / "closed", folder / "closed/file"):
            with pytest.raises(ReplicaError, match="permission denied; nothing was uploaded") as caught:
                gather([path], "p1")
            assert caught.value.hint

    as_nobody(as_user)


def test_an_endpoint_that_is_not_here_comes_with_a_remedy(w: World):
    (w.root("DESY-DISK") / ".replica/endpoint").unlink()
    with pytest.raises(Unreachable) as caught:
        upload(w.client, [w.write()], scope="p1", endpoint="DESY-DISK")
    assert "replica endpoint prepare DESY-DISK" in caught.value.hint


def test_when_the_endpoint_itself_fails_the_rest_is_not_tried(w: World):
    source = w.write({f"{n:03}.dat": b"x" * 1000 for n in range(400)})  # more lists than are copied at a time
    published = 0

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        nonlocal published
        if point == "after_publish":
            published += 1
            if published == 10:
                (w.root("DESY-DISK") / ".replica/endpoint").unlink()  # the disk is unmounted
        return None

    with faultpoints.handling(handler):
        done = upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    assert done.failed
    assert done.not_tried > 0
    assert done.files + len(done.failed) + done.not_tried == 400
    assert done.files == len(list(w.client.dids.list("p1")))


# --- what the catalogue refuses ---------------------------------------------------------------------------------------


def known_elsewhere(w: World, name: str, data: bytes) -> None:
    """A DID whose only replica is at HZDR."""
    upload(w.client, [w.write({name: data}, "elsewhere")], scope="p1", endpoint="HZDR-DISK")


def test_only_what_this_upload_put_there_is_removed_when_the_catalogue_refuses_it(w: World):
    known_elsewhere(w, "a.h5", b"other bytes")
    done = upload(w.client, [w.write()], scope="p1", dataset="raw", endpoint="DESY-DISK")
    assert (done.files, done.new) == (3, 3)
    assert [f.did for f in done.failed] == ["p1:a.h5"]
    assert "is known with size 11, not 5000" in done.failed[0].reason
    assert at_desy(w) == {n: d for n, d in CONTENT.items() if n != "a.h5"}
    assert files_in(w.root("HZDR-DISK"))["p1/a.h5"] == b"other bytes"
    assert {d.did for d in w.client.dids.contents("p1:raw")} == {f"p1:{n}" for n in CONTENT if n != "a.h5"}


def test_what_was_there_before_stays_when_the_catalogue_refuses_it(w: World):
    known_elsewhere(w, "a.h5", b"other bytes")
    (w.root("DESY-DISK") / "p1").mkdir()
    (w.root("DESY-DISK") / "p1/a.h5").write_bytes(CONTENT["a.h5"])
    done = upload(w.client, [w.write()], scope="p1", endpoint="DESY-DISK")
    assert [f.did for f in done.failed] == ["p1:a.h5"]
    assert at_desy(w)["a.h5"] == CONTENT["a.h5"]


def test_what_somebody_else_has_registered_meanwhile_stays(w: World):
    """The dataset is closed while bytes move, so the whole batch is refused; one file is registered by then."""
    source = w.write({"a.dat": b"1", "b.dat": b"2"})
    done = threading.Event()

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        path = w.root("DESY-DISK") / "p1/a.dat"
        if point == "after_publish" and path.exists() and not done.is_set():
            done.set()
            upload(w.client, [source / "a.dat"], scope="p1", endpoint="DESY-DISK")
            w.client.dids.change("p1:raw", wire.DidChange(open=False))
        return None

    with faultpoints.handling(handler), pytest.raises(Refused, match="closed"):
        upload(w.client, [source], scope="p1", dataset="raw", endpoint="DESY-DISK", threads=1)
    assert at_desy(w) == {"a.dat": b"1"}
    assert [r.state for r in w.client.replicas.locate("p1:a.dat")] == ["available"]


def test_a_name_that_is_a_dataset_is_refused(w: World):
    w.client.dids.add(wire.NewDid(did="p1:a.h5"))
    done = upload(w.client, [w.write()], scope="p1", endpoint="DESY-DISK")
    assert [f.did for f in done.failed] == ["p1:a.h5"]
    assert "a.h5" not in at_desy(w)


def test_the_dataset_may_be_written_as_a_did_and_may_be_there(w: World):
    w.client.dids.add(wire.NewDid(did="p1:raw"))
    assert upload(w.client, [w.write()], scope="p1", dataset="p1:raw", endpoint="DESY-DISK").dataset == "p1:raw"


def test_a_container_holds_no_files(w: World):
    w.client.dids.add(wire.NewDid(did="p1:box", kind="container"))
    with pytest.raises(Refused, match="container"):
        upload(w.client, [w.write()], scope="p1", dataset="box", endpoint="DESY-DISK")
    assert at_desy(w) == {}


def test_ctrl_c_leaves_no_unfinished_file(w: World):
    source = w.write({"big.dat": b"x" * 20_000_000})

    def interrupt(now: Progress) -> None:
        raise KeyboardInterrupt

    slow = threading.Event()

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        slow.wait(0.1)
        return None

    with faultpoints.handling(handler), pytest.raises(KeyboardInterrupt):
        upload(w.client, [source], scope="p1", endpoint="DESY-DISK", tell=interrupt)
    assert (at_desy(w), w.litter("DESY-DISK")) == ({}, [])


def test_a_conflict_between_two_uploads_at_once_ends_with_one_content(w: World):
    one, two = w.write({"a.dat": b"1" * 1000}, "one"), w.write({"a.dat": b"2" * 1000}, "two")
    results: list[object] = []

    def go(source: Path, endpoint: str) -> None:
        with w.service.client() as client:
            try:
                results.append(upload(client, [source], scope="p1", endpoint=endpoint))
            except AlreadyExists as error:
                results.append(error)

    threads = [threading.Thread(target=go, args=args) for args in ((one, "DESY-DISK"), (two, "HZDR-DISK"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (replica,) = w.client.replicas.locate("p1:a.dat")
    there = {name for name in ("DESY-DISK", "HZDR-DISK") if (w.root(name) / "p1/a.dat").exists()}
    assert there == {replica.endpoint}


# --- two at once ------------------------------------------------------------------------------------------------------


def test_what_was_adopted_and_taken_back_by_whoever_had_put_it_there_is_brought_again(w: World, monkeypatch):
    source = w.write({"a.h5": b"mine"})
    place = w.root("DESY-DISK") / "p1/a.h5"
    place.parent.mkdir()
    place.write_bytes(b"mine")
    register = w.client.replicas.register

    def taken_away(registration: wire.Registration) -> wire.Registered:
        place.unlink()  # his registration was refused in this moment
        return register(registration)

    monkeypatch.setattr(w.client.replicas, "register", taken_away)
    done = upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    assert (done.files, done.failed) == (1, [])
    assert at_desy(w) == {"a.h5": b"mine"}


def test_what_was_taken_back_while_somebody_registered_it_is_brought_again(w: World, monkeypatch):
    source = w.write({"a.h5": b"mine"})
    register, delete = w.client.replicas.register, PosixStorage.delete
    said: list[wire.Registration] = []

    def refuse(registration: wire.Registration) -> wire.Registered:
        said.append(registration)
        raise Refused("the dataset is closed")

    async def deleted_too_late(storage: PosixStorage, path: str) -> None:
        if path == "p1/a.h5":
            register(said[0])  # he had adopted the file
        await delete(storage, path)

    monkeypatch.setattr(w.client.replicas, "register", refuse)
    monkeypatch.setattr(PosixStorage, "delete", deleted_too_late)
    with pytest.raises(Refused):
        upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    assert at_desy(w) == {"a.h5": b"mine"}


def test_a_replica_that_rotted_is_looked_at_when_its_file_is_uploaded_again(w: World):
    source = w.write({"a.h5": b"mine"})
    upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    (w.root("DESY-DISK") / "p1/a.h5").write_bytes(b"mind")
    done = upload(w.client, [source], scope="p1", endpoint="DESY-DISK")
    assert "with just these bytes, but others are there" in done.failed[0].reason
    assert (done.files, len(done.bad_replicas), done.to_look_at, done.not_told) == (0, 1, 1, "")
    assert [(s.did, s.why) for s in w.client.integrity.suspects()] == [("p1:a.h5", "reader")]
    assert at_desy(w) == {"a.h5": b"mind"}
