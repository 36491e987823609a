"""Replicas as a Metalink document (RFC 5854), which download tools such as aria2 read.

Given     replicas, those of one file in a row; their endpoints; perhaps URLs that need no credentials.
Returns   the document, in pieces.
Promises  everything is escaped; only replicas that are available are named, disks and verified ones first. A URL holds
          no secret, unless the caller signs it. It is a claim, not a proof: whoever downloads compares the checksums.
Partner   `replica locate --metalink`, and GET /dids/{scope}/{name}/replicas with `Accept: application/metalink4+xml`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from xml.sax.saxutils import escape, quoteattr

from replica import wire

MEDIA_TYPE = "application/metalink4+xml"
#: Their names in IANA's registry of hash functions; tools leave out those they do not know.
_HASHES = {"sha256": "sha-256", "sha512": "sha-512", "sha1": "sha-1"}
#: What the schemes of endpoints are called elsewhere; what is missing here, such as memory://, means nothing there.
_SCHEMES = {
    **{scheme: scheme for scheme in ("https", "http", "s3", "sftp", "root", "roots", "file")},
    **{"davs": "https", "dav": "http", "s3+https": "https", "s3+http": "http"},
}
_COUNTRY = re.compile(r"[A-Za-z]{2}\Z")
_PRIORITY_MAX = 999_999


def metalink(
    replicas: Iterable[wire.Replica],
    endpoints: Mapping[str, wire.Endpoint],
    signed: Callable[[wire.Replica], str | None] = lambda _: None,
) -> Iterator[str]:
    """`signed`: a URL by which the replica can be read for a while; None: as it is."""
    yield '<?xml version="1.0" encoding="UTF-8"?>\n<metalink xmlns="urn:ietf:params:xml:ns:metalink">\n'
    for did, same in groupby(replicas, key=lambda replica: replica.did):
        held = [replica for replica in same if replica.state == "available"]
        if held:
            yield from _file(did, held, endpoints, signed)
    yield "</metalink>\n"


def _file(
    did: str,
    replicas: list[wire.Replica],
    endpoints: Mapping[str, wire.Endpoint],
    signed: Callable[[wire.Replica], str | None],
) -> Iterator[str]:
    name = did.partition(":")[2]
    yield f"  <file name={quoteattr(name)}>\n    <identity>{escape(did)}</identity>\n"
    yield f"    <size>{replicas[0].size}</size>\n"
    for algorithm, value in sorted(replicas[0].checksums.items()):
        yield f"    <hash type={quoteattr(_HASHES.get(algorithm, algorithm))}>{escape(value)}</hash>\n"
    for place, replica in enumerate(sorted(replicas, key=lambda replica: _rank(replica, endpoints)), 1):
        url = signed(replica) or _plain(replica.url)
        if url:
            country = _country(endpoints.get(replica.endpoint))
            where = f" location={quoteattr(country)}" if country else ""
            yield f'    <url{where} priority="{min(place, _PRIORITY_MAX)}">{escape(url)}</url>\n'
    yield "  </file>\n"


def _rank(replica: wire.Replica, endpoints: Mapping[str, wire.Endpoint]) -> tuple[bool, bool, bool, str]:
    endpoint = endpoints.get(replica.endpoint)
    unread = endpoint is None or not endpoint.readable
    return unread, endpoint is None or endpoint.kind != "disk", replica.verified_at is None, replica.endpoint


def _plain(url: str) -> str:
    scheme, _, rest = url.partition("://")
    known = _SCHEMES.get(scheme)
    return f"{known}://{rest}" if known else ""


def _country(endpoint: wire.Endpoint | None) -> str:
    country = endpoint.attributes.get("country") if endpoint is not None else None
    return country.lower() if isinstance(country, str) and _COUNTRY.match(country) else ""
