"""`replica scan`: whether an endpoint holds what the catalogue says, and nothing else.

Given     an endpoint, and perhaps a listing of it.
Returns   a scan and the first of its findings. Exit code 1 when it failed, or when so much is missing or dark that
          nothing is done before a person says that it is so.
Partner   replica.client.scans; a worker of the site lists, or the listing is compared here.
"""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from replica.cli.common import FILE, MOMENT, Command, connected, output
from replica.cli.output import Column, human_size, say, size_column

if TYPE_CHECKING:
    from replica import wire
    from replica.client import Client

ENDED = ("done", "held", "failed", "cancelled")
_LINE_EVERY_SECONDS = 5.0
#: How many findings go to the server at a time.
_AT_ONCE = 5_000
#: A listing whose beginning nobody knows may have begun so long before its file was last written.
LISTING_HOURS = 24

FINDINGS = (
    Column("kind", "kind"),
    Column("state", "state"),
    Column("path", "path"),
    Column("did", "did"),
    size_column("size", "size"),
    size_column("found", "found_size"),
    Column("since", "first_seen_at"),
    Column("reason", "reason"),
)

SCANS = (
    Column("scan", "id", right=True),
    Column("state", "state"),
    Column("endpoint", "endpoint"),
    Column("files", "listed_files", right=True),
    Column("missing", lambda scan: scan.missing_files + scan.differing_files, right=True),
    Column("dark", "dark_files", right=True),
    Column("lost", "lost_files", right=True),
    Column("begun", "began_at"),
    Column("ended", "finished_at"),
    Column("reason", "reason"),
)


@click.command(cls=Command)
@click.argument("endpoint")
@click.option(
    "--listing", type=FILE, metavar="FILE", help="What is there: CSV of path[,size[,checksum]], plain or gzip."
)
@click.option("--listed-at", type=MOMENT, metavar="TIME", help="When that listing began.  [default: a day before FILE]")
@click.option("--accept-fraction", is_flag=True, help="So much is missing or dark indeed: go on.")
@click.option("--remove-dark", is_flag=True, help="Move what the last scan confirmed as dark to quarantine.")
@click.option("--last", is_flag=True, help="Show the last scan, begin none.")
@click.option("--history", is_flag=True, help="List the endpoint's scans.")
@click.option("--no-wait", is_flag=True, help="Begin it, and do not wait.")
@click.option("--first", type=click.IntRange(0), default=20, show_default=True, help="So many findings are printed.")
def scan(
    endpoint: str,
    listing: Path | None,
    listed_at: datetime | None,
    accept_fraction: bool,
    remove_dark: bool,
    last: bool,
    history: bool,
    no_wait: bool,
    first: int,
) -> int:
    """Compare what is at an endpoint with what the catalogue says.

    A worker of the site lists the storage. What is missing in two scans, a day apart, is looked for once more and then
    made anew from another copy; what is dark, that is unknown to the catalogue, is only told. Dark files that two scans
    have found, a week apart, --remove-dark moves to .replica/quarantine. When a large part of the endpoint is missing
    or dark, nothing is done before somebody says --accept-fraction: then the disk may be what is wrong.
    """
    if sum((listing is not None, remove_dark, last, history)) > 1:
        raise click.UsageError("--listing, --remove-dark, --last and --history are four different things")
    with connected() as client:
        if history:
            output().many(client.scans.list(endpoint), SCANS, nothing="it was never scanned")
            return 0
        if remove_dark:
            found = _remove_dark(client, endpoint, accept_fraction, wait=not no_wait)
        elif last:
            found = _last(client, endpoint)
        elif listing is not None:
            found = _compare(client, endpoint, listing, listed_at, accept_fraction)
            found = found if no_wait else _wait(client, found)
        else:
            found = client.scans.start(endpoint, accept_fraction=accept_fraction)
            found = found if no_wait else _wait(client, found)
        return _print(client, found, first, endpoint)


def _last(client: Client, endpoint: str) -> wire.Scan:
    from rules.errors import NotFound

    found = next(client.scans.list(endpoint), None)
    if found is None:
        raise NotFound(f"{endpoint} was never scanned", hint=f"`replica scan {endpoint}`")
    return found


