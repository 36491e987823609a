"""Who may sign in, and that a repeated request has one effect."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from replica import wire
from replica.catalog import accounts, idempotency, scopes, sites
from replica.db import tables
from replica.db.engine import Database
from rules.errors import Invalid, NotAuthenticated, NotFound, Refused
from rules.permissions import Actor, Role
from tests.at_once import at_once
from tests.conftest import HandClock


@pytest.fixture
def world(db: Database) -> Database:
    with db.write() as s:
        accounts.bootstrap(s)
        sites.add(s, wire.NewSite(name="DESY"))
        s.execute(sa.insert(tables.accounts).values(name="alice", role="user", created_at=s.now))
    return db


def test_the_first_account_is_made_once(world: Database) -> None:
    with world.write() as s:
        before = accounts.account_id(s, "root")
        accounts.bootstrap(s)
        assert accounts.account_id(s, "root") == before


def test_a_token_is_its_account_in_its_role(world: Database) -> None:
    with world.write() as s:
        root = accounts.issue_token(s, account="root", label="admin")
        alice = accounts.issue_token(s, account="alice", label="laptop")
        worker = sites.issue_token(s, "DESY")
        assert root.startswith("rpl_") and len(root) >= 46
        assert accounts.authenticate(s, root) == Actor("root", Role.ADMIN, None)
        assert accounts.authenticate(s, alice) == Actor("alice", Role.USER, None)
        assert worker.site == "DESY"
        assert accounts.authenticate(s, worker.token) == Actor("root", Role.SITE, "DESY")


def test_the_database_holds_no_token(world: Database) -> None:
    with world.write() as s:
        token = accounts.issue_token(s, account="root", label="admin")
        for row in s.execute(sa.select(tables.tokens)):
            assert token.encode() not in row.hash and len(row.hash) == 32 and token not in row.label


@pytest.mark.parametrize("token", ["", "rpl_", "rpl_" + "x" * 43, "\0", "\ud800", "ü" * 10_000, "' OR 1=1 --"])
def test_anything_else_is_nobody(world: Database, token: str) -> None:
    with world.write() as s:
        accounts.issue_token(s, account="root", label="admin")
        with pytest.raises(NotAuthenticated, match="token is not known"):
            accounts.authenticate(s, token)


def test_replacing_ends_the_older_tokens_of_the_same_label_and_site_only(world: Database) -> None:
    with world.write() as s:
        old = accounts.issue_token(s, account="root", label="admin")
        other = accounts.issue_token(s, account="root", label="ci")
        worker = accounts.issue_token(s, account="root", label="admin", site="DESY")
        new = accounts.issue_token(s, account="root", label="admin", replace=True)
        with pytest.raises(NotAuthenticated):
            accounts.authenticate(s, old)
        for token in (other, worker, new):
            accounts.authenticate(s, token)
        newer = accounts.issue_token(s, account="root", label="admin", site="DESY", replace=True)
        with pytest.raises(NotAuthenticated):
            accounts.authenticate(s, worker)
        for token in (new, newer):
            accounts.authenticate(s, token)


def test_tokens_are_for_what_exists(world: Database) -> None:
    with world.write() as s:
        with pytest.raises(NotFound, match="no account 'bob'"):
            accounts.issue_token(s, account="bob", label="x")
        with pytest.raises(NotFound, match="no site 'CERN'"):
            accounts.issue_token(s, account="root", label="x", site="CERN")


# --- a request that comes twice -------------------------------------------------------------------------------------

HASH, OTHER = b"h" * 32, b"o" * 32


def test_the_first_answer_is_given_again_to_the_same_account(world: Database) -> None:
    with world.write() as s:
        assert idempotency.find(s, "root", "key 1", HASH) is None
        idempotency.store(s, "root", "key 1", HASH, 201, b"{}")
    with world.write() as s:
        assert idempotency.find(s, "root", "key 1", HASH) == (201, b"{}")
        assert idempotency.find(s, "alice", "key 1", HASH) is None


def test_a_key_used_for_another_request_is_refused(world: Database) -> None:
    with world.write() as s:
        idempotency.store(s, "root", "key", HASH, 201, b"{}")
        with pytest.raises(Refused, match="was used for another request"):
            idempotency.find(s, "root", "key", OTHER)


@pytest.mark.parametrize("key", ["", "x" * 201, "a\0", "ü", "a\nb"])
def test_a_key_that_cannot_be_kept_is_refused(world: Database, key: str) -> None:
    with pytest.raises(Invalid, match="Idempotency-Key cannot be used"), world.write() as s:
        idempotency.find(s, "root", key, HASH)


def test_of_twenty_equal_requests_at_once_one_does_the_work_and_all_get_its_answer(world: Database) -> None:
    def request(number: int) -> tuple[int, bytes]:
        with world.write() as s:
            if (answer := idempotency.find(s, "root", "key", HASH)) is not None:
                return answer
            scopes.add(s, Actor("root", Role.ADMIN), wire.NewScope(name="once"))
            idempotency.store(s, "root", "key", HASH, 201, b"%d" % number)
            return 201, b"%d" % number

    outcomes = at_once(*(lambda number=number: request(number) for number in range(20)))
    assert outcomes == [outcomes[0]] * 20 and isinstance(outcomes[0], tuple)


def test_old_answers_are_forgotten(world: Database, clock: HandClock) -> None:
    with world.write() as s:
        idempotency.store(s, "root", "old", HASH, 201, b"{}")
    clock.turn(hours=20)
    with world.write() as s:
        idempotency.store(s, "root", "new", HASH, 201, b"{}")
        assert idempotency.forget_old(s) == 0
    clock.turn(hours=5)
    with world.write() as s:
        assert idempotency.forget_old(s) == 1
        assert idempotency.find(s, "root", "old", HASH) is None
        assert idempotency.find(s, "root", "new", HASH) is not None
