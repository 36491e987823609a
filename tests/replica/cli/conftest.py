"""The command line as a person types it, against a service that listens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from replica import log
from replica.cli.main import root
from tests.replica.client.world import World, world


@dataclass
class Typed:
    """Types commands into a shell in which REPLICA_SERVER and REPLICA_TOKEN are set."""

    environment: dict[str, str]

    def __call__(self, *words: str | Path, code: int = 0, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(root, [str(w) for w in words], env=self.environment, input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}{result.stderr}"
        return result

    def json(self, *words: str | Path, code: int = 0, stdin: str | bytes | None = None) -> Any:
        """The one document on stdout."""
        return json.loads(self(*words, "-o", "json", code=code, stdin=stdin).stdout)

    def error(self, *words: str | Path, code: int, stdin: str | bytes | None = None) -> str:
        """What is said on stderr; nothing may be on stdout, and the message begins as it should."""
        result = self(*words, code=code, stdin=stdin)
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert result.stderr.startswith("replica: ")
        return result.stderr


@pytest.fixture
def w(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    log.configure("critical")  # the service runs in this process, and its log would be among what a command says
    with world(sqlite_url, tmp_path) as made:
        yield made


@pytest.fixture
def typed(w: World) -> Typed:
    return Typed({"REPLICA_SERVER": w.service.url, "REPLICA_TOKEN": w.service.admin})


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """A shell in which nothing is set."""
    monkeypatch.chdir(tmp_path)
    for name in ("REPLICA_SERVER", "REPLICA_TOKEN", "REPLICA_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    return Typed({})
