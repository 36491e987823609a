"""What Rucio writes down, as what we would write down: one entry in, our document and remarks out.

Given     entries of a Rucio `/export` document, or lines of NDJSON dumps of DIDs, contents, replicas and rules.
Returns   the documents of replica.wire that say the same, and remarks on what they cannot say.
Promises  pure: nothing is asked or sent. Nothing is dropped without a remark; what cannot be read raises Invalid.
Partner   replica.client.rucio_import reads the files and sends the documents.

Field names and their meaning: Rucio's REST documentation (`GET /export`, `/dids`, `/replicas/list`, `/rules`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from replica import wire
from rules.errors import Invalid
from rules.names import check_attribute_key, check_word, shown

Entry = Mapping[str, Any]
Kind = Literal["did", "content", "replica", "rule"]

#: Schemes an endpoint is opened by, the best first; a port of 0 stands for the scheme's own.
SCHEMES = ("file", "davs", "https", "dav", "http", "s3", "s3s", "root", "xroot", "sftp")
#: Columns of an RSE that are attributes with us.
_GEOGRAPHY = ("city", "region_code", "country_name", "latitude", "longitude", "time_zone", "qos_class")
#: Columns of an RSE that say nothing here: keys of Rucio's own, and what is read elsewhere.
_KNOWN = frozenset(
    {
        *("id", "rse", "vo", "created_at", "updated_at", "rse_type", "attributes", "protocols", "domain"),
        *("availability", "availability_read", "availability_write", "availability_delete", "MinFreeSpace"),
        *("deterministic", "volatile", "staging_area", "lfn2pfn_algorithm", "verify_checksum", "credentials"),
        *("third_party_copy_protocol", "third_party_copy_read_protocol", "third_party_copy_write_protocol"),
        *("read_protocol", "write_protocol", "delete_protocol", "sign_url"),
        *_GEOGRAPHY,
    }
)
#: Of a DID: what it is, what follows from its files, and marks of Rucio's own daemons. All else is metadata.
_DID_FIELDS = frozenset(
    {
        *("scope", "name", "did", "type", "did_type", "parent", "level", "account", "vo", "open", "is_open"),
        *("bytes", "length", "adler32", "md5", "guid", "availability", "access_cnt", "purge_replicas", "monotonic"),
        *("is_new", "complete", "suppressed", "hidden", "obsolete", "transient"),
        *("created_at", "updated_at", "closed_at", "deleted_at", "expired_at", "eol_at", "accessed_at"),
    }
)
_KINDS = {"FILE": "file", "F": "file", "DATASET": "dataset", "D": "dataset", "CONTAINER": "container", "C": "container"}
_GROUPINGS = {"DATASET": "dataset", "D": "dataset", "ALL": "all", "A": "all", "NONE": "none", "N": "none"}


@dataclass(frozen=True, slots=True)
class Place:
    """An endpoint, what is to be set once it is there, and how its files are found."""

    endpoint: wire.NewEndpoint
    change: wire.EndpointChange
    #: Names give the paths. Otherwise each replica tells its own.
    by_name: bool
    #: Below which the physical names of its files begin.
    prefixes: tuple[str, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Copy:
    """One file at one RSE."""

    rse: str
    did: str
    size: int
    checksums: dict[str, str]
    state: str
    pfn: str | None


@dataclass(frozen=True, slots=True)
class Collection:
    new: wire.NewDid
    account: str | None
    closed: bool


@dataclass(frozen=True, slots=True)
class Wish:
    new: wire.NewRule
    account: str | None
    suspended: bool
    remarks: tuple[str, ...] = field(default=())


def kind_of(entry: Entry) -> Kind:
    """What a line of a dump is about, told by its fields."""
    if "rse_expression" in entry:
        return "rule"
    if "child_name" in entry:
        return "content"
    if "rses" in entry or "rse" in entry:
        return "replica"
    if "name" in entry and ("type" in entry or "did_type" in entry):
        return "did"
    raise Invalid(
        "this is no DID, content, replica or rule of Rucio",
        hint="a rule has rse_expression, a content child_scope and child_name, a replica rses or rse, a DID type",
    )


# --- the export document --------------------------------------------------------------------------------------------


def place_of(name: str, rse: Entry, url: str | None = None) -> Place:
    """An RSE as an endpoint at `url`, or where the best of its protocols leads."""
    remarks: list[str] = []
    protocols = [p for p in rse.get("protocols") or () if isinstance(p, Mapping)]
    if url is None:
        url, others = _best_url(name, protocols)
        if others:
            remarks.append(f"only {url} is used; left out: {', '.join(others)}")
    attributes = _attributes(name, rse, remarks)
    site = str(attributes.pop("site", name))
    try:
        check_word(site, "a site")
    except Invalid:
        remarks.append(f"its site {shown(site)} is no name here; the site is called {name}")
        site = name
    algorithm = str(rse.get("lfn2pfn_algorithm") or attributes.get("lfn2pfn_algorithm") or "hash").lower()
    attributes.pop("lfn2pfn_algorithm", None)
    by_name = rse.get("deterministic") is not False and algorithm in ("hash", "default", "identity")
    if rse.get("deterministic") is False:
        remarks.append("it is not deterministic: paths are taken from the replicas")
    elif not by_name:
        remarks.append(f"its path algorithm {shown(algorithm)} is unknown here: paths are taken from the replicas")
    for flag, meaning in (("volatile", "is a cache"), ("staging_area", "is a staging area")):
        if rse.get(flag):
            remarks.append(f"it {meaning}, which an endpoint here cannot be: do not place rules there")
    remarks += [f"its {key} is left out" for key in sorted(set(rse) - _KNOWN) if rse[key] not in (None, "", [], {})]
    smallest = rse.get("MinFreeSpace")
    change: dict[str, Any] = {name: bool(rse[old]) for name, old in _AVAILABILITY.items() if rse.get(old) is not None}
    if isinstance(smallest, int | float) and smallest > 0:
        change["min_free_bytes"] = int(smallest)
    return Place(
        endpoint=wire.NewEndpoint(
            name=name,
            site=site,
            url=url,
            kind="tape" if str(rse.get("rse_type", "")).upper() in ("TAPE", "T") else "disk",
            layout="hash" if by_name and algorithm != "identity" else "identity",
            attributes=attributes,
        ),
        change=wire.EndpointChange(**change),
        by_name=by_name,
        prefixes=tuple(_prefixes(protocols)),
        remarks=tuple(remarks),
    )


_AVAILABILITY = {"readable": "availability_read", "writable": "availability_write", "deletable": "availability_delete"}


def distances_of(distances: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """`(source, target, distance)`: a link for each."""
    for source, targets in distances.items():
        for target, said in targets.items():
            distance = said.get("distance", said.get("ranking")) if isinstance(said, Mapping) else said
            if source != target and isinstance(distance, int | float) and distance >= 0:
                yield source, target, int(distance)


def _best_url(name: str, protocols: Sequence[Entry]) -> tuple[str, list[str]]:
    known = [p for p in protocols if p.get("scheme") in SCHEMES]
    if not known:
        offered = ", ".join(sorted({str(p.get("scheme")) for p in protocols})) or "none"
        raise Invalid(
            f"{name} has no protocol that an endpoint can use; it has {offered}",
            hint=f"say where it is: --url {name}=file:///PATH",
        )
    urls = [_url(p) for p in sorted(known, key=_preference)]
    rest = [_url(p) for p in protocols if p not in known]
    return urls[0], urls[1:] + rest


def _preference(protocol: Entry) -> tuple[int, int]:
    read = ((protocol.get("domains") or {}).get("wan") or {}).get("read") or 99
    return SCHEMES.index(protocol["scheme"]), int(read)


def _url(protocol: Entry) -> str:
    scheme, prefix = protocol["scheme"], "/" + str(protocol.get("prefix") or "").strip("/")
    if scheme == "file":
        return f"file://{prefix}"
    port = f":{protocol['port']}" if protocol.get("port") else ""
    return f"{scheme}://{protocol.get('hostname')}{port}{prefix}"


def _prefixes(protocols: Sequence[Entry]) -> Iterator[str]:
    """The longest first: one may lie beneath another."""
    found = {"/" + str(p.get("prefix") or "").strip("/") for p in protocols}
    yield from sorted(found, key=len, reverse=True)


def _attributes(name: str, rse: Entry, remarks: list[str]) -> dict[str, str | int | float | bool]:
    found: dict[str, str | int | float | bool] = {}
    given = {key: rse[key] for key in _GEOGRAPHY if rse.get(key) not in (None, "")} | dict(rse.get("attributes") or {})
    for key, value in given.items():
        if key == name or value is None:
            continue  # every RSE has an attribute of its own name
        try:
            check_attribute_key(key)
        except Invalid as error:
            remarks.append(f"{error.message}; left out")
            continue
        if not isinstance(value, str | int | float | bool):
            remarks.append(f"its attribute {key} is no single value; left out")
            continue
        found[key] = {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
    return found


# --- dumps ----------------------------------------------------------------------------------------------------------


def did_text(entry: Entry, scope: str = "scope", name: str = "name") -> str:
    if not isinstance(entry.get(scope), str) or not isinstance(entry.get(name), str):
        raise Invalid(f"it has no {scope} and {name}", hint="each line of a dump names a DID by both")
    return f"{entry[scope]}:{entry[name]}"


def did_kind(entry: Entry) -> str:
    said = str(entry.get("type") or entry.get("did_type")).upper().rpartition(".")[2]
    if said not in _KINDS:
        raise Invalid(f"{shown(said)} is not a type of DID", hint="FILE, DATASET or CONTAINER")
    return _KINDS[said]


def collection_of(entry: Entry, now: datetime) -> Collection:
    """A dataset or container; what Rucio keeps in columns besides is metadata."""
    kind = did_kind(entry)
    lifetime = _seconds_left(entry.get("expired_at"), now)
    metadata = {k: v for k, v in entry.items() if k not in _DID_FIELDS and v is not None}
    more: dict[str, Any] = {"monotonic": True} if entry.get("monotonic") else {}
    if lifetime is not None:
        more["lifetime_seconds"] = lifetime
    new = wire.NewDid(did=did_text(entry), kind=kind, metadata=metadata, **more)  # type: ignore[arg-type]
    account = entry.get("account")
    closed = entry.get("open", entry.get("is_open")) is False
    return Collection(new, str(account) if account else None, closed)


def copies_of(entry: Entry) -> Iterator[Copy]:
    """A line of `/replicas/list` is of all copies of a file; a line of a table of replicas is of one."""
    checksums = {a: str(entry[a]).lower() for a in ("adler32", "md5", "sha256") if entry.get(a)}
    size = entry.get("bytes", entry.get("size"))
    if not isinstance(size, int) or size < 0:
        raise Invalid(f"{did_text(entry)} has no size", hint="a replica needs bytes, and adler32 or md5")
    if not checksums:
        raise Invalid(f"{did_text(entry)} has no checksum", hint="without one, nothing could ever be verified")
    did = did_text(entry)
    if isinstance(entry.get("rses"), Mapping):
        states = entry.get("states") or {}
        for rse, pfns in entry["rses"].items():
            names = [p for p in pfns if isinstance(p, str)] if isinstance(pfns, Sequence) else []
            yield Copy(rse, did, size, checksums, _state(states.get(rse)), names[0] if names else None)
        return
    pfn = entry.get("pfn") or entry.get("path")
    yield Copy(str(entry["rse"]), did, size, checksums, _state(entry.get("state")), str(pfn) if pfn else None)


def path_of(copy: Copy, place: Place) -> str | None:
    """Where the file is below the endpoint, if its name does not tell. Invalid when nothing does."""
    if place.by_name:
        return None
    if copy.pfn is None:
        raise Invalid(f"{copy.did} at {copy.rse} has no path", hint="dump the replicas with their PFNs")
    path = unquote(urlsplit(copy.pfn).path) if "://" in copy.pfn else copy.pfn
    path = "/" + path.lstrip("/")
    for prefix in place.prefixes:
        if prefix == "/" or path.startswith(prefix + "/"):
            return path[len(prefix) :].lstrip("/") if prefix != "/" else path.lstrip("/")
    return path.lstrip("/")


def rule_of(entry: Entry, now: datetime) -> Wish:
    """A rule; Rucio's id stays with it as metadata."""
    state = str(entry.get("state") or "").upper().rpartition(".")[2]
    grouping = str(entry.get("grouping") or "DATASET").upper().rpartition(".")[2]
    more: dict[str, Any] = {}
    if entry.get("id"):
        more["metadata"] = {"rucio_id": str(entry["id"])}
    for theirs, ours in (("locked", "locked"), ("purge_replicas", "purge")):
        if entry.get(theirs):
            more[ours] = True
    if state in ("WAITING_APPROVAL", "W"):
        more["ask_approval"] = True
    foreign = ("child_rule_id", "split_container", "ignore_availability", "ignore_account_limit")
    remarks = [f"{name} is left out" for name in foreign if entry.get(name)]
    if str(entry.get("notification") or "NO").upper().rpartition(".")[2] not in ("NO", "N"):
        remarks.append("notification is left out: a webhook hears of rules")
    if grouping not in _GROUPINGS:
        raise Invalid(f"{shown(grouping)} is not a grouping", hint="DATASET, ALL or NONE")
    new = wire.NewRule(
        did=did_text(entry),
        expression=str(entry["rse_expression"]),
        copies=int(entry.get("copies") or 1),
        grouping=_GROUPINGS[grouping],  # type: ignore[arg-type]
        weight=entry.get("weight") or None,
        source_expression=entry.get("source_replica_expression") or None,
        lifetime_seconds=_seconds_left(entry.get("expires_at"), now),
        priority=min(5, max(1, int(entry.get("priority") or 3))),
        activity=str(entry.get("activity") or "default"),
        comment=str(entry.get("comments") or entry.get("comment") or "")[:2_000],
        **more,
    )
    account = entry.get("account")
    return Wish(new, str(account) if account else None, state in ("SUSPENDED", "U"), tuple(remarks))


def _state(said: object) -> str:
    text = str(said or "AVAILABLE").upper().rpartition(".")[2]
    return "AVAILABLE" if text == "A" else text


def _seconds_left(said: object, now: datetime) -> int | None:
    """Until a moment that Rucio wrote as ISO 8601 or as in HTTP; what has passed ends in a second."""
    if not said:
        return None
    try:
        moment = datetime.fromisoformat(str(said))
    except ValueError:
        try:
            moment = parsedate_to_datetime(str(said))
        except ValueError:
            raise Invalid(f"{shown(str(said))} is not a moment", hint="write it as 2027-01-31T12:00:00") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(1, int((moment - now).total_seconds()))
