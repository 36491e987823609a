"""`replica transfer`: what is being copied, and why not.

Given     transfers' numbers, or filters.
Returns   transfers and their states.
Partner   replica.client.transfers.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from replica.cli.common import Group, connected, output
from replica.cli.output import Column, human_size, say, size_column

if TYPE_CHECKING:
    from replica import wire
    from replica.client import Client

ACTIVE = ("queued", "claimed", "moving", "verifying", "waiting")
STATES = (*ACTIVE, "done", "failed", "cancelled")

COLUMNS = (
    Column("transfer", "id", right=True),
    Column("state", "state"),
    Column("did", "did"),
    Column("source", "source"),
    Column("target", "target"),
    size_column("size", "bytes"),
    Column("done", lambda t: _percent(t), right=True),
    Column("attempts", "attempts", right=True),
    Column("reason", "reason"),
)


def _percent(transfer: wire.Transfer) -> str:
    if transfer.state == "done":
        return "100 %"
    return f"{100 * transfer.bytes_done // transfer.bytes} %" if transfer.bytes else "0 %"


@click.group(cls=Group)
def transfer() -> None:
    """Transfers: what is being copied, and why not."""


@transfer.command("list")
@click.option("--state", type=click.Choice(STATES))
@click.option("--rule", type=int, help="Only those a rule waits for.")
@click.option("--did", help="Only those of a file.")
@click.option("--site", help="Only those to a site.")
def list_(**filters: Any) -> None:
    """List transfers."""
    with connected() as client:
        output().many(client.transfers.list(**filters), COLUMNS, nothing="there are no such transfers")


@transfer.command()
@click.argument("transfer", type=int)
def show(transfer: int) -> None:
    """Show one transfer."""
    with connected() as client:
        _print(client.transfers.show(transfer))


@transfer.command()
@click.argument("transfers", type=int, nargs=-1, required=True, metavar="TRANSFER…")
def cancel(transfers: tuple[int, ...]) -> None:
    """Cancel transfers that have not ended."""
    with connected() as client:
        output().many([client.transfers.cancel(number) for number in transfers], COLUMNS)


@transfer.command()
@click.argument("transfers", type=int, nargs=-1, required=True, metavar="TRANSFER…")
def retry(transfers: tuple[int, ...]) -> None:
    """Try transfers again now: failed ones, and those that pause before their next attempt."""
    with connected() as client:
        output().many([client.transfers.retry(number) for number in transfers], COLUMNS)


@transfer.command()
@click.argument("transfers", type=int, nargs=-1, metavar="[TRANSFER…]")
@click.option("--rule", type=int, help="Only those a rule waits for.")
@click.option("--site", help="Only those to a site.")
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between looks.")
def watch(transfers: tuple[int, ...], interval: float, **filters: Any) -> int:
    """Follow transfers until none is active; a line for each change. Exit 1 if one of them failed."""
    out = output()
    ended: list[wire.Transfer] = []
    seen: dict[int, tuple[str, int, str]] = {}
    with connected() as client:
        following = dict.fromkeys(transfers)
        while True:
            active = {t.id: t for t in _active(client, following, filters)}
            gone = [client.transfers.show(number) for number in seen.keys() - active.keys()]
            for found in (*gone, *active.values()):
                now = (found.state, found.attempts, _percent(found))
                if seen.get(found.id) != now:
                    seen[found.id] = now
                    _tell(out, found)
                if found.state not in ACTIVE:
                    ended.append(found)
                    del seen[found.id]
                    following.pop(found.id, None)
            if not seen and not active:
                break
            time.sleep(interval)
    if out.form == "json":
        out.many(ended, COLUMNS)
    failed = sum(t.state == "failed" for t in ended)
    say(f"ended: {len(ended) - failed} well, {failed} failed" if ended else "no transfer is active")
    return 1 if failed else 0


def _active(client: Client, following: dict[int, None], filters: dict[str, Any]) -> list[wire.Transfer]:
    """The transfers to tell of now. Those named by number are told of even when they have ended."""
    if following:
        return [client.transfers.show(number) for number in following]
    return [t for state in ACTIVE for t in client.transfers.list(state=state, **filters)]


def _tell(out: Any, found: wire.Transfer) -> None:
    if out.form == "ndjson":
        out.one(found)
    elif out.form == "table":
        reason = f": {found.reason}" if found.reason else ""
        way = f"{found.source or '?'} → {found.target}"
        out.lines(found, [f"{found.id}  {found.state}  {_percent(found)}  {found.did}  {way}{reason}"])


def _way(route: wire.Route | None) -> str | None:
    if route is None:
        return None
    hops = (
        f"{hop.endpoint} ({hop.state}{'' if hop.transfer is None else f', transfer {hop.transfer}'})"
        for hop in route.hops
    )
    way = " → ".join((route.source, *hops, route.target))
    return way if route.outcome is None else f"{way}: {route.outcome}, {route.reason}"


def _print(found: wire.Transfer) -> None:
    output().one(
        found,
        [
            ("transfer", found.id),
            ("state", found.state),
            ("did", found.did),
            ("source", found.source),
            ("why from there", found.source_why),
            ("also from", ", ".join(found.also_from) or None),
            ("route", _way(found.route)),
            ("a step for", ", ".join(map(str, found.step_for)) or None),
            ("target", found.target),
            ("size", human_size(found.bytes)),
            ("done", _percent(found)),
            ("attempts", found.attempts),
            ("priority", found.priority),
            ("activity", found.activity),
            ("reason", found.reason),
            ("created", found.created_at),
            ("not before", found.not_before),
            ("finished", found.finished_at),
        ],
    )
