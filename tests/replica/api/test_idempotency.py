"""A POST that creates, sent twice under one Idempotency-Key, has one effect and one answer."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from replica.db import tables
from replica.db.engine import Database
from tests.service import Answer, Service

SITES = "/api/v1/sites"


def post(service: Service, body: object, key: str, target: str = SITES, token: str = "admin") -> Answer:
    return service.ask("POST", target, body, token, {"Idempotency-Key": key})


def count(db: Database, table: sa.Table) -> int:
    with db.read() as s:
        return int(s.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


def test_the_second_gets_the_answer_of_the_first(service_on_both: Service):
    first, second = (post(service_on_both, {"name": "GSI"}, "k1") for _ in range(2))
    assert (first.status, second.status) == (201, 201)
    assert first.body == second.body
    assert [site.name for site in service_on_both.client().sites.list()] == ["DESY", "GSI"]


def test_without_a_key_the_second_is_told_what_is_there(service: Service):
    assert service.ask("POST", SITES, {"name": "GSI"}).status == 201
    answer = service.ask("POST", SITES, {"name": "GSI"})
    assert (answer.status, answer.json["code"]) == (409, "already_exists")


def test_a_key_belongs_to_one_request(service_on_both: Service):
    assert post(service_on_both, {"name": "GSI"}, "k1").status == 201
    other_body = post(service_on_both, {"name": "HZDR"}, "k1")
    other_path = post(service_on_both, {"name": "GSI"}, "k1", "/api/v1/scopes")
    for answer in (other_body, other_path):
        assert (answer.status, answer.json["code"]) == (422, "refused")
    assert [site.name for site in service_on_both.client().sites.list()] == ["DESY", "GSI"]


def test_a_key_belongs_to_one_account(service: Service):
    assert post(service, {"name": "mine"}, "k1", "/api/v1/scopes", "admin").json["account"] == "root"
    assert post(service, {"name": "his"}, "k1", "/api/v1/scopes", "user").json["account"] == "alice"


def test_what_failed_is_done_again_under_the_same_key(service: Service):
    endpoint = {"name": "GSI-DISK", "site": "GSI", "url": "file:///tmp/gsi-disk"}
    assert post(service, endpoint, "k1", "/api/v1/endpoints").status == 404
    assert service.ask("POST", SITES, {"name": "GSI"}).status == 201
    assert post(service, endpoint, "k1", "/api/v1/endpoints").status == 201


@pytest.mark.parametrize("key", ["", "x" * 201, "a\tb", "\xe9", "x" * 5_000])
def test_a_key_that_cannot_be_one_is_refused(service: Service, key: str):
    answer = post(service, {"name": "GSI"}, key)
    assert (answer.status, answer.json["code"]) == (400, "invalid")


def test_two_keys_in_one_request_are_refused(service: Service):
    body = b'{"name": "GSI"}'
    request = (
        f"POST {SITES} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.admin}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Idempotency-Key: a\r\nIdempotency-Key: b\r\n\r\n"
    )
    assert service.raw(request.encode() + body).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("times", [12])
def test_of_many_at_the_same_moment_one_has_the_effect_and_all_get_its_answer(
    db: Database, service_on_both: Service, times: int
):
    with service_on_both.client() as client:
        client.scopes.add("s")
    with ThreadPoolExecutor(times) as pool:
        answers = list(pool.map(lambda _: post(service_on_both, {"did": "s:d"}, "k1", "/api/v1/dids"), range(times)))
        assert {(a.status, a.body) for a in answers} == {(201, answers[0].body)}
        wish = {"did": "s:d", "expression": "*", "copies": 1}
        service_on_both.ask(
            "POST", "/api/v1/endpoints", {"name": "DESY-DISK", "site": "DESY", "url": "file:///tmp/desy-disk"}
        )
        answers = list(pool.map(lambda _: post(service_on_both, wish, "k2", "/api/v1/rules"), range(times)))
    assert {(a.status, a.body) for a in answers} == {(201, answers[0].body)}
    assert count(db, tables.rules) == 1
    assert count(db, tables.idempotency_keys) == 3  # of the scope, the dataset, the rule


def test_a_secret_is_never_kept_to_be_told_again(db: Database, service_on_both: Service):
    first, second = (post(service_on_both, None, "k1", "/api/v1/sites/DESY/tokens") for _ in range(2))
    assert first.status == second.status == 201
    assert first.json["token"] != second.json["token"]
    assert count(db, tables.idempotency_keys) == 0


def test_a_key_has_no_meaning_where_nothing_is_made(db: Database, service_on_both: Service):
    service_on_both.client().scopes.add("s")
    before = count(db, tables.idempotency_keys)
    post(service_on_both, {"did": "s:d", "expression": "*"}, "k1", "/api/v1/rules/plan")
    assert count(db, tables.idempotency_keys) == before
