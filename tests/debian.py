"""Debian packages that tests need: there already, installed now, or a failure that says how.

Given     names of Debian packages.
Returns   nothing; afterwards they are installed.
Promises  a test is never skipped for want of a server. As root apt-get installs what is missing, one process at a time,
          however many test processes ask at once; everybody else is told the exact command.
Partner   tests/servers_*.py call it before they look for their binaries.
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import tempfile
from pathlib import Path

from tests.servers import ServerUnavailable

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
#: apt-get's own lock is waited for too: somebody else may be installing something.
_APT_GET = ["apt-get", "-y", "-q", "-o", "DPkg::Lock::Timeout=300"]


@functools.cache
def need(*packages: str) -> None:
    """Raises ServerUnavailable with the command that would help."""
    if not _missing(packages):
        return
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0:
        raise ServerUnavailable(f"the tests need {' '.join(_missing(packages))}; as root: {command}")
    with Path(tempfile.gettempdir(), "replica-tests-apt.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install = [*_APT_GET, "install", "--no-install-recommends", *(missing := _missing(packages))]
        if missing and _run(install).returncode:  # the index of packages may be missing or old
            _run([*_APT_GET, "update"])
            if (failed := _run(install)).returncode:
                raise ServerUnavailable(f"`{command}` failed:\n{failed.stdout[-4000:]}")


def _missing(packages: tuple[str, ...]) -> list[str]:
    def installed(package: str) -> bool:
        told = _run(["dpkg-query", "-W", "-f", "${db:Status-Status}", package])
        return told.returncode == 0 and told.stdout == "installed"

    return [package for package in packages if not installed(package)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
        )
    except FileNotFoundError:
        raise ServerUnavailable(f"there is no {command[0]} here: these tests run on Debian and its likes") from None
