"""`replica rule`: how many good copies, and where.

Given     a DID, a number of copies, an endpoint expression.
Returns   the rule; with --wait, when it is kept: 0, or 5 when the time was up first.
Promises  waiting changes nothing and ends by itself only when the rule is ok, gone, or the time is up; a rule that is
          stuck is waited for, and what it is stuck on is said on stderr.
Partner   replica.client.rules.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from replica.cli import rule_acts
from replica.cli.common import DURATION, MOMENT, Command, Group, ParamType, connected, output, pointing
from replica.cli.output import Column, human_size, parse_duration, say, size_column
from replica.cli.rule_output import print_plan, print_rule, reason_line, waiting_lines
from rules.errors import Refused, Unavailable

if TYPE_CHECKING:
    from replica import wire
    from replica.client import Client

FOR_EVER = float("inf")
#: So long a server may be away while we wait: it is being restarted.
_PATIENCE_SECONDS = 60.0

COLUMNS = (
    Column("rule", "id", right=True),
    Column("state", "state"),
    Column("did", "did"),
    Column("copies", "copies", right=True),
    Column("to", "expression"),
    Column("files", lambda r: f"{r.files_available}/{r.files_total}", right=True),
    size_column("size", "bytes_total"),
    Column("ok/moving/stuck", lambda r: f"{r.locks_ok}/{r.locks_replicating}/{r.locks_stuck}", right=True),
    Column("expires", "expires_at"),
)


@click.group(cls=Group)
def rule() -> None:
    """Rules: how many good copies, and where."""


class _Add(Command):
    """`--wait` may stand alone: the word after it is its value only if it reads as a time."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_explicit_wait(args)))


def _with_explicit_wait(args: list[str]) -> Iterator[str]:
    rest = iter(args)
    for word in rest:
        if word == "--":
            yield word
            yield from rest
            return
        if word != "--wait":
            yield word
            continue
        following = next(rest, None)
        if following is not None and re.match(r"\d+(\.\d+)?[smhdwy]?\Z", following):
            yield f"--wait={following}"
        else:
            yield "--wait="
            if following is not None:
                yield from _with_explicit_wait([following, *rest])


class _Wait(ParamType):
    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if value == "":
            return FOR_EVER
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@rule.command(cls=_Add)
@click.argument("did")
@click.option("--copies", type=click.IntRange(1, 100), default=1, show_default=True, help="How many copies.")
@click.option("--to", "expression", required=True, metavar="EXPR", help="Among which endpoints, e.g. 'kind=disk'.")
@click.option(
    "--grouping",
    type=click.Choice(["dataset", "all", "none"]),
    default="dataset",
    show_default=True,
    help="What stays together: each dataset, everything, nothing.",
)
@click.option(
    "--spread",
    default="endpoint",
    show_default=True,
    metavar="ATTR",
    help="What no two copies share: endpoint, site, …",
)
@click.option("--weight", metavar="KEY", help="The numeric attribute that biases the choice.")
@click.option("--lifetime", type=DURATION, metavar="TIME", help="When the wish ends, for example 30d.")
@click.option("--from", "source_expression", metavar="EXPR", help="Copy only from these endpoints.")
@click.option("--priority", type=click.IntRange(1, 5), default=3, show_default=True, help="5 is the most urgent.")
@click.option("--activity", default="default", show_default=True)
@click.option("--comment", default="")
@click.option("--expires", "expires_at", type=MOMENT, metavar="TIME", help="When the wish ends, as a moment.")
@click.option("--not-before", type=MOMENT, metavar="TIME", help="It protects and moves nothing until then.")
@click.option("--locked", is_flag=True, help="It neither ends nor gives up a copy until it is unlocked.")
@click.option("--purge", is_flag=True, help="At its end its copies go at once, not when space is needed.")
@click.option("--ask-approval", is_flag=True, help="Wait until an administrator has said yes.")
@click.option("--notify", metavar="WEBHOOK", help="Who is told what becomes of it.")
@click.option("--metadata", callback=rule_acts.read_json, metavar="JSON")
@click.option("--plan", is_flag=True, help="Only say what would be done; change nothing.")
@click.option(
    "--wait", type=_Wait(), metavar="[SECONDS]", help="Wait until all copies are there; exit 5 if they are not in time."
)
def add(did: str, plan: bool, wait: float | None, lifetime: float | None, **wish: Any) -> int:
    """Wish for copies of a DID, now and of everything that is attached to it later."""
    from replica import wire

    if lifetime is not None:
        wish["lifetime_seconds"] = max(1, round(lifetime))
    with (
        connected() as client,
        pointing(expression=wish["expression"], source_expression=wish["source_expression"]),
    ):
        if plan:
            print_plan(client.rules.plan(wire.NewRule(did=did, **wish)))
            return 0
        made = client.rules.add(wire.NewRule(did=did, **wish))
        if wait is None:
            print_rule(made)
            return 0
        say(f"rule {made.id} was added; waiting for its copies")
        return _wait(client, made, wait)


