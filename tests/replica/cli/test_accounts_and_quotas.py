"""`replica account`, `replica quota` and `replica usage`, as they are typed."""

from __future__ import annotations

from replica.catalog import usage
from tests.replica.cli.conftest import Typed
from tests.replica.client.world import World


def test_accounts_and_their_keys(typed: Typed) -> None:
    assert typed.json("account", "add", "bob")["role"] == "user"
    assert typed.json("account", "add", "carol", "--role", "admin")["role"] == "admin"
    assert [account["name"] for account in typed.json("account", "list")][-2:] == ["bob", "carol"]
    assert typed.json("account", "show", "bob")["name"] == "bob"
    assert "no account 'dave'" in typed.error("account", "show", "dave", code=3)
    # Plain, so that `replica account key bob > bob.token` is all there is to do.
    token = typed("account", "key", "bob").stdout
    assert token.startswith("rpl_") and token == token.strip() + "\n"
    bob = Typed(typed.environment | {"REPLICA_TOKEN": token.strip()})
    assert bob.json("whoami")["account"] == "bob"
    assert "may not account.write" in bob.error("account", "key", "root", code=4)
    assert "may not quota.write" in bob.error("quota", "set", "bob", "*", "1PB", code=4)


def test_quotas_and_usage(typed: Typed, w: World) -> None:
    raw = w.write({"a": b"x" * 3_000, "b": b"y" * 1_000})
    typed("upload", raw, "--scope", "p1", "--dataset", "raw", "--endpoint", "DESY-DISK")
    assert typed.json("quota", "list") == typed.json("usage") == []
    assert typed.json("quota", "set", "root", "kind=disk", "4kB")["limit_bytes"] == 4_000
    assert typed.json("rule", "add", "p1:raw", "--to", "DESY-DISK")["state"] == "ok"
    assert "quota 4.0 kB short" in typed("rule", "add", "p1:raw", "--to", "HZDR-DISK", "--plan").stdout
    (quota,) = typed.json("quota", "show", "root")
    assert (quota["expression"], quota["used_bytes"], quota["left_bytes"]) == ("kind=disk", 4_000, 0)
    assert "4.0 kB" in typed("quota", "show", "root").stdout
    assert typed.json("usage", "--account", "root", "--endpoint", "site=DESY") == [
        {"account": "root", "endpoint": "DESY-DISK", "files": 2, "bytes": 4_000}
    ]
    assert typed.json("usage", "--by", "endpoint")[0]["account"] is None
    assert typed.json("usage", "--since", "2020-01-01") == []
    with w.database.write() as s:
        usage.note(s)
    assert typed.json("usage", "--since", "2020-01-01")[0]["bytes"] == 4_000
    assert "^" in typed.error("usage", "--endpoint", "site=", code=1)
    assert "do not go together" in typed.error("usage", "--by", "account", "--since", "2020-01-01", code=2)
    typed("quota", "remove", "root", "kind=disk")
    assert "no quota under" in typed.error("quota", "remove", "root", "kind=disk", code=3)
    assert "no account 'dave'" in typed.error("quota", "show", "dave", code=3)
