"""Who asks: from the Authorization header to an Actor.

Given     the Authorization headers of a request; a look-up of tokens in the catalogue.
Returns   the token; the Actor, remembered for a few seconds so that not every request costs a query.
Promises  identity comes from the token alone, never from another header, the path or the body. A token that was
          taken back is refused at most REMEMBERED_SECONDS later. Only hashes of tokens are kept here.
Partner   replica.catalog.accounts knows the tokens; rules.permissions says what the Actor may do.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from rules.errors import NotAuthenticated
from rules.permissions import Actor

REMEMBERED_SECONDS = 10.0
_REMEMBERED_MAX = 10_000
_TOKEN_BYTES_MAX = 1_024
_HINT = "send `Authorization: Bearer TOKEN`; `replica up` and `replica migrate --token-file` make a token"


def token_of(headers: Sequence[str]) -> str:
    """The token of the one Authorization header there must be."""
    if not headers:
        raise NotAuthenticated("the request carries no token", hint=_HINT)
    if len(headers) > 1:
        raise NotAuthenticated("the request carries more than one Authorization header", hint=_HINT)
    scheme, _, token = headers[0].partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise NotAuthenticated("the Authorization header is not a Bearer token", hint=_HINT)
    if len(token) > _TOKEN_BYTES_MAX or not token.isascii() or not token.isprintable():
        raise NotAuthenticated("the token is not known", hint=_HINT)
    return token


class RecentActors:
    """Actors by the hash of their token, each for REMEMBERED_SECONDS."""

    def __init__(self, seconds: float = REMEMBERED_SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[Actor, float]] = OrderedDict()

    def find(self, token: str) -> Actor | None:
        known = self._known.get(_hash(token))
        return known[0] if known is not None and known[1] > self._clock() else None

    def remember(self, token: str, actor: Actor) -> None:
        key = _hash(token)
        self._known[key] = (actor, self._clock() + self._seconds)
        self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED_MAX:
            self._known.popitem(last=False)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
