"""`replica whoami`: who the server takes you for.

Given     your token.
Returns   account, role, and the site of a worker's token.
Partner   replica.client.
"""

from __future__ import annotations

import click

from replica.cli.common import Command, connected, output


@click.command(cls=Command)
def whoami() -> None:
    """Who the server takes you for."""
    with connected() as client:
        output().one(client.whoami())
