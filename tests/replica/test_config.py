"""Settings: from where they come, which one wins, and what a slip of the pen costs (a message, not an evening)."""

import subprocess
import sys
from pathlib import Path

import pytest

from replica import config
from rules.errors import Invalid

SECRET = "rpl_canary-5f1d0c"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No replica.toml of the machine or the working directory plays a part."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(config, "SYSTEM_DIR", tmp_path / "etc")


def toml(tmp_path: Path, text: str) -> Path:
    (tmp_path / "replica.toml").write_text(text)
    return tmp_path


def test_without_anything_there_are_defaults():
    settings = config.load(environ={})
    assert (settings.listen, settings.lease_seconds, settings.concurrency) == ("127.0.0.1:8570", 120.0, 4)
    assert settings.database_url is None
    assert settings.origin("listen") == "default"


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path):
    where = toml(tmp_path, 'site = "FILE"\nconcurrency = 2\npoll_seconds = 7\n')
    environ = {"REPLICA_SITE": "ENVIRONMENT", "REPLICA_CONCURRENCY": "3"}
    settings = config.load(where, environ, site="LINE", server=None)
    assert (settings.site, settings.concurrency, settings.poll_seconds) == ("LINE", 3, 7.0)
    assert settings.origin("site") == "the command line"
    assert settings.origin("concurrency") == "REPLICA_CONCURRENCY"
    assert settings.origin("poll_seconds") == str(where / "replica.toml")
    assert settings.origin("dir") == "the command line"


def test_the_file_is_sought_in_the_directory_then_here_then_in_the_system(tmp_path: Path):
    (tmp_path / "etc").mkdir()
    toml(tmp_path / "etc", 'site = "ETC"')
    assert config.load(environ={}).site == "ETC"
    toml(tmp_path / "cwd", 'site = "HERE"')
    assert config.load(environ={}).site == "HERE"
    toml(tmp_path, 'site = "DIR"')
    assert config.load(environ={"REPLICA_DIR": str(tmp_path)}).site == "DIR"


@pytest.mark.parametrize(
    ("key", "meant"),
    [("databse_url", "database_url"), ("pol_seconds", "poll_seconds"), ("Site", "site"), ("root", "roots")],
)
def test_a_misspelt_key_in_the_file_is_an_error_that_names_the_right_one(tmp_path: Path, key: str, meant: str):
    where = toml(tmp_path, f'{key} = "x"')
    with pytest.raises(Invalid) as caught:
        config.load(where, {})
    assert key in caught.value.message
    assert str(where) in caught.value.message
    assert meant in caught.value.hint


def test_a_misspelt_variable_is_an_error_that_names_the_right_one():
    with pytest.raises(Invalid) as caught:
        config.load(environ={"REPLICA_DATABSE_URL": "postgresql://u:hunter2@h/d"})
    assert "REPLICA_DATABASE_URL" in caught.value.hint
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_variables_of_tests_and_of_others_are_left_alone():
    environ = {"REPLICA_TEST_POSTGRESQL": "x", "REPLICA_FAULT_POINTS": "", "PATH": "/bin", "REPLICA_SITE": ""}
    assert config.load(environ=environ).site is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", "many"),
        ("concurrency", "0"),
        ("lease_seconds", "-1"),
        ("poll_seconds", "nan-sense"),
        ("log_level", "loud"),
        ("listen", "8570"),
        ("listen", "host:99999"),
        ("roots", "data"),
    ],
)
def test_a_value_out_of_bounds_names_the_key_and_where_it_came_from(name: str, value: str):
    with pytest.raises(Invalid) as caught:
        config.load(environ={f"REPLICA_{name.upper()}": value})
    assert name in caught.value.message
    assert caught.value.field == name


def test_a_file_that_is_not_toml_says_which_and_where(tmp_path: Path):
    with pytest.raises(Invalid, match=r"replica\.toml is not TOML.*line 1"):
        config.load(toml(tmp_path, "site: DESY"), {})


def test_an_unknown_override_is_refused():
    with pytest.raises(Invalid):
        config.load(environ={}, databse_url="x")


def test_roots_are_a_list_separated_as_paths_are():
    assert config.load(environ={"REPLICA_ROOTS": "/data/a:/data/b"}).roots == ("/data/a", "/data/b")


def test_secrets_are_never_printed():
    settings = config.load(
        environ={},
        token=SECRET,
        database_url="postgresql://replica:hunter2@db/replica?sslpassword=hunter3&application_name=x",
        broker_url="redis://:hunter2@redis:6379/0",
    )
    text = repr(settings) + str(settings) + f"{settings}" + "".join(str(settings.shown(key)) for key in config.KEYS)
    assert "hunter" not in text
    assert SECRET not in text
    assert "postgresql://replica:***@db/replica" in text


def test_a_wrong_secret_is_not_shown_in_the_error():
    with pytest.raises(Invalid) as caught:
        config.load(environ={}, token=["hunter2"])
    assert "hunter2" not in str(caught.value)


def test_the_token_file_is_read_when_asked_and_may_change(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("rpl_one\n")
    file.chmod(0o600)
    settings = config.load(environ={"REPLICA_TOKEN_FILE": str(file)})
    assert settings.read_token() == "rpl_one"
    file.write_text("rpl_two")
    assert settings.read_token() == "rpl_two"
    assert settings.warnings == ()


def test_a_token_file_open_to_others_is_warned_about(tmp_path: Path):
    file = tmp_path / "token"
    file.write_text("rpl_one\n")
    file.chmod(0o644)
    (warning,) = config.load(environ={"REPLICA_TOKEN_FILE": str(file)}).warnings
    assert "chmod 600" in warning


@pytest.mark.parametrize("content", [None, b"", b"two words", b"\xff\xfe"])
def test_a_token_file_that_holds_no_token_is_a_clear_error(tmp_path: Path, content: bytes | None):
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Invalid, match="token file"):
        config.load(environ={"REPLICA_TOKEN_FILE": str(file)}).read_token()


def test_a_nearer_token_hides_a_farther_token_file(tmp_path: Path):
    where = toml(tmp_path, 'token_file = "/nowhere"')
    assert config.load(where, {"REPLICA_TOKEN": "rpl_near"}).read_token() == "rpl_near"
    settings = config.load(environ={"REPLICA_TOKEN": "rpl_far"}, token_file="/nowhere")
    assert settings.token is None


def test_addresses_of_both_families_are_understood():
    assert config.load(environ={}, listen="[::1]:80").listen_address() == ("::1", 80)
    assert config.load(environ={}, listen="0.0.0.0:8570").listen_address() == ("0.0.0.0", 8570)


def test_reading_settings_imports_nothing_heavy():
    heavy = ("sqlalchemy", "celery", "kombu", "aiohttp", "structlog")
    code = f"import sys, replica.config; print([m for m in {heavy} if m in sys.modules])"
    root = Path(config.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
