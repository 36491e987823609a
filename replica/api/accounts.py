"""Accounts over REST."""

from __future__ import annotations

from replica import wire
from replica.api.paging import Paging
from replica.api.routing import Context, Routes
from replica.catalog import accounts

routes = Routes("accounts", "Who may sign in, and in which role.")


@routes.post("/accounts", "account.write", status=201)
async def add(context: Context, body: wire.NewAccount) -> wire.Account:
    """Add an account."""
    return await context.write(accounts.add, body)


@routes.get("/accounts", "account.read")
async def list_(context: Context, query: Paging) -> wire.Page[wire.Account]:
    """List accounts."""
    return await context.read(accounts.list_page, query.cursor, query.limit)


@routes.get("/accounts/{account}", "account.read")
async def show(context: Context, account: str) -> wire.Account:
    """Show an account."""
    return await context.read(accounts.get, account)


@routes.post("/accounts/{account}/tokens", "account.write", status=201, keyed=False)
async def issue_token(context: Context, account: str) -> wire.AccountToken:
    """Make a token for an account.

    It is shown this once. It takes no Idempotency-Key: a kept answer would be a kept secret.
    """
    return await context.write(accounts.issue_key, account)
