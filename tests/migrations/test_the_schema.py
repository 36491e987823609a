"""The migrations make exactly the tables the code is written against, and every process knows when they did not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from replica.db import migrations, schema, tables
from replica.db.engine import Database
from rules.errors import Unavailable
from tests.at_once import at_once

#: What PostgreSQL and SQLite themselves say of every column, constraint and index, predicates included.
DEFINITIONS = {
    "postgresql": """
        SELECT 'column ' || table_name || '.' || column_name || ' ' || data_type
               || coalesce('(' || character_maximum_length || ')', '') || ' null:' || is_nullable
               || ' default:' || coalesce(column_default, '') || ' identity:' || is_identity
          FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
        UNION ALL
        SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
          FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
           AND conrelid::regclass::text <> 'alembic_version'
        UNION ALL
        SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
        ORDER BY 1""",
    # Not the text of CREATE TABLE: a column that a later step adds stands elsewhere in it.
    "sqlite": """
        SELECT 'column ' || t.name || '.' || c.name || ' ' || c.type || ' null:' || (c."notnull" = 0)
               || ' default:' || coalesce(c.dflt_value, '') || ' key:' || c.pk
          FROM sqlite_master t JOIN pragma_table_xinfo(t.name) c
         WHERE t.type = 'table' AND t.name <> 'alembic_version'
        UNION ALL
        SELECT 'constraint ' || t.name || '.' || f."from" || ' ' || f."table" || '.' || f."to" || ' ' || f.on_delete
          FROM sqlite_master t JOIN pragma_foreign_key_list(t.name) f WHERE t.type = 'table'
        UNION ALL
        SELECT 'index ' || t.name || ' ' || i."unique" || ' ' || i.origin || ' ' || coalesce(m.sql, (
               SELECT group_concat(x.name) FROM pragma_index_info(i.name) x))
          FROM sqlite_master t JOIN pragma_index_list(t.name) i LEFT JOIN sqlite_master m ON m.name = i.name
         WHERE t.type = 'table' AND t.name <> 'alembic_version'
        ORDER BY 1""",
}


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database without tables."""
    sqlite = request.param == "sqlite"
    database = Database(f"sqlite:///{tmp_path}/e.db" if sqlite else request.getfixturevalue("empty_postgresql_url"))
    yield database
    database.close()


def definitions(connection: Connection) -> list[str]:
    found = [" ".join(text.split()) for (text,) in connection.exec_driver_sql(DEFINITIONS[connection.dialect.name])]
    assert len(found) > 20
    return found


def test_the_migrations_make_the_tables_of_the_code(db: Database) -> None:
    with db.read() as s:
        # On SQLite alembic misreads defaults that are empty strings and indexes that go downwards; the next test
        # compares those to the letter.
        options: dict[str, object] = {"compare_type": True, "compare_server_default": s.postgresql}
        if not s.postgresql:
            options["include_name"] = lambda name, kind, parents: name != "ix_transfers_queue"
            options["include_object"] = lambda thing, name, kind, reflected, other: name != "ix_transfers_queue"
        else:  # alembic does not know that these are for SQLite only; the next test does
            unchecked = {f"fk_{column.table.name}_{column.name}" for column in tables.UNCHECKED}
            options["include_object"] = lambda thing, name, kind, reflected, other: name not in unchecked
        context = MigrationContext.configure(s.connection, opts=options)
        assert compare_metadata(context, tables.metadata) == []


def test_constraints_indexes_and_defaults_are_the_same_to_the_letter(empty: Database) -> None:
    """alembic's comparison does not look at the condition of a partial index, and a wrong one is a second writer."""
    schema.migrate(empty)
    with empty.read() as s:
        migrated = definitions(s.connection)
    tables.metadata.drop_all(empty.engine)
    tables.metadata.create_all(empty.engine)
    with empty.read() as s:
        assert migrated == definitions(s.connection)


def test_the_comparison_notices_another_condition_of_an_index(db: Database) -> None:
    with db.write() as s:
        before = definitions(s.connection)
        s.connection.exec_driver_sql("DROP INDEX uq_transfers_live")
        s.connection.exec_driver_sql(
            "CREATE UNIQUE INDEX uq_transfers_live ON transfers (file_id, target_id) WHERE state IN (1, 2, 3)"
        )
        assert definitions(s.connection) != before


def test_migrating_again_changes_nothing(db: Database) -> None:
    with db.read() as s:
        before = definitions(s.connection)
    assert schema.migrate(db) == schema.migrate(db)
    with db.read() as s:
        assert definitions(s.connection) == before
    schema.check(db)


def test_four_migrations_at_once_are_one(empty: Database) -> None:
    def migrate() -> str:
        database = Database(empty.url.render_as_string(hide_password=False))
        try:
            return schema.migrate(database)
        finally:
            database.close()

    outcomes = at_once(*[migrate] * 4)
    assert outcomes == [schema.migrate(empty)] * 4
    schema.check(empty)


def test_an_empty_schema_is_told_with_its_remedy(empty: Database) -> None:
    with pytest.raises(Unavailable, match="schema is empty") as refusal:
        schema.check(empty)
    assert "replica migrate" in refusal.value.hint


def test_an_older_schema_is_told_with_its_remedy(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with db.read() as s:
        now = schema._revision(s.connection)
    monkeypatch.setattr(schema, "_newest", lambda: "9999")  # as a release with one step more would say
    with pytest.raises(
        Unavailable, match=f"older than this release of Replica: it is {now}, needed is 9999"
    ) as refusal:
        schema.check(db)
    assert "replica migrate" in refusal.value.hint


def test_a_newer_schema_is_neither_used_nor_migrated(db: Database) -> None:
    with db.write() as s:
        s.connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    for use in (schema.check, schema.migrate):
        with pytest.raises(Unavailable, match="newer than this release of Replica: it is 9999") as refusal:
            use(db)
        assert "install the newer release" in refusal.value.hint


def test_a_step_that_fails_leaves_nothing_behind(empty: Database) -> None:
    with empty.write() as s:
        s.connection.exec_driver_sql("CREATE TABLE contents (unexpected INTEGER)")  # in the way of the first step
    with pytest.raises(Exception, match=r"."):
        schema.migrate(empty)
    with empty.read() as s:
        assert set(sa.inspect(s.connection).get_table_names()) - {"alembic_version"} == {"contents"}


def test_every_step_is_a_numbered_sentence_after_the_one_before() -> None:
    directory = Path(migrations.__file__).parent / "versions"
    steps = sorted(path for path in directory.glob("[0-9]*.py"))
    before = None
    for number, path in enumerate(steps, 1):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        step = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(step)
        assert path.name.startswith(f"{number:04}_") and step.revision == f"{number:04}"
        assert step.down_revision == before
        assert step.__doc__ and ("Pre:" in step.__doc__ or "Post:" in step.__doc__)
        before = step.revision
