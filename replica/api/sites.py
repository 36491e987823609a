"""Sites over REST."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging
from replica.api.routing import Context, Routes
from replica.catalog import sites

routes = Routes("sites", "Institutes, whose workers carry out transfers.")


@routes.post("/sites", "site.write", status=201)
async def add(context: Context, body: wire.NewSite) -> wire.Site:
    """Add a site."""
    return await context.write(sites.add, body)


@routes.get("/sites", "site.read")
async def list_(context: Context, query: Paging) -> wire.Page[wire.Site]:
    """List sites."""
    return await context.read(sites.list_page, query.cursor, query.limit)


@routes.get("/sites/{site}", "site.read")
async def show(context: Context, site: str) -> wire.Site:
    """Show a site."""
    return await context.read(sites.get, site)


@routes.post("/sites/{site}/tokens", "site.write", status=201, keyed=False)
async def issue_token(context: Context, site: str) -> wire.SiteToken:
    """Make a token for the site's workers.

    It is shown this once. It takes no Idempotency-Key: a kept answer would be a kept secret.
    """
    return await context.write(sites.issue_token, site)
