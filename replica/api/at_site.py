"""A worker's request: about its own site, whatever it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from replica.catalog import sites
from replica.db.engine import Session

P = ParamSpec("P")
T = TypeVar("T")


def at_site(
    s: Session, site: str, function: Callable[Concatenate[Session, int, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """The catalogue's function with the id of `site`, which was heard of by this."""
    site_id = sites.site_id(s, site)
    answer = function(s, site_id, *args, **kwargs)
    sites.seen(s, site_id)  # last: workers of one site wait for each other from here to the commit only
    return answer
