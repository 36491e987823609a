"""Paths of the contract ↔ addresses of a WebDAV server.

Given     a path, or an href that a server wrote into a listing.
Returns   the address to ask for, the Destination of a MOVE; the path of a listed child, and what is wrong with it.
Promises  a path becomes exactly one address, and a listed child only ever a direct child of the folder that was asked
          for; what a server would not keep as it is, is refused before anything is sent.
Partner   replica.storage.webdav.

RFC 4918 wants both percent-encoded. XRootD 5 decodes the address, but neither decodes Destination nor encodes hrefs; it
also cuts '?' and what follows from a Destination, and any bytes above 127 or spaces at its end. What a server does is
found out once, with a temporary of our own, when a name first needs to know it.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, unquote_to_bytes, urljoin, urlsplit

from replica.storage.base import PARTS
from replica.storage.faults import place
from rules.errors import Forbidden, Invalid, Transient
from rules.names import shown

if TYPE_CHECKING:
    from replica.storage.webdav import WebdavStorage

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: Cut off by a server that takes a Destination as it stands; keeps that from cutting off the end of a name.
_GUARD = "?replica"
#: A name of 255 bytes can be made, and is listed without its last.
_XROOTD_BYTES_MAX = 254


class Names:
    def __init__(self, storage: WebdavStorage) -> None:
        self._storage = storage
        self._raw_destination: bool | None = None
        self._raw_hrefs: bool | None = None

    def check(self, path: str) -> str:
        if _CONTROL.search(path):
            raise Invalid(
                f"the path {shown(path)} holds a control character, which WebDAV servers change or lose",
                hint="give the file a name without line breaks, tabs and the like",
            )
        return path

    def url(self, path: str) -> str:
        base = self._storage.http.base
        return f"{base}/{quote(path, safe='/~')}" if path else base

    # ── Destination ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def destination(self, path: str) -> str:
        """The value of Destination for a path. Invalid: the server would cut it."""
        encoded = self.url(path)
        base = self._storage.http.base
        if self._is_xrootd and any(len(segment.encode()) > _XROOTD_BYTES_MAX for segment in path.split("/")):
            raise Invalid(
                f"the path {shown(path)} has a name of over {_XROOTD_BYTES_MAX} bytes, which XRootD's listings cut",
                hint="give the file a shorter name",
            )
        if encoded == f"{base}/{path}" and "%" not in base:
            return encoded
        if not await self._takes_raw():
            return encoded
        if "?" in path:
            raise Invalid(
                f"the path {shown(path)} holds a '?', and the server of {self._storage.name or base} cuts names there",
                hint="give the file a name without '?', or bring the server up to date (XRootD 6)",
            )
        return f"{unquote_to_bytes(base).decode()}/{path}{_GUARD}"

    @property
    def _is_xrootd(self) -> bool:
        return self._storage.http.server.startswith("XrootD")

    async def _takes_raw(self) -> bool:
        """Does the server take a Destination as it stands, without decoding it?"""
        if self._raw_destination is not None:
            return self._raw_destination
        storage = self._storage
        tag = f"{PARTS}/probe-{secrets.token_hex(8)}"
        decoded = tag + "%2541"
        await storage.put_small(tag, b"")
        try:
            base = storage.http.base
            # As it stands comes first: to a server that does not decode, the encoded base would be another folder.
            for prefix in dict.fromkeys((unquote_to_bytes(base).decode(), base)):
                if await storage.move(tag, tag, f"{prefix}/{decoded}") is not None:
                    continue
                for raw, there in ((False, tag + "%41"), (True, decoded)):
                    if await storage.remove(there):
                        self._raw_destination = raw
                        return raw
                break
        finally:
            await storage.remove(tag)
        raise storage.error(
            Transient, tag, "what the server does with a percent-encoded Destination could not be found out"
        )

    # ── href ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def child(self, folder: str, href: str) -> tuple[str, str]:
        """The path of a listed resource (the folder itself included), and what makes it unusable; "": nothing.

        Forbidden: the server lists something that is not in the folder.
        """
        if "%" in href and self._raw_hrefs is None:
            self._raw_hrefs = await self._writes_raw(href)
        base = self.url(folder)
        address = href
        if not href.startswith("/"):
            # Absolute, or relative to the folder. A raw one is always a path.
            address = urljoin(base + "/", href)
            split = urlsplit(address)
            if (split.hostname, split.port) != (urlsplit(base).hostname, urlsplit(base).port):
                raise self._outside(folder, href)
            address = split.path
        elif not self._raw_hrefs:
            address = address.partition("?")[0].partition("#")[0]
        content = address.encode("utf-8", "surrogatepass") if self._raw_hrefs else unquote_to_bytes(address)
        root = unquote_to_bytes(urlsplit(base).path).rstrip(b"/") + b"/"
        content = content.removesuffix(b"/")
        if content + b"/" == root:
            return folder, ""
        if not content.startswith(root):
            raise self._outside(folder, href)
        return await self._named(folder, content[len(root) :], address)

    async def _named(self, folder: str, content: bytes, address: str) -> tuple[str, str]:
        beneath = f"{folder}/" if folder else ""
        try:
            name = content.decode()
        except UnicodeDecodeError:
            return beneath + content.decode(errors="backslashreplace"), "name is not UTF-8"
        problem = ""
        if self._is_xrootd and len(content) == _XROOTD_BYTES_MAX and await self._storage.look(beneath + name) is None:
            return beneath + name, "the server cut the name"
        if "/" in name:
            # Encoded, it is a strange name. As it stands, it is a grandchild, which was not asked for.
            if not self._raw_hrefs and address.rstrip("/").count("/") == urlsplit(self.url(folder)).path.count("/") + 1:
                return beneath + name.replace("/", "%2F"), "name holds a slash"
            raise self._outside(folder, address)
        if name in (".", ".."):
            raise self._outside(folder, address)
        if _CONTROL.search(name):
            name = name.encode("unicode_escape").decode()
            problem = "name holds a control character"
        return beneath + name, problem

    async def _writes_raw(self, href: str) -> bool | None:
        """Does the server write hrefs as the names are? Asked of the very resource whose href has a '%' in it. None:
        that cannot be told from this one; it is then read as the RFC wants it."""
        storage = self._storage
        root = storage.http.base.removesuffix(storage.http.base_path)
        address = urlsplit(href).path if "://" in href else href
        if not address.startswith("/"):
            return False  # such servers keep to the RFC
        if not re.fullmatch(r"(?:[^%]|%[0-9A-Fa-f]{2})*", address) or not address.isascii() or " " in address:
            return True
        async for found in storage.propfind(root + address, href, "0", b""):
            return found.href.rstrip("/") == unquote(address).rstrip("/")
        async for _ in storage.propfind(root + quote(address, safe="/~"), href, "0", b""):
            return True  # so the '%' is part of the name
        return None  # it went away meanwhile

    def _outside(self, folder: str, href: str) -> Forbidden:
        return Forbidden(
            f"{place(self._storage.name, folder)}: the server lists {shown(href)}, which is not in that folder",
            hint="the server is misconfigured, or is not the one that was meant",
            endpoint=self._storage.name,
            path=folder,
        )
