"""Third-party copies between two real XRootD servers, and every way in which such servers were seen to fail.

The servers' faults that come at random are imitated by tests.servers_faulty, in front of a real one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from aiohttp import web

from replica.storage import thirdparty
from replica.storage.base import PARTS, Party
from replica.storage.copy import Control, Copied, Expected, Stopped, copy_file
from replica.storage.credentials import Credentials
from replica.storage.hashing import Hasher
from replica.storage.registry import open_storage
from replica.storage.thirdparty import Memory, Patience, Way, copy_between, copy_headers
from replica.storage.webdav import WebdavStorage
from rules.checksums import Checksums
from rules.errors import Busy, ChecksumDiffers, NoSpace, SourceMissing, StorageError, TargetExists
from tests.servers_faulty import Behaviour, FaultyCopy, hanging, leaving, marker, orphaned, refusing
from tests.servers_xrootd import XRootD

CONTENT = os.urandom(50_000)
QUICK = Patience(
    first_byte_seconds=0.5, between_bytes_seconds=0.5, tick_seconds=0.02, settled_seconds=0.15, settling_seconds_max=3
)


@pytest.fixture(autouse=True)
def _forgotten() -> None:
    thirdparty.memory.__init__()  # type: ignore[misc]
    thirdparty._folders_made.clear()


def expected(content: bytes = CONTENT) -> Expected:
    hasher = Hasher()
    hasher.update(content)
    return Expected(len(content), hasher.checksums())


def opened(url: str, name: str, **settings: str) -> WebdavStorage:
    storage = open_storage(f"{url}/data", name=name, credentials=Credentials({url: settings}))
    assert isinstance(storage, WebdavStorage)
    return storage


@dataclass
class Place:
    """Two storages over two servers; each may be one whose COPY goes wrong."""

    source: WebdavStorage
    target: WebdavStorage
    one: XRootD
    two: XRootD
    pulls: FaultyCopy  #: in front of the target
    pushes: FaultyCopy  #: in front of the source

    async def copy(self, **more: object) -> Copied:
        """As a worker does."""
        arguments = {"tag": "t-1", "expected": expected()} | more
        return await copy_file(self.source, "x/f", self.target, "y/g", **arguments)  # type: ignore[arg-type]

    async def between(self, control: Control | None = None, patience: Patience = QUICK) -> Copied | None:
        return await copy_between(
            self.source, "x/f", self.target, "y/g",
            tag="t-1", expected=expected(), control=control or Control(), patience=patience,
        )  # fmt: skip

    @property
    def published(self) -> bytes | None:
        file = self.two.data / "data/y/g"
        return file.read_bytes() if file.exists() else None

    @property
    def parts(self) -> list[str]:
        folder = self.two.data / "data" / PARTS
        return os.listdir(folder) if folder.exists() else []


@pytest.fixture
async def place(xrootd_pair: tuple[XRootD, XRootD]) -> AsyncIterator[Place]:
    one, two = xrootd_pair
    async with FaultyCopy(two) as pulls, FaultyCopy(one) as pushes:
        source, target = opened(pushes.url, "SOURCE"), opened(pulls.url, "TARGET")
        await source.prepare()
        await target.prepare()
        one.put("data/x/f", CONTENT)
        made = Place(source, target, one, two, pulls, pushes)
        try:
            yield made
        finally:
            await made.source.close()
            await made.target.close()


def right(place: Place, copied: Copied | None) -> None:
    assert copied is not None
    assert (copied.size_bytes, copied.adopted, copied.moved_bytes) == (len(CONTENT), False, len(CONTENT))
    assert copied.verified_by == "digest adler32"
    assert copied.checksums.get("adler32") == f"{zlib.adler32(CONTENT):08x}"
    assert place.published == CONTENT
    assert place.parts == []


# ── as it should be ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_target_pulls_into_a_temporary_and_the_worker_sees_no_byte(place: Place) -> None:
    control = Control()
    right(place, await place.copy(control=control))
    assert control.bytes_done == len(CONTENT)
    (asked,) = place.pulls.copies
    assert asked["Source"] == f"{place.pushes.url}/data/x/f"
    assert (asked["Overwrite"], asked["Credential"], asked["X-Number-Of-Streams"]) == ("F", "none", "1")
    (path,) = place.pulls.paths
    assert path.startswith(f"data/{PARTS}/t-1.")
    assert place.pushes.copies == []


async def test_a_target_that_refuses_is_pushed_to_and_that_is_remembered(place: Place) -> None:
    place.pulls.behaviour = refusing(403, "no third parties")
    for _ in range(3):
        right(place, await place.copy())
        (place.two.data / "data/y/g").unlink()
    assert len(place.pulls.copies) == 1
    assert [asked["Destination"].rpartition("/")[0] for asked in place.pushes.copies] == [
        f"{place.pulls.url}/data/{PARTS}"
    ] * 3


async def test_when_neither_does_the_worker_streams(place: Place) -> None:
    place.pulls.behaviour = place.pushes.behaviour = refusing(501)
    copied = await place.copy()
    assert copied.verified_by == "digest adler32"
    assert copied.checksums.get("xxh3_128") == expected().checksums.get("xxh3_128")  # it saw the bytes
    assert place.published == CONTENT
    assert place.parts == []


def test_a_way_that_began_and_failed_is_left_out_after_the_third_time_and_not_for_ever() -> None:
    memory = Memory()
    for _ in range(2):
        memory.failed("a", "b", Way.PULL, 0.0, refused=False)
    assert memory.ways("a", "b", 0.0) == [Way.PULL, Way.PUSH]
    memory.succeeded("a", "b", Way.PULL)
    for _ in range(3):
        memory.failed("a", "b", Way.PULL, 0.0, refused=False)
    memory.failed("a", "b", Way.PUSH, 0.0, refused=True)
    assert memory.ways("a", "b", 1.0) == []
    assert memory.ways("b", "a", 1.0) == [Way.PULL, Way.PUSH]
    assert memory.ways("a", "b", thirdparty.REMEMBERED_SECONDS + 1) == [Way.PULL, Way.PUSH]


async def test_a_checksum_that_the_server_cannot_compute_is_computed_from_what_is_read_back(place: Place) -> None:
    only = Expected(len(CONTENT), Checksums.of({"xxh3_128": expected().checksums.get("xxh3_128") or ""}))
    copied = await place.copy(expected=only)
    assert copied.verified_by == "read back"
    assert len(place.pulls.copies) == 1
    assert place.published == CONTENT


async def test_a_file_without_known_checksums_is_not_left_to_others(place: Place) -> None:
    assert (await place.copy(expected=None)).size_bytes == len(CONTENT)
    assert place.pulls.copies == place.pushes.copies == []


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("path", "content"), [("x/ä b%41+;&#.dat", CONTENT), ("x/empty", b"")])
async def test_odd_names_and_empty_files(
    xrootd_pair: tuple[XRootD, XRootD], path: str, content: bytes, secure: bool
) -> None:
    """Straight between the real ones, in the open and over TLS."""
    one, two = xrootd_pair
    source, target = (
        opened(server.url_https if secure else server.url_http, name, ca_file=str(server.ca_file))
        for server, name in ((one, "SOURCE"), (two, "TARGET"))
    )
    one.put(f"data/{path}", content)
    try:
        await target.prepare()
        copied = await copy_between(
            source, path, target, path, tag="t", expected=expected(content), control=Control(), patience=QUICK
        )
        assert copied is not None
        assert copied.checksums.get("xxh3_128") is None  # the worker saw no byte
        assert (two.data / "data" / path).read_bytes() == content
    finally:
        await source.close()
        await target.close()


async def test_a_connection_lost_before_the_answer_is_tried_once_more(place: Place) -> None:
    async def lost_once(server: FaultyCopy, request: web.Request) -> web.StreamResponse:
        server.behaviour = None
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    place.pulls.behaviour = lost_once
    right(place, await place.copy())
    first, second = place.pulls.paths
    assert first != second
    assert place.pushes.copies == []


# ── the eight faults of XRootD ───────────────────────────────────────────────────────────────────────────────────────


async def test_fault_1_a_body_that_is_cut_short_at_random_is_not_published(place: Place) -> None:
    """Chunked bodies leave short files: whoever wrote it, and whatever he said, the size is looked at."""
    place.pulls.behaviour = leaving(CONTENT[:30_000], b"success: Created\n")
    place.pushes.behaviour = refusing(501)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.source, "read", _no_reading)
        with pytest.raises(AssertionError, match="streams"):
            await place.copy()
    assert len(place.pulls.copies) == 1
    assert place.published is None
    assert place.parts == []
    right(place, await _streamed(place))


async def _no_reading(*_: object) -> AsyncIterator[bytes]:
    raise AssertionError("the worker streams")
    yield b""


async def _streamed(place: Place) -> Copied:
    copied = await place.copy()
    assert copied.checksums.get("xxh3_128")
    return copied


async def test_fault_2_created_means_started(place: Place) -> None:
    """201 for a source that is not there."""
    (place.one.data / "data/x/f").unlink()
    with pytest.raises(SourceMissing) as failed:
        await place.copy()
    assert failed.value.side == "source"
    assert len(place.pulls.copies) == 1  # the real server: it said 201
    assert place.pushes.copies == []
    assert place.published is None


async def test_fault_3_what_a_failed_copy_leaves_is_removed(place: Place) -> None:
    """… and 201 for a source that does not answer; an empty file stays behind."""
    seen: list[list[str]] = []
    deleting = place.target.delete

    async def delete(path: str) -> None:
        seen.append(place.parts)
        await deleting(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.target, "delete", delete)
        patch.setattr(place.source, "party", _party_at("http://127.0.0.1:9/data/x/f", place.source))
        patch.setattr(place.source, "url", "http://127.0.0.1:9/data")
        assert await place.between() is None
    assert len(seen[0]) == 1
    assert place.parts == []
    assert place.published is None


def _party_at(url: str, storage: WebdavStorage) -> Callable[[str], Awaitable[Party]]:
    async def party(path: str) -> Party:
        return Party(url, storage.http.pool().session)

    return party


async def test_fault_4_an_existing_good_file_is_never_the_target_of_a_copy(place: Place) -> None:
    """It would be emptied. What has the name is looked at first, and a copy never carries that name."""
    place.two.put("data/y/g", CONTENT)
    assert (await place.copy()).adopted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thirdparty, "NO_LOOK_BYTES_MAX", 0)  # a large file is not even copied
        assert (await place.copy()).adopted
    (place.one.data / "data/x/f").unlink()
    assert (await place.copy()).adopted  # nor is the source needed
    assert place.published == CONTENT
    assert {path.rpartition("/")[0] for path in place.pulls.paths} == {f"data/{PARTS}"}
    # Somebody is faster, between our look and our move: his bytes stay.
    place.one.put("data/x/f", CONTENT)
    (place.two.data / "data/y/g").unlink()
    copied = await place.copy(before_publish=lambda: place.two.put("data/y/g", CONTENT) and None)
    assert copied.adopted
    assert place.published == CONTENT
    assert place.parts == []


@pytest.mark.parametrize("dropped", [False, True])
async def test_fault_5_a_server_that_goes_on_after_we_hung_up_does_no_harm(place: Place, dropped: bool) -> None:
    place.pulls.behaviour = orphaned(CONTENT[::-1], 20, 1.5, dropped=dropped)
    impatient = Patience(0.2, 0.2, 0.02, 0.1, 0.3)
    right(place, await place.between(patience=impatient))  # it was pushed meanwhile
    assert (len(place.pulls.copies), len(place.pushes.copies)) == (1, 1)
    (first,), second = place.pulls.paths, place.pushes.copies[0]["Destination"]
    assert first not in second
    await asyncio.gather(*place.pulls.background)
    assert place.published == CONTENT
    assert place.parts == []


async def test_fault_6_no_digest_but_that_of_what_arrived_is_believed(place: Place) -> None:
    """Right size, wrong bytes, success: the target's own digest tells; streaming then finds whose fault it was."""
    wrong = bytearray(CONTENT)
    wrong[123] ^= 1
    place.pulls.behaviour = leaving(bytes(wrong), b"success: Created\n")
    right(place, await _streamed(place))
    assert place.pushes.copies == []


