"""`replica demo`, as a person types it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.scenarios.system import ROOT, clean_environment

DEMO = [sys.executable, "-m", "replica", "demo"]


def environment(temporary: Path) -> dict[str, str]:
    return clean_environment() | {"TMPDIR": str(temporary)}


def test_all_that_it_says_is_true_and_nothing_is_left(tmp_path: Path):
    started = time.monotonic()
    done = subprocess.run(DEMO, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All of it is true." in done.stdout
    assert "kill -9" in done.stdout and "one byte flipped" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert time.monotonic() - started < 60
    assert list(tmp_path.iterdir()) == []


def test_it_takes_the_files_of_a_person_and_keeps_the_directory_that_was_named(tmp_path: Path):
    mine = tmp_path / "mine"
    (mine / "Lauf 1").mkdir(parents=True)
    for number in range(20):
        (mine / f"Lauf 1/Größe [{number}].txt").write_text(f"{number}\n" * 1000)
    done = subprocess.run(
        [*DEMO, str(mine), "--dir", str(tmp_path / "there")],
        env=environment(tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "42 of 42 copies right" in done.stdout
    kept = {path.name for path in (tmp_path / "there/disks/HZDR-DISK/demo/Lauf 1").iterdir()}
    assert kept == {f"Größe [{number}].txt" for number in range(20)}


def test_ctrl_c_ends_it_and_leaves_neither_files_nor_processes(tmp_path: Path):
    process = subprocess.Popen(
        DEMO, env=environment(tmp_path), cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("load"):
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 130, said
    assert list(tmp_path.iterdir()) == []
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path) in _environment_of(pid)]


def _environment_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return ""
