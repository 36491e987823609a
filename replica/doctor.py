"""What is in force here, from where, and what is wrong.

Given     the settings.
Returns   an Examination: every setting, and findings with a remedy each.
Promises  changes nothing; waits for nothing longer than a few seconds; shows no secret; looks only at what the settings
          name, so a client's machine is not blamed for having no database.
Partner   `replica doctor` prints it and ends with 1 if anything is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from replica.client import Client
from replica.client.places import Places, is_this_machine
from replica.config import KEYS, Settings
from replica.storage.credentials import Credentials
from rules.errors import NotAllowed, NotAuthenticated, ReplicaError

#: The server, the database and the broker are each waited for so long.
PATIENCE_SECONDS = 5.0
#: Endpoints that are looked at one by one.
ENDPOINTS_MAX = 1_000

Level = Literal["good", "odd", "wrong"]


class Setting(msgspec.Struct, frozen=True):
    key: str
    value: Any
    origin: str


class Finding(msgspec.Struct, frozen=True):
    """*odd* works, and may not be meant; *wrong* must be put right."""

    level: Level
    about: str
    message: str
    remedy: str = ""


class Examination(msgspec.Struct, frozen=True):
    settings: list[Setting]
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        return all(finding.level != "wrong" for finding in self.findings)


def run(settings: Settings, *, as_json: bool = False) -> int:
    """Print the examination; 0 when nothing is wrong."""
    examination = examine(settings)
    if as_json:
        sys.stdout.write(msgspec.json.encode(examination).decode() + "\n")
    else:
        sys.stdout.write(as_text(examination))
    return 0 if examination.healthy else 1


def examine(settings: Settings) -> Examination:
    shown = [Setting(key, settings.shown(key), settings.origin(key)) for key in KEYS]
    return Examination(shown, list(_findings(settings)))


def as_text(examination: Examination) -> str:
    from replica.cli.output import printable

    lines = []
    width = max(len(setting.key) for setting in examination.settings)
    for setting in examination.settings:
        value = setting.value
        text = "–" if value in (None, "", ()) else ", ".join(value) if isinstance(value, list | tuple) else str(value)
        lines.append(f"{setting.key:<{width}}  {text}  ({setting.origin})")
    lines.append("")
    for finding in examination.findings:
        lines.append(f"{finding.level.upper() if finding.level != 'good' else 'good':<5}  {finding.message}")
        if finding.remedy:
            lines.append(f"       → {finding.remedy}")
    wrong = sum(finding.level == "wrong" for finding in examination.findings)
    many = "Nothing is" if not wrong else "One thing is" if wrong == 1 else f"{wrong} things are"
    lines += ["", f"{many} wrong."]
    return "".join(printable(line) + "\n" for line in lines)


def _findings(settings: Settings) -> Iterator[Finding]:
    for warning in settings.warnings:
        yield Finding("wrong", "token_file", warning)
    if not settings.server and not settings.database_url:
        yield Finding(
            "wrong",
            "server",
            "neither a server nor a database is configured",
            "start one with `replica up`, or set REPLICA_SERVER and REPLICA_TOKEN_FILE",
        )
    if settings.database_url:
        yield from _database(settings.database_url)
    if settings.broker_url:
        yield from _broker(settings.broker_url)
    elif settings.database_url or settings.site:
        yield Finding(
            "odd",
            "broker_url",
            f"no broker: work is found by looking every {settings.poll_seconds:g} s instead of at once",
            "set REPLICA_BROKER_URL, for example redis://127.0.0.1:6379/0",
        )
    yield from _roots(settings)
    yield from _credentials(settings)
    if settings.server:
        yield from _server(settings)


def _server(settings: Settings) -> Iterator[Finding]:
    assert settings.server is not None
    try:
        token = settings.read_token()
    except ReplicaError as error:
        yield _wrong("token", error)
        token = None
    try:
        with Client(settings.server, token, timeout_seconds=PATIENCE_SECONDS) as client:
            client.ready()
            yield Finding("good", "server", f"the server {client.server} answers and is ready")
            if token is None:
                yield Finding(
                    "wrong",
                    "token",
                    "there is no token",
                    "`replica up` writes DIR/token; name it by REPLICA_TOKEN_FILE",
                )
                return
            me = client.whoami()
            who = f"the worker of {me.site}" if me.site else f"{me.account} ({me.role})"
            yield Finding("good", "token", f"the token is valid; it is that of {who}")
            if me.site and settings.site and me.site != settings.site:
                yield Finding(
                    "wrong",
                    "site",
                    f"the token is for the site {me.site}, but `site` says {settings.site}",
                    f"`replica site key {settings.site}` prints the token that belongs here",
                )
            if me.site is None:
                yield from _endpoints(settings, client)
    except NotAuthenticated as error:
        yield _wrong("token", error)
    except ReplicaError as error:
        yield _wrong("server", error)


def _endpoints(settings: Settings, client: Client) -> Iterator[Finding]:
    """Those that should be on this machine: of the site named, else all if the server is on this machine."""
    if not settings.site and not is_this_machine(client.server):
        return
    places = Places()
    good = 0
    try:
        for count, endpoint in enumerate(client.endpoints.list()):
            if count >= ENDPOINTS_MAX:
                break
            if endpoint.url.startswith("file:") and settings.site in (None, endpoint.site):
                reason = places.reason(endpoint)
                good += not reason
                if reason:
                    yield Finding(
                        "wrong",
                        f"endpoint {endpoint.name}",
                        f"{endpoint.name} cannot be used from this machine: {reason}",
                        "mount its disk; a new folder is made ready by `replica endpoint prepare`",
                    )
    except NotAllowed:
        return
    if good:
        yield Finding("good", "endpoints", f"{good} endpoint{'s' if good > 1 else ''} of this machine can be used")


def _roots(settings: Settings) -> Iterator[Finding]:
    for root in settings.roots:
        if "://" in root and not root.startswith("file:"):
            continue
        root = root.removeprefix("file://")
        if not Path(root).is_dir():
            yield Finding("wrong", "roots", f"{root} in roots is no directory", "make or mount it, or correct roots")
        elif not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            yield Finding(
                "wrong", "roots", f"{root} in roots cannot be read and written by this account", "chown or chmod it"
            )
    if settings.site and not settings.roots:
        yield Finding(
            "odd",
            "roots",
            "the worker may touch any directory and storage that its account can, if an order says so",
            "list the directories and URLs of the site's endpoints in REPLICA_ROOTS",
        )


def _credentials(settings: Settings) -> Iterator[Finding]:
    try:
        known = Credentials.at(settings.credentials_file)
    except ReplicaError as error:
        yield _wrong("credentials_file", error)
    else:
        if settings.credentials_file:
            yield Finding("good", "credentials_file", f"{known} can be read")


def _database(url: str) -> Iterator[Finding]:
    from replica.log import cause_of

    try:
        from replica.db import health, schema
        from replica.db.engine import Database
    except ModuleNotFoundError as error:
        yield Finding("wrong", "database", f"{error.name} is not installed", "pip install 'replica-manager[server]'")
        return
    try:
        database = Database(url, pool_size=1)
    except ReplicaError as error:
        yield _wrong("database", error)
        return
    try:
        file = database.url.database
        if database.url.get_backend_name() == "sqlite" and not (file and Path(file).is_file()):
            # Looking would make it.
            yield Finding("wrong", "database", f"there is no database file {file}", "run `replica migrate`")
            return
        schema.check(database)
        yield Finding("good", "database", "the database answers and has this release's schema")
        for trouble in health.forgetful(database):
            yield Finding("wrong", "database", f"the database may forget: {trouble}", "switch it on and restart it")
        for trouble in health.cramped(database):
            wanted = ", ".join(f"{name} = {value}" for name, value in health.RECOMMENDED.items())
            yield Finding("odd", "database", trouble, f"set {wanted} and restart it")
    except ReplicaError as error:
        if cause := cause_of(error):
            yield Finding("wrong", "database", f"{error.message}: {cause}", "start it, or correct database_url")
        else:
            yield _wrong("database", error)
    finally:
        database.close()


def _broker(url: str) -> Iterator[Finding]:
    from urllib.parse import urlsplit

    from replica.log import redact

    try:
        from replica.hints import reachable
    except ModuleNotFoundError as error:
        yield Finding("wrong", "broker", f"{error.name} is not installed", "pip install 'replica-manager[server]'")
        return
    reason = reachable(url)
    if reason is not None:
        yield Finding(
            "wrong",
            "broker",
            f"the broker does not answer: {redact(reason)}",
            "start it, or correct broker_url; without it work goes on, found by looking now and then",
        )
        return
    yield Finding("good", "broker", "the broker answers")
    parts = urlsplit(url)
    if parts.scheme == "redis" and parts.hostname not in ("127.0.0.1", "::1", "localhost", None):
        unguarded = "has no password" if not parts.password else "is spoken to without TLS"
        yield Finding(
            "odd", "broker", f"the broker {unguarded}", "use rediss://USER:PASSWORD@HOST outside of one machine"
        )


def _wrong(about: str, error: ReplicaError) -> Finding:
    from replica.log import redact

    return Finding("wrong", about, redact(error.message), redact(error.hint))
