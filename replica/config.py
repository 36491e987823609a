"""Every setting, where it came from, and nothing guessed.

Given     replica.toml (in the directory named, else the working directory, else /etc/replica), REPLICA_* variables,
          and what the command line said: the later one wins.
Returns   Settings: typed, in bounds, frozen.
Promises  a misspelt key or variable is an error that names the right one; a secret is never part of repr() or of a
          message; nothing heavy is imported, for every command begins here.
Partner   replica.doctor prints what is in force and from where.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from rules.errors import Invalid

if TYPE_CHECKING:
    from rules.reconciling import Policy

FILE_NAME = "replica.toml"
SYSTEM_DIR = Path("/etc/replica")
PREFIX = "REPLICA_"
#: Variables that begin like a setting and are none: they belong to tests.
NOT_SETTINGS = ("REPLICA_TEST_", "REPLICA_FAULT_POINTS")

#: Keys whose whole value is secret, and those that are URLs which may carry a password.
SECRET = frozenset({"token"})
URLS = frozenset({"database_url", "broker_url", "server"})

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a process was told. None: not told."""

    #: postgresql://… or sqlite:///PATH. Only the API and the control process read it; a worker never does.
    database_url: str | None = None
    #: redis://…; absent: no hints, everything is found by looking now and then.
    broker_url: str | None = None
    #: Where the API is, for the command line and for workers.
    server: str | None = None
    token: str | None = None
    token_file: str | None = None
    #: Where `replica serve` listens.
    listen: Annotated[str, msgspec.Meta(max_length=300)] = "127.0.0.1:8570"
    #: The site whose orders this worker carries out.
    site: str | None = None
    #: Directories, and beginnings of URLs, where a worker may write, delete and read; empty: anywhere.
    roots: tuple[str, ...] = ()
    #: Beginnings of URLs where a worker may read besides; empty: at other sites, but nothing of this machine's.
    sources: tuple[str, ...] = ()
    #: Secrets for storages that ask for some: see replica.storage.credentials.
    credentials_file: str | None = None
    #: Files (or lists of small files) that a worker moves at the same time.
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=256)] = 4
    #: How often a worker looks by itself, ±50 %.
    poll_seconds: Seconds = 30.0
    #: How long an order stays a worker's without a heartbeat. Set at the API and at the control process.
    lease_seconds: Annotated[float, msgspec.Meta(ge=0.5, le=86_400)] = 120.0
    #: The pace of unattended work: the interval of its most frequent pass.
    control_interval_seconds: Seconds = 5.0
    #: Whether what may be in flight adapts to what is measured. Set at the control process.
    adaptive_concurrency: bool = True
    #: The first pause before a failed transfer is tried again; doubled each time.
    retry_base_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    #: How long a DID that was deleted can be had back. Set at the API and at the control process.
    undelete_seconds: Annotated[float, msgspec.Meta(ge=0, le=315_360_000)] = 7 * 86_400
    #: How long ends of transfers can be read as events, and how long everything else that happened.
    keep_transfer_events_days: Annotated[int, msgspec.Meta(ge=1, le=36_500)] = 7
    keep_events_days: Annotated[int, msgspec.Meta(ge=1, le=36_500)] = 730
    #: Between the first scan that found files missing, or dark, and the one that counts. Set at the API and at control.
    scan_grace_seconds: Annotated[float, msgspec.Meta(ge=0, le=315_360_000)] = 86_400
    scan_dark_grace_seconds: Annotated[float, msgspec.Meta(ge=0, le=315_360_000)] = 7 * 86_400
    #: What part of an endpoint a scan may find missing or dark before a person is asked.
    scan_fraction_max: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    #: How often disks are scanned that have no attribute `scan_every`; 0: never.
    scan_every_days: Annotated[float, msgspec.Meta(ge=0, le=36_500)] = 7
    #: Where the embedded system keeps its state.
    dir: str | None = None
    log_level: Annotated[str, msgspec.Meta(pattern="^(debug|info|warning|error)$")] = "info"

    #: Key → where its value came from; a key that is missing here has its default.
    origins: dict[str, str] = {}
    #: What is odd without being wrong: a token file that others can read.
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{key}={self.shown(key)!r}' for key in KEYS if getattr(self, key) is not None)})"

    __str__ = __repr__

    def shown(self, key: str) -> Any:
        """The value as it may be printed."""
        value = getattr(self, key)
        if value is None:
            return None
        if key in SECRET:
            return "***"
        return masked_url(value) if key in URLS else value

    def origin(self, key: str) -> str:
        return self.origins.get(key, "default")

    def read_token(self) -> str | None:
        """The token itself: given directly, or read now from its file, so that a renewed file is seen."""
        if self.token is not None:
            return self.token
        if self.token_file is None:
            return None
        try:
            text = Path(self.token_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise Invalid(
                f"the token file {self.token_file} cannot be read: {reason}",
                hint="`replica up` and `replica migrate --token-file` write one; REPLICA_TOKEN_FILE names it",
                field="token_file",
            ) from None
        if not text or len(text) > 1000 or any(c.isspace() for c in text):
            raise Invalid(
                f"the token file {self.token_file} does not hold one token",
                hint="it has a single line that begins with rpl_",
                field="token_file",
            )
        return text

    def token_file_trouble(self) -> str | None:
        """A sentence when others than the owner can read the token file."""
        if self.token_file is None:
            return None
        try:
            mode = Path(self.token_file).expanduser().stat().st_mode
        except OSError:
            return None  # reading it says so, with the reason
        if mode & (stat.S_IRGRP | stat.S_IROTH | stat.S_IWGRP | stat.S_IWOTH):
            return f"the token file {self.token_file} is open to others (mode {stat.S_IMODE(mode):o}); chmod 600 it"
        return None

    def scan_policy(self) -> Policy:
        from rules.reconciling import Policy

        return Policy(
            self.scan_grace_seconds, self.scan_dark_grace_seconds, self.scan_fraction_max, self.scan_every_days
        )

    def listen_address(self) -> tuple[str, int]:
        """Host and port of `listen`; [::1]:8570 for IPv6."""
        host, colon, port = self.listen.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535 or not host:
            raise Invalid(
                f"listen is {self.listen[:80]!r}, which is not HOST:PORT",
                hint="for example 127.0.0.1:8570",
                field="listen",
            )
        return host.removeprefix("[").removesuffix("]"), int(port)


KEYS: tuple[str, ...] = tuple(
    field.name for field in msgspec.structs.fields(Settings) if field.name not in ("origins", "warnings")
)


def load(
    dir: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] = os.environ,
    **overrides: Any,
) -> Settings:
    """The settings in force; `overrides` are what the command line said (None: it said nothing). Raises Invalid."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def layer(found: Mapping[str, tuple[Any, str]]) -> None:
        # token and token_file are two ways to say one thing: the nearer one hides both ways of the farther one.
        if found.keys() & {"token", "token_file"}:
            for key in ("token", "token_file"):
                values.pop(key, None)
                origins.pop(key, None)
        for key, (value, origin) in found.items():
            values[key], origins[key] = value, origin

    variables = _from_environment(environ)
    directory = dir if dir is not None else variables.get("dir", (None, ""))[0]
    file = _find(directory)
    if file is not None:
        layer(_from_file(file))
    layer(variables)
    for key in overrides:
        _known(key, KEYS, "the setting")
    said = {key: (value, "the command line") for key, value in overrides.items() if value is not None}
    if dir is not None:
        said["dir"] = (os.fspath(dir), "the command line")
    layer(said)
    return _checked(values, origins)


def masked_url(text: str) -> str:
    """A URL without its password, wherever it hides."""
    text = re.sub(r"(?<=://)([^/@\s:]*):([^/\s]*)@", r"\1:***@", text)
    return re.sub(r"(?i)\b((?:ssl)?password)=[^&\s]*", r"\1=***", text)


def _find(directory: str | os.PathLike[str] | None) -> Path | None:
    """The first replica.toml there is: they are not merged, so one file says it all."""
    places = ([Path(directory)] if directory is not None else []) + [Path.cwd(), SYSTEM_DIR]
    return next((place / FILE_NAME for place in places if (place / FILE_NAME).is_file()), None)


def _from_file(path: Path) -> dict[str, tuple[Any, str]]:
    import tomllib  # only where there is a file: a client mostly has none

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Invalid(f"{path} is not TOML: {error}", hint='a line is: key = "value"') from None
    for key in content:
        _known(key, KEYS, f"{path}: the key")
    return {key: (value, str(path)) for key, value in content.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    names = {PREFIX + key.upper(): key for key in KEYS}
    found: dict[str, tuple[Any, str]] = {}
    for name in sorted(environ):
        if not name.startswith(PREFIX) or name.startswith(NOT_SETTINGS):
            continue
        _known(name, tuple(names), "the environment variable")
        value: Any = environ[name]
        if value == "":
            continue  # how a shell or a compose file says "not set"
        if names[name] in ("roots", "sources"):
            # Directories as in PATH; with a URL among them, which has colons itself, by spaces.
            value = value.split() if "://" in value else [part for part in value.split(os.pathsep) if part]
        found[names[name]] = (value, name)
    return found


def _known(key: str, known: tuple[str, ...], what: str) -> None:
    if key in known:
        return
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    raise Invalid(
        f"{what} {key[:80]!r} is not known",
        hint=f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}",
        field=key[:80],
    )


def _checked(values: dict[str, Any], origins: dict[str, str]) -> Settings:
    for key, value in values.items():
        # One by one, so that the message names the culprit and where it came from, and never shows a secret.
        try:
            msgspec.convert({key: value}, Settings, strict=False)
        except msgspec.ValidationError as error:
            reason = str(error).split(" - at `$")[0]
            raise Invalid(f"{key} (from {origins[key]}) cannot be right: {reason}", field=key) from None
    settings = msgspec.convert(values | {"origins": origins}, Settings, strict=False)
    for key, allowed in (("roots", settings.roots), ("sources", settings.sources)):
        for place in allowed:
            if not (place.startswith("/") and key == "roots") and "://" not in place:
                kind = "is not an absolute directory, and no URL" if key == "roots" else "is no URL"
                raise Invalid(
                    f"{key} (from {origins[key]}) has {place[:200]!r}, which {kind}",
                    hint="write /data/x or davs://host/folder",
                    field=key,
                )
    settings.listen_address()
    trouble = settings.token_file_trouble()
    return msgspec.structs.replace(settings, warnings=(trouble,)) if trouble else settings
