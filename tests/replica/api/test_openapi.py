"""The interface describes itself, from the facts that it enforces."""

import base64
import hashlib
import re

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from replica.api.app import NOUNS
from tests.service import Service

ROUTES = [route for noun in NOUNS for route in noun.all]


@pytest.fixture(scope="module")
def service(shared_service: Service) -> Service:
    return shared_service


def test_the_document_is_valid_openapi_3_1(service: Service):
    answer = service.ask("GET", "/api/v1/openapi.json", token=None)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.json["openapi"].startswith("3.1")
    assert [error.message for error in OpenAPIV31SpecValidator(answer.json).iter_errors()] == []


def test_every_route_is_in_it_with_its_action_its_answer_and_its_problems(service: Service):
    described = service.ask("GET", "/api/v1/openapi.json", token=None).json
    names = set()
    for route in ROUTES:
        operation = described["paths"][route.path][route.method.lower()]
        names.add(operation["operationId"])
        assert operation["summary"]
        assert operation.get("x-action") == route.action
        assert operation.get("security") == ([] if route.action is None else None)
        assert str(route.status) in operation["responses"]
        assert ("401" in operation["responses"]) == (route.action is not None)
        declared = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert declared == set(re.findall(r"{(\w+)}", route.path))
        assert ("requestBody" in operation) == (route.body is not None)
        keys = [p for p in operation["parameters"] if p["name"] == "Idempotency-Key"]
        assert bool(keys) == route.keyed
    assert len(names) == len(ROUTES)
    assert sum(len(operations) for operations in described["paths"].values()) == len(ROUTES)


def test_bounds_and_unknown_fields_are_in_the_document(service: Service):
    schemas = service.ask("GET", "/api/v1/openapi.json", token=None).json["components"]["schemas"]
    assert schemas["NewRule"]["additionalProperties"] is False
    assert schemas["NewRule"]["properties"]["copies"] == {"type": "integer", "minimum": 1, "maximum": 100, "default": 1}
    assert "additionalProperties" not in schemas["Rule"]


def test_the_page_needs_nothing_from_elsewhere_and_names_every_route(service: Service):
    answer = service.ask("GET", "/api/v1/docs", token=None)
    page = answer.body.decode()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "<script" not in page and "http://" not in page and "https://" not in page and "style=" not in page
    for route in ROUTES:
        assert f"{route.method} {route.path}" in page
    style = page.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in answer.headers["Content-Security-Policy"]
