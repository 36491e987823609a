"""Open, make and rename beneath a folder, and never outside it.

Given     the descriptor of a root folder and a path whose segments base.check_path has seen.
Returns   descriptors; everything raises OSError, translated one floor up.
Promises  no symbolic link is followed in any segment, however it is swapped while we look: the kernel resolves the path
          from the descriptor (openat2), or we open segment by segment, each relative to the one before.
Partner   replica.storage.tree, the only caller.

Python has neither openat2 nor renameat2, so they are called by number and by name through ctypes. Containers with an
old seccomp profile answer EPERM or ENOSYS; that is found out once, on a harmless path, because EPERM on a real path may
well mean the path.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import platform
import stat
import sys

_AT_FDCWD = -100
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RENAME_NOREPLACE = 1
#: The same number on every architecture that got it in 2020 or later; asked for only where we tried it.
_SYS_OPENAT2 = 437
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
#: Absent from older C libraries other than glibc.
_renameat2 = getattr(_libc, "renameat2", None)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


#: Typed once: converting the arguments by hand at each call costs as much as the call.
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_OpenHow), ctypes.c_size_t)
_syscall.restype = ctypes.c_long
_HOW_BYTES = ctypes.sizeof(_OpenHow)


def _openat2(folder: int, path: bytes, flags: int, mode: int) -> int:
    how = _OpenHow(
        flags | os.O_CLOEXEC,
        mode if flags & os.O_CREAT else 0,
        _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
    )
    while True:
        descriptor: int = _syscall(_SYS_OPENAT2, folder, path, how, _HOW_BYTES)
        if descriptor >= 0:
            return descriptor
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), os.fsdecode(path))


@functools.cache
def has_openat2() -> bool:
    """Whether the kernel, and whatever stands before it, lets us call openat2."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False
    try:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.close(_openat2(root, b".", os.O_PATH | os.O_DIRECTORY, 0))
        finally:
            os.close(root)
    except OSError:
        return False
    return True


def open_beneath(root: int, path: str, flags: int, mode: int = 0o666) -> int:
    """A descriptor of `path`, seen from the folder `root`. A symbolic link anywhere raises ELOOP."""
    if has_openat2():
        return _openat2(root, os.fsencode(path), flags, mode)
    return _open_by_segments(root, path, flags, mode)


def _open_by_segments(root: int, path: str, flags: int, mode: int) -> int:
    # Each step opens one name relative to a descriptor we hold, without following it: whatever is swapped meanwhile,
    # we stay in folders that were real folders beneath the root when we entered them.
    *folders, last = path.split("/")
    if ".." in (last, *folders):  # checked long before; kept, for here it would be believed
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    here = root
    try:
        for segment in folders:
            below = _enter(here, segment)
            if here != root:
                os.close(here)
            here = below
        descriptor = os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=here)
        if flags & os.O_PATH and stat.S_ISLNK(os.fstat(descriptor).st_mode):
            # O_PATH with O_NOFOLLOW opens the link itself; openat2 refuses it, and so do we.
            os.close(descriptor)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        return descriptor
    except NotADirectoryError:
        # O_DIRECTORY on a link says ENOTDIR; tell the truth, as openat2 does.
        if flags & os.O_DIRECTORY and _names_link(here, last):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path) from None
        raise
    finally:
        if here != root:
            os.close(here)


def _enter(folder: int, segment: str) -> int:
    try:
        return os.open(segment, os.O_PATH | _FOLDER, dir_fd=folder)
    except NotADirectoryError:
        if _names_link(folder, segment):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), segment) from None
        raise


def _names_link(folder: int, segment: str) -> bool:
    try:
        os.readlink(segment, dir_fd=folder)
    except OSError:
        return False
    return True


def open_folder(root: int, path: str, *, create: bool = False) -> int:
    """A descriptor of a folder that can be listed and fsynced; empty `path` for the root itself.

    With `create`, missing folders are made, and each new name is durable before the next one is made: a file that was
    published cannot lose its folder in a power cut.
    """
    if not path:
        return os.open(".", os.O_RDONLY | _FOLDER, dir_fd=root)
    try:
        return open_beneath(root, path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        if not create:
            raise
    here = os.open(".", os.O_RDONLY | _FOLDER, dir_fd=root)
    try:
        for segment in path.split("/"):
            try:
                below = open_beneath(here, segment, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                # Made by us or by somebody who was faster and has perhaps not come to his fsync: ours covers both.
                with contextlib.suppress(FileExistsError):
                    os.mkdir(segment, dir_fd=here)
                os.fsync(here)
                below = open_beneath(here, segment, os.O_RDONLY | os.O_DIRECTORY)
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here


def rename_no_replace(from_folder: int, from_name: str, to_folder: int, to_name: str) -> None:
    """Give a file another name in one step, or FileExistsError: what has the name already is never replaced."""
    if _renameat2 is None:
        return link_and_unlink(from_folder, from_name, to_folder, to_name)
    result: int = _renameat2(
        ctypes.c_int(from_folder),
        ctypes.c_char_p(os.fsencode(from_name)),
        ctypes.c_int(to_folder),
        ctypes.c_char_p(os.fsencode(to_name)),
        ctypes.c_uint(_RENAME_NOREPLACE),
    )
    if result == 0:
        return None
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):  # NFS and some FUSE file systems do not know the flag
        raise OSError(code, os.strerror(code), from_name, None, to_name)
    return link_and_unlink(from_folder, from_name, to_folder, to_name)


def link_and_unlink(from_folder: int, from_name: str, to_folder: int, to_name: str) -> None:
    """The same by a hard link, which never replaces either. A crash between leaves two names; tree.py knows."""
    os.link(from_name, to_name, src_dir_fd=from_folder, dst_dir_fd=to_folder, follow_symlinks=False)
    os.unlink(from_name, dir_fd=from_folder)
