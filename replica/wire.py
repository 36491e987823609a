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


class Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """A request: a field that we do not know is an error, not a wish silently ignored."""


class Answer(msgspec.Struct, kw_only=True, omit_defaults=False, gc=False):
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


class NewAccount(Document):
    name: Text
    role: Literal["user", "admin"] = "user"


class Account(Answer):
    name: str
    role: str
    created_at: datetime


class AccountToken(Answer):
    """Shown once: the server keeps only a hash."""

    account: str
    token: str


# --- what an account may and does keep ------------------------------------------------------------------------------


class NewQuota(Document):
    """How much an account may hold at all endpoints together that the expression selects."""

    account: Text
    expression: Annotated[str, msgspec.Meta(max_length=1_000)]
    limit_bytes: Count


class Quota(Answer):
    id: int
    account: str
    expression: str
    #: Those that it selects now.
    endpoints: list[str]
    limit_bytes: int
    used_bytes: int
    left_bytes: int
    #: What is held beyond the limit: it stays, and nothing more is placed.
    over_bytes: int
    created_at: datetime
    #: Why the expression selects nothing, if so: then it limits nothing.
    problem: str = ""


class Usage(Answer):
    """What the rules of an account hold at an endpoint, each file once. None: the total over all of them."""

    account: str | None
    endpoint: str | None
    files: int
    bytes: int


class UsageThen(Answer):
    """The same as it was at a moment, and until the next row of the same account and endpoint."""

    at: datetime
    account: str | None
    endpoint: str | None
    files: int
    bytes: int


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
    #: Copies that nobody protects go when less than this is free; null: when nothing is.
    min_free_bytes: Count | msgspec.UnsetType | None = msgspec.UNSET
    #: They go whether or not space is needed.
    delete_at_once: bool | msgspec.UnsetType = msgspec.UNSET
    #: So long a deletion can be undone.
    grace_seconds: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | msgspec.UnsetType = msgspec.UNSET
    #: At most so much is deleted in an hour; null: no limit.
    budget_files: Count | msgspec.UnsetType | None = msgspec.UNSET
    budget_bytes: Count | msgspec.UnsetType | None = msgspec.UNSET


