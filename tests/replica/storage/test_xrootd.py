"""XRootD: the suite against a real server, and what is particular to its protocol."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from replica.storage import xrootd as adapter
from replica.storage.base import PARTS, QUARANTINE, SENTINEL, part_path
from replica.storage.conformance import StorageConformance, listed, read_all, refusal, write
from replica.storage.credentials import Credentials
from replica.storage.faults import translated
from replica.storage.registry import open_storage
from replica.storage.xrootd_calls import Server
from rules.errors import (
    Busy,
    Forbidden,
    Invalid,
    NoSpace,
    Permanent,
    Refused,
    SourceMissing,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)
from tests.replica.storage.places import BehindFolder
from tests.servers_xrootd import XRootD


class BehindXRootD(BehindFolder):
    """The server's own folder. A file is put there by a rename, as programs do that care: the server tells times in
    whole seconds, and what is rewritten in place within one shows nowhere."""

    def __init__(self, server: XRootD, root: str) -> None:
        super().__init__(server.data / root)
        self.server = server

    def put(self, path: str, content: bytes) -> None:
        own = self.server.data / ".new"
        self.server.put(".new", content)
        file = self.root / path
        missing = [folder for folder in file.parents if not folder.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            os.chown(folder, own.stat().st_uid, own.stat().st_gid)
        own.rename(file)

    def vanish(self) -> None:
        self.server.kill()

    def return_(self) -> None:
        self.server.start()


def storage_at(server: XRootD, root: str = "site/data", name: str = "GRID"):
    return open_storage(f"{server.url_root}/{root}", name=name)


@pytest.fixture
async def storage(xrootd):
    storage = storage_at(xrootd)
    await storage.prepare()
    return storage


@pytest.fixture
def behind(xrootd):
    return BehindXRootD(xrootd, "site/data")


class TestXRootD(StorageConformance):
    refused_paths = frozenset({"line\nbreak", "$(id);`id`|&*?[a]{b}", "x" * 255})


class TestItsDiskIsNotMounted(TestXRootD):
    """The server answers, and all it has is an empty folder."""

    @pytest.fixture
    def behind(self, xrootd):
        behind = BehindXRootD(xrootd, "site/data")
        behind.vanish = lambda: BehindFolder.vanish(behind)
        behind.return_ = lambda: BehindFolder.return_(behind)
        return behind


# ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_is_nothing_to_readers_and_a_problem_in_a_listing(storage, behind):
    leave_claim(storage, "a/f")
    await refusal(SourceMissing, lambda: storage.stat("a/f"))
    await refusal(SourceMissing, lambda: read_all(storage, "a/f"))
    await refusal(SourceMissing, lambda: storage.quarantine("a/f"))
    assert [(e.path, e.problem) for e in await listed(storage)] == [("a/f", "a publication that was not finished")]


async def test_the_claim_of_a_worker_that_died_is_waited_for_and_then_taken_away(storage, behind, monkeypatch):
    monkeypatch.setattr(adapter, "_CLAIM_WAIT_SECONDS", 0.1)
    leave_claim(storage, "f")
    await write(storage, part_path("t1"), b"content")
    busy = await refusal(Busy, lambda: storage.publish(part_path("t1"), "f"))
    assert busy.retry_after_seconds == adapter.CLAIM_STALE_SECONDS
    assert behind.get("f") == b""
    made = (behind.root / "f").stat().st_mtime - adapter.CLAIM_STALE_SECONDS - 10
    os.utime(behind.root / "f", (made, made))
    await storage.publish(part_path("t1"), "f")
    assert behind.get("f") == b"content"
    assert not any(p.startswith((PARTS, QUARANTINE)) for p in behind.paths())


async def test_an_empty_file_of_somebody_else_is_no_claim(storage, behind):
    behind.put("f", b"")
    await write(storage, part_path("t1"), b"content")
    await refusal(TargetExists, lambda: storage.publish(part_path("t1"), "f"))
    assert (await storage.stat("f")).size_bytes == 0


@pytest.mark.parametrize("refuses", [FileExistsError(17, "File exists"), PermissionError(13, "Permission denied")])
async def test_a_server_that_renames_over_nothing_gets_the_name_freed_first(storage, behind, monkeypatch, refuses):
    """Other kinds of servers, and other releases of this one, refuse a rename onto any name that exists."""
    server = storage.server
    move = server.move

    def refusing(path, to):
        try:
            server.stat(to)
        except FileNotFoundError:
            return move(path, to)
        raise refuses

    monkeypatch.setattr(server, "move", refusing)
    await write(storage, part_path("t1"), b"content")
    if isinstance(refuses, FileExistsError):
        await storage.publish(part_path("t1"), "f")
        assert behind.get("f") == b"content"
    else:
        await refusal(Forbidden, lambda: storage.publish(part_path("t1"), "f"))
        assert behind.get("f") is None
        assert await read_all(storage, part_path("t1")) == b"content"


async def test_should_a_file_have_come_where_the_claim_was_it_is_not_removed(storage, behind):
    behind.put("f", b"theirs")
    storage._take_away_claim("/site/data/f")
    assert behind.get("f") == b"theirs"


def leave_claim(storage, path: str) -> None:
    server = storage.server
    server.close(server.create(f"{storage.root}/{path}", 0o601))


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_servers_digest_is_given_for_what_was_just_written_and_for_nothing_else(storage, behind):
    """Once asked, the server answers from memory, and does not see that a bit turned."""
    content = bytes(1000)
    digest = f"{zlib.adler32(content):08x}"
    await write(storage, part_path("t1"), content)
    assert await storage.checksum(part_path("t1"), "adler32") == digest
    assert await storage.checksum(part_path("t1"), "sha256") is None
    await storage.publish(part_path("t1"), "f")
    behind.flip("f", 500)
    assert storage.server.checksum("/site/data/f", "adler32", 1000) == f"adler32 {digest}"
    assert await storage.checksum("f", "adler32") is None


# ── listings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [b"line\nbreak", b"not \xff UTF-8", b"x" * 255])
async def test_a_folder_with_a_name_that_cannot_be_listed_is_an_error_and_no_gap(storage, behind, name):
    behind.put("a/good", b"1")
    behind.put(f"a/{os.fsdecode(name)}", b"2")
    error = await refusal(Permanent, lambda: listed(storage))
    assert error.path == "a"
    assert (await storage.stat("a/good")).size_bytes == 1


async def test_what_is_no_regular_file_is_listed_with_its_problem_and_never_opened_or_removed(storage, behind):
    behind.put("folder/f", b"1")
    (behind.root / "empty").mkdir()
    os.mkfifo(behind.root / "pipe")
    behind.put("what?", b"1")
    problems = {e.path: e.problem for e in await listed(storage)}
    assert problems == {"folder/f": "", "pipe": "not a regular file", "what?": "name that XRootD cannot keep"}
    for path in ("pipe", "folder", "empty"):
        for verb in (storage.stat, storage.delete, storage.quarantine, lambda p: read_all(storage, p)):
            await refusal(Forbidden, lambda verb=verb, path=path: verb(path))
    assert (behind.root / "empty").is_dir()


# ── endpoints, servers that are away ─────────────────────────────────────────────────────────────────────────────────


async def test_a_folder_belongs_to_one_endpoint(xrootd, storage, behind):
    error = await refusal(Refused, storage_at(xrootd, name="OTHER").prepare)
    assert "GRID" in error.message
    await refusal(Refused, storage_at(xrootd, "site/data/nested", name="NESTED").prepare)
    await refusal(Unreachable, lambda: storage_at(xrootd, name="OTHER").stat("f"))
    assert SENTINEL in behind.paths()


async def test_a_server_that_is_silent_is_given_up_in_time(xrootd, storage, monkeypatch):
    from replica.storage import xrootd_calls

    monkeypatch.setattr(xrootd_calls, "ASK_SECONDS", 1)
    monkeypatch.setattr(
        storage.server, "_ask", lambda *a, **k: type(storage.server)._ask(storage.server, *a, seconds=1)
    )
    xrootd.process.send_signal(signal.SIGSTOP)
    while " T " not in Path(f"/proc/{xrootd.process.pid}/stat").read_text():
        await asyncio.sleep(0.01)  # a busy machine lets its threads go on for a moment
    try:
        await refusal(TimedOut, lambda: storage.stat("f"))
    finally:
        xrootd.process.send_signal(signal.SIGCONT)
    await refusal(SourceMissing, lambda: storage.stat("f"))


async def test_a_server_that_dies_while_it_is_written_to_leaves_nothing_published(xrootd, storage, behind):
    async def chunks():
        yield bytes(adapter.PIECE_BYTES)
        xrootd.kill()
        xrootd.start()  # not in a thread: the server would end with it
        yield bytes(adapter.PIECE_BYTES)

    await refusal(Unreachable, lambda: storage.write(part_path("t1"), chunks()))
    await storage.delete(part_path("t1"))
    assert await listed(storage) == []


async def test_many_tasks_use_it_at_once(storage, behind):
    for number in range(20):
        behind.put(f"f{number}", bytes([number]) * 100_000)
    contents = await asyncio.gather(*(read_all(storage, f"f{number}") for number in range(20)))
    assert contents == [bytes([number]) * 100_000 for number in range(20)]


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_will_not_fit_is_refused_before_the_first_byte(storage, behind):
    async def none():
        raise AssertionError("was asked for bytes")
        yield b""

    await refusal(NoSpace, lambda: storage.write(part_path("t1"), none(), size_bytes=1 << 60))
    assert not any(p.startswith(PARTS) for p in behind.paths())


async def test_a_folder_the_server_may_not_write_to_is_forbidden_and_a_file_in_the_way_is_said(storage, behind):
    behind.put("ours/f", b"1")
    behind.put("root/f", b"1")
    os.chown(behind.root / "root", 0, 0)
    await write(storage, part_path("t1"), b"x")
    await refusal(Forbidden, lambda: storage.publish(part_path("t1"), "root/g"))
    await refusal(Forbidden, lambda: storage.delete("root/f"))
    await refusal(Permanent, lambda: storage.publish(part_path("t1"), "ours/f/g"))
    assert behind.get("ours/f") == b"1"
    assert await read_all(storage, part_path("t1")) == b"x"


@pytest.mark.parametrize(
    ("code", "number", "text", "kind"),
    [
        (400, 3009, "", NoSpace),
        (400, 3021, "", NoSpace),
        (400, 3005, "Unable to write /f; no space left on device", NoSpace),
        (400, 3005, "Unable to write /f; disk quota exceeded", NoSpace),
        (400, 3025, "", Forbidden),
        (400, 3024, "", Busy),
        (400, 3007, "", Transient),
        (400, 3012, "something new", Transient),
        (400, 3034, "", TimedOut),
        (206, 0, "", TimedOut),
        (204, 0, "", Forbidden),
        (108, 0, "", Unreachable),
        (999, 0, "", Unreachable),
    ],
)
def test_each_answer_is_one_kind_of_error(code, number, text, kind):
    server = Server("host", name="GRID")
    status = type("Status", (), {"ok": False, "code": code, "errno": number, "message": text})
    with pytest.raises(kind) as told, translated("GRID", "f"):
        server._checked((status, None))
    assert type(told.value) is kind
    assert told.value.endpoint == "GRID"


# ── URLs and secrets ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "root://",
        "root:///data",
        "root://host",
        "root://host/data",
        "root://host:99999//data",
        "root://host:x//data",
        "root://host//data//x",
        "root://host//data/../x",
        "root://host//data%3Fx",
        "root://user@host//data",
        "root://host//data?authz=x",
    ],
)
def test_urls_that_are_not_plain_are_refused(url):
    with pytest.raises(Invalid):
        open_storage(url)


def test_a_token_goes_by_tls_only_and_is_in_no_message(tmp_path: Path):
    credentials = Credentials({"roots://host": {"token": "s3cret"}, "root://host": {"token": "s3cret"}})
    with pytest.raises(Invalid, match="in the clear"):
        open_storage("root://host//data", name="GRID", credentials=credentials)
    storage = open_storage("roots://host//data/", name="GRID", credentials=credentials)
    assert storage.server.base == "roots://host/"
    assert storage.root == "/data"
    assert storage.server._with("/data/f", "cks.type=md5") == "/data/f?cks.type=md5&authz=Bearer%20s3cret"
    status = type("Status", (), {"ok": False, "code": 400, "errno": 3005, "message": "bad /data/f?authz=s3cret"})
    with pytest.raises(OSError) as told:
        storage.server._checked((status, None))
    assert "s3cret" not in str(told.value)


def test_roots_is_tls_and_trusts_whom_the_site_trusts(xrootd: XRootD):
    """In a process of its own: the library reads whom to trust from the environment, once."""
    script = f"""if True:
        import asyncio
        from replica.storage.registry import open_storage
        from rules.errors import StorageError

        async def main():
            storage = open_storage("roots://localhost:{xrootd.port}//tls", name="GRID")
            try:
                await storage.prepare()
                print("let in", (await storage.space()).total_bytes > 0)
            except StorageError as error:
                print(error.code)

        asyncio.run(main())
    """

    def told_with(trusted: Path) -> str:
        environment = os.environ | {"X509_CERT_DIR": str(trusted), "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip() or done.stderr

    assert told_with(xrootd.tls / "ca") == "let in True"
    assert told_with(xrootd.data) in ("unreachable", "forbidden")
