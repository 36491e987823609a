"""Which secret opens which storage: a file of the site's own, that neither catalogue nor orders ever hold.

Given     a TOML file with a table for each beginning of a URL.
Returns   for a storage's URL the settings of the longest beginning that fits.
Promises  a secret goes only to the scheme, host, port and folder it was written down for, whatever an order says; it is
          never part of repr() or of a message; one that lies in a file of its own is read anew at each use, so a
          renewed token is seen.
Partner   replica.storage.registry hands the settings to an adapter, whose docstring says which keys it reads.

    ["davs://se.desy.de:2880/data"]
    token_file = "/etc/replica/desy.token"

    ["s3+https://s3.hzdr.de/beamtimes"]
    access_key_id = "replica"
    secret_access_key_file = "/etc/replica/hzdr.key"
    quiet_seconds = "300"    # how long this server may be silent: any of WebDAV, S3, SFTP and root://
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rules.errors import Invalid
from rules.names import shown

Settings = Mapping[str, str]

#: Other names of a scheme. The file may say one and the endpoint's URL the other.
_SAME = {"davs": "https", "dav": "http"}
_PORTS = {"https": 443, "http": 80, "s3+https": 443, "s3+http": 80, "sftp": 22, "root": 1094, "roots": 1094}
_FILE = "_file"
_SIZE_MAX = 64 * 1024
_SECONDS_MAX = 86_400


class Credentials:
    """The tables of one file; none at all when nothing was given."""

    def __init__(self, tables: Mapping[str, Settings] | None = None) -> None:
        self._tables = [(_parts(url), dict(settings)) for url, settings in (tables or {}).items()]
        # The longest first: what is written for a folder goes before what is written for its host.
        self._tables.sort(key=lambda table: len(table[0]), reverse=True)

    def __repr__(self) -> str:
        return f"<{self}>"

    def __str__(self) -> str:
        return f"credentials for {len(self._tables)} beginning{'s' * (len(self._tables) != 1)} of URLs"

    @classmethod
    def at(cls, path: str | None) -> Credentials:
        """What the file of a setting holds; nothing, if it was not set."""
        return cls.load(path) if path else cls()

    @classmethod
    def load(cls, path: str | Path) -> Credentials:
        """What the file holds. Invalid: unreadable, no TOML, or open to other people."""
        file = Path(path).expanduser()

        def no(reason: str, hint: str) -> Invalid:
            return Invalid(f"the credentials file {path} {reason}", hint=hint, field="credentials_file")

        try:
            mode = file.stat().st_mode
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise no(f"cannot be read: {error.strerror}", "correct credentials_file, or make the file") from None
        except UnicodeDecodeError:
            raise no("is not text", "it is TOML in UTF-8") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise no(f"is open to others (mode {stat.S_IMODE(mode):o})", f"chmod 600 {path}")
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise no(f"is not TOML: {error}", 'a table looks so: ["davs://host/folder"]') from None
        for url, settings in tables.items():
            if "://" not in url or not isinstance(settings, dict):
                raise no(f"has {shown(url)}, which is no table named by a URL", 'write ["davs://host/folder"]')
            for key, value in settings.items():
                if not isinstance(value, str):
                    raise no(f"has {key} in [{shown(url)}], which is not text", f'write {key} = "…"')
        return cls(tables)

    def of(self, url: str) -> Settings:
        """The settings for a storage; empty when nothing was written down for it."""
        wanted = _parts(url)
        for beginning, settings in self._tables:
            if wanted[: len(beginning)] == beginning:
                return settings
        return {}


def secret(settings: Settings, key: str) -> str | None:
    """The secret `key`: written down itself, or read now from the file that `key_file` names."""
    if key in settings:
        return settings[key]
    path = settings.get(key + _FILE)
    if path is None:
        return None
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            return file.read(_SIZE_MAX).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise Invalid(
            f"the secret of {key}{_FILE} = {shown(path)} cannot be read: {reason}",
            hint="the credentials file of this worker names it",
            field=key,
        ) from None


def seconds_in(settings: Settings, key: str) -> float | None:
    """How long a setting allows; None: it does not say. Invalid: no such time."""
    text = settings.get(key)
    if text is None:
        return None
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.1 <= found <= _SECONDS_MAX:
        raise Invalid(
            f"{key} = {shown(text)} in the credentials file is not a number of seconds from 0.1 to {_SECONDS_MAX}",
            hint=f'write {key} = "60"',
            field=key,
        )
    return found


def _parts(url: str) -> tuple[str, ...]:
    """Scheme, host, port, then the folders: what two URLs are compared by, piece by piece."""
    try:
        split = urlsplit(url)
        scheme = _SAME.get(split.scheme.lower(), split.scheme.lower())
        port = split.port or _PORTS.get(scheme, 0)
    except ValueError:
        raise Invalid(f"the URL {shown(url)} cannot be read", hint="scheme://host:port/folder") from None
    folders = [unquote(segment) for segment in split.path.split("/") if segment]
    return (scheme, (split.hostname or "").lower(), str(port), *folders)
