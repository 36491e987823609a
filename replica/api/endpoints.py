"""Endpoints over REST."""

from __future__ import annotations

from replica import wire
from replica.api.at_site import at_site
from replica.api.paging import Paging, Word
from replica.api.routing import Context, Routes
from replica.catalog import endpoints

routes = Routes("endpoints", "The places that store.")


class Selection(Paging):
    #: An endpoint expression.
    where: Word | None = None


@routes.post("/endpoints", "endpoint.write", status=201)
async def add(context: Context, body: wire.NewEndpoint) -> wire.Endpoint:
    """Add an endpoint."""
    return await context.write(endpoints.add, body, context.actor)


@routes.get("/endpoints", "endpoint.read")
async def list_(context: Context, query: Selection) -> wire.Page[wire.Endpoint]:
    """List endpoints, or those that an expression selects."""
    return await context.read(endpoints.list_page, query.where, query.cursor, query.limit)


@routes.get("/endpoints/{endpoint}", "endpoint.read")
async def show(context: Context, endpoint: str) -> wire.Endpoint:
    """Show an endpoint."""
    return await context.read(endpoints.get, endpoint)


@routes.patch("/endpoints/{endpoint}", "endpoint.write")
async def change(context: Context, endpoint: str, body: wire.EndpointChange) -> wire.Endpoint:
    """Change attributes, abilities, capacity or how an endpoint is cleaned up."""
    return await context.write(endpoints.change, endpoint, body, context.actor)


@routes.post("/endpoints/{endpoint}/ban", "endpoint.write")
async def ban(context: Context, endpoint: str, body: wire.Ban) -> wire.Endpoint:
    """Switch reading, writing or deleting off, and say why."""
    return await context.write(endpoints.ban, endpoint, body, context.actor)


@routes.post("/endpoints/{endpoint}/unban", "endpoint.write")
async def unban(context: Context, endpoint: str) -> wire.Endpoint:
    """Switch reading, writing and deleting on again."""
    return await context.write(endpoints.unban, endpoint, context.actor)


@routes.post("/endpoints/{endpoint}/drain", "endpoint.write")
async def drain(context: Context, endpoint: str, body: wire.Drain) -> wire.Endpoint:
    """Bring elsewhere what is protected at an endpoint, or stop doing so."""
    return await context.write(endpoints.drain, endpoint, body, context.actor)


@routes.post("/endpoints/{endpoint}/decommission", "endpoint.write")
async def decommission(context: Context, endpoint: str, body: wire.Decommission) -> wire.Endpoint:
    """Take an endpoint out of service for good."""
    return await context.write(endpoints.decommission, endpoint, body, context.actor)


class Ways(Paging):
    source: Word | None = None
    target: Word | None = None


@routes.get("/links", "endpoint.read")
async def links(context: Context, query: Ways) -> wire.Page[wire.Link]:
    """List what is known of the ways between endpoints."""
    return await context.read(
        endpoints.list_links, source=query.source, target=query.target, cursor=query.cursor, limit=query.limit
    )


@routes.patch("/links", "endpoint.write")
async def set_link(context: Context, body: wire.LinkChange) -> wire.Link:
    """Set the distance from one endpoint to another, or forbid the way."""
    return await context.write(endpoints.set_link, body, context.actor)


@routes.post("/endpoints/{endpoint}/space", "orders.work")
async def report_space(context: Context, endpoint: str, body: wire.Space) -> None:
    """Tell how much is free, as a worker of the endpoint's site."""
    await context.write(at_site, context.site, endpoints.report_space, endpoint, body.free_bytes)