class Ban(Document):
    """What shall not be done at an endpoint, and why; everything, if nothing is named."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=2_000)]
    read: bool = False
    write: bool = False
    delete: bool = False


class Drain(Document):
    """Nothing new goes to the endpoint, and what is protected there is brought elsewhere."""

    reason: Annotated[str, msgspec.Meta(max_length=2_000)] = ""
    undo: bool = False


class Decommission(Document):
    """The endpoint goes out of service for good."""

    #: Forget the copies that are still there and that no rule protects.
    forget: bool = False
    #: Also those of which no other copy is known.
    last_copies: bool = False
    #: It is in service again.
    undo: bool = False


class LinkChange(Document):
    """Absent fields stay as they are; a link of which nothing is known has distance 1 and is allowed."""

    source: Text
    target: Text
    distance: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] | msgspec.UnsetType = msgspec.UNSET
    allowed: bool | msgspec.UnsetType = msgspec.UNSET


class Link(Answer):
    """A directed way between two endpoints: the nearer of two sources is read."""

    source: str
    target: str
    distance: int
    allowed: bool


class LimitChange(Document):
    """How much may be in flight at once; null: as much as there is. Absent fields stay as they are."""

    #: read and write: of an endpoint; link: to the endpoint `of`, from `source`.
    kind: Literal["read", "write", "link", "activity", "account"]
    of: Text
    source: Text | None = None
    files_max: Count | msgspec.UnsetType | None = msgspec.UNSET
    #: A file that is larger than this goes alone.
    bytes_max: Count | msgspec.UnsetType | None = msgspec.UNSET
    #: false: only what is set here holds, and nothing adapts; of an endpoint, nor do its links.
    adaptive: bool | msgspec.UnsetType = msgspec.UNSET


class Limit(Answer):
    kind: str
    #: What it is of; a link as `source → target`.
    of: str
    files_max: int | None
    bytes_max: int | None
    files_in_flight: int
    bytes_in_flight: int
    #: A file takes a slot, of small ones many share one.
    slots_in_flight: float
    #: Whether it may adapt; what it is by now, and why. Null: nothing was measured yet.
    adaptive: bool
    slots: int | None
    why: str | None
    reason: str | None
    decided_at: datetime | None


class Limits(Answer):
    items: list[Limit]


class LimitDecision(Answer):
    """A change of how many slots may be taken at once."""

    at: datetime
    before: int | None
    slots: int
    why: str
    reason: str
    #: What it follows from.
    measured: dict[str, float]


class LimitDecisions(Answer):
    items: list[LimitDecision]


class NewActivity(Document):
    name: Text
    #: Activities that wait share what workers can do in the proportion of their weights.
    weight: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]


class Activity(Answer):
    name: str
    weight: int


class Activities(Answer):
    items: list[Activity]


class Breaker(Answer):
    """Why an endpoint is left alone for a while, though nobody banned it."""

    direction: str
    #: open: nothing goes there before `probe_at`; half_open: one transfer tries it now.
    state: str
    #: full, denied, away, throttled or failing.
    why: str
    message: str
    since: datetime
    probe_at: datetime | None
    hint: str


class Protected(Answer):
    """What rules protect at an endpoint. A file that is in two datasets counts twice."""

    rules: int
    files: int
    bytes: int


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
    #: Nothing new goes there, and what is protected there is brought elsewhere.
    draining: bool = False
    #: Why it cannot be used as usual, in a person's words, and since when it is as it is.
    status_reason: str = ""
    status_since: datetime | None = None
    min_free_bytes: int | None = None
    delete_at_once: bool = False
    grace_seconds: int = 0
    budget_files: int | None = None
    budget_bytes: int | None = None
    #: Out of service for good since then.
    decommissioned_at: datetime | None = None
    #: Only where one endpoint was asked for.
    protected: Protected | None = None
    #: Only where one endpoint was asked for: what is not read from or written to for now, because it failed.
    breakers: list[Breaker] = []


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
    #: Nothing is ever taken out of it.
    monotonic: bool = False
    #: It is deleted when it is so old.
    lifetime_seconds: Annotated[int, msgspec.Meta(ge=1, le=10**10)] | None = None


class DidChange(Document):
    """Absent fields stay as they are."""

    open: bool | msgspec.UnsetType = msgspec.UNSET
    #: Can be set and never unset.
    monotonic: bool | msgspec.UnsetType = msgspec.UNSET
    #: Counted from now; null: it stays for ever.
    lifetime_seconds: Annotated[int, msgspec.Meta(ge=1, le=10**10)] | msgspec.UnsetType | None = msgspec.UNSET


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
    #: Nothing is ever taken out of it.
    monotonic: bool = False
    #: When it is deleted by itself.
    expires_at: datetime | None = None
    deleted_at: datetime | None = None
    #: Of what is deleted: until then it can be had back. Null: it is gone for good.
    final_at: datetime | None = None


class Metadata(Answer):
    did: str
    metadata: dict[str, Any]


class MetadataChange(Document):
    """Keys are paths such as `proposal.end`; a part that holds a dot itself is in double quotes."""

    set: dict[str, Any] = {}
    unset: Annotated[list[Text], msgspec.Meta(max_length=1_000)] = []


class MetadataOf(MetadataChange, kw_only=True):
    did: DidText


class MetadataChanges(Document):
    changes: Bulk[MetadataOf]


class MetadataChanged(Answer):
    #: How many of the given DIDs have other metadata than before.
    changed: int


class Attachment(Document):
    dids: Bulk[DidText]


class Attaching(Document):
    parent: DidText
    children: Bulk[DidText]


class Attachments(Document):
    """Several parents at once: all of it or nothing."""

    attachments: Annotated[list[Attaching], msgspec.Meta(min_length=1, max_length=1_000)]


class DidList(Document):
    dids: Bulk[DidText]


class Deleted(Answer):
    #: How many of the given DIDs were not deleted before.
    deleted: int
    #: Until then they can be had back.
    final_at: datetime


class Undeleted(Answer):
    undeleted: int


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


#: A moment with its time zone: without one nobody knows which is meant.
Moment = Annotated[datetime, msgspec.Meta(tz=True)]
#: A word of a rule that has a column of its own.
RuleWord = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class RuleTemplate(Document):
    """A wish without the DID it is about."""

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
    activity: RuleWord = "default"
    comment: Text = ""
    #: When it ends, instead of how long it lives.
    expires_at: Moment | None = None
    #: Before this moment it protects nothing and moves nothing.
    not_before: Moment | None = None
    #: It neither ends nor gives up a copy before somebody unlocks it.
    locked: bool = False
    #: At its end, copies that only it protected go at once, not when space is needed.
    purge: bool = False
    #: Wait for a person, unless every endpoint it may go to approves by itself.
    ask_approval: bool = False
    #: The name of a webhook that is told what becomes of it.
    notify: RuleWord | None = None
    metadata: dict[str, Any] | None = None


class NewRule(RuleTemplate, kw_only=True):
    did: DidText


class RuleChange(Document):
    """Absent fields stay as they are.

    What is wished (copies, expression, grouping, spread, weight) may change, too: copies that are not wished any more
    stay until those that are have been verified.
    """

    copies: Annotated[int, msgspec.Meta(ge=1, le=100)] | msgspec.UnsetType = msgspec.UNSET
    expression: Annotated[str, msgspec.Meta(max_length=10_000)] | msgspec.UnsetType = msgspec.UNSET
    grouping: Literal["dataset", "all", "none"] | msgspec.UnsetType = msgspec.UNSET
    spread: Text | msgspec.UnsetType = msgspec.UNSET
    weight: Text | msgspec.UnsetType | None = msgspec.UNSET
    source_expression: Annotated[str, msgspec.Meta(max_length=10_000)] | msgspec.UnsetType | None = msgspec.UNSET
    #: From now on; null: for ever.
    lifetime_seconds: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | msgspec.UnsetType | None = msgspec.UNSET
    expires_at: Moment | msgspec.UnsetType | None = msgspec.UNSET
    locked: bool | msgspec.UnsetType = msgspec.UNSET
    purge: bool | msgspec.UnsetType = msgspec.UNSET
    priority: Annotated[int, msgspec.Meta(ge=1, le=5)] | msgspec.UnsetType = msgspec.UNSET
    activity: RuleWord | msgspec.UnsetType = msgspec.UNSET
    comment: Text | msgspec.UnsetType = msgspec.UNSET
    metadata: dict[str, Any] | msgspec.UnsetType | None = msgspec.UNSET
    notify: RuleWord | msgspec.UnsetType | None = msgspec.UNSET
    #: Whose rule it is from now on, and whose quota it uses.
    account: Text | msgspec.UnsetType = msgspec.UNSET


class RuleMove(Document):
    """Where the copies shall be instead."""

    expression: Annotated[str, msgspec.Meta(max_length=10_000)]
    copies: Annotated[int, msgspec.Meta(ge=1, le=100)] | msgspec.UnsetType = msgspec.UNSET


class Verdict(Document):
    """What a person says to a rule that asked."""

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
    not_before: datetime | None = None
    locked: bool = False
    purge: bool = False
    notify: str | None = None
    metadata: dict[str, Any] | None = None
    ended_at: datetime | None = None
    #: Up by one with everything that happens to the rule; the ETag of an update.
    version: int = 0
    #: When all its copies will be there; only where one rule was asked for, and where it can be said.
    eta: Eta | None = None
    eta_note: str = ""


class Eta(Answer):
    """A band, from what the links did lately; None: cannot be said."""

    optimistic: datetime
    likely: datetime | None = None
    pessimistic: datetime | None = None


class Lock(Answer):
    """One copy of one unit: a dataset, or a single file."""

    unit: str
    endpoint: str
    files_total: int
    files_available: int
    files_stuck: int
    bytes_total: int
    #: The rule does not wish this copy any more, and keeps it until all that it does wish is there.
    surplus: bool = False


class Explanation(Answer):
    """A rule, where its copies are or will be, and in sentences what is missing, why and what happens next."""

    rule: Rule
    locks: list[Lock]
    transfers: dict[str, int]
    sentences: list[str]
    #: What the rule waits for: together, every unit that is not satisfied.
    waiting: list[Waiting] = []


class Waiting(Answer):
    """Copies that a rule waits for, for the same reason and at the same endpoint."""

    #: not_before, waiting_approval, suspended, placing, unplaced, ordering, queued, moving, retrying, held, stuck, lost
    what: str
    #: Of the reason: what placement or the storage said; empty where nothing is wrong.
    code: str
    endpoint: str | None
    files: int
    bytes: int
    since: datetime | None
    #: Why; and what happens next, and when.
    message: str
    next: str
    next_at: datetime | None = None
    #: What a person can do; empty where nothing need be done.
    hint: str = ""
    #: For what is queued: transfers of the same site that go before the first of these.
    ahead: int | None = None
    #: The first units it is about, at most ten.
    units: list[str] = []


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
    #: At most 1,000 of the copies and refusals are listed one by one; these count all.
    units: int
    copies_missing: int = 0
    totals: list[PlannedTotal] = []
    #: The rule that wishes the same already: nothing would be done but, if it has a lifetime, to prolong it.
    exists: int | None = None
    #: Why a person would be asked first; empty: nobody is asked.
    asks: str = ""


class PlannedTotal(Answer):
    """What all planned copies at one endpoint come to."""

    endpoint: str
    units: int
    files: int
    bytes: int
    #: Of these, what is neither there nor on its way yet.
    new_files: int
    new_bytes: int


class RuleDeletePlan(Answer):
    """What would lose its protection if the rule ended now; nothing was changed."""

    rule: int
    #: Whether it would go at once, or when its space is needed.
    purge: bool
    files: int
    bytes: int
    #: Copies that are the last good and protected ones of their file, or of which all the others go as well.
    last_copies: int
    #: Copies that are on their way, and would be stopped.
    stopped: int
    endpoints: list[Unprotected]
    #: Why it would be refused; empty: it would not.
    refused: str = ""


class Unprotected(Answer):
    endpoint: str
    files: int
    bytes: int
    last_copies: int
    stopped: int


class HistoryEntry(Answer):
    """One thing that happened to an entity; versions count up by one."""

    version: int
    kind: str
    at: datetime
    #: None: unattended work.
    account: str | None = None
    payload: dict[str, Any] = {}


Condition = Annotated[str, msgspec.Meta(max_length=10_000)]
Templates = Annotated[list[RuleTemplate], msgspec.Meta(min_length=1, max_length=20)]


class NewSubscription(Document):
    """Rules for every dataset and container that fulfils a condition.

    In the expressions of the rules, `{metadata.key}` stands for what the DID's metadata say.
    """

    name: Text
    condition: Condition
    rules: Templates
    comment: Text = ""
    lifetime_seconds: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    #: Look at what exists already, too; else only at what is made, closed or given other metadata from now on.
    backfill: bool = False


class SubscriptionChange(Document):
    """Absent fields stay as they are. Rules that were made already stay, too."""

    condition: Condition | msgspec.UnsetType = msgspec.UNSET
    rules: Templates | msgspec.UnsetType = msgspec.UNSET
    enabled: bool | msgspec.UnsetType = msgspec.UNSET
    comment: Text | msgspec.UnsetType = msgspec.UNSET
    #: From now on; null: for ever.
    lifetime_seconds: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | msgspec.UnsetType | None = msgspec.UNSET


class Skipped(Answer):
    """A DID that fulfils the condition and for which a rule could not be made, and why."""

    did: str
    #: The number of the subscription's rule.
    rule: int
    reason: str
    hint: str
    at: datetime


class Subscription(Answer):
    id: int
    name: str
    account: str
    condition: str
    rules: list[RuleTemplate]
    #: Of each of the rules. A changed rule is a new one with a new number.
    numbers: list[int]
    enabled: bool
    comment: str
    created_at: datetime
    updated_at: datetime
    expires_at: datetime | None = None
    #: What exists already is being looked at.
    backfilling: bool = False
    rules_made: int = 0
    #: The latest; only where one subscription was asked for.
    skipped: list[Skipped] = []


class PreviewedRule(Answer):
    #: The number of the subscription's rule.
    rule: int
    #: With its placeholders filled.
    expression: str
    new_bytes: int = 0
    #: Copies for which there is no place now.
    copies_missing: int = 0
    #: It was made before, and is not made again.
    exists: bool = False
    #: Why it could not be made; empty where it can.
    skipped: str = ""


class PreviewedDid(Answer):
    did: str
    rules: list[PreviewedRule]


class SubscriptionPreview(Answer):
    """What a backfill would do now; nothing was changed."""

    #: Datasets and containers that were looked at, and how many of them fulfil the condition.
    examined: int
    matching: int
    #: There are more than were looked at.
    more: bool
    #: The first of the matching ones, each as if it were alone.
    dids: list[PreviewedDid]
    #: Endpoint → bytes that would be copied there for those that are listed.
    new_bytes: dict[str, int]


class PlannedShare(Answer):
    """What happens at one endpoint."""

    endpoint: str
    #: Copies of units: datasets or, with grouping none, files.
    copies: int
    files: int
    bytes: int


class WishPlan(Answer):
    """What changing a rule's wish would do; nothing was changed."""

    candidates: list[str]
    #: Copies to be made; files and bytes that must move for them.
    made: list[PlannedShare]
    #: Copies that go after all that is wished then is available; files and bytes that are there now and that no other
    #: rule, and nothing else that this one wishes, keeps there.
    given_up: list[PlannedShare]
    refusals: list[PlanRefusal]
    missing_copies: int
    units: int