async def test_fault_7_missing_folders_are_made(place: Place) -> None:
    right(place, await place.copy())
    (place.two.data / "data/y/g").unlink()
    shutil.rmtree(place.two.data / "data" / PARTS)
    right(place, await place.between())
    assert len(place.pulls.copies) == 3  # one of them was refused


async def test_fault_8_a_checksum_from_before_the_rot_hides_nothing(place: Place) -> None:
    """The source's server swears by the checksum it kept; the target has computed its own."""
    assert await place.source.checksum("x/f", "adler32") == f"{zlib.adler32(CONTENT):08x}"
    file = place.one.data / "data/x/f"
    found = file.stat()
    with file.open("r+b") as opened:
        opened.write(bytes([CONTENT[0] ^ 1]))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert await place.source.checksum("x/f", "adler32") == f"{zlib.adler32(CONTENT):08x}"
    with pytest.raises(ChecksumDiffers) as failed:
        await place.copy()
    assert failed.value.side == "source"
    assert len(place.pulls.copies) == 1
    assert place.published is None
    assert place.parts == []


# ── other endings ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "behaviour",
    [
        leaving(CONTENT, b""),  # all of it arrived, and the server forgot to say so
        hanging(CONTENT, dropped=True),
        orphaned(CONTENT, 5, 0.3),  # it is written to the end after the connection was lost
    ],
)
async def test_without_a_last_line_the_file_itself_is_asked(place: Place, behaviour: Behaviour) -> None:
    place.pulls.behaviour = behaviour
    right(place, await place.between())
    assert place.pushes.copies == []


