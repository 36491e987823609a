"""Private WebDAV servers: Apache's mod_dav, and rclone's.

Given     Debian's packages `apache2-bin` and `rclone` (installed by tests.debian when they are missing).
Returns   servers on a free port of 127.0.0.1 whose files lie in `.data`, which can be stopped and started again.
Promises  as tests.servers: nothing outside the server's directory is touched, and it ends with the session.
Partner   tests/replica/storage/test_webdav.py; XRootD, the third server of WebDAV, is in tests.servers_xrootd.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.debian import need
from tests.servers import _Server, _unprivileged, free_port

USER, PASSWORD = "replica", "correct horse"

_MODULES = "mpm_event authn_core authn_file authz_core authz_user auth_basic dav dav_fs dav_lock"
_APACHE = """\
ServerName localhost
ServerRoot {own}
PidFile {own}/pid
Mutex file:{own}
ErrorLog {own}/error.log
LogLevel crit
Listen 127.0.0.1:{port}
DocumentRoot {own}/data
DavLockDB {own}/lock/db
AllowEncodedSlashes NoDecode
LimitRequestLine 16384
LimitRequestBody 0
KeepAliveTimeout 5
MaxKeepAliveRequests 0
StartServers 1
ServerLimit 2
ThreadsPerChild 25
MaxRequestWorkers 50
<Directory {own}/data>
  Dav On
  Require all granted
</Directory>
<Location /locked>
  AuthType Basic
  AuthName locked
  AuthUserFile {own}/users
  Require valid-user
</Location>
"""


class _DavServer(_Server):
    def __init__(self) -> None:
        super().__init__(_unprivileged())
        self.data = self.directory / "data"
        self._make("data")

    def _make(self, name: str) -> None:
        folder = self.directory / name
        folder.mkdir()
        if self.account is not None:
            os.chown(folder, self.account.pw_uid, self.account.pw_gid)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as s:
                s.sendall(b"OPTIONS / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return s.recv(16).startswith(b"HTTP/1.1 ")
        except OSError:
            return False

    def give_away(self, folder: Path) -> None:
        """`folder` and all beneath belong to the server's account."""
        if self.account is not None:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)

    def empty(self) -> None:
        for path in self.data.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


class Apache(_DavServer):
    """mod_dav with its file provider; what is under /locked asks for USER and PASSWORD."""

    def __init__(self) -> None:
        need("apache2-bin")
        super().__init__()
        self._make("lock")

    def start(self) -> None:
        self.port = self.port or free_port()
        digest = base64.b64encode(hashlib.sha1(PASSWORD.encode(), usedforsecurity=False).digest()).decode()
        (self.directory / "users").write_text(f"{USER}:{{SHA}}{digest}\n")
        loads = "".join(f"LoadModule {m}_module /usr/lib/apache2/modules/mod_{m}.so\n" for m in _MODULES.split())
        configuration = self.directory / "apache.conf"
        configuration.write_text(loads + _APACHE.format(own=self.directory, port=self.port))
        self._spawn(["/usr/sbin/apache2", "-f", configuration, "-D", "FOREGROUND"])
        self._await(self._answers, 20)


class Rclone(_DavServer):
    """`rclone serve webdav` of a folder; it keeps no cache of what is in there."""

    def __init__(self) -> None:
        need("rclone")
        super().__init__()

    def start(self) -> None:
        self.port = self.port or free_port()
        options = ["--addr", f"127.0.0.1:{self.port}", "--dir-cache-time", "0s", "--poll-interval", "0s"]
        nothing = self.directory / "rclone.conf"
        nothing.touch()
        self._spawn(["/usr/bin/rclone", "--config", nothing, "serve", "webdav", *options, self.data])
        self._await(self._answers, 20)


def rclone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run rclone as a client, with no configuration but its arguments."""
    need("rclone")
    command = ["/usr/bin/rclone", "--config", "/dev/null", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
