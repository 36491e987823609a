"""Temporaries of a folder that are written in ranges, and taken over from attempts that ended.

Given     a tree, and names of temporaries.
Returns   descriptors that may write; whether we are the only one who has such a descriptor.
Promises  a temporary has one writer at a time on this machine, for as long as his descriptor is open (flock); what was
          taken over has only its new name.
Partner   replica.storage.posix for the contract; replica.storage.parts_local keeps a descriptor for a whole copy.

Whoever writes holds an exclusive flock on the open file, which the kernel lets go of when the last descriptor of it is
closed, by whatever death. To get the lock therefore proves that no earlier writer of this machine has a descriptor
left: not a thread that hangs in the kernel, not a process that is stopped and will be woken. It proves nothing of other
machines that share the file system, nor where a file system has no locks; replica.storage.parts_local asks for both.
"""

from __future__ import annotations

import fcntl
import os
import stat as mode_of
from contextlib import closing

from replica.storage.base import PARTS, check_part
from replica.storage.beneath import open_beneath, open_folder, rename_no_replace
from replica.storage.faults import place, translated
from replica.storage.tree import Tree
from rules.errors import Forbidden, SourceMissing

_WRITE = os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY


def open_part(tree: Tree, part: str) -> int:
    """A descriptor to write to a temporary that is there."""
    check_part(part)
    with tree.root() as root, translated(tree.name, part, "target"):
        descriptor = open_beneath(root, part, _WRITE)
        found = os.fstat(descriptor)
        if mode_of.S_ISREG(found.st_mode) and found.st_nlink == 1:
            return descriptor
        os.close(descriptor)
        raise Forbidden(
            f"{place(tree.name, part)} is not a regular file with one name",
            hint="nothing of Replica's makes such a thing: look who did, and remove it by hand",
            endpoint=tree.name,
            path=part,
            side="target",
        )


def lock(descriptor: int) -> bool:
    """Be the only writer. False: somebody else is, or nobody can know."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def take_over(tree: Tree, part: str, mine: str) -> tuple[int, bool]:
    """Rename a temporary to a name of ours; its descriptor, and whether nobody else can write into it."""
    check_part(part)
    check_part(mine)
    try:
        descriptor = _open_to_take(tree, part)
        try:
            alone = lock(descriptor)
            with tree.root() as root, translated(tree.name, part):
                # Touched before it gets its new name: whoever collects old ones either removes the old name, or sees
                # the new one with this time.
                os.utime(descriptor)
                parts = open_beneath(root, PARTS, os.O_PATH | os.O_DIRECTORY)
                try:
                    rename_no_replace(parts, part.rpartition("/")[2], parts, mine.rpartition("/")[2])
                    taken = os.stat(mine.rpartition("/")[2], dir_fd=parts, follow_symlinks=False)
                finally:
                    os.close(parts)
            return descriptor, alone and os.path.samestat(taken, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
    except SourceMissing as error:
        error.side = "target"
        raise


def _open_to_take(tree: Tree, part: str) -> int:
    with tree.root() as root, translated(tree.name, part):
        descriptor = open_beneath(root, part, _WRITE)
    if not mode_of.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceMissing(f"{place(tree.name, part)} is no file", endpoint=tree.name, path=part)
    return descriptor


def append(tree: Tree, part: str, text: bytes) -> None:
    descriptor = open_to_append(tree, part)
    try:
        with translated(tree.name, part, "target"):
            os.write(descriptor, text)
    finally:
        os.close(descriptor)


def open_to_append(tree: Tree, part: str) -> int:
    check_part(part)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY
    with tree.root() as root, translated(tree.name, part, "target"):
        try:
            return open_beneath(root, part, flags)
        except FileNotFoundError:  # somebody tidied up in our folder
            os.close(open_folder(root, PARTS, create=True))
            return open_beneath(root, part, flags)


def names(tree: Tree, prefix: str) -> list[str]:
    """Temporaries whose tag begins so."""
    check_part(f"{PARTS}/{prefix}")
    with tree.root() as root, translated(tree.name, PARTS):
        try:
            parts = open_folder(root, PARTS)
        except FileNotFoundError:
            return []
        try:
            with closing(os.scandir(parts)) as entries:
                return [f"{PARTS}/{entry.name}" for entry in entries if entry.name.startswith(prefix)]
        finally:
            os.close(parts)


def write_all_at(descriptor: int, view: memoryview, offset: int) -> None:
    """pwrite() may take less than it was given; this does not."""
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
