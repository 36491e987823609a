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
    return await context.write(endpoints.add, body)


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
    """Change attributes, abilities or capacity of an endpoint."""
    return await context.write(endpoints.change, endpoint, body)


@routes.post("/endpoints/{endpoint}/space", "orders.work")
async def report_space(context: Context, endpoint: str, body: wire.Space) -> None:
    """Tell how much is free, as a worker of the endpoint's site."""
    await context.write(at_site, context.site, endpoints.report_space, endpoint, body.free_bytes)