# --- work -----------------------------------------------------------------------------------------------------------


class Transfer(Answer):
    id: int
    did: str
    source: str | None  #: the one it reads from now, else the last one tried
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
    #: Of what is done, where one transfer was asked for: what sources had to give. A repair moves damaged chunks only.
    moved_bytes: int | None = None
    #: Why the last claim read from its first source.
    source_why: str | None = None
    #: Sources that it reads from at the same time.
    also_from: list[str] = []
    #: Over which other endpoints the file comes, if it does; in a list this is left out.
    route: Route | None = None
    #: Transfers for which this copy is a step on the way; in a list this is left out.
    step_for: list[int] = []


class RouteHop(Answer):
    """A step on the way of a file: *reserved* until the copy is there, then *available*."""

    endpoint: str
    state: str
    #: The transfer that brings it there.
    transfer: int | None = None


class Route(Answer):
    """The plan by which a file comes to a target that no copy of it may go to directly."""

    id: int
    source: str
    target: str
    hops: list[RouteHop]
    #: None while it is in force; done, cancelled, failed.
    outcome: str | None
    reason: str
    created_at: datetime
    closed_at: datetime | None = None


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
    #: There were good bytes at the target once: what is still right of them need not be moved.
    repair: bool = False
    #: So many of the sources, the first ones, may be read at the same time; the others only in their stead.
    sources_at_once: int = 1


