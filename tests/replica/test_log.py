"""The log says what happened, and never a secret."""

import io
import json
import logging

import pytest

from replica import log

CANARY = "rpl_Canary-0123456789abcdef_XYZ"


@pytest.fixture(params=["structlog", "without structlog"])
def lines(request: pytest.FixtureRequest):
    """Configured anew, with the stream to read; once with structlog and once with the stand-in."""
    stream = io.StringIO()
    log.configure("debug", stream=stream, as_json=True)
    make = log.get_logger if request.param == "structlog" else lambda **keys: log._Plain(keys)

    def read() -> list[dict]:
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    read.raw = stream.getvalue  # type: ignore[attr-defined]
    read.make = make  # type: ignore[attr-defined]
    yield read
    log.configure("info")


def test_a_line_is_an_event_with_its_keys(lines):
    lines.make(site="DESY").bind(worker="w1").info("transfer.done", did="a:b", bytes=3)
    (line,) = lines()
    assert line.pop("at").endswith("+00:00")
    assert line == {"level": "info", "event": "transfer.done", "site": "DESY", "worker": "w1", "did": "a:b", "bytes": 3}


def test_an_exception_brings_its_story(lines):
    try:
        raise ValueError("broken here")
    except ValueError:
        lines.make().exception("pass.failed")
    assert "broken here" in lines()[0]["story"]
    assert lines()[0]["level"] == "error"


def test_a_token_never_reaches_a_line_whoever_logs_it_and_wherever_it_hides(lines):
    logger = lines.make(token=CANARY)
    logger.info("a.b", header={"Authorization": f"Bearer {CANARY}"}, items=[CANARY, (CANARY,)], text=f"x {CANARY} y")
    logger.info(f"c.{CANARY}", **{"odd " + CANARY: object()})
    logger.warning("d.e", url="redis://:hunter2@host:1/0", dsn="postgresql://u:hunter2@h/d?sslpassword=hunter2")
    logging.getLogger("aiohttp.client").error("sent Authorization: Bearer %s", CANARY)
    try:
        raise RuntimeError(f"could not log in with {CANARY} at redis://u:hunter2@h")
    except RuntimeError:
        logger.exception("f.g")
        logging.getLogger("celery").exception("story")
    assert len(lines()) == 6
    assert "Canary" not in lines.raw()
    assert "hunter2" not in lines.raw()


def test_what_is_no_secret_stays_readable(lines):
    lines.make().info("a.b", path="/data/run 1/a.h5", url="https://host:8443/x", checksum="rpl", tokens_used=3)
    line = lines()[0]
    assert (line["path"], line["url"], line["tokens_used"]) == ("/data/run 1/a.h5", "https://host:8443/x", 3)


def test_libraries_speak_in_the_same_form(lines):
    logging.getLogger("celery.worker").warning("no %s", "broker")
    assert lines()[0]["event"] == "celery.worker"
    assert lines()[0]["message"] == "no broker"


def test_a_closed_stream_does_not_end_the_work():
    stream = io.StringIO()
    log.configure(stream=stream)
    stream.close()
    log.get_logger().info("a.b")
    log.configure()


def test_on_a_terminal_a_line_is_for_eyes():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    log.configure(stream=stream)
    log.get_logger().info("transfer.done", did="a:run 1", seconds=0.5)
    log.configure()
    assert stream.getvalue()[13:] == 'info    transfer.done did="a:run 1" seconds=0.5\n'


def test_what_fails_in_a_loop_is_said_once():
    sparing = log.Sparing(60)
    assert sparing.due() == 0
    assert [sparing.due() for _ in range(5)] == [None] * 5
    sparing.reset()
    assert sparing.due() == 0
