"""A watcher that was never seen to bark proves nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.scenarios.system import Files, Poller, System, until


def watched(tmp_path: Path) -> tuple[System, Files, Path]:
    files = Files("s", {"a/one.dat": 1000, "a/two.dat": 2 << 20}, {"a/one.dat": "?", "a/two.dat": "?"})
    system = cast(System, SimpleNamespace(disks={"HZDR": tmp_path}))
    (tmp_path / "s/a").mkdir(parents=True)
    return system, files, tmp_path / "s/a"


def test_the_poller_sees_a_file_that_grows_under_its_final_name(tmp_path: Path):
    system, files, folder = watched(tmp_path)
    with Poller(system, files, ["HZDR"]) as poller:
        (folder / "one.dat").write_bytes(b"x" * 500)
        until("the poller has seen it", lambda: poller.seen)
        (folder / "one.dat").write_bytes(b"x" * 1000)
    with pytest.raises(AssertionError, match=r"had 500 of 1000 bytes under its final name"):
        poller.check(1)


def test_the_poller_sees_a_large_file_with_other_bytes(tmp_path: Path):
    system, files, folder = watched(tmp_path)
    with Poller(system, files, ["HZDR"]) as poller:
        (folder / "part").write_bytes(b"x" * (2 << 20))
        (folder / "part").rename(folder / "two.dat")
    with pytest.raises(AssertionError, match="had other bytes under its final name"):
        poller.check(1)


def test_the_poller_sees_that_a_file_never_came(tmp_path: Path):
    system, files, _ = watched(tmp_path)
    with Poller(system, files, ["HZDR"]) as poller:
        pass
    with pytest.raises(AssertionError, match="saw 0 of 2 files"):
        poller.check(2)
