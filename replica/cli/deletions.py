"""`replica deletion`: which copies go, why, and how to keep them.

Given     deletions' numbers, filters, or a file and an endpoint.
Returns   deletions and their states.
Partner   replica.client.deletions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from replica.cli.common import Group, connected, output
from replica.cli.output import Column, human_size, size_column

if TYPE_CHECKING:
    from replica import wire

STATES = ("queued", "claimed", "done", "failed", "undone")

COLUMNS = (
    Column("deletion", "id", right=True),
    Column("state", "state"),
    Column("did", "did"),
    Column("endpoint", "endpoint"),
    Column("why", "why"),
    size_column("size", "bytes"),
    Column("not before", "not_before"),
    Column("reason", "reason"),
)


@click.group(cls=Group)
def deletion() -> None:
    """Deletions: which copies go, why, and how to keep them."""


@deletion.command("list")
@click.option("--state", type=click.Choice(STATES))
@click.option("--endpoint", "-e", metavar="NAME", help="Only those at an endpoint.")
@click.option("--did", help="Only those of a DID's files.")
@click.option("--site", help="Only those at a site.")
def list_(**filters: Any) -> None:
    """List deletions."""
    with connected() as client:
        output().many(client.deletions.list(**filters), COLUMNS, nothing="there are no such deletions")


@deletion.command()
@click.argument("deletion", type=int)
def show(deletion: int) -> None:
    """Show one deletion."""
    with connected() as client:
        _print(client.deletions.show(deletion))


@deletion.command()
@click.argument("did")
@click.option("--endpoint", "-e", metavar="NAME", required=True, help="Where the copy is.")
@click.option("--last-copy", is_flag=True, help="Also if it is the last good copy: then the bytes are lost.")
def ask(did: str, endpoint: str, last_copy: bool) -> None:
    """Remove one copy of a file. What a rule protects stays, and so does the last good copy."""
    with connected() as client:
        _print(client.deletions.ask(did, endpoint, last_copy=last_copy))


@deletion.command()
@click.argument("deletions", type=int, nargs=-1, required=True, metavar="DELETION…")
def undo(deletions: tuple[int, ...]) -> None:
    """Take deletions back that no worker has begun."""
    with connected() as client:
        output().many([client.deletions.undo(number) for number in deletions], COLUMNS)


def _print(found: wire.Deletion) -> None:
    output().one(
        found,
        [
            ("deletion", found.id),
            ("state", found.state),
            ("did", found.did),
            ("endpoint", found.endpoint),
            ("site", found.site),
            ("why", found.why),
            ("size", human_size(found.bytes)),
            ("generation", found.generation),
            ("attempts", found.attempts),
            ("account", found.account),
            ("reason", found.reason),
            ("created", found.created_at),
            ("not before", found.not_before),
            ("finished", found.finished_at),
        ],
    )
