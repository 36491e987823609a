"""Would this database keep what it acknowledged, and has it room to work in?

Given     a Database that answers.
Returns   sentences about settings that would lose acknowledged work in a power cut, and about those that make a large
          catalogue slow; none is good.
Promises  reads only.
Partner   replica.doctor prints them; compose/compose.yaml starts PostgreSQL with what is recommended here.
"""

from __future__ import annotations

from replica.db.engine import Database

#: For a catalogue of millions of files. What PostgreSQL comes with suits a small machine: it then writes every page
#: that was changed to its log once more after each gigabyte, and keeps 128 MB of the indexes at hand.
RECOMMENDED = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",  # of an SSD
}
#: Of these, less than so many bytes is worth a word.
_LEAST_BYTES = {"shared_buffers": 512 << 20, "max_wal_size": 4 << 30}


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


def cramped(database: Database) -> list[str]:
    with database.read() as s:
        if not s.postgresql:
            return []
        return [
            f"{name} is {value}: a catalogue of millions of files will be slow"
            for name, least in _LEAST_BYTES.items()
            for value, enough in s.connection.exec_driver_sql(
                f"SELECT current_setting('{name}'), pg_size_bytes(current_setting('{name}')) >= {least}"
            )
            if not enough
        ]
