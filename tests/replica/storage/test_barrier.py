"""One wait for the disk instead of many: only where it is known to do what it says."""

import errno
import os
from pathlib import Path

import pytest

from replica.storage import barrier


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(barrier, "_avoided", {})


@pytest.fixture
def folder(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def mounted_as(monkeypatch, folder, kind):
    device = os.fstat(folder).st_dev
    line = f"22 1 {os.major(device)}:{os.minor(device)} / / rw,relatime shared:1 - {kind} /dev/vda rw\n"
    really = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self, **how: line if self.name == "mountinfo" else really(self, **how)
    )


@pytest.mark.parametrize(("kind", "done"), [("ext4", True), ("xfs", True), ("fuse.sshfs", False), ("nfs4", False)])
def test_it_is_believed_only_on_file_systems_of_which_it_is_known(folder, monkeypatch, kind, done):
    asked = []
    monkeypatch.setattr(barrier, "_syncfs", lambda _: asked.append(kind) or 0)
    mounted_as(monkeypatch, folder, kind)
    assert barrier.everything_durable(folder, 100) is done
    assert bool(asked) is done


def test_the_device_is_flushed_after_the_last_write(folder, monkeypatch):
    """Without a journal, ext4 flushes the device's cache in the middle of `syncfs` and writes names after that."""
    done = []
    monkeypatch.setattr(barrier, "_syncfs", lambda _: done.append("syncfs") or 0)
    monkeypatch.setattr(barrier.os, "fsync", lambda descriptor: done.append(descriptor))
    mounted_as(monkeypatch, folder, "ext4")
    assert barrier.everything_durable(folder, 100)
    assert done == ["syncfs", folder]


def test_another_disk_may_come_to_the_same_number(folder, monkeypatch):
    monkeypatch.setattr(barrier, "_syncfs", lambda _: 0)
    mounted_as(monkeypatch, folder, "ext4")
    assert barrier.everything_durable(folder, 100)
    monkeypatch.undo()
    mounted_as(monkeypatch, folder, "vfat")
    assert not barrier.everything_durable(folder, 100)


def test_a_kernel_that_does_not_tell_errors_is_not_believed(folder, monkeypatch):
    monkeypatch.setattr(barrier, "_kernel", lambda: (5, 4))
    mounted_as(monkeypatch, folder, "ext4")
    assert not barrier.everything_durable(folder, 100)


def test_few_files_do_not_wait_for_what_others_wrote(folder, monkeypatch):
    mounted_as(monkeypatch, folder, "ext4")
    monkeypatch.setattr(barrier, "_syncfs", lambda _: pytest.fail("not worth it"))
    assert not barrier.everything_durable(folder, barrier.FILES_MIN - 1)


def test_its_failure_is_told(folder, monkeypatch):
    mounted_as(monkeypatch, folder, "ext4")

    def fail(_):
        barrier.ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(barrier, "_syncfs", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        barrier.everything_durable(folder, 100)


def test_where_others_write_so_much_that_it_took_long_it_is_left_out_for_a_while(folder, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(barrier.time, "monotonic", lambda: now[0])
    mounted_as(monkeypatch, folder, "ext4")

    def slow(_):
        now[0] += 30
        return 0

    monkeypatch.setattr(barrier, "_syncfs", slow)
    assert barrier.everything_durable(folder, 100)
    assert not barrier.everything_durable(folder, 100)
    now[0] += barrier.AVOIDED_SECONDS
    assert barrier.everything_durable(folder, 100)


def test_a_file_that_was_written_has_no_failure_to_tell(tmp_path):
    with (tmp_path / "f").open("wb") as file:
        file.write(b"x" * 100_000)
        file.flush()
        barrier.raise_failure(file.fileno())
