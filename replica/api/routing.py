"""Routes with types: what a request must be, what the answer is, who may ask.

Given     a handler: an async function of a Context and of what its path, query and body are.
Returns   a Route for each, which validates, calls and encodes; replica.api.openapi describes them from the same facts.
Promises  a route without an action is public and says so; a request that is not what the route declares never reaches
          the handler. A path's segments are decoded once, after the split at '/', and strictly: `a%2Fb` is the name
          `a/b`, `a%252Fb` is the name `a%2Fb`, and what is not UTF-8 is no name.
Partner   replica.api.middleware has recognised the actor and checked the action before.

    routes = Routes("rules", "Wishes for copies.")

    @routes.post("/rules", "rule.write", status=201)
    async def add(context: Context, body: wire.NewRule) -> wire.Rule:
        \"\"\"Wish for copies.\"\"\"
        return await context.write(rules.add, context.actor, body)
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import types
import typing
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from aiohttp import web

from replica.api.json import decoder, invalid
from replica.api.work import Key, Replayed, Stream, Work, encode
from replica.db.engine import Session
from rules.errors import Invalid, ReplicaError
from rules.names import Did
from rules.permissions import ACTIONS, Actor
from rules.reconciling import Policy

P = ParamSpec("P")
T = TypeVar("T")

MIB = 1 << 20
BODY_MAX = 1 * MIB
BULK_BODY_MAX = 16 * MIB
#: Larger bodies are decoded in a thread, so that nobody else waits for it.
_DECODE_HERE_MAX = 64 * 1024
#: A sender slower than this for a whole body is not served.
BODY_SECONDS = 120.0
#: A reader that takes none of a stream for so long is not served.
STALL_SECONDS = 60.0
_KEY_MAX = 200
_PARAMETERS_MAX = 50
NDJSON = "application/x-ndjson"
#: In a request: the answer whose head is sent, so that no status can tell of a failure any more.
STARTED = web.RequestKey("started", web.StreamResponse)


class HttpRefusal(Exception):
    """A refusal for which HTTP has a status of its own."""

    def __init__(self, status: int, error: ReplicaError) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server knows besides its database."""

    lease_seconds: float
    retry_base_seconds: float
    undelete_seconds: float
    scans: Policy


