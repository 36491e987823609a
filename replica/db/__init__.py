"""The database: engine, tables and migrations. Only replica.catalog writes SQL against them."""
