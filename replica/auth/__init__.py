"""From credentials to an Actor. What an Actor may do is rules.permissions."""
