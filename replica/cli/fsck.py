"""The command `replica fsck`: does the database agree with itself?

Given     the URL of the database, and which invariants to check.
Returns   0 when all is well or was repaired, 1 when something is not.
Promises  reads one moment of the database while everything else goes on; changes nothing without `--repair`.
Partner   replica.catalog.fsck proves; it needs the database, not the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.common import Command, output, settings
from replica.cli.output import Column
from replica.cli.service import serving

if TYPE_CHECKING:
    from replica.catalog.fsck import Report


@click.command(cls=Command)
@click.option("--repair", type=click.Choice(["counters"]), help="Count again what was counted wrongly.")
@click.option("--only", multiple=True, metavar="NAME", help="Check only this invariant; may be given several times.")
@click.option("--list", "listed", is_flag=True, help="Print the invariants and what each promises, and check nothing.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where replica.toml is looked for; or the DIR of `replica up`.",
)
def fsck(repair: str | None, only: tuple[str, ...], listed: bool, directory: Path | None) -> int:
    """Prove that the database agrees with itself: locks, rules, replicas, transfers, usage and every counter.

    It reads the database of REPLICA_DATABASE_URL, or of `replica up` in DIR, as it is at one moment, while everything
    else goes on. Only counters are repaired, and only when asked. It ends with 0 when all is well or was repaired,
    with 1 when something is not.
    """
    with serving():
        from replica.catalog import fsck as proof
        from replica.db import schema
        from replica.db.engine import Database
        from rules.errors import Invalid

        wanted = proof.named(only)
        if listed:
            columns = [Column("invariant", "name"), Column("promises", "promise")]
            promises = ({"name": i.name, "promise": i.promise} for i in wanted)
            if output().form == "table":
                output().many(wanted, columns)
            else:
                output().many(promises, columns)
            return 0
        url = settings(directory).database_url or _embedded(directory)
        if url is None:
            raise Invalid(
                "no database was named",
                hint="set REPLICA_DATABASE_URL, for example postgresql://replica@127.0.0.1/replica; of `replica up "
                "--dir DIR`, it is checked with --dir DIR",
            )
        database = Database(url, pool_size=1)
        try:
            file = database.url.database
            if database.url.get_backend_name() == "sqlite" and not (file and Path(file).is_file()):
                raise Invalid(f"there is no database file {file}", hint="correct REPLICA_DATABASE_URL")
            schema.check(database)
            report = proof.check(database, only=only, repair=repair is not None)
        finally:
            database.close()
        output().lines(report, _lines(report))
        return 0 if report.clean else 1


def _embedded(directory: Path | None) -> str | None:
    """The database that `replica up --dir` keeps there."""
    from replica.embedded import DATABASE

    file = None if directory is None else directory.absolute() / DATABASE
    return f"sqlite:///{file}" if file is not None and file.is_file() else None


def _lines(report: Report) -> Iterator[str]:
    wrong = 0
    for finding in report.findings:
        if not finding.violations:
            continue
        wrong += finding.violations > finding.repaired
        times = "once" if finding.violations == 1 else f"{finding.violations} times"
        mended = f", {finding.repaired} repaired" if finding.repaired else ""
        yield f"WRONG {times}{mended}  {finding.invariant}: {finding.promise}"
        for example in finding.examples:
            yield f"       {example.message}"
        if finding.violations > len(finding.examples):
            yield f"       … and {finding.violations - len(finding.examples)} more"
    seconds = sum(finding.seconds for finding in report.findings)
    checked = len(report.findings)
    tell = "nothing is wrong" if not wrong else "one is violated" if wrong == 1 else f"{wrong} are violated"
    yield f"{checked} invariant{'' if checked == 1 else 's'} checked in {seconds:.1f} s: {tell}."
