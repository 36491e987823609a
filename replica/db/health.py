"""Would this database keep what it acknowledged?

Given     a Database that answers.
Returns   sentences about settings that would lose acknowledged work in a power cut; none is good.
Promises  reads only.
Partner   replica.doctor prints them.
"""

from __future__ import annotations

from replica.db.engine import Database


def forgetful(database: Database) -> list[str]:
    with database.read() as s:
        if not s.postgresql:
            # Our own connections set what matters; what they got says whether the file system can do it.
            mode = str(s.connection.exec_driver_sql("PRAGMA journal_mode").scalar_one())
            return [] if mode == "wal" else [f"SQLite's journal mode is {mode}, not wal: readers will block writers"]
        # synchronous_commit is not among them: our connections switch it on.
        troubles = {
            "fsync": "a power cut can destroy the database",
            "full_page_writes": "a power cut can destroy pages",
        }
        found = []
        for name, what in troubles.items():
            value = str(s.connection.exec_driver_sql(f"SHOW {name}").scalar_one())
            if value == "off":
                found.append(f"{name} is off: {what}")
        return found