class Orders(Answer):
    orders: list[Order]
    lease_seconds: float
    #: More is waiting: claim again as soon as there is room.
    more: bool
    #: Something waits for what is in flight to end: ask again after the next report.
    full: bool = False


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
    #: Of a file that came from several endpoints at once: the bytes that came from each.
    read_from: dict[Text, Count] = {}
    size: Count | None = None
    checksums: dict[str, str] = {}
    #: What sources had to give, where that is less than all: a repair.
    moved_bytes: Count | None = None
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


# --- what happened --------------------------------------------------------------------------------------------------

Kinds = Annotated[list[Annotated[str, msgspec.Meta(max_length=40)]], msgspec.Meta(max_length=50)]


class Event(Answer):
    """A change, told after its commit. Versions of one entity have no gaps: who sees one has missed nothing before it,
    or sees that he has."""

    #: What comes after this event is read with it.
    cursor: str
    #: `entity.what`, for example rule.ok.
    kind: str
    entity: str
    id: int
    version: int
    at: datetime
    #: Who did it; None: unattended work.
    account: str | None = None
    #: What it is about, as people call it, as far as it still is known.
    did: str | None = None
    name: str | None = None
    source: str | None = None
    target: str | None = None
    payload: dict[str, Any] = {}


class Events(Answer):
    """A part of the log. It has no end: `next` is where to go on, also when there is nothing yet."""

    items: list[Event]
    next: str
    #: There is more already.
    more: bool


