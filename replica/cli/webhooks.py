"""`replica webhook`: servers elsewhere that are told what happens.

Given     a name and a URL.
Returns   the webhook; when it is made its secret, this once.
Partner   replica.client.webhooks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from replica.cli.common import DURATION, Group, connected, output
from replica.cli.output import Column, say

if TYPE_CHECKING:
    from replica import wire

COLUMNS = (
    Column("webhook", "name"),
    Column("enabled", "enabled"),
    Column("url", "url"),
    Column("kinds", "kinds"),
    Column("delivered", "delivered_at"),
    Column("up to date", "up_to_date"),
    Column("failures", "failures", right=True),
    Column("last error", "last_error"),
)


@click.group(cls=Group)
def webhook() -> None:
    """Webhooks: servers elsewhere that are told what happens."""


@webhook.command()
@click.argument("name")
@click.argument("url")
@click.option("--kinds", multiple=True, metavar="KIND", help="For example rule.ok or 'rule.*' [default: everything].")
def add(name: str, url: str, kinds: tuple[str, ...]) -> None:
    """Add a webhook: from now on it is told what happens, by POST of JSON, in order.

    The secret that is printed signs what is sent: the header Replica-Signature is `sha256=` and the HMAC-SHA256 of the
    header Replica-Timestamp, a dot and the body. It is shown this once. An event may come twice; tell it by its cursor.
    """
    from replica import wire

    wanted = [kind for given in kinds for kind in given.split(",")]
    with connected() as client:
        made = client.webhooks.add(wire.NewWebhook(name=name, url=url, kinds=wanted))
    output().lines(made, [made.secret])


@webhook.command("list")
def list_() -> None:
    """List webhooks."""
    with connected() as client:
        output().many(client.webhooks.list(), COLUMNS, nothing="there are no webhooks")


@webhook.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a webhook, and why the last delivery failed if it did."""
    with connected() as client:
        output().one(client.webhooks.show(name))


@webhook.command()
@click.argument("name")
@click.option("--from-now", is_flag=True, help="Leave out what happened while it was disabled.")
def enable(name: str, from_now: bool) -> None:
    """Enable a webhook; it goes on where it was, at once."""
    with connected() as client:
        output().one(client.webhooks.change(name, enabled=True, from_now=from_now))


@webhook.command()
@click.argument("name")
def disable(name: str) -> None:
    """Disable a webhook; where it was is kept."""
    with connected() as client:
        output().one(client.webhooks.change(name, enabled=False))


@webhook.command()
@click.argument("name")
@click.option("--wait", type=DURATION, default="30s", show_default=True, metavar="TIME", help="How long to wait.")
def test(name: str, wait: float) -> int:
    """Send a webhook an event of its own. Exit 1 if it did not take it, 5 if it was not tried in time."""
    with connected() as client:
        before = client.webhooks.test(name)
        deadline = time.monotonic() + wait
        while True:
            now = client.webhooks.show(name)
            if _ended(before, now) or time.monotonic() >= deadline:
                break
            time.sleep(0.2)
    output().one(now)
    if now.failures > before.failures:
        say(f"replica: {name} did not take it: {now.last_error}")
        return 1
    return 0 if _ended(before, now) else 5


def _ended(before: wire.Webhook, now: wire.Webhook) -> bool:
    return now.failures > before.failures or (now.delivered_at != before.delivered_at and now.up_to_date)


@webhook.command()
@click.argument("name")
def delete(name: str) -> None:
    """Delete a webhook; it is told nothing any more."""
    with connected() as client:
        client.webhooks.delete(name)
    say(f"webhook {name} is deleted")