@pytest.mark.parametrize(
    "behaviour",
    [
        leaving(CONTENT[:10], b""),
        hanging(CONTENT[:10], dropped=True),
        leaving(CONTENT, b"failure: the source went away\n"),  # it is not believed to be right after that
        leaving(CONTENT[:10], b"failure: Transferred a partial file\n"),
        leaving(b"", b"success: Created\n", markers=marker(50_000)),
    ],
)
async def test_what_failed_after_201_is_tried_the_other_way(place: Place, behaviour: Behaviour) -> None:
    place.pulls.behaviour = behaviour
    right(place, await place.between())
    assert len(place.pushes.copies) == 1


async def test_a_copy_that_stalls_is_given_up(place: Place) -> None:
    place.pulls.behaviour, place.pushes.behaviour = hanging(CONTENT[:10_000]), hanging(None)
    control = Control()
    assert await place.between(control) is None
    assert len(place.pulls.copies) == 1
    assert place.published is None
    assert place.parts == []


async def test_progress_is_told_and_stop_is_heard(place: Place) -> None:
    place.pulls.behaviour = hanging(CONTENT[:10_000])
    control = Control()
    copying = asyncio.create_task(place.copy(control=control))
    async with asyncio.timeout(10):
        while control.bytes_done != 10_000:
            await asyncio.sleep(0.01)
        control.stop()
        with pytest.raises(Stopped):
            await copying
    assert place.published is None
    assert place.parts == []


