"""Who may do what: the whole table, and nothing beside it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.permissions import ACTIONS, Actor, Allowed, Denied, Role, may

ADMIN = Actor("root", Role.ADMIN)
USER = Actor("jdoe", Role.USER)
SITE = Actor("hzdr-worker", Role.SITE, site="HZDR")

#: What a webhook tells, an administrator decides; its URL may be a secret.
USERS_WRITE = ("scope", "did", "replica", "rule", "subscription")


def allowed(actor: Actor) -> set[str]:
    return {action for action in ACTIONS if may(actor, action)}


def test_an_administrator_may_everything_but_a_sites_work() -> None:
    assert allowed(ADMIN) == ACTIONS - {"orders.work"}


def test_a_user_may_read_everything_and_write_data_and_rules() -> None:
    reading = {action for action in ACTIONS if action.endswith(".read")}
    assert allowed(USER) == reading - {"webhook.read"} | {f"{noun}.write" for noun in USERS_WRITE} | {
        "replica.judge",
        "replica.doubt",
    }


def test_a_sites_worker_may_work_and_say_what_is_bad_at_its_site() -> None:
    assert allowed(SITE) == {"orders.work", "service.read", "replica.judge"}


@pytest.mark.parametrize("site", [None, ""])
def test_a_sites_worker_without_a_site_may_nothing(site: str | None) -> None:
    assert allowed(Actor("lost", Role.SITE, site)) == set()


def test_a_site_in_the_token_of_anybody_else_gives_no_work() -> None:
    assert not may(Actor("root", Role.ADMIN, site="HZDR"), "orders.work")
    assert not may(Actor("jdoe", Role.USER, site="HZDR"), "orders.work")


def test_the_actions_are_these() -> None:
    assert len(ACTIONS) == 32
    assert {"endpoint.write", "transfer.write", "orders.work", "account.read", "service.read"} <= ACTIONS
    assert "service.write" not in ACTIONS


@given(st.text(), st.sampled_from([ADMIN, USER, SITE]), st.text())
def test_an_action_nobody_knows_is_denied_to_everybody(action: str, actor: Actor, thing: str) -> None:
    if action not in ACTIONS:
        assert isinstance(may(actor, action, thing), Denied)


def test_a_denial_says_who_may_not_do_what_to_what() -> None:
    assert may(USER, "endpoint.write", "HZDR-DISK") == Denied("jdoe, as user, may not endpoint.write (HZDR-DISK)")
    assert may(USER, "did.read") == Allowed()
