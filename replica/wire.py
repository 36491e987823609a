"""What crosses the wire: one struct for each document of the REST interface.

Given     JSON of a request or an answer.
Returns   typed values; the same classes on the server, in the client and in the workers.
Promises  field names are a contract: added to, never renamed. States are printed in lower case, sizes are bytes,
          instants are ISO 8601 in UTC, checksums are `{algorithm: hexadecimal}`, a DID is its text `scope:name`.
Partner   replica.api serves them, replica.client reads them, the OpenAPI document is generated from them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

T = TypeVar("T")

#: How many items one bulk call takes.
BULK_MAX = 10_000

#: A count or a size; PostgreSQL's bigint is the limit.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
#: Which claim of a transfer somebody speaks of.
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
#: A bound on every free text, so that no request can carry a book.
Text = Annotated[str, msgspec.Meta(max_length=2_000)]
DidText = Annotated[str, msgspec.Meta(max_length=8_192)]
Bulk = Annotated[list[T], msgspec.Meta(min_length=1, max_length=BULK_MAX)]


class Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A request: a field that we do not know is an error, not a wish silently ignored."""


class Answer(msgspec.Struct, kw_only=True, omit_defaults=False):
    """An answer: a client of an older release ignores fields that it does not know."""


class Problem(Answer):
    """`application/problem+json` (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: str = ""
    #: The offending field of the request, if it is one.
    field: str = ""
    #: 1-based column in an expression; 0 where it does not apply.
    column: int = 0
    #: For bulk calls: the items that failed, with the reason of each.
    items: list[dict[str, Any]] = []


class Page(Answer, Generic[T]):
    """A part of a list; `next` is the cursor of the following part, None at the end."""

    items: list[T]
    next: str | None = None


# --- who ------------------------------------------------------------------------------------------------------------


class Whoami(Answer):
    account: str
    role: str
    site: str | None = None


class Health(Answer):
    status: str


class NewSite(Document):
    name: Text


class Site(Answer):
    id: int
    name: str
    created_at: datetime
    #: When a worker of this site was last heard of.
    worker_seen_at: datetime | None = None


class SiteToken(Answer):
    """Shown once: the server keeps only a hash."""

    site: str
    token: str


# --- where ----------------------------------------------------------------------------------------------------------


class NewEndpoint(Document):
    name: Text
    site: Text
    url: Text
    kind: Literal["disk", "tape"] = "disk"
    layout: Literal["identity", "hash"] = "identity"
    attributes: dict[str, str | int | float | bool] = {}
    #: What Replica may fill at most; None: as much as the storage says is free.
    capacity_bytes: Count | None = None


class EndpointChange(Document):
    """Absent fields stay as they are; an attribute set to null is removed."""

    attributes: dict[str, str | int | float | bool | None] | msgspec.UnsetType = msgspec.UNSET
    readable: bool | msgspec.UnsetType = msgspec.UNSET
    writable: bool | msgspec.UnsetType = msgspec.UNSET
    deletable: bool | msgspec.UnsetType = msgspec.UNSET
    capacity_bytes: Count | msgspec.UnsetType | None = msgspec.UNSET


class Endpoint(Answer):
    id: int
    name: str
    site: str
    kind: str
    url: str
    layout: str
    attributes: dict[str, str | int | float | bool]
    readable: bool
    writable: bool
    deletable: bool
    #: Bytes of the replicas that are there or on their way.
    used_bytes: int
    #: None: not known.
    free_bytes: int | None = None
    capacity_bytes: int | None = None


class Space(Document):
    """What a worker of the endpoint's site was told by the storage."""

    free_bytes: Count


# --- what -----------------------------------------------------------------------------------------------------------


class NewScope(Document):
    name: Text


class Scope(Answer):
    name: str
    account: str
    created_at: datetime


class NewDid(Document):
    """A dataset or a container; files come into being by being registered."""

    did: DidText
    kind: Literal["dataset", "container"] = "dataset"
    metadata: dict[str, Any] = {}


class DidChange(Document):
    open: bool | msgspec.UnsetType = msgspec.UNSET


class Did(Answer):
    did: str
    kind: str
    account: str
    open: bool
    created_at: datetime
    closed_at: datetime | None = None
    #: Of a file: its own; of a dataset or container: of everything in it.
    size: int | None = None
    files: int | None = None
    checksums: dict[str, str] = {}
    metadata: dict[str, Any] = {}


class Attachment(Document):
    dids: Bulk[DidText]


class Attached(Answer):
    #: How many of the given DIDs were new in the parent; the others were there already.
    attached: int


class Detached(Answer):
    detached: int


class NewReplica(Document):
    """A file at an endpoint. `path` only where the endpoint's layout does not give it."""

    did: DidText
    size: Count
    checksums: dict[str, str]
    path: Text | None = None


class Registration(Document):
    """Files that are at an endpoint already; new DIDs are made, known ones must agree in size and checksums.

    `evidence` *hashed*: the caller read the bytes where they lie: available at once. *declared*: nobody read them:
    they are verified in place by a worker of the site before they count.
    """

    endpoint: Text
    replicas: Bulk[NewReplica]
    dataset: DidText | None = None
    evidence: Literal["hashed", "declared"] = "declared"


class Registered(Answer):
    files: int
    #: Of these, DIDs that did not exist before.
    new: int
    attached: int
    #: Waiting for a worker to verify them in place.
    to_verify: int


