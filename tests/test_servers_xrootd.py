"""The tests' own XRootD servers do what the tests of transfers build upon."""

from __future__ import annotations

import http.client
import ssl
import zlib

import pytest

from tests import debian
from tests.servers import ServerUnavailable
from tests.servers_xrootd import XRootD

CONTENT = bytes(range(256)) * 5000


def ask(server: XRootD, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
    """Status, the header Digest, the body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Digest", ""), answer.read()
    finally:
        connection.close()


def test_it_keeps_files_knows_their_checksums_and_copies_to_another_by_itself(
    xrootd_pair: tuple[XRootD, XRootD],
) -> None:
    one, two = xrootd_pair
    assert ask(one, "PUT", "/folder/file", CONTENT)[0] in (200, 201)
    assert (one.data / "folder" / "file").read_bytes() == CONTENT
    status, digest, _ = ask(one, "HEAD", "/folder/file", Want_Digest="adler32")
    assert (status, digest) == (200, f"adler32={zlib.adler32(CONTENT):08x}")
    two.put("folder/other", b"")  # a COPY makes no folders
    for number, url in enumerate((one.url_http, one.url_https)):
        status, _, told = ask(two, "COPY", f"/folder/copy{number}", Source=f"{url}/folder/file", Credential="none")
        assert status == 201
        assert b"success" in told
        assert (two.data / "folder" / f"copy{number}").read_bytes() == CONTENT


def test_its_certificate_is_good_and_it_comes_back_where_it_was(xrootd: XRootD) -> None:
    context = ssl.create_default_context(cafile=str(xrootd.ca_file))
    xrootd.put("kept", b"kept")
    xrootd.kill()
    xrootd.start()
    connection = http.client.HTTPSConnection("localhost", xrootd.port, timeout=20, context=context)
    connection.request("GET", "/kept")
    assert connection.getresponse().read() == b"kept"
    connection.close()


def test_who_may_not_install_is_told_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian.os, "geteuid", lambda: 1000)
    with pytest.raises(ServerUnavailable, match="as root: apt-get install --no-install-recommends no-such-package"):
        debian.need("no-such-package")
