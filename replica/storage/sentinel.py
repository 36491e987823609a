"""The small file that says whose folder a storage is: what is in it, and what follows when it is another endpoint's.

Given     an endpoint's name, or the content of such a file.
Returns   the content; the name in it; the refusal.
Promises  a content that cannot be read names nobody: only a name can make a folder another endpoint's.
Partner   every adapter writes it in `prepare` and looks at it before it believes that a file is missing.
"""

from __future__ import annotations

import json
import secrets

from replica.storage.base import SENTINEL
from rules.errors import Refused

#: As much is read of one.
SENTINEL_BYTES_MAX = 10_000


def sentinel_of(name: str) -> bytes:
    """A new one for the endpoint; no two have the same content."""
    return (json.dumps({"endpoint": name, "id": secrets.token_hex(16)}) + "\n").encode()


def owner_in(content: bytes | str) -> str | None:
    """The endpoint that a sentinel names, empty if that had no name; None: this is no sentinel."""
    try:
        known = json.loads(content)
    except ValueError:
        return None
    return str(known["endpoint"]) if isinstance(known, dict) and "endpoint" in known else None


def is_anothers(owner: str | None, name: str) -> bool:
    """Whether both have a name, and not the same."""
    return bool(owner and name and owner != name)


def refuse_anothers(
    owner: str | None, name: str, where: str, *, file: str = f"{SENTINEL} there", what: str = "folder"
) -> None:
    """Refused when what is at `where` cannot become the endpoint's, because it is another's."""
    if is_anothers(owner, name):
        raise Refused(
            f"{where} belongs to the endpoint {owner}",
            hint=f"choose another {what}, or remove {file} if {owner} is gone for good",
        )
