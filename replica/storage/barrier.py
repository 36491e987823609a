"""Make many new files durable by one wait for the disk instead of one for each.

Given     a file system, by the descriptor of anything on it, and how many files are waiting.
Returns   whether everything written there before is durable now; if not, each file needs an fsync of its own.
Promises  it says so only on file systems and kernels of which it is known: `syncfs` of ext4 and XFS writes out data,
          sizes and names, and tells errors since Linux 5.8; FUSE and some others may answer without doing anything.
          An fsync after it flushes the device's cache, which ext4 without a journal does too early.
          A single file's failed write is told by `raise_failure`, as its own fsync would have told it.
Partner   replica.storage.copy_local, for batches of small files.

An fsync waits for the journal and for the device's cache: 2 ms a file on a cloud disk, however small. `syncfs` also
waits for other people's unwritten bytes; where that once took long, files are synced by themselves for a while.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
import threading
import time
from pathlib import Path

#: Fewer are not worth waiting for what others wrote.
FILES_MIN = 8
#: Longer than this, and others write so much that a file's own fsync is the shorter wait.
LONG_SECONDS = 2.0
LONG_SECONDS_A_FILE = 0.004
AVOIDED_SECONDS = 60.0

_KNOWN = frozenset({"ext4", "xfs"})
_TELLS_ERRORS = (5, 8)
_WAIT_BEFORE = 1  # SYNC_FILE_RANGE_WAIT_BEFORE
_libc = ctypes.CDLL(None, use_errno=True)
_syncfs = getattr(_libc, "syncfs", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)

_avoided: dict[int, float] = {}
_lock = threading.Lock()


def everything_durable(descriptor: int, files: int) -> bool:
    """Whether all that was written to this file system before the call is durable now. OSError as of an fsync."""
    if files < FILES_MIN:
        return False
    device = os.fstat(descriptor).st_dev
    began = time.monotonic()
    if _syncfs is None or _sync_file_range is None or not _is_known(device) or _avoided.get(device, 0.0) > began:
        return False
    if _syncfs(ctypes.c_int(descriptor)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    os.fsync(descriptor)  # flushes the device: ext4 without a journal writes names after its own flush
    ended = time.monotonic()
    if ended - began > LONG_SECONDS + files * LONG_SECONDS_A_FILE:
        with _lock:
            _avoided[device] = ended + AVOIDED_SECONDS
    return True


def raise_failure(descriptor: int) -> None:
    """After `everything_durable`: OSError if this file's bytes could not be written, told once as by an fsync."""
    assert _sync_file_range is not None
    whole = ctypes.c_int64(0)
    if _sync_file_range(ctypes.c_int(descriptor), ctypes.c_int64(0), whole, ctypes.c_uint(_WAIT_BEFORE)) != 0:
        code = ctypes.get_errno()
        if code != errno.ESPIPE:
            raise OSError(code, os.strerror(code))


def _is_known(device: int) -> bool:
    """Looked up each time: a disk that is mounted later may have the number of one that is gone."""
    if sys.platform != "linux" or _kernel() < _TELLS_ERRORS:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    for line in mounts.splitlines():
        fields, _, what = line.partition(" - ")
        if fields.split()[2] == number:
            return what.split()[0] in _KNOWN
    return False


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)
