"""Doubted and bad replicas; how far each endpoint has been read again.

Post: every replica that is bad has a row; of those that were before, it says that nobody wrote down why.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Integer, SmallInteger, String, text

revision = "0008"
down_revision = "0007"

Id = BigInteger().with_variant(Integer, "sqlite")

DUE = text("due_at IS NOT NULL")


def upgrade() -> None:
    op.create_table(
        "suspects",
        Column("file_id", Id, autoincrement=False),
        Column("endpoint_id", Id, ForeignKey("endpoints.id", name="fk_suspects_endpoint_id"), autoincrement=False),
        Column("why", String(16), nullable=False),
        Column("message", String(2_000), nullable=False),
        Column("account_id", Id),
        Column("since", BigInteger, nullable=False),
        Column("proven", Boolean, nullable=False, server_default=text("false")),
        Column("was", SmallInteger),
        Column("due_at", BigInteger),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("epoch", BigInteger, nullable=False, server_default=text("0")),
        Column("worker", String(128)),
        Column("claimed_at", BigInteger),
        Column("lease_until", BigInteger),
        sa.PrimaryKeyConstraint("file_id", "endpoint_id", name="pk_suspects"),
    )
    op.create_index("ix_suspects_due", "suspects", ["endpoint_id", "due_at"], postgresql_where=DUE, sqlite_where=DUE)
    op.create_table(
        "scrubs",
        Column("endpoint_id", Id, ForeignKey("endpoints.id", name="fk_scrubs_endpoint_id"), autoincrement=False),
        Column("depth", String(8), nullable=False),
        Column("bytes_per_second", BigInteger),
        Column("files_per_second", Float),
        Column("period_seconds", Integer, nullable=False),
        Column("guard_fraction", Float, nullable=False),
        Column("pass_number", Integer, nullable=False, server_default=text("1")),
        Column("pass_began_at", BigInteger, nullable=False),
        Column("pass_ended_at", BigInteger),
        Column("reached", BigInteger, nullable=False, server_default=text("0")),
        Column("files", BigInteger, nullable=False, server_default=text("0")),
        Column("bytes", BigInteger, nullable=False, server_default=text("0")),
        Column("wrong", BigInteger, nullable=False, server_default=text("0")),
        Column("upto", BigInteger),
        Column("epoch", Integer, nullable=False, server_default=text("0")),
        Column("worker", String(128)),
        Column("claimed_at", BigInteger),
        Column("lease_until", BigInteger),
        Column("next_at", BigInteger, nullable=False),
        Column("trouble", String(2_000), nullable=False, server_default=""),
        Column("halted_at", BigInteger),
        Column("halted_why", String(2_000), nullable=False, server_default=""),
        Column("bad_since", BigInteger),
        Column("bad", Integer, nullable=False, server_default=text("0")),
        sa.PrimaryKeyConstraint("endpoint_id", name="pk_scrubs"),
    )
    # State 4 is BAD, 3 UNAVAILABLE. Nothing made a replica bad before this step, but a person at the database may have.
    op.execute(
        "INSERT INTO suspects (file_id, endpoint_id, why, message, since, proven, was)"
        " SELECT file_id, endpoint_id, 'person', 'it was bad before reasons were kept', 0, true, 3"
        " FROM replicas WHERE state = 4"
    )
