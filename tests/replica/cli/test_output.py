import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Literal

import click
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from replica.cli.output import (
    Column,
    Output,
    human_size,
    parse_duration,
    parse_size,
    printable,
    show_error,
)
from rules.errors import InvalidExpression, Refused

ROOT = Path(__file__).parents[3]


class Thing(msgspec.Struct):
    name: str
    size: int | None = 0
    ready: bool = True
    attributes: dict[str, str | int | float | bool] = {}


COLUMNS = (Column("name", "name"), Column("size", lambda t: human_size(t.size), right=True), Column("ready", "ready"))
THINGS = [Thing("a", 1), Thing("longer", 1_500_000_000, ready=False), Thing("ü日本", None)]


def printed(call) -> tuple[str, str]:
    """stdout and stderr of a call."""
    result = CliRunner().invoke(click.Command("x", callback=call))
    assert result.exception is None, result.exception
    return result.stdout, result.stderr


def test_a_list_is_one_json_array():
    out, err = printed(lambda: Output("json").many(iter(THINGS), COLUMNS))
    assert [t["name"] for t in json.loads(out)] == ["a", "longer", "ü日本"]
    assert json.loads(out)[1]["size"] == 1_500_000_000
    assert err == ""


def test_an_empty_list_is_an_empty_array():
    out, err = printed(lambda: Output("json").many([], COLUMNS))
    assert (json.loads(out), err) == ([], "")


def test_ndjson_is_one_object_a_line():
    out, _ = printed(lambda: Output("ndjson").many(iter(THINGS), COLUMNS))
    assert [json.loads(line)["name"] for line in out.splitlines()] == ["a", "longer", "ü日本"]


def test_one_document_is_an_object():
    out, _ = printed(lambda: Output("json").one(THINGS[0], [("name", "a")]))
    assert json.loads(out) == {"name": "a", "size": 1, "ready": True, "attributes": {}}


def test_a_list_that_breaks_off_leaves_stdout_empty():
    def breaking():
        yield THINGS[0]
        raise Refused("the server went away")

    result = CliRunner().invoke(click.Command("x", callback=lambda: Output("json").many(breaking(), COLUMNS)))
    assert isinstance(result.exception, Refused)
    assert result.stdout == ""


def test_a_table_is_aligned_and_sizes_are_human():
    out, _ = printed(lambda: Output().many(iter(THINGS), COLUMNS))
    assert out.splitlines() == [
        "NAME      SIZE  READY",
        "a          1 B  yes",
        "longer  1.5 GB  no",
        "ü日本        –  yes",
    ]


def test_a_long_table_is_printed_in_parts_under_one_header():
    out, _ = printed(lambda: Output().many((Thing(f"n{i}") for i in range(2_500)), COLUMNS))
    lines = out.splitlines()
    assert len(lines) == 2_501
    assert sum(line.startswith("NAME") for line in lines) == 1


def test_an_empty_table_says_so_on_stderr():
    assert printed(lambda: Output().many([], COLUMNS, nothing="there are no things")) == ("", "there are no things\n")


def test_the_fields_of_one_thing_stand_in_lines():
    out, _ = printed(lambda: Output().one(Thing("x", 5, attributes={"tier": 1, "fast": True})))
    assert out.splitlines() == ["name        x", "size        5", "ready       yes", "attributes  tier=1, fast=true"]


@pytest.mark.parametrize("text", ["\x1b[2J", "\x07", "\u202e", "\u2028", "\x9b", "\r", "\n", "\x7f"])
@pytest.mark.parametrize("form", ["table", "json", "ndjson"])
def test_no_name_steers_a_terminal(text: str, form: Literal["table", "json", "ndjson"]):
    out, _ = printed(lambda: Output(form).many([Thing(f"<{text}>")], COLUMNS))
    assert f"<{text[0]}" not in out
    if form != "table":
        assert json.loads(out if form == "ndjson" else out[1:-2])["name"] == f"<{text}>"


def test_a_name_that_is_no_text_is_printed_escaped():
    assert printable("a\udcff") == "a\\udcff"


