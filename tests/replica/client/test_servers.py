"""Upload to and download from real servers: WebDAV (Apache, rclone, XRootD), root://, S3 (moto) and SFTP (OpenSSH)."""

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from replica import wire
from replica.cli.main import root
from replica.client import AsyncClient
from replica.client.download import download
from replica.client.parallel import Progress
from replica.client.places import prepare
from replica.client.upload import upload
from replica.storage import faultpoints
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from rules.errors import Forbidden, Refused
from tests.replica.client.world import CONTENT, World, files_in, world
from tests.servers_dav import PASSWORD, USER
from tests.servers_s3 import SETTINGS, Moto
from tests.servers_ssh import OpenSSH

ROOT = Path(__file__).parents[3]
KINDS = ("apache", "rclone", "xrootd-http", "root", "s3", "sftp")
#: What a name may hold and every one of these servers keeps.
ODD = {"50% #1 & more;=+.dat": b"1", "Füße/ß '\"<x>.dat": b"2", "a/b/c/d/e": b"3", "leer": b""}


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    server = Moto()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def openssh() -> Iterator[OpenSSH]:
    server = OpenSSH()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@dataclass
class Far:
    """A world with endpoints that are reached over the network."""

    world: World
    tables: dict[str, dict[str, str]]
    asked: pytest.FixtureRequest

    @property
    def client(self):
        return self.world.client

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.tables)

    def url(self, kind: str) -> tuple[str, dict[str, str]]:
        folder = f"w{secrets.token_hex(8)}-{len(self.tables)}"
        if kind in ("apache", "rclone"):
            server = self.asked.getfixturevalue({"apache": "apache", "rclone": "rclone_server"}[kind])
            return f"{server.url.replace('http:', 'dav:')}/{folder}", {}
        if kind == "locked":
            return f"{self.asked.getfixturevalue('apache').url}/locked/{folder}", {"user": USER, "password": PASSWORD}
        if kind == "xrootd-http":
            return f"{self.asked.getfixturevalue('xrootd').url_http}/{folder}", {}
        if kind == "root":
            return f"{self.asked.getfixturevalue('xrootd').url_root}/{folder}", {}
        if kind == "s3":
            server = self.asked.getfixturevalue("moto")
            with suppress(Exception):
                server.client().create_bucket(Bucket="bucket")
            return server.url("bucket", folder), SETTINGS
        server = self.asked.getfixturevalue("openssh")
        return f"{server.url}/{folder}", server.settings

    def add(self, kind: str, name: str, site: str = "HZDR") -> wire.Endpoint:
        url, settings = self.url(kind)
        self.tables[url] = dict(settings)
        made = self.client.endpoints.add(wire.NewEndpoint(name=name, site=site, url=url))
        if kind == "locked":
            apache = self.asked.getfixturevalue("apache")
            (apache.data / "locked").mkdir(exist_ok=True)
            apache.give_away(apache.data / "locked")
        asyncio.run(prepare(made, self.credentials))
        return made

    def put(self, name: str, did: str, data: bytes) -> None:
        """Other bytes under a replica's name, behind everybody's back."""

        async def go() -> None:
            endpoint = self.client.endpoints.show(name)
            storage = open_storage(endpoint.url, name=name, credentials=self.credentials)

            async def pieces():
                yield data

            await storage.delete(did)
            await storage.write(".replica/part/test", pieces(), size_bytes=len(data))
            await storage.publish(".replica/part/test", did)
            await storage.close()

        asyncio.run(go())

    def files(self, name: str) -> list[str]:
        async def go() -> list[str]:
            endpoint = self.client.endpoints.show(name)
            storage = open_storage(endpoint.url, name=name, credentials=self.credentials)
            try:
                return sorted([entry.path async for entry in storage.list()])
            finally:
                await storage.close()

        return asyncio.run(go())

    def up(self, source: Path, endpoint: str, **more):
        return upload(self.client, [source], scope="p1", endpoint=endpoint, credentials=self.credentials, **more)

    def down(self, *dids: str, to: str = "back", **more):
        more.setdefault("credentials", self.credentials)
        return download(self.client, dids, dir=self.world.directory / to, **more)

    def secrets(self) -> Path:
        """The credentials as the file that a person would write."""
        file = self.world.directory / "credentials.toml"
        lines = []
        for url, settings in self.tables.items():
            lines += [f"[{json.dumps(url)}]", *(f"{key} = {json.dumps(value)}" for key, value in settings.items())]
        file.write_text("\n".join(lines))
        file.chmod(0o600)
        return file

    def process(self, *dids: str, to: str = "back", **environ: str) -> subprocess.Popen:
        """The command in a process of its own."""
        service = self.world.service
        mine = {
            "REPLICA_SERVER": service.url,
            "REPLICA_TOKEN": service.admin,
            "REPLICA_CREDENTIALS_FILE": str(self.secrets()),
        }
        command = [sys.executable, "-m", "replica", "download", *dids, "--dir", self.world.directory / to, "-o", "json"]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | mine | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def far(sqlite_url: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Far]:
    with world(sqlite_url, tmp_path) as made:
        yield Far(made, {}, request)


