"""Loops that do not die, a watchdog that sees the one that hangs, and an orderly end."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from replica import log
from rules.errors import Unavailable
from workers import runtime
from workers.runtime import Life, Looper, Watchdog


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    stream = io.StringIO()
    log.configure("info", stream=stream, as_json=True)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    log.configure("info")


def until(true: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.005)


def loop_of(round_: Callable[[], bool], **options: Any) -> Looper:
    loop = Looper("test", round_, **({"seconds": 1000.0, "back_off_seconds": 0.01} | options))
    loop.start()
    return loop


def test_a_loop_looks_at_once_and_when_woken():
    rounds: list[float] = []
    loop = loop_of(lambda: rounds.append(time.monotonic()) or False)
    until(lambda: len(rounds) == 1)
    time.sleep(0.05)
    assert len(rounds) == 1
    began = time.monotonic()
    loop.wake()
    until(lambda: len(rounds) == 2)
    assert rounds[1] - began < 0.5
    assert loop.stop(5)


def test_a_loop_looks_by_itself():
    rounds: list[int] = []
    loop = loop_of(lambda: rounds.append(1) or False, seconds=0.02)
    until(lambda: len(rounds) >= 5)
    assert loop.stop(5)


def test_while_there_is_more_it_goes_on():
    left = list(range(100))
    loop = loop_of(lambda: bool(left and [left.pop()]))
    until(lambda: not left)
    assert loop.stop(5)


def test_being_woken_during_a_round_is_not_forgotten():
    rounds: list[int] = []
    inside, go_on = threading.Event(), threading.Event()

    def round_() -> bool:
        rounds.append(1)
        inside.set()
        go_on.wait(5)
        return False

    loop = loop_of(round_)
    assert inside.wait(5)
    loop.wake()
    go_on.set()
    until(lambda: len(rounds) == 2)
    assert loop.stop(5)


def test_a_failing_round_is_told_with_its_story_once_and_tried_again(lines):
    rounds: list[int] = []

    def round_() -> bool:
        rounds.append(1)
        if len(rounds) <= 4:
            raise ValueError("a bug")
        return False

    loop = loop_of(round_)
    until(lambda: loop.rounds == 1)
    assert loop.stop(5)
    told = [line for line in lines() if line["event"] == "pass.failed"]
    assert len(told) == 1
    assert "a bug" in told[0]["story"]
    assert [line["event"] for line in lines()][-1] == "pass.works_again"


def test_a_database_that_is_away_is_one_line_without_a_story(lines):
    rounds: list[int] = []

    def round_() -> bool:
        rounds.append(1)
        raise Unavailable("the database does not answer", hint="wait")

    loop = loop_of(round_)
    until(lambda: len(rounds) >= 4)
    assert loop.stop(5)
    (line,) = lines()
    assert (line["event"], line["reason"], "story" in line) == ("pass.waits", "the database does not answer", False)


def test_hints_do_not_hurry_a_loop_that_fails():
    rounds: list[int] = []

    def round_() -> bool:
        rounds.append(1)
        raise Unavailable("away")

    loop = loop_of(round_, back_off_seconds=0.2)
    for _ in range(100):
        loop.wake()
        time.sleep(0.003)
    assert len(rounds) <= 3
    began = time.monotonic()
    assert loop.stop(5)
    assert time.monotonic() - began < 1


def test_the_pauses_grow_and_have_an_end():
    loop = Looper("test", lambda: False, seconds=1, back_off_seconds=0.5, dice=lambda: 1.0)
    waited: list[float] = []
    loop._condition.wait_for = lambda true, seconds: waited.append(seconds) or True  # type: ignore[method-assign]
    for loop.failures in (1, 2, 3, 8, 10_000):
        loop._wait()
    assert waited == [0.5, 1.0, 2.0, 60.0, 60.0]


def test_a_loop_that_never_began_can_be_stopped():
    assert Looper("test", lambda: False, seconds=1).stop(1)


def test_bells_ring_for_those_who_listen_and_only_then():
    rung: list[str] = []
    with (
        runtime.listening("site.A", lambda: rung.append("one")),
        runtime.listening("site.A", lambda: rung.append("two")),
    ):
        runtime.ring("site.A")
        runtime.ring("site.B")
    runtime.ring("site.A")
    assert rung == ["one", "two"]


def test_a_signal_ends_a_life():
    life = Life()
    with life.signals():
        assert not life.wait(0)
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        assert life.wait(5)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert life.exit_code == 0
    life.close()


def test_what_hangs_is_seen_and_ends_the_process():
    class Thing:
        name = "thing"
        busy_since: float | None = None

    thing, life = Thing(), Life()
    dog = Watchdog(lambda: [thing], life, limit_seconds=10)
    dog.look()
    thing.busy_since = time.monotonic() - 5
    dog.look()
    assert not life.ended
    thing.busy_since = time.monotonic() - 11
    dog.look()
    assert (life.ended, life.exit_code) == (True, 75)
