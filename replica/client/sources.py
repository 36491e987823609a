"""Where a download takes each file from.

Given     endpoints, and the replicas of a file.
Returns   its sources, best first: folders of this machine, then disk before tape, then what was verified; and what was
          found wrong with replicas on the way.
Promises  a server that did not answer is asked last from then on, and after a few times in a row not at all: ten
          thousand files do not wait for it ten thousand times. A source that gave wrong bytes is remembered as bad
          until it gives the right ones.
Partner   replica.client.places opens them; replica.client.download reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

import msgspec

from replica import wire
from replica.client.places import Places, is_folder
from replica.storage.base import Storage
from rules.errors import ChecksumDiffers, ReplicaError, SourceMissing, TimedOut, Unreachable

if TYPE_CHECKING:
    from replica.client import Client

#: So often in a row an endpoint may not answer before it is left alone.
SILENT_TIMES = 3
#: Bad replicas that the server is told of: more than it has looked at for one account in a day.
TOLD_MAX = 1_000


class BadReplica(msgspec.Struct, kw_only=True):
    """A replica that the catalogue has as good, and that is lost or has other bytes."""

    did: str
    endpoint: str
    path: str
    reason: str


def tell_of(client: Client, bad: Sequence[BadReplica]) -> tuple[int, str]:
    """Tell the server, once: how many of these workers will look at; or why the server could not be told. Whatever
    comes of it, the download is what it is."""
    some = bad[:TOLD_MAX]
    doubts = [wire.DoubtedReplica(did=b.did, endpoint=b.endpoint, reason=b.reason or "it is wrong") for b in some]
    try:
        return client.integrity.doubt(doubts).to_look_at, ""
    except ReplicaError as error:
        return 0, error.message


class Sources:
    """Asked and told by one event loop."""

    def __init__(self, endpoints: dict[str, wire.Endpoint], places: Places) -> None:
        self._endpoints = endpoints
        self._places = places
        self._silent: dict[str, int] = {}
        self._bad: dict[tuple[str, str], BadReplica] = {}

    @property
    def bad(self) -> list[BadReplica]:
        return list(self._bad.values())

    async def look(self, names: Set[str]) -> None:
        """Find out which of their folders are here: what a path really is may take its time, and is asked once."""
        for endpoint in self._endpoints.values():
            if endpoint.name in names and is_folder(endpoint):
                await asyncio.to_thread(self._places.reason, endpoint)

    def of(self, replicas: Sequence[wire.Replica]) -> tuple[list[wire.Replica], list[str]]:
        """Those that can be tried, best first; and for each other one why not."""
        usable, why_not = [], []
        for replica in sorted(replicas, key=self._rank):
            reason = self._obstacle(replica)
            if reason:
                why_not.append(f"{replica.endpoint}: {reason}")
            else:
                usable.append(replica)
        return usable, why_not

    def is_here(self, replica: wire.Replica) -> bool:
        endpoint = self._endpoints[replica.endpoint]
        return is_folder(endpoint) and not self._places.reason(endpoint)

    async def open(self, replica: wire.Replica) -> Storage:
        """Unreachable, if it cannot be opened from here or did not answer a few times in a row."""
        silent = self._silent.get(replica.endpoint, 0)
        if silent >= SILENT_TIMES:
            raise Unreachable(
                f"{replica.endpoint} did not answer {silent} times in a row and is not asked again",
                hint="see what is wrong with it, and try again",
                endpoint=replica.endpoint,
                side="source",
            )
        return await asyncio.to_thread(self._places.open, self._endpoints[replica.endpoint])

    def answered(self, replica: wire.Replica) -> None:
        """It gave the right bytes."""
        self._silent.pop(replica.endpoint, None)
        self._bad.pop((replica.did, replica.endpoint), None)

    def failed(self, replica: wire.Replica, error: ReplicaError) -> None:
        if isinstance(error, Unreachable | TimedOut):
            self._silent[replica.endpoint] = self._silent.get(replica.endpoint, 0) + 1
        if isinstance(error, ChecksumDiffers | SourceMissing):
            self._bad[replica.did, replica.endpoint] = BadReplica(
                did=replica.did, endpoint=replica.endpoint, path=replica.path, reason=error.message
            )

    def _obstacle(self, replica: wire.Replica) -> str:
        endpoint = self._endpoints.get(replica.endpoint)
        if endpoint is None:
            return "it is not among the endpoints asked for"
        if replica.state != "available":
            return f"the replica is {replica.state}"
        if not endpoint.readable:
            return "it is not readable"
        # A server is asked when its turn comes.
        return self._places.reason(endpoint) if is_folder(endpoint) else ""

    def _rank(self, replica: wire.Replica) -> tuple[bool, bool, bool, bool, bool, str]:
        """The name last, so that the same command does the same."""
        endpoint = self._endpoints.get(replica.endpoint)
        return (
            replica.state != "available",
            self._silent.get(replica.endpoint, 0) > 0,
            endpoint is None or not is_folder(endpoint) or bool(self._places.reason(endpoint)),
            endpoint is None or endpoint.kind != "disk",
            replica.verified_at is None,
            replica.endpoint,
        )
