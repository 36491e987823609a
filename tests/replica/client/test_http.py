"""What the client does when the network or the server does not do what it should; the same for both kinds of client."""

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from replica import wire
from replica.client import AsyncClient, Client
from replica.client.calls import Call, at
from replica.client.endpoints import report_space
from replica.client.http import checked_token, parse_server
from replica.client.orders import claim_call, heartbeat_call, report_call
from replica.client.replicas import locate
from rules.errors import Invalid, NotFound, Unavailable
from tests.replica.client.scripted import CLOSE, SILENCE, answer, chunked, scripted

WHOAMI = Call("GET", at("whoami"), wire.Whoami)
NEW = Call("POST", at("sites"), wire.Site, wire.NewSite(name="GSI"), creates=True)
CLAIM = claim_call(wire.Claim(worker="w"))
BEAT = heartbeat_call(wire.Heartbeat(worker="w", beats=[]))
ME = answer(b'{"account": "root", "role": "admin", "from_the_future": 1}')
MADE = answer(b'{"id": 1, "name": "GSI", "created_at": "2026-01-01T00:00:00Z"}', "201 Created")
ORDERS = answer(b'{"orders": [], "lease_seconds": 120.0, "more": false}')

Ask = Callable[..., list[Any]]


def ask_sync(url: str, *calls: Call[Any], stream: bool = False, **more: Any) -> list[Any]:
    with Client(url, "rpl_token", **more) as client:
        return [list(client._http.lines(call)) if stream else client.send(call) for call in calls]


def ask_async(url: str, *calls: Call[Any], stream: bool = False, **more: Any) -> list[Any]:
    async def run() -> list[Any]:
        async with AsyncClient(url, "rpl_token", **more) as client:
            return [
                [item async for item in client._http.lines(call)] if stream else await client.send(call)
                for call in calls
            ]

    return asyncio.run(run())


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


def keys(requests: list[bytes]) -> list[bytes]:
    return [found[1] for each in requests if (found := re.search(rb"(?i)idempotency-key: (\S+)", each))]


def test_a_connection_is_kept_for_the_next_call(ask: Ask):
    with scripted(ME, ME) as server:
        first, _ = ask(server.url, WHOAMI, WHOAMI)
    assert first == wire.Whoami(account="root", role="admin")
    assert all(b"Authorization: Bearer rpl_token" in request for request in server.requests)


@pytest.mark.parametrize(("call", "good"), [(WHOAMI, ME), (NEW, MADE), (CLAIM, ORDERS)], ids=["get", "create", "claim"])
def test_a_connection_that_the_server_closed_while_idle_is_replaced_unnoticed(call: Call[Any], good: bytes):
    closing = ME.replace(b"\r\n\r\n", b"\r\nX-Then: close\r\n\r\n", 1)
    with scripted(closing, good) as server, Client(server.url) as client:
        client.whoami()
        with contextlib.suppress(OSError):  # until the end has arrived here
            client._http._mine.connection.sock.settimeout(5)
            client._http._mine.connection.sock.recv(1, socket.MSG_PEEK)
        client.send(call)
        assert len(server.requests) == 2


@pytest.mark.parametrize(("call", "good"), [(WHOAMI, ME), (BEAT, answer(b'{"lease_seconds": 1, "stop": []}'))])
def test_a_call_that_may_be_repeated_is_repeated_once(ask: Ask, call: Call[Any], good: bytes):
    with scripted(CLOSE, good) as server:
        ask(server.url, call)
        assert len(server.requests) == 2
    with scripted(CLOSE, CLOSE, CLOSE, CLOSE) as server, pytest.raises(Unavailable):
        ask(server.url, call)
    assert len(server.requests) <= 4  # aiohttp by itself repeats a GET once more


