"""What may an actor do?

Given     an Actor, whom replica.auth has recognised, an action, and the name of the thing it is about.
Returns   Allowed, or Denied with a reason for the person.
Promises  what is not allowed here is denied: an unknown action, an unknown role, a site's worker without a site.
Partner   replica.api enforces it; every route names its action.

| role  | may                                                                                          |
|-------|----------------------------------------------------------------------------------------------|
| admin | everything but a site's work: `orders.work` needs a site, and an administrator has none      |
| user  | read everything but webhooks, whose URLs may be secret; write scopes, DIDs and replicas;     |
|       | write rules and subscriptions, of its own account; say which of its replicas are bad, and    |
|       | have any replica looked at, as whoever may read it may find it wrong                         |
| site  | work off the orders of its own site (handlers take the site from the actor), ask for health; |
|       | say which replicas at its own endpoints are bad                                              |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from rules.errors import NotAllowed

_NOUNS = (
    *("site", "endpoint", "scope", "did", "replica", "rule", "transfer", "account", "quota"),
    *("subscription", "webhook", "deletion", "scan"),
)

#: All there are; a route names one of them.
ACTIONS = frozenset(f"{noun}.{verb}" for noun in _NOUNS for verb in ("read", "write")) | {
    "orders.work",
    "service.read",
    "event.read",
    "rule.approve",
    "replica.judge",
    "replica.doubt",
}


class Role(Enum):
    ADMIN = "admin"
    SITE = "site"
    USER = "user"


_READING = frozenset(action for action in ACTIONS if action.endswith(".read")) - {"webhook.read"}

_MAY: Mapping[Role, frozenset[str]] = MappingProxyType(
    {
        Role.ADMIN: ACTIONS - {"orders.work"},
        Role.USER: _READING
        | {"scope.write", "did.write", "replica.write", "rule.write", "subscription.write"}
        | {"replica.judge", "replica.doubt"},
        Role.SITE: frozenset({"orders.work", "service.read", "replica.judge"}),
    }
)


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks: an account in a role; a site's worker also has its site."""

    account: str
    role: Role
    site: str | None = None


@dataclass(frozen=True, slots=True)
class Allowed:
    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Denied:
    reason: str

    def __bool__(self) -> bool:
        return False


def may(actor: Actor, action: str, thing: str = "", owner: str | None = None) -> Allowed | Denied:
    """Whether `actor` may do `action`; `thing` is the name of what it is done to, for the reason.

    With `owner`, the account that the thing belongs to, a user may change it only as that account.
    """
    about = f" ({thing[:80]})" if thing else ""
    if action not in ACTIONS:
        return Denied(f"there is no action {action[:80]}")
    if action not in _MAY.get(actor.role, frozenset()):
        return Denied(f"{actor.account}, as {actor.role.value}, may not {action}{about}")
    if actor.role is Role.SITE and not actor.site:
        return Denied(f"{actor.account} is a site's worker, but its token names no site")
    if owner not in (None, actor.account) and actor.role is not Role.ADMIN and not action.endswith(".read"):
        return Denied(f"{actor.account}, as {actor.role.value}, may not {action}{about}: it belongs to {owner}")
    return Allowed()


def demand(actor: Actor, action: str, thing: str = "", owner: str | None = None) -> None:
    """NotAllowed where `may` denies it."""
    if isinstance(answer := may(actor, action, thing, owner), Denied):
        raise NotAllowed(answer.reason, hint=f"{owner} may, or an administrator" if owner else "ask an administrator")
