"""`replica subscription`: rules for all data that fulfil a condition.

Given     a condition on what is known of a DID, and rules without their DID.
Returns   the subscription; or what it would make, which changes nothing.
Partner   replica.client.subscriptions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replica.cli.common import DURATION, Group, connected, output, pointing
from replica.cli.output import Column, human_size, say
from rules.errors import Invalid

if TYPE_CHECKING:
    from replica import wire

COLUMNS = (
    Column("subscription", "name"),
    Column("enabled", "enabled"),
    Column("account", "account"),
    Column("condition", "condition"),
    Column("rules", lambda s: "; ".join(f"{r.copies} × {r.expression}" for r in s.rules)),
    Column("made", "rules_made", right=True),
    Column("backfilling", "backfilling"),
    Column("expires", "expires_at"),
)


def _wish(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which DIDs and which rules."""
    options = (
        click.option(
            "--where", "condition", metavar="COND", help="Which, e.g. 'kind = dataset and metadata.type = raw'."
        ),
        click.option("--to", metavar="EXPR", help="The rule's endpoints; {metadata.key} is filled in for each DID."),
        click.option(
            "--copies", type=click.IntRange(1, 100), default=1, show_default=True, help="Copies of that rule."
        ),
        click.option("--grouping", type=click.Choice(["dataset", "all", "none"]), default="dataset", show_default=True),
        click.option("--spread", default="endpoint", show_default=True, metavar="ATTR"),
        click.option("--rule-lifetime", type=DURATION, metavar="TIME", help="How long each rule lives."),
        click.option(
            "--rule",
            "rules",
            multiple=True,
            metavar="RULE",
            help="One more rule: an expression, or JSON with the fields of a rule; @FILE reads it from a file.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(cls=Group)
def subscription() -> None:
    """Subscriptions: rules for all data that fulfil a condition.

    A rule is made once for each DID, when it is made, closed or given other metadata, and with a backfill for what
    exists. It stays when its DID fulfils the condition no more, and when the subscription is changed or deleted. In
    the rules' expressions {metadata.key} stands for what the DID's metadata say; where they do not, no rule is made,
    and `subscription show` says so.
    """


@subscription.command()
@click.argument("name")
@_wish
@click.option("--comment", default="")
@click.option("--lifetime", type=DURATION, metavar="TIME", help="When the subscription itself ends.")
@click.option("--backfill", is_flag=True, help="Look at what exists, too.")
def add(name: str, comment: str, lifetime: float | None, backfill: bool, **wish: Any) -> None:
    """Add a subscription."""
    new = _new(name, wish)
    new.comment, new.backfill = comment, backfill
    new.lifetime_seconds = None if lifetime is None else int(lifetime)
    with connected() as client, pointing(condition=new.condition, expression=_only_expression(new)):
        _print(client.subscriptions.add(new))


@subscription.command()
@click.argument("name", required=False)
@_wish
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="DIDs that are listed.")
def preview(name: str | None, limit: int, **wish: Any) -> None:
    """Say what a backfill would make, and change nothing: of the subscription NAME, or of --where and --to."""
    if name is not None and wish["condition"] is not None:
        raise click.UsageError("say either NAME or --where")
    which = name if name is not None else _new("preview", wish)
    with connected() as client, pointing(condition=wish["condition"], expression=wish["to"]):
        found = client.subscriptions.preview(which, limit=limit)
    output().lines(found, _sentences(found))


def _sentences(found: wire.SubscriptionPreview) -> list[str]:
    lines = [f"{found.matching} of {found.examined} datasets and containers fulfil the condition"]
    for did in found.dids:
        for rule in did.rules:
            if rule.exists:
                said = "made before"
            elif rule.skipped:
                said = f"no rule: {rule.skipped}"
            else:
                said = f"{human_size(rule.new_bytes)} to copy"
                said += f", no place for {rule.copies_missing} copies" if rule.copies_missing else ""
            lines.append(f"{did.did}  {rule.expression}  {said}")
    if found.more:
        lines.append(f"… and {found.matching - len(found.dids)} more")
    lines += [
        f"to {endpoint}: {human_size(size)} for those listed" for endpoint, size in found.new_bytes.items() if size
    ]
    return lines


@subscription.command("list")
def list_() -> None:
    """List subscriptions."""
    with connected() as client:
        output().many(client.subscriptions.list(), COLUMNS, nothing="there are no subscriptions")


@subscription.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a subscription, and the DIDs for which a rule could not be made."""
    with connected() as client:
        _print(client.subscriptions.show(name))


@subscription.command()
@click.argument("name")
@_wish
@click.option("--comment")
@click.option("--lifetime", type=DURATION, metavar="TIME", help="When the subscription itself ends, from now.")
def update(name: str, comment: str | None, lifetime: float | None, **wish: Any) -> None:
    """Change a subscription from now on. What it made stays; a changed rule is a new one beside it."""
    from replica import wire

    change = wire.SubscriptionChange()
    if wish["condition"] is not None:
        change.condition = wish["condition"]
    if wish["to"] is not None or wish["rules"]:
        change.rules = _templates(wish)
    if comment is not None:
        change.comment = comment
    if lifetime is not None:
        change.lifetime_seconds = int(lifetime)
    if change == wire.SubscriptionChange():
        raise click.UsageError("say what to change; `replica subscription update --help` lists it")
    with connected() as client, pointing(condition=wish["condition"], expression=_only_expression(change)):
        _print(client.subscriptions.change(name, change))


@subscription.command()
@click.argument("name")
def enable(name: str) -> None:
    """Enable a subscription; it looks at what was made and changed meanwhile, too."""
    _change(name, enabled=True)


@subscription.command()
@click.argument("name")
def disable(name: str) -> None:
    """Disable a subscription."""
    _change(name, enabled=False)


def _change(name: str, **fields: Any) -> None:
    from replica import wire

    with connected() as client:
        _print(client.subscriptions.change(name, wire.SubscriptionChange(**fields)))


@subscription.command()
@click.argument("name")
def backfill(name: str) -> None:
    """Look at all that exist; `subscription preview NAME` says before what that makes."""
    with connected() as client:
        _print(client.subscriptions.backfill(name))


@subscription.command()
@click.argument("name")
def delete(name: str) -> None:
    """Delete a subscription; the rules that it made stay."""
    with connected() as client:
        client.subscriptions.delete(name)
    say(f"subscription {name} is deleted; its rules stay")


def _new(name: str, wish: dict[str, Any]) -> wire.NewSubscription:
    from replica import wire

    if wish["condition"] is None:
        raise click.UsageError("say which DIDs with --where")
    return wire.NewSubscription(name=name, condition=wish["condition"], rules=_templates(wish))


def _only_expression(said: Any) -> str | None:
    """What an error in an expression is about, if there is one that it can be about."""
    return said.rules[0].expression if said.rules and len(said.rules) == 1 else None


def _templates(wish: dict[str, Any]) -> list[wire.RuleTemplate]:
    from replica import wire

    templates = []
    if wish["to"] is not None:
        lifetime = wish["rule_lifetime"]
        templates.append(
            wire.RuleTemplate(
                expression=wish["to"],
                copies=wish["copies"],
                grouping=wish["grouping"],
                spread=wish["spread"],
                lifetime_seconds=None if lifetime is None else int(lifetime),
            )
        )
    templates += [_template(text) for text in wish["rules"]]
    if not templates:
        raise click.UsageError("say which rules with --to or --rule")
    return templates


def _template(text: str) -> wire.RuleTemplate:
    import msgspec

    from replica import wire

    if text.startswith("@"):
        text = Path(text[1:]).read_text(encoding="utf-8")
    # A placeholder begins with a brace, too, but never has a quote behind it.
    if not text.lstrip().startswith("{") or not text.lstrip()[1:].lstrip().startswith('"'):
        return wire.RuleTemplate(expression=text)
    try:
        return msgspec.json.decode(text, type=wire.RuleTemplate)
    except msgspec.MsgspecError as error:
        raise Invalid(
            f"--rule cannot be read: {error}", hint='write {"expression": "kind=disk", "copies": 2}'
        ) from None


def _print(found: wire.Subscription) -> None:
    rows: list[tuple[str, object]] = [
        ("subscription", found.name),
        ("enabled", found.enabled),
        ("account", found.account),
        ("condition", found.condition),
        *((f"rule {n}", f"{r.copies} × {r.expression}") for n, r in zip(found.numbers, found.rules, strict=True)),
        ("rules made", found.rules_made),
        ("backfilling", found.backfilling),
        ("comment", found.comment),
        ("expires", found.expires_at),
        *(("skipped", f"{s.did}: {s.reason}") for s in found.skipped),
    ]
    output().one(found, rows)
