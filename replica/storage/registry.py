"""From an endpoint's URL to its storage.

Given     a URL that an administrator registered, and the endpoint's name.
Returns   an object that keeps replica.storage.base.Storage.
Promises  exactly one reading of a URL: chained protocols, user names, hosts of file URLs, relative paths, '..', queries
          and fragments are refused, not guessed at. Nothing is opened or created.
Partner   replica.catalog.endpoints stores the URL; the mover opens it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import SplitResult, unquote, urlsplit

from replica.storage.base import Storage
from replica.storage.credentials import Credentials, Settings, seconds_in, secret
from rules.errors import Invalid
from rules.names import shown

_MEMORY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,99}\Z")
_IPV6 = re.compile(r"://\[[0-9A-Fa-f:.]+\]")
_IPV6_HOST = re.compile(r"(.*@)?\[[0-9A-Fa-f:.]+\](:[0-9]*)?\Z")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


def open_storage(url: str, *, name: str = "", credentials: Credentials | None = None) -> Storage:
    """The storage behind `url`; `name` is the endpoint's, for messages. Raises Invalid with what would be right.

    Without `credentials` a storage that asks for any refuses every verb with Forbidden; opening it is no refusal.
    """

    def no(reason: str, hint: str = "") -> Invalid:
        return Invalid(f"the URL {shown(url)} {reason}", hint=hint or _SUPPORTED, field="url")

    if any(c <= " " or c == "\x7f" for c in url):
        raise no("holds white space or a control character", "write such characters as %20 and so on")
    if "::" in _IPV6.sub("://", url, count=1):
        raise no("chains several protocols by '::'")
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise no("has no scheme")
    opener = _fsspec if scheme.startswith(_FSSPEC) else _SCHEMES.get(scheme)
    if opener is None:
        raise no(f"has the scheme {shown(scheme)}, which is not supported")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise no(f"cannot be read ({error})") from None
    if "[" in parts.netloc and not _IPV6_HOST.match(parts.netloc):
        raise no("has something beside an IPv6 address in brackets", "write [address] or [address]:port")
    if "@" in parts.netloc:
        raise no("carries a user name", "credentials are never part of an endpoint's URL")
    if "?" in url or "#" in url:
        raise no("has a query or a fragment", "write '?' as %3F and '#' as %23 if they belong to the path")
    return opener(Given(url, parts, name, (credentials or Credentials()).of(url)), no)


Refusal = Callable[..., Invalid]


@dataclass(frozen=True, slots=True)
class Given:
    """What an adapter is opened with."""

    url: str
    parts: SplitResult
    name: str
    settings: Settings = field(repr=False)


def _file(given: Given, no: Refusal) -> Storage:
    from replica.storage.posix import PosixStorage

    if given.parts.netloc:
        raise no("names a host", "a file URL has three slashes: file:///data/x")
    path = _folder(given.parts.path, no, "file:///data/x")
    return PosixStorage(path, name=given.name, url=given.url)


def _sftp(given: Given, no: Refusal) -> Storage:
    try:
        from replica.storage.sftp import SftpStorage
    except ModuleNotFoundError as error:
        if error.name != "asyncssh":
            raise
        raise no("needs asyncssh, which is not installed", "pip install 'replica-manager[sftp]'") from None

    parts = given.parts
    example = "sftp://host:22/data/x"
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        raise no("has a port that is no number", example) from None
    if not host or port == 0:
        raise no("names no host", example)
    return SftpStorage(
        host, port or 22, _folder(parts.path, no, example), given.settings, name=given.name, url=given.url
    )


def _folder(escaped: str, no: Refusal, example: str) -> str:
    """The absolute path of a folder, written plainly; never the root of the machine."""
    path = _plain(escaped, no, example)
    if not path:
        raise no("is the root of the machine", f"give the endpoint a folder of its own: {example}")
    return path


def _plain(escaped: str, no: Refusal, example: str) -> str:
    """The path of a URL, decoded, without a slash at its end; empty for the root."""
    if _BAD_PERCENT.search(escaped):
        raise no("has a '%' that is not followed by two hexadecimal digits", "write '%' as %25")
    try:
        path = unquote(escaped, errors="strict").removesuffix("/")
    except UnicodeDecodeError:
        raise no("is not UTF-8") from None
    if "\0" in path:
        raise no("holds a NUL character")
    if any(segment in ("", ".", "..") for segment in path.split("/")[1:]):
        raise no("has an empty segment, '.' or '..'", f"write the path plainly: {example}")
    return path


def _memory(given: Given, no: Refusal) -> Storage:
    from replica.storage.memory import MemoryStorage

    parts = given.parts
    if not _MEMORY_NAME.match(parts.netloc) or parts.path not in ("", "/"):
        raise no("is not memory://name", "use letters, digits, '.', '_' and '-' after memory://")
    return MemoryStorage(parts.netloc, name=given.name, url=given.url)


def _s3(given: Given, no: Refusal) -> Storage:
    from replica.storage.s3_url import open_s3

    return open_s3(given, no)


def _webdav(given: Given, no: Refusal) -> Storage:
    from replica.storage.webdav import WebdavStorage

    parts = given.parts
    example = "davs://host:port/folder"
    try:
        host = parts.hostname and parts.port != 0
    except ValueError:
        host = None
    if not host:
        raise no("names no host, or a port that is none", f"write {example}")
    path = _plain(parts.path, no, example)
    if any(c < " " or c == "\x7f" for c in path) or "%2f" in parts.path.lower():
        raise no("holds a control character or an encoded slash")
    return WebdavStorage(given.url, name=given.name, settings=given.settings)


def _xrootd(given: Given, no: Refusal) -> Storage:
    from replica.storage.xrootd import XRootDStorage
    from replica.storage.xrootd_calls import Server

    parts = given.parts
    example = f"{parts.scheme}://host//data/x"
    try:
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        raise no("has no port between 1 and 65535", f"write {example}") from None
    if not parts.hostname:
        raise no("names no host", f"write {example}")
    if not parts.path.startswith("//"):
        raise no("has no two slashes after the host", f"an absolute path of XRootD has two: {example}")
    root = _plain(parts.path[1:], no, example)
    if "?" in root or "\n" in root or "\r" in root:
        raise no("has a '?' or a line break in its path, which XRootD cannot keep")
    secure = parts.scheme == "roots"
    if not secure and ("token" in given.settings or "token_file" in given.settings):
        raise no(
            "would carry a token in the clear", f"write roots://, which is TLS, or remove the token of {given.name}"
        )
    token = partial(secret, given.settings, "token")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    server = Server(
        f"{host}{port}",
        secure=secure,
        name=given.name,
        token=token,
        ask_seconds=seconds_in(given.settings, "quiet_seconds"),
    )
    return XRootDStorage(server, root, name=given.name, url=given.url)


_FSSPEC = "fsspec+"
#: Replica's own adapters keep promises that fsspec's file systems cannot.
_OWN_SCHEMES = {"file": "file", "local": "file", "memory": "memory", "root": "root", "s3": "s3", "sftp": "sftp"}
#: They reach other places than their URL says, or nest one file system in another.
_WRAPPERS = frozenset(
    (
        *("asynclocal", "async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "data", "dir"),
        *("filecache", "generic", "libarchive", "reference", "simplecache", "tar", "zip"),
    )
)


def _fsspec(given: Given, no: Refusal) -> Storage:
    from fsspec.registry import available_protocols

    from replica.storage.fsspec_plain import FsspecStorage

    protocol = given.parts.scheme.removeprefix(_FSSPEC)
    if protocol in _OWN_SCHEMES:
        raise no("asks fsspec for what Replica does better by itself", f"write {_OWN_SCHEMES[protocol]}://")
    if protocol in _WRAPPERS or protocol not in available_protocols():
        raise no(f"names {shown(protocol)}, which is no protocol of fsspec's that reaches a storage by itself")
    path = _plain(given.parts.path, no, f"{given.parts.scheme}://host/folder")
    if not given.parts.netloc and not path:
        raise no("names no folder", "give the endpoint a folder of its own")
    plain = f"{protocol}://{given.parts.netloc}{path}"
    return FsspecStorage.of(protocol, plain, given.settings, name=given.name, full_url=given.url)


_SCHEMES: dict[str, Callable[[Given, Refusal], Storage]] = {
    "file": _file,
    "memory": _memory,
    "https": _webdav,
    "davs": _webdav,
    "http": _webdav,
    "dav": _webdav,
    "s3": _s3,
    "s3+https": _s3,
    "s3+http": _s3,
    "sftp": _sftp,
    "root": _xrootd,
    "roots": _xrootd,
}
_SUPPORTED = (
    "supported are file:///absolute/path, davs://host/folder, s3://bucket/prefix, s3+https://host/bucket/prefix, "
    "sftp://host/absolute/path, root://host//path, memory://name, "
    "and fsspec+PROTOCOL://… to read from what else fsspec knows"
)
