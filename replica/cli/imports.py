"""`replica import`: what another system knows, brought into this one.

Given     files that the other system wrote.
Returns   what was taken, and what could not be mapped; exit code 1 when anything could not.
Partner   replica.client.rucio_import does the work.
"""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.common import FILE, Group, connected, output
from replica.cli.output import say

_SHOWN = 3


@click.group("import", cls=Group)
def import_() -> None:
    """Bring over what another system knows."""


@import_.command()
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE…")
@click.option(
    "--url", "urls", multiple=True, metavar="RSE=URL", help="Where an RSE is, if not where its protocols say."
)
@click.option("--plan", is_flag=True, help="Say what would be brought over; send nothing.")
def rucio(files: tuple[Path, ...], urls: tuple[str, ...], plan: bool) -> int:
    """Bring over a Rucio: its export document, and NDJSON dumps of DIDs, contents, replicas and rules.

    The export document is what `GET /export` answers: endpoints, attributes, protocols, distances, accounts. In a dump
    each line is one object as Rucio's REST interface lists it; the files may come in any order, and again. Replicas
    count as copies once a worker of their site has verified them.
    """
    from replica.client.rucio_import import RucioImport

    known = dict(_mapping(url) for url in urls)
    with connected() as client:
        done = RucioImport(client, urls=known, plan=plan, tell=_tell).run(files)
    verb = "would be brought over" if plan else "brought over"
    output().lines(done, [f"{noun}: {count} {verb}" for noun, count in done.taken.items()] or [f"nothing {verb}"])
    for remark in done.unmapped:
        more = f" and {remark.count - _SHOWN} more" if remark.count > _SHOWN else ""
        say(f"{remark.noun}: {remark.reason} ({', '.join(remark.examples[:_SHOWN])}{more})")
    return 1 if done.unmapped else 0


def _mapping(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals or not name or not url:
        raise click.UsageError(f"{text!r} is not RSE=URL")
    return name, url


def _tell(noun: str, count: int) -> None:
    if count % 100_000 == 0:
        say(f"{noun}: {count}")