class NewWebhook(Document):
    name: Text
    #: http or https.
    url: Text
    #: Patterns such as rule.*; none: everything.
    kinds: Kinds = []


class Webhook(Answer):
    id: int
    name: str
    account: str
    url: str
    kinds: list[str]
    enabled: bool
    created_at: datetime
    delivered_at: datetime | None = None
    #: Tries in a row that failed, since when, why the last one did, and when the next one is.
    failures: int = 0
    failing_since: datetime | None = None
    last_error: str = ""
    next_try_at: datetime | None = None
    #: Nothing is waiting to be delivered.
    up_to_date: bool = False


class WebhookMade(Webhook, kw_only=True):
    """Its secret is shown this once."""

    secret: str


class WebhookChange(Document):
    enabled: bool
    #: When it is enabled: leave out what happened meanwhile.
    from_now: bool = False


class Delivery(Answer):
    """What a webhook is sent by POST.

    `Replica-Signature` is `sha256=` and the HMAC-SHA256, with the webhook's secret, of the header
    `Replica-Timestamp`, a dot, and the body. Events may come twice (tell them by their cursor), never not at all.
    """

    webhook: str
    events: list[Event]


# --- deletion -------------------------------------------------------------------------------------------------------


class NewDeletion(Document):
    """A person's wish that one copy of a file goes. What a rule protects stays, whoever asks."""

    did: DidText
    endpoint: Text
    #: Also if it is the last good copy there is.
    last_copy: bool = False


class Deletion(Answer):
    """The intent to remove one replica, and what became of it."""

    id: int
    did: str
    endpoint: str
    site: str
    state: str
    #: space | purge | drained | leftover | asked | asked_last | forgotten
    why: str
    bytes: int
    #: Of the replica that is meant; no later one is ever removed.
    generation: int
    attempts: int
    #: Who asked; None: the deletion pass.
    account: str | None
    reason: str | None
    created_at: datetime
    #: Until then it can be undone, and no worker is given it.
    not_before: datetime | None = None
    finished_at: datetime | None = None