async def test_cancelling_hangs_up_and_removes_the_temporary(place: Place) -> None:
    place.pulls.behaviour = hanging(CONTENT[:10_000])
    control = Control()
    copying = asyncio.create_task(place.copy(control=control))
    async with asyncio.timeout(10):
        while control.bytes_done != 10_000:
            await asyncio.sleep(0.01)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
    assert place.published is None
    assert place.parts == []


async def test_a_lost_lease_publishes_nothing(place: Place) -> None:
    def lost() -> None:
        raise Stopped("the lease is gone")

    with pytest.raises(Stopped):
        await place.copy(before_publish=lost)
    assert place.published is None
    assert place.parts == []


async def test_what_a_busy_or_full_server_says_is_passed_on(place: Place) -> None:
    place.pulls.behaviour = refusing(503, "later", Retry_After="17")
    with pytest.raises(Busy) as busy:
        await place.copy()
    assert (busy.value.retry_after_seconds, busy.value.side) == (17.0, "target")
    place.pulls.behaviour = refusing(507)
    with pytest.raises(NoSpace) as full:
        await place.copy()
    assert full.value.side == "target"
    assert place.pushes.copies == []


@pytest.mark.parametrize("killed", ["source", "target"])
async def test_a_server_killed_in_the_middle_of_a_copy(xrootd_pair: tuple[XRootD, XRootD], killed: str) -> None:
    """The real ones. Afterwards, when it runs again, the same order ends right."""
    one, two = xrootd_pair
    source, target = opened(one.url_http, "SOURCE"), opened(two.url_http, "TARGET")
    large = os.urandom(1 << 20) * 300
    try:
        await source.prepare()
        await target.prepare()
        one.put("data/x/f", large)
        known, control = expected(large), Control()
        copying = asyncio.create_task(
            copy_between(source, "x/f", target, "y/g", tag="t", expected=known, control=control)
        )
        victim = one if killed == "source" else two
        async with asyncio.timeout(20):
            while not _some_arrived(two):
                await asyncio.sleep(0.001)
            assert victim.process is not None
            victim.process.send_signal(signal.SIGKILL)
            with pytest.raises(StorageError) as failed:
                await copying
        assert failed.value.side == killed
        assert not (two.data / "data/y/g").exists()
        victim.kill()
        victim.start()
        copied = await copy_file(source, "x/f", target, "y/g", tag="t2", expected=known)
        assert copied.size_bytes == len(large)
        assert (two.data / "data/y/g").read_bytes() == large
    finally:
        await source.close()
        await target.close()
        for server in (one, two):
            if server.process is None:
                server.start()


