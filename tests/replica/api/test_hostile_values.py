"""Whatever stands in a field, a parameter or a path: it is done or refused, and never our fault."""

import http.client
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from replica.api.app import NOUNS
from replica.api.routing import Route
from tests.service import Service

TEXTS = [
    *("", "..", "../../etc/passwd", "a\r\nSet-Cookie: x=1", "\x1b[2J", "%2e%2e%2f", "%00", "'", '"', "*", "\\", "&&"),
    *("');DROP TABLE dids;--", "<svg onload=alert(1)>", "{0.__class__}", "%s%n", "\u202e", "．．／", "e\u0301"),
    *("\U0001f600" * 300, "x" * 1_999, "s:" + "x" * 2_000, "s:d", "s:../x", "null", "NaN", "-1", "1e309", "9" * 40),
    *("file:///etc/passwd", "http://169.254.169.254/", "a=b=c", "(" * 5_000, "a|" * 4_000, "a>NaN", "a<1e999"),
]
VALUES = [
    *(None, True, -1, 1, 2**31, 2**63 - 1, 2**63, 10**40, 0.5, 1e300),
    *([], {}, [None], {"a'b": 1}, {"$where": "1"}, {"a": 10**40}, {"a": 1e300}, {"a": None}, {"a": ["x"]}),
    *({"x" * 200: 1}, {"a": "x" * 5_000}, {"ключ": "значение"}),
]
FOUND: dict[str, Any] = {"missing": [[1, 1, None]], "dark": [["s/x", 1, 0, ""]]}
CHECKED: dict[str, Any] = {
    **{"file": 1, "endpoint_id": 1, "epoch": 1, "outcome": "ok", "size": 1},
    **{"checksums": {"md5": "00" * 16}, "error": "", "message": ""},
}
SCRUBBED = {"endpoint_id": 1, "epoch": 1, "findings": [CHECKED], "over": True, "trouble": ""}
COMPARED = {"listed_files": 1, "listed_bytes": 1, "missing": 1, "dark": 1}
#: A request that would be done, for each route that takes a document.
GOOD: dict[str, dict[str, Any]] = {
    "POST /api/v1/sites": {"name": "GSI"},
    "POST /api/v1/endpoints": {
        "name": "GSI-DISK",
        "site": "DESY",
        "url": "file:///tmp/replica-hostile-gsi",
        "kind": "disk",
        "layout": "hash",
        "attributes": {"tier": 1},
        "capacity_bytes": 10,
    },
    "PATCH /api/v1/endpoints/{endpoint}": {
        "attributes": {"tier": 2},
        "readable": True,
        "writable": True,
        "deletable": True,
        "capacity_bytes": 10**12,
    },
    "POST /api/v1/endpoints/{endpoint}/space": {"free_bytes": 10**12},
    "POST /api/v1/scopes": {"name": "other"},
    "POST /api/v1/dids": {
        "did": "s:new",
        "kind": "dataset",
        "metadata": {"a": 1},
        "monotonic": False,
        "lifetime_seconds": 10**9,
    },
    "PATCH /api/v1/dids/{scope}/{name}": {"open": True, "monotonic": False, "lifetime_seconds": None},
    "PATCH /api/v1/dids/{scope}/{name}/metadata": {"set": {"a.b": 1}, "unset": ["a.c"]},
    "PATCH /api/v1/dids/metadata": {"changes": [{"did": "s:d", "set": {"a": 1}, "unset": ["b"]}]},
    "POST /api/v1/dids/attachments": {"attachments": [{"parent": "s:d", "children": ["s:f"]}]},
    "DELETE /api/v1/dids": {"dids": ["s:new"]},
    "POST /api/v1/dids/undelete": {"dids": ["s:new"]},
    "POST /api/v1/dids/{scope}/{name}/contents": {"dids": ["s:f"]},
    "DELETE /api/v1/dids/{scope}/{name}/contents": {"dids": ["s:f"]},
    "POST /api/v1/replicas": {
        "endpoint": "DESY-DISK",
        "replicas": [{"did": "s:f", "size": 1, "checksums": {"adler32": "00000001"}, "path": None}],
        "dataset": "s:d",
        "evidence": "hashed",
    },
    "POST /api/v1/rules": {
        "did": "s:d",
        "expression": "DESY-DISK",
        "copies": 1,
        "grouping": "dataset",
        "spread": "site",
        "weight": None,
        "source_expression": None,
        "lifetime_seconds": 60,
        "priority": 3,
        "activity": "default",
        "comment": "",
    },
    "POST /api/v1/orders/claim": {"worker": "w", "limit": 1, "limit_bytes": 1},
    "POST /api/v1/orders/heartbeat": {
        "worker": "w",
        "beats": [{"transfer": 1, "epoch": 1, "bytes_done": 0, "phase": "moving"}],
    },
    "POST /api/v1/orders/report": {
        "worker": "w",
        "outcomes": [
            {
                "transfer": 1,
                "epoch": 1,
                "outcome": "failed",
                "source_endpoint": "DESY-DISK",
                "size": 1,
                "checksums": {},
                "adopted": False,
                "verified_by": "read back",
                "seconds": 1,
                "error": "timed_out",
                "message": "",
                "side": "target",
                "retry_after_seconds": 1,
            }
        ],
    },
    "POST /api/v1/subscriptions": {
        "name": "x",
        "condition": "kind = dataset",
        "rules": [{"expression": "*", "copies": 1}],
        "comment": "",
        "lifetime_seconds": 10,
        "backfill": False,
    },
    "POST /api/v1/subscriptions/preview": {
        "name": "x",
        "condition": "kind = dataset",
        "rules": [{"expression": "*"}],
    },
    "PATCH /api/v1/subscriptions/{subscription}": {
        "condition": "kind = dataset",
        "rules": [{"expression": "*"}],
        "enabled": True,
        "comment": "",
        "lifetime_seconds": None,
    },
    "POST /api/v1/webhooks": {"name": "x", "url": "http://127.0.0.1:9/", "kinds": ["rule.*"]},
    "PATCH /api/v1/webhooks/{webhook}": {"enabled": True, "from_now": False},
    "POST /api/v1/accounts": {"name": "new", "role": "user"},
    "POST /api/v1/quotas": {"account": "root", "expression": "kind=disk", "limit_bytes": 10**15},
    "PATCH /api/v1/limits": {
        "kind": "link",
        "of": "DESY-DISK",
        "source": "GSI-DISK",
        "files_max": 2,
        "bytes_max": None,
    },
    "PATCH /api/v1/activities": {"name": "user", "weight": 3},
    "PATCH /api/v1/links": {"source": "GSI-DISK", "target": "DESY-DISK", "distance": 2, "allowed": True},
    "PATCH /api/v1/rules/{rule}": {
        "copies": 1,
        "expression": "DESY-DISK",
        "grouping": "dataset",
        "spread": "site",
        "weight": None,
        "source_expression": None,
        "lifetime_seconds": 10**6,
        "locked": False,
        "purge": False,
        "priority": 3,
        "activity": "default",
        "comment": "",
        "metadata": {"a": 1},
        "notify": None,
        "account": "root",
    },
    "POST /api/v1/rules/{rule}/move": {"expression": "DESY-DISK", "copies": 1},
    "POST /api/v1/rules/{rule}/suspend": {"comment": ""},
    "POST /api/v1/rules/{rule}/approve": {"comment": ""},
    "POST /api/v1/rules/{rule}/deny": {"comment": ""},
    "POST /api/v1/deletions": {"did": "s:f", "endpoint": "DESY-DISK", "last_copy": False},
    "POST /api/v1/orders/deletions/claim": {"worker": "w", "limit": 1},
    "POST /api/v1/orders/deletions/heartbeat": {"worker": "w", "beats": [{"deletion": 1, "epoch": 1}]},
    "POST /api/v1/orders/deletions/report": {
        "worker": "w",
        "outcomes": [
            {
                "deletion": 1,
                "epoch": 1,
                "outcome": "failed",
                "error": "timed_out",
                "message": "",
                "retry_after_seconds": 1,
            }
        ],
    },
    "POST /api/v1/scans": {
        "endpoint": "DESY-DISK",
        "accept_fraction": False,
        "listing": False,
        "listed_at": "2026-01-01T00:00:00Z",
    },
    "POST /api/v1/scans/known": {"scan": 1, "epoch": 1, "after": 0},
    "POST /api/v1/scans/found": {"scan": 1, "epoch": 1, **FOUND},
    "POST /api/v1/scans/compared": {"scan": 1, "epoch": 1, **COMPARED},
    "POST /api/v1/scans/failed": {"scan": 1, "epoch": 1, "given_back": False, "message": ""},
    "POST /api/v1/orders/scans/claim": {"worker": "w"},
    "POST /api/v1/orders/scans/heartbeat": {"scan": 1, "epoch": 1, "phase": "listing", "files": 1},
    "POST /api/v1/orders/scans/known": {"scan": 1, "epoch": 1, "after": 0},
    "POST /api/v1/orders/scans/found": {"scan": 1, "epoch": 1, **FOUND},
    "POST /api/v1/orders/scans/compared": {"scan": 1, "epoch": 1, **COMPARED},
    "POST /api/v1/orders/scans/probed": {
        "scan": 1,
        "epoch": 1,
        "outcomes": [{"finding": 1, "outcome": "missing", "message": ""}],
    },
    "POST /api/v1/orders/scans/failed": {"scan": 1, "epoch": 1, "given_back": False, "message": ""},
    "POST /api/v1/orders/scans/dark": {
        "outcomes": [{"finding": 1, "epoch": 1, "outcome": "removed", "message": ""}],
    },
    "POST /api/v1/replicas/doubted": {
        "replicas": [{"did": "s:f", "endpoint": "DESY-DISK", "reason": "it was wrong"}],
    },
    "POST /api/v1/replicas/bad": {"endpoint": "DESY-DISK", "dids": ["s:f"], "reason": "dust", "repair": False},
    "POST /api/v1/replicas/good": {"endpoint": "DESY-DISK", "dids": ["s:f"]},
    "POST /api/v1/replicas/repair": {"did": "s:f", "endpoint": "DESY-DISK"},
    "PATCH /api/v1/scrubs/{endpoint}": {
        **{"depth": "deep", "bytes_per_second": 1, "files_per_second": 1.0, "period_seconds": 1},
        **{"guard_fraction": 0.5, "resume": False, "now": False},
    },
    "POST /api/v1/orders/checks/claim": {"worker": "w", "limit": 1},
    "POST /api/v1/orders/checks/heartbeat": {
        "worker": "w",
        "probes": [{"file": 1, "endpoint_id": 1, "epoch": 1}],
        "scrub": [1, 1],
    },
    "POST /api/v1/orders/checks/report": {"worker": "w", "probes": [CHECKED], "scrub": SCRUBBED},
    # Last, as nothing goes to the endpoint afterwards.
    "POST /api/v1/endpoints/{endpoint}/ban": {"reason": "dust", "read": True, "write": True, "delete": True},
    "POST /api/v1/endpoints/{endpoint}/drain": {"reason": "dust", "undo": False},
    "POST /api/v1/endpoints/{endpoint}/decommission": {"forget": True, "last_copies": True, "undo": False},
}
#: Those of a plan are those of the act.
PLANS = {
    "POST /api/v1/rules/plan": "POST /api/v1/rules",
    "POST /api/v1/rules/{rule}/plan": "PATCH /api/v1/rules/{rule}",
    "POST /api/v1/rules/{rule}/move/plan": "POST /api/v1/rules/{rule}/move",
}
GOOD |= {plan: GOOD[act] for plan, act in PLANS.items()}
ROUTES = {f"{route.method} {route.path}": route for noun in NOUNS for route in noun.all}
#: The same everywhere: tried once.
PAGING = {"limit", "cursor"}
REFUSALS = {400, 404, 409, 422}


