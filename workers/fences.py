"""Which storages this worker touches, whoever wrote its orders: the site's own word, which the centre cannot change.

Given     `roots`: directories and beginnings of URLs where it may write, and delete, and read; and `sources`: further
          beginnings of URLs from which it may read. Empty `roots`: anywhere, for a system in one process.
Returns   nothing, or Forbidden; Unreachable, where a name has no address that could be looked at.
Promises  a URL is within a beginning only if scheme, host and port are the same and each folder of the beginning is
          the URL's, one by one: no longer host or folder name, no '..', user name, encoded slash or odd spelling gets
          past. Directories are compared as they really are, symbolic links followed.
Partner   workers.storages asks before it opens anything; replica.config has the two settings.

Reading from other sites
    With `sources`, only from what is listed there or within `roots`. Without, from any host that the storages of other
    sites may have: any by https, davs, s3, sftp or root, but never this machine, its link or a cloud's metadata
    service, by whatever spelling, name or wrapping of an address. All addresses of a name are looked at, when the
    storage is opened; a name that has none now is not opened, for it may have one a moment later. A name may have
    another address by the time it is connected to: a site with services behind its own firewall that believe everybody
    lists its `sources`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from rules.errors import Forbidden, Invalid, Side, Unreachable
from rules.names import shown

_SAME = {"davs": "https", "dav": "http", "s3": "s3"}
_PORTS = {"https": 443, "http": 80, "s3+https": 443, "s3+http": 80, "sftp": 22, "root": 1094, "roots": 1094}
#: What other sites' storages are spoken to by.
_REMOTE = frozenset({"https", "s3", "s3+https", "sftp", "root", "roots"})
_HOST = re.compile(r"[A-Za-z0-9._\-]+|[0-9A-Fa-f:.]+")
_NETLOC = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(:[0-9]*)?")
_METADATA = frozenset({"metadata", "metadata.google.internal", "instance-data", "instance-data.ec2.internal"})
_NAT64 = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))
#: Metadata services outside of the link-local range: Alibaba's, Oracle's, and Amazon's by IPv6.
_METADATA_ADDRESSES = frozenset({"100.100.100.200", "192.0.0.192", "fd00:ec2::254"})
_HINT = {
    "target": "add the directory, or the beginning of the URL, to `roots` of this site's worker, "
    "or correct the endpoint's URL",
    "source": "add the beginning of the URL to `sources` of this site's worker, or correct the endpoint's URL",
}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class _Place:
    """A URL of another machine, understood: what two of them are compared by."""

    scheme: str
    host: str
    port: int
    folders: tuple[str, ...]

    def within(self, other: _Place) -> bool:
        return (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port) and (
            self.folders[: len(other.folders)] == other.folders
        )


class Fences:
    def __init__(self, roots: Sequence[str] = (), sources: Sequence[str] = ()) -> None:
        self.open = not roots
        self._directories = [_directory(root) or root for root in roots if _is_directory(root)]
        self._roots = [place_of(root) for root in roots if not _is_directory(root)]
        self._sources = [place_of(source) for source in sources]

    def permit(self, url: str, *, name: str, side: Side) -> None:
        """May wait for a disk, or for a name server. Forbidden, with what the site would have to write down."""
        side = "source" if side == "source" else "target"
        if self.open and (side == "target" or not self._sources):
            return
        reason = self._problem(url, side, name)
        if reason:
            hint = _HINT["target"] if _is_directory(url) else _HINT[side]
            raise Forbidden(f"this worker may not touch {shown(url)}: {reason}", hint=hint, endpoint=name, side=side)

    def _problem(self, url: str, side: Side, name: str) -> str:
        if url.startswith("memory://"):
            return ""  # nothing but this process
        if _is_directory(url):
            if "\0" in unquote(url):
                return "it holds a NUL character"
            return "" if self._is_within_a_directory(url) else "it is outside of the directories it was given"
        try:
            place = place_of(url)
        except Invalid as error:
            return error.message
        if any(place.within(root) for root in self._roots):
            return ""
        if side == "target":
            return "it is outside of the roots it was given"
        if self._sources:
            listed = any(place.within(source) for source in self._sources)
            return "" if listed else "it is not among the sources it was given"
        return _suspicious(place, name)

    def _is_within_a_directory(self, url: str) -> bool:
        if self.open:
            return True
        path = os.path.realpath(_directory(url) or "/")
        real = (os.path.realpath(directory) for directory in self._directories)
        return any(path == root or path.startswith(root.rstrip("/") + "/") for root in real)


def place_of(url: str) -> _Place:
    """Invalid: it can be read in more than one way, or in none."""

    def no(reason: str) -> Invalid:
        return Invalid(f"the URL {shown(url)} {reason}", hint="write scheme://host:port/folder", field="roots")

    if any(c <= " " or c >= "\x7f" for c in url) or "\\" in url:
        raise no("holds white space, a backslash or a character that is not ASCII: write it as %XX")
    if "?" in url or "#" in url:
        raise no("has a query or a fragment")
    try:
        split = urlsplit(url)
        scheme = _SAME.get(split.scheme, split.scheme)
        port = split.port if split.port is not None else _PORTS.get(scheme, -1)
        folders = [unquote(segment, errors="strict") for segment in split.path.split("/")]
    except (ValueError, UnicodeDecodeError):
        raise no("cannot be read") from None
    host = (split.hostname or "").lower()
    bare = _NETLOC.fullmatch(split.netloc) and "://" in url
    if not split.scheme or not bare or not _HOST.fullmatch(host) or port == 0:
        raise no("names no host, or with a user name or port that cannot be")
    folders = folders[2:] if scheme in ("root", "roots") and split.path.startswith("//") else folders[1:]
    if folders and folders[-1] == "":
        folders.pop()
    if any(folder in ("", ".", "..") or "/" in folder or "\0" in folder for folder in folders):
        raise no("has '..', or an empty or odd folder, in its path")
    return _Place(scheme, host, port, tuple(folders))


def _is_directory(root: str) -> bool:
    return root.startswith(("/", "file:"))


def _directory(root: str) -> str:
    return unquote(urlsplit(root).path) if root.startswith("file:") else root


# ── where nobody's storage is ────────────────────────────────────────────────────────────────────────────────────────


def _suspicious(place: _Place, name: str) -> str:
    if place.scheme not in _REMOTE:
        return f"{place.scheme} is for sources that are listed"
    if place.scheme == "s3":
        return ""  # a bucket; its server is Amazon, or the one that the site's credentials name
    if place.host.rstrip(".") in _METADATA or f".{place.host.rstrip('.')}".endswith(".localhost"):
        return "this host is never a storage"
    addresses = _addresses(place.host)
    if not addresses:
        raise Unreachable(
            f"{place.host} has no address now that could be looked at before it is connected to",
            hint="see whether its name is right, and what the name server says",
            endpoint=name,
            side="source",
        )
    for address in addresses:
        if _is_inside(address):
            return f"{place.host} is {address}, this machine or something next to it"
    return ""


def _addresses(host: str) -> list[Address]:
    """Of a name or of any spelling of a number; none, if there is none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]


def _is_inside(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        within = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if within is None and (any(address in net for net in _NAT64) or int(address) >> 32 == 0):
            within = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if within is not None and _is_inside(within):
            return True
    odd = address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast
    return odd or str(address) in _METADATA_ADDRESSES or (address.version == 4 and int(address) >> 24 == 0)
