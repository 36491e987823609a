"""Events: what happened, and what happens.

Given     where to begin and which kinds.
Returns   events in order: those that there are, or from then on as they come.
Promises  an event that came is known by its cursor, with which another iterator goes on after it. `follow` outlives
          restarts of the server and cut connections: it comes back where it was, and leaves out nothing.
Partner   replica.api.events; replica.client.aio has the same for asyncio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from replica import wire
from replica.client.calls import Call, at
from replica.client.http import SyncHttp
from rules.errors import Refused, Unavailable

#: Instead of a cursor: before all that is kept, and after all that has happened.
OLDEST, NOW = "oldest", "now"
#: Pauses before a lost stream is opened again.
PAUSES_SECONDS = (0.2, 1.0, 5.0, 15.0)


class Events:
    def __init__(self, http: SyncHttp) -> None:
        self._http = http

    def page(
        self, since: str | None = None, kinds: Sequence[str] = (), *, limit: int = 100, **filters: Any
    ) -> wire.Events:
        """Events after the cursor `since` (None: from the oldest). `filters`: entity, id, account."""
        return self._http.send(page_call(since, kinds, limit=limit, **filters))

    def list(self, since: str | None = None, kinds: Sequence[str] = (), **filters: Any) -> Iterator[wire.Event]:
        """All there are now."""
        more = True
        while more:
            page = self.page(since, kinds, limit=1_000, **filters)
            yield from page.items
            since, more = page.next, page.more

    def follow(
        self, since: str | None = NOW, kinds: Sequence[str] = (), *, reconnect: bool = True, **filters: Any
    ) -> Iterator[wire.Event]:
        """Those after `since`, and then as they come, for ever. Unavailable when the first connection fails, and
        without `reconnect` when one is lost."""
        reader = StreamReader(since)
        while True:
            try:
                for line in self._http.stream(stream_call(kinds, **filters), reader.headers()):
                    if (event := reader.event(line)) is not None:
                        yield event
            except Unavailable:
                if not reader.begun:
                    raise
            if not reconnect:
                raise reader.ended()
            time.sleep(reader.pause())


class StreamReader:
    """Lines of server-sent events into events; remembers where to go on."""

    def __init__(self, since: str | None) -> None:
        self.cursor = since or OLDEST
        self.begun = False
        self._failures = 0
        self._data = b""
        self._id = ""
        self._decode: Callable[[bytes], wire.Event] = msgspec.json.Decoder(wire.Event).decode

    def headers(self) -> dict[str, str]:
        self._data, self._id = b"", ""
        return {"Accept": "text/event-stream", "Last-Event-ID": self.cursor}

    def event(self, line: bytes) -> wire.Event | None:
        """What this line completes."""
        self.begun, self._failures = True, 0
        field, _, value = line.rstrip(b"\r\n").partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data += value
        elif field == b"id":
            self._id = value.decode()
        elif not field and line in (b"\n", b"\r\n"):
            data, self._data = self._data, b""
            event = self._decoded(data) if data else None
            self.cursor = self._id or self.cursor  # whole now: what was cut off before comes again
            return event
        return None

    def ended(self) -> Unavailable:
        return Unavailable("the stream of events ended", hint=f"go on after the cursor {self.cursor}")

    def pause(self) -> float:
        self._failures += 1
        return PAUSES_SECONDS[min(self._failures, len(PAUSES_SECONDS)) - 1]

    def _decoded(self, data: bytes) -> wire.Event:
        try:
            return self._decode(data)
        except msgspec.MsgspecError as error:
            raise Refused(
                "the server sent an event that cannot be read",
                hint=f"it may be of a newer release; the event is the one after {self.cursor}",
            ) from error


def page_call(since: str | None, kinds: Sequence[str], *, limit: int, **filters: Any) -> Call[wire.Events]:
    query = {"cursor": since, "limit": limit, "kinds": ",".join(kinds) or None, **filters}
    return Call("GET", at("events"), wire.Events, query=query)


def stream_call(kinds: Sequence[str], **filters: Any) -> Call[wire.Event]:
    return Call("GET", at("events"), wire.Event, query={"kinds": ",".join(kinds) or None, **filters})
