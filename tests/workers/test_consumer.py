"""Celery's worker in our process: what a broker can do to it, and that it comes back."""

from __future__ import annotations

import io
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from replica import log
from replica.hints import Hints
from tests.servers import Redis
from workers import consumer as consumer_module
from workers import runtime
from workers.consumer import Consumer

#: Not JSON; a body that is no base64; a message without properties. Each of the first two ends Celery's worker.
POISON = (
    b"\xff not json",
    b'{"body": "!!no base64", "headers": {}, "properties": {"delivery_tag": "x", "body_encoding": "base64",'
    b' "delivery_info": {"exchange": "", "routing_key": "q"}}, "content-type": "application/json",'
    b' "content-encoding": "utf-8"}',
    b"{}",
)


class Ear:
    """A consumer that counts what it hears, and a way to say something to it."""

    def __init__(self, url: str, queue: str) -> None:
        self.queue = queue
        self.heard = 0
        self.consumer = Consumer(url, (queue,))
        self.hints = Hints(url)

    def ring(self) -> None:
        self.heard += 1

    def hears_within(self, seconds: float) -> bool:
        """Say it again and again, as commits do, until it is heard."""
        before, deadline = self.heard, time.monotonic() + seconds
        while self.heard == before:
            if time.monotonic() > deadline:
                return False
            self.hints.wake({self.queue})
            time.sleep(0.05)
        return True


@pytest.fixture
def ear() -> Iterator[Callable[[str], Ear]]:
    made: list[tuple[Ear, Any]] = []

    def make(url: str) -> Ear:
        one = Ear(url, f"site.{uuid.uuid4().hex}")
        bell = runtime.listening(one.queue, one.ring)
        bell.__enter__()
        made.append((one, bell))
        one.consumer.start()
        return one

    yield make
    for one, bell in made:
        one.consumer.stop()
        one.hints.close()
        bell.__exit__(None, None, None)


@pytest.fixture
def own_redis(monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    """A Redis that the test may kill."""
    monkeypatch.setattr("replica.hints.PAUSE_SECONDS", 0.1)
    server = Redis()
    server.start()
    yield server
    if server.process is not None:
        server.process.send_signal(signal.SIGCONT)
    server.remove()


@pytest.mark.parametrize("poison", POISON, ids=["not JSON", "no base64", "no properties"])
def test_a_poison_message_costs_itself_and_a_restart_at_most(redis_server: Redis, ear, monkeypatch, poison: bytes):
    monkeypatch.setattr(consumer_module, "RESTART_SECONDS", (0.1,))
    one = ear(redis_server.url)
    assert one.hears_within(20)
    client = redis.Redis.from_url(redis_server.url)
    for _ in range(3):
        client.lpush(one.queue, poison)
    assert one.hears_within(20)
    time.sleep(0.3)
    assert one.hears_within(20)
    assert client.llen(one.queue) == 0
    assert one.consumer.restarts <= 3


def test_somebody_elses_key_under_the_queues_name_is_removed(redis_server: Redis, ear, monkeypatch):
    monkeypatch.setattr(consumer_module, "RESTART_SECONDS", (0.1,))
    one = ear(redis_server.url)
    assert one.hears_within(20)
    client = redis.Redis.from_url(redis_server.url)
    client.set(one.queue, "no list")
    assert one.hears_within(20)


@pytest.mark.parametrize("message", [b'{"task": "os.system"}', b"[]", b"0", b"null"])
def test_nonsense_that_celery_survives_is_not_executed(redis_server: Redis, ear, monkeypatch, message: bytes):
    monkeypatch.setattr(consumer_module, "RESTART_SECONDS", (0.1,))
    one = ear(redis_server.url)
    assert one.hears_within(20)
    redis.Redis.from_url(redis_server.url).lpush(one.queue, message)
    assert one.hears_within(20)


def test_a_redis_that_is_killed_and_comes_back_is_heard_again(own_redis: Redis, ear):
    one = ear(own_redis.url)
    assert one.hears_within(20)
    own_redis.stop(signal.SIGKILL)
    time.sleep(1)
    own_redis.start()
    assert one.hears_within(30)


def test_a_redis_that_comes_late_is_heard(own_redis: Redis, ear):
    own_redis.stop()
    one = ear(own_redis.url)
    time.sleep(1)
    own_redis.start()
    assert one.hears_within(30)


def test_a_redis_that_is_flushed_is_heard_on(own_redis: Redis, ear):
    one = ear(own_redis.url)
    assert one.hears_within(20)
    redis.Redis.from_url(own_redis.url).flushall()
    assert one.hears_within(20)


def test_a_frozen_redis_is_heard_again_when_it_thaws(own_redis: Redis, ear):
    one = ear(own_redis.url)
    assert one.hears_within(20)
    assert own_redis.process is not None
    own_redis.process.send_signal(signal.SIGSTOP)
    # What was on its way on a busy machine may still come; then nothing does.
    assert not all(one.hears_within(2) for _ in range(5))
    own_redis.process.send_signal(signal.SIGCONT)
    assert one.hears_within(30)


def test_an_absent_broker_does_not_fill_the_log():
    stream = io.StringIO()
    log.configure("info", stream=stream, as_json=True)
    consumer = Consumer("redis://127.0.0.1:1/0", ("site.X",))
    consumer.start()
    time.sleep(4)
    began = time.monotonic()
    assert consumer.stop()
    assert time.monotonic() - began < 3
    log.configure("info")
    assert len(stream.getvalue().splitlines()) <= 2


@pytest.mark.parametrize("broker", ["redis", "memory"])
def test_a_stop_is_quick_and_leaves_no_thread(broker: str, request: pytest.FixtureRequest):
    url = "memory://" if broker == "memory" else request.getfixturevalue("redis_server").url
    before = {thread.name for thread in threading.enumerate()}
    consumer = Consumer(url, (f"site.{uuid.uuid4().hex}",))
    consumer.start()
    assert consumer.ready.wait(20)
    began = time.monotonic()
    assert consumer.stop()
    assert time.monotonic() - began < 2
    assert {thread.name for thread in threading.enumerate()} - before <= {"Timer"}


@pytest.mark.parametrize("broker", ["redis", "memory"])
def test_a_queue_can_be_added_while_it_listens(broker: str, request: pytest.FixtureRequest, ear):
    url = "memory://" if broker == "memory" else request.getfixturevalue("redis_server").url
    one = ear(url)
    assert one.hears_within(20)
    rung = threading.Event()
    queue = f"site.{uuid.uuid4().hex}"
    with runtime.listening(queue, rung.set):
        one.consumer.add_queue(queue)
        one.hints.wake({queue})
        assert rung.wait(5)
    assert one.hears_within(5)