def test_what_creates_is_repeated_under_the_same_key(ask: Ask):
    with scripted(CLOSE, MADE, MADE) as server:
        made, _ = ask(server.url, NEW, NEW)
    assert made.name == "GSI"
    first, repeated, other = keys(server.requests)
    assert first == repeated != other


def test_a_claim_is_never_repeated_by_itself(ask: Ask):
    with scripted(CLOSE, ORDERS) as server, pytest.raises(Unavailable):
        ask(server.url, CLAIM)
    assert len(server.requests) == 1
    assert keys(server.requests) == []


def test_nothing_listens_there(ask: Ask):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Unavailable, match=f"127.0.0.1:{port} refuses the connection") as raised:
        ask(f"http://127.0.0.1:{port}", WHOAMI)
    assert "replica serve" in raised.value.hint


def test_a_host_that_does_not_exist(ask: Ask):
    with pytest.raises(Unavailable, match=r"no-such-host\.invalid"):
        ask("http://no-such-host.invalid", WHOAMI)


def test_an_answer_that_does_not_come_is_not_waited_for_twice(ask: Ask):
    with scripted(SILENCE, ME) as server, pytest.raises(Unavailable, match="did not answer in time"):
        ask(server.url, WHOAMI, timeout_seconds=0.5)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "strange",
    [
        answer(b"<html>It works!</html>", media_type="text/html"),
        answer(b"<html>Bad Gateway</html>", "502 Bad Gateway", "text/html"),
        answer(b"{}", "500 Oh", "application/problem+json"),
        answer(b"not json", "404 Not Found", "application/problem+json"),
        answer(b'{"account": 3}'),
        answer(b"\xff\xfe"),
        answer(b""),
    ],
)
def test_an_answer_that_is_not_ours_is_told_as_that(ask: Ask, strange: bytes):
    with scripted(strange) as server, pytest.raises(Unavailable, match="that Replica does not") as raised:
        ask(server.url, WHOAMI)
    assert raised.value.hint


def test_a_redirect_is_not_followed_and_the_token_stays(ask: Ask):
    with scripted(ME) as other:
        away = answer(b"", "302 Found", "text/plain", f"Location: {other.url}/api/v1/whoami")
        with scripted(away) as server, pytest.raises(Unavailable):
            ask(server.url, WHOAMI)
        assert other.requests == []


