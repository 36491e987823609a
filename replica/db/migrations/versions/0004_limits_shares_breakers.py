"""Limits on what is in flight, shares of activities, breakers of endpoints; the queue in lanes.

Pre: nothing that writes runs on the older schema: its claims would neither count nor be counted.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, Float, ForeignKey, Integer, String, text

revision = "0004"
down_revision = "0003"

Id = BigInteger().with_variant(Integer, "sqlite")

READY = text("state = 1 AND not_before IS NULL")
PARKED = text("state = 1 AND not_before IS NOT NULL")
LEASED = text("state IN (2, 3, 4)")


def upgrade() -> None:
    op.add_column("transfers", Column("waits_for", String(80), nullable=False, server_default=""))
    op.add_column("transfers", Column("reads_id", Id))
    op.create_index(
        "ix_transfers_lanes",
        "transfers",
        ["site_id", "activity", "target_id", "waits_for", text("(created_at - priority * 21600000000)"), "id"],
        postgresql_where=READY,
        sqlite_where=READY,
    )
    op.create_index(
        "ix_transfers_parked", "transfers", ["site_id", "not_before"], postgresql_where=PARKED, sqlite_where=PARKED
    )
    op.create_table(
        "limits",
        Column("kind", String(8)),
        Column("key", String(64)),
        Column("files_max", BigInteger),
        Column("bytes_max", BigInteger),
        sa.PrimaryKeyConstraint("kind", "key", name="pk_limits"),
    )
    op.create_table(
        "activities",
        Column("name", String(64)),
        Column("weight", Integer, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_activities"),
    )
    op.create_table(
        "shares",
        Column("site_id", Id, ForeignKey("sites.id", name="fk_shares_site_id"), autoincrement=False),
        Column("activity", String(64)),
        Column("deficit", Float, nullable=False),
        sa.PrimaryKeyConstraint("site_id", "activity", name="pk_shares"),
    )
    op.create_table(
        "breakers",
        Column("endpoint_id", Id, ForeignKey("endpoints.id", name="fk_breakers_endpoint_id"), autoincrement=False),
        Column("direction", String(8)),
        Column("state", String(16), nullable=False),
        Column("failures", Integer, nullable=False),
        Column("openings", Integer, nullable=False),
        Column("last_transfer", BigInteger),
        Column("why", String(16), nullable=False),
        Column("message", String(2_000), nullable=False),
        Column("since", BigInteger, nullable=False),
        Column("probe_at", BigInteger),
        Column("probe_transfer", BigInteger),
        Column("probe_epoch", Integer),
        sa.PrimaryKeyConstraint("endpoint_id", "direction", name="pk_breakers"),
    )
