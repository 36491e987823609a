"""Make the tables of the main job: who, where, what, wishes and work.

Pre: nothing runs on an older schema.
"""

from __future__ import annotations

from alembic import op
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

revision = "0001"
down_revision = None

# A copy, not an import, of the tables as they were at this revision: what this file makes must never change.
Id = BigInteger().with_variant(Integer, "sqlite")
Json = JSON().with_variant(JSONB, "postgresql")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Table(
    "accounts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("role", String(8), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

Table(
    "sites",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("worker_seen_at", BigInteger),
)

Table(
    "tokens",
    metadata,
    Column("id", Id, primary_key=True),
    Column("hash", LargeBinary(32), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id")),
    Column("label", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

Table(
    "endpoints",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("url", String(2000), nullable=False, unique=True),
    Column("layout", String(16), nullable=False),
    Column("readable", Boolean, nullable=False, server_default=text("true")),
    Column("writable", Boolean, nullable=False, server_default=text("true")),
    Column("deletable", Boolean, nullable=False, server_default=text("true")),
    Column("capacity_bytes", BigInteger),
    Column("used_bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("reported_free_bytes", BigInteger),
    Column("reported_at_used_bytes", BigInteger),
    Column("created_at", BigInteger, nullable=False),
)

Table(
    "endpoint_attributes",
    metadata,
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True),
    Column("key", String(64), primary_key=True),
    Column("value", Json, nullable=False),
)

Table(
    "links",
    metadata,
    Column("source_id", Id, ForeignKey("endpoints.id"), primary_key=True),
    Column("target_id", Id, ForeignKey("endpoints.id"), primary_key=True),
    Column("distance", Integer, nullable=False, server_default=text("1")),
    Column("allowed", Boolean, nullable=False, server_default=text("true")),
)

Table(
    "scopes",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

Table(
    "dids",
    metadata,
    Column("id", Id, primary_key=True),
    Column("scope_id", Id, ForeignKey("scopes.id"), nullable=False),
    Column("name", String(1024), nullable=False),
    Column("kind", SmallInteger, nullable=False),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("open", Boolean, nullable=False, server_default=text("true")),
    Column("created_at", BigInteger, nullable=False),
    Column("closed_at", BigInteger),
    Column("metadata", Json),
    UniqueConstraint("scope_id", "name"),
)

Table(
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

Table(
    "contents",
    metadata,
    Column("parent_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Column("child_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Index("ix_contents_child_id", "child_id", "parent_id"),
)

OWN_PATH = text("path IS NOT NULL")

Table(
    "replicas",
    metadata,
    Column("file_id", Id, ForeignKey("files.did_id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("state", SmallInteger, nullable=False),
    Column("generation", Integer, nullable=False, server_default=text("1")),
    Column("evidence", SmallInteger),
    Column("verified_at", BigInteger),
    Column("tombstone_at", BigInteger),
    Column("path", String(2000)),
    Index("ix_replicas_endpoint_id_state", "endpoint_id", "state"),
    Index("uq_replicas_path", "endpoint_id", "path", unique=True, postgresql_where=OWN_PATH, sqlite_where=OWN_PATH),
)

Table(
    "rules",
    metadata,
    Column("id", Id, primary_key=True),
    Column("did_id", Id, ForeignKey("dids.id"), nullable=False, index=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False, index=True),
    Column("copies", Integer, nullable=False),
    Column("expression", String(10_000), nullable=False),
    Column("grouping", SmallInteger, nullable=False),
    Column("spread", String(64), nullable=False),
    Column("weight", String(64)),
    Column("source_expression", String(10_000)),
    Column("priority", SmallInteger, nullable=False),
    Column("activity", String(64), nullable=False),
    Column("comment", String(2_000), nullable=False, server_default=""),
    Column("state", SmallInteger, nullable=False),
    Column("evaluate_at", BigInteger),
    Column("copies_missing", Integer, nullable=False, server_default=text("0")),
    Column("placed_to", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, index=True),
    Index("ix_rules_evaluate_at", "evaluate_at", postgresql_where=text("evaluate_at IS NOT NULL")),
)

OPEN_LOCK = text("files_available < files_total")
SLICED_LOCK = text("applied_to IS NOT NULL")

Table(
    "locks",
    metadata,
    Column("rule_id", Id, ForeignKey("rules.id"), primary_key=True, autoincrement=False),
    Column("unit_id", Id, ForeignKey("dids.id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("files_total", Integer, nullable=False, server_default=text("0")),
    Column("files_available", Integer, nullable=False, server_default=text("0")),
    Column("files_stuck", Integer, nullable=False, server_default=text("0")),
    Column("bytes_total", BigInteger, nullable=False, server_default=text("0")),
    Column("applied_to", BigInteger),
    Column("bytes_pending", BigInteger, nullable=False, server_default=text("0")),
    Index("ix_locks_unit_id", "unit_id", "endpoint_id"),
    Index("ix_locks_open", "rule_id", postgresql_where=OPEN_LOCK, sqlite_where=OPEN_LOCK),
    Index("ix_locks_slices", "rule_id", "endpoint_id", postgresql_where=SLICED_LOCK, sqlite_where=SLICED_LOCK),
)

Table(
    "reasons",
    metadata,
    Column("id", Id, primary_key=True),
    Column("rule_id", Id, ForeignKey("rules.id"), nullable=False),
    Column("code", String(40), nullable=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id")),
    Column("message", String(2_000), nullable=False),
    Column("hint", String(2_000), nullable=False, server_default=""),
    Column("files", Integer, nullable=False),
    Column("first_seen_at", BigInteger, nullable=False),
    Column("last_seen_at", BigInteger, nullable=False),
    Column("next_retry_at", BigInteger),
    Index("ix_reasons_rule_id", "rule_id"),
)

LIVE_TRANSFER = text("state IN (1, 2, 3, 4, 5)")
QUEUED_TRANSFER = text("state = 1")
LEASED_TRANSFER = text("state IN (2, 3, 4)")

Table(
    "transfers",
    metadata,
    Column("id", Id, primary_key=True),
    Column("file_id", Id, ForeignKey("files.did_id"), nullable=False),
    Column("target_id", Id, ForeignKey("endpoints.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),
    Column("rule_id", Id),
    Column("source_id", Id, ForeignKey("endpoints.id")),
    Column("state", SmallInteger, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    Column("activity", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("bytes_done", BigInteger, nullable=False, server_default=text("0")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker", String(128)),
    Column("lease_until", BigInteger),
    Column("not_before", BigInteger),
    Column("reason_code", String(40)),
    Column("reason", String(2_000)),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Index(
        "uq_transfers_live",
        "file_id",
        "target_id",
        unique=True,
        postgresql_where=LIVE_TRANSFER,
        sqlite_where=LIVE_TRANSFER,
    ),
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

Table(
    "attempts",
    metadata,
    Column("id", Id, primary_key=True),
    Column("transfer_id", Id, nullable=False, index=True),
    Column("epoch", Integer, nullable=False),
    Column("source_id", Id),
    Column("worker", String(128)),
    Column("outcome", String(16), nullable=False),
    Column("error", String(40), nullable=False, server_default=""),
    Column("side", String(8), nullable=False, server_default=""),
    Column("message", String(4_000), nullable=False, server_default=""),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("seconds", Float, nullable=False, server_default=text("0")),
    Column("at", BigInteger, nullable=False),
)

Table(
    "idempotency_keys",
    metadata,
    Column("account_id", Id, ForeignKey("accounts.id"), primary_key=True, autoincrement=False),
    Column("key", String(200), primary_key=True),
    Column("request_hash", LargeBinary(32), nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False, index=True),
)


def upgrade() -> None:
    metadata.create_all(op.get_bind(), checkfirst=False)
