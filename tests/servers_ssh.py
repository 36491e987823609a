"""Private OpenSSH servers: SFTP on a port of 127.0.0.1, with host and user keys of their own.

Given     Debian's openssh-server (installed by tests.debian when it is missing).
Returns   servers whose files lie in `.data`, which can be killed and started again in the middle of a test.
Promises  as tests.servers: nothing outside the server's directory is touched, and it ends with the session. It runs
          unprivileged, and lets in the account it runs as, by a key made for it.
Partner   tests/replica/storage/test_sftp.py.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.debian import need
from tests.servers import ServerUnavailable, _Server, _unprivileged, free_port

_CONFIGURATION = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {own}/host_key
AuthorizedKeysFile {own}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp {options}
MaxStartups 100
"""


class OpenSSH(_Server):
    """`options`: of internal-sftp, such as -R (read only). `room_bytes`: a disk of that size, see `start`."""

    def __init__(self, *, options: str = "", room_bytes: int = 0) -> None:
        need("openssh-server", "openssh-client")
        super().__init__(_unprivileged())
        self.options = options
        self.room_bytes = room_bytes
        self.data = self.directory / "data"
        self.data.mkdir()
        for key in ("host_key", "user_key", "other_key"):
            made = subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", self.directory / key],
                capture_output=True,
                text=True,
            )
            if made.returncode:
                raise ServerUnavailable(f"ssh-keygen failed:\n{made.stderr}")
        for path in self.directory.iterdir():
            self.give_away(path)

    @property
    def user(self) -> str:
        return (self.account or pwd.getpwuid(os.geteuid())).pw_name

    @property
    def url(self) -> str:
        return f"sftp://127.0.0.1:{self.port}{self.data}/root"

    @property
    def settings(self) -> dict[str, str]:
        """What a credentials file would say."""
        return {
            "user": self.user,
            "key_file": str(self.directory / "user_key"),
            "known_hosts_file": str(self.directory / "known_hosts"),
        }

    def give_away(self, path: Path) -> None:
        """To the account that the server runs as."""
        if self.account is not None:
            os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)

    def know(self, key: str = "host_key") -> None:
        """Write down who this server is."""
        public = (self.directory / f"{key}.pub").read_text()
        (self.directory / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {public}")

    def start(self) -> None:
        """With `room_bytes`, the data lie on a tmpfs of that size that nobody else sees; without the right to mount
        one, no file may grow beyond it: that failure comes without a word, and with space left."""
        self.port = self.port or free_port()
        self.know()
        configuration = self.directory / "sshd_config"
        configuration.write_text(
            _CONFIGURATION.format(port=self.port, own=self.directory, options=self.options or "-l ERROR")
        )
        command: list[object] = ["/usr/sbin/sshd", "-D", "-e", "-f", configuration]
        if self.room_bytes and self.account is not None:
            mount = f"mount -t tmpfs -o size={self.room_bytes},mode=777 replica {self.data}"
            ids = f"--reuid={self.account.pw_uid} --regid={self.account.pw_gid} --clear-groups"
            command = ["unshare", "-m", "sh", "-c", f'{mount} && exec setpriv {ids} "$@"', "sh", *command]
        elif self.room_bytes:
            command = ["sh", "-c", f'trap "" XFSZ; exec prlimit --fsize={self.room_bytes} "$@"', "sh", *command]
        self._spawn(command)
        self._await(self._answers, 20)

    def _spawn_options(self) -> dict[str, Any]:
        options = super()._spawn_options()
        if self.room_bytes:  # mounting comes first, setpriv after it
            options = {key: value for key, value in options.items() if key not in ("user", "group", "extra_groups")}
        return options

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def cut(self) -> None:
        """End every connection, as a broken network would; the server itself goes on."""
        for child in self._children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def hold(self, how: signal.Signals = signal.SIGSTOP) -> None:
        """Every session stands still (SIGSTOP), or goes on (SIGCONT)."""
        for child in self._children():
            os.kill(child, how)

    def kill(self) -> None:
        """As a power cut: the listener first, so that nobody comes back, then whoever is connected."""
        children = self._children()
        self.stop(signal.SIGKILL)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        children = self._children()
        super().stop(how)
        for child in children:  # each session has left our process group
            with suppress(ProcessLookupError):
                os.kill(child, how)

    def _children(self) -> list[int]:
        """The processes of the sessions, by their descent from ours."""
        parents: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    parents.setdefault(parent, []).append(int(entry.name))
        found, left = [], [self.process.pid] if self.process is not None else []
        while left:
            children = parents.get(left.pop(), [])
            found += children
            left += children
        return found