def _wait(client: Client, found: wire.Rule, seconds: float) -> int:
    """Until the rule is ok, gone, or the time is up."""
    deadline = time.monotonic() + seconds
    pause = 0.1
    said: object = None
    reached_at = time.monotonic()
    while found.state != "ok":
        if found.state == "expired":
            raise Refused(
                f"rule {found.id} ended while it was waited for", hint="it was deleted or its lifetime is over"
            )
        said = _say_progress(found, said)
        left = deadline - time.monotonic()
        if left <= 0:
            print_rule(found)
            say(f"replica: rule {found.id} is not yet ok after {seconds:g} s; it goes on without us")
            say(f"hint: see `replica rule explain {found.id}`")
            return 5
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, 2.0)
        try:
            found = client.rules.show(found.id)
            reached_at = time.monotonic()
        except Unavailable as error:
            if time.monotonic() - reached_at > _PATIENCE_SECONDS:
                raise
            said = _say_once(f"{error.message}; still waiting", said)
    print_rule(found)
    return 0


def _say_progress(found: wire.Rule, said: object) -> object:
    line = f"rule {found.id} is {found.state}: {found.locks_ok} copies of files ok, {found.locks_replicating} moving"
    if found.locks_stuck:
        line += f", {found.locks_stuck} stuck"
    for reason in found.reasons:
        line += f"\n  {reason_line(reason)}"
    return _say_once(line, said)


def _say_once(line: str, said: object) -> object:
    if line != said:
        for part in line.split("\n"):
            say(part)
    return line


@rule.command("list")
@click.argument("did", required=False)
@click.option("--account")
@click.option("--state", type=click.Choice(["replicating", "ok", "stuck", "suspended", "waiting_approval", "expired"]))
def list_(did: str | None, account: str | None, state: str | None) -> None:
    """List rules, all or those on a DID."""
    with connected() as client:
        output().many(client.rules.list(did=did, account=account, state=state), COLUMNS, nothing="there are no rules")


@rule.command()
@click.argument("rule", type=int)
def show(rule: int) -> None:
    """Show one rule."""
    with connected() as client:
        print_rule(client.rules.show(rule))


@rule.command()
@click.argument("rule", type=int)
def explain(rule: int) -> None:
    """Say where the copies of a rule are, what is missing, why, and what happens next."""
    with connected() as client:
        explained = client.rules.explain(rule)
    lines = list(explained.sentences)
    if explained.waiting:
        lines += ["", "waiting:", *waiting_lines(explained.waiting)]
    if explained.locks:
        lines += ["", "copies:"]
        lines += [
            f"  {lock.unit} at {lock.endpoint}: {lock.files_available} of {lock.files_total} files"
            f"{f', {lock.files_stuck} stuck' if lock.files_stuck else ''}, {human_size(lock.bytes_total)}"
            f"{', not wished any more: kept until the others are there' if lock.surplus else ''}"
            for lock in explained.locks
        ]
    output().lines(explained, lines)


for _command in rule_acts.COMMANDS:
    rule.add_command(_command)
