"""Why a source was chosen, and which others a claim reads from; the failures of a link that were not its target's; ways
over other endpoints.

Pre: nothing that writes runs on the older schema: its claims would not count all the sources they read from.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, Integer, SmallInteger, String, text

revision = "0005"
down_revision = "0004"

Id = BigInteger().with_variant(Integer, "sqlite")

OPEN = text("closed_at IS NULL")
UNROUTED = text("state = 1 AND reason_code = 'no_link'")


def upgrade() -> None:
    op.add_column("transfers", Column("source_why", String(500)))
    op.add_column("traffic", Column("source_failures", BigInteger, nullable=False, server_default=text("0")))
    op.create_table(
        "reads",
        Column("transfer_id", Id, autoincrement=False),
        Column("epoch", Integer, autoincrement=False),
        Column("source_id", Id, autoincrement=False),
        sa.PrimaryKeyConstraint("transfer_id", "epoch", "source_id", name="pk_reads"),
    )
    op.create_index("ix_transfers_unrouted", "transfers", ["id"], postgresql_where=UNROUTED, sqlite_where=UNROUTED)
    op.create_table(
        "routes",
        Column("id", Id),
        Column("transfer_id", Id, nullable=False),
        Column("file_id", Id, nullable=False),
        Column("target_id", Id, nullable=False),
        Column("source_id", Id, nullable=False),
        Column("created_at", BigInteger, nullable=False),
        Column("closed_at", BigInteger),
        Column("outcome", String(16)),
        Column("reason", String(2_000), nullable=False, server_default=""),
        Column("failed_id", Id),
        sa.PrimaryKeyConstraint("id", name="pk_routes"),
    )
    op.create_index("uq_routes_open", "routes", ["transfer_id"], unique=True, postgresql_where=OPEN, sqlite_where=OPEN)
    op.create_index("ix_routes_transfer_id", "routes", ["transfer_id"])
    op.create_table(
        "route_hops",
        Column("route_id", Id, autoincrement=False),
        Column("place", SmallInteger, autoincrement=False),
        Column("file_id", Id, nullable=False),
        Column("endpoint_id", Id, nullable=False),
        Column("made", Boolean, nullable=False),
        Column("closed_at", BigInteger),
        sa.PrimaryKeyConstraint("route_id", "place", name="pk_route_hops"),
    )
    op.create_index(
        "ix_route_hops_open", "route_hops", ["file_id", "endpoint_id"], postgresql_where=OPEN, sqlite_where=OPEN
    )
