"""`replica events`: what happened, and what happens.

Given     a cursor, kinds of events.
Returns   events in order; with --follow, for ever.
Promises  with `-o ndjson` a line for each event as soon as it is there; its `cursor` is what --since takes.
Partner   replica.client.events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from replica.cli.common import Command, connected, output
from replica.cli.output import Column, human_instant, payload_text

if TYPE_CHECKING:
    from replica import wire


def _about(event: wire.Event) -> str:
    name = event.did or event.name
    return f"{event.entity} {event.id}" + (f" ({name})" if name else "")


def _details(event: wire.Event) -> str:
    parts = [f"{event.source or '?'} → {event.target}"] if event.target else []
    return ", ".join(parts + ([payload_text(event.payload)] if event.payload else []))


COLUMNS = (
    Column("at", "at"),
    Column("kind", "kind"),
    Column("about", _about),
    Column("by", "account"),
    Column("details", _details),
)


@click.command(cls=Command)
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now on (or after --since).")
@click.option(
    "--kinds", multiple=True, metavar="KIND", help="Only these, for example rule.ok or 'rule.*'; several may be."
)
@click.option("--since", metavar="CURSOR", help="After the event with this cursor [default: the oldest kept].")
@click.option("--entity", help="Only about things of this kind: rule, did, endpoint, …")
@click.option("--id", type=int, help="With --entity: only about this one.")
@click.option("--account", help="Only what this account did.")
def events(follow: bool, kinds: tuple[str, ...], since: str | None, **filters: Any) -> None:
    """What happened, in order; with --follow also what happens.

    Ends of transfers are kept for a week, all else for two years.
    """
    out = output()
    wanted = [kind for given in kinds for kind in given.split(",")]
    with connected() as client:
        if not follow:
            out.many(client.events.list(since, wanted, **filters), COLUMNS, nothing="nothing of that happened")
            return
        for event in client.events.follow(since or "now", wanted, **filters):
            if out.form == "table":
                line = (human_instant(event.at), event.kind, _about(event), event.account or "–", _details(event))
                out.lines(event, ["  ".join(line).rstrip()])
            else:  # one document has no end here
                out.one_line(event)