# --- each kind --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_up_and_down_and_once_more(far: Far, kind: str):
    far.add(kind, "FAR")
    content = CONTENT | ODD
    source = far.world.write(content)
    done = far.up(source, "FAR", dataset="raw")
    assert (done.files, done.copied, done.new, done.failed) == (8, 8, 8, [])
    assert far.files("FAR") == sorted(f"p1/{name}" for name in content)
    again = far.up(source, "FAR", dataset="raw")
    assert (again.files, again.copied, again.adopted, again.new, again.failed) == (8, 0, 8, 0, [])
    done = far.down("p1:raw")
    assert (done.files, done.copied, done.failed, done.bad_replicas) == (8, 8, [], [])
    assert done.moved_bytes == sum(map(len, content.values()))
    assert files_in(far.world.directory / "back") == content
    assert far.down("p1:raw").adopted == 8


@pytest.mark.parametrize("kind", KINDS)
def test_other_bytes_at_a_server_are_neither_overwritten_nor_moved(far: Far, kind: str):
    far.add(kind, "FAR")
    far.put("FAR", "p1/a.h5", b"somebody's")
    done = far.up(far.world.write({"a.h5": b"mine", "b.h5": b"also mine"}), "FAR")
    assert done.files == 1
    assert [(f.did, "exists already with other bytes; it was not touched" in f.reason) for f in done.failed] == [
        ("p1:a.h5", True)
    ]
    assert far.files("FAR") == ["p1/a.h5", "p1/b.h5"]


@pytest.mark.parametrize("kind", ["apache", "s3", "sftp"])
def test_what_the_catalogue_refuses_is_taken_back(far: Far, kind: str):
    far.add(kind, "FAR")
    upload(far.client, [far.world.write({"a.h5": b"other"}, "other")], scope="p1", endpoint="DESY-DISK")
    done = far.up(far.world.write({"a.h5": b"mine", "b.h5": b"also mine"}), "FAR")
    assert (done.files, [f.did for f in done.failed]) == (1, ["p1:a.h5"])
    assert far.files("FAR") == ["p1/b.h5"]


@pytest.mark.parametrize("kind", ["locked", "s3", "sftp"])
def test_wrong_credentials_are_said_with_a_remedy(far: Far, kind: str):
    made = far.add(kind, "FAR")
    far.up(far.world.write(), "FAR", dataset="raw")
    wrong = {"locked": {"password": "canary"}}.get(kind, {})
    if kind == "sftp":
        wrong = {"key_file": str(far.asked.getfixturevalue("openssh").directory / "other_key")}
    # moto takes every key; none at all is refused before it is asked
    bad = Credentials({made.url: far.tables[made.url] | wrong} if wrong else {})
    done = far.down("p1:raw", credentials=bad)
    assert (done.files, len(done.failed)) == (0, 4)
    assert all("FAR: " in f.reason and f.hint and "canary" not in f.reason for f in done.failed)
    assert not (far.world.directory / "back/.replica").exists()
    with pytest.raises(Forbidden):
        asyncio.run(prepare(made, bad))


def test_an_endpoint_that_nobody_prepared_is_not_filled(far: Far):
    url, _ = far.url("apache")
    far.client.endpoints.add(wire.NewEndpoint(name="FAR", site="HZDR", url=url))
    done = far.up(far.world.write(), "FAR")
    assert done.files == 0
    assert "FAR" in done.failed[0].reason
    asyncio.run(prepare(far.client.endpoints.show("FAR")))
    asyncio.run(prepare(far.client.endpoints.show("FAR")))
    assert far.up(far.world.write(), "FAR").files == 4


# --- which source, which endpoint -------------------------------------------------------------------------------------


