"""The two parameters of every list."""

from __future__ import annotations

from typing import Annotated

import msgspec

LIMIT_MAX = 1_000

Limit = Annotated[int, msgspec.Meta(ge=1, le=LIMIT_MAX)]
Word = Annotated[str, msgspec.Meta(max_length=10_000)]


class Paging(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    limit: Limit = 100
    #: The `next` of the page before.
    cursor: Word | None = None
