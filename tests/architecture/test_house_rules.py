"""The rules of the house are tests: who may import whom, one style, types that hold, a README that tells the truth."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_imports_go_one_way():
    run(str(BIN / "lint-imports"), "--no-cache")


def test_the_style_is_one():
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_the_types_hold():
    run(sys.executable, "-m", "mypy")


def test_the_top_level_holds_nothing_else():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {path.split("/")[0] for path in tracked.splitlines() if not path.startswith(".")}
    assert top <= {"pyproject.toml", "README.md", "replica", "workers", "rules", "tests", "compose"}


def test_the_map_of_the_readme_is_true():
    """Every file and folder that the README's map names exists, and every module of the three packages is in it."""
    block = README.split("<!-- map -->")[1].split("```")[1]
    named: set[str] = set()
    folder = ""
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        path = line.strip().split()[0]
        if line[0] != " ":
            folder = path
            assert (ROOT / folder).exists(), f"the map names {folder}, which is not there"
            continue
        # "  a.py b.py  what they are": names up to the first run of two blanks
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            assert (ROOT / folder / name).exists(), f"the map names {folder}{name}, which is not there"
            named.add(folder + name)
    for package in ("rules", "replica", "workers"):
        for module in (ROOT / package).rglob("*.py"):
            path = str(module.relative_to(ROOT))
            if module.name == "__init__.py" or "/versions/" in path:
                continue
            inside = any(entry.endswith("/") and path.startswith(entry) for entry in named)
            assert path in named or inside, f"{path} is not on the README's map"


@pytest.mark.parametrize("which", ["demo", "tests"])
def test_a_set_up_command_is_one_line(which: str):
    block = README.split(f"<!-- command: {which} -->")[1].split("```sh\n")[1].split("\n```")[0]
    assert "\n" not in block
    assert block.startswith("python3 -m venv ")


def test_the_versions_required_have_upper_bounds_where_an_api_may_break():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    unbounded = {"fsspec", "structlog"}
    for requirement in project["dependencies"] + project["optional-dependencies"]["server"]:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert name in unbounded or "<" in requirement, f"{requirement} has no upper bound"
