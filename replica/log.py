"""The log: one line for one event, the same for our code and for the libraries beneath it.

Given     an event, a constant `noun.verb` (`transfer.failed`), and keys.
Returns   lines on stderr: for eyes on a terminal, JSON elsewhere.
Promises  a token, an Authorization header or the password in a URL never reaches a line, whoever logs it and however
          deep it hides, in tracebacks too; logging never raises.
Partner   replica.config has the level. structlog where it is installed (server, worker); a small stand-in elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Protocol, TextIO, cast

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
#: Libraries that tell at "info" what belongs to "debug".
TALKATIVE = ("kombu", "celery", "amqp", "aiohttp.access", "asyncio", "alembic", "sqlalchemy", "redis")

_SECRET_KEYS = re.compile(r"(?i)token$|password|passwd|secret|authorization|cookie|api_?key")
_SECRET_TEXT = (
    (re.compile(r"rpl_[A-Za-z0-9_\-]{4,}"), "rpl_***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{4,}"), r"\1 ***"),
    (re.compile(r"(?i)(authorization\W{1,4})(?!bearer|basic)[^\s,;'\"]{4,}"), r"\1***"),
    (re.compile(r"(?<=://)([^/@\s:'\"]*):([^/@\s'\"]+)@"), r"\1:***@"),
    (re.compile(r"(?i)\b((?:ssl)?password)=[^&\s'\"]+"), r"\1=***"),
)


class Logger(Protocol):
    """What the rest of Replica uses of a logger."""

    def debug(self, event: str, **keys: Any) -> Any: ...
    def info(self, event: str, **keys: Any) -> Any: ...
    def warning(self, event: str, **keys: Any) -> Any: ...
    def error(self, event: str, **keys: Any) -> Any: ...
    def exception(self, event: str, **keys: Any) -> Any:
        """An error with the story of the exception that is being handled."""
        ...

    def bind(self, **keys: Any) -> Logger: ...


def get_logger(**keys: Any) -> Logger:
    """A logger that adds `keys` to each of its events."""
    try:
        import structlog
    except ImportError:
        return _Plain(keys)
    if not structlog.is_configured():
        _set_up_structlog("warning")  # its own way would be stdout, which belongs to results
    return cast(Logger, structlog.get_logger(**keys))


def configure(level: str = "info", *, stream: TextIO | None = None, as_json: bool | None = None) -> None:
    """Decide once, at the start of a process, how lines look; repeating it replaces what was."""
    with _lock:
        _state.stream = stream
        _state.as_json = as_json
        _state.level = LEVELS[level]
        _state.configured = True
    with contextlib.suppress(ImportError):
        _set_up_structlog(level)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, _FromLibraries)]:
        root.removeHandler(handler)
    root.addHandler(_FromLibraries())
    root.setLevel(LEVELS[level])
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(max(LEVELS[level], LEVELS["warning"]))


def is_configured() -> bool:
    return _state.configured


def _set_up_structlog(level: str) -> None:
    import structlog

    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _emit],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *args: None,
        cache_logger_on_first_use=False,
    )


def redact(value: Any) -> Any:
    """The same without secrets: by what a key is called, and by what a text looks like."""
    if isinstance(value, str):
        for pattern, instead in _SECRET_TEXT:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, Mapping):
        return {
            redact(str(key)): ("***" if item and _SECRET_KEYS.search(str(key)) else redact(item))
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact(str(value))


def cause_of(error: BaseException) -> str:
    """What a driver said in its own words, without secrets: for operators, never for an answer. Empty if none did."""
    said = getattr(error.__cause__, "orig", None)
    lines = str(said or "").strip().splitlines()
    return str(redact(lines[0])) if lines else ""


class Sparing:
    """Lets an event through at most once in `seconds`, and says how many were left out: for what fails in a loop."""

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._last = float("-inf")
        self._left_out = 0

    def due(self) -> int | None:
        """None: be silent. A number: speak, so many were left out since the last time."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            self._left_out += 1
            return None
        left_out, self._left_out, self._last = self._left_out, 0, now
        return left_out

    def reset(self) -> None:
        """What failed works again: the next failure is news."""
        self._last, self._left_out = float("-inf"), 0


class _State:
    stream: TextIO | None = None
    as_json: bool | None = None
    level: int = LEVELS["warning"]
    configured: bool = False


_state = _State()
_lock = threading.Lock()


def _emit(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
    """structlog's last processor: writes the line itself, and lets structlog go no further."""
    import structlog

    _write(dict(event))
    raise structlog.DropEvent


def _write(event: dict[str, Any]) -> None:
    # Everything here is suppressed on purpose: a log that cannot be written must not end the work it tells of.
    with contextlib.suppress(Exception):
        story = _story(event.pop("exc_info", None), event.pop("exception", None))
        head = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": event.pop("level", "info")}
        event = redact(head | event)
        stream = _state.stream or sys.stderr
        as_json = _state.as_json if _state.as_json is not None else not stream.isatty()
        if as_json:
            line = json.dumps(event | ({"story": redact(story)} if story else {}), ensure_ascii=False, default=str)
        else:
            line = _for_eyes(event) + (f"\n{redact(story).rstrip()}" if story else "")
        with _lock:
            stream.write(line + "\n")
            stream.flush()


def _story(exc_info: Any, ready: Any) -> str:
    if isinstance(ready, str):
        return ready
    if exc_info is True:
        exc_info = sys.exc_info()
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    if not isinstance(exc_info, tuple) or exc_info[0] is None:
        return ""
    return "".join(traceback.format_exception(*exc_info))


def _for_eyes(event: dict[str, Any]) -> str:
    at, level, name = event.pop("at"), event.pop("level"), event.pop("event", "")
    keys = " ".join(f"{key}={_short(value)}" for key, value in event.items())
    return f"{at[11:23]} {level:<7} {name} {keys}".rstrip()


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[\s\"=]", text) or not text else text


class _FromLibraries(logging.Handler):
    """What celery, kombu, aiohttp and their like say, in our form."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            event: dict[str, Any] = {"level": record.levelname.lower(), "event": record.name}
            _write(event | {"message": record.getMessage(), "exc_info": record.exc_info})


class _Plain:
    """Where structlog is not installed: the same calls, the same lines."""

    def __init__(self, keys: dict[str, Any]) -> None:
        self._keys = keys

    def bind(self, **keys: Any) -> _Plain:
        return _Plain(self._keys | keys)

    def _log(self, level: str, event: str, keys: dict[str, Any]) -> None:
        if LEVELS[level] >= _state.level:
            _write(self._keys | keys | {"event": event, "level": level})

    def debug(self, event: str, **keys: Any) -> None:
        self._log("debug", event, keys)

    def info(self, event: str, **keys: Any) -> None:
        self._log("info", event, keys)

    def warning(self, event: str, **keys: Any) -> None:
        self._log("warning", event, keys)

    def error(self, event: str, **keys: Any) -> None:
        self._log("error", event, keys)

    def exception(self, event: str, **keys: Any) -> None:
        self._log("error", event, {"exc_info": True} | keys)
