"""Deny by default: every route of the running service is walked, and lets in whom the table of permissions names."""

import pytest

from replica.api.app import NOUNS, create_app
from replica.api.routing import Route
from replica.db.engine import Database
from rules.permissions import ACTIONS, Actor, Role, may
from tests.service import SITE, Service, serving

PUBLIC = {"/healthz", "/readyz", "/api/v1/openapi.json", "/api/v1/docs"}
ROUTES = [route for noun in NOUNS for route in noun.all]
PRIVATE = [route for route in ROUTES if route.action is not None]
ACTORS = {
    "admin": Actor("root", Role.ADMIN),
    "user": Actor("alice", Role.USER),
    "worker": Actor("root", Role.SITE, SITE),
}


def target(route: Route) -> str:
    return route.path.replace("{scope}", "s").replace("{name}", "n").replace("{", "").replace("}", "")


def name(route: Route) -> str:
    return f"{route.method} {route.path}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    from replica.db import schema

    database = Database(f"sqlite:///{tmp_path_factory.mktemp('routes') / 'replica.db'}")
    schema.migrate(database)
    with serving(database) as running:
        yield running
    database.close()


def test_the_router_knows_our_routes_and_no_others(sqlite_url: str):
    database = Database(sqlite_url)
    served = create_app(database).router.routes()
    known = {(route.method, getattr(route.handler, "__self__", None)) for route in served}
    assert known == {(route.method, route) for route in ROUTES}
    database.close()


def test_every_route_names_an_action_of_the_table_or_is_meant_to_be_public():
    assert {route.path for route in ROUTES if route.action is None} == PUBLIC
    assert {route.action for route in PRIVATE} <= ACTIONS
    assert all(route.method == "GET" for route in ROUTES if route.action is None)


def test_no_route_that_changes_something_asks_for_a_reading_action_only():
    reading = {f"{route.method} {route.path}" for route in PRIVATE if str(route.action).endswith(".read")}
    assert {each for each in reading if not each.startswith("GET")} == set()
    assert {name(r) for r in PRIVATE if r.method == "GET" and not str(r.action).endswith(".read")} == set()


def test_every_route_says_what_it_does():
    assert [name(route) for route in ROUTES if not route.summary.endswith(".")] == []


@pytest.mark.parametrize("route", [r for r in ROUTES if r.action is None], ids=name)
def test_a_public_route_asks_nobody_who_he_is(service: Service, route: Route):
    assert service.ask(route.method, route.path, token=None).status == 200
    assert service.ask(route.method, route.path, token="rpl_wrong").status == 200


@pytest.mark.parametrize("route", PRIVATE, ids=name)
def test_nobody_gets_in_without_a_token_that_is_known(service: Service, route: Route):
    worn = service.admin[:-1] + ("a" if service.admin[-1] != "a" else "b")
    for headers in (
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer rpl_wrong"},
        {"Authorization": f"Bearer {worn}"},
        {"Authorization": f"Basic {service.admin}"},
        {"Authorization": service.admin},
        {"Authorization": f"Bearer {service.admin} x"},
        {"Authorization": f"Bearer {'x' * 5_000}"},
        {"Authorization": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJyb290In0."},
        {"Authorization": "Bearer ' OR 1=1--"},
        {"Authorization": "Bearer \xe9\xff"},
        {"X-Rucio-Account": "root", "X-Rucio-Auth-Token": service.admin},
        {"Cookie": f"token={service.admin}"},
        {"X-Forwarded-For": "127.0.0.1"},
    ):
        answer = service.ask(route.method, target(route), token=None, headers=headers)
        assert answer.status == 401, headers
        assert answer.json["code"] == "not_authenticated"
        assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert service.ask(route.method, f"{target(route)}?access_token={service.admin}", token=None).status == 401


@pytest.mark.parametrize("route", PRIVATE, ids=name)
def test_who_is_known_gets_in_exactly_where_the_table_says(service: Service, route: Route):
    for role, actor in ACTORS.items():
        answer = service.ask(route.method, target(route), token=role)
        if may(actor, str(route.action)):
            assert answer.status not in (401, 403, 500), (role, answer.body)
        else:
            assert (answer.status, answer.json["code"]) == (403, "not_allowed"), role


def test_the_table_keeps_workers_away_from_everything_but_their_orders(service: Service):
    """Spelt out, so that the table cannot change without somebody reading this."""
    open_to_workers = {name(route) for route in PRIVATE if may(ACTORS["worker"], str(route.action))}
    assert open_to_workers == {
        "GET /api/v1/whoami",
        "POST /api/v1/orders/claim",
        *(f"POST /api/v1/orders/scans/{what}" for what in ("claim", "heartbeat", "known", "found", "compared")),
        *(f"POST /api/v1/orders/scans/{what}" for what in ("probed", "failed", "dark")),
        "POST /api/v1/orders/heartbeat",
        "POST /api/v1/orders/report",
        "POST /api/v1/orders/deletions/claim",
        "POST /api/v1/orders/deletions/heartbeat",
        "POST /api/v1/orders/deletions/report",
        "POST /api/v1/orders/checks/claim",
        "POST /api/v1/orders/checks/heartbeat",
        "POST /api/v1/orders/checks/report",
        "POST /api/v1/endpoints/{endpoint}/space",
        # Of replicas at endpoints of its own site only: see replica.catalog.verdicts.
        "POST /api/v1/replicas/bad",
        "POST /api/v1/replicas/good",
        "POST /api/v1/replicas/repair",
    }


def test_two_authorization_headers_are_none(service: Service):
    request = (
        "GET /api/v1/whoami HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {service.admin}\r\nAuthorization: Bearer {service.user}\r\n\r\n"
    )
    assert service.raw(request.encode()).startswith(b"HTTP/1.1 401")


def test_who_asks_is_decided_by_the_token_and_by_nothing_else(service: Service):
    headers = {"X-Rucio-Account": "root", "X-Replica-Site": "GSI", "X-Forwarded-User": "root"}
    assert service.ask("GET", "/api/v1/whoami", token="user", headers=headers).json == {
        "account": "alice",
        "role": "user",
        "site": None,
    }
    claim = {"worker": "w", "site": "GSI"}
    assert service.ask("POST", "/api/v1/orders/claim", claim, token="worker").json["field"] == "site"
    assert service.ask("POST", "/api/v1/sites", {"name": "GSI", "account": "root"}, token="admin").status == 400