def test_a_disk_here_goes_before_servers_and_from_restricts(far: Far):
    far.add("apache", "AFAR")
    source = far.world.write()
    far.up(source, "AFAR", dataset="raw")
    far.up(source, "HZDR-DISK", dataset="raw")
    far.put("AFAR", "p1/a.h5", b"alphA" * 1000)
    assert far.down("p1:raw").bad_replicas == []
    done = far.down("p1:a.h5", to="from", from_expression="AFAR")
    assert done.files == 0
    assert "AFAR: " in done.failed[0].reason
    assert "HZDR-DISK: it is not among the endpoints asked for" in done.failed[0].reason


@pytest.mark.parametrize("kind", ["apache", "s3", "root", "sftp"])
def test_wrong_bytes_of_one_source_are_told_and_taken_from_the_next(far: Far, kind: str):
    far.add(kind, "AFAR")
    far.add("rclone", "BFAR")
    source = far.world.write()
    far.up(source, "AFAR", dataset="raw")
    far.up(source, "BFAR", dataset="raw")
    far.put("AFAR", "p1/a.h5", b"alphA" * 1000)
    done = far.down("p1:raw")
    assert (done.files, done.failed) == (4, [])
    assert [(bad.did, bad.endpoint) for bad in done.bad_replicas] == [("p1:a.h5", "AFAR")]
    assert (done.to_look_at, done.not_told) == (1, "")
    (suspect,) = far.client.integrity.suspects()
    assert (suspect.did, suspect.endpoint, suspect.state, suspect.why) == ("p1:a.h5", "AFAR", "available", "reader")
    assert far.down("p1:raw", to="once more").to_look_at == 0
    assert files_in(far.world.directory / "back") == CONTENT


def test_a_bit_that_flips_in_flight_is_fetched_again_and_blames_nobody(far: Far):
    """Between our hash and the disk: it is the target's proof that finds it, and the one that says so."""
    far.add("apache", "FAR")
    far.up(far.world.write({"a": b"x" * 1000}), "FAR", dataset="raw")
    with faultpoints.handling(faultpoints.from_text("piece=flip")):
        done = far.down("p1:raw")
    assert (len(done.failed), done.bad_replicas) == (1, [])
    assert files_in(far.world.directory / "back") == {}
    assert far.down("p1:raw").files == 1


def test_a_server_that_is_down_is_not_asked_for_every_file(far: Far):
    far.add("apache", "FAR")
    far.up(far.world.write({f"{n}": b"x" for n in range(60)}), "FAR", dataset="raw")
    apache = far.asked.getfixturevalue("apache")
    apache.stop()
    try:
        done = far.down("p1:raw")
    finally:
        apache.start()
    assert len(done.failed) == 60
    assert sum("did not answer" in f.reason for f in done.failed) > 20
    assert far.down("p1:raw").files == 60


def test_without_an_endpoint_a_server_is_chosen_when_no_disk_is_here(far: Far):
    far.add("s3", "FAR")
    far.client.endpoints.add(wire.NewEndpoint(name="UNKNOWN", site="HZDR", url="davs://localhost:1/nothing"))
    source = far.world.write()
    assert upload(far.client, [source], scope="p1", credentials=far.credentials).endpoint.endswith("-DISK")
    for name in ("DESY-DISK", "HZDR-DISK"):
        far.client.endpoints.change(name, wire.EndpointChange(writable=False))
    assert upload(far.client, [source], scope="p1", credentials=far.credentials).endpoint == "FAR"
    with pytest.raises(Refused, match="UNKNOWN: no credentials for davs://localhost:1/nothing are known here"):
        upload(far.client, [source], scope="p1", credentials=Credentials())


# --- large files ------------------------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some megabytes are large."""
    monkeypatch.setattr("replica.storage.chunks.CHUNK_BYTES", MIB)
    monkeypatch.setattr("replica.storage.chunks.RESUME_BYTES", 4 * MIB)


def large(seed: int = 0) -> bytes:
    return b"".join(bytes([n ^ seed]) * MIB for n in range(24))


def parts(folder: Path) -> list[str]:
    return [p.name for p in (folder / ".replica/part").iterdir()]


@pytest.mark.parametrize("kind", ["apache", "s3", "sftp", "root"])
def test_a_download_that_was_killed_goes_on_within_the_file(far: Far, kind: str):
    """In processes of their own, with the real sizes: killed at its sixth chunk of 8 MiB, of ten."""
    far.add(kind, "FAR")
    content = {"big": b"".join(bytes([n]) * (8 * MIB) for n in range(10))}
    far.up(far.world.write(content), "FAR", dataset="raw")
    back = far.world.directory / "back"
    killed = far.process("p1:raw", REPLICA_FAULT_POINTS="chunk=kill@6")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert "big" not in files_in(back)
    assert len(parts(back)) == 2
    done = far.process("p1:raw")
    out, error = done.communicate()
    assert done.returncode == 0, error
    assert json.loads(out)["moved_bytes"] <= 5 * 8 * MIB
    assert files_in(back) == content  # and nothing else: no unfinished file, no lock


