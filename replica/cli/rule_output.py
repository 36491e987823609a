"""Rules, plans and reasons as a terminal shows them.

Given     structs of replica.wire.
Returns   nothing; they are printed by replica.cli.output, in the format that was asked for.
Promises  whatever is not satisfied is shown with its reason and what helps.
Partner   replica.cli.rules and .rule_acts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from replica.cli.common import output
from replica.cli.output import human_instant, human_size
from rules.quantities import counted

if TYPE_CHECKING:
    from replica import wire

#: How many copies and refusals of a plan are printed one by one.
LISTED_MAX = 20


def _copies(number: int) -> str:
    return f"{number} {'copy' if number == 1 else 'copies'}"


def _homeless(number: int) -> str:
    return f"{_copies(number)} {'has' if number == 1 else 'have'} no place"


def reason_line(reason: wire.Reason) -> str:
    where = f"{reason.endpoint}: "
    where = where if reason.endpoint and not reason.message.startswith(where) else ""
    files = f" ({reason.files} files)" if reason.files > 1 else ""
    hint = f"; {reason.hint}" if reason.hint else ""
    return f"{where}{reason.message}{files}{hint}"


def eta_text(rule: wire.Rule) -> str:
    if rule.eta is None:
        return rule.eta_note
    eta = rule.eta
    if eta.likely is None:
        return f"not before {human_instant(eta.optimistic)}: {rule.eta_note}"
    band = f"between {human_instant(eta.optimistic)} and {human_instant(eta.pessimistic)}"
    return f"about {human_instant(eta.likely)}, {band}"


def print_rule(found: wire.Rule) -> None:
    rows: list[tuple[str, object]] = [
        ("rule", found.id),
        ("state", found.state),
        ("did", found.did),
        ("copies", found.copies),
        ("to", found.expression),
        ("from", found.source_expression),
        ("grouping", found.grouping),
        ("spread", found.spread),
        ("weight", found.weight),
        ("files", f"{found.files_available} of {found.files_total} have all copies, {human_size(found.bytes_total)}"),
        ("copies of files", f"{found.locks_ok} ok, {found.locks_replicating} moving, {found.locks_stuck} stuck"),
        ("done", eta_text(found)),
        ("priority", found.priority),
        ("activity", found.activity),
        ("account", found.account),
        ("created", found.created_at),
        ("begins", found.not_before),
        ("expires", found.expires_at),
        ("ended", found.ended_at),
        ("locked", found.locked),
        ("purge", found.purge),
        ("notify", found.notify),
        ("comment", found.comment),
        ("metadata", found.metadata),
        ("version", found.version),
    ]
    rows += [("reason", reason_line(reason)) for reason in found.reasons]
    output().one(found, rows)


def print_plan(plan: wire.RulePlan) -> None:
    lines = [f"candidates: {', '.join(plan.candidates) or 'none'}"]
    if plan.exists is not None:
        lines.append(f"rule {plan.exists} wishes the same already: nothing would be added")
    if plan.asks:
        lines.append(f"a person would be asked first: {plan.asks}")
    lines += [f"{c.unit} → {c.endpoint}: {human_size(c.new_bytes)} to copy; {c.why}" for c in plan.copies[:LISTED_MAX]]
    for refusal in plan.refusals[:LISTED_MAX]:
        lines.append(f"{refusal.unit}: {_homeless(refusal.missing_copies)}")
        lines += [f"  {obstacle}" for obstacle in refusal.obstacles]
    shown = len({c.unit for c in plan.copies[:LISTED_MAX]} | {r.unit for r in plan.refusals[:LISTED_MAX]})
    if shown < plan.units:
        lines.append(f"… and {plan.units - shown} more of {plan.units}")
    lines += [
        f"{t.endpoint}: {counted(t.files, 'file')}, {human_size(t.bytes)}; of these {counted(t.new_files, 'file')}, "
        f"{human_size(t.new_bytes)} to copy"
        for t in plan.totals
    ]
    if plan.copies_missing:
        lines.append(_homeless(plan.copies_missing))
    lines.append(f"{human_size(plan.new_bytes)} would be copied; nothing was changed")
    output().lines(plan, lines)


def print_wish_plan(plan: wire.WishPlan) -> None:
    lines = [f"candidates: {', '.join(plan.candidates) or 'none'}"]
    lines += [
        f"to {m.endpoint}: {_copies(m.copies)}, {counted(m.files, 'file')}, {human_size(m.bytes)} to copy"
        for m in plan.made
    ]
    lines += [
        f"given up at {g.endpoint} once the others are there: {_copies(g.copies)}, {counted(g.files, 'file')}, "
        f"{human_size(g.bytes)}"
        for g in plan.given_up
    ]
    for refusal in plan.refusals[:LISTED_MAX]:
        lines.append(f"{refusal.unit}: {_homeless(refusal.missing_copies)}")
        lines += [f"  {obstacle}" for obstacle in refusal.obstacles]
    if plan.missing_copies:
        lines.append(_homeless(plan.missing_copies))
    lines.append("nothing was changed")
    output().lines(plan, lines)


def print_delete_plan(plans: list[wire.RuleDeletePlan]) -> None:
    lines = [line for plan in plans for line in _delete_lines(plan)]
    output().lines(plans, [*lines, "nothing was changed"])


def _delete_lines(plan: wire.RuleDeletePlan) -> Iterator[str]:
    if plan.refused:
        yield f"{plan.refused}; it would be refused"
    when = "would be removed at once" if plan.purge else "may be removed when space is needed"
    yield f"rule {plan.rule}: {plan.files} copies of files, {human_size(plan.bytes)}, lose their protection and {when}"
    for part in plan.endpoints:
        last = f"; {part.last_copies} of them the last copies" if part.last_copies else ""
        stopped = f"; {part.stopped} on their way are stopped" if part.stopped else ""
        yield f"  {part.endpoint}: {counted(part.files, 'file')}, {human_size(part.bytes)}{last}{stopped}"
    if plan.last_copies:
        yield f"  the last copies stay until somebody deletes the DID: {plan.last_copies}"


def waiting_lines(waiting: list[wire.Waiting]) -> Iterator[str]:
    for each in waiting:
        where = f" at {each.endpoint}" if each.endpoint else ""
        since = f", since {human_instant(each.since)}" if each.since else ""
        yield f"  {counted(each.files, 'file')} ({human_size(each.bytes)}){where}{since}: {each.message}"
        if each.next:
            yield f"    next: {each.next}"
        if each.hint:
            yield f"    what helps: {each.hint}"
        if each.units:
            more = " …" if len(each.units) == 10 else ""
            yield f"    for example: {', '.join(each.units)}{more}"
