"""What all commands share: common options, lazily imported commands, types of arguments, and the connection.

Given     the words on the command line, the environment, replica.toml.
Returns   click classes whose commands take `--server`, `--token-file` and `-o` wherever they are typed; a Client.
Promises  importing this imports click and nothing heavier; the client and the settings are loaded when asked for.
Partner   replica.config decides what is in force; replica.client talks to the server.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    ParamType = click.ParamType[Any]  # generic since click 8.5
    from replica.cli.output import Output
    from replica.client import Client
    from replica.config import Settings
    from replica.storage.credentials import Credentials
else:
    ParamType = click.ParamType

_META = "replica.cli."


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command that is imported when it is used: its section in the help, `module:attribute`, one line of help."""

    section: str
    at: str
    help: str

    def load(self) -> click.Command:
        module, _, attribute = self.at.partition(":")
        command = getattr(importlib.import_module(f"replica.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command


def _keep(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Remember a common option; the one nearest to the command wins. Nested contexts share `meta`."""
    if value is not None:
        context.meta[_META + str(parameter.name)] = value


def common_options() -> list[click.Option]:
    return [
        click.Option(
            ["--server"],
            metavar="URL",
            expose_value=False,
            callback=_keep,
            help="The server to talk to [REPLICA_SERVER].",
        ),
        click.Option(
            ["--token-file"],
            type=click.Path(path_type=Path),
            expose_value=False,
            callback=_keep,
            help="The file that holds your token [REPLICA_TOKEN_FILE].",
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(["table", "json", "ndjson"]),
            expose_value=False,
            callback=_keep,
            help="Output format [default: table].",
        ),
    ]


class Command(click.Command):
    """A command that takes the common options, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        taken = {name for p in self.params for name in p.opts}
        self.params.extend(o for o in common_options() if not taken.intersection(o.opts))


class Group(click.Group):
    """A group whose commands may be imported on use and whose help may have sections."""

    command_class = Command

    def __init__(
        self, *args: Any, lazy: Mapping[str, Lazy] | None = None, sections: Sequence[str] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options())
        self._lazy = lazy or {}
        self._sections = sections

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self._lazy, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = self._lazy.get(cmd_name)
        return lazy.load() if lazy is not None else super().get_command(ctx, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            known = self.list_commands(ctx)
            close = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
            ctx.fail(f"there is no command {name[:40]!r}{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if not self._lazy:
            super().format_commands(ctx, formatter)
            return
        width = max(map(len, self._lazy))
        for section in self._sections:
            with formatter.section(section):
                formatter.write_dl(
                    [(name.ljust(width), lazy.help) for name, lazy in self._lazy.items() if lazy.section == section]
                )


Group.group_class = Group


# --- what was asked for, and who is asked -----------------------------------------------------------------------------


def output() -> Output:
    from replica.cli.output import Output

    return Output(click.get_current_context().meta.get(_META + "output", "table"))


def settings(directory: Path | None = None, **said: Any) -> Settings:
    """What is in force: what was typed (`said`, and the common options) over environment over replica.toml."""
    from replica import config

    meta = click.get_current_context().meta
    if (token_file := meta.get(_META + "token_file")) is not None:
        said["token_file"] = str(token_file)
    return config.load(directory, server=meta.get(_META + "server"), **said)


def credentials() -> Credentials:
    """What opens storages that are reached over the network: the user's own file [REPLICA_CREDENTIALS_FILE]."""
    from replica.storage.credentials import Credentials

    return Credentials.at(settings().credentials_file)


@contextmanager
def connected() -> Iterator[Client]:
    """A client of the server that is in force; the errors say what to set."""
    from replica.cli.output import say
    from replica.client import Client
    from rules.errors import NotAuthenticated, Unavailable

    known = settings()
    for warning in known.warnings:
        say(f"replica: {warning}")
    if known.server is None:
        raise Unavailable(
            "no server was named",
            hint="set REPLICA_SERVER (`replica up` prints the line), or use --server http://127.0.0.1:8570",
        )
    token = known.read_token()
    if token is None:
        raise NotAuthenticated(
            "no token was given",
            hint="set REPLICA_TOKEN_FILE (`replica up` prints the line) or REPLICA_TOKEN, or use --token-file",
        )
    with Client(known.server, token) as client:
        yield client


@contextmanager
def pointing(**expressions: str | None) -> Iterator[None]:
    """Within, an error in an expression learns the text it is about, so that a caret can stand beneath its column."""
    from rules.errors import InvalidExpression

    try:
        yield
    except InvalidExpression as error:
        given = [text for text in expressions.values() if text]
        text = expressions.get(error.field) or (given[0] if len(set(given)) == 1 else None)
        if text is not None:
            error.text = text  # type: ignore[attr-defined]  # for replica.cli.output alone
        raise


# --- types of what is typed -------------------------------------------------------------------------------------------


class _Size(ParamType):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from replica.cli.output import parse_size

        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Duration(ParamType):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from replica.cli.output import parse_duration

        if isinstance(value, float):
            return value
        try:
            return parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Moment(ParamType):
    """`2026-05-01`, `2026-05-01T12:00`, `2026-05-01T12:00+02:00`; without a zone it is UTC."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a moment; write it like 2026-05-01T12:00+02:00", param, ctx)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


class _Attribute(ParamType):
    """`tier=1`, `country=DE`, `fast=true`; a key alone is true, as in expressions."""

    name = "attribute"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str | int | float | bool]:
        if isinstance(value, tuple):
            return value
        key, equals, text = value.partition("=")
        if not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, attribute_value(text) if equals else True


def attribute_value(text: str) -> str | int | float | bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        # A number only if it would print as it was typed: 007 and 1_0 are texts, nan and inf are nobody's attribute.
        if str(number) == text:
            return number
    return text


#: Whether it can be read is found out, and said, by who reads it.
FILE = click.Path(path_type=Path, readable=False)
SIZE = _Size()
DURATION = _Duration()
MOMENT = _Moment()
ATTRIBUTE = _Attribute()