def _some_arrived(server: XRootD) -> bool:
    folder = server.data / "data" / PARTS
    return folder.exists() and any(file.stat().st_size > 0 for file in folder.iterdir())


# ── secrets, and where a server may be sent ──────────────────────────────────────────────────────────────────────────


async def test_only_a_token_is_handed_on_and_only_under_cover() -> None:
    session = object()

    def party(url: str, secret: str = "") -> Party:
        return Party(url, session, {"Authorization": secret} if secret else {})  # type: ignore[arg-type]

    open_, sealed, other = "http://a:1/f", "https://b:1/f", "https://c/f"
    headers = copy_headers(Way.PULL, party(sealed, "Bearer mine"), party(other, "Bearer theirs"))
    assert (headers["Authorization"], headers["TransferHeaderAuthorization"]) == ("Bearer mine", "Bearer theirs")
    assert "TransferHeaderAuthorization" not in copy_headers(Way.PUSH, party(sealed, "Bearer mine"), party(other))
    for active, passive in [(party(sealed), party(other, "Basic dTpw")), (party(open_), party(other, "Bearer theirs"))]:
        with pytest.raises(thirdparty._Failed) as refused:
            copy_headers(Way.PULL, active, passive)
        assert refused.value.refused
        assert "theirs" not in str(refused.value)
    assert "mine" not in repr(party(sealed, "Bearer mine"))


async def test_tokens_reach_the_two_storages_and_nobody_else(place: Place) -> None:
    await place.source.close()
    await place.target.close()
    place.source = opened(place.pushes.url, "SOURCE", token="of-the-source")
    place.target = opened(place.pulls.url, "TARGET", token="of-the-target")
    elsewhere: list[dict[str, str]] = []
    async with FaultyCopy(place.two) as other:
        other.copies = elsewhere
        place.pulls.behaviour = refusing(307, Location=f"{other.url}/data/x")
        right(place, await place.copy())
    assert elsewhere == []  # the redirect was not followed
    (pull,), (push,) = place.pulls.copies, place.pushes.copies
    assert (pull["Authorization"], pull["TransferHeaderAuthorization"]) == (
        "Bearer of-the-target",
        "Bearer of-the-source",
    )
    assert (push["Authorization"], push["TransferHeaderAuthorization"]) == (
        "Bearer of-the-source",
        "Bearer of-the-target",
    )


async def test_a_redirect_is_followed_to_hosts_that_were_written_down_and_without_the_token(place: Place) -> None:
    async with FaultyCopy(place.two) as pool:

        async def redirect(_: FaultyCopy, request: web.Request) -> web.StreamResponse:
            return web.Response(status=307, headers={"Location": pool.url + request.path})

        place.pulls.behaviour = redirect
        await place.target.close()
        place.target = opened(place.pulls.url, "TARGET", token="of-the-target", redirects=pool.url[len("http://") :])
        right(place, await place.copy())
        (asked,) = pool.copies
    assert "Authorization" not in asked
    assert asked["Source"] == f"{place.pushes.url}/data/x/f"
    assert place.pushes.copies == []


async def test_no_server_is_sent_to_a_third_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place.source, "party", _party_at("http://169.254.169.254/latest", place.source))
    assert await place.between() is None
    assert place.pulls.copies == place.pushes.copies == []


async def test_others_in_the_way_are_not_overwritten(place: Place) -> None:
    """A publisher that loses to other bytes says so, and leaves them."""
    place.two.put("data/y/g", b"")

    async def there(path: str) -> str:
        raise TargetExists("kept", endpoint="TARGET", path=path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.target, "quarantine", there)
        with pytest.raises(TargetExists):
            await place.copy()
    assert place.published == b""
