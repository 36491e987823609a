"""`replica limit`: how much may be in flight at once, and who gets which part of it.

Given     an endpoint, a link, an activity or an account.
Returns   its limit, and what is in flight under it.
Partner   replica.client.limits.
"""

from __future__ import annotations

from typing import Any

import click

from replica.cli.common import Group, connected, output
from replica.cli.endpoints import SIZE_OR_NONE
from replica.cli.output import Column, size_column

COLUMNS = (
    Column("kind", "kind"),
    Column("of", "of"),
    Column("files in flight", "files_in_flight"),
    Column("of at most", "files_max"),
    size_column("bytes in flight", "bytes_in_flight"),
    size_column("of at most", "bytes_max"),
    Column("slots taken", "slots_in_flight"),
    Column("of by now", "slots"),
    Column("adapts", "adaptive"),
    Column("why", "reason"),
)
DECISIONS = (
    Column("at", "at"),
    Column("before", "before"),
    Column("slots", "slots"),
    Column("why", "why"),
    Column("reason", "reason"),
)


class _CountOrNone(click.ParamType):  # type: ignore[type-arg]
    """A number, or `none`, which is -1."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "none":
            return -1
        return int(click.IntRange(min=0).convert(value, param, ctx))


COUNT_OR_NONE = _CountOrNone()


def given(**options: int | None) -> dict[str, Any]:
    """Those that were named; none becomes null."""
    return {name: None if value < 0 else value for name, value in options.items() if value is not None}


@click.group(cls=Group)
def limit() -> None:
    """Limits on what is in flight at once, and shares of it."""


@limit.command("list")
def list_() -> None:
    """List the limits that are set or adapt, and what is in flight under each; the lowest holds.

    What adapts is counted in slots: a file takes one, and of small files up to 128 share one, as workers move them in
    lists. It is of what is written to an endpoint; of each link to it while several are in use; and of what is read
    from an endpoint while several links lead from it.
    """
    with connected() as client:
        output().many(client.limits.list(), COLUMNS, nothing="nothing is limited")


@limit.command("set")
@click.argument("kind", type=click.Choice(["read", "write", "link", "activity", "account"]))
@click.argument("of")
@click.option("--source", help="Of a link: the endpoint that is read from; OF is the one that is written to.")
@click.option("--files", "files_max", type=COUNT_OR_NONE, metavar="N", help="So many files at most; `none`: no limit.")
@click.option(
    "--bytes",
    "bytes_max",
    type=SIZE_OR_NONE,
    metavar="SIZE",
    help="So many bytes at most, for example 1TB; a file larger than that goes alone. `none`: no limit.",
)
@click.option(
    "--fixed/--adaptive",
    "fixed",
    default=None,
    help="Only what people set holds, and nothing adapts, also not the links of the endpoint; or it adapts (again).",
)
def set_(
    kind: Any, of: str, source: str | None, files_max: int | None, bytes_max: int | None, fixed: bool | None
) -> None:
    """Limit what is in flight: read from or written to an endpoint, on a link, for an activity or an account.

    What has no room waits and holds up nothing else. A limit of 0 files stops everything there.
    """
    from replica import wire

    values = given(files_max=files_max, bytes_max=bytes_max)
    if fixed is not None:
        values["adaptive"] = not fixed
    if not values:
        raise click.UsageError("nothing to change; name --files, --bytes, --fixed or --adaptive")
    with connected() as client:
        output().one(client.limits.set(wire.LimitChange(kind=kind, of=of, source=source, **values)))


@limit.command()
@click.argument("kind", type=click.Choice(["read", "write", "link"]))
@click.argument("of")
@click.option("--source", help="Of a link: the endpoint that is read from; OF is the one that is written to.")
@click.option("--limit", "most", default=20, show_default=True, type=click.IntRange(1, 1_000), help="So many at most.")
def history(kind: str, of: str, source: str | None, most: int) -> None:
    """Tell how what adapts was changed lately, and why, newest first; with -o json also what was measured."""
    with connected() as client:
        output().many(client.limits.history(kind, of, source, most), DECISIONS, nothing="nothing was decided yet")


@limit.command()
@click.argument("activity")
@click.argument("weight", type=click.IntRange(1, 1_000_000))
def share(activity: str, weight: int) -> None:
    """Set which part of the workers an activity gets while others wait, too; 100 if nothing is set."""
    with connected() as client:
        output().one(client.limits.set_weight(activity, weight))


@limit.command()
def shares() -> None:
    """List the activities whose share was set."""
    with connected() as client:
        columns = (Column("activity", "name"), Column("weight", "weight"))
        output().many(client.limits.activities(), columns, nothing="all activities get the same")
