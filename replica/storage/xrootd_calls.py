"""One XRootD server, blocking: each request of the protocol that Replica uses, bounded in time.

Given     host and port, the scheme (root, or roots for TLS), and a token if the site has one for it.
Returns   plain values.
Promises  a server's refusal is the OSError it stands for (the one table below), so that replica.storage.faults says
          whose it is and what to do; a server that is not there is Unreachable, one that does not answer TimedOut.
          A token is sent by TLS only, and is in no message.
Partner   replica.storage.xrootd, the only caller. The library (`xrootd` on PyPI) is imported by the first request.

Left to itself, the library hides faults that the engine must see: it waits half an hour for a server that is away,
answers for as long from memory that it is away, and goes on writing to one that has forgotten what it had been sent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from rules.errors import Forbidden, StorageError, TimedOut, Unreachable

#: A question about names, unless the setting `quiet_seconds` says else. What takes longer as a file is larger gets
#: more (`_seconds`).
ASK_SECONDS = 30
_BYTES_A_SECOND = 10 << 20

#: Answers of the server (kXR_… of the protocol) and the errors they stand for.
_ANSWERS = {
    3002: errno.ENAMETOOLONG,  # ArgTooLong
    3003: errno.EBUSY,  # FileLocked
    3007: errno.EIO,
    3008: errno.ENOMEM,
    3009: errno.ENOSPC,
    3010: errno.EACCES,  # NotAuthorized
    3011: errno.ENOENT,
    3013: errno.EOPNOTSUPP,
    3014: errno.EHOSTUNREACH,  # a redirector without a server for this
    3015: errno.EISDIR,  # NotFile
    3016: errno.EISDIR,
    3018: errno.EEXIST,
    3020: errno.EBUSY,  # inProgress
    3021: errno.EDQUOT,
    3024: errno.EAGAIN,  # Overloaded
    3025: errno.EROFS,
    3030: errno.EACCES,  # AuthFailed
    3034: errno.ETIMEDOUT,
    3035: errno.ETIMEDOUT,
}
#: 3005 is all the rest of the file system, told only by the text behind the last semicolon.
_TEXTS = {os.strerror(code).lower(): code for code in errno.errorcode}

#: What the client itself reports; all others of its codes are one or another way of not being there.
_ANSWERED = 400
_EXPIRED = (103, 206)
_NOT_LET_IN = (203, 204)
_UNREADABLE = 303

_READABLE_BY_ALL = 0o644
_FOLDER = 0o755


@dataclass(frozen=True, slots=True)
class Found:
    """What the server says of one name."""

    size_bytes: int
    mtime_ns: int
    identity: str  #: device and inode, as the server writes them; a change in place does not show
    mode: str
    is_folder: bool
    is_file: bool


class Server:
    def __init__(
        self,
        address: str,
        *,
        secure: bool = False,
        name: str = "",
        token: Callable[[], str | None] | None = None,
        ask_seconds: float | None = None,
    ) -> None:
        self._ask_seconds = ask_seconds
        self.base = f"{'roots' if secure else 'root'}://{address}/"
        self.name = name
        self._label = name or self.base
        self._connection = 0
        self._token = token
        self._library: Any = None
        self._opening = threading.Lock()

    # ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def stat(self, path: str) -> Found:
        return _found(self._ask("stat", self._with(path)))

    def listing(self, path: str) -> list[tuple[str, Found | None]]:
        """Names and what they are; None where the server did not say."""
        flags = self._flags().DirListFlags.STAT
        try:
            entries = self._ask("dirlist", self._with(path), flags, aside=True)
        except (SystemError, UnicodeDecodeError):  # how the library reports bytes that are no text
            raise OSError(errno.EILSEQ, "a name in it is not UTF-8") from None
        return [(entry.name, _found(entry.statinfo) if entry.statinfo else None) for entry in entries or ()]

    def make_folders(self, path: str) -> None:
        self._ask("mkdir", self._with(path), self._flags().MkDirFlags.MAKEPATH, _FOLDER)

    def move(self, path: str, to: str) -> None:
        """Debian's 5.5.3 replaces what is there, without a word; others refuse (FileExistsError). Trust neither."""
        self._ask("mv", self._with(path), self._with(to))

    def remove(self, path: str) -> None:
        """A file; but an empty folder goes too."""
        self._ask("rm", self._with(path))

    def query(self, what: str, argument: str, *, size_bytes: int = 0) -> str:
        code = getattr(self._flags().QueryCode, what)
        answer = self._ask("query", code, argument, seconds=self._seconds(size_bytes))
        return bytes(answer or b"").rstrip(b"\0\n").decode("utf-8", "replace")

    def checksum(self, path: str, algorithm: str, size_bytes: int) -> str:
        """`<algorithm> <digits>`. A server that has one in its memory gives that one, and looks at no byte."""
        return self.query("CHECKSUM", self._with(path, f"cks.type={algorithm}"), size_bytes=size_bytes)

    # ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self, path: str) -> Any:
        return self._open(path, self._flags().OpenFlags.READ, 0)

    def create(self, path: str, mode: int = _READABLE_BY_ALL) -> Any:
        """A new file, for writing; its folders too. FileExistsError: the name is taken. The server decides, at once."""
        flags = self._flags().OpenFlags
        return self._open(path, flags.NEW | flags.MAKEPATH | flags.UPDATE, mode)

    def _open(self, path: str, flags: int, mode: int) -> Any:
        file = self._client().File()
        for recovery in ("ReadRecovery", "WriteRecovery"):
            _owned(file.set_property(recovery, "false"))
        self._wait(file.open, self.base + self._with(path), flags, mode, seconds=self.ask_seconds, of=file)
        return file

    def read(self, file: Any, offset: int, length: int) -> bytes:
        return self._wait(file.read, offset, length, seconds=self._seconds(length), of=file) or b""

    def write(self, file: Any, offset: int, content: bytes) -> None:
        self._wait(file.write, content, offset, len(content), seconds=self._seconds(len(content)), of=file)

    def sync(self, file: Any, size_bytes: int) -> None:
        self._wait(file.sync, seconds=self._seconds(size_bytes), of=file)

    def close(self, file: Any) -> None:
        self._wait(file.close, seconds=self.ask_seconds, of=file)

    # ── the library ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, verb: str, *arguments: Any, seconds: int = 0, aside: bool = False) -> Any:
        system = self._filesystem()
        seconds = seconds or self.ask_seconds
        call = getattr(system, verb)
        if aside:
            call = partial(_aside, call)
        return self._wait(call, *arguments, seconds=seconds, of=system)

    def _wait(self, verb: Callable[..., Any], *arguments: Any, seconds: int, of: Any) -> Any:
        """The answer to one request, for which we wait by ourselves: the library waits for ever for the rest of an
        answer of which it has got a part."""
        answered = threading.Event()
        answers: list[tuple[Any, Any]] = []

        def tell(status: Any, value: Any, _: Any) -> None:
            answers.append((status, value))
            answered.set()

        begun = verb(*arguments, timeout=seconds, callback=tell)
        if begun is not None and not begun.ok:
            return self._checked((begun, None))
        if not answered.wait(seconds + _GRACE_SECONDS):
            self._start_anew(of, arguments)
            raise self._problem(TimedOut, "it stopped in the middle of an answer", "see whether it is overloaded")
        status, value = answers[0]
        if isinstance(value, Exception):
            raise value
        return self._checked((status, value))

    def _start_anew(self, *stuck: Any) -> None:
        """Our next requests go by another connection, which the library makes for another user name. What is stuck is
        never freed: that would wait for the server too, and hold up the whole process."""
        with self._opening:
            _stuck.append((self._library, *stuck))
            self._library = None
            self._connection += 1
            scheme, _, rest = self.base.partition("://")
            self.base = f"{scheme}://r{self._connection % 1_000_000}@{rest.rpartition('@')[2]}"

    @property
    def ask_seconds(self) -> int:
        return max(1, round(self._ask_seconds or ASK_SECONDS))

    def _seconds(self, size_bytes: int) -> int:
        return self.ask_seconds + size_bytes // _BYTES_A_SECOND

    def _with(self, path: str, *more: str) -> str:
        token = self._token() if self._token is not None else None
        words = [*more, *([f"authz=Bearer%20{quote(token, safe='')}"] if token else [])]
        return f"{path}?{'&'.join(words)}" if words else path

    def _client(self) -> Any:
        try:
            return _library()
        except ImportError:
            raise self._gone(
                "root:// needs a library that is not installed here", "pip install 'replica-manager[xrootd]'"
            ) from None

    def _flags(self) -> Any:
        return self._client().flags

    def _filesystem(self) -> Any:
        with self._opening:
            if self._library is None:
                self._library = self._client().FileSystem(self.base)
            return self._library

    def _checked(self, answer: tuple[Any, Any]) -> Any:
        status, value = answer
        if status.ok:
            return value
        if status.code != _ANSWERED:
            raise self._unanswered(status)
        text = status.message.strip()
        code = _ANSWERS.get(status.errno) or _TEXTS.get(text.rpartition("; ")[2].lower(), 0)
        raise OSError(code, os.strerror(code)) if code else OSError(_without_cgi(text))

    def _unanswered(self, status: Any) -> Exception:
        if status.code == _UNREADABLE:
            return OSError(errno.EILSEQ, "its answer cannot be read")
        if status.code in _EXPIRED:
            return self._problem(TimedOut, "it did not answer in time", "see whether it is overloaded")
        if status.code in _NOT_LET_IN:
            return self._problem(Forbidden, "it did not let us in", "correct the credentials of this worker for it")
        return self._gone("it cannot be reached", "check that it runs and that this worker's site may connect to it")

    def _gone(self, reason: str, hint: str) -> StorageError:
        return self._problem(Unreachable, reason, hint)

    def _problem(self, kind: type[StorageError], reason: str, hint: str) -> StorageError:
        return kind(f"endpoint {self._label}: {reason}", hint=hint, endpoint=self.name)


