"""The interface described by itself: OpenAPI 3.1, and a page to read it.

Given     the routes.
Returns   the document as a dict; the page as HTML without script, style or asset from elsewhere.
Promises  nothing is written twice: types, bounds, summaries and actions are those that the routes enforce.
Partner   replica.api.service serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

from replica import wire
from replica.api.errors import MEDIA_TYPE
from replica.api.middleware import STYLE
from replica.api.routing import BODY_MAX, BULK_BODY_MAX, MIB, NDJSON, Route, Routes
from rules.names import Did

_REFERENCE = "#/components/schemas/{name}"
_ABOUT = f"""\
Declares where good copies of research data must exist, and keeps it true.

A request is JSON in UTF-8 of at most {BODY_MAX // MIB} MiB ({BULK_BODY_MAX // MIB} MiB for bulk). Unknown fields, \
unknown parameters and keys given twice are errors. Integers are written without a fraction (`3`, not `3.0`). \
A DID's name is one segment of the path, percent-encoded (`/` as `%2F`, `%` as `%25`).

A list gives `next`, the cursor of its following part. An NDJSON stream ends with the line `{{"end":true,"count":n}}`; \
one without it was cut off.

A POST that creates takes an `Idempotency-Key`: sent again with the same key, it answers the same and does nothing. \
Errors are problem documents (RFC 9457); `code` tells them apart."""
_STATUS = {200: "As asked.", 201: "Made.", 204: "Done."}


def document(nouns: Sequence[Routes], version: str) -> dict[str, Any]:
    routes = [route for noun in nouns for route in noun.all]
    kinds: list[Any] = [wire.Problem]
    for route in routes:
        kinds += [kind for kind in (route.body, route.answer, route.lines) if kind is not None and kind not in kinds]
    references, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    schema_of = dict(zip(map(str, kinds), references, strict=True))
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Replica",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": noun.noun, "description": noun.about} for noun in nouns],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "responses": {
                "Problem": {
                    "description": "What is wrong, why, and what to do.",
                    "content": {MEDIA_TYPE: {"schema": schema_of[str(wire.Problem)]}},
                }
            },
        },
    }


def _operation(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route.answer is not None:
        content["application/json"] = {"schema": schema_of[str(route.answer)]}
    if route.lines is not None:
        content[NDJSON] = {"schema": schema_of[str(route.lines)]}
    success: dict[str, Any] = {"description": _STATUS[route.status]} | ({"content": content} if content else {})
    operation: dict[str, Any] = {
        "operationId": f"{route.noun}_{getattr(route.handler, '__name__', '')}",
        "summary": route.summary,
        "tags": [route.noun],
        "parameters": _parameters(route),
        "responses": {str(route.status): success}
        | {str(status): {"$ref": "#/components/responses/Problem"} for status in _refusals(route)},
    }
    if route.description:
        operation["description"] = route.description
    if route.action is None:
        operation["security"] = []
    else:
        operation["x-action"] = route.action
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema_of[str(route.body)]}},
        }
    return operation


def _refusals(route: Route) -> list[int]:
    refusals = {500, 503}
    if route.action is not None:
        refusals |= {401, 403}
    if route.parameters:
        refusals |= {400, 404}
    if route.query is not None:
        refusals |= {400}
    if route.method != "GET":
        refusals |= {404, 409, 422}
    if route.body is not None:
        refusals |= {400, 408, 413, 415}
    return sorted(refusals)


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, kind in route.parameters.items():
        if kind is Did:
            found += [
                _parameter("path", "scope", {"type": "string", "maxLength": 64}),
                _parameter("path", "name", {"type": "string", "maxLength": 1024}),
            ]
        elif kind is int:
            found.append(_parameter("path", name, {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}))
        else:
            found.append(_parameter("path", name, {"type": "string", "maxLength": 64}))
    if route.query is not None:
        fields = msgspec.json.schema_components([route.query], ref_template=_REFERENCE)[1][route.query.__name__]
        for name, schema in fields["properties"].items():
            # An absent parameter is how a query says null.
            options = [option for option in schema.get("anyOf", []) if option != {"type": "null"}]
            if options:
                schema = options[0] if len(options) == 1 else {"anyOf": options}
            if schema.get("default", "") is None:
                del schema["default"]
            found.append(_parameter("query", name, schema, required=name in fields.get("required", ())))
    if route.keyed:
        key = {"type": "string", "minLength": 1, "maxLength": 200}
        found.append(_parameter("header", "Idempotency-Key", key, required=False))
    return found


def _parameter(where: str, name: str, schema: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": where, "required": required, "schema": schema}


def page(described: dict[str, Any]) -> str:
    """The document for eyes."""
    parts = [f"<h1>{escape(described['info']['title'])} {escape(described['info']['version'])}</h1>"]
    parts += [f"<p>{escape(text)}</p>" for text in described["info"]["description"].split("\n\n")]
    parts.append('<p>For programs: <a href="openapi.json">openapi.json</a></p>')
    for tag in described["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2><p>{escape(tag['description'])}</p><dl>")
        for path, operations in described["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    parts.append(_entry(method, path, operation))
        parts.append("</dl>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Replica: REST</title>'
        f"<style>{STYLE}</style>{''.join(parts)}</html>"
    )


def _entry(method: str, path: str, operation: dict[str, Any]) -> str:
    words = [parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"]
    query = "?" + "&".join(f"{word}=" for word in words) if words else ""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    facts = [operation["summary"], operation.get("description", "")]
    if body:
        facts.append(f"Body: {body.get('$ref', '').rpartition('/')[2]}.")
    facts.append(f"Needs: {operation['x-action']}." if "x-action" in operation else "Public.")
    text = " ".join(fact for fact in facts if fact)
    return f"<dt><code>{method.upper()} {escape(path + query)}</code></dt><dd>{escape(text)}</dd>"
