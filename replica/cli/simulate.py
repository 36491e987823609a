"""`replica simulate`: what the rules that adapt would do, on paper.

Given     a trace, by name.
Returns   what would arrive with our rules, with FTS3's, and with fixed numbers; or our decisions one by one.
Promises  asks no server and changes nothing; the same seed gives the same.
Partner   replica.simulation.
"""

from __future__ import annotations

import statistics

import click

from replica.cli.common import Group, output
from replica.cli.output import Column


@click.group(cls=Group)
def simulate() -> None:
    """What the rules that adapt would do, on paper: no server is asked."""


@simulate.command()
@click.option("--trace", "names", multiple=True, metavar="NAME", help="Only this one; may be said again.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1, 1_000), help="In so many weathers.")
@click.option("--decisions", is_flag=True, help="Print what our rules decided and why, for the first seed.")
def concurrency(names: tuple[str, ...], seeds: int, decisions: bool) -> None:
    """Play how many files may be in flight: ours, FTS3's, 4, 32, and who knows the trace beforehand.

    Printed is what arrived as a part of what the last brought, how many attempts failed, and for how long too much was
    in flight. The traces are in replica/simulation/traces.py; a world of your own is a few lines of Python.
    """
    from replica.simulation.play import POLICIES, compare, play
    from replica.simulation.traces import TRACES

    unknown = next((name for name in names if name not in TRACES), None)
    if unknown is not None:
        raise click.UsageError(f"there is no trace {unknown}; there are {', '.join(TRACES)}")
    chosen = [TRACES[name] for name in names or TRACES]
    if decisions:
        rows: list[dict[str, object]] = [
            {"trace": trace.name, "second": at, "of": of, "number": number, "why": why, "reason": reason}
            for trace in chosen
            for at, of, number, why, reason in play(trace, "ours", 0, keep_decisions=True).decisions
        ]
        output().many(rows, [Column(name, name) for name in ("trace", "second", "of", "number", "why", "reason")])
        return
    scores = []
    for trace in chosen:
        played = [compare(trace, seed) for seed in range(seeds)]
        for policy in POLICIES:
            mine = [each[policy] for each in played]
            scores.append(
                {
                    "trace": trace.name,
                    "policy": policy,
                    "of_oracle": round(statistics.mean(score.of_oracle for score in mine), 3),
                    "failures": round(statistics.mean(score.failures for score in mine), 1),
                    "too_many_seconds": round(statistics.mean(score.overshoot_seconds for score in mine)),
                    "mean_in_flight": round(statistics.mean(score.mean_in_flight for score in mine), 1),
                }
            )
    columns = (
        *(Column(name, name) for name in ("trace", "policy")),
        Column("of the oracle's", "of_oracle"),
        Column("failures", "failures"),
        Column("too many, s", "too_many_seconds"),
        Column("in flight", "mean_in_flight"),
    )
    output().many(scores, columns)
