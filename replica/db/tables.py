"""All tables, on one page: the state of the whole system.

Given     nothing; replica.db.migrations builds the same in a database, and a test compares the two.
Returns   SQLAlchemy Core tables for replica.catalog, the only place that reads and writes them.
Promises  every entity has a bigint key and its name is stored once; states are the numbers of rules.states; instants
          are microseconds since 1970 in UTC, so PostgreSQL and SQLite compare and subtract them alike.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

from rules import states
from rules.states import DeletionState, TransferState

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Instant(TypeDecorator[datetime]):
    """A moment in UTC, stored as microseconds since 1970."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> int | None:
        return None if value is None else micros(value)

    def process_result_value(self, value: Any, dialect: Any) -> datetime | None:
        return None if value is None else instant(value)


class State(TypeDecorator[Enum]):
    """An enum of rules.states, stored as its number."""

    impl = SmallInteger
    cache_ok = True

    def __init__(self, enum: type[Enum]) -> None:
        super().__init__()
        self.enum = enum

    def process_bind_param(self, value: Any, dialect: Any) -> int | None:
        return None if value is None else int(self.enum(value).value)

    def process_result_value(self, value: Any, dialect: Any) -> Enum | None:
        return None if value is None else self.enum(value)


def micros(moment: datetime) -> int:
    """Microseconds since 1970 of an aware moment, without rounding."""
    return (moment - EPOCH) // timedelta(microseconds=1)


def instant(value: int) -> datetime:
    return EPOCH + timedelta(microseconds=value)


Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up by itself only on INTEGER
Json = JSON().with_variant(JSONB, "postgresql")


@cache
def alias_of(table: Table, name: str) -> Any:
    """The table under another name. One object for ever: to make one is to copy all its columns, a third of the time
    of a small request when each statement makes its own."""
    return table.alias(name)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# --- who ------------------------------------------------------------------------------------------------------------

accounts = Table(
    "accounts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("role", String(8), nullable=False),  # admin | user
    Column("created_at", Instant, nullable=False),
)

sites = Table(
    "sites",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", Instant, nullable=False),
    Column("worker_seen_at", Instant),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", Id, primary_key=True),
    Column("hash", LargeBinary(32), nullable=False, unique=True),  # SHA-256 of a 256-bit random token
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id")),  # set: a worker's token, which may do this site's orders only
    Column("label", String(64), nullable=False),
    Column("created_at", Instant, nullable=False),
)

# --- what an account may and does keep ------------------------------------------------------------------------------

