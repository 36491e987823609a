"""Every class of the error tree goes through the service to a client and is the same error there."""

from collections.abc import Iterator

import pytest
from aiohttp import web

from replica.api import errors as api_errors
from replica.api import middleware
from replica.client.calls import NOTHING, Call
from replica.client.http import SyncHttp
from rules import errors
from rules.errors import Broken, InvalidExpression, ReplicaError
from tests.service import listening


def tree(of: type[ReplicaError]) -> Iterator[type[ReplicaError]]:
    yield of
    for below in of.__subclasses__():
        yield from tree(below)


CLASSES = [kind for kind in tree(ReplicaError) if kind.__module__ == errors.__name__]
MESSAGE = "the dataset 'p1:räw' is closed; \"<svg onload=alert(1)>\"\r\nSet-Cookie: x=1"


def example(kind: type[ReplicaError]) -> ReplicaError:
    error = kind(MESSAGE, hint="reopen it – or don't")
    error.field = "dids[3]"
    error.items = [{"did": "p1:räw", "reason": "closed", "size": 2**53 + 1}, {"did": "p1:x"}]
    if isinstance(error, InvalidExpression):
        error.column = 17
    return error


@pytest.fixture(scope="module")
def http():
    by_code = {kind.code: kind for kind in CLASSES}

    async def fail(request: web.Request) -> web.StreamResponse:
        code = request.match_info["code"]
        if code == "surprise":
            raise ZeroDivisionError("secret of the house: postgresql://replica:hunter2@db/replica")
        raise example(by_code[code])

    app = web.Application(middlewares=[middleware.answering])
    app.on_response_prepare.append(middleware.headers)
    app.router.add_get("/{code}", fail)
    with listening(app) as (host, port):
        client = SyncHttp(f"http://{host}:{port}")
        yield client
        client.close()


def test_each_class_has_a_code_of_its_own():
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)


def test_the_table_of_statuses_names_classes_of_the_tree_and_covers_it():
    assert set(api_errors.STATUS) <= set(CLASSES)
    assert all(400 <= api_errors.status_of(example(kind)) < 600 for kind in CLASSES)
    assert {kind: api_errors.STATUS[kind] for kind in ReplicaError.__subclasses__()} == {
        errors.Invalid: 400,
        errors.NotAuthenticated: 401,
        errors.NotAllowed: 403,
        errors.NotFound: 404,
        errors.AlreadyExists: 409,
        errors.Conflict: 409,
        errors.Refused: 422,
        errors.Unavailable: 503,
        errors.StorageError: 502,
        errors.Broken: 500,
    }


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_it_was_raised(http: SyncHttp, kind: type[ReplicaError]):
    with pytest.raises(ReplicaError) as raised:
        http.send(Call("GET", f"/{kind.code}", NOTHING))
    found, sent = raised.value, example(kind)
    assert type(found) is kind
    if kind is Broken:  # our own fault: its story is in the log and nowhere else
        assert "under request" in found.message and sent.message not in found.message
        return
    assert (found.message, found.hint, found.field, found.items) == (sent.message, sent.hint, sent.field, sent.items)
    assert getattr(found, "column", 0) == getattr(sent, "column", 0)


def test_what_nobody_foresaw_tells_its_number_and_nothing_else(http: SyncHttp, caplog: pytest.LogCaptureFixture):
    with pytest.raises(Broken) as raised:
        http.send(Call("GET", "/surprise", NOTHING))
    told = f"{raised.value.message} {raised.value.hint} {raised.value.field} {raised.value.items}"
    assert "hunter2" not in told and "ZeroDivision" not in told and "postgresql" not in told


def test_a_code_that_is_newer_than_this_client_falls_back_to_its_branch():
    from replica import wire
    from replica.client.problems import rebuilt

    def problem(status: int) -> wire.Problem:
        return wire.Problem(type="", title="", status=status, detail="so", code="from_the_future", hint="do")

    kinds = {
        status: type(rebuilt(problem(status))) for status in (400, 401, 403, 404, 409, 413, 418, 422, 429, 500, 503)
    }
    assert kinds == {
        400: errors.Invalid,
        401: errors.NotAuthenticated,
        403: errors.NotAllowed,
        404: errors.NotFound,
        409: errors.Conflict,
        413: errors.Invalid,
        418: errors.Invalid,
        422: errors.Refused,
        429: errors.Unavailable,
        500: errors.Unavailable,
        503: errors.Unavailable,
    }
