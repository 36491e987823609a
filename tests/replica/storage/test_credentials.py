"""A secret goes where it was written down for, and nowhere else."""

from pathlib import Path

import pytest

from replica.storage.credentials import Credentials, secret
from rules.errors import Invalid

CREDENTIALS = Credentials(
    {
        "davs://se.desy.de": {"token": "host"},
        "davs://se.desy.de/data": {"token": "folder"},
        "davs://se.desy.de:2880": {"token": "port"},
        "s3+https://s3.hzdr.de/beamtimes": {"access_key_id": "replica"},
    }
)


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("davs://se.desy.de", "host"),
        ("https://SE.DESY.DE:443/other", "host"),
        ("davs://se.desy.de/data", "folder"),
        ("davs://se.desy.de/data/run1", "folder"),
        ("davs://se.desy.de/%64ata/run1", "folder"),
        ("davs://se.desy.de/database", "host"),
        ("davs://se.desy.de:2880/data", "port"),
        ("dav://se.desy.de/data", None),
        ("davs://se.desy.de.evil.org/data", None),
        ("davs://desy.de/data", None),
        ("file:///data", None),
    ],
)
def test_the_longest_beginning_of_whole_pieces_decides(url: str, token: str | None):
    assert CREDENTIALS.of(url).get("token") == token


def test_nothing_secret_is_printed():
    assert "folder" not in repr(CREDENTIALS)


def test_a_file_is_read_and_its_secrets_at_each_use(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("first\n")
    file = tmp_path / "credentials.toml"
    file.write_text(f'["davs://a/b"]\ntoken_file = "{token}"\n')
    file.chmod(0o600)
    settings = Credentials.load(file).of("davs://a/b/c")
    assert secret(settings, "token") == "first"
    token.write_text("second\n")
    assert secret(settings, "token") == "second"
    assert secret(settings, "password") is None
    token.unlink()
    with pytest.raises(Invalid, match="No such file"):
        secret(settings, "token")


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        ('["davs://a"]\ntoken = "t"\n', 0o640, "open to others"),
        ("token = 't'\n", 0o600, "no table named by a URL"),
        ('["davs://a"]\ntoken = 1\n', 0o600, "not text"),
        ("[[[", 0o600, "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_remedy(tmp_path: Path, content: str, mode: int, reason: str):
    file = tmp_path / "credentials.toml"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(Invalid, match=reason) as refusal:
        Credentials.load(file)
    assert refusal.value.hint
    assert refusal.value.field == "credentials_file"


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(Invalid, match=r"missing\.toml cannot be read"):
        Credentials.load(tmp_path / "missing.toml")
