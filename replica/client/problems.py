"""From a problem document back to the error that the server raised.

Given     status, media type and body of an answer that is not a success.
Returns   the class of rules.errors with that code; message, hint, field, column and items as they were.
Promises  never fails itself: what is no problem document (a proxy's page) becomes Unavailable and says so.
Partner   replica.api.errors writes the documents; a test walks every class over the wire and back.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from replica import wire
from rules import errors
from rules.errors import InvalidExpression, ReplicaError, Unavailable


def _tree(of: type[ReplicaError]) -> Iterator[type[ReplicaError]]:
    yield of
    for below in of.__subclasses__():
        yield from _tree(below)


_BY_CODE = {known.code: known for known in _tree(ReplicaError) if known.__module__ == errors.__name__}

#: A code of a newer server that we do not know: the branch is in the status.
_BY_STATUS: dict[int, type[ReplicaError]] = {
    401: errors.NotAuthenticated,
    403: errors.NotAllowed,
    404: errors.NotFound,
    409: errors.Conflict,
    422: errors.Refused,
    429: errors.Unavailable,
}


def error_from(status: int, media_type: str, body: bytes, server: str) -> ReplicaError:
    """The error that this answer stands for."""
    if media_type.partition(";")[0].strip().lower() == "application/problem+json":
        try:
            return rebuilt(msgspec.json.decode(body, type=wire.Problem))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            pass  # then it is not what it says it is
    return Unavailable(
        f"{server} answered {status} in a way that Replica does not",
        hint="check the server's URL; a proxy may stand in between",
    )


def rebuilt(problem: wire.Problem) -> ReplicaError:
    fallback = errors.Unavailable if problem.status >= 500 else errors.Invalid
    kind = _BY_CODE.get(problem.code) or _BY_STATUS.get(problem.status, fallback)
    error = kind(problem.detail, hint=problem.hint)
    error.field = problem.field
    error.items = [dict(item) for item in problem.items]
    if isinstance(error, InvalidExpression):
        error.column = problem.column
    return error
