"""Scans of endpoints, and what they found.

Post: nothing is scanned before its time in the timetable has come, or somebody asks.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Integer, LargeBinary, SmallInteger, String, text

revision = "0007"
down_revision = "0006"

Id = BigInteger().with_variant(Integer, "sqlite")

LIVE = text("state IN (1, 2, 4, 5)")
OPEN = text("state IN (6, 7)")


def upgrade() -> None:
    counts = ("phase_files", "known_files", "listed_files", "listed_bytes", "missing_files", "differing_files")
    more = ("dark_files", "dark_bytes", "odd_files", "lost_files", "last_copies")
    op.create_table(
        "scans",
        Column("id", Id, nullable=False),
        Column("endpoint_id", Id, ForeignKey("endpoints.id", name="fk_scans_endpoint_id"), nullable=False),
        Column("site_id", Id, ForeignKey("sites.id", name="fk_scans_site_id"), nullable=False),
        Column("state", SmallInteger, nullable=False),
        Column("account_id", Id, ForeignKey("accounts.id", name="fk_scans_account_id")),
        Column("listed_by", String(8), nullable=False),
        Column("accepted", Boolean, nullable=False, server_default=text("false")),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("epoch", Integer, nullable=False, server_default=text("0")),
        Column("worker", String(128)),
        Column("lease_until", BigInteger),
        Column("phase", String(12), nullable=False, server_default=""),
        *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in (*counts, *more)),
        Column("reason", String(2_000), nullable=False, server_default=""),
        Column("created_at", BigInteger, nullable=False),
        Column("began_at", BigInteger),
        Column("compared_at", BigInteger),
        Column("finished_at", BigInteger),
        sa.PrimaryKeyConstraint("id", name="pk_scans"),
    )
    op.create_index("uq_scans_live", "scans", ["endpoint_id"], unique=True, postgresql_where=LIVE, sqlite_where=LIVE)
    op.create_index("ix_scans_endpoint_id", "scans", ["endpoint_id", "id"])
    op.create_index("ix_scans_site_id", "scans", ["site_id"], postgresql_where=LIVE, sqlite_where=LIVE)
    op.create_table(
        "findings",
        Column("id", Id, nullable=False),
        Column("scan_id", Id, ForeignKey("scans.id", name="fk_findings_scan_id"), nullable=False),
        Column("endpoint_id", Id, ForeignKey("endpoints.id", name="fk_findings_endpoint_id"), nullable=False),
        Column("kind", String(8), nullable=False),
        Column("state", SmallInteger, nullable=False),
        Column("path", String(8_192), nullable=False),
        Column("path_hash", LargeBinary(16), nullable=False),
        Column("file_id", Id),
        Column("generation", Integer),
        Column("size_bytes", BigInteger, nullable=False),
        Column("found_bytes", BigInteger),
        Column("mtime_ns", BigInteger, nullable=False, server_default=text("0")),
        Column("first_seen_at", BigInteger, nullable=False),
        Column("epoch", Integer, nullable=False, server_default=text("0")),
        Column("worker", String(128)),
        Column("lease_until", BigInteger),
        Column("reason", String(2_000), nullable=False, server_default=""),
        sa.PrimaryKeyConstraint("id", name="pk_findings"),
    )
    op.create_index("uq_findings_path", "findings", ["scan_id", "kind", "path_hash"], unique=True)
    op.create_index("ix_findings_open", "findings", ["endpoint_id"], postgresql_where=OPEN, sqlite_where=OPEN)
    op.create_index("ix_findings_endpoint_id", "findings", ["endpoint_id", "scan_id"])
