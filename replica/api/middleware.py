"""What holds for every request: a number, a known actor, a permitted action, an answer that says what is wrong.

Given     a request and the route that the router found for it.
Returns   the answer of the route, or a problem document.
Promises  deny by default: whatever is not a route of ours, declared public, needs a token and a permission. Identity
          comes from the token only. What is our own fault is logged with its story and answered with its number.
Partner   replica.auth says who asks, rules.permissions what they may, replica.api.errors how a refusal looks.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from http import HTTPStatus

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from replica.api import errors
from replica.api.routing import STARTED, Context, Facts, HttpRefusal, Route
from replica.api.work import Work
from replica.auth.bearer import RecentActors, token_of
from replica.catalog import accounts
from replica.log import cause_of, get_logger
from rules.errors import Broken, Invalid, NotAllowed, NotFound, ReplicaError
from rules.permissions import Actor, Denied, may

REQUEST_ID = web.RequestKey("request_id", str)

#: The only style there is, of the page that shows the interface; allowed by its hash.
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8888; }
code { font-family: ui-monospace, monospace; }
dt { margin-top: 1rem; } dd { margin-left: 2rem; }
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {
    hdrs.SERVER: "replica",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; frame-ancestors 'none'",
    hdrs.CACHE_CONTROL: "no-store",
}

log = get_logger()


async def headers(request: web.Request, response: web.StreamResponse) -> None:
    """Signal `on_response_prepare`."""
    response.headers.update(HEADERS)
    if REQUEST_ID in request:
        response.headers["X-Request-Id"] = request[REQUEST_ID]


@web.middleware
async def answering(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outer one: whatever happens below becomes an answer and one line in the log."""
    request_id = request[REQUEST_ID] = secrets.token_hex(8)
    began = time.perf_counter()
    with structlog.contextvars.bound_contextvars(request=request_id):
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = _of_http(request, error, request_id)
        except HttpRefusal as refusal:
            response = errors.answer(errors.problem_of(refusal.error, request_id, refusal.status))
        except Exception as error:  # noqa: BLE001 - the top: whatever it is, it becomes an answer and a story
            response = _of_failure(request, error, request_id)
        log.debug(
            "request.answered",
            method=request.method,
            path=request.rel_url.raw_path[:200],
            status=response.status,
            seconds=round(time.perf_counter() - began, 4),
        )
        return response


def guard(work: Work, facts: Facts) -> Middleware:
    """The inner one: who asks, and may they? Then the route."""
    recent = RecentActors()

    async def known(request: web.Request) -> Actor:
        token = token_of(request.headers.getall(hdrs.AUTHORIZATION, []))
        actor = recent.find(token)
        if actor is None:
            actor = await work.read(True, accounts.authenticate, token)
            recent.remember(token, actor)
        return actor

    @web.middleware
    async def guarding(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.http_exception is not None:
            raise request.match_info.http_exception
        route = getattr(request.match_info.handler, "__self__", None)
        if not isinstance(route, Route):
            raise NotFound("there is nothing here")  # not declared by us, so not served
        actor = None
        if route.action is not None:
            await work.check_schema()
            actor = await known(request)
            allowed = may(actor, route.action)
            if isinstance(allowed, Denied):
                raise NotAllowed(allowed.reason)
        return await route.serve(Context(request, work, facts, route, actor))

    return guarding


def _of_failure(request: web.Request, error: Exception, request_id: str) -> web.StreamResponse:
    started: web.StreamResponse | None = request.get(STARTED)
    if isinstance(error, ConnectionError | TimeoutError) and started is not None:
        log.info("stream.abandoned", path=request.rel_url.raw_path[:200])  # the reader went away or fell asleep
    elif not isinstance(error, ReplicaError) or isinstance(error, Broken):
        log.exception("request.broke", method=request.method, path=request.rel_url.raw_path[:200])
    elif errors.status_of(error) >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning(
            "request.failed",
            method=request.method,
            path=request.rel_url.raw_path[:200],
            error=error.message,
            cause=cause_of(error),
        )
    if started is not None:
        # The head is sent; the cut connection and the missing trailer have to tell.
        if request.transport is not None:
            request.transport.abort()
        return started
    return errors.answer(errors.problem_of(error, request_id))


def _of_http(request: web.Request, error: web.HTTPException, request_id: str) -> web.Response:
    """What aiohttp itself refuses: a path or a method that is not there, a request that is too large."""
    ours: ReplicaError = Invalid(error.reason)
    more: dict[str, str] = {}
    if error.status == HTTPStatus.NOT_FOUND:
        ours = NotFound("there is nothing here", hint="/api/v1/openapi.json lists what there is")
    elif isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        ours = Invalid(f"{error.method[:20]} is not possible here", hint=f"possible: {allowed}")
        more["Allow"] = allowed
    return errors.answer(errors.problem_of(ours, request_id, error.status), more)