def test_the_command_ends_at_ctrl_c_and_goes_on_the_next_time(far: Far):
    far.add("apache", "FAR")
    content = {"big": b"".join(bytes([n]) * (8 * MIB) for n in range(10))}
    far.up(far.world.write(content), "FAR", dataset="raw")
    back = far.world.directory / "back"
    command = far.process("p1:raw", REPLICA_FAULT_POINTS="chunk=slow")
    end = time.monotonic() + 60
    while time.monotonic() < end and command.poll() is None:
        maps = list(back.glob(".replica/part/*.map"))
        if maps and maps[0].read_bytes().count(b"\n") >= 3:  # the head, and two chunks
            command.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, error = command.communicate(timeout=60)
    assert (command.returncode, "interrupted" in error, "Traceback" in error) == (130, True, False), error
    assert len(parts(back)) == 2
    done = far.down("p1:raw")
    assert done.moved_bytes <= 8 * 8 * MIB
    assert files_in(back) == content


def test_ctrl_c_leaves_what_can_be_gone_on_with_and_nothing_else(far: Far, small_chunks: None):
    far.add("apache", "FAR")
    content = {"big": large(), "small": b"x" * 1000}
    far.up(far.world.write(content), "FAR", dataset="raw")

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        threading.Event().wait(0.02)
        return None

    def interrupt(now: Progress) -> None:
        if now.bytes_done > 8 * MIB:
            raise KeyboardInterrupt

    with faultpoints.handling(handler), pytest.raises(KeyboardInterrupt):
        far.down("p1:big", tell=interrupt)
    back = far.world.directory / "back"
    (part,) = [name for name in parts(back) if not name.endswith(".map")]
    assert sorted(parts(back)) == [part, f"{part}.map"]
    assert sorted(p.name for p in (back / ".replica").iterdir()) == ["lock", "part"]
    assert far.down("p1:small").files == 1  # another download leaves it alone
    done = far.down("p1:raw")
    assert (done.files, done.adopted) == (2, 1)
    assert done.moved_bytes < 20 * MIB
    assert files_in(back) == content


def test_a_source_that_dies_midway_is_followed_by_another(far: Far, small_chunks: None):
    far.add("rclone", "AFAR")
    far.add("apache", "BFAR")
    source = far.world.write({"big": large()})
    for name in ("AFAR", "BFAR"):
        far.up(source, name, dataset="raw")
    far.client.endpoints.change("BFAR", wire.EndpointChange(readable=False))  # only to see that one alone fails
    rclone = far.asked.getfixturevalue("rclone_server")
    chunks = 0

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        nonlocal chunks
        chunks += point == "chunk"
        if chunks == 6 and rclone.process is not None:
            rclone.stop(signal.SIGKILL)
        return None

    try:
        with faultpoints.handling(handler):
            first = far.down("p1:raw")
            assert (first.files, len(first.failed)) == (0, 1)
            assert "AFAR: " in first.failed[0].reason
            far.client.endpoints.change("BFAR", wire.EndpointChange(readable=True))
            done = far.down("p1:raw")
    finally:
        rclone.start()
    assert (done.files, done.failed) == (1, [])
    assert done.moved_bytes < 24 * MIB
    assert files_in(far.world.directory / "back") == {"big": large()}


def test_a_large_file_comes_from_several_servers_and_a_bad_one_is_found_out(far: Far, small_chunks: None):
    far.add("rclone", "AFAR")
    far.add("apache", "BFAR")
    source = far.world.write({"big": large()})
    for name in ("AFAR", "BFAR"):
        far.up(source, name, dataset="raw")
    wrong = bytearray(large())
    wrong[5 * MIB + 7] ^= 1
    far.put("AFAR", "p1/big", bytes(wrong))
    done = far.down("p1:raw")
    assert (done.files, done.failed) == (1, [])
    assert files_in(far.world.directory / "back") == {"big": large()}
    far.put("BFAR", "p1/big", bytes(wrong))
    done = far.down("p1:raw", to="other")
    assert (done.files, {bad.endpoint for bad in done.bad_replicas}) == (0, {"AFAR", "BFAR"})
    assert files_in(far.world.directory / "other") == {}


