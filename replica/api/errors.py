"""Errors as problem documents (RFC 9457), by one table.

Given     an exception.
Returns   its status, its Problem, and the answer.
Promises  every class of rules.errors has a status, by itself or by its branch. What is our own fault says only that
          it happened and under which number the log tells of it: nothing internal leaves.
Partner   replica.client.problems reads the same documents backwards; a test walks every class there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from aiohttp import web

from replica import wire
from rules import errors
from rules.errors import Broken, InvalidExpression, ReplicaError

MEDIA_TYPE = "application/problem+json"
#: How long somebody should wait who met a 503.
RETRY_AFTER_SECONDS = 5

#: Class ↔ status. A class that is not here has the status of the nearest one above it.
STATUS: Mapping[type[ReplicaError], int] = {
    ReplicaError: 500,
    errors.Invalid: 400,
    errors.NotAuthenticated: 401,
    errors.NotAllowed: 403,
    errors.NotFound: 404,
    errors.AlreadyExists: 409,
    errors.Conflict: 409,
    errors.Refused: 422,
    errors.Unavailable: 503,
    # The server itself touches no storage; these are here for the day it does.
    errors.StorageError: 502,
    errors.Transient: 503,
    errors.Permanent: 502,
    errors.Broken: 500,
}


def status_of(error: ReplicaError) -> int:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def problem_of(error: BaseException, request_id: str, status: int | None = None) -> wire.Problem:
    """`status` where HTTP has a finer one than the class: 405, 413, 415."""
    if not isinstance(error, ReplicaError) or isinstance(error, Broken):
        return wire.Problem(
            type=_type(Broken.code),
            title=_title(Broken),
            status=500,
            detail=f"something went wrong inside Replica; its log tells of it under request {request_id}",
            code=Broken.code,
            hint="please report it with this number",
        )
    return wire.Problem(
        type=_type(error.code),
        title=_title(type(error)),
        status=status or status_of(error),
        detail=error.message,
        code=error.code,
        hint=error.hint,
        field=error.field,
        column=error.column if isinstance(error, InvalidExpression) else 0,
        items=list(error.items),
    )


def answer(problem: wire.Problem, headers: Mapping[str, str] | None = None) -> web.Response:
    more = dict(headers or {})
    if problem.status == HTTPStatus.UNAUTHORIZED:
        more["WWW-Authenticate"] = 'Bearer realm="replica"'
    if problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
        more["Retry-After"] = str(RETRY_AFTER_SECONDS)
    body = msgspec.json.encode(problem)
    return web.Response(body=body, status=problem.status, headers=more, content_type=MEDIA_TYPE)


def _type(code: str) -> str:
    return f"urn:replica:problem:{code}"


def _title(kind: type[ReplicaError]) -> str:
    return (kind.__doc__ or kind.__name__).strip().split("\n")[0].split("; ")[0].rstrip(".")
