"""The SFTP backend against OpenSSH's server: the shipped suite, who is let in, and what breaks."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from functools import partial

import asyncssh
import pytest

from replica.storage import sftp, ssh
from replica.storage.base import PARTS, SENTINEL, Storage, part_path
from replica.storage.conformance import StorageConformance, listed, pattern, read_all, refusal, write
from replica.storage.credentials import Credentials
from replica.storage.registry import open_storage
from replica.storage.sftp_faults import Unexplained, from_ssh
from rules.errors import (
    Forbidden,
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
from tests.servers_ssh import OpenSSH


@pytest.fixture(scope="module")
def _server():
    server = OpenSSH()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def server(_server):
    """An empty server that runs and is known, whatever the test before did to it."""
    if _server.process is None:
        _server.start()
    _server.know()
    for path in _server.data.iterdir():
        shutil.rmtree(path)
    return _server


def at(server, **settings):
    return open_storage(server.url, name="SSH", credentials=Credentials({server.url: server.settings | settings}))


@pytest.fixture
async def storage(server):
    storage = at(server)
    await storage.prepare()
    yield storage
    await storage.close()


class BehindServer(BehindFolder):
    def __init__(self, server):
        super().__init__(server.data / "root")
        self.server = server

    def put(self, path, content):
        super().put(path, content)
        file = self.root / path
        while file != self.root:
            self.server.give_away(file)
            file = file.parent


@pytest.fixture
def behind(server):
    return BehindServer(server)


class TestSftp(StorageConformance):
    clock_seconds = 1.1  # version 3 of the protocol tells times in whole seconds

    async def test_it_keeps_the_contract(self, storage):
        assert isinstance(storage, Storage)


# ── who is who ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_with_another_host_key_is_refused_with_its_fingerprint_and_a_remedy(server, storage):
    behind_it = asyncssh.read_public_key(server.directory / "host_key.pub").get_fingerprint()
    server.know("other_key")
    stranger = at(server)
    error = await refusal(Forbidden, lambda: stranger.stat("f"))
    assert error.endpoint == "SSH"
    assert behind_it in error.message
    assert str(server.directory / "known_hosts") in error.message
    assert f"ssh-keyscan -p {server.port} 127.0.0.1" in error.hint
    (server.directory / "known_hosts").write_text("")
    await refusal(Forbidden, lambda: stranger.stat("f"))
    server.know()  # the file is read anew for each connection
    await refusal(SourceMissing, lambda: stranger.stat("f"))
    await stranger.close()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"key_file": "{own}/other_key"}, "does not let"),
        ({"user": "no-such-user"}, "no-such-user"),
        ({"user": ""}, "no credentials"),
        ({"key_file": "/no/such/key"}, "/no/such/key"),
        ({"key_file": "{own}/sshd_config"}, "sshd_config"),
        ({"known_hosts_file": "/no/such/hosts"}, "/no/such/hosts"),
    ],
)
async def test_who_cannot_log_in_is_told_why(server, storage, settings, named):
    given = {key: value.format(own=server.directory) for key, value in settings.items()}
    refused = at(server, password="s3cr3t", **given)
    error = await refusal(Forbidden, lambda: refused.stat("f"))
    assert named in error.message
    assert error.hint
    assert "s3cr3t" not in f"{error.message} {error.hint} {refused.__dict__} {error.__cause__}"


async def test_without_credentials_every_verb_is_refused_and_opening_is_not(server):
    storage = open_storage(server.url, name="SSH")
    for verb in (storage.prepare, storage.space, partial(storage.stat, "f"), partial(listed, storage)):
        error = await refusal(Forbidden, verb)
        assert server.url in error.hint


# ── what breaks ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_killed_in_the_middle_of_a_write_publishes_nothing_and_is_found_again(server, storage, behind):
    part = part_path("t1")

    async def chunks():
        for number in range(64):
            if number == 8:
                server.kill()
            yield pattern(1 << 20)

    error = await refusal(Unreachable, lambda: storage.write(part, chunks()))
    assert error.path == part
    assert error.hint
    await refusal(Unreachable, lambda: storage.publish(part, "f"))
    server.start()
    await storage.delete(part)
    assert behind.paths() == [SENTINEL]
    await write(storage, part, b"again")
    await storage.publish(part, "f")
    assert behind.get("f") == b"again"


async def test_a_server_killed_in_the_middle_of_a_read_gives_no_short_file(server, storage, behind):
    behind.put("f", pattern(32 << 20))

    async def read():
        async for _ in storage.read("f"):
            if server.process is not None:
                server.kill()

    await refusal(Unreachable, read)
    server.start()
    assert await read_all(storage, "f", 5, 10) == pattern(15)[5:]


async def test_a_connection_that_dropped_while_idle_costs_nothing(server, storage, behind):
    behind.put("f", b"12345")
    verbs = (
        lambda: storage.stat("f"),
        lambda: read_all(storage, "f"),
        lambda: listed(storage),
        lambda: write(storage, part_path("t1"), b"x"),
        lambda: storage.publish(part_path("t1"), "g"),
        lambda: storage.delete("g"),
        lambda: storage.quarantine("f"),
        lambda: storage.collect_parts(0.0),
        lambda: storage.space(),
    )
    for verb in verbs:
        server.cut()
        await verb()


async def test_a_server_that_hangs_times_out_and_is_asked_anew(server, storage, behind, monkeypatch):
    behind.put("f", b"12345")
    await storage.stat("f")
    server.hold()
    monkeypatch.setattr(ssh.Session.ask, "__defaults__", (0.2,))
    try:
        await refusal(TimedOut, lambda: storage.stat("f"))
    finally:
        server.hold(signal.SIGCONT)
        monkeypatch.undo()
    assert (await storage.stat("f")).size_bytes == 5


async def test_a_full_disk_is_no_space_and_what_was_there_stays():
    server = OpenSSH(room_bytes=4 << 20)
    try:
        server.start()
        storage = at(server)
        await storage.prepare()
        await write(storage, part_path("t1"), b"kept")
        await storage.publish(part_path("t1"), "f")
        # Without the right to mount a small disk it is a limit that the server does not explain.
        kind = NoSpace if server.account is not None else Unexplained
        await refusal(kind, lambda: write(storage, part_path("t2"), *[pattern(1 << 20)] * 8))
        await storage.delete(part_path("t2"))
        if kind is NoSpace:
            whole = storage.write(part_path("t3"), chunks_never_asked_for(), size_bytes=8 << 20)
            assert (await refusal(NoSpace, lambda: whole)).side == "target"
        await write(storage, part_path("t4"), pattern(1 << 20))
        await storage.publish(part_path("t4"), "g")
        assert await read_all(storage, "f") == b"kept"
        assert await read_all(storage, "g") == pattern(1 << 20)
        await storage.close()
    finally:
        server.remove()


async def chunks_never_asked_for():
    raise AssertionError("the first byte was asked for")
    yield b""


async def test_a_server_that_only_lets_us_read_is_read_and_refuses_the_rest(server, storage, behind):
    behind.put("f", b"12345")
    await write(storage, part_path("t1"), b"x")
    read_only = OpenSSH(options="-R")
    read_only.data = server.data
    try:
        read_only.start()
        storage = at(read_only)
        assert await read_all(storage, "f") == b"12345"
        for verb in (
            lambda: write(storage, part_path("t2"), b"x"),
            lambda: storage.publish(part_path("t1"), "g"),
            lambda: storage.delete("f"),
            lambda: storage.quarantine("f"),
        ):
            assert (await refusal(Forbidden, verb)).hint
        await storage.close()
    finally:
        read_only.remove()


def test_what_a_server_says_becomes_what_it_means():
    for error, kind in (
        (asyncssh.SFTPFailure("Failure"), Unexplained),
        (asyncssh.SFTPFailure("write: No space left on device"), NoSpace),
        (asyncssh.SFTPFailure("Disk quota exceeded"), NoSpace),
        (asyncssh.SFTPError(asyncssh.FX_NO_SPACE_ON_FILESYSTEM, "full"), NoSpace),
        (asyncssh.SFTPError(asyncssh.FX_FILE_ALREADY_EXISTS, "there"), TargetExists),
        (asyncssh.SFTPError(99, "what?"), Unexplained),
        (asyncssh.SFTPPermissionDenied("no"), Forbidden),
        (asyncssh.SFTPConnectionLost("gone"), Unreachable),
        (asyncssh.ConnectionLost("gone"), Unreachable),
        (asyncssh.ChannelOpenError(1, "too many"), Unreachable),
        (ConnectionResetError(104, "reset"), Unreachable),
        (TimeoutError(), TimedOut),
    ):
        found = from_ssh(error, endpoint="SSH", path="a/b")
        assert type(found) is kind, error
        assert (found.endpoint, found.path) == ("SSH", "a/b")
        assert "a/b at SSH" in found.message
    assert issubclass(Unexplained, Transient)


# ── odd places ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_symbolic_links_are_not_followed(server, storage, behind):
    outside = server.data / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"secret")
    server.give_away(outside)
    behind.put("real/f", b"x")
    (behind.root / "folder").symlink_to(outside)
    (behind.root / "file").symlink_to(outside / "f")
    (behind.root / "real" / "inner").symlink_to("f")
    await write(storage, part_path("t1"), b"x")
    for path in ("folder/f", "file", "real/inner"):
        for verb in (
            lambda path=path: storage.stat(path),
            lambda path=path: read_all(storage, path),
            lambda path=path: storage.delete(path),
            lambda path=path: storage.quarantine(path),
        ):
            assert "symbolic link" in (await refusal(Forbidden, verb)).message
    await refusal(Forbidden, lambda: storage.publish(part_path("t1"), "folder/new"))
    await refusal(Forbidden, lambda: listed(storage, "folder/f"))
    await refusal(TargetExists, lambda: storage.publish(part_path("t1"), "file"))
    found = {entry.path: entry.problem for entry in await listed(storage)}
    assert found == dict.fromkeys(("folder", "file", "real/inner"), "symbolic link") | {"real/f": ""}
    assert [entry.problem for entry in await listed(storage, "folder")] == ["symbolic link"]
    assert os.listdir(outside) == ["f"]


async def test_what_is_no_replica_is_listed_with_its_problem_and_a_pipe_blocks_nobody(server, storage, behind):
    behind.put("f", b"x")
    behind.put(".replicas", b"x")
    (behind.root / os.fsdecode(b"caf\xe9")).write_bytes(b"x")
    os.mkfifo(behind.root / "pipe")
    found = {entry.path: entry.problem for entry in await listed(storage)}
    assert found == {
        "f": "",
        ".replicas": "name is kept for Replica",
        "caf\\xe9": "name is not UTF-8",
        "pipe": "FIFO",
    }
    for verb in (lambda: storage.stat("pipe"), lambda: read_all(storage, "pipe"), lambda: storage.delete("pipe")):
        assert "FIFO" in (await refusal(Forbidden, verb)).message


async def test_what_may_not_be_read_is_forbidden_and_never_left_out(server, storage, behind):
    behind.put("f", b"x")
    behind.put("closed/f", b"x")
    behind.put("names only/f", b"x")
    (behind.root / "f").chmod(0)
    await refusal(Forbidden, lambda: read_all(storage, "f"))
    for folder, mode in (("closed", 0), ("names only", 0o444)):
        (behind.root / folder).chmod(mode)
        error = await refusal(Forbidden, lambda: listed(storage))
        assert folder in error.path
        await refusal(Forbidden, lambda folder=folder: listed(storage, folder))
        await refusal(Forbidden, lambda folder=folder: storage.stat(f"{folder}/f"))
        (behind.root / folder).chmod(0o755)


async def test_somebody_elses_file_goes_to_quarantine(server, storage, behind):
    """A server makes no hard link to a file that is not the user's (fs.protected_hardlinks)."""
    behind.put("f", b"theirs")
    if os.geteuid() == 0:
        os.chown(behind.root / "f", 0, 0)
    assert behind.get(await storage.quarantine("f")) == b"theirs"