@dataclass(slots=True)
class Context:
    """One request, for its handler."""

    request: web.Request
    work: Work
    facts: Facts
    route: Route
    #: None on public routes only, whose handlers do not look.
    known: Actor | None
    key: Key | None = None

    @property
    def actor(self) -> Actor:
        assert self.known is not None, "the middleware lets nobody in unknown"
        return self.known

    @property
    def site(self) -> str:
        """The site of the worker that asks: from its token, from nowhere else."""
        assert self.actor.site is not None, "orders.work is for actors with a site"
        return self.actor.site

    async def read(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.work.read(self.route.quick, function, *args, **kwargs)

    async def write(self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """One transaction. Once in a request, and what it returns is the answer: a repeated key returns the same."""
        return await self.work.write(self.route.quick, self.key, self.route.status, function, *args, **kwargs)

    @property
    def wants_lines(self) -> bool:
        return NDJSON in self.request.headers.get("Accept", "")

    async def lines(
        self, function: Callable[Concatenate[Session, P], Iterator[T]], *args: P.args, **kwargs: P.kwargs
    ) -> Stream:
        return await self.work.lines(function, *args, **kwargs)


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    method: str
    #: As it is served; with {parameters}.
    path: str
    #: Of rules.permissions; None: public.
    action: str | None
    handler: Callable[..., Awaitable[Any]]
    noun: str
    status: int
    bulk: bool
    #: Takes an Idempotency-Key.
    keyed: bool
    body: Any
    query: Any
    #: Name and type of each parameter that is one segment of the path; a Did takes the segments scope and name.
    parameters: Mapping[str, Any]
    answer: Any
    #: The items of the NDJSON form, where there is one.
    lines: Any
    decode: Callable[[bytes], Any] | None

    @property
    def quick(self) -> bool:
        """Must not wait behind bulk work: a worker that is late loses its orders."""
        return self.action == "orders.work"

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.handler) or "").split("\n")[0]

    @property
    def description(self) -> str:
        return "\n".join((inspect.getdoc(self.handler) or "").split("\n")[1:]).strip()

    async def unguarded(self, request: web.Request) -> web.StreamResponse:
        """What the router knows the route by. Reached only if the guard were missing, and then nothing is served."""
        raise AssertionError("the middleware serves routes")

    async def serve(self, context: Context) -> web.StreamResponse:
        request = context.request
        words: dict[str, Any] = self._of_path(request)
        if self.query is not None:
            words["query"] = _query(request, self.query)
        elif request.query_string:
            _no_query(request)
        body = b""
        if self.decode is not None:
            body = await _body(request, BULK_BODY_MAX if self.bulk else BODY_MAX)
            decode = functools.partial(self.decode, body)
            words["body"] = decode() if len(body) <= _DECODE_HERE_MAX else await context.work.aside(decode)
        if self.keyed:
            context.key = _key(request, context.actor, body)
        try:
            answer = await self.handler(context, **words)
        except Replayed as done:
            return _json(done.status, done.body)
        if isinstance(answer, web.StreamResponse):
            return answer
        if isinstance(answer, Stream):
            return await _send_lines(request, answer)
        if self.status == HTTPStatus.NO_CONTENT:
            return web.Response(status=self.status)
        response = _json(self.status, encode(answer))
        if isinstance(version := getattr(answer, "version", None), int):
            response.headers["ETag"] = f'"{version}"'
        return response

    def _of_path(self, request: web.Request) -> dict[str, Any]:
        if not self.parameters:
            return {}
        raw = request.rel_url.raw_path.split("/")
        template = self.path.split("/")
        # The router looked at a tidied path; what had to be tidied is no path of ours.
        if len(raw) != len(template):
            raise web.HTTPNotFound
        texts = {
            name[1:-1]: _segment(segment, name[1:-1])
            for name, segment in zip(template, raw, strict=True)
            if name.startswith("{")
        }
        words: dict[str, Any] = {}
        for name, kind in self.parameters.items():
            if kind is Did:
                words[name] = Did.of(texts["scope"], texts["name"])
            elif kind is int:
                words[name] = _whole_number(texts[name], name)
            else:
                words[name] = texts[name]
        return words


class Routes:
    """The routes of one noun."""

    def __init__(self, noun: str, about: str, base: str = "/api/v1") -> None:
        self.noun = noun
        self.about = about
        self._base = base
        self.all: list[Route] = []

    def get(self, path: str, action: str | None, **more: Any) -> Callable[[T], T]:
        return self._add("GET", path, action, **more)

    def post(self, path: str, action: str, **more: Any) -> Callable[[T], T]:
        return self._add("POST", path, action, **more)

    def patch(self, path: str, action: str, **more: Any) -> Callable[[T], T]:
        return self._add("PATCH", path, action, **more)

    def delete(self, path: str, action: str, **more: Any) -> Callable[[T], T]:
        return self._add("DELETE", path, action, **more)

    def _add(
        self,
        method: str,
        path: str,
        action: str | None,
        *,
        status: int | None = None,
        bulk: bool = False,
        keyed: bool | None = None,
        lines: Any = None,
    ) -> Callable[[T], T]:
        assert action is None or action in ACTIONS, f"{method} {path}: there is no action {action}"

        def declare(handler: T) -> T:
            assert callable(handler)
            hints = typing.get_type_hints(handler, include_extras=True)
            answer = _document(hints.pop("return"))
            hints.pop("context")
            body, query = hints.pop("body", None), hints.pop("query", None)
            code = status or (204 if answer is None else 200)
            self.all.append(
                Route(
                    method=method,
                    path=self._base + path,
                    action=action,
                    handler=handler,
                    noun=self.noun,
                    status=code,
                    bulk=bulk,
                    keyed=code == HTTPStatus.CREATED if keyed is None else keyed,
                    body=body,
                    query=query,
                    parameters=hints,
                    answer=answer,
                    lines=lines,
                    decode=decoder(body) if body is not None else None,
                )
            )
            return handler

        return declare


