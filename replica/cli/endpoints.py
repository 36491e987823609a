"""`replica endpoint`: the storage at a site.

Given     an endpoint's name, its URL and what is known about it.
Returns   the endpoint.
Partner   replica.client.endpoints; attributes are what rule expressions select by.
"""

from __future__ import annotations

from typing import Any

import click

from replica.cli.common import ATTRIBUTE, DURATION, SIZE, Group, connected, credentials, output, pointing
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


LINK_COLUMNS = tuple(Column(key, key) for key in ("source", "target", "distance", "allowed"))


class _SizeOrNone(type(SIZE)):  # type: ignore[misc]
    """A size, or `none`, which is -1."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return -1 if value == "none" else int(super().convert(value, param, ctx))


SIZE_OR_NONE = _SizeOrNone()


@click.group(cls=Group)
def endpoint() -> None:
    """Endpoints: the storage at a site."""


@endpoint.command()
@click.argument("name")
@click.option("--site", required=True, help="The site it belongs to.")
@click.option("--url", required=True, help="A folder of its own: file:///absolute/path, sftp://host/path …")
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
    help="Make it ready now, from this machine.  [default: if it is a folder, and the server is on this machine, too]",
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

    It must be made ready, a folder on the machine that has it: Replica writes only where it finds its own mark, lest it
    fill an empty mount point. With the server on this machine that is done at once; else see `endpoint prepare`.
    """
    from replica import wire
    from replica.client.parallel import run_here
    from replica.client.places import is_folder, is_this_machine
    from replica.client.places import prepare as making_ready
    from rules.errors import ReplicaError

    with connected() as client:
        made = client.endpoints.add(
            wire.NewEndpoint(
                name=name, site=site, url=url, attributes=dict(attributes), capacity_bytes=capacity, **choices
            )
        )
        wanted = is_this_machine(client.server) and is_folder(made) if prepare is None else prepare
    _print(made)
    if not wanted:
        where = "on its machine" if is_folder(made) else "by who has the credentials"
        say(f"{made.url} is still to be made ready, {where}: replica endpoint prepare {made.name}")
        return 0
    try:
        run_here(lambda: making_ready(made, credentials()))
    except ReplicaError as error:
        say(f"replica: {made.name} was added, but could not be made ready: {error.message}")
        say(f"hint: {error.hint or 'see to it'}, then run `replica endpoint prepare {made.name}`")
        return 1
    return 0


@endpoint.command()
@click.argument("name")
def prepare(name: str) -> None:
    """Make an endpoint ready: its folder, bucket or prefix, with Replica's mark in it.

    A folder on the machine that has its disk; a server from anywhere, by your credentials file
    [REPLICA_CREDENTIALS_FILE]. Workers never do this: where the mark is missing, a disk may not be mounted. May be
    repeated.
    """
    from replica.client.parallel import run_here
    from replica.client.places import prepare as making_ready

    with connected() as client:
        found = client.endpoints.show(name)
    run_here(lambda: making_ready(found, credentials()))
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
    "--capacity",
    "capacity_bytes",
    type=SIZE_OR_NONE,
    help="What Replica may fill at most; `none`: as much as is free.",
    metavar="SIZE",
)
@click.option(
    "--min-free",
    "min_free_bytes",
    type=SIZE_OR_NONE,
    metavar="SIZE",
    help="Copies that nobody protects go when less than this is free; `none`: when nothing is.",
)
@click.option(
    "--delete-at-once/--delete-when-needed", default=None, help="Must copies that nobody protects go at once?"
)
@click.option("--grace", "grace_seconds", type=DURATION, metavar="TIME", help="So long a deletion can be undone.")
@click.option("--budget-files", type=click.IntRange(min=-1), help="Files deleted in an hour at most; -1: no limit.")
@click.option(
    "--budget-bytes", type=SIZE_OR_NONE, metavar="SIZE", help="Bytes deleted in an hour at most; `none`: no limit."
)
def set_(name: str, attributes: tuple[tuple[str, str | int | float | bool], ...], **given: Any) -> None:
    """Change an endpoint; what is not named stays as it is."""
    from replica import wire

    change = {k: v for k, v in given.items() if v is not None}
    for key in ("capacity_bytes", "min_free_bytes", "budget_files", "budget_bytes"):
        if change.get(key, 0) < 0:
            change[key] = None
    if "grace_seconds" in change:
        change["grace_seconds"] = round(change["grace_seconds"])
    if attributes:
        change["attributes"] = {k: None if v == "" else v for k, v in attributes}
    if not change:
        raise click.UsageError("nothing to change; name at least one option")
    with connected() as client:
        _print(client.endpoints.change(name, wire.EndpointChange(**change)))


