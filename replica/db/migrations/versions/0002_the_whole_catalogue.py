"""Quotas and usage, deletions, subscriptions, events; what rules, DIDs and endpoints can do besides.

Pre: nothing that writes runs on the older schema: the counters that are filled in here would miss what it does.
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
    MetaData,
    SmallInteger,
    String,
    Table,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"

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

# What the new tables refer to; made before.
Table("accounts", metadata, Column("id", Id, primary_key=True))
Table("endpoints", metadata, Column("id", Id, primary_key=True))
Table("sites", metadata, Column("id", Id, primary_key=True))
OLDER = list(metadata.tables.values())

Table(
    "events",
    metadata,
    Column("id", Id, primary_key=True),
    Column("tx", BigInteger, nullable=False, server_default=text("0")),
    Column("at", BigInteger, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("entity", String(16), nullable=False),
    Column("entity_id", BigInteger, nullable=False),
    Column("version", Integer, nullable=False),
    Column("account_id", Id),
    Column("payload", Json),
    Index(
        "ix_events_entity",
        "entity",
        "entity_id",
        "version",
        postgresql_where=text("entity <> 'transfer'"),
        sqlite_where=text("entity <> 'transfer'"),
    ),
    Index("ix_events_tx", "tx", "id"),
)
Table(
    "versions",
    metadata,
    Column("entity", String(16), primary_key=True),
    Column("entity_id", BigInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
)
Table(
    "quotas",
    metadata,
    Column("id", Id, primary_key=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("expression", String(1_000), nullable=False),
    Column("limit_bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    UniqueConstraint("account_id", "expression"),
)
Table(
    "subscriptions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("condition", String(10_000), nullable=False),
    Column("rules", Json, nullable=False),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("comment", String(2_000), nullable=False, server_default=""),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("seen_tx", BigInteger, nullable=False, server_default=text("0")),
    Column("seen_id", BigInteger, nullable=False, server_default=text("0")),
    Column("backfilled_to", BigInteger),
)
Table(
    "webhooks",
    metadata,
    Column("id", Id, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("account_id", Id, ForeignKey("accounts.id"), nullable=False),
    Column("url", String(2_000), nullable=False),
    Column("secret", String(100), nullable=False),
    Column("kinds", Json, nullable=False),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("created_at", BigInteger, nullable=False),
    Column("seen_tx", BigInteger, nullable=False, server_default=text("0")),
    Column("seen_id", BigInteger, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("failing_since", BigInteger),
    Column("next_try_at", BigInteger),
    Column("last_error", String(2_000), nullable=False, server_default=""),
    Column("delivered_at", BigInteger),
)
Table(
    "deletions",
    metadata,
    Column("id", Id, primary_key=True),
    Column("file_id", Id, nullable=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), nullable=False),
    Column("site_id", Id, ForeignKey("sites.id"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("state", SmallInteger, nullable=False),
    Column("was", SmallInteger, nullable=False),
    Column("why", String(16), nullable=False),
    Column("account_id", Id, ForeignKey("accounts.id")),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("epoch", Integer, nullable=False, server_default=text("0")),
    Column("worker", String(128)),
    Column("lease_until", BigInteger),
    Column("not_before", BigInteger),
    Column("reason", String(2_000)),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Index("ix_deletions_endpoint_id", "endpoint_id", "created_at"),
    Index("ix_deletions_file_id", "file_id", "endpoint_id"),
    Index(
        "ix_deletions_lease_until", "lease_until", postgresql_where=text("state = 2"), sqlite_where=text("state = 2")
    ),
    Index(
        "ix_deletions_queue",
        "site_id",
        "not_before",
        "id",
        postgresql_where=text("state = 1"),
        sqlite_where=text("state = 1"),
    ),
    Index(
        "uq_deletions_live",
        "file_id",
        "endpoint_id",
        unique=True,
        postgresql_where=text("state IN (1, 2)"),
        sqlite_where=text("state IN (1, 2)"),
    ),
)
Table(
    "traffic",
    metadata,
    Column("source_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("target_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("since", BigInteger, primary_key=True),
    Column("files", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
    Column("seconds", Float, nullable=False, server_default=text("0")),
    Column("failures", BigInteger, nullable=False, server_default=text("0")),
)
Table(
    "usage",
    metadata,
    Column("account_id", Id, ForeignKey("accounts.id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("files", BigInteger, nullable=False, server_default=text("0")),
    Column("bytes", BigInteger, nullable=False, server_default=text("0")),
)
Table(
    "usage_history",
    metadata,
    Column("account_id", Id, ForeignKey("accounts.id"), primary_key=True, autoincrement=False),
    Column("endpoint_id", Id, ForeignKey("endpoints.id"), primary_key=True, autoincrement=False),
    Column("at", BigInteger, primary_key=True),
    Column("files", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
)


def upgrade() -> None:
    op.add_column("endpoints", Column("draining", Boolean, nullable=False, server_default=text("false")))
    op.add_column("endpoints", Column("status_reason", String(2_000), nullable=False, server_default=""))
    op.add_column("endpoints", Column("status_since", BigInteger))
    op.add_column("endpoints", Column("min_free_bytes", BigInteger))
    op.add_column("endpoints", Column("delete_at_once", Boolean, nullable=False, server_default=text("false")))
    op.add_column("endpoints", Column("grace_seconds", Integer, nullable=False, server_default=text("0")))
    op.add_column("endpoints", Column("budget_files", BigInteger))
    op.add_column("endpoints", Column("budget_bytes", BigInteger))
    op.add_column("endpoints", Column("decommissioned_at", BigInteger))
    op.add_column("dids", Column("monotonic", Boolean, nullable=False, server_default=text("false")))
    op.add_column("dids", Column("expires_at", BigInteger))
    op.add_column("dids", Column("deleted_at", BigInteger))
    op.add_column("dids", Column("final_at", BigInteger))
    op.add_column("dids", Column("files_total", Integer))
    op.add_column("dids", Column("bytes_total", BigInteger))
    op.add_column("dids", Column("shared", Boolean, nullable=False, server_default=text("false")))
    op.add_column("rules", Column("revised_to", BigInteger))
    op.add_column("rules", Column("followed_to", BigInteger))
    op.add_column("rules", Column("followed_file", BigInteger, nullable=False, server_default=text("0")))
    op.add_column("rules", Column("not_before", BigInteger))
    op.add_column("rules", Column("locked", Boolean, nullable=False, server_default=text("false")))
    op.add_column("rules", Column("purge", Boolean, nullable=False, server_default=text("false")))
    op.add_column("rules", Column("metadata", Json))
    op.add_column("rules", Column("notify", String(64)))
    op.add_column("rules", Column("ended_at", BigInteger))
    op.add_column("rules", Column("subscription_id", Id))
    op.add_column("rules", Column("template", SmallInteger))
    op.add_column("locks", Column("surplus", Boolean, nullable=False, server_default=text("false")))
    op.add_column("locks", Column("troubled_at", BigInteger))
    op.add_column("replicas", Column("accessed_at", BigInteger))
    op.create_index(
        "ix_dids_expires_at",
        "dids",
        ["expires_at"],
        postgresql_where=text("expires_at IS NOT NULL"),
        sqlite_where=text("expires_at IS NOT NULL"),
    )
    op.create_index(
        "ix_dids_final_at",
        "dids",
        ["final_at"],
        postgresql_where=text("final_at IS NOT NULL"),
        sqlite_where=text("final_at IS NOT NULL"),
    )
    op.create_index(
        "ix_dids_metadata",
        "dids",
        ["metadata"],
        postgresql_where=text("metadata IS NOT NULL"),
        sqlite_where=text("metadata IS NOT NULL"),
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
    )
    op.create_index(
        "uq_rules_subscription",
        "rules",
        ["subscription_id", "did_id", "template"],
        unique=True,
        postgresql_where=text("subscription_id IS NOT NULL"),
        sqlite_where=text("subscription_id IS NOT NULL"),
    )
    op.create_index("ix_locks_endpoint_id", "locks", ["endpoint_id"])
    op.create_index(
        "ix_locks_surplus", "locks", ["rule_id"], postgresql_where=text("surplus"), sqlite_where=text("surplus")
    )
    op.create_index(
        "ix_replicas_leftover",
        "replicas",
        ["endpoint_id"],
        postgresql_where=text("state = 1 AND tombstone_at IS NOT NULL"),
        sqlite_where=text("state = 1 AND tombstone_at IS NOT NULL"),
    )
    op.create_index(
        "ix_replicas_tombstone",
        "replicas",
        ["endpoint_id", "tombstone_at", text("coalesce(accessed_at, 0)"), "file_id"],
        postgresql_where=text("tombstone_at IS NOT NULL"),
        sqlite_where=text("tombstone_at IS NOT NULL"),
    )
    metadata.create_all(op.get_bind(), [t for t in metadata.sorted_tables if t not in OLDER], checkfirst=False)
    if op.get_bind().dialect.name == "postgresql":
        # Looking the few rows of small tables up with each of millions took a third of the time of an insert.
        op.drop_constraint("fk_deletions_account_id", "deletions", type_="foreignkey")
        op.drop_constraint("fk_deletions_endpoint_id", "deletions", type_="foreignkey")
        op.drop_constraint("fk_deletions_site_id", "deletions", type_="foreignkey")
        op.drop_constraint("fk_dids_account_id", "dids", type_="foreignkey")
        op.drop_constraint("fk_dids_scope_id", "dids", type_="foreignkey")
        op.drop_constraint("fk_contents_parent_id", "contents", type_="foreignkey")
        op.drop_constraint("fk_replicas_endpoint_id", "replicas", type_="foreignkey")
        op.drop_constraint("fk_transfers_site_id", "transfers", type_="foreignkey")
        op.drop_constraint("fk_transfers_source_id", "transfers", type_="foreignkey")
        op.drop_constraint("fk_transfers_target_id", "transfers", type_="foreignkey")
    fill()


def fill() -> None:
    """What is kept by delta from here on is counted once. Kind 2 is a dataset, state 6 of a rule: it ended."""
    op.execute(
        """
        UPDATE dids SET
            files_total = (SELECT count(*) FROM contents WHERE parent_id = dids.id),
            bytes_total = (SELECT coalesce(sum(size_bytes), 0) FROM contents JOIN files ON did_id = child_id
                            WHERE parent_id = dids.id)
        WHERE kind = 2
        """
    )
    op.execute(
        """
        UPDATE dids SET shared = true
        WHERE kind = 2 AND EXISTS (
            SELECT 1 FROM contents c WHERE c.parent_id = dids.id AND (
                EXISTS (SELECT 1 FROM contents o WHERE o.child_id = c.child_id AND o.parent_id <> c.parent_id)
                OR EXISTS (SELECT 1 FROM locks WHERE unit_id = c.child_id)))
        """
    )
    op.execute(
        """
        INSERT INTO usage (account_id, endpoint_id, files, bytes)
        SELECT account_id, endpoint_id, count(*), sum(size_bytes)
        FROM (
            SELECT r.account_id, l.endpoint_id, c.child_id AS file_id
            FROM locks l JOIN rules r ON r.id = l.rule_id JOIN contents c ON c.parent_id = l.unit_id
            JOIN files f ON f.did_id = c.child_id
            UNION
            SELECT r.account_id, l.endpoint_id, l.unit_id
            FROM locks l JOIN rules r ON r.id = l.rule_id JOIN files f ON f.did_id = l.unit_id
        ) held
        JOIN files ON did_id = file_id
        GROUP BY account_id, endpoint_id
        """
    )
    op.execute("UPDATE rules SET ended_at = updated_at WHERE state = 6")