class DeletionClaim(Document):
    worker: Text
    limit: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 1_000


class DeletionOrder(Answer):
    """One replica to remove, as a site worker carries it out."""

    deletion: int
    epoch: int
    did: str
    generation: int
    endpoint: str
    url: str
    path: str
    #: What else is there is not this replica, and stays. None: known to be wrong, and not compared.
    size: int | None


class DeletionOrders(Answer):
    orders: list[DeletionOrder]
    lease_seconds: float
    #: More is waiting: claim again as soon as there is room.
    more: bool


class DeletionBeat(Document):
    deletion: Count
    epoch: Epoch


class DeletionHeartbeat(Document):
    worker: Text
    beats: Annotated[list[DeletionBeat], msgspec.Meta(max_length=BULK_MAX)]


class DeletionOutcome(Document):
    """*removed*: nothing is under that name any more, or nothing was. *failed*: `error` is the code of rules.errors.
    *given_back*: nothing was done, the worker stops; does not count as an attempt."""

    deletion: Count
    epoch: Epoch
    outcome: Literal["removed", "failed", "given_back"]
    error: Text = ""
    message: Annotated[str, msgspec.Meta(max_length=4_000)] = ""
    retry_after_seconds: Annotated[float, msgspec.Meta(ge=0)] | None = None


class DeletionReport(Document):
    worker: Text
    outcomes: Bulk[DeletionOutcome]


# --- scans ----------------------------------------------------------------------------------------------------------


class NewScan(Document):
    """A look whether an endpoint holds what the catalogue says, and nothing else. Joins the one that is under way."""

    endpoint: Text
    #: Whatever part is missing or dark: it is so.
    accept_fraction: bool = False
    #: Who asks lists what is there, and tells; else a worker of the endpoint's site does.
    listing: bool = False
    #: When that listing began: what was proven later is not missing because it is not in it.
    listed_at: datetime | None = None


class Scan(Answer):
    id: int
    endpoint: str
    site: str
    #: queued | listing | held | to_verify | verifying | done | failed | cancelled
    state: str
    #: Who asked; None: the timetable.
    account: str | None
    #: worker | person
    listed_by: str
    accepted: bool
    #: What it does now, and with how many files it has done that.
    phase: str
    phase_files: int
    #: Available at the endpoint, as the catalogue says.
    known_files: int
    listed_files: int
    listed_bytes: int
    missing_files: int
    differing_files: int
    dark_files: int
    dark_bytes: int
    #: Links, names that are not UTF-8 and the like: no replica can be that.
    odd_files: int
    #: Of what is missing or differs: seen by two scans with the grace between them.
    confirmed_files: int
    #: Of what is dark: the same, so `replica scan --remove-dark` would move it to quarantine.
    removable_files: int
    #: Looked for once more, not found, and declared bad.
    lost_files: int
    #: Of these: files of which no other good copy is known.
    last_copies: int
    removed_files: int
    #: Dark files that are to go, or are going.
    moving_files: int
    reason: str
    epoch: int
    created_at: datetime
    began_at: datetime | None = None
    compared_at: datetime | None = None
    finished_at: datetime | None = None


class Finding(Answer):
    #: missing | differs | dark | odd
    kind: str
    #: seen | confirmed | lost | there | unclear | asked | claimed | removed | kept
    state: str
    #: As it is at the storage; what is no text is written with escapes.
    path: str
    did: str | None
    size: int
    found_size: int | None
    first_seen_at: datetime
    reason: str


class ScanClaim(Document):
    worker: Text


class ScanOrder(Answer):
    """*list*: from the beginning. *verify*: only look once more for what is missing."""

    scan: int
    epoch: int
    what: Literal["list", "verify"]
    #: When its first attempt began: with the number it names the scan for ever, also in another database.
    began_at: datetime
    endpoint: str
    url: str


class DarkOrder(Answer):
    """A file that nobody knows, to be moved to quarantine if it still has this size and time."""

    finding: int
    epoch: int
    endpoint: str
    url: str
    path: str
    size: int
    mtime_ns: int


class ScanWork(Answer):
    scan: ScanOrder | None
    dark: list[DarkOrder]
    lease_seconds: float


class ScanBeat(Document):
    scan: Count
    epoch: Epoch
    phase: Annotated[str, msgspec.Meta(max_length=12)]
    files: Count


class ScanPart(Document):
    """Which part of what the catalogue knows at the endpoint: what comes after this file."""

    scan: Count
    epoch: Epoch
    after: Count = 0


