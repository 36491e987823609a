"""`replica bad`, `doubt`, `good`, `repair`, `suspects` and `scrub`: whether replicas are still what they were.

Given     DIDs and an endpoint; how an endpoint shall be read again.
Returns   what became of it.
Promises  a last copy that is bad is told loudly, on stderr; nothing here destroys bytes.
Partner   replica.client.integrity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import click

from replica.cli.common import Command, Group, connected, output
from replica.cli.endpoints import SIZE_OR_NONE
from replica.cli.output import Column, say, size_column
from rules.quantities import counted

SUSPECTS = (
    Column("did", "did"),
    Column("endpoint", "endpoint"),
    Column("state", "state"),
    Column("doubted by", "why"),
    Column("proven", "proven"),
    Column("since", "since"),
    Column("looked at next", "due_at"),
    Column("what", "message"),
)
SCRUBS = (
    Column("endpoint", "endpoint"),
    Column("depth", "depth"),
    size_column("a second", "bytes_per_second"),
    Column("pass", "pass_number"),
    Column("progress", "progress"),
    Column("files", "files"),
    size_column("bytes", "bytes"),
    Column("wrong", "wrong"),
    Column("next", "next_at"),
    Column("suspicious", "suspicious"),
    Column("bad", "bad"),
    Column("halted", "halted_why"),
)


def _dids(dids: tuple[str, ...], listing: BinaryIO | None) -> list[str]:
    listed = [] if listing is None else [text for line in listing if (text := line.decode().strip())]
    if not (found := [*dids, *listed]):
        raise click.UsageError("name DIDs, or a file of them with --from")
    return found


def _endpoint(endpoint: str | None, all_at: str | None) -> str:
    if (endpoint is None) == (all_at is None):
        raise click.UsageError("name the endpoint, once: --endpoint E, or --all-at E with --from FILE")
    return endpoint or all_at or ""


_AT = click.option("--endpoint", help="Where the replica is.")
_ALL_AT = click.option("--all-at", metavar="ENDPOINT", help="Where all that --from lists are.")
_FROM = click.option("--from", "listing", type=click.File("rb"), help="A file with a DID on each line; - is stdin.")


@click.command(cls=Command)
@click.argument("dids", nargs=-1, metavar="DID…")
@_AT
@_ALL_AT
@_FROM
@click.option("--reason", default="somebody said so", show_default=True, help="What is wrong, for whoever looks later.")
@click.option("--repair", is_flag=True, help="Mend it also where no rule asks for it.")
def bad(
    dids: tuple[str, ...],
    endpoint: str | None,
    all_at: str | None,
    listing: BinaryIO | None,
    reason: str,
    repair: bool,
) -> None:
    """Declare replicas bad: no sources any more, they count for no rule, and are healed from good copies.

    Nothing is destroyed by it: bad bytes stay, and later in quarantine. The last copy of a file stays what it is.
    """
    where = _endpoint(endpoint, all_at)
    with connected() as client:
        said = client.integrity.bad(_dids(dids, listing), where, reason=reason, repair=repair)
    for did in said.last_copies:
        say(f"replica: no good copy of {did} is left: the bad one at {where} is kept, and its rules are stuck")

    def lines() -> Iterator[str]:
        yield f"{counted(said.bad, 'replica')} declared bad, {said.known} bad already"
        if said.last_copies:
            yield f"without any good copy: {counted(len(said.last_copies), 'file')}"
        if said.repairs:
            yield f"to be repaired, besides what rules ask for: {said.repairs}"

    output().lines(said, lines())


@click.command(cls=Command)
@click.argument("dids", nargs=-1, metavar="DID…")
@_AT
@_ALL_AT
@_FROM
@click.option("--reason", default="somebody said so", show_default=True, help="What was seen, for whoever looks later.")
def doubt(
    dids: tuple[str, ...], endpoint: str | None, all_at: str | None, listing: BinaryIO | None, reason: str
) -> None:
    """Have replicas looked at by a worker of their site. Nothing else changes, whatever you say.

    For whoever read one and found it wrong; `replica download` does it by itself. Each account may have so many looked
    at in a day.
    """
    from replica import wire

    where = _endpoint(endpoint, all_at)
    with connected() as client:
        found = [wire.DoubtedReplica(did=did, endpoint=where, reason=reason) for did in _dids(dids, listing)]
        said = client.integrity.doubt(found)
    lines = [f"{counted(said.to_look_at, 'replica')} to be looked at"]
    if said.passed_over:
        lines.append(f"not known as good, doubted already, or read again just now: {said.passed_over}")
    if said.too_many:
        lines.append(f"more than one account may have looked at in a day: {said.too_many}")
    output().lines(said, iter(lines))


@click.command(cls=Command)
@click.argument("dids", nargs=-1, metavar="DID…")
@_AT
@_ALL_AT
@_FROM
def good(dids: tuple[str, ...], endpoint: str | None, all_at: str | None, listing: BinaryIO | None) -> None:
    """Take back that replicas are bad. What a worker found wrong, a worker reads again first."""
    with connected() as client:
        said = client.integrity.good(_dids(dids, listing), _endpoint(endpoint, all_at))
    lines = [f"{counted(said.good, 'replica')} good again"]
    if said.to_verify:
        lines.append(f"to be read by a worker of the site first: {said.to_verify}")
    output().lines(said, iter(lines))


@click.command(cls=Command)
@click.argument("did")
@click.option("--endpoint", required=True, help="Where the bad replica is.")
def repair(did: str, endpoint: str) -> None:
    """Mend a bad replica from good copies; of a large file only the damaged chunks are written anew."""
    with connected() as client:
        output().one(client.integrity.repair(did, endpoint))


@click.command(cls=Command)
@click.option("--endpoint", help="Of this endpoint only.")
def suspects(endpoint: str | None) -> None:
    """List the replicas that are doubted or bad, and why."""
    with connected() as client:
        output().many(client.integrity.suspects(endpoint), SUSPECTS, nothing="nothing is doubted")


@click.group(cls=Group)
def scrub() -> None:
    """How endpoints are read again, to find what rots."""


@scrub.command("list")
def list_() -> None:
    """List all endpoints: how they are read again, and how far that is."""
    with connected() as client:
        output().many(client.integrity.scrubs(), SCRUBS, nothing="there is no disk endpoint")


@scrub.command()
@click.argument("endpoint")
def show(endpoint: str) -> None:
    """Show how an endpoint is read again."""
    with connected() as client:
        output().one(client.integrity.scrub(endpoint))


@scrub.command("set")
@click.argument("endpoint")
@click.option(
    "--depth",
    type=click.Choice(["off", "shallow", "deep"]),
    help="deep: every byte is read; shallow: sizes and what the server says, which may hide what rots.",
)
@click.option("--rate", type=SIZE_OR_NONE, metavar="SIZE", help="Bytes in a second at most; `none`: no limit.")
@click.option("--files", type=click.FloatRange(min=0, min_open=True), help="Files in a second at most.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Everything is read again in so many days.")
@click.option(
    "--guard",
    type=click.FloatRange(min=0, max=100, min_open=True),
    metavar="PERCENT",
    help="When more than this is wrong, nothing is declared bad and a person is asked.",
)
@click.option("--resume", is_flag=True, help="Go on after a halt.")
@click.option("--now", is_flag=True, help="Begin the next pass now.")
def set_(
    endpoint: str,
    depth: str | None,
    rate: int | None,
    files: float | None,
    days: float | None,
    guard: float | None,
    resume: bool,
    now: bool,
) -> None:
    """Set how an endpoint is read again."""
    change: dict[str, Any] = {}
    if depth is not None:
        change["depth"] = depth
    if rate is not None:
        change["bytes_per_second"] = None if rate < 0 else rate
    if files is not None:
        change["files_per_second"] = files
    if days is not None:
        change["period_seconds"] = max(1, int(days * 86_400))
    if guard is not None:
        change["guard_fraction"] = guard / 100
    change |= {name: True for name, wanted in (("resume", resume), ("now", now)) if wanted}
    if not change:
        raise click.UsageError("nothing to change; see --help")
    with connected() as client:
        output().one(client.integrity.set_scrub(endpoint, **change))