def _aside(verb: Callable[..., Any], *arguments: Any, timeout: int, callback: Callable[..., None]) -> None:
    """For requests whose answer the library may fail to make an object of: it would not call back then."""

    def ask() -> None:
        try:
            callback(*verb(*arguments, timeout=timeout), None)
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            callback(None, error, None)

    threading.Thread(target=ask, name="xrootd-aside", daemon=True).start()


def _owned(answer: bool) -> None:
    """The library (6.2.1) gives True away without counting it; some thousand times, and Python 3.11 dies of it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(answer))


def _without_cgi(text: str) -> str:
    return text.partition("?")[0].removeprefix("[ERROR] ")


def _found(info: Any) -> Found:
    flags = info.flags
    special = bool(flags & 4)
    folder = bool(flags & 2)
    return Found(info.size, info.modtime * 10**9, info.id, str(info.mode or ""), folder, not (folder or special))


#: Operators may set each by an environment variable XRD_…, which the library prefers to what is put here.
_BOUNDS = {
    "ConnectionWindow": 10,  # seconds for one attempt to connect
    "ConnectionRetry": 1,  # attempts: the engine has its own
    "StreamErrorWindow": 0,  # seconds for which a lost server is answered for without asking it
    "StreamTimeout": 60,  # seconds of silence after which a connection is given up
    "RedirectLimit": 16,
    "TimeoutResolution": 1,
}
#: How much longer we wait than the library should.
_GRACE_SECONDS = 3.0
_stuck: list[Any] = []
_loading = threading.Lock()
_loaded: list[Any] = []


def _library() -> Any:
    with _loading:
        if not _loaded:
            from XRootD import client
            from XRootD.client import flags

            for key, value in _BOUNDS.items():
                client.EnvPutInt(key, value)
            client.flags = flags
            _loaded.append(client)
        return _loaded[0]
