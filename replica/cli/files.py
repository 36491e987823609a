"""`replica upload` and `replica download`: bytes between this machine and endpoints.

Given     files and folders, or DIDs.
Returns   what was done; exit code 1 when any file failed, with the reason of each on stderr.
Partner   replica.client.upload and replica.client.download do the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from replica.cli.common import FILE, Command, connected, credentials, output, pointing
from replica.cli.output import human_size, say
from rules.quantities import counted

if TYPE_CHECKING:
    from replica.client.sources import BadReplica
    from replica.client.upload import Failed

_SHOWN = 20


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, type=FILE, metavar="PATH…")
@click.option("--scope", required=True, help="The scope of the new DIDs.")
@click.option("--dataset", help="Put the files into this dataset; it is made if it is not there.")
@click.option("--endpoint", help="Where to; else the disk on this machine with most space, or a server.")
def upload(paths: tuple[Path, ...], scope: str, dataset: str | None, endpoint: str | None) -> int:
    """Copy files or folders to an endpoint, verified, and register them.

    A file gets the DID SCOPE:its-name; a file in a folder is named by its path relative to that folder. The same
    command again goes on where it was. Servers are opened by your credentials file [REPLICA_CREDENTIALS_FILE].
    """
    from replica.cli.progress import progress
    from replica.client import upload as uploading

    with connected() as client, progress("upload") as tell:
        done = uploading.upload(
            client,
            paths,
            scope=scope,
            dataset=dataset,
            endpoint=endpoint,
            credentials=credentials(),
            tell=tell,
            chosen=lambda name: say(f"uploading to {name}"),
        )
    into = f" in {done.dataset}" if done.dataset else ""
    output().lines(
        done,
        [
            f"{_files(done.files, done.bytes)} registered at {done.endpoint}{into}:"
            f" {done.copied} copied, {done.adopted} found there already"
        ],
    )
    _show_bad(done.bad_replicas, done.to_look_at, done.not_told)
    return _show_failed(done.failed, done.not_tried)


@click.command(cls=Command)
@click.argument("dids", nargs=-1, required=True, metavar="DID…")
@click.option("--dir", "directory", default=".", type=click.Path(path_type=Path), help="Where to.  [default: here]")
@click.option("--from", "from_expression", metavar="EXPR", help="Only from these endpoints.")
def download(dids: tuple[str, ...], directory: Path, from_expression: str | None) -> int:
    """Fetch files, or datasets with all their files, verified, each to DIR/its-name.

    What is there already and right is left alone; what is there and different is never overwritten. Disks of this
    machine are read first, then servers, opened by your credentials file [REPLICA_CREDENTIALS_FILE]. The same command
    again goes on where it was, within a large file too. Of replicas that are wrong the server is told, and has them
    looked at.
    """
    from replica.cli.progress import progress
    from replica.client import download as downloading

    with (
        connected() as client,
        pointing(where=from_expression, expression=from_expression),
        progress("download") as tell,
    ):
        done = downloading.download(
            client, dids, dir=directory, from_expression=from_expression, credentials=credentials(), tell=tell
        )
    output().lines(
        done,
        [f"{_files(done.files, done.bytes)} in {done.dir}: {done.copied} fetched, {done.adopted} found there already"],
    )
    _show_bad(done.bad_replicas, done.to_look_at, done.not_told)
    return _show_failed(done.failed)


def _show_bad(bad: Sequence[BadReplica], to_look_at: int, not_told: str) -> None:
    for replica in bad[:_SHOWN]:
        say(f"replica: the replica of {replica.did} at {replica.endpoint} is not good: {replica.reason}")
    if len(bad) > _SHOWN:
        say(f"replica: and {counted(len(bad) - _SHOWN, 'more replica')}; -o json lists all of them")
    if not_told:
        say(f"hint: tell those who look after these endpoints; the server could not be told: {not_told}")
    elif to_look_at:
        say(f"workers of the sites were asked to look at {counted(to_look_at, 'replica')}: see `replica suspects`")
    elif bad:
        say("the server was told, and has nobody look: they are doubted already, were proven right just now, are not")
        say("known as good any more, or it was enough of them for one account today")


def _files(count: int, size: int) -> str:
    return f"{counted(count, 'file')}, {human_size(size)}, {'is' if count == 1 else 'are'}"


def _show_failed(failed: Sequence[Failed], not_tried: int = 0) -> int:
    for failure in failed[:_SHOWN]:
        first, *rest = failure.reason.splitlines() or [""]
        say(f"replica: {failure.did} failed: {first}")
        for line in rest:
            say(f"  {line}")
    if len(failed) > _SHOWN:
        say(f"replica: and {counted(len(failed) - _SHOWN, 'more file')} failed; -o json lists all of them")
    if not_tried:
        say(f"replica: not tried: {counted(not_tried, 'file')}")
    for hint in dict.fromkeys(f.hint for f in failed[:_SHOWN] if f.hint):
        say(f"hint: {hint}")
    if failed or not_tried:
        say("hint: the same command again does what is left")
    return 1 if failed or not_tried else 0
