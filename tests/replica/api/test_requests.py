"""A request that is not what its route declares goes no further, and the answer says what is wrong with it."""

import gzip
import json
import socket
from urllib.parse import quote

import pytest

from tests.service import Service

SITES = "/api/v1/sites"
DIDS = "/api/v1/dids"


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Service:
    return shared_service


@pytest.mark.parametrize(
    ("body", "says", "field"),
    [
        ({"name": "GSI", "is_admin": True}, "unknown field `is_admin`", "is_admin"),
        ({}, "missing required field `name`", "name"),
        ({"name": 3}, "expected `str`, got `int`", "name"),
        ({"name": None}, "expected `str`, got `null`", "name"),
        ({"name": ["GSI"]}, "expected `str`, got `array`", "name"),
        ({"name": "x" * 3000}, "more than 2000 characters", "name"),
        ([{"name": "GSI"}], "expected `object`, got `array`", ""),
        (b'{"name": "GSI", "name": "HZDR"}', "the key 'name' is there twice", "name"),
        (b'{"name": "a\\u0000b"}', "U+0000", ""),
        (b'{"name": "a\x00b"}', "not JSON", ""),
        (b'{"name": "\\ud800"}', "not JSON", ""),
        (b'{"name": "\xff"}', "not JSON", ""),
        (b'{"name": "GSI",}', "not JSON", ""),
        (b'{"name": "GSI"} // a comment', "not JSON", ""),
        (b"\xef\xbb\xbf{}", "not JSON", ""),
        ('{"name": "GSI"}'.encode("utf-16"), "not JSON", ""),
        (b"", "not JSON", ""),
    ],
)
def test_a_body_that_is_not_what_it_should_be(service: Service, body: object, says: str, field: str):
    answer = service.ask("POST", SITES, body)
    assert answer.status == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    problem = answer.json
    assert (problem["code"], problem["status"], problem["field"]) == ("invalid", 400, field)
    assert says in problem["detail"].lower() or says in problem["detail"]
    assert [site.name for site in service.client().sites.list()] == ["DESY"]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_number_that_json_does_not_have_is_refused(service: Service, value: str):
    body = b'{"did": "s:d", "metadata": {"x": %s}}' % value.encode()
    assert service.ask("POST", DIDS, body).status == 400


@pytest.mark.parametrize("depth", [40, 500, 100_000])
def test_deep_nesting_is_refused(service: Service, depth: int):
    body = b'{"did": "s:d", "metadata": {"x": ' + b"[" * depth + b"]" * depth + b"}}"
    answer = service.ask("POST", DIDS, body)
    assert answer.status == 400
    assert "nested more than 32 levels" in answer.json["detail"]


def test_an_escaped_backslash_before_u0000_is_a_text_like_any_other(service: Service):
    answer = service.ask("POST", DIDS, b'{"did": "no.such.scope:d", "metadata": {"x": "\\\\u0000"}}')
    assert (answer.status, answer.json["code"]) == (404, "not_found")


@pytest.mark.parametrize("number", ["3.0", '"3"', "true", "0", "101", "1e1"])
def test_integers_are_written_as_integers_and_within_their_bounds(service: Service, number: str):
    body = b'{"did": "s:d", "expression": "*", "copies": %s}' % number.encode()
    answer = service.ask("POST", "/api/v1/rules", body)
    assert (answer.status, answer.json["field"]) == (400, "copies")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/x-python-serialize",
        "text/yaml",
        "application/json; charset=utf-7",
    ],
)
def test_only_json_is_read(service: Service, content_type: str):
    answer = service.ask("POST", SITES, b'{"name": "GSI"}', headers={"Content-Type": content_type})
    assert (answer.status, answer.json["status"], answer.json["code"]) == (415, 415, "invalid")


def test_a_compressed_body_is_refused(service: Service):
    bomb = gzip.compress(b'{"name": "' + b" " * (50 << 20) + b'"}')
    answer = service.ask("POST", SITES, bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status == 415


def test_a_body_that_is_too_large_is_refused_by_its_announced_length(service: Service):
    head = (
        f"POST {SITES} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nContent-Length: 1048577\r\n\r\n"
    )
    with socket.create_connection((service.host, service.port), timeout=30) as connection:
        connection.sendall(head.encode())  # and not one byte of the body
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]


