"""What HTTP says → errors of Replica: one table.

Given     a status, or an error of aiohttp, with the endpoint and path it happened at.
Returns   the one StorageError whose branch decides what happens next; its message names the place and the reason.
Promises  a status that is not in the table is Transient: retrying a hopeless case costs time, giving up a hopeful one
          costs data. No header of ours, no query of a URL and no secret is ever part of a message.
Partner   replica.storage.faults does the same for the operating system; replica.storage.http_session raises these.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp

from replica.storage.faults import place
from replica.storage.multistatus import mtime_ns
from rules.errors import (
    Busy,
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

_RIGHTS = "look at the credentials file of this worker, and at the rights of that account at the server"
_TABLE: dict[int, tuple[type[StorageError], str]] = {
    400: (Permanent, "the server does not take such a request; its log says why"),
    401: (Forbidden, "the credentials are missing or were refused; " + _RIGHTS),
    403: (Forbidden, _RIGHTS),
    404: (SourceMissing, ""),
    405: (Forbidden, "the server does not allow this method there: is it a WebDAV folder that may be written to?"),
    407: (Forbidden, "a proxy asks for credentials"),
    408: (TimedOut, ""),
    409: (TargetExists, "a file stands where a folder is needed, or the folder is not there"),
    410: (SourceMissing, ""),
    411: (Permanent, ""),
    412: (TargetExists, ""),
    413: (
        NoSpace,
        "the server does not take a file of this size; Apache takes 1 GiB, unless its LimitRequestBody says more",
    ),
    414: (Permanent, "the name is too long for this server"),
    415: (Permanent, ""),
    423: (Busy, "somebody holds a lock there"),
    425: (Busy, ""),
    429: (Busy, ""),
    431: (Permanent, "the name is too long for this server"),
    451: (Forbidden, ""),
    501: (Permanent, "the server does not know this method: it is perhaps not a WebDAV server"),
    502: (Transient, "a proxy before the server failed; if always: does it change http to https without Destination?"),
    503: (Busy, ""),
    504: (TimedOut, ""),
    507: (NoSpace, "free space there, raise the quota, or move data elsewhere"),
}
#: How some servers say "full" with another status than 507.
_FULL = re.compile(r"no space left|disk quota exceeded|insufficient storage", re.IGNORECASE)
_RETRY_AFTER_MAX = 24 * 3600.0


def refused(
    status: int, what: str, *, endpoint: str, path: str, reason: str = "", retry_after: str = ""
) -> StorageError:
    """The error for a status; `what` is the method, `reason` what the server said, if anything."""
    kind, hint = _TABLE.get(status, (Permanent if 400 <= status < 500 else Transient, ""))
    if 300 <= status < 400:
        kind, hint = Forbidden, "name the host in `redirects` of the credentials file, if it belongs to the server"
    if _FULL.search(reason) and status >= 400:
        kind, hint = NoSpace, _TABLE[507][1]
    said = f": {reason}" if reason else ""
    error = kind(
        f"{place(endpoint, path)}: {what} was answered with status {status}{said}",
        hint=hint,
        endpoint=endpoint,
        path=path,
    )
    if isinstance(error, Busy):
        error.retry_after_seconds = seconds_of(retry_after)
    return error


def seconds_of(retry_after: str) -> float | None:
    """`Retry-After`: seconds or a date; None where it says neither."""
    text = retry_after.strip()
    if text.isascii() and text.isdecimal() and len(text) < 10:
        return min(float(text), _RETRY_AFTER_MAX)
    if when := mtime_ns(text):
        return min(max(0.0, when / 1e9 - time.time()), _RETRY_AFTER_MAX)
    return None


@contextmanager
def translated_http(endpoint: str, path: str, what: str) -> Iterator[None]:
    """Within, an error of aiohttp becomes the StorageError it means."""

    def error(kind: type[StorageError], reason: str, hint: str = "") -> StorageError:
        return kind(f"{place(endpoint, path)}: {what}: {reason}", hint=hint, endpoint=endpoint, path=path)

    try:
        yield
    except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as failed:
        raise error(
            Unreachable,
            "the server's certificate is not trusted, or TLS failed",
            "put its authority's certificate into `ca_file` of the credentials file",
        ) from failed
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as failed:
        raise error(Unreachable, "the server does not answer", _RUNNING) from failed
    except TimeoutError as failed:  # ServerTimeoutError is one too
        raise error(TimedOut, "the server did not go on in time", _RUNNING) from failed
    except aiohttp.ClientPayloadError as failed:
        raise error(Transient, "the body ended too early") from failed
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as failed:
        raise error(Transient, "the connection was lost") from failed
    except aiohttp.ClientError as failed:
        raise error(Transient, f"what came is not HTTP ({type(failed).__name__})") from failed


_RUNNING = "check that the server runs and can be reached from here"
