"""The service itself: is it alive, can it work, who am I, what is there to ask."""

from __future__ import annotations

import functools

import msgspec
from aiohttp import web

from replica import wire
from replica.api.openapi import document, page
from replica.api.routing import Context, Routes
from rules.errors import Unavailable

routes = Routes("service", "The service itself.")
outside = Routes("health", "For whoever watches over the service.", base="")

#: Set when the service is to stop: it finishes what it has and takes no more.
STOPPING = web.AppKey("stopping", list[bool])
#: The description of the interface and its page, encoded.
DESCRIBED = web.AppKey("described", tuple[bytes, bytes])


@outside.get("/healthz", None)
async def alive(context: Context) -> wire.Health:
    """Tell that the process answers; looks at nothing else."""
    return wire.Health(status="ok")


@outside.get("/readyz", None)
async def ready(context: Context) -> wire.Health:
    """Tell that requests can be served: the database answers and has this release's schema."""
    if context.request.app[STOPPING]:
        raise Unavailable("the service is stopping", hint="ask another one")
    await context.work.check_now()
    return wire.Health(status="ready")


@routes.get("/whoami", "service.read")
async def whoami(context: Context) -> wire.Whoami:
    """Tell whose token this is."""
    actor = context.actor
    return wire.Whoami(account=actor.account, role=actor.role.value, site=actor.site)


@routes.get("/openapi.json", None)
async def openapi(context: Context) -> web.Response:
    """Describe the interface for programs: OpenAPI 3.1."""
    return web.Response(body=context.request.app[DESCRIBED][0], content_type="application/json")


@routes.get("/docs", None)
async def docs(context: Context) -> web.Response:
    """Describe the interface for people."""
    return web.Response(body=context.request.app[DESCRIBED][1], content_type="text/html", charset="utf-8")


@functools.cache
def described(version: str, nouns: tuple[Routes, ...]) -> tuple[bytes, bytes]:
    description = document(nouns, version)
    return msgspec.json.encode(description), page(description).encode()
