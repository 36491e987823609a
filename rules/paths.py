"""Where a file lies at an endpoint: its name → its path below the endpoint's root.

Given     a Did and the layout of the endpoint.
Returns   a relative path, separated by '/'.
Promises  the path of a Did never changes; it never leads out of the root: no segment is empty, '.' or '..'.
Partner   replica.storage puts the root before it.

`identity` (the default) is `scope/name`. Two Dids never share a path: a scope holds no '/', so it is the first segment.
Rucio's layout of that name differs for scopes that begin with `user` or `group`, whose dots it makes slashes.

`hash` is exactly Rucio's layout of that name, so endpoints filled by Rucio can be used as they are: `scope/ab/cd/name`,
where abcd are the first digits of the MD5 of `scope:name`, and in scopes that begin with `user` or `group` every dot is
a slash. It keeps directories small. It is not injective for these scopes, because the slashes blur where the scope
ends: `user.08:n559` and `user:6d/n559` share the path `user/08/0e/6d/n559`. For all other scopes it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rules.errors import Invalid
from rules.names import Did, shown

DEFAULT_LAYOUT = "identity"
#: Scopes whose dots Rucio makes slashes. It asks no dot after these words: `users.x` is one of them.
_SLASHED = ("user", "group")
_NO_SEGMENT = frozenset(("", ".", ".."))


def path_for(did: Did, layout: str) -> str:
    """The path of `did` below the root of an endpoint with this layout."""
    make = LAYOUTS.get(layout)
    if make is None:
        raise Invalid(f"{shown(layout)} is not a layout", hint=f"use one of {', '.join(LAYOUTS)}", field="layout")
    path = make(did)
    # A checked Did cannot lead out; one that was made without a check is stopped here.
    if not _NO_SEGMENT.isdisjoint(path.split("/")):
        raise Invalid(
            f"{shown(str(did))} has no path in layout {layout}", hint="it was not made by Did.parse", field="did"
        )
    return path


def is_injective(did: Did, layout: str) -> bool:
    """Whether no other name can have the path of this one."""
    return layout == "identity" or not did.scope.startswith(_SLASHED)


def owners(path: str, layout: str) -> list[Did]:
    """Whose path this is: of at most one Did, except in scopes of users and groups in the layout `hash`."""
    parts = path.split("/")
    between, ends = (0, 2) if layout == "identity" else (2, len(parts) - 2)
    found = []
    for end in range(1, ends):
        try:
            owner = Did.of(".".join(parts[:end]), "/".join(parts[end + between :]))
        except Invalid:
            continue
        if path_for(owner, layout) == path:
            found.append(owner)
    return found


def _identity(did: Did) -> str:
    return f"{did.scope}/{did.name}"


def _hash(did: Did) -> str:
    digest = hashlib.md5(str(did).encode(errors="replace"), usedforsecurity=False).hexdigest()
    scope = did.scope
    if scope.startswith(_SLASHED):
        scope = scope.replace(".", "/")
    return f"{scope}/{digest[0:2]}/{digest[2:4]}/{did.name}"


LAYOUTS: Mapping[str, Callable[[Did], str]] = MappingProxyType({"identity": _identity, "hash": _hash})
