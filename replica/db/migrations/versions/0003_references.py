"""PostgreSQL no longer looks up a DID or a file again with each row that refers to it.

No row of `dids` or `files` is ever removed, so the look could only ever succeed, for a third of the time of an insert.
`replica fsck` looks instead.

Pre: nothing that writes runs on the older schema: it relied on the look to hold what it attaches.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_constraint("fk_files_did_id", "files", type_="foreignkey")
        op.drop_constraint("fk_contents_child_id", "contents", type_="foreignkey")
        op.drop_constraint("fk_replicas_file_id", "replicas", type_="foreignkey")
        op.drop_constraint("fk_transfers_file_id", "transfers", type_="foreignkey")
