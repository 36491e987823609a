"""Why a source was chosen, and which others a claim reads from; the failures of a link that were not its target's.

Pre: nothing that writes runs on the older schema: its claims would not count all the sources they read from.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Column, Integer, String, text

revision = "0005"
down_revision = "0004"

Id = BigInteger().with_variant(Integer, "sqlite")


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
