"""`replica did`: files, datasets and containers.

Given     DIDs, `scope:name`; conditions on their metadata.
Returns   what the catalogue knows of them.
Partner   replica.client.dids. Files come into being by `replica upload` and `replica register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import click

from replica.cli.common import DURATION, Group, connected, output, pointing
from replica.cli.output import Column, human_instant, human_size, payload_text, size_column

COLUMNS = (
    Column("did", "did"),
    Column("kind", "kind"),
    Column("state", lambda d: "–" if d.kind == "file" else "open" if d.open else "closed"),
    Column("files", "files", right=True),
    size_column("size", "size"),
)
HISTORY = (
    Column("version", "version", right=True),
    Column("at", "at"),
    Column("what", "kind"),
    Column("who", "account"),
    Column("details", lambda e: payload_text(e.payload)),
)


@click.group(cls=Group)
def did() -> None:
    """Files, datasets and containers."""


@did.command()
@click.argument("did")
@click.option("--kind", type=click.Choice(["dataset", "container"]), default="dataset", show_default=True)
@click.option("--container", "kind", flag_value="container", help="The same as --kind container.")
@click.option("--monotonic", is_flag=True, help="Nothing is ever taken out of it.")
@click.option("--lifetime", type=DURATION, help="It is deleted when it is so old: 30d, 2y.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="As `did meta DID set KEY=VALUE` takes it.")
def add(did: str, kind: Any, monotonic: bool, lifetime: float | None, metadata: tuple[str, ...]) -> None:
    """Add a dataset, which holds files, or a container, which holds datasets and containers."""
    from replica import wire

    seconds = None if lifetime is None else round(lifetime)
    known = _nested(metadata)
    new = wire.NewDid(did=did, kind=kind, metadata=known, monotonic=monotonic, lifetime_seconds=seconds)
    with connected() as client:
        _print(client.dids.add(new))


def _searching(command: Callable[..., None]) -> Callable[..., None]:
    """The options of every search."""
    for option in (
        click.option("--limit", type=click.IntRange(1, 1_000_000_000), help="At most so many."),
        click.option("--deleted", is_flag=True, help="Those that were deleted, and no others."),
        click.option("--sort", metavar="KEY", help="By a key: name, bytes, run; -run the other way round."),
        click.option("--where", multiple=True, metavar="CONDITION", help="`datatype = raw and run in 100..200`."),
        click.option("--kind", type=click.Choice(["file", "dataset", "container"])),
        click.option("--scope", "only", help="Only those of a scope."),
    ):
        command = option(command)
    return command


@did.command("list")
@click.argument("pattern", default="")
@_searching
def list_(pattern: str, only: str | None, **search: Any) -> None:
    """List DIDs. PATTERN is scope:name, where * in the name stands for anything; a scope alone is all of it."""
    scope, colon, name = pattern.partition(":")
    if only is not None:
        if colon and scope != only:
            raise click.UsageError(f"{pattern!r} is of another scope than {only!r}")
        scope, name = only, name if colon else pattern
    _search(scope or None, name or None, **search)


@did.command()
@click.argument("condition", default="")
@_searching
def find(condition: str, only: str | None, where: tuple[str, ...], **search: Any) -> None:
    """Find DIDs by what is known of them.

    CONDITION compares keys of the metadata, and kind name scope account created_at closed_at open files size bytes:

    \b
      datatype = raw and run in 100..200
      detector in (eiger, jungfrau) or name like "test*"
      exists proposal.end and proposal.end < 2026-01-01 and not tags has keep
      kind = dataset and bytes > 1TB and created_at >= 2026-03-01
    """
    _search(only, None, where=(condition, *where) if condition else where, **search)


def _search(scope: str | None, name: str | None, *, where: tuple[str, ...], limit: int | None, **search: Any) -> None:
    text = where[0] if len(where) == 1 else " and ".join(f"({each})" for each in where)
    with connected() as client, pointing(where=text):
        found: Iterable[Any] = client.dids.list(scope, pattern=name, where=text or None, **search)
        output().many(islice(found, limit), COLUMNS, nothing="no DID matches")


@did.command()
@click.argument("did")
@click.option("--deleted", is_flag=True, help="Also when it was deleted.")
def show(did: str, deleted: bool) -> None:
    """Show one DID."""
    with connected() as client:
        _print(client.dids.show(did, deleted=deleted))


@did.command("set")
@click.argument("did")
@click.option("--lifetime", help="It is deleted so long from now: 30d; `none`: it stays for ever.")
@click.option("--monotonic", is_flag=True, help="Nothing is taken out of it from now on; this cannot be undone.")
def set_(did: str, lifetime: str | None, monotonic: bool) -> None:
    """Give a DID a lifetime, or make a collection monotonic."""
    import msgspec

    from replica import wire

    if lifetime is None and not monotonic:
        raise click.UsageError("nothing to change; name at least one option")
    change = wire.DidChange(monotonic=True if monotonic else msgspec.UNSET)
    if lifetime is not None:
        change.lifetime_seconds = None if lifetime == "none" else round(_seconds(lifetime))
    with connected() as client:
        _print(client.dids.change(did, change))


def _seconds(text: str) -> float:
    context = click.get_current_context()
    (option,) = (each for each in context.command.params if each.name == "lifetime")
    return DURATION.convert(text, option, context)


@did.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar="DID… [set KEY=VALUE… | unset KEY…]")
def meta(words: tuple[str, ...]) -> None:
    """Show the metadata of DIDs, or change it: `did meta p1:raw set run=17 proposal.end=2026-06-01`."""
    at = next((i for i, word in enumerate(words) if word in ("set", "unset")), len(words))
    names, change = words[:at], _metadata_change(words[at:])
    if not names:
        raise click.UsageError("no DID was given")
    with connected() as client:
        if change is not None:
            done = client.dids.change_metadata_of_many(_each(names, change))
            if len(names) > 1:
                output().lines(done, [f"{done.changed} changed, {len(names) - done.changed} were so already"])
                return
        if len(names) == 1:
            found = client.dids.metadata(names[0])
            output().one(found, [(key, _metadata_text(value)) for key, value in found.metadata.items()])
            return
        columns = (Column("did", "did"), Column("metadata", lambda m: _metadata_text(m.metadata)))
        output().many((client.dids.metadata(name) for name in names), columns)


def _metadata_change(words: tuple[str, ...]) -> Any:
    """What `set KEY=VALUE…` or `unset KEY…` mean; None for no words."""
    from replica import wire

    if not words:
        return None
    verb, *rest = words
    if not rest:
        raise click.UsageError(f"{verb} what?")
    if verb == "unset":
        return wire.MetadataChange(unset=rest)
    return wire.MetadataChange(set=_pairs(rest))


def _pairs(words: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE as it is typed, keys as they are."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise click.UsageError(f"{word!r} is not KEY=VALUE")
        found[key] = _metadata_value(value)
    return found


def _nested(words: Iterable[str]) -> dict[str, Any]:
    """The metadata of a DID that is to be: `proposal.end=…` is the `end` of the proposal, as everywhere."""
    from rules.conditions import parse_key
    from rules.errors import Invalid, InvalidExpression

    known: dict[str, Any] = {}
    for key, value in _pairs(words).items():
        try:
            *above, last = parse_key(key).path
        except InvalidExpression as error:
            raise Invalid(f"the key {key[:80]!a} cannot be one: {error.message}", hint=error.hint) from None
        place = known
        for part in above:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"{key!r} is below a key that has a value of its own")
        place[last] = value
    return known


def _metadata_value(text: str) -> Any:
    """A list, an object or a text in quotes is written as JSON; else a number or true and false where it looks so."""
    import json

    from replica.cli.common import attribute_value

    if text[:1] in ("[", "{", '"') or text == "null":
        try:
            return json.loads(text)
        except ValueError as error:
            raise click.UsageError(f"{text!r} is not JSON: {error}") from None
    return attribute_value(text)


def _metadata_text(value: object) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _each(names: tuple[str, ...], change: Any) -> list[Any]:
    from replica import wire

    return [wire.MetadataOf(did=name, set=change.set, unset=change.unset) for name in names]


@did.command()
@click.argument("did")
def history(did: str) -> None:
    """List what happened to a DID, from the beginning."""
    with connected() as client:
        output().many(client.dids.history(did), HISTORY, nothing=f"nothing is known of {did}")


@did.command()
@click.argument("dids", nargs=-1, required=True, metavar="DID…")
def delete(dids: tuple[str, ...]) -> None:
    """Delete DIDs. For some time they can be had back; their names stay taken for ever."""
    with connected() as client:
        done = client.dids.delete(dids)
    until = f"until {human_instant(done.final_at)} they can be had back with `replica did undelete`"
    output().lines(done, [f"{done.deleted} deleted; {until}" if done.deleted else "deleted already"])


@did.command()
@click.argument("dids", nargs=-1, required=True, metavar="DID…")
def undelete(dids: tuple[str, ...]) -> None:
    """Have deleted DIDs back."""
    with connected() as client:
        done = client.dids.undelete(dids)
    output().lines(done, [f"{done.undeleted} had back"])


@did.command()
@click.argument("did")
def contents(did: str) -> None:
    """List what is directly in a dataset or container."""
    with connected() as client:
        output().many(client.dids.contents(did), COLUMNS, nothing=f"{did} is empty")


@did.command()
@click.argument("parent")
@click.argument("children", nargs=-1, required=True)
def attach(parent: str, children: tuple[str, ...]) -> None:
    """Put files into a dataset, or datasets and containers into a container."""
    with connected() as client:
        done = client.dids.attach(parent, children)
    output().lines(done, [f"{done.attached} attached, {len(children) - done.attached} were there already"])


@did.command()
@click.argument("parent")
@click.argument("children", nargs=-1, required=True)
def detach(parent: str, children: tuple[str, ...]) -> None:
    """Take DIDs out of a dataset or container. They go on existing."""
    with connected() as client:
        done = client.dids.detach(parent, children)
    output().lines(done, [f"{done.detached} detached, {len(children) - done.detached} were not in it"])


@did.command()
@click.argument("did")
def close(did: str) -> None:
    """Close a dataset or container: nothing more can be attached or detached."""
    _open(did, False)


@did.command()
@click.argument("did")
def reopen(did: str) -> None:
    """Open a closed dataset or container again."""
    _open(did, True)


def _open(did: str, open_: bool) -> None:
    from replica import wire

    with connected() as client:
        _print(client.dids.change(did, wire.DidChange(open=open_)))


def _print(found: Any) -> None:
    rows: list[tuple[str, object]] = [("did", found.did), ("kind", found.kind), ("account", found.account)]
    if found.kind != "file":
        state = "open" if found.open else "closed"
        rows += [("state", f"{state}, monotonic" if found.monotonic else state), ("files", found.files)]
    rows += [("size", human_size(found.size)), ("created", found.created_at)]
    rows += [("expires", found.expires_at)] if found.expires_at else []
    if found.deleted_at:
        rows += [("deleted", found.deleted_at), ("can be had back until", found.final_at)]
    rows += [(algorithm, value) for algorithm, value in found.checksums.items()]
    rows += [(key, _metadata_text(value)) for key, value in found.metadata.items()]
    output().one(found, rows)