class Known(Answer, array_like=True):
    """One file as the catalogue knows it there."""

    file: int
    generation: int
    size: int
    #: Its bytes should be there.
    expected: bool
    path: str


class KnownPart(Answer):
    known: list[Known]
    #: Where the next part begins; None: this is the last.
    next: int | None


class MissingFile(Document, array_like=True):
    file: Count
    generation: Count
    #: What lies there instead; None: nothing.
    found_size: Count | None


class DarkFile(Document, array_like=True):
    path: Annotated[str, msgspec.Meta(max_length=8_000)]
    size: Count
    mtime_ns: int
    #: Why it can be no replica; empty for an ordinary file.
    problem: Annotated[str, msgspec.Meta(max_length=200)]


class ScanFindings(Document):
    """What a comparison came to, in parts. Saying a part again changes nothing."""

    scan: Count
    epoch: Epoch
    missing: Annotated[list[MissingFile], msgspec.Meta(max_length=BULK_MAX)] = []
    dark: Annotated[list[DarkFile], msgspec.Meta(max_length=BULK_MAX)] = []


class ScanCompared(Document):
    """All was listed, compared and told; the endpoint's own mark was there before and after."""

    scan: Count
    epoch: Epoch
    listed_files: Count
    listed_bytes: Count
    missing: Count
    dark: Count


class ScanFailed(Document):
    """*given_back*: the worker stops."""

    scan: Count
    epoch: Epoch
    given_back: bool = False
    message: Annotated[str, msgspec.Meta(max_length=4_000)] = ""


class Probe(Answer):
    finding: int
    path: str
    size: int


class Probes(Answer):
    """What is to be looked for once more; none: the scan is over."""

    probes: list[Probe]


class ProbeOutcome(Document):
    finding: Count
    outcome: Literal["missing", "differs", "there", "unclear"]
    message: Annotated[str, msgspec.Meta(max_length=2_000)] = ""


class ProbeReport(Document):
    scan: Count
    epoch: Epoch
    outcomes: Annotated[list[ProbeOutcome], msgspec.Meta(max_length=BULK_MAX)]


class DarkOutcome(Document):
    """*removed*: it is in quarantine. *gone*: nothing was there. *kept*: it changed. *failed*: try again later."""

    finding: Count
    epoch: Epoch
    outcome: Literal["removed", "gone", "kept", "failed"]
    message: Annotated[str, msgspec.Meta(max_length=2_000)] = ""


class DarkReport(Document):
    outcomes: Bulk[DarkOutcome]


# --- integrity ------------------------------------------------------------------------------------------------------


class BadReplicas(Document):
    """Replicas at one endpoint that are bad, in somebody's word. Nothing of them is destroyed by saying so."""

    endpoint: Text
    dids: Bulk[DidText]
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=2_000)]
    #: Make new bytes of a good copy there also where no rule asks for it.
    repair: bool = False


class BadDeclared(Answer):
    #: Bad now that were not before.
    bad: int
    #: Bad already.
    known: int
    #: DIDs of those that are bad and of which no good copy is known: kept as they are, until somebody finds one.
    last_copies: list[str]
    #: Transfers that were made where no rule asks for one.
    repairs: int


class GoodReplicas(Document):
    """Replicas at one endpoint that were declared bad, and are not, in somebody's word."""

    endpoint: Text
    dids: Bulk[DidText]


class GoodDeclared(Answer):
    #: What they were before: no worker had ever found them wrong.
    good: int
    #: A worker of the site reads them first; only what it finds counts.
    to_verify: int


class DoubtedReplica(Document):
    did: DidText
    endpoint: Text
    #: What was seen.
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]


class Doubts(Document):
    """Replicas that somebody read, and found wrong or missing. No verdict: workers of their sites are sent to look."""

    replicas: Annotated[list[DoubtedReplica], msgspec.Meta(min_length=1, max_length=1_000)]


class DoubtsTaken(Answer):
    to_look_at: int
    #: Not known as good, doubted already, or proven just now.
    passed_over: int
    #: More than one account may have looked at in a day.
    too_many: int


class RepairWish(Document):
    did: DidText
    endpoint: Text


class Suspect(Answer):
    """A replica that is doubted, or bad."""

    did: str
    endpoint: str
    #: The replica's: available or unavailable while it is only doubted; bad.
    state: str
    #: source | scrub | scan | reader | person
    why: str
    message: str
    #: Its own site's worker found it so.
    proven: bool
    account: str | None
    since: datetime
    #: When a worker looks next; None: none will.
    due_at: datetime | None
    attempts: int


