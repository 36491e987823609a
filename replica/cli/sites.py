"""`replica site`: places with storage and a worker.

Given     a site's name.
Returns   the site, or the token its worker logs in with.
Partner   replica.client.sites.
"""

from __future__ import annotations

import click

from replica.cli.common import Group, connected, output
from replica.cli.output import Column

COLUMNS = (
    Column("site", "name"),
    Column("worker seen", "worker_seen_at"),
    Column("created", "created_at"),
)


@click.group(cls=Group)
def site() -> None:
    """Sites: places with storage and a worker."""


@site.command()
@click.argument("name")
def add(name: str) -> None:
    """Add a site."""
    with connected() as client:
        output().one(client.sites.add(name))


@site.command("list")
def list_() -> None:
    """List all sites."""
    with connected() as client:
        output().many(client.sites.list(), COLUMNS, nothing="there are no sites; make one with `replica site add NAME`")


@site.command()
@click.argument("name")
def show(name: str) -> None:
    """Show one site."""
    with connected() as client:
        output().one(client.sites.show(name))


@site.command()
@click.argument("name")
def key(name: str) -> None:
    """Make a token for the site's worker and print it. It is shown this once; the server keeps only a hash."""
    with connected() as client:
        made = client.sites.key(name)
    output().lines(made, [made.token])
