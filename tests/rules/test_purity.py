"""rules/ is pure: the standard library, and nothing of it that reads the world."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rules

MODULES = sorted(Path(rules.__file__).parent.glob("*.py"))
ALLOWED = {
    *["__future__", "collections", "dataclasses", "difflib", "enum", "functools", "hashlib", "itertools", "math"],
    *["datetime", "operator", "re", "types", "typing", "unicodedata", "rules"],
}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_a_module_imports_nothing_that_reads_the_world(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= ALLOWED


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_a_module_asks_no_clock(module: Path) -> None:
    tree = ast.parse(module.read_text(encoding="utf-8"))
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not asked & {"now", "utcnow", "today"}


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.stem)
def test_a_module_says_what_it_is_given_returns_and_promises(module: Path) -> None:
    said = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    if module.stem != "__init__":
        assert all(f"\n{word} " in said for word in ("Given", "Returns", "Promises"))


def test_the_theory_of_operation_has_every_module() -> None:
    assert rules.__doc__
    assert all(f"`{m.stem}`" in rules.__doc__ for m in MODULES if m.stem != "__init__")