class Wire:
    """One kept connection: this asks a great many things."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._connection = http.client.HTTPConnection(service.host, service.port, timeout=60)

    def ask(self, route: Route, target: str, body: bytes | None = None) -> tuple[int, bytes]:
        token = self._service.worker if route.quick else self._service.admin
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection.request(route.method, target, body, headers)
        response = self._connection.getresponse()
        return response.status, response.read()


@pytest.fixture
def wire(service_on_both: Service) -> Wire:
    wire = Wire(service_on_both)
    for name in ("POST /api/v1/scopes", "POST /api/v1/dids", "POST /api/v1/endpoints", "POST /api/v1/replicas"):
        body = json.dumps(
            GOOD[name]
            | {"POST /api/v1/scopes": {"name": "s"}, "POST /api/v1/dids": {"did": "s:d"}}.get(name, {})
            | ({"name": "DESY-DISK", "url": "file:///tmp/replica-hostile-desy"} if "endpoints" in name else {})
        )
        status, answer = wire.ask(ROUTES[name], ROUTES[name].path, body.encode())
        assert status == 201, answer
    return wire


def target(route: Route) -> str:
    words = {
        "{scope}": "s",
        "{name}": "d",
        "{endpoint}": "DESY-DISK",
        "{site}": "DESY",
        "{rule}": "1",
        "{transfer}": "1",
    }
    path = route.path
    for word, value in words.items():
        path = path.replace(word, value)
    return path


def changed(document: Any) -> Iterator[Any]:
    """The document with each of its values, and those within them, replaced by each hostile one; and one field more."""
    if isinstance(document, dict):
        yield document | {"is_admin": True, "id": 1}
        for key, value in document.items():
            # Where a number belongs, one text is as wrong as another.
            for hostile in (*VALUES, *(TEXTS if isinstance(value, str | None) else TEXTS[:3])):
                yield document | {key: hostile}
            for inner in changed(value):
                yield document | {key: inner}
    elif isinstance(document, list):
        for inner in changed(document[0]):
            yield [inner]


def test_every_route_that_takes_a_document_is_here():
    assert set(GOOD) == {name for name, route in ROUTES.items() if route.body is not None}


def test_in_a_document(wire: Wire):
    for name, good in GOOD.items():
        if name in PLANS:
            continue
        route = ROUTES[name]
        for document in changed(good):
            status, answer = wire.ask(route, target(route), json.dumps(document).encode())
            assert status in REFUSALS | {route.status}, (name, document, answer)
            if status in REFUSALS:
                problem = json.loads(answer)
                assert problem["code"] != "broken" and len(problem["detail"]) < 1_000, (name, document, answer)


def test_in_a_parameter(wire: Wire):
    for name, route in ROUTES.items():
        fields = msgspec.structs.fields(route.query) if route.query is not None else ()
        for field in fields:
            if field.name in PAGING and not name.endswith("/sites"):
                continue
            needed = "scope=s&" if any(f.name == "scope" for f in fields) and field.name != "scope" else ""
            for text in (*TEXTS, *map(str, VALUES)):
                question = f"{needed}{field.name}={quote(text[:3_000], safe='')}"
                status, answer = wire.ask(route, f"{target(route)}?{question}")
                assert status in REFUSALS | {200}, (name, question, answer)


def test_in_a_path(wire: Wire):
    for name, route in ROUTES.items():
        body = json.dumps(GOOD[name]).encode() if name in GOOD else None
        for text in TEXTS if route.parameters else ():
            path = re.sub(r"{\w+}", lambda _: quote(text[:1_500], safe=""), route.path)  # noqa: B023 - used at once
            status, answer = wire.ask(route, path, body)
            assert status in REFUSALS | {405}, (name, text, answer)