def test_a_body_that_is_too_large_is_refused_though_it_announces_nothing(service: Service):
    answer = service.ask("POST", SITES, iter_chunks(2 << 20), headers={"Transfer-Encoding": "chunked"})
    assert answer.status == 413


def test_a_body_that_does_not_come_is_not_waited_for_for_ever(service: Service, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("replica.api.routing.BODY_SECONDS", 0.3)
    head = (
        f"POST {SITES} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\nConnection: close\r\n"
        "Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
    )
    with socket.create_connection((service.host, service.port), timeout=30) as connection:
        connection.sendall(head.encode())
        assert b" 408 " in connection.recv(65536).split(b"\r\n")[0]


def iter_chunks(size: int) -> bytes:
    piece = b" " * 65536
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for _ in range(size // len(piece))) + b"0\r\n\r\n"


def test_bulk_takes_more_than_the_others(service: Service):
    replicas = [{"did": f"s:{'x' * 200}{i}", "size": 1, "checksums": {}} for i in range(9_000)]
    body = json.dumps({"endpoint": "NOWHERE", "replicas": replicas}).encode()
    assert len(body) > 2 << 20
    answer = service.ask("POST", "/api/v1/replicas", body)
    assert answer.status == 404, answer.body


def test_bulk_takes_ten_thousand_items_and_not_one_more(service: Service):
    body = {"dids": [f"s:{i}" for i in range(10_001)]}
    answer = service.ask("POST", "/api/v1/dids/s/d/contents", body)
    assert (answer.status, answer.json["field"]) == (400, "dids")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=1001", "limit"),
        ("limit=1e9", "limit"),
        ("limit=NaN", "limit"),
        ("limit=", "limit"),
        ("limit=5&limit=6", "limit"),
        ("limit[]=5", "limit[]"),
        ("sort=id;--", "sort"),
        ("cursor=forged", "cursor"),
        ("cursor=%00", "cursor"),
        ("cursor=%ff", ""),
    ],
)
def test_parameters_are_checked_like_bodies(service: Service, query: str, field: str):
    answer = service.ask("GET", f"{SITES}?{query}")
    assert (answer.status, answer.json["code"], answer.json["field"]) == (400, "invalid", field)


def test_a_parameter_where_there_is_none_is_refused(service: Service):
    assert service.ask("GET", "/api/v1/whoami?account=root").json["field"] == "account"


@pytest.mark.parametrize("rule", ["x", "-1", "1.0", "%31%00", str(2**63), "9" * 5000, "٣"])
def test_a_number_in_a_path_is_a_number(service: Service, rule: str):
    assert service.ask("GET", f"/api/v1/rules/{quote(rule, safe='%')}").status == 400


def test_what_is_not_there_is_a_problem_document_too(service: Service):
    for target in ("/", "/api/v1", "/api/v1/nothing", "/api/v2/sites", "/api/v1/sites/DESY/x", "/metrics", "//"):
        answer = service.ask("GET", target)
        assert (answer.status, answer.json["code"]) == (404, "not_found"), target


@pytest.mark.parametrize("method", ["PUT", "TRACE", "OPTIONS", "DELETE"])
def test_a_method_that_is_not_there_is_told_what_is(service: Service, method: str):
    answer = service.ask(method, SITES)
    assert (answer.status, answer.json["status"]) == (405, 405)
    assert answer.headers["Allow"] == "GET, POST"


def test_the_method_is_the_one_of_the_request_line(service: Service):
    answer = service.ask("GET", SITES, headers={"X-HTTP-Method-Override": "DELETE"})
    assert answer.status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /api/v1/sites HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"POST /api/v1/sites HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /api/v1/sites HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n{}",
        b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 400_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused_and_the_service_goes_on(service: Service, request_bytes: bytes):
    answer = service.raw(request_bytes)
    assert answer.startswith((b"HTTP/1.0 4", b"HTTP/1.1 4")), answer[:200]
    assert b"aiohttp" not in answer.lower() and b"python" not in answer.lower()
    assert service.ask("GET", "/healthz").status == 200


def test_answers_carry_a_number_and_no_version_and_are_kept_by_nobody(service: Service):
    for target in ("/healthz", "/api/v1/sites", "/nothing", "/api/v1/docs"):
        headers = service.ask("GET", target).headers
        assert headers["Server"] == "replica"
        assert len(headers["X-Request-Id"]) == 16
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