class Replica(Answer):
    did: str
    endpoint: str
    site: str
    state: str
    size: int
    checksums: dict[str, str]
    #: Relative to the endpoint's URL.
    path: str
    url: str
    verified_at: datetime | None = None
    evidence: str | None = None


# --- wishes ---------------------------------------------------------------------------------------------------------


class NewRule(Document):
    did: DidText
    expression: Annotated[str, msgspec.Meta(max_length=10_000)]
    copies: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    grouping: Literal["dataset", "all", "none"] = "dataset"
    #: The failure domain that no two copies share: endpoint, site, or an attribute's key.
    spread: Text = "endpoint"
    weight: Text | None = None
    #: Limits the sources.
    source_expression: Annotated[str, msgspec.Meta(max_length=10_000)] | None = None
    lifetime_seconds: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=1, le=5)] = 3
    activity: Text = "default"
    comment: Text = ""


class Reason(Answer):
    """Why a rule is not satisfied, and what a person can do."""

    code: str
    endpoint: str | None
    message: str
    hint: str
    files: int
    first_seen_at: datetime
    last_seen_at: datetime
    next_retry_at: datetime | None = None


class Rule(Answer):
    id: int
    did: str
    account: str
    copies: int
    expression: str
    grouping: str
    spread: str
    state: str
    #: Copies of files: how many this rule's locks want, by what is true of them now.
    locks_ok: int
    locks_replicating: int
    locks_stuck: int
    #: Files of the DID, and how many of them the least complete of the wished copies has.
    files_total: int
    files_available: int
    bytes_total: int
    priority: int
    activity: str
    created_at: datetime
    updated_at: datetime
    weight: str | None = None
    source_expression: str | None = None
    expires_at: datetime | None = None
    comment: str = ""
    reasons: list[Reason] = []


class Lock(Answer):
    """One copy of one unit: a dataset, or a single file."""

    unit: str
    endpoint: str
    files_total: int
    files_available: int
    files_stuck: int
    bytes_total: int


class Explanation(Answer):
    """A rule, where its copies are or will be, and in sentences what is missing, why and what happens next."""

    rule: Rule
    locks: list[Lock]
    transfers: dict[str, int]
    sentences: list[str]


class PlannedCopy(Answer):
    unit: str
    endpoint: str
    new_bytes: int
    why: str


class PlanRefusal(Answer):
    unit: str
    missing_copies: int
    #: One sentence for every candidate endpoint.
    obstacles: list[str]


class RulePlan(Answer):
    """What `rule add` would do; nothing was changed."""

    candidates: list[str]
    copies: list[PlannedCopy]
    refusals: list[PlanRefusal]
    new_bytes: int
    #: At most this many of the copies and refusals are listed one by one; `units` counts all.
    units: int


# --- work -----------------------------------------------------------------------------------------------------------


class Transfer(Answer):
    id: int
    did: str
    source: str | None
    target: str
    state: str
    attempts: int
    priority: int
    activity: str
    bytes: int
    bytes_done: int
    reason: str | None
    created_at: datetime
    not_before: datetime | None = None
    finished_at: datetime | None = None


class Claim(Document):
    #: Names the claiming process, for people; the site comes from the token.
    worker: Text
    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 100
    #: Transfers whose bytes together exceed this are left for another claim; the first one always fits.
    limit_bytes: Count | None = None


class OrderSource(Answer):
    endpoint: str
    url: str
    path: str


class Order(Answer):
    """One transfer as a site worker carries it out. It carries no credentials."""

    transfer: int
    epoch: int
    did: str
    size: int
    checksums: dict[str, str]
    target_endpoint: str
    target_url: str
    target_path: str
    #: Best first. Empty: the bytes should be at the target already; verify them in place.
    sources: list[OrderSource]
    #: The attempt this is, from 1.
    attempt: int


class Orders(Answer):
    orders: list[Order]
    lease_seconds: float
    #: More is waiting: claim again as soon as there is room.
    more: bool


class Beat(Document):
    transfer: Count
    epoch: Epoch
    bytes_done: Count = 0
    phase: Literal["claimed", "moving", "verifying"] = "moving"


class Heartbeat(Document):
    worker: Text
    beats: Annotated[list[Beat], msgspec.Meta(max_length=BULK_MAX)]


class HeartbeatAnswer(Answer):
    lease_seconds: float
    #: Transfers to stop at once: the lease was lost, or they were cancelled.
    stop: list[int]


class Outcome(Document):
    """What became of one order.

    *done*: the target holds verified bytes under the final name. *failed*: `error` is the code of rules.errors,
    `side` whose fault. *given_back*: nothing was wrong, the worker stops; does not count as an attempt.
    """

    transfer: Count
    epoch: Epoch
    outcome: Literal["done", "failed", "given_back"]
    source_endpoint: Text | None = None
    size: Count | None = None
    checksums: dict[str, str] = {}
    adopted: bool = False
    verified_by: Text = ""
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    error: Text = ""
    message: Annotated[str, msgspec.Meta(max_length=4_000)] = ""
    side: Literal["source", "target", "unknown"] = "unknown"
    retry_after_seconds: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Report(Document):
    worker: Text
    outcomes: Bulk[Outcome]


class ReportAnswer(Answer):
    accepted: int
    #: Transfers whose epoch or state was not the reported one any more: another worker has them, or nobody wants them.
    stale: list[int]
