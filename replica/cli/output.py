"""How the command line speaks: one JSON document or a table on stdout, everything else on stderr.

Given     answers of the server, errors, counts of work done.
Returns   nothing; prints.
Promises  with `-o json` stdout carries exactly one JSON document, with `-o ndjson` one object a line, and nothing else;
          no text of a server or a file name reaches a terminal with control characters in it; rich is imported only
          when a table or a bar is drawn on a terminal.
Partner   every module of replica.cli prints through here; replica.cli.main turns errors into exit codes.
"""

from __future__ import annotations

import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, TypeVar

import click

from rules.errors import InvalidExpression, ReplicaError
from rules.quantities import human_bytes

T = TypeVar("T")
Format = Literal["table", "json", "ndjson"]

#: Rows that are measured and printed together: a long list begins to appear at once and needs little memory.
_ROWS_AT_ONCE = 1_000
#: So much of an expression is shown before and after the column that is wrong.
_AROUND = 60

#: Characters that steer a terminal or hide in a text: controls, bidirectional overrides, line and paragraph separators.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """The text with everything that would steer a terminal written as an escape."""
    return _STEERING.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


def human_size(size: int | None) -> str:
    return "–" if size is None else human_bytes(size)


def human_instant(at: datetime | None) -> str:
    return "–" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def text_of(value: object) -> str:
    """Any field as a table shows it."""
    match value:
        case None | "":
            return "–"
        case bool():
            return "yes" if value else "no"
        case datetime():
            return human_instant(value)
        case Mapping():
            return ", ".join(f"{k}={attribute_text(v)}" for k, v in value.items()) or "–"
        case list() | tuple():
            return ", ".join(map(str, value)) or "–"
    return str(value)


def attribute_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def payload_text(payload: Mapping[str, object]) -> str:
    """What an event says besides what it is about; values as JSON would have them, texts without quotes."""
    import json

    said = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in payload.items()}
    return ", ".join(f"{k}={said[k]}" for k, v in payload.items() if v is not None) or "–"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its title and what it shows of an item (a field's name, or a function)."""

    title: str
    show: str | Callable[[Any], object]
    right: bool = False

    def text(self, item: object) -> str:
        value = getattr(item, self.show) if isinstance(self.show, str) else self.show(item)
        return printable(text_of(value))


def size_column(title: str, field: str) -> Column:
    return Column(title, lambda item: human_size(getattr(item, field)), right=True)


class Output:
    """Prints what one command found, in the format that was asked for."""

    def __init__(self, form: Format = "table") -> None:
        self.form: Format = form

    def one(self, item: object, rows: Sequence[tuple[str, object]] | None = None) -> None:
        """One document; as a table a line for each of `rows` (all fields of the item when None)."""
        if self.form != "table":
            _write(_encode(item, indent=2 if self.form == "json" else 0))
            return
        if rows is None:
            rows = [(k.replace("_", " "), v) for k, v in _fields(item).items()]
        width = max((_width(title) for title, _ in rows), default=0)
        for title, value in rows:
            _write(f"{title}{' ' * (width - _width(title))}  {printable(text_of(value))}".encode())

    def one_line(self, item: object) -> None:
        """One of an endless list, as JSON on a line of its own, at once."""
        _write(_encode(item))
        sys.stdout.flush()

    def many(self, items: Iterable[T], columns: Sequence[Column], *, nothing: str = "nothing found") -> int:
        """A list: an array, one object a line, or a table. Returns how many there were.

        JSON is printed only when the list is complete, so that an error in the middle leaves stdout empty.
        """
        count = 0
        if self.form == "json":
            collected = list(items)
            _write(_encode(collected, indent=2))
            return len(collected)
        if self.form == "ndjson":
            for item in items:
                _write(_encode(item))
                count += 1
            return count
        columns_free = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        widths: list[int] = [_width(c.title) for c in columns]
        for rows in _chunks(([c.text(item) for c in columns] for item in items), _ROWS_AT_ONCE):
            # A table that does not fit is left to the terminal: lines wrapped by it can still be copied, cells cannot.
            if _room(columns, rows) <= columns_free:
                _rich_table(columns, rows)
            else:
                _plain_table(columns, rows, widths, header=count == 0)
            count += len(rows)
        if count == 0:
            say(nothing)
        return count

    def lines(self, item: object, lines: Iterable[str]) -> None:
        """A document whose table form is text of its own."""
        if self.form != "table":
            self.one(item)
            return
        for line in lines:
            _write(printable(line).encode(errors="backslashreplace"))


def say(message: str) -> None:
    """A message for the person; never on stdout."""
    click.echo(printable(message), err=True)


def show_error(error: ReplicaError) -> None:
    """`replica: <message>`, the expression with a caret where it is about one, and what to do."""
    lines = error.message.splitlines() or [""]
    say(f"replica: {lines[0]}")
    for line in lines[1:]:
        say(f"  {line}")
    if isinstance(error, InvalidExpression) and error.column > 0:
        text = getattr(error, "text", "")
        if text:
            first = max(0, error.column - 1 - _AROUND)
            before = ("…" if first else "") + printable(text[first : error.column - 1])
            last = error.column - 1 + _AROUND
            say(f"  {before}{printable(text[error.column - 1 : last])}{'…' if len(text) > last else ''}")
            say(f"  {' ' * _width(before)}^")
    items = getattr(error, "items", ())
    for item in items[:10] if len(items) > 1 else ():  # of a single one the message speaks
        say(f"  {_at_fault(item)}")
    if error.hint:
        say(f"hint: {error.hint}")


def _at_fault(item: Mapping[str, object]) -> str:
    """One item of a bulk call that was refused."""
    if {"did", "field", "known", "given"} <= item.keys():
        return f"{item['did']} is known with {item['field']} {item['known']}, not {item['given']}"
    return ": ".join(map(str, item.values()))


def parse_size(text: str) -> int:
    """`10TB`, `1.5 GiB`, `4096`; raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGTPE]?)(i?)[bB]?", text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{printable(text)!r} is not a size; write for example 500GB, 10TB or 4TiB")
    unit: int = (1024 if match[3] else 1000) ** " KMGTPE".index(match[2].upper() or " ")
    return round(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}


def parse_duration(text: str) -> float:
    """`30d`, `12h`, `1d12h`, `90` (seconds); raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhdwy]?)", text)
    if not parts or not re.fullmatch(r"\s*(?:\d+(?:\.\d+)?|(?:\d+(?:\.\d+)?\s*[smhdwy]\s*)+)\s*", text):
        raise ValueError(f"{printable(text)!r} is not a duration; write for example 90s, 12h, 30d or 10y")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