def test_two_downloads_into_one_folder_fetch_a_large_file_once(far: Far, small_chunks: None):
    far.add("apache", "FAR")
    content = {"big": large()} | {f"s/{n}": bytes([n]) * 100 for n in range(100)}
    far.up(far.world.write(content), "FAR", dataset="raw")

    def go(_: int) -> tuple[int, int]:
        with far.world.service.client() as client:
            done = download(client, ["p1:raw"], dir=far.world.directory / "back", credentials=far.credentials)
            assert done.failed == []
            return done.files, done.moved_bytes

    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(go, range(3)))
    assert [files for files, _ in told] == [101] * 3
    assert sum(moved for _, moved in told) < 25 * MIB
    assert files_in(far.world.directory / "back") == content


def test_an_upload_to_a_disk_here_goes_on_within_a_large_file(far: Far, small_chunks: None):
    source = far.world.write({"big": large()})
    written = 0

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        nonlocal written
        written += len(piece or b"")
        return None

    def interrupt(now: Progress) -> None:
        if now.bytes_done > 8 * MIB:
            raise KeyboardInterrupt

    def slow(point: str, piece: memoryview | None) -> bytes | None:
        threading.Event().wait(0.02)
        return handler(point, piece)

    with faultpoints.handling(slow), pytest.raises(KeyboardInterrupt):
        far.up(source, "DESY-DISK", tell=interrupt)
    assert written < 20 * MIB
    with faultpoints.handling(handler):
        assert far.up(source, "DESY-DISK").copied == 1
    assert written < 27 * MIB
    assert far.world.litter("DESY-DISK") == []


def test_nothing_in_the_way_is_moved_even_when_it_appears_in_the_last_moment(far: Far):
    """Between our look and our publishing somebody puts another file there."""
    far.add("apache", "FAR")
    apache = far.asked.getfixturevalue("apache")
    folder = apache.data / far.client.endpoints.show("FAR").url.rpartition("/")[2]

    def handler(point: str, piece: memoryview | None) -> bytes | None:
        if point == "after_verify":
            (folder / "p1").mkdir(exist_ok=True)
            (folder / "p1/a").write_bytes(b"somebody's")
            apache.give_away(folder / "p1")
        return None

    with faultpoints.handling(handler):
        done = far.up(far.world.write({"a": b"mine"}), "FAR")
    assert "exists already with other bytes" in done.failed[0].reason
    assert (folder / "p1/a").read_bytes() == b"somebody's"


def test_a_signed_link_is_readable_by_anybody(far: Far, monkeypatch: pytest.MonkeyPatch):
    far.add("s3", "FAR")
    far.up(far.world.write({"a ü.h5": b"alpha"}), "FAR", dataset="raw")
    service = far.world.service
    for key, value in {"SERVER": service.url, "TOKEN": service.admin, "CREDENTIALS_FILE": str(far.secrets())}.items():
        monkeypatch.setenv(f"REPLICA_{key}", value)
    plain, signed = (
        CliRunner().invoke(root, ["locate", "p1:raw", "--metalink", *more]).stdout
        for more in ([], ["--presigned", "1h"])
    )
    assert SETTINGS["secret_access_key"] not in plain + signed
    (url,) = [u.text for u in ElementTree.fromstring(signed).iter("{urn:ietf:params:xml:ns:metalink}url")]
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"alpha"
    assert "Signature" in signed
    assert "Signature" not in plain


async def test_the_same_verbs_for_asyncio(far: Far):
    source = far.world.write({"big": bytes(50_000_000)})
    service = far.world.service
    async with AsyncClient(service.url, service.admin) as client:
        told: list[Progress] = []
        done = await client.upload([source], scope="p1", dataset="raw", endpoint="DESY-DISK", tell=told.append)
        assert (done.files, told[-1].files_done) == (1, 1)
        began = threading.Event()

        def slow(point: str, piece: memoryview | None) -> bytes | None:
            began.set()
            threading.Event().wait(0.05)
            return None

        with faultpoints.handling(slow):
            task = asyncio.create_task(client.download(["p1:raw"], dir=far.world.directory / "back"))
            await asyncio.to_thread(began.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert files_in(far.world.directory / "back") == {}
        assert (await client.download(["p1:raw"], dir=far.world.directory / "back")).files == 1


async def test_in_a_notebook_a_loop_is_running_already(far: Far):
    far.up(far.world.write(), "DESY-DISK", dataset="raw")
    assert far.down("p1:raw").files == 4
