"""The fence around a worker: URLs of other people's making do not get past it, however they are spelled."""

from __future__ import annotations

import socket

import pytest

from replica import config
from rules.errors import Forbidden, Invalid, Unreachable
from workers.fences import Fences, place_of
from workers.storages import Storages

ROOTS = ("davs://se.example.org/data/site", "s3+https://s3.example.org:9000/bucket/pre", "root://x.example.org//pool/a")


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """A name server of our own: no test asks the real one."""
    known = {
        "se.example.org": ["93.184.216.34"],
        "other.example.org": ["93.184.216.35"],
        "rebound.example.org": ["93.184.216.34", "127.0.0.1"],
        "link.example.org": ["169.254.169.254"],
        "six.example.org": ["2606:2800:220:1::1"],
        "mapped.example.org": ["::ffff:127.0.0.1"],
    }
    real = socket.getaddrinfo

    def look(host, port, *more, **options):
        if host in known:
            return [(None, None, None, "", (address, 0)) for address in known[host]]
        if any(c.isalpha() for c in host) and not host.startswith("0x") and host != "localhost" and ":" not in host:
            raise socket.gaierror("no such name")
        return real(host, port, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look)


def permitted(fences: Fences, url: str, side: str) -> bool:
    try:
        fences.permit(url, name="X", side=side)
    except Forbidden as error:
        assert (error.side, error.endpoint) == (side, "X")
        assert error.hint
        return False
    return True


@pytest.mark.parametrize(
    "url",
    [
        "davs://se.example.org/data/site",
        "davs://se.example.org/data/site/",
        "https://SE.example.org:443/data/site/deeper",
        "davs://se.example.org/%64ata/si%74e/x%20y",
        "s3+https://s3.example.org:9000/bucket/pre/fix",
        "root://x.example.org:1094//pool/a/b",
    ],
)
def test_what_is_within_a_root_may_be_written_to(url):
    assert permitted(Fences(ROOTS), url, "target")
    assert permitted(Fences(ROOTS), url, "source")


@pytest.mark.parametrize(
    "url",
    [
        "davs://se.example.org/data/site2",
        "davs://se.example.org/data",
        "davs://se.example.org/Data/site",
        "davs://se.example.org/data/site/../other",
        "davs://se.example.org/data/site/%2e%2e/other",
        "davs://se.example.org/data/site/..%2fother",
        "davs://se.example.org/data/site%2fx/../../y",
        "davs://se.example.org/data//site",
        "davs://se.example.org/data/site/%252e%252e/x\\..\\..",
        "davs://se.example.org.evil.org/data/site",
        "davs://se.example.org./data/site",
        "davs://evil.org/davs://se.example.org/data/site",
        "davs://se.example.org@evil.org/data/site",
        "davs://evil.org#se.example.org/data/site",
        "davs://evil.org\\@se.example.org/data/site",
        "davs://user:pw@se.example.org/data/site",
        "davs://se.example.org:8443/data/site",
        "davs://se.example.org:0/data/site",
        "davs://[se.example.org]/data/site",
        "davs://se.example.org:99999/data/site",
        "http://se.example.org/data/site",
        "dav://se.example.org:443/data/site",
        "davs://se.example.org/data/site?x=/../..",
        "davs://se.example.org/data/site/%ff",
        "davs://se.example.org/data/\nsite",
        "davs://ѕe.example.org/data/site",
        "s3+https://s3.example.org/bucket/pre",
        "s3+https://s3.example.org:9000/bucket2/pre",
        "s3://bucket/pre",
        "root://x.example.org//pool/ab",
        "roots://x.example.org//pool/a",
        "sftp://se.example.org/data/site",
        "fsspec+https://se.example.org/data/site",
        "fsspec+file:///data/site",
        "file:///data/site",
        "FILE:///data/site",
        "local:///etc",
        "simplecache::file:///etc/passwd",
        "gopher://se.example.org/data/site",
        "",
    ],
)
def test_what_only_looks_like_a_root_may_not(url):
    assert not permitted(Fences(ROOTS), url, "target")


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x",
        "https://127.1/x",
        "https://2130706433/x",
        "https://0x7f.1/x",
        "https://0/x",
        "https://[::1]:6379/x",
        "https://[::]/x",
        "https://[::ffff:127.0.0.1]/x",
        "https://[64:ff9b::7f00:1]/x",
        "https://[64:ff9b:1::7f00:1]/x",
        "https://[2002:7f00:1::]/x",
        "https://[fe80::1]/x",
        "https://[fd00:ec2::254]/x",
        "https://169.254.169.254/latest/meta-data",
        "https://100.100.100.200/x",
        "https://metadata.google.internal/x",
        "https://db.localhost/x",
        "https://localhost./x",
        "https://[::ffff:0:127.0.0.1]/x",
        "https://localhost/x",
        "https://rebound.example.org/x",
        "https://link.example.org/x",
        "https://mapped.example.org/x",
        "root://127.0.0.1//x",
        "sftp://localhost/x",
        "http://other.example.org/x",
        "fsspec+ftp://other.example.org/x",
        "file:///etc",
        "file:///data%00/x",
    ],
)
def test_no_order_makes_a_worker_read_what_is_inside(url):
    assert not permitted(Fences(ROOTS), url, "source")