def test_the_environment_names_no_proxy_for_the_token(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    with scripted(ME) as proxy, scripted(ME) as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        ask(server.url, WHOAMI)
        assert proxy.requests == []


def test_a_problem_is_the_error_it_stands_for(ask: Ask):
    body = b'{"type": "", "title": "", "status": 404, "detail": "there is no site X", "code": "not_found", "hint": "h"}'
    problem = answer(body, "404 Not Found", "application/problem+json")
    with scripted(problem) as server, pytest.raises(NotFound, match="there is no site X") as raised:
        ask(server.url, WHOAMI)
    assert raised.value.hint == "h"


# --- streams --------------------------------------------------------------------------------------------------------


def replica(number: int) -> bytes:
    found = wire.Replica(
        did=f"s:{number}", endpoint="E", site="S", state="available", size=1, checksums={}, path="p", url="file:///p"
    )
    return msgspec.json.encode(found) + b"\n"


def end(count: int) -> bytes:
    return b'{"end":true,"count":%d}\n' % count


LOCATE = locate("s:d")


def test_a_stream_gives_its_items_whatever_pieces_it_comes_in(ask: Ask):
    whole = replica(1) + replica(2) + end(2)
    pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    with scripted(chunked(*pieces), chunked(whole), chunked(end(0))) as server:
        results = ask(server.url, LOCATE, LOCATE, LOCATE, stream=True)
    assert [[item.did for item in result] for result in results] == [["s:1", "s:2"], ["s:1", "s:2"], []]
    assert b"Accept: application/x-ndjson" in server.requests[0]


@pytest.mark.parametrize(
    "cut",
    [
        chunked(replica(1), replica(2)),
        chunked(replica(1), end(2)),
        chunked(replica(1), replica(2), end(1)),
        chunked(replica(1), replica(2)[:20]),
        chunked(replica(1), end(1)[:-1]),
        chunked(replica(1), end(1), replica(2)),
        chunked(replica(1), b"nonsense\n", end(2)),
        chunked(replica(1), replica(2), end=False),
        chunked(replica(1), replica(2), end(2))[:-30],
        chunked(),
        answer(replica(1), media_type="application/json"),
    ],
)
def test_a_stream_that_was_cut_is_never_taken_for_a_whole_one(ask: Ask, cut: bytes):
    if b"Connection: close" not in cut:
        cut = cut.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
    with scripted(cut) as server, pytest.raises(Unavailable):
        ask(server.url, LOCATE, stream=True)


def test_who_stops_reading_a_stream_spoils_no_other_call():
    with scripted(chunked(*map(replica, range(1000)), end(1000)), ME) as server, Client(server.url) as client:
        for _ in client.replicas.locate("s:d"):
            break
        assert client.whoami().account == "root"


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_a_message_that_no_database_can_hold_does_not_keep_a_report_from_arriving(ask: Ask):
    outcome = wire.Outcome(transfer=1, epoch=1, outcome="failed", message="bad name \udcff\0" + "x" * 5_000)
    report = wire.Report(worker="w", outcomes=[outcome])
    with scripted(answer(b'{"accepted": 1, "stale": []}')) as server:
        ask(server.url, report_call(report))
    sent = msgspec.json.decode(server.requests[0].split(b"\r\n\r\n", 1)[1], type=wire.Report)
    assert sent.outcomes[0].message.startswith("bad name \\udcff\\0x")
    assert len(sent.outcomes[0].message) == 4_000


def test_a_text_that_is_not_unicode_is_refused_before_it_is_sent(ask: Ask):
    with scripted() as server, pytest.raises(Invalid, match="not Unicode"):
        ask(server.url, Call("POST", at("sites"), wire.Site, wire.NewSite(name="\udcff"), creates=True))
    assert server.requests == []


def test_an_answer_without_a_document(ask: Ask):
    with scripted(b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n") as server:
        assert ask(server.url, report_space("E", 5), report_space("E", 5)) == [None, None]
    assert b'{"free_bytes":5}' in server.requests[0]


def test_a_server_below_a_path(ask: Ask):
    with scripted(ME) as server:
        ask(f"{server.url}/replica/", WHOAMI)
    assert server.requests[0].startswith(b"GET /replica/api/v1/whoami ")


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "replica.example:8570",
        "ftp://x",
        "http://",
        "http://user:secret@x",
        "http://x:99999",
        "http://x?y",
        "x" * 500,
    ],
)
def test_what_is_not_the_url_of_a_server(wrong: str):
    with pytest.raises(Invalid) as raised:
        parse_server(wrong)
    assert "secret" not in raised.value.message


@pytest.mark.parametrize("wrong", ["", " ", "a b", "a\r\nX: y", "a\0b", "é", "\x7f"])
def test_what_is_not_a_token(wrong: str):
    with pytest.raises(Invalid) as raised:
        checked_token(wrong)
    assert wrong.strip() == "" or wrong not in raised.value.message
    assert checked_token(" rpl_x\n") == "rpl_x"


def test_a_client_shows_no_token():
    assert "rpl_" not in repr(Client("http://x", "rpl_secret")) + str(vars(Client("http://x", "rpl_secret")))


def test_importing_the_client_imports_nothing_heavy():
    script = (
        "import sys, replica.client; "
        "heavy = {'aiohttp', 'sqlalchemy', 'celery', 'kombu', 'redis', 'structlog', 'replica.db', 'replica.catalog', "
        "'replica.api'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    script = script.replace("import sys, replica.client;", "import sys; from replica.client import AsyncClient;")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['aiohttp']"