def _document(returned: Any) -> Any:
    """The type of the JSON document that a handler returns; None where it returns none or answers by itself."""
    kinds = typing.get_args(returned) if typing.get_origin(returned) in (types.UnionType, typing.Union) else (returned,)
    documents = [
        kind
        for kind in kinds
        if kind is not type(None) and not (inspect.isclass(kind) and issubclass(kind, web.StreamResponse | Stream))
    ]
    return documents[0] if documents else None


def _segment(raw: str, name: str) -> str:
    try:
        text = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Invalid("the path is not UTF-8", hint="percent-encode the name's bytes in UTF-8", field=name) from error
    if "\0" in text:
        raise Invalid("the path holds the character U+0000", field=name)
    return text


def _whole_number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19) or int(text) >= 2**63:
        raise Invalid(f"{text[:40]!a} is not the number of anything", hint="write it as lists show it", field=name)
    return int(text)


def _query(request: web.Request, kind: Any) -> Any:
    words: dict[str, str] = {}
    for key, value in _pairs(request):
        if key in words:
            raise Invalid(f"the parameter {key[:80]!a} is there twice", field=key[:80])
        if "\0" in value:
            raise Invalid(f"the parameter {key[:80]!a} holds the character U+0000", field=key[:80])
        words[key] = value
    try:
        return msgspec.convert(words, kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error) from error


def _no_query(request: web.Request) -> None:
    for key, _ in _pairs(request):
        raise Invalid(f"there is no parameter {key[:80]!a} here", field=key[:80])


def _pairs(request: web.Request) -> list[tuple[str, str]]:
    """As written, decoded strictly, like the path."""
    try:
        return parse_qsl(
            request.rel_url.raw_query_string, keep_blank_values=True, errors="strict", max_num_fields=_PARAMETERS_MAX
        )
    except ValueError as error:
        raise Invalid("the query cannot be read", hint="percent-encode its values in UTF-8") from error


async def _body(request: web.Request, most: int) -> bytes:
    """The body, or a refusal before more of it was read than may be."""
    if request.content_type != "application/json" or (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise HttpRefusal(415, Invalid("the body is not JSON", hint="send Content-Type: application/json in UTF-8"))
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise HttpRefusal(415, Invalid("the body is compressed", hint="send it as it is"))
    too_large = HttpRefusal(
        413, Invalid(f"the body is larger than {most // MIB} MiB", hint="send several requests with fewer items each")
    )
    if (request.content_length or 0) > most:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.content.iter_any():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise HttpRefusal(408, Invalid("the body did not come in time", hint="send it again")) from None
    return b"".join(parts)


def _key(request: web.Request, actor: Actor, body: bytes) -> Key | None:
    given = request.headers.getall("Idempotency-Key", [])
    if not given:
        return None
    key = given[0]
    if len(given) > 1 or not 1 <= len(key) <= _KEY_MAX or not key.isascii() or not key.isprintable():
        raise Invalid(
            "the Idempotency-Key cannot be one", hint=f"send one, of 1 to {_KEY_MAX} printable ASCII characters"
        )
    asked = f"{request.method} {request.rel_url.raw_path}\n".encode()
    return Key(actor.account, key, hashlib.sha256(asked + body).digest())


def _json(status: int, body: bytes) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


async def _send_lines(request: web.Request, stream: Stream) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": NDJSON})
    request[STARTED] = response
    try:
        await response.prepare(request)
        while stream.part is not None:
            async with asyncio.timeout(STALL_SECONDS):
                await response.write(stream.part)
            await stream.advance()
        await response.write_eof()
    finally:
        await stream.close()
    return response