def test_a_name_without_an_address_is_not_opened_for_it_may_have_one_a_moment_later():
    with pytest.raises(Unreachable) as refused:
        Fences(ROOTS).permit("https://later.example.org/x", name="X", side="source")
    assert (refused.value.side, refused.value.endpoint) == ("source", "X")


@pytest.mark.parametrize("url", ["https://other.example.org/x", "root://six.example.org//x", "s3://anybody/x"])
def test_other_sites_are_read_from_and_never_written_to(url):
    fences = Fences(ROOTS)
    assert permitted(fences, url, "source")
    assert not permitted(fences, url, "target")
    listed = Fences(ROOTS, ("davs://se.example.org/data", "https://127.0.0.1:8443/near"))
    assert not permitted(listed, url, "source")
    assert permitted(listed, "davs://se.example.org/data/elsewhere", "source")
    assert permitted(listed, "davs://127.0.0.1:8443/near/x", "source")
    assert not permitted(listed, "davs://127.0.0.1:8443/nearby", "source")


def test_what_was_opened_to_read_is_not_thereby_opened_to_write(tmp_path):
    storages = Storages(roots=ROOTS)
    url = "https://other.example.org/x"
    assert storages.get(url, name="O", side="source") is storages.get(url, name="O", side="source")
    with pytest.raises(Forbidden) as refused:
        storages.get(url, name="O", side="target")
    assert "roots" in refused.value.hint
    within = f"{ROOTS[0]}/x"
    assert storages.get(within, name="W", side="target") is storages.get(within, name="W", side="source")


def test_without_roots_everything_may_be_touched():
    for side in ("source", "target"):
        assert permitted(Fences(), "http://127.0.0.1:1/x", side)
    assert not permitted(Fences((), ("https://se.example.org",)), "https://other.example.org", "source")


def test_a_root_that_can_be_read_in_two_ways_is_refused_at_the_start():
    for root in ("davs://user@host/x", "davs:///x", "davs://host/../x", "davs://host/x?y"):
        with pytest.raises(Invalid):
            Fences((root,))
    assert place_of("davs://[2001:db8::1]:8443/x").host == "2001:db8::1"


def test_roots_and_sources_are_settings():
    told = config.load(
        environ={"REPLICA_ROOTS": "/data/a davs://host:8443/folder", "REPLICA_SOURCES": "https://host/x"}
    )
    assert told.roots == ("/data/a", "davs://host:8443/folder")
    assert told.sources == ("https://host/x",)
    with pytest.raises(Invalid):
        config.load(environ={"REPLICA_SOURCES": "/data/a"})
