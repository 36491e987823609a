"""Words, options and exit codes, as far as they need no server."""

import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest

from replica.cli.main import COMMANDS, exit_code, root
from replica.cli.rules import FOR_EVER, add
from rules import errors
from rules.errors import ReplicaError
from tests.replica.cli.conftest import Typed

ROOT = Path(__file__).parents[3]


def commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    context = click.Context(command)
    if not isinstance(command, click.Group):
        return [path]
    found = []
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below is not None
        found += commands(below, (*path, name))
    return found


ALL = commands(root)


def test_no_command_at_all_shows_what_there_is(alone: Typed):
    for words in ([], ["did"]):
        said = alone(*words, code=2)
        assert said.stdout == "" and said.stderr.startswith("Usage: ") and "\n\nOptions:\n" in said.stderr


def test_the_command_line_is_the_contract():
    assert {" ".join(path) for path in ALL} >= {
        *[
            "demo",
            "up",
            "serve",
            "worker",
            "control",
            "migrate",
            "doctor",
            "whoami",
            "register",
            "upload",
            "download",
            "locate",
        ],
        *(f"site {c}" for c in ["add", "list", "show", "key"]),
        *(f"endpoint {c}" for c in ["add", "list", "show", "set", "ban", "unban", "drain", "link", "decommission"]),
        *(f"account {c}" for c in ["add", "list", "show", "key"]),
        *(f"quota {c}" for c in ["set", "list", "show"]),
        *["usage", "events", "fsck", "import rucio"],
        *(f"scope {c}" for c in ["add", "list"]),
        *(f"did {c}" for c in ["add", "list", "show", "attach", "detach", "close", "reopen"]),
        *(f"did {c}" for c in ["meta", "find", "delete", "undelete", "history"]),
        *(f"subscription {c}" for c in ["add", "list", "show", "preview", "backfill", "delete"]),
        *(f"deletion {c}" for c in ["ask", "list", "show", "undo"]),
        *(f"rule {c}" for c in ["add", "list", "show", "explain", "history", "update", "delete", "move"]),
        *(f"rule {c}" for c in ["approve", "deny", "suspend", "resume"]),
        *(f"transfer {c}" for c in ["list", "show", "cancel", "retry", "watch"]),
    }


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_help_and_takes_the_common_options(path: tuple[str, ...], alone: Typed):
    shown = alone(*path, "--help").stdout
    assert "--server" in shown
    assert "--token-file" in shown
    assert "-o, --output" in shown
    assert shown.splitlines()[2].strip(), "the first line says what it is for"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_top_help_is_the_truth(name: str):
    """The static help names a command that is there, of that name."""
    assert COMMANDS[name].load().name == name


def test_an_unknown_command_suggests_the_right_one(alone: Typed):
    message = alone.error("endpiont", "list", code=2)
    assert "did you mean 'endpoint'?" in message
    assert "there are add, key, list, show" in alone.error("site", "zzz", code=2)


@pytest.mark.parametrize(
    "words",
    [
        ("rule", "add", "a:b"),
        ("rule", "add", "a:b", "--to", "x", "--copies", "0"),
        ("rule", "add", "a:b", "--to", "x", "--lifetime", "soon"),
        ("rule", "add", "a:b", "--to", "x", "--wait=soon"),
        ("rule", "show", "x"),
        ("upload", "x"),
        ("endpoint", "add", "X", "--site", "S", "--url", "file:///x", "--capacity", "much"),
        ("endpoint", "add", "X", "--site", "S", "--url", "file:///x", "--attribute", "=x"),
        ("endpoint", "set", "X"),
        ("register", "--endpoint", "X"),
        ("register", "--endpoint", "X", "file"),
        ("site", "list", "-o", "xml"),
        ("--nonsense",),
    ],
)
def test_what_cannot_be_read_is_a_usage_error(words: tuple[str, ...], alone: Typed):
    assert "hint: see `replica" in alone.error(*words, code=2)


def test_without_a_server_the_error_says_what_to_set(alone: Typed):
    assert "REPLICA_SERVER" in alone.error("site", "list", code=6)


def test_without_a_token_the_error_says_what_to_set(alone: Typed):
    assert "REPLICA_TOKEN_FILE" in alone.error("site", "list", "--server", "http://127.0.0.1:9", code=4)


def test_a_token_file_that_is_not_there_is_named(alone: Typed):
    message = alone.error("site", "list", "--server", "http://127.0.0.1:9", "--token-file", "nowhere", code=1)
    assert "nowhere" in message


def test_a_server_that_is_not_there_is_exit_6(alone: Typed):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: the connection is refused
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        alone.environment = {"REPLICA_SERVER": url, "REPLICA_TOKEN": "rpl_x"}
        assert url in alone.error("whoami", code=6)
        assert url in alone.error("whoami", "-o", "json", code=6)


def test_every_error_has_an_exit_code():
    def tree(of: type[ReplicaError]) -> list[type[ReplicaError]]:
        return [of, *(c for below in of.__subclasses__() for c in tree(below))]

    codes = {kind.__name__: exit_code(kind("x")) for kind in tree(ReplicaError) if kind.__module__ == errors.__name__}
    assert {name for name, code in codes.items() if code == 3} == {"NotFound"}
    assert {name for name, code in codes.items() if code == 4} == {"NotAuthenticated", "NotAllowed"}
    assert {name for name, code in codes.items() if code == 6} == {"Unavailable"}
    assert set(codes.values()) == {1, 3, 4, 6}


@pytest.mark.parametrize(
    ("words", "wait"),
    [
        ([], None),
        (["--wait"], FOR_EVER),
        (["--wait", "30"], 30.0),
        (["--wait", "1.5"], 1.5),
        (["--wait=2m"], 120.0),
        (["--wait", "--copies", "2"], FOR_EVER),
        (["--wait", "--", "a:b"], FOR_EVER),
    ],
)
def test_wait_may_stand_alone(words: list[str], wait: float | None):
    did = [] if "a:b" in words else ["a:b"]
    context = add.make_context("add", ["--to", "x", *words, *did])
    assert (context.params["wait"], context.params["did"]) == (wait, "a:b")


def test_a_did_after_wait_is_the_did():
    context = add.make_context("add", ["--wait", "a:b", "--to", "x"])
    assert (context.params["wait"], context.params["did"]) == (FOR_EVER, "a:b")


def test_ctrl_c_ends_with_130_and_a_word(tmp_path: Path):
    """The server accepts the connection and never answers."""
    import signal
    import time

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment = {"REPLICA_SERVER": f"http://127.0.0.1:{silent.getsockname()[1]}", "REPLICA_TOKEN": "rpl_x"}
        process = subprocess.Popen(
            [sys.executable, "-m", "replica", "whoami"],
            cwd=ROOT,
            env=environment,
            # A shell that runs the tests in the background has switched it off for them and for whom they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        silent.settimeout(20)
        connection, _ = silent.accept()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        connection.close()
    assert (process.returncode, out, err.strip()) == (130, "", "replica: interrupted")


def test_a_misspelt_setting_is_named(alone: Typed):
    alone.environment = {"REPLICA_SERVRE": "http://x"}
    assert "REPLICA_SERVER" in alone.error("whoami", code=1)