class ScrubChange(Document):
    """How the replicas of an endpoint are read again. Absent fields stay as they are; null: no limit."""

    depth: Literal["off", "shallow", "deep"] | msgspec.UnsetType = msgspec.UNSET
    bytes_per_second: Annotated[int, msgspec.Meta(ge=1, le=2**62)] | msgspec.UnsetType | None = msgspec.UNSET
    files_per_second: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | msgspec.UnsetType | None = msgspec.UNSET
    period_seconds: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)] | msgspec.UnsetType = msgspec.UNSET
    #: When more than this part of what was read is wrong, nothing is declared bad, and a person is asked.
    guard_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] | msgspec.UnsetType = msgspec.UNSET
    #: Go on after a halt.
    resume: bool = False
    #: Begin a pass now.
    now: bool = False


class Scrub(Answer):
    """How the replicas of an endpoint are read again, and how far that is."""

    endpoint: str
    site: str
    depth: str
    bytes_per_second: int | None
    files_per_second: float | None
    period_seconds: int
    guard_fraction: float
    pass_number: int
    #: Of this pass; the next one begins then.
    pass_began_at: datetime
    #: Of the pass before.
    pass_ended_at: datetime | None
    #: Of this pass, so far: read, and found wrong.
    files: int
    bytes: int
    wrong: int
    #: How much of all files' numbers is passed, from 0 to 1.
    progress: float
    next_at: datetime
    worker: str | None
    trouble: str
    halted_at: datetime | None
    halted_why: str
    #: Replicas of this endpoint that are doubted, and that are bad.
    suspicious: int
    bad: int


class Scrubs(Answer):
    items: list[Scrub]


#: Replicas in one batch of looks.
CHECKS_MAX = 1_000


class CheckClaim(Document):
    worker: Text
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 16


class Check(Answer):
    """One replica to look at where it lies."""

    file: int
    endpoint_id: int
    #: Of a probe; of a batch it stands in the batch.
    epoch: int
    did: str
    endpoint: str
    url: str
    path: str
    size: int
    checksums: dict[str, str]


class ScrubOrder(Answer):
    """A part of an endpoint's pass, in the order in which it is to be read."""

    endpoint_id: int
    epoch: int
    depth: str
    bytes_per_second: int | None
    checks: list[Check]


class Checks(Answer):
    """Probes go first: there is a scrub only if there is none."""

    probes: list[Check]
    scrub: ScrubOrder | None
    lease_seconds: float
    #: There may be more to do after so long.
    again_seconds: float


Millionths = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class ProbeBeat(Document):
    file: Count
    endpoint_id: Count
    epoch: Millionths


class CheckHeartbeat(Document):
    worker: Text
    probes: Annotated[list[ProbeBeat], msgspec.Meta(max_length=CHECKS_MAX)] = []
    #: Endpoint and epoch of the batch in hands.
    scrub: tuple[Count, Epoch] | None = None


class CheckBeatAnswer(Answer):
    lease_seconds: float
    #: Files of probes to stop; and whether the batch is to be stopped.
    stop: list[int]
    stop_scrub: bool


class CheckOutcome(Document):
    """What was found at one replica.

    *ok*: all of it was looked at, and it is the catalogue's. *differs*, *missing*: it is not, or there is nothing, and
    the storage itself was there; of a probe: twice. *unsteady*: once so, once so. *failed*: nothing can be said.
    *given_back*: the worker stops.
    """

    file: Count
    endpoint_id: Count
    epoch: Millionths
    outcome: Literal["ok", "differs", "missing", "unsteady", "failed", "given_back"]
    size: Count | None = None
    checksums: dict[str, str] = {}
    error: Text = ""
    message: Annotated[str, msgspec.Meta(max_length=4_000)] = ""


class ScrubReport(Document):
    endpoint_id: Count
    epoch: Epoch
    findings: Annotated[list[CheckOutcome], msgspec.Meta(max_length=CHECKS_MAX)]
    #: Nothing is left of the batch.
    over: bool
    #: Why it ends before its time: the storage cannot be reached, for one.
    trouble: Annotated[str, msgspec.Meta(max_length=4_000)] = ""


class CheckReport(Document):
    worker: Text
    probes: Annotated[list[CheckOutcome], msgspec.Meta(max_length=CHECKS_MAX)] = []
    scrub: ScrubReport | None = None


class CheckAnswer(Answer):
    accepted: int
    #: Files of probes that are not the worker's any more.
    stale: list[int]
    #: The batch goes on: it is still the worker's, and nothing stopped it.
    scrub_goes_on: bool
