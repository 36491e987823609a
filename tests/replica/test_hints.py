"""Hints reach a real Celery worker, and a broker that is absent costs nothing but speed."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from replica import hints, log
from replica.hints import PILE_MAX, Hints, connect, reachable
from tests.servers import Redis
from workers import runtime
from workers.consumer import Consumer

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(params=["redis", "memory"])
def broker_url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    server: Redis = request.getfixturevalue("redis_server")
    return server.url


@pytest.fixture
def queue() -> str:
    """A name of its own: the queues of a broker in memory outlive a test."""
    return f"site.{uuid.uuid4().hex}"


@pytest.fixture
def sender(broker_url: str) -> Iterator[Hints]:
    sender = Hints(broker_url)
    yield sender
    sender.close()


def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def length(broker_url: str, queue: str) -> int:
    with connect(broker_url) as connection:
        return int(connection.default_channel.queue_declare(queue=queue).message_count)


def test_a_real_celery_worker_understands_a_hint(broker_url: str, sender: Hints, queue: str):
    rung = threading.Event()
    consumer = Consumer(broker_url, (queue,))
    with runtime.listening(queue, rung.set):
        consumer.start()
        assert consumer.ready.wait(20)
        sender.wake({queue})
        assert rung.wait(5)
        assert consumer.stop()
    assert consumer.restarts == 0


def test_a_hint_is_quick(broker_url: str, sender: Hints, queue: str):
    rung = threading.Event()
    consumer = Consumer(broker_url, (queue,))
    seconds = []
    with runtime.listening(queue, rung.set):
        consumer.start()
        assert consumer.ready.wait(20)
        for _ in range(11):
            rung.clear()
            began = time.monotonic()
            sender.wake({queue})
            assert rung.wait(5)
            seconds.append(time.monotonic() - began)
        consumer.stop()
    assert sorted(seconds)[5] < 0.3


def test_any_other_name_is_for_control():
    assert [hints.queue_of(name) for name in ("site.DESY", "evaluation", "leases")] == [
        "site.DESY",
        "control",
        "control",
    ]


def test_a_thousand_commits_make_few_hints(broker_url: str, sender: Hints, queue: str):
    for _ in range(1000):
        sender.wake({queue})
    until(lambda: sender.sent)
    time.sleep(0.2)
    assert length(broker_url, queue) <= PILE_MAX


def test_hints_that_nobody_reads_do_not_pile_up(broker_url: str, sender: Hints, queue: str):
    for count in range(PILE_MAX + 15):
        sender.wake({queue})
        until(lambda count=count: sender.sent + sender.spared > count)
    assert length(broker_url, queue) == PILE_MAX
    assert sender.spared == 15


def test_waking_never_waits_and_never_raises_whatever_the_broker_does():
    for url in (NOWHERE, "redis://203.0.113.1:6379/0", "nonsense://x", "redis://[", ""):
        sender = Hints(url)
        began = time.monotonic()
        for _ in range(1000):
            sender.wake({"site.DESY", "evaluation"})
        assert time.monotonic() - began < 0.5, url
        sender.close(0.1)


def test_without_a_broker_the_own_process_is_told_all_the_same():
    told: list[set[str]] = []
    Hints(None, also=told.append).wake({"evaluation"})
    assert told == [{"evaluation"}]


def test_a_listener_of_the_own_process_that_breaks_does_not_break_the_commit():
    def breaks(names: set[str]) -> None:
        raise RuntimeError("broken")

    Hints(None, also=breaks).wake({"evaluation"})


def test_a_broker_that_is_away_is_logged_once_and_what_waited_is_sent_when_it_is_back(queue: str, monkeypatch):
    import io

    monkeypatch.setattr(hints, "PAUSE_SECONDS", 0.1)
    stream = io.StringIO()
    log.configure("info", stream=stream, as_json=True)
    server = Redis()
    server.start()
    sender = Hints(server.url)
    try:
        sender.wake({queue})
        until(lambda: sender.sent == 1)
        server.stop(signal.SIGKILL)
        for _ in range(50):
            sender.wake({queue})
            time.sleep(0.01)
        until(lambda: sender.errors >= 3)
        assert stream.getvalue().count("hint.not_sent") == 1
        server.start()
        until(lambda: sender.sent == 2)
        assert length(server.url, queue) == 1
        assert "hint.sent_again" in stream.getvalue()
    finally:
        sender.close()
        server.remove()
        log.configure("info")


def test_a_key_of_another_type_harms_nobody(redis_server: Redis, queue: str, monkeypatch):
    """Somebody else's data under the queue's name: an error that is counted, as any other."""
    monkeypatch.setattr(hints, "PAUSE_SECONDS", 0.05)
    client = redis.Redis.from_url(redis_server.url)
    client.set(queue, "no list")
    sender = Hints(redis_server.url)
    sender.wake({queue})
    until(lambda: sender.errors >= 1)
    client.delete(queue)
    until(lambda: sender.sent == 1)
    sender.close()


def test_a_message_carries_nothing_but_look(redis_server: Redis, queue: str):
    import base64
    import json

    sender = Hints(redis_server.url)
    sender.wake({queue})
    until(lambda: sender.sent == 1)
    sender.close()
    client = redis.Redis.from_url(redis_server.url)
    (raw,) = client.lrange(queue, 0, -1)
    message = json.loads(raw)
    assert json.loads(base64.b64decode(message["body"]))[:2] == [[], {}]
    assert message["headers"]["task"] == "replica.look"


def test_whether_a_broker_answers_is_known_within_seconds(broker_url: str):
    assert reachable(broker_url) is None
    began = time.monotonic()
    assert "refused" in (reachable(NOWHERE) or "")
    assert reachable("nonsense://x")
    assert time.monotonic() - began < 5


def test_sending_hints_imports_no_celery():
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys, time; from replica.hints import Hints; h = Hints('memory://'); h.wake({'site.A'})\n"
        "while not h.sent: time.sleep(0.01)\n"
        "print('celery' in sys.modules)"
    )
    root = Path(hints.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False"
