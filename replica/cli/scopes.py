"""`replica scope`: the first half of every DID.

Given     a scope's name.
Returns   the scope.
Partner   replica.client.scopes.
"""

from __future__ import annotations

import click

from replica.cli.common import Group, connected, output
from replica.cli.output import Column

COLUMNS = (Column("scope", "name"), Column("account", "account"), Column("created", "created_at"))


@click.group(cls=Group)
def scope() -> None:
    """Scopes: the first half of every DID."""


@scope.command()
@click.argument("name")
def add(name: str) -> None:
    """Add a scope."""
    with connected() as client:
        output().one(client.scopes.add(name))


@scope.command()
@click.argument("name")
def show(name: str) -> None:
    """Show one scope."""
    with connected() as client:
        output().one(client.scopes.show(name))


@scope.command("list")
def list_() -> None:
    """List all scopes."""
    with connected() as client:
        output().many(
            client.scopes.list(), COLUMNS, nothing="there are no scopes; make one with `replica scope add NAME`"
        )
