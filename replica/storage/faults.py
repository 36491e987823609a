"""Errors of the operating system → errors of Replica.

Given     an OSError, the endpoint and path it happened at, and whose side that is.
Returns   the one StorageError whose branch (transient? permanent?) decides what happens next; its message names the
          place and the reason, its hint what a person can do.
Promises  an unknown errno is Transient: retrying a hopeless case costs time, giving up a hopeful one costs data.
Partner   rules.errors holds the tree; replica.storage.copy says whose side it was.
"""

from __future__ import annotations

import errno
import os
from types import TracebackType

from rules.errors import (
    Busy,
    Forbidden,
    NoSpace,
    Permanent,
    Side,
    SourceMissing,
    StorageError,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)

_E = errno
_GONE = "check that its disk is mounted and answers"

#: errno → class and hint. What depends on the side is in `from_os_error`.
_TABLE: dict[int, tuple[type[StorageError], str]] = {
    _E.ENOSPC: (NoSpace, "free space or inodes there (df, df -i), or move data elsewhere"),
    _E.EDQUOT: (NoSpace, "raise the quota of the worker's user there, or move data elsewhere"),
    _E.EFBIG: (NoSpace, "the file system, or the process's limit (ulimit -f), does not allow a file of this size"),
    _E.EACCES: (Forbidden, "give the worker's user the right to do this there"),
    _E.EPERM: (Forbidden, "give the worker's user the right to do this there"),
    _E.EROFS: (Forbidden, "the file system is read-only: remount it, or mark the endpoint as read-only"),
    _E.ELOOP: (Forbidden, "a symbolic link is in the path; Replica follows none: replace it by the file or folder"),
    _E.EXDEV: (Forbidden, "the path leaves the endpoint's file system: make that file system an endpoint of its own"),
    _E.EISDIR: (Forbidden, "a folder stands where a file is expected"),
    _E.EEXIST: (TargetExists, ""),
    _E.ENAMETOOLONG: (Permanent, "the name is too long for this file system"),
    _E.EILSEQ: (Permanent, "this file system does not allow such a name"),
    _E.EIO: (Transient, "the device reported an I/O error: look at the kernel's log, the disk may be dying"),
    _E.ESTALE: (Unreachable, _GONE),
    _E.ENOTCONN: (Unreachable, _GONE),
    _E.ENODEV: (Unreachable, _GONE),
    _E.ENXIO: (Unreachable, _GONE),
    _E.ENOMEDIUM: (Unreachable, _GONE),
    _E.EHOSTDOWN: (Unreachable, _GONE),
    _E.EHOSTUNREACH: (Unreachable, _GONE),
    _E.ENETUNREACH: (Unreachable, _GONE),
    _E.ESHUTDOWN: (Unreachable, _GONE),
    _E.EUCLEAN: (Unreachable, "the file system is damaged: it needs fsck"),
    _E.ETIMEDOUT: (TimedOut, _GONE),
    _E.EBUSY: (Busy, ""),
    _E.ETXTBSY: (Busy, ""),
    _E.EAGAIN: (Busy, ""),
    _E.EMFILE: (Transient, "raise the limit of open files (ulimit -n)"),
    _E.ENFILE: (Transient, "the machine has too many open files"),
    _E.ENOMEM: (Transient, "the machine is short of memory"),
}


def from_os_error(error: OSError, *, endpoint: str, path: str, side: Side = "unknown") -> StorageError:
    code = error.errno or 0
    kind, hint = _TABLE.get(code, (Transient, ""))
    if code in (_E.ENOENT, _E.ENOTDIR):
        if side == "target":
            if code == _E.ENOTDIR:
                kind, hint = TargetExists, "a file stands where a folder is needed"
            else:  # what we made was removed beneath us: it can be made anew
                kind, hint = Transient, ""
        else:
            kind, hint = SourceMissing, ""
    reason = os.strerror(code) if code else str(error)
    return kind(f"{place(endpoint, path)}: {reason}", hint=hint, endpoint=endpoint, path=path, side=side)


def place(endpoint: str, path: str) -> str:
    """How a message names a file at an endpoint."""
    return f"{repr(path)[1:-1]} at {endpoint or 'an unnamed storage'}"


class translated:
    """Within, an OSError becomes the StorageError it means. A class, for a small file passes twenty of these."""

    __slots__ = ("_endpoint", "_path", "_side")

    def __init__(self, endpoint: str, path: str, side: Side = "unknown") -> None:
        self._endpoint, self._path, self._side = endpoint, path, side

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise from_os_error(error, endpoint=self._endpoint, path=self._path, side=self._side) from error


class blaming:
    """Within, every StorageError is the fault of `side`: the storage did not know which end of a copy it was."""

    __slots__ = ("_side",)

    def __init__(self, side: Side) -> None:
        self._side = side

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(error, StorageError):
            return
        if isinstance(error, SourceMissing) and self._side == "target" and error.side != "source":
            # Not the source's loss: what we wrote (or looked at) on the target went away beneath us.
            raise Transient(
                f"{error.message} (it went away meanwhile)",
                hint=error.hint,
                endpoint=error.endpoint,
                path=error.path,
                side="target",
            ) from error
        if error.side == "unknown" or (isinstance(error, SourceMissing) and error.side != "source"):
            error.side = self._side
