"""`replica did`: files, datasets and containers.

Given     DIDs, `scope:name`.
Returns   what the catalogue knows of them.
Partner   replica.client.dids. Files come into being by `replica upload` and `replica register`.
"""

from __future__ import annotations

from typing import Any

import click

from replica.cli.common import Group, connected, output
from replica.cli.output import Column, human_size, size_column

COLUMNS = (
    Column("did", "did"),
    Column("kind", "kind"),
    Column("state", lambda d: "–" if d.kind == "file" else "open" if d.open else "closed"),
    Column("files", "files", right=True),
    size_column("size", "size"),
)


@click.group(cls=Group)
def did() -> None:
    """Files, datasets and containers."""


@did.command()
@click.argument("did")
@click.option("--kind", type=click.Choice(["dataset", "container"]), default="dataset", show_default=True)
@click.option("--container", "kind", flag_value="container", help="The same as --kind container.")
def add(did: str, kind: Any) -> None:
    """Add a dataset, which holds files, or a container, which holds datasets and containers."""
    from replica import wire

    with connected() as client:
        _print(client.dids.add(wire.NewDid(did=did, kind=kind)))


@did.command("list")
@click.argument("pattern", default="")
@click.option("--scope", "only", help="Only those of a scope.")
@click.option("--kind", type=click.Choice(["file", "dataset", "container"]))
def list_(pattern: str, only: str | None, kind: str | None) -> None:
    """List DIDs. PATTERN is scope:name, where * in the name stands for anything; a scope alone is all of it."""
    scope, colon, name = pattern.partition(":")
    if only is not None:
        if colon and scope != only:
            raise click.UsageError(f"{pattern!r} is of another scope than {only!r}")
        scope, name = only, name if colon else pattern
    with connected() as client:
        output().many(
            (
                found
                for each in ([scope] if scope else [s.name for s in client.scopes.list()])
                for found in client.dids.list(each, pattern=name or None, kind=kind)
            ),
            COLUMNS,
            nothing="no DID matches",
        )


@did.command()
@click.argument("did")
def show(did: str) -> None:
    """Show one DID."""
    with connected() as client:
        _print(client.dids.show(did))


@did.command()
@click.argument("did")
def contents(did: str) -> None:
    """List what is directly in a dataset or container."""
    with connected() as client:
        output().many(client.dids.contents(did), COLUMNS, nothing=f"{did} is empty")


@did.command()
@click.argument("parent")
@click.argument("children", nargs=-1, required=True)
def attach(parent: str, children: tuple[str, ...]) -> None:
    """Put files into a dataset, or datasets and containers into a container."""
    with connected() as client:
        done = client.dids.attach(parent, children)
    output().lines(done, [f"{done.attached} attached, {len(children) - done.attached} were there already"])


@did.command()
@click.argument("parent")
@click.argument("children", nargs=-1, required=True)
def detach(parent: str, children: tuple[str, ...]) -> None:
    """Take DIDs out of a dataset or container. They go on existing."""
    with connected() as client:
        done = client.dids.detach(parent, children)
    output().lines(done, [f"{done.detached} detached, {len(children) - done.detached} were not in it"])


@did.command()
@click.argument("did")
def close(did: str) -> None:
    """Close a dataset or container: nothing more can be attached or detached."""
    _open(did, False)


@did.command()
@click.argument("did")
def reopen(did: str) -> None:
    """Open a closed dataset or container again."""
    _open(did, True)


def _open(did: str, open_: bool) -> None:
    from replica import wire

    with connected() as client:
        _print(client.dids.change(did, wire.DidChange(open=open_)))


def _print(found: Any) -> None:
    rows: list[tuple[str, object]] = [("did", found.did), ("kind", found.kind), ("account", found.account)]
    if found.kind != "file":
        rows += [("state", "open" if found.open else "closed"), ("files", found.files)]
    rows += [("size", human_size(found.size)), ("created", found.created_at)]
    rows += [(algorithm, value) for algorithm, value in found.checksums.items()]
    rows += [(key, value) for key, value in found.metadata.items()]
    output().one(found, rows)
