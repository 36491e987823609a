import pytest

from replica.storage.memory import MemoryStorage
from replica.storage.posix import PosixStorage
from replica.storage.registry import open_storage
from replica.storage.sftp import SftpStorage
from rules.errors import Invalid


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("file:///data/x", "/data/x"),
        ("file:///data/x/", "/data/x"),
        ("file:///data/with%20space%23%25", "/data/with space#%"),
        ("file:///data/%C3%BC", "/data/ü"),
        ("file:///...", "/..."),
    ],
)
def test_a_file_url_is_a_folder(url, root):
    storage = open_storage(url, name="DISK")
    assert isinstance(storage, PosixStorage)
    assert (storage.tree.path, storage.name, storage.url) == (root, "DISK", url)


@pytest.mark.parametrize(
    "url",
    [
        "davs://[2001:db8::1]:8443/data",
        "https://[::1]/data",
        "sftp://[::1]:2022/data",
        "root://[2001:db8::1]:1094//data",
        "s3+https://[::1]:9000/bucket/prefix",
    ],
)
def test_an_address_of_six_is_a_host(url):
    assert open_storage(url, name="SIX").url == url


def test_an_address_of_six_reaches_its_server():
    storage = open_storage("http://[::1]:1/data", name="SIX")
    assert storage.http.base == "http://[::1]:1/data"
    assert open_storage("root://[::1]:1094//data").server.base == "root://[::1]:1094/"


def test_a_memory_url_is_a_store_of_that_name():
    storage = open_storage("memory://demo")
    assert isinstance(storage, MemoryStorage)
    assert storage.store == "demo"


@pytest.mark.parametrize("url", ["sftp://se.example.org/data/with%20space", "sftp://se.example.org:2022/data/x/"])
def test_an_sftp_url_is_a_folder_at_a_host(url):
    storage = open_storage(url, name="SSH")
    assert isinstance(storage, SftpStorage)
    assert (storage.name, storage.url) == ("SSH", url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/data/x",
        "data/x",
        "file:/data/x",
        "file:data",
        "file://data/x",
        "file://localhost/data/x",
        "file:///",
        "file://",
        "file:////data",
        "file:///data//x",
        "file:///data/../etc",
        "file:///data/%2e%2e/etc",
        "file:///data/./x",
        "file:///data/%2F/x",
        "file:///data/%00x",
        "file:///data/%ff",
        "file:///data/%zz",
        "file:///data/x?a=b",
        "file:///data/x#f",
        "file:///data/x\n",
        "file:///data/x y",
        "file://user@host/x",
        "FILE:///data/x",
        "local:///data/x",
        "simplecache::file:///etc/passwd",
        "file:///data::x",
        "davs://[::1]/data::x",
        "davs://[::1]::file:///etc",
        "davs://[::1/data",
        "davs://[::1]x/data",
        "reference::memory://x",
        "memory://",
        "memory://a/b",
        "memory://a:80",
        "memory://user@a",
        "memory://[::1]",
        "s3+ftp://host/bucket",
        "https:///folder",
        "https://host:port/folder",
        "davs://user@host/folder",
        "davs://host/a/../b",
        "davs://host/a//b",
        "davs://host/a%2Fb",
        "davs://host/a%zz",
        "davs://host/a?b",
        "webdav://host/folder",
        "gopher://x",
        "sftp:///data/x",
        "sftp://host",
        "sftp://host/",
        "sftp://host/a/../b",
        "sftp://host/~//x",
        "sftp://host:port/x",
        "sftp://host:0/x",
        "sftp://host:99999/x",
        "sftp://user:word@host/x",
        "data:,x",
        "://x",
    ],
)
def test_anything_else_is_refused(url):
    with pytest.raises(Invalid):
        open_storage(url)


def test_a_refusal_lists_what_is_supported():
    with pytest.raises(Invalid) as told:
        open_storage("gopher://bucket/x")
    assert "gopher" in told.value.message
    assert "file:///" in told.value.hint
    assert "memory://" in told.value.hint


def test_opening_creates_nothing(tmp_path):
    open_storage(f"file://{tmp_path}/new")
    assert not (tmp_path / "new").exists()
