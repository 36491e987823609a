"""`replica endpoint`: the storage at a site.

Given     an endpoint's name, its URL and what is known about it.
Returns   the endpoint.
Partner   replica.client.endpoints; attributes are what rule expressions select by.
"""

from __future__ import annotations

from typing import Any

import click

from replica.cli.common import ATTRIBUTE, SIZE, Group, connected, output, pointing
from replica.cli.output import Column, human_size, say, size_column

COLUMNS = (
    Column("endpoint", "name"),
    Column("site", "site"),
    Column("kind", "kind"),
    size_column("used", "used_bytes"),
    size_column("free", "free_bytes"),
    Column("read", "readable"),
    Column("write", "writable"),
    Column("attributes", "attributes"),
    Column("url", "url"),
)


@click.group(cls=Group)
def endpoint() -> None:
    """Endpoints: the storage at a site."""


@endpoint.command()
@click.argument("name")
@click.option("--site", required=True, help="The site it belongs to.")
@click.option("--url", required=True, help="Where it is: file:///absolute/path of a folder of its own.")
@click.option("--kind", type=click.Choice(["disk", "tape"]), default="disk", show_default=True)
@click.option(
    "--layout",
    type=click.Choice(["identity", "hash"]),
    default="identity",
    show_default=True,
    help="How names become paths: scope/name, or Rucio's hashed folders.",
)
@click.option("--attribute", "attributes", type=ATTRIBUTE, multiple=True, metavar="KEY=VALUE", help="Repeatable.")
@click.option("--capacity", type=SIZE, help="What Replica may fill at most, for example 10TB.")
@click.option(
    "--prepare/--no-prepare",
    default=None,
    help="Make the folder ready on this machine.  [default: if the server is on this machine, too]",
)
def add(
    name: str,
    site: str,
    url: str,
    attributes: tuple[tuple[str, str | int | float | bool], ...],
    capacity: int | None,
    prepare: bool | None,
    **choices: Any,
) -> int:
    """Add an endpoint to a site.

    Its folder must be made ready on the machine that has it: Replica writes only where it finds its own mark, lest it
    fill an empty mount point. With the server on this machine that is done at once; else see `endpoint prepare`.
    """
    from replica import wire
    from replica.client.places import is_this_machine, prepare_here
    from rules.errors import ReplicaError

    with connected() as client:
        made = client.endpoints.add(
            wire.NewEndpoint(
                name=name, site=site, url=url, attributes=dict(attributes), capacity_bytes=capacity, **choices
            )
        )
        wanted = is_this_machine(client.server) if prepare is None else prepare
    _print(made)
    if not wanted:
        say(f"{made.url} is still to be made ready, on its machine: replica endpoint prepare {made.name}")
        return 0
    try:
        prepare_here(made)
    except ReplicaError as error:
        say(f"replica: {made.name} was added, but could not be made ready: {error.message}")
        say(f"hint: {error.hint or 'see to it'}, then run `replica endpoint prepare {made.name}`")
        return 1
    return 0


@endpoint.command()
@click.argument("name")
def prepare(name: str) -> None:
    """Make an endpoint's folder ready on this machine, which has its disk."""
    from replica.client.places import prepare_here

    with connected() as client:
        found = client.endpoints.show(name)
    prepare_here(found)
    output().lines(found, [f"{found.url} is ready to be {found.name}"])


@endpoint.command("list")
@click.option("--where", metavar="EXPR", help="Only those an expression selects, for example 'kind=disk&site=DESY'.")
def list_(where: str | None) -> None:
    """List endpoints."""
    with connected() as client, pointing(where=where, expression=where):
        output().many(client.endpoints.list(where=where), COLUMNS, nothing="there are no endpoints")


@endpoint.command()
@click.argument("name")
def show(name: str) -> None:
    """Show one endpoint."""
    with connected() as client:
        _print(client.endpoints.show(name))


@endpoint.command("set")
@click.argument("name")
@click.option(
    "--attribute",
    "attributes",
    type=ATTRIBUTE,
    multiple=True,
    metavar="KEY=VALUE",
    help="Set an attribute; `KEY=` removes it. Repeatable.",
)
@click.option("--readable/--not-readable", default=None, help="May Replica read from it?")
@click.option("--writable/--not-writable", default=None, help="May Replica write to it?")
@click.option("--deletable/--not-deletable", default=None, help="May Replica delete from it?")
@click.option(
    "--capacity", type=SIZE, help="What Replica may fill at most; `none`: as much as is free.", metavar="SIZE"
)
def set_(
    name: str,
    attributes: tuple[tuple[str, str | int | float | bool], ...],
    readable: bool | None,
    writable: bool | None,
    deletable: bool | None,
    capacity: int | None,
) -> None:
    """Change an endpoint; what is not named stays as it is."""
    from replica import wire

    given: dict[str, Any] = {"readable": readable, "writable": writable, "deletable": deletable}
    change = {k: v for k, v in given.items() if v is not None}
    if attributes:
        change["attributes"] = {k: None if v == "" else v for k, v in attributes}
    if capacity is not None:
        change["capacity_bytes"] = None if capacity < 0 else capacity
    if not change:
        raise click.UsageError("nothing to change; name at least one option")
    with connected() as client:
        _print(client.endpoints.change(name, wire.EndpointChange(**change)))


def _print(found: Any) -> None:
    output().one(
        found,
        [
            ("endpoint", found.name),
            ("site", found.site),
            ("kind", found.kind),
            ("url", found.url),
            ("layout", found.layout),
            ("attributes", found.attributes),
            ("readable", found.readable),
            ("writable", found.writable),
            ("deletable", found.deletable),
            ("used", human_size(found.used_bytes)),
            ("free", human_size(found.free_bytes)),
            ("capacity", human_size(found.capacity_bytes)),
        ],
    )
