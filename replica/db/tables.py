"""All tables, on one page: the state of the whole system.

Given     nothing; replica.db.migrations builds the same in a database, and a test compares the two.
Returns   SQLAlchemy Core tables for replica.catalog, the only place that reads and writes them.
Promises  every entity has a bigint key and its name is stored once; states are the numbers of rules.states; instants
          are microseconds since 1970 in UTC, so PostgreSQL and SQLite compare and subtract them alike.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import Enum
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
from rules.states import TransferState

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
    UniqueConstraint("scope_id", "name"),
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

replicas = Table(
    "replicas",
    metadata,
    Column("file_id", Id, ForeignKey("files.did_id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("state", State(states.ReplicaState), nullable=False),
    Column("generation", Integer, nullable=False, server_default=text("1")),
    Column("evidence", State(states.Evidence)),
    Column("verified_at", Instant),
    Column("tombstone_at", Instant),  # not protected by any rule since; NULL: protected, or never was under a rule
    Column("path", String(2000)),  # only where the endpoint's layout does not give it
    Index("ix_replicas_endpoint_id_state", "endpoint_id", "state"),
    # Two files never share bytes at an endpoint; few rows have a path, so this costs the others nothing.
    Index("uq_replicas_path", "endpoint_id", "path", unique=True, postgresql_where=OWN_PATH, sqlite_where=OWN_PATH),
)

# --- wishes ---------------------------------------------------------------------------------------------------------

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
    Column("created_at", Instant, nullable=False),
    Column("updated_at", Instant, nullable=False),
    Column("expires_at", Instant, index=True),
    Index("ix_rules_evaluate_at", "evaluate_at", postgresql_where=text("evaluate_at IS NOT NULL")),
)

OPEN_LOCK = text("files_available < files_total")
SLICED_LOCK = text("applied_to IS NOT NULL")

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
    Index("ix_locks_unit_id", "unit_id", "endpoint_id"),
    # Whether a rule still misses anything is read here, however many of its copies are complete.
    Index("ix_locks_open", "rule_id", postgresql_where=OPEN_LOCK, sqlite_where=OPEN_LOCK),
    Index("ix_locks_slices", "rule_id", "endpoint_id", postgresql_where=SLICED_LOCK, sqlite_where=SLICED_LOCK),
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
    # At most one live transfer for a file and target: the database itself forbids a second writer.
    Index(
        "uq_transfers_live",
        "file_id",
        "target_id",
        unique=True,
        postgresql_where=LIVE_TRANSFER,
        sqlite_where=LIVE_TRANSFER,
    ),
    # The claim reads this in order and stops at its limit, whatever the length of the queue.
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
