"""Places for storage tests: folders, and the back door to them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from replica.storage.posix import PosixStorage


class BehindFolder:
    """conformance.Behind for a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, path: str, content: bytes) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def get(self, path: str) -> bytes | None:
        try:
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def flip(self, path: str, at: int = 0) -> None:
        file = self.root / path
        found = file.stat()
        with file.open("r+b") as opened:
            opened.seek(at)
            byte = opened.read(1)[0]
            opened.seek(at)
            opened.write(bytes([byte ^ 1]))
        os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))

    def paths(self) -> list[str]:
        return sorted(
            os.path.relpath(os.path.join(folder, name), self.root)
            for folder, _, names in os.walk(self.root)
            for name in names
        )

    def vanish(self) -> None:
        # What an unmounted disk looks like: its empty mount point.
        self.root.rename(self.root.with_name(self.root.name + ".unmounted"))
        self.root.mkdir()

    def return_(self) -> None:
        self.root.rmdir()
        self.root.with_name(self.root.name + ".unmounted").rename(self.root)


def as_nobody(do: Callable[[Path], None]) -> None:
    """Run `do(folder)` as a user who may not do everything: in a child process, which leaves root if we are root.

    The child is forked, so nothing has to be readable for it but the folder, which is its own.
    """
    folder = Path(tempfile.mkdtemp(prefix="replica-nobody-"))
    try:
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        in_child(partial(_drop_and_do, do, folder))
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", folder], check=True)
        shutil.rmtree(folder)


def _drop_and_do(do: Callable[[Path], None], folder: Path) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    do(folder)


def in_child(do: Callable[[], None]) -> None:
    """Run `do` in a forked child; its failure is ours, with its story."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            do()
        except BaseException:  # noqa: BLE001 - told to the parent
            os.write(write, traceback.format_exc().encode()[-4000:])
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        story = told.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, story or f"the child ended with status {status}"


def folder_storage(root: Path, name: str = "") -> PosixStorage:
    """A prepared endpoint, without an event loop."""
    storage = PosixStorage(root, name=name)
    storage.tree.prepare()
    return storage


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
