"""`replica quota` and `replica usage`: how much accounts may hold where, and what they hold.

Given     an account and an endpoint expression.
Returns   limits with what is used and left; what is held, now and over time.
Partner   replica.client.quotas; rules.expressions are what both speak of.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from replica.cli.common import SIZE, Command, Group, connected, output, pointing
from replica.cli.output import Column, size_column

COLUMNS = (
    Column("id", "id"),
    Column("account", "account"),
    Column("where", "expression"),
    size_column("limit", "limit_bytes"),
    size_column("used", "used_bytes"),
    size_column("left", "left_bytes"),
    size_column("over", "over_bytes"),
    Column("endpoints", "endpoints"),
)

HELD = (
    Column("account", "account"),
    Column("endpoint", "endpoint"),
    Column("files", "files"),
    size_column("size", "bytes"),
)


@click.group(cls=Group)
def quota() -> None:
    """Quotas: how much an account may hold at endpoints, taken together."""


@quota.command("set")
@click.argument("account")
@click.argument("expression")
@click.argument("limit", type=SIZE)
def set_(account: str, expression: str, limit: int) -> None:
    """Let ACCOUNT hold at most LIMIT at all endpoints together that EXPRESSION selects, for example 'kind=disk' 10TB.

    Where several quotas select an endpoint, all of them must have room; where none does, nothing is limited.
    """
    from replica import wire

    if limit < 0:
        raise click.UsageError("a limit is a size; `replica quota remove` takes it away")
    with connected() as client, pointing(expression=expression):
        found = client.quotas.set(wire.NewQuota(account=account, expression=expression, limit_bytes=limit))
    output().one(found, [(column.title, column.text(found)) for column in COLUMNS])


@quota.command("list")
@click.option("--account", help="Only those of this account.")
def list_(account: str | None) -> None:
    """List quotas with what is used and left."""
    with connected() as client:
        output().many(client.quotas.list(account), COLUMNS, nothing="there are no quotas: nothing is limited")


@quota.command()
@click.argument("account")
def show(account: str) -> None:
    """Show what ACCOUNT may hold, and what is used and left of that."""
    with connected() as client:
        client.accounts.show(account)
        nothing = f"{account} has no quota: nothing is limited"
        output().many(client.quotas.list(account), COLUMNS, nothing=nothing)


@quota.command()
@click.argument("account")
@click.argument("expression")
def remove(account: str, expression: str) -> None:
    """Take away the limit that ACCOUNT has under EXPRESSION. Its data stay."""
    from rules.errors import NotFound

    with connected() as client:
        found = [each for each in client.quotas.list(account) if each.expression == expression.strip()]
        if not found:
            hint = f"`replica quota show {account}` shows what there is"
            raise NotFound(f"{account} has no quota under {expression!r}", hint=hint)
        client.quotas.remove(found[0].id)
    output().lines(found[0], [f"{account} is no longer limited by {found[0].expression}"])


@click.command(cls=Command)
@click.option("--account", help="Only what this account holds.")
@click.option("--endpoint", metavar="EXPR", help="Only at the endpoints that an expression selects.")
@click.option("--by", type=click.Choice(["account", "endpoint"]), help="Totals of each account, or of each endpoint.")
@click.option(
    "--since",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    help="How it was since then (UTC), instead of now: a line for each period in which it changed.",
)
def usage(account: str | None, endpoint: str | None, by: Any, since: datetime | None) -> None:
    """What the rules of accounts hold at endpoints. A file counts once, however many rules hold it there."""
    from datetime import UTC

    if by is not None and since is not None:
        raise click.UsageError("--by and --since do not go together")
    with connected() as client, pointing(where=endpoint, expression=endpoint):
        if since is None:
            output().many(client.usage.list(account, endpoint, by), HELD, nothing="nothing is held there")
        else:
            then = client.usage.history(account, endpoint, since.replace(tzinfo=UTC))
            nothing = "nothing was written down yet: that happens every hour"
            output().many(then, (Column("at", "at"), *HELD), nothing=nothing)