quotas = Table(
    "quotas",
    metadata,
    Column("id", Id, primary_key=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("expression", String(1_000), nullable=False),  # of all endpoints it selects together
    Column("limit_bytes", BigInteger, nullable=False),
    Column("created_at", Instant, nullable=False),
    UniqueConstraint("account_id", "expression"),
)

usage = Table(
    "usage",
    metadata,
    # What the locks of an account's rules hold at an endpoint, each file once. Kept in the transaction that changes
    # a lock or a dataset below one.
    Column("account_id", Id, ForeignKey("accounts.id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("files", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
)

usage_history = Table(
    "usage_history",
    metadata,
    # As usage was at the end of a period in which it changed.
    Column("account_id", Id, ForeignKey("accounts.id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("at", Instant, primary_key=True),
    Column("files", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)

# --- where ----------------------------------------------------------------------------------------------------------

endpoints = Table(
    "endpoints",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),
    Column("kind", State(states.EndpointKind), nullable=False),
    Column("url", String(2000), nullable=False, unique=True),
    Column("layout", String(16), nullable=False),
    Column("readable", Boolean, nullable=False, server_default=text("true")),
    Column("writable", Boolean, nullable=False, server_default=text("true")),
    Column("deletable", Boolean, nullable=False, server_default=text("true")),
    Column("capacity_bytes", BigInteger),
    # Bytes of the replicas at the endpoint or on their way: kept by delta in the transaction that changes the
    # replicas, so what is reserved is known without counting.
    Column("used_bytes", BigInteger, nullable=False, server_default=text("0")),
    # What the storage itself last said is free, and the used_bytes of that moment.
    Column("reported_free_bytes", BigInteger),
    Column("reported_at_used_bytes", BigInteger),
    Column("created_at", Instant, nullable=False),
    # Nothing new goes there, and what is protected there is brought elsewhere.
    Column("draining", Boolean, nullable=False, server_default=text("false")),
    # Why reading, writing or deleting is off or the endpoint is drained, as a person said it, and since when.
    Column("status_reason", String(2_000), nullable=False, server_default=""),
    Column("status_since", Instant),
    # Deletion: copies nobody protects go when less than this is free, or at once; so long after the decision, which
    # can be undone until then; at most so much in an hour.
    Column("min_free_bytes", BigInteger),
    Column("delete_at_once", Boolean, nullable=False, server_default=text("false")),
    Column("grace_seconds", Integer, nullable=False, server_default=text("0")),
    Column("budget_files", BigInteger),
    Column("budget_bytes", BigInteger),
    # Out of service for good: no rule may use it. The row stays for what is told about the past.
    Column("decommissioned_at", Instant),
)

endpoint_attributes = Table(
    "endpoint_attributes",
    metadata,
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", Json, nullable=False),
)

links = Table(
    "links",
    metadata,
    Column("source_id", Id, ForeignKey("endpoints.id"), primary_key=True),
    Column("target_id", Id, ForeignKey("endpoints.id"), primary_key=True),
    Column("distance", Integer, nullable=False, server_default=text("1")),
    Column("allowed", Boolean, nullable=False, server_default=text("true")),
)

traffic = Table(
    "traffic",
    metadata,
    # What went over a link in a period that began at `since`: where estimates come from.
    Column("source_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("target_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("since", Instant, primary_key=True),
    Column("files", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("seconds", Float, nullable=False, server_default=text("0")),  # summed over files that went side by side
    Column("failures", BigInteger, nullable=False, server_default=text("0")),
    Column("strained", BigInteger, nullable=False, server_default=text("0")),  # of the failures: load can be the cause
    # Of the failures, those that were not the target's: what the choice of a source goes by.
    Column("source_failures", BigInteger, nullable=False, server_default=text("0")),
    Index("ix_traffic_since", "since"),
)

# --- what -----------------------------------------------------------------------------------------------------------

scopes = Table(
    "scopes",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("created_at", Instant, nullable=False),
)

dids = Table(
    "dids",
    metadata,
    Column("id", Id, primary_key=True),
    Column("scope_id", Id, ForeignKey("scopes.id"), nullable=False),
    Column("name", String(1024), nullable=False),
    Column("kind", State(states.DidKind), nullable=False),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("open", Boolean, nullable=False, server_default=text("true")),
    Column("created_at", Instant, nullable=False),
    Column("closed_at", Instant),
    Column("metadata", Json),
    Column("monotonic", Boolean, nullable=False, server_default=text("false")),  # nothing is ever taken out of it
    Column("expires_at", Instant),
    Column("deleted_at", Instant),  # its name stays taken for ever, and for some time it can be had back
    Column("final_at", Instant),  # of what is deleted: until then; NULL: it is gone for good
    # Of a dataset: its files, kept by delta. NULL for files and containers.
    Column("files_total", Integer),
    Column("bytes_total", BigInteger),
    # Of a dataset: some of its files are, or were, in another unit of a lock as well. False proves that none is, so
    # what one lock holds need not be compared file by file with what others hold.
    Column("shared", Boolean, nullable=False, server_default=text("false")),
    UniqueConstraint("scope_id", "name"),
    Index(
        "ix_dids_expires_at",
        "expires_at",
        postgresql_where=text("expires_at IS NOT NULL"),
        sqlite_where=text("expires_at IS NOT NULL"),
    ),
    Index(
        "ix_dids_final_at",
        "final_at",
        postgresql_where=text("final_at IS NOT NULL"),
        sqlite_where=text("final_at IS NOT NULL"),
    ),
    Index(
        "ix_dids_metadata",
        "metadata",
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=text("metadata IS NOT NULL"),
        sqlite_where=text("metadata IS NOT NULL"),
    ),
)

files = Table(
    "files",
    metadata,
    Column("did_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("xxh3_128", LargeBinary(16)),
    Column("adler32", LargeBinary(4)),
    Column("md5", LargeBinary(16)),
    Column("sha256", LargeBinary(32)),
    Column("crc32c", LargeBinary(4)),
)

contents = Table(
    "contents",
    metadata,
    Column("parent_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Column("child_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Index("ix_contents_child_id", "child_id", "parent_id"),
)

OWN_PATH = text("path IS NOT NULL")
TOMBSTONE = text("tombstone_at IS NOT NULL")
LEFTOVER = text(f"state = {states.ReplicaState.COPYING.value} AND tombstone_at IS NOT NULL")

replicas = Table(
    "replicas",
    metadata,
    Column("file_id", Id, ForeignKey("files.did_id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("state", State(states.ReplicaState), nullable=False),
    Column("generation", Integer, nullable=False, server_default=text("1")),
    Column("evidence", State(states.Evidence)),
    Column("verified_at", Instant),
    # Not protected by any rule since; NULL: protected, or never was under a rule. 1970: shall go at once.
    Column("tombstone_at", Instant),
    Column("path", String(2000)),  # only where the endpoint's layout does not give it
    Column("accessed_at", Instant),
    Index("ix_replicas_endpoint_id_state", "endpoint_id", "state"),
    # Two files never share bytes at an endpoint; few rows have a path, so this costs the others nothing.
    Index("uq_replicas_path", "endpoint_id", "path", unique=True, postgresql_where=OWN_PATH, sqlite_where=OWN_PATH),
    # What may be deleted, the longest unprotected first.
    Index(
        "ix_replicas_tombstone",
        "endpoint_id",
        "tombstone_at",
        text("coalesce(accessed_at, 0)"),
        "file_id",
        postgresql_where=TOMBSTONE,
        sqlite_where=TOMBSTONE,
    ),
    # What a transfer that was stopped may have left behind: few.
    Index("ix_replicas_leftover", "endpoint_id", postgresql_where=LEFTOVER, sqlite_where=LEFTOVER),
)

# --- wishes ---------------------------------------------------------------------------------------------------------

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("condition", String(10_000), nullable=False),
    Column("rules", Json, nullable=False),  # templates: each a rule without its DID
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("comment", String(2_000), nullable=False, server_default=""),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("expires_at", Instant),
    # New and changed DIDs are read from the outbox, up to here.
    Column("seen_tx", BigInteger, nullable=False, server_default=text("0")),
    Column("seen_id", BigInteger, nullable=False, server_default=text("0")),
    # Existing DIDs up to this id were looked at; NULL: no backfill is under way.
    Column("backfilled_to", BigInteger),
)

rules = Table(
    "rules",
    metadata,
    Column("id", Id, primary_key=True),
    Column("did_id", Id, ForeignKey("dids.id"), nullable=False, index=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("copies", Integer, nullable=False),
    Column("expression", String(10_000), nullable=False),
    Column("grouping", State(states.Grouping), nullable=False),
    Column("spread", String(64), nullable=False),
    Column("weight", String(64)),
    Column("source_expression", String(10_000)),
    Column("priority", SmallInteger, nullable=False),
    Column("activity", String(64), nullable=False),
    Column("comment", String(2_000), nullable=False, server_default=""),
    Column("state", State(states.RuleState), nullable=False),
    # The work list of the evaluation pass: due when not null and not in the future.
    Column("evaluate_at", Instant),
    # Copies of units that could not be placed yet.
    Column("copies_missing", Integer, nullable=False, server_default=text("0")),
    # Units up to this id were looked at in the present round of placement; NULL: no round is under way.
    Column("placed_to", BigInteger),
    # The wish was changed, and units up to this id were compared with it; NULL: all of them.
    Column("revised_to", BigInteger),
    # The rule was suspended, resumed or hurried: what is queued for units below this id, and of this unit for files up
    # to `followed_file`, goes by it already; NULL: all of it.
    Column("followed_to", BigInteger),
    Column("followed_file", BigInteger, nullable=False, server_default=text("0")),
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("expires_at", Instant, index=True),
    Column("not_before", Instant),  # starts then
    Column("locked", Boolean, nullable=False, server_default=text("false")),  # may not be deleted
    Column("purge", Boolean, nullable=False, server_default=text("false")),  # at its end its copies go at once
    Column("metadata", Json),
    Column("notify", String(64)),  # the webhook that is told of it, besides those that hear everything
    Column("ended_at", Instant),
    Column("subscription_id", Id),  # what made it; not a foreign key: the rule outlives its subscription
    Column("template", SmallInteger),  # which of the subscription's rules this is
    Index("ix_rules_evaluate_at", "evaluate_at", postgresql_where=text("evaluate_at IS NOT NULL")),
    # A subscription makes each of its rules for a DID once, however often it looks.
    Index(
        "uq_rules_subscription",
        "subscription_id",
        "did_id",
        "template",
        unique=True,
        postgresql_where=text("subscription_id IS NOT NULL"),
        sqlite_where=text("subscription_id IS NOT NULL"),
    ),
)

OPEN_LOCK = text("files_available < files_total")
SLICED_LOCK = text("applied_to IS NOT NULL")
SURPLUS_LOCK = text("surplus")

locks = Table(
    "locks",
    metadata,
    # "Rule r protects unit u at endpoint e"; the unit is a dataset or a single file.
    Column("rule_id", Id, ForeignKey("rules.id"), primary_key=True, autoincrement=False),
    Column("unit_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("files_total", Integer, nullable=False, server_default=text("0")),
    Column("files_available", Integer, nullable=False, server_default=text("0")),
    Column("files_stuck", Integer, nullable=False, server_default=text("0")),
    Column("bytes_total", BigInteger, nullable=False, server_default=text("0")),
    # Files with an id up to this one have their replica and transfer rows; NULL: all of them. Large units are
    # applied in slices; the lock protects from its first moment whatever the slices have reached.
    Column("applied_to", BigInteger),
    # Of the bytes wanted, those that have no replica row yet: reserved, though not yet part of used_bytes.
    Column("bytes_pending", BigInteger, nullable=False, server_default=text("0")),
    # The rule does not wish this copy any more (it was changed, or the endpoint is drained or hopeless), but keeps what
    # is there until all that it does wish is available. It protects like any other lock and orders nothing.
    Column("surplus", Boolean, nullable=False, server_default=text("false")),
    # Since when this copy gets on no further, as evaluation saw it; NULL: it does.
    Column("troubled_at", Instant),
    Index("ix_locks_unit_id", "unit_id", "endpoint_id"),
    Index("ix_locks_endpoint_id", "endpoint_id"),
    # Whether a rule still misses anything is read here, however many of its copies are complete.
    Index("ix_locks_open", "rule_id", postgresql_where=OPEN_LOCK, sqlite_where=OPEN_LOCK),
    Index("ix_locks_slices", "rule_id", "endpoint_id", postgresql_where=SLICED_LOCK, sqlite_where=SLICED_LOCK),
    Index("ix_locks_surplus", "rule_id", postgresql_where=SURPLUS_LOCK, sqlite_where=SURPLUS_LOCK),
)

reasons = Table(
    "reasons",
    metadata,
    Column("id", Id, primary_key=True),
    Column("rule_id", Id, ForeignKey("rules.id"), nullable=False),
    Column("code", String(40), nullable=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id")),  # NULL: about the rule as a whole
    Column("message", String(2_000), nullable=False),
    Column("hint", String(2_000), nullable=False, server_default=""),
    Column("files", Integer, nullable=False),
    Column("first_seen_at", Instant, nullable=False),
    Column("last_seen_at", Instant, nullable=False),
    Column("next_retry_at", Instant),
    Index("ix_reasons_rule_id", "rule_id"),
)

# --- work -----------------------------------------------------------------------------------------------------------

LIVE_TRANSFER = text(
    "state IN ({})".format(", ".join(str(s.value) for s in TransferState if s not in states.TRANSFER_TERMINAL))
)
QUEUED_TRANSFER = text(f"state = {TransferState.QUEUED.value}")
READY_TRANSFER = text(f"state = {TransferState.QUEUED.value} AND not_before IS NULL")
UNROUTED_TRANSFER = text(f"state = {TransferState.QUEUED.value} AND reason_code = 'no_link'")
PARKED_TRANSFER = text(f"state = {TransferState.QUEUED.value} AND not_before IS NOT NULL")
LEASED_TRANSFER = text(
    "state IN ({})".format(", ".join(str(s.value) for s in TransferState if s in states.TRANSFER_LEASED))
)

transfers = Table(
    "transfers",
    metadata,
    Column("id", Id, primary_key=True),
    Column("file_id", Id, ForeignKey("files.did_id"), nullable=False),
    Column("target_id", Id, ForeignKey("endpoints.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),  # whose workers carry it out
    Column("rule_id", Id),  # the rule that asked first; only for people, several may want it
    Column("source_id", Id, ForeignKey("endpoints.id")),  # the source last tried
    Column("state", State(states.TransferState), nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("activity", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("bytes_done", BigInteger, nullable=False, server_default=text("0")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("epoch", Integer, nullable=False, server_default=text("0")),  # up by one with every claim; never down
    Column("worker", String(128)),
    Column("lease_until", Instant),
    Column("not_before", Instant),
    Column("reason_code", String(40)),
    Column("reason", String(2_000)),
    Column("created_at", Instant, nullable=False),
    Column("finished_at", Instant),
    # Of what is queued: the limit or the endpoint that it has been found to wait for, as `kind:key`; else empty.
    Column("waits_for", String(80), nullable=False, server_default=""),
    # Of what is leased: the source it reads from, as far as limits count it; and why from that one.
    Column("reads_id", Id),
    Column("source_why", String(500)),
    # At most one live transfer for a file and target: the database itself forbids a second writer.
    Index(
        "uq_transfers_live",
        "file_id",
        "target_id",
        unique=True,
        postgresql_where=LIVE_TRANSFER,
        sqlite_where=LIVE_TRANSFER,
    ),
    # The claim goes from lane to lane and reads each of them in order, only as far as it hands out. What waits for a
    # moment is not in it; what waits for the same thing is a lane of its own, passed over as a whole.
    Index(
        "ix_transfers_lanes",
        "site_id",
        "activity",
        "target_id",
        "waits_for",
        text("(created_at - priority * 21600000000)"),  # see rules.shares.urgency
        "id",
        postgresql_where=READY_TRANSFER,
        sqlite_where=READY_TRANSFER,
    ),
    Index(
        "ix_transfers_parked",
        "site_id",
        "not_before",
        postgresql_where=PARKED_TRANSFER,
        sqlite_where=PARKED_TRANSFER,
    ),
    # What goes before a transfer is counted here.
    Index(
        "ix_transfers_queue",
        "site_id",
        text("priority DESC"),
        "id",
        postgresql_where=QUEUED_TRANSFER,
        sqlite_where=QUEUED_TRANSFER,
    ),
    Index("ix_transfers_lease_until", "lease_until", postgresql_where=LEASED_TRANSFER, sqlite_where=LEASED_TRANSFER),
    Index("ix_transfers_file_id", "file_id", "target_id"),
    # What no copy may go to directly, and nobody has found a way for yet.
    Index("ix_transfers_unrouted", "id", postgresql_where=UNROUTED_TRANSFER, sqlite_where=UNROUTED_TRANSFER),
)

reads = Table(
    "reads",
    metadata,
    # Other sources that a claim reads from at the same time; they count as `reads_id` does while that claim is leased.
    Column("transfer_id", Id, primary_key=True, autoincrement=False),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("source_id", Id, primary_key=True, autoincrement=False),
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("transfer_id", Id, nullable=False, index=True),
    Column("epoch", Integer, nullable=False),
    Column("source_id", Id),
    Column("worker", String(128)),
    Column("outcome", String(16), nullable=False),  # done | failed | given_back | lost
    Column("error", String(40), nullable=False, server_default=""),
    Column("side", String(8), nullable=False, server_default=""),  # of a failure: source | target | unknown
    Column("message", String(4_000), nullable=False, server_default=""),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("seconds", Float, nullable=False, server_default=text("0")),
    Column("at", Instant, nullable=False),
)

limits = Table(
    "limits",
    metadata,
    # How much may be in flight at once; what it is of, see rules.limits.
    Column("kind", String(8), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("files_max", BigInteger),
    Column("bytes_max", BigInteger),
    Column("fixed", Boolean, nullable=False, server_default=text("false")),  # nothing adapts there
)

concurrency = Table(
    "concurrency",
    metadata,
    # How many slots may be taken at once, as rules.concurrency decided last; `kind` and `key` as in limits.
    Column("kind", String(8), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("why", String(16), nullable=False),
    Column("reason", String(400), nullable=False),
    Column("state", Json, nullable=False),  # what the next decision remembers
    Column("decided_at", Instant, nullable=False),
    # Since then it is measured: what was counted of traffic up to then, in its period that began at `counted_since`.
    Column("measured_at", Instant, nullable=False),
    Column("counted_since", Instant, nullable=False),
    Column("counted", Json, nullable=False),
    # What was in flight, summed over so many looks since then.
    Column("flight", Float, nullable=False),
    Column("looks", Integer, nullable=False),
    # Something was in flight or arrived.
    Column("active_at", Instant, nullable=False),
)

concurrency_decisions = Table(
    "concurrency_decisions",
    metadata,
    # Every change of a number, and what it followed from.
    Column("id", Id, primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("key", String(64), nullable=False),
    Column("at", Instant, nullable=False),
    Column("before", Integer),
    Column("number", Integer, nullable=False),
    Column("why", String(16), nullable=False),
    Column("reason", String(400), nullable=False),
    Column("measured", Json, nullable=False),
    Index("ix_concurrency_decisions_key", "kind", "key", "id"),
    Index("ix_concurrency_decisions_at", "at"),
)

activities = Table(
    "activities",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("weight", Integer, nullable=False),  # an activity without a row has rules.shares.DEFAULT_WEIGHT
)

shares = Table(
    "shares",
    metadata,
    # What an activity is owed of what a site's workers were handed out before; below zero: what it owes.
    Column("site_id", Id, ForeignKey("sites.id"), primary_key=True, autoincrement=False),
    Column("activity", String(64), primary_key=True),
    Column("deficit", Float, nullable=False),
)

breakers = Table(
    "breakers",
    metadata,
    # Of endpoints that failed lately, see rules.breakers; where there is no row nothing failed since the last success.
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("direction", String(8), primary_key=True),  # read | write
    Column("state", String(16), nullable=False),  # closed | open | half_open
    Column("failures", Integer, nullable=False),
    Column("openings", Integer, nullable=False),
    Column("last_transfer", BigInteger),
    Column("why", String(16), nullable=False),
    Column("message", String(2_000), nullable=False),
    Column("since", Instant, nullable=False),
    Column("probe_at", Instant),
    # The claim that probes it; when that is over, however it ended, there is no probe.
    Column("probe_transfer", BigInteger),
    Column("probe_epoch", Integer),
)

OPEN_ROUTE = text("closed_at IS NULL")

routes = Table(
    "routes",
    metadata,
    # The plan by which a file comes to a target over other endpoints, since no copy of it may go there directly.
    Column("id", Id, primary_key=True),
    Column("transfer_id", Id, nullable=False),  # that it serves
    Column("file_id", Id, nullable=False),
    Column("target_id", Id, nullable=False),
    Column("source_id", Id, nullable=False),
    Column("created_at", Instant, nullable=False),
    # Since when nothing is kept for it, and how it ended: done | cancelled | failed.
    Column("closed_at", Instant),
    Column("outcome", String(16)),
    Column("reason", String(2_000), nullable=False, server_default=""),
    Column("failed_id", Id),  # the hop that it failed at, which the next plan leaves out for a time
    Index("uq_routes_open", "transfer_id", unique=True, postgresql_where=OPEN_ROUTE, sqlite_where=OPEN_ROUTE),
    Index("ix_routes_transfer_id", "transfer_id"),
)

route_hops = Table(
    "route_hops",
    metadata,
    # Its steps. While it is open the replica there is reserved: nobody deletes it or stops its transfer.
    Column("route_id", Id, primary_key=True, autoincrement=False),
    Column("place", SmallInteger, primary_key=True, autoincrement=False),  # from 1
    Column("file_id", Id, nullable=False),
    Column("endpoint_id", Id, nullable=False),
    Column("made", Boolean, nullable=False),  # the replica is there only for routes: it goes when the last has ended
    Column("closed_at", Instant),  # as the route's
    Index("ix_route_hops_open", "file_id", "endpoint_id", postgresql_where=OPEN_ROUTE, sqlite_where=OPEN_ROUTE),
)

LIVE_DELETION = text(
    "state IN ({})".format(", ".join(str(s.value) for s in DeletionState if s not in states.DELETION_TERMINAL))
)
QUEUED_DELETION = text(f"state = {DeletionState.QUEUED.value}")
LEASED_DELETION = text(f"state = {DeletionState.CLAIMED.value}")

deletions = Table(
    "deletions",
    metadata,
    # The intent to remove the bytes of a replica: written in the transaction that proved that nobody needs them.
    Column("id", Id, primary_key=True),
    Column("file_id", Id, nullable=False),  # made from a replica, which refers to the file: not checked once more
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),  # whose workers carry it out
    Column("generation", Integer, nullable=False),  # of the replica that is meant: no later one is ever removed
    Column("size_bytes", BigInteger, nullable=False),
    Column("state", State(states.DeletionState), nullable=False),
    Column("was", State(states.ReplicaState), nullable=False),  # the replica's state: what an undo gives back
    Column("why", String(16), nullable=False),  # see rules.deletion.Why
    Column("account_id", Id, ForeignKey("accounts.id")),  # who asked; NULL: the deletion pass
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker", String(128)),
    Column("lease_until", Instant),
    Column("not_before", Instant),  # until then it can be undone
    Column("reason", String(2_000)),
    Column("created_at", Instant, nullable=False),
    Column("finished_at", Instant),
    Index(
        "uq_deletions_live",
        "file_id",
        "endpoint_id",
        unique=True,
        postgresql_where=LIVE_DELETION,
        sqlite_where=LIVE_DELETION,
    ),
    # The claim reads this in order: what waits out its grace stands behind what is due.
    Index(
        "ix_deletions_queue",
        "site_id",
        "not_before",
        "id",
        postgresql_where=QUEUED_DELETION,
        sqlite_where=QUEUED_DELETION,
    ),
    Index("ix_deletions_lease_until", "lease_until", postgresql_where=LEASED_DELETION, sqlite_where=LEASED_DELETION),
    Index("ix_deletions_file_id", "file_id", "endpoint_id"),
    Index("ix_deletions_endpoint_id", "endpoint_id", "created_at"),
)

LIVE_SCAN = text(f"state IN ({', '.join(str(s.value) for s in sorted(states.SCAN_LIVE, key=lambda s: s.value))})")
OPEN_FINDING = text(f"state IN ({states.FindingState.ASKED.value}, {states.FindingState.CLAIMED.value})")

scans = Table(
    "scans",
    metadata,
    # A look whether an endpoint holds what the catalogue says, and nothing else.
    Column("id", Id, primary_key=True),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),  # whose workers carry it out
    Column("state", State(states.ScanState), nullable=False),
    Column("account_id", Id, ForeignKey("accounts.id")),  # who asked; NULL: the timetable
    Column("listed_by", String(8), nullable=False),  # worker | person: who lists what is there
    Column("accepted", Boolean, nullable=False, server_default=text("false")),  # whatever part is missing or dark
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker", String(128)),
    Column("lease_until", Instant),
    Column("phase", String(12), nullable=False, server_default=""),
    Column("phase_files", BigInteger, nullable=False, server_default=text("0")),  # how far it is in that
    Column("known_files", BigInteger, nullable=False, server_default=text("0")),  # available, as the catalogue says
    Column("listed_files", BigInteger, nullable=False, server_default=text("0")),
    Column("listed_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("missing_files", BigInteger, nullable=False, server_default=text("0")),
    Column("differing_files", BigInteger, nullable=False, server_default=text("0")),
    Column("dark_files", BigInteger, nullable=False, server_default=text("0")),
    Column("dark_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("odd_files", BigInteger, nullable=False, server_default=text("0")),
    Column("lost_files", BigInteger, nullable=False, server_default=text("0")),  # declared bad
    Column("last_copies", BigInteger, nullable=False, server_default=text("0")),  # of these, those without another
    Column("reason", String(2_000), nullable=False, server_default=""),
    Column("created_at", Instant, nullable=False),
    Column("began_at", Instant),  # before the catalogue was asked; of the last attempt
    Column("compared_at", Instant),  # what was found is complete since
    Column("finished_at", Instant),
    Index("uq_scans_live", "endpoint_id", unique=True, postgresql_where=LIVE_SCAN, sqlite_where=LIVE_SCAN),
    Index("ix_scans_endpoint_id", "endpoint_id", "id"),
    Index("ix_scans_site_id", "site_id", postgresql_where=LIVE_SCAN, sqlite_where=LIVE_SCAN),
)

findings = Table(
    "findings",
    metadata,
    # What the last two complete scans of each endpoint found.
    Column("id", Id, primary_key=True),
    Column("scan_id", Id, ForeignKey("scans.id"), nullable=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), nullable=False),
    Column("kind", String(8), nullable=False),  # missing | differs | dark | odd
    Column("state", State(states.FindingState), nullable=False),
    Column("path", String(8_192), nullable=False),
    Column("path_hash", LargeBinary(16), nullable=False),
    Column("file_id", Id),  # of what the catalogue knows
    Column("generation", Integer),
    Column("size_bytes", BigInteger, nullable=False),  # as the catalogue knows it, or as it lies there
    Column("found_bytes", BigInteger),
    Column("mtime_ns", BigInteger, nullable=False, server_default=text("0")),
    Column("first_seen_at", Instant, nullable=False),  # by the first of the scans without a gap that saw it
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker", String(128)),
    Column("lease_until", Instant),
    Column("reason", String(2_000), nullable=False, server_default=""),
    Index("uq_findings_path", "scan_id", "kind", "path_hash", unique=True),
    Index("ix_findings_open", "endpoint_id", postgresql_where=OPEN_FINDING, sqlite_where=OPEN_FINDING),
    Index("ix_findings_endpoint_id", "endpoint_id", "scan_id"),
)

# --- doubts ---------------------------------------------------------------------------------------------------------

DUE_SUSPECT = text("due_at IS NOT NULL")

suspects = Table(
    "suspects",
    metadata,
    # Replicas that are doubted, and those that are bad: few. Why, who says so, and the look at it that is to decide.
    Column("file_id", Id, primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("why", String(16), nullable=False),  # see rules.integrity.Why
    Column("message", String(2_000), nullable=False),
    Column("account_id", Id),  # who said it; NULL: unattended work
    Column("since", Instant, nullable=False),
    # A worker of its site read it wrong, or found nothing, twice. A word alone does not take that back.
    Column("proven", Boolean, nullable=False, server_default=text("false")),
    Column("was", State(states.ReplicaState)),  # before it was declared bad
    # The look: not before `due_at` (NULL: none is wanted), in a worker's hands until `lease_until`.
    Column("due_at", Instant),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("epoch", BigInteger, nullable=False, server_default=text("0")),  # rises with the clock: a row may come back
    Column("worker", String(128)),
    Column("claimed_at", Instant),
    Column("lease_until", Instant),
    Index("ix_suspects_due", "endpoint_id", "due_at", postgresql_where=DUE_SUSPECT, sqlite_where=DUE_SUSPECT),
)

scrubs = Table(
    "scrubs",
    metadata,
    # How the replicas of an endpoint are read again, and how far that is: in the order of the files' ids, round and
    # round. What was verified lately is passed over; so replicas need no index by their age.
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("depth", String(8), nullable=False),
    Column("bytes_per_second", BigInteger),
    Column("files_per_second", Float),
    Column("period_seconds", Integer, nullable=False),
    Column("guard_fraction", Float, nullable=False),
    # This pass: files with an id up to `reached` are done.
    Column("pass_number", Integer, nullable=False, server_default=text("1")),
    Column("pass_began_at", Instant, nullable=False),
    Column("pass_ended_at", Instant),  # of the one before
    Column("reached", BigInteger, nullable=False, server_default=text("0")),
    Column("files", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("wrong", BigInteger, nullable=False, server_default=text("0")),
    # The batch in a worker's hands, up to which file; and when the next one may go.
    Column("upto", BigInteger),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker", String(128)),
    Column("claimed_at", Instant),
    Column("lease_until", Instant),
    Column("next_at", Instant, nullable=False),
    Column("trouble", String(2_000), nullable=False, server_default=""),
    # Too much was wrong: a person is to look.
    Column("halted_at", Instant),
    Column("halted_why", String(2_000), nullable=False, server_default=""),
    # Declared bad unattended since that moment.
    Column("bad_since", Instant),
    Column("bad", Integer, nullable=False, server_default=text("0")),
)

# --- what happened --------------------------------------------------------------------------------------------------

events = Table(
    "events",
    metadata,
    # The outbox: written in the transaction that changed something. Ids are given before the commit, so a reader goes
    # by (tx, id), and reads only what was written by transactions that are over (see replica.catalog.outbox).
    Column("id", Id, primary_key=True),
    Column("tx", BigInteger, nullable=False, server_default=text("0")),
    Column("at", Instant, nullable=False),
    Column("kind", String(40), nullable=False),  # for example rule.ok
    Column("entity", String(16), nullable=False),
    Column("entity_id", BigInteger, nullable=False),
    Column("version", Integer, nullable=False),  # of the entity, from 1 without gaps
    Column("account_id", Id),  # who did it; NULL: unattended work
    Column("payload", Json),
    Index("ix_events_tx", "tx", "id"),
    Index(
        "ix_events_entity",
        "entity",
        "entity_id",
        "version",
        postgresql_where=text("entity <> 'transfer'"),
        sqlite_where=text("entity <> 'transfer'"),
    ),
)

versions = Table(
    "versions",
    metadata,
    # How many events an entity has had. Transfers have one only, their end.
    Column("entity", String(16), primary_key=True),
    Column("entity_id", BigInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("url", String(2_000), nullable=False),
    Column("secret", String(100), nullable=False),  # signs what is sent, so it is kept as it is
    Column("kinds", Json, nullable=False),  # patterns such as rule.*
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("created_at", Instant, nullable=False),
    Column("seen_tx", BigInteger, nullable=False, server_default=text("0")),
    Column("seen_id", BigInteger, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),  # in a row
    Column("failing_since", Instant),
    # Not before this moment; while something is being delivered, until when nobody else is to try.
    Column("next_try_at", Instant),
    Column("last_error", String(2_000), nullable=False, server_default=""),
    Column("delivered_at", Instant),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    # The answer to a POST, kept in the transaction that did the work, so that a repeated POST has one effect.
    Column("account_id", Id, ForeignKey("accounts.id"), primary_key=True, autoincrement=False),
    Column("key", String(200), primary_key=True),
    Column("request_hash", LargeBinary(32), nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", Instant, nullable=False, index=True),
)

#: What millions of rows refer to and nobody ever removes: the few rows of the smallest tables, and DIDs and files, of
#: which whoever puts one into another holds both. PostgreSQL would look each of them up again with every row, for a
#: third of the time of an insert; `replica fsck` looks instead.
UNCHECKED = (
    *(dids.c.scope_id, dids.c.account_id, contents.c.parent_id, replicas.c.endpoint_id),
    *(files.c.did_id, contents.c.child_id, replicas.c.file_id, transfers.c.file_id),
    *(transfers.c.target_id, transfers.c.site_id, transfers.c.source_id),
    *(deletions.c.endpoint_id, deletions.c.site_id, deletions.c.account_id),
)
for _column in UNCHECKED:
    for _reference in _column.foreign_keys:
        assert _reference.constraint is not None
        _reference.constraint.ddl_if(dialect="sqlite")