@endpoint.command()
@click.argument("name")
@click.option("--reason", required=True, help="Why: everybody who waits for the endpoint reads it.")
@click.option("--read", is_flag=True, help="Only reading is off.")
@click.option("--write", is_flag=True, help="Only writing is off.")
@click.option("--delete", is_flag=True, help="Only deleting is off.")
def ban(name: str, reason: str, read: bool, write: bool, delete: bool) -> None:
    """Switch reading, writing and deleting off.

    The options name less than all three and may be combined. What is under way is not broken off. Copies that cannot
    be written there go to other endpoints after an hour; those that are complete stay.
    """
    from replica import wire

    with connected() as client:
        _print(client.endpoints.ban(name, wire.Ban(reason=reason, read=read, write=write, delete=delete)))


@endpoint.command()
@click.argument("name")
def unban(name: str) -> None:
    """Switch reading, writing and deleting on again."""
    with connected() as client:
        _print(client.endpoints.unban(name))


@endpoint.command()
@click.argument("name")
@click.option("--reason", default="", help="Why: it is shown with the endpoint.")
@click.option("--undo", is_flag=True, help="Stop; what was brought elsewhere stays there.")
def drain(name: str, reason: str, undo: bool) -> None:
    """Bring elsewhere what rules protect at an endpoint.

    Nothing new goes there. Each copy goes when its replacement was verified; what no other endpoint can take stays,
    and its rule says why. `replica endpoint show` tells how much is still protected.
    """
    with connected() as client:
        _print(client.endpoints.drain(name, reason, undo=undo))


@endpoint.command()
@click.argument("name")
@click.option("--forget", is_flag=True, help="Forget the copies there that no rule protects; their bytes stay.")
@click.option("--last-copies", is_flag=True, help="With --forget: also those of which no other copy is known.")
@click.option("--undo", is_flag=True, help="Take it into service again; then `replica endpoint unban` it.")
def decommission(name: str, forget: bool, last_copies: bool, undo: bool) -> None:
    """Take an endpoint out of service for good.

    Refused while rules protect anything there, while transfers or deletions are under way, and while there are copies
    that are not to be forgotten. Drain it first.
    """
    from replica import wire

    with connected() as client:
        order = wire.Decommission(forget=forget, last_copies=last_copies, undo=undo)
        _print(client.endpoints.decommission(name, order))


@endpoint.command()
@click.argument("source", required=False)
@click.argument("target", required=False)
@click.option("--distance", type=click.IntRange(min=0), help="The nearer of two sources is read; without a link: 1.")
@click.option("--allow/--forbid", "allowed", default=None, help="May anything be read from SOURCE for TARGET?")
def link(source: str | None, target: str | None, distance: int | None, allowed: bool | None) -> None:
    """Set how far it is from SOURCE to TARGET; without an option: list what is set."""
    from replica import wire

    change: dict[str, Any] = {k: v for k, v in {"distance": distance, "allowed": allowed}.items() if v is not None}
    if change and (source is None or target is None):
        raise click.UsageError("name SOURCE and TARGET of the link that is to be set")
    with connected() as client:
        if source is not None and target is not None and change:
            made = client.endpoints.set_link(wire.LinkChange(source=source, target=target, **change))
            output().one(
                made, [(column, getattr(made, column)) for column in ("source", "target", "distance", "allowed")]
            )
        else:
            found = client.endpoints.links(source, target)
            output().many(found, LINK_COLUMNS, nothing="no link is set: every way is allowed, at distance 1")


def _print(found: Any) -> None:
    protected = found.protected
    held = "" if protected is None else _protected(protected)
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
            ("protected", held),
            ("draining", found.draining),
            ("gone since", found.decommissioned_at),
            ("reason", found.status_reason),
            ("since", found.status_since),
            ("min free", human_size(found.min_free_bytes)),
            ("at once", found.delete_at_once),
            ("grace", f"{found.grace_seconds} s"),
            ("budget", _budget(found)),
            *[("left alone", _breaker(each)) for each in found.breakers],
        ],
    )


def _breaker(breaker: Any) -> str:
    """What is not read or written for now, and why."""
    when = "one transfer tries it now"
    if breaker.probe_at is not None:
        when = f"tried again at {breaker.probe_at:%H:%M:%S} UTC"
    done = "reading" if breaker.direction == "read" else "writing"
    since = f"since {breaker.since:%Y-%m-%d %H:%M:%S} UTC ({breaker.why})"
    return f"{done}, {since}: {breaker.message}; {when}; {breaker.hint}"


def _budget(found: Any) -> str:
    """What may be deleted in an hour."""
    limits = [] if found.budget_files is None else [f"{found.budget_files} files"]
    if found.budget_bytes is not None:
        limits.append(human_size(found.budget_bytes))
    return " and ".join([*limits[:-1], f"{limits[-1]} an hour"]) if limits else ""


def _protected(held: Any) -> str:
    if not held.rules:
        return "nothing"
    rules = "1 rule" if held.rules == 1 else f"{held.rules} rules"
    return f"{held.files} files, {human_size(held.bytes)}, by {rules}"
