"""How much may be in flight adapts to what is measured: decisions, their history, and what they are measured by.

Pre: nothing that writes runs on the older schema: its reports would not say which failures load can be the cause of.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Integer, String, text
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"

Id = BigInteger().with_variant(Integer, "sqlite")
Json = JSON().with_variant(JSONB, "postgresql")


def upgrade() -> None:
    op.add_column("traffic", Column("strained", BigInteger, nullable=False, server_default=text("0")))
    op.create_index("ix_traffic_since", "traffic", ["since"])
    op.add_column("limits", Column("fixed", Boolean, nullable=False, server_default=text("false")))
    op.create_table(
        "concurrency",
        Column("kind", String(8)),
        Column("key", String(64)),
        Column("number", Integer, nullable=False),
        Column("why", String(16), nullable=False),
        Column("reason", String(400), nullable=False),
        Column("state", Json, nullable=False),
        Column("decided_at", BigInteger, nullable=False),
        Column("measured_at", BigInteger, nullable=False),
        Column("counted_since", BigInteger, nullable=False),
        Column("counted", Json, nullable=False),
        Column("flight", Float, nullable=False),
        Column("looks", Integer, nullable=False),
        Column("active_at", BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("kind", "key", name="pk_concurrency"),
    )
    op.create_table(
        "concurrency_decisions",
        Column("id", Id),
        Column("kind", String(8), nullable=False),
        Column("key", String(64), nullable=False),
        Column("at", BigInteger, nullable=False),
        Column("before", Integer),
        Column("number", Integer, nullable=False),
        Column("why", String(16), nullable=False),
        Column("reason", String(400), nullable=False),
        Column("measured", Json, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_concurrency_decisions"),
    )
    op.create_index("ix_concurrency_decisions_key", "concurrency_decisions", ["kind", "key", "id"])
    op.create_index("ix_concurrency_decisions_at", "concurrency_decisions", ["at"])
