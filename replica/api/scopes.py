"""Scopes over REST."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging
from replica.api.routing import Context, Routes
from replica.catalog import scopes

routes = Routes("scopes", "Who may give names.")


@routes.post("/scopes", "scope.write", status=201)
async def add(context: Context, body: wire.NewScope) -> wire.Scope:
    """Add a scope, owned by who asks."""
    return await context.write(scopes.add, context.actor, body)


@routes.get("/scopes", "scope.read")
async def list_(context: Context, query: Paging) -> wire.Page[wire.Scope]:
    """List scopes."""
    return await context.read(scopes.list_page, query.cursor, query.limit)


@routes.get("/scopes/{scope}", "scope.read")
async def show(context: Context, scope: str) -> wire.Scope:
    """Show a scope."""
    return await context.read(scopes.get, scope)
