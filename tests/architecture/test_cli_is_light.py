"""A laptop's command line begins at once: help imports nothing heavy, and a client command nothing of a server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: What no help may import.
HEAVY = ("sqlalchemy", "celery", "kombu", "redis", "aiohttp", "structlog", "fsspec", "rich", "psycopg", "alembic")
#: What no command of a client may import, whatever it does.
SERVER = ("sqlalchemy", "celery", "kombu", "redis", "structlog", "psycopg", "alembic")
OURS = ("replica.db", "replica.catalog", "replica.api", "workers")

_LIST = """
import json, sys
sys.argv = ["replica", *json.loads(sys.argv[1])]
from replica.cli.main import main
try:
    main()
except SystemExit as end:
    sys.stderr.write("\\n" + json.dumps([end.code, sorted(sys.modules)]))
"""


def run(*words: str, environ: dict[str, str] | None = None) -> tuple[int, set[str]]:
    """Exit code, and all modules that the command imported."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST, json.dumps(words)],
        cwd=ROOT,
        env=os.environ | (environ or {}),
        capture_output=True,
        text=True,
        check=False,
    )
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, set(modules)


def of(packages: tuple[str, ...], modules: set[str]) -> set[str]:
    return {m for m in modules for p in packages if m == p or m.startswith(p + ".")}


GROUPS = ("site", "endpoint", "scope", "did", "rule", "transfer", "subscription", "webhook", "events")


@pytest.mark.parametrize("words", [("--help",), *((group, "--help") for group in GROUPS), ("rule", "add", "--help")])
def test_help_imports_nothing_heavy(words: tuple[str, ...]):
    code, modules = run(*words)
    assert code == 0
    assert not of(HEAVY, modules)


@pytest.mark.parametrize(
    "command", ["demo", "up", "serve", "worker", "control", "migrate", "doctor", "upload", "download"]
)
def test_the_help_of_a_heavy_command_is_light(command: str):
    code, modules = run(command, "--help")
    assert code == 0
    assert not of(HEAVY, modules)


def test_the_top_help_imports_no_command():
    _, modules = run("--help")
    assert of(("replica.cli",), modules) <= {
        "replica.cli",
        "replica.cli.main",
        "replica.cli.common",
        "replica.cli.output",
    }


@pytest.mark.parametrize(
    "words",
    [
        ("whoami",),
        ("site", "list"),
        ("rule", "list"),
        ("upload", __file__, "--scope", "a"),
        ("download", "a:b"),
        ("register", __file__, "--scope", "a", "--endpoint", "E"),
    ],
)
def test_a_client_command_imports_nothing_of_a_server(words: tuple[str, ...]):
    """Nothing listens at this address, so the command ends with 6; what it needed until then is imported."""
    code, modules = run(*words, environ={"REPLICA_SERVER": "http://127.0.0.1:9", "REPLICA_TOKEN": "rpl_x"})
    assert code == 6
    assert not of((*SERVER, *OURS), modules)
    assert not of(("aiohttp", "rich"), modules)


def test_help_answers_in_less_than_200_ms():
    """In CPU time, and the fastest of several: neighbours on a busy machine are not what is measured."""
    script = """
import os, subprocess, sys
best = 9.0
for _ in range(7):
    before = os.times()
    subprocess.run([sys.executable, "-m", "replica", "--help"], check=True, capture_output=True)
    after = os.times()
    best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
print(best)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.2
