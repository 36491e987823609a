"""What a person does to a rule that is there: change, move, approve, pause, end it, and ask what became of it.

Given     the number of a rule.
Returns   the rule as it is then; with --plan, what would be done.
Promises  --plan changes nothing; what is not typed stays as it is.
Partner   replica.client.rules; replica.cli.rules has these under `replica rule`.
"""

from __future__ import annotations

import json
from typing import Any

import click

from replica.cli.common import DURATION, MOMENT, Command, connected, output, pointing
from replica.cli.output import Column
from replica.cli.rule_output import print_delete_plan, print_rule, print_wish_plan

HISTORY = (
    Column("version", "version", right=True),
    Column("at", "at"),
    Column("what", lambda e: e.kind.partition(".")[2]),
    Column("by", lambda e: e.account or "–"),
    Column("more", lambda e: ", ".join(f"{k}: {_said(v)}" for k, v in e.payload.items()) or "–"),
)

PLAN = click.option("--plan", is_flag=True, help="Only say what would be done; change nothing.")
COMMENT = click.option("--comment", default="", help="Why; kept in the history.")


def _said(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2:
        return f"{_said(value[0])} → {_said(value[1])}"
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False)
    return "nothing" if value is None or value == "" else str(value)


def read_json(context: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """An object, as `--metadata` takes it."""
    if value is None:
        return None
    try:
        found = json.loads(value)
    except ValueError as error:
        raise click.BadParameter(f"this is not JSON: {error}", context, parameter) from error
    if not isinstance(found, dict):
        raise click.BadParameter("write an object, for example '{\"run\": 7}'", context, parameter)
    return found


@click.command(cls=Command)
@click.argument("rule", type=int)
@click.option("--copies", type=click.IntRange(1, 100))
@click.option("--to", "expression", metavar="EXPR", help="Among which endpoints.")
@click.option("--grouping", type=click.Choice(["dataset", "all", "none"]))
@click.option("--spread", metavar="ATTR")
@click.option("--weight", metavar="KEY", help="Empty: none.")
@click.option("--from", "source_expression", metavar="EXPR", help="Copy only from these endpoints; empty: from all.")
@click.option("--lifetime", type=DURATION, metavar="TIME", help="From now on, for example 30d.")
@click.option("--expires", "expires_at", type=MOMENT, metavar="TIME", help="When it ends.")
@click.option("--for-ever", is_flag=True, help="It does not end by itself.")
@click.option("--lock/--unlock", "locked", default=None, help="Whether it may end or give up a copy.")
@click.option("--purge/--no-purge", default=None, help="Whether its copies go at once when it ends.")
@click.option("--priority", type=click.IntRange(1, 5))
@click.option("--activity")
@click.option("--comment")
@click.option("--metadata", callback=read_json, metavar="JSON")
@click.option("--notify", metavar="WEBHOOK", help="Who is told what becomes of it; empty: nobody.")
@click.option("--account", help="Whose rule it is from now on.")
@click.option("--if-version", "version", type=int, help="Only if nothing has happened to it since it had this version.")
@PLAN
def update(rule: int, plan: bool, version: int | None, for_ever: bool, lifetime: float | None, **said: Any) -> None:
    """Change a rule in place. Copies it does not wish any more stay until those it does wish are there."""
    from replica import wire

    fields = {name: value for name, value in said.items() if value is not None}
    for name in ("weight", "source_expression", "notify"):
        if fields.get(name) == "":
            fields[name] = None
    if lifetime is not None:
        fields["lifetime_seconds"] = max(1, round(lifetime))
    if for_ever:
        if lifetime is not None or said["expires_at"] is not None:
            raise click.UsageError("--for-ever and an end exclude each other")
        fields["expires_at"] = None
    if not fields:
        raise click.UsageError("say what to change; `replica rule update --help` lists it")
    change = wire.RuleChange(**fields)
    with (
        connected() as client,
        pointing(expression=said["expression"], source_expression=said["source_expression"]),
    ):
        if plan:
            print_wish_plan(client.rules.plan_update(rule, change))
        else:
            print_rule(client.rules.update(rule, change, version=version))


@click.command(cls=Command)
@click.argument("rule", type=int)
@click.option("--to", "expression", required=True, metavar="EXPR", help="Where the copies shall be instead.")
@click.option("--copies", type=click.IntRange(1, 100), help="How many, if not as many as now.")
@PLAN
def move(rule: int, expression: str, copies: int | None, plan: bool) -> None:
    """Make a rule's copies elsewhere. The old ones go when the new ones are there and verified."""
    from replica import wire

    wanted = wire.RuleMove(expression=expression, **({} if copies is None else {"copies": copies}))
    with connected() as client, pointing(expression=expression):
        if plan:
            print_wish_plan(client.rules.plan_move(rule, wanted))
        else:
            print_rule(client.rules.move(rule, wanted))


@click.command(cls=Command)
@click.argument("rule", type=int)
@COMMENT
def approve(rule: int, comment: str) -> None:
    """Say yes to a rule that waits for approval: it begins."""
    with connected() as client:
        print_rule(client.rules.approve(rule, comment))


@click.command(cls=Command)
@click.argument("rule", type=int)
@COMMENT
def deny(rule: int, comment: str) -> None:
    """Say no to a rule that waits for approval: it ends."""
    with connected() as client:
        print_rule(client.rules.deny(rule, comment))


@click.command(cls=Command)
@click.argument("rule", type=int)
@COMMENT
def suspend(rule: int, comment: str) -> None:
    """Let a rule's transfers wait. It protects what it protected, and covers what is attached."""
    with connected() as client:
        print_rule(client.rules.suspend(rule, comment))


@click.command(cls=Command)
@click.argument("rule", type=int)
def resume(rule: int) -> None:
    """Let a suspended rule go on."""
    with connected() as client:
        print_rule(client.rules.resume(rule))


@click.command(cls=Command)
@click.argument("rule", type=int)
def history(rule: int) -> None:
    """List what happened to a rule, from its beginning."""
    with connected() as client:
        output().many(client.rules.history(rule), HISTORY, nothing="nothing is known to have happened")


@click.command(cls=Command)
@click.argument("rules", type=int, nargs=-1, required=True, metavar="RULE…")
@click.option("--purge/--no-purge", default=None, help="Whether its copies go at once; else as the rule says.")
@PLAN
def delete(rules: tuple[int, ...], purge: bool | None, plan: bool) -> None:
    """Delete rules. Replicas that no other rule protects may then be removed."""
    with connected() as client:
        if plan:
            print_delete_plan([client.rules.plan_delete(number, purge=purge) for number in rules])
            return
        for number in rules:
            client.rules.delete(number, purge=purge)
    output().lines({"deleted": list(rules)}, [f"rule {number} was deleted" for number in rules])


COMMANDS = (update, move, approve, deny, suspend, resume, history, delete)
