"""`replica account` and `replica whoami`: who may sign in, and who the server takes you for.

Given     an account's name, or your token.
Returns   the account with its role, or a new token of it; the site of a worker's token.
Partner   replica.client.accounts.
"""

from __future__ import annotations

from typing import Any

import click

from replica.cli.common import Command, Group, connected, output
from replica.cli.output import Column

COLUMNS = (Column("account", "name"), Column("role", "role"), Column("created", "created_at"))


@click.command(cls=Command)
def whoami() -> None:
    """Who the server takes you for."""
    with connected() as client:
        output().one(client.whoami())


@click.group(cls=Group)
def account() -> None:
    """Accounts: people and programs that may sign in."""


@account.command()
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(["user", "admin"]),
    default="user",
    show_default=True,
    help="user: reads everything, writes data, and rules of its own; admin: everything.",
)
def add(name: str, role: Any) -> None:
    """Add an account. `replica account key NAME` makes the token it signs in with."""
    from replica import wire

    with connected() as client:
        output().one(client.accounts.add(wire.NewAccount(name=name, role=role)))


@account.command("list")
def list_() -> None:
    """List all accounts."""
    with connected() as client:
        output().many(client.accounts.list(), COLUMNS, nothing="there are no accounts")


@account.command()
@click.argument("name")
def show(name: str) -> None:
    """Show one account."""
    with connected() as client:
        output().one(client.accounts.show(name))


@account.command()
@click.argument("name")
def key(name: str) -> None:
    """Make a token for the account and print it. It is shown this once; the server keeps only a hash."""
    with connected() as client:
        made = client.accounts.key(name)
    output().lines(made, [made.token])
