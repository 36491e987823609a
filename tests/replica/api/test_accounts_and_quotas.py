"""Accounts, quotas and usage over REST and through the client; and whose rules one may change."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from replica import wire
from replica.catalog import usage
from replica.db.engine import Database
from rules.errors import AlreadyExists, Invalid, NotAllowed, NotFound, Refused
from tests.service import Service

DISK = wire.NewEndpoint(name="DESY-DISK", site="DESY", url="file:///data/desy")
HASHED = {"adler32": "00000001"}


def fill(service: Service, count: int = 3) -> None:
    """A dataset s:d with so many files of 1,000 bytes at DESY-DISK."""
    with service.client() as root:
        root.endpoints.add(DISK)
        root.scopes.add("s")
        root.dids.add(wire.NewDid(did="s:d"))
        files = [wire.NewReplica(did=f"s:f{i}", size=1_000, checksums=HASHED) for i in range(count)]
        call = wire.Registration(endpoint="DESY-DISK", replicas=files, dataset="s:d", evidence="hashed")
        root.replicas.register(call)


def test_an_account_signs_in_with_a_key_that_is_shown_once(service: Service) -> None:
    with service.client() as root:
        made = root.accounts.add(wire.NewAccount(name="bob"))
        assert (made.name, made.role) == ("bob", "user") and root.accounts.show("bob") == made
        assert [account.name for account in root.accounts.list()] == ["root", "alice", "bob"]
        with pytest.raises(AlreadyExists, match="an account bob already"):
            root.accounts.add(wire.NewAccount(name="bob", role="admin"))
        with pytest.raises(Invalid, match="not a name for an account"):
            root.accounts.add(wire.NewAccount(name="bob/.."))
        first, second = root.accounts.key("bob").token, root.accounts.key("bob").token
        with pytest.raises(NotFound, match="no account 'carol'"):
            root.accounts.key("carol")
    for token in (first, second):
        with service.client(token) as bob:
            assert bob.whoami().account == "bob"
            with pytest.raises(NotAllowed):
                bob.accounts.key("root")
            with pytest.raises(NotAllowed):
                bob.accounts.add(wire.NewAccount(name="mallory", role="admin"))
            with pytest.raises(NotAllowed):
                bob.quotas.set(wire.NewQuota(account="bob", expression="*", limit_bytes=10**15))


def test_a_quota_says_what_it_leaves_and_limits_what_is_placed(service: Service) -> None:
    fill(service)
    with service.client() as root, service.client(service.user) as alice:
        quota = root.quotas.set(wire.NewQuota(account="alice", expression="kind=disk", limit_bytes=2_000))
        assert alice.rules.add(wire.NewRule(did="s:d", expression="DESY-DISK")).state == "stuck"
        root.quotas.set(wire.NewQuota(account="alice", expression="kind=disk", limit_bytes=4_000))
        assert alice.rules.add(wire.NewRule(did="s:d", expression="*", comment="another")).state == "ok"
        (shown,) = alice.quotas.list("alice")
        assert shown == alice.quotas.show(quota.id)
        assert (shown.limit_bytes, shown.used_bytes, shown.left_bytes) == (4_000, 3_000, 1_000)
        assert (shown.endpoints, shown.over_bytes, shown.problem) == (["DESY-DISK"], 0, "")
        assert list(alice.quotas.list("root")) == []
        with pytest.raises(Refused, match="selects no endpoint"):
            root.quotas.set(wire.NewQuota(account="alice", expression="tier=1", limit_bytes=1))
        root.quotas.remove(quota.id)
        with pytest.raises(NotFound):
            root.quotas.remove(quota.id)


def test_usage_now_and_over_time(service: Service, sqlite: Database) -> None:
    fill(service)
    with service.client(service.user) as alice:
        alice.rules.add(wire.NewRule(did="s:d", expression="DESY-DISK"))
        (now,) = alice.usage.list("alice", "kind=disk")
        assert now == wire.Usage(account="alice", endpoint="DESY-DISK", files=3, bytes=3_000)
        assert [row.endpoint for row in alice.usage.list(by="endpoint")] == ["DESY-DISK"]
        assert list(alice.usage.list("root")) == list(alice.usage.history()) == []
        with sqlite.write() as s:
            assert usage.note(s) == 1
        (then,) = alice.usage.history("alice", since=datetime.now(UTC) - timedelta(hours=1))
        assert (then.account, then.endpoint, then.bytes) == ("alice", "DESY-DISK", 3_000)
    assert service.ask("GET", "/api/v1/usage?by=moon", token="user").status == 400
    assert service.ask("GET", "/api/v1/usage/history?since=2026-01-01T00:00:00", token="user").status == 400


def test_a_rule_of_another_account_is_changed_by_an_administrator_only(service: Service) -> None:
    fill(service)
    with service.client() as root, service.client(service.user) as alice:
        theirs = root.rules.add(wire.NewRule(did="s:d", expression="DESY-DISK"))
        mine = alice.rules.add(wire.NewRule(did="s:d", expression="DESY-DISK"))
        assert theirs.id != mine.id and alice.rules.show(theirs.id).account == "root"
        with pytest.raises(NotAllowed, match="belongs to root"):
            alice.rules.delete(theirs.id)
        assert root.rules.show(theirs.id).state == "ok"
        alice.rules.delete(mine.id)
        alice_s = alice.rules.add(wire.NewRule(did="s:d", expression="DESY-DISK"))
        root.rules.delete(alice_s.id)
