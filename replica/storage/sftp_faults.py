"""Errors of an SFTP server → errors of Replica.

Given     what asyncssh raised, the endpoint and the path it was about.
Returns   the one StorageError by one table: an SFTP status code says little, OpenSSH's "Failure" (4) nothing at all.
Promises  a lost connection, and one that cannot be made, is Unreachable; an answer that does not come TimedOut; a login
          or host key refused Forbidden. What the server does not explain is `Unexplained`, which is Transient: the
          adapter looks for the reason (a full disk, a name in the way) where there may be one.
Partner   replica.storage.ssh raises them, replica.storage.sftp explains them. Like replica.storage.faults.

How OpenSSH answers (its errno_to_portable): ENOENT, ENOTDIR, ELOOP → no such file; EPERM, EACCES → permission denied;
ENAMETOOLONG, EINVAL → bad message; ENOSYS → unsupported; all others (EEXIST, ENOSPC, EDQUOT, EFBIG, EROFS, EIO …) →
failure, without a word.
"""

from __future__ import annotations

import asyncssh

from replica.storage.faults import from_os_error, place
from rules.errors import (
    Forbidden,
    NoSpace,
    Permanent,
    SourceMissing,
    StorageError,
    TargetExists,
    TimedOut,
    Transient,
    Unreachable,
)


class Unexplained(Transient):
    """The server said no more than that it failed."""


_FULL = "free space there, raise the quota of the user it is reached as, or move data elsewhere"
_ASK = "the server's own log knows the reason: a quota, a limit on file sizes, a read-only or dying disk"
_GONE = "check that the SFTP server runs and that the network to it is up; it is tried again"

#: SFTP status code → class and hint. Those above 8 are of later protocol versions; some servers send them all the same.
_TABLE: dict[int, tuple[type[StorageError], str]] = {
    asyncssh.FX_NO_SUCH_FILE: (SourceMissing, ""),
    asyncssh.FX_PERMISSION_DENIED: (Forbidden, "give the user it is reached as the right to do this there"),
    asyncssh.FX_FAILURE: (Unexplained, _ASK),
    asyncssh.FX_BAD_MESSAGE: (Permanent, "the server's file system does not allow such a name: it may be too long"),
    asyncssh.FX_NO_CONNECTION: (Unreachable, _GONE),
    asyncssh.FX_CONNECTION_LOST: (Unreachable, _GONE),
    asyncssh.FX_OP_UNSUPPORTED: (Forbidden, "the server lacks what Replica needs there; OpenSSH's has it"),
    asyncssh.FX_NO_SUCH_PATH: (SourceMissing, ""),
    asyncssh.FX_FILE_ALREADY_EXISTS: (TargetExists, ""),
    asyncssh.FX_WRITE_PROTECT: (Forbidden, "the file system is read-only: remount it, or mark the endpoint so"),
    asyncssh.FX_NO_SPACE_ON_FILESYSTEM: (NoSpace, _FULL),
    asyncssh.FX_QUOTA_EXCEEDED: (NoSpace, _FULL),
    asyncssh.FX_LINK_LOOP: (Forbidden, "a symbolic link is in the path; Replica follows none"),
}
#: Servers other than OpenSSH say in words what the code does not.
_WORDS = (("no space", NoSpace), ("disk full", NoSpace), ("quota", NoSpace), ("exists", TargetExists))


def from_ssh(error: Exception, *, endpoint: str, path: str) -> StorageError:
    where = place(endpoint, path) if path else f"endpoint {endpoint or 'without a name'}"
    kind: type[StorageError]
    if isinstance(error, TimeoutError):
        kind, hint, reason = TimedOut, "the disk behind the server may hang; it is tried again", "no answer in time"
    elif isinstance(error, asyncssh.SFTPError):
        kind, hint = _TABLE.get(error.code, (Unexplained, _ASK))
        reason = f"the server says {error.reason!r}" if kind is Unexplained else error.reason
        if kind is Unexplained:
            told = next((found for word, found in _WORDS if word in error.reason.lower()), None)
            kind, hint = (told, _FULL if told is NoSpace else "") if told else (kind, hint)
    elif isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.errno:
        return from_os_error(error, endpoint=endpoint, path=path)
    else:  # whatever ends an SSH connection
        kind, hint, reason = Unreachable, _GONE, f"the connection was lost ({from_unexpected(error)})"
    return kind(f"{where}: {reason}", hint=hint, endpoint=endpoint, path=path)


def from_unexpected(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, asyncssh.Error):
        return error.reason or type(error).__name__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
