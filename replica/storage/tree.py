"""One folder of this machine as an endpoint: every verb of the contract, blocking.

Given     the root folder, as an administrator chose it (symbolic links on the way to it are his), and paths in it.
Returns   values of replica.storage.base, and open descriptors for replica.storage.copy.
Promises  nothing outside the root is read, written, renamed or unlinked; only regular files with one name are opened;
          a disk that is not mounted is Unreachable, never empty; what is reported as done survives a power cut.
Partner   replica.storage.posix gives it the asynchronous contract; replica.storage.copy works on it directly.

Every verb opens the root anew and looks for the sentinel: some 6 µs, for which we always speak to what is mounted there
*now*, hold no descriptor that would keep an administrator from unmounting, and need no lock between threads.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat as mode_of
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from replica.storage.base import (
    OWN,
    PARTS,
    QUARANTINE,
    SENTINEL,
    Entry,
    Space,
    Stat,
    check_part,
    check_path,
    check_prefix,
    check_readable,
)
from replica.storage.beneath import open_beneath, open_folder, rename_no_replace
from replica.storage.faults import from_os_error, place, translated
from replica.storage.refusals import exists_already, no_room
from replica.storage.sentinel import SENTINEL_BYTES_MAX, is_anothers, owner_in, refuse_anothers, sentinel_of
from rules.errors import Forbidden, Refused, SourceChanged, Unreachable

#: Opening must never block on a FIFO nor give the process a terminal.
_CLOSED = (errno.EACCES, errno.EPERM)
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


class Tree:
    def __init__(self, root: str, *, name: str = "") -> None:
        self.path = root
        self.name = name
        #: How messages call this endpoint.
        self.label = name or root
        #: The sentinel that was read last: it says that this is our disk.
        self._seen: tuple[int, int, int] | None = None

    # ── the root ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def root(self) -> AbstractContextManager[int]:
        """The root's descriptor, after a look that it is the endpoint's disk and not an empty mount point."""
        return _Root(self)

    def open_root(self) -> int:
        try:
            root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _CLOSED:
                raise self._closed(self.path) from error
            reason = os.strerror(error.errno or 0)
            raise self._unreachable(f"its folder {self.path} cannot be opened ({reason})") from error
        try:
            try:
                sentinel = os.stat(SENTINEL, dir_fd=root, follow_symlinks=False)
            except OSError as error:
                if error.errno in _CLOSED:
                    raise self._closed(f"{self.path}/{SENTINEL}") from error
                reason = f"{self.path} has no file {SENTINEL}; its disk is perhaps not mounted"
                raise self._unreachable(reason) from error
            if not mode_of.S_ISREG(sentinel.st_mode):
                raise self._unreachable(f"{self.path}/{SENTINEL} is not a regular file")
            self._refuse_another(root, sentinel)
        except BaseException:
            os.close(root)
            raise
        return root

    def _refuse_another(self, root: int, sentinel: os.stat_result) -> None:
        """The disk of another endpoint, mounted here by mistake: its files would be taken for ours."""
        seen = (sentinel.st_dev, sentinel.st_ino, sentinel.st_mtime_ns)
        if seen == self._seen or not self.name:
            return
        with translated(self.name, SENTINEL), _closing_descriptor(open_folder(root, OWN)) as own:
            owner = _owner(own)
        if is_anothers(owner, self.name):
            raise self._unreachable(f"{self.path} belongs to the endpoint {owner}")
        self._seen = seen

    def _unreachable(self, reason: str) -> Unreachable:
        return Unreachable(
            f"endpoint {self.label}: {reason}",
            hint="mount the disk; if this really is the endpoint's disk, prepare the endpoint again",
            endpoint=self.name,
        )

    def _closed(self, what: str) -> Forbidden:
        return Forbidden(
            f"endpoint {self.label}: {what} may not be opened by this account",
            hint="give the worker's user the right to read and write there, up to the root of the file system",
            endpoint=self.name,
        )

    def prepare(self) -> None:
        # Two endpoints on one disk would count one copy twice, and each would take the other's files for strays.
        with translated(self.name, self.path):
            root = Path(self.path).resolve()
            for above in root.parents:
                if (above / SENTINEL).exists():
                    raise Refused(
                        f"{root} lies within another endpoint, {above}",
                        hint="choose a folder outside of it; endpoints cannot be nested",
                    )
            root.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.close(open_folder(descriptor, PARTS, create=True))
                own = open_folder(descriptor, OWN)
                try:
                    self._claim(own, root)
                finally:
                    os.close(own)
            finally:
                os.close(descriptor)

    def _claim(self, own: int, root: Path) -> None:
        try:
            written = os.open("endpoint", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=own)
        except FileExistsError:
            refuse_anothers(_owner(own), self.name, str(root), file=f"{root}/{SENTINEL}")
            return
        with os.fdopen(written, "wb") as file:
            file.write(sentinel_of(self.name))
            file.flush()
            os.fsync(file.fileno())
        os.fsync(own)

    # ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def stat(self, path: str) -> Stat:
        check_readable(path)
        with self.root() as root, translated(self.name, path):
            descriptor = open_beneath(root, path, os.O_PATH)
            try:
                return stat_of(self._regular(root, path, descriptor))
            finally:
                os.close(descriptor)

    def open(self, path: str) -> int:
        """A descriptor to read a regular file by; the caller closes it. SourceMissing, Forbidden."""
        check_readable(path)
        with self.root() as root, translated(self.name, path):
            descriptor = open_beneath(root, path, _READ)
            try:
                self._regular(root, path, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def _regular(self, root: int, path: str, descriptor: int) -> os.stat_result:
        found = os.fstat(descriptor)
        if not mode_of.S_ISREG(found.st_mode):
            raise Forbidden(
                f"{place(self.name, path)} is {_kind(found.st_mode)}, not a regular file",
                hint="Replica keeps regular files only",
                endpoint=self.name,
                path=path,
            )
        if found.st_nlink > 1:
            # A publish by link and unlink that was killed between the two leaves our own second name: remove that one.
            _drop_twins(root, found)
            found = os.fstat(descriptor)
        if found.st_nlink > 1:
            # Anybody who may write here could have linked a file that only the worker's user may read.
            raise Forbidden(
                f"{place(self.name, path)} has {found.st_nlink} names (hard links)",
                hint="make it a file of its own: cp it to a new name and mv that back",
                endpoint=self.name,
                path=path,
            )
        return found

    def walk(self, prefix: str = "") -> Generator[Entry, None, None]:
        check_prefix(prefix)
        with self.root() as root, translated(self.name, prefix):
            folders = [prefix]
            while folders:
                folder = folders.pop()
                try:
                    descriptor = open_folder(root, folder)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # went away, or was replaced by a file: either is as good as seen before or after
                except OSError as error:
                    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                        yield Entry(_shown(folder), 0, 0, _PROBLEMS[error.errno])
                        continue
                    raise from_os_error(error, endpoint=self.name, path=_shown(folder)) from error
                try:
                    with closing(os.scandir(descriptor)) as entries:
                        for entry in entries:
                            path = f"{folder}/{entry.name}" if folder else entry.name
                            if path == OWN:
                                continue
                            try:
                                found = entry.stat(follow_symlinks=False)
                            except FileNotFoundError:
                                continue
                            if mode_of.S_ISDIR(found.st_mode):
                                folders.append(path)
                            else:
                                yield _entry(path, found)
                finally:
                    os.close(descriptor)

    def space(self) -> Space:
        with self.root() as root, translated(self.name, ""):
            found = os.fstatvfs(root)
            return Space(found.f_frsize * found.f_blocks, found.f_frsize * found.f_bavail)

    # ── changing ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def create_part(self, part: str, size_bytes: int | None = None) -> int:
        """A descriptor of a new, empty temporary, for writing and reading back; the caller closes it."""
        check_part(part)
        with self.root() as root, translated(self.name, part, "target"):
            if size_bytes is not None:
                found = os.fstatvfs(root)
                free = found.f_frsize * found.f_bavail
                if size_bytes > free:
                    raise no_room(self.name, self.label, part, free_bytes=free, size_bytes=size_bytes)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            try:
                return open_beneath(root, part, flags)
            except FileNotFoundError:  # somebody tidied up in our folder
                os.close(open_folder(root, PARTS, create=True))
                return open_beneath(root, part, flags)

    def publish(self, part: str, final: str) -> None:
        with _closing_descriptor(self.rename(part, final)) as folder:
            os.fsync(folder)

    def rename(self, part: str, final: str) -> int:
        """`publish` without its last step: returns the descriptor of the folder that is still to be fsynced."""
        check_part(part)
        check_path(final)
        parent, _, name = final.rpartition("/")
        with self.root() as root, translated(self.name, final, "target"):
            parts = open_beneath(root, PARTS, os.O_PATH | os.O_DIRECTORY)
            try:
                folder = open_folder(root, parent, create=True)
                try:
                    rename_no_replace(parts, part.rpartition("/")[2], folder, name)
                except FileExistsError:
                    os.close(folder)
                    raise exists_already(self.name, final) from None
                except BaseException:
                    os.close(folder)
                    raise
                return folder
            finally:
                os.close(parts)

    def make_durable(self, path: str) -> None:
        """fsync a published file and its name: whoever published it may have died before he came to that."""
        descriptor = self.open(path)
        try:
            with translated(self.name, path):
                os.fsync(descriptor)
                with self.root() as root:
                    folder = open_folder(root, path.rpartition("/")[0])
                    try:
                        os.fsync(folder)
                    finally:
                        os.close(folder)
        finally:
            os.close(descriptor)

    def delete(self, path: str) -> None:
        check_readable(path)
        parent, _, name = path.rpartition("/")
        with self.root() as root, translated(self.name, path):
            try:
                folder = open_folder(root, parent)
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not mode_of.S_ISREG(found.st_mode):
                    raise Forbidden(
                        f"{place(self.name, path)} is {_kind(found.st_mode)}, not a regular file: not deleted",
                        hint="nothing of Replica's makes such a thing: look who did, and remove it by hand",
                        endpoint=self.name,
                        path=path,
                    )
                os.unlink(name, dir_fd=folder)  # should it be a link by now, the link goes, not what it points to
                if parent != PARTS:
                    os.fsync(folder)
            except FileNotFoundError:
                return
            finally:
                os.close(folder)

    def quarantine(self, path: str, *, only: str = "") -> str:
        """`only`: the etag of the file that was found wrong. SourceChanged, and nothing is moved, if the path names
        another one by now: somebody else may have put the right bytes there since, and reported them."""
        check_path(path)
        parent, _, name = path.rpartition("/")
        away = f"{QUARANTINE}/{secrets.token_hex(8)}/{path}"
        with self.root() as root, translated(self.name, path):
            folder = open_folder(root, parent)
            try:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not mode_of.S_ISREG(found.st_mode):
                    raise Forbidden(
                        f"{place(self.name, path)} is {_kind(found.st_mode)}, not a regular file: not moved",
                        endpoint=self.name,
                        path=path,
                    )
                self._only(path, found, only)
                target = open_folder(root, away.rpartition("/")[0], create=True)
                try:
                    rename_no_replace(folder, name, target, name)
                    try:
                        self._only(path, os.stat(name, dir_fd=target, follow_symlinks=False), only)
                    except SourceChanged:  # swapped in the moment before: it goes back where it was
                        rename_no_replace(target, name, folder, name)
                        raise
                    os.fsync(target)
                    os.fsync(folder)
                finally:
                    os.close(target)
            finally:
                os.close(folder)
        return away

    def _only(self, path: str, found: os.stat_result, only: str) -> None:
        if only and stat_of(found).etag != only:
            raise SourceChanged(
                f"{place(self.name, path)} changed before it could be moved to quarantine",
                hint="it was left where it is, and is looked at again",
                endpoint=self.name,
                path=path,
            )

    def collect_parts(self, older_than_seconds: float) -> int:
        removed = 0
        with self.root() as root, translated(self.name, PARTS):
            try:
                parts = open_folder(root, PARTS)
            except FileNotFoundError:
                return 0
            try:
                with closing(os.scandir(parts)) as entries:
                    for entry in entries:
                        with suppress(FileNotFoundError, IsADirectoryError):
                            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                            if age >= older_than_seconds:
                                os.unlink(entry.name, dir_fd=parts)
                                removed += 1
            finally:
                os.close(parts)
        return removed


class _Root:
    """Opened for one verb and closed after it; a class, for a small file passes six of them."""

    __slots__ = ("_root", "_tree")

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def __enter__(self) -> int:
        self._root = self._tree.open_root()
        return self._root

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._root)


@contextmanager
def _closing_descriptor(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def stat_of(found: os.stat_result) -> Stat:
    return Stat(found.st_size, found.st_mtime_ns, f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}")


def _drop_twins(root: int, found: os.stat_result) -> None:
    with suppress(FileNotFoundError):
        parts = open_folder(root, PARTS)
        try:
            with closing(os.scandir(parts)) as entries:
                for entry in entries:
                    if entry.inode() == found.st_ino:
                        with suppress(FileNotFoundError):
                            os.unlink(entry.name, dir_fd=parts)
        finally:
            os.close(parts)


def _owner(own: int) -> str:
    with suppress(OSError):
        descriptor = os.open("endpoint", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=own)
        with os.fdopen(descriptor, "rb") as file:
            return owner_in(file.read(SENTINEL_BYTES_MAX)) or ""
    return ""


_PROBLEMS = {errno.ELOOP: "symbolic link", errno.ENAMETOOLONG: "path is too long"}


def _entry(path: str, found: os.stat_result) -> Entry:
    problem = ""
    if not mode_of.S_ISREG(found.st_mode):
        problem = _kind(found.st_mode).partition(" ")[2]
    elif path.startswith(OWN):
        problem = "name is kept for Replica"
    shown = _shown(path)
    if shown != path:
        problem = "name is not UTF-8"
    return Entry(shown, found.st_size, found.st_mtime_ns, problem)


def _kind(mode: int) -> str:
    kinds = (
        (mode_of.S_ISDIR, "a folder"),
        (mode_of.S_ISLNK, "a symbolic link"),
        (mode_of.S_ISFIFO, "a FIFO"),
        (mode_of.S_ISSOCK, "a socket"),
        (mode_of.S_ISCHR, "a character device"),
        (mode_of.S_ISBLK, "a block device"),
    )
    return next((text for matches, text in kinds if matches(mode)), "something unknown")


def _shown(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