# --- below: how it is drawn -------------------------------------------------------------------------------------------


def _fields(item: object) -> dict[str, object]:
    if isinstance(item, Mapping):
        return dict(item)
    import msgspec

    return dict(msgspec.structs.asdict(item)) if isinstance(item, msgspec.Struct) else dict(vars(item))


def _encode(item: object, indent: int = 0) -> bytes:
    import msgspec

    data = msgspec.json.encode(item)
    if indent:
        data = msgspec.json.format(data, indent=indent)
    # JSON lets most steering characters through; inside a string an escape means the same, and they occur nowhere else.
    text = data.decode()
    steering = re.sub(r"[\n ]", "", "".join(set(_STEERING.findall(text))))
    if steering:
        text = re.sub(f"[{re.escape(steering)}]", lambda m: f"\\u{ord(m[0]):04x}", text)
    return text.encode()


def _write(line: bytes) -> None:
    """One line on stdout, in UTF-8 whatever the locale says."""
    click.echo(line)


def _chunks(rows: Iterable[list[str]], size: int) -> Iterator[list[list[str]]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _width(text: str) -> int:
    """Columns a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _plain_table(columns: Sequence[Column], rows: list[list[str]], widths: list[int], *, header: bool) -> None:
    if header:
        rows = [[c.title.upper() for c in columns], *rows]
    for row in rows:
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], _width(cell))
    for row in rows:
        cells = []
        for i, (column, cell) in enumerate(zip(columns, row, strict=True)):
            pad = " " * (widths[i] - _width(cell))
            cells.append(pad + cell if column.right else cell + pad)
        _write("  ".join(cells).rstrip().encode(errors="backslashreplace"))


def _room(columns: Sequence[Column], rows: list[list[str]]) -> int:
    """How wide the drawn table is: each column and a blank on either side."""
    return sum(max(_width(c.title), *(_width(row[i]) for row in rows)) + 2 for i, c in enumerate(columns))


def _rich_table(columns: Sequence[Column], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a name are no markup
    Console().print(table)