def _wait(client: Client, found: wire.Scan) -> wire.Scan:
    said_at, pause = time.monotonic(), 0.1
    while found.state not in ENDED:
        if time.monotonic() - said_at >= _LINE_EVERY_SECONDS:
            said_at = time.monotonic()
            what = f"{found.phase}, {found.phase_files} files" if found.phase else "no worker of the site has begun"
            say(f"scanning {found.endpoint}: {found.state}: {what}")
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
        found = client.scans.show(found.id)
    return found


def _remove_dark(client: Client, endpoint: str, accept_fraction: bool, *, wait: bool) -> wire.Scan:
    from rules.errors import NotFound

    complete = next((it for it in client.scans.list(endpoint) if it.compared_at is not None), None)
    if complete is None:
        raise NotFound(f"{endpoint} was never scanned to the end", hint=f"`replica scan {endpoint}`")
    if accept_fraction and complete.state == "held":
        client.scans.accept(complete.id)
    found = client.scans.remove_dark(complete.id)
    pause = 0.1
    while wait and found.moving_files:
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
        found = client.scans.show(found.id)
    return found


def _compare(
    client: Client, endpoint: str, listing: Path, listed_at: datetime | None, accept_fraction: bool
) -> wire.Scan:
    """What a worker would do, with the listing instead of the storage."""
    import tempfile
    from datetime import UTC

    from replica import wire
    from replica.client.listings import entries
    from replica.client.scans import know, told_of
    from replica.storage.comparing import Comparison

    if listed_at is None:
        written = datetime.fromtimestamp(listing.stat().st_mtime, UTC)
        listed_at = written - timedelta(hours=LISTING_HOURS)
    with tempfile.TemporaryDirectory(prefix="replica-scan-") as folder:
        comparison = Comparison(Path(folder) / "comparison")
        lines = entries(listing)
        while some := list(islice(lines, _AT_ONCE)):
            comparison.list_all(some)
        comparison.listed.finish()
        found = client.scans.start(endpoint, accept_fraction=accept_fraction, listing=True, listed_at=listed_at)
        try:
            after: int | None = 0
            while after is not None:
                part = client.scans.known(wire.ScanPart(scan=found.id, epoch=found.epoch, after=after))
                know(comparison, part.known)
                after = part.next
            comparison.known.finish()
            counts = {"missing": 0, "dark": 0}
            differences = comparison.differences()
            while these := list(islice(differences, _AT_ONCE)):
                told = told_of(found.id, found.epoch, these)
                counts["missing"] += len(told.missing)
                counts["dark"] += len(told.dark)
                client.scans.found(told)
        except BaseException:
            client.scans.failed(wire.ScanFailed(scan=found.id, epoch=found.epoch, message="it was broken off"))
            raise
        totals = comparison.listed.totals
        compared = wire.ScanCompared(
            scan=found.id, epoch=found.epoch, listed_files=totals.files, listed_bytes=totals.bytes, **counts
        )
        return client.scans.compared(compared)


def _print(client: Client, found: wire.Scan, first: int, endpoint: str) -> int:
    import msgspec

    out = output()
    findings = list(islice(client.scans.findings(found.id), first)) if first and found.compared_at else []
    document: dict[str, Any] = msgspec.structs.asdict(found) | {"findings": findings}
    out.one(
        document,
        [
            ("scan", found.id),
            ("state", found.state),
            ("endpoint", found.endpoint),
            ("files that should be there", found.known_files),
            ("files there", f"{found.listed_files}, {human_size(found.listed_bytes)}"),
            ("missing", found.missing_files),
            ("of another size", found.differing_files),
            ("of these confirmed", found.confirmed_files),
            ("declared bad", found.lost_files),
            ("dark", f"{found.dark_files}, {human_size(found.dark_bytes)}"),
            ("of these removable", found.removable_files),
            ("moved to quarantine", found.removed_files),
            ("links and odd names", found.odd_files),
            ("reason", found.reason),
            ("begun", found.began_at),
            ("finished", found.finished_at),
        ],
    )
    if findings and out.form == "table":
        out.many(findings, FINDINGS)
    if found.last_copies:
        say(f"LOST: {found.last_copies} of these files have no other good copy that Replica knows of")
        say(f"hint: `replica suspects --endpoint {endpoint}` names what is bad there, and why")
    if found.state == "held":
        say(f"replica: nothing is done: {found.reason}")
        say(f"hint: look at the storage; if it is so indeed: `replica scan {endpoint} --accept-fraction`")
    elif found.state == "failed":
        say(f"replica: the scan failed: {found.reason}")
    return 1 if found.state in ("held", "failed", "cancelled") else 0