@given(st.text())
def test_printable_text_is_printable_and_plain_text_is_left_alone(text: str):
    shown = printable(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)
    assert printable(shown) == shown


def test_an_error_shows_its_hint(capsys: pytest.CaptureFixture[str]):
    show_error(Refused("the disk \x1b[31mis full\nreally", hint="free some"))
    assert capsys.readouterr().err == "replica: the disk \\x1b[31mis full\n  really\nhint: free some\n"


def test_an_expression_error_points_at_its_column(capsys: pytest.CaptureFixture[str]):
    error = InvalidExpression("expected a name", column=5)
    error.text = "日本\t& &"  # type: ignore[attr-defined]
    show_error(error)
    _, expression, caret = capsys.readouterr().err.splitlines()
    assert expression == "  日本\\t& &"
    # Wide characters take two columns, and the tab is written as two characters.
    assert caret == "  " + " " * (2 + 2 + 2 + 1) + "^"


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("10TB", 10**13), ("1.5 GiB", 3 * 2**29), ("500G", 5 * 10**11), ("1k", 1000), ("7B", 7)],
)
def test_sizes_are_read(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "TB", "1 XB", "-1", "1iB", "1e3", "ten"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30d", 2_592_000), ("1d12h", 129_600), ("1.5h", 5400), ("10y", 315_360_000)],
)
def test_durations_are_read(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1", "1 month", "1d 2", "10 20", "5x"])
def test_what_is_no_duration_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def in_a_terminal(script: str) -> bytes:
    """What a program writes to a real pseudo-terminal."""
    caught = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1024)
        caught.extend(data)
        return data

    assert os.waitstatus_to_exitcode(pty.spawn([sys.executable, "-c", script], read)) == 0
    return bytes(caught)


def test_a_terminal_gets_a_drawn_table_and_names_are_no_markup():
    """In a real pseudo-terminal, for that is what is asked of the system."""
    script = """
import os, pty, sys
from replica.cli.output import Column, Output
from types import SimpleNamespace
Output().many([SimpleNamespace(name="[bold]a[/bold]\\x1b[2J")], (Column("name", "name"),))
"""
    caught = in_a_terminal(script)
    assert b"[bold]a[/bold]\\x1b[2J" in caught
    assert b"\x1b[2J" not in caught


def test_a_table_too_wide_for_the_terminal_is_not_cut_up():
    """Its lines are whole, so that a long name can be copied."""
    script = """
import os
os.environ["COLUMNS"] = "40"
from replica.cli.output import Column, Output
from types import SimpleNamespace
Output().many([SimpleNamespace(name="x" * 60)], (Column("name", "name"),))
"""
    caught = in_a_terminal(script)
    assert b"x" * 60 in caught


def test_a_reader_who_leaves_early_causes_no_noise():
    """`replica … | head -1`"""
    script = """
from replica.cli.main import root
from replica.cli.output import Column, Output
from types import SimpleNamespace
import click
@root.command("much")
def much():
    Output().many((SimpleNamespace(name="x" * 100) for _ in range(100_000)), (Column("name", "name"),))
root(["much"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=20)


def test_of_a_long_expression_only_the_neighbourhood_of_the_column_is_shown():
    error = InvalidExpression("column 5001: no", column=5001)
    error.text = "x" * 5000 + "!" + "y" * 5000  # type: ignore[attr-defined]
    _, err = printed(lambda: show_error(error))
    _, text, caret = err.splitlines()
    assert max(map(len, err.splitlines())) < 140
    assert text[caret.index("^")] == "!"
    assert text.strip().startswith("…")
    assert text.endswith("…")


def test_refused_items_are_sentences_and_a_single_one_is_not_said_twice():
    error = Refused("p:a is known with size 1, not 2 (and 1 more like it)")
    error.items = [{"did": f"p:{name}", "field": "size", "known": 1, "given": 2} for name in "ab"]
    _, err = printed(lambda: show_error(error))
    assert "  p:b is known with size 1, not 2" in err.splitlines()
    del error.items[1:]
    _, err = printed(lambda: show_error(error))
    assert len(err.splitlines()) == 1
