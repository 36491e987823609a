"""Private XRootD servers: root://, HTTP(S) and third-party copies on one port of 127.0.0.1.

Given     Debian's packages of XRootD (installed by tests.debian when they are missing) and `openssl`.
Returns   servers whose files lie in `.data`, which can be stopped, killed and started again in the middle of a test.
Promises  as tests.servers: nothing outside the server's directory is touched, and it ends with the session.
Partner   tests/conftest.py makes fixtures of them: `xrootd`, and `xrootd_pair`, two that trust one authority.

5.5.3 loads the handler of third-party copies only once HTTPS is configured, so every server has a certificate.
"""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.debian import need
from tests.servers import ServerUnavailable, _Server, _unprivileged, free_port

PACKAGES = ("xrootd-server", "xrootd-server-plugins", "xrootd-plugins", "xrootd-client", "xrootd-client-plugins")

_CONFIGURATION = """\
all.sitename {name}
all.export /
all.adminpath {own}/admin
all.pidpath   {own}/admin
oss.localroot {own}/data
xrd.port {port}
xrd.network nodnr nokeepalive
xrd.sched mint 4 maxt 64 avlt 4
xrootd.chksum chkcgi adler32 crc32c md5
xrd.protocol XrdHttp:{port} libXrdHttp.so
http.selfhttps2http no
http.exthandler xrdtpc libXrdHttpTPC.so
http.header2cgi Authorization authz
ofs.tpc autorm pgm /usr/bin/xrdcp --server
xrd.tls {own}/tls/host.crt {own}/tls/host.key
xrd.tlsca certdir {own}/tls/ca
"""

_HOST_EXTENSIONS = "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n"


class XRootD(_Server):
    """One server, HTTP without authentication. `trusting`: another one, whose authority and certificate it shares.

    `more`: further lines of configuration.
    """

    def __init__(self, name: str = "one", *, trusting: XRootD | None = None, more: str = "") -> None:
        need(*PACKAGES, "openssl")
        super().__init__(_unprivileged())
        self.name = name
        self.more = more
        self.data = self.directory / "data"
        self.tls = self.directory / "tls"
        for folder in (self.data, self.directory / "admin"):
            folder.mkdir()
        if trusting is None:
            _make_certificates(self.tls)
        else:
            shutil.copytree(trusting.tls, self.tls, symlinks=True)
        self._give_away(self.directory)

    def _places(self) -> list[Path]:
        """Where checksums can be kept in attributes of the file, as on a real server: old kernels' tmpfs cannot."""
        return [place for place in super()._places() if _keeps_attributes(place)] or super()._places()

    def _give_away(self, folder: Path) -> None:
        """All beneath belongs to the server's account."""
        if self.account is not None:
            for path in folder.rglob("*"):
                os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)

    def put(self, path: str, content: bytes) -> Path:
        """A file that appears at the server behind everybody's back; its folders belong to the server."""
        file = self.data / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self._give_away(self.data)
        return file

    @property
    def ca_file(self) -> Path:
        """The certificate that a client must trust."""
        return self.tls / "ca.pem"

    @property
    def url_http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url_https(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def url_root(self) -> str:
        return f"root://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Not in a thread that ends before the test does: the server would end with it."""
        self.port = self.port or free_port()
        configuration = self.directory / "xrootd.cfg"
        text = _CONFIGURATION.format(name=self.name, own=self.directory, port=self.port)
        configuration.write_text(text + self.more)
        self._spawn(["/usr/bin/xrootd", "-c", configuration, "-n", self.name])
        self._await(self._answers, 30)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("HEAD", "/")
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """As a power cut: nothing is finished, nothing is told."""
        self.stop(signal.SIGKILL)

    def empty(self) -> None:
        """Remove all its files, while it runs or not."""
        for path in self.data.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _keeps_attributes(place: Path) -> bool:
    probe = place / f".replica-{os.getpid()}"
    try:
        probe.touch()
        os.setxattr(probe, "user.replica", b"1")
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _make_certificates(folder: Path) -> None:
    """A throw-away authority in `ca.pem` and `ca/`, and by it a certificate for localhost and 127.0.0.1."""
    trusted = folder / "ca"
    trusted.mkdir(parents=True)
    (folder / "extensions").write_text(_HOST_EXTENSIONS)
    new = "req -newkey rsa:2048 -nodes"
    _openssl(folder, f"{new} -x509 -days 30 -subj /CN=Replica-tests -keyout ca.key -out ca.pem")
    _openssl(folder, f"{new} -subj /CN=localhost -keyout host.key -out host.csr")
    sign = "x509 -req -days 30 -in host.csr -CA ca.pem -CAkey ca.key -set_serial 2"
    _openssl(folder, f"{sign} -extfile extensions -out host.crt")
    shutil.copy(folder / "ca.pem", trusted / "ca.pem")
    _openssl(folder, "rehash ca")
    (folder / "host.key").chmod(0o400)


def _openssl(folder: Path, arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments.split()], cwd=folder, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ServerUnavailable(f"`openssl {arguments}` failed:\n{done.stderr[-2000:]}")


def running(*servers: XRootD) -> Iterator[tuple[XRootD, ...]]:
    """For fixtures: all of them started, and removed at the end, whatever happens."""
    try:
        for server in servers:
            server.start()
        yield servers
    finally:
        for server in servers:
            server.remove()
