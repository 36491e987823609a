"""What an S3 endpoint's URL and settings say: which server, which bucket, which beginning of its keys.

Given     the URL, split, and the settings of the credentials file.
Returns   an S3Storage.
Promises  one reading of each URL; plain http goes to this machine only, unless the settings say insecure = "yes": else
          every verb is Forbidden (opening is not: the catalogue opens without settings, to check a URL).
Partner   replica.storage.registry.

    s3://bucket/prefix                    Amazon, or the server that the setting `endpoint` names
    s3+https://host[:port]/bucket/prefix  a server of one's own
    s3+http://127.0.0.1:9000/bucket       for tests
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from replica.storage.base import OWN
from replica.storage.s3 import S3Storage
from replica.storage.s3_wire import Server
from rules.errors import Invalid

if TYPE_CHECKING:
    from replica.storage.registry import Given

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{1,61}[A-Za-z0-9]\Z")
_REGION = re.compile(r"[A-Za-z0-9\-]{1,64}\Z")
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_LOOK = "a URL looks so: s3://bucket/prefix or s3+https://host:9000/bucket/prefix"


def open_s3(given: Given, no: Callable[..., Invalid]) -> S3Storage:
    settings, parts = given.settings, given.parts
    region = settings.get("region", "us-east-1")
    if not _REGION.match(region):
        raise no("has a setting `region` that cannot be right", "a region looks so: eu-central-1")
    if _BAD_PERCENT.search(parts.path):
        raise no("has a '%' that is not followed by two hexadecimal digits", "write '%' as %25")
    try:
        segments = [unquote(segment, errors="strict") for segment in parts.path.removesuffix("/").split("/")[1:]]
    except UnicodeDecodeError:
        raise no("is not UTF-8") from None
    if parts.scheme == "s3":
        bucket, server = parts.netloc, settings.get("endpoint") or f"https://s3.{region}.amazonaws.com"
    else:
        bucket, server = segments.pop(0) if segments else "", f"{parts.scheme.removeprefix('s3+')}://{parts.netloc}"
    if not _BUCKET.match(bucket) or ".." in bucket:
        raise no("names no bucket", _LOOK)
    if any(_unfit(segment) for segment in segments):
        raise no("has an empty segment, '.', '..', a '/' in one, or a name that Replica keeps for itself", _LOOK)
    at = urlsplit(server)
    try:
        host, _ = at.hostname, at.port
    except ValueError:
        host = None
    if at.scheme not in ("http", "https") or not host or "@" in at.netloc or at.path not in ("", "/") or at.query:
        raise no("belongs to a server that is not http(s)://host:port", "correct `endpoint` in the credentials file")
    loopback = _is_loopback(host)
    named = parts.scheme == "s3" and "endpoint" not in settings
    addressing = settings.get("addressing") or ("virtual" if named and "." not in bucket else "path")
    if addressing not in ("path", "virtual"):
        raise no("has a setting `addressing` that is unknown", "it is path or virtual")
    virtual = addressing == "virtual"
    place = Server(
        scheme=at.scheme,
        host=at.netloc,
        netloc=f"{bucket}.{at.netloc}" if virtual else at.netloc,
        folder="" if virtual else f"/{bucket}",
        bucket=bucket,
        region=region,
        loopback=loopback,
    )
    return S3Storage(place, "/".join(segments), settings, name=given.name, url=given.url)


def _unfit(segment: str) -> bool:
    odd = "/" in segment or any(c < " " or c == "\x7f" for c in segment)
    return odd or segment in ("", ".", "..") or segment.startswith(OWN)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
