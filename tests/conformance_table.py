"""Which adapter keeps which promise, proven against which server: a table, and whether it has a gap.

    python -m tests.conformance_table          what would be run
    python -m tests.conformance_table --run    what it comes to: the suite is run, real servers and all

Given     the classes beneath tests/replica/storage that inherit the shipped suite (replica.storage.conformance).
Returns   Markdown: a line for each test of the suite, a column for each adapter over each server.
Promises  an adapter that is registered without the suite, a server of the list that is not run against, a class that
          leaves a test out, or one that the list does not know, is a gap: `gaps` names it.
Partner   tests/replica/storage/test_the_conformance_table.py asks for gaps; replica.storage.registry has the adapters.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from replica.storage import registry
from replica.storage.conformance import StorageConformance

FOLDER = Path(__file__).parent / "replica/storage"
PACKAGE = "tests.replica.storage"


@dataclass(frozen=True, slots=True)
class Column:
    adapter: str  #: module:class
    schemes: tuple[str, ...]
    server: str


POSIX, WEBDAV = "replica.storage.posix:PosixStorage", "replica.storage.webdav:WebdavStorage"
S3, XROOTD = "replica.storage.s3:S3Storage", "replica.storage.xrootd:XRootDStorage"
_DAV = ("davs", "https", "dav", "http")
_S3 = ("s3", "s3+https", "s3+http")
#: Every run that must be, by the class that is it.
COLUMNS = {
    "test_conformance.TestPosixOnDisk": Column(POSIX, ("file",), "a disk"),
    "test_conformance.TestPosixInSharedMemory": Column(POSIX, ("file",), "tmpfs"),
    "test_conformance.TestPosixWithoutNewSystemCalls": Column(POSIX, ("file",), "an old kernel"),
    "test_conformance.TestMemory": Column("replica.storage.memory:MemoryStorage", ("memory",), "this process"),
    "test_webdav_conformance.TestApache": Column(WEBDAV, _DAV, "Apache mod_dav"),
    "test_webdav_conformance.TestRclone": Column(WEBDAV, _DAV, "rclone"),
    "test_webdav_conformance.TestXRootD": Column(WEBDAV, _DAV, "XRootD"),
    "test_s3.TestMoto": Column(S3, _S3, "moto"),
    "test_s3.TestRclone": Column(S3, _S3, "rclone"),
    "test_s3.TestStrict": Column(S3, _S3, "conditions and digests kept"),
    "test_sftp.TestSftp": Column("replica.storage.sftp:SftpStorage", ("sftp",), "OpenSSH"),
    "test_xrootd.TestXRootD": Column(XROOTD, ("root", "roots"), "XRootD"),
    "test_xrootd.TestItsDiskIsNotMounted": Column(XROOTD, ("root", "roots"), "XRootD, no disk"),
    "test_fsspec_plain.TestFsspecLocal": Column(
        "replica.storage.fsspec_plain:FsspecStorage", (registry._FSSPEC,), "fsspec's local files"
    ),
}
#: Of abilities that not every storage has: they say nothing about one that has not.
_OF_AN_ABILITY = "write_at"


def suite() -> list[str]:
    """The tests of the suite, in its order."""
    return [name for name in vars(StorageConformance) if name.startswith("test_")]


def classes() -> dict[str, type[StorageConformance]]:
    """Every class that pytest would run the suite with."""
    found = {}
    for file in sorted(FOLDER.glob("test_*.py")):
        if "Conformance" not in file.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"{PACKAGE}.{file.stem}")
        for name, value in vars(module).items():
            ours = inspect.isclass(value) and issubclass(value, StorageConformance)
            if ours and name.startswith("Test") and value.__module__ == module.__name__:
                found[f"{file.stem}.{name}"] = value
    return found


def gaps(found: dict[str, type[StorageConformance]] | None = None) -> list[str]:
    """What is missing; nothing, if all is well."""
    found = classes() if found is None else found
    missing = [f"{name} is no column of the table" for name in found.keys() - COLUMNS.keys()]
    missing += [
        f"nothing runs {COLUMNS[name].adapter} against {COLUMNS[name].server} ({name})"
        for name in COLUMNS.keys() - found.keys()
    ]
    schemes = {scheme for name in found.keys() & COLUMNS.keys() for scheme in COLUMNS[name].schemes}
    missing += [
        f"nothing runs the suite for {scheme}://" for scheme in {*registry._SCHEMES, registry._FSSPEC} - schemes
    ]
    for name, one in found.items():
        marks = [mark.name for mark in (getattr(one, "pytestmark", None) or [])]
        if {"skip", "skipif", "xfail"} & {*marks}:
            missing.append(f"{name} is skipped")
        for test in suite():
            run = getattr(one, test, None)
            if not callable(run) or {m.name for m in getattr(run, "pytestmark", [])} & {"skip", "skipif", "xfail"}:
                missing.append(f"{name} leaves out {test}")
            elif run is not getattr(StorageConformance, test):
                missing.append(f"{name} has a {test} of its own")
    return sorted(missing)


def _is_of_an_ability(test: str) -> bool:
    return "SupportsResume" in inspect.getsource(getattr(StorageConformance, test))


def _has_ability(column: Column) -> bool:
    module, _, name = column.adapter.partition(":")
    return hasattr(getattr(importlib.import_module(module), name), _OF_AN_ABILITY)


def table(results: dict[tuple[str, str], str] | None = None) -> str:
    """`results`: by class and test; without them each cell says that it would be run."""
    able = {name: _has_ability(column) for name, column in COLUMNS.items()}
    heads = [f"{column.schemes[0].rstrip('+')}: {column.server}" for column in COLUMNS.values()]
    lines = [f"| promise | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for test in suite():
        of_an_ability = _is_of_an_ability(test)
        cells = []
        for name in COLUMNS:
            cell = "run" if results is None else results.get((name, test), "MISSING")
            cells.append("–" if of_an_ability and not able[name] else cell)
        lines.append(f"| {test.removeprefix('test_').replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run() -> dict[tuple[str, str], str]:
    """Run the suite, and say of each test how it ended."""
    places = [f"{FOLDER / name.split('.')[0]}.py::{name.split('.')[1]}" for name in COLUMNS]
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch, "told.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={told}", *places]
        subprocess.run(command, check=False, stdout=sys.stderr)
        cases = ElementTree.parse(told).getroot().iter("testcase")
        results = {}
        for case in cases:
            name = (case.get("classname") or "").removeprefix(f"{PACKAGE}.")
            bad = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "")
            results[name, case.get("name") or ""] = bad.upper() or "✓"
    return results


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the suite, and print what it came to")
    said = parser.parse_args(words)
    results = run() if said.run else None
    print(table(results))
    missing = gaps()
    for gap in missing:
        print(f"GAP: {gap}", file=sys.stderr)
    expected = {(name, test) for name in COLUMNS for test in suite()}
    bad = {} if results is None else {key for key in expected if results.get(key) != "✓"}
    for name, test in sorted(bad):
        print(f"BAD: {name} {test}: {(results or {}).get((name, test), 'was not run')}", file=sys.stderr)
    return 1 if missing or bad else 0


if __name__ == "__main__":
    sys.exit(main())