async def test_killed_between_the_two_steps_of_a_publish_both_names_are_one_whole_file(storage, behind):
    await write(storage, part_path("t1"), b"whole")
    os.link(behind.root / part_path("t1"), behind.root / "f")
    await refusal(TargetExists, lambda: storage.publish(part_path("t1"), "f"))
    assert await read_all(storage, "f") == b"whole"
    assert await storage.collect_parts(0.0) == 1
    assert behind.paths() == [SENTINEL, "f"]


async def test_names_that_cannot_be_are_refused_before_any_effect(storage, behind):
    behind.put("file", b"x")
    await write(storage, part_path("t1"), b"x")
    before = behind.paths()
    error = await refusal(Permanent, lambda: storage.publish(part_path("t1"), "a/" + "x" * 256))
    assert "too long" in error.message
    await refusal(TargetExists, lambda: storage.publish(part_path("t1"), "file/f"))
    await refusal(SourceMissing, lambda: storage.stat("file/f"))
    await storage.delete("file/f")
    assert await listed(storage, "file") == []
    assert behind.paths() == before
    assert not (behind.root / "a").exists()


async def test_endpoints_are_not_nested_nor_taken_for_each_other(server, storage, behind):
    settings = Credentials({server.url: server.settings})
    inner = open_storage(server.url + "/in/ner", name="INNER", credentials=settings)
    await refusal(Refused, inner.prepare)
    other = open_storage(server.url, name="OTHER", credentials=settings)
    await refusal(Refused, other.prepare)
    await refusal(Unreachable, lambda: other.stat("f"))
    assert behind.paths() == [SENTINEL]
    assert not (behind.root / "in").exists()
    for opened in (inner, other):
        await opened.close()


