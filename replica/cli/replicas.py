"""`replica register` and `replica locate`: which file is at which endpoint.

Given     files that are at an endpoint already, or a list of them; a DID.
Returns   how many were registered; the replicas of a DID.
Promises  a file that is registered by name is read here and now, where it lies; what a list says is believed by nobody
          before a worker has read it.
Partner   replica.client.replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import click

from replica.cli.common import DURATION, FILE, Command, connected, credentials, output
from replica.cli.output import Column, size_column
from rules.quantities import counted

if TYPE_CHECKING:
    from replica import wire

T = TypeVar("T")

#: Files in one registration: read from disk, each batch takes a while; from a list, none does.
_HASHED_BATCH = 500
_LISTED_BATCH = 5_000

COLUMNS = (
    Column("did", "did"),
    Column("endpoint", "endpoint"),
    Column("site", "site"),
    Column("state", "state"),
    size_column("size", "size"),
    Column("evidence", "evidence"),
    Column("verified", "verified_at"),
    Column("path", "path"),
)


@click.command(cls=Command)
@click.argument("did")
@click.option("--metalink", "as_metalink", is_flag=True, help="As a Metalink document (RFC 5854), for download tools.")
@click.option(
    "--presigned",
    "presigned_seconds",
    type=DURATION,
    metavar="TIME",
    help="With --metalink: URLs that anybody may read by for so long, where your credentials can sign them (S3).",
)
def locate(did: str, as_metalink: bool, presigned_seconds: float | None) -> None:
    """Where the replicas of a DID are; of a dataset, those of all its files."""
    if presigned_seconds is not None and not as_metalink:
        raise click.UsageError("--presigned goes with --metalink")
    with connected() as client:
        found = client.replicas.locate(did)
        if as_metalink:
            endpoints = {endpoint.name: endpoint for endpoint in client.endpoints.list()}
            _print_metalink(found, endpoints, None if presigned_seconds is None else round(presigned_seconds))
        else:
            output().many(found, COLUMNS, nothing=f"{did} has no replica")


def _print_metalink(
    found: Iterator[wire.Replica], endpoints: dict[str, wire.Endpoint], presigned_seconds: int | None
) -> None:
    from replica.client.places import Places
    from replica.metalink import metalink
    from replica.storage.base import SupportsPresigned

    places = Places(credentials())

    def signed(replica: wire.Replica) -> str | None:
        endpoint = endpoints.get(replica.endpoint)
        if presigned_seconds is None or endpoint is None or not places.has_credentials(endpoint):
            return None
        storage = places.open(endpoint)
        return storage.presigned(replica.path, presigned_seconds) if isinstance(storage, SupportsPresigned) else None

    for piece in metalink(found, endpoints, signed):
        click.echo(piece, nl=False)


@click.command(cls=Command)
@click.argument("files", nargs=-1, type=FILE, metavar="FILE…")
@click.option("--endpoint", required=True, help="Where the files are.")
@click.option("--scope", help="The scope of the new DIDs; their names are the paths beneath the endpoint's folder.")
@click.option("--dataset", help="Put the files into this dataset; it is made if it is not there.")
@click.option(
    "--from",
    "listing",
    type=click.File("rb"),
    metavar="FILE|-",
    help="Read NDJSON {did, size, checksums, path} instead; a worker of the site verifies them.",
)
def register(
    files: tuple[Path, ...], endpoint: str, scope: str | None, dataset: str | None, listing: BinaryIO | None
) -> int:
    """Make files known that are at an endpoint already. They are read where they lie; nothing is moved."""
    from replica import wire
    from replica.client.upload import dataset_did, require_dataset, require_scope

    if (listing is None) == (not files):
        raise click.UsageError("name files, or a list of them with --from; one of the two")
    if listing is None and scope is None:
        raise click.UsageError("--scope is missing: it is the first half of the new DIDs")
    with connected() as client:
        place = client.endpoints.show(endpoint)
        parent = dataset_did(scope or "", dataset)
        if listing is None:
            assert scope is not None
            require_scope(client, scope)
            batches = _batches(_found(place, files, scope), _HASHED_BATCH)
        else:
            batches = _batches(_listed(listing), _LISTED_BATCH)
        total = wire.Registered(files=0, new=0, attached=0, to_verify=0)
        made = parent is None
        for batch in batches:
            if parent is not None and not made:
                require_dataset(client, parent)
                made = True
            done = client.replicas.register(
                wire.Registration(
                    endpoint=endpoint,
                    replicas=batch,
                    dataset=str(parent) if parent else None,
                    evidence="hashed" if listing is None else "declared",
                )
            )
            for count in ("files", "new", "attached", "to_verify"):
                setattr(total, count, getattr(total, count) + getattr(done, count))
    output().lines(total, _summary(total, endpoint))
    return 0


def _summary(total: wire.Registered, endpoint: str) -> Iterator[str]:
    yield f"{counted(total.files, 'file')} registered at {endpoint}, {total.new} new to the catalogue"
    if total.to_verify:
        yield f"to be verified: {counted(total.to_verify, 'file')}; available when a worker of the site has read it all"


def _found(place: wire.Endpoint, files: tuple[Path, ...], scope: str) -> Iterator[wire.NewReplica]:
    """The files with what was computed from their bytes. All names are checked before the first byte is read."""
    from replica import wire
    from replica.client.places import Places
    from replica.client.upload import files_in
    from replica.storage.copy import measure_local
    from rules.errors import Invalid, Refused
    from rules.names import Did

    storage = Places().open_here(place)
    root = Path(storage.tree.path).resolve()
    paths: dict[str, Did] = {}
    odd: list[str] = []
    for given in files:
        path = given.parent.resolve() / given.name if given.name not in ("", "..") else given.resolve()
        if not path.is_relative_to(root):
            raise Invalid(
                f"{given} is not beneath the folder of {place.name}, {root}",
                hint="`replica upload` copies it there and registers it",
            )
        relative = path.relative_to(root).as_posix()
        if path.is_dir() and not path.is_symlink():
            inside = [
                f"{relative}/{name}".removeprefix("./")
                for name, _ in files_in(path, odd)
                if relative != "." or not name.startswith(".replica/")
            ]
        else:
            inside = [relative]
        for name in inside:
            paths[name] = Did.of(scope, name)
    if odd:
        raise Refused(f"{odd[0]} is not a regular file; nothing was registered", hint="leave it out, or replace it")
    for relative, did in paths.items():
        size, checksums = measure_local(storage, relative)
        yield wire.NewReplica(did=str(did), size=size, checksums=checksums.as_dict(), path=relative)


def _listed(listing: BinaryIO) -> Iterator[wire.NewReplica]:
    import msgspec

    from replica import wire
    from rules.errors import Invalid

    decoder = msgspec.json.Decoder(wire.NewReplica)
    for number, line in enumerate(listing, 1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            done = (number - 1) // _LISTED_BATCH * _LISTED_BATCH
            raise Invalid(
                f"line {number} of the list cannot be right: {error}",
                hint=(f"about {done} lines before it are registered already; " if done else "nothing was registered; ")
                + 'a line is {"did": "scope:name", "size": 1, "checksums": {"adler32": "00620062"}, "path": "a/b"}',
            ) from None


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
