import stat
from pathlib import Path

from replica.catalog import accounts
from replica.db.engine import Database
from tests.replica.cli.conftest import Typed


def test_the_schema_is_made_and_an_administrators_token_written_once(alone: Typed, tmp_path: Path):
    url = f"sqlite:///{tmp_path}/replica.db"
    alone.environment = {"REPLICA_DATABASE_URL": url}
    token = tmp_path / "new/token"
    assert "schema is at" in alone("migrate", "--token-file", token).stderr
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    first = token.read_text()
    assert "holds a valid token already" in alone("migrate", "--token-file", token).stderr
    assert token.read_text() == first
    database = Database(url)
    with database.read() as s:
        assert accounts.authenticate(s, first.strip()).account == "root"
    database.close()
    assert list(token.parent.iterdir()) == [token]


def test_a_token_of_another_database_is_replaced(alone: Typed, tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("rpl_of_long_ago\n")
    alone.environment = {"REPLICA_DATABASE_URL": f"sqlite:///{tmp_path}/replica.db"}
    alone("migrate", "--token-file", token)
    assert token.read_text() != "rpl_of_long_ago\n"


def test_without_a_database_the_error_says_what_to_set(alone: Typed):
    assert "REPLICA_DATABASE_URL" in alone.error("migrate", code=1)


def test_a_database_that_does_not_answer_is_an_error_without_a_story(alone: Typed):
    alone.environment = {"REPLICA_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/nothing"}
    alone.error("migrate", code=6)