async def test_a_place_without_safe_hard_links_is_refused_when_it_is_prepared(server, behind, monkeypatch):
    async def fails(self, old, new, shown):
        raise Unexplained("the server says 'Failure'")

    async def replaces(self, old, new, shown):
        pass

    for link in (fails, replaces):
        monkeypatch.setattr(ssh.Session, "link", link)
        storage = at(server)
        error = await refusal(Forbidden, storage.prepare)
        assert "hard link" in error.message
        assert not any(path.startswith(PARTS) for path in behind.paths())
        await storage.close()


# ── how it works ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_requests_of_one_file_are_on_the_way_at_once_and_its_bytes_stay_in_order():
    class Slow:
        now = most = 0

        async def read(self, offset, length):
            self.now += 1
            self.most = max(self.most, self.now)
            for _ in range(7 - offset % 7):  # later requests are answered before earlier ones
                await asyncio.sleep(0)
            self.now -= 1
            return content[offset : offset + length]

        async def write(self, offset, data):
            await self.read(offset, 0)
            written[offset : offset + len(data)] = data

    async def chunks():
        buffer = bytearray(1000)  # used again for each
        for begin in range(0, len(content), 1000):
            piece = content[begin : begin + 1000]
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]

    content, written, slow = pattern(50_003), bytearray(50_003), Slow()
    pieces = [piece async for piece in sftp._read_ahead(slow, 3, len(content), 256)]
    assert b"".join(pieces) == content[3:]
    assert slow.most == sftp.AHEAD
    slow.most = 0
    await sftp._write_ahead(slow, chunks(), 256)
    assert written == content
    assert slow.most == sftp.AHEAD


async def test_each_event_loop_has_its_own_connection(server, storage, behind):
    behind.put("f", b"12345")
    sizes = []

    async def elsewhere():
        sizes.append((await storage.stat("f")).size_bytes)

    for _ in range(2):
        thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
        thread.start()
        sizes.append((await storage.stat("f")).size_bytes)
        await asyncio.to_thread(thread.join)
    assert sizes == [5] * 4


async def test_a_cancelled_write_leaves_nothing_open_at_the_server(server, storage):
    held = asyncio.Event()

    async def chunks():
        yield b"x"
        held.set()
        await asyncio.Event().wait()

    for number in range(3):
        task = asyncio.create_task(storage.write(part_path(f"t{number}"), chunks()))
        await held.wait()
        held.clear()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await storage.delete(part_path(f"t{number}"))
    await storage.close()  # waits for what is being closed
    assert await storage.collect_parts(0.0) == 0
    open_files = [
        os.readlink(f"/proc/{child}/fd/{descriptor}")
        for child in server._children()
        for descriptor in os.listdir(f"/proc/{child}/fd")
    ]
    assert not [path for path in open_files if PARTS in path]
