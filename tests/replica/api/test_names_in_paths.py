"""A DID's name is one segment of the path: what goes in at the client comes out at the catalogue, or is refused."""

import pytest

from replica import wire
from replica.client.calls import at
from rules.errors import Invalid
from rules.names import Did
from tests.service import Service

# Legal, and each of them something else to a proxy, a shell, SQL, HTML or a careless decoder.
LEGAL = [
    *("a/b", "a%2Fb", "a%252Fb", "a%2fb", "%2e%2e%2f", "..%c0%af", "%ff", "%00", "100%", "a+b", "a b", "a?b=c&d"),
    *("a#b", "a;b", "a:b:c", ":", "...", "~", "~root", "-rf", "--help", "run 1/a.h5", "$(id)", "`id`", "|id", "&"),
    *("*", "[a]", "{a,b}", "'", '"', "'--", "');DROP TABLE x;--", "_", "<svg onload=alert(1)>", "javascript:alert(1)"),
    *("{{7*7}}", "${7*7}", "%s%n", "{0.__class__}", "=1+1", "@SUM(1)", "é", "ﬁ", "．．／", "ß", "SS", "ı", "а"),
    *("日本語/データ", "\U0001f600", "\ufffd", "\U0001f600" * 60, "x" * 255, "/".join(["d"] * 500), "CON", "NUL.txt"),
    *("__proto__", "None", "null", "true", "NaN", "contents", "replicas", "plan"),
]
ILLEGAL = [
    *("", ".", "..", "a/../b", "a/./b", "a//b", "/a", "a/", "//srv/x", "a\n", "a\r\nSet-Cookie: x=1", "a\0b", "a\t"),
    *("\x1b[2J", " a", "a ", "a\\b", "..\\..\\x", "\u202e", "\u200b", "\u2028", "\ufeff", "x" * 256, "x/" * 600 + "x"),
    *("é" * 128, "\U0001f600" * 64, ".replica"),
]


@pytest.fixture
def scope(service: Service) -> str:
    return service.client().scopes.add("user.alice").name


def test_every_legal_name_comes_back_as_it_went(service: Service, scope: str):
    with service.client() as client:
        for name in LEGAL:
            made = client.dids.add(wire.NewDid(did=f"{scope}:{name}"))
            assert made.did == f"{scope}:{name}"
        for name in LEGAL:
            shown = client.dids.show(Did(scope, name))
            assert shown.did == f"{scope}:{name}"
            assert client.dids.change(shown.did, wire.DidChange(open=False)).did == shown.did
            assert list(client.dids.contents(shown.did)) == []
        assert {found.did for found in client.dids.list(scope)} == {f"{scope}:{name}" for name in LEGAL}


def test_a_name_far_too_long_is_refused_in_words(service: Service, scope: str):
    """By itself, aiohttp answers a request line above 8 KiB with a bare text."""
    for path in (at("dids", scope, "x" * 10_000), at("dids", scope, "\U0001f600" * 10_000), at("sites", "x" * 10_000)):
        raw = service.ask("GET", path)
        assert raw.status == 400
        assert raw.json["code"] == "invalid"
        assert raw.json["hint"]


def test_a_name_that_is_not_normalised_is_found_by_either_form(service: Service, scope: str):
    with service.client() as client:
        client.dids.add(wire.NewDid(did=f"{scope}:caf\u0065\u0301"))
        raw = service.ask("GET", at("dids", scope, "cafe\u0301"))
        assert raw.json["did"] == f"{scope}:caf\u00e9"
        assert client.dids.show(f"{scope}:cafe\u0301").did == f"{scope}:caf\u00e9"


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_name_is_refused_by_client_and_server(service: Service, scope: str, name: str):
    with pytest.raises(Invalid):
        service.client().dids.show(f"{scope}:{name}")
    answer = service.ask("GET", at("dids", scope, name))
    # Without a name, it is another path.
    assert answer.status == (400 if name else 404), answer.body
    assert b"Set-Cookie" not in str(answer.headers).encode()
    assert service.ask("POST", "/api/v1/dids", {"did": f"{scope}:{name}"}).status == 400


@pytest.mark.parametrize("scope", ["..", ".", "a/b", "", "x" * 65, "a b", "é", "a%2Fb", "a\n"])
def test_an_illegal_scope_is_refused(service: Service, scope: str):
    assert service.ask("GET", at("dids", scope, "name")).status in (400, 404)
    assert service.ask("POST", "/api/v1/scopes", {"name": scope}).status == 400


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/v1/dids/user.alice/%ff", 400),  # not UTF-8
        ("/api/v1/dids/user.alice/..%c0%af", 400),  # an overlong slash
        ("/api/v1/dids/user.alice/%ed%a0%80", 400),  # a lone surrogate
        ("/api/v1/dids/user.alice/a%00b", 400),
        ("/api/v1/dids/user.alice/../user.alice/name", 404),
        ("/api/v1/dids/user.alice/%2e%2e/name", 404),
        ("/api/v1/dids/x/../../dids/user.alice/name", 404),
        ("/api/v1/./dids/user.alice/name", 404),
        ("/api/v1//dids/user.alice/name", 404),
        ("/api/v1/%64ids/user.alice/name", 200),
        ("/api/v1/dids/user.alice/n%61me", 200),
    ],
)
def test_a_path_is_decoded_once_strictly_and_never_tidied(service: Service, scope: str, path: str, status: int):
    service.client().dids.add(wire.NewDid(did=f"{scope}:name"))
    answer = service.raw(
        f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\nConnection: close\r\n\r\n".encode()
    )
    assert int(answer.split(b" ")[1]) == status, answer


def test_a_whole_url_as_the_target_means_the_same(service: Service, scope: str):
    service.client().dids.add(wire.NewDid(did=f"{scope}:a/b"))
    head = f"Host: x\r\nAuthorization: Bearer {service.admin}\r\nConnection: close\r\n\r\n"
    answer = service.raw(f"GET {service.url}/api/v1/dids/{scope}/a%2Fb HTTP/1.1\r\n{head}".encode())
    assert answer.startswith(b"HTTP/1.1 200"), answer
