"""The way from an empty database to today's tables, one numbered sentence a step. Run by replica.db.schema only."""
